"""For the first lines of a program, before its slow imports. Imports nothing slow itself."""

import os
import signal


def exit_on_interrupt():
    """Until run_command begins, Ctrl-C ends the program with status 130 and without a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else Ctrl-C is ignored
        signal.signal(signal.SIGINT, exit_now)


def exit_now(*_):
    """The signal handler. A KeyboardInterrupt could come out of an import as any other error."""
    os._exit(130)

"""How a program starts, is launched in several processes, is stopped and ends."""

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from multiprocessing import resource_tracker

import torch
from tqdm import tqdm

from Utils import InputError, RunError, flush_output, rank, say, sum_over_processes


class Stopped(Exception):
    """The run was asked to stop. status: what the program exits with, 130 after SIGINT, else 0."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


# SIGUSR2 as SLURM is asked to; SIGHUP of a terminal that is closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
STOPPING = b"asked to stop: saving where the run can go on from (ask again: at once)\n"


class StopSignal:
    """Inside `with`, a signal asks the run to stop where it can go on from; the same one again, or
    `deadline` seconds without an end, ends the process at once."""

    def __init__(self, deadline=300.0):
        self.deadline, self.signal = deadline, 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in heard()}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()

    def note(self, number, _):
        """The handler."""
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            # Whatever hangs then: it says where, and ends the process.
            faulthandler.dump_traceback_later(self.deadline, exit=True)
            if rank() == 0 and multiprocessing.parent_process() is None:
                with contextlib.suppress(OSError):  # Ctrl-C ends a `| tee`, too
                    os.write(1, STOPPING)  # which is safe in a handler
        elif number == self.signal and time.monotonic() - self.since > 1:
            # Within a second it is the same request, sent to a group and passed on by its parent.
            with contextlib.suppress(OSError):
                os.write(2, b"error: asked to stop again: ended without saving\n")
            os._exit(128 + number)

    def asked(self):
        """Whether this process was asked to stop."""
        return self.signal != 0

    def check(self):
        """Raises Stopped on all processes, which must call it together, where one was asked to
        stop."""
        asked = torch.tensor([self.asked(), self.signal == signal.SIGINT], dtype=torch.int32)
        sum_over_processes(asked)
        if asked[0]:
            raise Stopped("stopped", 130 if asked[1] else 0)


def heard():
    """The stop signals but for SIGHUP under nohup."""
    left = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (left and number == signal.SIGHUP)]


def launch(function, devices, *args):
    """Runs function(*args) in one process per device, by torch's elastic launcher on this machine;
    here and now for one device, or where another launcher (torchrun, srun) has started this
    process."""
    if len(devices) == 1 or "WORLD_SIZE" in os.environ:
        return function(*args)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(devices),
        run_id=secrets.token_hex(4),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        # A stop is passed on, and the processes take their time; the launcher gives them 30 s.
        signals_to_handle="none",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))
    signals = heard()
    for number in signals:
        signal.signal(number, pass_on)
    # The processes inherit this, so that a stop waits until they can deal with it.
    resource_tracker.ensure_running()  # later, it would let the signals in again
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=pass_all_on, args=[signals], daemon=True).start()
    for name in ("distributed.elastic", "multiprocessing"):  # the processes speak for themselves
        logging.getLogger(f"torch.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        try:
            elastic_launch(config, run_child)(function, os.getpid(), f"{folder}/said", *args)
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            if failure.exitcode < 0:
                killed = f"process {number} was ended by signal {-failure.exitcode}"
                fail(f"{killed}; was it short of memory?", 128 - failure.exitcode)
            sys.exit(failure.exitcode)


def pass_on(number, _):
    """Passes a signal on to the processes that this one has started."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)
    with contextlib.suppress(OSError):
        os.write(1, STOPPING)


def pass_all_on(signals):
    """A thread that passes on these signals, which are blocked."""
    while True:
        number = signal.sigwait(signals)
        while not multiprocessing.active_children():  # they are not started yet
            time.sleep(0.1)
        pass_on(number, None)


def run_child(function, parent, said, *args):
    """One process of several; the first that fails says why, by creating the file `said`."""
    tqdm.set_lock(threading.RLock())  # its own, of multiprocessing, would be leaked by the _exit
    threading.Thread(target=end_with, args=[parent], daemon=True).start()
    try:
        run_command(partial(unblocked, function, *args), said)
    except SystemExit as ended:
        if ended.code:  # at once: torch's wrapper waits for its agent, which waits for it
            flush_output()
            os._exit(ended.code)


def unblocked(function, *args):
    """function(*args), with the signals let in that `launch` has blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    function(*args)


def end_with(parent):
    """Ends this process as soon as its parent is no more, killed, for example."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def run_command(command, said=None):
    """Runs a program's function and turns its errors into a line and an exit status: 2 for bad
    input, 1 for a run that can't go on, 130 for an interruption, 0 for a stop that was asked
    for."""
    try:
        command()
    except InputError as error:
        # A loader's worker wraps the message in its traceback; it is the last line.
        fail(str(error).strip().splitlines()[-1].split("ImageError: ")[-1], 2, said)
    except RunError as error:
        fail(error, 1, said)
    except Stopped as stopped:
        say(stopped)
        # Others end well: a launcher would end the first one, too, which has yet to close files.
        sys.exit(stopped.status if rank() == 0 else 0)
    except KeyboardInterrupt:
        fail("interrupted", 130, said)
    except Exception as error:
        if reason := explain(error):
            fail(reason, 1, said)
        if said is None:
            raise
        fail(f"in process {rank()}\n{traceback.format_exc()}", 1, said)
    finally:
        flush_output()


def explain(error):
    """One line about an error of torch that users meet; None for others."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return (
            f"out of memory ({first}); lower --code_bs or --sp (sampling), --mini_bs or raise "
            "--accum (gradient steps), lower --eval_bs or --probe_bs_val (validation)"
        )
    if "Connection closed by peer" in text or "Connection reset by peer" in text:
        return "another process of this run has ended"
    if text.startswith("DataLoader worker"):
        return f"{first}; was it short of memory? Try fewer --num_workers"
    return None


def fail(message, status, said=None):
    """Ends the program with an error; where `said` is a path, only its first caller prints it."""
    with contextlib.suppress(FileExistsError):
        if said is not None:
            os.close(os.open(said, os.O_CREAT | os.O_EXCL))
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
    end_workers()  # one that hangs would keep us from ending
    sys.exit(status)


def end_workers():
    """Ends the loader workers of this process, which leave all gentler signals to it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for workers that end
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def adopt_slurm_step():
    """Describes this task of a SLURM step of several (`srun python ...`) as torchrun would, in the
    environment. Leaves alone what torchrun started, a batch script, an interactive shell."""
    environment = os.environ
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "RANK" in environment or os.isatty(0):
        return
    # node[03-17,20],other -> node03: the step's first host, where its first task runs.
    host = re.sub(r"\[(\w+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = tasks
    environment.setdefault("MASTER_ADDR", host)
    # Of its own for each step, below the ports that systems give away.
    environment.setdefault("MASTER_PORT", str(10000 + (100 * job + step) % 20000))

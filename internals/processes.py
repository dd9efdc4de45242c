"""How a program starts, is launched in several processes, is stopped and ends."""

import contextlib
import errno
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from multiprocessing.util import Finalize

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, start_processes
from tqdm import tqdm

from internals.startup import exit_now
from Utils import InputError, RunError, flush_output, rank, say, sum_over_processes

# SLURM sends SIGUSR2 (we ask it to) before the time limit; a terminal that closes sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


class Stopped(Exception):
    """The run was asked to stop. status: the program's exit status, 130 after SIGINT, else 0."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


class StopSignal:
    """Inside `with`, a stop signal asks the run to save and end. The same signal again ends the
    process at once. A process that has not ended `deadline` seconds later is ended, too."""

    def __init__(self, deadline=300.0):
        self.deadline, self.signal = deadline, 0

    def __enter__(self):
        self.handlers_before = {n: signal.signal(n, self.handle) for n in signals_to_handle()}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()

    def handle(self, number, _):
        """The signal handler."""
        if not self.signal:
            self.signal, self.time = number, time.monotonic()
            # At the deadline, prints where the process hangs and ends it.
            faulthandler.dump_traceback_later(self.deadline, exit=True)
            if rank() == 0 and multiprocessing.parent_process() is None:
                announce_stop()
        elif number == self.signal and time.monotonic() - self.time > 1:
            # Within one second it is the same request: sent to all processes, and forwarded, too.
            with contextlib.suppress(OSError):
                os.write(2, b"error: asked to stop again: ended without saving\n")
            os._exit(128 + number)

    def asked(self):
        """Whether this process was asked to stop."""
        return self.signal != 0

    def check(self):
        """Raises Stopped on all processes if any process was asked to stop. All processes must
        call this together."""
        asked = torch.tensor([self.asked(), self.signal == signal.SIGINT], dtype=torch.int32)
        sum_over_processes(asked)
        if asked[0]:
            raise Stopped("stopped", 130 if asked[1] else 0)


def signals_to_handle():
    """The stop signals; without SIGHUP under nohup, which makes processes ignore SIGHUP."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]


def announce_stop():
    """Tells the user that the run will stop. Uses os.write, which is safe in a signal handler."""
    message = "asked to stop: saving, so that the run can go on later (a second signal ends it now)"
    with contextlib.suppress(OSError):  # Ctrl-C may have ended the reader of our output, too
        os.write(1, f"{message}\n".encode())


# -------------------------------------------------------------------------------------------------
# Several processes.


def launch(function, devices, *args):
    """Runs function(*args) in one process per device of this machine. With one device, or under
    another launcher (torchrun, srun), calls the function directly."""
    if len(devices) == 1 or "WORLD_SIZE" in os.environ:
        return function(*args)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))
    # Made before the signals are blocked: it starts Python's resource tracker, which unblocks some.
    error_lock = multiprocessing.get_context("spawn").Lock()
    with tempfile.TemporaryDirectory() as folder:
        # The new processes inherit the blocked signals. So a stop waits until run_command.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        child_args = (len(devices), f"{folder}/rendezvous", error_lock, function, args)
        processes = start_processes(run_child, child_args, nprocs=len(devices), join=False)
        for number in signals_to_handle():
            signal.signal(number, forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            # After a failure, the other processes get 10 s to end, then SIGTERM, then SIGKILL.
            while not processes.join(grace_period=10):
                pass
        except ProcessExitedException as error:
            if error.exit_code > 0:  # the process has said why
                sys.exit(error.exit_code)
            hint = "; was it short of memory?" if error.exit_code == -signal.SIGKILL else ""
            killed = f"process {error.error_index} was ended by signal {-error.exit_code}{hint}"
            fail(killed, 128 - error.exit_code)


def forward(number, _):
    """The launching process's signal handler: forwards each stop signal to the processes."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)
    announce_stop()


def run_child(number, world_size, rendezvous_file, error_lock, function, args):
    """Runs function(*args) in process `number` of `launch`."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world_size)}
    os.environ["INIT_METHOD"] = f"file://{rendezvous_file}?rank={number}&world_size={world_size}"
    tqdm.set_lock(threading.RLock())  # tqdm's default lock is reported as leaked after a kill
    threading.Thread(target=end_with_parent, daemon=True).start()
    run_command(lambda: function(*args), error_lock)


def end_with_parent():
    """Ends this process as soon as the launching process has ended, for example by SIGKILL. Our own
    code, as torch does so on Linux only, by a SIGINT that a process may not be able to handle."""
    multiprocessing.parent_process().join()
    os._exit(1)


def ignore_stop_signals(_):
    """A DataLoader's worker_init_fn. Workers ignore stop signals; the main process ends them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@cache
def end_workers_at_exit():
    """Makes this process kill its workers when it exits. Python would send them SIGTERM, which they
    ignore, and wait."""
    Finalize(None, end_workers, exitpriority=10)


def end_workers():
    """Kills the loader workers of this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


# -------------------------------------------------------------------------------------------------
# Errors and exit statuses.


def run_command(command, error_lock=None):
    """Calls command() and turns its errors into one line and an exit status: 2 for bad input, 1 for
    a run that can't go on, 130 after an interruption, 0 after a stop. error_lock: see fail."""
    try:
        if signal.getsignal(signal.SIGINT) == exit_now:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        open_streams()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # which `launch` has blocked
        command()
        if dist.is_initialized():  # else NCCL warns when the process ends
            dist.destroy_process_group()
    except InputError as error:
        # From a loader worker, the message is the last line of a traceback.
        fail(str(error).strip().splitlines()[-1].split("ImageError: ")[-1], 2, error_lock)
    except RunError as error:
        fail(error, 1, error_lock)
    except Stopped as stopped:
        say(stopped)
        # The first process still has files to close. A launcher would end it if another process
        # ended with a non-zero status before.
        sys.exit(stopped.status if rank() == 0 else 0)
    except KeyboardInterrupt:
        fail("interrupted", 130, error_lock)
    except Exception as error:
        if reason := explain(error):
            fail(reason, 1, error_lock)
        if error_lock is None:
            raise
        fail(f"in process {rank()}\n{traceback.format_exc()}", 1, error_lock)
    finally:
        flush_output()


def open_streams():
    """Opens /dev/null in place of closed standard streams, whose numbers another file could get.
    The open ones print names that they can't encode with escapes."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's stream prints anything
            stream.reconfigure(errors="backslashreplace")


def explain(error):
    """One line for an error that users may meet; None for any other error."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if "</torch_" in text or "out of shared memory" in text:  # from a worker, in a traceback
        return (
            "the shared memory /dev/shm, by which loader workers send images, is full or can't be "
            "used: give it more (docker run --shm-size 1g), or use --num_workers 0 or fewer workers"
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return (
            f"out of memory ({first}); lower --code_bs or --sp (sampling; with --sampler surrogate "
            "also --ns), --mini_bs or raise --accum (gradient steps), lower --eval_bs or "
            "--probe_bs_val (validation), --batch_size (fine-tuning)"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"a file could not be written ({first})"
    if "Connection closed by peer" in text or "Connection reset by peer" in text:
        return "another process of this run has ended"
    if text.startswith("DataLoader worker"):
        return f"{first}; was it short of memory? Try fewer --num_workers"
    return None


def fail(message, status, error_lock=None):
    """Prints an error and exits. error_lock: shared by the processes of `launch`; only the first
    process that fails can acquire it, and only that one prints."""
    if error_lock is None or error_lock.acquire(block=False):
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
    end_workers()  # a worker that hangs would keep this process from ending
    sys.exit(status)


def adopt_slurm_step():
    """Sets the environment variables that torchrun would set, where `srun` has started this process
    as one of several tasks. Changes nothing under torchrun, in a batch script or in a shell."""
    environment = os.environ
    n_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if n_tasks == "1" or "RANK" in environment or os.isatty(0):
        return
    # The step's first host, where its first task runs: node[03-17,20],other -> node03.
    host = re.sub(r"\[(\w+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = n_tasks
    environment.setdefault("MASTER_ADDR", host)
    # Each step has its own port, below the ports that systems give to outgoing connections.
    environment.setdefault("MASTER_PORT", str(10000 + (100 * job + step) % 20000))

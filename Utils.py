"""Small things that everything rests on: seeded random numbers, the learning-rate schedule, devices
and processes."""

import contextlib
import errno
import faulthandler
import logging
import math
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
from enum import IntEnum
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as a signed 64-bit number


class InputError(Exception):
    """A mistake in what the user gave. Its message is one line, with which the command ends (exit
    status 2)."""


@contextlib.contextmanager
def naming(flag):
    """Puts a flag's name in front of an InputError from inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None


class RunError(Exception):
    """A run that can't go on; its message says why."""


class Stream(IntEnum):
    """What random numbers are for: each purpose draws from a stream of its own."""

    POOL, MINIBATCH, IMAGE, MASK, CODE, EVALUATION, FEW_SHOT, PROBE = range(8)


# -------------------------------------------------------------------------------------------------
# Random numbers as a pure function of seeds: the same on every device, for every number of workers
# and processes.


def splitmix(x):
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): int64 tensor -> int64 tensor, well
    mixed."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & 2**33 - 1)


def mix_seeds(*parts):
    """One int64 seed from integers or int64 tensors, which broadcast; their order matters."""
    seed = torch.zeros((), dtype=torch.int64)
    for part in parts:
        seed = splitmix((seed ^ part) + GOLDEN)
    return seed


def random_bits(seeds, counters):
    """The random 64 bits with these numbers, from 0, of each seed's sequence: int64 tensors that
    broadcast -> int64."""
    return splitmix(seeds + (counters + 1) * GOLDEN)


def random_uniform(seeds, n):
    """seeds (N,) int64 -> float32 (N, n) in [0, 1)."""
    bits = random_bits(seeds[:, None], torch.arange(n, device=seeds.device))
    return (bits >> 40 & 2**24 - 1).float() * 2**-24


def random_normal(seeds, counters):
    """Standard normal numbers, float32, by random_bits of seeds and counters (Box-Muller)."""
    bits = random_bits(seeds, counters)
    radius = ((bits >> 32 & 2**32 - 1) + 1).float().mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 2**32 - 1).float().mul_(2 * math.pi * 2**-32)
    return radius * angle.cos_()


def permutation(n, seed):
    """A random order of range(n), int64 on the CPU, a pure function of the seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(seed)))


@contextlib.contextmanager
def seeded(seed):
    """Code inside draws from torch's CPU generator as seeded here; the generator's state comes back
    afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(int(seed))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


# -------------------------------------------------------------------------------------------------


def learning_rate(step, *, base, minimum, start, ramp, total, cycles=0):
    """The rate for gradient step `step` (from 0): 0 before `start`, then a linear ramp of `ramp`
    steps up to `base`, then `cycles` equal cosine cycles down to `minimum` that end at `total`, or
    `base` throughout where cycles is 0."""
    step = step - start
    if step < 0:
        return 0.0
    if step < ramp:
        return minimum + (base - minimum) * (step + 1) / ramp
    if not cycles:
        return base
    share = (step - ramp) * cycles / (total - start - ramp) % 1
    return minimum + (base - minimum) * (1 + math.cos(math.pi * share)) / 2


# -------------------------------------------------------------------------------------------------
# Devices and processes. Without a process group everything here does the natural thing for one
# process.


def fastest_dtype(device):
    """The lowest precision that the device computes natively, by its type: bfloat16, float16 or
    float32."""
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    features = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    native = features.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def choose_dtype(name, device):
    """--sample_dtype as a torch.dtype, for a device."""
    return fastest_dtype(device) if name == "auto" else getattr(torch, name)


def autocast(device, dtype):
    """Mixed precision in `dtype` on `device`; nothing at all for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def rank():
    """This process's number among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(*tensors):
    """Adds up each tensor over all processes, in place. Where every process fills rows of its own
    and the others hold zeros, this is an exact gather."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first_process(value):
    """The value that the first process has."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


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


def join_processes(devices):
    """Joins the process group that the launcher prepared in the environment; the device of this
    process, which is devices[its number on this machine]."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(devices[local_rank % len(devices)])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


# -------------------------------------------------------------------------------------------------
# Lines for people, and files.


def say(text):
    """Prints a line on the first process, above any progress bar. Whether it can be printed, on a
    full disk or to a terminal that is gone, is nothing to the run."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            tqdm.write(str(text), file=sys.stdout)
        flush_output()


def flush_output():
    """Lets standard output go where it can go; what nobody can read any more is dropped."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def write_atomically(path, content):
    """Writes bytes, or what `content(file)` writes: all of it or, whatever happens, nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# How a program starts and ends.


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

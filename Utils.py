"""Small things that everything rests on: seeded random numbers, the learning-rate schedule, devices
and processes."""

import contextlib
import errno
import math
import os
import resource
import secrets
import sys
import time
from enum import IntEnum
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
    """Seeds torch's CPU generator for the code inside, and restores its state afterwards.
    torch.random.fork_rng would make loading an image 28 pixels wide 8 % slower."""
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


def max_over_processes(*tensors):
    """Takes the maximum of each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)


def from_first_process(value):
    """The value that the first process has."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


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


def watch(items, description, total, unit="images", after_each=None):
    """Passes items on, with a progress bar: chunks (rows, images), of which images are counted, or,
    for another unit, anything, counted by one. Each time that one is dealt with, calls
    after_each(start time, number done by this process)."""
    shown = rank() == 0 and sys.stderr.isatty()
    bar = tqdm(desc=description, total=total, unit=f" {unit}", disable=not shown, leave=False)
    start, done = None, 0
    with bar:
        for item in items:
            start = start or time.perf_counter()  # the loader's workers have started
            yield item
            number = len(item[1]) if unit == "images" else 1
            bar.update(number * world_size() if unit == "images" else number)
            done += number
            if after_each is not None:
                after_each(start, done)


class Forecast:
    """Says once, after the first chunk of sampling (and a second, to be past the start-up), how
    long the run's sampling will take and what memory it holds."""

    def __init__(self, device, images_left):
        self.device, self.images_left = device, images_left

    def __call__(self, start, images):
        if not self.images_left:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        if seconds < 1 and images * world_size() < self.images_left:
            return
        left = duration(seconds / images * self.images_left / world_size())
        say(f"sampling will take about {left} of this run; memory: {memory(self.device)}")
        self.images_left = 0


def memory(device):
    """The most memory that this process has held, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB on the GPU"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, else KB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB"


def duration(seconds):
    """Seconds as 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def first_line(error):
    """An error's message, cut to one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]

"""Helpers for all modules: errors, seeded random numbers, the learning-rate schedule, devices and
processes, printing, writing files."""

import contextlib
import errno
import math
import os
import resource
import secrets
import sys
import time
import warnings
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as a signed 64-bit number


class InputError(Exception):
    """Bad input from the user. Its message is one line: the command prints it and ends with exit
    status 2."""


@contextlib.contextmanager
def naming(flag):
    """Inside `with`, adds a flag's name to the front of an InputError's message."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None


class RunError(Exception):
    """The run can't go on. Its message says why: the command prints it and ends with status 1."""


class Stream(IntEnum):
    """The purposes of random numbers. Each purpose has its own stream of random numbers."""

    POOL, MINIBATCH, IMAGE, MASK, CODE, EVALUATION, FEW_SHOT, PROBE = range(8)


# -------------------------------------------------------------------------------------------------
# Random numbers as pure functions of seeds: they do not depend on the device or on the number of
# workers and processes.


def splitmix(x):
    """Mixes the bits of an int64 tensor: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & 2**33 - 1)


def mix_seeds(*parts):
    """Combines integers or int64 tensors, which broadcast, into one int64 seed. The order of the
    parts matters."""
    seed = torch.zeros((), dtype=torch.int64)
    for part in parts:
        seed = splitmix((seed ^ part) + GOLDEN)
    return seed


def random_bits(seeds, counters):
    """Element number `counters` (from 0) of each seed's sequence of random int64 numbers. Both are
    int64 tensors, which broadcast."""
    return splitmix(seeds + (counters + 1) * GOLDEN)


def random_uniform(seeds, n):
    """n random numbers in [0, 1) per seed: seeds (N,) int64 -> float32 (N, n)."""
    bits = random_bits(seeds[:, None], torch.arange(n, device=seeds.device))
    return (bits >> 40 & 2**24 - 1).float() * 2**-24


def random_normal(seeds, counters):
    """Random numbers from the standard normal distribution, float32 (Box-Muller). The arguments are
    those of random_bits."""
    bits = random_bits(seeds, counters)
    radius = ((bits >> 32 & 2**32 - 1) + 1).float().mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 2**32 - 1).float().mul_(2 * math.pi * 2**-32)
    return radius * angle.cos_()


def permutation(n, seed):
    """A random order of range(n): int64 (n,) on the CPU. A pure function of the seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(seed)))


@contextlib.contextmanager
def seeded(seed):
    """Inside `with`, torch's CPU generator starts from this seed. Its previous state is restored
    afterwards. torch.random.fork_rng would load an image of 28 pixels 8 % slower."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(int(seed))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


# -------------------------------------------------------------------------------------------------
# The learning-rate schedule.


def learning_rate(step, *, base, minimum, start, ramp, total, cycles=0, ramp_from_minimum=False):
    """The learning rate for gradient step `step` (from 0): 0 before step `start`; then a linear
    ramp of `ramp` steps from `minimum` to `base`; then `cycles` equal cosine cycles down to
    `minimum`, which end at step `total`, or `base` if cycles is 0.

    The ramp's last step has the rate `base`; with ramp_from_minimum, as in MAE's linear probe, its
    first step has the rate `minimum` instead."""
    step = step - start
    if step < 0:
        return 0.0
    if step < ramp:
        return minimum + (base - minimum) * (step + (not ramp_from_minimum)) / ramp
    if not cycles:
        return base
    share = (step - ramp) * cycles / (total - start - ramp) % 1
    return minimum + (base - minimum) * (1 + math.cos(math.pi * share)) / 2


# -------------------------------------------------------------------------------------------------
# Devices and processes. Without a process group, these functions treat the program as one process.


def default_device():
    """The first CUDA GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fastest_dtype(device):
    """The shortest float type that the device computes natively: bfloat16, float16 or float32."""
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    features = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    native = features.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def choose_dtype(name, device):
    """The torch.dtype for a value of --sample_dtype: "auto" means the device's fastest."""
    return fastest_dtype(device) if name == "auto" else getattr(torch, name)


def autocast(device, dtype):
    """A context of mixed precision in `dtype`; without effect for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(*tensors):
    """Sums each tensor over all processes, in place. An exact gather, if each row is non-zero on at
    most one process."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def max_over_processes(*tensors):
    """Takes the maximum of each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)


def from_first_process(value):
    """Returns the first process's value on all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def join_processes(devices):
    """Joins the process group that the launcher described in environment variables. Returns this
    process's device: devices[LOCAL_RANK]."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(devices[local_rank % len(devices)])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # `launch` sets INIT_METHOD; without it, the processes meet at MASTER_ADDR:MASTER_PORT.
        store, number, size = next(rendezvous(os.environ.get("INIT_METHOD", "env://")))
        # After a restart, torchrun's store still has the addresses of processes that have ended.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size)
        # For parts of one image: the strides of the class token's gradient differ, not its numbers.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return device


# -------------------------------------------------------------------------------------------------
# Printing, and writing files.


def say(text):
    """Prints a line on the first process, above any progress bar. Ignores a failure to print (full
    disk, closed terminal), so that the run goes on. Before the processes of torchrun or srun join,
    RANK is the number of a process."""
    if (rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0:
        with contextlib.suppress(OSError):
            tqdm.write(str(text), file=sys.stdout)
        flush_output()


def drawable(text):
    """The text with escapes for what is not valid Unicode, which names of files may hold."""
    return str(text).encode(errors="backslashreplace").decode()


def printable(text):
    """Like `drawable`, on one line."""
    return drawable(text).replace("\n", "\\n")


def flush_output():
    """Flushes standard output. If its reader has gone, sends all further output to /dev/null."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def write_atomically(path, content):
    """Writes a file completely or not at all. content: bytes, or a function content(file) that
    writes them."""
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
    """Yields items and shows a progress bar. With unit "images", items are pairs (rows, images) and
    the bar counts images; else the bar counts items. After each item, calls after_each(start time,
    count of this process)."""
    shown = rank() == 0 and sys.stderr.isatty()
    bar = tqdm(desc=description, total=total, unit=f" {unit}", disable=not shown, leave=False)
    start, done = None, 0
    with bar:
        for item in items:
            start = start or time.perf_counter()  # without the time that the workers take to start
            yield item
            number = len(item[1]) if unit == "images" else 1
            bar.update(number * world_size() if unit == "images" else number)
            done += number
            if after_each is not None:
                after_each(start, done)


class Forecast:
    """Prints once how long the run's sampling will take and how much memory it uses. For `watch`,
    as after_each: prints at the first chunk that ends after one second."""

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


def total_memory(device):
    """The memory of a device in bytes; of a CPU: what this container may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # there is no limit, or it is "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def memory(device):
    """The peak memory of this process, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB on the GPU"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS reports bytes, Linux KB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB"


def duration(seconds):
    """Formats seconds: 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def first_line(error):
    """The first line of an error's message, at most 200 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]

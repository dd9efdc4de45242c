"""Helpers of the benchmarks: timing candidates in turns, counting operations, memory, tables."""

import ctypes
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Table:
    """Rows to print and to write; columns: key of a row -> (heading, format)."""

    title: str
    columns: dict
    rows: list
    notes: list = field(default_factory=list)


def interleaved(candidates, repeats, device=None, warmup=1):
    """The median seconds of each candidate in {name: callable}. The candidates run in turns, so
    that a slow moment of the machine hits all alike: `warmup` rounds, then `repeats` timed ones."""
    seconds = {name: [] for name in candidates}
    for round_number in range(warmup + repeats):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def flops(run):
    """The floating-point operations of a call's matrix products and attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def matmul(model, dtype, dim=None):
    """A callable that computes 16 times the decoder's widest matrix product for the tokens of 32
    completions; dim: another width than the decoder's."""
    dim, device = dim or model.config.decoder_dim, model.pos_embed.device
    tokens = torch.randn(32 * model.pos_embed.shape[1], dim, device=device).to(dtype)
    weights = torch.randn(4 * dim, dim, device=device).to(dtype)
    out = torch.empty(len(tokens), len(weights), device=device, dtype=dtype)

    def run():
        for _ in range(16):
            torch.mm(tokens, weights.T, out=out)

    return run


def added_memory(run, device):
    """The peak memory in GB that a call adds: torch's on a GPU, the process's on Linux; None on
    other systems."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - before


def process_memory(name):
    """A field of /proc/self/status in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**20


def describe(device):
    """The name of a device, for titles."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"


def name_of(dtype):
    """The name of a torch.dtype: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

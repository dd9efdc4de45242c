"""a gradient step: the plain way, ours in float32, and ours in a run's mixed precision"""

import copy
from functools import partial

import torch

from Data import Batch, Pool
from IO import whole
from Models import PRESETS, parameter_groups
from TrainIMLE import train_step
from Utils import fastest_dtype

from .plain import plain_losses, plain_model
from .sampling import random_model
from .timing import Table, added_memory, describe, flops, interleaved, matmul, name_of

COLUMNS = {
    "name": ("gradient step", "{}"),
    "images_per_sec": ("images/s", "{:,.2f}"),
    "ratio_to_plain": ("x plain", "{:.2f}"),
    "share_of_matmul": ("of matmul", "{:.0%}"),
    "added_memory_gb": ("+ GB", "{:.2f}"),
}


def add_flags(parser):
    """Adds the benchmark's flags."""
    add = parser.add_argument
    add("--arch", choices=PRESETS, default="vit_base", help="default: vit_base")
    add("--input_size", type=whole(1), default=224, metavar="PIXELS", help="side of the images")
    add("--mini_bs", type=whole(1), metavar="IMAGES", help="per step; default: CPU 8, GPU 64")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--repeats", type=whole(1), default=5, metavar="N", help="rounds that are timed")


def measure(args):
    """Yields the Table of gradient steps, optimizer included, with random weights of --arch."""
    device = torch.device(args.device)
    n = args.mini_bs or (8 if device.type == "cpu" else 64)
    model, (_, mask_noise, seeds) = random_model(args, n, device)
    low = fastest_dtype(device)
    images = torch.randint(0, 256, (n, 3, *model.config.image_size), dtype=torch.uint8)
    codes = model.sample_codes(seeds, 1)[:, 0].cpu()
    rows = torch.arange(n)
    pool = Pool(None, 0, rows, rows, mask_noise.cpu(), images, shuffle=True, seed=0)
    batch = Batch(pool, rows, codes, rows, step=0)
    steps = {
        "plain, float32": plain_step(model, batch, device),
        "ours, float32": our_step(copy.deepcopy(model), batch, device, torch.float32),
        f"ours, {name_of(low)} autocast": our_step(model, batch, device, low),
    }
    products = {dtype: matmul(model, dtype) for dtype in (torch.float32, low)}
    seconds = interleaved({**steps, **products}, args.repeats, device)
    table = []
    for name, step in steps.items():
        dtype = torch.float32 if "float32" in name else low
        rate = flops(products[dtype]) / seconds[dtype]
        table.append(
            {
                "name": name,
                "images_per_sec": n / seconds[name],
                "ratio_to_plain": seconds["plain, float32"] / seconds[name],
                "share_of_matmul": flops(step) / seconds[name] / rate,
                "added_memory_gb": added_memory(step, device),
                "arch": args.arch,
                "mini_bs": n,
                "device": describe(device),
            }
        )
    yield Table(f"Training: {args.arch}, {n} images a step, on {describe(device)}", COLUMNS, table)


def plain_step(model, batch, device):
    """The original's step: decodes all tokens, unfused attention, AdamW parameter by parameter."""
    model = plain_model(model, fused=False)
    groups = parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, foreach=False, fused=False)

    def step():
        optimizer.zero_grad()
        plain_losses(model, *batch.to(device)).mean().backward()
        optimizer.step()

    return step


def our_step(model, batch, device, dtype):
    """One train_step of a run, as a callable."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    options = {
        "optimizer": optimizer,
        "scaler": scaler,
        "batch_size": len(batch.rows),
        "parts": 1,
        "dtype": dtype,
        "masking": {},
        "clip_grad": 0.0,
    }
    return partial(train_step, model, batch, {"mae": 1e-4, "z": 1e-4}, **options)

"""a gradient step: the plain way, ours, and ours as a run does it, in mixed precision"""

import copy
from functools import partial

import torch

from Augmentation import normalize
from Data import Batch
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
    """The benchmark's flags."""
    add = parser.add_argument
    add("--arch", choices=PRESETS, default="vit_base", help="default: vit_base")
    add("--input_size", type=whole(1), default=224, metavar="PIXELS", help="side of the images")
    add("--mini_bs", type=whole(1), metavar="IMAGES", help="default: CPU 8, GPU 64")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--repeats", type=whole(1), default=5, metavar="N", help="rounds that count")


def measure(args):
    """Yields the Table of gradient steps, optimizer included, by random weights at --arch."""
    device = torch.device(args.device)
    n = args.mini_bs or (8 if device.type == "cpu" else 64)
    model, (_, mask_noise, seeds) = random_model(args, n, device)
    low = fastest_dtype(device)
    images = torch.randint(0, 256, (n, 3, *model.config.image_size), dtype=torch.uint8)
    numbers = torch.zeros(n, dtype=torch.int64)
    batch = Batch(images.to(device), mask_noise.cpu(), seeds.cpu(), numbers, step=0, names=None)
    steps = {
        "plain, float32": plain_step(model, batch),
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


def plain_step(model, batch):
    """A step as the original's: all tokens decoded, attention written out, torch's plain AdamW."""
    codes = model.sample_codes(batch.seeds.to(batch.images.device), 1)
    mask_noise = batch.mask_noise.to(codes.device)
    model = plain_model(model, fused=False)
    groups = parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, foreach=False, fused=False)

    def step():
        optimizer.zero_grad()
        plain_losses(model, normalize(batch.images), mask_noise, codes).mean().backward()
        optimizer.step()

    return step


def our_step(model, batch, device, dtype):
    """train_step, as a run calls it."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rates = {"mae": 1e-4, "z": 1e-4}
    return partial(
        train_step,
        model,
        batch,
        optimizer,
        scaler,
        rates,
        images_per_step=len(batch.images),
        dtype=dtype,
    )

"""linear probes: speed of features, cost of ten heads, the fast probe's head against a loader"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from internals.encoders import image_features
from internals.heads import Head, Heads, lars, train_step
from IO import whole
from LinearProbe import linear_probe
from Models import PRESETS, in_precision
from Utils import fastest_dtype, learning_rate

from .sampling import random_model
from .timing import Table, added_memory, describe, flops, interleaved, matmul, name_of

FEATURES = {
    "name": ("features", "{}"),
    "images_per_sec": ("images/s", "{:,.1f}"),
    "share_of_matmul": ("of matmul", "{:.0%}"),
    "added_memory_gb": ("+ GB", "{:.2f}"),
}
FULL = {
    "name": ("full probe", "{}"),
    "images_per_sec": ("images/s", "{:,.1f}"),
    "ratio_to_one_head": ("time, x one head", "{:.3f}"),
}
FAST = {
    "name": ("head of the fast probe", "{}"),
    "features_per_sec": ("features/s", "{:,.0f}"),
    "ratio_to_loader": ("x loader", "{:.1f}"),
    "top1": ("top-1", "{:.3f}"),
}


def add_flags(parser):
    """Declares the benchmark's flags. Default sizes depend on the device."""
    add = parser.add_argument
    add("--arch", choices=PRESETS, default="vit_base", help="network; default: vit_base")
    add("--input_size", type=whole(1), default=224, metavar="PIXELS", help="side of the images")
    add(
        "--images",
        type=whole(2),
        metavar="N",
        help="images per pass and step; default: 16 on a CPU, 256 on a GPU",
    )
    add("--classes", type=whole(2), default=1000, metavar="N", help="classes of the full probe")
    add("--num_workers", type=whole(1), default=2, metavar="N", help="loader workers for features")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--repeats", type=whole(1), default=3, metavar="N", help="rounds that are timed")


def measure(args):
    """Yields the Tables, measured with random weights and random images."""
    device = torch.device(args.device)
    n = args.images or (16 if device.type == "cpu" else 256)
    model, (_, _, seeds) = random_model(args, n, device)
    images = torch.randint(0, 256, (n, 3, *model.config.image_size), dtype=torch.uint8)
    images, low = images.to(device), fastest_dtype(device)
    where = f"{args.arch}, {n} images, on {describe(device)}"
    yield Table(f"Features: {where}", FEATURES, features_rows(args, model, images, seeds, low))
    model = in_precision(model, low)
    yield Table(f"Full probe: {where}", FULL, full_rows(args, model, images, seeds))
    yield Table(f"Fast probe: on {describe(device)}", FAST, fast_rows(args, device))


def features_rows(args, model, images, seeds, low):
    """Speed and memory of features, in float32 and in the precision that probes use."""
    passes, products = {}, {}
    for dtype in dict.fromkeys((torch.float32, low)):
        ready = in_precision(model, dtype)
        passes[dtype] = partial(image_features, ready, images, seeds, ("mean",), 0)
        products[name_of(dtype)] = matmul(model, dtype, dim=model.config.dim)
    seconds = interleaved({**passes, **products}, args.repeats, images.device)
    return [
        {
            "name": name_of(dtype),
            "images_per_sec": len(images) / seconds[dtype],
            "share_of_matmul": flops(run)
            / seconds[dtype]
            / (flops(products[name_of(dtype)]) / seconds[name_of(dtype)]),
            "added_memory_gb": added_memory(run, images.device),
        }
        for dtype, run in passes.items()
    ]


def full_rows(args, model, images, seeds):
    """Time of a full probe's gradient step, features included, with one head and with ten."""
    labels = torch.randint(0, args.classes, (len(images),), device=images.device)

    def step(heads, optimizer):
        features = image_features(model, images, seeds, ("cls",), 0)
        train_step(heads, optimizer, features, labels, rate=0.1)

    candidates = {}
    for name, count in {"one head": 1, "ten heads": 10}.items():
        specs = [Head("cls", 0.1 * (1 + i), 0.0) for i in range(count)]
        heads = Heads(specs, ("cls",), args.classes, model.config.dim).to(images.device)
        candidates[name] = partial(step, heads, lars(heads, specs, len(images)))
    seconds = interleaved(candidates, args.repeats, images.device)
    return [
        {
            "name": name,
            "images_per_sec": len(images) / seconds[name],
            "ratio_to_one_head": seconds[name] / seconds["one head"],
        }
        for name in candidates
    ]


def fast_rows(args, device, n=1600, n_classes=32, dim=768, epochs=10):
    """The fast probe's head with default flags, and the same head trained with a DataLoader."""
    centres = 0.16 * torch.randn(n_classes, dim)
    (x, y), test = (
        (centres[labels] + torch.randn(n, dim), labels)
        for labels in (torch.randint(0, n_classes, (n,)) for _ in range(2))
    )
    loader = DataLoader(
        TensorDataset((x - x.mean(0)) / x.std(0), y),
        batch_size=16,
        shuffle=True,
        num_workers=args.num_workers,
        persistent_workers=True,
    )
    accuracies, on_device = {}, [tensor.to(device) for tensor in (x, y, *test)]

    def ours():
        accuracies["ours"] = linear_probe(*on_device, epochs=epochs)["top1"]

    def plain():
        head, step, steps = torch.nn.Linear(dim, n_classes, device=device), 0, epochs * len(loader)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.01)
        for _ in range(epochs):
            for features, labels in loader:
                optimizer.param_groups[0]["lr"] = learning_rate(
                    step, base=1e-3, minimum=0, start=0, ramp=steps // 10, total=steps, cycles=1
                )
                optimizer.zero_grad()
                F.cross_entropy(head(features.to(device)), labels.to(device)).backward()
                optimizer.step()
                step += 1
        inputs = ((test[0] - x.mean(0)) / x.std(0)).to(device)
        right = head(inputs).argmax(1) == test[1].to(device)
        accuracies[f"loader, {args.num_workers} workers"] = right.double().mean().item()

    candidates = {f"loader, {args.num_workers} workers": plain, "ours": ours}
    seconds = interleaved(candidates, args.repeats, device)
    first = next(iter(candidates))
    return [
        {
            "name": name,
            "features_per_sec": n * epochs / seconds[name],
            "ratio_to_loader": seconds[first] / seconds[name],
            "top1": accuracies[name],
        }
        for name in candidates
    ]

"""Draws one epoch of IMLE with the functions that training calls: masks, the losses of an image's
codes, the chosen codes, and the effect of gradient steps. docs/how_it_works.md shows the pictures.

python scripts/how_it_works.py demo/imle_mnist.pt"""

import math
from pathlib import Path
from typing import NamedTuple

import _path  # noqa: F401 (makes the modules importable)
import numpy as np
import torch

import Data
import Models
import TrainIMLE
from Augmentation import normalize, transforms
from internals.plots import picture_grid, saved_figure
from internals.processes import run_command
from internals.weights import SOURCES, load_model
from IO import Parser, check_mask_ratio, real, whole
from Samplers import image_losses, sort_keys, try_codes
from Utils import InputError

SHOWN = 6  # images in the picture of masks
ROWS = 3  # images in the picture of codes
CODES_PER_PASS = 16
BATCH = 32


class Epoch(NamedTuple):
    """A pool of n images, all loaded."""

    pool: Data.Pool
    loader: Data.ImageLoader
    images: torch.Tensor  # (n, 3, H, W) normalised
    mask_noise: torch.Tensor  # (n, L)


def open_epoch(path, size, model, seed):
    """The first Epoch of a run on the data at `path`, of `size` images."""
    images, n_patches = Data.open_images(path), math.prod(model.config.grid)
    pool = Data.draw_pool(images, size, 0, n_patches=n_patches, seed=seed)
    transform = transforms(model.config.image_size, False)[0]
    loader = Data.ImageLoader(images, transform, num_workers=0)
    pixels = torch.cat([part for _, part in loader.chunks(pool.indices, pool.seeds, BATCH)])
    return Epoch(pool, loader, normalize(pixels), pool.mask_noise(slice(None)))


@torch.no_grad()
def losses_of_codes(model, epoch, n_codes, mask_ratio):
    """For an Epoch's images the losses of all codes (n, n_codes) and the loss without code (n,)."""
    parts = []
    tensors = (epoch.images, epoch.mask_noise, epoch.pool.seeds)
    for images, mask_noise, seeds in zip(*(x.split(BATCH) for x in tensors), strict=True):
        prefix = model.prefix(images, mask_noise, mask_ratio)
        numbers = torch.arange(n_codes).expand(len(images), -1)
        _, losses = try_codes(model, prefix, images, seeds, numbers, CODES_PER_PASS)
        plain = image_losses(model, model.suffix(prefix, None), images, prefix.mask)
        parts.append((losses, plain))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def draw_masks(model, epoch, mask_ratio, path):
    """Draws some images of an Epoch, and what the network sees of them."""
    images, noise = epoch.images[:SHOWN], epoch.mask_noise[:SHOWN]
    cells = Models.completions(model, images, noise, None, mask_ratio)[:, :2].transpose(0, 1)
    about = f"Above: {SHOWN} images of a pool. Below: what the network sees of them."
    picture_grid(cells.contiguous(), [""] * SHOWN, about).save(path)


def draw_codes(model, epoch, losses, plain, mask_ratio, path):
    """Draws, for some images, completions by the worst, middle and best code and without code; and
    the distribution of all codes' losses."""
    n_codes = losses.shape[1]
    order = sort_keys(losses[:ROWS]).argsort(1)
    numbers = torch.stack([order[:, -1], order[:, n_codes // 2], order[:, 0]], dim=1)
    images, noise = epoch.images[:ROWS], epoch.mask_noise[:ROWS]
    codes = model.numbered_codes(epoch.pool.seeds[:ROWS], numbers)
    coded = Models.completions(model, images, noise, codes, mask_ratio)
    alone = Models.completions(model, images, noise, None, mask_ratio)
    cells = torch.cat([coded[:, :2], alone[:, 2:], coded[:, 2:]], dim=1).movedim(2, -1).numpy()
    titles = ["image", "masked", "no code", "worst code", "middle code", "chosen code"]
    with saved_figure(path, (13, 2.1 * ROWS), dpi=80) as figure:
        panels = figure.subplots(ROWS, 7, width_ratios=[1] * 6 + [2.6])
        for row in range(ROWS):
            shown = [None, None, plain[row], *losses[row, numbers[row]]]
            for axes, cell, title, loss in zip(
                panels[row], cells[row], titles, shown, strict=False
            ):
                axes.imshow(cell)
                axes.set(xticks=[], yticks=[])
                if not row:
                    axes.set_title(title, fontsize=10)
                if loss is not None:
                    axes.set_xlabel(f"loss {loss:.2f}", fontsize=9)
            histogram = panels[row, -1]
            histogram.hist(losses[row].numpy(), bins=24, color="C7")
            marks = {
                "without code": plain[row],
                "mean": losses[row].mean(),
                "chosen": losses[row].min(),
            }
            for number, (label, value) in enumerate(marks.items()):
                histogram.axvline(value, color=f"C{number}", label=label)
            if not row:
                histogram.set_title(f"losses of the {n_codes} codes", fontsize=10)
                histogram.legend(fontsize=8)


def take_steps(model, epoch, chosen, steps, mask_ratio, lr):
    """Takes gradient steps with the chosen codes (n,), as training does."""
    optimizer = torch.optim.AdamW(Models.parameter_groups(model, 0.01), betas=(0.9, 0.95))
    scaler, rates = torch.amp.GradScaler("cpu", enabled=False), {"mae": lr, "z": lr}
    amounts = {"steps": steps, "size": BATCH, "code_numbers": chosen}
    for batch in Data.minibatches(epoch.pool, epoch.loader, torch.device("cpu"), **amounts):
        TrainIMLE.train_step(
            model, batch, optimizer, scaler, rates, images_per_step=BATCH, mask_ratio=mask_ratio
        )


def draw_steps(before, after, chosen, steps, path):
    """Draws histograms of the losses (n, codes) before and after the gradient steps: of the chosen
    codes and of all codes."""
    with saved_figure(path, (11, 3.4), dpi=80) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        bins = np.linspace(0, np.quantile(before.numpy(), 0.995), 60)
        kinds = {
            "the chosen code of each image": lambda x: x.gather(1, chosen).flatten(),
            "all codes": lambda x: x.flatten(),
        }
        for axes, (title, pick) in zip(panels, kinds.items(), strict=True):
            for name, losses in (("before", before), (f"after {steps} gradient steps", after)):
                values = pick(losses).numpy()
                label = f"{name}, mean {values.mean():.3f}"
                weights = np.full(len(values), 1 / len(values))
                axes.hist(values, bins, weights=weights, alpha=0.55, label=label)
            axes.set(title=title, xlabel="loss of an image")
            axes.legend(fontsize=9)
        panels[0].set_ylabel("share")


def start(args):
    """Runs one epoch and draws the three pictures."""
    out = Path(args.out)
    if not out.is_dir():
        raise InputError(f"--out {out}: no folder")
    model = load_model(args.model).eval()
    if not model.code_dim:
        raise InputError(f"{args.model}: a model without codes")
    check_mask_ratio(args.mask_ratio, math.prod(model.config.grid))
    epoch = open_epoch(args.data_tr, args.images, model, args.seed)
    before, plain = losses_of_codes(model, epoch, args.codes, args.mask_ratio)
    chosen = sort_keys(before).argmin(1, keepdim=True)
    spread = before.std(1).mean()
    print(f"{len(before)} images, {args.codes} codes each: mean loss {before.mean():.3f}, of the")
    print(f"chosen codes {before.gather(1, chosen).mean():.3f}, without code {plain.mean():.3f};")
    print(f"an image's losses have a standard deviation of {spread:.3f}")
    draw_masks(model, epoch, args.mask_ratio, out / "masks.png")
    draw_codes(model, epoch, before, plain, args.mask_ratio, out / "codes.png")
    take_steps(model, epoch, chosen[:, 0], args.steps, args.mask_ratio, args.lr)
    after, _ = losses_of_codes(model, epoch, args.codes, args.mask_ratio)
    draw_steps(before, after, chosen, args.steps, out / "steps.png")
    print(f"drawn: {out}/masks.png, codes.png, steps.png")


def main(argv=None):
    """The command how_it_works.py."""
    description = " ".join(__doc__.split("\n\n")[0].split())
    parser = Parser(prog="how_it_works.py", description=description)
    add = parser.add_argument
    # fmt: off
    add("model", metavar="MODEL", help=f"a model with codes: {SOURCES}")
    add("--data_tr", default="demo/mnist_train.tar", metavar="PATH", help="training images")
    add("--out", default="docs/how_it_works", metavar="FOLDER", help="the pictures go there")
    add("--images", type=whole(SHOWN), default=256, metavar="N", help="images in the pool")
    add("--codes", type=whole(2), default=128, metavar="N", help="codes per image")
    add("--steps", type=whole(1), default=64, metavar="N", help="gradient steps")
    add("--lr", type=real(0), default=3e-4, metavar="RATE", help="learning rate")
    add("--mask_ratio", type=real(0, 1), default=0.75, metavar="SHARE", help="masked patches")
    add("--seed", type=whole(0, 2**31), default=0, metavar="N", help="random seed")
    # fmt: on
    args = parser.parse_args(argv)
    run_command(lambda: start(args))


if __name__ == "__main__":
    main()

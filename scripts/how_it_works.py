"""Draws one epoch of IMLE with the functions that training calls: masks, the losses of an image's
codes, the chosen codes, and the effect of gradient steps. docs/how_it_works.md shows the pictures.

python scripts/how_it_works.py demo/imle_mnist.pt"""

import math
from functools import partial
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
import numpy as np
import torch

import Data
import Models
import TrainIMLE
from Augmentation import normalize, transforms
from internals.plots import picture_grid
from internals.processes import run_command
from internals.weights import SOURCES, load_model
from IO import Parser, check_mask_ratio, real, whole
from Samplers import image_losses, sort_keys, try_codes
from Utils import InputError, write_atomically

SHOWN = 6  # images in the picture of masks
ROWS = 3  # images in the picture of codes
CODES_PER_PASS = 16
BATCH = 32


def open_pool(path, size, model, seed):
    """A training epoch's pool of `size` images, with its images loaded."""
    images, (height, width) = Data.open_images(path), model.config.image_size
    n_patches = math.prod(model.config.grid)
    draw = partial(Data.draw_pool, seed=seed, shuffle=True, fix_mask_noise=False)
    pool = draw(images, size, 0, image_size=(height, width), n_patches=n_patches)
    loader = Data.ImageLoader(images, transforms((height, width), False)[0], num_workers=0)
    for rows, part in loader.chunks(pool.indices, pool.seeds, BATCH):
        pool.images[rows] = part
    return pool


@torch.no_grad()
def losses_of_codes(model, pool, n_codes, mask_ratio):
    """The losses of a pool's n images: with each code (n, n_codes), without code (n,)."""
    parts = []
    for rows in torch.arange(len(pool.indices)).split(BATCH):
        images, seeds = normalize(pool.images[rows]), pool.seeds[rows]
        prefix = model.prefix(images, pool.mask_noise[rows], mask_ratio)
        numbers = torch.arange(n_codes).expand(len(rows), -1)
        _, losses = try_codes(model, prefix, images, seeds, numbers, CODES_PER_PASS)
        plain = image_losses(model, model.suffix(prefix, None), images, prefix.mask)
        parts.append((losses, plain))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def draw_masks(model, pool, mask_ratio, path):
    """Draws some images of the pool and their visible patches."""
    images, noise = normalize(pool.images[:SHOWN]), pool.mask_noise[:SHOWN]
    cells = Models.completions(model, images, noise, None, mask_ratio)[:, :2].transpose(0, 1)
    about = f"Above: {SHOWN} images of a pool. Below: what the network sees of them."
    picture_grid(cells.contiguous(), [""] * SHOWN, about).save(path)


def draw_codes(model, pool, losses, plain, mask_ratio, path):
    """Draws some images, their completions without code and with the worst, the middle and the best
    code, and histograms of the losses of all codes."""
    from matplotlib.figure import Figure  # slow to import; and Figure alone opens no windows

    n_codes = losses.shape[1]
    order = sort_keys(losses[:ROWS]).argsort(1)
    numbers = torch.stack([order[:, -1], order[:, n_codes // 2], order[:, 0]], dim=1)
    images, noise = normalize(pool.images[:ROWS]), pool.mask_noise[:ROWS]
    codes = model.numbered_codes(pool.seeds[:ROWS], numbers)
    coded = Models.completions(model, images, noise, codes, mask_ratio)
    alone = Models.completions(model, images, noise, None, mask_ratio)
    cells = torch.cat([coded[:, :2], alone[:, 2:], coded[:, 2:]], dim=1).movedim(2, -1).numpy()
    titles = ["image", "masked", "no code", "worst code", "middle code", "chosen code"]
    figure = Figure(figsize=(13, 2.1 * ROWS), layout="constrained")
    panels = figure.subplots(ROWS, 7, width_ratios=[1] * 6 + [2.6])
    for row in range(ROWS):
        shown = [None, None, plain[row], *losses[row, numbers[row]]]
        for axes, cell, title, loss in zip(panels[row], cells[row], titles, shown, strict=False):
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
    write_atomically(path, lambda file: figure.savefig(file, dpi=80, format="png"))


def take_steps(model, pool, codes, steps, mask_ratio, lr):
    """Takes gradient steps on the pool's images with the chosen codes, as training does."""
    optimizer = torch.optim.AdamW(Models.parameter_groups(model, 0.01), betas=(0.9, 0.95))
    stepping = {
        "optimizer": optimizer,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "batch_size": BATCH,
        "parts": 1,
        "dtype": torch.float32,
        "masking": {"mask_ratio": mask_ratio, "predict_ratio": 1.0},
        "clip_grad": 0.0,
    }
    for batch in Data.minibatches(pool, codes, steps, BATCH):
        TrainIMLE.train_step(model, batch, {"mae": lr, "z": lr}, **stepping)


def draw_steps(before, after, chosen, steps, path):
    """Draws histograms of the losses (n, codes) before and after the gradient steps: of the chosen
    codes and of all codes."""
    from matplotlib.figure import Figure  # slow to import; and Figure alone opens no windows

    figure = Figure(figsize=(11, 3.4), layout="constrained")
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
    write_atomically(path, lambda file: figure.savefig(file, dpi=80, format="png"))


def start(args):
    """Runs one epoch and draws the three pictures."""
    out = Path(args.out)
    if not out.is_dir():
        raise InputError(f"--out {out}: no folder")
    model = load_model(args.model).eval()
    if not model.code_dim:
        raise InputError(f"{args.model}: a model without codes")
    check_mask_ratio(args.mask_ratio, math.prod(model.config.grid))
    pool = open_pool(args.data_tr, args.images, model, args.seed)
    draw_masks(model, pool, args.mask_ratio, out / "masks.png")
    before, plain = losses_of_codes(model, pool, args.codes, args.mask_ratio)
    draw_codes(model, pool, before, plain, args.mask_ratio, out / "codes.png")
    chosen = sort_keys(before).argmin(1, keepdim=True)
    codes = model.numbered_codes(pool.seeds, chosen)[:, 0]
    take_steps(model, pool, codes, args.steps, args.mask_ratio, args.lr)
    after, _ = losses_of_codes(model, pool, args.codes, args.mask_ratio)
    draw_steps(before, after, chosen, args.steps, out / "steps.png")
    spread = before.std(1).mean()
    print(f"{len(before)} images, {args.codes} codes each: mean loss {before.mean():.3f}, of the")
    print(f"chosen codes {before.gather(1, chosen).mean():.3f}, without code {plain.mean():.3f};")
    print(f"an image's losses have a standard deviation of {spread:.3f}")
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

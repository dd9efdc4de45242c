"""Draws what a model's features look like: principal components of the patch tokens as colours, the
class token's attention, where codes change completions, and nearest neighbours in a data set.

python scripts/look.py demo/imle_mnist.pt PICTURE [PICTURE ...] --data demo/mnist_val.tar"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import _path  # noqa: F401 (makes the modules importable)
import torch
from complete import fitted, open_pictures, picture_path, save, size_flag
from exploring.completions import deviation_of, heat, overlay
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

import Data
from Augmentation import normalize, resized, to_pictures
from internals.encoders import check_finite, extract, image_features, load_encoder
from internals.layout import UNLABELLED
from internals.parsing import Parser, real, whole
from internals.plots import picture_grid
from internals.processes import run_command
from internals.weights import FOREIGN_SOURCES, SOURCES
from IO import IMAGES, WORKERS, check_mask_ratio, height_and_width
from Models import ImplicitMAE, completions
from Utils import InputError, Stream, default_device, fastest_dtype, mix_seeds, naming, say, seeded
from Validation import examples, prepare

BATCH = 256  # images per pass
COLUMNS = {  # value of --what -> what the caption says
    "pca": "Features: the first three principal components of all patch tokens, as colours.",
    "attention": "Heads: what the class token attends to in the last encoder block; bright: most.",
    "codes": "Codes: where completions of a masked picture differ; bright: most, in this picture.",
    "neighbors": "Neighbours: images of --data with the nearest features (cosine similarity).",
}


class Column(NamedTuple):
    """A column of the sheet."""

    header: str
    cells: torch.Tensor  # uint8 (n, 3, H, W), in pixels of the picture, or one pixel per patch
    labels: list | None = None  # n texts below the cells


class Rows(NamedTuple):
    """The n pictures that the sheet shows."""

    images: torch.Tensor  # (n, C, H, W), uint8 or uint16
    labels: list  # n texts
    indices: torch.Tensor | None = None  # (n,) in the data set; None: files of one's own


def main(argv=None):
    """Writes a sheet with a row per picture."""
    parser = Parser(
        description=" ".join(__doc__.split("\n\n")[0].split()),
        usage="look.py MODEL [PICTURE ...] [--data PATH] [flags]",
    )
    add = parser.add_argument
    # fmt: off
    add("model", metavar="MODEL", help=f"Weights of the model: {SOURCES}; {FOREIGN_SOURCES}.")
    add("pictures", nargs="*", metavar="PICTURE", help="Image files of any size and mode; default: "
        "some of --data.")
    add("--data", metavar="PATH", help=f"Images among which neighbours are sought: {IMAGES}.")
    add("--out", default="look.png", metavar="FILE", help="File that the sheet goes to.")
    add("--what", nargs="+", choices=COLUMNS, metavar="COLUMN", help="Columns beside the picture, "
        f"any of: {' '.join(COLUMNS)}; default: all that MODEL has, neighbors with --data.")
    add("--images", type=whole(1), default=6, metavar="N", help="Without PICTURE: so many images "
        "of --data are shown, evenly spaced.")
    add("--neighbors", type=whole(1), default=5, metavar="N", help="Neighbours per picture.")
    add("--codes", type=whole(2), default=16, metavar="N", help="Completions whose deviation is "
        "shown.")
    add("--mask_ratio", type=real(0, 1), default=0.75, metavar="SHARE", help="Share of the patches "
        "that are masked in these completions.")
    add("--seed", type=whole(0, 2**31), default=0, metavar="N", help="Seed of masks and codes.")
    add("--cell", type=whole(16, 1024), default=112, metavar="PIXELS", help="Height of the sheet's "
        "cells, rounded to whole pixels per patch.")
    # fmt: on
    size_flag(parser)
    args = parser.parse_args(argv)
    run_command(lambda: draw(args))


@torch.no_grad()
def draw(args):
    """Writes the sheet that the flags ask for."""
    out = picture_path(args.out)
    if not (args.pictures or args.data):
        raise InputError("no pictures: name a PICTURE, or a data set by --data")
    device = default_device()
    size = args.input_size and height_and_width(args.input_size)
    model = load_encoder(args.model, size=size, dtype=fastest_dtype(device)).to(device)
    c = model.config
    what = columns_of(args.what, missing_columns(model, args.data))
    if "codes" in what:
        check_mask_ratio(args.mask_ratio, math.prod(c.grid))
    with naming("--data"):
        data = Data.open_images(args.data, channels=c.channels) if args.data else None
    if args.pictures:
        rows = rows_of_files(args.pictures, c.channels, c.image_size)
    else:
        rows = rows_of_data(data, args.images, c.image_size)

    images = normalize(rows.images.to(device), c.mean, c.std)
    tokens = model.encode(images).float()
    check_finite(tokens.flatten(0, 1), "the sheet's", "is the model damaged?")
    grid = patch_grid(tokens.shape[1] - 1, c.image_size)
    pictures = to_pictures(images, c.mean, c.std).cpu()
    columns = [Column("picture", pictures, rows.labels)]
    if "pca" in what:
        colours = pca_colours(tokens[:, 1:]).unflatten(1, grid).movedim(-1, 1)
        columns.append(Column("features", (255 * colours).round().to(torch.uint8)))
    if "attention" in what:
        for number, shares in enumerate(class_attention(model, images).cpu().unbind(1), 1):
            maps = [heat(values) for values in shares[:, 1:].unflatten(1, grid)]
            columns.append(Column(f"head {number}", torch.stack(maps)))
    if "codes" in what:
        deviations = code_deviations(
            model, rows.images, n_codes=args.codes, mask_ratio=args.mask_ratio, seed=args.seed
        )
        columns.append(Column("codes", torch.stack(list(map(overlay, pictures, deviations)))))
    if "neighbors" in what:
        columns += neighbor_columns(model, data, rows, args.neighbors, device)
    height, width = c.image_size
    caption = f"{args.model}, {height} x {width} pixels. {' '.join(map(COLUMNS.get, what))}"
    save(sheet(columns, caption, grid, args.cell), out)


# -------------------------------------------------------------------------------------------------
# Columns and rows.


def missing_columns(model, data):
    """The columns that can't be drawn of a model, or without --data: {name: reason}."""
    missing = {}
    if "vector" in getattr(model, "pools", ()):
        missing["pca"] = "this encoder has one vector per image, no patch tokens"
    if not isinstance(model, ImplicitMAE):
        missing["attention"] = "it is not read from encoders of other libraries"
    if not model.code_dim:
        missing["codes"] = "this model has no codes"
    if not data:
        missing["neighbors"] = "needs --data"
    return missing


def columns_of(asked, missing):
    """The names of the columns to draw, in the order of COLUMNS: those asked for, an InputError if
    one is missing; or, for None, all that are not missing, with a note."""
    for name, reason in missing.items():
        if asked is None:
            say(f"note: no column {name}: {reason}")
        elif name in asked:
            raise InputError(f"--what {name}: {reason}")
    return [name for name in COLUMNS if name in (asked or COLUMNS.keys() - missing.keys())]


def rows_of_files(paths, channels, size):
    """Rows of image files, fitted to a size (height, width)."""
    items = [(fitted(picture, size), 0) for picture in open_pictures(paths, channels)]
    return Rows(Data.collate(items)[0], [Path(path).name for path in paths])


def rows_of_data(data, n, size):
    """Rows of at most n images of a data set, evenly spaced."""
    chosen = examples(data, n, partial(fitted, size=size), seed=0)
    chunks = chosen.loader.chunks(chosen.indices, chosen.seeds, len(chosen.indices))
    labels = [label(data, index) for index in chosen.indices.tolist()]
    return Rows(next(chunks)[1], labels, chosen.indices)


def label(data, index):
    """An image's class; without classes the name of its file."""
    name = data.classes[data.target(index)]
    return Path(data.name(index)).name if name == UNLABELLED else name


def sheet(columns, caption, grid, cell_height):
    """The picture of all columns. grid: (rows, columns) of patches; each is drawn with the same
    whole number of pixels, so that a cell is about cell_height pixels high."""
    image_height, image_width = columns[0].cells.shape[-2:]
    height = grid[0] * max(1, round(cell_height / grid[0]))
    size = [height, round(height * image_width / image_height)]
    cells, labels = [], []
    for column in columns:
        if column.cells.shape[-2:] == grid:
            cells.append(resize(column.cells, size, InterpolationMode.NEAREST_EXACT))
        else:
            cells.append(resized(column.cells, size))
        labels.append(column.labels or [""] * len(column.cells))
    headers = [column.header for column in columns]
    labels = list(zip(*labels, strict=True))  # row by row
    return picture_grid(torch.stack(cells, dim=1), headers, caption, height, labels)


# -------------------------------------------------------------------------------------------------
# What is drawn.


def patch_grid(n_patches, size):
    """(rows, columns) of the patches of images of a size (height, width); patches are square."""
    n_rows = max(1, round(math.sqrt(n_patches * size[0] / size[1])))
    return n_rows, n_patches // n_rows


def pca_colours(tokens):
    """The first three principal components of all tokens (N, L, C) as colours from 0 to 1, (N, L,
    3), on the CPU. In each component, the lowest and highest 2 % of the tokens are clipped."""
    points = tokens.flatten(0, 1).cpu()  # `seeded` sets the CPU's generator only
    with seeded(0):  # starts from q random directions; more than 3 make the first 3 more exact
        _, _, axes = torch.pca_lowrank(points, q=min(8, *points.shape))
    values = (points - points.mean(0)) @ axes[:, :3]
    low, high = values.quantile(values.new_tensor([0.02, 0.98]), dim=0)
    colours = ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return F.pad(colours, (0, 3 - colours.shape[1])).unflatten(0, tokens.shape[:2])


def class_attention(model, images):
    """How the class token attends to all tokens in the last encoder block, for images (N,C,H,W)
    normalised: shares (N, heads, 1+L) that sum to 1. timm's attention does not return them: they
    are computed from the block's input."""
    block, inputs = model.blocks[-1], []
    with block.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments)):
        model.encode(images)
    tokens = block.norm1(inputs[0][:, 0])  # (N, 1+L, C)
    queries, keys, _ = block.attn.qkv(tokens).float().chunk(3, dim=-1)
    queries, keys = (x.unflatten(-1, (block.attn.num_heads, -1)) for x in (queries[:, 0], keys))
    scores = torch.einsum("nhc,nthc->nht", queries, keys) / math.sqrt(keys.shape[-1])
    return scores.softmax(dim=-1)


def code_deviations(model, images, *, n_codes, mask_ratio, seed):
    """For images (n, C, H, W), uint8 or uint16, the deviation of completions over codes: a list of
    n maps (H, W). Masks and codes are those of scripts/complete.py with the same seed."""
    maps = []
    seeds = mix_seeds(seed, Stream.EVALUATION, torch.arange(len(images)), 0)
    for one, its_seed in zip(images.split(1), seeds.split(1), strict=True):
        image, noise, its_seed = prepare(model, one, its_seed)
        codes = model.sample_codes(its_seed, n_codes)
        cells = completions(model, image, noise, codes, mask_ratio)[0, 2:]
        maps.append(deviation_of(cells).cpu())
    return maps


def neighbor_columns(model, data, rows, n, device):
    """The n images of a data set with the features (mean of the patch tokens) of the greatest
    cosine similarity, as columns. An image of the data set is not a neighbour of itself."""
    n_others = len(data) - (rows.indices is not None)
    if not n_others:
        raise InputError("--data: its one image has no neighbour; choose other columns by --what")
    c, indices, parts = model.config, torch.arange(len(data)), ("mean",)
    loader = Data.ImageLoader(data, partial(fitted, size=c.image_size), num_workers=WORKERS)
    # Unused: there are no codes and no random crops.
    seeds = torch.zeros(max(len(data), n * len(rows.images)), dtype=torch.long)
    how = {"device": device, "batch_size": BATCH, "parts": parts}
    features = extract(model, loader, indices, seeds, **how)[:, 0]  # (images, C)
    check_finite(features, "--data's", "is the model damaged?")
    queries = image_features(model, rows.images.to(device), seeds, parts, 0)[:, 0]
    similarity = F.normalize(queries, dim=1) @ F.normalize(features, dim=1).T  # (rows, images)
    if rows.indices is not None:
        similarity[torch.arange(len(queries)), rows.indices] = -math.inf
    values, nearest = similarity.cpu().topk(min(n, n_others), dim=1)
    _, images = next(loader.chunks(nearest.flatten(), seeds, nearest.numel()))
    pictures = to_pictures(normalize(images, c.mean, c.std), c.mean, c.std)
    pictures = pictures.unflatten(0, nearest.shape)  # (rows, n, 3, H, W)
    columns = []
    for k in range(nearest.shape[1]):
        pairs = zip(values[:, k].tolist(), nearest[:, k].tolist(), strict=True)
        labels = [f"{value:.2f} {label(data, index)}" for value, index in pairs]
        columns.append(Column(f"neighbour {k + 1}", pictures[:, k], labels))
    return columns


if __name__ == "__main__":
    main()

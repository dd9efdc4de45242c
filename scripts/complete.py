"""Masks pictures of your own and draws how a model completes them, with one column per code.

python scripts/complete.py demo/imle_mnist.pt PICTURE [PICTURE ...] --codes 8 --out grid.png"""

import math
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor

from Augmentation import resized
from internals.decoding import NOTE, open_image, reason_of
from internals.parsing import SWITCH, Parser, real, whole
from internals.plots import NORMALIZED, picture_grid
from internals.processes import run_command
from internals.weights import SOURCES, load_model
from IO import check_bands, check_mask_ratio, height_and_width
from Models import completions, in_precision
from Samplers import code_passes
from Utils import InputError, Stream, default_device, fastest_dtype, mix_seeds, say
from Validation import prepare

CODES_PER_PASS = 16
MOSAIC = 4, 8  # rows and columns of a picture's mosaic
N_MOSAIC = MOSAIC[0] * MOSAIC[1] - 2  # completions in a mosaic; image and masked image go first


def main(argv=None):
    """Writes a grid of completions and, with --mosaic, a second picture."""
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        usage="complete.py MODEL PICTURE [PICTURE ...] [flags]",
    )
    add = parser.add_argument
    # fmt: off
    add("model", metavar="MODEL", help=f"Weights of the model: {SOURCES}.")
    add("pictures", nargs="+", metavar="PICTURE", help="Image files of any size and mode.")
    add("--out", default="completions.png", metavar="FILE", help="File that the grid goes to.")
    add("--codes", type=whole(1), default=8, metavar="N", help="Completions per row of the grid.")
    add("--masks", type=whole(1), default=1, metavar="N", help="Masks, and so rows, per picture.")
    add("--mask_ratio", type=real(0, 1), default=0.75, metavar="SHARE", help="Share of the patches "
        "that are masked.")
    add("--visible", type=whole(0), nargs="*", metavar="PATCH", help="Patches that stay visible, "
        "not a random mask: numbers from 0, in rows from the top left; none: all are masked.")
    add("--code_numbers", type=whole(0), nargs="+", metavar="N", help="Numbers of the codes that "
        "the grid shows, from 0, instead of the first --codes of each row.")
    add("--mosaic", type=whole(0), default=0, metavar="CODES", help="Try CODES codes and draw the "
        f"{N_MOSAIC} completions that differ most, in a second file OUT_mosaic; 0: no mosaic.")
    add("--seed", type=whole(0, 2**31), default=0, metavar="N", help="Seed of masks and codes.")
    add("--show_bands", type=whole(0), nargs="+", metavar="BAND", help="Channels, numbered from 0, "
        "that are shown as red, green and blue, or the one that is shown as grey; default: the "
        "first three, or the first of one or two.")
    # fmt: on
    model_flags(parser)
    args = parser.parse_args(argv)
    run_command(lambda: draw(args))


def size_flag(parser):
    """Declares --input_size, which IO.height_and_width reads."""
    # fmt: off
    parser.add_argument("--input_size", type=whole(1), nargs="+", metavar="PIXELS", help="Side, or "
        "height and width, of the images that the network sees; default: the model's own size.")
    # fmt: on


def model_flags(parser):
    """Declares the flags that `overrides_of` reads."""
    size_flag(parser)
    # fmt: off
    parser.add_argument("--norm_pix_loss", **SWITCH, help="What the model predicts. 1: normalised "
        "patches; 0: pixels; default: as MODEL's file says, else 1.")
    # fmt: on


def overrides_of(args):
    """The fields of ModelConfig that the flags of `model_flags` set, for load_model."""
    overrides = {}
    if args.input_size:
        overrides["image_size"] = tuple(height_and_width(args.input_size))
    if args.norm_pix_loss is not None:
        overrides["norm_pix_loss"] = bool(args.norm_pix_loss)
    return overrides


@torch.no_grad()
def draw(args):
    """Writes the grid and the mosaic that the flags ask for."""
    out = picture_path(args.out)
    device = default_device()
    model = load_model(args.model, **overrides_of(args)).to(device).eval()
    pictures = open_pictures(args.pictures, model.config.channels)
    n_patches, mask_ratio = math.prod(model.config.grid), args.mask_ratio
    if args.visible is None:
        check_mask_ratio(mask_ratio, n_patches)
    else:
        shown, mask_ratio = mask_of(args.visible, n_patches)
        if args.masks > 1:
            raise InputError("--visible: this is one mask; leave --masks out")
    if args.code_numbers and not model.code_dim:
        raise InputError(f"--code_numbers: {args.model} has no codes, so only one completion")
    if args.mosaic and not model.code_dim:
        raise InputError(f"--mosaic: {args.model} has no codes, so only one completion")

    bands = args.show_bands or ()
    check_bands(bands, model.config.channels)
    images = [fitted(picture, model.config.image_size) for picture in pictures]
    number = torch.arange(len(images) * args.masks)
    seeds = mix_seeds(args.seed, Stream.EVALUATION, number // args.masks, number % args.masks)
    numbers = torch.tensor(args.code_numbers or range(args.codes))
    rows, mosaics = [], []
    model = in_precision(model, fastest_dtype(device))
    for i, seed in enumerate(seeds):
        image, noise, seed = prepare(model, images[i // args.masks][None], seed[None])
        noise = noise if args.visible is None else shown.to(device)
        codes = model.numbered_codes(seed, numbers[None].to(device)) if model.code_dim else None
        rows.append(completions(model, image, noise, codes, mask_ratio, bands))
        if args.mosaic and i % args.masks == 0:
            chosen = most_different_codes(model, image, noise, seed, args.mosaic, mask_ratio)
            mosaics.append(tiles(completions(model, image, noise, chosen, mask_ratio, bands)))

    names = [f"code {k + 1}" for k in numbers.tolist()] if model.code_dim else ["completion"]
    share = mask_ratio if args.visible is None else 1 - len(set(args.visible)) / n_patches
    caption = f"Completions by {args.model}, {share:.0%} of the patches masked."
    caption += NORMALIZED if model.config.norm_pix_loss else ""
    save(picture_grid(torch.cat(rows).cpu(), ["image", "masked", *names], caption), out)
    if mosaics:
        caption = f"The completions that differ most, of {args.mosaic} codes. {caption}"
        headers = ["image", "masked", *[""] * (MOSAIC[1] - 2)]
        mosaic = picture_grid(torch.cat(mosaics).cpu(), headers, caption)
        save(mosaic, out.with_name(f"{out.stem}_mosaic{out.suffix}"))


def picture_path(text):
    """The path of a picture to write; an InputError where none can be written."""
    path = Path(text).expanduser()
    file_format = Image.registered_extensions().get(path.suffix.lower())
    if file_format not in Image.SAVE or not path.parent.is_dir():
        raise InputError(f"--out {path}: allowed is an image file, such as grid.png, in a folder")
    return path


def mask_of(visible, n_patches):
    """The mask that shows the patches with the numbers `visible`, as ImplicitMAE.prefix takes it:
    mask noise (1, L) and mask ratio. An InputError if it leaves no patch masked."""
    shown = sorted(set(visible))
    if shown and shown[-1] >= n_patches:
        raise InputError(f"--visible {shown[-1]}: allowed are 0 to {n_patches - 1}")
    if len(shown) == n_patches:
        raise InputError(f"--visible: all {n_patches} patches are visible; leave some out")
    noise = torch.ones(1, n_patches)
    noise[0, shown] = 0
    return noise, 1 - (len(shown) + 0.5) / n_patches  # the half guards against rounding down


def open_pictures(paths, channels=3):
    """`open_picture` of all paths; prints the first note that a decoder left."""
    pictures = [open_picture(path, channels) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if NOTE in getattr(picture, "info", ()):
            say(f"note: {path}: {picture.info[NOTE]}")
            break
    return pictures


def open_picture(path, channels=3):
    """Reads a picture of any mode with so many channels, turned as its EXIF data say, on a white
    background: Pillow's, or a tensor (C, H, W)."""
    try:
        return open_image(Path(path).expanduser().read_bytes(), channels, upright=True)
    except Exception as error:  # decoders raise anything for damaged bytes
        raise InputError(f"cannot read the picture {path}: {reason_of(error)}") from None


def fitted(picture, size):
    """The largest centre of a picture with the proportions of size (height, width), resized to it:
    uint8 or uint16 (C, H, W)."""
    if not isinstance(picture, torch.Tensor):
        return pil_to_tensor(fitted_picture(picture, size))
    height, width = size
    scale = min(picture.shape[1] / height, picture.shape[2] / width)
    return resized(center_crop(picture, [round(height * scale), round(width * scale)]), size)


def fitted_picture(picture, size):
    """`fitted` for a Pillow image, as a Pillow image."""
    return ImageOps.fit(picture, (size[1], size[0]), Image.BICUBIC)


def most_different_codes(model, image, noise, seed, n_codes, mask_ratio):
    """The codes (1, k, D) whose completions of one picture differ most, of n_codes codes."""
    prefix = model.prefix(image, noise, mask_ratio)
    numbers = torch.arange(n_codes, device=seed.device)[None]
    passes = code_passes(model, prefix, seed, numbers, CODES_PER_PASS)
    preds = torch.cat([model.suffix(prefix, codes).float() for codes in passes], dim=1)
    chosen = most_different(preds[0].flatten(1), N_MOSAIC)
    return model.numbered_codes(seed, numbers[:, chosen])


def most_different(points, k):
    """Indices of at most k of the points (n, d): first the point nearest to the mean, then always
    the point farthest from the chosen points (Gonzalez 1985)."""
    distances = torch.cdist(points, points)
    chosen = [int((points - points.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < min(k, len(points)):
        chosen.append(int(distances[:, chosen].min(1).values.argmax()))
    return chosen


def tiles(cells):
    """Arranges pictures (1, n, 3, H, W) as (rows, columns, 3, H, W); empty places are white."""
    n_columns = MOSAIC[1]
    n_empty = -cells.shape[1] % n_columns
    white = cells.new_full((n_empty, *cells.shape[2:]), 255)
    return torch.cat([cells[0], white]).unflatten(0, (-1, n_columns))


def save(picture, path):
    """Writes a picture and prints its path."""
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--out: cannot write {path}: {error}") from None
    print(path)


if __name__ == "__main__":
    main()

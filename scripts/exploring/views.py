"""Views: what a person has chosen on the page of scripts/explore.py; masks, and pictures that come
in."""

import base64
import dataclasses
import io
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from complete import fitted_picture
from PIL import Image

from internals.decoding import open_image, reason_of
from Utils import InputError, Stream, mix_seeds, random_uniform

DRAWN, NEAREST, DIFFERENT = "as drawn", "nearest to the image", "most different"
ORDERS = (DRAWN, NEAREST, DIFFERENT)
MOST_CODES = 64
USUAL_RATIO = 0.75  # of masked patches, in training
LARGEST_FILE, LARGEST_PICTURE = 20 * 2**20, 40_000_000  # uploads: bytes, pixels
FORMATS = "PNG JPEG WEBP GIF BMP TIFF PPM AVIF".split()  # of uploads: no format runs a program


# -------------------------------------------------------------------------------------------------
# A view: all that a person has chosen.


@dataclass(frozen=True)
class View:
    """What the page shows. Everything else follows from it and from the models."""

    picture: str  # fitted to the model's size: a PNG in base64
    name: str  # of the picture, for people
    visible: tuple[int, ...]  # numbers of the visible patches, rising
    ratio: float = USUAL_RATIO  # of a random mask
    mask_seed: int = 0
    seed: int = 0  # of the codes
    codes: int = 15
    order: str = DRAWN
    chosen: tuple[int, ...] = ()  # numbers of the codes A, B and C to walk between
    model: str = ""
    compare: str = ""  # another model; "": none

    def to_json(self):
        """Settings, as `from_json` reads them."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def changed(self, **fields):
        """A copy with other fields."""
        return dataclasses.replace(self, **fields)


def from_json(text, size, n_patches):
    """The View in settings that the page saved, for a model of images of a size (height, width)
    with n_patches. An InputError for anything else."""
    try:
        fields = json.loads(text)
        fields = {field.name: fields[field.name] for field in dataclasses.fields(View)}
        view = View(**fields | {name: tuple(fields[name]) for name in ("visible", "chosen")})
        numbers = (*view.visible, *view.chosen, view.mask_seed, view.seed, view.codes)
        texts = (view.picture, view.name, view.model, view.compare)
        are_right = (
            all(type(number) is int and 0 <= number < 2**31 for number in numbers)
            and all(isinstance(text, str) for text in texts)
            and 1 <= view.codes <= MOST_CODES
            and all(number < view.codes for number in view.chosen)
            and len(set(view.chosen)) == len(view.chosen) <= 3
            and list(view.visible) == sorted({n for n in view.visible if n < n_patches})
            and view.order in ORDERS
            and 0 <= view.ratio <= 1
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        are_right = False
    if not are_right:
        raise InputError("these are no settings of this page, or of a model of other sizes")
    try:
        data = base64.b64decode(view.picture, validate=True)
        picture = check_upload(io.BytesIO(data), len(data)).convert("RGB")
    except Exception as error:  # decoders raise anything for damaged bytes
        raise InputError(f"the picture in the settings can't be read: {reason_of(error)}") from None
    return view.changed(picture=encoded(fitted_picture(picture, size)))


def read_settings(path, size, n_patches):
    """The View in the file at `path`; an InputError that names the file."""
    try:
        if Path(path).stat().st_size > LARGEST_FILE:
            raise InputError(f"it is larger than {LARGEST_FILE // 2**20} MB")
        return from_json(Path(path).read_bytes().decode(errors="replace"), size, n_patches)
    except (OSError, InputError) as error:
        raise InputError(f"cannot open {Path(path).name}: {reason_of(error)}") from None


def command_of(view, numbers, picture="picture.png", overrides=()):
    """The command that draws a view's grid, with the codes of these numbers. picture: the path of
    the view's picture; overrides: of Explorer, as a dict."""
    words = ["python", "scripts/complete.py", view.model, picture, "--seed", view.seed]
    words += ["--visible", *view.visible]
    words += ["--code_numbers", *numbers] if numbers else []
    for name, value in dict(overrides).items():
        words += ["--input_size", *value] if name == "image_size" else [f"--{name}", int(value)]
    return shlex.join(map(str, [*words, "--out", "completions.png"]))


# -------------------------------------------------------------------------------------------------
# Pictures in.


def encoded(picture):
    """A Pillow image as a PNG in base64."""
    picture.save(file := io.BytesIO(), "png", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def decoded(picture):
    """The Pillow image of a PNG in base64."""
    return Image.open(io.BytesIO(base64.b64decode(picture)))


def check_upload(file, size):
    """A Pillow image of a file, not decoded yet. A ValueError if its bytes or pixels are too many,
    or if its format is none of FORMATS."""
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size / 2**20:.0f} MB; allowed are {LARGEST_FILE // 2**20}")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {LARGEST_PICTURE / 1e6:.0f} million pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"it is no picture of these formats: {', '.join(FORMATS)}") from None
    if math.prod(image.size) > LARGEST_PICTURE:
        pixels = f"{math.prod(image.size) / 1e6:.0f} million pixels"
        raise ValueError(f"it has {pixels}; allowed are {LARGEST_PICTURE / 1e6:.0f} million")
    return image


def open_upload(path):
    """The picture in a file that somebody sent, as scripts/complete.py reads it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            check_upload(file, path.stat().st_size)
        return open_image(path.read_bytes(), upright=True)
    except Exception as error:  # decoders raise anything for damaged bytes
        raise InputError(f"cannot read {path.name}: {reason_of(error)}") from None


# -------------------------------------------------------------------------------------------------
# Masks: numbers of the visible patches, in rows from the top left.


def random_mask(n_patches, ratio, mask_seed):
    """The mask that scripts/complete.py draws for a first picture with this --seed."""
    seed = mix_seeds(code_seed(mask_seed), Stream.MASK)
    n_visible = int(n_patches * (1 - ratio))
    return tuple(
        sorted(random_uniform(seed, n_patches)[0].argsort(stable=True)[:n_visible].tolist())
    )


def block_mask(grid, mask_seed, share=0.5):
    """All patches but a block of about this share of the picture, at a random place."""
    sides = [max(1, min(n, round(n * share**0.5))) for n in grid]
    random = random_uniform(mix_seeds(mask_seed, Stream.MASK)[None], 2)[0].tolist()
    starts = [int(r * (n - side + 1)) for r, n, side in zip(random, grid, sides, strict=True)]
    return outside(grid, starts, sides)


def centre_mask(grid, share=0.5):
    """All patches but a block of about this share in the centre."""
    sides = [max(1, min(n, round(n * share**0.5))) for n in grid]
    return outside(grid, [(n - side) // 2 for n, side in zip(grid, sides, strict=True)], sides)


def outside(grid, starts, sides):
    """The patches of a grid (rows, columns) outside of a block that starts at a row and a column
    and has a height and a width."""
    masked = np.zeros(grid, bool)
    masked[starts[0] : starts[0] + sides[0], starts[1] : starts[1] + sides[1]] = True
    return tuple(np.flatnonzero(~masked).tolist())


def code_seed(seed):
    """The seed (1,) of the first picture's codes and mask in scripts/complete.py --seed."""
    return mix_seeds(seed, Stream.EVALUATION, 0, 0)[None]

"""What scripts/explore.py shows, without its page: a view (what a person has chosen), the
completions of a view, and their pictures. Tested without a browser.

Letters in shapes: those of Models.py."""

import base64
import dataclasses
import functools
import io
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import _path  # noqa: F401 (makes the modules importable)
import numpy as np
import torch
from complete import mask_of, most_different
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from Augmentation import normalize
from internals.decoding import open_image, reason_of
from internals.plots import import_matplotlib
from internals.weights import load_model
from Models import in_precision, pictures
from Samplers import code_passes, image_losses, sort_keys
from Utils import InputError, Stream, fastest_dtype, mix_seeds, random_uniform

DRAWN, NEAREST, DIFFERENT = "as drawn", "nearest to the image", "most different"
ORDERS = (DRAWN, NEAREST, DIFFERENT)
MOST_CODES = 64
CODES_PER_PASS = 4, 16  # fewest and most; fewer for large networks, to show progress
FRAMES = 17  # of a walk between two codes
PLANE = 5  # completions along each side of a plane through three codes
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
    return view.changed(picture=encoded(fitted(picture, size)))


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


def fitted(picture, size):
    """A Pillow image as scripts/complete.py fits it to a size (height, width)."""
    return ImageOps.fit(picture, (size[1], size[0]), Image.BICUBIC)


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


# -------------------------------------------------------------------------------------------------
# Completions.


def silent(n):
    """Shows no progress."""


class Completed(NamedTuple):
    """The completions of a view, by code number from 0."""

    image: torch.Tensor  # uint8 (3, H, W)
    masked: torch.Tensor  # the image as the network sees it
    plain: torch.Tensor  # completed without code
    cells: torch.Tensor  # uint8 (K, 3, H, W); K is 0 for a model without codes
    losses: list  # of the K codes; empty if nothing is masked
    plain_loss: float | None
    points: torch.Tensor  # (K, Q) what was predicted, to compare completions by

    def order(self, name):
        """Code numbers in one of ORDERS."""
        numbers = list(range(len(self.cells)))
        if name == NEAREST and self.losses:
            return sort_keys(torch.tensor(self.losses)).argsort(stable=True).tolist()
        if name == DIFFERENT and numbers:  # equal points come twice, or not at all
            return list(dict.fromkeys([*most_different(self.points, len(numbers)), *numbers]))
        return numbers

    def nearest(self):
        """The number of the code that IMLE would choose; None without codes or a masked patch."""
        return self.order(NEAREST)[0] if self.losses else None

    def ends(self):
        """The two codes whose completions differ most, to walk between; none if there are fewer."""
        if len(self.points) < 2:
            return ()
        if self.plain_loss is None:
            return 0, 1
        farthest = torch.cdist(self.points, self.points).argmax()
        return divmod(int(farthest), len(self.points))

    def deviation(self):
        """The standard deviation over codes (H, W), mean over channels, as a share of white."""
        if len(self.cells) < 2:
            return torch.zeros(self.image.shape[1:])
        return (self.cells.float() / 255).std(0, correction=0).mean(0)


class Explorer:
    """A model that completes views. Keeps its last results: the encoder runs once per mask, and
    nothing that has not changed is computed again."""

    def __init__(self, source, device, **overrides):
        model = load_model(source, **overrides).to(device).eval()
        self.source, self.overrides = source, overrides
        self.config, self.code_dim = model.config, model.code_dim
        self.model = in_precision(model, fastest_dtype(device))
        self.device, self.n_patches = device, math.prod(model.config.grid)
        least, most = CODES_PER_PASS
        values_per_code = self.n_patches * model.config.decoder_dim
        self.codes_per_pass = max(least, min(most, 2**19 // values_per_code))
        self.prefix = functools.lru_cache(32)(self._prefix)
        self.predicted = functools.lru_cache(32)(self._predicted)
        self.mixed = functools.lru_cache(32)(self._mixed)

    def _prefix(self, picture, visible):
        """The normalised picture (1,3,H,W) and its model.prefix."""
        images = normalize(pil_to_tensor(decoded(picture))[None].to(self.device))
        noise, ratio = mask_of(visible, self.n_patches)
        return images, self.model.prefix(images, noise.to(self.device), ratio)

    def complete(self, view, progress=silent):
        """The Completed of a view. progress(n) is called when n further codes are done."""
        key = view.picture, view.visible, view.seed, view.codes
        return self.predicted(*key, Progress(progress))

    @torch.no_grad()
    def _predicted(self, picture, visible, seed, n_codes, progress):
        """See complete."""
        n_codes = n_codes if self.code_dim else 0
        if len(visible) == self.n_patches:  # nothing to complete
            image = pil_to_tensor(decoded(picture))
            cells = image.expand(n_codes, -1, -1, -1)
            return Completed(image, image, image, cells, [], None, torch.zeros(n_codes, 1))
        images, prefix = self.prefix(picture, visible)
        numbers = torch.arange(n_codes, device=self.device)[None]
        seeds = code_seed(seed).to(self.device)
        plain = self.model.suffix(prefix, None, masked_only=False)[:, None]
        preds = [plain]
        passes = code_passes(self.model, prefix, seeds, numbers, self.codes_per_pass)
        for codes in passes if n_codes else ():
            preds.append(self.model.suffix(prefix, codes, masked_only=False))
            progress(codes.shape[1])
        pred = torch.cat(preds, dim=1)  # (1, 1 + K, L, P*P*3)
        losses = image_losses(self.model, pred, images, prefix.mask)[0].tolist()
        image, masked, plain, *cells = pictures(pred, images, prefix.mask, self.config)[0].cpu()
        cells = torch.stack(cells) if cells else image[None, :0].new_empty(0, *image.shape)
        points = pred[0, 1:, prefix.mask[0].bool()].flatten(1).float().cpu()
        return Completed(image, masked, plain, cells, losses[1:], losses[0], points)

    def mixtures(self, view, chosen, weights, progress=silent):
        """Completions uint8 (n, 3, H, W) by mixtures of the codes with the numbers `chosen` (m,):
        weights is a tuple of n tuples of m numbers. progress: as of `complete`."""
        key = view.picture, view.visible, view.seed, tuple(chosen), weights
        return self.mixed(*key, Progress(progress))

    @torch.no_grad()
    def _mixed(self, picture, visible, seed, chosen, weights, progress):
        """See mixtures."""
        if len(visible) == self.n_patches:
            return pil_to_tensor(decoded(picture)).expand(len(weights), -1, -1, -1)
        images, prefix = self.prefix(picture, visible)
        seeds = code_seed(seed).to(self.device)
        codes = self.model.numbered_codes(seeds, torch.tensor([chosen], device=self.device))[0]
        codes = mix(codes, torch.tensor(weights, device=self.device))
        preds = []
        for part in codes.split(self.codes_per_pass):
            preds.append(self.model.suffix(prefix, part[None], masked_only=False))
            progress(len(part))
        return pictures(torch.cat(preds, dim=1), images, prefix.mask, self.config)[0, 2:].cpu()


class Progress:
    """A function that caches take for the same as any other."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        self.function(*arguments)

    def __eq__(self, other):
        return isinstance(other, Progress)

    def __hash__(self):
        return 0


def mix(codes, weights):
    """Mixtures (n, D) of codes (m, D) by weights (n, m). A mixture of codes is shorter than codes
    of the prior are: it gets the mixture of their lengths."""
    mixed, lengths = weights @ codes, (weights @ codes.norm(dim=1)).abs()
    return mixed * (lengths / mixed.norm(dim=1).clamp(min=1e-8))[:, None]


def walk_weights(frames=FRAMES):
    """Weights of two codes, from the first to the second."""
    return tuple((1 - i / (frames - 1), i / (frames - 1)) for i in range(frames))


def plane_weights(side=PLANE):
    """Weights of three codes A, B and C: A top left, B top right, C bottom left; in rows."""
    places = [i / (side - 1) for i in range(side)]
    return tuple((1 - u - v, u, v) for v in places for u in places)


# -------------------------------------------------------------------------------------------------
# Pictures out.


def picture_of(cell):
    """A tensor uint8 (3, H, W) as a Pillow image."""
    return Image.fromarray(cell.movedim(0, -1).contiguous().numpy())


def heat(deviation):
    """A map of deviations (H, W) as colours uint8 (3, H, W), from black (none) to the greatest."""
    colours = import_matplotlib().colormaps["inferno"]
    scaled = (deviation / deviation.max().clamp(min=1e-6)).numpy()
    return torch.from_numpy((colours(scaled)[..., :3] * 255).astype(np.uint8)).movedim(-1, 0)


def overlay(image, deviation, share=0.7):
    """The map of deviations, laid over the image in grey: uint8 (3, H, W)."""
    grey = image.float().mean(0, keepdim=True)
    return (share * heat(deviation) + (1 - share) * grey).round().to(torch.uint8)


def animation(frames, path, least=224):
    """Writes frames (n, 3, H, W), there and back, as an animated WebP at least 224 pixels high."""
    scale = max(1, -(-least // frames.shape[-2]))
    frames = [picture_of(frame) for frame in frames]
    frames = [f.resize((f.width * scale, f.height * scale), Image.NEAREST) for f in frames]
    frames += frames[-2:0:-1]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=90, loop=0, quality=90)

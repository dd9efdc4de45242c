"""The completions of a view by a model, and their pictures; letters in shapes as in Models.py."""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from complete import mask_of, most_different
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from Augmentation import normalize
from internals.decoding import MODES
from internals.plots import import_matplotlib
from internals.weights import load_model
from Models import in_precision, pictures
from Samplers import code_passes, image_losses, sort_keys
from Utils import InputError, fastest_dtype

from .views import DIFFERENT, NEAREST, code_seed, decoded

CODES_PER_PASS = 4, 16  # fewest and most; fewer for large networks, to show progress
KEPT = 8  # results of each kind that an Explorer keeps
FRAMES = 17  # of a walk between two codes
PLANE = 5  # completions along each side of a plane through three codes


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
        return deviation_of(self.cells)


class Explorer:
    """A model that completes views. Keeps its last results: the encoder runs once per mask, and
    nothing that has not changed is computed again."""

    def __init__(self, source, device, **overrides):
        model = load_model(source, **overrides).to(device).eval()
        self.source, self.overrides = source, overrides
        self.config, self.code_dim = model.config, model.code_dim
        if self.config.channels not in MODES:
            n = self.config.channels
            raise InputError(f"{source} is for images of {n} channels, which this page can't show")
        self.model = in_precision(model, fastest_dtype(device))
        self.device, self.n_patches = device, math.prod(model.config.grid)
        least, most = CODES_PER_PASS
        values_per_code = self.n_patches * model.config.decoder_dim
        self.codes_per_pass = max(least, min(most, 2**19 // values_per_code))
        self.prefix = functools.lru_cache(KEPT)(self._prefix)
        self.predicted = functools.lru_cache(KEPT)(self._predicted)
        self.mixed = functools.lru_cache(KEPT)(self._mixed)

    def _prefix(self, picture, visible):
        """The normalised picture (1,C,H,W) and its model.prefix."""
        c = self.config
        pixels = pil_to_tensor(decoded(picture).convert(MODES[c.channels]))
        images = normalize(pixels[None].to(self.device), c.mean, c.std)
        noise, ratio = mask_of(visible, self.n_patches)
        return images, self.model.prefix(images, noise.to(self.device), ratio)

    def complete(self, view, progress=silent):
        """The Completed of a view. progress(n) is called when n further codes are done."""
        self.progress = progress
        return self.predicted(view.picture, view.visible, view.seed, view.codes)

    @torch.no_grad()
    def _predicted(self, picture, visible, seed, n_codes):
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
            self.progress(codes.shape[1])
        pred = torch.cat(preds, dim=1)  # (1, 1 + K, L, P*P*C)
        losses = image_losses(self.model, pred, images, prefix.mask)[0].tolist()
        image, masked, plain, *cells = pictures(pred, images, prefix.mask, self.config)[0].cpu()
        cells = torch.stack(cells) if cells else image[None, :0].new_empty(0, *image.shape)
        points = pred[0, 1:, prefix.mask[0].bool()].flatten(1).float().cpu()
        return Completed(image, masked, plain, cells, losses[1:], losses[0], points)

    def mixtures(self, view, chosen, weights, progress=silent):
        """Completions uint8 (n, 3, H, W) by mixtures of the codes with the numbers `chosen` (m,):
        weights is a tuple of n tuples of m numbers. progress: as of `complete`."""
        self.progress = progress
        return self.mixed(view.picture, view.visible, view.seed, tuple(chosen), weights)

    @torch.no_grad()
    def _mixed(self, picture, visible, seed, chosen, weights):
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
            self.progress(len(part))
        return pictures(torch.cat(preds, dim=1), images, prefix.mask, self.config)[0, 2:].cpu()


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


def deviation_of(cells):
    """The standard deviation of completions uint8 (K, 3, H, W) over codes: (H, W), mean over
    channels, as a share of white."""
    return (cells.float() / 255).std(0, correction=0).mean(0)


def heat(values):
    """A map of numbers from 0 on (H, W) as colours uint8 (3, H, W), from black (0) to the greatest
    number."""
    colours = import_matplotlib().colormaps["inferno"]
    scaled = (values / values.max().clamp(min=1e-6)).numpy()
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

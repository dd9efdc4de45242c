"""Transforms from images to uint8 tensors, and between those and what the network sees.

An image is Pillow's, or uint8 (3, H, W): transforms draw the same random numbers for both, and
differ by rounding."""

from functools import cache, partial

import torch
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in MAE, whose weights expect them
STD = (0.229, 0.224, 0.225)


def augment(size, least=0.2):
    """MAE's pretraining augmentation (appendix A.1): image -> uint8 (3, H, W), randomly cropped and
    flipped. least: the smallest share of the image that a crop may have."""
    return partial(crop_and_flip, T.RandomResizedCrop(size, scale=(least, 1)), size)


def crop_and_flip(crop, size, image):
    """What T.Compose would do with `crop` and T.RandomHorizontalFlip, in less time."""
    box, flipped = crop.make_params([image]), torch.rand(1) < 0.5
    if isinstance(image, torch.Tensor):
        rows = slice(box["top"], box["top"] + box["height"])
        columns = slice(box["left"], box["left"] + box["width"])
        image = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
        image = interpolate(image, size, mode="bicubic", antialias=True)[0]  # fast in that format
        return image.flip(-1) if flipped else image
    image = F.resized_crop(image, **box, size=size, interpolation=InterpolationMode.BICUBIC)
    return F.pil_to_tensor(F.horizontal_flip(image) if flipped else image)


def resize(size):
    """Image -> uint8 (3, H, W): the whole image, its proportions given up."""
    return T.Compose([T.Resize(size, InterpolationMode.BICUBIC), T.PILToTensor()])


def center_crop(size):
    """MAE's test transform, image -> uint8 (3, H, W): resized to 256/224 of `size`, then its
    centre."""
    return T.Compose([partial(fit, size), T.CenterCrop(size), T.PILToTensor()])


def fit(size, image):
    """The image resized so that `size` is 224/256 of it in the direction where less is left."""
    height, width = F.get_size(image)
    scale = max(size[0] / height, size[1] / width) * 256 / 224
    new_size = [
        max(length, round(old * scale)) for length, old in zip(size, (height, width), strict=True)
    ]
    return F.resize(image, new_size, InterpolationMode.BICUBIC)


def transforms(size, use_augs, least=0.2):
    """The transforms (training, test) for images of a size (height, width)."""
    return (augment(size, least), center_crop(size)) if use_augs else (resize(size), resize(size))


@cache
def channels(values, device):
    """Three numbers as (3, 1, 1) on a device, copied there once."""
    return torch.tensor(values, device=device)[:, None, None]


def normalize(images):
    """uint8 (..., 3, H, W) -> float32 as the network sees it."""
    return (images.float() / 255 - channels(MEAN, images.device)) / channels(STD, images.device)


def denormalize(images):
    """The inverse of `normalize`, rounded and clipped: float (..., 3, H, W) -> uint8."""
    images = images.float() * channels(STD, images.device) + channels(MEAN, images.device)
    return (images * 255).round().clamp(0, 255).to(torch.uint8)

"""Transforms from images to uint8 tensors, and from these to the network's input and back.

An image is Pillow's, or uint8 (3, H, W). The transforms draw the same random numbers for both; the
results differ by rounding."""

from functools import cache, partial

import torch
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's channels, as in MAE: its weights expect them
STD = (0.229, 0.224, 0.225)


def augment(size, least=0.2):
    """MAE's pretraining augmentation (appendix A.1): image -> uint8 (3, H, W), randomly cropped and
    flipped. least: the smallest share of the image's area that a crop may have."""
    return partial(crop_and_flip, T.RandomResizedCrop(size, scale=(least, 1)), size)


def crop_and_flip(crop, size, image):
    """The result of T.Compose of `crop`, T.RandomHorizontalFlip and T.PILToTensor. T.Compose would
    make loading an image 28 pixels wide 30 % slower, and one decoded by torchcodec 10 % slower."""
    box, flipped = crop.make_params([image]), torch.rand(1) < 0.5
    if isinstance(image, torch.Tensor):
        rows = slice(box["top"], box["top"] + box["height"])
        columns = slice(box["left"], box["left"] + box["width"])
        image = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
        # torch resizes channels_last images faster.
        image = interpolate(image, size, mode="bicubic", antialias=True)[0]
        return image.flip(-1) if flipped else image
    image = F.resized_crop(image, **box, size=size, interpolation=InterpolationMode.BICUBIC)
    return F.pil_to_tensor(F.horizontal_flip(image) if flipped else image)


def resize(size):
    """Image -> uint8 (3, H, W): the whole image, stretched to the size (height, width)."""
    return T.Compose([T.Resize(size, InterpolationMode.BICUBIC), T.PILToTensor()])


def center_crop(size):
    """MAE's test transform, image -> uint8 (3, H, W): the centre of the image resized to 256/224 of
    `size`."""
    return T.Compose([partial(fit, size), T.CenterCrop(size), T.PILToTensor()])


def fit(size, image):
    """The image resized, with its proportions, so that its height and width are at least 256/224 of
    `size` and one of them is exactly that."""
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
    """Three numbers as a (3, 1, 1) tensor on a device, made once per device."""
    return torch.tensor(values, device=device)[:, None, None]


def normalize(images):
    """uint8 (..., 3, H, W) -> float32, the network's input."""
    return (images.float() / 255 - channels(MEAN, images.device)) / channels(STD, images.device)


def denormalize(images):
    """The inverse of `normalize`, rounded and clipped: float (..., 3, H, W) -> uint8."""
    images = images.float() * channels(STD, images.device) + channels(MEAN, images.device)
    return (images * 255).round().clamp(0, 255).to(torch.uint8)

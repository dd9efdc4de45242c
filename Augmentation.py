"""Transforms from images to tensors of whole numbers, and from these to the network's input and
back.

An image is Pillow's, or a tensor uint8 or uint16 (C, H, W) of C channels. A transform gives uint8
(C, H, W), or uint16 for uint16. The transforms draw the same random numbers for both; the results
differ by rounding."""

from functools import cache, partial

import torch
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's channels, as in MAE: its weights expect them
STD = (0.229, 0.224, 0.225)
DEPTHS = {torch.uint8: 255, torch.uint16: 65535}  # types of images -> the largest number


def augment(size, least=0.2):
    """MAE's pretraining augmentation (appendix A.1): image -> (C, H, W), randomly cropped and
    flipped. least: the smallest share of the image's area that a crop may have."""
    return partial(crop_and_flip, T.RandomResizedCrop(size, scale=(least, 1)), size)


def crop_and_flip(crop, size, image):
    """The result of T.Compose of `crop`, T.RandomHorizontalFlip and T.PILToTensor. T.Compose would
    make loading an image 28 pixels wide 30 % slower, and one decoded by torchcodec 10 % slower."""
    box, flipped = crop.make_params([image]), torch.rand(1) < 0.5
    if isinstance(image, torch.Tensor):
        rows = slice(box["top"], box["top"] + box["height"])
        columns = slice(box["left"], box["left"] + box["width"])
        image = image[:, rows, columns]
        if image.dtype == torch.uint8:
            image = image[None].contiguous(memory_format=torch.channels_last)
            # torch resizes channels_last images faster.
            image = interpolate(image, size, mode="bicubic", antialias=True)[0]
        else:
            image = resized(image, size)
        return image.flip(-1) if flipped else image
    image = F.resized_crop(image, **box, size=size, interpolation=InterpolationMode.BICUBIC)
    return F.pil_to_tensor(F.horizontal_flip(image) if flipped else image)


def resized(image, size):
    """The image, stretched to the size (height, width)."""
    if not isinstance(image, torch.Tensor) or image.dtype == torch.uint8:
        return F.resize(image, list(size), InterpolationMode.BICUBIC)
    image = interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    return image.round().clamp(0, 65535).to(torch.uint16)  # torch resizes no uint16


def resize(size):
    """Image -> tensor (C, H, W): the whole image, stretched to the size (height, width)."""
    return T.Compose([partial(resized, size=size), T.PILToTensor()])


def center_crop(size):
    """MAE's test transform, image -> (C, H, W): the centre of the image resized to 256/224 of
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
    return resized(image, new_size)


def transforms(size, use_augs, least=0.2):
    """The transforms (training, test) for images of a size (height, width)."""
    return (augment(size, least), center_crop(size)) if use_augs else (resize(size), resize(size))


@cache
def channels(values, device):
    """One number per channel as a (C, 1, 1) tensor on a device, made once per device."""
    return torch.tensor(values, device=device)[:, None, None]


def normalize(images, mean=MEAN, std=STD):
    """uint8 or uint16 (..., C, H, W) -> float32, the network's input. mean, std: of each channel,
    as shares of the largest number of the type."""
    depth = DEPTHS.get(images.dtype, 255)
    mean, std = (channels(tuple(values), images.device) for values in (mean, std))
    return (images.float() / depth - mean) / std


def denormalize(images, mean=MEAN, std=STD, white=1.0):
    """The inverse of `normalize`, rounded and clipped: float (..., C, H, W) -> uint8. white: the
    share of the largest number that becomes 255."""
    images = images.float() * channels(tuple(std), images.device)
    images = images + channels(tuple(mean), images.device)
    return (images * (255 / white)).round().clamp(0, 255).to(torch.uint8)


def to_pictures(images, mean, std, bands=()):
    """Normalised images, float (..., C, H, W), as RGB, uint8 (..., 3, H, W). bands: the numbers of
    the three channels that are red, green and blue, or of one that is grey; by default the first
    three, or the first of one or two. Where all numbers are small (12 bits in 16), pictures are
    brightened: white is three deviations above the mean."""
    bands = list(bands) or ([0, 1, 2] if len(mean) > 2 else [0])
    white = min(1.0, max(mean[band] + 3 * std[band] for band in bands))
    pictures = denormalize(images, mean, std, white)
    return pictures[..., bands if len(bands) == 3 else 3 * bands, :, :]

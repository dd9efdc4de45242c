"""Decodes image files. IMAGE_DECODERS, at the end, lists the decoders: all give the same pixels."""

import contextlib
import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from Utils import InputError

NOTE = "note of IMLE-SSL"  # key of an image's `info`: how its numbers became pixels


def open_image(data, upright=False):
    """Encoded image -> Pillow's RGB, as torchvision's ImageFolder loads it: orientation tags and
    transparency are ignored. Grey images of more than 8 bits: see `eight_bits`. upright: the image
    is turned as its orientation tag says and put on a white background, for people to look at."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        found = f"it begins with {data[:16]}" if data else "it is empty"
        raise ValueError(f"cannot identify the format of the image file: {found}") from None
    except Image.DecompressionBombError as error:
        found = str(error).split(",")[0]  # both numbers of pixels: found and allowed
        raise ValueError(f"{found}: make the picture smaller or leave it out") from None
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        return eight_bits(image)
    if upright and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def reason_of(error):
    """Why a picture can't be read, on one line. Decoders raise errors of any kind for damaged
    bytes."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())


BITS, SAMPLE_FORMAT, PHOTOMETRIC = 258, 339, 262  # tags of TIFF files


def eight_bits(image):
    """A grey image of 16 bits, 32-bit integers or floats -> RGB, whose info[NOTE] says how. What
    becomes 0 to 255: for 16 bits the type's whole range, for others the image's own range."""
    tags, numbers = getattr(image, "tag_v2", {}), np.asarray(image)
    if image.mode == "F":
        kind, limits = "floats", None
    elif image.mode == "I" and tags.get(BITS) == (16,):
        kind, limits = "16 bits with a sign", (-32768, 32767)
    elif image.mode != "I" or image.format in ("PNG", "PPM"):  # which Pillow may read as 32 bits
        kind, limits = "16 bits", (0, 65535)
    else:
        kind, limits = "32-bit integers", None
        if tags.get(SAMPLE_FORMAT) == (1,):  # without a sign; Pillow takes the sign for granted
            numbers = numbers.view(np.uint32)
    numbers = numbers.astype(np.float32 if limits else np.float64)
    low, high = found = numbers.min(), numbers.max()
    if not np.isfinite(found).all():
        raise ValueError("it holds numbers that are not finite")
    low, high = limits or found
    grey = ((numbers - low) * (255 / ((high - low) or 1))).round().astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero; for 8 bits, Pillow does this
        grey = 255 - grey
    rgb = Image.fromarray(grey).convert("RGB")
    scale = f"{low:,g} to {high:,g} becomes" if limits else "each image's own range becomes"
    rgb.info[NOTE] = (
        f"grey values are {kind}, here from {found[0]:,g} to {found[1]:,g}; in images of this "
        f"kind {scale} 0 to 255"
    )
    return rgb


def decode_by_torchcodec(data):
    """Encoded image -> uint8 (3, H, W) with the same pixels as Pillow's. Pillow decodes everything
    but intact JPEGs in grey or RGB of a size that Pillow takes without a warning."""
    from torchcodec.decoders import decode_jpeg  # optional; see `check_decoder`

    if data.startswith(b"\xff\xd8\xff"):
        jpeg, n_pixels = without_orientation(data)
        if n_pixels <= (Image.MAX_IMAGE_PIXELS or math.inf):
            with contextlib.suppress(RuntimeError):  # Pillow decodes some damaged images
                image = decode_jpeg(torch.frombuffer(jpeg, dtype=torch.uint8), mode="UNCHANGED")
                if len(image) in (1, 3):  # grey or RGB
                    return image.expand(3, -1, -1)
    return open_image(data)


def without_orientation(data):
    """A copy of a JPEG in which the APP1 segments, where cameras write the orientation, are
    comments, and the number of pixels. torchcodec would rotate the image; ImageFolder does not."""
    data, position, n_pixels = bytearray(data), 2, 0
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        marker = data[position + 1] if position + 1 < len(data) else 0
        if marker == 0xFF:  # padding before a marker
            position += 1
            continue
        if marker == 0xE1:
            data[position + 1] = 0xFE
        if marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):  # start of a frame
            height, width = data[position + 5 : position + 7], data[position + 7 : position + 9]
            n_pixels = int.from_bytes(height, "big") * int.from_bytes(width, "big")
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data, n_pixels


IMAGE_DECODERS = {"pillow": open_image, "torchcodec": decode_by_torchcodec}


def check_decoder(name):
    """Refuses a decoder that is not installed, or does not load."""
    if name == "torchcodec":
        try:
            from torchcodec.decoders import decode_jpeg  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            advice = "pip install a torchcodec that fits this torch, or use pillow"
            raise InputError(f"torchcodec does not load ({reason}); {advice}") from None

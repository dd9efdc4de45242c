"""Decodes image files. IMAGE_DECODERS, at the end, lists the decoders: all give the same pixels."""

import contextlib
import io
import math

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from Utils import InputError

NOTE = "note of IMLE-SSL"  # key of an image's `info`: how its numbers became pixels


MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # number of channels -> Pillow's mode
NUMPY, TIFFS = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how files begin


def open_image(data, channels=3, upright=False):
    """Encoded image -> Pillow's RGB (or grey or RGBA, for 1 or 4 channels), as torchvision's
    ImageFolder loads it: orientation tags and transparency are ignored. upright: the image is
    turned as its orientation tag says and put on a white background, for people to look at.

    Arrays (.npy), TIFFs that Pillow can't read, and grey images of 16 bits for 1 channel become
    tensors uint8 or uint16 (C, H, W). Other grey images of more than 8 bits: see `eight_bits`."""
    if data.startswith(NUMPY):
        return from_array(np.load(io.BytesIO(data), allow_pickle=False), channels)
    is_tiff = data.startswith(TIFFS)
    if is_tiff and channels not in MODES:
        return from_array(read_tiff(data, channels), channels)
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if is_tiff:
            return from_array(read_tiff(data, channels), channels)
        found = f"it begins with {data[:16]}" if data else "it is empty"
        raise ValueError(f"cannot identify the format of the image file: {found}") from None
    except Image.DecompressionBombError as error:
        found = str(error).split(",")[0]  # both numbers of pixels: found and allowed
        raise ValueError(f"{found}: make the picture smaller or leave it out") from None
    if channels not in MODES:
        raise ValueError(
            f"pictures are read with 1, 3 or 4 channels, not {channels} (--channels): only .npy "
            "files and TIFFs of several bands can have so many"
        )
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        return eight_bits(image, channels)
    if upright and channels < 4 and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if channels == 4 and len(image.getbands()) == 4:  # such as CMYK: four channels as they are
        return image
    return image.convert(MODES[channels])


def from_array(array, channels):
    """An array (H, W), (H, W, C) or (C, H, W) as a tensor (C, H, W); a ValueError unless it has so
    many channels, and uint8 or uint16."""
    if array.dtype not in (np.uint8, np.dtype("<u2"), np.dtype(">u2")):
        raise ValueError(f"it holds numbers of type {array.dtype}; allowed are uint8 and uint16")
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] == channels:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != channels or 0 in array.shape:
        shape = " x ".join(map(str, array.shape))
        raise ValueError(f"its shape is {shape}, expected are {channels} channels (--channels)")
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def read_tiff(data, channels):
    """The array in a TIFF file, by tifffile, which is optional. A ValueError for one of more pixels
    than Pillow allows."""
    try:
        import tifffile
    except ImportError:
        raise ValueError("this kind of TIFF needs tifffile: pip install tifffile") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
        if (n_pixels := file.series[0].size // channels) > most:
            raise ValueError(f"it has {n_pixels} pixels, more than {most}: make it smaller")
        return file.asarray()


def reason_of(error):
    """Why a picture can't be read, on one line. Decoders raise errors of any kind for damaged
    bytes."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())


BITS, SAMPLE_FORMAT, PHOTOMETRIC = 258, 339, 262  # tags of TIFF files


def eight_bits(image, channels=3):
    """A grey image of 16 bits, 32-bit integers or floats -> 8 bits, with a note in info[NOTE]. What
    becomes 0 to 255: for 16 bits the type's whole range, for others the image's own range. For 1
    channel, an image of 16 bits keeps them: uint16 (1, H, W)."""
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
    white_is_zero = tags.get(PHOTOMETRIC) == 0  # for 8 bits, Pillow does this
    if limits and channels == 1:
        numbers = (numbers.astype(np.int32) - limits[0]).clip(0, 65535).astype(np.uint16)
        return torch.from_numpy(65535 - numbers if white_is_zero else numbers)[None]
    numbers = numbers.astype(np.float32 if limits else np.float64)
    low, high = found = numbers.min(), numbers.max()
    if not np.isfinite(found).all():
        raise ValueError("it holds numbers that are not finite")
    low, high = limits or found
    grey = ((numbers - low) * (255 / ((high - low) or 1))).round().astype(np.uint8)
    image = Image.fromarray(255 - grey if white_is_zero else grey).convert(MODES[channels])
    scale = f"{low:,g} to {high:,g} becomes" if limits else "each image's own range becomes"
    image.info[NOTE] = (
        f"grey values are {kind}, here from {found[0]:,g} to {found[1]:,g}; in images of this "
        f"kind {scale} 0 to 255"
    )
    return image


def decode_by_torchcodec(data, channels=3):
    """Encoded image -> uint8 (C, H, W) with the same pixels as Pillow's. Pillow decodes everything
    but intact upright JPEGs in grey or RGB, for 1 or 3 channels, of a size that Pillow takes
    without a warning."""
    from torchcodec.decoders import decode_jpeg  # optional; see `check_decoder`

    if channels in (1, 3) and data.startswith(b"\xff\xd8\xff"):
        with contextlib.suppress(Exception):  # a damaged image may raise any; Pillow decodes some
            header = Image.open(io.BytesIO(data))  # reads no pixels
            fits = header.width * header.height <= (Image.MAX_IMAGE_PIXELS or math.inf)
            # torchcodec would rotate an image by its orientation; ImageFolder does not.
            rotates = header.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if fits and not rotates and header.mode in ("L", MODES[channels]):
                jpeg = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return decode_jpeg(jpeg, mode="UNCHANGED").expand(channels, -1, -1)
    return open_image(data, channels)


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

"""images from a folder, a TAR, an LMDB: opening them at ImageNet's size, and loading photographs"""

import contextlib
import io
import multiprocessing
import pickle
import random
import shutil
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pack import pack
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

import Data
from Augmentation import augment
from internals.decoding import check_decoder
from internals.plots import import_matplotlib
from IO import whole
from Utils import InputError, naming

from .timing import Table, added_memory, interleaved

SCALE = {
    "name": ("store", "{}"),
    "made_seconds": ("made in s", "{:.2f}"),
    "microseconds": ("us/image", "{:.2f}"),
    "ratio": ("x tarfile", "{:.1f}"),
    "peak_mb": ("peak MB", "{:.0f}"),
    "open_seconds": ("opened in s", "{:.4f}"),
    "pickle_kb": ("pickle KB", "{:.0f}"),
    "worker_mb": ("worker +MB", "{:.1f}"),
}
LOADING = {
    "name": ("store and decoder", "{}"),
    "images_per_sec": ("images/s", "{:.0f}"),
    "ratio_to_folder": ("x folder", "{:.2f}"),
    "ratio_to_torchvision": ("x torchvision", "{:.2f}"),
}


def add_flags(parser):
    """The benchmark's flags."""
    add = parser.add_argument
    add("--images", metavar="FOLDER", help="photographs, FOLDER/class/image, to load; default: "
        "parts of the one that matplotlib brings, 500 pixels wide")  # fmt: skip
    add("--entries", type=whole(2000), default=1_281_167, metavar="N",
        help="tiny images in the archive that is opened")  # fmt: skip
    add("--reads", type=whole(1000), default=100_000, metavar="N", help="of a worker, for memory")
    add("--input_size", type=whole(1), default=224, metavar="PIXELS", help="side of the crops")
    add("--most", type=whole(1), default=256, metavar="N", help="photographs to load in a round")
    add("--repeats", type=whole(1), default=5, metavar="N", help="rounds that count")
    add("--work", metavar="DIR", help="where archives are made, and removed; default: a temporary "
        "folder")  # fmt: skip


def measure(args):
    """Yields the Tables."""
    torch.set_num_threads(1)
    if args.work and not Path(args.work).is_dir():
        raise InputError(f"--work {args.work}: there is no such folder")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        yield measure_loading(args, Path(folder))
        yield measure_scale(args, Path(folder))


# -------------------------------------------------------------------------------------------------
# Opening, and a worker's memory.


def measure_scale(args, folder):
    """The Table of what the number of images costs."""
    path, small = folder / "large.tar", folder / "small.tar"
    make_archive(path, args.entries)
    make_archive(small, 1000)
    peak = in_a_process(peak_of_listing, path)  # while little is held here
    seconds = interleaved(
        {"tarfile": partial(list_by_tarfile, path), "tar": partial(list_by_us, path)},
        min(3, args.repeats),
        warmup=0,
    )
    rows = [{"name": "tarfile.getmembers", "made_seconds": seconds["tarfile"]}]
    for kind in ("tar", "lmdb"):
        start = time.perf_counter()
        if kind == "lmdb":
            pack(path, path.with_suffix(".lmdb"))
            pack(small, small.with_suffix(".lmdb"))
        made = {"lmdb": time.perf_counter() - start, **seconds}[kind]
        start = time.perf_counter()
        images = Data.open_images(path.with_suffix(f".{kind}"))
        opened = time.perf_counter() - start
        few = Data.open_images(small.with_suffix(f".{kind}"))
        rows.append(
            {
                "name": f".{kind}",
                "made_seconds": made,
                "peak_mb": peak if kind == "tar" else None,
                "open_seconds": opened,
                "pickle_kb": len(pickle.dumps(images)) / 1000,
                "worker_mb": worker_mb(images, args.reads) - worker_mb(few, args.reads),
            }
        )
    for row in rows:
        row["microseconds"] = 1e6 * row["made_seconds"] / args.entries
        row["ratio"] = seconds["tarfile"] / row["made_seconds"]
        row["entries"] = args.entries
    return Table(
        f"{args.entries:,} tiny images in 1,000 classes, in the page cache",
        SCALE,
        rows,
        [
            "made: a .tar's index; an .lmdb packed of the .tar, and checked; peak: beyond what the "
            "process held before",
            f"worker: what it holds alone after {args.reads:,} random reads, beyond what it holds "
            "with 1,000 images",
        ],
    )


def make_archive(path, n):
    """A TAR as `tar` would make it of n images of one pixel in 1,000 classes, in no order."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    member = tarfile.TarInfo()
    member.size = len(file.getvalue())
    body = file.getvalue().ljust(512, b"\0")
    blank = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    total = sum(blank[:148]) + sum(blank[156:]) + 8 * 32
    order = np.random.default_rng(0)
    with open(path, "wb") as file:
        for label in order.permutation(1000).tolist():
            for i in order.permutation(np.arange(label, n, 1000)).tolist():
                name = b"data/imagenet/train/n%08d/n%08d_%d.JPEG" % (label, label, i)
                header = bytearray(blank)
                header[: len(name)] = name
                header[148:156] = b"%06o\0 " % (total + sum(name))
                file.write(header + body)
        file.write(bytes(10240))


def list_by_tarfile(path):
    """Lists the members as tarfile does."""
    with tarfile.open(path) as archive:
        archive.getmembers()


def list_by_us(path):
    """Opens the archive without an index."""
    shutil.rmtree(f"{path}.index", ignore_errors=True)
    Data.open_images(path)


def in_a_process(function, *arguments):
    """A function's result, by a forked process, so that nothing that was held before counts."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_of_listing(path):
    """The most MB that list_by_us holds beyond what was held before; None without Linux."""
    added = added_memory(partial(list_by_us, path), torch.device("cpu"))
    return None if added is None else 1024 * added


def own_memory():
    """MB that no other process shares with this one (its unique set size)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = (line for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
    return sum(int(line.split()[1]) for line in private) / 1024


class Memory(Dataset):
    """Reads images in random order; the MB that this process alone holds then (its unique set)."""

    def __init__(self, images, reads):
        self.images, self.reads = images, reads

    def __getitem__(self, seed):
        generator = random.Random(seed)
        for _ in range(self.reads):
            self.images[generator.randrange(len(self.images))]
        with contextlib.suppress(OSError):
            return own_memory()
        return float("nan")


def worker_mb(images, reads):
    """The MB that a worker holds alone after so many reads."""
    (mb,) = DataLoader(Memory(images, reads), None, sampler=range(1), num_workers=1)
    return mb


# -------------------------------------------------------------------------------------------------
# Loading photographs.


def measure_loading(args, folder):
    """The Table of images per second and core, with crop and flip, from the page cache."""
    photos = Path(args.images) if args.images else make_photos(folder / "photos")
    stores = {"folder": photos, ".tar": folder / "photos.tar", ".lmdb": folder / "photos.lmdb"}
    with naming("--images"):
        for path in list(stores.values())[1:]:
            pack(photos, path)
    size = (args.input_size,) * 2
    decoders = ["pillow"]
    with contextlib.suppress(InputError):
        check_decoder("torchcodec")
        decoders.append("torchcodec")
    plain = T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.PILToTensor(),
        ]
    )
    theirs = ImageFolder(photos, plain)
    n = min(args.most, len(theirs))
    chosen = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(0))[:n]
    candidates = {"torchvision's ImageFolder": partial(load_theirs, theirs, chosen)}
    for decoder in decoders:
        for store, path in stores.items():
            images = Data.open_images(path, image_decoder=decoder)
            loader = Data.ImageLoader(images, augment(size), num_workers=0)
            candidates[f"{store}, {decoder}"] = partial(load_ours, loader, chosen)
    seconds = interleaved(candidates, args.repeats)
    rows = []
    for name in candidates:
        folder_name = f"folder, {name.split(', ')[-1]}"
        rows.append(
            {
                "name": name,
                "images_per_sec": n / seconds[name],
                "ratio_to_folder": seconds.get(folder_name, np.nan) / seconds[name]
                if folder_name in seconds
                else None,
                "ratio_to_torchvision": seconds["torchvision's ImageFolder"] / seconds[name],
            }
        )
    notes = [] if "torchcodec" in decoders else ["torchcodec is not installed"]
    source = args.images or "parts of one photograph that matplotlib brings, 500 pixels wide"
    kilobytes = np.mean([Path(path).stat().st_size for path, _ in theirs.samples]) / 1000
    about = f"{n} photographs of {kilobytes:.0f} KB ({source})"
    return Table(f"Loading {about}, one core, {size[0]} x {size[1]}", LOADING, rows, notes)


def load_theirs(images, chosen):
    """A pass of torchvision's plain loader."""
    for _ in DataLoader(images, 32, sampler=chosen.tolist()):
        pass


def load_ours(loader, chosen):
    """A pass of ours."""
    for _ in loader.chunks(chosen, chosen, 32):
        pass


def make_photos(folder):
    """A folder of 256 parts of a photograph, as JPEGs 500 pixels wide."""
    photo = Image.open(
        import_matplotlib().cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    )
    generator = random.Random(0)
    for i in range(256):
        width = generator.randint(300, photo.width)
        height = width * 3 // 4
        left = generator.randint(0, photo.width - width)
        top = generator.randint(0, photo.height - height)
        part = photo.crop((left, top, left + width, top + height)).resize((500, 375))
        (folder / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
        part.save(folder / f"class{i % 4}/{i:03}.jpg", quality=95)
    return folder

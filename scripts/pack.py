"""Packs images (a folder, a .tar, an .lmdb) into one .lmdb or .tar. The encoded images are copied,
or made smaller. The packed file gets its name only when all of it was read back and compared."""

import argparse
import contextlib
import io
import json
import os
import shutil
import tarfile
import zlib
from array import array
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
import lmdb
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from Data import contents, open_images
from internals.decoding import NOTE
from internals.processes import end_workers_at_exit, ignore_stop_signals, run_command
from internals.stores import ImageError, Index, LmdbImages, TarImages, lmdb_key
from Utils import InputError, printable, say, write_atomically

BATCH = 64  # images that a worker sends at a time
TRANSACTION = 2**26  # bytes that are written to an LMDB at a time


def main(argv=None):
    """python scripts/pack.py SOURCE OUT.lmdb|OUT.tar [--size 256] [--num_workers N]"""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder of class folders, a .tar or an .lmdb")
    add("out", metavar="OUT", help="OUT.lmdb or OUT.tar; must not exist")
    add("--size", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer "
        "than this to this length, as JPEGs; default: copy all images")  # fmt: skip
    add("--num_workers", type=int, metavar="N", help="worker processes that load images; "
        "default: one per core with --size, else 0")  # fmt: skip
    args = parser.parse_args(argv)
    run_command(lambda: pack(args.source, Path(args.out).expanduser(), args.size, args.num_workers))


def pack(source, out, size=None, num_workers=None):
    """Packs the images at `source` into `out`, by way of a hidden folder beside `out`. A run that
    is killed leaves the folder behind; the next run deletes it and starts anew."""
    if num_workers is None:
        num_workers = os.cpu_count() if size else 0
    check_arguments(out, size, num_workers)
    images = open_images(source)
    one_class_tar = out.suffix == ".tar" and len(images.classes) == 1
    if one_class_tar and any(images.entry(i).count("/") > 1 for i in range(len(images))):
        raise InputError(f"{out}: folders within the only class would be taken for classes")
    write, store = WRITERS[out.suffix]
    folder, lock = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.lock")
    packed = folder / out.name
    try:
        with FileLock(lock, timeout=0), contextlib.ExitStack() as at_end:
            at_end.callback(lock.unlink, missing_ok=True)
            at_end.callback(shutil.rmtree, folder, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            checksums = write(packed, images, encoded(images, size, num_workers))
            check(store(packed), images, checksums)
            os.replace(packed, out)
            with contextlib.suppress(OSError):  # without its index, a TAR is indexed when opened
                os.replace(f"{packed}.index", f"{out}.index")
    except Timeout:
        raise InputError(f"{out}: another process is packing it") from None
    except (OSError, lmdb.Error) as error:
        raise InputError(f"cannot write {out}: {error}") from None
    say(f"packed, and checked, in {out}: {contents(images)}")


def check_arguments(out, size, num_workers):
    """Refuses bad arguments of `pack`."""
    if out.suffix not in WRITERS:
        raise InputError(f"{out}: allowed are OUT.lmdb and OUT.tar")
    if size is not None and size < 1:
        raise InputError(f"--size {size}: allowed is at least 1 pixel")
    if num_workers < 0:
        raise InputError(f"--num_workers {num_workers}: allowed is at least 0")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    if out.exists():
        raise InputError(f"{out} is there already; delete it first, or choose another name")


class Encoded(Dataset):
    """Items (entry, encoded image, its decoder's note or None). size: the longest allowed shorter
    side, in pixels, or None."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        content, note = self.images.read(index), None
        if self.size is not None:
            image = self.images.load(index)
            if isinstance(image, torch.Tensor):
                raise ImageError(f"--size makes JPEGs, but {self.images.name(index)} is an array")
            if min(image.size) > self.size:
                note = image.info.get(NOTE)
                file = io.BytesIO()
                image = F.resize(image, [self.size], InterpolationMode.BICUBIC)
                image.save(file, "jpeg", quality=95)
                content = file.getvalue()
        return os.fsencode(self.images.entry(index)), content, note


def encoded(images, size, num_workers):
    """Yields (entry, encoded image) of all images in order, with a progress bar. Prints the first
    note of the decoder."""
    end_workers_at_exit()
    noted = False
    batches = DataLoader(
        Encoded(images, size),
        batch_size=BATCH,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=ignore_stop_signals,
    )
    with tqdm(total=len(images), desc="packing", unit=" images", disable=None) as bar:
        for batch in batches:
            for entry, content, note in batch:
                if note and not noted:
                    noted = True
                    say(f"note: {printable(os.fsdecode(entry))}: {note}")
                yield entry, content
            bar.update(len(batch))


def write_tar(path, images, items):
    """Writes a TAR of items (entry, content). Returns a checksum of each item."""
    checksums = array("Q")

    def write(file):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for entry, content in items:
                member = tarfile.TarInfo(os.fsdecode(entry))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                archive.members = []  # tarfile would keep all members in memory
                checksums.append(checksum(entry, content))

    write_atomically(path, write)
    return checksums


def write_lmdb(path, images, items):
    """Writes an LMDB as LmdbImages reads it. Returns a checksum of each item (entry, content)."""
    checksums, names, starts, sizes = array("Q"), bytearray(), array("q", [0]), array("q")
    waiting, size = [], 0  # what is to be written next
    name = os.fsencode(path)  # lmdb refuses text that is no UTF-8
    with lmdb.open(name, subdir=False, lock=False, sync=False, map_size=2**28) as environment:
        for number, (entry, content) in enumerate(items):
            checksums.append(checksum(entry, content))
            names += entry
            starts.append(len(names))
            sizes.append(len(content))
            waiting.append((lmdb_key(number), content))
            size += len(content) + 100  # a hundred bytes for the objects themselves
            if size > TRANSACTION:
                put(environment, waiting)
                waiting, size = [], 0
        arrays = np.frombuffer(names, np.uint8), np.array(starts), np.array(sizes)
        index = Index(images.classes, images.index.counts, None, arrays)
        waiting.append((b"head", json.dumps(index.head()).encode()))
        put(environment, [*waiting, (b"names", names), (b"places", sizes), (b"starts", starts)])
        environment.sync(True)
    # A reader of a damaged page may look up to 64 KB behind it. Behind the file it would crash.
    os.truncate(path, os.path.getsize(path) + 2**17)
    return checksums


def put(environment, items):
    """Appends (key, value) items in one transaction; doubles the LMDB's size limit if needed."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value, append=True)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def checksum(entry, content):
    """The CRC of an image and its name."""
    return zlib.crc32(content, zlib.crc32(entry))


def check(packed, images, checksums):
    """Reads all packed images back. An InputError where one is not as it was written."""
    if packed.classes != images.classes or packed.starts.tolist() != images.starts.tolist():
        raise InputError(f"{packed.path}: the classes read back are not the packed ones")
    bar = tqdm(checksums, desc="checking", unit=" images", disable=None)
    for index, expected in enumerate(bar):
        if checksum(os.fsencode(packed.entry(index)), packed.read(index)) != expected:
            raise InputError(f"{packed.name(index)} read back is not what was packed")


WRITERS = {".lmdb": (write_lmdb, LmdbImages), ".tar": (write_tar, TarImages)}


if __name__ == "__main__":
    main()

"""Packs images (a folder, a .tar, an .lmdb) into one .lmdb or .tar: the encoded images as they are,
or made smaller. What is there afterwards is whole and checked, or nothing is there."""

import argparse
import contextlib
import io
import os
import secrets
import tarfile
import zlib
from array import array
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
import lmdb
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from Data import open_images
from internals.processes import end_workers_at_exit, ignore_stop_signals, run_command
from internals.stores import SLACK, LmdbImages, TarImages, lmdb_head, lmdb_item
from Utils import InputError, say

BATCH = 64  # images that a worker sends at a time
TRANSACTION = 2**26  # bytes that an LMDB takes at a time


def main(argv=None):
    """python scripts/pack.py SOURCE OUT.lmdb|OUT.tar [--size 256] [--num_workers N]"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a folder of class folders, .tar or .lmdb")
    parser.add_argument("out", metavar="OUT", help="OUT.lmdb or OUT.tar; must not exist")
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="make the shorter side of larger images so long, and JPEGs of them; "
        "default: images as they are",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        metavar="N",
        help="processes that make images smaller; default: cores with --size, else 0",
    )
    args = parser.parse_args(argv)
    run_command(lambda: pack(args.source, Path(args.out).expanduser(), args.size, args.num_workers))


def pack(source, out, size=None, num_workers=None):
    """Packs the images at `source` into `out`, by way of a hidden file beside it, which a run that
    was killed leaves behind and the next one starts anew."""
    writers = {".lmdb": (write_lmdb, LmdbImages), ".tar": (write_tar, TarImages)}
    if out.suffix not in writers:
        raise InputError(f"{out}: allowed are OUT.lmdb and OUT.tar")
    if size is not None and size < 1:
        raise InputError(f"--size {size}: allowed is at least 1 pixel")
    if num_workers is None:
        num_workers = os.cpu_count() if size else 0
    if num_workers < 0:
        raise InputError(f"--num_workers {num_workers}: allowed is at least 0")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    if out.exists():
        raise InputError(f"{out} is there already; delete it first, or choose another name")
    images = open_images(source)
    write, store = writers[out.suffix]
    if store is TarImages and len(images.classes) == 1:
        nested = any(images.entry(i).count("/") > 1 for i in range(len(images)))
        if nested:
            raise InputError(f"{out}: folders within the only class would be taken for classes")
    partial, lock = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.lock")
    index = out.with_name(f"{partial.name}.index")  # of a TAR that is checked
    try:
        with FileLock(lock, timeout=0), contextlib.ExitStack() as end:
            end.callback(lock.unlink, missing_ok=True)
            for path in (partial, index):
                end.callback(path.unlink, missing_ok=True)
                path.unlink(missing_ok=True)
            sums = write(partial, images, encoded(images, size, num_workers))
            check(store(partial), images, sums)
            os.replace(partial, out)
            with contextlib.suppress(FileNotFoundError):
                os.replace(index, f"{out}.index")
    except Timeout:
        raise InputError(f"{out}: another process is packing it") from None
    except (OSError, lmdb.Error) as error:
        raise InputError(f"cannot write {out}: {error}") from None
    say(f"packed: {len(images)} images in {len(images.classes)} classes, checked, in {out}")


class Encoded(Dataset):
    """Items (entry, encoded image), made smaller where a size is given."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return os.fsencode(self.images.entry(index)), self.content(index)

    def content(self, index):
        """The encoded image: as it is, unless its shorter side is longer than wanted."""
        if self.size is not None:
            image = self.images.load(index)
            if min(image.size) > self.size:
                file = io.BytesIO()
                image = F.resize(image, [self.size], InterpolationMode.BICUBIC)
                image.save(file, "jpeg", quality=95)
                return file.getvalue()
        return self.images.read(index)


def encoded(images, size, num_workers):
    """Yields (entry, encoded image) of all images, in their order, with a progress bar."""
    end_workers_at_exit()
    batches = DataLoader(
        Encoded(images, size),
        batch_size=BATCH,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=ignore_stop_signals,
    )
    with tqdm(total=len(images), desc="packing", unit=" images", disable=None) as bar:
        for batch in batches:
            yield from batch
            bar.update(len(batch))


def write_tar(path, images, items):
    """Writes a TAR of items (entry, content); a CRC of each."""
    sums = array("Q")
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for entry, content in items:
                member = tarfile.TarInfo(os.fsdecode(entry))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                sums.append(crc(entry, content))
        file.flush()
        os.fsync(file.fileno())
    return sums


def write_lmdb(path, images, items):
    """Writes an LMDB of items (entry, content); a CRC of each."""
    sums, waiting, size, identity = array("Q"), [], 0, secrets.token_bytes(8)
    environment = lmdb.open(str(path), subdir=False, lock=False, sync=False, map_size=2**28)
    with environment:
        for number, (entry, content) in enumerate(items):
            sums.append(crc(entry, content))
            waiting.append(lmdb_item(identity, number, entry, content))
            size += len(content)
            if size > TRANSACTION or len(waiting) == 100_000:
                put(environment, waiting)
                waiting, size = [], 0
        counts = [len(images.of_class(i)) for i in range(len(images.classes))]
        put(environment, [*waiting, (b"head", lmdb_head(identity, images.classes, counts))])
        environment.sync(True)
    os.truncate(path, os.path.getsize(path) + SLACK)
    return sums


def put(environment, items):
    """Appends (key, value) items in one transaction, in a map as large as that needs."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value, append=True)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def crc(entry, content):
    """A check sum of an image and its name."""
    return zlib.crc32(content, zlib.crc32(entry))


def check(packed, images, sums):
    """Reads back all that was written; an InputError where it isn't what went in."""
    if packed.classes != images.classes or packed.starts.tolist() != images.starts.tolist():
        raise InputError(f"{packed.path}: the classes read back are not those packed")
    for index, expected in enumerate(tqdm(sums, desc="checking", unit=" images", disable=None)):
        if crc(os.fsencode(packed.entry(index)), packed.read(index)) != expected:
            raise InputError(f"{packed.name(index)} read back is not what was packed")


if __name__ == "__main__":
    main()

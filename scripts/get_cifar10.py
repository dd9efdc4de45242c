"""Fetches CIFAR-10 (Krizhevsky 2009) by torchvision and writes it as two archives, OUT/train.tar
(50,000 images) and OUT/val.tar (10,000), with one folder per class."""

import argparse
import io
import tarfile
import tempfile
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from internals.processes import run_command
from Utils import InputError


def write_archive(dataset, path):
    """Writes a torchvision dataset of PIL images and labels to a .tar of PNGs, CLASS/NUMBER.png.
    The file gets its name when it is complete."""
    unfinished = path.with_name(f".{path.name}.tmp")
    with tarfile.open(unfinished, "w") as archive:
        for number, (image, label) in enumerate(tqdm(dataset, desc=path.name, unit=" images")):
            image.save(content := io.BytesIO(), "PNG")
            member = tarfile.TarInfo(f"{dataset.classes[label]}/{number:05d}.png")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
    unfinished.rename(path)


def get(out):
    """Writes the archives that are not in the folder `out` yet; an InputError if CIFAR-10 can't be
    fetched or the folder can't be written to."""
    parts = {out / "train.tar": True, out / "val.tar": False}
    missing = {path: is_train for path, is_train in parts.items() if not path.exists()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            for path, is_train in missing.items():
                write_archive(CIFAR10(folder, train=is_train, download=True), path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: CIFAR-10 could not be fetched or written: {error}") from None
    print(*parts, sep="\n")


def main(argv=None):
    """python scripts/get_cifar10.py OUT"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the two archives")
    args = parser.parse_args(argv)
    run_command(lambda: get(args.out.expanduser()))


if __name__ == "__main__":
    main()

"""Stores of images: a folder, a TAR archive, an LMDB database. All give the same classes, the same
order and the same encoded images. FORMATS, at the end, lists the stores."""

import contextlib
import functools
import hashlib
import io
import json
import os
import zlib
from functools import cached_property
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from internals.tar import find_images, read_file
from Utils import InputError, say, write_atomically


class ImageError(InputError):
    """An image that cannot be read."""


class Images(Dataset):
    """Encoded images in classes, in ImageFolder's order: by class, folder and file name. Items are
    (image, target).

    Each data format is a subclass with three methods: find, read and entry."""

    def __init__(self, path, *, transform=None, image_decoder="pillow", skip_bad=False):
        self.path, self.transform, self.skip_bad = str(path), transform, skip_bad
        self.decode = IMAGE_DECODERS[image_decoder]
        self.classes, counts = self.find()
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # of each class

    def find(self):
        """Opens the store. Returns the sorted names of the classes and the number of images in
        each."""
        raise NotImplementedError

    def read(self, index):
        """An encoded image, as bytes."""
        raise NotImplementedError

    def entry(self, index):
        """An image's path below the root, CLASS/.../IMAGE: the same in every store."""
        raise NotImplementedError

    def __len__(self):
        return int(self.starts[-1])

    @cached_property
    def targets(self):
        """Each image's class: (n,) int64. Computed on first use: loader workers do without."""
        return np.repeat(np.arange(len(self.classes)), np.diff(self.starts))

    def __getstate__(self):
        computed = ("targets", "file")  # the copy computes these again
        return {name: value for name, value in vars(self).items() if name not in computed}

    def __getitem__(self, index):
        image = self.load(index)
        return (image if self.transform is None else self.transform(image)), self.target(index)

    def target(self, index):
        """The class of an image, as a number."""
        index = range(len(self))[index]
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def of_class(self, target):
        """The images of a class, as a sequence of indices."""
        return range(self.starts[target], self.starts[target + 1])

    def name(self, index):
        """Where an image is, for messages: one line."""
        return printable(f"{self.path}/{self.entry(range(len(self))[index])}")

    def load(self, index):
        """An image as Pillow's RGB, or as uint8 (3, H, W) from torchcodec. An ImageError that names
        the image where it is damaged."""
        index = range(len(self))[index]
        try:
            return self.decode(self.read(index))
        except Exception as error:  # decoders raise anything for damaged bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"cannot read the image {self.name(index)}: {reason}") from None


def printable(text):
    """Text on one line, with escapes for file names that are not valid Unicode."""
    return text.encode(errors="backslashreplace").decode().replace("\n", "\\n")


def check_classes(path, class_folders, classes):
    """Refuses a store without class folders, or with a class folder that holds no image, as
    ImageFolder does. classes: the names of the class folders that hold images."""
    if not class_folders:
        raise InputError(f"{path} has no class folders: expected {path}/class/image")
    if not classes:
        raise InputError(
            f"{path} holds no images in its class folders ({', '.join(IMG_EXTENSIONS)})"
        )
    empty = sorted(set(class_folders) - set(classes))
    if empty:
        raise InputError(
            f"{path}: no image in the class folder {empty[0]}"
            + f" ({len(empty)} such)" * (len(empty) > 1)
        )


# -------------------------------------------------------------------------------------------------


def decode_by_pillow(data):
    """Encoded image -> Pillow's RGB, as torchvision's ImageFolder gives it (no orientation tag is
    followed)."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode_by_torchcodec(data):
    """Encoded image -> uint8 (3, H, W), the same pixels; as `decode_by_pillow` gives it where it is
    no sound JPEG in grey or RGB."""
    from torchcodec.decoders import decode_jpeg  # optional; see `check_decoder`

    if data.startswith(b"\xff\xd8\xff"):
        with contextlib.suppress(RuntimeError):  # Pillow, which is more patient, shall decide
            encoded = torch.frombuffer(without_orientation(data), dtype=torch.uint8)
            image = decode_jpeg(encoded, mode="UNCHANGED")
            if len(image) in (1, 3):  # grey or RGB
                return image.expand(3, -1, -1)
    return decode_by_pillow(data)


def without_orientation(data):
    """A copy of a JPEG whose APP1 segments, where cameras put the orientation, are comments:
    torchcodec would turn the image, ImageFolder does not."""
    data, position = bytearray(data), 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        if data[position + 1 : position + 2] == b"\xff":  # a marker may have several of these
            position += 1
            continue
        if data[position + 1 : position + 2] == b"\xe1":
            data[position + 1] = 0xFE
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data


IMAGE_DECODERS = {"pillow": decode_by_pillow, "torchcodec": decode_by_torchcodec}


def check_decoder(name):
    """Refuses a decoder that this machine doesn't have."""
    if name == "torchcodec":
        try:
            from torchcodec.decoders import decode_jpeg  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            advice = "pip install a torchcodec that fits this torch, or use pillow"
            raise InputError(f"torchcodec does not load ({reason}); {advice}") from None


# -------------------------------------------------------------------------------------------------


class Index:
    """Which images a folder or TAR holds. Python lists would be copied into every loader worker;
    flat arrays are shared.

    names: all entries as one uint8 array. starts: (n + 1,) int64, where each entry starts in it.
    places: (n, 3) int64, where a TAR holds each image, or (n, 0). origin: which archive the index
    was made of. folder: where the index is saved, or None."""

    ARRAYS = ("names", "starts", "places")

    def __init__(self, classes, counts, origin, arrays, folder=None):
        self.classes, self.counts, self.origin, self.folder = classes, counts, origin, folder
        self.names, self.starts, self.places = arrays

    @classmethod
    def make(cls, groups, origin=None):
        """groups: (class, entries as bytes, their places) in order; a class may come several times
        in a row."""
        counts, names, lengths, places = {}, [], [[0]], []
        for name, entries, entry_places in groups:
            counts[name] = counts.get(name, 0) + len(entries)
            names.append(b"".join(entries))
            lengths.append(list(map(len, entries)))
            places.append(entry_places)
        names = np.frombuffer(b"".join(names), np.uint8)
        starts = np.concatenate(lengths).cumsum()
        arrays = names, starts, np.concatenate(places)
        return cls(list(counts), list(counts.values()), origin, arrays)

    def entry(self, index):
        """CLASS/.../IMAGE."""
        return entry_at(self.names, self.starts, index)

    def head(self):
        """All but the arrays, and a checksum of everything."""
        head = {"classes": self.classes, "counts": self.counts, "origin": self.origin}
        checksum = zlib.crc32(json.dumps(head).encode())
        for name in self.ARRAYS:
            checksum = zlib.crc32(getattr(self, name), checksum)
        return head | {"checksum": checksum}

    def save(self, folder):
        """Writes each array to a .npy file of a folder. Processes that save the same index at once
        write the same bytes; the head, written last, makes the index valid."""
        if folder.is_file():  # an index of version 0.1.0
            folder.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.ARRAYS:
            write_atomically(
                folder / f"{name}.npy", lambda file, name=name: np.save(file, getattr(self, name))
            )
        write_atomically(folder / "head.json", json.dumps(self.head()).encode())

    @classmethod
    def load(cls, folder):
        """The index in a folder, its arrays mapped rather than read; None where there is none, or
        it is damaged."""
        try:
            head = json.loads((folder / "head.json").read_bytes())
            arrays = [
                np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in cls.ARRAYS
            ]
            index = cls(head["classes"], head["counts"], head["origin"], arrays, folder)
            return index if index.head() == head else None
        except Exception:  # numpy raises anything for damaged files
            return None

    def __getstate__(self):
        """A saved index travels to other processes by the path of its folder."""
        return (self.folder, self.head()) if self.folder else (None, vars(self))

    def __setstate__(self, state):
        folder, content = state
        if folder:
            index = Index.load(folder)
            if index is None or index.head() != content:
                raise InputError(f"{folder} was made anew since the data was opened")
            content = vars(index)
        vars(self).update(content)


def entry_at(names, starts, index):
    """The entry of an image, from the arrays of Index."""
    return os.fsdecode(bytes(names[starts[index] : starts[index + 1]]))


class FolderImages(Images):
    """A folder as torchvision's ImageFolder reads: path/class/.../image."""

    def find(self):
        class_folders = sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())
        start = len(os.path.join(self.path, ""))
        groups = []
        for name in class_folders:
            found = make_dataset(self.path, {name: 0}, IMG_EXTENSIONS, allow_empty=True)
            if found:
                entries = [os.fsencode(path[start:]) for path, _ in found]
                groups.append((name, entries, np.empty((len(entries), 0), np.int64)))
        check_classes(self.path, class_folders, [name for name, _, _ in groups])
        self.index = Index.make(groups)
        return self.index.classes, self.index.counts

    def entry(self, index):
        return self.index.entry(index)

    def read(self, index):
        with open(f"{self.path}/{self.index.entry(index)}", "rb") as file:
            return file.read()


class TarImages(Images):
    """An uncompressed TAR as ROOT/class/.../image. ROOT is the longest folder that all images
    share."""

    def find(self):
        self.index = self.find_index()
        if len(self.index.classes) == 1:
            only = printable(self.index.classes[0])
            say(f"note: all images of {self.path} are of one class, {only}")
        return self.index.classes, self.index.counts

    def find_index(self):
        """The archive's index: beside the archive, or in the user's cache. Made and saved where
        there is none of the archive as it is; kept in memory where it cannot be saved."""
        origin = self.origin()
        folders = [Path(f"{self.path}.index"), cache_folder(self.path)]
        saved = load_index(folders, origin)
        if saved:
            return saved
        class_folders, groups = find_images(self.path)
        index = Index.make(groups, origin)
        check_classes(self.path, class_folders, index.classes)
        if self.origin() != origin:
            raise InputError(f"{self.path} changed while it was read: is it still being written?")
        for folder in folders:
            with contextlib.suppress(OSError):
                # Another process may have saved the index meanwhile: its files are in use.
                if not load_index([folder], origin):
                    index.save(folder)
                return Index.load(folder) or index
        return index

    def origin(self):
        """What tells the archive from others: size, time of the last change, and which file names
        count as images."""
        stat = os.stat(self.path)
        return [stat.st_size, stat.st_mtime_ns, *IMG_EXTENSIONS]

    def entry(self, index):
        return self.index.entry(index)

    @cached_property
    def file(self):
        """The archive, opened on first use."""
        return open(self.path, "rb", buffering=0)

    def read(self, index):
        position, size, crc = self.index.places[index].tolist()
        content, found_crc = read_file(self.file, position, size)
        if found_crc != crc:
            raise InputError(f"the archive is not the one that {self.index.folder} was made of")
        return content


def load_index(folders, origin):
    """The first index in one of the folders that was made of this origin, or None."""
    for folder in folders:
        index = Index.load(folder)
        if index and index.origin == origin:
            return index
    return None


def cache_folder(path):
    """Where the index is kept of an archive whose own folder cannot be written to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return cache / "imle-ssl" / f"{name}.index"


# -------------------------------------------------------------------------------------------------

LMDB_READS = 16  # then the file is opened anew: pages that were read count as process memory


class OpenLmdb:
    """An LMDB that each process opens for itself, without locks. identity: see `identify`."""

    def __init__(self, *identity):
        self.identity, self.environment, self.process, self.reads = identity, None, None, 0

    @contextlib.contextmanager
    def transaction(self, path):
        """A transaction, whose `get` returns memoryviews that are valid only inside."""
        if self.process != os.getpid() or self.reads >= LMDB_READS:
            if self.environment is not None:
                self.environment.close()
            self.environment = None
            self.environment = open_environment(path, self.identity)
            self.process, self.reads = os.getpid(), 0
        self.reads += 1
        try:
            with self.environment.begin(buffers=True) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise InputError(f"{path} is damaged: {error}") from None


open_lmdb = functools.cache(OpenLmdb)  # a process may open a file once only


def open_environment(path, identity):
    """An lmdb.Environment. An InputError where the file is no LMDB, is cut or was replaced."""
    try:
        environment = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
        size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    except lmdb.Error as error:
        raise InputError(f"{path} is no LMDB that can be read: {error}") from None
    refusal = None
    if os.path.getsize(path) < size:  # reading a missing page would kill the process
        refusal = f"is cut: it should have {size} bytes"
    elif identify(path) != identity:
        refusal = "was replaced since it was opened"
    if refusal:
        environment.close()
        raise InputError(f"{path} {refusal}")
    return environment


def identify(path):
    """(device, inode) of a file: other files have another pair."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def lmdb_key(number):
    """The key of an image. Its value is the encoded image."""
    return number.to_bytes(8, "big")


class LmdbImages(Images):
    """An LMDB that scripts/pack.py made. Besides the images: b"head", JSON with the classes and
    their numbers of images; b"names" and b"starts", as in Index; b"sizes", int64 of each image."""

    def find(self):
        self.identity = identify(self.path)
        with self.transaction() as transaction:
            try:
                head = json.loads(bytes(transaction.get(b"head", b"")))
                return head["classes"], head["counts"]
            except (ValueError, LookupError, TypeError):
                raise InputError(
                    f"{self.path} was not made by scripts/pack.py, or by its version 0.1.0, "
                    "or is damaged: pack the images again"
                ) from None

    def transaction(self):
        return open_lmdb(*self.identity).transaction(self.path)

    def value(self, transaction, key):
        """The value of a key, as a memoryview."""
        value = transaction.get(key)
        if value is None:
            raise InputError(f"{self.path} is damaged: it lacks the key {key}")
        return value

    def entry(self, index):
        with self.transaction() as transaction:
            starts = np.frombuffer(self.value(transaction, b"starts"), np.int64)
            return entry_at(self.value(transaction, b"names"), starts, index)

    def read(self, index):
        with self.transaction() as transaction:
            content = self.value(transaction, lmdb_key(index))
            sizes = np.frombuffer(self.value(transaction, b"sizes"), np.int64)
            if len(content) != sizes[index]:  # a damaged size may lead out of the file
                raise InputError(f"{self.path} is damaged")
            return bytes(content)


# To add a data format, write a subclass of Images and add a line: which paths are of the format,
# and the class. The first line that fits a path is used.
FORMATS = [
    (lambda path: path.suffix.lower() == ".lmdb" and not path.is_dir(), LmdbImages),
    (lambda path: path.is_dir(), FolderImages),
    (lambda path: path.suffix.lower() == ".tar", TarImages),
]

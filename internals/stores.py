"""Stores of images: a folder, a TAR archive, an LMDB database. All give the same classes, the same
order and the same encoded images. FORMATS, at the end, lists the stores."""

import contextlib
import functools
import hashlib
import json
import os
import zlib
from functools import cached_property
from pathlib import Path

import lmdb
import numpy as np
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from internals.decoding import IMAGE_DECODERS, reason_of
from internals.layout import SYSTEM_FOLDERS, UNLABELLED, find_layout, identify, list_folder
from internals.tar import SPARSE, find_images, read_file
from Utils import InputError, printable, write_atomically


class ImageError(InputError):
    """An image that cannot be read."""


class Images(Dataset):
    """Encoded images in classes, in ImageFolder's order: by class, folder and file name. Items are
    (image, target).

    Each data format is a subclass with three methods: find, read and size."""

    def __init__(self, path, *, transform=None, image_decoder="pillow", skip_bad=False, channels=3):
        self.path, self.transform, self.skip_bad = str(path), transform, skip_bad
        self.channels = channels  # of the images that `load` gives
        self.decode = IMAGE_DECODERS[image_decoder]
        self.replaced, self.noted = set(), False  # what ImageLoaders have reported, see there
        self.index = self.find()
        self.classes = self.index.classes
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.starts = np.concatenate([[0], np.cumsum(self.index.counts)])  # of each class

    def find(self):
        """Opens the store: the Index of its images. Called once, before `read`."""
        raise NotImplementedError

    def read(self, index):
        """An encoded image, as bytes."""
        raise NotImplementedError

    def size(self, index):
        """The number of bytes of an encoded image, without reading the image if possible."""
        raise NotImplementedError

    def fingerprint(self):
        """Plain data, the same for the same images in any store: the number of images, the classes,
        a digest of all entries, and one of the sizes of 1,000 evenly spaced images and the bytes of
        100 of them."""
        entries = hashlib.sha256(self.index.names)
        entries.update(self.index.starts)
        sizes = [int(self.size(i)) for i in evenly_spaced(len(self), 1000)]
        contents = hashlib.sha256(str(sizes).encode())
        for i in evenly_spaced(len(self), 100):
            with contextlib.suppress(OSError, InputError):  # an error only where it is used
                contents.update(self.read(i))
        return {
            "images": len(self),
            "classes": list(self.classes),
            "entries": entries.hexdigest(),
            "contents": contents.hexdigest(),
        }

    def entry(self, index):
        """An image's path below the root, CLASS/.../IMAGE: the same in every store."""
        return self.index.entry(index)

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

    def source(self, index):
        """The store that holds an image, and the image's index there."""
        return self, index

    def target(self, index):
        """The class of an image, as a number."""
        index = range(len(self))[index]
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def of_class(self, target):
        """The images of a class, as a sequence of indices."""
        return range(self.starts[target], self.starts[target + 1])

    def name(self, index):
        """Where an image is, for messages: one line."""
        entry = self.entry(range(len(self))[index])
        return printable(f"{self.path}/{entry.removeprefix(f'{UNLABELLED}/')}")

    def load(self, index):
        """An image of self.channels channels as Pillow's, or as a tensor (C, H, W), see open_image.
        An ImageError that names the image where it is damaged."""
        index = range(len(self))[index]
        try:
            return self.decode(self.read(index), self.channels)
        except Exception as error:  # decoders raise anything for damaged bytes
            name = self.name(index)
            raise ImageError(f"cannot read the image {name}: {reason_of(error)}") from None


def evenly_spaced(n, most):
    """At most so many evenly spaced numbers of range(n)."""
    count = min(n, most)
    return [i * n // count for i in range(count)]


# -------------------------------------------------------------------------------------------------


class Index:
    """The images of a store, as flat arrays: all processes share the memory of these.

    names: all entries as one uint8 array. starts: (n + 1,) int64, where each entry starts in names.
    places: (n, ...) int64, where each image lies, as the store understands it. origin: what the
    index was made of. left_out: numbers and kinds of the files that are no images, as text. folder:
    where the index is saved, or None."""

    ARRAYS = {"names": np.uint8, "starts": np.int64, "places": np.int64}

    def __init__(self, classes, counts, origin, arrays, left_out="", folder=None):
        self.classes, self.counts, self.origin, self.folder = classes, counts, origin, folder
        self.left_out = left_out
        self.names, self.starts, self.places = arrays

    @classmethod
    def make(cls, groups, origin=None, left_out=""):
        """An index in memory. groups: (class, entries as bytes, their places) in ImageFolder's
        order, where each class comes once or several times in a row."""
        counts, names, lengths, places = {}, [], [[0]], []
        for name, entries, entry_places in groups:
            counts[name] = counts.get(name, 0) + len(entries)
            names.append(b"".join(entries))
            lengths.append(list(map(len, entries)))
            places.append(entry_places)
        names = np.frombuffer(b"".join(names), np.uint8)
        starts = np.concatenate(lengths).cumsum()
        arrays = names, starts, np.concatenate(places)
        return cls(list(counts), list(counts.values()), origin, arrays, left_out)

    def entry(self, index):
        """CLASS/.../IMAGE."""
        return os.fsdecode(bytes(self.names[self.starts[index] : self.starts[index + 1]]))

    def head(self):
        """The fields that are not arrays, and a checksum of all fields."""
        names = ("classes", "counts", "origin", "left_out")
        head = {name: getattr(self, name) for name in names}
        checksum = zlib.crc32(json.dumps(head).encode())
        for name in self.ARRAYS:
            checksum = zlib.crc32(getattr(self, name), checksum)
        return head | {"checksum": checksum}

    def save(self, folder):
        """Writes the index to a folder, each array to a .npy file. Returns it with these files
        mapped. Several processes may save an index at once: they write the same bytes."""
        if folder.is_file():  # an index of version 0.1.0
            folder.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.ARRAYS:
            array = getattr(self, name)
            write_atomically(folder / f"{name}.npy", functools.partial(np.save, arr=array))
        write_atomically(folder / "head.json", json.dumps(self.head()).encode())
        return self.load(folder, self.origin)

    @classmethod
    def checked(cls, head, arrays, folder=None):
        """The index with this head and these arrays. A ValueError, LookupError or TypeError where
        it is damaged."""
        fields = head["classes"], head["counts"], head["origin"], arrays, head["left_out"]
        index = cls(*fields, folder)
        if index.head() != head:
            raise ValueError("the checksum is wrong")
        return index

    @classmethod
    def load(cls, folder, origin):
        """The index in a folder, its arrays mapped. None where there is no sound index that was
        made of this origin."""
        try:
            head = json.loads((folder / "head.json").read_bytes())
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.ARRAYS]
            # np.asarray: the same memory, faster to index.
            index = cls.checked(head, map(np.asarray, arrays), folder)
            return index if index.origin == origin else None
        except Exception:  # numpy and json raise anything for damaged files
            return None

    def __getstate__(self):
        """Of a saved index, only the head is pickled: the copy maps the same files."""
        return (self.folder, self.head()) if self.folder else (None, vars(self))

    def __setstate__(self, state):
        folder, content = state
        if folder:
            index = Index.load(folder, content["origin"])
            if index is None or index.head() != content:
                raise InputError(f"{folder} was made anew since the data was opened")
            content = vars(index)
        vars(self).update(content)


class FolderImages(Images):
    """A folder as torchvision's ImageFolder reads: path/class/.../image."""

    def find(self):
        files, folders, broken = list_folder(self.path)
        # With --skip_bad_images, an image that a broken link stands for is a damaged image.
        refused = [link for link in broken if not (self.skip_bad and is_image_file(link))]
        if refused:
            link, more = refused[0], f" ({len(refused)} such links)" * (len(refused) > 1)
            target = f"is a link to {broken[link]}, which can't be opened{more}"
            raise InputError(printable(f"{self.path}/{link} {target}: mend or delete it"))
        groups, left_out = find_layout(self.path, files, folders, root=[])
        groups = (
            (name, [os.fsencode(f"{below}/{n}") for n in names], np.empty((len(names), 0), int))
            for name, below, _, names in groups
        )
        return Index.make(groups, left_out=left_out)

    def read(self, index):
        with open(f"{self.path}/{self.index.entry(index)}", "rb") as file:
            return file.read()

    def size(self, index):
        try:
            return os.path.getsize(f"{self.path}/{self.index.entry(index)}")
        except OSError:  # a broken link: an error only where the image is used
            return -1


class TarImages(Images):
    """An uncompressed TAR as ROOT/class/.../image. ROOT is the longest folder that all images
    share."""

    def find(self):
        """The archive's index. A new one is saved beside the archive or in the user's cache; where
        neither can be written to, the index stays in memory."""
        origin = self.origin()
        folders = [Path(f"{self.path}.index"), cache_folder(self.path)]
        for folder in folders:
            if index := Index.load(folder, origin):
                return index
        groups, left_out = find_images(self.path)
        index = Index.make(groups, origin, left_out)
        if self.origin() != origin:
            raise InputError(f"{self.path} changed while it was read: is it still being written?")
        for folder in folders:
            with contextlib.suppress(OSError):
                # Another process may have saved the index meanwhile, and others use its files.
                return Index.load(folder, origin) or index.save(folder) or index
        return index

    def origin(self):
        """What tells the archive from others: size, time of the last change, and which file names
        count as images."""
        stat = os.stat(self.path)
        return [stat.st_size, stat.st_mtime_ns, *IMG_EXTENSIONS, *sorted(SYSTEM_FOLDERS)]

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

    def size(self, index):
        size = self.index.places[index][1]
        return len(self.read(index)) if size == SPARSE else size


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
        name = os.fsencode(path)  # lmdb refuses text that is no UTF-8
        environment = lmdb.open(name, subdir=False, readonly=True, lock=False, readahead=False)
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


def lmdb_key(number):
    """The key of an image. Its value is the encoded image."""
    return number.to_bytes(8, "big")


class LmdbImages(Images):
    """An LMDB that scripts/pack.py made. It holds the images, the head of their Index as b"head",
    and the arrays of the Index by their names. places: (n,), the size of each image in bytes."""

    def find(self):
        self.identity = identify(self.path)
        return self.read_index()

    def transaction(self):
        return open_lmdb(*self.identity).transaction(self.path)

    def read_index(self):
        """The Index, in memory."""
        with self.transaction() as transaction:
            try:
                head = json.loads(bytes(transaction.get(b"head", b"")))
                arrays = [
                    np.frombuffer(bytes(transaction.get(name.encode(), b"")), dtype)
                    for name, dtype in Index.ARRAYS.items()
                ]
                return Index.checked(head, arrays)
            except (ValueError, LookupError, TypeError):
                raise InputError(
                    f"{self.path} was not made by scripts/pack.py, or by an old version of it "
                    "(0.1.0), or is damaged: pack the images again"
                ) from None

    def __getstate__(self):
        return super().__getstate__() | {"index": None}

    def __setstate__(self, state):
        vars(self).update(state)
        self.index = self.read_index()

    def read(self, index):
        with self.transaction() as transaction:
            content = transaction.get(lmdb_key(index), b"")
            if len(content) != self.index.places[index]:
                raise InputError(f"{self.path} is damaged")
            return bytes(content)

    def size(self, index):
        return self.index.places[index]


# To add a data format, write a subclass of Images and add a line: which paths are of the format,
# and the class. The first line that fits a path is used.
FORMATS = [
    (lambda path: path.suffix.lower() == ".lmdb" and not path.is_dir(), LmdbImages),
    (lambda path: path.is_dir(), FolderImages),
    (lambda path: path.suffix.lower() == ".tar", TarImages),
]

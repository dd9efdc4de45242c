"""Where images lie: in a folder, a TAR, an LMDB. Each gives the same classes, order and bytes, and
holds nothing in memory that grows with the number of images."""

import contextlib
import functools
import hashlib
import io
import json
import os
import struct
import tarfile
import tempfile
import weakref
import zlib
from functools import cached_property
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from internals.archives import BLOCK, TarMembers, check_classes
from Utils import InputError, say, write_atomically


class ImageError(InputError):
    """An image that can't be read."""


class Images(Dataset):
    """Encoded images in classes, in ImageFolder's order: by class, folder and file name. Items are
    (image, target).

    classes: sorted names; counts: images of each; subclasses add `read` and `entry`."""

    def __init__(
        self, path, classes, counts, *, transform=None, image_decoder="pillow", skip_bad=False
    ):
        self.path, self.transform, self.skip_bad = str(path), transform, skip_bad
        self.classes, self.class_to_idx = classes, {name: i for i, name in enumerate(classes)}
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # of each class
        self.decode = IMAGE_DECODERS[image_decoder]

    def __len__(self):
        return int(self.starts[-1])

    @cached_property
    def targets(self):
        """Each image's class: (n,) int64. Made when asked for, so that workers go without."""
        return np.repeat(np.arange(len(self.classes)), np.diff(self.starts))

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "targets"}

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

    def read(self, index):
        """The encoded image, as bytes."""
        raise NotImplementedError

    def entry(self, index):
        """CLASS/.../IMAGE, the same in every store."""
        raise NotImplementedError

    def name(self, index):
        """Where the image is, for messages: one line, whatever its name holds."""
        text = f"{self.path}/{self.entry(range(len(self))[index])}"
        return text.encode(errors="backslashreplace").decode().replace("\n", "\\n")

    def load(self, index):
        """The image as Pillow's RGB, or, by another decoder, as uint8 (3, H, W); an ImageError that
        names it where it is damaged."""
        index = range(len(self))[index]
        try:
            return self.decode(self.read(index))
        except Exception as error:  # decoders raise anything for damaged bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"cannot read the image {self.name(index)}: {reason}") from None


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


class Reader:
    """A file that is read at any place, by any number of processes and threads. Opened when it is
    first read, and again after pickling."""

    def __init__(self, path):
        self.path, self.descriptor = str(path), None

    def read(self, size, position):
        """Exactly `size` bytes from `position` on; an OSError where the file ends before."""
        data = os.pread(self.fileno(), size, position)
        while len(data) < size:  # the system may give less at a time
            more = os.pread(self.descriptor, size - len(data), position + len(data))
            if not more:
                raise OSError(f"{self.path} ends before byte {position + size}")
            data += more
        return data

    def fileno(self):
        """The open file's descriptor."""
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        return self.descriptor

    def __getstate__(self):
        return {"path": self.path, "descriptor": None}

    def __del__(self):
        if self.descriptor is not None:
            os.close(self.descriptor)


# -------------------------------------------------------------------------------------------------
# The index of a folder or TAR: a file of flat arrays, read in place. It isn't mapped, as a mapped
# page counts as a worker's own memory where no other process has touched it.

RECORD = struct.Struct("<qqqII")  # of an image: position, size, CRC of its header; its name
COLUMNS = np.dtype("<i8, <i8, <i8, <u4, <u4")  # the same: position, size, name, name's length, CRC
TRAILER = struct.Struct("<8sqqI")  # magic; where the records begin, where the head does; the CRC
MAGIC = b"IMLEidx1"


class Index:
    """An index file: classes, counts of images, `origin`, by which it is known to be current. An
    OSError or ValueError where it is none, or is damaged."""

    def __init__(self, path):
        self.file = Reader(path)
        self.trailer = self.read_trailer()
        magic, self.records, start, crc = TRAILER.unpack(self.trailer)
        end = os.fstat(self.file.fileno()).st_size - TRAILER.size
        if magic != MAGIC or not 0 <= self.records <= start <= end:
            raise ValueError(f"{path} is no index")
        found = 0
        for position in range(0, end, 2**20):
            found = zlib.crc32(self.file.read(min(2**20, end - position), position), found)
        if found != crc:
            raise ValueError(f"{path} is damaged")
        head = json.loads(self.file.read(end - start, start))
        self.classes, self.counts, self.origin = head["classes"], head["counts"], head["origin"]

    def read_trailer(self):
        """The end of the file, which tells one index from another."""
        size = os.fstat(self.file.fileno()).st_size
        return self.file.read(TRAILER.size, max(0, size - TRAILER.size))

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.read_trailer() != self.trailer:
            raise InputError(f"{self.file.path} was made anew since the data was opened")

    def record(self, index):
        """(position, size, position of the name, its length, CRC of the header) of an image."""
        return RECORD.unpack(self.file.read(RECORD.size, self.records + index * RECORD.size))

    def entry(self, index):
        """CLASS/.../IMAGE."""
        _, _, position, length, _ = self.record(index)
        return os.fsdecode(self.file.read(length, position))


def write_index(file, origin, groups):
    """Writes an index. groups: (class, entries as bytes, their positions, sizes, CRCs), in order;
    a class may come several times in a row."""
    classes, counts, records, end, crc = [], [], [], 0, 0
    for name, entries, *places in groups:
        if not classes or classes[-1] != name:
            classes.append(name)
            counts.append(0)
        counts[-1] += len(entries)
        lengths = np.fromiter(map(len, entries), np.int64, len(entries))
        ends = end + lengths.cumsum()
        end += int(lengths.sum())
        names = b"".join(entries)
        file.write(names)
        crc = zlib.crc32(names, crc)
        columns = np.zeros(len(entries), COLUMNS)
        columns["f2"], columns["f3"] = ends - lengths, lengths
        for field, values in zip(("f0", "f1", "f4"), places, strict=False):
            columns[field] = values
        records.append(columns.tobytes())
    start = end + RECORD.size * sum(counts)
    head = json.dumps({"classes": classes, "counts": counts, "origin": origin}).encode()
    for data in (*records, head):
        file.write(data)
        crc = zlib.crc32(data, crc)
    file.write(TRAILER.pack(MAGIC, end, start, crc))


def temporary_index(owner, origin, groups):
    """An Index in a temporary file, which goes with `owner`."""
    with tempfile.NamedTemporaryFile(prefix="imle-ssl-", suffix=".index", delete=False) as file:
        weakref.finalize(owner, remove, file.name, os.getpid())
        write_index(file, origin, groups)
    return Index(file.name)


def remove(path, process):
    """Removes a file, but in this process only: a forked one must leave it."""
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            os.unlink(path)


# -------------------------------------------------------------------------------------------------


class FolderImages(Images):
    """Images as torchvision's ImageFolder finds them: path/class/.../image."""

    def __init__(self, path, **options):
        classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        self.index = temporary_index(self, None, self.find(str(path), classes))
        check_classes(path, classes, self.index.classes)
        super().__init__(path, self.index.classes, self.index.counts, **options)

    @staticmethod
    def find(path, classes):
        """The groups of write_index."""
        for name in classes:
            found = make_dataset(path, {name: 0}, IMG_EXTENSIONS, allow_empty=True)
            if found:
                start = len(os.path.join(path, ""))
                yield name, [os.fsencode(image[start:]) for image, _ in found]

    def entry(self, index):
        return self.index.entry(index)

    def read(self, index):
        with open(f"{self.path}/{self.index.entry(index)}", "rb") as file:
            return file.read()


class TarImages(Images):
    """Images in an uncompressed TAR as ROOT/class/.../image, where ROOT is all that the images'
    folders have in common."""

    def __init__(self, path, **options):
        self.file = Reader(path)
        self.index = self.find_index(Path(path))
        super().__init__(path, self.index.classes, self.index.counts, **options)
        if len(self.classes) == 1:
            say(f"note: all images of {path} are of one class, {self.name(0).split('/')[-2]}")

    def find_index(self, path):
        """The archive's index, made where there is none of the archive as it is: beside it, else in
        the user's cache, else in a temporary file."""
        origin = self.origin()
        places = [path.with_name(f"{path.name}.index"), cache_folder() / index_name(path)]
        for place in places:
            with contextlib.suppress(OSError, ValueError):
                index = Index(place)
                if index.origin == origin:
                    return index
        members = TarMembers(self.file.fileno(), origin[0], path)
        if self.origin() != origin:
            raise InputError(f"{path} changed while it was read: is it still being written?")
        for place in places:
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(place, lambda file: write_index(file, origin, members.groups()))
                return Index(place)
        return temporary_index(self, origin, members.groups())

    def origin(self):
        """What an index of this archive is known by."""
        stat = os.fstat(self.file.fileno())
        return [stat.st_size, stat.st_mtime_ns, *IMG_EXTENSIONS]

    def entry(self, index):
        return self.index.entry(index)

    def read(self, index):
        position, size, _, _, crc = self.index.record(index)
        data = self.file.read(BLOCK + max(0, size), position)
        if zlib.crc32(data[:BLOCK]) != crc:
            raise InputError(f"its archive is not what {self.index.file.path} was made of")
        return data[BLOCK:] if size >= 0 else self.read_sparse(position)

    def read_sparse(self, position):
        """The content of a member with holes: rare, so by Python's own reader."""
        with open(self.path, "rb") as file:
            file.seek(position)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                return archive.extractfile(archive.next()).read()


def cache_folder():
    """Where indexes are kept of archives in folders that can't be written to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imle-ssl"


def index_name(path):
    """An index's name in the cache, by the archive's whole path."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32] + ".index"


# -------------------------------------------------------------------------------------------------
# LMDB: b"head" -> HEAD, JSON; an image's number, 8 bytes -> HEADER, CRC, entry, encoded image.

HEADER = struct.Struct("<8sqqq")  # which packing this is of; the number; lengths of what follows
CRC = struct.Struct("<I")  # behind it, of it and the entry
HEAD = struct.Struct("<qI")  # the length and CRC of the JSON
SLACK = 2**17  # bytes at the end of the file: a damaged page leads the library so far behind it
LMDB_READS = 16  # after so many, what was mapped is let go: it would count as this process's memory


class LmdbFile:
    """An LMDB, opened read-only and without locks when it is first read, by each process for
    itself."""

    def __init__(self, *_):
        self.environment, self.process, self.reads = None, None, 0

    def get(self, path, key, use):
        """use(the value of a key), which is a memoryview within `use` only, or None."""
        old = self.process != os.getpid() or self.reads >= LMDB_READS
        if self.environment is not None and old:  # in a process that forked, it isn't ours
            self.environment.close()
            self.environment = None
        if self.environment is None:
            self.environment = open_lmdb(path)
            self.process, self.reads = os.getpid(), 0
        self.reads += 1
        try:
            with self.environment.begin(buffers=True) as transaction:
                value = transaction.get(key)
                return None if value is None else use(value)
        except lmdb.Error as error:
            raise InputError(f"{path} is damaged: {error}") from None


lmdb_file = functools.cache(LmdbFile)  # by device and inode: a process may open a file once only


def open_lmdb(path):
    """An lmdb.Environment for reading; an InputError where the file is cut or none."""
    folder = os.path.isdir(path)
    try:
        environment = lmdb.open(
            path, subdir=folder, readonly=True, lock=False, readahead=False, max_readers=1
        )
        size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    except lmdb.Error as error:
        raise InputError(f"{path} is no LMDB that can be read: {error}") from None
    if os.path.getsize(f"{path}/data.mdb" if folder else path) < size:
        environment.close()  # reading what is missing would kill the process
        raise InputError(f"{path} is cut: it has not all of its {size} bytes")
    return environment


class LmdbImages(Images):
    """Images in an LMDB that scripts/pack.py made."""

    def __init__(self, path, **options):
        self.path = str(path)
        stat = os.stat(path)
        self.file = stat.st_dev, stat.st_ino
        head = lmdb_file(*self.file).get(self.path, b"head", parse_head)
        if head is None:
            raise InputError(f"{path} was not made by scripts/pack.py, or is damaged")
        self.identity = bytes.fromhex(head["identity"])
        super().__init__(path, head["classes"], head["counts"], **options)

    def entry(self, index):
        return os.fsdecode(self.get(index, lambda entry, _: bytes(entry)))

    def read(self, index):
        return self.get(index, lambda _, content: bytes(content))

    def get(self, index, use):
        """use(entry, content), both as memoryviews, of an image."""

        def parse(value):
            start = HEADER.size + CRC.size
            if len(value) < start:
                raise InputError("the LMDB is damaged")
            identity, number, length, rest = HEADER.unpack_from(value)
            # Nothing is read where a damaged page says that it lies, but as far as these agree.
            if (identity, number) != (self.identity, index) or start + length + rest != len(value):
                raise InputError("the LMDB is damaged, or not the one that was opened")
            entry = value[start : start + length]
            right = zlib.crc32(entry, zlib.crc32(value[: HEADER.size]))
            if right != CRC.unpack_from(value, HEADER.size)[0]:
                raise InputError("the LMDB is damaged")
            return use(entry, value[start + length :])

        found = lmdb_file(*self.file).get(self.path, index.to_bytes(8, "big"), parse)
        if found is None:
            raise InputError("the LMDB is damaged: the image is missing")
        return found


def lmdb_head(identity, classes, counts):
    """The value of b"head"."""
    head = json.dumps({"identity": identity.hex(), "classes": classes, "counts": counts}).encode()
    return HEAD.pack(len(head), zlib.crc32(head)) + head


def parse_head(value):
    """What lmdb_head was told, or None."""
    length, crc = HEAD.unpack_from(value) if len(value) >= HEAD.size else (0, 0)
    if length + HEAD.size != len(value) or zlib.crc32(value[HEAD.size :]) != crc:
        return None
    return json.loads(bytes(value[HEAD.size :]))


def lmdb_item(identity, number, entry, content):
    """(key, value) of an image."""
    header = HEADER.pack(identity, number, len(entry), len(content))
    sums = CRC.pack(zlib.crc32(entry, zlib.crc32(header)))
    return number.to_bytes(8, "big"), b"".join([header, sums, entry, content])

"""Finds the images in a TAR archive with the standard library's tarfile."""

import os
import tarfile
import zlib
from array import array
from collections import defaultdict

import numpy as np
from tqdm import tqdm

from internals.layout import find_layout
from Utils import InputError

SPARSE = -1  # instead of the size: a file whose holes the archive leaves out
NO_FILE = -1  # instead of the row: a link to a file outside of the archive
DUMP_FOLDER, VOLUME = b"D", b"M"  # GNU tar's types: a folder of a backup, a part of a split file


class Member(tarfile.TarInfo):
    """A member of an archive, with the CRC of its header."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        member.crc = zlib.crc32(buf)
        return member


class Contents:
    """The files and folders of an archive. An InputError where the archive is damaged, cut,
    compressed, or several archives in one file."""

    def __init__(self, path):
        self.files = defaultdict(dict)  # {folder: {file name: row of places, or NO_FILE}}
        self.folders = set()
        self.places = array("q")  # three numbers for each file; see `place`
        try:
            with open(path, "rb") as file:
                with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as archive:
                    self.read_headers(archive, os.path.getsize(path))
                check_end(file, archive.offset)
        # tarfile raises the last two for some damaged headers.
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"{path} is not a whole, uncompressed TAR archive: {error}; "
                "decompress it, or make it again with tar -cf"
            ) from None

    def read_headers(self, archive, size):
        """Adds every member of an archive of `size` bytes."""
        bar = tqdm(total=size, desc="indexing", unit="B", unit_scale=True, delay=2, disable=None)
        with bar:
            for member in iter(archive.next, None):
                archive.members = []  # tarfile would keep all members in memory
                if member.type == VOLUME or member.size < 0:
                    raise tarfile.ReadError("a file in it is split over several archives")
                self.add(member)
                bar.update(archive.offset - bar.n)

    def add(self, member):
        """Adds one member. A later file replaces an earlier one of the same name."""
        name = normal(member.name)
        folder, _, file_name = name.rpartition("/")
        if member.isreg():
            self.files[folder][file_name] = len(self.places) // 3
            self.places.extend(place(member))
        elif member.islnk():  # a hard link: to the file that has this name so far
            target_folder, _, target = normal(member.linkname).rpartition("/")
            row = self.files.get(target_folder, {}).get(target, NO_FILE)
            self.files[folder][file_name] = row
        elif member.issym():
            self.files[folder][file_name] = NO_FILE
            if "." not in file_name:  # the link may lead to a class folder
                self.folders.add(name)
        elif member.isdir() or member.type == DUMP_FOLDER:
            self.folders.add(name)


def normal(name):
    """A member's path without a leading / or ./"""
    return os.path.normpath(name.lstrip("/"))


def place(member):
    """Where a file lies: the position of its header, its size, the CRC of its header. For a sparse
    file: the position of its first header, SPARSE, the CRC."""
    if member.issparse():
        return member.offset, SPARSE, member.crc
    return member.offset_data - tarfile.BLOCKSIZE, member.size, member.crc


def read_file(file, position, size):
    """The content of the file at a place of an open archive, and the CRC of its header: bytes, int.
    An OSError where the archive ends before."""
    if size != SPARSE:
        data = os.pread(file.fileno(), tarfile.BLOCKSIZE + size, position)
        if len(data) < tarfile.BLOCKSIZE + size:
            raise OSError("the archive is cut")
        return data[tarfile.BLOCKSIZE :], zlib.crc32(data[: tarfile.BLOCKSIZE])
    with open(file.name, "rb") as own_file:  # with a position of its own
        own_file.seek(position)
        with tarfile.open(fileobj=own_file, mode="r:", tarinfo=Member) as archive:
            member = archive.next()
            if member is None:
                raise OSError("the archive is damaged")
            return archive.extractfile(member).read(), member.crc


def check_end(file, position):
    """Refuses an archive that has no end mark where its last member ends, or anything but zeros
    behind. tarfile takes damaged headers and cut archives for the end of the archive."""
    file.seek(position)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end mark: it was cut, or is still being written")
    if any(block):
        raise tarfile.ReadError(f"no sound header at byte {position}")
    while data := file.read(2**20):
        if any(data):
            position = file.tell() - len(data.lstrip(b"\0"))
            raise tarfile.ReadError(
                f"a second archive or damage at byte {position}, behind the end mark; "
                "to join archives use tar -A"
            )


# -------------------------------------------------------------------------------------------------


def find_images(path):
    """The images in a TAR archive: groups of images in ImageFolder's order, as Index.make takes
    them, and the numbers and kinds of all other files, as text. The class folders lie in the
    longest folder that all images share."""
    contents = Contents(path)
    layout, left_out = find_layout(path, contents.files, contents.folders)
    return image_groups(path, contents, layout), left_out


def image_groups(path, contents, layout):
    """Yields (class, entries, places) of each folder with images."""
    places = np.frombuffer(contents.places, np.int64).reshape(-1, 3)
    for class_name, below, folder, names in layout:
        files = contents.files.pop(folder)  # frees the memory on the way
        entries = [f"{below}/{name}" for name in names]
        rows = [files[name] for name in names]
        if NO_FILE in rows:
            raise InputError(
                f"{path}: {entries[rows.index(NO_FILE)]} is a link, the archive does not hold its "
                "image; make the archive with tar -h, which follows links"
            )
        yield class_name, list(map(os.fsencode, entries)), places[rows]

"""The images in a TAR archive, whatever tool made it, found without reading what lies between its
headers."""

import os
import zlib
from array import array

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from Utils import InputError

# -------------------------------------------------------------------------------------------------
# The members of an archive.

FILE, LINK, FOLDER, OTHER, SPARSE = range(5)  # LINK: hard; SPARSE: a file, its holes left out
KINDS = {48: FILE, 0: FILE, 55: FILE, 49: LINK, 53: FOLDER, 68: FOLDER, 83: SPARSE}  # by type flag
BARE = b"123456"  # links, devices, folders: whatever size they state, no content follows
BLOCK = 512
SMALL = 2**14  # bytes of a file behind which it pays to have read on
LONGEST = 2**20  # bytes of an extended header: more than any name has
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class Damaged(Exception):
    """What is wrong with an archive."""


def walk(descriptor, size):
    """Yields (kind, name, position, length, CRC, link) of each member of an open archive of `size`
    bytes. Raises Damaged.

    name, link: bytes, as they stand there. position: of the header, with `length` bytes of content
    behind it; for SPARSE of the first header that belongs to the member. CRC: of that header."""
    start = os.pread(descriptor, BLOCK, 0)
    for magic, tool in COMPRESSED.items():
        if start.startswith(magic):
            raise Damaged(f"it is compressed by {tool}")
    position, first, known = 0, None, {}  # of the member: its first header, what others say of it
    unchecked = []  # headers whose sum was not checked yet: many at once are cheaper
    window, window_at, length = b"", 0, 0  # what was read of the archive
    bar = tqdm(total=size, desc="indexing", unit="B", unit_scale=True, delay=2, disable=None)
    with bar:
        while True:
            header = window[position - window_at : position - window_at + BLOCK]
            if len(header) < BLOCK and position < size:  # the next one too, where files are small
                window = os.pread(descriptor, BLOCK if length > SMALL else 4 * SMALL, position)
                window_at, header = position, window[:BLOCK]
            if len(header) < BLOCK:
                check_many(unchecked, position)  # which may be why we came here
                raise Damaged("it ends without an end mark: it was cut, or is still being written")
            code = header[156]
            if code == 48 and not known:  # an ordinary file: in a hurry, as there are millions
                try:
                    length = int(header[124:135], 8)
                    if length < 0 or header[135] > 32:
                        raise ValueError
                except ValueError:  # not the usual eleven digits
                    length = number(header[124:136], position)
                yield FILE, name_of(header), position, length, zlib.crc32(header), b""
                unchecked.append(header)
                if len(unchecked) == 4096:
                    check_many(unchecked, position)
                    unchecked.clear()
                    bar.update(position - bar.n)
            elif not header[0] and not any(header):
                break
            else:
                check(header, position)
                length = number(header[124:136], position)
                if code in b"LKxX":  # it tells of the next member
                    first = position if first is None else first
                    known |= extension(code, descriptor, position, length)
                elif code not in b"gVN":  # of the archive as a whole, or obsolete
                    start = position if first is None else first
                    yield describe(descriptor, header, position, start, known)
                    position, length = content(descriptor, header, position, length, known)
                    first, known = None, {}
            position += BLOCK + (length + BLOCK - 1 & -BLOCK)
    check_many(unchecked, position)
    refuse_second(descriptor, position, size)


def describe(descriptor, header, position, first, known):
    """Any but the most ordinary member, as `walk` yields it."""
    kind = KINDS.get(header[156], OTHER)
    name = known.get(b"path", name_of(header))
    link = known.get(b"linkpath", header[157:257].partition(b"\0")[0])
    length = int(known.get(b"size", number(header[124:136], position)))
    if kind == FILE and name.endswith(b"/"):  # as before there were flags for folders
        kind = FOLDER
    if kind == SPARSE or any(key.startswith(b"GNU.sparse.") for key in known):
        kind, name, position = SPARSE, known.get(b"GNU.sparse.name", name), first
        header = os.pread(descriptor, BLOCK, first)
    return kind, name, position, length, zlib.crc32(header), link


def content(descriptor, header, position, length, known):
    """(position of a member's last header, length of the content behind it)."""
    if header[156] == 77:
        raise Damaged("it is one of several volumes")
    if header[156] in BARE:
        return position, 0
    more = header[156] == 83 and header[482]
    while more:  # the map of the holes goes on in blocks of its own
        position += BLOCK
        more = (os.pread(descriptor, BLOCK, position) or bytes(BLOCK))[504]
    return position, int(known.get(b"size", length))


def name_of(header):
    """The name in a header, its prefix included."""
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU's own format has times there
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def number(field, position):
    """The number in a field of the header at `position`: octal digits, or, where that is too short,
    binary."""
    try:
        value = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        value = int.from_bytes(field[1:], "big") if field[0] == 128 else -1
    if value < 0:
        raise Damaged(f"there is no header of a TAR at byte {position}, where one should be")
    return value


def extension(code, descriptor, position, length):
    """What an extended header says of the next member: {b"path": ..., b"size": ...}."""
    data = os.pread(descriptor, min(length, LONGEST), position + BLOCK)
    if len(data) < length:
        raise Damaged(f"its extended header at byte {position} is cut or damaged")
    if code in b"LK":
        return {b"path" if code == 76 else b"linkpath": data.partition(b"\0")[0]}
    records, rest = {}, data.rstrip(b"\0")
    while rest:  # "length key=value\n"
        digits = rest.partition(b" ")[0]
        end = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = rest[len(digits) + 1 : end - 1].partition(b"=")
        whole = bool(equals) and rest[end - 1 : end] == b"\n"
        if not whole or key == b"size" and not (value.isdigit() and len(value) < 19):
            raise Damaged(f"its extended header at byte {position} is damaged")
        records[key], rest = value, rest[end:]
    return records


def check(header, position):
    """Refuses a header whose sum isn't what it says; some old tools took its bytes for signed."""
    said, field = number(header[148:156], position), header[148:156]
    total = sum(header) - sum(field) + 8 * 32  # the sum's own field counts as spaces
    if said != total:
        signed = np.frombuffer(header, np.int8).sum(dtype=int) - np.frombuffer(field, np.int8).sum()
        if said != signed + 8 * 32:
            raise Damaged(f"no sound header stands at or before byte {position}")


def check_many(headers, position):
    """`check` for headers up to `position`, all at once."""
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
    said = (blocks[:, 148:154].astype(np.int64) - 48) @ (8 ** np.arange(5, -1, -1))  # as usual
    for i in np.flatnonzero(sums != said):
        check(headers[i], position)


def refuse_second(descriptor, position, size):
    """Refuses an archive that has another one behind its end, which would be left unread."""
    while position < size:
        data = os.pread(descriptor, 2**20, position)
        content = data.lstrip(b"\0")
        position += (len(data) - len(content)) // BLOCK * BLOCK if content else len(data)
        if content or not data:
            break
    header = os.pread(descriptor, BLOCK, position)
    if len(header) == BLOCK:
        try:
            check(header, position)
        except Damaged:
            return  # whatever it is, it is no archive
        raise Damaged(f"a second archive follows at byte {position}; join archives by tar -A")


# -------------------------------------------------------------------------------------------------
# The images among them.

HOLES, NO_FILE, HARD_LINK = -1, -2, -3  # as the size of a member; the first one in an index, too
ENDINGS = tuple(ending.encode() for ending in IMG_EXTENSIONS)


class TarMembers:
    """The images in a TAR, sorted as in ImageFolder. An InputError where they can't be told
    exactly. Columns rather than objects, as there may be millions."""

    def __init__(self, descriptor, size, path):
        self.descriptor, self.size, self.path = descriptor, size, path
        self.found = {}  # folder: (file names, positions, sizes, CRCs)
        self.folders, self.links = set(), []
        try:
            self.collect()
            self.linked = self.follow_links() if self.links else {}
        except (Damaged, OSError) as error:
            shown = f"{path} is not a whole, uncompressed TAR archive"
            raise InputError(f"{shown}: {error}") from None
        self.arrange()

    def collect(self):
        """Walks the archive once."""
        found, sizes = self.found, {SPARSE: HOLES, OTHER: NO_FILE, LINK: HARD_LINK}
        for kind, name, position, size, crc, link in walk(self.descriptor, self.size):
            folder, _, file_name = name.rpartition(b"/")
            if kind == FOLDER:
                self.folders.add(normal(name))
            elif file_name.lower().endswith(ENDINGS):
                columns = found.get(folder)
                if columns is None:
                    columns = found[folder] = [], array("q"), array("q"), array("I")
                columns[0].append(file_name)
                columns[1].append(position)
                columns[2].append(size if kind == FILE else sizes[kind])
                columns[3].append(crc)
                if kind == LINK:
                    self.links.append((position, normal(link)))
            elif kind == OTHER and link and b"." not in file_name:  # may well lead to a folder
                self.folders.add(normal(name))

    def follow_links(self):
        """{position of a hard link: (position, size, CRC) of the file of that name before it}."""
        wanted, known, followed = {link for _, link in self.links}, {}, {}
        for kind, name, position, size, crc, link in walk(self.descriptor, self.size):
            place = position, HOLES if kind == SPARSE else size, crc
            if kind == LINK:
                place = followed[position] = known.get(normal(link))
            if kind in (FILE, SPARSE, LINK) and normal(name) in wanted:
                known[normal(name)] = place
        return followed

    def arrange(self):
        """Finds the root, and the classes in it."""
        if not self.found:
            raise InputError(f"{self.path} holds no images ({', '.join(IMG_EXTENSIONS)})")
        merged = {}
        for folder, columns in self.found.items():
            merged.setdefault(normal(folder), []).append(columns)
        parts = {folder: folder.split(b"/") if folder else [] for folder in merged}
        root = os.path.commonprefix(list(parts.values()))
        if root in parts.values():  # images lie right in it: fine where they all do, in one class
            if len(parts) > 1 or not root:
                name = b"/".join([*root, merged[b"/".join(root)][0][0][0]])
                shown = f"{self.path} holds images outside of class folders"
                raise InputError(f"{shown}: expected .../class/image, found {os.fsdecode(name)}")
            root = root[:-1]
        depth = len(root)
        classes = {os.fsdecode(names[depth]) for names in parts.values()}
        beside = (folder.split(b"/") for folder in self.folders if folder)
        there = {os.fsdecode(x[depth]) for x in beside if len(x) == depth + 1 and x[:-1] == root}
        check_classes(self.path, classes | there, classes)
        self.sorted = sorted(
            (os.fsdecode(names[depth]), os.fsdecode(folder), b"/".join(names[depth:]), columns)
            for (folder, names), columns in zip(parts.items(), merged.values(), strict=True)
        )

    def groups(self):
        """The groups of write_index, one for each folder."""
        for name, _, folder, columns in self.sorted:
            names, *places = columns[0]
            if len(columns) > 1:  # one folder, as ./folder, too
                names, *places = (sum(parts[1:], parts[0]) for parts in zip(*columns, strict=True))
            places = [np.asarray(column, np.int64) for column in places]
            order = sort_names(names, places[0])
            places = [column[order] for column in places]
            if self.linked or (places[1] < 0).any():
                self.place_links(folder, [names[i] for i in order], *places)
            yield name, [b"%b/%b" % (folder, names[i]) for i in order], *places

    def place_links(self, folder, names, positions, sizes, crcs):
        """Puts, into columns, what links lead to; refuses what is no file."""
        for i in np.flatnonzero(sizes < HOLES):
            place = self.linked.get(int(positions[i]))
            if sizes[i] == NO_FILE or place is None:
                shown = os.fsdecode(b"%b/%b" % (folder, names[i]))
                raise InputError(
                    f"{self.path}: {shown} is a link, its image is not in there; "
                    "make the archive with tar -h, which follows links"
                )
            positions[i], sizes[i], crcs[i] = place


def normal(name):
    """A member's path without detours."""
    name = os.path.normpath(name.lstrip(b"/") or b".")
    return b"" if name == b"." else name


def sort_names(names, positions):
    """The order in which ImageFolder has files; of a name that comes twice, the later one only."""
    rows = range(len(names))
    if len(set(names)) < len(names):
        rows = {names[i]: i for i in positions.argsort()}.values()
    if b"".join(names).isascii():
        return sorted(rows, key=names.__getitem__)
    decoded = [os.fsdecode(name) for name in names]  # bytes may be ordered in another way
    return sorted(rows, key=decoded.__getitem__)


def check_classes(path, there, used):
    """Refuses a folder without class folders, or with a class that has no image, as ImageFolder
    does. there, used: names of classes, of those with images."""
    if not there:
        raise InputError(f"{path} has no class folders: expected {path}/class/image")
    if not used:
        raise InputError(
            f"{path} holds no images in its class folders ({', '.join(IMG_EXTENSIONS)})"
        )
    empty = sorted(set(there) - set(used))
    if empty:
        raise InputError(
            f"{path}: no image in the class folder {empty[0]}"
            + f" ({len(empty)} such)" * (len(empty) > 1)
        )

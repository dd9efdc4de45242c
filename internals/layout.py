"""Finds images and their classes among the files of a folder or an archive, and explains layouts
that other tools made."""

import os
import re
import shlex
from collections import Counter

from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from Utils import InputError, printable

UNLABELLED = "."  # the class of all images of a data set without class folders

# Folders that systems make among a user's. Names that begin with a dot are left out, too: macOS
# puts ._x.jpg beside x.jpg, Jupyter puts copies into .ipynb_checkpoints.
SYSTEM_FOLDERS = frozenset(
    ["__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"]
    + ["System Volume Information"]
)
# What bash does in a folder: unpacks archives into folders of their names; makes folders of names.
UNPACK = 'for f in *.tar; do mkdir "${f%.tar}" && tar -xf "$f" -C "${f%.tar}" && rm "$f"; done'
RENAME = r'for f in *\\*; do p="${f//\\//}"; mkdir -p "${p%/*}" && mv "$f" "$p"; done'
TRANSFORM = r"--transform 's,\\,/,g'"


def hidden(name):
    """Whether a file or folder of this name is none of the user's data."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_array(name):
    """Whether a file of this name holds an image as an array."""
    return name.lower().endswith(".npy")


def is_split(name):
    """Whether a folder of this name is a part of a data set rather than a class: val, test2017."""
    splits = ("train", "training", "val", "valid", "validation", "test", "testing")
    return re.match("[a-z]*", name.lower())[0] in splits


def find_layout(path, files, folders, root=None):
    """Groups of images (class, folder below the root, folder, names) in ImageFolder's order, and
    the numbers and kinds of all other files, as text. Images without any class folder are one group
    of the class UNLABELLED. An InputError where classes and images do not lie as they should.

    files: {folder: file names}; folders: other folders. A folder is its path, "" is the top. root:
    where the class folders lie, as a list; None: in the longest folder that all images share."""
    images, left_out, others = sort_out(files, root)
    arrays = {} if images else sort_out(files, root, is_array)
    if arrays and arrays[0]:  # only where there are no other images, beside which .npy is none
        images, left_out, others = arrays
    is_archive, stray = root is None, []
    root = common_folder(images) if is_archive else root
    if "/".join(root) in images:
        if is_archive and root and len(images) == 1 and not is_split(root[-1]):  # the only class
            root = root[:-1]
        else:
            stray = images.pop("/".join(root))
    below = {folder: parts(folder)[len(root) :] for folder in images}
    groups = [(names[0], "/".join(names), f, sorted(images[f])) for f, names in below.items()]
    groups.sort()
    if reason := foreign_layout(path, groups, stray, others):
        raise InputError(printable(f"{path} {reason}"))
    if stray and not groups:  # without class folders
        return [(UNLABELLED, UNLABELLED, "/".join(root), sorted(stray))], text_of(left_out)
    if stray and not is_archive:  # as in ImageFolder
        left_out.append(f"{len(stray):,} outside of class folders")
        stray = []
    left_out = text_of(left_out)
    classes = {name for name, *_ in groups}
    class_folders = {name for *above, name in map(parts, folders) if above == root}
    empty = sorted(name for name in class_folders - classes if not hidden(name))
    if reason := missing(groups, stray, empty, root):
        other_files = f"; other files: {left_out}" if left_out else ""
        raise InputError(printable(f"{path} {reason}") + other_files)
    return groups, left_out


def text_of(left_out):
    """The numbers and kinds of the files that are left out, as one line."""
    return printable(", ".join(left_out))


def missing(groups, stray, empty, root):
    """Which class folders or images are missing, as text; None if all are there. stray: images
    outside of class folders; empty: class folders without images."""
    expected = f"expected CLASS/IMAGE ({', '.join(IMG_EXTENSIONS)}; or .npy alone)"
    if stray:
        return (
            f"holds images outside of class folders: {expected}, found "
            f"{'/'.join([*root, stray[0]])}; move these images into a class folder, or out"
        )
    if not groups:
        where = "in its class folders" if empty else "and no class folders"
        return f"holds no images {where}: {expected}"
    if empty:
        more = f" ({len(empty)} such)" if len(empty) > 1 else ""
        return f"holds no image in the class folder {empty[0]}{more}"
    return None


def parts(folder):
    """The names on the path to a folder."""
    return folder.split("/") if folder else []


def common_folder(folders):
    """The names on the path to the longest folder that all folders share."""
    return list(os.path.commonprefix(list(map(parts, folders))))


def sort_out(files, root, is_image=is_image_file):
    """Returns {folder: image names}; the numbers of all other files as a list of texts; and by
    their endings as a Counter. Below the root, hidden files and those in hidden folders are no
    images."""
    if root is None:
        root = common_folder(f for f, names in files.items() if any(map(is_image, names)))
    images, others, hidden_files, example = {}, Counter(), 0, None
    for folder, names in files.items():
        below = parts(folder)
        below = below[len(os.path.commonprefix([root, below])) :]
        in_hidden, found = any(map(hidden, below)), []
        for name in names:
            if in_hidden or hidden(name):
                hidden_files += 1
                example = example or "/".join([*below, name])
            elif is_image(name):
                found.append(name)
            else:
                others[os.path.splitext(name)[1].lower()[:12] or "without ending"] += 1
        if found:
            images[folder] = found
    texts = [f"{hidden_files:,} hidden (such as {example})"] * (hidden_files > 0)
    ranked = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    texts += [f"{number:,} {ending}" for ending, number in ranked[:8]]
    texts += [f"{sum(dict(ranked[8:]).values()):,} others"] * (len(ranked) > 8)
    return images, texts, others


def foreign_layout(path, groups, stray, others):
    """What is wrong with a layout that another tool made, and what to do; else None. stray: images
    outside of class folders; others: numbers of other files by their endings."""
    classes, is_archive = {name for name, *_ in groups}, os.path.isfile(path)
    names = stray or [name for *_, names in groups for name in names[:1]]
    quoted, unpacked = shlex.quote(path), shlex.quote(os.path.splitext(path)[0])
    if not classes and others[".mdb"]:
        return (
            "is an LMDB of another tool (data.mdb): export its images into a folder for each "
            "class; scripts/pack.py can pack these"
        )
    if not names and others[".tar"]:
        commands = f"cd {quoted} && {UNPACK}"
        if is_archive:
            first = f"mkdir {unpacked} && tar -xf {quoted} -C {unpacked}"
            commands = f"{first}; cd {unpacked} && {UNPACK}"
        return f"holds {others['.tar']:,} archives, no images; if each is a class: {commands}"
    if len(classes) < 2 and others[".cls"]:
        return (
            "is a shard of a WebDataset (.cls files beside images): unpack all shards, and move "
            "each image into a folder named after its class, which the .cls file holds"
        )
    if len(classes) < 2 and "\\" in "".join(names):
        commands = f"cd {shlex.quote(os.path.join(path, *classes))} && {RENAME}"
        if is_archive:
            commands = f"mkdir {unpacked} && tar -xf {quoted} -C {unpacked} {TRANSFORM}"
        return f"has names with \\ for folders, made on Windows, such as {names[0]}: {commands}"
    nested = len(classes) > 1 or any("/" in below for _, below, *_ in groups)
    if classes and nested and all(map(is_split, classes)):
        advice = "make an archive of each" if is_archive else "name one of these folders"
        return f"holds {', '.join(sorted(classes))}: parts of a data set, not classes; {advice}"
    return None


def list_folder(path):
    """Lists a folder, with links followed: {folder: file names}, all folders, and links that lead
    nowhere {link: target}, of names that an image or a folder may have. Folders are paths below
    `path`. An InputError where a link leads to a folder that holds the link."""
    files, folders, broken = {}, [], {}

    def add(folder, above):
        """above: (device, inode) of the folder and of those that it was reached by."""
        names = files[folder] = []
        with os.scandir(os.path.join(path, folder)) as entries:
            for entry in entries:
                below = os.path.join(folder, entry.name)
                kind = kind_of(entry)
                if kind == "folder" and not hidden(entry.name):
                    identity = identify(entry)
                    if entry.is_symlink() and identity in above:
                        circle = f"{path}/{below} is a link to a folder that holds it: delete it"
                        raise InputError(printable(circle))
                    folders.append(below)
                    add(below, {*above, identity})
                elif kind == "folder":
                    for hidden_folder, _, hidden_names in os.walk(entry.path):
                        files[os.path.relpath(hidden_folder, path)] = hidden_names
                elif kind in ("file", "link"):
                    names.append(entry.name)
                    matters = is_image_file(entry.name) or "." not in entry.name
                    if kind == "link" and matters and not hidden(entry.name):
                        broken[below] = os.readlink(entry.path)

    add("", {identify(path)})
    return files, folders, broken


def identify(path):
    """(device, inode) of a file or folder: others have another pair."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def kind_of(entry):
    """What an os.DirEntry is or leads to: "folder", "file", "link" to nowhere, or "device"."""
    try:
        if entry.is_dir() or entry.is_file():
            return "folder" if entry.is_dir() else "file"
    except OSError:  # a link to itself
        pass
    return "link" if entry.is_symlink() else "device"

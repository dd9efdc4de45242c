"""Folder, TAR and LMDB: the same data set from each, whatever tool made the archive; damage,
memory, packing."""

import io
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pack  # noqa: E402 (the line above makes it importable)
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from PIL import Image
from test_data import NAMES, assert_equals_image_folder, make_folder, picture, tar, tar_of
from torch.utils.data import ConcatDataset, DataLoader

import Augmentation
import Data
import internals.stores
from Utils import InputError

ODD_NAMES = [
    *NAMES,
    "cat/UPPER.PNG",
    "cat/n.JPEG",
    "cat/x.tar.jpg",
]
SMALL = ["a/1.png", "a/2.png", "b/1.png", "b/c/1.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("stores") / "data/train", ODD_NAMES)


@pytest.fixture(scope="module")
def stores(folder):
    """{kind: path} of the same images."""
    paths = {"folder": folder, "tar": tar_of(folder), "lmdb": folder.with_suffix(".lmdb")}
    pack.pack(folder, paths["lmdb"])
    return paths


def contents(images):
    return {images.entry(i): (images.read(i), images.target(i)) for i in range(len(images))}


def without_indexes(folder):
    for path in folder.glob("*.index"):
        shutil.rmtree(path)


# -------------------------------------------------------------------------------------------------
# The same data set.


@pytest.mark.parametrize("kind", ["folder", "tar", "lmdb"])
def test_each_store_equals_image_folder(stores, kind):
    images = Data.open_images(stores[kind])
    assert_equals_image_folder(images, stores["folder"])
    assert images.target(-1) == images.targets[-1]
    assert [i for target in range(len(images.classes)) for i in images.of_class(target)] == list(
        range(len(images))
    )
    with pytest.raises(IndexError):
        images[len(images)]


@pytest.mark.parametrize("first", ["folder", "tar", "lmdb"])
def test_packing_from_any_store_into_any_other_keeps_everything(stores, tmp_path, first):
    before = contents(Data.open_images(stores["folder"]))
    pack.pack(stores[first], tmp_path / "x.lmdb")
    pack.pack(tmp_path / "x.lmdb", tmp_path / "y.tar")
    for path in (tmp_path / "x.lmdb", tmp_path / "y.tar"):
        assert_equals_image_folder(Data.open_images(path), stores["folder"])
        assert contents(Data.open_images(path)) == before
    assert sorted(os.listdir(tmp_path)) == ["x.lmdb", "y.tar", "y.tar.index"]


def test_the_fingerprint_is_that_of_the_images_in_any_store(stores, folder, tmp_path):
    images, expected = Data.open_images(folder), Data.open_images(folder).fingerprint()
    assert all(Data.open_images(path).fingerprint() == expected for path in stores.values())
    few = Data.few_shot(images, 1, 1, seed=0)
    assert few.fingerprint() == expected, "of the whole data set"
    for change in ("content", "name", "more", "class"):
        other = tmp_path / change
        shutil.copytree(folder, other)
        path = other / images.entry(0)
        if change == "content":  # of the same size
            path.write_bytes(path.read_bytes()[::-1])
        elif change == "name":
            path.rename(path.with_name("another.png"))
        elif change == "more":
            shutil.copy(path, path.with_name("another.png"))
        else:
            path.parent.rename(path.parent.with_name("another"))
        assert Data.open_images(other).fingerprint() != expected


def test_processes_that_read_other_images_than_the_first_are_refused(folder, monkeypatch):
    images = Data.open_images(folder)
    data = Data.fingerprints(images, images)
    other = {**data, "data_val": {**data["data_val"], "images": 1}}
    monkeypatch.setattr(Data, "from_first_process", lambda _: other)
    with pytest.raises(InputError, match="--data_val: not all processes read the same images"):
        Data.fingerprints(images, images)


def test_names_that_are_no_unicode_come_in_image_folder_s_order(tmp_path):
    root = os.fsencode(tmp_path) + b"/train/a"
    os.makedirs(root)
    names = [b"\xff.png", "\uff5e.png".encode(), b"z.png", "\U0001f600.png".encode(), b"\x80.png"]
    for seed, name in enumerate(names):
        with open(root + b"/" + name, "wb") as file:
            picture(seed).save(file, "png")
    folder = make_folder(tmp_path / "train", ["b/1.png"])
    assert_equals_image_folder(Data.open_images(folder), folder)
    archive = Data.open_images(tar_of(folder))
    assert_equals_image_folder(archive, folder)
    pack.pack(folder, tmp_path / "x.lmdb")
    assert_equals_image_folder(Data.open_images(tmp_path / "x.lmdb"), folder)
    for i in range(len(archive)):
        archive.name(i).encode()  # fit to be printed


# -------------------------------------------------------------------------------------------------
# Archives made by other tools.

GNU = "gnu oldgnu pax ustar v7".split()


@pytest.mark.parametrize("form", GNU)
def test_archives_in_every_format_of_gnu_tar_equal_the_folder(tmp_path, form):
    short = form in ("v7", "ustar")  # these can't hold long names
    folder = make_folder(tmp_path / "train", [n for n in NAMES if len(n) < 60 or not short])
    path = tar(tmp_path / "x.tar", f"--format={form}", "-C", tmp_path, "train")
    assert_equals_image_folder(Data.open_images(path), folder)


@pytest.mark.parametrize("form", ["USTAR", "GNU", "PAX"])
def test_archives_by_python_equal_the_folder(tmp_path, form):
    folder = make_folder(tmp_path / "train", [n for n in NAMES if len(n) < 60 or form != "USTAR"])
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=getattr(tarfile, f"{form}_FORMAT")) as archive:
        archive.add(folder, "somewhere/train")
    assert_equals_image_folder(Data.open_images(path), folder)


@pytest.mark.parametrize("form", ["pax", "gnutar", "ustar", "v7tar"])
@pytest.mark.skipif(not shutil.which("bsdtar"), reason="bsdtar is not installed")
def test_archives_by_bsdtar_equal_the_folder(tmp_path, form):
    names = [n for n in NAMES if n.isascii() and len(n) < 60 or form in ("pax", "gnutar")]
    folder = make_folder(tmp_path / "train", names)
    os.link(folder / "cat/2.png", folder / "cat/3.png")
    path = tmp_path / "x.tar"
    arguments = ["bsdtar", "--format", form, "-C", tmp_path, "-cf", path, "train"]
    subprocess.run(arguments, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert_equals_image_folder(Data.open_images(path), folder)


@pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed")
def test_archives_by_cpio_equal_the_folder(tmp_path):
    folder = make_folder(tmp_path / "train", SMALL)
    os.link(folder / "a/1.png", folder / "b/9.png")
    listed = "\n".join(str(p.relative_to(tmp_path)) for p in sorted(folder.rglob("*")))
    made = subprocess.run(
        ["cpio", "-o", "-H", "ustar"], input=listed.encode(), cwd=tmp_path, stdout=subprocess.PIPE
    )
    (tmp_path / "x.tar").write_bytes(made.stdout)
    assert_equals_image_folder(Data.open_images(tmp_path / "x.tar"), folder)


@pytest.mark.parametrize(
    "options", ["gnu", "oldgnu", "pax --sparse-version=0.0", "pax --sparse-version=0.1", "pax"]
)
def test_sparse_members_are_read_with_their_holes(tmp_path, options):
    folder = make_folder(tmp_path / "train", SMALL)
    for name in SMALL[1:3]:
        content = (folder / name).read_bytes()
        with open(folder / name, "wb") as file:  # a hole behind the image, one more behind that
            for start in range(0, 40 * 2**16, 2**16):
                file.seek(start)
                file.write(content)
            file.truncate(41 * 2**16)
    path = tar(tmp_path / "x.tar", f"--format={options.split()[0]}", *options.split()[1:], "-S",
        "-C", tmp_path, "train")  # fmt: skip
    assert path.stat().st_size < 2**20
    images = Data.open_images(path)
    assert_equals_image_folder(images, folder)
    assert contents(images) == contents(Data.open_images(folder))


@pytest.mark.parametrize(
    "options", [["-V", "a label"], ["-b", "1"], ["-b", "200"], ["-g", "{}/snapshot"]]
)
def test_labels_block_sizes_and_incremental_archives_are_understood(tmp_path, options):
    folder = make_folder(tmp_path / "train", SMALL)
    options = [option.format(tmp_path) for option in options]
    path = tar(tmp_path / "x.tar", *options, "-C", tmp_path, "train")
    assert_equals_image_folder(Data.open_images(path), folder)


def test_joined_archives_are_read_whole_or_refused(tmp_path):
    folder = make_folder(tmp_path / "train", SMALL)
    parts = [tar(tmp_path / f"{c}.tar", "-C", tmp_path, f"train/{c}") for c in "ab"]
    joined = b"".join(part.read_bytes() for part in parts)
    (tmp_path / "cat.tar").write_bytes(joined)
    with pytest.raises(InputError, match="a second archive .*tar -A"):
        Data.open_images(tmp_path / "cat.tar")
    subprocess.run(["tar", "-A", "-f", parts[0], parts[1]], check=True)
    assert_equals_image_folder(Data.open_images(parts[0]), folder)


def test_a_part_of_an_archive_in_volumes_is_refused(tmp_path):
    folder = make_folder(tmp_path / "train", ["a/1.png", "b/1.png"])
    (folder / "a/1.png").write_bytes(bytes(30000))
    volumes = [tmp_path / f"{i}.tar" for i in range(4)]
    subprocess.run(
        ["tar", "-cM", "-L", "20", *(f"-f{v}" for v in volumes), "-C", tmp_path, "train"],
        check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    for volume in volumes[:2]:
        with pytest.raises(InputError, match="not a whole"):
            Data.open_images(volume)


def rewritten(path, change):
    """An archive whose headers went through `change`, their sums set right again."""
    data = bytearray(path.read_bytes())
    position = 0
    while any(data[position : position + 512]):
        size = int(data[position + 124 : position + 135], 8)
        header = bytearray(data[position : position + 512])
        change(header, size)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[position : position + 512] = header
        position += 512 + (size + 511 & -512)
    path.write_bytes(data)


def binary_sizes(header, size):
    header[124:136] = b"\x80" + size.to_bytes(11, "big")


def padded_sizes(header, size):
    header[124:136] = b"%11o " % size


def twelve_digits(header, size):
    header[124:136] = b"%012o" % size


def old_flags(header, size):
    if header[156:157] == b"5":
        name = header[:100].rstrip(b"\0")
        header[:100] = (name.rstrip(b"/") + b"/").ljust(100, b"\0")
    header[156], header[257:265] = 0, bytes(8)


def sizes_of_folders(header, size):
    if header[156:157] == b"5":  # no content follows all the same
        header[124:136] = b"00000004000\0"


@pytest.mark.parametrize(
    "change", [sizes_of_folders, binary_sizes, padded_sizes, twelve_digits, old_flags]
)
def test_headers_as_other_tools_write_them_are_understood(tmp_path, change):
    folder = make_folder(tmp_path / "train", SMALL)
    path = tar_of(folder)
    rewritten(path, change)
    assert_equals_image_folder(Data.open_images(path), folder)


def test_sums_of_signed_bytes_are_understood(tmp_path):
    folder = make_folder(tmp_path / "train", ["é/1.png", "é/2.png", "ü/3.png"])
    path = tar_of(folder)
    data = bytearray(path.read_bytes())
    for position in range(0, len(data), 512):
        header = data[position : position + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            signed = sum(byte - 256 * (byte > 127) for byte in header)
            data[position + 148 : position + 156] = b"%06o\0 " % signed
    path.write_bytes(data)
    assert_equals_image_folder(Data.open_images(path), folder)


def test_hard_links_lead_to_what_bore_the_name_before_them(tmp_path):
    images = [picture(seed) for seed in range(3)]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:

        def add(name, image=None, link=""):
            member, file = tarfile.TarInfo(name), io.BytesIO()
            if image is not None:
                image.save(file, "png")
            member.size, member.linkname = file.tell(), link
            member.type = tarfile.LNKTYPE if link else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(file.getvalue()) if image else None)

        add("a/1.png", images[0])
        add("./b/1.png", link="a/1.png")
        add("a/1.png", images[1])  # replaces the first, but b/1.png stays what it was
        add("b/2.png", link="./b/1.png")
        add("notes/data.bin", images[2])
        add("c/3.png", link="notes/data.bin")
    opened = Data.open_images(path)
    expected = {"a/1.png": 1, "b/1.png": 0, "b/2.png": 0, "c/3.png": 2}
    assert [opened.entry(i) for i in range(len(opened))] == list(expected)
    for i, number in enumerate(expected.values()):
        assert np.array_equal(opened.load(i), images[number])


def test_a_link_in_place_of_a_class_folder_is_refused(tmp_path):
    folder = make_folder(tmp_path / "train", SMALL)
    make_folder(tmp_path / "elsewhere", ["c/1.png"])
    (folder / "c").symlink_to(tmp_path / "elsewhere/c")
    assert_equals_image_folder(Data.open_images(folder), folder)
    with pytest.raises(InputError, match="no image in the class folder c"):
        Data.open_images(tar_of(folder))
    path = tar(tmp_path / "followed.tar", "-h", "-C", tmp_path, "train")
    assert_equals_image_folder(Data.open_images(path), folder)


def test_an_empty_class_folder_is_refused_in_a_tar_as_in_a_folder(tmp_path):
    folder = make_folder(tmp_path / "train", SMALL)
    (folder / "nothing").mkdir()
    for path in (folder, tar_of(folder)):
        with pytest.raises(InputError, match="no image in the class folder nothing"):
            Data.open_images(path)


# -------------------------------------------------------------------------------------------------
# Files that are no images of the user's, and layouts that other tools made.

HIDDEN = (
    "._a.png .git/a/1.png __MACOSX/train/a/._1.png .ipynb_checkpoints/1-checkpoint.png "
    "a/._1.png a/.ipynb_checkpoints/1-checkpoint.png a/@eaDir/1.png/thumb.jpg lost+found/1.png "
    "b/c/.x.png .Trash/x/y/z.png"
).split()


def each_store(folder):
    """The paths of a folder, of a TAR of it, and of a TAR of what it holds."""
    inner = tar(folder.with_name("inner.tar"), "-C", folder, *sorted(os.listdir(folder)))
    return folder, tar_of(folder), inner


def test_hidden_files_are_left_out_of_every_store_and_told_with_their_number(tmp_path, capsys):
    clean = make_folder(tmp_path / "clean", SMALL)
    folder = make_folder(tmp_path / "train", [*SMALL, *HIDDEN])
    for name in ("a/1.avif", "a/2.AVIF", "b/c/notes.txt", "b/Makefile", "x.txt"):
        (folder / name).write_bytes(b"")
    (folder / ".idea").mkdir()  # empty
    for path in each_store(folder):
        assert_equals_image_folder(Data.open_images(path), clean)
        for _ in range(2):  # the second time, a TAR's index was read
            Data.open_pair(path, path)
            first, second = capsys.readouterr().out.splitlines()
            assert first.startswith("training: 4 images, 2 classes (a, b); left out: 10 hidden")
            assert first.endswith("), 2 .avif, 2 .txt, 1 without ending")
            assert second.replace("validation", "training") == first
        pack.pack(path, tmp_path / "x.lmdb")
        assert "4 images, 2 classes (a, b); left out: 10 hidden" in capsys.readouterr().out
        assert_equals_image_folder(Data.open_images(tmp_path / "x.lmdb"), clean)
        (tmp_path / "x.lmdb").unlink()
    make_folder(folder, ["stray.png"])
    assert "1 outside of class folders" in Data.contents(Data.open_images(folder))


def test_names_above_the_root_may_begin_with_a_dot(tmp_path):
    folder = make_folder(tmp_path / ".data/lost+found/train", [*SMALL, "a/.x.png"])
    assert len(Data.open_images(folder)) == 4
    for arguments in (["-C", tmp_path, ".data"], ["-C", tmp_path / ".data", "lost+found"]):
        assert len(Data.open_images(tar(tmp_path / "x.tar", *arguments))) == 4


def test_an_index_that_was_made_before_hidden_files_were_left_out_is_made_anew(tmp_path):
    path = tar_of(make_folder(tmp_path / "train", [*SMALL, "a/._1.png"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("internals.layout.hidden", lambda name: False)
        patch.setattr("internals.stores.SYSTEM_FOLDERS", ())
        assert len(Data.open_images(path)) == 5
    assert len(Data.open_images(path)) == 4


def test_the_start_line_names_images_classes_and_the_data_that_a_subset_is_of(tmp_path, capsys):
    folder = make_folder(tmp_path / "train", [f"{i}/{j}.png" for i in range(10) for j in "xy"])
    assert Data.contents(Data.open_images(folder)) == "20 images, 10 classes (0, 1, ... 9)"
    Data.open_pair(folder, folder, n_way=1, n_shot=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: 1 image, 1 class (0), of 20 images, 10 classes"
    assert lines[1] == "validation: 2 images, 1 class (0), of 20 images, 10 classes"


def refusal(path, **options):
    """The line that refuses a data set."""
    with pytest.raises(InputError) as refused:
        Data.open_images(path, **options)
    (line,) = str(refused.value).splitlines()
    return line


def in_bash(commands, cwd):
    subprocess.run(["bash", "-ec", commands], cwd=cwd, check=True, capture_output=True)


def test_imagenet_s_archive_of_archives_comes_with_the_commands_that_unpack_it(tmp_path):
    folder = make_folder(tmp_path / "of archives/train", ["n01/1.png", "n02/1.png"])
    for name in ("n01", "n02"):
        tar(tmp_path / "of archives" / f"{name}.tar", "-C", folder / name, "1.png")
    whole = tar(
        tmp_path / "ILSVRC2012 train.tar", "-C", tmp_path / "of archives", "n01.tar", "n02.tar"
    )
    line = refusal(whole)
    assert "holds 2 archives, no images; if each is a class: mkdir " in line
    in_bash(line.partition("class: ")[2], tmp_path)
    assert_equals_image_folder(Data.open_images(tmp_path / "ILSVRC2012 train"), folder)
    shutil.rmtree(folder)
    line = refusal(tmp_path / "of archives")
    in_bash(line.partition("class: ")[2], tmp_path)
    assert len(Data.open_images(tmp_path / "of archives")) == 2


def test_names_of_windows_come_with_the_commands_that_mend_them(tmp_path):
    folder = tmp_path / "made on"
    folder.mkdir()
    for name in ("train\\a\\1.png", "train\\b\\x y.png"):
        picture(0).save(folder / name)
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as file:
        for path in folder.iterdir():
            file.add(path, path.name)
    assert "names with \\ for folders" in refusal(tar_of(folder))  # all in the folder `made on`
    for path, result in (archive, tmp_path / "x"), (folder, folder):
        line = refusal(path)
        assert "has names with \\ for folders, made on Windows, such as train" in line
        in_bash(line.partition("png: ")[2], tmp_path)
        assert sorted(p.name for p in (result / "train").iterdir()) == ["a", "b"]
        assert len(Data.open_images(result / "train")) == 2


def test_layouts_of_other_tools_are_refused_with_what_they_are_and_what_to_do(tmp_path):
    shard = make_folder(tmp_path / "shard", ["000.jpg", "001.jpg"])
    for name in ("000.cls", "001.cls"):
        (shard / name).write_text("3")
    (tmp_path / "lsun").mkdir()
    for name in ("data.mdb", "lock.mdb"):
        (tmp_path / "lsun" / name).write_bytes(b"")
    splits = make_folder(tmp_path / "all", ["train/a/1.png", "train/b/1.png", "val_2017/1.png"])
    heic = make_folder(tmp_path / "phone", ["a/1.png"])
    (heic / "b").mkdir()
    (heic / "b/IMG_1.HEIC").write_bytes(b"")
    for folder, words in {
        shard: "shard of a WebDataset .*named after its class",
        tmp_path / "lsun": "is an LMDB of another tool .*scripts/pack.py",
        splits: "holds train, val_2017: parts of a data set, not classes; ",
        heic: r"no image in the class folder b; other files: 1 \.heic",
    }.items():
        for path in each_store(folder):
            assert re.search(words, refusal(path)), (path, refusal(path))
    (splits / "val_2017/1.png").unlink()
    (splits / "val_2017").rmdir()
    assert "holds train: parts of a data set" in refusal(splits)
    assert len(Data.open_images(splits / "train")) == 2
    vehicles = make_folder(tmp_path / "vehicles", ["train/1.png", "tram/1.png", "test/1.png"])
    assert Data.open_images(vehicles).classes == ["test", "train", "tram"]


def test_links_that_lead_nowhere_or_in_circles_are_refused_by_name(tmp_path):
    folder = make_folder(tmp_path / "train", SMALL)
    for name in ("a/notes.txt", "a/._1.png"):  # harmless
        (folder / name).symlink_to("nowhere")
    assert len(Data.open_images(folder)) == 4
    for link, target in {"a/3.png": "gone.png", "c": "/gone/c", "b/4.png": "4.png"}.items():
        (folder / link).symlink_to(target)
        line = refusal(folder)
        assert line.startswith(f"{folder}/{link} is a link to {target}, which can't be opened: ")
        images = Data.open_images(folder, skip_bad_images=True) if "png" in link else None
        assert images is None or len(images) == 5
        (folder / link).unlink()
    (folder / "b/c/above").symlink_to(folder / "b")
    assert refusal(folder) == f"{folder}/b/c/above is a link to a folder that holds it: delete it"
    (folder / "b/c/above").unlink()
    make_folder(tmp_path / "other", ["1.png"])
    (folder / "a/to").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(folder / "a")
    assert "is a link to a folder that holds it" in refusal(folder)
    (tmp_path / "other/back").unlink()
    (folder / "a/._1.png").unlink()
    assert_equals_image_folder(Data.open_images(folder), folder)


# -------------------------------------------------------------------------------------------------
# The index of a TAR.


def test_an_index_is_made_once_and_anew_when_the_archive_changed(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "train", SMALL)
    path = tar_of(folder)
    assert_equals_image_folder(Data.open_images(path), folder)
    assert (tmp_path / "train.tar.index").exists()
    with monkeypatch.context() as patch:
        patch.setattr("internals.stores.find_images", None)
        assert_equals_image_folder(Data.open_images(path), folder)
    make_folder(tmp_path / "train", ["c/1.png"])
    tar_of(folder)
    assert_equals_image_folder(Data.open_images(path), folder)


def test_a_data_set_that_travels_with_another_index_is_refused(tmp_path):
    folder = make_folder(tmp_path / "train", SMALL)
    path = tar_of(folder)
    pickled = pickle.dumps(Data.open_images(path))
    make_folder(tmp_path / "train", ["a/0.png"])
    tar_of(folder)
    Data.open_images(path)
    with pytest.raises(InputError, match="train.tar.index was made anew"):
        pickle.loads(pickled)


INDEX_FILES = ["head.json", "names.npy", "starts.npy", "places.npy"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty", "missing"])
@pytest.mark.parametrize("name", INDEX_FILES)
def test_a_damaged_index_is_made_anew(tmp_path, name, damage):
    folder = make_folder(tmp_path / "train", SMALL)
    path = tar_of(folder)
    Data.open_images(path)
    assert sorted(os.listdir(tmp_path / "train.tar.index")) == sorted(INDEX_FILES)
    file = tmp_path / "train.tar.index" / name
    data = bytearray(file.read_bytes())
    changed = {
        "cut": [data[:-10]],
        "flipped": [
            data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :] for i in range(0, len(data), 5)
        ],
        "foreign": [b"something else" * 20],
        "empty": [b""],
        "missing": [None],
    }[damage]
    for content in changed:
        file.unlink() if content is None else file.write_bytes(content)
        assert_equals_image_folder(Data.open_images(path), folder)
        if damage != "flipped":  # some bits say nothing
            assert file.read_bytes() == data


def test_the_single_index_file_of_version_0_1_0_is_replaced(tmp_path):
    folder = make_folder(tmp_path / "train", SMALL)
    path = tar_of(folder)
    (tmp_path / "train.tar.index").write_bytes(b"IMLEidx1")
    for _ in range(2):
        assert_equals_image_folder(Data.open_images(path), folder)
    assert sorted(os.listdir(tmp_path / "train.tar.index")) == sorted(INDEX_FILES)


def test_an_index_goes_to_the_cache_or_stays_in_memory_where_the_folder_can_t_be_written_to(
    tmp_path, monkeypatch
):
    folder = make_folder(tmp_path / "train", SMALL)
    path, cache = tar_of(folder), tmp_path / "cache"
    (tmp_path / "train.tar.index/head.json").mkdir(parents=True)  # in the way of root, too
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert_equals_image_folder(Data.open_images(path), folder)
    (index,) = cache.rglob("*.index")
    with monkeypatch.context() as patch:
        patch.setattr("internals.stores.find_images", None)
        assert_equals_image_folder(Data.open_images(path), folder)
    shutil.rmtree(cache)
    cache.write_bytes(b"a file in the way of the folder")
    images = Data.open_images(path)
    assert images.index.folder is None
    assert_equals_image_folder(pickle.loads(pickle.dumps(images)), folder)


def open_and_report(path, barrier, queue):
    barrier.wait()
    images = Data.open_images(path)
    queue.put(hash(tuple(sorted(contents(images).items()))))


def test_processes_that_make_an_index_at_once_all_end_well(stores):
    context = multiprocessing.get_context("fork")
    without_indexes(stores["tar"].parent)
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=open_and_report, args=(stores["tar"], barrier, queue))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    seen = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(seen) == 1
    assert [p.name for p in stores["tar"].parent.glob("*.index*")] == ["train.tar.index"]
    assert not list(stores["tar"].parent.glob(".*.tmp"))


def test_an_archive_that_changes_under_its_index_is_noticed(tmp_path):
    folder = make_folder(tmp_path / "train", ["a/1.bmp", "a/2.bmp", "b/1.bmp"])
    path = tar_of(folder)
    before = path.stat()
    Data.open_images(path)
    (folder / "a/1.bmp").rename(folder / "a/3.bmp")
    tar_of(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    images = Data.open_images(path)  # takes the old index for its own
    noticed = 0
    for i in range(len(images)):
        try:
            entry, content = images.entry(i), images.read(i)
            assert (folder / entry).read_bytes() == content
        except InputError as error:
            assert "index" in str(error)
            noticed += 1
    assert noticed


# -------------------------------------------------------------------------------------------------
# Damage: a clear error or the right bytes, never a crash, a hang or a wrong label.


def verdict(path, before):
    """What a damaged archive does, against the {entry: (image, target)} of the whole one: each
    image is right, or an InputError."""
    try:
        images = Data.open_images(path)
    except InputError as error:
        return "refused" if str(path) in str(error) else f"nameless: {error}"
    if len(images) != len(before):
        return "another number of images"
    for i, (image, target) in enumerate(before.values()):
        if images.target(i) != target:
            return "another class"
        try:
            if not np.array_equal(images.load(i), image):
                return "another image"
        except InputError as error:
            if str(path) not in str(error):
                return f"nameless: {error}"
    return "right"


def in_a_child(function, *arguments):
    """A function's string, by a forked process; "signal N" where that is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)  # a hang
        try:
            text = function(*arguments)
        except BaseException as error:
            text = repr(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    status = os.waitpid(child, 0)[1]
    return text or f"signal {status & 127}"


@pytest.mark.parametrize("mode", ["bit", "garbage", "cut"])
@pytest.mark.parametrize("kind", ["tar", "lmdb"])
def test_damaged_archives_are_refused_or_right(tmp_path, kind, mode):
    folder = make_folder(tmp_path / "train", [*SMALL, *(f"c/{i}.png" for i in range(60))])
    whole = tmp_path / f"whole.{kind}"
    pack.pack(folder, whole)
    images, data = Data.open_images(whole), whole.read_bytes()
    before = {images.entry(i): (images.load(i), images.target(i)) for i in range(len(images))}
    seen = {}
    for seed in range(80):
        random_, damaged = random.Random(seed), bytearray(data)
        place = random_.randrange(len(data))
        if mode == "bit":
            damaged[place] ^= 1 << random_.randrange(8)
        elif mode == "garbage":
            damaged[place : place + 700] = random_.randbytes(700)
        else:
            del damaged[place:]
        path = tmp_path / f"{seed}.{kind}"
        path.write_bytes(damaged)
        seen.setdefault(in_a_child(verdict, path, before), []).append(seed)
        path.unlink()
    assert seen.keys() <= {"refused", "right"}, seen


@pytest.mark.parametrize("place", [0, 124, 148, 257])
def test_a_header_that_lies_is_refused_with_its_place(tmp_path, place):
    path = tar_of(make_folder(tmp_path / "train", SMALL))
    data = bytearray(path.read_bytes())
    start = data.index(b"train/b/1.png")
    data[start + place] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"train.tar is not a whole, .* byte \d+"):
        Data.open_images(path)


def test_an_lmdb_that_is_cut_foreign_or_none_is_refused(tmp_path):
    pack.pack(make_folder(tmp_path / "train", SMALL), tmp_path / "x.lmdb")
    data = (tmp_path / "x.lmdb").read_bytes()
    for name, content in {
        "cut": data[: len(data) // 4096 * 4096 - 2**17 - 4096],
        "text": b"no LMDB" * 999,
        "empty": b"",
    }.items():
        (tmp_path / f"{name}.lmdb").write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.lmdb"):
            Data.open_images(tmp_path / f"{name}.lmdb")
    with (
        lmdb.open(str(tmp_path / "other.lmdb"), subdir=False) as other,
        other.begin(write=True) as transaction,
    ):
        transaction.put(b"key", b"value")
    with pytest.raises(InputError, match="not made by scripts/pack.py"):
        Data.open_images(tmp_path / "other.lmdb")


def test_an_lmdb_that_was_replaced_while_it_was_open_is_noticed(tmp_path):
    first = make_folder(tmp_path / "first", SMALL)
    pack.pack(first, tmp_path / "x.lmdb")
    images = Data.open_images(tmp_path / "x.lmdb")
    (tmp_path / "x.lmdb").unlink()
    pack.pack(make_folder(tmp_path / "second", SMALL[::-1]), tmp_path / "x.lmdb")
    again = pickle.loads(pickle.dumps(images))
    seen = set()
    for _ in range(2 * internals.stores.LMDB_READS):
        try:
            seen.add(again.read(0) == (first / "a/1.png").read_bytes())
        except InputError:
            seen.add("noticed")
    assert False not in seen and "noticed" in seen


# -------------------------------------------------------------------------------------------------
# Processes and memory.


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_every_kind_read_what_the_folder_holds(stores, method):
    opened = [Data.open_images(path) for path in stores.values()]
    for images in opened:
        images.load(0)  # so that something is open that must not be inherited
    augment = Augmentation.augment((8, 6))
    items = ConcatDataset([Keys(Data.SeededImages(images, augment)) for images in opened])
    loader = DataLoader(items, batch_size=4, num_workers=2, multiprocessing_context=method)
    pixels = torch.cat([images for images, _ in loader]).chunk(3)
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    expected = torch.stack([Data.SeededImages(opened[0], augment)[i, i][0] for i in range(5)])
    assert torch.equal(pixels[0][:5], expected)


class Keys(torch.utils.data.Dataset):
    """A SeededImages by index alone."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items.images)

    def __getitem__(self, index):
        return self.items[index, index]


def test_a_process_that_forked_opens_an_lmdb_for_itself(stores):
    images = Data.open_images(stores["lmdb"])
    images.load(0)
    opened = internals.stores.open_lmdb(*images.identity)
    inherited = opened.environment

    def read():
        images.load(0)
        return f"{opened.process == os.getpid()} {opened.environment is not inherited}"

    assert opened.process == os.getpid()
    assert in_a_child(read) == "True True"
    assert opened.environment is inherited


def test_two_data_sets_of_one_lmdb_can_be_open_at_once(stores):
    one, two = (Data.open_images(stores["lmdb"]) for _ in range(2))
    for i in range(len(one)):
        assert one.read(i) == two.read(len(two) - 1 - i) or i != len(two) - 1 - i


def private_megabytes():
    with open("/proc/self/smaps_rollup") as file:
        private = [line for line in file if line.startswith(("Private_Clean", "Private_Dirty"))]
    return sum(int(line.split()[1]) for line in private) / 1024


class Memory(torch.utils.data.Dataset):
    """Reads many images for each item, which is the memory that is this process's alone."""

    def __init__(self, images, reads):
        self.images, self.reads = images, reads

    def __getitem__(self, seed):
        random_ = random.Random(seed)
        for _ in range(self.reads):
            self.images[random_.randrange(len(self.images))]
        return private_megabytes()


def worker_megabytes(images, reads):
    loader = DataLoader(Memory(images, reads // 10), None, sampler=range(10), num_workers=1)
    return list(loader)[-1]


def made_archive(path, n):
    """A TAR of n tiny images in 100 classes."""
    with open(path, "wb") as file:
        content = io.BytesIO()
        picture(0, size=(1, 1)).save(content, "png")
        member = tarfile.TarInfo("x")
        member.size = len(content.getvalue())
        base = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        body = content.getvalue().ljust(512, b"\0")
        for i in range(n):
            name = b"data/train/class%03d/image%07d.png" % (i * 7 % 100, i)
            header = bytearray(base)
            header[: len(name)] = name
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header + body)
        file.write(bytes(10240))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_a_worker_s_memory_and_the_pickle_do_not_grow_with_the_number_of_images(tmp_path):
    small, large = (made_archive(tmp_path / f"{n}.tar", n) for n in (1000, 300_000))
    for path in (small, large):
        pack.pack(path, path.with_suffix(".lmdb"))
    (tmp_path / "unpacked").mkdir()
    for path in (large,):
        subprocess.run(["tar", "-C", tmp_path / "unpacked", "-xf", path], check=True)
    opened = {
        "tar": [Data.open_images(path) for path in (small, large)],
        "lmdb": [Data.open_images(path.with_suffix(".lmdb")) for path in (small, large)],
    }
    folder = Data.open_images(tmp_path / "unpacked/data/train")
    for images, most in (
        (opened["tar"][1], 50_000),
        (opened["lmdb"][1], 50_000),
        (folder, 300_000 * 50),  # the names, which no file holds
    ):
        assert len(images) == 300_000
        assert len(pickle.dumps(images)) < most
        assert len(images.targets) == 300_000  # what was computed here does not travel
        assert len(pickle.dumps(images)) < most
    # A TAR's worker reads the mapped index: all processes share its pages, but while one process
    # alone has read a page, it counts as that process's own.
    index = sum(file.stat().st_size for file in (tmp_path / "300000.tar.index").iterdir()) / 2**20
    assert index * 1_281_167 / 300_000 < 100  # megabytes for ImageNet
    for kind, (few, many) in opened.items():
        grown = worker_megabytes(many, 30_000) - worker_megabytes(few, 30_000)
        assert grown < 5 + index * (kind == "tar"), kind
    assert worker_megabytes(folder, 10_000) - worker_megabytes(opened["tar"][0], 10_000) < 5


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux")
def test_indexing_reads_headers_not_contents(tmp_path):
    folder = make_folder(tmp_path / "train", ["a/1.png", "b/1.png"])
    for name in ("a/2.png", "b/2.png"):
        (folder / name).write_bytes(bytes(2**24))
    path = tar_of(folder)
    before = bytes_read()
    Data.open_images(path)
    assert bytes_read() - before < 2**21


def bytes_read():
    """The bytes that this process has read from files so far."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


# -------------------------------------------------------------------------------------------------
# Packing.


def test_packing_what_is_there_already_or_can_t_be_is_refused(tmp_path, capsys):
    folder = make_folder(tmp_path / "train", SMALL)
    (tmp_path / "there.tar").write_bytes(b"dear")
    nested = make_folder(tmp_path / "one", ["only/a/1.png", "only/b/1.png"])
    for arguments, message in {
        (folder, "there.tar"): "is there already",
        (folder, "x.zip"): "allowed are OUT.lmdb and OUT.tar",
        (folder, "x.tar", "--size", "0"): "--size 0",
        (folder, "x.tar", "--num_workers", "-1"): "--num_workers -1",
        (folder, "none/x.tar"): "cannot write",
        (tmp_path / "none", "x.tar"): "none does not exist",
        (nested, "x.tar"): "would be taken for classes",
    }.items():
        source, out, *rest = arguments
        with pytest.raises(SystemExit) as ended:
            pack.main([str(source), str(tmp_path / out), *rest])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert (tmp_path / "there.tar").read_bytes() == b"dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "there.tar", "train"]
    pack.pack(nested, tmp_path / "x.lmdb")
    assert_equals_image_folder(Data.open_images(tmp_path / "x.lmdb"), nested)


@pytest.mark.parametrize("ending", ["lmdb", "tar"])
def test_packing_checks_what_it_wrote(tmp_path, monkeypatch, ending):
    folder = make_folder(tmp_path / "train", SMALL)
    store = {"lmdb": internals.stores.LmdbImages, "tar": internals.stores.TarImages}[ending]
    real = store.read
    monkeypatch.setattr(store, "read", lambda images, i: real(images, i)[: -1 if i == 2 else None])
    with pytest.raises(InputError, match="b/1.png read back is not what was packed"):
        pack.pack(folder, tmp_path / f"x.{ending}")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_packed_tar_has_its_index_already(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "train", SMALL)
    pack.pack(folder, tmp_path / "x.tar")
    monkeypatch.setattr("internals.stores.find_images", None)
    assert_equals_image_folder(Data.open_images(tmp_path / "x.tar"), folder)


def test_an_lmdb_of_version_0_1_0_is_refused_with_what_to_do(tmp_path):
    head = b'{"identity": "00", "classes": ["a"], "counts": [1]}'
    with (
        lmdb.open(str(tmp_path / "old.lmdb"), subdir=False) as old,
        old.begin(write=True) as transaction,
    ):
        transaction.put(b"head", struct.pack("<qI", len(head), zlib.crc32(head)) + head)
    with pytest.raises(InputError, match="old.lmdb .*0.1.0.*: pack the images again"):
        Data.open_images(tmp_path / "old.lmdb")


@pytest.mark.parametrize("ending", ["lmdb", "tar"])
def test_packing_smaller_shrinks_what_is_larger_and_keeps_the_rest(tmp_path, ending):
    folder = make_folder(tmp_path / "train", ["a/small.png", "b/small.png"])
    smooth = Image.linear_gradient("L").convert("RGB").resize((40, 100))
    smooth.save(folder / "a/large.png")
    picture(1, "CMYK", size=(60, 30)).save(folder / "b/wide.jpg")
    out = tmp_path / f"x.{ending}"
    pack.pack(folder, out, size=20, num_workers=2)
    packed, source = Data.open_images(out), Data.open_images(folder)
    assert packed.classes == source.classes
    sizes = {packed.entry(i): packed.load(i).size for i in range(len(packed))}
    assert sizes == {"a/large.png": (20, 50), "a/small.png": (9, 7), "b/small.png": (9, 7),
        "b/wide.jpg": (40, 20)}  # fmt: skip
    assert packed.read(1) == source.read(1)
    small = smooth.resize((20, 50), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(packed.load(0), int) - np.asarray(small, int)).max() < 8


def kill_while_packing(source, out, wait):
    """Kills a packing after so many seconds of work; whether it was still at it."""
    arguments = [sys.executable, ROOT / "scripts/pack.py", source, out]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
        partial = out.with_name(f".{out.name}.partial")
        while not partial.exists() and not out.exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(wait)
        at_it = process.poll() is None
        process.kill()
    return at_it


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["lmdb", "tar"])
def test_a_packing_that_is_killed_leaves_nothing_or_all_and_can_be_started_again(tmp_path, ending):
    source = made_archive(tmp_path / "source.tar", 30_000)
    before = None
    killed = 0
    for wait in (0, 0.2, 0.5, 0.9, 1.4, 2):
        out = tmp_path / f"{wait}.{ending}"
        killed += kill_while_packing(source, out, wait)
        if not out.exists():
            pack.pack(source, out)
        packed = Data.open_images(out)
        found = [packed.entry(i) for i in range(len(packed))], packed.read(len(packed) - 1)
        before = before or found
        assert found == before
        assert not out.with_name(f".{out.name}.partial").exists()
    assert killed >= 3


def test_one_packing_at_a_time(tmp_path):
    folder = make_folder(tmp_path / "train", SMALL)
    with FileLock(tmp_path / ".x.tar.lock"), pytest.raises(InputError, match="another process"):
        in_thread(pack.pack, folder, tmp_path / "x.tar")


def in_thread(function, *arguments):
    """A function's result or exception, by a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()

"""Data sets, few-shot subsets, pools and minibatches, loading, transforms; against ImageFolder and
brute force."""

import bz2
import contextlib
import gc
import gzip
import io
import itertools
import lzma
import multiprocessing
import os
import pickle
import random
import struct
import subprocess
import sys
from collections import Counter

import complete
import get_cifar10
import numpy as np
import pack  # noqa: E402 (the line above makes it importable)
import pytest
import torch
from conftest import ROOT, TINY, command
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import get_sample_data
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

import Augmentation
import Data
import IO
from internals import decoding, processes, stores
from Utils import InputError, seeded

LONG = "/".join(["long" * 30] * 3)  # longer than any header field of a TAR
NAMES = (
    "cat/2.png cat/10.png cat/a/1.png cat/a-b/1.png cat/a/b/1.png cat-2/1.png cat_3/x.y.png "
    f"Dog/N01.JPEG Dog/n01.jpg éclair/日本.png dog/{LONG}.png"
).split() + ["a b/c d.png"]
DECODERS = ["pillow"]
with contextlib.suppress(InputError):  # not installed, or made for another torch
    decoding.check_decoder("torchcodec")
    DECODERS.append("torchcodec")
POOL = {"seed": 3, "shuffle": True, "fix_mask_noise": False, "n_patches": 5}


def picture(seed, mode="RGB", size=(9, 7)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert("RGB").convert(mode)


def make_folder(root, names=NAMES):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)
    return root


def tar(path, *arguments, cwd=None):
    subprocess.run(["tar", *arguments, "-cf", path], cwd=cwd, check=True, capture_output=True)
    return path


def tar_of(folder):
    return tar(folder.with_suffix(".tar"), "-C", folder.parent, folder.name)


def assert_equals_image_folder(images, folder):
    expected = ImageFolder(folder)
    assert images.classes == expected.classes
    assert images.class_to_idx == expected.class_to_idx
    assert images.targets.tolist() == expected.targets
    assert len(images) == len(expected)
    for i, (path, target) in enumerate(expected.samples):
        assert images.entry(i) == os.path.relpath(path, folder)
        image, label = images[i]
        assert label == target
        assert np.array_equal(image, expected[i][0])


class Named(stores.Images):
    """Images that exist by name only: `counts` of each class."""

    def __init__(self, *counts):
        self.counts = counts
        super().__init__("nowhere")

    def find(self):
        numbers = iter(range(sum(self.counts)))
        return stores.Index.make(
            (name, [f"{name}/{next(numbers)}.png".encode() for _ in range(count)], [[]] * count)
            for name, count in ((f"class{i:03}", n) for i, n in enumerate(self.counts))
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("made") / "data/imagenet/train")


@pytest.fixture(scope="module")
def opened(folder):
    return Data.open_images(tar_of(folder))


# -------------------------------------------------------------------------------------------------


def test_a_folder_equals_image_folder(folder):
    assert_equals_image_folder(Data.open_images(folder), folder)


@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.parametrize("recipe", ["readme", "parent", "root", "classes", "absolute"])
def test_tar_of_a_folder_equals_the_folder(folder, tmp_path, recipe, form):
    arguments = {
        "readme": ["-v", "data/imagenet/train"],
        "parent": ["-C", "data/imagenet", "train"],
        "root": ["-C", "data/imagenet/train", "."],
        "classes": ["-C", "data/imagenet/train", *sorted(os.listdir(folder), reverse=True)],
        "absolute": ["-P", folder],
    }[recipe]
    path = tar(tmp_path / "x.tar", f"--format={form}", *arguments, cwd=folder.parents[2])
    assert_equals_image_folder(Data.open_images(path), folder)


def test_tar_with_one_class_equals_the_folder(tmp_path):
    folder = make_folder(tmp_path / "train", ["cat/1.png", "cat/2.png"])
    assert_equals_image_folder(Data.open_images(tar_of(folder)), folder)


def test_a_file_that_was_appended_again_replaces_the_first(tmp_path):
    folder = make_folder(tmp_path / "train", ["a/1.png", "b/1.png"])
    path = tar_of(folder)
    picture(99).save(folder / "a/1.png")
    subprocess.run(["tar", "-C", tmp_path, "-rf", path, "train/a/1.png"], check=True)
    assert_equals_image_folder(Data.open_images(path), folder)


def test_tar_of_hard_linked_images_equals_the_folder(tmp_path):
    folder = make_folder(tmp_path / "train", ["a/1.png", "b/1.png"])
    os.link(folder / "a/1.png", folder / "b/2.png")
    assert_equals_image_folder(Data.open_images(tar_of(folder)), folder)


def test_tar_that_holds_a_mere_link_to_an_image_is_refused(tmp_path):
    folder = make_folder(tmp_path / "train", ["a/1.png", "b/1.png"])
    picture(0).save(tmp_path / "elsewhere.png")
    (folder / "b/2.png").symlink_to(tmp_path / "elsewhere.png")
    assert_equals_image_folder(Data.open_images(folder), folder)
    with pytest.raises(InputError, match="b/2.png"):  # ImageFolder has it: never leave it out
        Data.open_images(tar_of(folder))


def test_tar_survives_pickling(opened):
    opened.load(0)
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).load(1), opened.load(1))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archives_are_refused(folder, tmp_path, compress):
    path = tmp_path / "x.tar"
    path.write_bytes(compress(tar_of(folder).read_bytes()))
    with pytest.raises(InputError, match="x.tar is not a whole, uncompressed TAR"):
        Data.open_images(path)


def test_a_cut_archive_is_refused_wherever_an_image_is_lost(tmp_path):
    path = tar_of(make_folder(tmp_path / "train", ["a/1.png", "b/1.png", f"c/{LONG}.png"]))
    whole = path.read_bytes()
    kept = []
    for cut in range(0, len(whole), 128):
        path.write_bytes(whole[:cut])
        try:
            kept.append((cut, len(Data.open_images(path))))
        except InputError as error:
            assert str(path) in str(error)
    assert [(cut, n) for cut, n in kept if n < 3] == []


@pytest.mark.parametrize("content", [b"", bytes(10240), b"no archive at all" * 100])
def test_empty_and_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match="x.tar"):
        Data.open_images(path)


@pytest.mark.parametrize("root", [".", "train", "data/train"])
def test_images_beside_class_folders_are_refused_in_a_tar(tmp_path, root):
    make_folder(tmp_path / "in" / root, ["stray.png", "a/1.png", "b/1.png"])
    path = tar(tmp_path / "x.tar", "-C", tmp_path / "in", root)
    with pytest.raises(InputError, match="x.tar holds images outside of class folders"):
        Data.open_images(path)


def test_images_without_class_folders_are_one_class_the_same_in_every_store(tmp_path, capsys):
    folder = make_folder(tmp_path / "val", ["b.png", "a.png", ".hidden.png"])
    folder_images = Data.open_images(folder)
    inner = tar(tmp_path / "inner.tar", "-C", folder, "b.png", "a.png")
    stores = [inner, tar(tmp_path / "val.tar", "-C", tmp_path, "val")]
    for path in tmp_path / "x.lmdb", tmp_path / "x.tar":
        pack.pack(folder, path)
        stores.append(path)
    for images in (folder_images, *map(Data.open_images, stores)):
        assert Data.contents(images).startswith("2 images without class folders")
        assert images.fingerprint() == folder_images.fingerprint()
        assert [images.entry(i) for i in range(2)] == ["./a.png", "./b.png"]
        assert images.name(1).endswith("/b.png") and "/./" not in images.name(1)
        assert images[0][0].tobytes() == picture(1).tobytes() and images.targets.tolist() == [0, 0]
    labelled = make_folder(tmp_path / "tr", ["a/1.png", "b/1.png"])
    with pytest.raises(InputError, match="--data_val: .*val has no class folders.*valprep.sh"):
        Data.open_pair(labelled, folder)
    assert Data.open_pair(folder, labelled)[1].classes == ["a", "b"]


@pytest.mark.parametrize("make", [lambda folder: folder, tar_of])
def test_data_without_images_are_refused(tmp_path, make):
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    with pytest.raises(InputError, match="holds no images"):
        Data.open_images(make(tmp_path / "train"))


def test_an_empty_class_folder_is_refused_by_name(tmp_path):
    folder = make_folder(tmp_path / "train", ["a/1.png"])
    (folder / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing"):
        Data.open_images(folder)


@pytest.mark.parametrize("name", ["missing", "file.zip"])
def test_what_is_neither_folder_nor_tar_is_refused(tmp_path, name):
    (tmp_path / "file.zip").write_bytes(b"")
    with pytest.raises(InputError, match=name):
        Data.open_images(tmp_path / name)


# -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_workers_left():
    """Ends those of a loader that was given up; collecting one with live workers takes seconds."""
    yield
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join()
    gc.collect()


@pytest.mark.parametrize("make", [lambda folder: folder, tar_of])
def test_a_damaged_image_is_an_error_that_names_it(tmp_path, make):
    folder = make_folder(tmp_path / "train", ["a/0.jpg", "a/cut.jpg", "b/empty.jpg", "b/text.png"])
    content = (folder / "a/cut.jpg").read_bytes()
    (folder / "a/cut.jpg").write_bytes(content[: len(content) * 2 // 3])
    (folder / "b/empty.jpg").write_bytes(b"")
    (folder / "b/text.png").write_bytes(b"no image")
    images = Data.open_images(make(folder))
    images.load(0)
    for index, name in enumerate(["a/cut.jpg", "b/empty.jpg", "b/text.png"], start=1):
        with pytest.raises(stores.ImageError, match=name):
            images.load(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_ends_the_command_in_one_line(
    tmp_path, capsys, num_workers, no_workers_left
):
    folder = make_folder(tmp_path, ["a/0.jpg", "a/cut.jpg"])
    (folder / "a/cut.jpg").write_bytes((folder / "a/0.jpg").read_bytes()[:400])
    images, indices = Data.open_images(folder), torch.arange(2)
    loader = Data.ImageLoader(images, Augmentation.resize((8, 8)), num_workers=num_workers)
    with pytest.raises(SystemExit) as ended:
        processes.run_command(lambda: list(loader.chunks(indices, indices, 1)))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "a/cut.jpg" in line


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo():
    """A photograph."""
    return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")


def odd_images(photo):
    """{name: encoded image} of every kind that is met."""
    photo = photo.crop((90, 20, 187, 151))
    grey, palette, turned = photo.convert("L"), photo.quantize(16), Image.Exif()
    turned[0x0112] = 6  # orientation: a viewer turns the image
    made = {f"{mode}.jpg": encoded(photo.convert(mode), "jpeg") for mode in ("CMYK", "L", "RGB")}
    made |= {f"{n}.jpg": encoded(photo, "jpeg", subsampling=n) for n in (0, 1)}
    made |= {f"{m}.png": encoded(photo.convert(m), "png") for m in ("1", "L", "LA", "P", "RGBA")}
    whole, in_exif = encoded(photo, "jpeg", quality=90), encoded(photo, "jpeg", exif=turned)
    return made | {
        "progressive.jpg": encoded(photo, "jpeg", progressive=True),
        "turned.jpg": in_exif,
        # Behind another segment and a marker that is filled up.
        "turned late.jpg": in_exif[:2] + b"\xff\xfe\0\x0aa commen\xff\xff" + in_exif[2:],
        "turned.png": encoded(photo, "png", exif=turned),
        "transparent.png": encoded(palette, "png", transparency=bytes(range(16))),
        "transparent one.png": encoded(palette, "png", transparency=3),
        "a png.JPEG": encoded(photo, "png"),
        "a jpeg.png": whole,
        "one pixel.jpg": encoded(photo.crop((0, 0, 1, 1)), "jpeg"),
        "webp.webp": encoded(photo, "webp"),
        "bmp.bmp": encoded(photo, "bmp"),
        "pgm.pgm": encoded(grey, "ppm"),
        "followed by more.jpg": whole + b"more" * 9,
        "changed.jpg": whole[:2500] + bytes(4) + whole[2504:],
    }


def damaged_images(photo):
    """{name: what is no image}."""
    whole = encoded(photo.crop((90, 20, 187, 151)), "jpeg", quality=90)
    return {
        "cut.jpg": whole[: len(whole) * 2 // 3],
        "cut at the end.jpg": whole[:-2],
        "cut.png": encoded(photo, "png")[:5000],
        "nothing.jpg": b"",
        "text.png": b"no image",
        "zeros.jpg": bytes(500),
        "start.jpg": whole[:2],
    }


def pixels(image):
    """(H, W, 3) of an image in either form."""
    return np.asarray(image.permute(1, 2, 0) if isinstance(image, torch.Tensor) else image)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("image_decoder", DECODERS)
def test_odd_images_are_the_same_in_each_store_as_in_image_folder(tmp_path, photo, image_decoder):
    folder, damaged = make_folder(tmp_path / "train", ["a/1.png", "b/1.png"]), damaged_images(photo)
    for name, content in (odd_images(photo) | damaged).items():
        (folder / "a" / name).write_bytes(content)
    pack.pack(folder, tmp_path / "x.lmdb")
    expected, refused = ImageFolder(folder), set()
    for path in (folder, tar_of(folder), tmp_path / "x.lmdb"):
        images = Data.open_images(path, image_decoder=image_decoder)
        for i, (name, target) in enumerate(expected.samples):
            assert images.target(i) == target
            name = os.path.basename(name)
            if name in damaged:
                with pytest.raises(stores.ImageError) as refusal:
                    images.load(i)
                (line,) = str(refusal.value).splitlines()
                assert str(path) in line and f"a/{name}: " in line and "BytesIO" not in line
                refused.add(name)
            else:
                assert np.array_equal(pixels(images.load(i)), expected[i][0]), name
    assert refused == damaged.keys()


def tiff(numbers, order="<", white=1):
    """A grey TIFF of any type of number, in either byte order; white=0: white is zero."""
    height, width = numbers.shape
    data = numbers.astype(numbers.dtype.newbyteorder(order)).tobytes()
    bits, sample = 8 * numbers.dtype.itemsize, "uif".index(numbers.dtype.kind) + 1
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample}
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items()]
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)


def grey_images():
    """{name: (encoded image, the 8 bits that it should become)} of grey images with more bits."""
    values = np.arange(48).reshape(6, 8) * 5  # 0 to 235
    own = (values * (255 / 235)).round()
    sixteen, turned = Image.fromarray((257 * values).astype(np.uint16)), Image.Exif()
    turned[0x0112] = 6
    pgm = b"P5\n8 6\n65535\n" + (257 * values).astype(">u2").tobytes()
    twelve = b"P5\n8 6\n4095\n" + (values * 4095 // 255).astype(">u2").tobytes()
    made = {"16.png": (encoded(sixteen, "png"), values), "16.pgm": (pgm, values)}
    made |= {"12.pgm": (twelve, values), "16.webp": (encoded(sixteen, "png", exif=turned), values)}
    made["white.tif"] = tiff((257 * values).astype("u2"), white=0), 255 - values
    made["float.png"] = encoded(Image.fromarray(values.astype("f4") / 1e4 - 3), "tiff"), own
    made["pfm.ppm"] = b"Pf\n8 6\n-1\n" + values[::-1].astype("<f4").tobytes(), own
    made["flat.tif"] = tiff(np.full((6, 8), 7, "f4")), 0 * values
    made["large.tif"] = tiff((values.astype("u8") * 10**7).astype("u4")), own  # 2**31 and more
    for order in "<>":
        made[f"u2{order}.tif"] = tiff((257 * values).astype("u2"), order), values
        made[f"i2{order}.tif"] = tiff((257 * values - 32768).astype("i2"), order), values
        made[f"i4{order}.tif"] = tiff((values - 100).astype("i4"), order), own
        made[f"f4{order}.tif"] = tiff((values / 1000).astype("f4"), order), own
    return made


def test_grey_images_of_more_bits_are_scaled_alike_by_training_packing_and_completing(tmp_path):
    expected, folder = grey_images(), make_folder(tmp_path / "train", ["b/1.png"])
    (folder / "a").mkdir()
    for name, (content, _) in expected.items():
        (folder / "a" / name).write_bytes(content)
    pack.pack(folder, tmp_path / "x.lmdb")
    pack.pack(folder, tmp_path / "small.tar", size=5, num_workers=0)
    for path, decoder in itertools.product([folder, tmp_path / "x.lmdb"], DECODERS):
        images = Data.open_images(path, image_decoder=decoder)
        packed = Data.open_images(tmp_path / "small.tar", image_decoder=decoder)
        for i, name in enumerate(sorted(expected)):
            right = expected[name][1].astype(np.uint8)
            assert np.array_equal(pixels(images.load(i)), np.stack([right] * 3, 2)), name
            small = Image.fromarray(right).resize((6, 5), Image.Resampling.BICUBIC)
            assert np.abs(pixels(packed.load(i))[..., 0] - np.array(small, int)).max() < 12, name
    for name, (content, right) in expected.items():
        shown = complete.open_picture(folder / "a" / name)
        upright = np.rot90(right, -1) if b"eXIf" in content else right
        assert np.array_equal(np.asarray(shown)[..., 0], upright), name
    (folder / "a/16.png").write_bytes(tiff(np.array([[0, np.nan]], "f4")))
    with pytest.raises(decoding.InputError, match="a/16.png: it holds numbers that are not finite"):
        complete.open_picture(folder / "a/16.png")


def test_a_picture_beyond_pillow_s_limit_is_refused_by_each_decoder(tmp_path, photo, monkeypatch):
    (tmp_path / "a").mkdir()
    for name, size in {"0.jpg": (50, 20), "1.jpg": (50, 39), "2.jpg": (50, 41)}.items():
        photo.resize(size).save(tmp_path / "a" / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for decoder in DECODERS:
        images = Data.open_images(tmp_path, image_decoder=decoder)
        images.load(0)
        with pytest.warns(Image.DecompressionBombWarning):
            images.load(1)
        with pytest.raises(stores.ImageError, match="2.jpg: .*2050 pixels.* 2000 .*smaller"):
            images.load(2)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "tiff", "gif", "bmp"])
def test_bytes_damaged_anywhere_are_an_image_or_an_error(tmp_path, photo, form):
    whole = encoded(photo.resize((40, 50)), form)
    folder = make_folder(tmp_path, ["a/1.png"])
    random_ = random.Random(0)
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(random_.randrange(1, 4)):
            start = random_.randrange(len(content))
            content[start : start + random_.randrange(1, 9)] = random_.randbytes(3)
        (folder / "a/1.png").write_bytes(content)
        for image_decoder in DECODERS:
            try:
                image = Data.open_images(folder, image_decoder=image_decoder).load(0)
                assert pixels(image).shape[2] == 3
            except stores.ImageError as error:
                assert "a/1.png" in str(error)


# -------------------------------------------------------------------------------------------------


@pytest.mark.skipif("torchcodec" not in DECODERS, reason="torchcodec does not load")
@pytest.mark.parametrize("name", ["augment", "resize", "center_crop"])
def test_torchcodec_s_pipeline_differs_from_pillow_s_by_rounding(photo, name):
    content, transform = encoded(photo, "jpeg"), getattr(Augmentation, name)((96, 112))
    differences = []
    for seed in range(20):
        with seeded(seed):
            pillow = transform(decoding.open_image(content))
            after = torch.rand(1)
        with seeded(seed):
            tensor = transform(decoding.decode_by_torchcodec(content))
            assert torch.rand(1) == after
        differences.append((pillow.int() - tensor.int()).abs().float())
    differences = torch.stack(differences)
    assert differences.mean() < 0.1 and differences.max() <= 12


def test_augment_draws_and_computes_what_torchvision_s_transforms_do(photo):
    crop = T.RandomResizedCrop((48, 40), scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC)
    theirs = T.Compose([crop, T.RandomHorizontalFlip(), T.PILToTensor()])
    ours = Augmentation.augment((48, 40))
    for seed in range(20):
        for image in (photo, T.functional.pil_to_tensor(photo)):
            with seeded(seed):
                expected = theirs(image), torch.rand(1)
            with seeded(seed):
                assert torch.equal(ours(image), expected[0])
                assert torch.rand(1) == expected[1]


def test_a_decoder_that_is_not_installed_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(InputError, match="torchcodec does not load .*pip install"):
        Data.open_images(ROOT / "demo/mnist_val.tar", image_decoder="torchcodec")
    with pytest.raises(SystemExit) as ended:
        IO.parse_flags("--data_tr a --data_val b --image_decoder torchcodec".split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--image_decoder: torchcodec does not load" in line


# -------------------------------------------------------------------------------------------------


@pytest.fixture
def thousand(tmp_path):
    """A folder of 2,000 tiny images in 4 classes, those of c0 different from each other."""
    content = encoded(picture(0, size=(2, 2)), "png")
    for i in range(2000):
        (tmp_path / f"c{i % 4}").mkdir(exist_ok=True)
        if i % 4:
            (tmp_path / f"c{i % 4}/{i:04}.png").write_bytes(content)
        else:
            picture(i, size=(3, 2)).save(tmp_path / f"c0/{i:04}.png")
    return tmp_path


def test_skip_bad_images_replaces_by_the_next_of_the_class_up_to_one_in_a_thousand(
    thousand, capsys, no_workers_left
):
    resize, indices = Augmentation.resize((2, 3)), torch.arange(500)
    whole, replaced = Data.open_images(thousand), {250: 251, 499: 0}
    expected = [resize(whole.load(replaced.get(i, i))) for i in range(500)]
    for name in ("1000", "1996"):  # one in the middle and the last of c0
        (thousand / f"c0/{name}.png").write_bytes(b"no image")
    images = Data.open_images(thousand, skip_bad_images=True)
    for num_workers in (0, 2):
        loader = Data.ImageLoader(images, resize, num_workers=num_workers)
        for _ in range(2):  # bad images are told of once
            assert torch.equal(load_all(loader, indices, indices, 64), torch.stack(expected))
        assert images.replaced == replaced.keys()
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(lines) == 2
    assert "c0/1000.png: " in lines[0] and "; 1 of 2000 images replaced" in lines[0]
    (thousand / "c1/0001.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"3 of 2000 images .* more than 0.1%.*c1/0001.png"):
        load_all(loader, *[torch.arange(502)] * 2, 64)
    with pytest.raises(stores.ImageError, match="c0/1000.png"):
        load_all(Data.ImageLoader(Data.open_images(thousand), resize, num_workers=0), indices,
            indices)  # fmt: skip


def test_in_a_subset_a_damaged_image_is_replaced_from_the_subset(thousand):
    images = Data.open_images(thousand, skip_bad_images=True)
    subset = Data.few_shot(images, 2, 3, seed=0)
    chosen = subset.of_class(1)
    (thousand / images.entry(subset.indices[chosen[2]])).write_bytes(b"no image")
    picture(5).save(thousand / images.entry(subset.indices[chosen[0]]))
    items = Data.SeededImages(subset, Augmentation.resize((2, 3)))
    assert items[chosen[2], 0][1] and not items[chosen[0], 0][1]
    assert torch.equal(items[chosen[2], 0][0], items[chosen[0], 0][0])


def test_damaged_images_of_subsets_count_together_against_the_whole_data_set(thousand, capsys):
    images, indices = Data.open_images(thousand, skip_bad_images=True), torch.arange(4)
    resize, shots = Augmentation.resize((2, 3)), [Data.few_shot(images, 4, 1, s) for s in range(3)]
    bad = {subset.indices[0] for subset in shots}
    assert len(bad) == 3
    for index in bad:
        (thousand / images.entry(index)).write_bytes(b"")
    for subset in shots[:2]:  # whose only image of c0 is damaged: one from outside the subset
        load_all(Data.ImageLoader(subset, resize, num_workers=0), indices, indices)
    assert "2 of 2000 images replaced so far" in capsys.readouterr().err
    with pytest.raises(InputError, match="3 of 2000 images .* can't be read, more than 0.1%"):
        load_all(Data.ImageLoader(shots[2], resize, num_workers=0), indices, indices)


def test_a_class_without_one_sound_image_is_an_error(thousand):
    for path in (thousand / "c2").iterdir():
        path.write_bytes(b"no image")
    items = Data.SeededImages(
        Data.open_images(thousand, skip_bad_images=True), Augmentation.resize((2, 3))
    )
    with pytest.raises(stores.ImageError, match="c2/0002.png"):
        items[1000, 0]


@pytest.mark.slow
def test_a_run_skips_bad_images_only_when_asked_to(thousand, tmp_path_factory):
    (thousand / "c0/0008.png").write_bytes(b"no image")
    pack.pack(thousand, tmp_path_factory.mktemp("packed") / "x.lmdb")
    data = tmp_path_factory.getbasetemp().glob("packed*/x.lmdb")
    arguments = [*TINY, "--data_tr", next(data), "--data_val", thousand, "--ex_per_epoch", 2000]
    arguments += ["--ipe", 170, "--epochs", 1, "--ignore_z", 1, "--fast_linear_probe", 0]
    arguments += ["--steps_per_eval", 0, "--save_folder", tmp_path_factory.mktemp("runs")]
    refused = command(*arguments, check=False)
    assert refused.returncode == 2
    assert "x.lmdb/c0/0008.png: cannot identify" in refused.stderr.splitlines()[-1]
    done = command(*arguments, "--skip_bad_images", 1)
    assert "1 of 2000 images replaced" in done.stderr


# -------------------------------------------------------------------------------------------------


PROPERTIES = settings(max_examples=150, deadline=None)


@PROPERTIES
@given(
    n=st.integers(1, 600),
    sizes=st.lists(st.integers(0, 300), max_size=8),
    start=st.integers(0, 3),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
)
def test_however_they_are_taken_all_indices_are_drawn_k_or_one_less_times(
    n, sizes, start, seed, shuffle
):
    first = start * n  # the sequence's only state
    drawn = []
    for size in sizes:
        drawn += Data.even_indices(n, first + len(drawn), size, seed, shuffle).tolist()
        counts = np.bincount(drawn, minlength=n)
        assert len(counts) == n and counts.max() - counts.min() <= 1
    assert drawn == Data.even_indices(n, first, len(drawn), seed, shuffle).tolist()


@PROPERTIES
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=40), data=st.data())
def test_few_shot_subsets_are_exactly_what_was_asked_for(counts, data):
    images = Named(*counts)
    n_way = data.draw(st.integers(1, len(counts)) | st.just(-1))
    n_shot = data.draw(st.integers(1, min(counts)) | st.just(-1))
    seed = data.draw(st.integers(0, 2**31))
    subset = Data.few_shot(images, n_way, n_shot, seed)
    ways = len(counts) if n_way == -1 else n_way
    assert subset.classes == [images.classes[i * len(counts) // ways] for i in range(ways)]
    for target, name in enumerate(subset.classes):
        members = [subset.name(i) for i in subset.of_class(target)]
        assert all(f"/{name}/" in member for member in members)
        wanted = counts[images.class_to_idx[name]] if n_shot == -1 else n_shot
        assert len(set(members)) == len(members) == wanted
    assert [subset.target(i) for i in range(len(subset))] == subset.targets.tolist()
    inner = Data.few_shot(subset, 1, 1, seed)
    assert inner.classes == subset.classes[:1] and inner.targets.tolist() == [0]
    assert f"/{inner.classes[0]}/" in inner.name(0)


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_classes", "n_way"), [(10, 3), (10, 10), (7, 1), (100, 32), (5, -1)])
def test_few_shot_classes_are_evenly_spaced_and_targets_dense(n_classes, n_way):
    images = Named(*[3] * n_classes)
    subset = Data.few_shot(images, n_way, 2, seed=0)
    n_way = n_classes if n_way == -1 else n_way
    ways = [images.classes.index(name) for name in subset.classes]
    assert len(ways) == n_way and ways == sorted(set(ways))
    steps = np.diff([*ways, n_classes])
    assert ways[0] == 0 and steps.max() - steps.min() <= 1
    assert Counter(subset.targets.tolist()) == dict.fromkeys(range(n_way), 2)
    for i, index in enumerate(subset.indices):
        assert subset.name(i) == images.name(index)
        assert ways[subset.targets[i]] == images.targets[index]


def test_few_shot_examples_depend_on_the_seed_and_more_shots_keep_the_fewer():
    images = Named(*[50] * 4)
    chosen = {
        (seed, shots): set(Data.few_shot(images, 2, shots, seed).indices.tolist())
        for seed in range(3)
        for shots in (5, 20)
    }
    assert chosen[0, 5] == set(Data.few_shot(images, 2, 5, 0).indices.tolist())
    assert chosen[0, 5] != chosen[1, 5] != chosen[2, 5]
    assert all(chosen[seed, 5] < chosen[seed, 20] for seed in range(3))
    assert len(Data.few_shot(images, 2, -1, 0)) == 100


def test_few_shot_does_not_depend_on_the_hash_seed(tmp_path):
    make_folder(tmp_path, [f"{name}/{i}.png" for name in "abcdefgh" for i in range(4)])
    code = "import Data, sys; s = Data.few_shot(Data.open_images(sys.argv[1]), 5, 2, 0); "
    code += "print(s.classes, s.indices.tolist())"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1",
        "PYTHONPATH": os.path.dirname(Data.__file__),
    }
    command = [sys.executable, "-c", code, tmp_path]
    output = subprocess.check_output(command, env=environment, text=True)
    subset = Data.few_shot(Data.open_images(tmp_path), 5, 2, 0)
    assert output.strip() == f"{subset.classes} {subset.indices.tolist()}"


def test_a_subset_of_a_subset_still_names_and_loads_its_images(folder):
    images = Data.open_images(folder)
    outer = Data.few_shot(images, 4, -1, seed=0)
    inner = Data.few_shot(outer, 2, 1, seed=0)
    assert set(inner.classes) < set(outer.classes)
    assert inner.targets.tolist() == [0, 1]
    for i, target in enumerate(inner.targets):
        assert f"/train/{inner.classes[target]}/" in inner.name(i)
        index = [images.name(j) for j in range(len(images))].index(inner.name(i))
        assert np.array_equal(inner.load(i), images.load(index))


@pytest.mark.parametrize(("n_way", "n_shot"), [(4, 1), (3, 4), (-1, 4), (1000, -1)])
def test_more_classes_or_images_than_there_are_is_refused(n_way, n_shot):
    with pytest.raises(InputError, match="wanted"):
        Data.few_shot(Named(5, 5, 3), n_way, n_shot, seed=0)


def test_with_classes_keeps_all_images_in_the_order_of_the_classes_given():
    images = Named(2, 3, 1, 4)
    subset = Data.with_classes(images, ["class001", "class003"])
    assert subset.indices.tolist() == [2, 3, 4, 6, 7, 8, 9]
    assert subset.targets.tolist() == [0] * 3 + [1] * 4
    with pytest.raises(InputError, match="class009"):
        Data.with_classes(images, ["class001", "class009"])


def test_open_pair_gives_both_sets_the_same_classes_and_names_the_flag_at_fault(tmp_path):
    tr = make_folder(tmp_path / "tr", ["a/1.png", "a/2.png", "b/1.png", "c/1.png", "d/1.png"])
    val = make_folder(tmp_path / "val", ["a/1.png", "c/1.png", "c/2.png"])
    images_tr, images_val = Data.open_pair(tr, val, n_way=2, n_shot=1, seed=0)
    assert images_tr.classes == images_val.classes == ["a", "c"]
    assert images_val.targets.tolist() == [0, 1, 1]
    options = {"n_way": -1, "n_shot": -1, "seed": 0, "same_classes": False}
    assert Data.open_pair(tr, val, **options)[1].classes == ["a", "c"]
    for (tr_, val_, n_way, n_shot), message in (
        ((tmp_path / "none", val, 2, 1), "^--data_tr: .*none"),
        ((tr, tmp_path / "none", 2, 1), "^--data_val: .*none"),
        ((tr, val, 5, 1), "^--train_n_way: 5 .* 4"),
        ((tr, val, 2, 2), "^--train_n_shot: 2 .* c has 1"),
        ((tr, val, -1, -1), "^--data_val: no class b"),
    ):
        with pytest.raises(InputError, match=message):
            Data.open_pair(tr_, val_, n_way=n_way, n_shot=n_shot, seed=0)


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("n", "size"), [(7, 3), (7, 7), (5, 13), (1, 4), (10, 1)])
def test_every_index_is_drawn_evenly_for_any_pool_size_and_across_epochs(n, size, shuffle):
    whole = Data.even_indices(n, 0, 6 * size, 5, shuffle)
    drawn = []
    for epoch in range(6):
        part = Data.even_indices(n, epoch * size, size, 5, shuffle)
        assert torch.equal(part, whole[epoch * size : (epoch + 1) * size])
        assert torch.equal(part, Data.even_indices(n, epoch * size, size, 5, shuffle))
        drawn += part.tolist()
        counts = [drawn.count(i) for i in range(n)]
        assert sum(counts) == len(drawn) and max(counts) - min(counts) <= 1


def test_shuffled_passes_differ_from_each_other_and_by_seed():
    passes = Data.even_indices(30, 0, 90, 0).view(3, 30).tolist()
    passes.append(Data.even_indices(30, 0, 30, 1).tolist())
    assert all(sorted(p) == list(range(30)) for p in passes)
    assert all(a != b for a, b in itertools.combinations(passes, 2))


def test_occurrences_count_what_came_before():
    for n in (0, 1, 50):
        indices = torch.randint(0, 8, (n,), generator=torch.Generator().manual_seed(n))
        expected = [indices[:i].tolist().count(x) for i, x in enumerate(indices.tolist())]
        assert Data.occurrences(indices).tolist() == expected


def draw(n, size, epoch, **options):
    return Data.draw_pool(Named(n), size, epoch, **{**POOL, **options})


def test_an_image_seed_depends_on_seed_epoch_index_and_occurrence_alone():
    known = {}
    for seed, epoch, size, shuffle in itertools.product((3, 4), (0, 1, 5), (4, 30), (True, False)):
        pool = draw(7, size, epoch, seed=seed, shuffle=shuffle)
        indices = pool.indices.tolist()
        for i, index in enumerate(indices):
            key = seed, epoch, index, indices[:i].count(index)
            row = pool.seeds[i].item(), pool.mask_noise([i])[0].tolist()
            assert known.setdefault(key, row) == row
    assert len({s for s, _ in known.values()}) == len(known) > 100
    assert len({tuple(noise) for _, noise in known.values()}) == len(known)


def test_fix_mask_noise_gives_an_image_the_same_mask_in_every_epoch():
    known, crops = {}, set()
    for epoch, size in itertools.product(range(4), (7, 12)):
        pool = draw(7, size, epoch, fix_mask_noise=True)
        noise_of_all = pool.mask_noise(slice(None)).tolist()
        for index, noise in zip(pool.indices.tolist(), noise_of_all, strict=True):
            assert known.setdefault(index, noise) == noise
        crops |= set(pool.seeds.tolist())
    assert len({tuple(noise) for noise in known.values()}) == 7
    assert len(crops) > 4 * 7  # crops still change


def test_a_pool_is_pure_and_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    one, two = draw(9, 20, 2), draw(9, 20, 2)
    noise = one.mask_noise(torch.arange(20))
    assert torch.equal(one.seeds, two.seeds)
    assert torch.equal(noise, two.mask_noise(torch.arange(20)))
    assert torch.equal(noise[[4, 2]], one.mask_noise(torch.tensor([4, 2])))
    assert torch.equal(state, torch.get_rng_state())
    assert noise.shape == (20, 5) and noise.min() >= 0 and noise.max() < 1


def test_a_pool_holds_a_few_numbers_per_image_and_no_pixels():
    numbers = [x for x in vars(draw(9, 1000, 0)).values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() for x in numbers) <= 3 * 1000 + 1


class Rows:
    """Stands for an ImageLoader: gives for every row a 1 x 1 image of its seed."""

    def load(self, indices, seeds, batches):
        for rows in batches:
            yield rows, seeds[rows][:, None, None, None]


def batches_of(pool, **options):
    return list(Data.minibatches(pool, Rows(), torch.device("cpu"), **options))


def rows_of(pool, batch):
    """The rows of the pool in a minibatch; no two rows have the same seed."""
    return [pool.seeds.tolist().index(seed) for seed in batch.seeds.tolist()]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("pool_size", "size"), [(5, 3), (12, 4), (3, 7), (6, 6)])
def test_minibatches_are_whole_passes_in_exactly_sized_pieces(pool_size, size, shuffle):
    steps, epoch = 5, 2
    pool = draw(4, pool_size, epoch, shuffle=shuffle)
    batches = [rows_of(pool, b) for b in batches_of(pool, steps=steps, size=size)]
    assert [len(batch) for batch in batches] == [size] * steps
    stream = sum(batches, [])
    for start in range(0, len(stream), pool_size):
        part = stream[start : start + pool_size]
        assert len(set(part)) == len(part)
    for done in range(steps):
        rest = batches_of(pool, steps=steps, size=size, done=done)
        assert [rows_of(pool, batch) for batch in rest] == batches[done:]


def test_processes_share_a_minibatch_and_gather_images_noise_and_codes_by_row(monkeypatch):
    pool, numbers = draw(4, 9, 0), torch.randperm(9)
    (whole,) = batches_of(pool, steps=1, size=7)
    monkeypatch.setattr(Data, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(Data, "rank", lambda r=rank: r)
        (batch,) = batches_of(pool, steps=1, size=7, code_numbers=numbers)
        rows = rows_of(pool, batch)
        assert torch.equal(batch.images.flatten(), pool.seeds[rows])
        assert torch.equal(batch.mask_noise, pool.mask_noise(rows))
        assert torch.equal(batch.code_numbers, numbers[rows])
        assert batch.names() == whole.names() and len(whole.names()) == 7
        assert torch.cat([part.seeds for part in batch.split(2)]).equal(batch.seeds)
        assert len(batch.split(100)) == len(rows)
        shares += rows
    assert sorted(shares) == sorted(rows_of(pool, whole))


# -------------------------------------------------------------------------------------------------


def load_all(loader, indices, seeds, size=4):
    chunks = list(loader.chunks(indices, seeds, size))
    assert [i for rows, _ in chunks for i in range(len(indices))[rows]] == list(range(len(indices)))
    return torch.cat([images for _, images in chunks])


def test_pixels_do_not_depend_on_workers_and_the_global_random_state_stays(opened, no_workers_left):
    augment = Augmentation.augment((6, 8))
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, len(opened), (11,), generator=generator)
    rounds = [torch.randint(0, 2**60, (11,), generator=generator) for _ in range(2)]
    expected = []
    for seeds in rounds:
        for index, seed in zip(indices.tolist(), seeds.tolist(), strict=True):
            with seeded(seed):
                expected.append(augment(opened.load(index)))
    expected = torch.stack(expected).view(2, 11, 3, 6, 8)
    assert not torch.equal(*expected)
    state = torch.get_rng_state()
    for num_workers, persistent in (0, False), (7, False), (2, True):
        loader = Data.ImageLoader(opened, augment, num_workers=num_workers, persistent=persistent)
        assert torch.equal(load_all(loader, indices, rounds[0]), expected[0])
        if persistent:
            next(loader.chunks(indices, rounds[0], 2))  # given up half-way
        assert torch.equal(load_all(loader, indices, rounds[1], 3), expected[1])
    assert torch.equal(state, torch.get_rng_state())


def test_processes_share_out_whole_chunks(opened, monkeypatch):
    loader = Data.ImageLoader(opened, Augmentation.resize((4, 4)), num_workers=0)
    indices = torch.arange(10)
    monkeypatch.setattr(Data, "world_size", lambda: 3)
    rows = []
    for rank in range(3):
        monkeypatch.setattr(Data, "rank", lambda r=rank: r)
        rows += [(s.start, s.stop) for s, _ in loader.chunks(indices, indices, 3)]
    assert sorted(rows) == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_seeds_decide_the_crop(opened):
    items = Data.SeededImages(opened, Augmentation.augment((6, 6)))
    assert torch.equal(items[0, 1][0], items[0, 1][0])
    assert len({items[0, seed][0].numpy().tobytes() for seed in range(8)}) == 8


def test_normalize_and_denormalize_are_inverse():
    images = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    normal = Augmentation.normalize(images)
    assert torch.equal(Augmentation.denormalize(normal), images)
    expected = T.functional.normalize(images / 255, Augmentation.MEAN, Augmentation.STD)
    torch.testing.assert_close(normal, expected)
    limits = Augmentation.denormalize(torch.tensor([-99.0, 99.0]).expand(3, 1, 2))
    assert limits.unique().tolist() == [0, 255]


@pytest.mark.parametrize("size", [(7, 7), (9, 4), (1, 13), (32, 32)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (31, 5), (33, 35), (8, 64)])
def test_transforms_give_the_size_asked_for(size, shape):
    image = picture(0, size=shape)
    for make in (Augmentation.augment, Augmentation.resize, Augmentation.center_crop):
        made = make(size)(image)
        assert made.shape == (3, *size)
        assert made.dtype == torch.uint8


def test_the_test_transform_is_mae_s():
    image = picture(0, size=(400, 300))
    mae = T.Compose([T.Resize(256, InterpolationMode.BICUBIC), T.CenterCrop(224), T.PILToTensor()])
    assert torch.equal(Augmentation.center_crop((224, 224))(image), mae(image))


def test_a_loader_that_is_alive_at_the_end_does_not_keep_a_program_from_ending():
    code = """
import gc, torch, Augmentation, Data
images, transform = Data.open_images("demo/mnist_val.tar"), Augmentation.resize((28, 28))
loader = Data.ImageLoader(images, transform, num_workers=2, persistent=True)
list(loader.chunks(torch.arange(9), torch.arange(9), 3))
loader.itself = loader  # as a cycle that is not collected
gc.disable()
"""
    assert command(program=(sys.executable, "-c", code)).returncode == 0


def test_cifar_10_becomes_two_archives_that_training_reads(tmp_path, monkeypatch, capsys):
    fetched = []

    class Fetched(list):  # as torchvision.datasets.CIFAR10: (image, label) pairs
        classes = ["airplane", "ship"]

        def __init__(self, root, train, download):
            assert download
            fetched.append(train)
            super().__init__((Image.new("RGB", (32, 32), (i, 0, 0)), i % 2) for i in range(5))

    monkeypatch.setattr(get_cifar10, "CIFAR10", Fetched)
    get_cifar10.main([str(tmp_path / "cifar10")])
    assert capsys.readouterr().out.splitlines()[-1].endswith("val.tar")
    for name in ("train.tar", "val.tar"):
        images = Data.open_images(tmp_path / "cifar10" / name)
        assert list(images.classes) == ["airplane", "ship"] and len(images) == 5
        assert np.asarray(images.load(1))[0, 0].tolist() == [2, 0, 0], "PNGs lose nothing"
    get_cifar10.main([str(tmp_path / "cifar10")])
    assert fetched == [True, False], "archives that are there are kept"


def test_cifar_10_that_can_t_be_fetched_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(get_cifar10, "CIFAR10", refused)
    with pytest.raises(SystemExit) as ended:
        get_cifar10.main([str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "no network" in line and not list(tmp_path.iterdir())

"""Images of 1, 4 and 5 channels and of 16 bits: read, normalised, trained on, drawn, probed."""

import io
import json
import sys

import complete
import export_encoder
import numpy as np
import pack
import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, command, final_state, run_folder
from PIL import Image
from timm.models import adapt_input_conv

import Augmentation
import Data
import IO
import LinearProbe
import Models
import TrainIMLE
from Augmentation import MEAN, STD, denormalize, normalize, to_pictures, transforms
from internals import decoding
from internals.decoding import open_image
from internals.weights import load_model
from Utils import InputError, seeded


def save(path, array):
    """An array (H, W, C) as .npy, or a grey one (H, W) as .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)


def digits(root, channels, per_class=8):
    """A folder of digits with dark numbers of 16 bits: grey PNGs, or .npy of 5 channels that
    differ."""
    images = Data.open_images(ROOT / "demo/mnist_train.tar")
    for label in range(3):
        for number in images.of_class(label)[:per_class]:
            grey = np.asarray(images.load(number))[:, :, 0].astype(np.uint16) * 16 + 3
            if channels == 1:
                save(root / f"{label}/{number}.png", grey)
            else:
                bands = [np.roll(grey, band, axis=1) // (band + 1) for band in range(channels)]
                save(root / f"{label}/{number}.npy", np.stack(bands, axis=2))
    return root


def loaded(path, channels, n, transform=None):
    """The first n images of a data set, as the loader gives them."""
    images = Data.open_images(path, channels=channels)
    loader = Data.ImageLoader(images, transform or transforms((28, 28), False)[1], num_workers=0)
    ((_, pixels),) = loader.chunks(torch.arange(n), torch.arange(n), n)
    return pixels


@pytest.mark.parametrize("channels", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_images_of_other_channels_train_go_on_probe_complete_and_are_exported(
    tmp_path, channels, capsys
):
    data = digits(tmp_path / "data", channels)
    common = ["--data_tr", str(data), "--data_val", str(data), "--gpus", "cpu"]
    common += ["--num_workers", "0"]
    flags = [*map(str, TINY), *common, "--channels", str(channels), "--uid", "x"]
    flags += ["--steps_per_eval", "4", "--ip_spec", "3", "adain"]
    if channels == 5:
        flags += ["--show_bands", "4", "2", "0", "--norm_pix_loss", "1", "--use_augs", "1"]
    for folder, epochs in (("a", 1), ("a", 2), ("b", 2)):
        TrainIMLE.main([*flags, "--epochs", str(epochs), "--save_folder", str(tmp_path / folder)])
    assert capsys.readouterr().out.count("measured on 24 training images: --mean 0.0") == 2
    a, b = (run_folder(tmp_path / folder) for folder in "ab")
    assert_same_run(a, b)
    numbers = loaded(data, channels, 24, transforms((28, 28), channels == 5)[1]).double() / 65535
    config = final_state(a)["config"]
    for name, expected in (("mean", numbers.mean((0, 2, 3))), ("std", numbers.std((0, 2, 3)))):
        torch.testing.assert_close(torch.tensor(config[name]).double(), expected, rtol=1e-4, atol=0)
    model = load_model(a)
    assert model.config.channels == channels == model.patch_embed.proj.in_channels
    for fast in ("1", "0"):
        probe = [*common, "--model", str(a), "--fast", fast, "--save_folder", str(tmp_path)]
        LinearProbe.main([*probe, "--epochs", "2", "--lrs", "1", "--probe_epochs", "2"])
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["n_val"] == 24 and result["top1"] > 0.2
    picture = str(next(data.rglob("0/*.*")))
    grid = sorted((a / "images").glob("pretrain_train_0*.png"))[-1]
    shown = np.asarray(Image.open(grid))[22:106:3, 4:88:3]
    pixels = loaded(data, channels, 1, transforms((28, 28), channels == 5)[1])
    how = model.config.mean, model.config.std
    bands = (4, 2, 0) if channels == 5 else ()
    expected = to_pictures(normalize(pixels, *how), *how, bands)[0].movedim(0, -1)
    assert np.array_equal(shown, expected), "the first training image, in the bands asked for"
    assert (channels == 1) == np.array_equal(shown[..., 0], shown[..., 1])
    complete.main([str(a), picture, "--out", str(tmp_path / "x.png"), "--mosaic", "16"])
    drawn = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))[26:120, 6:100]
    assert drawn.max() > 200, "dark numbers are brightened"
    export_encoder.main([str(a), str(tmp_path / "encoder.safetensors")])
    out = capsys.readouterr().out
    assert f"in_chans={channels}" in out and f"mean {model.config.mean}" in out


def test_numbers_of_16_bits_reach_the_network_with_all_their_bits(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 65536, (28, 28)).astype(np.uint16)
    save(tmp_path / "a/0.png", numbers)
    save(tmp_path / "a/1.npy", numbers)  # beside pictures, arrays are none
    assert len(Data.open_images(tmp_path)) == 1
    pixels = loaded(tmp_path, 1, 1)
    assert pixels.dtype == torch.uint16 and np.array_equal(pixels[0, 0].numpy(), numbers)
    x = normalize(pixels, (0.25,), (0.5,))
    expected = (torch.from_numpy(numbers.astype(np.float64)) / 65535 - 0.25) / 0.5
    torch.testing.assert_close(x[0, 0].double(), expected, atol=1e-6, rtol=0)
    assert loaded(tmp_path, 3, 1).dtype == torch.uint8, "as without --channels"


def test_images_of_8_and_16_bits_in_one_batch_keep_their_meaning(tmp_path):
    small = np.arange(784, dtype=np.uint16).reshape(28, 28).astype(np.uint8)
    save(tmp_path / "a/0.png", small)
    save(tmp_path / "a/1.png", small.astype(np.uint16) * 257)
    pixels = loaded(tmp_path, 1, 2)
    assert pixels.dtype == torch.uint16 and torch.equal(pixels[0].int(), pixels[1].int())
    images = Data.open_images(tmp_path, channels=1)
    loader = Data.ImageLoader(images, transforms((28, 28), False)[1], num_workers=0)
    loader.most = 1  # pieces of one image each, of different types
    for order in ([0, 1, 0], [1, 0, 1]):
        ((_, pieces),) = loader.chunks(torch.tensor(order), torch.arange(3), 3)
        assert torch.equal(pieces.int(), pixels[torch.zeros(3, dtype=int)].int())


def test_arrays_are_read_in_every_store_with_either_order_of_axes(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 24, 5)).astype(np.uint16)
    save(tmp_path / "in/a/0.npy", values)
    save(tmp_path / "in/b/0.npy", values.transpose(2, 0, 1).astype(">u2"))
    save(tmp_path / "in/b/1.npy", (values >> 8).astype(np.uint8))
    fingerprint = Data.open_images(tmp_path / "in").fingerprint()
    for name in ("x.tar", "x.lmdb"):
        pack.pack(tmp_path / "in", tmp_path / name)
    for path in (tmp_path / "in", tmp_path / "x.tar", tmp_path / "x.lmdb"):
        images = Data.open_images(path, channels=5)
        assert images.classes == ["a", "b"] and images.fingerprint() == fingerprint
        expected = torch.from_numpy(values.transpose(2, 0, 1).copy())
        assert torch.equal(images[0][0].int(), expected.int())
        assert torch.equal(images[1][0].int(), expected.int())
        assert images[2][0].dtype == torch.uint8 and images[2][0].shape == (5, 20, 24)
    with pytest.raises(InputError, match="--size makes JPEGs, but .*in/a/0.npy is an array"):
        three = values[:, :, :3]
        for name in ("a/0", "b/0", "b/1"):
            save(tmp_path / f"in/{name}.npy", three)
        pack.pack(tmp_path / "in", tmp_path / "y.lmdb", size=8, num_workers=0)


def test_tiffs_of_several_bands_are_read_by_tifffile(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile", reason="optional: reads TIFFs of several bands")
    values = np.random.default_rng(0).integers(0, 65536, (20, 24, 5)).astype(np.uint16)
    (tmp_path / "a").mkdir()
    tifffile.imwrite(tmp_path / "a/0.tif", values, photometric="minisblack", planarconfig="contig")
    bands = values.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a/1.tif", bands, photometric="minisblack", planarconfig="separate")
    images = Data.open_images(tmp_path, channels=5)
    assert all(np.array_equal(images[i][0].numpy(), bands) for i in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
        with pytest.raises(InputError, match="a/0.tif: it has 480 pixels, more than 400"):
            images[0]
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(InputError, match="a/0.tif: this kind of TIFF needs tifffile: pip install"):
        images[0]


def encoded(image, form):
    image.save(file := io.BytesIO(), form)
    return file.getvalue()


def test_pictures_become_so_many_channels_or_are_refused(tmp_path):
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 4)).astype(np.uint8))
    data = encoded(rgba, "png")
    assert np.array_equal(open_image(data, 4), rgba)
    assert np.array_equal(open_image(data, 1), rgba.convert("L"))
    assert np.array_equal(open_image(data), rgba.convert("RGB"))
    assert open_image(encoded(rgba.convert("CMYK"), "tiff"), 4).mode == "CMYK"
    path = tmp_path / "a/0.png"
    for channels, content, message in (
        (5, data, "a/0.png: pictures are read with 1, 3 or 4 channels, not 5"),
        (1, array_bytes(np.zeros((4, 4, 3), np.uint8)), "its shape is 4 x 4 x 3, expected are 1"),
        (3, array_bytes(np.zeros((4, 4), np.uint8)), "its shape is 1 x 4 x 4, expected are 3"),
        (1, array_bytes(np.zeros((4, 4))), "numbers of type float64; allowed are uint8 and uint16"),
        (1, array_bytes(np.array([None])), "a/0.png: "),  # would need pickle
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            Data.open_images(tmp_path, channels=channels)[0]


def array_bytes(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


@pytest.mark.parametrize("name", ["augment", "resize", "center_crop"])
def test_arrays_are_cropped_and_resized_as_pictures_are(name):
    picture = Image.open(ROOT / "demo/completions.png").convert("RGB").resize((61, 50))
    array = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())
    transform = getattr(Augmentation, name)((32, 24))
    for seed in range(5):
        results = []
        for image in (picture, array, Data.widened(array)):
            with seeded(seed):
                results.append(transform(image))
        assert [x.dtype for x in results] == [torch.uint8, torch.uint8, torch.uint16]
        shares = [results[0].float() / 255, results[1].float() / 255, results[2].float() / 65535]
        assert (shares[0] - shares[1]).abs().max() < 4 / 255
        assert (shares[0] - shares[2]).abs().mean() < 1 / 255
    white = torch.full((5, 40, 40), 65535, dtype=torch.int32)
    white[:, ::2] = 0  # bicubic weights go beyond black and white
    result = Augmentation.resized(white.to(torch.uint16), (17, 17)).int()
    assert result.min() >= 0 and result.max() <= 65535 and 20000 < result.float().mean() < 45000


def test_pictures_show_the_bands_that_are_asked_for():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(to_pictures(normalize(images), MEAN, STD), images)
    assert torch.equal(denormalize(normalize(images)), images)
    five = torch.cat([images, images[:, :2].flip(-1)], dim=1)
    mean, std = (0.5,) * 5, (0.3,) * 5
    for bands, expected in (((), [0, 1, 2]), ((4, 3, 0), [4, 3, 0]), ((3,), [3, 3, 3])):
        pictures = to_pictures(normalize(five, mean, std), mean, std, bands)
        assert torch.equal(pictures, five[:, expected])
    one = to_pictures(normalize(five[:, :1], (0.5,), (0.3,)), (0.5,), (0.3,))
    assert torch.equal(one, five[:, [0, 0, 0]])


RGB = ROOT / "demo/imle_mnist.pt"


def test_weights_of_rgb_images_fit_one_channel(capsys):
    grey, rgb = (load_model(RGB, channels=n, mean=(0.5,) * n, std=(0.25,) * n) for n in (1, 3))
    (line,) = capsys.readouterr().out.splitlines()
    assert "adapted to --channels 1: the patch embedding as by timm, the prediction head" in line
    images, noise = torch.randn(3, 1, 28, 28), torch.rand(3, 49)
    with torch.no_grad():
        tokens, expected = grey.encode(images), rgb.encode(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
        found, wide = grey(images, noise)[0], rgb(images.expand(-1, 3, -1, -1), noise)[0]
    torch.testing.assert_close(found, wide.unflatten(-1, (-1, 3)).mean(-1), atol=1e-4, rtol=1e-4)


def test_weights_of_rgb_images_fit_five_channels_with_a_fresh_head_and_measured_mean(capsys):
    measured = {"mean": (0.1,) * 5, "std": (0.2,) * 5}
    model = load_model(RGB, channels=5, measure=lambda: measured)
    out = capsys.readouterr().out
    assert "adapted to --channels 5: the patch embedding as by timm\n" in out
    assert "warning: the prediction head starts fresh" in out
    assert model.config.mean == (0.1,) * 5 and model.decoder_pred.out_features == 16 * 5
    rgb = load_model(RGB)
    expected = adapt_input_conv(5, rgb.patch_embed.proj.weight)
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    assert torch.equal(model.norm.weight, rgb.norm.weight)
    assert rgb.config.mean == MEAN, "weights of 0.1.0 have ImageNet's"
    with pytest.raises(InputError, match="it has no mean and std of 5 channels"):
        load_model(RGB, channels=5)


def test_a_run_starts_from_weights_of_rgb_images_with_measured_channels(tmp_path, capsys):
    data = str(digits(tmp_path / "data", 5))
    flags = [*map(str, TINY), "--data_tr", data, "--data_val", data, "--channels", "5"]
    flags += ["--finetune", "1", "--mae_weights", str(RGB), "--epochs", "0", "--ignore_z", "1"]
    TrainIMLE.main([*flags, "--save_folder", str(tmp_path)])
    out = capsys.readouterr().out
    for line in ("measured on 24 training images", "adapted to --channels 5", "head starts fresh"):
        assert out.count(line) == 1, line
    state, rgb = final_state(run_folder(tmp_path)), load_model(RGB)
    assert len(state["config"]["mean"]) == 5 and max(state["config"]["mean"]) < 0.05
    assert torch.equal(state["model"]["norm.weight"], rgb.norm.weight)


def test_torchcodec_gives_one_channel_as_pillow_does():
    try:
        decoding.check_decoder("torchcodec")
    except InputError as error:
        pytest.skip(str(error))
    picture = Image.open(ROOT / "demo/completions.png").convert("RGB")
    for image in (picture, picture.convert("L")):
        data = encoded(image, "jpeg")
        for channels in (1, 3):
            decoded = decoding.decode_by_torchcodec(data, channels)
            if not isinstance(decoded, torch.Tensor):
                decoded = torch.from_numpy(np.asarray(decoded).copy())[None]
            expected = np.asarray(open_image(data, channels)).reshape(*picture.size[::-1], -1)
            difference = decoded.movedim(0, -1).int().numpy() - expected.astype(int)
            assert decoded.shape[0] == channels and np.abs(difference).max() <= 1


def test_weights_bring_their_own_mean_and_other_channels_are_refused(tmp_path):
    model = Models.build(two_channels())
    torch.save({"model": model.state_dict(), "config": vars(model.config)}, tmp_path / "x.pt")
    assert load_model(tmp_path / "x.pt", channels=2).config.mean == (0.1, 0.2)
    assert load_model(tmp_path / "x.pt").config.channels == 2
    with pytest.raises(InputError, match="2 channels: give --channels 2; only weights of RGB"):
        load_model(tmp_path / "x.pt", channels=3)


def two_channels():
    fields = vars(Models.PRESETS["vit_demo"]) | {"image_size": (28, 28), "channels": 2}
    return Models.ModelConfig(**(fields | {"mean": (0.1, 0.2), "std": (0.3, 0.4)}))


def test_a_channel_without_contrast_has_a_deviation_by_which_one_can_divide(tmp_path):
    for number in range(3):
        save(tmp_path / f"a/{number}.npy", np.full((8, 8, 2), 51, np.uint8))
    images = Data.open_images(tmp_path, channels=2)
    found = Data.measure_channels(images, transforms((8, 8), False)[1], seed=0, num_workers=0)
    assert found == {"mean": (0.2, 0.2), "std": (1.0, 1.0)}


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(tmp_path):
    data = digits(tmp_path / "data", 5)
    flags = [*TINY, "--data_tr", data, "--data_val", data, "--channels", 5, "--epochs", 0]
    configs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command(*flags, "--save_folder", folder, "--processes", processes)
        configs.append(final_state(run_folder(folder))["config"])
    assert configs[0] == configs[1] and len(configs[0]["mean"]) == 5


def test_flags_of_channels_are_kept_when_a_run_goes_on():
    names = {"channels", "mean", "std"}
    assert names <= IO.architecture_flags()
    assert not names & IO.changeable_flags(IO.training_parser())

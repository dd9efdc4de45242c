"""Weights from everywhere: what loads, what is refused, what is fetched; exporting them."""

import argparse
import dataclasses
import itertools
import json
import pickle
import re
import shutil
import sys
import threading
from pathlib import Path

import gdown
import numpy as np
import pytest
import timm
import torch
from conftest import DEMO_DATA, ROOT, TINY, command, server
from PIL import Image
from safetensors.torch import load_file, save_file

import IO
import Models
from internals import checkpoints, weights
from scripts import complete
from Utils import InputError

GOLDEN = Path(__file__).parent / "golden"
HEADS = {"num_heads": 4, "decoder_num_heads": 4}


@pytest.fixture(scope="module")
def state():
    return torch.load(GOLDEN / "mae_tiny.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def hf_state():
    return load_file(GOLDEN / "hf_vitmae_tiny/model.safetensors")


def same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# -------------------------------------------------------------------------------------------------
# Layouts.


@pytest.mark.parametrize("source", ["hf_vitmae_tiny", "hf_vitmae_tiny/model.safetensors"])
def test_weights_of_hugging_face_predict_what_they_predict_there(source):
    golden = load_file(GOLDEN / "hf_vitmae_tiny/io.safetensors")
    model = IO.load_model(GOLDEN / source)
    pred, mask = model(golden["imgs"], golden["noise"])
    torch.testing.assert_close(pred, golden["pred"], atol=1e-4, rtol=0)
    assert torch.equal(mask, golden["mask"]) and model.config.norm_pix_loss
    loss = Models.reconstruction_loss(pred, golden["imgs"], mask, norm_pix_loss=True).mean()
    torch.testing.assert_close(loss, golden["loss"].squeeze(), rtol=1e-5, atol=0)


RENAMED = [  # as other versions of transformers name the same
    (r"encoder\.layer\.", "layers."),
    (r"decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"decoder\.decoder_layers\.", "decoder.decoder_layers."),
    (r"attention\.attention\.(q)uery", r"attention.\1_proj"),
    (r"attention\.attention\.(k)ey", r"attention.\1_proj"),
    (r"attention\.attention\.(v)alue", r"attention.\1_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d\.)output\.dense", r"\1mlp.fc2"),
]


@pytest.mark.parametrize("patterns", [RENAMED[1:2], [*RENAMED[1:], RENAMED[0]]], ids=str)
def test_other_versions_of_transformers_name_the_same_weights(tmp_path, hf_state, patterns):
    renamed = {}
    for name, tensor in hf_state.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    assert renamed.keys() != hf_state.keys()
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    shutil.copy(GOLDEN / "hf_vitmae_tiny/config.json", tmp_path)
    expected = IO.load_model(GOLDEN / "hf_vitmae_tiny").state_dict()
    assert same(IO.load_model(tmp_path), expected)


def test_the_options_of_hugging_face_are_taken_from_its_config(tmp_path, hf_state):
    save_file(hf_state, tmp_path / "model.safetensors")
    config = json.loads((GOLDEN / "hf_vitmae_tiny/config.json").read_text())
    config |= {"layer_norm_eps": 1e-12, "norm_pix_loss": False, "num_attention_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = IO.load_model(tmp_path)
    assert model.config.norm_eps == model.norm.eps == model.blocks[0].norm1.eps == 1e-12
    assert not model.config.norm_pix_loss and model.config.num_heads == 6
    for damage, message in ((b"{", "no JSON"), (b'{"hidden_act": "relu"}', "hidden_act 'relu'")):
        (tmp_path / "config.json").write_bytes(damage)
        with pytest.raises(InputError, match=message):
            IO.load_model(tmp_path)


def test_an_encoder_alone_gets_a_fresh_decoder_and_says_so(tmp_path, state, capsys):
    names = [n for n in state if not n.startswith("decoder") and n != "mask_token"]
    encoder = {name: state[name] for name in names}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    sizes = {"decoder_dim": 32, "decoder_depth": 1}
    model = IO.load_model(tmp_path / "encoder.pth", **HEADS, **sizes)
    assert "warning: the decoder starts fresh" in capsys.readouterr().out
    assert len(model.decoder_blocks) == 1
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], encoder[name]) for name in names)
    whole = IO.load_model(GOLDEN / "mae_tiny.pth", **HEADS)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode(images), whole.encode(images))
    published = IO.load_model(tmp_path / "encoder.pth", num_heads=4).config
    assert (published.decoder_dim, published.decoder_depth) == (512, 8)


def test_the_decoder_of_weights_is_known_and_another_one_is_refused(tmp_path, state, capsys):
    with pytest.raises(InputError, match="decoder 'self', not 'cross'.*--finetune 0"):
        weights.load_model(GOLDEN / "mae_tiny.pth", **HEADS, decoder="cross")
    encoder = {n: t for n, t in state.items() if "decoder" not in n and n != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    options = {"decoder": "cross", "decoder_dim": 32, "decoder_depth": 2}
    model = weights.load_model(tmp_path / "encoder.pth", **HEADS, **options)
    assert "the decoder starts fresh" in capsys.readouterr().out
    torch.save(model.state_dict(), tmp_path / "cross.pth")  # bare, without its config
    again = weights.load_model(tmp_path / "cross.pth", **HEADS)
    assert again.config.decoder == "cross"
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    torch.testing.assert_close(again(images, noise)[0], model(images, noise)[0])
    with pytest.raises(InputError, match="decoder 'cross', not 'self'"):
        weights.load_model(tmp_path / "cross.pth", **HEADS, decoder="self")


def test_a_bare_state_dict_that_is_no_square_is_recognised_by_its_position_embedding(tmp_path):
    config = dataclasses.replace(tiny_config(), image_size=(24, 48))
    model = Models.build(config)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert IO.load_model(tmp_path / "bare.pth", **HEADS).config.image_size == (24, 48)
    model.pos_embed.data.normal_()
    torch.save(model.state_dict(), tmp_path / "learned.pth")
    with pytest.raises(InputError, match="give image_size"):
        IO.load_model(tmp_path / "learned.pth", **HEADS)
    again = IO.load_model(tmp_path / "learned.pth", image_size=(24, 48), **HEADS)
    assert same(again, model.state_dict())


def tiny_config():
    return IO.load_model(GOLDEN / "mae_tiny.pth", **HEADS).config


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (24, 16)])
def test_another_input_size_resamples_both_position_embeddings(state, size):
    model = IO.load_model(GOLDEN / "mae_tiny.pth", image_size=size, **HEADS)
    rows, columns = size[0] // 8, size[1] // 8
    for name in ("pos_embed", "decoder_pos_embed"):
        original = state[name]
        resampled = model.state_dict()[name]
        assert resampled.shape == (1, 1 + rows * columns, original.shape[2])
        old = original[0, 1:].T.reshape(1, -1, 4, 4)
        interpolate = torch.nn.functional.interpolate
        new = interpolate(old, (rows, columns), mode="bicubic", antialias=True)
        torch.testing.assert_close(resampled[0, 1:], new.flatten(2)[0].T)
    pred, _ = model(torch.randn(2, 3, *size), torch.rand(2, rows * columns))
    assert pred.shape == (2, rows * columns, 192) and pred.isfinite().all()


def test_weights_for_raw_pixels_are_known_by_their_published_name(tmp_path, capsys):
    path = tmp_path / "mae_visualize_vit_tiny.pth"
    shutil.copy(GOLDEN / "mae_tiny.pth", path)
    assert not IO.load_model(path, **HEADS).config.norm_pix_loss
    assert IO.load_model(path, norm_pix_loss=True, **HEADS).config.norm_pix_loss
    assert "was trained with --norm_pix_loss 0" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------
# Refusals.


class Canary:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda state: {"model": Canary()}, "refused"),
        (lambda state: b"\x80\x02garbage", "no checkpoint|refused"),
        (lambda state: b"<!doctype html><p>Sign in</p>", "no checkpoint|refused"),
        (lambda state: b"", "no checkpoint"),
        (lambda state: [1, 2], "holds a list"),
        (lambda state: {"model": {"head.weight": torch.zeros(1)}}, "not the weights of a masked"),
        (lambda state: {"model": {k: v for k, v in state.items() if "norm1" not in k}}, "Missing"),
        (lambda state: {"model": {**state, "extra": torch.zeros(1)}}, "Unexpected.*extra"),
        (
            lambda state: {"model": {**state, "norm.weight": torch.zeros(3)}},
            "size mismatch for norm",
        ),
        (lambda state: {"model": state, "config": {"depth": 10**9}}, "depth is 3, but 1000000000"),
        (lambda state: {"model": state, "config": {"colour": "red"}}, "does not hold a model"),
        (
            lambda state: {"model": state, "config": {"ip_spec": [["a", "b"]]}},
            "ip_spec .*unknown method b",
        ),
        (
            lambda state: {"model": state, "config": {"ip_spec": [[99, "adain"]]}},
            "ip_spec .*no place 99",
        ),
        (lambda state: {"model": state, "config": {"norm_eps": "x"}}, "norm_eps 'x': allowed"),
        (lambda state: {"model": state, "config": {"num_heads": 0}}, "num_heads 0: allowed"),
        (
            lambda state: {"model": state, "config": {"num_heads": 5}},
            "dim 48: .*number of heads, 5",
        ),
        (
            lambda state: {"model": state, "config": {"image_size": (8, 8, 8)}},
            "image_size .8, 8, 8.: allowed",
        ),
        (lambda state: {"model": state, "config": [["depth", 4]]}, "config is no dict"),
        (lambda state: {"model": 3}, "no state dict"),
        (lambda state: {"model": {1: torch.zeros(2)}}, "no state dict"),
        (lambda state: {"model": {k: v.long() for k, v in state.items()}}, "holds torch.int64"),
        (
            lambda state: {"model": {k: state[k] for k in state if "blocks" not in k}},
            "depth 0: allowed",
        ),
        (lambda state: {"model": {**state, "pos_embed": torch.zeros(1, 5, 7)}}, "hold a model"),
    ],
)
def test_foreign_damaged_and_hostile_weights_are_refused(
    state, content, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content, heads = content(state), HEADS
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content["config"], heads = {**HEADS, **content["config"]}, {}
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict) and isinstance(content["model"], Canary):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as caught:
        IO.load_model(path, **heads)
    assert str(caught.value).count(str(path)) == 1 and "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_weights_of_another_architecture_name_what_differs():
    sizes = {name: getattr(Models.PRESETS["vit_base"], name) for name in weights.SIZES}
    with pytest.raises(InputError, match="patch_size is 8, expected was 16"):
        IO.load_model(GOLDEN / "mae_tiny.pth", **sizes)
    demo = ROOT / "demo/imle_mnist.pt"
    with pytest.raises(InputError, match="they fit --arch vit_demo"):
        IO.load_model(demo, **sizes)


def test_truncated_and_flipped_files_are_refused(tmp_path, state):
    checkpoints.save_checkpoint(tmp_path / "whole.pt", {"model": state})
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "whole.safetensors")
    pytorch, safetensors = (next(tmp_path.glob(f"*.{e}")).read_bytes() for e in ("pt", "safe*"))
    flipped = bytearray(pytorch)
    flipped[len(pytorch) // 2] ^= 1
    for damaged in (pytorch[: len(pytorch) // 2], bytes(flipped), safetensors[:5000]):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(InputError, match="damaged") as caught:
            IO.load_model(tmp_path / "damaged")
        assert "\n" not in str(caught.value)


def test_training_files_of_mae_which_hold_a_namespace_load(tmp_path, state):
    content = {"model": state, "args": argparse.Namespace(lr=1.0)}
    for zipped in (True, False):  # as torch saves them now, and before 1.6
        torch.save(content, tmp_path / "mae.pth", _use_new_zipfile_serialization=zipped)
        assert IO.load_model(tmp_path / "mae.pth", **HEADS).config.depth == 3


# -------------------------------------------------------------------------------------------------
# Fetching, from a server of our own.


def test_an_address_is_fetched_once_even_by_several_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = (GOLDEN / "mae_tiny.pth").read_bytes()
    with server({"/a/model.pth": content, "/b/model.pth": b"other"}) as (address, requests):
        source, paths = f"{address}/a/model.pth", []
        threads = [
            threading.Thread(target=lambda: paths.append(weights.fetch(source))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(paths)) == 1 and len(paths) == 4 and len(requests) == 1
        assert IO.load_model(source, **HEADS).config.depth == 3 and len(requests) == 1
        assert Path(paths[0]).read_bytes() == content
        with pytest.raises(InputError):  # the same name at another address is another file
            weights.fetch(f"{address}/b/model.pth")


@pytest.mark.parametrize("kind", ["cut", "page", "three", "missing", "gone"])
def test_what_is_not_whole_is_not_kept(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content = (GOLDEN / "mae_tiny.pth").read_bytes()
    torch.save({"model": 3}, "three")
    files = {"/cut": (content[:-1000], len(content)), "/page": b"<html>Sign in</html>"}
    files["/three"] = Path("three").read_bytes()
    with server(files) as (address, _):
        address = "http://127.0.0.1:9" if kind == "gone" else address
        with pytest.raises(InputError, match="could not fetch .*; fetch it elsewhere") as caught:
            weights.fetch(f"{address}/{kind}")
    assert "\n" not in str(caught.value)
    assert [p.name for p in Path("mae_checkpoints").iterdir() if p.suffix != ".lock"] == []
    put_at = Path(str(caught.value).rsplit("put it at ")[-1])
    shutil.copy(GOLDEN / "mae_tiny.pth", put_at)  # what the message tells to do helps
    assert weights.fetch(f"{address}/{kind}") == str(put_at)


@pytest.mark.parametrize("name", ["model.safetensors", "own/file.pt"])
def test_the_probe_takes_a_model_from_the_hub(tmp_path, name):
    weights = (GOLDEN / "hf_vitmae_tiny/model.safetensors").read_bytes()
    at = "/someone/vit-mae/resolve/main/"
    config = (GOLDEN / "hf_vitmae_tiny/config.json").read_bytes()
    source = "hf-hub:someone/vit-mae"
    if name == "own/file.pt":
        weights, source = (ROOT / "demo/imle_mnist.pt").read_bytes(), f"{source}/{name}"
    with server({at + name: weights, at + "config.json": config}) as (address, _):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
        flags = [*DEMO_DATA, "--model", source, "--gpus", "cpu", "--use_augs", 0]
        flags += ["--val_n_shot", 2, "--probe_epochs", 1, "--num_workers", 0, "--fast", 1]
        flags += ["--save_folder", tmp_path]
        done = command(*flags, program=(sys.executable, "LinearProbe.py"), **environment)
        assert json.loads(done.stdout.splitlines()[-1])["model"] == source


def test_a_repository_without_weights_is_refused_in_one_line(tmp_path):
    with server({}) as (address, _):
        done = command(
            *(*DEMO_DATA, "--model", "hf-hub:someone/nothing", "--gpus", "cpu"),
            *("--save_folder", tmp_path),
            program=(sys.executable, "LinearProbe.py"),
            check=False,
            HF_ENDPOINT=address,
            HF_HOME=str(tmp_path),
        )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--model: hf-hub:someone/nothing has none of these files" in done.stderr


def test_google_drive_is_asked_for_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def download(*, id, output, quiet):
        if id != "known":
            raise gdown.exceptions.FileURLRetrievalError("Cannot retrieve\nthe public link")
        shutil.copy(GOLDEN / "mae_tiny.pth", output)

    monkeypatch.setattr(gdown, "download", download)
    assert IO.load_model("gdrive:known", **HEADS).config.depth == 3
    with pytest.raises(InputError, match=r"gdrive:other \(Cannot retrieve\)"):
        IO.load_model("gdrive:other")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_offline_says_in_one_line_what_to_fetch(tmp_path, processes):
    """From a folder of its own, as a file that was fetched before would be found; the proxy is not
    there."""
    (tmp_path / "train.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport TrainIMLE\n"
        "if __name__ == '__main__':\n    TrainIMLE.main()\n"
    )
    flags = [ROOT / flag if flag.endswith(".tar") else flag for flag in TINY]
    for flag, value in (("--arch", "vit_base"), ("--input_size", 32), ("--finetune", 1)):
        flags[flags.index(flag) + 1] = value
    done = command(
        *(*flags, "--fast_linear_probe", 0, "--processes", processes),
        program=(sys.executable, "train.py"),
        check=False,
        cwd=tmp_path,
        https_proxy="http://127.0.0.1:9",
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    name = "mae_pretrain_vit_base_full.pth"
    assert f"could not fetch {weights.MAE_ADDRESS}pretrain/{name}" in done.stderr
    assert done.stderr.rstrip().endswith(f"put it at mae_checkpoints/{name}")


# -------------------------------------------------------------------------------------------------
# Exporting and completing, by the real commands.


@pytest.mark.parametrize("source", ["demo/imle_mnist.pt", "tests/golden/hf_vitmae_tiny"])
def test_timm_gives_the_same_features_with_the_exported_encoder(tmp_path, source):
    out = tmp_path / "encoder.safetensors"
    done = command(source, out, program=(sys.executable, "scripts/export_encoder.py"))
    model = IO.load_model(ROOT / source)
    images = torch.randn(2, 3, *model.config.image_size)
    namespace = {"timm": timm, "images": images}
    exec("\n".join(done.stdout.splitlines()[-3:]), namespace)  # the lines that it shows
    torch.testing.assert_close(namespace["features"], model.encode(images), atol=1e-5, rtol=1e-5)


def test_exporting_refuses_in_one_line(tmp_path):
    program = (sys.executable, "scripts/export_encoder.py")
    for arguments in (("nowhere.pt", tmp_path / "a"), ("demo/imle_mnist.pt", tmp_path / "no/a")):
        done = command(*arguments, program=program, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture in every mode that Pillow writes, all of the same content."""
    folder = tmp_path_factory.mktemp("pictures")
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    gray = Image.fromarray(ramp)
    gray.convert("RGB").save(folder / "rgb.png")
    gray.save(folder / "gray.png")
    gray.convert("P").save(folder / "palette.gif")
    gray.convert("RGB").convert("CMYK").save(folder / "cmyk.tiff")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "sixteen.png")
    big_endian = (ramp.astype(">u2") * 257).astype(">u2")
    Image.frombytes("I;16B", (60, 40), big_endian.tobytes()).save(folder / "big_endian.tiff")
    Image.fromarray(ramp.astype(np.float32) / 255).save(folder / "float.tiff")
    transparent = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    transparent.putalpha(Image.fromarray(255 - ramp))
    transparent.paste((0, 0, 0), mask=Image.new("L", (60, 40), 255))
    transparent.putalpha(Image.fromarray(255 - ramp))
    transparent.save(folder / "transparent.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    gray.convert("RGB").rotate(180).save(folder / "turned.png", exif=exif)
    return sorted(folder.iterdir())


def test_pictures_of_every_mode_look_as_they_should(pictures):
    for path in pictures:
        picture = np.asarray(complete.open_picture(path)).astype(int)
        assert picture.shape == (40, 60, 3), path
        expected = np.linspace(0, 255, 60)[None, :, None]
        assert np.abs(picture - expected).max() <= 8, path


def test_completing_draws_a_row_per_picture_and_mask_and_a_mosaic(tmp_path, pictures):
    grid = tmp_path / "grid.png"
    flags = ["--codes", 3, "--masks", 2, "--mosaic", 40, "--out", grid]
    arguments = ["demo/imle_mnist.pt", *pictures[:2], *flags]
    command(*arguments, program=(sys.executable, "scripts/complete.py"))
    first = np.asarray(Image.open(grid))
    assert first.shape[1] == 4 + 5 * (28 * 3 + 4)  # image, masked, 3 codes
    assert first.shape[0] > 22 + 4 * (28 * 3 + 4)  # 2 pictures, 2 masks
    cells = [first[22:106, 4 + i * 88 : 88 + i * 88].astype(int) for i in range(5)]
    for a, b in itertools.combinations(cells, 2):
        assert np.abs(a - b).mean() > 0.5, "each column shows another picture"
    mosaic = Image.open(tmp_path / "grid_mosaic.png")
    assert mosaic.width == 4 + 8 * 88 and mosaic.height > 22 + 8 * 88


def test_a_plain_mae_completes_in_one_way(tmp_path, pictures):
    grid = tmp_path / "grid.png"
    program = (sys.executable, "scripts/complete.py")
    command(GOLDEN / "hf_vitmae_tiny", pictures[0], "--out", grid, program=program)
    assert Image.open(grid).width == 4 + 3 * (32 * 3 + 4)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nowhere.pt", "demo/completions.png"], "nowhere.pt"),
        (["demo/imle_mnist.pt", "README.md"], "README.md"),
        (["demo/imle_mnist.pt", "demo/completions.png", "--out", "no/where.png"], "--out"),
        (["demo/imle_mnist.pt", "demo/completions.png", "--out", "grid.text"], "--out"),
        (["demo/imle_mnist.pt", "demo/completions.png", "--out", "grid.psd"], "--out"),
        (["demo/imle_mnist.pt", "demo/completions.png", "--mask_ratio", "1"], "--mask_ratio"),
        (["tests/golden/hf_vitmae_tiny", "demo/completions.png", "--mosaic", "9"], "--mosaic"),
        (["demo/imle_mnist.pt", "demo/completions.png", "--input_size", "30"], "multiples of 4"),
        (
            ["demo/imle_mnist.pt", "demo/completions.png", *"--input_size 4 4 4".split()],
            "--input_size",
        ),
    ],
)
def test_completing_refuses_bad_input_in_one_line(arguments, named, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        complete.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and named in said


def test_the_most_different_points_are_found():
    points = torch.tensor([[0.0, 0], [1, 0], [0, 1], [10, 0], [10, 1], [0, 10]])
    chosen = complete.most_different(points, 4)
    assert chosen[0] == 1 and set(chosen[1:]) >= {5} and {3, 4} & set(chosen)
    assert len(complete.most_different(points, 9)) == 6

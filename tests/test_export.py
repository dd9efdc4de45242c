"""Exporting a model for transformers, as a folder or to the Hub: the same model there and here,
what is refused, the model card. transformers is optional; tried were 4.57.6 and 5.24.0."""

import base64
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import export_encoder
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, command, final_path, metrics, server
from PIL import Image
from safetensors.torch import load_file, save_file

import IO
from Augmentation import normalize, resize
from internals.checkpoints import save_checkpoint
from internals.encoders import ENCODER
from internals.hugging_face import from_hugging_face, to_hugging_face
from internals.weights import load_model
from Models import ModelConfig, build, reconstruction_loss
from Utils import InputError

GOLDEN = Path(__file__).parent / "golden/hf_vitmae_tiny"
SMALL = ModelConfig(
    image_size=(16, 16),
    patch_size=4,
    dim=24,
    depth=3,
    num_heads=2,
    decoder_dim=16,
    decoder_depth=2,
    decoder_num_heads=4,
    latent_dim=8,
    mapping_net_layers=2,
    mapping_net_h_dim=8,
    ip_spec=((1, "adain"), (2, "local_adain"), ("mask", "adain"), (4, "add")),
)
PLAIN = dataclasses.replace(SMALL, ip_spec=())


def checkpoint(path, config=SMALL):
    """A model with random numbers in every tensor, and the path of its checkpoint."""
    torch.manual_seed(0)
    model = build(config).eval()
    for tensor in model.state_dict().values():
        tensor.add_(0.1 * torch.randn_like(tensor))
    content = {"model": model.state_dict(), "config": dataclasses.asdict(config)}
    save_checkpoint(path, content)
    return model, path


def run(*arguments):
    """Exports in this process."""
    export_encoder.main([str(argument) for argument in arguments])


def refusal(capsys, *arguments):
    """The one line in which an export is refused."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1, said
    return said


@pytest.fixture
def exported(tmp_path):
    """A model with four injections, and the folder of its export."""
    model, path = checkpoint(tmp_path / "model.pt")
    run(path, tmp_path / "out", "--format", "hf")
    return model, tmp_path / "out"


def same(model, other):
    """Whether two models have the same config and the same tensors."""
    a, b = model.state_dict(), other.state_dict()
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return equal and model.config == other.config


# -------------------------------------------------------------------------------------------------
# The same model there and here.


NO_TRANSFORMERS = "no transformers: pip install transformers"
VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_eps": 1e-3, "norm_pix_loss": False},
        {"channels": 1, "mean": (0.3,), "std": (0.2,)},
        {"channels": 5, "mean": (0.3,) * 5, "std": (0.2,) * 5},
    ],
    ids=["rgb", "options", "grey", "five"],
)


@VARIANTS
@torch.no_grad()
def test_transformers_predicts_and_encodes_the_same(tmp_path, changes):
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    ours, path = checkpoint(tmp_path / "model.pt", dataclasses.replace(SMALL, **changes))
    run(path, tmp_path / "out", "--format", "hf")
    theirs, report = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), "nothing is missing, left over, or warned of"
    c = ours.config
    images, noise = torch.randn(3, c.channels, 16, 16), torch.rand(3, 16)
    there = theirs.eval()(images, noise=noise)
    pred, mask = ours(images, noise)
    torch.testing.assert_close(there.logits, pred, atol=1e-5, rtol=0)
    assert torch.equal(there.mask, mask)
    loss = reconstruction_loss(pred, images, mask, c.norm_pix_loss).mean()
    torch.testing.assert_close(there.loss, loss, atol=1e-5, rtol=1e-5)
    encoder = transformers.ViTMAEModel.from_pretrained(tmp_path / "out", mask_ratio=0.0).eval()
    tokens = encoder(images, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
    torch.testing.assert_close(tokens, ours.encode(images), atol=1e-5, rtol=0)


@VARIANTS
def test_the_image_processor_prepares_images_as_we_do(tmp_path, changes):
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    c = dataclasses.replace(SMALL, **changes)
    run(checkpoint(tmp_path / "model.pt", c)[1], tmp_path / "out", "--format", "hf")
    # use_fast: the default since transformers 5.
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=True)
    if c.channels == 5:
        array = np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8)
        pixels = processor(array, return_tensors="pt", input_data_format="channels_first")
        expected = normalize(torch.from_numpy(array), c.mean, c.std)
    else:
        picture = Image.open(ROOT / "demo/completions.png").convert("L")
        pixels = processor(picture, return_tensors="pt")
        picture = picture.convert("RGB") if c.channels == 3 else picture
        expected = normalize(resize((16, 16))(picture), c.mean, c.std)
    error = (pixels["pixel_values"][0] - expected).abs().max()
    assert error < 1.5 / 255 / min(c.std), "equal but for rounding: resizing is other code"


def test_names_are_those_of_the_published_files_and_come_back():
    state = load_file(GOLDEN / "model.safetensors")
    ours = from_hugging_face(state)
    there = to_hugging_face(ours | {"injections.1.weight": torch.zeros(1)})
    # As in facebook/vit-mae-base; the golden file is by transformers 5, see hugging_face.py.
    published = {n.replace("decoder_encoder.layer", "decoder_layers"): x for n, x in state.items()}
    assert there.keys() == published.keys()
    assert all(torch.equal(there[name], published[name]) for name in there)
    back = from_hugging_face(there)
    assert back.keys() == ours.keys() and all(torch.equal(back[n], ours[n]) for n in ours)


def test_our_own_model_comes_back_with_its_injections(exported, capsys):
    model, folder = exported
    for source in (folder, folder / "model.safetensors"):
        again = load_model(source)
        assert same(again, model) and not isinstance(again.config.ip_spec, list)
    assert "warning" not in capsys.readouterr().out
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    codes = model.sample_codes(torch.arange(2), 3)
    assert torch.equal(again(images, noise, codes)[0], model(images, noise, codes)[0])
    names = load_file(folder / "model.safetensors")
    assert not any("injections" in name for name in names), "transformers would warn of these"


def test_without_the_injections_file_the_model_is_a_plain_mae(exported, capsys):
    """As where transformers saves such a model again: it keeps our key, but not this file."""
    model, folder = exported
    (folder / "injections.safetensors").unlink()
    again = load_model(folder)
    assert again.config == PLAIN
    assert "warning: " in (said := capsys.readouterr().out) and "taken as a plain MAE" in said
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    assert torch.equal(again(images, noise)[0], model(images, noise)[0])


@pytest.mark.parametrize(
    "ours, message",
    [
        ([1], "imle_ssl is no JSON object"),
        ({"colour": "red"}, "unknown field colour"),
        ({"latent_dim": "x"}, "latent_dim 'x': allowed"),
        ({"latent_dim": 10**9}, "latent_dim 1000000000: allowed"),
        ({"ip_spec": [["mask", "__class__"]]}, "ip_spec .*unknown method"),
        ({"ip_spec": "mask"}, "ip_spec 'mask': allowed are pairs"),
        ({"mean": [[1], 2, 3]}, "mean .*: allowed"),
        ({"mapping_net_lrmul": float("nan")}, "mapping_net_lrmul nan: allowed"),
        ({"adain_init": {"a": 1}}, "adain_init .*: allowed"),
        ({"dim": 32}, ""),  # ViTMAE's own field goes first
    ],
    ids=str,
)
def test_a_hostile_config_is_refused_in_one_line(exported, ours, message):
    model, folder = exported
    config = json.loads((folder / "config.json").read_text())
    config["imle_ssl"] = {**config["imle_ssl"], **ours} if isinstance(ours, dict) else ours
    (folder / "config.json").write_text(json.dumps(config))
    if not message:
        assert same(load_model(folder), model)
        return
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is no JSON"):
        load_model(folder)


def test_a_hostile_injections_file_changes_no_other_tensor(exported, capsys):
    model, folder = exported
    save_file(
        {"norm.weight": torch.zeros(24), "x": torch.zeros(3)}, folder / "injections.safetensors"
    )
    state = load_model(folder).state_dict()
    mae = {n: x for n, x in model.state_dict().items() if not n.startswith("injections.")}
    assert all(torch.equal(state[name], tensor) for name, tensor in mae.items())
    assert "warning: the injections starts fresh" in capsys.readouterr().out
    (folder / "injections.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="injections.safetensors is damaged"):
        load_model(folder)


# -------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder": "cross", "ip_spec": ()}, "no decoder 'cross'"),
        ({"image_size": (16, 32)}, "square images only, not 16 x 32"),
    ],
)
def test_models_that_vitmae_can_t_express_are_refused(tmp_path, capsys, changes, message):
    _, path = checkpoint(tmp_path / "model.pt", dataclasses.replace(SMALL, **changes))
    said = refusal(capsys, path, tmp_path / "out", "--format", "hf")
    assert message in said and str(path) in said and not (tmp_path / "out").exists()
    run(path, tmp_path / "encoder.safetensors")  # its encoder goes to timm


def test_a_model_without_a_decoder_is_refused(tmp_path, capsys):
    model, _ = checkpoint(tmp_path / "model.pt", PLAIN)
    state = {n: x for n, x in model.state_dict().items() if n.startswith(ENCODER)}
    torch.save({"model": state}, tmp_path / "encoder.pth")
    state = {"model": state, "config": dataclasses.asdict(PLAIN)}
    save_checkpoint(tmp_path / "encoder.pth", state)
    said = refusal(capsys, tmp_path / "encoder.pth", tmp_path / "out", "--format", "hf")
    assert "no complete model: it has no decoder" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format", "onnx"], "--format"),
        (["--private"], "--private: .*give --push"),
        (["--licence", "mit"], "--licence: .*no model card"),
        (["--format", "hf", "--licence", "my own\nterms"], "--licence"),
        (["--push", "no-owner"], "--push: 'no-owner' is not OWNER/NAME"),
        (["--push", "a/b/c"], "--push: Repo id"),
    ],
)
def test_flags_are_refused_in_one_line(tmp_path, capsys, flags, message):
    said = refusal(capsys, tmp_path / "no.pt", tmp_path / "out", *flags)
    assert re.search(message, said.replace("argument ", ""))


# -------------------------------------------------------------------------------------------------
# The folder.


def contents(folder):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_an_export_of_ours_is_replaced(exported, tmp_path, capsys):
    _, folder = exported
    plain, path = checkpoint(tmp_path / "plain.pt", PLAIN)
    run(path, folder, "--format", "hf")
    assert same(load_model(folder), plain)
    assert not (folder / "injections.safetensors").exists(), "the old export is gone as a whole"
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    saved_again = shutil.copytree(folder, tmp_path / "again")
    (saved_again / "notes.txt").unlink()
    config = json.loads((saved_again / "config.json").read_text())
    (saved_again / "config.json").write_text(json.dumps(config | {"transformers_version": "5"}))
    for out in (folder, saved_again):
        before = contents(out)
        assert "holds other things" in refusal(capsys, path, out, "--format", "hf")
        assert contents(out) == before
    assert "is a file" in refusal(capsys, path, tmp_path / "file", "--format", "hf")
    assert "cannot write" in refusal(capsys, path, tmp_path / "no/where", "--format", "hf")
    (tmp_path / "empty").mkdir()
    run(path, tmp_path / "empty", "--format", "hf")
    assert same(load_model(tmp_path / "empty"), plain)
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


def test_an_export_that_fails_leaves_the_folder_as_it_was(exported, tmp_path, capsys, monkeypatch):
    _, folder = exported
    before, write = contents(folder), export_encoder.write_atomically

    def write_or_fail(path, content):
        if path.name == "model.safetensors":
            raise OSError("No space left on device")
        write(path, content)

    monkeypatch.setattr(export_encoder, "write_atomically", write_or_fail)
    for out in (folder, tmp_path / "new"):
        said = refusal(capsys, tmp_path / "model.pt", out, "--format", "hf")
        assert "No space left on device" in said
    assert contents(folder) == before and not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


# -------------------------------------------------------------------------------------------------
# The model card.


def test_the_card_has_the_run_s_data_steps_and_accuracy(tiny_run, tmp_path):
    newest = final_path(tiny_run)
    copied = shutil.copytree(tiny_run, tmp_path / "run")
    older = torch.load(newest, weights_only=True)
    older["progress"]["step"] = 4
    save_checkpoint(copied / "checkpoints/epoch_000001_step_00000004.pt", older)
    for path in (newest, copied / "checkpoints/epoch_000001_step_00000004.pt"):
        out = tmp_path / path.stem
        run(path, out, "--format", "hf", "--licence", "mit")
        card = (out / "README.md").read_text()
        assert "license: mit" in card.split("---")[1]
        step = int(path.stem.split("_")[-1])
        assert f"{step} gradient steps of 12 images from `demo/mnist_train.tar`" in card
        assert "with 75% of the patches masked, with 5 codes tried" in card
        assert "started from scratch" in card and "CC-BY-NC 4.0" in card
        records = [r for r in metrics(tiny_run) if r["pretrain/step"] <= step]
        record = [r for r in records if "fast_linear_probe/acc_te" in r][-1]
        assert record["pretrain/step"] == step, "not the metrics of later steps"
        row = f"{record['fast_linear_probe/acc_te']:.4g} | {record['pretrain/step']} |"
        assert f"| accuracy of a linear probe | {row}" in card
        assert str(ROOT) not in card and str(tiny_run) not in card, "no folders of this machine"
        namespace = {}
        lines = card.split("```python\n")[2].split("```")[0].replace(f"'{out.name}'", f"'{out}'")
        exec(lines, namespace)  # the lines that the card shows for this repository
        assert same(namespace["model"], IO.load_model(path))


def test_a_card_without_a_run_or_a_licence_says_so(tmp_path):
    run(GOLDEN, tmp_path / "out", "--format", "hf")
    card = (tmp_path / "out/README.md").read_text()
    assert "`model.safetensors`, which does not say how it was trained" in card
    assert "license:" not in card and "No licence is stated here" in card


# -------------------------------------------------------------------------------------------------
# The Hub, as a server of our own answers for it. Every upload is of the kind "regular"; how large
# files travel (LFS, Xet) is up to huggingface_hub.


class Hub:
    """What a Hub of our own holds, and its answers."""

    def __init__(self, status=200, is_private=None):
        """is_private: of the repository that exists already, or None."""
        self.files, self.status, self.private, self.address = {}, status, is_private, ""

    def show(self, name):
        """Lets api.model_info answer."""
        info = {"id": name, "private": bool(self.private), "siblings": []}
        self.files[f"/api/models/{name}"] = json.dumps(info).encode()

    def answer(self, path, body):
        """The answer to a POST."""
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish['organization']}/{wish['name']}"
            if self.status != 200:
                return self.status, {"error": "You have no right\nto do this"}
            exists = self.private is not None
            if not exists:  # releases of huggingface_hub send one or the other
                self.private = wish.get("visibility") == "private" or bool(wish.get("private"))
            self.show(name)
            url = {"url": f"{self.address}/{name}", "error": "exists"}
            return (409 if exists else 200), url
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            about = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": name, **about} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"/{name}/resolve/main/{line['value']['path']}"] = content
            return 200, {"commitUrl": f"{self.address}/{name}/commit/0", "commitOid": "0" * 40}
        return 404, {}


LOAD_BACK = """
import sys, timm, torch
sys.path.insert(0, ".")
from IO import load_model
model, again = load_model(sys.argv[1]).eval(), load_model("hf-hub:someone/whole").eval()
named = load_model("hf-hub:someone/whole/model.safetensors")
assert named.config == again.config and named.code_dim
assert again.config == model.config and again.code_dim > 0
for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
    assert torch.equal(a, b), name
encoder = timm.create_model("hf-hub:someone/encoder", pretrained=True).eval()
images = torch.randn(2, model.config.channels, *model.config.image_size)
with torch.no_grad():
    torch.testing.assert_close(encoder.forward_features(images), model.encode(images))
data = timm.data.resolve_model_data_config(encoder)
assert tuple(data["mean"]) == model.config.mean and tuple(data["std"]) == model.config.std
"""


@pytest.mark.slow
def test_what_is_pushed_comes_back_from_the_hub(tmp_path):
    hub, program = Hub(), (sys.executable, "scripts/export_encoder.py")
    _, path = checkpoint(tmp_path / "model.pt")
    with server(hub.files, hub.answer) as (hub.address, _):
        environment = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_TOKEN": "hf_x",
        }
        for name, out, flags in (
            ("whole", tmp_path / "out", ["--format", "hf", "--private", "--licence", "mit"]),
            ("encoder", tmp_path / "encoder.safetensors", []),
        ):
            hub.private = None
            push = ["--push", f"someone/{name}", *flags]
            done = command(path, out, *push, program=program, **environment)
            assert hub.private == ("--private" in flags)
            assert done.stdout.splitlines()[-1].endswith(f"/someone/{name}")
            assert f"hf-hub:someone/{name}" in done.stdout or name == "encoder"
        assert b"library_name: timm" in hub.files["/someone/encoder/resolve/main/README.md"]
        command(path, program=(sys.executable, "-c", LOAD_BACK), **environment)


@pytest.mark.parametrize("private", [True, False])
def test_a_push_uploads_the_folder(tmp_path, capsys, monkeypatch, private):
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with server(hub.files, hub.answer) as (hub.address, _):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        flags = ["--push", "someone/name", *["--private"] * private]
        run(checkpoint(tmp_path / "model.pt")[1], tmp_path / "out", "--format", "hf", *flags)
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"{hub.address}/someone/name" and hub.private == private
    there = {path: content for path, content in hub.files.items() if "/resolve/" in path}
    prefix, here = "/someone/name/resolve/main/", contents(tmp_path / "out")
    assert there == {prefix + name: content for name, content in here.items()} and len(here) == 5
    assert "load_model('hf-hub:someone/name')" in said
    assert b"load_model('hf-hub:someone/name')" in here["README.md"]


@pytest.mark.parametrize("fault", ["token", "network", "right", "public"])
def test_a_push_that_fails_ends_in_one_line(tmp_path, capsys, monkeypatch, fault):
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_TOKEN", "" if fault == "token" else "hf_x")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub = Hub(status=403 if fault == "right" else 200, is_private=False)
    with server(hub.files, hub.answer) as (hub.address, _):
        address = "http://127.0.0.1:9" if fault == "network" else hub.address
        monkeypatch.setattr(constants, "ENDPOINT", address)
        flags = ["--format", "hf", "--push", "someone/name", "--private"]
        said = refusal(capsys, GOLDEN, tmp_path / "out", *flags)
    reasons = {"token": "no login", "network": "", "right": "403", "public": "exists and is public"}
    assert "--push" in said and reasons[fault] in said
    assert (tmp_path / "out").exists() == (fault != "token"), "without a login nothing is begun"
    assert fault == "token" or f"{tmp_path / 'out'} is written" in said
    assert not any("resolve" in path for path in hub.files), "nothing is published"

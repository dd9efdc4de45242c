"""The benchmarks, tiny: they run, and what they compare computes the same."""

import json
import sys

import pytest
import torch
from benchmarks.plain import plain_losses, plain_model  # noqa: E402 (the line above)
from conftest import ROOT, command
from PIL import Image

import IO
import Models

PROGRAM = (sys.executable, "scripts/benchmark.py")
TINY = "--arch vit_demo --input_size 28 --repeats 1 --device cpu".split()
REGRET = "--regret_images 32 --ns 64".split()


def rows(path):
    return {(row["name"], row.get("tries")): row for row in json.loads(path.read_text())}


@pytest.mark.slow
def test_the_benchmark_of_sampling_compares_speed_and_regret(tmp_path):
    options = [*TINY, *REGRET, "--regret_ns", 64, "--json", tmp_path / "rows.json"]
    done = command("sampling", *options, program=PROGRAM)
    found = {name: row for (name, _), row in rows(tmp_path / "rows.json").items()}
    assert all(name in done.stdout for name in found)
    for name, row in found.items():
        assert row["image_codes_per_sec"] > 0 and row["share_of_matmul"] > 0, name
        assert row["images_per_sec"] == pytest.approx(row["image_codes_per_sec"] / 64)
    assert found["plain"]["ratio_to_plain"] == 1
    assert found["exhaustive, float32"]["regret"] == pytest.approx(0, abs=1e-6)
    (surrogate,) = (row["regret"] for name, row in found.items() if "surrogate" in name)
    (default,) = (row["regret"] for name, row in found.items() if "default" in name)
    (fewer,) = (row["regret"] for name, row in found.items() if "a fifth of" in name)
    assert default < 0.01 and surrogate < fewer / 2


def test_the_frontier_is_a_picture_of_regret_over_time(tmp_path):
    options = [*TINY, *REGRET, "--tries", 8, 24, "--json", tmp_path / "rows.json"]
    command("frontier", *options, "--out", tmp_path / "frontier.png", program=PROGRAM)
    found = rows(tmp_path / "rows.json")
    kinds = {("all codes", 64)} | {(k, n) for k in ("fewer codes", "surrogate") for n in (8, 24)}
    assert found.keys() == kinds
    assert found["surrogate", 24]["regret"] < found["fewer codes", 24]["regret"]
    assert Image.open(tmp_path / "frontier.png").size[0] > 500


def test_the_benchmark_of_training_compares_steps(tmp_path):
    command("train", *TINY, "--json", tmp_path / "rows.json", program=PROGRAM)
    found = rows(tmp_path / "rows.json").values()
    assert len(found) == 3 and all(row["images_per_sec"] > 0 for row in found)


@pytest.mark.slow
def test_the_benchmark_of_probes_compares_heads(tmp_path):
    options = [*TINY, "--images", 8, "--classes", 5, "--num_workers", 1]
    command("probe", *options, "--json", tmp_path / "rows.json", program=PROGRAM)
    found = {name: row for (name, _), row in rows(tmp_path / "rows.json").items()}
    assert found["float32"]["images_per_sec"] > 0 and found["float32"]["share_of_matmul"] > 0
    assert (
        found["one head"]["ratio_to_one_head"] == 1 < 10 > found["ten heads"]["ratio_to_one_head"]
    )
    assert found["ours"]["ratio_to_loader"] > 2  # 5 where nothing else runs
    assert found["ours"]["top1"] == pytest.approx(found["loader, 1 workers"]["top1"], abs=0.03)


def test_the_benchmark_of_data_compares_stores(tmp_path):
    options = "--entries 2000 --reads 1000 --repeats 1 --most 4 --input_size 32".split()
    options += ["--work", tmp_path, "--json", tmp_path / "rows.json"]
    command("data", *options, program=PROGRAM)
    found = {name: row for (name, _), row in rows(tmp_path / "rows.json").items()}
    for name in ("folder, pillow", ".tar, pillow", ".lmdb, pillow"):
        assert found[name]["images_per_sec"] > 0 and found[name]["ratio_to_folder"] > 0
    for name in (".tar", ".lmdb"):
        assert found[name]["made_seconds"] > 0 and found[name]["pickle_kb"] < 100
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_plain_way_computes_what_the_model_does(norm_pix_loss, fused):
    model = IO.load_model(ROOT / "demo/imle_mnist.pt", norm_pix_loss=norm_pix_loss)
    torch.manual_seed(0)
    images, noise = torch.randn(3, 3, 28, 28), torch.rand(3, 49)
    codes = model.sample_codes(torch.arange(3), 4)
    plain = plain_losses(plain_model(model, fused), images, noise, codes)
    pred, mask = model(images, noise, codes, masked_only=True)
    torch.testing.assert_close(plain, Models.reconstruction_loss(pred, images, mask, norm_pix_loss))


@pytest.mark.parametrize(
    "options, named",
    [
        (["sampling", "--checkpoint", "nowhere.pt"], "--checkpoint: nowhere.pt"),
        (["sampling", "--data", "nowhere"], "--data: nowhere"),
        (["frontier", "--checkpoint", "tests/golden/hf_vitmae_tiny"], "has no codes"),
        (["train", "--input_size", "30"], "--input_size 30"),
        (["data", "--images", "nowhere"], "--images: nowhere"),
        (["data", "--work", "nowhere"], "--work nowhere"),
        (["train", "--arch", "vit_giant"], "--arch"),
    ],
)
def test_bad_input_ends_in_one_line(options, named):
    small = [*TINY[:4], *TINY[6:], *("--ns 2".split() if options[0] != "train" else [])]
    small = [] if options[0] == "data" else small
    done = command(options[0], *small, *options[1:], program=PROGRAM, check=False)
    assert done.returncode == 2 and named in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr

"""The algorithm and the real command, tiny: what is chosen, trained, measured, left behind."""

import dataclasses
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import (
    DEMO_DATA,
    ROOT,
    TINY,
    assert_same_run,
    command,
    final_path,
    final_state,
    metrics,
    random_batch,
    run_folder,
    step_options,
)
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import Augmentation
import Data
import IO
import Models
import Samplers
import TrainIMLE
import Validation
from Augmentation import transforms
from internals import checkpoints
from internals.encoders import effective_rank
from Utils import RunError, fastest_dtype, learning_rate


@pytest.fixture(scope="module")
def model():
    """A small model whose codes matter."""
    return IO.load_model(ROOT / "demo/imle_mnist.pt")


@pytest.fixture(scope="module")
def chunk(model):
    """Images, mask noise and seeds."""
    torch.manual_seed(0)
    return torch.randn(5, 3, 28, 28), torch.rand(5, 49), torch.arange(5)


def digits(n):
    """Validation digits, evenly spaced: images, mask noise and seeds."""
    torch.manual_seed(0)
    images = Data.open_images(ROOT / "demo/mnist_val.tar")
    loader = Data.ImageLoader(images, transforms((28, 28), use_augs=False)[1], num_workers=0)
    indices = torch.arange(n) * len(images) // n
    ((_, pixels),) = loader.chunks(indices, indices, n)
    return Augmentation.normalize(pixels), torch.rand(n, 49), indices


def brute_force(model, images, mask_noise, seeds, n_codes):
    """Losses (N, n_codes): every code through the whole network, all tokens decoded."""
    losses = []
    for code in model.sample_codes(seeds, n_codes).unbind(1):
        pred, mask = model(images, mask_noise, code[:, None])
        losses.append(Models.reconstruction_loss(pred, images, mask, model.config.norm_pix_loss))
    return torch.cat(losses, dim=1)


@pytest.mark.parametrize("codes_per_pass", [1, 4, 7, 10, 16])
@torch.no_grad()
def test_the_nearest_of_all_codes_is_chosen_however_they_are_cut(model, chunk, codes_per_pass):
    losses = brute_force(model, *chunk, 10)
    codes, numbers, best, mean = TrainIMLE.choose_codes(
        model, *chunk, codes_per_image=10, codes_per_pass=codes_per_pass
    )
    expected = model.sample_codes(chunk[2], 10)[torch.arange(5), losses.argmin(1)]
    assert torch.equal(codes, expected) and torch.equal(numbers, losses.argmin(1))
    torch.testing.assert_close(best, losses.min(1).values)
    torch.testing.assert_close(mean, losses.mean(1))


SAMPLERS = {  # of six codes, all of them tried
    "exhaustive": TrainIMLE.choose_codes,
    "surrogate": partial(Samplers.choose_codes_surrogate, tries=6),
}


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_loss_that_is_not_finite_never_wins(model, chunk, monkeypatch, sampler):
    losses = brute_force(model, *chunk, 6)
    lowest, second = losses.sort(dim=1).values[:, :2].unbind(1)  # lowest: the loss that would win
    values = torch.tensor([math.nan, -math.inf, math.nan, -math.inf, math.nan])
    right_loss = Models.reconstruction_loss

    def broken(pred, *arguments):
        result = right_loss(pred, *arguments)  # (N, k)
        return torch.where(result < (lowest + second)[:, None] / 2, values[:, None], result)

    monkeypatch.setattr(Samplers, "reconstruction_loss", broken)
    codes, numbers, best, _ = SAMPLERS[sampler](model, *chunk, codes_per_image=6, codes_per_pass=2)
    expected = losses.argsort(dim=1)[:, 1]
    assert torch.equal(numbers, expected)
    assert torch.equal(codes, model.sample_codes(chunk[2], 6)[torch.arange(5), expected])
    assert best.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("rs_epsilon", [0.0, 0.8, 100.0])
@pytest.mark.parametrize("predict_ratio", [1.0, 0.25])
def test_both_samplers_choose_alike_where_all_codes_are_tried(
    model, chunk, rs_epsilon, predict_ratio
):
    options = {"codes_per_image": 6, "codes_per_pass": 4, "mask_ratio": 0.6}
    options |= {"rs_epsilon": rs_epsilon, "predict_ratio": predict_ratio}
    results = [choose(model, *chunk, **options) for choose in SAMPLERS.values()]
    for exact, surrogate in zip(*[result[:3] for result in results], strict=True):
        torch.testing.assert_close(exact, surrogate)
    codes, numbers = results[0][:2]
    assert numbers.dtype == torch.int64 and torch.equal(
        codes, model.numbered_codes(chunk[2], numbers[:, None])[:, 0]
    )
    prefix = model.prefix(*chunk[:2], 0.6, predict_ratio)
    again = [choose(model, *chunk, **options, prefix=prefix) for choose in SAMPLERS.values()]
    for first, second in zip(sum(results, ()), sum(again, ()), strict=True):
        assert torch.equal(first, second), "with the prefix given"


@torch.no_grad()
def test_codes_nearer_than_epsilon_are_chosen_only_where_all_are(model, chunk):
    losses = brute_force(model, *chunk, 12)
    lowest = losses.sort(dim=1).values
    epsilon = lowest[0, 3].item() + 1e-6  # rules out some codes of some images
    assert (losses < epsilon).any() and not (losses < epsilon).all()
    for rs_epsilon in (epsilon, 100.0):
        options = {"codes_per_image": 12, "codes_per_pass": 5, "rs_epsilon": rs_epsilon}
        codes, _, chosen, _ = TrainIMLE.choose_codes(model, *chunk, **options)
        for n, row in enumerate(losses.tolist()):
            far = [loss for loss in row if loss >= rs_epsilon]
            expected = row.index(min(far) if far else max(row))
            assert torch.equal(codes[n], model.sample_codes(chunk[2][n, None], 12)[0, expected])
            assert chosen[n].item() == pytest.approx(row[expected], rel=1e-5)


@torch.no_grad()
def test_the_surrogate_chooses_nearly_as_well_as_all_codes_by_a_fifth_of_the_tries(model):
    chunk = digits(40)
    images, mask_noise, indices = chunk
    prefix, numbers = model.prefix(images, mask_noise), torch.arange(128).expand(40, -1)
    _, losses = Samplers.try_codes(model, prefix, images, indices, numbers, 16)
    best, mean = losses.min(1).values, losses.mean(1)
    codes, number, chosen, first = Samplers.choose_codes_surrogate(
        model, *chunk, codes_per_image=128, codes_per_pass=16, tries=25
    )
    assert torch.equal(codes, model.sample_codes(indices, 128)[torch.arange(40), number])
    torch.testing.assert_close(chosen, losses[torch.arange(40), number], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first, losses[:, :8].mean(1), atol=1e-5, rtol=1e-4)
    regret = (chosen - best).sum() / (mean - best).sum()
    fewer = (losses[:, :25].min(1).values - best).sum() / (mean - best).sum()
    assert regret < 0.02 < 0.08 < fewer


@torch.no_grad()
def test_the_surrogates_memory_holds_the_residuals_of_the_tried_codes_twice(model, chunk):
    prefix, numbers = model.prefix(*chunk[:2]), torch.arange(8).expand(5, -1)
    residuals, _ = Samplers.try_codes(model, prefix, chunk[0], chunk[2], numbers, 4)
    memory = [Samplers.surrogate_memory(model, 5, 40, tries) for tries in (0, 8)]
    assert 2 * residuals.nbytes <= memory[1] - memory[0] < 4 * residuals.nbytes
    assert memory[0] > 5 * 40 * 40 * 8


@torch.no_grad()
def test_the_surrogate_looks_for_codes_that_are_not_too_near(model):
    torch.manual_seed(0)
    chunk = torch.randn(12, 3, 28, 28), torch.rand(12, 49), torch.arange(12)
    losses = brute_force(model, *chunk, 64)
    epsilon = losses.quantile(0.3).item()
    options = {"codes_per_image": 64, "codes_per_pass": 16, "rs_epsilon": epsilon}
    _, _, expected, _ = TrainIMLE.choose_codes(model, *chunk, **options)
    _, _, chosen, _ = Samplers.choose_codes_surrogate(model, *chunk, **options, tries=24)
    eligible = (losses >= epsilon).any(1)
    assert eligible.sum() > 8 and (chosen[eligible] >= epsilon).all()
    assert ((chosen - expected) / losses.std(1))[eligible].mean() < 0.3


@torch.no_grad()
@pytest.mark.parametrize("tries", [1, 2, 5, 10])
@pytest.mark.parametrize("broken", ["nothing", "features", "residuals"])
def test_the_surrogate_never_tries_a_code_twice_and_takes_the_nearest_of_the_tried(
    model, chunk, monkeypatch, tries, broken
):
    """Also where it can learn nothing: codes without effect, residuals that are not finite."""
    losses = brute_force(model, *chunk, 10)
    tried = []

    def try_codes(model, prefix, images, seeds, numbers, codes_per_pass):
        tried.append(numbers)
        residuals = torch.randn(5, numbers.shape[1], 7)
        return residuals * (math.nan if broken == "residuals" else 1), losses.gather(1, numbers)

    monkeypatch.setattr(Samplers, "try_codes", try_codes)
    if broken == "features":
        monkeypatch.setattr(model, "code_features", torch.zeros_like)
    _, numbers, best, mean = Samplers.choose_codes_surrogate(
        model, *chunk, codes_per_image=10, codes_per_pass=3, tries=tries
    )
    torch.testing.assert_close(mean, losses.gather(1, tried[0]).mean(1))
    tried = torch.cat(tried, dim=1)
    assert tried.shape == (5, tries) and all(len(set(row)) == tries for row in tried.tolist())
    assert torch.equal(best, losses.gather(1, tried).min(1).values)
    assert torch.equal(best, losses.gather(1, numbers[:, None])[:, 0])


def test_losses_are_predicted_exactly_where_completions_are_linear_in_the_features():
    torch.manual_seed(0)
    features = torch.randn(3, 40, 4, dtype=torch.float64)
    completions = features @ torch.randn(3, 4, 50, dtype=torch.float64) + 1
    residuals = completions - torch.randn(3, 1, 50, dtype=torch.float64)
    numbers = torch.stack([torch.randperm(40)[:9] for _ in range(3)])
    known = residuals.gather(1, numbers[:, :, None].expand(-1, -1, 50))
    kernel = features @ features.transpose(1, 2)
    predicted = Samplers.predicted_losses(kernel, numbers, known, ridge=1e-9)
    torch.testing.assert_close(predicted, residuals.square().mean(2), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_low_precision_hardly_changes_the_quality_of_the_choice(model):
    chunk = digits(25)
    losses = brute_force(model, *chunk, 16)
    low = Models.in_precision(model, torch.bfloat16)
    _, chosen, _, _ = TrainIMLE.choose_codes(low, *chunk, codes_per_image=16, codes_per_pass=16)
    regret = losses[torch.arange(25), chosen] - losses.min(1).values
    assert regret.sum() / (losses.mean(1) - losses.min(1).values).sum() < 0.01


@torch.no_grad()
def test_validation_equals_a_brute_force_over_codes(model, chunk):
    losses = brute_force(model, *chunk, 6)
    found = Validation.evaluate(model, *chunk, codes_per_image=6, codes_per_pass=4, mask_ratio=0.75)
    prefix = model.prefix(*chunk[:2])
    pred = model.suffix(prefix, model.sample_codes(chunk[2], 6))
    spread = pred.std(1, correction=0).mean((1, 2))
    plain = Samplers.image_losses(model, model.suffix(prefix, None), chunk[0], prefix.mask)
    expected = [losses.mean(1), losses.min(1).values, plain, spread]
    expected = dict(zip(Validation.METRICS, expected, strict=True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_a_step_follows_the_gradient_of_both_mean_losses_in_any_number_of_parts(parts, weight):
    model = IO.load_model(ROOT / "demo/imle_mnist.pt")
    batch = random_batch(6)
    images = Augmentation.normalize(batch.images)
    codes = model.sample_codes(batch.seeds, 3)[torch.arange(6), batch.code_numbers]
    expected = []
    for some in (codes[:, None], None):
        pred, mask = model(images, batch.mask_noise, some)
        expected.append(Models.reconstruction_loss(pred, images, mask, False).mean())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected[0] + weight * expected[1], trained)
    options = step_options(model, parts=parts, rates={"mae": 0.0, "z": 0.0})
    found = TrainIMLE.train_step(model, batch, **options, mae_loss_weight=weight)
    assert found["pretrain/loss_tr"] == pytest.approx(expected[0].item(), rel=1e-5)
    if weight:
        assert found["pretrain/loss_tr_no_z"] == pytest.approx(expected[1].item(), rel=1e-5)
    else:
        assert "pretrain/loss_tr_no_z" not in found
    assert found["pretrain/grad_norm"] == pytest.approx(
        torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-4
    )
    for parameter, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_images(monkeypatch):
    model = IO.load_model(ROOT / "demo/imle_mnist.pt")
    batch = random_batch(6)
    whole = model.numbered_codes

    def numbered_codes(*args):
        codes = whole(*args)
        codes[3] = math.nan
        return codes

    monkeypatch.setattr(model, "numbered_codes", numbered_codes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RunError, match="after 7 gradient steps the training loss is nan") as caught:
        TrainIMLE.train_step(model, batch, **step_options(model))
    assert all(name in str(caught.value) for name in batch.names())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_clipping_bounds_the_gradient():
    model = IO.load_model(ROOT / "demo/imle_mnist.pt")
    options = step_options(model, clip_grad=1e-3, rates={"mae": 0.0, "z": 0.0})
    TrainIMLE.train_step(model, random_batch(6), **options)
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(norms).norm() <= 1.001e-3


def test_the_schedule_is_that_of_the_design():
    shape = {"base": 2.0, "minimum": 0.5, "start": 10, "ramp": 4, "total": 54}
    rates = [learning_rate(k, **shape, cycles=2) for k in range(54)]
    assert rates[:10] == [0] * 10
    assert rates[10:14] == [0.5 + 1.5 * i / 4 for i in (1, 2, 3, 4)]
    for k in range(14, 54):
        share = ((k - 14) % 20) / 20
        assert rates[k] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * share)) / 2)
    assert [learning_rate(k, **shape) for k in (13, 14, 53)] == [2.0] * 3
    assert learning_rate(0, base=2.0, minimum=0.0, start=0, ramp=0, total=9) == 2.0


def test_a_run_leaves_what_the_readme_says(tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["flags"]["uid"] == "tiny" and config["flags"]["lr_z"] == 1e-3
    assert {"torch", "timm", "python"} <= config["versions"].keys()
    assert "TrainIMLE.py" in config["command"]
    records = metrics(tiny_run)
    evaluated = [r for r in records if "pretrain/loss_te" in r]
    epochs = [r for r in records if "pretrain/loss_tr" in r]
    assert [r["pretrain/step"] for r in evaluated] == [0, 2, 4, 6, 8]
    assert [(r["epoch"], r["pretrain/step"]) for r in epochs] == [(0, 4), (1, 8)]
    for key in ("loss_te", "loss_te_best", "loss_te_no_z", "code_spread"):
        assert all(isinstance(r[f"pretrain/{key}"], float) for r in evaluated)
        assert ["pretrain/" + key + "_baseline" in r for r in evaluated] == [True] + [False] * 4
    for key in ("acc_te", "knn_te"):
        assert all(0 <= r[f"fast_linear_probe/{key}"] <= 1 for r in evaluated)
    assert all(1 <= r["pretrain/rankme"] <= 128 for r in evaluated)
    for record in evaluated:
        for key in ("images/pretrain_train", "images/pretrain_test"):
            width, height = Image.open(tiny_run / record[key]).size
            assert width > 4 * 28 and height > 2 * 28
        assert record["pretrain/loss_te_best"] <= record["pretrain/loss_te"]
    for record in epochs:
        assert record["sampling/end_losses"] <= record["sampling/first_losses"]
        assert {"sampling/delta_wrt_no_z", "pretrain/lr_mae", "pretrain/lr_z"} <= record.keys()
    assert evaluated[0]["pretrain/code_spread"] == 0 < evaluated[4]["pretrain/code_spread"]
    assert evaluated[4]["pretrain/loss_te_no_z"] < evaluated[0]["pretrain/loss_te_no_z"]
    assert Image.open(tiny_run / "curves.png").size[0] > 500
    content = torch.load(tiny_run / "checkpoints/step_00000008.pt", weights_only=True)
    assert content["progress"]["step"] == 8
    assert IO.load_model(tiny_run / "checkpoints/step_00000008.pt").code_dim == 8


@pytest.mark.slow
def test_rankme_is_logged_without_a_probe_by_any_number_of_processes(tmp_path):
    flags = "--epochs 0 --fast_linear_probe 0 --processes 2 --uid x --num_workers 0".split()
    command(*TINY, *flags, "--save_folder", tmp_path)
    (record,) = metrics(run_folder(tmp_path))
    model = IO.load_model(run_folder(tmp_path))
    tokens = model.encode(digits(10)[0]).detach()
    expected = effective_rank(tokens[:, 1:].mean(1))
    assert record["pretrain/rankme"] == pytest.approx(expected, rel=1e-4)
    assert record["pretrain/rankme_baseline"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_unlabelled_pretraining_is_watched_by_probes_on_other_sets(tiny_run, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    images = Data.open_images(ROOT / "demo/mnist_train.tar")
    for i in range(0, 4000, 80):
        images.load(i).save(flat / f"{i}.png")
    digits = "digits=demo/mnist_train.tar,demo/mnist_val.tar"
    flags = [*TINY, "--data_tr", flat, "--data_val", flat, "--epochs", 1, "--ignore_z", 1]
    flags += ["--probe_data", digits, digits.replace("digits", "again"), "--processes", 2]
    done = command(*flags, "--save_folder", tmp_path)
    assert "training: 50 images without class folders" in done.stdout
    assert "digits, training: 4,000 images, 10 classes" in done.stdout
    assert done.stdout.count("no probe on the training images: all are of one class") == 1
    records = [r for r in metrics(run_folder(tmp_path)) if "pretrain/loss_te" in r]
    for record in records:
        assert "fast_linear_probe/acc_te" not in record and record["pretrain/rankme"] >= 1
        for key in ("acc_te", "knn_te"):
            found = record[f"fast_linear_probe/digits/{key}"]
            assert 0 <= found <= 1 and found == record[f"fast_linear_probe/again/{key}"]
    # The start of the run on the digits themselves, without codes, has the same weights.
    first = [r for r in metrics(tiny_run) if "pretrain/loss_te_baseline" in r]
    for key in ("acc_te", "knn_te"):
        expected = first[0][f"fast_linear_probe/{key}_baseline"]
        assert records[0][f"fast_linear_probe/digits/{key}"] == pytest.approx(expected, abs=0.02)
    assert "digits: probe " in done.stdout and "again: probe " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("x=nowhere,demo/mnist_val.tar", "--probe_data x: TRAIN: nowhere does not exist"),
        ("x=demo/mnist_val.tar,FLAT", "--probe_data x: VAL: .* has no class folders"),
        ("x=FLAT,FLAT", "--probe_data x: TRAIN: a probe needs at least two classes, there is 1"),
    ],
)
def test_bad_data_of_a_probe_end_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(ROOT)
    Image.new("RGB", (28, 28)).save(tmp_path / "0.png")
    words = words.replace("FLAT", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        TrainIMLE.main([*map(str, TINY), "--save_folder", str(tmp_path), "--probe_data", words])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and re.search(message, line), line


def test_imle_alone_has_the_numbers_that_version_0_1_0_had(imle_alone_run):
    recorded = (ROOT / "tests/golden/tiny_run.jsonl").read_text().splitlines()
    for line, now in zip(map(json.loads, recorded), metrics(imle_alone_run), strict=True):
        for key, value in line.items():
            # A probe counts images: on another processor one of 150 may fall to another class.
            tolerance = 0.02 if key.startswith("fast_linear_probe") else 1e-5
            assert now[key] == pytest.approx(value, rel=1e-5, abs=tolerance), key


LARGE_POOL = r"""
import os, resource, signal, sys, time
sys.path.insert(0, {root!r})
import Data, TrainIMLE
draw_pool, train_step, times = Data.draw_pool, TrainIMLE.train_step, []
def timed_pool(*args, **options):
    times.append(time.perf_counter())
    return draw_pool(*args, **options)
def timed_step(*args, **options):
    times.append(time.perf_counter())
    if len(times) == 5:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        # One write, so that two processes' lines stay apart.
        os.write(1, f"\nmeasured {{memory}} {{times[1] - times[0]}}\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(*args, **options)
Data.draw_pool, TrainIMLE.train_step = timed_pool, timed_step
if __name__ == "__main__":
    TrainIMLE.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_pool_of_200_000_images_needs_no_more_memory_and_starts_as_soon_as_one_of_2_000(
    tmp_path, processes
):
    script = tmp_path / "measured.py"
    script.write_text(LARGE_POOL.format(root=str(ROOT)))
    flags = (
        f"--ignore_z 1 --arch vit_tiny --input_size 112 --steps_per_eval 0 --save_folder {tmp_path}"
    )
    program = ["torchrun", "--standalone", "--nproc_per_node", str(processes), str(script)]
    measured = {}
    for size in (2000, 200_000):
        pool = ["--ex_per_epoch", size, "--ipe", -(-size // 12), "--num_workers", 1]
        done = command(*TINY, *flags.split(), *pool, "--uid", size, program=program)
        lines = [x.split()[1:] for x in done.stdout.splitlines() if x.startswith("measured")]
        assert len(lines) == processes
        measured[size] = [max(map(float, column)) for column in zip(*lines, strict=True)]
    (memory, seconds), (large_memory, large_seconds) = measured.values()
    assert large_memory < memory + 200  # MB
    assert large_seconds < seconds + 2  # this machine may be busy


def test_evaluating_and_probing_more_often_changes_nothing(tiny_run, tmp_path):
    options = ["--steps_per_eval", 1, "--num_workers", 2, "--get_mae_baseline", 0]
    command(*TINY, *options, "--uid", "often", "--save_folder", tmp_path)
    a, b = final_state(tiny_run), final_state(run_folder(tmp_path))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    a, b = metrics(tiny_run), metrics(run_folder(tmp_path))
    assert [r for r in a if "pretrain/loss_tr" in r] == [r for r in b if "pretrain/loss_tr" in r]
    keep = ("pretrain/loss_te", "fast_linear_probe/acc_te", "pretrain/code_spread")
    last = [{k: records[-2][k] for k in keep} for records in (a, b)]
    assert last[0] == last[1]


def test_resume_needs_no_other_flag(tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent.parent, tmp_path, dirs_exist_ok=True)
    folder = run_folder(tmp_path)
    done = command("--resume", folder / "checkpoints/step_00000008.pt", "--epochs", 3)
    assert "going on after step 8" in done.stdout
    assert [r["pretrain/step"] for r in metrics(folder) if "pretrain/loss_tr" in r] == [4, 8, 12]


def test_two_processes_train_the_same_run_as_one(tiny_run, tmp_path):
    flags = [*TINY, "--steps_per_eval", 2, "--uid", "tiny", "--save_folder", tmp_path]
    command(*flags, "--processes", 2)
    assert_same_run(tiny_run, run_folder(tmp_path), tolerance=1e-5)


@pytest.mark.slow
def test_three_processes_choose_the_same_codes_and_train_the_same_run_as_one(tmp_path):
    flags = [*TINY, "--ipe", 10, "--steps_per_eval", 10, "--uid", "x", "--save_minutes", 0]
    for processes in (1, 3):
        command(*flags, "--processes", processes, "--save_folder", tmp_path / str(processes))
    alone, together = (run_folder(tmp_path / str(processes)) for processes in (1, 3))
    assert_same_run(alone, together, tolerance=1e-5)
    before = [folder / "checkpoints/step_00000019.pt" for folder in (alone, together)]
    a, b = (torch.load(path, weights_only=True)["progress"]["codes"] for path in before)
    assert torch.equal(a, b), "the codes that were chosen"


@pytest.mark.slow
def test_two_nodes_started_by_torchrun_train_the_same_run_as_one_process(tiny_run, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["TrainIMLE.py", *TINY, "--steps_per_eval", 2, "--uid", "tiny"]
    nodes = "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id x --rdzv_endpoint"
    torchrun = [sys.executable, *f"-m torch.distributed.run {nodes} localhost:{port}".split()]
    start = partial(subprocess.Popen, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    processes = [
        start([*torchrun, *map(str, flags), "--save_folder", str(tmp_path)], text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum(text.count("step 8:") for text in said) == 1, "one process speaks"
    assert_same_run(tiny_run, run_folder(tmp_path), tolerance=1e-5)


@pytest.mark.slow
def test_the_cross_decoder_and_the_surrogate_train_the_same_run_in_two_processes(tmp_path):
    flags = [*TINY, "--decoder", "cross", "--sampler", "surrogate", "--ns", 12, "--tries", 6]
    flags += ["--epochs", 1, "--rs_epsilon", 0.01, "--steps_per_eval", 2, "--uid", "cross"]
    for processes in (1, 2):
        command(*flags, "--processes", processes, "--save_folder", tmp_path / str(processes))
    alone, together = (run_folder(tmp_path / str(processes)) for processes in (1, 2))
    assert_same_run(alone, together, tolerance=1e-5)
    (epoch,) = (r for r in metrics(alone) if "pretrain/loss_tr" in r)
    assert epoch["sampling/end_losses"] <= epoch["sampling/first_losses"]
    model = IO.load_model(final_path(alone))
    assert isinstance(model.decoder_blocks[0], Models.CrossBlock)
    flags += ["--decoder", "self", "--predict_ratio", 1]
    done = command(*flags, "--save_folder", tmp_path / "1", check=False)
    assert done.returncode == 2 and "--decoder was cross, is self" in done.stderr


def test_a_plain_mae_samples_nothing_and_is_evaluated_as_one(tmp_path):
    flags = ["--ignore_z", 1, "--epochs", 1, "--mae_loss_weight", 0.5, "--save_folder", tmp_path]
    command(*TINY, *flags)
    records = metrics(run_folder(tmp_path))
    assert not any("pretrain/loss_tr_no_z" in record for record in records)
    assert not any(key.startswith("sampling/") for record in records for key in record)
    for record in (r for r in records if "pretrain/loss_te" in r):
        assert record["pretrain/loss_te"] == record["pretrain/loss_te_best"]
        assert record["pretrain/loss_te"] == record["pretrain/loss_te_no_z"]
    assert final_state(run_folder(tmp_path))["config"]["ip_spec"] == ()


README_RUN_CUT_DOWN = [
    *DEMO_DATA,
    *"--gpus cpu --num_workers 1 --arch vit_demo --input_size 28 --ip_spec 3 adain".split(),
    *"--train_n_way 4 --train_n_shot 6 --ex_per_epoch 24 --mini_bs 12 --ipe 2 --epochs 10".split(),
    *"--ns 4 --sp 3 --code_bs 10 --ex_for_mse_loss 6 --z_per_ex_loss 3 --save_iter 5".split(),
    *"--steps_per_eval 20 --probe_epochs 1".split(),
]


@pytest.mark.parametrize("name", ["imle", "mae"])
def test_the_paper_s_runs_run(name, tmp_path):
    program = ("bash", f"scripts/{name}_from_scratch.sh")
    command(*README_RUN_CUT_DOWN, "--save_folder", tmp_path, program=program)
    folder = run_folder(tmp_path)
    assert f"{name.upper()}_FROM_SCRATCH" in folder.name
    assert {p.name for p in (folder / "checkpoints").glob("epoch*")} == {
        "epoch_000005_step_00000010.pt",
        "epoch_000010_step_00000020.pt",
    }
    assert list(folder.glob("wandb/offline-run-*")), "W&B mirrors the run offline"
    rates = [r["pretrain/lr_mae"] for r in metrics(folder) if "pretrain/lr_mae" in r]
    assert rates.index(max(rates)) == 7, "8 epochs of ramp"
    assert ("sampling/end_losses" in metrics(folder)[-1]) == (name == "imle")
    assert len(json.loads((folder / "config.json").read_text())["flags"]["ip_spec"]) == (
        2 if name == "imle" else 0
    )


def test_mixed_precision_augmentation_and_every_option_at_once(tmp_path):
    done = command(
        *TINY,
        *"--ip_spec 1 adain mask adain 5 local_adain".split(),
        *"--fp16 --sample_dtype auto --use_augs 1 --norm_pix_loss 1 --adain_init original".split(),
        *"--input_size 32 28 --accum 2 --clip_grad 1 --fix_mask_noise 1 --shuffle_data 0".split(),
        *"--probe_ignore_z 0 --probe_augs_per_image 2 --global_pool 0 --num_workers 2".split(),
        *"--headstart_z 1 --notes hello --train_n_shot 30 --val_n_way 99 --val_n_shot 99".split(),
        *["--save_folder", tmp_path],
    )
    assert "--val_n_way 10 classes of --val_n_shot 30 images" in done.stdout
    epochs = [r for r in metrics(run_folder(tmp_path)) if "pretrain/loss_tr" in r]
    assert [r["pretrain/lr_mae"] for r in epochs] == [0, 1e-3]
    assert [r["pretrain/lr_z"] for r in epochs] == [1e-3, 1e-3]


def test_native_precision_of_a_cpu_is_bfloat16_or_nothing():
    assert fastest_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.slow
def test_the_first_command_of_the_readme_runs_with_published_weights(tmp_path):
    """ViT-B with every default, but for the amounts; the weights' file is there as if fetched."""
    weights = tmp_path / "mae_checkpoints/mae_pretrain_vit_base_full.pth"
    weights.parent.mkdir()
    torch.save({"model": Models.build(Models.PRESETS["vit_base"]).state_dict()}, weights)
    program = (sys.executable, ROOT / "TrainIMLE.py")
    data = ["--data_tr", ROOT / DEMO_DATA[1], "--data_val", ROOT / DEMO_DATA[3]]
    amounts = "--epochs 1 --ex_per_epoch 4 --ipe 1 --mini_bs 4 --ns 2 --ex_for_mse_loss 4"
    amounts += " --z_per_ex_loss 2 --val_n_way 2 --val_n_shot 2 --train_n_way 2 --probe_epochs 1"
    amounts += " --get_mae_baseline 0 --ex_for_vis_tr 1 --ex_for_vis_te 1 --z_per_ex_vis 1"
    command(*data, *amounts.split(), program=program, cwd=tmp_path)
    assert "pretrain/loss_te" in metrics(run_folder(tmp_path))[-2]


def test_on_a_gpu_nothing_is_mixed_with_the_cpu():
    """By tensors that have a device but no values: this machine need not have a GPU."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            sizes = {"image_size": (28, 28), "ip_spec": tuple((p, "adain") for p in (3, "mask", 5))}
            model = Models.build(dataclasses.replace(Models.PRESETS["vit_demo"], **sizes))
            chunk = torch.zeros(3, 3, 28, 28), torch.rand(3, 49), torch.zeros(3, dtype=torch.int64)
        options = {"codes_per_image": 5, "codes_per_pass": 3}
        pixels = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
        results = [
            *TrainIMLE.choose_codes(model, *chunk, **options),
            *Samplers.choose_codes_surrogate(model, *chunk, **options, tries=4, rs_epsilon=0.1),
            *Validation.evaluate(model, *chunk, **options, mask_ratio=0.75).values(),
            Models.completions(model, *chunk[:2], model.sample_codes(chunk[2], 4), 0.75),
            model.encode(chunk[0], model.sample_codes(chunk[2], 1)[:, 0]),
            *Validation.prepare(model, pixels, chunk[2].cpu()),
        ]
        assert {result.device.type for result in results} == {"cuda"}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_input_found_late_ends_in_one_line_from_any_number_of_processes(tmp_path, processes):
    weights = tmp_path / "garbage.pth"
    weights.write_bytes(b"garbage")
    flags = [*TINY, "--finetune", 1, "--mae_weights", weights, "--save_folder", tmp_path]
    done = command(*flags, "--processes", processes, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "--mae_weights: " in done.stderr
    assert not (tmp_path / "models").exists(), "refused before anything was written"


@pytest.mark.slow
def test_metrics_that_are_shorter_than_the_checkpoint_knows_stay_readable(tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent.parent, tmp_path, dirs_exist_ok=True)
    folder = run_folder(tmp_path)
    (folder / "metrics.jsonl").unlink()
    for epochs in (3, 4):
        command("--resume", final_path(folder), "--epochs", epochs, "--save_folder", tmp_path)
    epochs = [r for r in metrics(folder) if "pretrain/loss_tr" in r]
    assert [r["pretrain/step"] for r in epochs] == [12, 16]


@pytest.mark.slow
def test_a_run_is_found_by_its_whole_uid_alone(tiny_run, tmp_path):
    command(*TINY, "--epochs", 1, "--uid", "x-1", "--save_folder", tmp_path)
    before = (run_folder(tmp_path) / "metrics.jsonl").read_bytes()
    done = command(*TINY, "--epochs", 1, "--uid", "1", "--save_folder", tmp_path)
    assert "new: " in done.stdout
    (other,) = (tmp_path / "models").glob("*-x-1")
    assert (other / "metrics.jsonl").read_bytes() == before


def copied_run(run, tmp_path, **args):
    """The folder of a copy of a run whose checkpoint and config.json hold these flags, too; a flag
    that is None is missing there."""
    shutil.copytree(run.parent.parent, tmp_path, dirs_exist_ok=True)
    folder = run_folder(tmp_path)
    content, config = final_state(folder), json.loads((folder / "config.json").read_text())
    for name, value in args.items():
        for flags in (content["args"], config["flags"]):
            flags.pop(name) if value is None else flags.update({name: value})
    checkpoints.save_checkpoint(final_path(folder), content)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SHORT_COMMAND = [*DEMO_DATA, "--uid", "tiny", "--num_workers", 0, "--epochs", 3]


@pytest.mark.slow
def test_flags_that_the_command_does_not_give_are_those_of_the_run_that_goes_on(tiny_run, tmp_path):
    folder = copied_run(tiny_run, tmp_path, mae_loss_weight=0.25, save_minutes=77.0)
    done = command(*SHORT_COMMAND, "--save_folder", tmp_path)
    assert "going on after step 8" in done.stdout
    args = final_state(folder)["args"]
    assert (args["mae_loss_weight"], args["lr"], args["arch"]) == (0.25, 1e-3, "vit_demo")
    assert args["save_minutes"] == 10, "a flag that may change has its default"
    done = command(*SHORT_COMMAND, "--lr", 2e-3, "--save_folder", tmp_path, check=False)
    assert done.returncode == 2 and "--lr was 0.001, is 0.002" in done.stderr


@pytest.mark.slow
def test_a_run_of_version_0_1_0_goes_on_with_the_loss_of_the_chosen_codes_alone(tiny_run, tmp_path):
    earlier = {"mae_loss_weight": None, "code_free_share": 0.0}
    folder = copied_run(tiny_run, tmp_path, **earlier)
    flags = [*SHORT_COMMAND, "--save_folder", tmp_path]
    done = command(*flags, "--mae_loss_weight", 1, check=False)
    assert done.returncode == 2 and "--mae_loss_weight was 0.0, is 1.0" in done.stderr
    command(*flags)
    assert final_state(folder)["args"]["mae_loss_weight"] == 0
    assert "pretrain/loss_tr_no_z" not in metrics(folder)[-1]


def test_a_run_with_a_flag_that_is_no_more_is_refused_in_one_line(tiny_run, tmp_path):
    folder = copied_run(tiny_run, tmp_path, code_free_share=0.5)
    uid = [*SHORT_COMMAND, "--save_folder", tmp_path]
    for flags in (uid, ["--resume", final_path(folder)]):
        done = command(*flags, check=False)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and "--code_free_share 0.5" in line and "0.1.0" in line


def test_a_run_goes_on_although_a_flag_is_newer_than_it(tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent.parent, tmp_path, dirs_exist_ok=True)
    path = final_path(run_folder(tmp_path))
    content = torch.load(path, weights_only=True)
    del content["args"]["clip_grad"]
    checkpoints.save_checkpoint(path, content)
    flags = [*TINY, "--steps_per_eval", 2, "--uid", "tiny", "--save_folder", tmp_path]
    assert "going on after step 8" in command(*flags, "--epochs", 3).stdout


@pytest.mark.slow
def test_a_slim_checkpoint_is_the_same_model_in_half_precision(tiny_run, tmp_path):
    program = (sys.executable, "scripts/slim_checkpoint.py")
    path = final_path(tiny_run)
    command(path, tmp_path / "slim.pt", program=program)
    assert (tmp_path / "slim.pt").stat().st_size < path.stat().st_size / 5
    model, slim = IO.load_model(path), IO.load_model(tmp_path / "slim.pt")
    assert slim.config == model.config
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(slim.state_dict()[name], weights, atol=1e-3, rtol=1e-3)
    for arguments in (("tests/golden/mae_tiny.pth", tmp_path / "x"), (path, tmp_path / "no/x")):
        done = command(*arguments, program=program, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_runs_are_listed_with_what_they_reached_and_drawn_together(tiny_run, tmp_path):
    program = (sys.executable, "scripts/runs.py")
    shutil.copytree(tiny_run, tmp_path / "runs/other")
    lines = (tiny_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    cut = "".join([*lines[:4], lines[4][:20]])  # in the second epoch, while a line is written
    (tmp_path / "runs/other/metrics.jsonl").write_text(cut)
    picture = tmp_path / "together.png"
    done = command(tiny_run.parent, tmp_path / "runs", "--plot", picture, program=program)
    heading, first, second, _ = done.stdout.splitlines()
    assert heading.split()[:2] == ["state", "steps"]
    assert first.split()[:2] == ["done", "8"] and tiny_run.name in first
    assert second.split()[0] == "stopped" and second.split()[-1] == "other"
    assert Image.open(picture).size[0] > 500
    done = command("scripts", program=program, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1

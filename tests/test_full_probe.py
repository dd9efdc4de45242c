"""The full probe: its heads equal MAE's recipe written out; its command goes on after a stop."""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO_DATA, ROOT, command
from PIL import Image
from safetensors.torch import load_file
from timm.optim import Lars

import Data
import IO
import LinearProbe
import Utils
from Augmentation import augment, normalize, resize
from internals import encoders, full_probe
from internals.heads import Head, Heads, lars, train_step
from internals.processes import Stopped
from internals.runs import read_metrics
from Utils import InputError, seeded

PROGRAM = (sys.executable, "LinearProbe.py")
MODEL = ["--model", "demo/imle_mnist.pt"]
CPU = ["--gpus", "cpu", "--num_workers", 0, "--sample_dtype", "float32"]
FEW = ["--train_n_shot", 12, "--epochs", 6, "--batch_size", 25]
CPU_DEVICE = torch.device("cpu")


def probe(*flags):
    """Runs a LinearProbe.py command; its result, the last line of the output."""
    done = command(*DEMO_DATA, *flags, program=PROGRAM)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def probe_here(monkeypatch, capsys):
    """As `probe`, in this process."""
    monkeypatch.chdir(ROOT)

    def run(*flags):
        LinearProbe.main([str(word) for word in (*DEMO_DATA, *flags)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def without_time(result):
    return {k: v for k, v in result.items() if k not in ("seconds", "folder")}


# -------------------------------------------------------------------------------------------------
# The heads.


def test_lars_is_that_of_mae():
    golden = load_file(ROOT / "tests/golden/mae_lars.safetensors")
    weight, bias = (torch.nn.Parameter(golden[name].clone()) for name in ("w0", "b0"))
    heads = Heads([Head("cls", 6.4, 0.0)], ("cls",), *weight.shape)
    heads.linears[0].weight, heads.linears[0].bias = weight, bias
    optimizer = lars(heads, [Head("cls", 6.4, 0.0)], images_per_step=256)
    for group in optimizer.param_groups:
        group["lr"] = group["base"]
    for step in range(4):
        weight.grad, bias.grad = golden[f"gw{step}"], golden[f"gb{step}"]
        optimizer.step()
        torch.testing.assert_close(weight.data, golden[f"w{step + 1}"])
        torch.testing.assert_close(bias.data, golden[f"b{step + 1}"])


def mae_rate(epoch, lr, warmup, epochs):
    """adjust_learning_rate as the paper's code has it, with min_lr 0."""
    if epoch < warmup:
        return lr * epoch / warmup
    return lr * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def plain_probe(features, labels, start, *, lr, wd, batches, steps, warmup, epochs, batch_size):
    """MAE's recipe for one head, by torch's modules: (losses of all steps, BatchNorm, linear)."""
    norm = torch.nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6)
    linear = torch.nn.Linear(features.shape[1], len(start))
    linear.weight.data.copy_(start)
    torch.nn.init.zeros_(linear.bias)
    groups = [
        {"params": [linear.weight], "weight_decay": wd, "always_adapt": True},
        {"params": [linear.bias], "weight_decay": 0.0},
    ]
    optimizer, losses = Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001), []
    for number, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = mae_rate(number / steps, lr * batch_size / 256, warmup, epochs)
        loss = F.cross_entropy(linear(norm(features[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, norm.eval(), linear


def rate_of(step, *, steps, warmup, epochs):
    """The rate of a full probe's gradient step, as a share of the base rate."""
    return Utils.learning_rate(
        step,
        base=1.0,
        minimum=0.0,
        start=0,
        ramp=warmup * steps,
        total=epochs * steps,
        cycles=1,
        ramp_from_minimum=True,
    )


@pytest.mark.parametrize("warmup", [0, 2, 10])
def test_the_schedule_is_that_of_mae_s_probe(warmup):
    rates = [rate_of(step, steps=7, warmup=warmup, epochs=12) for step in range(7 * 12)]
    expected = [mae_rate(step / 7, 1.0, warmup, 12) for step in range(7 * 12)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("images_per_pass", [1024, 5], ids=["whole", "in parts"])
def test_heads_side_by_side_learn_as_each_alone_by_mae_s_recipe(images_per_pass, monkeypatch):
    monkeypatch.setattr("internals.heads.IMAGES_PER_PASS", images_per_pass)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 2, 8, generator=generator) * 3 + 1
    labels = torch.randint(0, 7, (64,), generator=generator)
    batches = torch.stack([torch.randperm(64, generator=generator)[:32] for _ in range(12)])
    specs = [
        Head(pool, lr, wd)
        for pool in ("cls", "mean", "both")
        for lr, wd in ((0.5, 0.0), (8.0, 0.0), (8.0, 0.1))
    ]
    heads = Heads(specs, ("cls", "mean"), 7, 8, seed=3)
    optimizer = lars(heads, specs, images_per_step=32)
    starts = [linear.weight.detach().clone() for linear in heads.linears]
    losses = []
    for step, rows in enumerate(batches):
        rate = rate_of(step, steps=2, warmup=2, epochs=6)
        losses.append(train_step(heads, optimizer, features[rows], labels[rows], rate))
    columns = {"cls": features[:, 0], "mean": features[:, 1], "both": features.flatten(1)}
    metrics = heads.evaluate(features, labels)
    for number, (spec, start) in enumerate(zip(specs, starts, strict=True)):
        expected, norm, linear = plain_probe(
            *(columns[spec.pool], labels, start),
            lr=spec.lr,
            wd=spec.wd,
            batches=batches,
            steps=2,
            warmup=2,
            epochs=6,
            batch_size=32,
        )
        torch.testing.assert_close(torch.stack(losses)[:, number], torch.tensor(expected))
        torch.testing.assert_close(heads.linears[number].weight, linear.weight)
        torch.testing.assert_close(heads.linears[number].bias, linear.bias)
        logits = linear(norm(columns[spec.pool]))
        ranked = logits.argsort(dim=1, descending=True)
        assert metrics["top1"][number] == (ranked[:, 0] == labels).double().mean()
        assert metrics["top5"][number] == (ranked[:, :5] == labels[:, None]).any(1).double().mean()
        assert metrics["loss"][number] == pytest.approx(F.cross_entropy(logits, labels).item())
        assert torch.equal(heads.predict(features, number), ranked[:, 0])


def make_heads(specs, parts, seed=0):
    """Heads for 3 classes and features of width 4, and their optimizer."""
    heads = Heads(specs, parts, 3, 4, seed=seed)
    return heads, lars(heads, specs, images_per_step=256)


def test_heads_are_saved_whole():
    features, labels = torch.randn(16, 1, 4), torch.arange(16) % 3
    specs = [Head("mean", 1.0, 0.0)] * 2
    first, second = (make_heads(specs, ("mean",), seed) for seed in (0, 1))
    train_step(*first, features, labels, 1.0)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert torch.equal(*(train_step(*some, features, labels, 1.0) for some in (first, second)))
    assert torch.equal(*(heads.linears[1].weight for heads, _ in (first, second)))
    assert torch.equal(*(heads.norm.running_var for heads, _ in (first, second)))


def test_a_head_that_diverges_leaves_the_others_alone():
    features, labels = torch.randn(32, 1, 4), torch.arange(32) % 3
    specs, losses = [Head("cls", 1.0, 0.0), Head("cls", 1e30, 0.0)], []
    both, one = (make_heads(some, ("cls",)) for some in (specs, specs[:1]))
    for _ in range(20):
        losses.append([train_step(*some, features, labels, 1.0)[0] for some in (both, one)])
    torch.testing.assert_close(*torch.tensor(losses).T.unbind())
    metrics = both[0].evaluate(features, labels)
    assert not math.isfinite(metrics["loss"][1]) and math.isfinite(metrics["loss"][0])


def test_a_part_of_each_class_is_held_out():
    labels = torch.tensor([0] * 20 + [1] * 5 + [2] + [3] * 2)
    train, held_out = full_probe.split_images(labels, 0.2, seed=0)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(28))
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [4, 1, 0, 1]
    assert torch.equal(held_out, full_probe.split_images(labels, 0.2, seed=0)[1])
    assert not torch.equal(held_out, full_probe.split_images(labels, 0.2, seed=1)[1])


def test_the_best_head_is_chosen_on_images_held_out_never_by_validation():
    last = {"top1": [0.9, 0.1, 0.2], "held_out_top1": [0.2, 0.5, 0.49]}
    for n_held_out, losses, best in (
        (10**6, [0.0, 2.0, 1.0], 1),  # accuracies are certain
        (100, [0.0, 2.0, 1.0], 2),  # a point is within the error
        (100, [0.0, 2.0, math.nan], 1),
    ):
        assert full_probe.choose(last | {"held_out_loss": losses}, n_held_out) == best
    assert full_probe.choose({"top1": [0.5]}, 0) == 0


def test_the_worst_classes_and_what_they_are_taken_for():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    predicted = torch.tensor([0, 0, 3, 3, 2, 3, 3, 3])
    rows, columns, shares = full_probe.confusion(labels, predicted, list("abcd"), most=2)
    assert (rows, columns) == (["b", "c"], ["b", "c", "d"])
    assert shares == [[0, 0, 1], [0, 0.5, 0.5]]


# -------------------------------------------------------------------------------------------------
# The command.


@pytest.fixture(scope="module")
def demo_features():
    """(features (n, 2, C), labels) of the demo's training images, 50 of each class, as a command's
    --train_n_shot 50 chooses them, and of its validation images, alone."""
    model, sets = encoders.load_encoder(str(ROOT / "demo/imle_mnist.pt")), []
    train = Data.few_shot(Data.open_images(ROOT / "demo/mnist_train.tar"), -1, 50, 0)
    for images in train, Data.open_images(ROOT / "demo/mnist_val.tar"):
        indices = torch.arange(len(images))
        loader = Data.ImageLoader(images, resize((28, 28)), num_workers=0)
        options = {"device": CPU_DEVICE, "batch_size": 250, "parts": ("cls", "mean")}
        features = encoders.extract(model, loader, indices, indices, **options)
        sets.append((features, torch.as_tensor(images.targets)))
    return sets


def test_the_command_follows_mae_s_recipe_step_by_step(tmp_path, probe_here, demo_features):
    flags = [*MODEL, *CPU, "--use_augs", 0, "--lrs", 2, "--save_folder", tmp_path]
    flags += ["--train_n_shot", 50, "--epochs", 6, "--warmup_epochs", 2, "--batch_size", 120]
    result = probe_here(*flags)
    (train, labels), (test, truth) = ((x[:, 0], y) for x, y in demo_features)
    heads = Heads([Head("cls", 2.0, 0.0)], ("cls",), 10, 128)
    orders = [
        Utils.permutation(500, Utils.mix_seeds(0, Utils.Stream.PROBE, epoch)) for epoch in range(6)
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    losses, norm, linear = plain_probe(
        *(train, labels, heads.linears[0].weight.detach()),
        lr=2.0,
        wd=0.0,
        steps=4,
        warmup=2,
        epochs=6,
        batch_size=120,
        batches=[order[i * 120 : i * 120 + 120] for order in orders for i in range(4)],
    )
    ranked = linear(norm(test)).argsort(dim=1, descending=True)
    assert result["top1"] == (ranked[:, 0] == truth).double().mean()
    assert result["top5"] == (ranked[:, :5] == truth[:, None]).any(1).double().mean()
    assert result["knn"] == encoders.nearest_neighbors(train, labels, test, truth)
    assert (result["n_train"], result["n_held_out"], result["n_val"]) == (500, 0, 1000)
    assert (result["pool"], result["lr"], result["epochs"]) == ("cls", 2.0, 6)
    history = json.loads(next(tmp_path.glob("probes/*/result.json")).read_text())["history"]
    means = np.reshape(losses, (6, 4)).mean(1)
    assert [record["training_loss"][0] for record in history] == pytest.approx(
        means.tolist(), rel=1e-4
    )


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_both_probes_are_within_a_point_of_logistic_regression(pool, demo_features):
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    part = ("cls", "mean").index(pool)
    (train, labels), (test, truth) = ((x[:, part], y) for x, y in demo_features)
    scaler = preprocessing.StandardScaler().fit(train)
    inputs, inputs_test, reached = scaler.transform(train), scaler.transform(test), []
    for strength in (0.01, 0.1, 1.0):  # as many looks at the test set as the heads have
        classifier = linear_model.LogisticRegression(C=strength, max_iter=1000)
        reached.append(classifier.fit(inputs, labels).score(inputs_test, truth))
    specs = [Head("cls", lr, 0.0) for lr in IO.probe_parser().get_default("lrs")]
    batch = min(512, len(train) // 8)
    heads = Heads(specs, ("cls",), 10, 128)
    optimizer, step = lars(heads, specs, images_per_step=batch), 0
    for epoch in range(90):
        rows = Utils.permutation(len(train), epoch).split(batch)
        for part in rows:
            rate = rate_of(step, steps=len(rows), warmup=10, epochs=90)
            train_step(heads, optimizer, train[part][:, None], labels[part], rate)
            step += 1
    assert max(heads.evaluate(test[:, None], truth)["top1"]) > max(reached) - 0.01
    fast = LinearProbe.linear_probe(train, labels, test, truth)
    assert fast["top1"] > max(reached) - 0.02


def test_a_probe_leaves_a_table_a_picture_and_a_row_per_run(tmp_path, probe_here):
    flags = [*MODEL, *CPU, *FEW, "--use_augs", 0, "--save_folder", tmp_path]
    flags += ["--lrs", 1, 3, "--wds", 0, 0.01, "--pools", "cls", "mean", "both"]
    first, again = probe_here(*flags), probe_here(*flags)
    assert without_time(first) == without_time(again)
    table = first["heads"]
    assert len({(row["pool"], row["lr"], row["wd"]) for row in table}) == 12
    best = table[first["best"]]
    assert best["held_out_top1"] >= max(row["held_out_top1"] for row in table) - 0.16
    assert all(first[key] == best[key] for key in ("top1", "top5", "pool", "lr", "wd"))
    assert (first["n_train"], first["n_held_out"]) == (120, 10)
    fast = ["--fast", 1, "--val_n_shot", 4, "--probe_epochs", 1, "--save_folder", tmp_path]
    probe_here(*MODEL, *CPU, *fast)
    with open(tmp_path / "probes/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["probe"] for row in rows] == ["full", "full", "fast"]
    assert all(float(row["top1"]) > 0 and row["model"] == MODEL[1] for row in rows)
    folder = tmp_path / "probes" / first["folder"].rsplit("/")[-1]
    assert {"config.json", "metrics.jsonl", "probe.png", "result.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not any((folder / "checkpoints").iterdir())  # a probe that is done does not go on
    assert not (folder / "curves.png").exists()
    assert Image.open(folder / "probe.png").size[0] > 500
    records = read_metrics(folder)
    assert [record["epoch"] for record in records] == list(range(6))
    assert records[-1]["top1"] == [row["top1"] for row in table]


def test_files_of_a_probe_whose_head_diverges_are_valid_json(tmp_path, probe_here):
    flags = [*MODEL, *CPU, *FEW, "--use_augs", 0, "--save_folder", tmp_path]
    assert probe_here(*flags, "--lrs", 1, 1e30)["best"] == 0
    (folder,) = tmp_path.glob("probes/*/")
    result = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    for history in result["history"], records:
        loss, diverged = history[-1]["training_loss"]
        assert math.isfinite(loss) and diverged is None


@pytest.fixture(scope="module")
def prime_images(tmp_path_factory):
    """A folder with 101 validation images, a prime number."""
    folder = tmp_path_factory.mktemp("prime")
    with tarfile.open(ROOT / "demo/mnist_val.tar") as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        for member in [*members[::10], members[1]]:
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
    (root,) = {path.parent.parent for path in folder.rglob("*.png")}
    return root


@pytest.mark.slow
@pytest.mark.parametrize("fast, n", [(0, 2), (0, 3), (1, 3)])
def test_one_two_and_three_processes_give_the_same_result(
    tmp_path, probe_here, prime_images, fast, n
):
    flags = [*MODEL, *CPU, "--train_n_shot", 7, "--fast", fast, "--data_val", prime_images]
    flags += ["--save_folder", tmp_path, "--probe_bs_val", 16]
    flags += ["--probe_epochs", 3] if fast else ["--epochs", 3, "--batch_size", 20, "--lrs", 3, 9]
    alone = probe_here(*flags)
    assert alone["n_val"] == 101
    assert without_time(probe(*flags, "--processes", n)) == without_time(alone)


def test_each_epoch_crops_an_image_anew_by_seed_epoch_and_image_alone():
    model = encoders.load_encoder(str(ROOT / "demo/imle_mnist.pt"))
    images = Data.open_images(ROOT / "demo/mnist_val.tar")
    transform, indices = augment((28, 28), 0.08), torch.tensor([3, 500, 77, 9, 640, 12, 33])
    encoder = full_probe.Encoder(
        model,
        CPU_DEVICE,
        parts=("mean",),
        n_codes=1,
        images_per_pass=2,
        use_augs=True,
        seed=4,
        num_workers=0,
        loader_timeout=0,
        stop=StopAfter(-1),
    )
    batches = full_probe.Batches(encoder, images, indices, batch_size=3, keep_gb=1)
    batches.labels = torch.arange(7)  # as names of the images
    epochs = [list(batches(epoch, first=0)) for epoch in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [2, 2]
    (again,) = batches(1, first=1)  # as after a stop
    assert torch.equal(again[0], epochs[1][1][0])
    for epoch, batches_of_epoch in enumerate(epochs):
        names = torch.cat([labels for _, labels in batches_of_epoch])
        assert len(names.unique()) == 6
        for name, feature in zip(
            names, torch.cat([features for features, _ in batches_of_epoch]), strict=True
        ):
            seed = encoder.seeds(epoch, indices[name])
            with seeded(seed):
                image = transform(images.load(int(indices[name])))[None]
            codes = model.sample_codes(seed[None], 1)[:, 0]
            with torch.no_grad():
                tokens = model.encode(normalize(image), codes)
            torch.testing.assert_close(feature, tokens[:, 1:].mean(1), atol=1e-4, rtol=1e-4)


def test_features_that_are_too_many_to_keep_are_computed_again(tmp_path, probe_here):
    flags = [*MODEL, *CPU, *FEW, "--use_augs", 0, "--save_folder", tmp_path, "--lrs", 2]
    kept, again = probe_here(*flags), probe_here(*flags, "--keep_gb", 0)
    assert again["top1"] == pytest.approx(kept["top1"], abs=0.003)
    histories = [
        json.loads(path.read_text())["history"] for path in tmp_path.glob("probes/*/result.json")
    ]
    assert len(histories) == 1  # --keep_gb makes no other probe


class StopAfter:
    """A StopSignal that stops the probe at its check number `checks`."""

    def __init__(self, checks):
        self.left = checks

    def asked(self):
        return False

    def check(self):
        self.left -= 1
        if self.left == 0:
            raise Stopped("stopped", 0)


@pytest.mark.parametrize("use_augs", [0, 1])
def test_a_probe_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch, use_augs):
    monkeypatch.chdir(ROOT)

    def run(folder, checks):
        argv = [*DEMO_DATA, *MODEL, *CPU, "--train_n_shot", 4, "--epochs", 3, "--lrs", 1, 5]
        argv += ["--batch_size", 5, "--use_augs", use_augs, "--save_folder", folder]
        argv += ["--probe_ignore_z", 0, "--train_n_way", 4, "--val_n_way", 4]
        flags = IO.parse_probe_flags([str(word) for word in argv])
        images = Data.open_pair(
            flags.data_tr, flags.data_val, n_way=4, n_shot=4, seed=0, same_classes=True
        )
        model = encoders.load_encoder(flags.model)
        return LinearProbe.run_full_probe(flags, model, *images, CPU_DEVICE, StopAfter(checks))

    whole = run(tmp_path / "whole", -1)
    torch.manual_seed(7)  # the global random state does not matter
    for _ in range(2):  # inside an epoch of two steps, and at its end
        with pytest.raises(Stopped, match="stopped after step .*, saved in"):
            run(tmp_path / "parts", 3 if use_augs else 4)  # one check after each set of features
    parts = run(tmp_path / "parts", -1)
    assert without_time(parts) == without_time(whole)
    histories = [
        json.loads(next((tmp_path / name).glob("probes/*/result.json")).read_text())["history"]
        for name in ("whole", "parts")
    ]
    assert histories[0] == histories[1] and len(histories[0]) == 3


def test_a_probe_that_was_stopped_goes_on_with_its_images_only(tmp_path):
    archive = tmp_path / "train.tar"
    shutil.copy(ROOT / DEMO_DATA[1], archive)
    (tmp_path / "link.tar").symlink_to(archive)

    def run(checks, data_tr=archive, **changes):
        argv = ["--data_tr", data_tr, "--data_val", ROOT / DEMO_DATA[3], "--model", ROOT / MODEL[1]]
        argv += [*CPU, "--epochs", 2, "--lrs", 1, "--batch_size", 50, "--use_augs", 0]
        argv += ["--train_n_shot", 10, "--save_folder", tmp_path]
        flags = IO.parse_probe_flags([str(word) for word in argv])
        vars(flags).update(changes)
        images = Data.open_pair(flags.data_tr, flags.data_val, n_shot=10)
        model = encoders.load_encoder(flags.model)
        return LinearProbe.run_full_probe(flags, model, *images, CPU_DEVICE, StopAfter(checks))

    for data_tr in (archive, tmp_path / "link.tar"):  # after one and two of four steps
        with pytest.raises(Stopped, match="stopped after step"):
            run(4, data_tr)
    assert len(list(tmp_path.glob("probes/*/config.json"))) == 1
    shutil.copy(ROOT / DEMO_DATA[3], archive)
    with pytest.raises(InputError, match=r"other images: --data_tr had \d+ images, has \d+;"):
        run(-1)
    assert run(-1, force_resume=1)["n_train"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_stops_the_command_which_then_goes_on(tmp_path, processes):
    flags = [*DEMO_DATA, *MODEL, *CPU, "--train_n_shot", 20, "--epochs", 40, "--batch_size", 40]
    flags += ["--lrs", 3, "--save_folder", tmp_path, "--processes", processes]
    running = subprocess.Popen(
        [*PROGRAM, *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in running.stdout:
        if line.startswith("epoch "):
            running.send_signal(signal.SIGTERM)
            break
    output = running.stdout.read()
    assert running.wait(60) == 0 and re.search(r"stopped after step (\d+), saved in", output), (
        output
    )
    done = command(*flags, program=PROGRAM)
    assert "going on after step" in done.stdout
    stopped, whole = json.loads(done.stdout.splitlines()[-1]), tmp_path / "whole"
    flags[flags.index(tmp_path)] = whole
    assert without_time(probe(*flags[4:])) == without_time(stopped)

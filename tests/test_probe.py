"""Linear probes: on made-up features, and on a checkpoint by the real command."""

import json
import random
import re
import sys

import pytest
import torch
from conftest import DEMO_DATA, ROOT, command
from PIL import Image

import Data
import IO
import LinearProbe
from Augmentation import normalize, resize
from internals.encoders import effective_rank, extract


def blobs(n, spread, seed, n_classes=6, dim=16):
    """n points around n_classes centres, with their classes."""
    centres = torch.randn(n_classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, n_classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, dim, generator=generator), labels


def probe(spread, **options):
    return LinearProbe.linear_probe(*blobs(600, spread, 1), *blobs(300, spread, 2), **options)


def test_accuracies_are_high_with_true_labels_and_low_with_shuffled_ones():
    good = probe(0.3, epochs=20)
    assert good["top1"] > 0.98 and good["knn"] > 0.98 and good["top5"] >= good["top1"]
    features, labels = blobs(600, 0.3, 1)
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(3))]
    bad = LinearProbe.linear_probe(features, shuffled, *blobs(300, 0.3, 2), epochs=20)
    assert bad["top1"] < 0.5


def test_the_head_reaches_the_best_linear_classifier():
    """Against full-batch logistic regression to convergence."""
    features, labels = blobs(600, 1.5, 1)
    test, truth = blobs(300, 1.5, 2)
    mean, std = features.mean(0), features.std(0)
    x, y = (features - mean) / std, (test - mean) / std
    head = torch.nn.Linear(16, 6)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(x), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (head(y).argmax(1) == truth).float().mean().item()
    assert probe(1.5, epochs=50)["top1"] == pytest.approx(expected, abs=0.02)


def test_the_rate_of_the_head_is_the_one_given():
    assert probe(1.5, lr=0.0, epochs=2)["top1"] < 0.35 < probe(1.5, lr=1e-2, epochs=2)["top1"]


def test_probing_is_seeded_on_its_own():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert probe(1.0, epochs=3) == probe(1.0, epochs=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_nearest_neighbours_equal_a_loop_over_the_points():
    (features, labels), (test, truth) = blobs(200, 1.0, 1), blobs(50, 1.0, 2)
    right = 0
    for point, true in zip(test, truth, strict=True):
        similarity = torch.cosine_similarity(point[None], features)
        votes = torch.zeros(6)
        for i in similarity.argsort(descending=True)[:20].tolist():
            votes[labels[i]] += (similarity[i] / 0.07).exp()
        right += int(votes.argmax() == true)
    accuracy = LinearProbe.nearest_neighbors(features, labels, test, truth)
    assert accuracy == pytest.approx(right / 50)


def test_rankme_counts_the_directions_that_features_fill():
    directions = torch.linalg.qr(torch.randn(40, 12)).Q  # 12 orthonormal columns
    for n in (1, 5, 12):
        features = 3 * directions[:, :n] @ torch.linalg.qr(torch.randn(16, n)).Q.T
        assert effective_rank(features) == pytest.approx(n, rel=1e-4)
    assert effective_rank(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-4)
    x = torch.randn(50, 8) * torch.arange(1, 9)
    shares = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
    assert effective_rank(x) == pytest.approx(
        (-(shares * shares.log()).sum()).exp().item(), rel=1e-4
    )


@pytest.mark.parametrize("global_pool", [True, False])
@pytest.mark.parametrize("ignore_codes", [True, False])
def test_features_are_those_of_each_image_alone(global_pool, ignore_codes):
    model = IO.load_model(ROOT / "demo/imle_mnist.pt")
    images = Data.open_images(ROOT / "demo/mnist_val.tar")
    transform = resize((28, 28))
    indices, seeds = torch.tensor([3, 500, 3, 999]), torch.tensor([1, 2, 1, 4])
    features = extract(
        model,
        Data.ImageLoader(images, transform, num_workers=0),
        indices,
        seeds,
        device=torch.device("cpu"),
        batch_size=3,
        parts=("mean",) if global_pool else ("cls",),
        n_codes=0 if ignore_codes else 1,
    )[:, 0]
    for feature, index, seed in zip(features, indices.tolist(), seeds, strict=True):
        image = normalize(transform(images[index][0])[None])
        codes = None if ignore_codes else model.sample_codes(seed[None], 1)[:, 0]
        tokens = model.encode(image, codes)[0]
        expected = tokens[1:].mean(0) if global_pool else tokens[0]
        torch.testing.assert_close(feature, expected, atol=1e-4, rtol=1e-4)


def test_the_command_prints_its_result_as_json_on_the_last_line(tmp_path):
    flags = [*DEMO_DATA, "--fast", 1, "--use_augs", 0, "--val_n_shot", 40, "--probe_epochs", 20]
    flags += ["--model", "demo/imle_mnist.pt", "--gpus", "cpu", "--probe_lr", "3e-3"]
    flags += ["--save_folder", tmp_path]
    done = command(*flags, program=(sys.executable, "LinearProbe.py"))
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["n_train"] == 400 and result["n_val"] == 1000
    assert result["model"] == "demo/imle_mnist.pt"
    assert 0.7 < result["top1"] <= result["top5"] <= 1 and 0.6 < result["knn"] < 1


def test_the_fast_probe_leaves_random_numbers_and_the_model_s_mode_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    images = Data.open_pair("demo/mnist_train.tar", "demo/mnist_val.tar")
    probe = LinearProbe.FastProbe(
        *images,
        image_size=(28, 28),
        device=torch.device("cpu"),
        n_way=3,
        n_shot=4,
        augs_per_image=2,
        images_per_pass=256,
        n_codes=1,
        lr=1e-3,
        epochs=2,
        batch_size=16,
        num_workers=2,
    )
    assert probe.sizes == (24, 300)
    model, results = IO.load_model("demo/imle_mnist.pt"), []
    for mode in True, False:
        torch.manual_seed(5)
        states = torch.get_rng_state(), random.getstate()
        results.append(probe(model.train(mode)))
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        assert all(module.training == mode for module in model.modules())
    assert results[0] == results[1]


def copy_classes(path, names):
    """A folder with an image of each class of these names."""
    for name in names:
        (path / name).mkdir(parents=True)
        Image.new("RGB", (28, 28)).save(path / name / "0.png")
    return path


MODEL = ["--model", "demo/imle_mnist.pt"]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--model", "nowhere.pt"], "--model"),
        (["--model", "demo"], "--model"),
        (["--model", "decoder.pt"], "--model: .*decoder.pt: not the weights of"),
        (["--model", "untrained:nowhere.pt"], "--model: nowhere.pt does not exist"),
        (["--model", "timm:resnet188"], "--model: timm has no .*mean timm:resnet18?"),
        (["--model", "torchvision:resnet17"], "--model: torchvision has no .*resnet18?"),
        (["--model", "timm:resnet18=tests/golden/mae_tiny.pth"], "--model: .* does not fit"),
        (["--model", "untrained:torchvision:vit_b_16", "--input_size", 28], "--input_size 28"),
        ([*MODEL, "--input_size", 30], "--model: .*multiples of 4"),
        ([*MODEL, "--data_val", "nowhere"], "--data_val"),
        ([*MODEL, "--data_val", "other"], "--data_val: .*no class a, which this has"),
        ([*MODEL, "--data_val", "fewer"], "--data_val: no class 2, .*(8 such)"),
        ([*MODEL, "--train_n_way", 1], "--data_tr"),
        ([*MODEL, "--data_tr", "single", "--data_val", "single"], "--data_tr: .*two classes"),
        ([*MODEL, "--train_n_shot", 401], "--train_n_shot: 401 images a class wanted"),
        ([*MODEL, "--train_n_shot", 1], "--hold_out: .*second image"),
        ([*MODEL, "--probe_codes", 2], "--probe_codes 2: needs --probe_ignore_z 0"),
        ([*MODEL, "--lrs", 1, 1], "--lrs 1.0 1.0: the same value twice"),
        ([*MODEL, "--epochs", 2, "--warmup_epochs", 3], "--warmup_epochs 3: at most"),
        (["--model", "pixels", "--pools", "cls", "mean"], "--pools cls: .*one vector"),
        ([*MODEL, "--save_folder", "/dev/null"], "--save_folder: cannot write"),
    ],
)
@pytest.mark.parametrize("fast", [0, 1])
def test_bad_input_ends_in_one_line(flags, named, fast, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if fast and any(str(flag) in ("--lrs", "--pools", "--epochs", "1") for flag in flags[2:]):
        pytest.skip("of the full probe")
    state = torch.load("demo/imle_mnist.pt", weights_only=True)
    state["model"] = {k: v for k, v in state["model"].items() if k.startswith("decoder")}
    torch.save(state, tmp_path / "decoder.pt")
    digits = [str(i) for i in range(10)]
    copy_classes(tmp_path / "other", [*digits, "a"])
    copy_classes(tmp_path / "fewer", ["0", "1"])
    copy_classes(tmp_path / "single", ["0"])
    made = ("decoder.pt", "other", "fewer", "single")
    flags = [str(tmp_path / flag) if flag in made else str(flag) for flag in flags]
    common = [*DEMO_DATA, "--gpus", "cpu", "--save_folder", str(tmp_path), "--fast", str(fast)]
    with pytest.raises(SystemExit) as ended:
        LinearProbe.main([*common, *flags])
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(line.splitlines()) == 1 and re.search(named, line), line

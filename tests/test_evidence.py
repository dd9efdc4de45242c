"""What scripts/figure.py and scripts/what_codes_add.py compute, against counting it out."""

import itertools
import sys

import figure  # noqa: E402 (the line above)
import pytest
import torch
import what_codes_add  # noqa: E402
from conftest import TINY, command, metrics, run_folder
from matplotlib.figure import Figure
from PIL import Image

import Models
from internals import runs

IMPLICIT = Models.ModelConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, ip_spec=((0, "adain"),), latent_dim=4)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_the_best_of_k_is_the_mean_over_all_choices(k):
    values = torch.rand(3, 6, dtype=torch.float64)
    choices = list(itertools.combinations(range(6), k))
    counted = torch.stack([values[:, list(c)].min(1).values for c in choices]).mean(0)
    torch.testing.assert_close(what_codes_add.best_of(k, values), counted)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_classes_among_k_completions_are_the_mean_over_all_choices(k):
    classes = torch.tensor([[0, 2, 2, -1, 1], [-1, -1, -1, -1, 2]])
    labels, losses = torch.tensor([2, 0]), torch.rand(2, 5)
    found = what_codes_add.measure(losses, losses[:, 0], classes, labels, 3)
    choices = list(itertools.combinations(range(5), k))
    sets = [[set(row[list(c)].tolist()) - {-1} for c in choices] for row in classes]
    distinct = sum(len(shown) for row in sets for shown in row) / len(choices) / 2
    pairs = zip(sets, labels.tolist(), strict=True)
    true = sum(label in shown for row, label in pairs for shown in row) / len(choices) / 2
    at = found["k"].index(k)
    assert found["classes"][at] == pytest.approx(distinct)
    assert found["true"][at] == pytest.approx(true)


def test_codes_that_win_are_counted():
    losses = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.4, 0.6], [0.1, 0.7, 0.8], [0.2, 0.1, 0.4]])
    none = torch.full((4, 3), -1)
    found = what_codes_add.measure(losses, losses[:, 0], none, torch.zeros(4).long(), 2)
    assert found["winners"] == 2 and found["effective"] == pytest.approx(2)
    assert found["plausible"] == found["true"][0] == 0


def test_a_class_that_the_nearest_code_gives_away_is_told_from_the_code():
    model, labels = Models.build(IMPLICIT), torch.randint(4, (400,))
    losses = 1 + torch.rand(400, 8)
    says_nothing = what_codes_add.class_by_code(model, losses, labels, seed=0)
    losses[torch.arange(400), labels] = 0  # each class has a code of its own
    assert what_codes_add.class_by_code(model, losses, labels, seed=0) == 1 > 2 * says_nothing


@pytest.mark.slow
def test_the_figure_s_table_has_means_and_ranges_over_seeds(tmp_path, capsys):
    for uid in ("a-0", "a-1", "b-1"):
        command(*TINY, "--ignore_z", 1, "--seed", uid[-1], "--uid", uid, "--save_folder", tmp_path)
    arms = figure.arms(tmp_path)
    assert {arm: len(runs) for arm, runs in arms.items()} == {"a": 2, "b": 1}
    figure.main([str(tmp_path), "--names", "b=mine", "--out", str(tmp_path / "figure.png")])
    _, _, first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("| mine | 1 ") and second.startswith("| a    | 2 ")
    losses = [metrics(run)[-2]["pretrain/loss_te"] for run in arms["a"].values()]
    low, high = sorted(losses)
    assert f"{sum(losses) / 2:.3f} ({low:.3f}-{high:.3f})" in second
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_figure_has_a_panel_for_each_metric_that_the_runs_have(tmp_path, monkeypatch):
    steps = {step: {"pretrain/loss_te": 1.0, "time/training_seconds": step} for step in (0, 8, 16)}
    panels, subplots = [], Figure.subplots
    keep = lambda self, *shape, **options: panels.append(shape) or subplots(self, *shape, **options)  # noqa: E731
    monkeypatch.setattr(Figure, "subplots", keep)
    for over in (["steps"], ["steps", "time"]):
        figure.draw({"a": [steps, steps]}, {}, tmp_path / "figure.png", over)
    probe = {"fast_linear_probe/acc_te": 0.5, "fast_linear_probe/knn_te": 0.5}
    figure.draw({"a": [{8: steps[8] | probe}]}, {}, tmp_path / "figure.png", ["steps"])
    assert panels == [(1, 1), (2, 1), (1, 3)]


@pytest.mark.slow
def test_runs_without_labels_have_no_judge(tmp_path):
    (tmp_path / "flat").mkdir()
    for number, image in enumerate(torch.randint(256, (40, 28, 28, 3), dtype=torch.uint8)):
        Image.fromarray(image.numpy()).save(tmp_path / f"flat/{number}.png")
    data = ["--data_tr", tmp_path / "flat", "--data_val", tmp_path / "flat"]
    command(*TINY, *data, "--epochs", 0, "--uid", "a-0", "--save_folder", tmp_path)
    done = command(tmp_path, program=(sys.executable, "scripts/what_codes_add.py"), check=False)
    assert done.returncode == 2
    assert "a judge of completions needs at least two classes" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_folder_without_such_runs_is_refused_in_one_line(tmp_path):
    for script in ("figure.py", "what_codes_add.py"):
        done = command(tmp_path, program=(sys.executable, f"scripts/{script}"), check=False)
        assert done.returncode == 2
        assert "no runs with a --uid of the form ARM-SEED" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_training_time_leaves_out_validation_and_goes_on_with_the_run(tmp_path):
    flags = [*TINY, "--steps_per_eval", 4, "--save_folder", tmp_path, "--uid", "timed"]
    for epochs in (2, 3):
        command(*flags, "--epochs", epochs)
    records = runs.read_metrics(run_folder(tmp_path))
    times = [record["time/training_seconds"] for record in records]
    assert times == sorted(times) and times[0] < times[-1]
    epochs = sum(record.get("time/epoch_seconds", 0) for record in records)
    validation = sum(record.get("time/validation_seconds", 0) for record in records)
    assert times[-1] < epochs - 0.5 * validation

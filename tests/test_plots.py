"""Curves, the picture of a probe, and the list of runs."""

import csv
import json
import re
import sys

import numpy as np
import pytest
import runs
import torch
from conftest import command
from matplotlib.figure import Figure
from PIL import Image

from internals import plots

NAME = r"a$\frac_b$"  # no formula


@pytest.fixture
def texts(monkeypatch):
    """The texts of each figure that is saved, by its number."""
    saved = []

    def savefig(figure, *args, **options):
        saved.append([text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text"))])
        return save(figure, *args, **options)

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def records(*metrics):
    """Records of three steps with these metrics."""
    return [{"pretrain/step": step, **dict.fromkeys(metrics, 0.1 * step)} for step in (0, 5, 9)]


@pytest.mark.parametrize("n_runs", [1, 3])
@pytest.mark.parametrize("n_panels", [0, 1, 5, 13])
def test_curves_have_any_number_of_panels_lines_and_runs(
    monkeypatch, tmp_path, texts, n_runs, n_panels
):
    curves = {
        f"panel {i}": {f"m/{i}/{j}": f"line {i}.{j}" for j in range(i + 1)} for i in range(n_panels)
    }
    monkeypatch.setattr(plots, "CURVES", curves)
    metrics = [key for keys in curves.values() for key in keys]
    runs = {f"{NAME}{i}": records(*metrics) for i in range(n_runs)}
    plots.draw_curves(runs, tmp_path / "curves.png", title=NAME * 30)
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    (found,) = texts
    assert set(curves) <= set(found) and ("nothing recorded yet" in found) == (not n_panels)
    lines = {label for keys in curves.values() for label in keys.values()}
    assert lines - {"line 0.0"} <= set(found)
    assert n_runs == 1 or set(runs) <= set(found)


def test_a_metric_that_is_new_is_drawn_in_a_panel_of_its_own_and_listed(tmp_path, texts):
    known = records(
        "epoch", "time/validation_seconds", "pretrain/loss_te", "pretrain/loss_baseline"
    )
    probed = {"fast_linear_probe/x.y/acc_te": 0.75, "fast_linear_probe/x.y/knn_te": 0.5}
    values = {
        **probed,
        "pretrain/rankme": 3.21,
        "mine/fid": 12.5,
        "mine/bad": None,
        "images/x": "images/x.png",
        "mine/text": "new",
    }
    content = [*known, {"pretrain/step": 9, **values}]
    assert plots.other_metrics(content) == [*probed, "mine/fid"]
    plots.draw_curves({"run": content}, tmp_path / "curves.png")
    (found,) = texts
    assert {"reconstruction loss", "mine/fid", "effective rank of features"} <= set(found)
    assert {"validation accuracy, x.y", "linear probe", "nearest neighbours"} <= set(found)
    assert not any(re.match("mine/[bt]|time|epoch|images|.*baseline", text) for text in found)
    lines = "".join(json.dumps(record) + "\n" for record in content)
    (tmp_path / "metrics.jsonl").write_text(lines)
    done = command(tmp_path, program=(sys.executable, "scripts/runs.py"))
    heading, row = done.stdout.splitlines()
    assert {"mine/fid", "rank"} <= set(heading.split()) and {"12.5", "3.2"} <= set(row.split())


def a_run(path, flags, **values):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"flags": flags}))
    record = {"epoch": 0, "pretrain/step": 9, "time/epoch_seconds": 61.2, **values}
    (path / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_the_table_of_runs_has_the_flags_that_differ_and_any_order(tmp_path, capsys):
    flags = {"uid": "x", "gpus": ["cpu"], "lr": 0.1, "ip_spec": ["3", "adain"], "wd": 0.5}
    a_run(tmp_path / "b", flags, **{"pretrain/loss_te": 0.123456})
    a_run(tmp_path / "a", {**flags, "uid": "y", "lr": 0.02, "ip_spec": []}, **{"mine/fid": 3})
    a_run(tmp_path / "c", {**flags, "gpus": ["0"], "lr": 10.0}, **{"pretrain/loss_te": 0.012})

    def table(*options):
        runs.main([str(tmp_path), *map(str, options)])
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    heading, *rows = table("--sort", "lr", "--csv", tmp_path / "table.csv")
    assert heading[-4:] == ["time", "lr", "ip_spec", "run"] and "wd" not in heading
    assert [row[-1] for row in rows[:3]] == ["a", "b", "c"]
    assert rows[1][-5:] == ["s", "0.1", "3", "adain", "b"]
    for key in ("pretrain/loss_te", "loss, mean"):
        assert [row[-1] for row in table("--sort", key)[1:]] == ["a", "c", "b"], key
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["lr"] for row in rows] == ["0.02", "0.1", "10.0"]
    assert rows[1]["pretrain/loss_te"] == "0.123456" and rows[0]["pretrain/loss_te"] == ""
    assert rows[1]["ip_spec"] == "3 adain" and rows[1]["seconds"] == "61.2"
    assert rows[0]["run"] == str(tmp_path / "a") and rows[0]["mine/fid"] == "3"
    for options, message in (
        (["--sort", "pretrain/los_te"], "--sort pretrain/los_te: .*mean 'pretrain/loss_te"),
        (["--csv", tmp_path / "no/x.csv"], "--csv: cannot write .*No such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            table(*options)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and re.search(message, line), line


def test_class_names_and_titles_are_drawn_as_they_are(tmp_path, texts):
    heads = [{"pool": "cls", "lr": 0.1, "wd": 0.0}, {"pool": "mean", "lr": 1.0, "wd": 0.0}]
    result = {"heads": heads, "best": 1, "model": NAME, "top1": 0.5}
    history = [{"top1": [0.1, 0.2], "top5": [0.5, 0.6]}] * 2
    confusion = [NAME, "_b"], [NAME, "_b", "c"], [[0.5, 0.5, 0.0], [0.0, 0.8, 0.2]]
    plots.draw_probe(tmp_path / "probe.png", result, history, confusion)
    assert Image.open(tmp_path / "probe.png").size[0] > 500
    (found,) = texts
    assert {NAME, "_b", "c", f"{NAME}: top-1 50.00%"} <= set(found)


def test_labels_of_a_grid_stand_below_their_cells_and_are_cut_to_their_width():
    cells = torch.full((2, 2, 3, 96, 96), 255, dtype=torch.uint8)
    labels = [["", "W" * 99], ["1\n2", ""]]
    plain, labelled = (
        np.asarray(plots.picture_grid(cells, ["", ""], "", labels=some)) for some in ((), labels)
    )
    assert labelled.shape == (plain.shape[0] + 2 * 18, *plain.shape[1:]) and plain.min() == 255
    dark = labelled.min(-1) < 128
    for row in range(2):
        top = 22 + row * (96 + 18 + 4)
        for column in range(2):
            left = 4 + column * (96 + 4)
            label = dark[top + 96 : top + 96 + 18 + 4, left : left + 96]
            assert label.any() == bool(labels[row][column])
    assert not dark[:, 4 + 96 + 4 + 96 :].any()

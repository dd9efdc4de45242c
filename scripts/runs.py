"""Lists runs with their state and what they reached last, and draws them together: python
scripts/runs.py FOLDER [FOLDER ...] [--plot FILE], folders of runs or that hold some."""

import math
import os
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)

from internals.plots import draw_curves
from internals.runs import is_running, read_config, read_metrics
from IO import Parser
from Utils import duration

COLUMNS = {  # heading -> (key in metrics.jsonl, format)
    "steps": ("pretrain/step", "{:d}"),
    "training": ("pretrain/loss_tr", "{:.4f}"),
    "loss, mean": ("pretrain/loss_te", "{:.4f}"),
    "best": ("pretrain/loss_te_best", "{:.4f}"),
    "no code": ("pretrain/loss_te_no_z", "{:.4f}"),
    "spread": ("pretrain/code_spread", "{:.4f}"),
    "probe": ("fast_linear_probe/acc_te", "{:.3f}"),
    "k-NN": ("fast_linear_probe/knn_te", "{:.3f}"),
}


def row(run, records):
    """The cells of a run's row: its state, of each column the value recorded last, its time."""
    cells = [state(run, records)]
    for key, form in COLUMNS.values():
        values = [record[key] for record in records if record.get(key) is not None]
        cells.append(form.format(values[-1]) if values else "-")
    return [*cells, duration(sum(record.get("time/epoch_seconds", 0) for record in records))]


def state(run, records):
    """running, done, or stopped: it can go on."""
    if is_running(run):
        return "running"
    epochs_done = sum("pretrain/loss_tr" in record for record in records)
    return "done" if epochs_done >= read_config(run).get("epochs", math.inf) else "stopped"


def short_names(runs):
    """Names of runs without what they share in front."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        return list(map(str, runs))
    shared = len(os.path.commonprefix(names).rpartition("-")[0])
    return [name[shared:].strip("-") for name in names] if len(names) > 1 else names


def main(argv=None):
    """Prints the table, draws the picture; loss and spread are of validation images, over codes."""
    parser = Parser(prog="runs.py", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--plot", metavar="FILE", help="a .png with the curves of all these runs")
    args = parser.parse_args(argv)
    runs = sorted(
        {path.parent for folder in args.folders for path in Path(folder).rglob("metrics.jsonl")},
        key=lambda run: (run / "metrics.jsonl").stat().st_mtime,
    )
    if not runs:
        parser.error(f"no run in {' '.join(args.folders)}")
    records = [read_metrics(run) for run in runs]
    rows = [["state", *COLUMNS, "time"], *map(row, runs, records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = ["run", *(run.name for run in runs)]
    for name, cells in zip(names, rows, strict=True):
        print("  ".join(map(str.rjust, cells, widths)), "", name)
    if args.plot:
        draw_curves(dict(zip(short_names(runs), records, strict=True)), args.plot)
        print(f"drawn: {args.plot}")


if __name__ == "__main__":
    main()

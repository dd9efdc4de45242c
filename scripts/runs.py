"""Lists runs: state, last value of each metric, time; and draws their curves in one picture.

python scripts/runs.py FOLDER [FOLDER ...] [--plot FILE]"""

import math
import os
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)

from internals.plots import draw_curves, other_metrics
from internals.processes import run_command
from internals.runs import is_running, read_config, read_metrics
from IO import Parser
from Utils import InputError, duration

COLUMNS = {  # heading -> (key in metrics.jsonl, format); other metrics follow under their keys
    "steps": ("pretrain/step", "{:d}"),
    "training": ("pretrain/loss_tr", "{:.4f}"),
    "loss, mean": ("pretrain/loss_te", "{:.4f}"),
    "best": ("pretrain/loss_te_best", "{:.4f}"),
    "no code": ("pretrain/loss_te_no_z", "{:.4f}"),
    "spread": ("pretrain/code_spread", "{:.4f}"),
    "probe": ("fast_linear_probe/acc_te", "{:.3f}"),
    "k-NN": ("fast_linear_probe/knn_te", "{:.3f}"),
    "rank": ("pretrain/rankme", "{:.1f}"),
}


def row(run, records, columns):
    """The cells of a run's row: its state, the last value in each column, its time."""
    cells = [state(run, records)]
    for key, form in columns.values():
        values = [record[key] for record in records if record.get(key) is not None]
        cells.append(form.format(values[-1]) if values else "-")
    return [*cells, duration(sum(record.get("time/epoch_seconds", 0) for record in records))]


def state(run, records):
    """running, done, or stopped; a stopped run can go on."""
    if is_running(run):
        return "running"
    epochs_done = sum("pretrain/loss_tr" in record for record in records)
    return "done" if epochs_done >= read_config(run).get("epochs", math.inf) else "stopped"


def short_names(runs):
    """Names of runs without the words at the start that all names share."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        return list(map(str, runs))
    shared = len(os.path.commonprefix(names).rpartition("-")[0])
    return [name[shared:].strip("-") for name in names] if len(names) > 1 else names


def main(argv=None):
    """Prints the table and draws the picture."""
    parser = Parser(prog="runs.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="Run, or folder with runs.")
    parser.add_argument("--plot", metavar="FILE", help="Picture (.png) of the curves of all runs.")
    args = parser.parse_args(argv)
    run_command(lambda: list_runs(args.folders, args.plot))


def list_runs(folders, plot):
    """Prints the table of the runs in folders, then draws their curves to the path `plot`."""
    runs = sorted(
        {path.parent for folder in folders for path in Path(folder).rglob("metrics.jsonl")},
        key=lambda run: (run / "metrics.jsonl").stat().st_mtime,
    )
    if not runs:
        raise InputError(f"no run in {' '.join(folders)}")
    records = [read_metrics(run) for run in runs]
    others = other_metrics([record for some in records for record in some])
    columns = COLUMNS | {key: (key, "{:.4g}") for key in others}
    rows = [["state", *columns, "time"]]
    rows += [row(run, some, columns) for run, some in zip(runs, records, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, cells in zip(["run", *(run.name for run in runs)], rows, strict=True):
        print("  ".join(map(str.rjust, cells, widths)), "", name)
    if plot:
        draw_curves(dict(zip(short_names(runs), records, strict=True)), plot)
        print(f"drawn: {plot}")


if __name__ == "__main__":
    main()

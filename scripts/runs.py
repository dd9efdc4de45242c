"""Lists runs: state, last value of each metric, time, and the flags in which the runs differ; draws
their curves in one picture.

python scripts/runs.py FOLDER [FOLDER ...] [--sort KEY] [--csv FILE] [--plot FILE]"""

import csv
import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import _path  # noqa: F401 (makes the modules importable)

from internals.plots import draw_curves, other_metrics
from internals.processes import run_command
from internals.runs import ADDED_FLAGS, is_running, read_config, read_metrics
from IO import NOT_FROM_CONFIG, Parser
from Utils import InputError, duration

METRICS = {  # heading -> (key in metrics.jsonl, format); other metrics follow under their keys
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
# Flags that differ in any two runs, or are in a run's name.
HIDDEN_FLAGS = {*NOT_FROM_CONFIG, "save_folder", "suffix", "notes"}


class Column(NamedTuple):
    """A column of the table; values: one for each run, None where a run has none."""

    heading: str
    key: str  # for --sort and --csv
    values: list
    show: Callable  # value -> text


def columns_of(runs, records):
    """The Columns of runs, a list of folders, with these records of metrics."""
    return metric_columns(runs, records) + flag_columns(runs)


def metric_columns(runs, records):
    """The Columns of the state, of all metrics, and of the time."""
    others = other_metrics([record for some in records for record in some])
    metrics = METRICS | {key: (key, "{:.4g}") for key in others}
    seconds = [sum(record.get("time/epoch_seconds", 0) for record in some) for some in records]
    return [
        Column("state", "state", list(map(state, runs, records)), str),
        *(
            Column(heading, key, [last_value(some, key) for some in records], form.format)
            for heading, (key, form) in metrics.items()
        ),
        Column("time", "seconds", seconds, duration),
    ]


def flag_columns(runs):
    """The Columns of the flags in which the runs differ."""
    flags = [ADDED_FLAGS | read_config(run) for run in runs]
    names = differing(flags)
    return [Column(name, name, [some.get(name) for some in flags], flag_text) for name in names]


def last_value(records, key):
    """The last value of a metric; None if there is none."""
    values = [record[key] for record in records if record.get(key) is not None]
    return values[-1] if values else None


def differing(flags):
    """Names of the flags, in a list of dicts, that have several values. A run that lacks a flag is
    of another version: that is no difference."""
    names = dict.fromkeys(name for some in flags for name in some if name not in HIDDEN_FLAGS)
    return [name for name in names if len({repr(f[name]) for f in flags if name in f}) > 1]


def flag_text(value):
    """A flag's value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def state(run, records):
    """running, done, or stopped; a stopped run can go on."""
    if is_running(run):
        return "running"
    epochs_done = sum("pretrain/loss_tr" in record for record in records)
    return "done" if epochs_done >= read_config(run).get("epochs", math.inf) else "stopped"


def sorted_order(columns, key):
    """The runs' numbers in the order of a column's values, the highest last, runs without a value
    first. key: of the column, or its heading; an InputError if there is none."""
    names = {column.heading: column for column in columns}
    names |= {column.key: column for column in columns}
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"--sort {key}: no column has this name{hint}; there are {', '.join(names)}"
        )

    def rank(number):
        value = names[key].values[number]
        is_number = isinstance(value, int | float)
        return value is not None, is_number, value if is_number else flag_text(value)

    return sorted(range(len(columns[0].values)), key=rank)


def short_names(runs):
    """Names of runs without the words at the start that all names share."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        return list(map(str, runs))
    shared = len(os.path.commonprefix(names).rpartition("-")[0])
    return [name[shared:].strip("-") for name in names] if len(names) > 1 else names


def main(argv=None):
    """Prints the table; writes the file and draws the picture that the flags ask for."""
    parser = Parser(prog="runs.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="Run, or folder with runs.")
    add("--sort", metavar="KEY", help="Heading, metric or flag by which the runs are sorted, the "
        "highest value last; default: time of the last change.")  # fmt: skip
    add("--csv", metavar="FILE", help="File for the same table: whole numbers, metrics by their "
        "keys in metrics.jsonl, time in seconds.")  # fmt: skip
    add("--plot", metavar="FILE", help="Picture (.png) of the curves of all runs.")
    args = parser.parse_args(argv)
    run_command(lambda: list_runs(args.folders, args.sort, args.csv, args.plot))


def list_runs(folders, sort, csv_file, plot):
    """Prints the table of the runs in folders, sorted by a key; writes the table to csv_file and
    draws the runs' curves to the path `plot`. Each but the folders may be None."""
    runs = find_runs(folders)
    records = [read_metrics(run) for run in runs]
    columns = columns_of(runs, records)
    order = range(len(runs)) if sort is None else sorted_order(columns, sort)
    rows = [[column.heading for column in columns]]
    rows += [[shown(column, number) for column in columns] for number in order]
    names = ["run", *(runs[number].name for number in order)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, cells in zip(names, rows, strict=True):
        print("  ".join(map(str.rjust, cells, widths)), "", name)
    if csv_file:
        write_csv(csv_file, runs, columns, order)
    if plot:
        labels = short_names(runs)
        draw_curves({labels[number]: records[number] for number in order}, plot)
        print(f"drawn: {plot}")
    print(f"as a page to send: python scripts/report.py {shlex.join(folders)}", file=sys.stderr)


def find_runs(folders):
    """The runs in folders, those that were logged to last at the end; an InputError for none."""
    runs = sorted(
        {path.parent for folder in folders for path in Path(folder).rglob("metrics.jsonl")},
        key=lambda run: (run / "metrics.jsonl").stat().st_mtime,
    )
    if not runs:
        raise InputError(f"no run in {' '.join(folders)}")
    return runs


def shown(column, number):
    """A cell of the printed table."""
    value = column.values[number]
    return "-" if value is None else column.show(value)


def write_csv(path, runs, columns, order):
    """Writes the table to a CSV file, runs by their folders."""
    try:
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["run", *(column.key for column in columns)])
            for number in order:
                values = (column.values[number] for column in columns)
                texts = (flag_text(value) if isinstance(value, list) else value for value in values)
                writer.writerow([runs[number], *texts])
    except OSError as error:
        raise InputError(f"--csv: cannot write {path}: {error.strerror}") from None
    print(f"written: {path}")


if __name__ == "__main__":
    main()

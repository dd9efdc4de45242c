"""Lists runs with what they reached last: python scripts/runs.py FOLDER [FOLDER ...], folders of
runs or that hold some."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from IO import duration, read_metrics  # noqa: E402 (the line above makes it importable)

COLUMNS = {  # heading -> (key in metrics.jsonl, format)
    "steps": ("pretrain/step", "{:d}"),
    "loss, mean": ("pretrain/loss_te", "{:.4f}"),
    "best": ("pretrain/loss_te_best", "{:.4f}"),
    "no code": ("pretrain/loss_te_no_z", "{:.4f}"),
    "spread": ("pretrain/code_spread", "{:.4f}"),
    "probe": ("fast_linear_probe/acc_te", "{:.3f}"),
    "k-NN": ("fast_linear_probe/knn_te", "{:.3f}"),
}


def row(run):
    """The cells of a run's row: of each column the value recorded last."""
    records = read_metrics(run)
    cells = []
    for key, form in COLUMNS.values():
        values = [record[key] for record in records if record.get(key) is not None]
        cells.append(form.format(values[-1]) if values else "-")
    return [*cells, duration(sum(record.get("time/epoch_seconds", 0) for record in records))]


def main(argv=None):
    """Prints the table; loss and spread are of validation images, over codes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    folders = parser.parse_args(argv).folders
    runs = sorted(
        {path.parent for folder in folders for path in Path(folder).rglob("metrics.jsonl")},
        key=lambda run: (run / "config.json").stat().st_mtime,
    )
    if not runs:
        parser.exit(2, f"error: no run in {' '.join(folders)}\n")
    rows = [[*COLUMNS, "time"], *map(row, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = ["run", *(run.name for run in runs)]
    for name, cells in zip(names, rows, strict=True):
        print("  ".join(map(str.rjust, cells, widths)), "", name)


if __name__ == "__main__":
    main()

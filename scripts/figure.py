"""Compares arms (settings) over seeds: draws accuracies and validation losses over gradient steps
and over training time, one line per arm, and prints their last values.

python scripts/figure.py FOLDER --out figure.png, for runs with uids of the form ARM-SEED"""

from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
import numpy as np

from internals.plots import saved_figure
from internals.processes import run_command
from internals.runs import read_config, read_metrics
from IO import Parser
from Utils import InputError, drawable, duration

PANELS = {  # title -> {key in metrics.jsonl: (style, label)}
    "linear probe, accuracy": {"fast_linear_probe/acc_te": ("-", "")},
    "nearest neighbours, accuracy": {"fast_linear_probe/knn_te": ("-", "")},
    "validation loss": {
        "pretrain/loss_te": ("-", "mean over codes"),
        "pretrain/loss_te_best": ("--", "best of codes"),
        "pretrain/loss_te_no_z": (":", "without code"),
    },
}
COLUMNS = {  # heading -> (key, format)
    "probe": ("fast_linear_probe/acc_te", "{:.3f}"),
    "k-NN": ("fast_linear_probe/knn_te", "{:.3f}"),
    "loss, mean": ("pretrain/loss_te", "{:.3f}"),
    "best": ("pretrain/loss_te_best", "{:.3f}"),
    "no code": ("pretrain/loss_te_no_z", "{:.3f}"),
    "spread": ("pretrain/code_spread", "{:.3f}"),
    "steps": ("pretrain/step", "{:.0f}"),
    "time": ("time/training_seconds", None),
}


def arms(folder):
    """{arm: {seed: folder}} of the runs below a folder with uids of the form ARM-SEED; an
    InputError if there is none, or if two runs have the same uid."""
    found = {}
    for run in sorted(path.parent for path in Path(folder).rglob("metrics.jsonl")):
        arm, _, seed = read_config(run).get("uid", "").rpartition("-")
        if arm and seed.isdecimal():
            other = found.setdefault(arm, {}).setdefault(int(seed), run)
            if other != run:
                raise InputError(f"{folder}: two runs have the uid {arm}-{seed}: {other}, {run}")
    if not found:
        raise InputError(f"{folder}: no runs with a --uid of the form ARM-SEED there")
    return found


def called(arms, words):
    """(names, arms): {arm: name} from words ARM=NAME, and `arms` in the order of these words, other
    arms last."""
    if wrong := [word for word in words if "=" not in word]:
        raise InputError(f"--names {wrong[0]}: expected ARM=NAME")
    names = dict(word.split("=", 1) for word in words)
    order = [*(arm for arm in names if arm in arms), *(arm for arm in arms if arm not in names)]
    return names, {arm: arms[arm] for arm in order}


def check_folder(out):
    """Refuses a picture in a folder that does not exist."""
    if out and not Path(out).parent.is_dir():
        raise InputError(f"--out {out}: the folder {Path(out).parent} does not exist")


def validations(run):
    """{gradient step: record} of a run's validations."""
    records = (r for r in read_metrics(run) if r.get("pretrain/loss_te") is not None)
    return {record["pretrain/step"]: record for record in records}


def together(runs, key, steps):
    """Array (runs, steps) of the values of a metric at these steps."""
    return np.array([[run[step].get(key, np.nan) for step in steps] for run in runs], float)


UNITS = {"steps": "gradient steps", "time": "minutes of sampling and training"}


def draw(groups, names, path, over):
    """Draws {arm: [validations of each seed]} to a picture at `path`: a row of panels over each of
    `over`, keys of UNITS. Leaves out panels of metrics that no run has, such as accuracies of runs
    without labels."""
    records = [record for runs in groups.values() for run in runs for record in run.values()]
    panels = {
        title: keys
        for title, keys in PANELS.items()
        if any(record.get(key) is not None for record in records for key in keys)
    }
    with saved_figure(path, (13, 1 + 3.25 * len(over)), dpi=90) as figure:
        axes = figure.subplots(len(over), len(panels), sharey="col", squeeze=False)
        for column, (title, keys) in enumerate(panels.items()):
            axes[0, column].set_title(title, fontsize=11)
            for row, unit in enumerate(over):
                axes[row, column].set_xlabel(UNITS[unit])
                axes[row, column].grid(alpha=0.3)
                for number, runs in enumerate(groups.values()):
                    draw_arm(axes[row, column], runs, keys, f"C{number}", over_time=unit == "time")
        lines = [axes[0, 0].plot([], [], color=f"C{n}")[0] for n in range(len(groups))]
        n_seeds = sorted({len(runs) for runs in groups.values()})
        seeds = f"line: mean, band: range over {' to '.join(map(str, n_seeds))} seeds"
        caption = "one seed" if n_seeds == [1] else seeds
        labels = [drawable(names.get(arm, arm)) for arm in groups]
        for style, label in PANELS["validation loss"].values():
            lines += axes[0, 0].plot([], [], style, color="black")
            labels.append(f"loss, {label}")
        options = {"loc": "outside lower center", "ncols": 4, "frameon": False}
        figure.legend(lines, labels, title=caption, **options)


def draw_arm(axes, runs, keys, color, over_time):
    """Draws mean and range over an arm's runs, at the steps that all of them validated at."""
    steps = sorted(set.intersection(*map(set, runs)))
    x = together(runs, "time/training_seconds", steps).mean(0) / 60 if over_time else steps
    for key, (style, _) in keys.items():
        values = together(runs, key, steps)
        if "loss" in key:  # the untrained network's loss would stretch the axis
            values[:, np.array(steps) == 0] = np.nan
        axes.plot(x, values.mean(0), style, marker=".", color=color)
        axes.fill_between(x, values.min(0), values.max(0), alpha=0.15, lw=0, color=color)


def table(groups, names):
    """Prints each arm's values at its last validation: mean over seeds (range)."""
    rows = [["run", "seeds", *COLUMNS]]
    for arm, runs in groups.items():
        last = [run[max(run)] for run in runs]
        cells = [names.get(arm, arm), str(len(runs))]
        for key, form in COLUMNS.values():
            values = [record[key] for record in last if record.get(key) is not None]
            if not values:
                cells.append("-")
            elif form is None:
                cells.append(duration(sum(values) / len(values)))
            elif min(values) == max(values):
                cells.append(form.format(values[0]))
            else:
                mean, low, high = map(form.format, (np.mean(values), min(values), max(values)))
                cells.append(f"{mean} ({low}-{high})")
        rows.append(cells)
    print_table(rows)


def print_table(rows):
    """Prints rows of text as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, cells in enumerate(rows):
        print("|", " | ".join(map(str.ljust, cells, widths)), "|")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def start(args):
    """Prints the table, and draws the picture where --out names one."""
    names, runs_of = called(arms(args.folder), args.names)
    check_folder(args.out)
    groups = {arm: [validations(run) for run in runs.values()] for arm, runs in runs_of.items()}
    groups = {arm: [run for run in runs if run] for arm, runs in groups.items() if any(runs)}
    if not groups:
        raise InputError(f"{args.folder}: no run in this folder has been validated yet")
    table(groups, names)
    if args.out:
        draw(groups, names, Path(args.out), args.over)
        print(f"drawn: {args.out}")


def main(argv=None):
    """Draws the figure and prints the table."""
    parser = Parser(prog="figure.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="Folder with runs that have uids of the form ARM-SEED.")
    add("--out", metavar="FILE", help="Picture to draw; default: only the table is printed.")
    help_names = "Names that table and picture use for arms; other arms keep their own names."
    add("--names", nargs="+", default=[], metavar="ARM=NAME", help=help_names)
    help_over = "What curves are drawn over, a row of panels each."
    add("--over", nargs="+", choices=UNITS, default=list(UNITS), help=help_over)
    args = parser.parse_args(argv)
    run_command(lambda: start(args))


if __name__ == "__main__":
    main()

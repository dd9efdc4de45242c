"""Puts runs into one web page that needs no server and no network, to send to a colleague: a table
of what differs, curves, completions through training, configurations and commands.

python scripts/report.py RUN [RUN ...] --out report.html"""

import base64
import io
import json
import math
import os
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
from runs import find_runs, flag_columns, metric_columns, short_names, shown

from internals.decoding import open_image
from internals.parsing import Parser
from internals.plots import panels_of
from internals.processes import run_command
from internals.runs import flags_of, read_description, read_metrics
from Utils import InputError, drawable, write_atomically

TEMPLATE = Path(__file__).with_suffix(".html")
LARGEST_PAGE = 10_000_000  # bytes
POINTS = 500  # of a curve, at most
PICTURES = 48  # of a grid through a run's training, at most
WIDTH, QUALITY = 1400, 75  # of pictures, in pixels at most, and of their WebP


def main(argv=None):
    """Writes the page."""
    about = " ".join(__doc__.split("\n\n")[0].split())
    parser = Parser(prog="report.py", description=about + " The page holds the runs' flags, paths "
                    "and notes.")  # fmt: skip
    parser.add_argument("folders", nargs="+", metavar="RUN", help="Run, or folder with runs.")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="The page.")
    args = parser.parse_args(argv)
    run_command(lambda: report(args.folders, args.out))


def report(folders, out):
    """Writes the page about the runs in folders to the path `out`."""
    runs = find_runs(folders)
    records = [[r for r in read_metrics(run) if isinstance(r, dict)] for run in runs]
    page = describe(runs, records)
    paths = [grid_paths(run, some) for run, some in zip(runs, records, strict=True)]
    page["about"] = add_pictures(page, paths)
    try:
        write_atomically(out, filled(page))
        size = os.path.getsize(out) / 1e6
    except OSError as error:
        raise InputError(f"--out: cannot write {out}: {error.strerror or error}") from None
    print(f"{out}: {page['about']} {size:.1f} MB")


def describe(runs, records):
    """What the page shows of runs, as plain data, without their pictures."""
    columns, flags = metric_columns(runs, records), flag_columns(runs)
    panels = panels_of([record for some in records for record in some])
    keys = [key for panel in panels.values() for key in panel]
    names = short_names(runs)
    described = [
        {
            "name": drawable(names[number]),
            "cells": [shown(column, number) for column in columns],
            "differing": {column.heading: drawable(shown(column, number)) for column in flags},
            "points": {key: points for key in keys if (points := curve(records[number], key))},
            "notes": drawable(flags_of(config).get("notes", "")),
            "command": drawable(config.get("command", "")),
            "config": json.dumps(config, indent=2),
        }
        for number, config in enumerate(map(read_description, runs))
    ]
    headings = [column.heading for column in columns]
    differing = [column.heading for column in flags]
    return {"columns": headings, "differing": differing, "panels": panels, "runs": described}


def add_pictures(page, paths):
    """Adds the pictures of the runs' grid_paths to the page, as many as fit; returns a line."""
    keys = sorted({key for some in paths for key in some}, key=lambda key: (len(key), key))
    page["series"] = {key: title_of(key) for key in keys}
    count, pictures, damaged = fitting_pictures(paths, LARGEST_PAGE - len(filled(page)) - 10_000)
    for run, some in zip(page["runs"], pictures, strict=True):
        run["pictures"] = some
    total = sum(len(series) for some in paths for series in some.values())
    left_out = total - damaged - sum(len(series) for some in pictures for series in some.values())
    about = f"{len(paths)} run{'s' * (len(paths) > 1)}."
    if left_out:
        about += (
            f" {left_out} of {total} pictures were left out, to keep the page small: a grid is "
        )
        about += f"shown at {count} steps of a run at most."
    return about + (f" {damaged} pictures can't be read." if damaged else "")


def curve(records, key):
    """The points (step, value) of a metric, at most POINTS, evenly spaced, with the last."""
    points = [(r.get("pretrain/step"), r.get(key)) for r in records]
    points = [(step, float(f"{y:.6g}")) for step, y in points if is_finite(step) and is_finite(y)]
    return thinned(points, POINTS)


def is_finite(value):
    """Whether a value out of JSON is a finite number."""
    return isinstance(value, int | float) and abs(value) < math.inf


def thinned(items, count):
    """At most `count` of the items, evenly spaced. The last one is always there."""
    if len(items) <= count:
        return items
    step = (len(items) - 1) / max(1, count - 1)
    return [items[len(items) - 1 - round(i * step)] for i in reversed(range(count))]


def is_grid(key):
    """Whether a metric is a picture."""
    return key.startswith("images/")


def title_of(key):
    """A grid's name for people."""
    title = key.removeprefix("images/pretrain_").removeprefix("images/").replace("_", ", ")
    names = {"train": "training images", "test": "validation images", "baseline": "without codes"}
    return drawable(", ".join(names.get(word, word) for word in title.split(", ")))


def grid_paths(run, records):
    """The pictures of a run: key -> pairs (step, path)."""
    found = {}
    for record in records:
        for key, name in record.items():
            if is_grid(key) and isinstance(name, str) and is_finite(record.get("pretrain/step")):
                path = run / "images" / Path(name).name  # only of the run's own folder
                found.setdefault(key, []).append((record["pretrain/step"], path))
    return found


def fitting_pictures(paths, budget):
    """For each of the runs' grid_paths the pictures, key -> pairs (step, data URI), that take at
    most `budget` bytes together: of every grid the same number, evenly spaced. Returns that number,
    the pictures, and how many can't be read."""
    encoded = {}  # path -> data URI, None for a damaged picture
    count = PICTURES
    while count:
        chosen = [{key: thinned(series, count) for key, series in run.items()} for run in paths]
        wanted = [path for run in chosen for series in run.values() for _, path in series]
        size = 0
        for path in wanted:
            if path not in encoded:
                encoded[path] = data_uri(path)
            size += len(encoded[path] or "") + 40
            if size > budget:
                break
        if size <= budget:
            break
        count //= 2
    if not count:
        chosen, wanted = [{} for _ in paths], []
    shown = [
        {
            key: [(step, encoded[path]) for step, path in series if encoded[path]]
            for key, series in run.items()
        }
        for run in chosen
    ]
    return count, shown, sum(encoded[path] is None for path in wanted)


def data_uri(path):
    """A picture as a small WebP in a data URI; None for one that can't be read."""
    try:
        picture = open_image(path.read_bytes())
    except Exception:  # decoders raise anything for damaged bytes
        return None
    picture.thumbnail((WIDTH, 10 * WIDTH))
    picture.save(file := io.BytesIO(), "webp", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def filled(page):
    """The bytes of the web page that shows `page`."""
    text = json.dumps(page)
    for sign in "<>&":  # so that no text of a run ends the script or begins a comment
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return TEMPLATE.read_text().replace(">DATA<", f">{text}<").encode()


if __name__ == "__main__":
    main()

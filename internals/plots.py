"""Pictures: grids of completions, curves of runs, the result of a probe."""

import contextlib
import math
import os
import re
import textwrap
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from Utils import InputError, drawable, first_line, printable, say, write_atomically

NORMALIZED = (  # in the captions of grids
    " Predicted patches are normalised: shown with the true patches' means and deviations."
)


@contextlib.contextmanager
def at_most_a_warning(picture):
    """Inside `with`, an error costs a warning that the picture of this name is missing, and nothing
    else: no picture is worth a run or its results."""
    try:
        yield
    except Exception as error:  # libraries, disks and devices raise errors of many kinds
        say(f"warning: {picture} was not drawn ({first_line(error)})")


def picture_grid(cells, headers, caption, cell_height=96, labels=()):
    """A Pillow image of a table of pictures with a caption: cells uint8 (rows, columns, 3, H, W),
    one header per column. labels: for each row its cells' texts, each drawn below its cell and cut
    to the cell's width."""
    rows, columns, _, h, w = cells.shape
    scale = max(1, round(cell_height / h))
    cells = np.kron(np.asarray(cells.movedim(2, -1)), np.ones((1, 1, scale, scale, 1), np.uint8))
    gap, top, line = 4, 22, 18  # pixels
    step_x, step_y = w * scale + gap, h * scale + gap + line * bool(labels)
    lines = textwrap.wrap(drawable(caption), columns * step_x // 7)
    size = (columns * step_x + gap, top + rows * step_y + gap + line * len(lines))
    canvas = Image.new("RGB", size, "white")
    # Pillow's own font lacks letters such as e with an accent.
    font_path = f"{import_matplotlib().get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    draw, font = ImageDraw.Draw(canvas), ImageFont.truetype(font_path, 11)
    for column, header in enumerate(headers):
        x = gap + column * step_x
        draw.text((x + w * scale / 2, top / 2), drawable(header), "black", font, anchor="mm")
        for row in range(rows):
            canvas.paste(Image.fromarray(cells[row, column]), (x, top + row * step_y))
            if labels:
                text = printable(labels[row][column])
                while font.getlength(text) > w * scale:
                    text = text[:-1]
                draw.text((x, top + (row + 1) * step_y - gap - line), text, "black", font)
    for number, text in enumerate(lines):
        draw.text((gap, size[1] - line * (len(lines) - number)), text, "black", font)
    return canvas


CURVES = {  # panel -> {metric: label}. A metric that is in no panel gets a panel of its own.
    "reconstruction loss": {
        "pretrain/loss_tr": "training, chosen codes",
        "pretrain/loss_tr_no_z": "training, without code",
        "pretrain/loss_te": "validation, mean over codes",
        "pretrain/loss_te_best": "validation, best of codes",
        "pretrain/loss_te_no_z": "validation, without code",
    },
    "sampled codes, training": {
        "sampling/first_losses": "mean over codes",
        "sampling/end_losses": "best of codes",
    },
    "validation accuracy": {
        "fast_linear_probe/acc_te": "linear probe",
        "fast_linear_probe/knn_te": "nearest neighbours",
    },
    "effective rank of features": {"pretrain/rankme": "RankMe"},
    "spread over codes": {"pretrain/code_spread": "standard deviation"},
    "learning rates": {"pretrain/lr_mae": "MAE", "pretrain/lr_z": "injections"},
    "norm of the gradient": {"pretrain/grad_norm": "mean over steps"},
    "gain by codes, training": {"sampling/delta_wrt_no_z": "best of codes minus without code"},
}
PROBE = re.compile("fast_linear_probe/(.+)/(acc_te|knn_te)")  # on a set of --probe_data
# Metrics that are neither drawn nor listed: positions, times, and values that are logged once.
HIDDEN = re.compile(
    "epoch|pretrain/step|time/.*|.*_baseline|pretrain/skipped_steps|sampling/codes_per_sec"
)


def other_metrics(records):
    """Names of the numeric metrics in records that are in no panel of CURVES and not hidden."""
    drawn = {key for keys in CURVES.values() for key in keys}
    numeric = {k: None for r in records for k, v in r.items() if isinstance(v, int | float)}
    return [key for key in numeric if key not in drawn and not HIDDEN.fullmatch(key)]


def panels_of(records):
    """CURVES, and panels for the other metrics: one for each data set that is probed, one for each
    further metric."""
    panels = {name: dict(keys) for name, keys in CURVES.items()}
    for key in other_metrics(records):
        name, label = key, key
        if match := PROBE.fullmatch(key):
            name = f"validation accuracy, {match[1]}"
            label = CURVES["validation accuracy"][f"fast_linear_probe/{match[2]}"]
        panels.setdefault(name, {})[key] = label
    return panels


@contextlib.contextmanager
def saved_figure(path, size, dpi=100):
    """Yields a matplotlib Figure of a size in inches, then saves the picture at `path`; an
    InputError if the file can't be written. Texts are drawn as they are: "$" starts no formula."""
    matplotlib = import_matplotlib()
    as_text = {"text.parse_math": False, "text.usetex": False}
    with matplotlib.rc_context(as_text), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that no font has is drawn as a box
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        yield figure
        try:
            write_atomically(path, lambda file: figure.savefig(file, dpi=dpi, format="png"))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def import_matplotlib():
    """matplotlib with its Figure, but without pyplot, which may open windows. MPLBACKEND may name a
    notebook's backend, which is not installed here: importing matplotlib would fail."""
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib.figure  # here, as the import is slow

    if backend is not None:  # for a notebook that calls this and draws later
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def draw_curves(runs, path, title=""):
    """Draws the metrics of runs, {name: records}, over gradient steps to a picture at `path`, one
    panel for each entry of CURVES that has values. Several runs: one colour per run."""
    runs = {drawable(name): records for name, records in runs.items()}
    records = [record for some in runs.values() for record in some]
    panels = panels_of(records)
    recorded = {key for record in records for key, value in record.items() if value is not None}
    panels = {name: keys for name, keys in panels.items() if recorded & keys.keys()}
    panels = panels or {"nothing recorded yet": {}}
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    several = len(runs) > 1
    size = max(5.5 * columns, 8), 3.5 * rows + several * 0.25 * len(runs)
    with saved_figure(path, size) as figure:
        figure.suptitle("\n".join(textwrap.wrap(drawable(title), int(10 * size[0]))), fontsize=9)
        for number, (name, keys) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(rows, columns, number)
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("gradient steps")
            axes.grid(alpha=0.3)
            draw_panel(axes, runs.values(), keys, several)
        if several:
            lines = [axes.plot([], [], color=f"C{n}", marker=".")[0] for n in range(len(runs))]
            figure.legend(lines, runs, loc="outside lower left", fontsize=8, frameon=False)


def draw_panel(axes, runs, keys, several):
    """Draws metrics, {key: label}, of runs, an iterable of records: one line style per metric."""
    for number, (key, label) in enumerate(keys.items()):
        style = {"linestyle": ("-", "--", ":", "-.")[number % 4], "marker": ".x+^"[number // 4 % 4]}
        for run, records in enumerate(runs):
            points = [(r["pretrain/step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                look = {"color": f"C{run}"} if several else {"label": label}
                axes.plot(*zip(*points, strict=True), **style, **look)
        if several and len(keys) > 1:
            axes.plot([], [], color="black", label=label, **style)
    if any(label != axes.get_title() for label in axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=8, handlelength=3)


def draw_probe(path, result, history, confusion):
    """Draws a probe to a picture at `path`: the heads' accuracies by epoch, and for the worst
    classes the classes predicted. confusion: row names, column names, shares (rows, columns)."""
    best, epochs = result["best"], range(1, len(history) + 1)
    with saved_figure(path, (12, 5.5)) as figure:
        left, right = figure.subplots(1, 2)
        for number, head in enumerate(result["heads"]):
            label = f"{head['pool']}, lr {head['lr']:g}, wd {head['wd']:g}"
            style = {"color": "black", "lw": 2} if number == best else {"lw": 0.8, "alpha": 0.8}
            top1 = [record["top1"][number] for record in history]
            left.plot(epochs, top1, label=label + " (reported)" * (number == best), **style)
        top5 = [record["top5"][best] for record in history]
        left.plot(epochs, top5, "--", color="gray", label="top-5 of the reported head")
        left.set(xlabel="epoch", ylabel="validation accuracy, top-1", ylim=(0, 1.02))
        left.grid(alpha=0.3)
        figure.legend(fontsize=7, loc="outside lower center", ncols=3, frameon=False)
        draw_confusion(right, *confusion)
        figure.suptitle(f"{drawable(result['model'])}: top-1 {result['top1']:.2%}", fontsize=10)


def draw_confusion(axes, rows, columns, shares):
    """Draws shares (rows, columns) of the images of classes `rows` by predicted class."""
    shares = np.asarray(shares)
    rows, columns = ([drawable(name[:16]) for name in names] for names in (rows, columns))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(shares >= 0.005):
        shade = "white" if shares[row, column] > 0.5 else "black"
        text = f"{shares[row, column] * 100:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=shade)
    axes.set_xticks(range(len(columns)), columns, rotation=60, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set(xlabel="predicted class", ylabel="class")
    axes.set_title(f"the {len(rows)} worst classes, % of their images", fontsize=10)

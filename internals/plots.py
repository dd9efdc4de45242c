"""Pictures: grids of completions, curves of runs, the picture of a probe."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from Utils import write_atomically

NORMALIZED = (  # in the captions of grids
    " Predicted patches are normalised: shown with the true patches' means and deviations."
)


def picture_grid(cells, headers, caption, cell_height=96):
    """A captioned table of pictures: cells uint8 (rows, columns, 3, H, W), one header a column ->
    Pillow image."""
    rows, columns, _, h, w = cells.shape
    scale = max(1, round(cell_height / h))
    cells = np.kron(np.asarray(cells.movedim(2, -1)), np.ones((1, 1, scale, scale, 1), np.uint8))
    gap, top, line = 4, 22, 18  # pixels
    step_x, step_y = w * scale + gap, h * scale + gap
    lines = textwrap.wrap(caption, columns * step_x // 7)
    size = (columns * step_x + gap, top + rows * step_y + gap + line * len(lines))
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, header in enumerate(headers):
        x = gap + column * step_x
        draw.text((x + w * scale / 2, top / 2), header, "black", font, anchor="mm")
        for row in range(rows):
            canvas.paste(Image.fromarray(cells[row, column]), (x, top + row * step_y))
    for number, text in enumerate(lines):
        draw.text((gap, size[1] - line * (len(lines) - number)), text, "black", font)
    return canvas


CURVES = {  # panel -> {key: label}
    "reconstruction loss": {
        "pretrain/loss_tr": "training",
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
    "spread over codes": {"pretrain/code_spread": "standard deviation"},
}


def draw_curves(runs, path, title=""):
    """Draws what {name: records} of runs hold, over gradient steps, to a picture at `path`: one
    line a key; with several runs one colour a run, one style a key."""
    from matplotlib.figure import Figure  # slow to import; and Figure alone opens no windows

    several = len(runs) > 1
    figure = Figure(figsize=(11, 7 + several * 0.25 * len(runs)), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize=9)
    for axes, (panel, keys) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("gradient steps")
        axes.grid(alpha=0.3)
        for style, (key, label) in zip(("-", "--", ":", "-."), keys.items(), strict=False):
            for number, records in enumerate(runs.values()):
                points = [(r["pretrain/step"], r[key]) for r in records if r.get(key) is not None]
                look = {"color": f"C{number}", "linestyle": style} if several else {"label": label}
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", **look)
            if several and len(keys) > 1 and axes.lines:
                axes.plot([], [], color="black", linestyle=style, label=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        elif not axes.lines:
            axes.text(0.5, 0.5, "nothing recorded", ha="center", transform=axes.transAxes)
    if several:
        lines = [axes.plot([], [], color=f"C{n}", marker=".")[0] for n in range(len(runs))]
        figure.legend(lines, runs, loc="outside lower left", fontsize=8, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, dpi=100, format="png"))


def draw_probe(path, result, history, confusion):
    """Draws a probe to a picture: the heads' accuracy by epoch, and what the worst classes are
    taken for, confusion: their names, the names of the columns, shares (rows, columns)."""
    from matplotlib.figure import Figure  # slow to import; and Figure alone opens no windows

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    best, epochs = result["best"], range(1, len(history) + 1)
    for number, head in enumerate(result["heads"]):
        label = f"{head['pool']}, lr {head['lr']:g}, wd {head['wd']:g}"
        style = {"color": "black", "lw": 2} if number == best else {"lw": 0.8, "alpha": 0.8}
        top1 = [record["top1"][number] for record in history]
        left.plot(epochs, top1, label=label + " (reported)" * (number == best), **style)
    top5 = [record["top5"][best] for record in history]
    left.plot(epochs, top5, "--", color="gray", label="top-5 of the reported head")
    left.set(xlabel="epoch", ylabel="validation accuracy, top-1", ylim=(0, 1.02))
    left.grid(alpha=0.3)
    left.legend(fontsize=7, loc="lower right")
    rows, columns, shares = confusion
    shares = np.asarray(shares)
    right.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(shares >= 0.005):
        shade = "white" if shares[row, column] > 0.5 else "black"
        text = f"{shares[row, column] * 100:.0f}"
        right.text(column, row, text, ha="center", va="center", fontsize=7, color=shade)
    right.set_xticks(range(len(columns)), [name[:16] for name in columns], rotation=60, fontsize=7)
    right.set_yticks(range(len(rows)), [name[:16] for name in rows], fontsize=7)
    right.set(xlabel="taken for", ylabel="class")
    right.set_title(f"the {len(rows)} worst classes, % of their images", fontsize=10)
    figure.suptitle(f"{result['model']}: top-1 {result['top1']:.2%}", fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, dpi=100, format="png"))

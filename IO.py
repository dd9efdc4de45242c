"""The edges of a run: what a person sees of it, and what it leaves in its folder."""

import contextlib
import csv
import io
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from Checkpoints import checkpoint_paths, lock_folder, save_checkpoint, step_of
from Utils import InputError, rank, say, world_size, write_atomically
from Weights import load_model  # noqa: F401 (where users look for it)

# -------------------------------------------------------------------------------------------------
# What a person sees: lines and progress bars, of the first process only.


def watch(items, description, total, unit="images", after_each=None):
    """Passes items on, with a progress bar: chunks (rows, images), of which images are counted, or,
    for another unit, anything, counted by one. Each time that one is dealt with, calls
    after_each(start time, number done by this process)."""
    shown = rank() == 0 and sys.stderr.isatty()
    bar = tqdm(desc=description, total=total, unit=f" {unit}", disable=not shown, leave=False)
    start, done = None, 0
    with bar:
        for item in items:
            start = start or time.perf_counter()  # the loader's workers have started
            yield item
            number = len(item[1]) if unit == "images" else 1
            bar.update(number * world_size() if unit == "images" else number)
            done += number
            if after_each is not None:
                after_each(start, done)


class Forecast:
    """Says once, after the first chunk of sampling (and a second, to be past the start-up), how
    long the run's sampling will take and what memory it holds."""

    def __init__(self, device, images_left):
        self.device, self.images_left = device, images_left

    def __call__(self, start, images):
        if not self.images_left:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        if seconds < 1 and images * world_size() < self.images_left:
            return
        left = duration(seconds / images * self.images_left / world_size())
        say(f"sampling will take about {left} of this run; memory: {memory(self.device)}")
        self.images_left = 0


def memory(device):
    """The most memory that this process has held, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB on the GPU"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, else KB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB"


def duration(seconds):
    """Seconds as 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {seconds:02d} s"


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


# -------------------------------------------------------------------------------------------------
# The run's folder: config.json, metrics.jsonl, curves.png, images/, checkpoints/; only the first
# process writes there.


class Run:
    """Writes down what a run does. The local files are the truth; W&B mirrors them and may fail
    without harm."""

    def __init__(self, folder, flags, checkpoint=None, found=()):
        """Does nothing yet; entered by `with`, it opens the folder, behind the metrics that the
        checkpoint knows. found: the checkpoints that were there before that was read."""
        self.folder, self.flags, self.main = Path(folder), flags, rank() == 0
        self.step = checkpoint["progress"]["step"] if checkpoint else 0
        self.metrics_size = checkpoint["metrics_size"] if checkpoint else 0
        self.found = list(found)
        self.waiting = {}  # what the disk has not taken yet: names of files -> bytes
        self.lines = b""  # likewise, of metrics.jsonl

    def __enter__(self):
        if self.main:
            config = describe_run(self.flags)
            try:
                for name in ("images", "checkpoints"):
                    (self.folder / name).mkdir(parents=True, exist_ok=True)
                self.lock = lock_folder(self.folder)
                if checkpoint_paths(self.folder) != self.found:
                    raise InputError(f"--uid: another process went on with {self.folder} meanwhile")
                self.tidy()
                write_atomically(self.folder / "config.json", json.dumps(config, indent=2).encode())
                self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
                self.metrics.truncate(min(self.metrics_size, self.metrics.tell()))
                self.metrics.seek(0, os.SEEK_END)
            except OSError as error:
                raise InputError(
                    f"--save_folder: cannot write to {self.folder}: {error.strerror}"
                ) from None
            self.wandb = WandB(self.flags.wandb, self.folder, config)
        return self

    def tidy(self):
        """Clears away what a save that was killed has left, and checkpoints that can't be read: a
        run goes on from the newest that can."""
        for folder in (self.folder, self.folder / "images", self.folder / "checkpoints"):
            for left in folder.glob(".*.tmp"):
                left.unlink()
        for path in self.found:
            if step_of(path) > self.step:
                path.rename(path.with_suffix(".damaged"))

    def __exit__(self, *_):
        if self.main:
            self.draw_curves()
            with contextlib.suppress(OSError):
                self.write_down()
            self.metrics.close()
            self.wandb.close()
            self.lock.close()

    def log(self, step, epoch, values):
        """Appends one JSON object to metrics.jsonl; pictures (keys images/...) become files, and
        stand there by their names."""
        if not self.main:
            return
        record = {"epoch": epoch, "pretrain/step": step, **values}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[key] = None  # JSON has no word for it
            if isinstance(value, Image.Image):
                record[key] = f"images/{key.split('/')[-1]}_{step:08d}.png"
                value.save(file := io.BytesIO(), "png")
                self.waiting[record[key]] = file.getvalue()
        self.lines += json.dumps(record).encode() + b"\n"
        try:
            self.write_down()
        except OSError as error:
            say(f"warning: {self.folder}: {error.strerror}; metrics and pictures wait in memory")
        self.wandb.log(step, {**values, "epoch": epoch, "pretrain/step": step})

    def write_down(self):
        """Writes what waits: pictures, then the lines that name them."""
        for name, content in list(self.waiting.items()):
            write_atomically(self.folder / name, content)
            del self.waiting[name]
        while self.lines:
            self.lines = self.lines[self.metrics.write(self.lines) :]

    def draw_curves(self):
        """Draws curves.png anew from metrics.jsonl."""
        if self.main:
            with contextlib.suppress(OSError):  # it is drawn again
                runs = {self.folder.name: read_metrics(self.folder)}
                draw_curves(runs, self.folder / "curves.png", title=self.folder.name)

    def save(self, state, *, keep=False):
        """Writes a checkpoint of `state`, which gets the size of metrics.jsonl; keep: for good,
        besides the newest two. An OSError where the disk does not take it: what was there stays."""
        if not self.main:
            return
        self.write_down()
        os.fsync(self.metrics.fileno())
        state = {**state, "metrics_size": self.metrics.tell()}
        step = state["progress"]["step"]
        folder = self.folder / "checkpoints"
        save_checkpoint(newest := folder / f"step_{step:08d}.pt", state)
        if keep:
            kept = folder / f"epoch_{state['progress']['epoch']:06d}_step_{step:08d}.pt"
            try:
                os.link(newest, kept)
            except OSError:  # it is there, or there are no links
                save_checkpoint(kept, state)
        for old in sorted(folder.glob("step_*.pt"))[:-2]:
            old.unlink()


class WandB:
    """Weights & Biases as a mirror: where it is missing, refuses or raises, that costs one
    warning."""

    def __init__(self, mode, folder, config):
        self.run = None
        if mode != "disabled":
            self.attempt(lambda: self.start(mode, folder, config))

    def attempt(self, action):
        """Does it, or warns and gives W&B up."""
        try:
            action()
        except Exception as error:  # whatever it is, it must not cost the run
            self.run = None
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            say(f"warning: Weights & Biases failed and is off from here ({reason[0]})")

    def start(self, mode, folder, config):
        import wandb

        self.image = wandb.Image
        flags = config["flags"]
        self.run = wandb.init(
            project="IMLE-SSL",
            name=folder.name,
            id=flags["uid"],
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=config,
            notes=flags["notes"],
            settings=wandb.Settings(silent=True),
        )

    def log(self, step, values):
        if self.run is not None:
            self.attempt(
                lambda: self.run.log({k: self.mirror(v) for k, v in values.items()}, step=step)
            )

    def mirror(self, value):
        """A value as W&B takes it."""
        return self.image(value) if isinstance(value, Image.Image) else value

    def close(self):
        if self.run is not None:
            self.attempt(self.run.finish)


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


def read_metrics(folder):
    """The records of a run's metrics.jsonl, as a list of dicts; lines that are damaged, or are
    being written, are left out."""
    records = []
    for line in (Path(folder) / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


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


def describe_run(flags):
    """What config.json holds: resolved flags, versions, git commit, command."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        folder = Path(__file__).parent
        git = subprocess.run(describe, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:
        git = ""  # there is no git
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    return {
        "flags": vars(flags),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "git_commit": git or None,
        "command": shlex.join([sys.executable, *sys.argv]),
    }


# -------------------------------------------------------------------------------------------------
# What a probe leaves.

PROBE_COLUMNS = (
    "model probe top1 top5 knn n_train n_held_out n_val pool lr wd epochs batch_size "
    "data_tr data_val seed seconds folder".split()
)


def append_row(path, values):
    """Appends a row of these values to a CSV, under its own heading or, in a new file, under
    PROBE_COLUMNS."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")), open(path, "a+", newline="") as file:
            file.seek(0)
            columns = next(csv.reader(file), None)
            writer = csv.DictWriter(file, columns or PROBE_COLUMNS, extrasaction="ignore")
            if not columns:
                writer.writeheader()
            writer.writerow(values)
    except OSError as error:
        raise InputError(f"--save_folder: cannot write {path}: {error.strerror}") from None


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

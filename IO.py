"""The edges of a run: its folder, its metrics and pictures, its checkpoints."""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from Utils import InputError, rank, say, world_size, write_atomically
from Weights import load_model, read_checkpoint  # noqa: F401 (load_model: where users look for it)

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

    def __init__(self, folder, flags, checkpoint=None):
        """Does nothing yet; entered by `with`, it opens the folder, behind the metrics that the
        checkpoint knows."""
        self.folder, self.flags, self.main = Path(folder), flags, rank() == 0
        self.step = checkpoint["progress"]["step"] if checkpoint else 0
        self.metrics_size = checkpoint["metrics_size"] if checkpoint else 0
        self.found = checkpoint_paths(folder)
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
        for left in self.folder.rglob(".*.tmp"):
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
                path = self.folder / "curves.png"
                draw_curves(read_metrics(self.folder), path, title=self.folder.name)

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
        if keep:
            epoch = state["progress"]["epoch"]
            save_checkpoint(folder / f"epoch_{epoch:06d}_step_{step:08d}.pt", state)
        save_checkpoint(folder / f"step_{step:08d}.pt", state)
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
    """The records of a run's metrics.jsonl, as a list of dicts."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def draw_curves(records, path, title=""):
    """Draws what the records hold, over gradient steps, to a picture at `path`."""
    from matplotlib.figure import Figure  # slow to import; and Figure alone opens no windows

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize=9)
    for axes, (panel, keys) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("gradient steps")
        for key, label in keys.items():
            points = [(r["pretrain/step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        if axes.lines:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "nothing recorded", ha="center", transform=axes.transAxes)
        axes.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, dpi=100, format="png"))


def run_name(script, flags):
    """script-data-arch-ip-hyperparameters-suffix-uid, at most 200 characters, the uid never cut."""
    data = Path(flags.data_tr).resolve()
    ip = "_".join(flags.ip_spec) or "mae"
    numbers = f"bs{flags.mini_bs}-epe{flags.ex_per_epoch}-ipe{flags.ipe}-lr{flags.lr:g}"
    numbers += "" if flags.ignore_z else f"-lrz{flags.lr_z:g}-ns{flags.ns}"
    parts = [script, f"{data.parent.name}_{data.stem}", flags.arch, ip, numbers, flags.suffix]
    name = re.sub(r"[^\w.+-]", "_", "-".join(part for part in parts if part), flags=re.ASCII)
    return f"{name[: 199 - len(flags.uid)]}-{flags.uid}"


# What may differ when a run goes on: where and how it computes, what it measures and keeps.
CHANGEABLE = frozenset(
    "gpus processes num_workers loader_timeout sample_dtype fp16 code_bs sp accum "
    "fast_linear_probe val_n_way val_n_shot probe_lr probe_epochs probe_bs probe_bs_val "
    "probe_ignore_z probe_augs_per_image global_pool ex_for_mse_loss z_per_ex_loss eval_bs "
    "ex_for_vis_tr ex_for_vis_te z_per_ex_vis steps_per_eval get_mae_baseline save_folder suffix "
    "uid resume force_resume save_iter save_minutes wandb notes mae_weights skip_bad_images".split()
)
# What may never: the sizes of its model. The rest makes it the run it is, and needs --force_resume.
ARCHITECTURE = frozenset(
    "arch ip_spec latent_dim mapping_net_layers mapping_net_h_dim mapping_net_lrmul act_type "
    "adain_init decoder norm_pix_loss input_size ignore_z".split()
)


def read_config(folder):
    """The flags in a run's config.json; empty where they can't be read."""
    try:
        return json.loads((folder / "config.json").read_text())["flags"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def check_writable(folder):
    """Refuses a folder that can't be made or written to; leaves nothing there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"--save_folder: cannot write to {there}: {error.strerror}") from None


def lock_folder(folder, patience=5.0):
    """Keeps other processes from running in this folder until the file returned is closed, or this
    process ends. An InputError where one does already, `patience` seconds later.

    A POSIX lock: forked loader workers, which may live longer, don't inherit it."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115
    end = time.monotonic() + patience  # one that was killed may need a moment to end
    while not can_lock(file):
        if time.monotonic() > end:
            file.seek(0)
            raise InputError(f"--uid: {folder} is in use by {file.read() or 'another process'}")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def can_lock(file):
    """Locks a file for this process, if no other one has; True also where locks are unknown."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.EACCES:
            return False
        say(f"warning: {file.name} can't be locked ({error.strerror}); start each run once")
    return True


def locate_run(script, flags):
    """(folder, checkpoint or None): of the run with these flags' uid, or that --resume names, where
    it stood; else a new one."""
    models = Path(flags.save_folder).expanduser() / "models"
    if flags.resume:
        folder = Path(flags.resume).absolute().parent.parent
    else:
        named = (path.parent for path in models.glob(f"*-{flags.uid}/config.json"))
        mine = (path for path in named if read_config(path).get("uid") == flags.uid)
        folder = next(mine, models / run_name(script, flags))
    check_writable(folder)
    path, checkpoint = newest_checkpoint(folder)
    old = checkpoint["args"] if checkpoint else read_config(folder)
    if old.get("uid", flags.uid) != flags.uid or (not old and holds_something(folder)):
        raise InputError(f"--save_folder: {folder} is in the way, and is no run of this --uid")
    if flags.resume and not path.samefile(flags.resume):
        step = read_checkpoint(flags.resume).get("progress", {}).get("step")
        if step != checkpoint["progress"]["step"]:
            raise InputError(f"--resume {flags.resume}: not its run's newest; give {path}")
    changed = check_changes(vars(flags), old, flags.force_resume) if old else False
    if changed and checkpoint:  # its codes may be another pool's
        checkpoint["progress"] |= {"codes": None, "sampled": {}}
    return folder, checkpoint


def holds_something(folder):
    """Whether there is more in a run's folder than a start that was killed leaves."""
    return any(path.is_file() and path.name[0] != "." for path in folder.rglob("*"))


def check_changes(new, old, force):
    """Whether flags differ that make a run what it is, from those that it was started with; refused
    without `force`, and for flags of the model always."""
    # A flag that is newer than the run has changed nothing.
    same = CHANGEABLE | (new.keys() - old.keys())
    if new["scheduler"] != "linear_ramp_cosine_decay":  # whose rates depend on the end
        same = same | {"epochs"}
    changed = [name for name in new if name not in same and new[name] != old[name]]
    shown = ", ".join(f"--{name} was {old[name]}, is {new[name]}" for name in changed)
    if any(name in ARCHITECTURE for name in changed):
        raise InputError(
            f"--uid {new['uid']}: that run has another model ({shown}); give its flags, or choose "
            "another --uid (from its weights: --mae_weights)"
        )
    if changed and not force:
        raise InputError(
            f"--uid {new['uid']}: that run was started with other flags ({shown}); give those, or "
            "choose another --uid, or go on all the same with --force_resume 1"
        )
    if changed:
        say(f"warning: going on with other flags: {shown}")
    elif new["epochs"] != old["epochs"]:
        say(f"note: --epochs was {old['epochs']}, is {new['epochs']}")
    return bool(changed)


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
# The checkpoints of a run.


def save_checkpoint(path, state):
    """Saves a dict of tensors and plain data; an OSError where the disk does not take it."""
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # of torch, about a file that it could not finish
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def checkpoint_paths(folder):
    """A run's checkpoints, the newest first."""
    kept = Path(folder, "checkpoints").glob("*step_*.pt")
    return sorted(kept, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(path):
    """The gradient step in a checkpoint's name; -1 where there is none."""
    number = path.stem.split("step_")[-1]
    return int(number) if number.isdecimal() else -1


def newest_checkpoint(folder):
    """(path, content) of the newest checkpoint in a run's folder that can be read, (None, None) in
    a folder without any; an InputError where all are damaged."""
    paths = checkpoint_paths(folder)
    for path in paths:
        try:
            content = read_checkpoint(path)
            missing = {"model", "optimizer", "progress", "args", "metrics_size"} - content.keys()
            if not missing:
                return path, content
            say(f"warning: {path} is no checkpoint of a run (it has no {', '.join(missing)})")
        except InputError as error:
            say(f"warning: {error}; using the one before")
    if paths:
        raise InputError(f"{folder}: none of its {len(paths)} checkpoints can be read")
    return None, None

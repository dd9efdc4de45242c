"""The edges of a run: what a person sees of it, and what it leaves in its folder."""

import contextlib
import csv
import errno
import fcntl
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from PIL import Image

from internals.checkpoints import (
    checkpoint_paths,
    newest_checkpoint,
    read_run_checkpoint,
    save_checkpoint,
    step_of,
)
from internals.plots import draw_curves
from Utils import InputError, from_first_process, naming, rank, say, write_atomically

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


def read_metrics(folder):
    """The records of a run's metrics.jsonl, as a list of dicts; lines that are damaged, or are
    being written, are left out."""
    records = []
    for line in (Path(folder) / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


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
# Where a run stands.


def run_name(script, flags):
    """script-data-arch-ip-hyperparameters-suffix-uid, at most 200 characters, the uid never cut."""
    data = Path(flags.data_tr).resolve()
    ip = "_".join(flags.ip_spec) or "mae"
    numbers = f"bs{flags.mini_bs}-epe{flags.ex_per_epoch}-ipe{flags.ipe}-lr{flags.lr:g}"
    numbers += "" if flags.ignore_z else f"-lrz{flags.lr_z:g}-ns{flags.ns}"
    parts = [script, f"{data.parent.name}_{data.stem}", flags.arch, ip, numbers, flags.suffix]
    name = re.sub(r"[^\w.+-]", "_", "-".join(part for part in parts if part), flags=re.ASCII)
    return f"{name[: 199 - len(flags.uid)]}-{flags.uid}"


def read_config(folder):
    """The flags in a run's config.json; empty where they can't be read."""
    try:
        flags = json.loads((folder / "config.json").read_text())["flags"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return flags if isinstance(flags, dict) else {}


def check_writable(folder):
    """Refuses a folder that can't be made or written to; leaves nothing there."""
    there = folder
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
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


def is_running(folder):
    """Whether a process has locked this run's folder."""
    try:
        file = open(folder / ".lock")  # noqa: SIM115
    except OSError:
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def locate_run(script, flags, *, changeable, architecture):
    """(folder, its checkpoints, the one to go on from or None): of the run with these flags' uid,
    or that --resume names; else a new one. The first process chooses, for all.
    changeable, architecture: see check_changes."""
    chosen, checkpoint = None, None
    if rank() == 0:
        chosen, checkpoint = choose_checkpoint(script, flags, changeable, architecture)
    folder, found, path, changed = from_first_process(chosen)
    if path is not None and rank() > 0:
        with naming("--save_folder, which all processes must share"):
            checkpoint = read_run_checkpoint(path)
    if path is not None and changed:  # its codes may be another pool's
        checkpoint["progress"] |= {"codes": None, "sampled": {}}
    return folder, found, checkpoint


def choose_checkpoint(script, flags, changeable, architecture):
    """(folder, its checkpoints, the path of the one to go on from or None, whether flags have
    changed), and what is in it."""
    models = Path(flags.save_folder).expanduser() / "models"
    if flags.resume:
        folder = Path(flags.resume).absolute().parent.parent
    else:
        named = (path.parent for path in models.glob(f"*-{flags.uid}/config.json"))
        mine = (path for path in named if read_config(path).get("uid") == flags.uid)
        folder = next(mine, models / run_name(script, flags))
    check_writable(folder)
    found = checkpoint_paths(folder)  # before one is read, which takes its time
    path, checkpoint = newest_checkpoint(folder)
    old = checkpoint["args"] if checkpoint else read_config(folder)
    if old.get("uid", flags.uid) != flags.uid or (not old and holds_something(folder)):
        raise InputError(f"--save_folder: {folder} is in the way, and is no run of this --uid")
    if flags.resume and path is None:
        raise InputError(f"--resume {flags.resume}: it is not in the checkpoints/ of its run")
    if flags.resume and not path.samefile(flags.resume):
        step = read_run_checkpoint(flags.resume)["progress"]["step"]
        if step != checkpoint["progress"]["step"]:
            raise InputError(f"--resume {flags.resume}: not its run's newest; give {path}")
    changed = bool(old) and check_changes(
        vars(flags), old, flags.force_resume, changeable=changeable, architecture=architecture
    )
    return (folder, found, path, changed), checkpoint


def holds_something(folder):
    """Whether there is more in a run's folder than a start that was killed leaves."""
    return any(path.is_file() and path.name[0] != "." for path in folder.rglob("*"))


def check_changes(new, old, force, *, changeable, architecture):
    """Whether the training's flags differ: new from those that the run was started with, old. An
    InputError for such changes without `force`, and always for changes of the model.

    changeable, architecture: names of the flags that may always, and may never, change."""
    free = changeable | (new.keys() - old.keys())  # a run of an older version lacks some flags
    if new["scheduler"] != "linear_ramp_cosine_decay":  # only the decay depends on the last epoch
        free = free | {"epochs"}
    changed = [name for name in new if name not in free and new[name] != old[name]]
    changes = ", ".join(f"--{name} was {old[name]}, is {new[name]}" for name in changed)
    if any(name in architecture for name in changed):
        raise InputError(
            f"--uid {new['uid']}: that run has another model ({changes}); give its flags, or "
            "choose another --uid (to start from its weights: --mae_weights)"
        )
    if changed and not force:
        raise InputError(
            f"--uid {new['uid']}: that run was started with other flags ({changes}); give its "
            "flags, or choose another --uid, or go on all the same with --force_resume 1"
        )
    if changed:
        say(f"warning: going on with other flags: {changes}")
    elif new["epochs"] != old.get("epochs", new["epochs"]):
        say(f"note: --epochs was {old['epochs']}, is {new['epochs']}")
    return bool(changed)


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

"""A run's folder: finding it by the run's uid; locking it against a second process; writing metrics
and pictures."""

import contextlib
import errno
import fcntl
import glob
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
from typing import NamedTuple

from PIL import Image

from internals.checkpoints import (
    RUN_PARTS,
    checkpoint_paths,
    newest_checkpoint,
    read_run_checkpoint,
    refuse_unknown,
    step_of,
)
from internals.plots import at_most_a_warning, draw_curves
from Utils import InputError, from_first_process, naming, printable, rank, say, write_atomically

# -------------------------------------------------------------------------------------------------
# Finding a run.


class Start(NamedTuple):
    """From where a run starts or goes on."""

    folder: Path
    paths: list  # the checkpoints in the folder
    path: Path | None = None  # the checkpoint to go on from
    checkpoint: dict | None = None  # its content
    changed: bool = False  # whether flags or images differ from those that the run was started with


def locate_run(script, flags, *, changeable, architecture, data=None):
    """The Start of the run that --resume names, else of the run with the flags' uid, else of a new
    run. changeable, architecture: names of flags, see check_changes; data: see check_data."""
    return on_all_processes(lambda: find_run(script, flags, changeable, architecture, data or {}))


def on_all_processes(find, parts=RUN_PARTS):
    """Returns, on all processes, the Start that find() returns on the first process. Every process
    reads the checkpoint itself."""
    start = find() if rank() == 0 else None
    shared = from_first_process(start and start._replace(checkpoint=None))
    if rank() == 0 or shared.path is None:
        return start or shared
    with naming("--save_folder, which all processes must share"):
        return shared._replace(checkpoint=read_run_checkpoint(shared.path, parts))


def find_in_folder(folder, parts=RUN_PARTS):
    """The Start in a run's folder: at its newest checkpoint that can be read."""
    check_writable(folder)
    # Listed before one is read: if the list changes meanwhile, Run.open_folder refuses the folder.
    paths = checkpoint_paths(folder)
    return Start(folder, paths, *newest_checkpoint(folder, parts))


def find_run(script, flags, changeable, architecture, data):
    """See locate_run; for the first process."""
    if flags.resume:
        folder = Path(flags.resume).expanduser().absolute().parent.parent
    else:
        folder = folder_of(flags.uid, flags.save_folder)
        folder = folder or models_folder(flags.save_folder) / run_name(script, flags)
    start = find_in_folder(folder)
    old = start.checkpoint["args"] if start.checkpoint else read_config(folder)
    if old.get("uid", flags.uid) != flags.uid or (not old and holds_files(folder)):
        reason = f"{folder} is in the way, and is no run of this --uid"
        raise InputError(f"--save_folder: {reason}; choose another --save_folder or --uid")
    # A run that torchrun has restarted has newer checkpoints than the one that --resume names.
    if flags.resume and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        check_resume(flags.resume, start)
    if not old:
        return start
    checkpoint = start.checkpoint or {"data": {}}
    refuse_unknown(checkpoint, RUN_PARTS | {"data"}, start.path)
    if "data" in checkpoint:  # else only the flag tells which images the run was trained on
        changeable = changeable | {"data_tr"}
    changed = check_changes(vars(flags), current_flags(old), changeable, architecture)
    changes = check_data(
        folder,
        data,
        checkpoint.get("data"),
        force=flags.force_resume,
        # Another path to validation images is meant to lead to other images.
        may_differ={"data_val"} if flags.data_val != old.get("data_val") else set(),
    )
    changed |= "data_tr" in changes
    return start._replace(changed=changed)


def models_folder(save_folder):
    """The folder that holds the folders of all runs."""
    return Path(save_folder).expanduser() / "models"


def folder_of(uid, save_folder):
    """The folder of the run with this uid; None if there is none."""
    configs = models_folder(save_folder).glob(f"*-{glob.escape(str(uid))}/config.json")
    named = (path.parent for path in configs)
    return next((path for path in named if read_config(path).get("uid") == uid), None)


# Flags that version 0.1.0 lacked, with the values that do what its runs did; and flags of version
# 0.1.0 that this version lacks, with the values that had no effect.
ADDED_FLAGS = {"mae_loss_weight": 0.0}
REMOVED_FLAGS = {"code_free_share": 0.0}


def current_flags(flags):
    """The flags of a run, a dict, as this version would store them. An InputError if the run used a
    flag that this version lacks."""
    for name, value in REMOVED_FLAGS.items():
        if flags.get(name, value) != value:
            raise InputError(
                f"--{name} {flags[name]}, which this run used, is no flag of this version; go on "
                "with version 0.1.0, or start from the run's weights: --mae_weights CHECKPOINT"
            )
    kept = {name: value for name, value in flags.items() if name not in REMOVED_FLAGS}
    return ADDED_FLAGS | kept


def check_resume(path, start):
    """Refuses a --resume PATH that is not at the step of its run's newest checkpoint."""
    if start.path is None:
        raise InputError(f"--resume {path}: it is not in the checkpoints/ folder of a run")
    if not start.path.samefile(Path(path).expanduser()):
        step = read_run_checkpoint(path, mmap=True)["progress"]["step"]
        if step != start.checkpoint["progress"]["step"]:
            reason = "it is not the newest checkpoint of its run"
            raise InputError(f"--resume {path}: {reason}; give {start.path}")


def holds_files(folder):
    """Whether a folder holds files, other than the hidden ones that a killed start may leave."""
    return any(path.is_file() and path.name[0] != "." for path in folder.rglob("*"))


def run_name(script, flags):
    """script-data-arch-ip-hyperparameters-suffix-uid, at most 200 characters, the uid never cut."""
    data = Path(flags.data_tr).resolve()
    ip = "_".join(flags.ip_spec) or "mae"
    numbers = f"bs{flags.mini_bs}-epe{flags.ex_per_epoch}-ipe{flags.ipe}-lr{flags.lr:g}"
    numbers += "" if flags.ignore_z else f"-lrz{flags.lr_z:g}-ns{flags.ns}"
    parts = [script, f"{data.parent.name}_{data.stem}", flags.arch, ip, numbers, flags.suffix]
    name = re.sub(r"[^\w.+-]", "_", "-".join(part for part in parts if part), flags=re.ASCII)
    return f"{name[: 199 - len(flags.uid)]}-{flags.uid}"


def check_changes(new, old, changeable, architecture):
    """Compares the flags of a run (old) with those of the command that goes on with it (new), both
    dicts. Returns whether flags differ other than those that may. An InputError if so without
    --force_resume 1, or if the model differs.

    changeable: names of the flags that may differ; architecture: of those that never may."""
    refuse_unknown(old, new, f"--uid {new['uid']}: that run")
    # Flags that did not exist yet when the run was started count as equal.
    ignored = changeable | (new.keys() - old.keys())
    if new["scheduler"] != "linear_ramp_cosine_decay":  # its rates depend on the number of epochs
        ignored = ignored | {"epochs"}
    changed = [name for name in new if name not in ignored and new[name] != old[name]]
    shown = ", ".join(f"--{name} was {old[name]}, is {new[name]}" for name in changed)
    if any(name in architecture for name in changed):
        raise InputError(
            f"--uid {new['uid']}: that run has another model ({shown}); give its flags, or choose "
            "another --uid (to start from that run's weights: --mae_weights CHECKPOINT)"
        )
    if changed and not new["force_resume"]:
        raise InputError(
            f"--uid {new['uid']}: that run was started with other flags ({shown}); give those, or "
            "choose another --uid, or go on all the same with --force_resume 1"
        )
    if changed:
        say(f"warning: going on with other flags: {shown}")
    elif new["epochs"] != old.get("epochs", new["epochs"]):
        say(f"note: --epochs was {old['epochs']}, is {new['epochs']}")
    return bool(changed)


def check_data(folder, new, old, *, force, may_differ=()):
    """Compares the images of a command (new) with those of the run in `folder` (old, may be None),
    dicts: flag -> Images.fingerprint(). Returns {flag: what differs}. An InputError if images of a
    flag that is not in may_differ differ, unless `force`."""
    changes = {}
    for flag, fingerprint in new.items():
        if text := data_changes(fingerprint, (old or {}).get(flag, fingerprint)):
            changes[flag] = text
    shown = "; ".join(f"--{flag} {text}" for flag, text in changes.items())
    if changes.keys() - may_differ and not force:
        raise InputError(
            f"{folder} was started with other images: {shown}; give those images, start anew in "
            "another --save_folder, or go on all the same with --force_resume 1"
        )
    if changes:
        say(f"warning: going on with other images: {shown}")
    return changes


def data_changes(new, old):
    """What differs between two fingerprints of images, as text; "" if nothing does."""
    changes, old = [], new | old  # fields that another version lacks count as equal
    if new["images"] != old["images"]:
        changes.append(f"had {old['images']} images, has {new['images']}")
    for verb, one, other in (("lacks the", old, new), ("has the new", new, old)):
        if classes := sorted(set(one["classes"]) - set(other["classes"])):
            more = f" ({len(classes)} such)" if len(classes) > 1 else ""
            changes.append(f"{verb} class {printable(classes[0])}{more}")
    for name, text in (
        ("entries", "has other names of files"),
        ("contents", "has other files of the same names"),
    ):
        if not changes and new[name] != old[name]:
            changes.append(text)
    return ", ".join(changes)


def read_config(folder):
    """The flags in a run's config.json; an empty dict if they can't be read."""
    return flags_of(read_description(folder))


def flags_of(description):
    """The flags in the content of a run's config.json; an empty dict if there are none."""
    flags = description.get("flags")
    return flags if isinstance(flags, dict) else {}


def read_description(folder):
    """The content of a run's config.json; an empty dict if it can't be read."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_writable(folder):
    """Refuses a folder that can't be made or written to; leaves nothing there."""
    parent = folder
    try:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise InputError(f"--save_folder: cannot write to {parent}: {error.strerror}") from None


# -------------------------------------------------------------------------------------------------
# One process per run.


def lock(path, title, patience=5.0):
    """Locks the file at `path` and returns the lock, an open file: until it is closed, or this
    process ends, no other process can lock it. An InputError about `title`, which the lock guards,
    if another process still holds the lock after `patience` seconds.

    A POSIX lock, not filelock's: forked loader workers, which may outlive this process, would
    inherit filelock's and hold it."""
    file = open(path, "a+")  # noqa: SIM115
    end = time.monotonic() + patience  # a process that was killed may need a moment to end
    while not try_lock(file, fcntl.LOCK_EX):
        if time.monotonic() > end:
            file.seek(0)
            raise InputError(f"{title} is in use by {file.read() or 'another process'}")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def try_lock(file, kind):
    """Tries to lock a file: kind LOCK_EX for this process alone, LOCK_SH shared. Returns False if
    another process holds the lock. Where files can't be locked, warns and returns True."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if kind == fcntl.LOCK_EX:
            say(f"warning: {file.name} can't be locked ({error.strerror}); start each run once")
    return True


def is_running(folder):
    """Whether a process runs in this run's folder."""
    try:
        with open(folder / ".lock") as file:
            return not try_lock(file, fcntl.LOCK_SH)
    except OSError:
        return False


# -------------------------------------------------------------------------------------------------
# What a run writes.


class Run:
    """Writes config.json, metrics.jsonl, curves.png and images/ in a run's folder, on the first
    process only. The local files are the truth; W&B mirrors them and may fail without harm."""

    def __init__(self, start, flags, *, wandb="disabled", curves=True):
        """Touches no file: `with` does, and cuts off metrics that are newer than the checkpoint.
        start: of locate_run; flags: a dict, for config.json; wandb: disabled, offline or online;
        curves: whether curves.png is drawn."""
        self.folder, self.flags, self.main = start.folder, flags, rank() == 0
        checkpoint = start.checkpoint or {"progress": {"step": -1}, "metrics_size": 0}
        self.start_paths = start.paths  # not `start`, which would keep the checkpoint in memory
        self.start_step = checkpoint["progress"]["step"]
        self.start_size = checkpoint["metrics_size"]  # of metrics.jsonl, in bytes
        self.wandb_mode, self.curves = wandb, curves
        self.waiting_pictures = {}  # file name -> bytes that are not written to the disk yet
        self.waiting_lines = b""  # lines of metrics.jsonl that are not written to the disk yet
        self.next_drawing = 0.0  # earliest time of draw_curves_if_due, by time.monotonic

    def __enter__(self):
        if self.main:
            config = describe_run(self.flags)
            try:
                self.open_folder(config)
            except OSError as error:
                raise InputError(
                    f"--save_folder: cannot write to {self.folder}: {error.strerror}"
                ) from None
            self.wandb = WandB(self.wandb_mode, self.folder, config)
        return self

    def open_folder(self, config):
        """Makes and locks the folder, and clears away what a killed process left there."""
        folders = [self.folder, self.folder / "images", self.folder / "checkpoints"]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder / ".lock", self.folder)
        if checkpoint_paths(self.folder) != self.start_paths:
            reason = f"another process wrote checkpoints in {self.folder} meanwhile"
            raise InputError(f"{reason}; start this command again")
        for folder in folders:
            for unfinished in folder.glob(".*.tmp"):
                unfinished.unlink()
        for path in self.start_paths:
            if step_of(path) > self.start_step:  # newer, but could not be read
                path.rename(path.with_suffix(".damaged"))
        write_atomically(self.folder / "config.json", json.dumps(config, indent=2).encode())
        self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
        self.metrics.truncate(min(self.start_size, self.metrics.tell()))
        self.metrics.seek(0, os.SEEK_END)

    def __exit__(self, *_):
        if self.main:
            with contextlib.suppress(OSError):
                self.write_waiting()
            self.draw_curves()
            self.metrics.close()
            self.wandb.close()
            self.lock.close()

    def log(self, step, epoch, values):
        """Appends one JSON object to metrics.jsonl. A picture (key images/...) becomes a file, and
        the JSON object holds the file's name."""
        if not self.main:
            return
        values = {"epoch": epoch, "pretrain/step": step, **values}
        record = dict(values)
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[key] = None  # JSON has no infinities
            if isinstance(value, Image.Image):
                name, record[key] = f"images/{key.split('/')[-1]}_{step:08d}.png", None
                with at_most_a_warning(name):
                    value.save(file := io.BytesIO(), "png")
                    self.waiting_pictures[name], record[key] = file.getvalue(), name
        self.waiting_lines += json.dumps(record).encode() + b"\n"
        try:
            self.write_waiting()
        except OSError as error:
            say(f"warning: {self.folder}: {error.strerror}; metrics and pictures wait in memory")
        self.wandb.log(step, values)

    def write_waiting(self):
        """Writes the waiting lines, an OSError if the disk refuses one; then the waiting pictures,
        which go on waiting, with a warning, if the disk refuses one."""
        while self.waiting_lines:
            self.waiting_lines = self.waiting_lines[self.metrics.write(self.waiting_lines) :]
        try:
            for name, content in list(self.waiting_pictures.items()):
                write_atomically(self.folder / name, content)
                del self.waiting_pictures[name]
        except OSError as error:
            n = len(self.waiting_pictures)
            say(f"warning: {self.folder / name}: {error.strerror}; {n} pictures are not written")

    def flush(self):
        """Makes sure that metrics.jsonl is on the disk. Returns the file's size in bytes."""
        self.write_waiting()
        os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    def draw_curves_if_due(self):
        """Draws curves.png if the last drawing, which takes about a second of one core, was more
        than 30 seconds ago. The end of the run draws it in any case."""
        if time.monotonic() >= self.next_drawing:
            self.draw_curves()
            self.next_drawing = time.monotonic() + 30

    def draw_curves(self):
        """Draws curves.png anew from metrics.jsonl."""
        if self.main and self.curves:
            with at_most_a_warning(path := self.folder / "curves.png"):
                runs = {self.folder.name: read_metrics(self.folder)}
                draw_curves(runs, path, title=self.folder.name)


class WandB:
    """Mirrors metrics and pictures to Weights & Biases. Any failure of W&B costs one warning."""

    def __init__(self, mode, folder, config):
        self.run = None
        if mode != "disabled":
            self.attempt(lambda: self.start(mode, folder, config))

    def attempt(self, action):
        """Calls action(). If it fails, prints a warning and switches W&B off for the rest of the
        run."""
        try:
            action()
        except Exception as error:  # no error of W&B may end the run
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
            self.attempt(lambda: self.run.log(self.converted(values), step=step))

    def converted(self, values):
        """The values, with each picture as a wandb.Image."""
        return {k: self.image(v) if isinstance(v, Image.Image) else v for k, v in values.items()}

    def close(self):
        if self.run is not None:
            self.attempt(self.run.finish)


def read_metrics(folder):
    """The records of a run's metrics.jsonl, a list of dicts, without lines that are damaged or
    still being written."""
    records = []
    for line in (Path(folder) / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def describe_run(flags):
    """The content of config.json: resolved flags, versions, git commit, command."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        folder = Path(__file__).parent
        git = subprocess.run(describe, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:
        git = ""  # there is no git
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    return {
        "flags": flags,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "git_commit": git or None,
        "command": shlex.join([sys.executable, *sys.argv]),
    }

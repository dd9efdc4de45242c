"""Where a run stands: finding it by its uid, whether it may go on with these flags, one process at
a time; saving and loading its checkpoints."""

import errno
import fcntl
import json
import os
import platform
import re
import tempfile
import time
from pathlib import Path

import torch

from Utils import InputError, from_first_process, naming, rank, say, write_atomically
from Weights import read_run_checkpoint


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
    "data_val gpus processes num_workers loader_timeout sample_dtype fp16 code_bs sp accum "
    "fast_linear_probe val_n_way val_n_shot probe_lr probe_epochs probe_bs probe_bs_val "
    "probe_ignore_z probe_augs_per_image global_pool ex_for_mse_loss z_per_ex_loss eval_bs "
    "ex_for_vis_tr ex_for_vis_te z_per_ex_vis steps_per_eval get_mae_baseline save_folder suffix "
    "uid resume force_resume save_iter save_minutes staged wandb notes mae_weights "
    "skip_bad_images".split()
)
# What may never: the sizes of its model. The rest makes it the run it is, and needs --force_resume.
ARCHITECTURE = frozenset(
    "arch ip_spec latent_dim mapping_net_layers mapping_net_h_dim mapping_net_lrmul act_type "
    "adain_init decoder norm_pix_loss input_size ignore_z".split()
)


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


def locate_run(script, flags):
    """(folder, its checkpoints, the one to go on from or None): of the run with these flags' uid,
    or that --resume names; else a new one. The first process chooses, for all."""
    chosen, checkpoint = choose_checkpoint(script, flags) if rank() == 0 else (None, None)
    folder, found, path, changed = from_first_process(chosen)
    if path is not None and rank() > 0:
        with naming("--save_folder, which all processes must share"):
            checkpoint = read_run_checkpoint(path)
    if path is not None and changed:  # its codes may be another pool's
        checkpoint["progress"] |= {"codes": None, "sampled": {}}
    return folder, found, checkpoint


def choose_checkpoint(script, flags):
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
    changed = check_changes(vars(flags), old, flags.force_resume) if old else False
    return (folder, found, path, changed), checkpoint


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
    elif new["epochs"] != old.get("epochs", new["epochs"]):
        say(f"note: --epochs was {old['epochs']}, is {new['epochs']}")
    return bool(changed)


# -------------------------------------------------------------------------------------------------


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
            return path, read_run_checkpoint(path)
        except InputError as error:
            say(f"warning: {error}; using the one before")
    if paths:
        raise InputError(f"{folder}: none of its {len(paths)} checkpoints can be read")
    return None, None

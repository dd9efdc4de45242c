"""Checkpoints: tensors and plain data, saved whole or not at all, read without running code."""

import argparse
import contextlib
import errno
import math
import os
import pickle
import re
import time
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from internals.processes import Stopped
from Utils import (
    InputError,
    RunError,
    duration,
    first_line,
    rank,
    say,
    sum_over_processes,
    write_atomically,
)

# Errors of a disk or of the system: the file itself may be whole, and readable another time.
TEMPORARY_ERRORS = {errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE}


def read_checkpoint(path, mmap=False):
    """Returns the dict in a checkpoint of ours or of facebookresearch/mae (whose training files
    hold an argparse.Namespace). An InputError if the file is missing or damaged, or if reading it
    would run code. mmap: each tensor stays in the file until it is used."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        is_zip = zipfile.is_zipfile(path)  # torch before 1.6 wrote other files
        if is_zip and (bad := zipfile.ZipFile(path).testzip()):
            raise InputError(f"{path} is damaged: its part {bad} has a wrong checksum")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            # torch maps no file whose name is no UTF-8.
            mmap = mmap and is_zip and os.fsencode(path) == str(path).encode(errors="replace")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors and plain data, or is no checkpoint"
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"beside tensors and plain data it holds {name[1]}; where you trust the file, "
            reason += "save its state dict alone by torch.save, and give that"
        raise InputError(f"{path} was refused: {reason}") from None
    except InputError:
        raise
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in TEMPORARY_ERRORS:
            raise RunError(f"{path} can't be read: {error.strerror}") from None
        raise InputError(f"{path} is damaged, or no checkpoint ({error})") from None
    except Exception as error:  # a foreign file can make torch and zipfile raise any error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path} is damaged, or no checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def refuse_unknown(names, known, owner):
    """Refuses a checkpoint with names that are not among the `known` ones. owner: what has them."""
    if unknown := sorted(map(str, set(names) - set(known))):
        more = f" ({len(unknown)} such)" if len(unknown) > 1 else ""
        raise InputError(
            f"{owner} has the unknown field {unknown[0]:.80}{more}: a newer version of IMLE-SSL "
            "made this checkpoint; use that version"
        )


# What a training run's checkpoint holds. `args`: the flags; `metrics_size`: bytes of metrics.jsonl.
# Beside these, `data`: the fingerprints of the images, which version 0.1.0 did not save.
RUN_PARTS = {"model", "config", "optimizer", "scaler", "progress", "args", "metrics_size"}


def read_run_checkpoint(path, parts=RUN_PARTS, mmap=False):
    """Returns the dict in a checkpoint of a run, from which the run can go on; an InputError if one
    of `parts` is missing. mmap: see read_checkpoint."""
    content = read_checkpoint(path, mmap)
    if missing := sorted(parts - content.keys()):
        others = ", ".join(map(str, list(content.keys() - parts)[:5])) or "nothing else"
        missing = ", ".join(missing)
        raise InputError(f"{path} is no checkpoint of a run: it lacks {missing}; it has {others}")
    for name in ("args", "progress", "config", "data"):
        if not isinstance(content.get(name, {}), dict):
            raise InputError(f"{path} is no checkpoint of a run: its {name} is no dict")
    return content


def save_checkpoint(path, content):
    """Writes a dict of tensors and plain data to `path`, whole or not at all; an OSError if the
    disk refuses it."""
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except RuntimeError as error:  # torch raises it for a file that it could not finish
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def checkpoint_paths(folder):
    """The paths of a run's checkpoints, the newest first."""
    paths = Path(folder, "checkpoints").glob("*step_*.pt")
    return sorted(paths, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(path):
    """The gradient step in a checkpoint's file name; -1 if there is none."""
    number = path.stem.split("step_")[-1]
    return int(number) if number.isdecimal() else -1


def newest_checkpoint(folder, parts=RUN_PARTS, mmap=False):
    """Returns (path, content) of the newest checkpoint in a run's folder that can be read; (None,
    None) for a folder without checkpoints; an InputError if all are damaged."""
    paths = checkpoint_paths(folder)
    for path in paths:
        try:
            return path, read_run_checkpoint(path, parts, mmap)
        except InputError as error:
            say(f"warning: {error}; using the one before")
    if paths:
        raise InputError(f"{folder}: none of its {len(paths)} checkpoints can be read")
    return None, None


# -------------------------------------------------------------------------------------------------
# What a run saves, and when.


class Checkpoints:
    """The checkpoints of one run. Gets the parts of a checkpoint once; then saves and restores all
    of them."""

    def __init__(self, folder, **parts):
        """parts: name -> an object with state_dict() and load_state_dict(), or plain data, which is
        saved as it is and not restored."""
        self.folder, self.parts = Path(folder, "checkpoints"), parts

    def state_dict(self):
        """The content of a checkpoint now."""
        return {
            name: part.state_dict() if hasattr(part, "state_dict") else part
            for name, part in self.parts.items()
        }

    def restore(self, content):
        """Sets every part to its state in `content`, the dict in a checkpoint."""
        for name, part in self.parts.items():
            has_state = hasattr(part, "load_state_dict")
            if has_state and content[name]:  # the state of a disabled gradient scaler is empty
                try:
                    part.load_state_dict(content[name])
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, LookupError, TypeError) as error:
                    reason = " ".join(str(error).split())
                    raise InputError(
                        f"{self.folder}: the {name} of the newest checkpoint does not fit this "
                        f"version or this command: {reason:.300}"
                    ) from None

    def save(self, progress, *, metrics_size, keep=False):
        """Writes a checkpoint and deletes all but the newest two. keep: also writes a copy that is
        never deleted. An OSError if the disk refuses it; older checkpoints then stay."""
        content = {**self.state_dict(), "metrics_size": metrics_size}
        save_checkpoint(newest := self.folder / f"step_{progress.step:08d}.pt", content)
        if keep:
            kept = self.folder / f"epoch_{progress.epoch:06d}_step_{progress.step:08d}.pt"
            try:
                os.link(newest, kept)
            except OSError:  # it exists, or this disk has no hard links
                save_checkpoint(kept, content)
        for old in sorted(self.folder.glob("step_*.pt"))[:-2]:
            old.unlink()


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint needs beside the weights and the optimizer."""

    epoch: int = 0  # finished epochs
    step: int = 0  # gradient steps done
    epoch_step: int = 0  # gradient steps done in the current epoch
    totals: dict = field(default_factory=dict)  # metric -> its sum over the current epoch's steps
    counts: dict = field(default_factory=dict)  # metric -> the number of steps that had it
    epoch_metrics: dict = field(default_factory=dict)  # metrics of the current epoch as a whole
    # IMLE: numbers of the codes that are chosen for the images of the current pool (n,), -1 for an
    # image without a code yet, and three losses of each image (n, 3): see choose_chunk_codes in
    # TrainIMLE.py. Version 0.1.0 kept the codes themselves (n, D).
    codes: torch.Tensor | None = None
    code_losses: torch.Tensor | None = None
    validated: int = -1  # the last step that was validated
    seconds: float = 0.0  # of training, without validation

    def step_done(self, metrics):
        """Counts a gradient step. metrics: {name: number or tensor} of this step; means of tensors
        are tensors, which Run.log can't write."""
        self.step += 1
        self.epoch_step += 1
        for name, value in metrics.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def epoch_done(self):
        """Counts an epoch, and returns its metrics: step metrics as means over its steps."""
        means = {name: total / self.counts[name] for name, total in self.totals.items()}
        metrics = means | self.epoch_metrics
        self.epoch += 1
        self.epoch_step, self.codes, self.code_losses = 0, None, None
        self.totals, self.counts, self.epoch_metrics = {}, {}, {}
        return metrics

    def last_step(self, epochs, steps_per_epoch):
        """How many gradient steps are done when the run ends: those done already, and those left.
        Equals epochs * steps_per_epoch unless one of the two changed when the run went on."""
        epochs_left = max(0, epochs - self.epoch)
        return self.step + epochs_left * steps_per_epoch - min(self.epoch_step, steps_per_epoch)

    def forget_codes(self):
        """Drops the codes that are chosen for the current pool, so that all are chosen anew."""
        self.codes, self.code_losses, self.epoch_metrics = None, None, {}

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        """Takes a state of this version or of version 0.1.0."""
        state = from_version_0_1(state) if "losses" in state else state
        refuse_unknown(state, vars(self), "the progress in the newest checkpoint")
        vars(self).update(state)


def from_version_0_1(state):
    """The state of Progress from that of version 0.1.0, which kept lists of losses and norms."""
    state = dict(state)
    losses, norms, sampled = (state.pop(name, []) for name in ("losses", "norms", "sampled"))
    norms = [norm for norm in norms if math.isfinite(norm)]
    series = {"pretrain/loss_tr": losses, "pretrain/grad_norm": norms}
    return {
        **state,
        "epoch_step": len(losses),
        "totals": {name: sum(values) for name, values in series.items() if values},
        "counts": {name: len(values) for name, values in series.items() if values},
        "epoch_metrics": dict(sampled),
    }


class Keeper:
    """Saves a run's checkpoints when due, stops the run when a signal asked for that, and measures
    the training time. All processes call each method together."""

    def __init__(self, run, checkpoints, progress, stop, *, save_minutes):
        self.run, self.checkpoints, self.progress, self.stop = run, checkpoints, progress, stop
        self.save_seconds = 60 * save_minutes
        self.started = self.epoch_started = self.counted = time.monotonic()
        self.next_save = self.started + self.save_seconds
        self.first_epoch = progress.epoch
        self.must_keep = False  # True: the next save must stay for good, as such a save failed

    def count_time(self):
        """Adds the time since the last call to progress.seconds."""
        now = time.monotonic()
        self.progress.seconds += now - self.counted
        self.counted = now

    def save(self, keep=False):
        """Saves a checkpoint; keep: one that stays for good. An OSError if the disk refuses it."""
        self.count_time()
        self.must_keep |= keep
        if rank() == 0:
            size = self.run.flush()
            self.checkpoints.save(self.progress, metrics_size=size, keep=self.must_keep)
        self.must_keep = False
        self.next_save = time.monotonic() + self.save_seconds

    def try_to_save(self, keep=False):
        """Saves, or warns that the disk refused it; the next try is within a minute."""
        try:
            self.save(keep)
        except OSError as error:
            say(f"warning: no checkpoint could be saved ({error}); the next try is in a minute")
            self.next_save = time.monotonic() + min(60, self.save_seconds)

    def save_last(self):
        """Saves as the run ends; a RunError if the disk refuses it."""
        try:
            self.save()
        except OSError as error:
            raise RunError(f"the last checkpoint could not be saved: {error}") from None
        sum_over_processes(torch.zeros(()))  # all wait here until the checkpoint is written

    def wants_to_save(self):
        """Whether any process was asked to stop, or save_minutes have passed since the last save,
        by the first process's clock. The same on all processes."""
        due = self.stop.asked() or (rank() == 0 and time.monotonic() > self.next_save)
        due = torch.tensor(due, dtype=torch.int32)
        sum_over_processes(due)
        return bool(due)

    def after_step(self):
        """Stops the run if it was asked to; saves if save_minutes have passed."""
        self.stop.check()
        self.count_time()
        if time.monotonic() > self.next_save:
            self.try_to_save()

    def after_epoch(self, metrics, line, *, epochs, keep=False):
        """Logs the metrics of an epoch that is done, and prints `line` about it. keep: saves a
        checkpoint that stays for good."""
        self.count_time()
        now, epoch = time.monotonic(), self.progress.epoch
        timed = {
            "time/epoch_seconds": now - self.epoch_started,
            "time/training_seconds": self.progress.seconds,
        }
        self.run.log(self.progress.step, epoch - 1, metrics | timed)
        left = (now - self.started) / (epoch - self.first_epoch) * (epochs - epoch)
        seconds = duration(timed["time/epoch_seconds"])
        say(f"epoch {epoch}/{epochs}: {line}; {seconds}, {duration(left)} left")
        self.epoch_started = now
        if keep:
            self.try_to_save(keep=True)

    @contextlib.contextmanager
    def saving_at_the_end(self):
        """Saves when the training inside `with` ends, or is stopped by a signal."""
        folder, progress = self.run.folder, self.progress
        try:
            yield
        except Stopped as stopped:
            self.save_last()
            message = f"stopped after step {progress.step}, saved in {folder}"
            raise Stopped(message, stopped.status) from None
        self.save_last()

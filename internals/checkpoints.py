"""Checkpoints: tensors and plain data, saved whole or not at all, read without running code."""

import argparse
import errno
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from Utils import InputError, RunError, say, write_atomically

# Of a disk or a system, not of a file: it may be whole, and readable another time.
PASSING = {errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE}


def read_checkpoint(path, mmap=False):
    """The dict in a checkpoint of ours or of facebookresearch/mae, whose training files hold an
    argparse.Namespace; an InputError where it is missing, damaged, or wants to run code. mmap: the
    tensors stay in the file until they are read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        is_zip = zipfile.is_zipfile(path)  # else a file of torch before 1.6
        if is_zip and (bad := zipfile.ZipFile(path).testzip()):
            raise InputError(f"{path} is damaged: its part {bad} has a wrong checksum")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            mmap = mmap and is_zip
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        reason = "it holds more than tensors and plain data, or is no checkpoint"
        raise InputError(f"{path} was refused: {reason}") from None
    except InputError:
        raise
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in PASSING:
            raise RunError(f"{path} can't be read: {error.strerror}") from None
        raise InputError(f"{path} is damaged, or no checkpoint ({error})") from None
    except Exception as error:  # whatever a foreign file makes torch's and zipfile's readers raise
        reason = f" ({type(error).__name__})"
        raise InputError(f"{path} is damaged, or no checkpoint{reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


RUN_PARTS = {"model", "config", "optimizer", "scaler", "progress", "args", "metrics_size"}


def read_run_checkpoint(path):
    """The dict in a checkpoint that a run can go on from; an InputError that says what is missing
    and what is there instead."""
    content = read_checkpoint(path)
    if missing := sorted(RUN_PARTS - content.keys()):
        others = ", ".join(map(str, list(content.keys() - RUN_PARTS)[:5])) or "nothing else"
        missing = ", ".join(missing)
        raise InputError(f"{path} is no checkpoint of a run: it lacks {missing}; it has {others}")
    if not isinstance(content["args"], dict) or not isinstance(content["progress"], dict):
        raise InputError(f"{path} is no checkpoint of a run: its args or progress are no dict")
    return content


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

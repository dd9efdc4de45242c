"""Writes a small copy of a checkpoint, to share: only the weights, in half precision. A run can't
be resumed from the copy, but a new run can start from its weights."""

import argparse

import _path  # noqa: F401 (makes the modules importable)

from internals.checkpoints import save_checkpoint
from internals.processes import run_command
from internals.weights import read_content
from Utils import InputError


def main(argv=None):
    """python scripts/slim_checkpoint.py CHECKPOINT OUT"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="A run's checkpoint, or its folder."
    )
    parser.add_argument("out", metavar="OUT", help="File to write.")
    args = parser.parse_args(argv)
    run_command(lambda: slim(args.checkpoint, args.out))


def slim(source, out):
    """Writes the model and config of a checkpoint, in float16."""
    _, content = read_content(source)
    if not {"model", "config"} <= content.keys():
        raise InputError(f"{source} is no checkpoint of IMLE-SSL: it has no model or no config")
    weights = {name: tensor.half() for name, tensor in content["model"].items()}
    try:
        save_checkpoint(out, {"model": weights, "config": content["config"]})
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None


if __name__ == "__main__":
    main()

"""Finds a network's tensors in the checkpoint of any training program: in nested dicts, under
prefixes, beside other networks."""

import re
from collections import Counter
from pathlib import Path

import torch

from Utils import InputError, say

# What DDP, torch.compile, FSDP and activation checkpointing add to the names of tensors.
WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])")  # names of a moving average of a network's weights


def split_key(source):
    """A source of weights, and the name behind its "#", which says which network of a file is
    meant; "" without a "#"."""
    path, mark, key = str(source).rpartition("#")
    is_key = mark and not Path(source).expanduser().exists()
    return (path, key) if is_key else (str(source), "")


def named_tensors(content, prefix=""):
    """Yields (name, tensor) of all tensors in nested dicts; a name is the dicts' keys with dots."""
    for key, value in content.items():
        if torch.is_tensor(value) and isinstance(key, str):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict) and isinstance(key, str):
            yield from named_tensors(value, f"{prefix}{key}.")


def unwrap(content, names, *, path, key="", refusal):
    """The state dict, without prefixes, of the network in a file's dict that has most of the
    tensors `names`, and where this state dict lay: "model", "teacher.backbone".

    key: a part of that place, where a file has several such networks; an InputError lists them.
    refusal: what an InputError says if there is none. path: of the file, for messages."""
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in named_tensors(content)}
    if not tensors:
        keys = ", ".join(map(str, content))
        raise InputError(f"{path} holds no state dict (tensors by name), only {keys:.200}")
    counts = Counter()  # place -> how many of the names are there
    for name in tensors:
        dots = [-1, *(match.start() for match in re.finditer(r"\.", name))]
        counts.update(name[: max(dot, 0)] for dot in dots if name[dot + 1 :] in names)
    most = max(counts.values(), default=0)
    if not most:
        shown = ", ".join(list(tensors)[:5])
        raise InputError(f"{refusal}: it has {len(tensors)} tensors, such as {shown:.300}")
    found = [place for place, count in counts.items() if 2 * count > most]
    place = choose_place(found, key, path)
    prefix = place and f"{place}."
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}, place


def choose_place(found, key, path):
    """One of the places of networks; an InputError if it is not clear which. Says which one is
    taken, unless it is the usual place."""
    chosen = [place for place in found if f".{key}." in f".{place}." or not key]
    # A network inside a chosen one is a part of this one.
    chosen = [a for a in chosen if not any(a.startswith(b and f"{b}.") for b in chosen if b != a)]
    trained = [place for place in chosen if not AVERAGE.search(place)]
    chosen = trained if len(trained) == 1 else chosen
    if len(chosen) != 1:
        what = f"has no network {key!r}" if key and not chosen else "has several networks"
        places = " or ".join(f"#{place}" for place in found)
        raise InputError(f"{path} {what}; write behind its name which one: {places}")
    others = [place for place in found if not place.startswith(chosen[0])]
    if others or chosen[0] not in ("", "model"):
        more = f"; for others write behind its name: #{', #'.join(others)}" if others else ""
        say(f"note: {path}: taken are the weights under {chosen[0] or 'no key'!r}{more}")
    return chosen[0]

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
# In names of a moving average of a network's weights: model_ema, state_dict_ema, EMA.
AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)


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
    tensors `names`, and where this state dict lay: "model", "teacher.backbone". A note says so.

    key: a part of that place, where a file has several such networks; an InputError lists them.
    refusal: what an InputError says if there is none. path: of the file, for messages."""
    wrapped = dict(named_tensors(content))
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in wrapped.items()}
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
    notes = [] if place in ("", "model") else [f"taken are the weights under {place!r}"]
    if dropped := sorted({word for name in wrapped for word in WRAPPERS.findall(name)}):
        notes.append(f"{' and '.join(dropped)} left out of the tensors' names")
    others = [other for other in found if other != place and not inside(other, place)]
    if others and not key:
        notes.append(f"for others write behind its name #{' or #'.join(others)}")
    if notes:
        say(f"note: {path}: {'; '.join(notes)}")
    prefix = place and f"{place}."
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}, place


def choose_place(found, key, path):
    """One of the places of networks; an InputError if it is not clear which. Without a key the
    trained weights go before their moving average."""
    chosen = [place for place in found if f".{key}." in f".{place}." or not key]
    chosen = [place for place in chosen if not any(inside(place, other) for other in chosen)]
    trained = [place for place in chosen if not AVERAGE.search(place)]
    chosen = trained if len(trained) == 1 else chosen
    if len(chosen) != 1:
        what = f"has no network {key!r}" if key and not chosen else "has several networks"
        places = " or ".join(f"#{place}" if place else "no #" for place in found)
        raise InputError(f"{path} {what}; write behind its name {places}")
    return chosen[0]


def inside(place, other):
    """Whether a place of tensors is a part of another place."""
    return place != other and place.startswith(other and f"{other}.")

"""The model card of an exported model, README.md on the Hugging Face Hub: what it is, how to load
it, and what the run that trained it says about data, steps and accuracy."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData

from internals.runs import read_metrics
from internals.unwrap import split_key
from internals.weights import fetch, read_content

CARD = """\
---
{metadata}
---

# {name}

{description}

## How to load it

{usages}

## How it was trained

{training}

## Licence

{licence}
"""
REMOTE = "(hf-hub|gdrive|https?):"  # how sources of weights begin that are no path
RUN_FLAGS = {
    "data_tr",
    "mini_bs",
    "mask_ratio",
    "ignore_z",
    "ns",
    "arch",
    "finetune",
    "mae_weights",
}
RESULTS = {  # the metrics that a card shows -> what they are
    "fast_linear_probe/acc_te": "accuracy of a linear probe",
    "fast_linear_probe/knn_te": "accuracy of k nearest neighbours",
    "pretrain/rankme": "RankMe, the effective rank of the features",
    "pretrain/loss_te_no_z": "loss without code",
    "pretrain/loss_te": "loss, mean over codes",
    "pretrain/loss_te_best": "loss of the best code",
}


class Source(NamedTuple):
    """A file of weights, and what the run that wrote it says, if it is a run of ours."""

    path: str  # for load_model
    name: str  # for the card: without this machine's folders
    flags: dict  # of the run; empty without a run
    step: int  # gradient steps done
    metrics: dict  # a metric's name -> (its last value, the gradient step of this value)


def open_source(source):
    """The Source of weights that load_model takes."""
    place, key = split_key(source)
    path, content = read_content(fetch(place))
    name = place if re.match(REMOTE, place) else path.name
    source = Source(f"{path}#{key}" if key else str(path), name, {}, 0, {})
    parts = [content.get(part) for part in ("args", "progress")]
    if not all(isinstance(part, dict) for part in parts):
        return source
    flags, progress = parts
    if RUN_FLAGS - flags.keys() or type(step := progress.get("step")) is not int:
        return source
    metrics = metrics_until(path.parent.parent, step)
    return source._replace(flags=flags, step=step, metrics=metrics)


def metrics_until(run, step):
    """The last value of each metric up to a gradient step, with its own step: {name: (value,
    step)}; empty where the folder `run` has no metrics."""
    if not (run / "metrics.jsonl").is_file():
        return {}
    metrics = {}
    for record in read_metrics(run):
        if isinstance(record, dict) and (at := record.get("pretrain/step", math.inf)) <= step:
            metrics |= {key: (value, at) for key, value in record.items()}
    return metrics


def model_card(config, source, *, name, library, holds, usages, licence=None):
    """The text of a model card for a model with this ModelConfig from a Source. holds: the parts of
    the model that are exported; usages: {library: lines of Python}; licence: the Hub's name of one,
    or None."""
    tags = ["masked-autoencoder", "imle-ssl"]
    metadata = ModelCardData(library_name=library, license=licence, tags=tags).to_yaml()
    blocks = [f"With {title}:\n\n```python\n{lines}\n```" for title, lines in usages.items()]
    return CARD.format(
        metadata=metadata.strip(),
        name=name,
        description=f"{description(config)} This export holds its {holds}.",
        usages="\n\n".join(blocks),
        training=training(source),
        licence=licence_section(source, licence),
    )


def description(config):
    """What the model is, in sentences."""
    c, (height, width) = config, config.image_size
    text = (
        f"A masked autoencoder (MAE, [He et al. 2022](https://arxiv.org/abs/2111.06377)): a ViT of "
        f"{c.depth} blocks, {c.dim} wide, for images of {height} x {width} pixels and {c.channels} "
        f"channel{'s' * (c.channels > 1)}, in patches of {c.patch_size} pixels. It predicts "
        f"{'patches normalised by their own mean and deviation' if c.norm_pix_loss else 'pixels'}."
        f" Images are normalised by mean {listed(c.mean)} and standard deviation {listed(c.std)} "
        "of the channels, from 0 to 1."
    )
    if c.ip_spec:
        places = ", ".join(f"{method} at {place}" for place, method in c.ip_spec)
        text += (
            f" Latent codes are injected into it ({places}) and trained by Implicit Maximum "
            "Likelihood Estimation ([Li & Malik 2018](https://arxiv.org/abs/1809.09087)): each "
            "code gives another completion. Only IMLE-SSL can use codes; other libraries load a "
            "plain MAE, which computes what the model computes without code."
        )
    return text


def listed(numbers):
    """Numbers as text: 0.485, 0.456, 0.406."""
    return ", ".join(f"{number:.4g}" for number in numbers)


def training(source):
    """How the run trained the model, and its metrics, in Markdown."""
    if not source.flags:
        return f"Exported from `{source.name}`, which does not say how it was trained."
    flags = source.flags
    text = f"{source.step} gradient steps of {flags['mini_bs']} images from `{images_of(flags)}`, "
    text += f"with {flags['mask_ratio']:.0%} of the patches masked"
    text += "" if flags["ignore_z"] else f", with {flags['ns']} codes tried per image"
    text += f". The run started {start_of(flags)}."
    rows = [
        f"| {meaning} | {value:.4g} | {step} |"
        for name, (value, step) in source.metrics.items()
        if (meaning := meaning_of(name)) and isinstance(value, (int, float))
    ]
    if not rows:
        return text
    head = "| on validation images | value | after gradient steps |\n|---|---|---|"
    return "\n".join([text, "", head, *sorted(rows)])


def meaning_of(metric):
    """What a metric of a run is, in words; None for those that a card leaves out."""
    if match := re.fullmatch(r"fast_linear_probe/(.+)/(acc|knn)_te", metric):  # of --probe_data
        return f"{RESULTS[f'fast_linear_probe/{match[2]}_te']}, on {match[1]}"
    return RESULTS.get(metric)


def start_of(flags):
    """From which weights a run started."""
    if not flags["finetune"]:
        return "from scratch"
    if weights := flags["mae_weights"]:
        is_remote = re.match(REMOTE, weights)
        return f"from the weights `{weights if is_remote else Path(weights).name}`"
    return f"from the MAE weights published for {flags['arch']}"


def licence_section(source, licence):
    """The sentences about the licence."""
    text = f"The model's licence is {licence}." if licence else "No licence is stated here."
    text += " Published MAE weights (those of facebookresearch/mae, and facebook/vit-mae-*) are "
    text += "CC-BY-NC 4.0, and models that start from them inherit this."
    if source.flags:
        text += f" This one started {start_of(source.flags)}."
    return text


def images_of(flags):
    """The name of a run's training images, as in the name of the run."""
    path = Path(flags["data_tr"])
    return f"{path.parent.name}/{path.name}"

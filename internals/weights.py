"""Weights from everywhere: fetched, read without ever running code in them, converted to the layout
of facebookresearch/mae, and made into a model."""

import contextlib
import dataclasses
import hashlib
import math
import re
import shutil
import socket
import sys
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv

from Augmentation import MEAN, STD
from internals.checkpoints import newest_checkpoint, read_checkpoint, refuse_unknown
from internals.hugging_face import (
    INJECTIONS_FILE,
    from_hugging_face,
    hugging_face_fields,
    our_fields,
)
from internals.unwrap import named_tensors, split_key, unwrap
from Models import PRESETS, ModelConfig, build, sincos_position_embedding
from Utils import InputError, first_line, say

MAE_ADDRESS = "https://dl.fbaipublicfiles.com/mae/"
PUBLISHED = {  # by facebookresearch/mae, CC-BY-NC 4.0; addresses from its issues 3 and 8
    "vit_base": MAE_ADDRESS + "pretrain/mae_pretrain_vit_base_full.pth",
    "vit_base_vis": MAE_ADDRESS + "visualize/mae_visualize_vit_base.pth",
    "vit_large": MAE_ADDRESS + "pretrain/mae_pretrain_vit_large_full.pth",
    "vit_huge": MAE_ADDRESS + "pretrain/mae_pretrain_vit_huge_full.pth",
}
SOURCES = (  # for --help
    "a file or folder, https://..., hf-hub:OWNER/NAME or gdrive:ID, with weights of this "
    "repository (a run's folder: its newest), of facebookresearch/mae or of Hugging Face's ViTMAE; "
    "#NAME behind a file with several networks names one"
)
FOREIGN_SOURCES = (  # for --help: further sources, which internals/encoders.py loads
    "timm:NAME or torchvision:NAME, with =FILE behind NAME for your own weights; pixels; with "
    "untrained: in front of a source, or of an --arch of TrainIMLE.py, fresh weights"
)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # Hugging Face's names for weights
SIZES = (  # the fields of ModelConfig that must be equal in weights and model
    *("patch_size", "dim", "depth", "num_heads"),
    *("decoder_dim", "decoder_depth", "decoder_num_heads"),
)


def load_model(source, *, measure=None, complete=False, **overrides):
    """An ImplicitMAE with weights from a path, https://..., hf-hub:OWNER/NAME or gdrive:ID; #NAME
    behind it names one of several networks in a file.

    `overrides` replace fields of the weights' ModelConfig; an InputError if the weights do not fit
    them. A missing decoder and missing injections get fresh weights, with a warning. Weights of
    RGB images are adapted to other channels, with a note. measure() gives {"mean", "std"} of the
    channels where neither overrides nor weights do. complete: fresh weights are an InputError."""
    source, key = split_key(source)
    path = fetch(source)
    with refusing(source, path):
        state, config_fields = read_state(path, key)
        weights_config = infer_config(state, config_fields, overrides)
        overrides = overrides | channel_fields(state, config_fields, overrides)
    if "mean" not in overrides and measure is not None:
        overrides |= measure()
    with refusing(source, path):
        if "mean" not in overrides:
            n = overrides["channels"]
            raise InputError(f"it has no mean and std of {n} channels: give mean=... and std=...")
        config = dataclasses.replace(weights_config, **overrides)
        state, adapted = adapt_channels(state, config.channels)
        model = build(config)
        fresh_parts = load_weights(model, state, weights_config.grid)
    if adapted:
        say(f"note: {source} is adapted to --channels {config.channels}: {adapted}")
    if complete and fresh_parts:
        raise InputError(f"{source} is no complete model: it has no {', no '.join(fresh_parts)}")
    for part in fresh_parts:
        say(f"warning: the {part} starts fresh: {source} has none that fits")
    if weights_config.norm_pix_loss != config.norm_pix_loss and "norm_pix_loss" in config_fields:
        trained_with = int(weights_config.norm_pix_loss)
        say(f"note: {source} was trained with --norm_pix_loss {trained_with}")
    return model


@contextlib.contextmanager
def refusing(source, path):
    """Inside `with`, errors become an InputError of one line that names the source of weights."""
    try:
        yield
    except InputError as error:
        prefix = "" if str(path) in str(error) else f"{source}: "
        raise InputError(f"{prefix}{error}".replace("\n", " ")) from None
    except Exception as error:  # a file that holds no model can raise any error
        raise InputError(f"{source} does not hold a model ({type(error).__name__})") from None


# -------------------------------------------------------------------------------------------------
# Fetching.


def fetch(source, folder="mae_checkpoints"):
    """The path of a source's weights on this machine. Weights from elsewhere are downloaded to
    `folder` on first use, by one process at a time; an InputError says where to put the file by
    hand."""
    source = str(source)
    if source.startswith("hf-hub:"):
        return fetch_from_hub(source)
    if not source.startswith(("https://", "http://", "gdrive:")):
        return source
    path = Path(folder) / cached_name(source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            say(f"fetching {source} to {path}")
            with FileLock(path.with_name(f".{path.name}.lock")):
                if not path.exists():  # another process may have been faster
                    download(source, path)
    except Exception as error:  # the errors of torch.hub, gdown and the disk share no base class
        raise InputError(
            f"could not fetch {source} ({first_line(error)}); fetch it elsewhere and put it at "
            f"{path}"
        ) from None
    return str(path)


def cached_name(source):
    """The file name for an address or gdrive:ID. A digest of the address tells apart files of one
    name; the published files keep their names."""
    if source.startswith("gdrive:"):
        return source.replace(":", "-").replace("/", "_")
    name = Path(re.split("[?#]", source)[0]).name[-100:]
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return name if source.startswith(MAE_ADDRESS) else f"{digest}-{name}"


def download(source, path):
    """Downloads the weights at an address or at gdrive:ID to `path`, with a progress bar. An error
    of any kind where that fails; an incomplete file is not kept. The caller holds a lock."""
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    folder.mkdir()
    default_timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(60)  # seconds without data; torch.hub has no limit of its own
        partial, progress = str(folder / path.name), sys.stderr.isatty()
        if source.startswith("gdrive:"):
            import gdown  # slow to import, seldom used

            gdown.download(id=source.removeprefix("gdrive:"), output=partial, quiet=not progress)
        else:
            torch.hub.download_url_to_file(source, partial, progress=progress)
        try:
            if not any(named_tensors(read_content(partial)[1])):
                raise InputError("no tensors")
        except InputError:  # also where the end of the file is missing
            raise InputError("the downloaded file is incomplete or holds no weights") from None
        Path(partial).replace(path)
    finally:
        socket.setdefaulttimeout(default_timeout)
        shutil.rmtree(folder, ignore_errors=True)


def fetch_from_hub(source):
    """The path of weights on the Hugging Face Hub, hf-hub:OWNER/NAME[/FILE][@REVISION], in the
    Hub's own cache. Their config.json and injections, if there are any, are fetched into the same
    folder."""
    logging.set_verbosity_error()  # hides warnings about retries; the error below says enough
    name, _, revision = source.removeprefix("hf-hub:").partition("@")
    parts = name.split("/", 2)
    repository, files = "/".join(parts[:2]), parts[2:] or HUB_FILES

    def get(file):
        """The file's path, or None where the repository has no such file."""
        try:
            return hf_hub_download(repository, file, revision=revision or None)
        except LocalEntryNotFoundError:  # offline
            raise
        except EntryNotFoundError:
            return None

    try:
        config = get("config.json")
        path = next(filter(None, map(get, files)), None)
        if set(files) <= set(HUB_FILES) and config and our_fields(config).get("ip_spec"):
            get(INJECTIONS_FILE)
    except (OSError, ValueError) as error:
        raise InputError(
            f"could not fetch {source} ({first_line(error)}); fetch its config.json and "
            f"{' or '.join(files)} elsewhere and give their folder"
        ) from None
    if path is None:
        raise InputError(f"{source} has none of these files: {', '.join(files)}")
    return path


# -------------------------------------------------------------------------------------------------
# Reading: tensors and plain data only.

NO_MAE = "not the weights of a masked autoencoder or its encoder"


def read_state(path, key=""):
    """Reads what read_content does. Returns a state dict in the layout of facebookresearch/mae or
    ours, and the fields of ModelConfig that its source gives. key: see unwrap."""
    path, content = read_content(path)
    state, place = unwrap(content, PATCH_EMBEDDINGS, path=path, key=key, refusal=NO_MAE)
    state = without_classifier(state, path)
    if place == "model" and "config" in content:
        if not isinstance(content["config"], dict):
            raise InputError(f"{path} is damaged: its config is no dict")
        if "ip_spec" in content["config"]:  # of this repository
            refuse_unknown(content["config"], vars(ModelConfig()), f"the model in {path}")
        return state, content["config"]
    if any(name.endswith("embeddings.cls_token") for name in state):
        fields = hugging_face_fields(path.with_name("config.json"))
        return with_injections(from_hugging_face(state), fields, path)
    return state, {"norm_pix_loss": False} if "visualize" in path.name else {}


def with_injections(state, fields, path):
    """The state dict with the injections of a model that export_encoder.py wrote to `path`, and
    its fields of ModelConfig: without injections where their file is missing, as transformers does
    not write it when it saves such a model again."""
    if not fields.get("ip_spec"):
        return state, fields
    file = path.with_name(INJECTIONS_FILE)
    if not file.is_file():
        say(f"warning: {path} is taken as a plain MAE: its injections' file {file} is missing")
        return state, fields | {"ip_spec": ()}
    # The prefix keeps a hostile file from replacing other tensors.
    tensors = read_safetensors(file).items()
    return state | {f"injections.{name}": tensor for name, tensor in tensors}, fields


def read_content(path):
    """The path and the dict of a file of any kind, of a folder as Hugging Face saves it, or of the
    newest checkpoint in a run's folder."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = [path / name for name in HUB_FILES if (path / name).is_file()]
        if not files:
            return newest_in_run(path)
        path = files[0]
    return path, (
        read_safetensors(path) if is_safetensors(path) else read_checkpoint(path, mmap=True)
    )


def newest_in_run(folder):
    """The path and the dict of the newest checkpoint in a run's folder, or in its checkpoints/."""
    run = folder.parent if folder.name == "checkpoints" else folder
    path, content = newest_checkpoint(run, mmap=True)
    if path is None:
        names = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        reason = f"it has neither {' nor '.join(HUB_FILES)} nor checkpoints of a run, but {names}"
        raise InputError(f"{folder} is a folder without weights: {reason}")
    say(f"note: {folder}: taken is its newest checkpoint, {path.name}")
    return path, content


def is_safetensors(path):
    """Whether a file begins as the format does: the header's size in 8 bytes, then JSON."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path):
    """The dict of tensors in a .safetensors file; an InputError where it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)})") from None


# -------------------------------------------------------------------------------------------------
# Converting.

PATCH_EMBEDDINGS = {  # the tensor by which weights are known, as MAE and Hugging Face name it
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "vit.embeddings.patch_embeddings.projection.weight",
}
CLASSIFIER = re.compile(r"(vit\.)?(head|classifier|pooler)\.")  # of fine-tuning, linear probes


def without_classifier(state, path):
    """The state dict without a classifier. An encoder that was fine-tuned on the mean of its tokens
    has fc_norm in place of the last norm: it becomes that norm."""
    kept = {name: tensor for name, tensor in state.items() if not CLASSIFIER.match(name)}
    if len(kept) < len(state):
        left_out = ", ".join(sorted({name.rpartition(".")[0] for name in state.keys() - kept}))
        say(f"note: {path}: its classifier is left out ({left_out:.100})")
    if "fc_norm.weight" in kept and "norm.weight" not in kept:
        say(f"note: {path}: its fc_norm, of the mean of tokens, is taken for the norm of each")
        kept = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in kept.items()}
    return kept


# -------------------------------------------------------------------------------------------------
# From a state dict to a model.


def infer_config(state, config_fields, overrides):
    """The ModelConfig of a state dict. Sizes are read off its tensors; `config_fields` are the
    fields that its file gives. `overrides`, and then the preset of these sizes, give the other
    fields, such as the numbers of heads."""
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token")
    if missing := [name for name in needed if name not in state]:
        raise InputError(f"{NO_MAE}: it lacks {', '.join(missing)}")
    sizes = tensor_sizes(state)
    for name, size in sizes.items():
        if config_fields.get(name, size) != size:
            raise InputError(
                f"damaged: its {name} is {size}, but {config_fields[name]} in its config"
            )
    fields = {k: v for k, v in (sizes | config_fields).items() if k not in CHANNEL_FIELDS}
    if has_decoder(state):
        crosses = any(name.endswith(".kv.weight") for name in state)
        fields.setdefault("decoder", "cross" if crosses else "self")
    check_architecture(fields, overrides)
    preset, names = fitting_preset(sizes), (*SIZES, "decoder")
    requested = {name: overrides[name] for name in names if name in overrides}
    fields = (vars(PRESETS[preset]) if preset else {}) | requested | fields
    if "num_heads" not in fields or (has_decoder(state) and "decoder_num_heads" not in fields):
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"no preset has these sizes ({shown}): give num_heads and decoder_num_heads"
        )
    if "image_size" not in config_fields:
        patch_size = sizes["patch_size"]
        rows, columns = position_grid(state["pos_embed"], patch_size, overrides.get("image_size"))
        fields["image_size"] = (rows * patch_size, columns * patch_size)
    return ModelConfig(**fields)


CHANNEL_FIELDS = ("channels", "mean", "std")  # of ModelConfig


def channel_fields(state, config_fields, overrides):
    """The fields of ModelConfig about channels: `overrides`, else those of the weights, if they
    have as many channels, else ImageNet's for 3 channels; else mean and std are missing."""
    of_weights = state["patch_embed.proj.weight"].shape[1]
    if (stated := config_fields.get("channels", of_weights)) != of_weights:
        raise InputError(f"damaged: its channels are {of_weights}, but {stated} in its config")
    fields = {"channels": overrides.get("channels", of_weights)}
    if "mean" in overrides:
        return fields
    if fields["channels"] == of_weights and "mean" in config_fields:
        return fields | {name: tuple(config_fields[name]) for name in ("mean", "std")}
    return fields | ({"mean": MEAN, "std": STD} if fields["channels"] == 3 else {})


def adapt_channels(state, channels):
    """The state dict with its patch embedding adapted from 3 to other channels as timm does; the
    prediction head becomes the mean over colours for 1 channel, else it is left out. Also what was
    done, as text."""
    embedding, head = "patch_embed.proj.weight", ("decoder_pred.weight", "decoder_pred.bias")
    of_weights, state = state[embedding].shape[1], dict(state)
    if of_weights == channels:
        return state, ""
    if of_weights != 3:
        raise InputError(
            f"its images have {of_weights} channels: give --channels {of_weights}; only weights of "
            "RGB images fit other channels"
        )
    state[embedding] = adapt_input_conv(channels, state[embedding].float())
    text = "the patch embedding as by timm"  # whose rule is for float32: files may hold float16
    if channels == 1:
        text += ", the prediction head by the mean over colours"
    for name in (name for name in head if name in state):
        tensor = state.pop(name).float()  # (P*P*3, ...)
        if channels == 1:
            state[name] = tensor.unflatten(0, (-1, 3)).mean(1)
    return state, text


def tensor_sizes(state):
    """The fields of ModelConfig that the shapes in a state dict give."""
    dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    sizes = {"patch_size": patch_size, "dim": dim, "depth": count_blocks(state, "blocks")}
    if has_decoder(state):
        sizes["decoder_dim"] = state["decoder_embed.weight"].shape[0]
        sizes["decoder_depth"] = count_blocks(state, "decoder_blocks")
    return sizes


def has_decoder(state):
    """Whether a state dict has any tensor of a decoder."""
    return any(name.startswith(("decoder_embed.", "decoder_blocks.")) for name in state)


def is_headless(state):
    """Whether a state dict has a decoder without its prediction head."""
    return has_decoder(state) and not any(name.startswith("decoder_pred.") for name in state)


def count_blocks(state, name):
    """How many blocks `name`.0, `name`.1, ... a state dict has."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


def fitting_preset(sizes):
    """The name of the first preset with these sizes, or None."""
    fitting = (arch for arch in PRESETS if sizes.items() <= vars(PRESETS[arch]).items())
    return next(fitting, None)


def position_grid(pos_embed, patch_size, image_size):
    """The (rows, columns) of patches that a position embedding (1, 1+L, C) was made for: the grid
    whose fixed embedding it is, else a square, else the grid of `image_size`, if that is given."""
    length, channels = pos_embed.shape[1] - 1, pos_embed.shape[2]
    for rows in (n for n in range(1, length + 1) if length % n == 0):
        grid = rows, length // rows
        fixed = sincos_position_embedding(grid, channels)
        if torch.allclose(fixed, pos_embed.float(), atol=1e-2):
            return grid
    side = math.isqrt(length)
    if side**2 == length:
        return side, side
    if image_size and math.prod(image_size) == length * patch_size**2:
        return image_size[0] // patch_size, image_size[1] // patch_size
    raise InputError(f"its {length} patches are no square: give image_size=(height, width)")


def check_architecture(weights_fields, overrides):
    """Refuses weights whose sizes or decoder differ from the requested ones."""
    sizes = {name: weights_fields[name] for name in SIZES if name in weights_fields}
    for name, size in sizes.items():
        if overrides.get(name, size) != size:
            arch = fitting_preset(sizes)
            hint = f"; they fit --arch {arch}" if arch else ""
            raise InputError(f"its {name} is {size}, expected was {overrides[name]}{hint}")
    decoder = weights_fields.get("decoder")
    if decoder and overrides.get("decoder", decoder) != decoder:
        raise InputError(
            f"it has the decoder {decoder!r}, not {overrides['decoder']!r}: give --decoder "
            f"{decoder}, or train from scratch with --finetune 0"
        )


def load_weights(model, state, grid):
    """Copies a state dict into the model and resamples position embeddings, made for `grid`.
    Returns the parts that stay fresh: a missing decoder, injections of which not all fit."""
    fresh_state, state, fresh_parts = model.state_dict(), dict(state), []
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state:
            state[name] = resample_abs_pos_embed(state[name], list(model.config.grid), list(grid))

    def shapes(tensors):
        return {n: x.shape for n, x in tensors.items() if n.startswith("injections.")}

    keep_fresh = {
        "injections": ("injections.",) if shapes(state) != shapes(fresh_state) else (),
        "decoder": () if has_decoder(state) else ("decoder_", "mask_token"),
        "prediction head": ("decoder_pred.",) if is_headless(state) else (),
    }
    for part, prefixes in keep_fresh.items():
        fresh = {n: x for n, x in fresh_state.items() if n.startswith(prefixes)}
        state = {n: x for n, x in state.items() if not n.startswith(prefixes)} | fresh
        if fresh:
            fresh_parts.append(part)
    load_all(model, state)
    return fresh_parts


def load_all(network, state):
    """Loads a state dict into a network; an InputError where a tensor is missing, unexpected, of
    another shape, or holds whole numbers instead of floats."""
    for name, tensor in network.state_dict().items():
        if name in state and state[name].is_floating_point() != tensor.is_floating_point():
            raise InputError(f"does not fit: {name} holds {state[name].dtype}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # a header and one line for each kind of mismatch
        raise InputError(f"does not fit: {str(error).splitlines()[1].strip():.200}") from None

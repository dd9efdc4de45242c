"""Weights from everywhere: fetched, read without ever running code in them, converted to
facebookresearch/mae's layout, and made into a model."""

import dataclasses
import hashlib
import http.client
import json
import math
import re
import shutil
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from tqdm import tqdm

from internals.checkpoints import read_checkpoint
from Models import (
    ACTIVATIONS,
    DECODERS,
    INJECTIONS,
    PRESETS,
    ModelConfig,
    build,
    sincos_position_embedding,
)
from Utils import InputError, first_line, say, write_atomically

MAE_ADDRESS = "https://dl.fbaipublicfiles.com/mae/"
PUBLISHED = {  # of facebookresearch/mae, CC-BY-NC 4.0; see its issues 3 and 8
    "vit_base": MAE_ADDRESS + "pretrain/mae_pretrain_vit_base_full.pth",
    "vit_base_vis": MAE_ADDRESS + "visualize/mae_visualize_vit_base.pth",
    "vit_large": MAE_ADDRESS + "pretrain/mae_pretrain_vit_large_full.pth",
    "vit_huge": MAE_ADDRESS + "pretrain/mae_pretrain_vit_huge_full.pth",
}
SOURCES = (  # for --help
    "a file, https://..., hf-hub:OWNER/NAME or gdrive:ID; ours, facebookresearch/mae's or "
    "Hugging Face's ViTMAE"
)
FOREIGN_SOURCES = (  # of Encoders.py, likewise
    "timm:NAME, torchvision:NAME, with =FILE behind it for weights of your own; pixels; untrained: "
    "in front of these, of a checkpoint or of an --arch of TrainIMLE.py, for fresh weights"
)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # as Hugging Face saves weights


def load_model(source, **overrides):
    """An ImplicitMAE with weights from anywhere: a path, https://..., hf-hub:OWNER/NAME, gdrive:ID.

    `overrides` replace fields of its ModelConfig; an InputError where that would need other sizes
    than the weights have. A missing decoder and missing injections start fresh, with a warning."""
    path = fetch(source)
    try:
        state, told = read_state(path)
        config = infer_config(state, told, overrides)
        wanted = dataclasses.replace(config, **overrides)
        check_sizes(config, wanted)
        check_config(wanted)
        model = build(wanted)
        fresh = load_weights(model, state, config.grid)
    except InputError as error:
        named = "" if str(path) in str(error) else f"{source}: "
        raise InputError(f"{named}{error}".replace("\n", " ")) from None
    except Exception as error:  # whatever a file that is no model makes its reader raise
        raise InputError(f"{source} does not hold a model ({type(error).__name__})") from None
    for part in fresh:
        say(f"warning: the {part} starts fresh: {source} has none that fits")
    if told.get("norm_pix_loss", wanted.norm_pix_loss) != wanted.norm_pix_loss:
        say(f"note: {source} was trained with --norm_pix_loss {int(told['norm_pix_loss'])}")
    return model


# -------------------------------------------------------------------------------------------------
# Fetching.


def fetch(source, folder="mae_checkpoints"):
    """The path of weights on this machine. What is elsewhere is fetched on first use, by one
    process at a time, and kept only if it is whole; an InputError says where to put it by hand."""
    source = str(source)
    if source.startswith("hf-hub:"):
        return fetch_from_hub(source)
    if not source.startswith(("https://", "http://", "gdrive:")):
        return source
    try:
        path = Path(folder) / cached_name(source)
    except ValueError as error:
        raise InputError(f"{source} is no address ({error})") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            say(f"fetching {source} to {path}")
            with FileLock(path.with_name(f".{path.name}.lock")):
                for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
                    left.unlink()
                if not path.exists():  # another process may have been faster
                    write_atomically(path, lambda file: download(source, file))
    except (OSError, ValueError, http.client.HTTPException, InputError) as error:
        reason = first_line(error)
        raise InputError(
            f"could not fetch {source} ({reason}); fetch it elsewhere and put it at {path}"
        ) from None
    return str(path)


def cached_name(source):
    """The file name for an address or gdrive:ID. Addresses other than the published have a digest
    in front, since many a file is called model.pth."""
    if source.startswith("gdrive:"):
        return source.replace(":", "-").replace("/", "_")
    name = Path(urllib.parse.urlsplit(source).path).name[-100:] or "weights"
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return name if source.startswith(MAE_ADDRESS) else f"{digest}-{name}"


def download(source, file):
    """Writes the weights at an address or at gdrive:ID to a file, with a progress bar; an error
    where they are not whole."""
    if source.startswith("gdrive:"):
        download_from_drive(source.removeprefix("gdrive:"), file)
    else:
        request = urllib.request.Request(source, headers={"User-Agent": "IMLE-SSL"})
        with urllib.request.urlopen(request, timeout=60) as response:
            size = int(response.headers.get("Content-Length") or 0)
            options = {"total": size or None, "disable": not sys.stderr.isatty(), "leave": False}
            with tqdm.wrapattr(response, "read", desc="fetching", **options) as stream:
                shutil.copyfileobj(stream, file, 2**20)
        if size and file.tell() != size:
            raise OSError(f"only {file.tell()} of {size} bytes came")
    file.flush()
    try:
        read_state(file.name)
    except InputError:
        raise OSError("what came is damaged, or no weights") from None


def download_from_drive(file_id, file):
    """Writes a file of Google Drive's to an open file."""
    import gdown  # slow to import, seldom used

    try:
        gdown.download(id=file_id, output=file, quiet=not sys.stderr.isatty())
    except Exception as error:  # gdown's own have no base class in common with those of requests
        raise OSError(first_line(error)) from None


def fetch_from_hub(source):
    """The path of weights on the Hugging Face Hub, hf-hub:OWNER/NAME[/FILE][@REVISION], in the
    Hub's own cache, beside their config.json if they have one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries; what fails in the end is said in one line

    name, _, revision = source.removeprefix("hf-hub:").partition("@")
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")

    def get(file):
        """The file's path, or None where the repository has no such file."""
        try:
            return hf_hub_download(f"{owner}/{repository}", file, revision=revision or None)
        except LocalEntryNotFoundError:  # offline
            raise
        except EntryNotFoundError:
            return None

    files = [file] if file else HUB_FILES
    try:
        get("config.json")
        path = next(filter(None, map(get, files)), None)
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


def read_safetensors(path):
    """The dict of tensors in a .safetensors file; an InputError where it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)})") from None


def read_state(path):
    """From a file of any kind, or a folder as Hugging Face saves it: a state dict in
    facebookresearch/mae's layout or ours, and what its source tells of the ModelConfig's fields."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in HUB_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"the folder has none of these files: {', '.join(HUB_FILES)}")
        path = found[0]
    content = read_safetensors(path) if is_safetensors(path) else read_checkpoint(path, mmap=True)
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()
    ):
        raise InputError(f"{path} holds no state dict, of tensors by their names")
    if "config" in content:
        if not isinstance(content["config"], dict):
            raise InputError(f"{path} is damaged: its config is no dict")
        return state, content["config"]
    if any(name.endswith("embeddings.cls_token") for name in state):
        return from_hugging_face(state), hugging_face_options(path.with_name("config.json"))
    return state, {"norm_pix_loss": False} if "visualize" in path.name else {}


def is_safetensors(path):
    """Whether a file begins as the format does: with its header's size in 8 bytes and JSON."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


# -------------------------------------------------------------------------------------------------
# Converting.

# Patterns in the names of ViTMAEForPreTraining and ViTMAEModel, as files have them and as they are
# since transformers 5 -> ours; q, k and v are still apart.
HUGGING_FACE = [
    (r"^(vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(vit\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(vit\.)?embeddings\.", ""),
    (r"^(vit\.)?(encoder\.layer|layers)\.", "blocks."),
    (r"^(vit\.)?layernorm\.", "norm."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
]


def from_hugging_face(state):
    """A state dict of Hugging Face's ViTMAE in facebookresearch/mae's layout."""
    ours = {}
    for name, tensor in state.items():
        for pattern, replacement in HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        ours[name] = tensor
    for name in [name for name in ours if ".attn.q." in name]:
        parts = [ours.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        ours[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return ours


def hugging_face_options(path):
    """What a ViTMAE's config.json tells of ModelConfig's fields; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        raise InputError(f"{path} is no JSON") from None
    if config.get("hidden_act", "gelu") != "gelu":
        raise InputError(f"{path}: hidden_act {config['hidden_act']!r}; allowed is gelu")
    names = {
        "num_attention_heads": "num_heads",
        "decoder_num_attention_heads": "decoder_num_heads",
        "layer_norm_eps": "norm_eps",
        "norm_pix_loss": "norm_pix_loss",
    }
    options = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if "image_size" in config:
        size = config["image_size"]
        options["image_size"] = tuple(size) if isinstance(size, list) else (size, size)
    return options


def infer_config(state, told, overrides):
    """The ModelConfig of a state dict, read off its shapes and what its source told. What they
    leave open comes from `overrides`, or from the preset that fits: numbers of heads, a decoder
    that is not there."""
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise InputError("not the weights of a masked autoencoder or its encoder")
    dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    sizes = {"patch_size": patch_size, "dim": dim, "depth": count_blocks(state, "blocks")}
    open_fields = ["num_heads", "decoder_num_heads"]
    if has_decoder(state):
        sizes["decoder_dim"] = state["decoder_embed.weight"].shape[0]
        sizes["decoder_depth"] = count_blocks(state, "decoder_blocks")
        kind = "cross" if any(name.endswith(".kv.weight") for name in state) else "self"
        told = {"decoder": kind, **told}
    else:
        open_fields += ["decoder_dim", "decoder_depth", "decoder"]
    for name, size in sizes.items():
        if told.get(name, size) != size:
            raise InputError(f"damaged: its {name} is {size}, but {told[name]} by its own account")
    preset = fitting_preset(sizes)
    known = {name: getattr(PRESETS[preset], name) for name in open_fields} if preset else {}
    known |= {name: overrides[name] for name in open_fields if name in overrides}
    known |= {**sizes, **told}
    if "num_heads" not in known or (has_decoder(state) and "decoder_num_heads" not in known):
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"no preset has these sizes ({shown}): give num_heads and decoder_num_heads"
        )
    if "image_size" not in known:
        rows, columns = position_grid(state["pos_embed"], patch_size, overrides.get("image_size"))
        known["image_size"] = (rows * patch_size, columns * patch_size)
    return ModelConfig(**known)


def has_decoder(state):
    """Whether a state dict has a decoder, be it a damaged one."""
    return any(name.startswith(("decoder_embed.", "decoder_blocks.")) for name in state)


def count_blocks(state, name):
    """How many blocks `name`.0, `name`.1, ... a state dict has."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


def fitting_preset(sizes):
    """The name of the first preset with these sizes, or None."""
    fits = (
        arch
        for arch, preset in PRESETS.items()
        if all(getattr(preset, name) == size for name, size in sizes.items())
    )
    return next(fits, None)


def position_grid(pos_embed, patch_size, image_size=None):
    """The (rows, columns) of patches that a position embedding (1, 1+L, C) was made for: those by
    which MAE's fixed one is computed, a square, or those of `image_size`."""
    length, channels = pos_embed.shape[1] - 1, pos_embed.shape[2]
    for rows in range(1, length + 1):
        grid = rows, length // rows
        if math.prod(grid) == length:
            fixed = sincos_position_embedding(grid, channels)
            if torch.allclose(fixed, pos_embed.float(), atol=1e-2):
                return grid
    side = math.isqrt(length)
    if side**2 == length:
        return side, side
    if image_size and math.prod(image_size) == length * patch_size**2:
        return image_size[0] // patch_size, image_size[1] // patch_size
    raise InputError(f"its {length} patches are no square: give image_size=(height, width)")


SIZES = (
    *("patch_size", "dim", "depth", "num_heads"),
    *("decoder_dim", "decoder_depth", "decoder_num_heads"),
)


def check_sizes(config, wanted):
    """Refuses weights of a ModelConfig for a model of another architecture."""
    for name in SIZES:
        found, expected = getattr(config, name), getattr(wanted, name)
        if found != expected:
            arch = fitting_preset({name: getattr(config, name) for name in SIZES})
            hint = f"; they fit --arch {arch}" if arch else ""
            raise InputError(f"its {name} is {found}, expected was {expected}{hint}")
    if config.decoder != wanted.decoder:
        raise InputError(
            f"it has the decoder {config.decoder!r}, not {wanted.decoder!r}: give --decoder "
            f"{config.decoder}, or train from scratch with --finetune 0"
        )


def check_config(config):
    """Refuses a ModelConfig, which a file may have brought, with values that no model can have."""
    c = config
    numbers = (*SIZES, "latent_dim", "mapping_net_layers", "mapping_net_h_dim")
    size = c.image_size
    allowed = {
        **{name: type(getattr(c, name)) is int and getattr(c, name) > 0 for name in numbers},
        "image_size": len(size) == 2 and all(type(n) is int and n > 0 for n in size),
        "norm_eps": type(c.norm_eps) is float and 0 < c.norm_eps < 1,
        "decoder": c.decoder in DECODERS,
        "norm_pix_loss": type(c.norm_pix_loss) is bool,
        "mapping_net_lrmul": 0 < c.mapping_net_lrmul < math.inf,
        "act_type": c.act_type in ACTIVATIONS,
        "adain_init": c.adain_init in ("original", "identity"),
        "ip_spec": all(
            (place == "mask" or (type(place) is int and 0 <= place < c.depth + c.decoder_depth))
            and method in INJECTIONS
            for place, method in c.ip_spec
        ),
    }
    for name, is_allowed in allowed.items():
        if not is_allowed:
            raise InputError(f"its {name} can't be {getattr(c, name)!r}")
    for name, heads in (("dim", "num_heads"), ("decoder_dim", "decoder_num_heads")):
        if getattr(c, name) % getattr(c, heads):
            shown = f"{name} {getattr(c, name)} is no multiple of its {heads} {getattr(c, heads)}"
            raise InputError(f"its {shown}")
    if any(side % c.patch_size for side in size):
        shown = f"allowed are multiples of {c.patch_size}, its patch size"
        raise InputError(f"image_size {tuple(size)}: {shown}")


def load_weights(model, state, grid):
    """Copies a state dict in facebookresearch/mae's layout, or our own, into the model; position
    embeddings, made for `grid`, are resampled to the model's. Returns the parts that stay fresh:
    the decoder where there is none, the injections where not all of them fit."""
    own, state = model.state_dict(), dict(state)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state:
            state[name] = resample_abs_pos_embed(state[name], list(model.config.grid), list(grid))
    injections = {name for name in own if name.startswith("injections.")}
    offered = {name: state.pop(name) for name in list(state) if name.startswith("injections.")}
    fresh = {}
    if offered.keys() != injections or any(offered[n].shape != own[n].shape for n in injections):
        fresh["injections"] = injections
        offered = {}
    if not has_decoder(state):
        fresh["decoder"] = {n for n in own if n.startswith("decoder_") or n == "mask_token"}
        state = {name: tensor for name, tensor in state.items() if name not in fresh["decoder"]}
    state |= offered
    expected = own.keys() - set().union(*fresh.values())
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    wrong = [n for n in sorted(expected & state.keys()) if state[n].shape != own[n].shape]
    numbers = [n for n in sorted(expected & state.keys()) if not state[n].is_floating_point()]
    if numbers:
        raise InputError(f"does not fit: {numbers[0]} holds {state[numbers[0]].dtype}")
    for names, what in ((missing, "missing"), (unexpected, "unexpected"), (wrong, "misshapen")):
        if names:
            shapes = [tuple(named[names[0]].shape) for named in (state, own) if names is wrong]
            detail = f": {shapes[0]} instead of {shapes[1]}" if shapes else ""
            raise InputError(f"does not fit: {len(names)} {what}, first {names[0]}{detail}")
    model.load_state_dict(state, strict=False)
    return [part for part, names in fresh.items() if names]

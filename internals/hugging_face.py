"""Hugging Face's ViTMAE: its names of tensors and the fields of its config.json, turned into ours
and back."""

import dataclasses
import json
import re
from pathlib import Path

import torch

from internals.checkpoints import refuse_unknown
from Models import ModelConfig
from Utils import InputError

OUR_KEY = "imle_ssl"  # in a config.json that this repository wrote: all fields of our ModelConfig
# The injections' tensors lie in a file of their own: in model.safetensors, transformers would list
# each of them in a warning.
INJECTIONS_FILE = "injections.safetensors"

# -------------------------------------------------------------------------------------------------
# Tensors.

# Names in ViTMAEForPreTraining and ViTMAEModel, in their files and since transformers 5 -> our
# names. Queries, keys and values become one tensor afterwards.
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
# Our names -> those in the files of facebook/vit-mae-*, which transformers 4 and 5 both read. (The
# files that transformers 5 writes name the decoder's blocks so that transformers 4 misses them.)
TO_HUGGING_FACE = [
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^norm\.", "vit.layernorm."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(decoder_|mask_token)", r"decoder.\1"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
]


def renamed(name, patterns):
    """The name after all replacements [(pattern, replacement)], one after the other."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def from_hugging_face(state):
    """A state dict of Hugging Face's ViTMAE in the layout of facebookresearch/mae."""
    converted = {renamed(name, HUGGING_FACE): tensor for name, tensor in state.items()}
    for name in [name for name in converted if ".attn.q." in name]:
        parts = [converted.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        converted[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return converted


def to_hugging_face(state):
    """The inverse of from_hugging_face, with the names of ViTMAEForPreTraining; without the
    injections, which it does not have."""
    converted = {}
    for name, tensor in state.items():
        if name.startswith("injections."):
            continue
        name = renamed(name, TO_HUGGING_FACE)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                converted[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            converted[name] = tensor
    return converted


# -------------------------------------------------------------------------------------------------
# config.json.

FIELDS = {  # of their config -> of ModelConfig; image_size is one number there
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "decoder_hidden_size": "decoder_dim",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_num_heads",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "layer_norm_eps": "norm_eps",
    "norm_pix_loss": "norm_pix_loss",
}


def read_config(path):
    """The dict in a config.json; an InputError where it holds none."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def our_fields(path):
    """The fields of ModelConfig that we wrote into a config.json; none in a foreign file. Their
    values are as unchecked as the file; ModelConfig checks them."""
    fields = read_config(path).get(OUR_KEY, {})
    if not isinstance(fields, dict):
        raise InputError(f"{path}: its {OUR_KEY} is no JSON object")
    refuse_unknown(fields, vars(ModelConfig()), f"{OUR_KEY} in {path}")
    return {name: as_tuples(value) for name, value in fields.items()}


def as_tuples(value):
    """The value with tuples in place of lists, which JSON makes of tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def hugging_face_fields(path):
    """The fields of ModelConfig that a ViTMAE's config.json gives; none where there is no file.
    Where transformers saved a model of ours again, its own fields are newer than ours."""
    if not path.is_file():
        return {}
    content = read_config(path)
    if content.get("hidden_act", "gelu") != "gelu":
        raise InputError(f"{path}: hidden_act {content['hidden_act']!r}; allowed is gelu")
    fields = our_fields(path)
    fields |= {ours: content[theirs] for theirs, ours in FIELDS.items() if theirs in content}
    if "image_size" in content:
        size = content["image_size"]
        fields["image_size"] = tuple(size) if isinstance(size, list) else (size, size)
    return fields


def hugging_face_config(config, mask_ratio):
    """The content of config.json for a ModelConfig; an InputError if ViTMAE has no such model."""
    if config.decoder != "self":
        raise InputError(f"ViTMAE of transformers has no decoder {config.decoder!r}, only 'self'")
    height, width = config.image_size
    if height != width:
        raise InputError(f"ViTMAE of transformers takes square images only, not {height} x {width}")
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
        "image_size": height,
        "intermediate_size": 4 * config.dim,
        "decoder_intermediate_size": 4 * config.decoder_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
        "mask_ratio": mask_ratio,
        OUR_KEY: dataclasses.asdict(config),
    }


def preprocessor_config(config):
    """The content of preprocessor_config.json for images of 8 bits: resized as a whole, normalised
    as the model expects."""
    height, width = config.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": config.channels == 3,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # Pillow's BICUBIC
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.mean,
        "image_std": config.std,
    }

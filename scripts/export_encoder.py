"""Writes a model's encoder to a file for timm's VisionTransformer and prints how to load it."""

import argparse
import functools

import _path  # noqa: F401 (makes the modules importable)
import safetensors.torch
import timm
import torch

from Augmentation import MEAN, STD
from internals.processes import run_command
from internals.weights import SOURCES, load_model
from Utils import InputError, write_atomically

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


def main(argv=None):
    """python scripts/export_encoder.py MODEL OUT.safetensors"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=f"Weights of the model: {SOURCES}.")
    parser.add_argument("out", metavar="OUT.safetensors", help="File to write.")
    args = parser.parse_args(argv)
    run_command(lambda: export(args.model, args.out))


def export(source, out):
    """Writes the encoder's tensors, which have timm's names, and prints how to load them."""
    model = load_model(source)
    try:
        write_atomically(out, safetensors.torch.save(encoder_state(model), {"format": "pt"}))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {out}: {error}") from None
    print(usage(model.config, out))


def encoder_state(model):
    """The encoder's tensors by timm's names."""
    return {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith(ENCODER)}


def timm_sizes(config):
    """The encoder's sizes by timm's names, a dict."""
    sizes = {"img_size": tuple(config.image_size), "patch_size": config.patch_size}
    sizes |= {"embed_dim": config.dim, "depth": config.depth, "num_heads": config.num_heads}
    return sizes | ({"in_chans": config.channels} if config.channels != 3 else {})


def timm_network(model, **options):
    """timm's VisionTransformer with the encoder's weights. Its forward_features are the model's
    `encode`. options: further arguments, of a head for example."""
    options["norm_layer"] = functools.partial(torch.nn.LayerNorm, eps=model.config.norm_eps)
    network = timm.models.VisionTransformer(**timm_sizes(model.config), **options)
    network.load_state_dict(network.state_dict() | encoder_state(model))
    return network


def usage(config, out):
    """Lines of Python that load the encoder and compute features (N, 1+L, C)."""
    c = config
    arguments = ", ".join(f"{k}={v}" for k, v in {**timm_sizes(c), "num_classes": 0}.items())
    if c.norm_eps != 1e-6:
        arguments += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={c.norm_eps})"
    norm = "ImageNet's mean and std"
    if (tuple(c.mean), tuple(c.std)) != (MEAN, STD):
        norm = f"mean {tuple(c.mean)} and std {tuple(c.std)}, of images / 255 or 65535"
    return "\n".join(
        [
            f"encoder = timm.models.VisionTransformer({arguments})",
            f"timm.models.load_checkpoint(encoder, {str(out)!r})",
            f"features = encoder.forward_features(images)  # normalised by {norm}",
        ]
    )


if __name__ == "__main__":
    main()

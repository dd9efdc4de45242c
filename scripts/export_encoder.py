"""Writes a model's encoder to a file for timm's VisionTransformer and prints how to load it."""

import argparse

import _path  # noqa: F401 (makes the modules importable)
import safetensors.torch

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
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith(ENCODER)}
    try:
        write_atomically(out, safetensors.torch.save(state, {"format": "pt"}))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {out}: {error}") from None
    print(usage(model.config, out))


def usage(config, out):
    """Lines of Python that load the encoder and compute features (N, 1+L, C)."""
    c = config
    arguments = f"img_size={tuple(c.image_size)}, patch_size={c.patch_size}, embed_dim={c.dim}, "
    arguments += f"depth={c.depth}, num_heads={c.num_heads}, num_classes=0"
    if c.channels != 3:
        arguments += f", in_chans={c.channels}"
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

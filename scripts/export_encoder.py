"""Exports a model to other libraries: its encoder for timm, or all of it for transformers. Prints
how to load it. Can upload it to the Hugging Face Hub.

python scripts/export_encoder.py MODEL OUT --format hf --push OWNER/NAME"""

import argparse
import json
import re
import secrets
import shutil
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
import safetensors.torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import HFValidationError, logging, validate_repo_id

from Augmentation import MEAN, STD
from internals.encoders import encoder_state, timm_arguments
from internals.hugging_face import (
    INJECTIONS_FILE,
    OUR_KEY,
    hugging_face_config,
    preprocessor_config,
    read_config,
    to_hugging_face,
)
from internals.model_card import model_card, open_source
from internals.parsing import Parser
from internals.processes import run_command
from internals.weights import SOURCES, load_model
from Utils import InputError, naming, write_atomically

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # the Hub's names
PREPROCESSOR = "preprocessor_config.json"


def main(argv=None):
    """python scripts/export_encoder.py MODEL OUT [flags]"""
    about, usage = __doc__.split("\n\n")[0], "export_encoder.py MODEL OUT [flags]"
    parser = Parser(description=about, usage=usage)
    add = parser.add_argument
    # fmt: off
    add("model", metavar="MODEL", help=f"Weights of the model: {SOURCES}.")
    add("out", metavar="OUT", type=Path, help="Where the export goes. timm: a file, such as "
        "encoder.safetensors; hf: a folder that is new, empty, or an earlier export, which is "
        "replaced.")
    add("--format", choices=tuple(FORMATS), default="timm", help="timm: the encoder, for timm's "
        "VisionTransformer; hf: encoder, decoder and injections, for ViTMAEForPreTraining and "
        "ViTMAEModel of transformers and for IO.load_model.")
    add("--push", metavar="OWNER/NAME", type=repository, help="Upload the export, too, to this "
        "repository of the Hugging Face Hub, with a model card. Makes the repository where it is "
        "missing. Needs a login: hf auth login, or HF_TOKEN in the environment.")
    add("--private", action="store_true", default=None, help="With --push: only you, or your "
        "organization, see the repository.")
    add("--licence", metavar="ID", type=licence, help="The licence that the model card states, by "
        "the Hub's name for it: mit, apache-2.0, cc-by-nc-4.0, ...; without it: none.")
    # fmt: on
    args = parser.parse_args(argv)
    run_command(lambda: export(args))


def repository(text):
    """The type of --push."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f"{error}") from None
    if "/" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not OWNER/NAME")
    return text


def licence(text):
    """The type of --licence."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of the Hub's names, such as mit")
    return text


def export(args):
    """Writes the export, prints how to load it and, with --push, uploads it."""
    out, make_files = args.out.expanduser(), FORMATS[args.format]
    whole = args.format == "hf"
    if args.private and not args.push:
        raise InputError("--private: only a repository is private; give --push OWNER/NAME")
    if args.licence and not (whole or args.push):
        raise InputError("--licence: a file for timm has no model card; give --push OWNER/NAME")
    if args.push and not get_token():
        raise InputError("--push: no login; run hf auth login, or set HF_TOKEN")
    if whole:
        check_replaceable(out)
    source = open_source(args.model)
    model = load_model(source.path, complete=whole)
    with naming(f"--format {args.format}: {args.model}"):
        files, usage = make_files(model, source, args)
    try:
        write_folder(out.resolve(), files) if whole else write_atomically(out, files[WEIGHTS])
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {out}: {error}") from None
    print(usage)
    if args.push:
        try:
            print(push(files, args.push, args.private))
        except Exception as error:  # httpx, requests, the Hub and its client raise many kinds
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise InputError(f"--push {args.push}: {reason:.300}; {out} is written") from None


def safetensors_bytes(state):
    """A state dict as the bytes of a .safetensors file."""
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    return safetensors.torch.save(state, {"format": "pt"})


def as_json(content):
    """Plain data as the bytes of a JSON file."""
    return (json.dumps(content, indent=2) + "\n").encode()


# -------------------------------------------------------------------------------------------------
# For timm.


def timm_files(model, source, args):
    """The encoder's file and, with --push, the other files of a repository that timm loads, {name:
    bytes}; how to load the file OUT."""
    files, c = {WEIGHTS: safetensors_bytes(encoder_state(model))}, model.config
    if args.push:
        if c.norm_eps != 1e-6:
            raise InputError(f"timm's config.json has no place for norm_eps {c.norm_eps:g}")
        lines = f'import timm\nencoder = timm.create_model("hf-hub:{args.push}", pretrained=True)'
        usages = {"timm": f"{lines}\n{features_line(c)}"}
        card = model_card(c, source, name=args.push, library="timm", holds="encoder",
                          usages=usages, licence=args.licence)  # fmt: skip
        files |= {CONFIG: as_json(timm_config(c)), CARD: card.encode()}
    return files, usage(c, args.out)


def timm_config(config):
    """The content of config.json, from which timm.create_model builds the encoder."""
    c = config
    return {
        "architecture": "vit_base_patch16_224",  # one of timm's ViTs; model_args give its sizes
        "num_classes": 0,
        "num_features": c.dim,
        "global_pool": "token",
        "model_args": timm_arguments(c),
        "pretrained_cfg": {
            "input_size": (c.channels, *c.image_size),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": c.mean,
            "std": c.std,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def usage(config, out):
    """Lines of Python that load the encoder and compute features (N, 1+L, C)."""
    arguments = ", ".join(f"{name}={value}" for name, value in timm_arguments(config).items())
    if config.norm_eps != 1e-6:
        arguments += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={config.norm_eps})"
    return "\n".join(
        [
            f"encoder = timm.models.VisionTransformer({arguments})",
            f"timm.models.load_checkpoint(encoder, {str(out)!r})",
            features_line(config),
        ]
    )


def features_line(config):
    """The line of Python that computes features, with the normalisation of the images."""
    c, norm = config, "ImageNet's mean and std"
    if (tuple(c.mean), tuple(c.std)) != (MEAN, STD):
        norm = f"mean {tuple(c.mean)} and std {tuple(c.std)}, of images / 255 or 65535"
    return f"features = encoder.forward_features(images)  # normalised by {norm}"


# -------------------------------------------------------------------------------------------------
# For transformers and this repository.


def hugging_face_files(model, source, args):
    """The files of a folder for transformers and IO.load_model, {name: bytes}; how to load it."""
    c, name = model.config, args.push or args.out.absolute().name
    files = {
        CONFIG: as_json(hugging_face_config(c, source.flags.get("mask_ratio", 0.75))),
        PREPROCESSOR: as_json(preprocessor_config(c)),
        WEIGHTS: safetensors_bytes(to_hugging_face(model.state_dict())),
    }
    if c.ip_spec:
        files[INJECTIONS_FILE] = safetensors_bytes(model.injections.state_dict())
    usages = hugging_face_usages(name, args.push)
    holds = f"encoder and decoder{', with the injections' if c.ip_spec else ''}"
    card = model_card(c, source, name=name, library="transformers", holds=holds, usages=usages,
                      licence=args.licence)  # fmt: skip
    usages = hugging_face_usages(args.push or str(args.out), args.push)
    return files | {CARD: card.encode()}, "\n\n".join(usages.values())


def hugging_face_usages(place, is_hub):
    """Lines of Python that load the export from a folder or from the Hub: {library: lines}."""
    source = f"hf-hub:{place}" if is_hub else place  # for this repository
    return {
        "transformers": "from transformers import AutoImageProcessor, ViTMAEForPreTraining\n"
        f"processor = AutoImageProcessor.from_pretrained({place!r})\n"
        f"model = ViTMAEForPreTraining.from_pretrained({place!r})\n"
        f"# Features of whole images: ViTMAEModel.from_pretrained({place!r}, mask_ratio=0.0)",
        "IMLE-SSL": f"from IO import load_model\nmodel = load_model({source!r})",
    }


def check_replaceable(folder):
    """Refuses a folder that holds anything but an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"OUT {folder} is a file; --format hf writes a folder")
    names = {path.name for path in folder.iterdir()}
    always = {CONFIG, PREPROCESSOR, WEIGHTS, CARD}
    is_export = always <= names <= always | {INJECTIONS_FILE}
    if is_export:  # transformers, when it saves the model again, adds its version
        config = read_config(folder / CONFIG)
        is_export = OUR_KEY in config and "transformers_version" not in config
    if names and not is_export:
        raise InputError(f"OUT {folder} holds other things than an export; give another folder")


def write_folder(folder, files):
    """Writes a folder with files, {name: bytes}, in place of an earlier export. After an error the
    earlier export is still there; after a crash the folder is whole, old or new, or missing."""
    temporary, old = (
        folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}") for kind in ("tmp", "old")
    )
    temporary.mkdir()
    try:
        for name, content in files.items():
            write_atomically(temporary / name, content)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


# To add a format, write a function like timm_files and name the function here.
FORMATS = {"timm": timm_files, "hf": hugging_face_files}


# -------------------------------------------------------------------------------------------------
# The Hub.


def push(files, name, private):
    """Uploads files, {name: bytes}, to a repository of the Hub; returns the repository's address.
    Raises any error of the Hub's client."""
    logging.set_verbosity_error()  # hides warnings about retries
    api = HfApi()
    address = api.create_repo(name, private=private, exist_ok=True)
    # The Hub ignores `private` for a repository that exists.
    if private and not api.model_info(name).private:
        raise InputError("this repository exists and is public; leave --private out, or change it")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit(name, operations, commit_message="Export a model of IMLE-SSL")
    return str(address)


if __name__ == "__main__":
    main()

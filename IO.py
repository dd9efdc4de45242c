"""The command lines: every flag with its meaning, default, unit and bounds, and the checks of flags
that depend on each other."""

import argparse
import dataclasses
import json
import math
import os
import re
import secrets
import sys
from pathlib import Path

import torch

from Data import MEASURED, MOST_BAD
from internals.checkpoints import read_run_checkpoint
from internals.decoding import IMAGE_DECODERS, check_decoder
from internals.parsing import SWITCH, Parser, real, whole
from internals.runs import current_flags, folder_of, read_config
from internals.weights import (
    FOREIGN_SOURCES,
    PUBLISHED,
    SOURCES,
    load_model,  # noqa: F401 (where users look for it)
)
from Models import (
    ACTIVATIONS,
    ADAIN_INITS,
    DECODERS,
    INJECTIONS,
    LARGEST_SIZE,
    PRESETS,
    FieldError,
    ModelConfig,
)
from Utils import InputError, first_line, naming, say

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(8, CORES)  # processes that load images
SURROGATE_NS = 64  # with fewer codes the surrogate's regression has too few to learn from
# Flags of one start of a run: a run that goes on by --resume has its own. --config sets neither
# these nor the other flags that say which run it is, and where it runs.
ONE_START = ("resume", "force_resume", "staged", "config")
NOT_FROM_CONFIG = (*ONE_START, "uid", "gpus", "processes")
IMAGES = "a folder with one folder per class, a .tar of one, or an .lmdb made by scripts/pack.py"

# -------------------------------------------------------------------------------------------------
# The flags of TrainIMLE.py, one function per group. A flag that is added must be read somewhere.


def training_parser():
    """The parser of TrainIMLE.py."""
    parser = Parser(
        prog="TrainIMLE.py",
        usage="TrainIMLE.py --data_tr PATH --data_val PATH [flags]",
        description="Train a masked autoencoder with latent codes by Implicit Maximum Likelihood "
        "Estimation (IMLE), or a plain masked autoencoder (MAE).",
    )
    data_flags(parser)
    model_flags(parser)
    step_flags(parser)
    code_flags(parser)
    optimizer_flags(parser)
    mask_flags(parser)
    probe_flags(parser)
    validation_flags(parser)
    device_flags(parser)
    run_flags(parser)
    return parser


# fmt: off
def data_flags(parser, training=True):
    """training=False: for probes and fine-tuning, whose results depend on more of these flags."""
    add = parser.group("data")
    add("--data_tr", required=True, metavar="PATH", help=f"Training images: {IMAGES}.")
    add("--data_val", required=True, metavar="PATH", changeable=training,
        help=f"Validation images: {IMAGES}.")
    add("--train_n_way", type=whole(1, also=-1), default=-1, metavar="CLASSES",
        help="Few-shot training: number of classes, evenly spaced in sorted order; -1: all.")
    add("--train_n_shot", type=whole(1, also=-1), default=-1, metavar="IMAGES",
        help="Few-shot training: number of images per class, chosen by --seed; -1: all.")
    add("--use_augs", **SWITCH, default=1,
        help="1: random crops and flips in training, centre crops in tests; 0: plain resizing.")
    add("--image_decoder", choices=IMAGE_DECODERS, default="pillow",
        help="Decoder of image files. torchcodec must be installed; it is about twice as fast as "
        "pillow, and its pixels differ by rounding.")
    add("--skip_bad_images", **SWITCH, default=0, changeable=training,
        help="1: replace each damaged image by another one of its class, up to "
        f"{MOST_BAD * 1000:g} in 1000 of the data set; 0: end with an error at a damaged image.")
    add("--num_workers", type=whole(0), default=WORKERS, metavar="N", changeable=True,
        help="Workers per process that load images; default: number of CPU cores, at most 8.")
    add("--loader_timeout", type=real(1), default=120.0, metavar="SECONDS", changeable=True,
        help="Seconds without an image from a loader worker until the program ends with an error.")
    add("--seed", type=whole(0, 2**31), default=0, metavar="N", help="Seed of all random numbers.")


def model_flags(parser):
    add = parser.group("model")
    add("--arch", choices=PRESETS, default="vit_base", metavar="NAME",
        help=f"Name of the network's sizes: {', '.join(PRESETS)}.")
    add("--decoder", choices=DECODERS, default="self",
        help="Attention in the decoder. self: all patches attend to each other, as in MAE; cross: "
        "masked patches attend to visible patches only.")
    add("--ip_spec", nargs="+", metavar="PLACE METHOD",
        help="Where and how codes are injected: pairs of a place and a method. Places: 0, 1, ... "
        "are the encoder blocks, the numbers after them the decoder blocks, `mask` is the mask "
        f"token. Methods: {', '.join(INJECTIONS)}; default: adain at the last encoder block.")
    add("--latent_dim", type=whole(1, LARGEST_SIZE), default=32, metavar="NUMBERS",
        help="Number of values in the latent code of an adain or local_adain injection.")
    add("--mapping_net_layers", type=whole(1, 64), default=3, metavar="N",
        help="Number of layers of the mapping network, which turns a code into shifts and scales.")
    add("--mapping_net_h_dim", type=whole(1, LARGEST_SIZE), default=64, metavar="WIDTH",
        help="Width of the hidden layers of the mapping network.")
    add("--mapping_net_lrmul", type=real(1e-6), metavar="X",
        help="Learning-rate multiplier of the mapping network, as in StyleGAN; default: 1, or "
        "0.01 with --adain_init original.")
    add("--act_type", choices=ACTIVATIONS, default="leakyrelu",
        help="Activation function of the mapping network.")
    add("--adain_init", choices=ADAIN_INITS, default="identity",
        help="Initial weights of the mapping network. identity: the injection changes nothing at "
        "the first step; original: random, as in StyleGAN, and the network learns very slowly.")
    add("--finetune", **SWITCH, default=1,
        help="Initial weights. 1: --mae_weights, or else those published for --arch; 0: random.")
    add("--mae_weights", metavar="SOURCE", changeable=True, help=f"Pretrained weights: {SOURCES}.")
    add("--ignore_z", **SWITCH, default=0,
        help="1: train a plain MAE, without codes; 0: train with codes.")


def step_flags(parser):
    add = parser.group("epochs and gradient steps")
    add("--epochs", type=whole(0), default=1024, metavar="N",
        help="Number of epochs; each epoch draws a pool of images and trains on this pool.")
    add("--ex_per_epoch", type=whole(1), default=2048, metavar="IMAGES",
        help="Number of images in the pool of an epoch, over all processes.")
    add("--ipe", type=whole(1), default=64, metavar="STEPS", help="Gradient steps per epoch.")
    add("--mini_bs", type=whole(1), default=32, metavar="IMAGES",
        help="Number of images per gradient step, over all processes.")
    add("--accum", type=whole(1), default=1, metavar="PARTS", changeable=True,
        help="Parts in which a process computes a gradient step; more parts need less memory.")
    add("--shuffle_data", **SWITCH, default=1,
        help="1: draw pools and minibatches in random order; 0: in the order of the data.")


def code_flags(parser):
    add = parser.group("choosing codes")
    add("--ns", type=whole(1), default=128, metavar="CODES",
        help="Number of codes tried per image; the code with the lowest loss is chosen.")
    add("--code_bs", type=whole(1), default=32, metavar="IMAGES", changeable=True,
        help="Number of images in one sampling pass of a process.")
    add("--sp", type=whole(1), default=64, metavar="CODES", changeable=True,
        help="Largest number of codes per image in one sampling pass; a CPU's pass may have fewer.")
    add("--sampler", choices=("auto", "exhaustive", "surrogate"), default="auto",
        help="How codes are chosen. exhaustive: try all --ns codes; surrogate: try only --tries of "
        "them, mostly codes that a regression on the codes tried before predicts to be best; auto: "
        f"surrogate if --ns is at least {SURROGATE_NS} and the injections allow it.")
    add("--tries", type=whole(1, also=-1), default=-1, metavar="CODES",
        help="Number of codes tried per image with --sampler surrogate; -1: a fifth of --ns.")
    add("--rs_epsilon", type=real(0), default=0.0, metavar="LOSS",
        help="RS-IMLE: a code with a loss below LOSS is chosen only if all are below; 0: off.")
    add("--mae_loss_weight", type=real(0), default=1.0, metavar="WEIGHT",
        help="Weight of the loss without code, as of a plain MAE, which each gradient step adds to "
        "the loss with the chosen code; 0: the loss with the chosen code alone.")


def optimizer_flags(parser):
    add = parser.group("optimisation")
    add("--lr", type=real(0), default=1e-4, metavar="RATE", help="Base learning rate of the MAE.")
    add("--lr_z", type=real(0, also=-1), default=-1, metavar="RATE",
        help="Base learning rate of the injections; -1: the same as --lr.")
    add("--min_lr", type=real(0), default=0.0, metavar="RATE",
        help="Learning rate at the start of the ramp and at the end of each cosine cycle.")
    add("--clip_grad", type=real(0), default=0.0, metavar="NORM",
        help="Largest norm of the gradient: larger gradients are scaled down to it; 0: off.")
    add("--scheduler", choices=("constant", "linear_ramp", "linear_ramp_cosine_decay"),
        default="constant",
        help="Schedule of the learning rates. constant: base rates; linear_ramp: a linear ramp up "
        "to base rates; linear_ramp_cosine_decay: a ramp, then cosine cycles down to --min_lr.")
    add("--n_ramp", type=whole(0), default=0, metavar="EPOCHS",
        help="Length of the linear ramp of the learning rates in epochs; 0: no ramp.")
    add("--n_cycles", type=whole(1), default=1, metavar="N",
        help="Number of equal cosine cycles of the learning rates after the ramp.")
    add("--headstart_z", type=whole(0), default=0, metavar="EPOCHS",
        help="Number of epochs at the start in which only the injections learn.")
    add("--wd", type=real(0), default=0.01, metavar="RATE",
        help="Weight decay of AdamW; biases, norms and tokens have none.")
    add("--beta1", type=real(0, 0.9999), default=0.9, metavar="X",
        help="Coefficient beta1 of AdamW, for the running mean of gradients.")
    add("--beta2", type=real(0, 0.9999), default=0.95, metavar="X",
        help="Coefficient beta2 of AdamW, for the running mean of squared gradients.")


def mask_flags(parser):
    add = parser.group("input, masks and targets")
    add("--mask_ratio", type=real(0, 1), default=0.75, metavar="SHARE",
        help="Share of an image's patches that are masked.")
    add("--fix_mask_noise", **SWITCH, default=0,
        help="1: an image has the same mask in every epoch; 0: a new mask in every epoch.")
    add("--predict_ratio", type=real(0, 1), metavar="SHARE",
        help="Share of an image's patches, drawn from its masked ones, that are predicted in "
        "training; default: 0.25 with --decoder cross, else all masked patches.")
    add("--norm_pix_loss", **SWITCH,
        help="Targets of the predictions. 1: patches, each normalised by its mean and deviation; "
        "0: raw pixels; default: 1, or 0 with --arch vit_base_vis.")
    add("--input_size", type=whole(1), nargs="+", default=[224], metavar="PIXELS",
        help="Side, or height and width, of the images that the network sees, in pixels.")
    add("--channels", type=whole(1, 1024), default=3, metavar="N",
        help="Number of channels of an image. Pictures have 1 (grey), 3 (RGB) or 4 (RGBA); .npy "
        "files and TIFFs of several bands can have any number.")
    add("--mean", type=real(), nargs="+", metavar="X",
        help="Mean of each channel, as a share of the largest number (255, or 65535 of 16 bits); "
        "default: that of --mae_weights, else ImageNet's for 3 channels, else measured on "
        f"{MEASURED} training images.")
    add("--std", type=real(0), nargs="+", metavar="X",
        help="Standard deviation of each channel, in the unit of --mean; give both or neither.")


def probe_flags(parser, title="fast linear probe", training=True):
    """training: as in data_flags."""
    add = parser.group(title, changeable=True)
    add("--val_n_way", type=whole(2), default=32, metavar="CLASSES",
        help="Largest number of classes in the fast probe.")
    add("--val_n_shot", type=whole(1), default=50, metavar="IMAGES",
        help="Largest number of training images per class in the fast probe.")
    add("--probe_lr", type=real(0), default=1e-3, metavar="RATE",
        help="Peak learning rate of the fast probe's linear head.")
    add("--probe_epochs", type=whole(1), default=100, metavar="EPOCHS",
        help="Number of epochs for which the fast probe's linear head is trained.")
    add("--probe_bs", type=whole(1), default=16, metavar="IMAGES",
        help="Number of images per gradient step of the fast probe's linear head.")
    add("--probe_bs_val", type=whole(1), default=256, metavar="IMAGES", changeable=training,
        help="Number of images per pass when a probe computes features.")
    add("--probe_ignore_z", **SWITCH, default=1, changeable=training,
        help="1: a probe computes features without codes; 0: with random codes.")
    add("--probe_augs_per_image", type=whole(1), default=1, metavar="COPIES",
        help="Augmented copies of each training image in the fast probe, with --use_augs 1.")
    add("--global_pool", **SWITCH, default=1, changeable=training,
        help="Features that a probe uses. 1: mean of the patch tokens; 0: class token.")


def validation_flags(parser):
    add = parser.group("validation", changeable=True)
    add("--fast_linear_probe", **SWITCH, default=1,
        help="1: each validation trains and tests the fast probe on --data_tr and --data_val, if "
        "they have several classes; 0: no probe on them.")
    add("--probe_data", nargs="+", metavar="NAME=TRAIN,VAL",
        help="Other labelled images on which each validation trains and tests a fast linear probe: "
        f"a name for the metrics, and the paths of training and validation images ({IMAGES}).")
    add("--ex_for_mse_loss", type=whole(1), default=2048, metavar="IMAGES",
        help="Number of images on which the validation loss is computed.")
    add("--z_per_ex_loss", type=whole(1), default=128, metavar="CODES",
        help="Number of codes per image with which the validation loss is computed.")
    add("--eval_bs", type=whole(1), default=32, metavar="IMAGES",
        help="Number of images per pass and process when the validation loss is computed.")
    add("--ex_for_vis_tr", type=whole(0), default=8, metavar="ROWS",
        help="Number of training images, one per row, in the picture of completions.")
    add("--ex_for_vis_te", type=whole(0), default=8, metavar="ROWS",
        help="Number of validation images, one per row, in the picture of completions.")
    add("--z_per_ex_vis", type=whole(1), default=8, metavar="CODES",
        help="Number of codes, one per column, in the pictures of completions.")
    add("--show_bands", type=whole(0), nargs="+", metavar="BAND",
        help="Channels, numbered from 0, that pictures of completions show as red, green and blue, "
        "or the one that they show as grey; default: the first three, or the first of one or two.")
    add("--steps_per_eval", type=whole(0), default=64, metavar="STEPS",
        help="Validate every STEPS steps, also before the first and after the last; 0: never.")
    add("--get_mae_baseline", **SWITCH, default=1,
        help="1: also validate the initial network without codes; 0: only with codes.")


def device_flags(parser, training=True):
    """training: as in data_flags."""
    add = parser.group("devices and precision", changeable=True)
    if training:
        add("--fp16", action=argparse.BooleanOptionalAction, default=True,
            help="Gradient steps in mixed precision (bfloat16 or float16); --no-fp16: in float32.")
    add("--sample_dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        changeable=training,
        help="Precision of sampling, validation and probe features; auto: the device's fastest.")
    add("--gpus", nargs="+", metavar="ID",
        help="Ids of CUDA GPUs, one process each, or `cpu`; default: all visible, else the CPU.")
    add("--processes", type=whole(1), default=1, metavar="N", help="Processes with --gpus cpu.")


def run_flags(parser):
    add = parser.group("run", changeable=True)
    add("--save_iter", type=whole(1, also=-1), default=-1, metavar="EPOCHS",
        help="Epochs between checkpoints that are kept for good; -1: keep only the newest ones.")
    add("--save_minutes", type=real(0), default=10.0, metavar="MINUTES",
        help="Minutes between saves of the newest checkpoint, besides a save at the end.")
    add("--wandb", choices=("disabled", "offline", "online"), default="disabled",
        help="Copy of metrics and pictures for W&B: none, in files to upload later, or online.")
    add("--save_folder", default=".", metavar="DIR", help="Runs are saved in DIR/models/NAME.")
    add("--suffix", default="", metavar="TEXT", help="Text that the run's name contains.")
    add("--uid", metavar="TEXT",
        help="Identity of the run, at the end of its name. The same command with the same uid goes "
        "on where the run stopped; default: the SLURM job's id, or else random.")
    add("--notes", default="", metavar="TEXT", help="Notes to keep in config.json and in W&B.")
    add("--resume", metavar="CHECKPOINT",
        help="Newest checkpoint of a run to go on with; flags not given keep that run's values.")
    add("--force_resume", **SWITCH, default=0,
        help="1: go on although flags of training, not of the model, have changed; 0: refuse to.")
    add("--config", metavar="FILE", default=argparse.SUPPRESS,
        help="JSON file with values for flags that the command line does not give: {\"lr\": 0.001, "
        "...}, or a run's config.json. A run's "
        f"{', '.join(f'--{name}' for name in NOT_FROM_CONFIG)} are left out; a file of your own "
        "can't have them.")
    add("--staged", metavar="DIR",
        help="Folder on a fast disk with copies of the data: DIR/PATH is read in place of /PATH of "
        "--data_tr, --data_val and --probe_data; the run's name keeps /PATH "
        "(scripts/slurm_submit.py --stage).")


# fmt: on
def changeable_flags(parser):
    """Names of the flags with which a run, or a probe, may go on with another value."""
    return {action.dest for action in parser._actions if getattr(action, "changeable", False)}


def settings(flags, parser):
    """The flags that a result depends on, {name: value}: a probe or a fine-tuning goes on only if
    they are equal. Paths of data are absolute: all paths to one place are equal."""
    changeable = changeable_flags(parser)
    kept = {name: value for name, value in vars(flags).items() if name not in changeable}
    paths = {name: str(Path(kept[name]).expanduser().resolve()) for name in ("data_tr", "data_val")}
    return kept | paths


def architecture_flags(config_class=ModelConfig):
    """Names of the flags that determine the model: a run can never go on with another value."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    return fields - {"image_size"} | {"input_size", "arch", "ignore_z"}


# -------------------------------------------------------------------------------------------------
# From the words of a command line to checked flags.


def parse_flags(argv=None):
    """The flags of TrainIMLE.py, resolved and checked; ends the program on a mistake."""
    parser, argv = training_parser(), sys.argv[1:] if argv is None else argv
    argv = with_flags_of_run(with_config(argv))
    with parser.errors():
        return resolve_flags(parser.parse_args(argv))


def with_config(argv):
    """TrainIMLE.py's command line, a list of words, in which the flags of the --config FILE replace
    `--config FILE`. They come first, so that the command line's own flags override them."""
    args, others = early_flags(argv, "config")
    if args.config is None:
        return argv
    return [*words_of(lambda: read_config_file(args.config), f"--config {args.config}"), *others]


def with_flags_of_run(argv):
    """The command line with flags of the run that goes on before its own flags: all flags of the
    run that --resume names; of the run with this --uid the flags that may not change."""
    early, _ = early_flags(argv, "resume", "uid", "save_folder")
    source = "--resume" if early.resume else "--uid" if early.uid else ""
    return [*words_of(lambda: flags_of_run(**vars(early)), source), *argv]


def early_flags(argv, *names):
    """A namespace with the values of these flags in a command line, None where a flag or its value
    is missing, and the other words. Reports no mistake: that is left to the parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?")
    return parser.parse_known_args(argv)


def words_of(read, source):
    """The flags that read() returns, a dict, as words of a command line. Ends the program on a
    mistake in them, with their source in the message."""
    parser = training_parser()
    parser.source = source
    for action in parser._actions:
        action.required = False
    with parser.errors():
        flags = read()
        parser.check_names(f"--{name}" for name in flags)
        words = [word for name, value in flags.items() for word in as_words(parser, name, value)]
        parser.parse_args(words)  # only to report mistakes with their source
    return words


def flags_of_run(resume, uid, save_folder):
    """The flags, a dict, that the run which goes on gives to the command line. Flags that are no
    flags of this version are left out, as `runs` refuses them."""
    parser = training_parser()
    if resume:
        flags, left_out = read_run_checkpoint(resume, mmap=True)["args"], ONE_START
    else:
        folder = folder_of(uid or launcher_uid(), save_folder or parser.get_default("save_folder"))
        flags, left_out = read_config(folder) if folder else {}, changeable_flags(parser)
    if not flags:
        return {}
    names = {action.dest for action in parser._actions} - set(left_out)
    return {name: value for name, value in current_flags(flags).items() if name in names}


def read_config_file(path):
    """The flags in a --config FILE, a dict, without those that it never sets."""
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"it can't be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"it is no JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError('expected names of flags with their values, {"lr": 0.001, ...}')
    if isinstance(content.get("flags"), dict):  # of a run, which holds all of its flags
        flags = current_flags(content["flags"])
        return {name: flags[name] for name in flags if name not in NOT_FROM_CONFIG}
    for name in NOT_FROM_CONFIG:
        if name in content:
            raise InputError(f"--{name}: allowed on the command line only")
    return content


def as_words(parser, name, value):
    """The value of a flag, from a --config FILE or of a run, as words of a command line; none for
    null or an empty list, which leave the flag's default."""
    action, several = parser._option_string_actions[f"--{name}"], isinstance(value, list)
    values = value if several else [value]
    if value in (None, []):
        return []
    if not all(isinstance(part, str | int | float) for part in values):  # a bool is an int
        raise InputError(f"--{name}: expected a number, a text, or a list of these")
    if several and action.nargs != "+":
        raise InputError(f"--{name}: expected one value, not a list")
    if isinstance(action, argparse.BooleanOptionalAction):
        if value not in (0, 1):
            raise InputError(f"--{name}: expected true or false")
        return [f"--{name}" if value else f"--no-{name}"]
    texts = [str(int(part) if isinstance(part, bool) else part) for part in values]
    return [f"--{name}", *texts] if several else [f"--{name}={texts[0]}"]


def resolve_flags(args):
    """A new namespace in which every default that depends on other flags is filled in; an
    InputError for flags that contradict each other."""
    flags, preset = argparse.Namespace(**vars(args)), PRESETS[args.arch]
    if args.norm_pix_loss is None:
        flags.norm_pix_loss = int(preset.norm_pix_loss)
    if args.mapping_net_lrmul is None:
        flags.mapping_net_lrmul = 1.0 if args.adain_init == "identity" else 0.01
    if args.predict_ratio is None:
        flags.predict_ratio = 0.25 if args.decoder == "cross" else 1.0
    flags.ip_spec = args.ip_spec or [str(preset.depth - 1), "adain"]
    if args.ignore_z:
        flags.ip_spec = []
    if args.sampler == "auto":
        flags.sampler = choose_sampler(flags)
    if args.tries == -1 and flags.sampler == "surrogate":
        flags.tries = max(1, args.ns // 5)
    flags.lr_z = args.lr if args.lr_z == -1 else args.lr_z
    flags.uid = args.uid or launcher_uid() or secrets.token_hex(4)
    resolve_shared_flags(flags)
    check_patches(flags, math.prod(check_model(flags).grid))
    check_codes(flags)
    check_steps(flags)
    check_weights(flags)
    check_bands(flags.show_bands or [], flags.channels)
    probe_paths(flags.probe_data)
    if not re.fullmatch(r"[\w.+-]{1,64}", flags.uid, re.ASCII):
        refuse(flags, "uid", "allowed are up to 64 letters, digits and . _ + -")
    if args.epochs and args.headstart_z + args.n_ramp > args.epochs:
        say(f"note: the last of --epochs {args.epochs} ends before --headstart_z and --n_ramp do")
    return flags


def choose_sampler(flags):
    """The sampler that --sampler auto stands for."""
    methods = [INJECTIONS.get(method) for method in flags.ip_spec[1::2]]
    can_learn = methods and all(method and method.surrogate_can_learn for method in methods)
    return "surrogate" if can_learn and flags.ns >= SURROGATE_NS else "exhaustive"


def launcher_uid():
    """The uid of a run without --uid: the id of the SLURM job, or else that of torchrun; None
    without these. An InputError if torchrun has restarted the run and gives no id to find it by."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return job
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id != "none":  # torchrun's default
        return re.sub(r"[^\w.+-]", "_", run_id, flags=re.ASCII)[:64]
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise InputError(
            "torchrun has restarted this run, which can't go on without --uid: give a --uid "
            "(that of the stopped run ends the name of its folder), or torchrun --rdzv_id"
        )
    return None


def refuse(flags, name, reason):
    """Raises the InputError for a flag's value; reason: what is allowed, or what to do."""
    value = getattr(flags, name)
    words = value if isinstance(value, list) else [value]
    raise InputError(f"--{name} {' '.join(map(str, words))}: {reason}")


def check_model(flags):
    """The ModelConfig of resolved flags; an InputError for sizes and options of no model."""
    if (flags.mean is None) != (flags.std is None):
        name = "std" if flags.mean is None else "mean"
        refuse(flags, name, "give --mean and --std, or neither")
    unknown = dict.fromkeys(("mean", "std"), (0.5,) * flags.channels)  # measured later
    try:
        return ModelConfig(**(unknown | model_fields(flags)))
    except FieldError as error:
        refuse(flags, "input_size" if error.field == "image_size" else error.field, error.reason)


def check_patches(flags, n_patches):
    """Refuses shares of an image's patches that are none or all of them."""
    check_mask_ratio(flags.mask_ratio, n_patches)
    if flags.predict_ratio < 1 and flags.decoder == "self":
        reason = "--decoder self predicts all masked patches; use --decoder cross, or 1"
        refuse(flags, "predict_ratio", reason)
    if round(flags.predict_ratio * n_patches) < 1:
        reason = f"at least one of {n_patches} patches must be predicted"
        refuse(flags, "predict_ratio", f"{reason}; use {1 / n_patches:.2g} or more")


def check_mask_ratio(mask_ratio, n_patches):
    """Refuses a mask ratio that leaves no visible or no masked patch."""
    n_visible = int(n_patches * (1 - mask_ratio))
    if not 0 < n_visible < n_patches:
        reason = f"it leaves {n_visible} of {n_patches} patches visible"
        raise InputError(f"--mask_ratio {mask_ratio:g}: {reason}; allowed are some, but not all")


def check_bands(bands, channels):
    """Refuses --show_bands that are not three, or one, of an image's channels."""
    if len(bands) not in (0, 1, 3) or any(band >= channels for band in bands):
        reason = f"allowed are three numbers, or one, from 0 to {channels - 1}"
        raise InputError(f"--show_bands {' '.join(map(str, bands))}: {reason}")


def check_codes(flags):
    """Refuses flags of codes that contradict each other, or that have no effect without codes."""
    idle = {"sampler": "exhaustive", "tries": -1, "rs_epsilon": 0, "headstart_z": 0}
    for name, value in idle.items():
        if flags.ignore_z and getattr(flags, name) != value:
            default = {"sampler": "auto"}.get(name, value)
            refuse(flags, name, f"with --ignore_z 1 there are no codes; use --{name} {default}")
    if flags.sampler == "exhaustive" and flags.tries != -1:
        refuse(flags, "tries", "needs --sampler surrogate; or use --tries -1")
    for method in flags.ip_spec[1::2]:
        if flags.sampler == "surrogate" and not INJECTIONS[method].surrogate_can_learn:
            reason = f"it can't rank codes of `{method}`, which have too many numbers"
            refuse(flags, "sampler", f"{reason}; use --sampler exhaustive")
    if flags.tries > flags.ns:
        refuse(flags, "tries", f"allowed are 1 to --ns {flags.ns}, or -1: a fifth of --ns")


def check_steps(flags):
    """Refuses steps, minibatches, schedules and learning rates that contradict each other."""
    least = math.ceil(flags.ex_per_epoch / flags.mini_bs)
    if flags.ipe < least:
        reason = f"so few steps of --mini_bs {flags.mini_bs} images do not use each of the"
        refuse(flags, "ipe", f"{reason} --ex_per_epoch {flags.ex_per_epoch}; use at least {least}")
    check_processes(flags, int(os.environ.get("WORLD_SIZE", len(flags.gpus))))
    if flags.n_ramp and flags.scheduler == "constant":
        reason = "--scheduler constant has no ramp; use 0, or --scheduler linear_ramp"
        refuse(flags, "n_ramp", reason)
    rates = {"lr": flags.lr} if flags.ignore_z else {"lr": flags.lr, "lr_z": flags.lr_z}
    for name, rate in rates.items():
        if flags.min_lr > rate:
            refuse(flags, "min_lr", f"at most --{name} {rate} is allowed")


def check_processes(flags, n_processes):
    """Refuses a minibatch that has fewer images than there are processes."""
    if flags.mini_bs < n_processes:
        reason = f"each of the {n_processes} processes needs an image; use at least {n_processes}"
        refuse(flags, "mini_bs", reason)


def check_weights(flags):
    """Refuses weights that training would not start from, or that are published nowhere."""
    if flags.mae_weights and not flags.finetune:
        reason = "--finetune 0 starts from random weights; use --finetune 1, or no --mae_weights"
        refuse(flags, "mae_weights", reason)
    if flags.finetune and not flags.mae_weights:
        advice = "name weights by --mae_weights, or train from scratch by --finetune 0"
        if flags.decoder != "self":
            reason = f"the published weights have no --decoder {flags.decoder}"
            refuse(flags, "finetune", f"{reason}; {advice}")
        if flags.arch not in PUBLISHED:
            reason = f"no weights are published for --arch {flags.arch}, only for"
            refuse(flags, "finetune", f"{reason} {', '.join(PUBLISHED)}; {advice}")


def resolve_shared_flags(flags):
    """Resolves and checks, in place, flags that training and probes share."""
    with naming("--image_decoder"):
        check_decoder(flags.image_decoder)
    if flags.input_size:
        flags.input_size = height_and_width(flags.input_size)
    flags.gpus = device_names(flags.gpus, flags.processes)
    if flags.probe_augs_per_image > 1 and not flags.use_augs:
        refuse(flags, "probe_augs_per_image", "needs --use_augs 1; or use 1 copy")


# fmt: off
def probe_parser():
    """The parser of LinearProbe.py."""
    parser = Parser(
        prog="LinearProbe.py",
        usage="LinearProbe.py --model SOURCE --data_tr PATH --data_val PATH [flags]",
        description="Measure how well linear heads classify images by an encoder's features: with "
        "MAE's recipe and several heads at once, or with the fast probe that training uses.",
    )
    add = parser.group("encoder")
    add("--model", required=True, metavar="SOURCE",
        help=f"Weights of the encoder to probe: {SOURCES}; {FOREIGN_SOURCES}.")
    add("--input_size", type=whole(1), nargs="+", metavar="PIXELS",
        help="Side, or height and width, of images in pixels; default: as the network was trained.")
    add("--probe_codes", type=whole(1), default=1, metavar="CODES",
        help="Number of codes per image over which features are averaged (--probe_ignore_z 0).")
    add("--fast", **SWITCH, default=0, changeable=True,
        help="1: the fast probe, on a few-shot subset; 0: the full probe.")
    data_flags(parser, training=False)
    device_flags(parser, training=False)

    add = parser.group("full probe")
    add("--lrs", type=real(0), nargs="+", default=[0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
        metavar="RATE",
        help="Learning rates per 256 images, one head each; MAE uses 0.1, small data need more.")
    add("--wds", type=real(0), nargs="+", default=[0.0], metavar="RATE",
        help="Weight decays: a head is trained with each, for each of --lrs.")
    add("--pools", nargs="+", choices=("cls", "mean", "both"),
        help="Features that heads are trained on. cls: class token; mean: mean of the patch "
        "tokens; both: the two, concatenated; default: cls, or mean with --global_pool 1.")
    add("--hold_out", type=real(0.001, 0.9), default=0.1, metavar="SHARE",
        help="Share of each class's training images held out to choose the best of several heads.")
    add("--epochs", type=whole(1), metavar="N",
        help="Number of epochs of the full probe; default: 90, or 50 for ViT-L and ViT-H.")
    add("--warmup_epochs", type=whole(0), metavar="N",
        help="Length of the linear warm-up in epochs; default: 10, at most a fifth of --epochs.")
    add("--batch_size", type=whole(2), metavar="IMAGES",
        help="Images per step of all processes; default: 512, at most 1/8 of the training images.")
    add("--keep_gb", type=real(0), default=8.0, metavar="GB", changeable=True,
        help="Memory for features in GB; with --use_augs 0, features that fit are computed once.")
    add("--save_minutes", type=real(0), default=10.0, metavar="MINUTES", changeable=True,
        help="Minutes between saves of the probe's checkpoint.")
    add("--force_resume", **SWITCH, default=0, changeable=True,
        help="1: go on with a probe that was stopped although its images have changed; 0: refuse.")
    add("--save_folder", default=".", metavar="DIR", changeable=True,
        help="A probe is saved in DIR/probes/NAME, and as a row of DIR/probes/results.csv.")
    probe_flags(
        parser,
        "fast probe (--probe_bs_val, --probe_ignore_z, --global_pool: of both probes)",
        training=False,
    )
    parser.set_defaults(global_pool=None)
    return parser


def finetune_parser():
    """The parser of scripts/finetune.py."""
    parser = Parser(
        prog="finetune.py",
        usage="finetune.py MODEL --data_tr PATH --data_val PATH [flags]",
        description="Fine-tune an encoder to classify images, by parts of MAE's recipe. The last "
        "line of the output is the result as JSON. The same command goes on after the last "
        "finished epoch.",
    )
    parser.add_argument("model", metavar="MODEL",
        help=f"Weights of the encoder: {SOURCES}; untrained:MODEL: fresh weights, same sizes.")
    data_flags(parser, training=False)
    add = parser.group("fine-tuning (MAE's values for ViT-B, but for --batch_size)")
    add("--epochs", type=whole(1), default=100, metavar="N",
        help="Number of passes over the training images.")
    add("--batch_size", type=whole(2), default=128, metavar="IMAGES",
        help="Number of images per gradient step, even; MAE has 1024.")
    add("--lr", type=real(0), default=5e-4, metavar="RATE",
        help="Peak learning rate of the head, for 256 images per step. It rises for a twentieth of "
        "the steps, then follows a cosine to 0.")
    add("--layer_decay", type=real(0.01, 1), default=0.65, metavar="X",
        help="Each block learns with X times the rate of the block after it; 1: with the same.")
    add("--wd", type=real(0), default=0.05, metavar="RATE",
        help="Weight decay of AdamW; biases, norms and tokens have none.")
    add("--drop_path", type=real(0, 0.99), default=0.1, metavar="SHARE",
        help="Stochastic depth: share of images for which the last block is left out; earlier "
        "blocks have smaller shares.")
    add("--mixup", type=real(0), default=0.8, metavar="ALPHA",
        help="Mixup: the share of the second image is drawn from Beta(ALPHA, ALPHA); 0: off.")
    add("--cutmix", type=real(0), default=1.0, metavar="ALPHA",
        help="CutMix: the area from the second image is drawn from Beta(ALPHA, ALPHA); 0: off.")
    add("--gpus", changeable=True, metavar="ID",
        help="Id of one CUDA GPU, or `cpu`; default: the first GPU, else the CPU.")
    add("--out", default="finetuned.pt", changeable=True, metavar="FILE",
        help="Checkpoint, written after each epoch, from which the same command goes on.")
    return parser


# fmt: on
ONLY_FAST = "val_n_way val_n_shot probe_lr probe_epochs probe_bs probe_augs_per_image".split()
ONLY_FULL = (
    "lrs wds pools hold_out epochs warmup_epochs batch_size keep_gb save_minutes force_resume"
).split()


def parse_probe_flags(argv=None):
    """The flags of LinearProbe.py, checked; ends the program on a mistake."""
    parser = probe_parser()
    with parser.errors():
        return resolve_probe_flags(parser.parse_args(argv), parser.get_default)


def parse_finetune_flags(argv=None):
    """The flags of scripts/finetune.py, checked; ends the program on a mistake."""
    parser = finetune_parser()
    with parser.errors():
        flags = parser.parse_args(argv)
        flags.gpus = device_names(flags.gpus and [flags.gpus], 1)[0]
        flags.out = Path(flags.out).expanduser()
        if not os.access(flags.out.parent, os.W_OK):
            refuse(flags, "out", "its folder does not exist, or can't be written to")
        if flags.batch_size % 2:
            refuse(flags, "batch_size", "Mixup mixes pairs of images; use an even number")
    return flags


def resolve_probe_flags(args, default):
    """A new namespace in which every default that depends on other flags is filled in; an
    InputError for flags that contradict each other. default(name): a flag's default."""
    flags = argparse.Namespace(**vars(args))
    if flags.global_pool is None:
        flags.global_pool = flags.fast
    for name in ("lrs", "wds", "pools"):
        values = getattr(flags, name) or []
        if len(set(values)) < len(values):
            refuse(flags, name, "the same value twice; give each value once")
    if flags.epochs and (flags.warmup_epochs or 0) > flags.epochs:
        refuse(flags, "warmup_epochs", f"at most --epochs {flags.epochs} is allowed")
    if flags.probe_codes > 1 and flags.probe_ignore_z:
        refuse(flags, "probe_codes", "needs --probe_ignore_z 0")
    resolve_shared_flags(flags)
    idle = ONLY_FULL if flags.fast else ONLY_FAST
    given = [f"--{name}" for name in idle if getattr(args, name) != default(name)]
    if given:
        say(f"note: {', '.join(given)}: no part of the {'fast' if flags.fast else 'full'} probe")
    return flags


def height_and_width(sizes):
    """[height, width] from the one or two numbers of --input_size."""
    if len(sizes) > 2:
        size = " ".join(map(str, sizes))
        raise InputError(f"--input_size {size}: allowed are one or two numbers")
    return [sizes[0], sizes[-1]]


def parse_ip_spec(words):
    """--ip_spec's words as ((place, method), ...), a block's place as a whole number."""
    if len(words) % 2:
        reason = f"expected pairs PLACE METHOD, got {len(words)} words"
        raise InputError(f"--ip_spec {' '.join(words)}: {reason}")
    return tuple(
        (int(place) if place.isdecimal() else place, method)
        for place, method in zip(words[::2], words[1::2], strict=True)
    )


def probe_paths(words):
    """--probe_data's words NAME=TRAIN,VAL, or None, as {name: (training path, validation path)}."""
    pairs = {}
    for word in words or []:
        name, _, paths = word.partition("=")
        paths = tuple(paths.split(","))
        if not re.fullmatch(r"[\w.+-]+", name, re.ASCII) or len(paths) != 2 or not all(paths):
            reason = "expected NAME=TRAIN,VAL, two paths without commas"
            raise InputError(f"--probe_data {word}: {reason}; names have letters, digits, . _ + -")
        if name in pairs:
            raise InputError(f"--probe_data {word}: the name {name} twice; give each set its own")
        pairs[name] = paths
    return pairs


def device_names(gpus, processes):
    """--gpus and --processes as torch's device names, one per process."""
    gpus_here = [str(number) for number in range(torch.cuda.device_count())]
    ids = [name.removeprefix("cuda:") for name in gpus or gpus_here or ["cpu"]]
    if set(ids) == {"cpu"}:
        return ["cpu"] * processes
    for name in ids:
        if name not in gpus_here or ids.count(name) > 1:
            reason = f"GPU {name} twice" if name in gpus_here else f"no GPU {name} on this machine"
            allowed = " or ".join([", ".join(gpus_here), "cpu"] if gpus_here else ["cpu"])
            raise InputError(f"--gpus {' '.join(gpus)}: {reason}; allowed: {allowed}")
    if processes not in (1, len(ids)):
        reason = "with GPUs there is one process for each; leave --processes out"
        raise InputError(f"--processes {processes}: {reason}")
    return [f"cuda:{name}" for name in ids]


def model_fields(flags):
    """The fields of ModelConfig that resolved flags determine: all but norm_eps, which weights from
    elsewhere bring along, and mean and std unless they are given."""
    preset = vars(PRESETS[flags.arch])
    fields = preset | vars(flags)
    fields["image_size"] = tuple(flags.input_size)
    fields["norm_pix_loss"] = bool(flags.norm_pix_loss)
    fields["ip_spec"] = parse_ip_spec(flags.ip_spec)
    for name in ("mean", "std"):
        fields[name] = fields[name] and tuple(fields[name])
    return {k: fields[k] for k in preset if k != "norm_eps" and fields[k] is not None}

"""The flags of the programs: what they mean, their defaults and bounds, and what goes together."""

import argparse
import difflib
import math
import os
import re
import secrets
import sys

import torch

from Data import MOST_BAD
from internals.checkpoints import read_run_checkpoint
from internals.stores import IMAGE_DECODERS, check_decoder
from internals.weights import (
    FOREIGN_SOURCES,
    PUBLISHED,
    SOURCES,
    load_model,  # noqa: F401 (where users look for it)
)
from Models import ACTIVATIONS, DECODERS, INJECTIONS, PRESETS
from Utils import InputError, naming, say

# -------------------------------------------------------------------------------------------------
# Flags. Every flag, its default, its unit and its bounds stand in `training_parser`; `parse_flags`
# checks what bounds can't say.


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends on a mistake with one line, which names the nearest flag for an
    unknown one."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        flags = self._option_string_actions
        for word in (word.split("=")[0] for word in argv if word.startswith("--")):
            if word not in flags:  # first, as a missing flag may only be misspelt
                near = difflib.get_close_matches(word, flags, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                self.error(f"unknown argument {word}{hint}")
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}")
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, but for those that say nothing."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action):
        silent = action.default in (None, "", argparse.SUPPRESS) or "default" in action.help
        return action.help if silent else super()._get_help_string(action)


def number(kind, low=-math.inf, high=math.inf, also=None):
    """A type for add_argument: an int or float within [low, high], or the one value `also`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value) or value == also):
            bounds = f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
            bounds = "" if low == -math.inf else bounds + ("" if also is None else f", or {also:g}")
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}{bounds}")
        return value

    return convert


def whole(low, high=math.inf, also=None):
    """A type for add_argument: a whole number within bounds."""
    return number(int, low, high, also)


def real(low, high=math.inf, also=None):
    """A type for add_argument: a number within bounds."""
    return number(float, low, high, also)


SWITCH = {"type": int, "choices": (0, 1)}
WORKERS = min(
    8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
)


# fmt: off
def data_flags(parser):
    """The flags that training and probes share: images, seed, devices."""
    add = parser.add_argument_group("data").add_argument
    add("--data_tr", required=True, metavar="PATH",
        help="training images: a folder with one folder per class, a .tar of one, or an .lmdb "
        "of scripts/pack.py")
    add("--data_val", required=True, metavar="PATH", help="validation images, likewise")
    add("--train_n_way", type=whole(1, also=-1), default=-1, metavar="CLASSES",
        help="few-shot training: classes, evenly spaced in sorted order; -1: all")
    add("--train_n_shot", type=whole(1, also=-1), default=-1, metavar="IMAGES",
        help="few-shot training: images per class, chosen by --seed; -1: all")
    add("--use_augs", **SWITCH, default=1,
        help="1: random resized crop and flip, centre crop for tests; 0: plain resize for both")
    add("--image_decoder", choices=IMAGE_DECODERS, default="pillow",
        help="torchcodec (to be installed): about twice as fast, differs from pillow by rounding")
    add("--skip_bad_images", **SWITCH, default=0,
        help="1: replace damaged images by others of their class, up to "
        f"{MOST_BAD * 1000:g} in 1000; 0: stop")
    add("--num_workers", type=whole(0), default=WORKERS, metavar="N",
        help="loader workers per process; default: cores, at most 8")
    add("--loader_timeout", type=real(1), default=120.0, metavar="SECONDS",
        help="for which a loader worker may give nothing before the run ends with an error")
    add("--seed", type=whole(0, 2**31), default=0, metavar="N", help="of everything that is random")

    add = parser.add_argument_group("devices and precision").add_argument
    add("--gpus", nargs="+", metavar="ID",
        help="device ids, one process each, or `cpu`; default: all visible GPUs, else the CPU")
    add("--processes", type=whole(1), default=1, metavar="N", help="processes, with --gpus cpu")
    add("--sample_dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="precision of all that needs no gradients; auto: the fastest that the device has")


def probe_flags(parser, title="fast linear probe"):
    """The flags of the fast linear probe."""
    add = parser.add_argument_group(title).add_argument
    add("--val_n_way", type=whole(2), default=32, metavar="CLASSES", help="classes, at most")
    add("--val_n_shot", type=whole(1), default=50, metavar="IMAGES",
        help="training images per class, at most")
    add("--probe_lr", type=real(0), default=1e-3, metavar="RATE", help="peak rate of the head")
    add("--probe_epochs", type=whole(1), default=100, metavar="EPOCHS", help="epochs of the head")
    add("--probe_bs", type=whole(1), default=16, metavar="IMAGES", help="batch size of the head")
    add("--probe_bs_val", type=whole(1), default=256, metavar="IMAGES",
        help="images per pass when features are computed")
    add("--probe_ignore_z", **SWITCH, default=1,
        help="1: features without codes; 0: with one code per image")
    add("--probe_augs_per_image", type=whole(1), default=1, metavar="COPIES",
        help="augmented copies of each training image (with --use_augs 1)")
    add("--global_pool", **SWITCH, default=1,
        help="features: 1: mean of the patch tokens; 0: class token")


def training_parser():
    """The parser of TrainIMLE.py. A flag that is added here must be read somewhere."""
    parser = Parser(
        prog="TrainIMLE.py",
        usage="TrainIMLE.py --data_tr PATH --data_val PATH [flags]",
        description="Train a masked autoencoder, made implicit by latent codes, by IMLE.",
    )
    data_flags(parser)

    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=PRESETS, default="vit_base", metavar="NAME", help=", ".join(PRESETS))
    add("--ip_spec", nargs="+", metavar="PLACE METHOD",
        help="where codes enter, as pairs: 0... encoder blocks, then decoder blocks, or `mask`, "
        f"the mask token; {', '.join(INJECTIONS)}; default: adain at the last encoder block")
    add("--latent_dim", type=whole(1, 2**16), default=512, metavar="NUMBERS",
        help="numbers per code")
    add("--mapping_net_layers", type=whole(1, 64), default=8, metavar="N",
        help="of the net that turns a code into shifts and scales")
    add("--mapping_net_h_dim", type=whole(1, 2**16), default=512, metavar="WIDTH",
        help="its hidden width")
    add("--mapping_net_lrmul", type=real(1e-6), metavar="X",
        help="its learning-rate multiplier; default: .01, with --adain_init identity 1")
    add("--act_type", choices=ACTIVATIONS, default="leakyrelu", help="its activation")
    add("--adain_init", choices=("original", "identity"), default="original",
        help="identity: an injection changes nothing at first, and learns faster")
    add("--decoder", choices=DECODERS, default="self",
        help="self: MAE's, patches attend to each other; cross: masked ones to visible ones only")
    add("--mask_ratio", type=real(0, 1), default=0.75, metavar="SHARE", help="of patches removed")
    add("--predict_ratio", type=real(0, 1), metavar="SHARE",
        help="of all patches, masked ones, predicted in training (not in validation); default: "
        "with --decoder cross .25, else all masked ones")
    add("--norm_pix_loss", **SWITCH,
        help="1: predict patches normalised one by one; 0: pixels; default: 1, for vit_base_vis 0")
    add("--input_size", type=whole(1), nargs="+", default=[224], metavar="PIXELS",
        help="side, or height and width, of the images as the network sees them")
    add("--finetune", **SWITCH, default=1,
        help="1: start from pretrained weights, those of --mae_weights or the published ones for "
        "--arch; 0: from scratch")
    add("--mae_weights", metavar="SOURCE", help=f"weights to start from: {SOURCES}")
    add("--ignore_z", **SWITCH, default=0, help="1: no codes, a plain MAE")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole(0), default=1024, metavar="N", help="pools of images to train on")
    add("--ex_per_epoch", type=whole(1), default=2048, metavar="IMAGES", help="size of a pool")
    add("--ipe", type=whole(1), default=64, metavar="STEPS", help="gradient steps per epoch")
    add("--mini_bs", type=whole(1), default=32, metavar="IMAGES",
        help="per gradient step, over all processes")
    add("--accum", type=whole(1), default=1, metavar="PARTS",
        help="in which a process computes its share of a gradient step")
    add("--ns", type=whole(1), default=128, metavar="CODES", help="tried per image")
    add("--code_bs", type=whole(1), default=32, metavar="IMAGES", help="per sampling pass")
    add("--sp", type=whole(1), default=64, metavar="CODES",
        help="per image and sampling pass, at most; on a CPU as many as its cache likes")
    add("--sampler", choices=("exhaustive", "surrogate"), default="exhaustive",
        help="exhaustive: try all --ns codes; surrogate: try --tries of them, most of which a "
        "regression on those tried before takes for the best")
    add("--tries", type=whole(1, also=-1), default=-1, metavar="CODES",
        help="per image, with --sampler surrogate; -1: a fifth of --ns")
    add("--rs_epsilon", type=real(0), default=0.0, metavar="LOSS",
        help="RS-IMLE: a code nearer than this is chosen only where all are; 0: off")
    add("--code_free_share", type=real(0, 0.99), default=0.0, metavar="SHARE",
        help="of gradient steps, evenly spaced, taken without codes, as a plain MAE's: the network "
        "that probes see then learns, too")
    add("--shuffle_data", **SWITCH, default=1, help="1: pools and minibatches in random order")
    add("--fix_mask_noise", **SWITCH, default=0, help="1: an image has the same mask in all epochs")
    add("--fp16", action=argparse.BooleanOptionalAction, default=True,
        help="mixed-precision gradient steps in what the device computes natively")

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=real(0), default=1e-4, metavar="RATE", help="base rate of the MAE")
    add("--lr_z", type=real(0, also=-1), default=-1, metavar="RATE",
        help="base rate of the injections; -1: as --lr")
    add("--min_lr", type=real(0), default=0.0, metavar="RATE", help="where ramps start, decays end")
    add("--scheduler", choices=("constant", "linear_ramp", "linear_ramp_cosine_decay"),
        default="constant", help="of the rates, set anew for each gradient step")
    add("--n_ramp", type=whole(0), default=0, metavar="EPOCHS", help="of linear ramp")
    add("--n_cycles", type=whole(1), default=1, metavar="N", help="cosine cycles after the ramp")
    add("--headstart_z", type=whole(0), default=0, metavar="EPOCHS",
        help="in which only the injections learn")
    add("--wd", type=real(0), default=0.01, metavar="RATE", help="AdamW's weight decay")
    add("--beta1", type=real(0, 0.9999), default=0.9, metavar="X", help="AdamW's")
    add("--beta2", type=real(0, 0.9999), default=0.95, metavar="X", help="AdamW's")
    add("--clip_grad", type=real(0), default=0.0, metavar="NORM", help="of the gradient; 0: off")

    add = parser.add_argument_group("validation").add_argument
    add("--steps_per_eval", type=whole(0), default=64, metavar="STEPS",
        help="gradient steps between validations, besides the first and the last; 0: never")
    add("--ex_for_mse_loss", type=whole(1), default=2048, metavar="IMAGES", help="for the loss")
    add("--z_per_ex_loss", type=whole(1), default=128, metavar="CODES",
        help="per image, for the loss")
    add("--eval_bs", type=whole(1), default=32, metavar="IMAGES", help="per pass, for the loss")
    add("--ex_for_vis_tr", type=whole(0), default=8, metavar="ROWS", help="in the training grid")
    add("--ex_for_vis_te", type=whole(0), default=8, metavar="ROWS", help="in the validation grid")
    add("--z_per_ex_vis", type=whole(1), default=8, metavar="CODES", help="columns in the grids")
    add("--get_mae_baseline", **SWITCH, default=1,
        help="1: validate the starting point without codes, too")
    add("--fast_linear_probe", **SWITCH, default=1, help="1: with the probe below")
    probe_flags(parser)

    add = parser.add_argument_group("run").add_argument
    add("--save_folder", default=".", metavar="DIR", help="the run is DIR/models/NAME")
    add("--suffix", default="", metavar="TEXT", help="in the run's name")
    add("--uid", metavar="TEXT",
        help="the run's identity: the same command with the same uid goes on where it stood; "
        "default: the SLURM job's id, else random")
    add("--resume", metavar="CHECKPOINT",
        help="go on from the newest checkpoint of a run, with its flags where they are not given")
    add("--force_resume", **SWITCH, default=0,
        help="1: go on although flags changed that make the run what it is (never: its model's)")
    add("--save_iter", type=whole(1, also=-1), default=-1, metavar="EPOCHS",
        help="between checkpoints that are kept for good; -1: only the newest are kept")
    add("--save_minutes", type=real(0), default=10.0, metavar="MINUTES",
        help="between saves of the newest checkpoint, besides the last one")
    add("--staged", metavar="DIR",
        help="a folder of copies, on a fast disk: DIR/PATH is read where --data_tr or --data_val "
        "is /PATH, which the run is still named by (scripts/slurm_submit.py --stage)")
    add("--wandb", choices=("disabled", "offline", "online"), default="disabled",
        help="mirror metrics and pictures to Weights & Biases")
    add("--notes", default="", metavar="TEXT", help="kept in config.json and W&B")
    return parser


# fmt: on
def parse_flags(argv=None):
    """The flags of TrainIMLE.py, checked and with their defaults resolved; ends the program on a
    mistake."""
    parser = training_parser()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume", nargs="?")  # without a value: the real parser says so
    source = early.parse_known_args(argv)[0].resume
    if source:  # a run's flags are the defaults for going on with it
        try:
            known = read_run_checkpoint(source)["args"]
        except InputError as error:
            parser.error(f"--resume: {error}")
        parser.set_defaults(**{**known, "force_resume": 0})
        for action in parser._actions:
            action.required = action.required and action.dest not in known
    args = parser.parse_args(argv)
    try:
        return resolve_flags(args)
    except InputError as error:
        parser.error(str(error))


def resolve_flags(args):
    """A new namespace with every default that depends on other flags filled in; an InputError for
    what does not go together."""
    flags, preset = argparse.Namespace(**vars(args)), PRESETS[args.arch]
    flags.input_size = list(args.input_size) * (2 if len(args.input_size) == 1 else 1)
    if args.norm_pix_loss is None:
        flags.norm_pix_loss = int(preset.norm_pix_loss)
    if args.mapping_net_lrmul is None:
        flags.mapping_net_lrmul = 1.0 if args.adain_init == "identity" else 0.01
    if args.predict_ratio is None:
        flags.predict_ratio = 0.25 if args.decoder == "cross" else 1.0
    if args.tries == -1 and args.sampler == "surrogate":
        flags.tries = max(1, args.ns // 5)
    pairs = [] if args.ignore_z else parse_ip_spec(args.ip_spec, preset)
    flags.ip_spec = [str(word) for pair in pairs for word in pair]
    flags.lr_z = args.lr if args.lr_z == -1 else args.lr_z
    flags.uid = args.uid or os.environ.get("SLURM_JOB_ID") or secrets.token_hex(4)
    resolve_shared_flags(flags)
    check_flags(flags, preset.patch_size)
    if args.sp > args.ns and not args.ignore_z:
        say(f"note: --sp {args.sp} is lowered to {args.ns}, as --ns")
        flags.sp = args.ns
    if args.epochs and args.headstart_z + args.n_ramp > args.epochs:
        say(f"note: --epochs {args.epochs} end before --headstart_z and --n_ramp do")
    return flags


def check_flags(flags, patch_size):
    """Refuses resolved flags that do not go together; the InputError says what is allowed."""
    size = " ".join(map(str, flags.input_size))
    if len(flags.input_size) != 2 or any(side % patch_size for side in flags.input_size):
        wanted = f"one or two multiples of {patch_size}, the patch size of --arch {flags.arch}"
        raise InputError(f"--input_size {size}: allowed are {wanted}")
    n_patches = math.prod(flags.input_size) // patch_size**2
    check_mask_ratio(flags.mask_ratio, n_patches)
    check_sampling(flags)
    if flags.predict_ratio < 1 and flags.decoder == "self":
        shown = "with --decoder self all masked patches are predicted; use --decoder cross"
        raise InputError(f"--predict_ratio {flags.predict_ratio}: {shown}")
    if round(flags.predict_ratio * n_patches) < 1:
        shown = f"of {n_patches} patches at least one must be predicted"
        raise InputError(f"--predict_ratio {flags.predict_ratio}: {shown}")
    if flags.ipe * flags.mini_bs < flags.ex_per_epoch:
        raise InputError(
            f"--ipe {flags.ipe}: so many steps of --mini_bs {flags.mini_bs} images do not see "
            f"the --ex_per_epoch {flags.ex_per_epoch} images once; allowed is at least "
            f"{math.ceil(flags.ex_per_epoch / flags.mini_bs)}"
        )
    if flags.n_ramp and flags.scheduler == "constant":
        shown = "--scheduler constant has no ramp; use 0, or linear_ramp"
        raise InputError(f"--n_ramp {flags.n_ramp}: {shown}")
    if flags.headstart_z and flags.ignore_z:
        shown = "with --ignore_z 1 nothing could learn first; allowed is 0"
        raise InputError(f"--headstart_z {flags.headstart_z}: {shown}")
    if flags.min_lr > flags.lr or (flags.min_lr > flags.lr_z and not flags.ignore_z):
        raise InputError(f"--min_lr {flags.min_lr}: must be at most --lr and --lr_z")
    n_processes = max(len(flags.gpus), int(os.environ.get("WORLD_SIZE", 1)))
    check_processes(flags.mini_bs, n_processes)
    if not re.fullmatch(r"[\w.+-]{1,64}", flags.uid, re.ASCII):
        raise InputError(f"--uid {flags.uid}: allowed are up to 64 letters, digits and . _ + -")
    if flags.mae_weights and not flags.finetune:
        shown = "--finetune 0 starts from scratch; use --finetune 1, or no weights"
        raise InputError(f"--mae_weights: {shown}")
    if flags.finetune and not flags.mae_weights and flags.decoder != "self":
        shown = f"the published weights have no --decoder {flags.decoder}"
        raise InputError(f"--finetune 1: {shown}; name others with --mae_weights, or --finetune 0")
    if flags.finetune and not flags.mae_weights and flags.arch not in PUBLISHED:
        raise InputError(
            f"--finetune 1: no weights are published for --arch {flags.arch} (but for "
            f"{', '.join(PUBLISHED)}); name others with --mae_weights, "
            "or train from scratch with --finetune 0"
        )


def check_processes(mini_bs, n_processes):
    """Refuses a minibatch that does not have an image for each process."""
    if mini_bs < n_processes:
        shown = f"allowed is at least one image for each of {n_processes} processes"
        raise InputError(f"--mini_bs {mini_bs}: {shown}")


def check_sampling(flags):
    """Refuses what makes no sense for the choice of codes."""
    if flags.ignore_z:
        given = {
            "sampler": flags.sampler != "exhaustive",
            "rs_epsilon": flags.rs_epsilon > 0,
            "code_free_share": flags.code_free_share > 0,
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise InputError(f"--{name}: with --ignore_z 1 no codes are chosen; leave it out")
    if flags.sampler == "exhaustive" and flags.tries != -1:
        raise InputError(f"--tries {flags.tries}: needs --sampler surrogate, else leave it out")
    for method in flags.ip_spec[1::2]:
        if flags.sampler == "surrogate" and not INJECTIONS[method].surrogate_can_learn:
            shown = f"it learns nothing about the codes of `{method}`; use --sampler exhaustive"
            raise InputError(f"--sampler surrogate: {shown}")
    if flags.tries > flags.ns:
        raise InputError(f"--tries {flags.tries}: allowed are 1 to --ns {flags.ns}, or -1")


def check_mask_ratio(mask_ratio, n_patches):
    """Refuses a mask ratio that leaves nothing to see or to complete."""
    if not 0 < int(n_patches * (1 - mask_ratio)) < n_patches:
        shown = f"of {n_patches} patches some must be masked, some visible"
        raise InputError(f"--mask_ratio {mask_ratio}: {shown}")


def resolve_shared_flags(flags):
    """Resolves, in place, what training and probes have in common."""
    with naming("--image_decoder"):
        check_decoder(flags.image_decoder)
    flags.gpus = device_names(flags.gpus, flags.processes)
    if flags.probe_augs_per_image > 1 and not flags.use_augs:
        given = flags.probe_augs_per_image
        raise InputError(f"--probe_augs_per_image {given}: needs --use_augs 1, else use 1")


# fmt: off
def probe_parser():
    """The parser of LinearProbe.py."""
    parser = Parser(
        prog="LinearProbe.py",
        usage="LinearProbe.py --model SOURCE --data_tr PATH --data_val PATH [flags]",
        description="Probe how much of the classes an encoder's features hold: by MAE's recipe for "
        "linear probes, several heads at once, or by the fast probe that watches training.",
    )
    add = parser.add_argument_group("what is probed").add_argument
    add("--model", required=True, metavar="SOURCE",
        help=f"the weights to probe: {SOURCES}; {FOREIGN_SOURCES}")
    add("--input_size", type=whole(1), nargs="+", metavar="PIXELS",
        help="side, or height and width, of the images as the network sees them; default: its own")
    add("--probe_codes", type=whole(1), default=1, metavar="CODES",
        help="with --probe_ignore_z 0: codes per image over which features are averaged")
    add("--fast", **SWITCH, default=0, help="1: the fast probe, of a few-shot subset")
    data_flags(parser)

    add = parser.add_argument_group("full probe").add_argument
    add("--lrs", type=real(0), nargs="+", default=[0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
        metavar="RATE",
        help="base rates per 256 images, a head for each; .1 is MAE's, small data want more")
    add("--wds", type=real(0), nargs="+", default=[0.0], metavar="RATE",
        help="weight decays: a head for each, with each rate")
    add("--pools", nargs="+", choices=("cls", "mean", "both"),
        help="features: class token, mean of the patch tokens, both side by side: heads for each; "
        "default: as --global_pool says, without it the class token")
    add("--hold_out", type=real(0.001, 0.9), default=0.1, metavar="SHARE",
        help="of each class's training images, to choose among several heads; one head needs none")
    add("--epochs", type=whole(1), metavar="N", help="default: 90, of ViT-L and ViT-H 50")
    add("--warmup_epochs", type=whole(0), metavar="N",
        help="of linear warm-up; default: 10, at most a fifth of --epochs")
    add("--batch_size", type=whole(2), metavar="IMAGES",
        help="per step, over all processes, of which --probe_bs_val pass the network at a time; "
        "default: 512, at most an eighth of all; MAE's paper has 16384")
    add("--keep_gb", type=real(0), default=8.0, metavar="GB",
        help="of features on the device, at most; with --use_augs 0 they are computed once if "
        "that is enough")
    add("--save_minutes", type=real(0), default=10.0, metavar="MINUTES",
        help="between saves of where the probe stands")
    add("--save_folder", default=".", metavar="DIR",
        help="the probe is DIR/probes/NAME, and a row of DIR/probes/results.csv")
    probe_flags(
        parser,
        "fast probe; of both are --probe_bs_val, --probe_ignore_z and --global_pool",
    )
    parser.set_defaults(global_pool=None)
    return parser


# fmt: on
ONLY_FAST = "val_n_way val_n_shot probe_lr probe_epochs probe_bs probe_augs_per_image".split()
ONLY_FULL = "lrs wds pools hold_out epochs warmup_epochs batch_size keep_gb save_minutes".split()


def parse_probe_flags(argv=None):
    """The flags of LinearProbe.py, checked; ends the program on a mistake."""
    parser = probe_parser()
    args = parser.parse_args(argv)
    try:
        return resolve_probe_flags(args, parser.get_default)
    except InputError as error:
        parser.error(str(error))


def resolve_probe_flags(args, default):
    """A new namespace with what depends on other flags filled in; an InputError for what does not
    go together. default(name): a flag's default."""
    flags = argparse.Namespace(**vars(args))
    if flags.input_size and len(flags.input_size) > 2:
        raise InputError(f"--input_size {' '.join(map(str, flags.input_size))}: one or two numbers")
    if flags.input_size:
        flags.input_size = list(flags.input_size) * (2 if len(flags.input_size) == 1 else 1)
    if flags.global_pool is None:
        flags.global_pool = int(bool(flags.fast))
    for name in ("lrs", "wds", "pools"):
        if len(set(getattr(flags, name) or [])) < len(getattr(flags, name) or []):
            raise InputError(f"--{name}: the same value twice")
    if flags.warmup_epochs is not None and flags.epochs and flags.warmup_epochs > flags.epochs:
        raise InputError(f"--warmup_epochs {flags.warmup_epochs}: at most --epochs {flags.epochs}")
    if flags.probe_codes > 1 and flags.probe_ignore_z:
        raise InputError(f"--probe_codes {flags.probe_codes}: needs --probe_ignore_z 0")
    resolve_shared_flags(flags)
    idle = ONLY_FULL if flags.fast else ONLY_FAST
    given = [f"--{name}" for name in idle if getattr(args, name) != default(name)]
    if given:
        say(f"note: {', '.join(given)}: no part of the {'fast' if flags.fast else 'full'} probe")
    return flags


def parse_ip_spec(words, preset):
    """--ip_spec's words, checked, as [(place, method), ...] with whole-number places."""
    words = words or [str(preset.depth - 1), "adain"]
    shown = f"--ip_spec {' '.join(words)}"
    n_places = preset.depth + preset.decoder_depth
    if len(words) % 2:
        raise InputError(f"{shown}: expected pairs PLACE METHOD, got {len(words)} words")
    pairs = list(zip(words[::2], words[1::2], strict=True))
    for place, method in pairs:
        if method not in INJECTIONS:
            raise InputError(
                f"{shown}: unknown method {method}; allowed are {', '.join(INJECTIONS)}"
            )
        if place != "mask" and not (place.isdecimal() and int(place) < n_places):
            raise InputError(f"{shown}: no place {place}; allowed are 0 to {n_places - 1} and mask")
    pairs = [(place if place == "mask" else int(place), method) for place, method in pairs]
    if len({place for place, _ in pairs}) < len(pairs):
        raise InputError(f"{shown}: a place can be named once only")
    return pairs


def device_names(gpus, processes):
    """--gpus and --processes as torch's device names, one per process."""
    n_gpus = torch.cuda.device_count()
    if gpus is None:
        gpus = [str(i) for i in range(n_gpus)] or ["cpu"]
        if gpus == ["cpu"] and torch.accelerator.is_available():
            found = torch.accelerator.current_accelerator().type
            say(f"note: {found} devices are not supported; using the CPU")
    ids = [name.removeprefix("cuda:") for name in gpus]
    if set(ids) == {"cpu"}:
        return ["cpu"] * processes
    if "cpu" in ids:
        raise InputError(f"--gpus {' '.join(gpus)}: cpu can't be combined with GPUs")
    for name in ids:
        if not (name.isdecimal() and int(name) < n_gpus):
            allowed = f"0 to {n_gpus - 1}, or cpu" if n_gpus else "cpu, as this machine has no GPU"
            raise InputError(f"--gpus {' '.join(gpus)}: no GPU {name}; allowed: {allowed}")
    if len(set(ids)) < len(ids):
        raise InputError(f"--gpus {' '.join(gpus)}: the same GPU twice")
    if processes not in (1, len(ids)):
        raise InputError(
            f"--processes {processes}: with GPUs there is one process for each; leave it out"
        )
    return [f"cuda:{name}" for name in ids]


def model_fields(flags):
    """The fields of ModelConfig that resolved flags determine: all but norm_eps, which weights from
    elsewhere bring along."""
    preset = PRESETS[flags.arch]
    fields = {name: vars(flags).get(name, value) for name, value in vars(preset).items()}
    fields |= {
        "image_size": tuple(flags.input_size),
        "norm_pix_loss": bool(flags.norm_pix_loss),
        "ip_spec": tuple(parse_ip_spec(flags.ip_spec, preset)) if flags.ip_spec else (),
    }
    del fields["norm_eps"]
    return fields

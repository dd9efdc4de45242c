"""choosing codes: the plain way, all codes in float32, a run's default, and fewer tries"""

import dataclasses
from functools import partial
from pathlib import Path

import torch

import Data
from Augmentation import normalize, resize
from internals.weights import load_model
from IO import whole
from Models import PRESETS, build, in_precision, reconstruction_loss
from Samplers import choose_codes_surrogate
from TrainIMLE import choose_codes
from Utils import InputError, Stream, fastest_dtype, mix_seeds, naming, random_uniform

from .plain import plain_losses, plain_model
from .timing import Table, added_memory, describe, flops, interleaved, matmul, name_of

DEMO = Path(__file__).resolve().parent.parent.parent / "demo"
COLUMNS = {
    "name": ("sampler", "{}"),
    "image_codes_per_sec": ("codes/s", "{:,.1f}"),
    "images_per_sec": ("images/s", "{:.2f}"),
    "ratio_to_plain": ("x plain", "{:.2f}"),
    "share_of_matmul": ("of matmul", "{:.0%}"),
    "added_memory_gb": ("+ GB", "{:.2f}"),
    "regret": ("regret", "{:.2%}"),
}


def add_flags(parser):
    """Adds the benchmark's flags. Default sizes depend on the device."""
    sampling_flags(parser)
    add = parser.add_argument
    add("--regret_ns", type=whole(2), default=128, metavar="CODES", help="codes for regret")
    add("--code_bs", type=whole(1), metavar="IMAGES", help="per pass; default: CPU 4, GPU 32")
    add("--sp", type=whole(1), metavar="CODES", help="per image and pass; default: CPU 8, GPU 64")
    add("--repeats", type=whole(1), default=3, metavar="N", help="rounds that are timed")


def sampling_flags(parser, ns=None, regret_images=128):
    """Adds the flags that the benchmarks of sampling share."""
    add = parser.add_argument
    add("--arch", choices=PRESETS, default="vit_base", help="model for speed; default: vit_base")
    add("--ns", type=whole(2), default=ns, metavar="CODES",
        help=f"codes per image; default: {ns or 'CPU 32, GPU 128'}")  # fmt: skip
    add("--input_size", type=whole(1), default=224, metavar="PIXELS", help="side of the images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--checkpoint", default=str(DEMO / "imle_mnist.pt"), metavar="SOURCE",
        help="trained model for regret")  # fmt: skip
    add("--data", default=str(DEMO / "mnist_val.tar"), metavar="PATH",
        help="images for regret, like --data_val")  # fmt: skip
    add("--regret_images", type=whole(1), default=regret_images, metavar="N", help="for regret")


def measure(args):
    """Yields the Table of samplers: speed with random weights of --arch, regret on --checkpoint."""
    device, cpu = torch.device(args.device), args.device == "cpu"
    ns, sp = args.ns or (32 if cpu else 128), args.sp or (8 if cpu else 64)
    model, chunk = random_model(args, args.code_bs or (4 if cpu else 32), device)
    low = fastest_dtype(device)
    samplers = {
        "plain": plain_sampler,
        "plain, fused attention": partial(plain_sampler, fused=True),
        "exhaustive, float32": our_sampler,
        f"default: all, {name_of(low)}": partial(our_sampler, dtype=low),
        f"surrogate, {name_of(low)}": partial(our_sampler, dtype=low, share=0.2),
        f"a fifth of the codes, {name_of(low)}": partial(our_sampler, dtype=low, fewer=0.2),
    }
    ready = {name: make(model, chunk, ns=ns, sp=sp) for name, make in samplers.items()}
    cross, _ = random_model(args, 1, device, decoder="cross")
    options = {"ns": ns, "sp": sp, "dtype": low, "predict_ratio": 0.25}
    ready[f"all, --decoder cross, {name_of(low)}"] = our_sampler(cross, chunk, **options)
    products = {dtype: matmul(model, dtype) for dtype in (torch.float32, low)}
    seconds = interleaved({**ready, **products}, args.repeats, device)
    ours = {name: make for name, make in samplers.items() if not name.startswith("plain")}
    regrets = measure_regrets(args, ours, device, args.regret_ns)
    regrets |= dict.fromkeys(samplers.keys() - ours.keys(), 0.0)  # by definition
    n, rows = len(chunk[0]), []
    for name, run in ready.items():
        dtype = low if name_of(low) in name else torch.float32
        rate = flops(products[dtype]) / seconds[dtype]
        rows.append(
            {
                "name": name,
                "image_codes_per_sec": n * ns / seconds[name],
                "images_per_sec": n / seconds[name],
                "ratio_to_plain": seconds["plain"] / seconds[name],
                "share_of_matmul": flops(run) / seconds[name] / rate,
                "added_memory_gb": added_memory(run, device),
                "regret": regrets.get(name),
                "arch": args.arch,
                "code_bs": n,
                "sp": sp,
                "ns": ns,
                "device": describe(device),
            }
        )
    shape = f"{args.arch}, {n} images x {ns} codes, {sp} codes a pass, on {describe(device)}"
    yield Table(
        f"Sampling: {shape}",
        COLUMNS,
        rows,
        [
            "codes/s: codes to choose from, per second; of matmul: operations per second, as a "
            "share of those of the decoder's widest matrix product in the same precision",
            f"regret: on {args.checkpoint}, {args.regret_images} images x {args.regret_ns} codes",
        ],
    )


def random_model(args, n, device, **options):
    """A model of --arch with random weights and AdaIN at the last encoder block, and a chunk of n
    images: images, mask noise, seeds. options: more fields of the ModelConfig."""
    preset = PRESETS[args.arch]
    if args.input_size % preset.patch_size:
        raise InputError(f"--input_size {args.input_size}: no multiple of {preset.patch_size}")
    ip_spec, size = ((preset.depth - 1, "adain"),), (args.input_size,) * 2
    torch.manual_seed(0)
    config = dataclasses.replace(preset, ip_spec=ip_spec, image_size=size, **options)
    model = build(config).eval().to(device)
    length = model.pos_embed.shape[1] - 1
    chunk = torch.randn(n, 3, *size), torch.rand(n, length), torch.arange(n)
    return model, [tensor.to(device) for tensor in chunk]


def plain_sampler(model, chunk, *, ns, sp, fused=False):
    """A callable that chooses codes (N, D) as the original does: runs the encoder again for every
    pass of sp codes, decodes all tokens, computes in float32."""
    model = plain_model(model, fused)

    @torch.no_grad()
    def run():
        images, mask_noise, seeds = chunk
        codes = model.sample_codes(seeds, ns)
        losses = [plain_losses(model, images, mask_noise, part) for part in codes.split(sp, dim=1)]
        return codes[torch.arange(len(codes)), torch.cat(losses, dim=1).argmin(1)]

    return run


def our_sampler(model, chunk, *, ns, sp, dtype=torch.float32, share=None, fewer=1.0, **options):
    """A callable that chooses codes (N, D) as a run does, from a share `fewer` of the ns codes; the
    surrogate tries a `share` of these codes."""
    model, choose = in_precision(model, dtype), choose_codes
    options |= {"codes_per_image": max(1, round(ns * fewer)), "codes_per_pass": sp}
    if share is not None:
        choose = partial(choose_codes_surrogate, tries=max(1, round(ns * share)))
    return lambda: choose(model, *chunk, **options)[0]


@torch.no_grad()
def measure_regrets(args, samplers, device, ns):
    """{name: regret} of the samplers on the trained checkpoint, with ns codes per image."""
    model, chunk = trained_model(args, device)
    losses = all_losses(model, *chunk[:2], model.sample_codes(chunk[2], ns))
    return {
        name: regret(model, chunk, losses, make(model, chunk, ns=ns, sp=16))
        for name, make in samplers.items()
    }


def trained_model(args, device):
    """The checkpoint's model, and a chunk of evenly spaced images of the data."""
    with naming("--checkpoint"):
        model = load_model(args.checkpoint).eval().to(device)
        if not model.code_dim:
            raise InputError(f"{args.checkpoint} has no codes")
    with naming("--data"):
        images = Data.open_images(args.data, channels=model.config.channels)
    n = min(args.regret_images, len(images))
    indices = torch.arange(n) * len(images) // n
    loader = Data.ImageLoader(images, resize(model.config.image_size), num_workers=0)
    ((_, pixels),) = loader.chunks(indices, indices, n)
    noise = random_uniform(mix_seeds(indices, Stream.MASK), model.pos_embed.shape[1] - 1)
    pixels = normalize(pixels, model.config.mean, model.config.std)
    return model, [pixels.to(device), noise.to(device), indices.to(device)]


def all_losses(model, images, mask_noise, codes):
    """The losses (N, k) of codes (N, k, D) in float32, 16 codes at a time, all tokens decoded."""
    losses = []
    for part in codes.split(16, dim=1):
        pred, mask = model(images, mask_noise, part)
        losses.append(reconstruction_loss(pred, images, mask, model.config.norm_pix_loss))
    return torch.cat(losses, dim=1)


@torch.no_grad()
def regret(model, chunk, losses, sampler):
    """Regret: (loss of the chosen codes - loss of the best) / (mean loss - loss of the best), each
    summed over the images, in float32. losses (N, ns) of all codes."""
    images, mask_noise, _ = chunk
    chosen = all_losses(model, images, mask_noise, sampler()[:, None])[:, 0]
    best = losses.min(1).values
    return ((chosen - best).sum() / (losses.mean(1) - best).sum()).item()

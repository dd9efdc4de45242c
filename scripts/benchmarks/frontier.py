"""the quality lost by trying fewer codes: a picture of regret over time"""

from functools import partial

import torch

from internals.plots import at_most_a_warning, saved_figure
from IO import whole
from Utils import fastest_dtype

from . import sampling
from .timing import Table, describe, interleaved, name_of

COLUMNS = {
    "name": ("sampler", "{}"),
    "tries": ("codes tried", "{}"),
    "share_of_time": ("of the time for all", "{:.1%}"),
    "regret": ("regret", "{:.2%}"),
}


def add_flags(parser):
    """Adds the benchmark's flags."""
    sampling.sampling_flags(parser, ns=128, regret_images=256)
    add = parser.add_argument
    add("--tries", type=whole(1), nargs="+", default=[4, 8, 12, 16, 24, 32, 48, 64, 96],
        metavar="CODES", help="numbers of codes to try, below --ns")  # fmt: skip
    add("--sp", type=whole(1), default=64, metavar="CODES", help="codes per image and pass")
    add("--images", type=whole(1), metavar="N", help="timed images; default: CPU 2, GPU 32")
    add("--repeats", type=whole(1), default=2, metavar="N", help="rounds that are timed")
    add("--out", default="frontier.png", metavar="FILE", help="the picture; default: frontier.png")


def measure(args):
    """Yields and draws the Table of fewer codes and of the surrogate, in a run's precision: time
    with random weights of --arch, regret on --checkpoint."""
    device = torch.device(args.device)
    dtype = fastest_dtype(device)
    ours = partial(sampling.our_sampler, dtype=dtype)
    samplers = {("all codes", args.ns): ours}
    for tries in (tries for tries in args.tries if tries < args.ns):
        samplers["fewer codes", tries] = partial(ours, fewer=tries / args.ns)
        samplers["surrogate", tries] = partial(ours, share=tries / args.ns)
    n = args.images or (2 if device.type == "cpu" else 32)
    model, chunk = sampling.random_model(args, n, device)
    ready = {key: make(model, chunk, ns=args.ns, sp=args.sp) for key, make in samplers.items()}
    seconds = interleaved(ready, args.repeats, device)
    regrets = sampling.measure_regrets(args, samplers, device, args.ns)
    whole_time = seconds["all codes", args.ns]
    rows = [
        {
            "name": name,
            "tries": tries,
            "share_of_time": seconds[name, tries] / whole_time,
            "regret": regrets[name, tries],
            "arch": args.arch,
            "ns": args.ns,
            "device": describe(device),
        }
        for name, tries in sorted(samplers)
    ]
    title = f"Regret of trying fewer than {args.ns} codes; time: {args.arch}, {name_of(dtype)}"
    yield Table(title, COLUMNS, rows, [f"regret: on {args.checkpoint}", f"drawn in {args.out}"])
    with at_most_a_warning(args.out):  # the rows go to --json afterwards
        draw(rows, args)


def draw(rows, args):
    """Draws regret over time, one line for each sampler."""
    with saved_figure(args.out, (6.4, 4), dpi=120) as figure:
        axes = figure.subplots()
        for name, marker in (("fewer codes", "o"), ("surrogate", "s")):
            mine = sorted(
                (row for row in rows if row["name"] == name), key=lambda row: row["tries"]
            )
            points = [(row["share_of_time"], max(row["regret"], 1e-5)) for row in mine]
            axes.plot(*zip(*points, strict=True), marker=marker, label=name)
            for row, point in zip(mine, points, strict=True):
                axes.annotate(row["tries"], point, (4, 4), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", yscale="log", ylabel="regret")
        axes.set_xlabel(f"time, as a share of that for all {args.ns} codes ({args.arch})")
        axes.set_title("Codes tried per image, and how much worse the chosen one is", fontsize=10)
        axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1])
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.grid(alpha=0.3, which="both")
        axes.legend()

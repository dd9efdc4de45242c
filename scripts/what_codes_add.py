"""Measures what codes add, on runs with the uids ARM-SEED: the loss of the best of k completions of
a masked image, the number of classes that the completions show, and whether the true class is among
them. A classifier trained on whole images (the judge) recognises the classes. A linear probe tells
the class of an image from its nearest code alone, one of the same codes for all images: what the
code says of the class, the encoder need not. For comparison: an
MAE's single completion, that completion with noise as large as the effect of codes, and an
untrained network with codes.

python scripts/what_codes_add.py FOLDER --out codes.png"""

import dataclasses
import math
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)
import numpy as np
import torch
from figure import arms, called, check_folder, print_table  # noqa: E402
from torch import nn
from torch.nn import functional as F

import Data
import Models
from Augmentation import denormalize, normalize, to_pictures, transforms
from internals.plots import picture_grid, saved_figure
from internals.processes import run_command
from internals.runs import read_config
from internals.weights import load_model
from IO import Parser, real, whole
from LinearProbe import check_classes, linear_probe
from Samplers import image_losses
from Utils import (
    InputError,
    Stream,
    default_device,
    drawable,
    fastest_dtype,
    mix_seeds,
    random_normal,
    say,
    seeded,
    watch,
)
from Validation import examples, prepare

NOISE, UNTRAINED = "MAE + noise", "untrained"
IMAGES_PER_PASS = 8
JUDGE_IMAGES = 50_000  # the judge learns from at most so many images
ROWS, COLUMNS = 8, 12  # at most, in the picture of classes: images, classes


# -------------------------------------------------------------------------------------------------
# The judge.


def train_judge(images, labels, n_classes, seed, config, batch=64):
    """Trains a small convolutional network to classify images (n, C, H, W), uint8 or uint16.
    config: the ModelConfig by which they are normalised."""
    epochs = min(20, max(1, round(80_000 / len(images))))
    with seeded(seed):
        judge = nn.Sequential(
            *(nn.Conv2d(config.channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4)),
            *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 16, n_classes)),
        ).to(images.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(judge.parameters())
        n_batches = math.ceil(len(images) / batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * n_batches)
        order = (i for _ in range(epochs) for i in torch.randperm(len(images)).split(batch))
        for rows in watch(order, "judge", epochs * n_batches, unit="steps"):
            optimizer.zero_grad()
            x = normalize(images[rows], config.mean, config.std)
            F.cross_entropy(judge(x), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return Models.in_precision(judge.eval(), fastest_dtype(images.device))


def make_judge(images, device, config, options):
    """A judge trained on the images of a data set. config: see train_judge; options: keywords of
    Validation.examples."""
    chosen = examples(images, JUDGE_IMAGES, **options)
    chunks = chosen.loader.chunks(chosen.indices, chosen.seeds, 256)
    parts = [part for _, part in watch(chunks, "loading", len(chosen.indices))]
    labels = torch.as_tensor(images.targets)[chosen.indices].to(device)
    images, n_classes = torch.cat(parts).to(device), len(images.classes)
    return train_judge(images, labels, n_classes, options["seed"], config)


@torch.no_grad()
def judged(judge, images, config):
    """images (N, K, C, H, W) normalised -> the judge's classes (N, K) and their probabilities."""
    # uint8 first, so that values beyond black and white can't make the judge sure of a class.
    shown = denormalize(images, config.mean, config.std)
    shown = normalize(shown, config.mean, config.std).flatten(0, 1)
    shown = shown.to(next(judge.parameters()).dtype)
    shown = shown.contiguous(memory_format=torch.channels_last)
    probabilities = torch.cat([judge(part).float().softmax(1) for part in shown.split(256)])
    return [x.unflatten(0, images.shape[:2]) for x in probabilities.max(1)[::-1]]


# -------------------------------------------------------------------------------------------------
# Completions and their measures.


@torch.no_grad()
def complete(models, mae, images, mask_noise, codes_per_image, mask_ratio, seeds):
    """Yields (name, completions (N,K,L,P*P*C), mask) for each model in {name: model}, with the same
    codes for every image. For the model `mae` it also yields completions with noise: each value's
    noise is as large as the first model's standard deviation over codes."""
    deviation = None
    for name, model in models.items():
        codes = None
        if model.code_dim:
            codes = model.sample_codes(torch.zeros_like(seeds), codes_per_image)
        pred, mask = model(images, mask_noise, codes, mask_ratio)
        pred = (pred if model.code_dim else pred[:, None]).float()
        if deviation is None and model.code_dim:
            deviation = pred.std(1, keepdim=True)
        yield name, pred, mask
    if mae in models and deviation is not None:
        pred, mask = models[mae](images, mask_noise, None, mask_ratio)
        shape = (codes_per_image, *deviation.shape[2:])
        counters = torch.arange(math.prod(shape), device=seeds.device)
        noise = random_normal(mix_seeds(seeds, Stream.CODE)[:, None], counters).unflatten(1, shape)
        yield NOISE, pred[:, None].float() + deviation * noise, mask


def best_of(k, values):
    """The expected minimum (N,) of k values drawn from values (N,K) without replacement."""
    n = values.shape[1]
    ways = [math.comb(n - 1 - i, k - 1) / math.comb(n, k) for i in range(n)]
    return values.sort(1).values @ torch.tensor(ways, dtype=values.dtype)


def shown_classes(k, counts, n):
    """counts (N, C): how many of an image's n completions show each class -> the probability (N, C)
    that at least one of k completions, drawn without replacement, shows the class."""
    ways = [1 - math.comb(n - count, k) / math.comb(n, k) for count in range(n + 1)]
    return torch.tensor(ways, dtype=torch.float64)[counts]


def measure(losses, spread, classes, labels, n_classes):
    """The measures of one way to complete images, {name: number or list over k}: losses (N,K),
    spread (N,) over codes, classes (N,K), -1 where no class is plausible, labels (N,)."""
    n, k = losses.shape
    ks = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
    counts = F.one_hot(classes + 1, n_classes + 1).sum(1)[:, 1:]  # (N, C)
    shown = [shown_classes(i, counts, k) for i in ks]
    wins = losses.argmin(1).bincount(minlength=k).double() / n
    return {
        "k": ks,
        "loss": [best_of(i, losses.double()).mean().item() for i in ks],
        "classes": [p.sum(1).mean().item() for p in shown],
        "true": [p[torch.arange(n), labels].mean().item() for p in shown],
        "plausible": (classes >= 0).double().mean().item(),
        "spread": spread.mean().item(),
        "winners": int((wins > 0).sum()),
        "effective": torch.special.entr(wins).sum().exp().item(),
    }


@torch.no_grad()
def class_cells(images, mask, pictures, mae, n_classes, config):
    """Rows of the picture of classes, uint8 (N, columns, 3, H, W): image, masked image, the MAE's
    completion, and for each class the first model's completion that shows the class best, gray if
    no completion does. Second result: the number of classes shown (N,)."""
    completed, classes, probabilities = next(iter(pictures.values()))
    gray = torch.full_like(images[:, :1], 128).expand_as(images)
    gray = normalize(gray, config.mean, config.std)
    patches = Models.patchify(gray, math.isqrt(images[0, 0].numel() // mask.shape[1]))
    columns = [images, Models.paste(patches[:, None], images, mask)[:, 0]]
    columns += [pictures[mae][0][:, 0]] if mae in pictures else []
    shows = classes[:, None] == torch.arange(n_classes, device=classes.device)[:, None]  # (N, C, K)
    best = torch.where(shows, probabilities[:, None], -1).max(2)
    numbers, shown = best.indices[:, :COLUMNS], best.values[:, :COLUMNS] >= 0
    found = completed[torch.arange(len(images))[:, None], numbers]  # (N, columns, 3, H, W)
    found = torch.where(shown[..., None, None, None], found, gray[:, None])
    cells = torch.cat([torch.stack(columns, dim=1), found], dim=1)
    return to_pictures(cells, config.mean, config.std).cpu(), (best.values >= 0).sum(1).cpu()


def most_classes(cells, n_shown):
    """Keeps the ROWS images whose completions show the most classes."""
    rows = n_shown.argsort(descending=True, stable=True)[:ROWS]
    return cells[rows], n_shown[rows]


def class_by_code(model, losses, labels, seed):
    """The accuracy with which a linear probe tells the class of an image from its nearest code; the
    probe is trained on every second image, tested on the others. losses (N,K), labels (N,)."""
    codes = model.sample_codes(torch.zeros(1, dtype=torch.int64), losses.shape[1])[0]
    nearest = codes[losses.argmin(1)]  # (N, D)
    halves = nearest[::2], labels[::2], nearest[1::2], labels[1::2]
    return linear_probe(*halves, lr=1e-2, seed=seed)["top1"]


# -------------------------------------------------------------------------------------------------
# Runs of one seed, and all of them together.


def load_models(runs, seed, device):
    """{name: model} of the runs {arm: folder}, models with codes first, and an untrained model."""
    models = {arm: load_model(run) for arm, run in runs.items()}
    models = dict(sorted(models.items(), key=lambda item: item[1].code_dim == 0))
    config = next(iter(models.values())).config
    if not config.ip_spec:
        raise InputError("no run with codes there")
    with seeded(seed):  # the original start, where codes do something at once
        untrained = Models.build(dataclasses.replace(config, adain_init="original"))
    models |= {UNTRAINED: untrained}
    dtype = fastest_dtype(device)
    return {name: Models.in_precision(m.to(device).eval(), dtype) for name, m in models.items()}


def measure_seed(runs, mae, args):
    """For the runs {arm: folder} of one seed: {name: measures}; the judge's accuracy on whole
    images; rows of the picture of classes, the number of images, the names of the classes."""
    flags = read_config(next(iter(runs.values())))
    device = default_device()
    models = load_models(runs, flags["seed"], device)
    config = models[UNTRAINED].config
    names = ("data_tr", "data_val", "seed", "image_decoder")
    images_tr, images_val = Data.open_pair(
        **{name: flags[name] for name in names},
        n_way=flags["train_n_way"],
        n_shot=flags["train_n_shot"],
        skip_bad_images=bool(flags["skip_bad_images"]),
        channels=config.channels,
    )
    check_classes(images_tr, "a judge of completions")
    transform = transforms(tuple(flags["input_size"]), flags["use_augs"])[1]
    options = {"transform": transform, "seed": flags["seed"], "num_workers": flags["num_workers"]}

    judge, n_classes = make_judge(images_tr, device, config, options), len(images_tr.classes)
    chosen = examples(images_val, args.images or flags["ex_for_mse_loss"], **options)
    labels = torch.as_tensor(images_val.targets)[chosen.indices]
    taken_for, parts, cells = [], {}, []
    for rows, images in watch(
        chosen.loader.chunks(chosen.indices, chosen.seeds, IMAGES_PER_PASS),
        "completing",
        len(chosen.indices),
    ):
        images, mask_noise, seeds = prepare(models[UNTRAINED], images, chosen.seeds[rows])
        taken_for.append(judged(judge, images[:, None], config)[0][:, 0].cpu())
        pictures = {}
        how = (args.codes, flags["mask_ratio"], seeds)
        for name, pred, mask in complete(models, mae, images, mask_noise, *how):
            model = models[mae if name == NOISE else name]
            completed = Models.paste(Models.pixels(pred, images, model.config), images, mask)
            classes, probabilities = judged(judge, completed, config)
            classes = torch.where(probabilities >= args.plausible, classes, -1)
            pictures[name] = (completed, classes, probabilities)
            loss = image_losses(model, pred, images, mask)
            spread = (pred.std(1, correction=0) * mask[..., None]).sum((1, 2))
            spread = spread / mask.sum(1) / pred.shape[-1]
            parts.setdefault(name, []).append([x.cpu() for x in (loss, spread, classes)])
        cells = [*cells, class_cells(images, mask, pictures, mae, n_classes, config)]
        cells = [most_classes(*map(torch.cat, zip(*cells, strict=True)))]
    measured = {}
    for name, rows in parts.items():
        losses, spread, classes = map(torch.cat, zip(*rows, strict=True))
        measured[name] = measure(losses, spread, classes, labels, n_classes)
        if name in models and models[name].code_dim:
            told = class_by_code(models[name].cpu(), losses, labels, flags["seed"])
            measured[name]["class by code"] = told
    accuracy = (torch.cat(taken_for) == labels).double().mean().item()
    return measured, accuracy, (cells[0][0], len(labels), images_tr.classes)


PANELS = {  # title -> key of the measure
    "validation loss of the best of k": "loss",
    "plausible classes among k completions": "classes",
    "the true class is among them": "true",
}


def draw(results, names, path):
    """Draws the results {name: [measures of each seed]} over k."""
    with saved_figure(path, (13, 4.6), dpi=90) as figure:
        panels = figure.subplots(1, len(PANELS))
        for axes, (title, key) in zip(panels, PANELS.items(), strict=True):
            axes.set_title(title, fontsize=11)
            axes.set_xlabel("k, completions of one masked image")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            ks = max((seeds[0]["k"] for seeds in results.values()), key=len)
            axes.set_xticks(ks, list(map(str, ks)))
            for number, (name, seeds) in enumerate(results.items()):
                if name == UNTRAINED:  # in the table only: its loss is far from all others
                    continue
                values = np.array([seed[key] for seed in seeds])
                label = drawable(names.get(name, name))
                if values.shape[1] == 1:  # one completion: the same for every k
                    values, label = np.repeat(values, len(ks), axis=1), f"{label}, its single one"
                look = {"color": f"C{number}", "ls": "-" if len(seeds[0]["k"]) > 1 else "--"}
                axes.plot(ks, values.mean(0), marker=".", label=label, **look)
                axes.fill_between(ks, values.min(0), values.max(0), alpha=0.15, lw=0, **look)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def table(results, names, n_codes):
    """Prints the results {name: [measures of each seed]}: their means over seeds."""
    heads = ["loss of one", f"best of {n_codes}", "spread", "plausible", "classes", "true"]
    rows = [["completions by", *heads, "codes that win", "class by code"]]
    for name, seeds in results.items():
        mean = {
            key: np.mean([np.ravel(seed[key])[[0, -1]] for seed in seeds], axis=0)
            for key in seeds[0]
        }
        cells = [f"{mean['loss'][0]:.3f}", f"{mean['loss'][1]:.3f}", f"{mean['spread'][0]:.3f}"]
        cells += [f"{mean['plausible'][0]:.1%}", f"{mean['classes'][1]:.2f}"]
        cells += [f"{mean['true'][1]:.1%}"]
        wins = f"{mean['winners'][0]:.0f} ({mean['effective'][0]:.0f})"
        alone = len(seeds[0]["k"]) == 1 or name == NOISE
        told = f"{mean['class by code'][0]:.1%}" if "class by code" in mean else "-"
        rows.append([names.get(name, name), *cells, "-" if alone else wins, told])
    print_table(rows)


def start(args):
    """Measures the runs of each seed, prints the table and draws both pictures."""
    names, runs_of = called(arms(args.folder), args.names)
    check_folder(args.out)
    seeds, results = sorted(set.intersection(*map(set, runs_of.values()))), {}
    if not seeds:
        raise InputError(f"{args.folder}: no seed of which there is a run of each arm")
    for seed in seeds:
        runs = {arm: folders[seed] for arm, folders in runs_of.items()}
        measured, accuracy, pictures = measure_seed(runs, args.mae, args)
        say(f"seed {seed}: the judge classifies {accuracy:.1%} of whole validation images right")
        if accuracy < args.plausible:
            say("warning: by a judge that errs so often, plausible, classes and true mean little")
        for name, values in measured.items():
            results.setdefault(name, []).append(values)
        if seed == seeds[0]:
            cells, n_images, classes = pictures
    table(results, names, args.codes)
    out = Path(args.out)
    draw(results, names, out)
    headers = ["image", "masked", *["MAE"] * (args.mae in runs_of)]
    headers += [name[:9] for name in classes[:COLUMNS]]
    about = f"Of {args.codes} completions of an image, for each class that a judge sees "
    about += f"with at least {args.plausible:.0%}, the one it is surest of; gray: none. "
    about += f"The {ROWS} of {n_images} images with the most classes."
    grid = picture_grid(cells, headers, about, cell_height=64)
    grid.save(out.with_name(f"{out.stem}_classes.png"))


def main(argv=None):
    """The command what_codes_add.py."""
    description = " ".join(__doc__.split("\n\n")[0].split())
    parser = Parser(prog="what_codes_add.py", description=description)
    add = parser.add_argument
    # fmt: off
    add("folder", metavar="FOLDER", help="the folder that holds runs with the uids ARM-SEED")
    add("--out", default="codes.png", metavar="FILE",
        help="the picture; beside it FILE_classes.png: completions by the class they show")
    add("--codes", type=whole(2), default=128, metavar="N", help="completions of each image")
    add("--images", type=whole(1), metavar="N",
        help="validation images, at most; default: as the runs, --ex_for_mse_loss")
    add("--plausible", type=real(0, 1), default=0.9, metavar="P",
        help="a completion shows a class if the judge's probability of it is at least P")
    add("--mae", default="mae", metavar="ARM", help="the arm of the plain MAE")
    add("--names", nargs="+", default=[], metavar="ARM=NAME", help="names of arms in the pictures")
    # fmt: on
    args = parser.parse_args(argv)
    run_command(lambda: start(args))


if __name__ == "__main__":
    main()

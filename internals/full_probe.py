"""The full linear probe: MAE's recipe (He et al. 2022, appendix A.1), for many heads at once.

The encoder is frozen, so one pass over the images serves all heads. Read `train_heads` first, then
`heads.train_step`."""

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import Data
import Utils
from Augmentation import transforms
from internals.checkpoints import Checkpoints, Keeper, Progress, checkpoint_paths
from internals.encoders import POOLS, check_finite, extract, image_features, nearest_neighbors
from internals.heads import Head, Heads, lars, train_step
from internals.plots import at_most_a_warning, draw_probe
from internals.processes import StopSignal
from internals.runs import Run, check_data, find_in_folder, on_all_processes, read_metrics
from Utils import (
    InputError,
    Stream,
    duration,
    mix_seeds,
    permutation,
    rank,
    say,
    sum_over_processes,
    world_size,
    write_atomically,
)

SMALLEST_CROP = 0.08  # of MAE's probe, as a share of the image; MAE's pretraining has 0.2


# -------------------------------------------------------------------------------------------------
# The training loop.


# fmt: off
def train_heads(heads, optimizer, batches, test_sets, keeper, *, epochs, warmup_epochs):
    """Trains the heads from where keeper.progress stands. test_sets: see evaluate."""
    progress, steps = keeper.progress, batches.steps
    rate = partial(
        Utils.learning_rate, base=1.0, minimum=0.0, start=0, ramp=warmup_epochs * steps,
        total=epochs * steps, cycles=1, ramp_from_minimum=True,
    )
    for epoch in range(progress.epoch, epochs):
        for features, labels in batches(epoch, first=progress.epoch_step):
            losses = train_step(heads, optimizer, features, labels, rate(progress.step))
            progress.step_done({"training_loss": losses.cpu()})
            keeper.after_step()
        check_finite(heads.norm.running_var[None], "training")  # not finite if a batch was not
        metrics = {"training_loss": progress.epoch_done()["training_loss"].tolist()}
        metrics |= evaluate(heads, test_sets)
        best = metrics["top1"].index(max(metrics["top1"]))
        line = f"best top-1 {metrics['top1'][best]:.4f}, this head's training loss "
        line += f"{metrics['training_loss'][best]:.4f}"
        # JSON can't hold NaN and infinities: None stands for them.
        metrics = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
        keeper.after_epoch(metrics, line, epochs=epochs)


# fmt: on
def evaluate(heads, test_sets):
    """{metric: list of one value per head}. test_sets: prefix of the metrics' names -> (features,
    labels)."""
    return {
        prefix + name: values
        for prefix, (features, labels) in test_sets.items()
        for name, values in heads.evaluate(features, labels).items()
    }


# -------------------------------------------------------------------------------------------------
# Features of images.


@dataclass
class Encoder:
    """A frozen encoder, and the settings for computing its features of images."""

    model: torch.nn.Module
    device: torch.device
    parts: tuple  # of the features: "cls", "mean"
    n_codes: int  # over which features are averaged; 0: without codes
    images_per_pass: int
    use_augs: bool
    seed: int
    num_workers: int
    loader_timeout: float  # seconds
    stop: StopSignal

    def loader(self, images, *, training):
        """The ImageLoader of images. training: with random crops and flips, if use_augs is set;
        else with the test transform."""
        crops, test = transforms(self.model.config.image_size, self.use_augs, SMALLEST_CROP)
        return Data.ImageLoader(
            images,
            crops if training else test,
            num_workers=self.num_workers,
            timeout=self.loader_timeout,
            persistent=training,
            pin_memory=self.device.type == "cuda",
            # Training stops between steps only, when all processes have a batch's features.
            stopping=(lambda: False) if training else self.stop.asked,
        )

    def seeds(self, epoch, indices):
        """Seeds (n,) of the crops and codes of images indices (n,) in an epoch."""
        return mix_seeds(self.seed, Stream.PROBE, Stream.IMAGE, epoch, indices)

    # fmt: off
    def test_features(self, title, images, indices):
        """Features (n, parts, dim) and labels (n,) of images indices (n,) with the test transform,
        on the device. title: of these images, for messages."""
        start = time.perf_counter()
        loader, seeds = self.loader(images, training=False), self.seeds(0, indices)
        features = extract(
            self.model, loader, indices, seeds, device=self.device, parts=self.parts,
            batch_size=self.images_per_pass, n_codes=self.n_codes,
        )
        self.stop.check()
        check_finite(features, title)
        seconds = duration(time.perf_counter() - start)
        say(f"features of {len(indices):,} {title} images in {seconds}")
        return features, torch.as_tensor(images.targets)[indices].to(self.device)


# fmt: on
class Batches:
    """The training batches of every epoch. Their order, the images' crops and codes are pure
    functions of seed and epoch. Every process gets the features of a whole batch, so that BatchNorm
    and the heads do not depend on the number of processes."""

    def __init__(self, encoder, images, indices, batch_size, keep_gb):
        """indices (n,): the images to train on. Without augmentation an image has the same features
        in every epoch: if the features of all images fit into keep_gb, computes them here, once."""
        self.encoder, self.images, self.indices = encoder, images, indices
        self.batch_size = batch_size
        self.steps = len(indices) // batch_size  # as in MAE, images that fill no batch are left out
        self.labels = torch.as_tensor(images.targets)[indices].to(encoder.device)
        gb_per_image = 4 * len(encoder.parts) * encoder.model.config.dim / 2**30
        self.most = max(1, int(keep_gb / gb_per_image))  # images whose features fit
        self.features = None
        if not encoder.use_augs and len(indices) <= self.most:
            self.features, _ = encoder.test_features("training", images, indices)
            return
        self.loader = encoder.loader(images, training=True)
        if not encoder.use_augs:
            say(f"note: --keep_gb {keep_gb:g} can't keep the features; each epoch computes them")

    def __call__(self, epoch, first):
        """Yields features (batch_size, parts, dim), labels (batch_size,) from batch `first` on."""
        seed = mix_seeds(self.encoder.seed, Stream.PROBE, epoch)
        order = permutation(len(self.indices), seed)[: self.steps * self.batch_size]
        order = order.view(self.steps, self.batch_size)[first:]
        if self.features is None:
            features = self.computed(order, epoch)
        else:
            features = (self.features[rows] for rows in order)
        return zip(features, self.labels[order], strict=True)

    def computed(self, order, epoch):
        """Yields the features of each row of order (batches, batch_size). Each process computes its
        share of every batch, in passes."""
        encoder, indices = self.encoder, self.indices[order.flatten()]
        seeds = encoder.seeds(epoch if encoder.use_augs else 0, indices)
        # A batch has a pass for each process, and at least eight, so that 1 to 8 compute the same.
        size = min(encoder.images_per_pass, -(-self.batch_size // max(8, world_size())))
        passes = torch.arange(self.batch_size).split(size)[rank() :: world_size()]
        rows = [batch * self.batch_size + part for batch in range(len(order)) for part in passes]
        images = Data.copied(self.loader.load(indices, seeds, rows), encoder.device)
        images = iter(Utils.watch(images, f"epoch {epoch + 1}", len(indices)))
        shape = self.batch_size, len(encoder.parts), encoder.model.config.dim
        for _ in order:
            features = torch.zeros(shape, device=encoder.device)
            for part in passes:
                rows, pixels = next(images)
                features[part] = image_features(
                    encoder.model, pixels, seeds[rows], encoder.parts, encoder.n_codes
                )
            sum_over_processes(features)
            yield features

    def test_features(self):
        """Features and labels of the training images with the test transform; of evenly spaced
        images if the features of all don't fit into keep_gb."""
        if self.features is not None:
            return self.features, self.labels
        n = min(self.most, len(self.indices))
        indices = self.indices[torch.arange(n) * len(self.indices) // n]
        return self.encoder.test_features("training", self.images, indices)


# -------------------------------------------------------------------------------------------------
# The settings of a probe.


class Plan(NamedTuple):
    """What a probe trains, and on which images."""

    specs: list  # of Head
    parts: tuple  # of the features
    epochs: int
    warmup_epochs: int
    batch_size: int
    train: torch.Tensor  # indices of the training images
    held_out: torch.Tensor  # indices of the images on which the best head is chosen


# fmt: off
def make_plan(
    model, images_tr, *, pools, default_pool, learning_rates, weight_decays, hold_out, epochs,
    warmup_epochs, batch_size, seed,
):
    """The Plan of a probe; an InputError if it does not fit the model or the images. hold_out: a
    share of each class. pools, epochs, warmup_epochs and batch_size may be None: defaults."""
    possible_pools = getattr(model, "pools", ("cls", "mean", "both"))
    if pools is None:
        pools = [default_pool if default_pool in possible_pools else possible_pools[0]]
    for pool in pools:
        if pool not in possible_pools:
            reason = "this encoder has one vector per image, no tokens; leave --pools out"
            raise InputError(f"--pools {pool}: {reason}")
    specs = [Head(pool, lr, wd) for pool in pools for wd in weight_decays for lr in learning_rates]
    epochs = epochs or (50 if model.config.depth >= 24 else 90)
    warmup_epochs = min(10, epochs // 5) if warmup_epochs is None else warmup_epochs
    labels = torch.as_tensor(images_tr.targets)
    train, held_out = torch.arange(len(labels)), torch.arange(0)
    if len(specs) > 1:
        train, held_out = split_images(labels, hold_out, seed)
        if not len(held_out):
            reason = "no class has a second image to hold out; give one --lrs, --wds and --pools"
            raise InputError(f"--hold_out: to choose among {len(specs)} heads, {reason}")
    if batch_size and batch_size > len(train):
        say(f"note: --batch_size is lowered to {len(train)}, the number of training images")
    batch_size = min(batch_size or max(2, min(512, len(train) // 8)), len(train))
    parts = tuple(part for part in ("cls", "mean") if any(part in POOLS[pool] for pool in pools))
    return Plan(specs, parts, epochs, warmup_epochs, batch_size, train, held_out)


# fmt: on
def split_images(labels, share, seed):
    """labels (n,) -> indices of the images that train, and of those held out: a share of each
    class, at least one of a class with two images, chosen by seed."""
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        order = permutation(len(members), mix_seeds(seed, Stream.PROBE, Stream.FEW_SHOT, label))
        is_held_out[members[order[:count]]] = True
    return (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]


def probe_folder(save_folder, model_name, data_tr, model, settings):
    """save_folder/probes/NAME. NAME ends in a digest of the model's weights and of `settings`,
    plain data: another probe has another folder."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    data = Path(data_tr).resolve()
    model_name = model_name if ":" in model_name else Path(model_name).stem
    name = f"{model_name[-80:]}-{data.parent.name}_{data.stem}"
    name = re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)[:180]
    return Path(save_folder).expanduser() / "probes" / f"{name}-{digest.hexdigest()[:8]}"


# -------------------------------------------------------------------------------------------------
# One probe, put together.


# fmt: off
def full_probe(
    encoder, images_tr, images_val, plan, folder, *, name, keep_gb, save_minutes, flags, force=False
):
    """Trains the heads of a Plan on an Encoder's features. Returns the result as plain data, and
    leaves it in `folder`, where a probe that was stopped goes on. name: of the model; keep_gb:
    memory for features on the device, in GB; flags: a dict, for config.json; force: go on although
    the images have changed."""
    shape = len(images_tr.classes), encoder.model.config.dim
    heads = Heads(plan.specs, plan.parts, *shape, seed=encoder.seed).to(encoder.device)
    optimizer, progress = lars(heads, plan.specs, plan.batch_size), Progress()
    data = Data.fingerprints(images_tr, images_val)
    parts = {
        "heads": heads, "optimizer": optimizer, "progress": progress, "args": flags, "data": data,
    }
    checkpoints, names = Checkpoints(folder, **parts), parts.keys() | {"metrics_size"}
    start = on_all_processes(lambda: find_probe(folder, names, data, force), names)
    if start.checkpoint:
        checkpoints.restore(start.checkpoint)
    run = Run(start, flags, curves=False)
    start = start._replace(checkpoint=None)  # gives the memory back
    with run:
        step = progress.step
        say(f"going on after step {step} in {folder}" if start.path else f"new: {folder}")
        everything = torch.arange(len(images_val))
        test_sets = {"": encoder.test_features("validation", images_val, everything)}
        if len(plan.held_out):
            test_sets["held_out_"] = encoder.test_features("held-out", images_tr, plan.held_out)
        batches = Batches(encoder, images_tr, plan.train, plan.batch_size, keep_gb)
        keeper = Keeper(run, checkpoints, progress, encoder.stop, save_minutes=save_minutes)
        with keeper.saving_at_the_end():
            train_heads(
                heads, optimizer, batches, test_sets, keeper,
                epochs=plan.epochs, warmup_epochs=plan.warmup_epochs,
            )
        metrics = evaluate(heads, test_sets)
        best = choose(metrics, len(plan.held_out))
        (x, labels), (x_test, labels_test) = (
            (features.flatten(1)[:, heads.columns[best]], labels)
            for features, labels in (batches.test_features(), test_sets[""])
        )
        knn = nearest_neighbors(x, labels, x_test, labels_test)
        table = heads_table(plan.specs, metrics, best)
        result = {
            "model": name, "probe": "full", "folder": str(folder), **table[best], "knn": knn,
            "n_train": len(images_tr), "n_held_out": len(plan.held_out), "n_val": len(images_val),
            "epochs": plan.epochs, "batch_size": plan.batch_size, "best": best, "heads": table,
        }
        if rank() == 0:
            predicted = heads.predict(test_sets[""][0], best)
            mistakes = confusion(labels_test, predicted, images_tr.classes)
            write_result(folder, result, metrics, mistakes)
    return result


# fmt: on
def find_probe(folder, parts, data, force):
    """The Start of the probe in a folder, on the first process. data, force: see check_data."""
    start = find_in_folder(folder, parts)
    check_data(folder, data, (start.checkpoint or {}).get("data"), force=force)
    return start


def choose(metrics, n_held_out):
    """The number of the best head by the held-out images: of the heads whose accuracy is within a
    standard error of the highest, the one with the lowest loss, which varies less. Without
    held-out images there is one head: 0."""
    if not n_held_out:
        return 0
    accuracies, losses = metrics["held_out_top1"], metrics["held_out_loss"]
    highest = max(accuracies)
    lowest = highest - math.sqrt(highest * (1 - highest) / n_held_out)
    candidates = [i for i, accuracy in enumerate(accuracies) if accuracy >= lowest]
    return min(candidates, key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)


# -------------------------------------------------------------------------------------------------
# The result.


def heads_table(specs, metrics, best):
    """Prints and returns a table: a dict for each head, its settings and its accuracies as
    fractions."""
    names = [name for name in ("held_out_top1", "top1", "top5") if name in metrics]
    table = [
        {**spec._asdict(), **{name: metrics[name][number] for name in names}}
        for number, spec in enumerate(specs)
    ]
    say("  ".join(f"{name:>13}" for name in table[0]))
    for number, head in enumerate(table):
        cells = (value if isinstance(value, str) else f"{value:.4g}" for value in head.values())
        say("  ".join(f"{cell:>13}" for cell in cells) + "  <- best" * (number == best))
    return table


def confusion(labels, predicted, classes, most=10):
    """The `most` classes with the lowest accuracy, and how their images are classified.

    Returns the names of these classes; the same names and those of the other classes that are
    predicted most for these images; the shares (rows, columns) of a row's images that are predicted
    as the column's class."""
    labels, predicted, n = labels.cpu(), predicted.cpu(), len(classes)
    counts = torch.bincount(labels, minlength=n)
    accuracy = torch.bincount(labels[labels == predicted], minlength=n) / counts
    present = labels.unique()
    rows = present[accuracy[present].argsort(stable=True)[:most]].sort().values
    shares = torch.stack(
        [torch.bincount(predicted[labels == row], minlength=n) / counts[row] for row in rows]
    )
    totals = shares.sum(0).index_fill(0, rows, 0)
    others = totals.argsort(descending=True, stable=True)[:most]
    columns = torch.cat([rows, others[totals[others] > 0]])
    return [classes[i] for i in rows], [classes[i] for i in columns], shares[:, columns].tolist()


def write_result(folder, result, metrics, confusion):
    """Writes result.json, with the metrics of all epochs, and probe.png. Deletes the checkpoints: a
    probe that is done does not go on, but starts anew."""
    names = ("training_loss", *metrics)
    history = [{name: record[name] for name in names} for record in read_metrics(folder)]
    content = json.dumps({**result, "history": history}, indent=1)
    write_atomically(folder / "result.json", content.encode())
    with at_most_a_warning(picture := folder / "probe.png"):
        draw_probe(picture, result, history, confusion)
    for path in checkpoint_paths(folder):
        path.unlink()

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
from internals.encoders import POOLS, extract, image_features, nearest_neighbors
from internals.heads import Head, Heads, lars, train_step
from internals.plots import draw_probe
from internals.processes import StopSignal
from internals.runs import Run, find_in_folder, on_all_processes, read_metrics
from Utils import (
    InputError,
    RunError,
    Stream,
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
def train_heads(heads, optimizer, batches, evaluate, keeper, *, epochs, warmup_epochs):
    """Trains the heads from where keeper.progress stands. evaluate(): an epoch's metrics, each a
    list with one value per head."""
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
        metrics = {"training_loss": progress.epoch_done()["training_loss"].tolist(), **evaluate()}
        best = max(range(len(metrics["top1"])), key=metrics["top1"].__getitem__)
        line = f"best top-1 {metrics['top1'][best]:.4f}, this head's training loss "
        line += f"{metrics['training_loss'][best]:.4f}{batches.pace.text()}"
        metrics = {name: json_numbers(values) for name, values in metrics.items()}
        keeper.after_epoch(metrics, line, epochs=epochs)


# fmt: on
def json_numbers(values):
    """A list of numbers with None for those that are not finite, which JSON can't hold."""
    return [value if math.isfinite(value) else None for value in values]


# -------------------------------------------------------------------------------------------------
# Features of images.


class Pace:
    """Measures how many images per second come from all processes, and the share of time that this
    process waits for them."""

    def __init__(self, device):
        self.device, self.start, self.images, self.waited = device, time.perf_counter(), 0, 0.0

    def __call__(self, batches):
        """Passes (rows, images) on, and counts images and waiting time."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            # The wait costs nothing while a GPU still computes.
            if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
                self.waited += time.perf_counter() - start
            if batch is None:
                return
            self.images += len(batch[1])
            yield batch

    def text(self):
        """Such as "; 1,234 images/s, waiting for data 5%"; empty if there were no images."""
        if not self.images:
            return ""
        seconds = time.perf_counter() - self.start
        speed = self.images * world_size() / seconds
        return f"; {speed:,.0f} images/s, waiting for data {self.waited / seconds:.0%}"


@dataclass
class Encoder:
    """A frozen encoder, and all that its features of an image depend on."""

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
        """The ImageLoader of images: with random crops, if use_augs, for training."""
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

    def images_that_fit(self, gigabytes):
        """The number of images whose features fit into this memory, at least 1."""
        bytes_per_image = 4 * len(self.parts) * self.model.config.dim
        return max(1, int(gigabytes * 2**30 / bytes_per_image))

    def test_features(self, title, images, indices):
        """Features (n, parts, dim) and labels (n,) of images indices (n,) with the test transform,
        on the device. title: of these images, for messages."""
        pace = Pace(self.device)
        loader, seeds = self.loader(images, training=False), self.seeds(0, indices)
        # fmt: off
        features = extract(
            self.model, loader, indices, seeds, device=self.device, parts=self.parts,
            batch_size=self.images_per_pass, n_codes=self.n_codes, pace=pace,
        )
        # fmt: on
        self.stop.check()
        if not features.isfinite().all():
            raise RunError(f"the features of {title} images are not finite numbers")
        say(f"features of {len(indices):,} {title} images{pace.text()}")
        return features, torch.as_tensor(images.targets)[indices].to(self.device)


class Batches:
    """The training batches of every epoch. Their order, the images' crops and codes are pure
    functions of seed and epoch. Every process gets a whole batch's features, so that BatchNorm and
    the heads do not depend on the number of processes."""

    def __init__(self, encoder, images, indices, batch_size, features=None):
        """indices (n,): the images to train on; features (n, parts, dim): of these images, if they
        are the same in every epoch and were computed before."""
        self.encoder, self.indices, self.batch_size = encoder, indices, batch_size
        self.labels = torch.as_tensor(images.targets)[indices].to(encoder.device)
        self.features, self.pace = features, Pace(encoder.device)
        self.loader = encoder.loader(images, training=True) if features is None else None

    @property
    def steps(self):
        """Batches per epoch. As in MAE, images that don't fill a batch are left out."""
        return len(self.indices) // self.batch_size

    def __call__(self, epoch, first):
        """Yields features (batch_size, parts, dim), labels (batch_size,) from batch `first` on."""
        seed = mix_seeds(self.encoder.seed, Stream.PROBE, epoch)
        order = permutation(len(self.indices), seed)[: self.steps * self.batch_size]
        order = order.view(self.steps, self.batch_size)[first:]
        if self.features is None:
            features = self.computed(order, epoch)
        else:
            features = (self.features[rows.to(self.features.device)] for rows in order)
        for rows, batch in zip(order, features, strict=True):
            yield batch, self.labels[rows.to(self.labels.device)]

    def computed(self, order, epoch):
        """Yields the features of each row of order (batches, batch_size). Each process computes its
        share of every batch, in passes."""
        encoder, indices = self.encoder, self.indices[order.flatten()]
        seeds = encoder.seeds(epoch if encoder.use_augs else 0, indices)
        # A batch has at least eight passes, so that several processes can share it.
        size = min(encoder.images_per_pass, -(-self.batch_size // 8))
        passes = torch.arange(self.batch_size).split(size)[rank() :: world_size()]
        rows = [batch * self.batch_size + part for batch in range(len(order)) for part in passes]
        images = self.pace(self.loader.load(indices, seeds, rows))
        images = Data.copied(images, encoder.device)
        images = iter(Utils.watch(images, f"epoch {epoch + 1}", len(indices)))
        for _ in order:
            shape = len(encoder.parts), encoder.model.config.dim
            features = torch.zeros(self.batch_size, *shape, device=encoder.device)
            for part in passes:
                rows, pixels = next(images)
                features[part] = image_features(
                    encoder.model, pixels, seeds[rows], encoder.parts, encoder.n_codes
                )
            sum_over_processes(features)
            yield features


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
    epochs = epochs or (50 if getattr(model.config, "depth", 0) >= 24 else 90)
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


def full_probe(encoder, images_tr, images_val, plan, folder, *, name, keep_gb, save_minutes, flags):
    """Trains the heads of a Plan on an Encoder's features. Returns the result as plain data, and
    leaves it in `folder`, where a probe that was stopped goes on. name: of the model; keep_gb:
    memory for features on the device, in GB; flags: a dict, for config.json."""
    shape = len(images_tr.classes), encoder.model.config.dim
    heads = Heads(plan.specs, plan.parts, *shape, seed=encoder.seed).to(encoder.device)
    optimizer, progress = lars(heads, plan.specs, plan.batch_size), Progress()
    parts = {"heads": heads, "optimizer": optimizer, "progress": progress, "args": flags}
    checkpoints, names = Checkpoints(folder, **parts), parts.keys() | {"metrics_size"}
    start = on_all_processes(lambda: find_in_folder(folder, names), names)
    if start.checkpoint:
        checkpoints.restore(start.checkpoint)
    with Run(start, flags, curves=False) as run:
        going_on = f"going on after step {progress.step} in {folder}"
        say(going_on if start.checkpoint else f"new: {folder}")
        test = encoder.test_features("validation", images_val, torch.arange(len(images_val)))
        test_sets = {"": test}
        if len(plan.held_out):
            test_sets["held_out_"] = encoder.test_features("held-out", images_tr, plan.held_out)
        evaluate = partial(evaluate_heads, heads, test_sets)
        batches = make_batches(encoder, images_tr, plan, keep_gb)
        keeper = Keeper(run, checkpoints, progress, encoder.stop, save_minutes=save_minutes)
        with keeper.saving_at_the_end():
            # fmt: off
            train_heads(
                heads, optimizer, batches, evaluate, keeper,
                epochs=plan.epochs, warmup_epochs=plan.warmup_epochs,
            )
            # fmt: on
        metrics = evaluate()
        best = choose(metrics, len(plan.held_out))
        knn = knn_accuracy(encoder, images_tr, plan, plan.specs[best].pool, batches, test, keep_gb)
        table = heads_table(plan.specs, metrics)
        # fmt: off
        result = {
            "model": name, "probe": "full", "folder": str(folder), **table[best], "knn": knn,
            "n_train": len(images_tr), "n_held_out": len(plan.held_out), "n_val": len(images_val),
            "epochs": plan.epochs, "batch_size": plan.batch_size, "best": best, "heads": table,
        }
        # fmt: on
        if rank() == 0:
            predicted = heads.predict(test[0], best)
            write_result(folder, result, metrics, confusion(test[1], predicted, images_tr.classes))
    print_table(table, best)
    return result


def evaluate_heads(heads, test_sets):
    """{metric: list of one value per head}. test_sets: prefix of the metrics' names -> (features,
    labels)."""
    return {
        prefix + name: values
        for prefix, test in test_sets.items()
        for name, values in heads.evaluate(*test).items()
    }


def make_batches(encoder, images_tr, plan, keep_gb):
    """The Batches of training images. Without augmentation their features are the same in every
    epoch: computed once, here, if they fit into keep_gb."""
    features = None
    if not encoder.use_augs and len(plan.train) <= encoder.images_that_fit(keep_gb):
        features, _ = encoder.test_features("training", images_tr, plan.train)
    elif not encoder.use_augs:
        say(f"note: --keep_gb {keep_gb:g} can't keep the features; each epoch computes them")
    return Batches(encoder, images_tr, plan.train, plan.batch_size, features)


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


def knn_accuracy(encoder, images_tr, plan, pool, batches, test, keep_gb):
    """The accuracy of nearest neighbours on the features of a pool, with the test transform; among
    evenly spaced training images if the features of all don't fit into keep_gb."""
    features, labels = batches.features, batches.labels
    if features is None:
        n = min(encoder.images_that_fit(keep_gb), len(plan.train))
        indices = plan.train[torch.arange(n) * len(plan.train) // n]
        features, labels = encoder.test_features("training", images_tr, indices)
    columns = [plan.parts.index(part) for part in POOLS[pool]]
    features, features_test = (x[:, columns].flatten(1) for x in (features, test[0]))
    return nearest_neighbors(features, labels, features_test, test[1])


# -------------------------------------------------------------------------------------------------
# The result.


def heads_table(specs, metrics):
    """A dict for each head: its settings and its accuracies as fractions."""
    names = [name for name in ("held_out_top1", "top1", "top5") if name in metrics]
    return [
        {**spec._asdict(), **{name: metrics[name][number] for name in names}}
        for number, spec in enumerate(specs)
    ]


def print_table(table, best):
    """Prints the table of all heads."""
    say("  ".join(f"{name:>13}" for name in table[0]))
    for number, head in enumerate(table):
        cells = (value if isinstance(value, str) else f"{value:.4g}" for value in head.values())
        say("  ".join(f"{cell:>13}" for cell in cells) + "  <- best" * (number == best))


def confusion(labels, predicted, classes, most=10):
    """Which classes the images of the worst classes are taken for: the names of the `most` classes
    with the lowest accuracy; the names of these and of the other classes predicted most for them;
    the shares (rows, columns) of the images of a row that are predicted as the column's class."""
    n = len(classes)
    labels, predicted = labels.cpu(), predicted.cpu()
    counts = torch.bincount(labels, minlength=n)
    correct = torch.bincount(labels[labels == predicted], minlength=n)
    accuracy = torch.where(counts > 0, correct / counts, math.inf)
    rows = accuracy.argsort(stable=True)[:most]
    rows = rows[counts[rows] > 0].sort().values
    shares = torch.stack(
        [torch.bincount(predicted[labels == row], minlength=n) / counts[row] for row in rows]
    )
    totals = shares.sum(0)
    totals[rows] = 0
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
    draw_probe(folder / "probe.png", result, history, confusion)
    for path in checkpoint_paths(folder):
        path.unlink()

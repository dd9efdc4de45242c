"""The linear probe that papers report: MAE's recipe (He et al. 2022, appendix A.1), for many heads
at once.

The encoder is frozen, so one pass over the images serves all heads. Read `train_heads` first, then
`heads.step`."""

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import Data
import Utils
from Augmentation import transforms
from internals import plots
from internals.checkpoints import read_checkpoint, save_checkpoint
from internals.encoders import POOLS, extract, image_features, nearest_neighbors
from internals.heads import Head, Heads
from internals.processes import Stopped, StopSignal
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

SMALLEST_CROP = 0.08  # share of the image, of MAE's probe; its pretraining has .2


# -------------------------------------------------------------------------------------------------
# The training loop, and where it stands.


def train_heads(heads, batches, evaluate, keeper, progress, *, epochs, warmup):
    """Trains the heads from where `progress` stands. batches(epoch, first) gives an epoch's batches
    from number `first` on; evaluate(heads) what is known of an epoch; `keeper` is told of all."""
    for epoch in range(len(progress.history), epochs):
        for features, labels in batches(epoch, progress.step - epoch * batches.steps):
            point = progress.step / batches.steps
            losses = heads.step(features, labels, epoch=point, warmup=warmup, epochs=epochs)
            progress.step_done(losses)
            keeper.after_step(progress)
        progress.epoch_done(evaluate(heads), batches.steps)
        keeper.after_epoch(progress)
    keeper.save(progress)


@dataclass
class Progress:
    """Where training stands: all that a checkpoint needs beside the heads."""

    losses: torch.Tensor  # (heads,), summed over the present epoch's steps
    step: int = 0
    history: list = field(default_factory=list)  # of each epoch: {"training_loss", "top1", ...}

    def step_done(self, losses):
        self.step += 1
        self.losses += losses

    def epoch_done(self, found, steps):
        self.history.append({"training_loss": (self.losses / steps).tolist(), **found})
        self.losses.zero_()


class Pace:
    """How fast images come and are dealt with: images per second over all processes, the share of
    the time spent waiting for data, the time left."""

    def __init__(self, device, done=0.0):
        """done: the share of all that was done before."""
        self.device, self.done_before = device, done
        self.start, self.images, self.waited = time.perf_counter(), 0, 0.0

    def __call__(self, chunks):
        """Passes chunks (rows, images) of this process on, and counts."""
        chunks = iter(chunks)
        while True:
            start = time.perf_counter()
            chunk = next(chunks, None)
            # While a GPU still computes, nobody waits.
            if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
                self.waited += time.perf_counter() - start
            if chunk is None:
                return
            self.images += len(chunk[1])
            yield chunk

    def text(self, done=1.0):
        """What to say of it; done: the share of all that is done."""
        seconds = time.perf_counter() - self.start
        parts = []
        if self.images:
            speed = self.images * world_size() / seconds
            parts = [f"{speed:,.0f} images/s", f"waiting for data {self.waited / seconds:.0%}"]
        if self.done_before < done < 1:
            left = seconds / (done - self.done_before) * (1 - done)
            parts.append(f"{Utils.duration(left)} left")
        return ", ".join(parts) or Utils.duration(seconds)


@dataclass
class Keeper:
    """Saves where training stands, now and then and when it is asked to stop, and says how it
    goes."""

    folder: Path
    heads: Heads
    stop: StopSignal
    pace: Pace
    steps: int  # of all epochs
    save_minutes: float

    def __post_init__(self):
        self.saved = self.said = time.monotonic()

    def save(self, progress):
        """Writes the checkpoint, on the first process."""
        if rank() == 0:
            state = {"heads": self.heads.state_dict(), "progress": vars(progress)}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_checkpoint(self.folder / "checkpoint.pt", state)
            except OSError as error:
                say(f"warning: where the probe stands could not be saved ({error})")
        self.saved = time.monotonic()

    def after_step(self, progress):
        """Saves where save_minutes are over, or where the probe was asked to stop, which it then
        does."""
        try:
            self.stop.check()
        except Stopped as stopped:
            self.save(progress)
            message = f"stopped after step {progress.step}, saved in {self.folder}"
            raise Stopped(f"{message}; the same command goes on", stopped.status) from None
        if time.monotonic() - self.saved > 60 * self.save_minutes:
            self.save(progress)
        self.tell(progress, every=30)

    def after_epoch(self, progress):
        self.tell(progress, every=0 if progress.step == self.steps else 5)

    def tell(self, progress, every):
        """A line on how it goes, if the last one is so many seconds ago."""
        if time.monotonic() - self.said < every:
            return
        text = f"step {progress.step}/{self.steps}"
        if progress.history:
            last = progress.history[-1]
            best = max(range(len(last["top1"])), key=last["top1"].__getitem__)
            text += f", {len(progress.history)} epochs done: top-1 {last['top1'][best]:.4f} at best"
            text += f", its training loss {last['training_loss'][best]:.4f}"
        say(f"{text}; {self.pace.text(progress.step / self.steps)}")
        self.said = time.monotonic()


# -------------------------------------------------------------------------------------------------
# The images, as batches of features.


@dataclass
class Batches:
    """The training batches of every epoch: an order, and crops, that are a pure function of the
    seed and the epoch. All processes get all features of a batch, so that what they make of it does
    not depend on how many they are."""

    model: torch.nn.Module
    loader: Data.ImageLoader
    indices: torch.Tensor  # (n,) into the loader's images
    labels: torch.Tensor  # (n,) on the device
    batch_size: int
    images_per_pass: int
    parts: tuple
    n_codes: int
    seed: int
    pace: Pace
    varies: bool  # whether features are others in every epoch
    kept: torch.Tensor | None = None  # features (n, parts, C), else

    @property
    def steps(self):
        """Batches in an epoch, all of them full."""
        return len(self.indices) // self.batch_size

    def __call__(self, epoch, first):
        """Yields features (batch_size, parts, C), labels (batch_size,) from batch `first` on."""
        n = self.steps * self.batch_size
        order = permutation(len(self.indices), mix_seeds(self.seed, Stream.PROBE, epoch))[:n]
        order = order.view(self.steps, self.batch_size)[first:]
        if self.kept is None:
            features = self.computed(order, epoch)
        else:
            features = (self.kept[rows.to(self.kept.device)] for rows in order)
        for rows, batch in zip(order, features, strict=True):
            yield batch, self.labels[rows.to(self.labels.device)]

    def computed(self, order, epoch):
        """Yields the features of each row of order (batches, batch_size), each process having
        computed its passes."""
        # Passes are of one batch only, so that an epoch can be gone on with at any batch: the last
        # image fills the last pass up. A batch has at least eight, to be shared out.
        size = min(self.images_per_pass, -(-self.batch_size // 8))
        width = -(-self.batch_size // size) * size
        order = order[:, torch.arange(width).clamp(max=self.batch_size - 1)]
        indices = self.indices[order.flatten()]
        seeds = image_seeds(self.seed, epoch if self.varies else 0, indices)
        chunks = self.pace(self.loader.chunks(indices, seeds, size))
        chunks = Data.copied(chunks, self.labels.device)
        batch, held = 0, self.nothing(width)
        for rows, images in Utils.watch(chunks, f"epoch {epoch + 1}", len(indices)):
            while rows.start >= (batch + 1) * width:
                yield self.gathered(held)
                batch, held = batch + 1, self.nothing(width)
            at = slice(rows.start - batch * width, rows.stop - batch * width)
            held[at] = image_features(self.model, images, seeds[rows], self.parts, self.n_codes)
        for _ in range(batch, len(order)):
            yield self.gathered(held)
            held = self.nothing(width)

    def nothing(self, width):
        """Features of no image yet."""
        shape = width, len(self.parts), self.model.config.dim
        return torch.zeros(shape, device=self.labels.device)

    def gathered(self, held):
        """A batch's features from all processes."""
        sum_over_processes(held)
        return held[: self.batch_size]


def image_seeds(seed, epoch, indices):
    """The seeds (n,) of the crops and codes of images indices (n,) in an epoch."""
    return mix_seeds(seed, Stream.PROBE, Stream.IMAGE, epoch, indices)


def hold_out(labels, share, seed):
    """labels (n,) -> the numbers of the images that train, and of those held out: of each class the
    same share, at least one of a class with two, chosen by seed."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        mine = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(mine))), len(mine) - 1)
        order = permutation(len(mine), mix_seeds(seed, Stream.PROBE, Stream.FEW_SHOT, label))
        held[mine[order[:count]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def choose(history, n_held_out):
    """The number of the best head at the end of training, by the images held out: of those whose
    accuracy is within a standard error of the highest, the one with the lowest loss, which varies
    less; the only head where no images are held out."""
    if not n_held_out:
        return 0
    accuracies, losses = (history[-1][f"held_out_{name}"] for name in ("top1", "loss"))
    highest = max(accuracies)
    least = highest - math.sqrt(highest * (1 - highest) / n_held_out)
    able = [i for i, accuracy in enumerate(accuracies) if accuracy >= least]
    return min(able, key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)


# -------------------------------------------------------------------------------------------------
# One probe, put together.

# What changes neither heads nor features: a probe goes on with others of these.
NEUTRAL = frozenset(
    "gpus processes num_workers save_folder save_minutes keep_gb fast val_n_way val_n_shot "
    "probe_lr probe_epochs probe_bs probe_augs_per_image".split()
)


class Setting(NamedTuple):
    """What a probe is made of, from its flags."""

    specs: list  # of Head
    parts: tuple
    epochs: int
    warmup: int
    batch_size: int
    train: torch.Tensor  # the numbers of the images that train
    held_out: torch.Tensor  # of those that choose among heads

    @property
    def steps(self):
        """Batches in an epoch; as in MAE, the images that fill none wait for another order."""
        return len(self.train) // self.batch_size


def setting(flags, model, images_tr):
    """The Setting that the flags ask for; an InputError where it does not fit model or images."""
    pools = getattr(model, "pools", ("cls", "mean", "both"))
    wanted = flags.pools or (["mean"] if flags.global_pool else ["cls"])
    if not flags.pools and pools == ("vector",):
        wanted = ["vector"]
    for pool in wanted:
        if pool not in pools:
            shown = f"{flags.model} has one vector per image, no tokens; leave --pools out"
            raise InputError(f"--pools {pool}: {shown}")
    specs = [Head(pool, lr, wd) for pool in wanted for wd in flags.wds for lr in flags.lrs]
    epochs = flags.epochs or (50 if getattr(model.config, "depth", 0) >= 24 else 90)
    warmup = min(10, epochs // 5) if flags.warmup_epochs is None else flags.warmup_epochs
    labels = torch.as_tensor(images_tr.targets)
    train, held_out = torch.arange(len(labels)), torch.arange(0)
    if len(specs) > 1:
        train, held_out = hold_out(labels, flags.hold_out, flags.seed)
        if not len(held_out):
            shown = "no class has a second image to hold out; give one --lrs, --wds and --pools"
            raise InputError(f"--hold_out: to choose among {len(specs)} heads, {shown}")
    batch_size = min(flags.batch_size or max(2, min(512, len(train) // 8)), len(train))
    if flags.batch_size and batch_size < flags.batch_size:
        say(f"note: --batch_size is lowered to {batch_size}, the number of training images")
    parts = tuple(part for part in ("cls", "mean") if any(part in POOLS[p] for p in wanted))
    return Setting(specs, parts, epochs, warmup, batch_size, train, held_out)


class Known:
    """Computes the features of images by the test's transform, which are the same every time."""

    def __init__(self, flags, model, parts, device, stop):
        self.model, self.seed, self.device, self.stop = model, flags.seed, device, stop
        self.transform = transforms(model.config.image_size, flags.use_augs)[1]
        self.loading = {
            "num_workers": flags.num_workers,
            "timeout": flags.loader_timeout,
            "pin_memory": device.type == "cuda",
        }
        self.options = {
            "device": device,
            "batch_size": flags.probe_bs_val,
            "parts": parts,
            "n_codes": 0 if flags.probe_ignore_z else flags.probe_codes,
        }
        image = 4 * len(parts) * model.config.dim  # bytes
        self.most = max(1, int(flags.keep_gb * 2**30 / image))  # images whose features are kept

    def __call__(self, what, images, indices):
        """Features (n, parts, C) and labels (n,) of images indices (n,), on the device."""
        loading = {**self.loading, "stopping": self.stop.asked}
        pace, loader = Pace(self.device), Data.ImageLoader(images, self.transform, **loading)
        seeds = image_seeds(self.seed, 0, indices)
        features = extract(self.model, loader, indices, seeds, pace=pace, **self.options)
        self.stop.check()
        if not features.isfinite().all():
            raise RunError(f"the features of {what} images are not finite numbers")
        say(f"features of {len(indices):,} {what} images: {pace.text()}")
        return features, torch.as_tensor(images.targets)[indices].to(self.device)


def make_batches(flags, model, images_tr, chosen, known, done):
    """The Batches of training images; where nothing about them is random, their features are
    computed here, once. done: the share of all that was done before."""
    features = None
    if not flags.use_augs and len(chosen.train) <= known.most:
        features, _ = known("training", images_tr, chosen.train)
    elif not flags.use_augs:
        say(f"note: --keep_gb {flags.keep_gb:g} can't keep the features; each epoch computes them")
    labels = torch.as_tensor(images_tr.targets)[chosen.train]
    transform = transforms(model.config.image_size, flags.use_augs, SMALLEST_CROP)[0]
    return Batches(
        model=model,
        loader=Data.ImageLoader(images_tr, transform, persistent=True, **known.loading),
        indices=chosen.train,
        labels=labels.to(known.device),
        batch_size=chosen.batch_size,
        images_per_pass=flags.probe_bs_val,
        parts=chosen.parts,
        n_codes=known.options["n_codes"],
        seed=flags.seed,
        pace=Pace(known.device, done),
        varies=bool(flags.use_augs),
        kept=features,
    )


def neighbours(chosen, pool, batches, known, images_tr, test):
    """The k-NN accuracy on the features of a pooling, by the test's transform; from evenly spaced
    training images where they are too many to keep."""
    if batches.kept is not None:
        features, labels = batches.kept, batches.labels
    else:
        n = min(known.most, len(chosen.train))
        rows = torch.arange(n) * len(chosen.train) // n
        features, labels = known("training", images_tr, chosen.train[rows])
    columns = [chosen.parts.index(part) for part in POOLS[pool]]
    features, features_test = (x[:, columns].flatten(1) for x in (features, test[0]))
    return nearest_neighbors(features, labels, features_test, test[1])


def full_probe(flags, model, images_tr, images_val, device, stop):
    """Trains the heads that the flags ask for on a frozen encoder's features, and returns what came
    of it, as plain data. Meanwhile it saves where it stands in a folder of its own, and goes on
    from there; in the end it leaves its result and a picture in it."""
    chosen = setting(flags, model, images_tr)
    folder = probe_folder(flags, model, images_tr, images_val)
    shape = chosen.specs, chosen.parts, len(images_tr.classes), model.config.dim
    scale = chosen.batch_size / 256
    heads = Heads(*shape, scale=scale, seed=flags.seed, device=device)
    progress = going_on(folder, heads)
    known = Known(flags, model, chosen.parts, device, stop)
    test = known("validation", images_val, torch.arange(len(images_val)))
    held_out = known("held-out", images_tr, chosen.held_out) if len(chosen.held_out) else None
    steps = chosen.epochs * chosen.steps
    batches = make_batches(flags, model, images_tr, chosen, known, progress.step / steps)
    keeper = Keeper(folder, heads, stop, batches.pace, steps, flags.save_minutes)

    def evaluate(heads):
        found = heads.evaluate(*test)
        if held_out is not None:
            found |= {f"held_out_{k}": v for k, v in heads.evaluate(*held_out).items()}
        return found

    schedule = {"epochs": chosen.epochs, "warmup": chosen.warmup}
    train_heads(heads, batches, evaluate, keeper, progress, **schedule)
    best = choose(progress.history, len(chosen.held_out))
    knn = neighbours(chosen, chosen.specs[best].pool, batches, known, images_tr, test)
    result = {"model": flags.model, "probe": "full", "folder": str(folder)}
    result |= summary(chosen, progress.history, best, knn, len(images_tr), len(images_val))
    confusion = confused(test[1], heads.predict(test[0], best), images_tr.classes)
    if rank() == 0:
        write_result(folder, result, progress.history, confusion)
    show(result)
    return result


def summary(chosen, history, best, knn, n_train, n_val):
    """The result: of the best head, and the table of all."""
    last = history[-1]
    table = [
        {
            **spec._asdict(),
            **{key: last[key][i] for key in ("held_out_top1", "top1", "top5") if key in last},
        }
        for i, spec in enumerate(chosen.specs)
    ]
    return {
        "top1": last["top1"][best],
        "top5": last["top5"][best],
        "knn": knn,
        "n_train": n_train,
        "n_held_out": len(chosen.held_out),
        "n_val": n_val,
        **chosen.specs[best]._asdict(),
        "epochs": chosen.epochs,
        "batch_size": chosen.batch_size,
        "best": best,
        "heads": table,
    }


def confused(labels, predicted, classes, most=10):
    """What the `most` classes with the lowest accuracy are taken for: their names, the names of the
    classes that they are taken for most, and the shares (rows, columns) of their images."""
    n = len(classes)
    labels, predicted = labels.cpu(), predicted.cpu()
    counts = torch.bincount(labels, minlength=n)
    right = torch.bincount(labels[labels == predicted], minlength=n)
    accuracy = torch.where(counts > 0, right / counts, math.inf)
    rows = accuracy.argsort(stable=True)[:most]
    rows = rows[counts[rows] > 0].sort().values
    shares = torch.stack(
        [torch.bincount(predicted[labels == row], minlength=n) / counts[row] for row in rows]
    )
    others = shares.sum(0)
    others[rows] = -1
    extra = [
        i for i in others.argsort(descending=True, stable=True)[:most].tolist() if others[i] > 0
    ]
    columns = torch.cat([rows, torch.tensor(extra, dtype=torch.int64)])
    return [classes[i] for i in rows], [classes[i] for i in columns], shares[:, columns].tolist()


# -------------------------------------------------------------------------------------------------
# The folder of a probe.


def probe_folder(flags, model, images_tr, images_val):
    """{--save_folder}/probes/NAME: the same for the same encoder, images and flags, another for
    others."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    told = {name: value for name, value in vars(flags).items() if name not in NEUTRAL}
    sizes = [(len(images), list(images.classes)) for images in (images_tr, images_val)]
    digest.update(json.dumps([told, sizes], sort_keys=True).encode())
    data = Path(flags.data_tr).resolve()
    model_name = flags.model if ":" in flags.model else Path(flags.model).stem
    name = f"{model_name[-80:]}-{data.parent.name}_{data.stem}"
    name = re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)[:180]
    return Path(flags.save_folder).expanduser() / "probes" / f"{name}-{digest.hexdigest()[:8]}"


def going_on(folder, heads):
    """Where this probe stood, its heads set to that; the start, where it did not begin yet."""
    path, zeros = folder / "checkpoint.pt", heads.mean.new_zeros(len(heads.specs))
    progress = Progress(zeros)
    if not path.exists():
        say(f"new: {folder}")
        return progress
    try:
        state = read_checkpoint(path)
    except InputError as error:
        say(f"warning: {error}; the probe starts anew")
        return progress
    heads.load_state_dict(state["heads"])
    progress = Progress(**state["progress"])
    progress.losses = progress.losses.to(heads.mean.device)
    say(f"going on after step {progress.step} in {folder}")
    return progress


def write_result(folder, result, history, confusion):
    """Leaves the result and its picture, and no checkpoint: what is done is not gone on with."""
    for values in (values for record in history for values in record.values()):
        values[:] = [x if math.isfinite(x) else None for x in values]  # JSON has no word for it
    content = json.dumps({**result, "history": history}, indent=1)
    write_atomically(folder / "result.json", content.encode())
    plots.draw_probe(folder / "probe.png", result, history, confusion)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def show(result):
    """Prints the table of all heads."""
    names = [name for name in HEADINGS if name in result["heads"][0]]
    say("  ".join(f"{HEADINGS[name]:>8}" for name in names))
    for number, head in enumerate(result["heads"]):
        cells = (
            f"{x:8.4g}" if not isinstance(x := head[name], str) else f"{x:>8}" for name in names
        )
        say("  ".join(cells) + "  <- best" * (number == result["best"]))


HEADINGS = {
    "pool": "pool",
    "lr": "lr",
    "wd": "wd",
    "held_out_top1": "held out",
    "top1": "top-1",
    "top5": "top-5",
}

"""Images in classes, and few-shot subsets of them; which image is drawn when, and loading them."""

import contextlib
import dataclasses
import os
import signal
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from Augmentation import normalize
from internals.processes import STOP_SIGNALS, end_workers
from internals.stores import FORMATS, ImageError, check_decoder
from Utils import (
    InputError,
    RunError,
    Stream,
    mix_seeds,
    naming,
    permutation,
    random_bits,
    random_uniform,
    rank,
    seeded,
    world_size,
)

MOST_BAD = 0.001  # of a data set: the share of its images that may be replaced


def open_images(path, transform=None, *, image_decoder="pillow", skip_bad_images=False):
    """The Images at `path`: a folder as torchvision's ImageFolder reads, a .tar of one, or an .lmdb
    that scripts/pack.py made. skip_bad_images: an ImageLoader replaces damaged images."""
    check_decoder(image_decoder)
    path = Path(path).expanduser()
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        for fits, images_class in FORMATS:
            if fits(path):
                return images_class(
                    path,
                    transform=transform,
                    image_decoder=image_decoder,
                    skip_bad=skip_bad_images,
                )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    raise InputError(f"{path} is neither a folder nor a .tar (uncompressed) nor an .lmdb")


class Subset(Dataset):
    """Some images of some classes of another data set, with dense targets."""

    def __init__(self, images, classes, indices):
        self.images, self.indices, self.classes = images, indices, classes
        self.class_to_idx = {name: i for i, name in enumerate(classes)}
        self.path, self.skip_bad = images.path, images.skip_bad
        self.dense = np.full(len(images.classes), -1)  # its class of each class of the other's
        self.dense[[images.class_to_idx[name] for name in classes]] = np.arange(len(classes))

    @cached_property
    def targets(self):
        """Each image's class: (n,) int64."""
        return self.dense[self.images.targets[self.indices]]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "targets"}

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.images[self.indices[index]][0], self.target(index)

    def target(self, index):
        """The class of an image, as a number."""
        return int(self.dense[self.images.target(self.indices[index])])

    def of_class(self, target):
        """The images of a class, as a sequence of indices."""
        return np.flatnonzero(self.targets == target)

    def load(self, index):
        return self.images.load(self.indices[index])

    def name(self, index):
        return self.images.name(self.indices[index])


def few_shot(images, n_way, n_shot, seed):
    """The subset of n_way classes, evenly spaced in sorted order, with n_shot images each, chosen
    by seed; -1: all."""
    n_classes = len(images.classes)
    if n_way in (-1, n_classes) and n_shot == -1:
        return images  # a subset of all would only cost memory
    ways = range(n_classes) if n_way == -1 else [i * n_classes // n_way for i in range(n_way)]
    if len(ways) > n_classes:
        raise InputError(f"{n_way} classes wanted, but there are {n_classes}")
    chosen = []
    for way in ways:
        indices = np.asarray(images.of_class(way))
        if n_shot > len(indices):
            raise InputError(
                f"{n_shot} images a class wanted, but {images.classes[way]} has {len(indices)}"
            )
        if n_shot != -1:
            order = permutation(len(indices), mix_seeds(seed, Stream.FEW_SHOT, way))
            indices = np.sort(indices[order[:n_shot].numpy()])
        chosen.append(indices)
    return Subset(images, [images.classes[i] for i in ways], np.concatenate(chosen))


def with_classes(images, classes):
    """All images of the classes of these names; refused where one is missing."""
    if list(classes) == images.classes:
        return images
    missing = [name for name in classes if name not in images.class_to_idx]
    if missing:
        raise InputError(
            f"no class {missing[0]}, which the training data has"
            + f" ({len(missing)} such)" * (len(missing) > 1)
        )
    ways = [images.class_to_idx[name] for name in classes]
    return Subset(images, list(classes), np.flatnonzero(np.isin(images.targets, ways)))


def staged_path(path, folder):
    """Where the copy of a path lies in a folder of copies, which holds the tree from the root on;
    the path itself without such a folder."""
    return f"{folder}{os.path.abspath(Path(path).expanduser())}" if folder else path


def open_pair(data_tr, data_val, *, n_way, n_shot, seed, same_classes=True, staged=None, **options):
    """Training images, reduced to a few-shot subset, and validation images of the same classes (of
    all, where same_classes is false: no labels are needed); messages name the flags. staged: a
    folder of copies to read instead. options: those of open_images."""
    with naming("--data_tr"):
        images_tr = open_images(staged_path(data_tr, staged), **options)
    with naming("--train_n_way" if n_way > len(images_tr.classes) else "--train_n_shot"):
        images_tr = few_shot(images_tr, n_way, n_shot, seed)
    with naming("--data_val"):
        images_val = open_images(staged_path(data_val, staged), **options)
        if same_classes:
            images_val = with_classes(images_val, images_tr.classes)
    return images_tr, images_val


# -------------------------------------------------------------------------------------------------


def even_indices(n, first, count, seed, shuffle=True):
    """Numbers `first` to `first + count` of an endless sequence that passes over range(n), each
    time in another order: int64 (count,). So every index is drawn k or k-1 times, whatever is taken
    at a time. Its whole state is `first`: what comes next depends on nothing that came before."""
    positions = torch.arange(first, first + count)
    if not shuffle or not count:
        return positions % n
    passes = torch.arange(first // n, (first + count - 1) // n + 1)
    seeds = mix_seeds(seed, passes)
    if n < 256:  # there may be very many passes, so all at once
        orders = random_bits(seeds[:, None], torch.arange(n)).argsort(1).flatten()
    else:
        orders = torch.cat([permutation(n, s) for s in seeds.tolist()])
    return orders[positions - passes[0] * n]


def occurrences(indices):
    """How often each entry came before in (n,) indices: (n,) int64."""
    order = indices.argsort(stable=True)
    ordered = indices[order]
    starts = torch.searchsorted(ordered, ordered)
    result = torch.empty_like(indices)
    result[order] = torch.arange(len(indices)) - starts
    return result


class SeededImages(Dataset):
    """Items (index, seed) -> uint8 (3, H, W), the image transformed by random numbers from the seed
    alone, and whether another took its place: where the images skip_bad, the next of its class that
    can be read replaces a damaged one."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __getitem__(self, key):
        index, seed = key
        image, replaced = self.load(index)
        with seeded(seed):
            return self.transform(image), replaced

    def load(self, index):
        """The image, or its replacement, and whether it is that."""
        try:
            return self.images.load(index), False
        except ImageError:
            if not self.images.skip_bad:
                raise
        others = self.images.of_class(self.images.target(index))
        place = int(np.searchsorted(others, index))
        for other in [*others[place + 1 :], *others[:place]]:
            with contextlib.suppress(ImageError):
                return self.images.load(other), True
        return self.images.load(index), True  # none can be read: the error again


def leave_signals(_):
    """In a worker: to stop is the main process's business, also where a signal goes to all of a
    job's processes."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@cache
def end_workers_at_exit():
    """Sees to it, once, that this process ends its workers before multiprocessing would: that
    sends them SIGTERM and waits."""
    Finalize(None, end_workers, exitpriority=10)


class ImageLoader:
    """Loads images in chunks by worker processes, which live as long as the loader where
    `persistent`. timeout: seconds that a chunk may take; chunks end early once stopping()."""

    def __init__(
        self,
        images,
        transform,
        *,
        num_workers,
        persistent=False,
        pin_memory=False,
        timeout=0,
        stopping=lambda: False,
    ):
        self.images, self.bad = images, set()  # bad: indices of images that had to be replaced
        self.batches = []  # what the workers load next; the loader asks when it is iterated
        self.stopping = stopping
        end_workers_at_exit()
        self.loader = DataLoader(
            SeededImages(images, transform),
            batch_sampler=self.batches,
            num_workers=num_workers,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=pin_memory,
            timeout=timeout / 2 if num_workers else 0,
            # Not as the processes of a launch, whose every worker would import torch anew.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # of its own: else each pass draws from the global one
        )

    def chunks(self, indices, seeds, size):
        """Yields (rows, images): a slice of range(len(indices)) and uint8 (n, 3, H, W), for every
        chunk of `size` rows that falls to this process. Image indices[i] is cropped by seeds[i]."""
        slices = [
            slice(start, min(start + size, len(indices))) for start in range(0, len(indices), size)
        ]
        slices = slices[rank() :: world_size()]
        self.batches[:] = [
            list(zip(indices[rows].tolist(), seeds[rows].tolist(), strict=True)) for rows in slices
        ]
        if self.stopping():
            return
        loaded = iter(self.loader)
        for rows in slices:
            if self.stopping():
                return
            images, replaced = self.next_chunk(loaded, indices[rows])
            if replaced.any():
                self.count_bad(indices[rows][replaced].tolist())
            yield rows, images

    def next_chunk(self, loaded, indices):
        """The next of `loaded`, the chunk of these images; a RunError when that takes too long."""
        for _ in range(2):  # a suspended run that wakes up would take the first time for over
            try:
                return next(loaded)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
        names = ", ".join(self.images.name(i) for i in indices[:3].tolist())
        seconds = 2 * self.loader.timeout
        raise RunError(
            f"--loader_timeout {seconds:g}: a loader worker gave nothing for so many "
            f"seconds; it was loading {len(indices)} images: {names}{' ...' * (len(indices) > 3)}"
        ) from None

    def count_bad(self, indices):
        """Tells of images that were replaced, each once; an InputError when there are too many."""
        for index in indices:
            if index not in self.bad:
                self.bad.add(index)
                count = f"{len(self.bad)} of {len(self.images)} images replaced so far"
                try:
                    self.images.load(index)  # again, to hear why
                except ImageError as error:
                    tqdm.write(f"warning: {error}; {count}", file=sys.stderr)
        if len(self.bad) > MOST_BAD * len(self.images):
            raise InputError(
                f"--skip_bad_images: {len(self.bad)} of {len(self.images)} images in "
                f"{self.images.path} can't be read, more than {MOST_BAD:.1%}; "
                f"one is {self.images.name(index)}"
            )


def copied(chunks, device):
    """Passes chunks (rows, images) on as (rows, images, images on the device); on a GPU they are
    copied while it still computes on those before."""
    if device.type != "cuda":
        yield from ((rows, images, images.to(device)) for rows, images in chunks)
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for rows, images in chunks:
        with torch.cuda.stream(copying):
            on_device = images.to(device, non_blocking=True)
        computing.wait_stream(copying)
        on_device.record_stream(computing)  # else its memory could be given away too early
        yield rows, images, on_device


# -------------------------------------------------------------------------------------------------
# An epoch's pool of images, and its minibatches.


@dataclass
class Pool:
    """The images of one epoch: each has one crop and one mask, a pure function of its seed."""

    source: Dataset
    epoch: int
    indices: torch.Tensor  # (n,) into the source
    seeds: torch.Tensor  # (n,) int64
    mask_noise: torch.Tensor  # (n, L)
    images: torch.Tensor  # (n, 3, H, W) uint8, filled by choose_pool_codes
    shuffle: bool
    seed: int


def draw_pool(source, size, epoch, *, seed, shuffle, fix_mask_noise, image_size, n_patches):
    """The pool of an epoch, drawn evenly from the source, its images not loaded yet. An image's
    seed depends on the run's seed, the epoch, its index and how often it came before in this
    pool."""
    indices = even_indices(len(source), epoch * size, size, mix_seeds(seed, Stream.POOL), shuffle)
    seeds = mix_seeds(seed, Stream.IMAGE, epoch, indices, occurrences(indices))
    mask_seeds = (
        mix_seeds(seed, Stream.MASK, indices) if fix_mask_noise else mix_seeds(seeds, Stream.MASK)
    )
    images = torch.zeros(size, 3, *image_size, dtype=torch.uint8)
    mask_noise = random_uniform(mask_seeds, n_patches)
    return Pool(source, epoch, indices, seeds, mask_noise, images, shuffle, seed)


@dataclass
class Batch:
    """This process's share of a minibatch."""

    pool: Pool
    rows: torch.Tensor  # (n,) of the pool
    codes: torch.Tensor | None  # (pool, D)
    whole: torch.Tensor  # the rows of the whole minibatch, over all processes
    step: int  # the run's gradient step

    def split(self, parts):
        """The share in at most `parts` parts, never none."""
        return [dataclasses.replace(self, rows=rows) for rows in self.rows.chunk(parts)]

    def to(self, device):
        """Images normalised (n,3,H,W), mask noise (n,L), codes (n,1,D) or None, on the device."""
        images = normalize(self.pool.images[self.rows].to(device, non_blocking=True))
        codes = None if self.codes is None else self.codes[self.rows, None].to(device)
        return images, self.pool.mask_noise[self.rows].to(device), codes

    def names(self):
        """The images of the whole minibatch, for messages."""
        return [self.pool.source.name(i) for i in self.pool.indices[self.whole].tolist()]


def minibatches(pool, codes, steps, size, *, code_free_share=0.0, step=0, done=0):
    """Yields the epoch's `steps` minibatches but for those `done`, the first of them as the run's
    gradient step `step`: shuffled passes over the pool, cut into `size`. codes: (pool, D) or
    None; a code_free_share of the steps, evenly spaced, goes without."""
    seed = mix_seeds(pool.seed, Stream.MINIBATCH, pool.epoch)
    stream = even_indices(len(pool.indices), 0, steps * size, seed, pool.shuffle).view(steps, size)
    for number, whole in enumerate(stream[done:], step):
        free = int((number + 1) * code_free_share) > int(number * code_free_share)
        yield Batch(pool, whole[rank() :: world_size()], None if free else codes, whole, number)

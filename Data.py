"""Data sets of images in classes, and few-shot subsets; loading images; an epoch's pool of images
and its minibatches."""

import contextlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from Augmentation import DEPTHS
from internals.decoding import NOTE, check_decoder
from internals.layout import UNLABELLED
from internals.processes import end_workers_at_exit, ignore_stop_signals
from internals.stores import FORMATS, ImageError
from Utils import (
    InputError,
    RunError,
    Stream,
    from_first_process,
    mix_seeds,
    naming,
    permutation,
    printable,
    random_bits,
    random_uniform,
    rank,
    say,
    seeded,
    sum_over_processes,
    world_size,
)

MOST_BAD = 0.001  # share of a data set's images that --skip_bad_images may replace
IN_FLIGHT = 2**24  # bytes that workers load ahead, at most: /dev/shm has 64 MB under Docker
MEASURED = 1024  # images by which mean and deviation of the channels are measured
REPLACED, NOTED = 1, 2  # what a loader worker reports of an image; see SeededImages


def open_images(path, transform=None, *, image_decoder="pillow", skip_bad_images=False, channels=3):
    """The Images at `path`, of so many channels: a folder as torchvision's ImageFolder reads, a
    .tar of one, or an .lmdb that scripts/pack.py made. skip_bad_images: an ImageLoader replaces
    damaged images."""
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
                    channels=channels,
                )
    except OSError as error:
        place = error.filename or path
        raise InputError(f"cannot read {place}: {error.strerror or error}") from None
    raise InputError(f"{path} is neither a folder nor a .tar (uncompressed) nor an LMDB of pack.py")


def contents(images):
    """What images were read, and which files were left out, as one line."""
    store, classes = images, list(map(printable, images.classes))
    while isinstance(store, Subset):
        store = store.images
    names = classes if len(classes) < 4 else [*classes[:2], f"... {classes[-1]}"]
    text = f"{len(images):,} image{'s' * (len(images) > 1)}"
    if classes == [UNLABELLED]:
        text += " without class folders"
    else:
        text += f", {len(classes):,} class{'es' * (len(classes) > 1)} ({', '.join(names)})"
    if store is not images:
        text += f", of {len(store):,} images, {len(store.classes):,} classes"
    return text + (f"; left out: {store.index.left_out}" if store.index.left_out else "")


class Subset(Dataset):
    """Some images of some classes of another data set. Classes are numbered anew, from 0."""

    def __init__(self, images, classes, indices):
        self.images, self.indices, self.classes = images, indices, classes
        self.class_to_idx = {name: i for i, name in enumerate(classes)}
        self.path, self.skip_bad = images.path, images.skip_bad
        self.dense = np.full(len(images.classes), -1)  # class number in `images` -> number here
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

    def source(self, index):
        """The store that holds an image, and the image's index there."""
        return self.images.source(self.indices[index])

    def target(self, index):
        """The class of an image, as a number."""
        return int(self.dense[self.images.target(self.indices[index])])

    def of_class(self, target):
        """The images of a class, as a sequence of indices."""
        return np.flatnonzero(self.targets == target)

    def load(self, index):
        return self.images.load(self.indices[index])

    def fingerprint(self):
        """The fingerprint of the whole data set, not of the subset."""
        return self.images.fingerprint()

    def name(self, index):
        return self.images.name(self.indices[index])


def use_channels(images, channels):
    """Sets the number of channels that a data set's images are loaded with."""
    images.source(0)[0].channels = channels


def few_shot(images, n_way, n_shot, seed):
    """The subset of n_way classes, evenly spaced in sorted order, with n_shot images of each, which
    `seed` chooses. -1 means all. An InputError if the data has fewer."""
    n_classes = len(images.classes)
    if n_way in (-1, n_classes) and n_shot == -1:
        return images  # a Subset of all images would only need more memory
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
    """All images of the classes with these names; an InputError if a class is missing."""
    if list(classes) == images.classes:
        return images
    missing = [name for name in classes if name not in images.class_to_idx]
    if images.classes == [UNLABELLED]:
        raise InputError(
            f"{images.path} has no class folders, but the training data has classes: sort the "
            "images into a folder for each class; for ImageNet's validation images, valprep.sh of "
            "github.com/soumith/imagenetloader.torch or torchvision.datasets.ImageNet does this"
        )
    if missing:
        raise InputError(
            f"no class {missing[0]}, which is a class of the training data"
            + f" ({len(missing)} such)" * (len(missing) > 1)
        )
    ways = [images.class_to_idx[name] for name in classes]
    return Subset(images, list(classes), np.flatnonzero(np.isin(images.targets, ways)))


def staged_path(path, folder):
    """The path of the copy of `path` in `folder`, where copies lie under their whole absolute path:
    FOLDER/data/train.tar for /data/train.tar. If folder is None, the path itself."""
    return f"{folder}{os.path.abspath(Path(path).expanduser())}" if folder else path


def open_pair(
    data_tr,
    data_val,
    *,
    n_way=-1,
    n_shot=-1,
    seed=0,
    same_classes=True,
    staged=None,
    image_decoder="pillow",
    skip_bad_images=False,
    channels=3,
    names=("--data_tr", "--data_val"),
    title="",
):
    """Opens the training images, reduced to a few-shot subset, and the validation images, reduced
    to the same classes if there are several. same_classes=False, for runs without labels:
    validation images of all classes. staged: a folder of copies to read instead, see staged_path.
    names: of the two paths, for errors. Two lines, which begin with the title, say what was
    read."""
    options = {
        "image_decoder": image_decoder,
        "skip_bad_images": skip_bad_images,
        "channels": channels,
    }
    with naming(names[0]):
        images_tr = open_images(staged_path(data_tr, staged), **options)
    same_classes = same_classes and len(images_tr.classes) > 1
    with naming("--train_n_way" if n_way > len(images_tr.classes) else "--train_n_shot"):
        images_tr = few_shot(images_tr, n_way, n_shot, seed)
    with naming(names[1]):
        images_val = open_images(staged_path(data_val, staged), **options)
        if same_classes:
            images_val = with_classes(images_val, images_tr.classes)
    say(f"{title}training: {contents(images_tr)}")
    say(f"{title}validation: {contents(images_val)}")
    return images_tr, images_val


def open_probe_pairs(paths, **options):
    """The sets of --probe_data: {name: (training images, validation images)}. paths: {name:
    (training path, validation path)}; options: of open_pair."""
    pairs = {}
    for name, pair in paths.items():
        with naming(f"--probe_data {name}"):
            pairs[name] = open_pair(*pair, names=("TRAIN", "VAL"), title=f"{name}, ", **options)
    return pairs


def fingerprints(images_tr, images_val):
    """What a checkpoint holds of the images: flag -> Images.fingerprint(). An InputError if this
    process reads other images than the first process."""
    data = {"data_tr": images_tr.fingerprint(), "data_val": images_val.fingerprint()}
    for flag, fingerprint in from_first_process(data).items():
        if fingerprint != data[flag]:
            raise InputError(f"--{flag}: not all processes read the same images")
    return data


# -------------------------------------------------------------------------------------------------


def even_indices(n, first, count, seed, shuffle=True):
    """Elements `first` to `first + count` of an endless sequence of indices: int64 (count,). The
    sequence passes over range(n) again and again, with shuffle in a new order each time: after any
    number of elements, each index has come k or k-1 times. A pure function of the arguments."""
    positions = torch.arange(first, first + count)
    if not shuffle or not count:
        return positions % n
    passes = torch.arange(first // n, (first + count - 1) // n + 1)
    seeds = mix_seeds(seed, passes)
    if n < 256:  # a small n may need very many passes: all at once is faster
        orders = random_bits(seeds[:, None], torch.arange(n)).argsort(1).flatten()
    else:
        orders = torch.cat([permutation(n, s) for s in seeds.tolist()])
    return orders[positions - passes[0] * n]


def occurrences(indices):
    """Counts, for each of the indices (n,), how often the same index came before it: int64 (n,)."""
    order = indices.argsort(stable=True)
    ordered = indices[order]
    starts = torch.searchsorted(ordered, ordered)
    result = torch.empty_like(indices)
    result[order] = torch.arange(len(indices)) - starts
    return result


class SeededImages(Dataset):
    """Item (index, seed): the image, uint8 or uint16 (C, H, W), transformed with random numbers
    that depend on the seed alone; and REPLACED if another image replaced it, NOTED if its decoder
    left a note, else 0. Only damaged images are replaced, and only if images.skip_bad is set."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __getitem__(self, key):
        index, seed = key
        image, report = self.load(index)
        with seeded(seed):
            return self.transform(image), report

    def load(self, index):
        """Returns the image and 0 or NOTED; for a damaged image the next readable one of its class
        and REPLACED. A subset's class without a readable image falls back on the whole class."""
        try:
            image = self.images.load(index)
            return image, NOTED if NOTE in getattr(image, "info", ()) else 0
        except ImageError:
            if not self.images.skip_bad:
                raise
        for images, i in (self.images, index), self.images.source(index):
            others = images.of_class(images.target(i))
            place = int(np.searchsorted(others, i))
            for other in [*others[place + 1 :], *others[:place]]:
                with contextlib.suppress(ImageError):
                    return images.load(other), REPLACED
        return self.images.load(index), REPLACED  # all are damaged: raises the error again


def collate(items):
    """Stacks items of SeededImages: images (n, C, H, W), reports (n,). If one image is uint16, all
    become uint16."""
    images, reports = zip(*items, strict=True)
    if len({image.dtype for image in images}) > 1:
        images = list(map(widened, images))
    return default_collate(images), torch.tensor(reports)


def widened(images):
    """uint8 or uint16 -> uint16: the same shares of the largest number."""
    if images.dtype == torch.uint16:
        return images
    return (images.int() * (DEPTHS[torch.uint16] // DEPTHS[torch.uint8])).to(torch.uint16)


class Requests:
    """The batches that the workers are to load: an iterable of lists of (index, seed), which
    ImageLoader.load replaces before each pass. The same workers can then serve all passes."""

    def __init__(self):
        self.batches = ()

    def __iter__(self):
        return iter(self.batches)


class ImageLoader:
    """Loads images by worker processes, which live as long as the loader if `persistent`. timeout:
    the most seconds that one batch may take; loading ends early once stopping() is true."""

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
        self.images, self.stopping = images, stopping
        self.requests = Requests()
        self.most = sys.maxsize  # images that a worker sends at once
        if num_workers:
            channels = images.source(0)[0].channels
            with seeded(0):
                example = torch.zeros(channels, 32, 32, dtype=torch.uint8)
                image_bytes = transform(example).nbytes
            self.most = max(1, IN_FLIGHT // (2 * num_workers * image_bytes))  # two in flight each
        end_workers_at_exit()
        self.loader = DataLoader(
            SeededImages(images, transform),
            batch_sampler=self.requests,
            num_workers=num_workers,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=collate,
            timeout=timeout / 2 if num_workers else 0,
            # By default, a process of `launch` spawns its workers, and each imports torch again.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # without it, passes draw from torch's global generator
        )

    def load(self, indices, seeds, batches):
        """Yields (rows, images) for each of `batches`, a sequence of rows (slices or index tensors)
        of indices (n,) and seeds (n,). images: uint8 or uint16 (rows, C, H, W), image indices[i]
        transformed with seeds[i]. Workers load ahead."""
        self.requests.batches = (
            list(zip(*keys, strict=True))
            for rows in batches
            for keys in zip(*map(self.pieces, (indices[rows], seeds[rows])), strict=True)
        )
        if self.stopping():
            return
        loaded = iter(self.loader)
        for rows in batches:
            if self.stopping():
                return
            images, reports = self.next_batch(loaded, indices[rows])
            if reports.any():
                self.report_replaced(indices[rows][reports == REPLACED].tolist())
                self.report_note(indices[rows][reports == NOTED].tolist())
            yield rows, images

    def chunks(self, indices, seeds, size):
        """`load` for this process's share of all rows, in chunks of `size`: yields (slice,
        images)."""
        n = len(indices)
        slices = [slice(start, min(start + size, n)) for start in range(0, n, size)]
        return self.load(indices, seeds, slices[rank() :: world_size()])

    def pieces(self, numbers):
        """Cuts the numbers of a batch into lists of nearly equal lengths, at most self.most."""
        return [piece.tolist() for piece in numbers.chunk(max(1, -(-len(numbers) // self.most)))]

    def next_batch(self, loaded, indices):
        """The next batch of `loaded`, of these images, joined from its pieces."""
        first, *others = self.pieces(indices)
        images, reports = self.next_piece(loaded, first)
        if not others:
            return images, reports
        shape, done = (len(indices), *images.shape[1:]), len(first)
        joined = torch.empty(shape, dtype=images.dtype, pin_memory=self.loader.pin_memory)
        joined[:done], reports = images, [reports]
        for piece in others:  # one by one: each leaves the shared memory at once
            images, more = self.next_piece(loaded, piece)
            if images.dtype != joined.dtype:
                images, joined = widened(images), widened(joined)
            joined[done : done + len(piece)] = images
            reports, done = [*reports, more], done + len(piece)
        return joined, torch.cat(reports)

    def next_piece(self, loaded, indices):
        """The next piece of `loaded`, of these images; a RunError if it takes too long."""
        # Two waits of half the timeout: after a suspended run wakes up, the first is over at once.
        for _ in range(2):
            try:
                return next(loaded)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
        names = ", ".join(self.images.name(i) for i in indices[:3])
        seconds = 2 * self.loader.timeout
        raise RunError(
            f"--loader_timeout {seconds:g}: a loader worker gave nothing for so many "
            f"seconds; it was loading {len(indices)} images: {names}{' ...' * (len(indices) > 3)}"
        ) from None

    def report_replaced(self, indices):
        """Warns of images that were replaced, once for each; an InputError if there are too many
        in the whole data set, of which self.images may be a subset."""
        for index in indices:
            store, number = self.images.source(index)
            if number in store.replaced:
                continue
            store.replaced.add(number)
            count = f"{len(store.replaced)} of {len(store)} images"
            try:
                store.load(number)  # again, for the error's text
            except ImageError as error:
                tqdm.write(f"warning: {error}; {count} replaced so far", file=sys.stderr)
            if len(store.replaced) > MOST_BAD * len(store):
                raise InputError(
                    f"--skip_bad_images: {count} in {store.path} can't be read, more than "
                    f"{MOST_BAD:.1%}; one is {store.name(number)}"
                )

    def report_note(self, indices):
        """Prints the decoder's note on the first of these images, once for a data set."""
        for store, number in map(self.images.source, indices[:1]):
            if not store.noted:
                store.noted = True
                say(f"note: {store.name(number)}: {store.load(number).info[NOTE]}")


def measure_channels(images, transform, *, seed, **loading):
    """The mean and the standard deviation of each channel over at most MEASURED images, chosen by
    seed, {"mean", "std"}, as Augmentation.normalize takes them. Every process measures its share;
    whole numbers make the result independent of the shares. loading: further arguments of
    ImageLoader."""
    n = min(MEASURED, len(images))
    indices = even_indices(len(images), 0, n, mix_seeds(seed, Stream.EVALUATION))
    loader = ImageLoader(images, transform, **loading)
    sums, count = torch.zeros(3, images.source(0)[0].channels, dtype=torch.int64), 0
    for _, pixels in loader.chunks(indices, indices, 16):
        numbers = widened(pixels).long().transpose(0, 1).flatten(1)  # (C, pixels)
        squares = numbers.square().sum(1)
        sums += torch.stack([numbers.sum(1), squares >> 32, squares % 2**32])  # can't overflow
        count += numbers.shape[1]
    count = torch.tensor(count)
    sum_over_processes(sums, count)
    depth = DEPTHS[torch.uint16]
    total, high, low = sums.double() / count
    mean, square = (total / depth).tolist(), ((high * 2**32 + low) / depth**2).tolist()
    result = {"mean": [], "std": []}
    for first, second in zip(mean, square, strict=True):
        deviation = math.sqrt(max(0.0, second - first**2))
        result["mean"].append(float(f"{first:.6g}"))
        result["std"].append(float(f"{deviation:.6g}") or 1.0)  # 0: all of the channel is equal
    shown = (" ".join(["--" + name, *map(str, values)]) for name, values in result.items())
    say(f"measured on {n:,} training images: {' '.join(shown)}")
    return {name: tuple(values) for name, values in result.items()}


def copied(batches, device):
    """Yields (rows, images) with the images on the device. Does not wait for a GPU: the next batch
    is loaded while the GPU computes."""
    yield from ((rows, images.to(device, non_blocking=True)) for rows, images in batches)


# -------------------------------------------------------------------------------------------------
# An epoch's pool of images, and its minibatches.


@dataclass
class Pool:
    """The images of one epoch, without pixels: an image's crop, mask and codes are pure functions
    of its seed, computed where they are needed."""

    images: Dataset
    indices: torch.Tensor  # (n,) into images
    seeds: torch.Tensor  # (n,) int64, for crops and codes
    mask_seeds: torch.Tensor  # (n,) int64
    n_patches: int  # L
    minibatch_seed: torch.Tensor  # for the order of images in minibatches
    shuffle: bool

    def mask_noise(self, rows):
        """The noise (len(rows), L) whose argsort is the mask, as in MAE."""
        return random_uniform(self.mask_seeds[rows], self.n_patches)


def draw_pool(images, size, epoch, *, n_patches, seed, shuffle=True, fix_mask_noise=False):
    """The pool of `size` images of an epoch, drawn evenly. An image's seed depends on the run's
    seed, the epoch, its index and how often it came before in this pool. fix_mask_noise: an image
    has the same mask in all epochs."""
    indices = even_indices(len(images), epoch * size, size, mix_seeds(seed, Stream.POOL), shuffle)
    seeds = mix_seeds(seed, Stream.IMAGE, epoch, indices, occurrences(indices))
    mask_seeds = (
        mix_seeds(seed, Stream.MASK, indices) if fix_mask_noise else mix_seeds(seeds, Stream.MASK)
    )
    minibatch_seed = mix_seeds(seed, Stream.MINIBATCH, epoch)
    return Pool(images, indices, seeds, mask_seeds, n_patches, minibatch_seed, bool(shuffle))


@dataclass
class Batch:
    """This process's share of a minibatch: n images."""

    images: torch.Tensor  # (n, C, H, W) uint8 or uint16, on the device
    mask_noise: torch.Tensor  # (n, L)
    seeds: torch.Tensor  # (n,) int64
    code_numbers: torch.Tensor | None  # (n,) int64; None for a plain MAE
    step: int  # the run's gradient step
    names: Callable  # () -> the names of all images of the minibatch, for messages

    def split(self, parts):
        """The share in at most `parts` parts, none of them empty."""
        fields = (self.images, self.mask_noise, self.seeds)
        chunks = [tensor.chunk(parts) for tensor in fields]
        numbers = self.code_numbers
        chunks.append([None] * len(chunks[0]) if numbers is None else numbers.chunk(parts))
        return [Batch(*part, self.step, self.names) for part in zip(*chunks, strict=True)]


def minibatches(pool, loader, device, *, steps, size, code_numbers=None, step=0, done=0):
    """Yields this process's share of each minibatch of the epoch, as a Batch, without the first
    `done`. Minibatches: shuffled passes over the pool, cut into `steps` pieces of `size` images.
    The first Batch is for the run's gradient step `step`.

    code_numbers: of the pool's chosen codes (n,), None for a plain MAE."""
    n = steps * size
    stream = even_indices(len(pool.indices), 0, n, pool.minibatch_seed, pool.shuffle)
    minibatch_rows = stream.view(steps, size)[done:]  # (steps - done, size) rows of the pool
    shares = [all_rows[rank() :: world_size()] for all_rows in minibatch_rows]
    loaded = copied(loader.load(pool.indices, pool.seeds, shares), device)
    pairs = zip(minibatch_rows, loaded, strict=True)
    for number, (all_rows, (rows, images)) in enumerate(pairs, step):
        numbers = None if code_numbers is None else code_numbers[rows]
        names = partial(image_names, pool.images, pool.indices[all_rows])
        yield Batch(images, pool.mask_noise(rows), pool.seeds[rows], numbers, number, names)


def image_names(images, indices):
    """The names of images indices (n,), for messages."""
    return [images.name(i) for i in indices.tolist()]

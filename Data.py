"""Images in classes, from a folder or a TAR; few-shot subsets; which image is drawn when, and
loading them."""

import dataclasses
import io
import os
import signal
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from Augmentation import normalize
from Utils import (
    InputError,
    Stream,
    mix_seeds,
    naming,
    permutation,
    random_uniform,
    rank,
    seeded,
    world_size,
)


class ImageError(InputError):
    """An image that can't be read."""


class Images(Dataset):
    """Encoded images in classes, in ImageFolder's order: by class, folder and file name. Items are
    (image, target).

    classes: sorted names; targets: (n,) int64, each image's class; subclasses add `read`."""

    def __init__(self, path, names, targets, classes, transform=None):
        self.path, self.transform = str(path), transform
        self.classes, self.class_to_idx = classes, {name: i for i, name in enumerate(classes)}
        self.targets = np.asarray(targets, dtype=np.int64)
        self.names = np.array(
            [os.fsencode(name) for name in names]
        )  # one flat array: workers share it

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = self.load(index)
        return (image if self.transform is None else self.transform(image)), int(
            self.targets[index]
        )

    def read(self, index):
        """The encoded image, as bytes."""
        raise NotImplementedError

    def name(self, index):
        """Where the image is, for messages."""
        return os.fsdecode(self.names[index])

    def load(self, index):
        """The image as Pillow's RGB; an ImageError that names it where it is damaged."""
        try:
            return Image.open(io.BytesIO(self.read(index))).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageError(
                f"{self.path}: cannot read the image {self.name(index)}: {error}"
            ) from None


class FolderImages(Images):
    """Images as torchvision's ImageFolder finds them: path/class/.../image."""

    def __init__(self, path, transform=None):
        classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        class_to_idx = {name: i for i, name in enumerate(classes)}
        found = (
            make_dataset(str(path), class_to_idx, IMG_EXTENSIONS, allow_empty=True)
            if classes
            else []
        )
        names, targets = zip(*found, strict=True) if found else ((), ())
        check_classes(path, classes, targets)
        super().__init__(path, names, targets, classes, transform)

    def read(self, index):
        return Path(self.name(index)).read_bytes()


class TarImages(Images):
    """Images in an uncompressed TAR as ROOT/class/.../image, where ROOT is all that the images'
    folders have in common."""

    def __init__(self, path, transform=None):
        members = self.find(path)
        if not members:
            raise InputError(f"{path} holds no images ({', '.join(IMG_EXTENSIONS)})")
        root = common_folders(members)
        beside = [name for name in members if name.count("/") == len(root)]
        if len(beside) == len(members):  # all in one folder, which then is the only class
            root = root[:-1]
        if any(name.count("/") <= len(root) for name in beside):
            shown = f"{path} holds images outside of class folders"
            raise InputError(f"{shown}: expected .../class/image, found {beside[0]}")
        depth = len(root)
        samples = sorted(
            (name.split("/")[depth], *os.path.split(name), *at) for name, at in members.items()
        )
        classes = sorted({sample[0] for sample in samples})
        class_to_idx = {name: i for i, name in enumerate(classes)}
        names = [f"{folder}/{file}" for _, folder, file, _, _ in samples]
        super().__init__(
            path, names, [class_to_idx[sample[0]] for sample in samples], classes, transform
        )
        self.offsets, self.sizes = np.array([sample[3:] for sample in samples], dtype=np.int64).T
        self.opened = None, None  # (process, file descriptor): a fork opens its own

    @staticmethod
    def find(path):
        """{name: (offset, size)} of the images; where a name comes twice the later one counts."""
        found = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    name = os.path.normpath(member.name)
                    if not name.lower().endswith(IMG_EXTENSIONS) or member.isdir():
                        continue
                    if member.islnk():  # a hard link: the content came before, by another name
                        member = archive.getmember(member.linkname)
                    if not member.isfile():
                        raise InputError(f"{path}: {name} is a link, its image is not in there")
                    found[name] = member.offset_data, member.size
                end = archive.offset
            with open(path, "rb") as file:
                file.seek(end)
                # tarfile takes anything that is no header for the end.
                if file.read(512) != bytes(512):
                    raise tarfile.ReadError("it ends without an end mark")
        except (tarfile.ReadError, KeyError) as error:
            shown = f"{path} is not a whole, uncompressed TAR archive"
            raise InputError(f"{shown}: {error}") from None
        return found

    def __getstate__(self):
        return {**self.__dict__, "opened": (None, None)}

    def read(self, index):
        if self.opened[0] != os.getpid():
            self.opened = os.getpid(), os.open(self.path, os.O_RDONLY)
        return os.pread(self.opened[1], int(self.sizes[index]), int(self.offsets[index]))


def common_folders(names):
    """The folders that all names start with, as a list."""
    folders = [name.split("/")[:-1] for name in names]
    first, last = min(folders), max(folders)
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[:shared]


def check_classes(path, classes, targets):
    """Refuses a folder without class folders, or with a class that has no image, as ImageFolder
    does."""
    if not classes:
        raise InputError(f"{path} has no class folders: expected {path}/class/image")
    if len(targets) == 0:
        raise InputError(
            f"{path} holds no images in its class folders ({', '.join(IMG_EXTENSIONS)})"
        )
    used = set(targets)
    empty = [name for i, name in enumerate(classes) if i not in used]
    if empty:
        raise InputError(
            f"{path}: no image in the class folder {empty[0]}"
            + f" ({len(empty)} such)" * (len(empty) > 1)
        )


def open_images(path, transform=None):
    """The Images at `path`: a folder as torchvision's ImageFolder reads, or a .tar of one."""
    path = Path(path).expanduser()
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if path.is_dir():
            return FolderImages(path, transform)
        if path.suffix == ".tar":
            return TarImages(path, transform)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    raise InputError(f"{path} is neither a folder nor a .tar")


class Subset(Dataset):
    """Some images of some classes of another data set, with dense targets."""

    def __init__(self, images, classes, indices):
        self.images, self.indices, self.classes = images, indices, classes
        self.class_to_idx = {name: i for i, name in enumerate(classes)}
        dense = np.full(len(images.classes), -1)
        dense[[images.classes.index(name) for name in classes]] = np.arange(len(classes))
        self.targets = dense[images.targets[indices]]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.images[self.indices[index]][0], int(self.targets[index])

    def load(self, index):
        return self.images.load(self.indices[index])

    def name(self, index):
        return self.images.name(self.indices[index])


def few_shot(images, n_way, n_shot, seed):
    """The subset of n_way classes, evenly spaced in sorted order, with n_shot images each, chosen
    by seed; -1: all."""
    n_classes = len(images.classes)
    ways = range(n_classes) if n_way == -1 else [i * n_classes // n_way for i in range(n_way)]
    if len(ways) > n_classes:
        raise InputError(f"{n_way} classes wanted, but there are {n_classes}")
    chosen = []
    for way in ways:
        indices = np.flatnonzero(images.targets == way)
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
    missing = [name for name in classes if name not in images.classes]
    if missing:
        raise InputError(
            f"no class {missing[0]}, which the training data has"
            + f" ({len(missing)} such)" * (len(missing) > 1)
        )
    ways = [images.classes.index(name) for name in classes]
    return Subset(images, list(classes), np.flatnonzero(np.isin(images.targets, ways)))


def open_pair(data_tr, data_val, *, n_way, n_shot, seed, same_classes=True):
    """Training images, reduced to a few-shot subset, and validation images of the same classes (of
    all, where same_classes is false: no labels are needed); messages name the flags."""
    with naming("--data_tr"):
        images_tr = open_images(data_tr)
    with naming("--train_n_way" if n_way > len(images_tr.classes) else "--train_n_shot"):
        images_tr = few_shot(images_tr, n_way, n_shot, seed)
    with naming("--data_val"):
        images_val = open_images(data_val)
        if same_classes:
            images_val = with_classes(images_val, images_tr.classes)
    return images_tr, images_val


# -------------------------------------------------------------------------------------------------


def even_indices(n, first, count, seed, shuffle=True):
    """Numbers `first` to `first + count` of an endless sequence that passes over range(n), each
    time in another order: int64 (count,). So every index is drawn k or k-1 times, whatever is taken
    at a time, and there is no state to save."""
    positions = torch.arange(first, first + count)
    if not shuffle:
        return positions % n
    passes = range(first // n, (first + count - 1) // n + 1)
    orders = torch.cat([permutation(n, mix_seeds(seed, p)) for p in passes])
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
    """Items (index, seed) -> uint8 (3, H, W): the image transformed by random numbers from the seed
    alone."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __getitem__(self, key):
        index, seed = key
        with seeded(seed):
            return self.transform(self.images.load(index))


def leave_interrupts(_):
    """In a worker: an interruption is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ImageLoader:
    """Loads images in chunks by worker processes, which live as long as the loader where
    `persistent`."""

    def __init__(self, images, transform, *, num_workers, persistent=False, pin_memory=False):
        self.images = images
        self.batches = []  # what the workers load next; the loader asks when it is iterated
        self.loader = DataLoader(
            SeededImages(images, transform),
            batch_sampler=self.batches,
            num_workers=num_workers,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=leave_interrupts,
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
        yield from zip(slices, self.loader, strict=True)


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


def minibatches(pool, codes, step, steps, size):
    """Yields the epoch's `steps` minibatches from the run's gradient step `step` on: shuffled
    passes over the pool, cut into `size`. codes: (pool, D) or None."""
    seed = mix_seeds(pool.seed, Stream.MINIBATCH, pool.epoch)
    stream = even_indices(len(pool.indices), 0, steps * size, seed, pool.shuffle).view(steps, size)
    for number, whole in enumerate(stream[step - pool.epoch * steps :], step):
        yield Batch(pool, whole[rank() :: world_size()], codes, whole, number)

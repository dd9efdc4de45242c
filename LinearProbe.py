"""Linear probes measure how well an encoder's features tell classes apart: the accuracy of a linear
head on the features, and of nearest neighbours among them.

This file holds the fast probe, which training uses, and the command that runs the fast or the full
probe; `internals/full_probe.py` holds the full probe."""

if __name__ == "__main__":
    from internals.startup import exit_on_interrupt

    exit_on_interrupt()

import csv
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock

import Data
import IO
import Utils
from Augmentation import transforms
from internals.encoders import (
    check_finite,
    effective_rank,
    extract,
    load_encoder,
    nearest_neighbors,
)
from internals.full_probe import Encoder, full_probe, make_plan, probe_folder
from internals.processes import StopSignal, adopt_slurm_step, launch, run_command
from internals.runs import check_writable
from Utils import (
    InputError,
    Stream,
    choose_dtype,
    join_processes,
    mix_seeds,
    naming,
    permutation,
    rank,
    say,
)


def linear_probe(
    features,
    labels,
    features_test,
    labels_test,
    *,
    lr=1e-3,
    epochs=100,
    batch_size=16,
    weight_decay=0.01,
    seed=0,
):
    """Trains a linear head on features (n, C) and labels (n,), and evaluates the head on the test
    features. Returns accuracies as fractions: "top1", "top5", and "knn" of `nearest_neighbors`. A
    NotFiniteError if features are not finite.

    AdamW; the learning rate rises for a tenth of the steps, then follows a cosine to 0. Features
    are standardised by the training features' mean and deviation. `seed` determines all random
    numbers."""
    check_finite(features, "training")
    check_finite(features_test, "validation")
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, features_test = (features - mean) / std, (features_test - mean) / std
    n, n_classes = len(features), int(max(labels.max(), labels_test.max())) + 1
    weight = torch.zeros(n_classes, features.shape[1], device=features.device)
    bias, one_hot = weight.new_zeros(n_classes), torch.eye(n_classes, device=weight.device)
    optimizer = torch.optim.AdamW([weight, bias], weight_decay=weight_decay, fused=True)
    step, steps = 0, epochs * -(-n // batch_size)
    for epoch in Utils.watch(range(epochs), "probe head", epochs, unit="epochs"):
        order = permutation(n, mix_seeds(seed, Stream.PROBE, epoch)).to(features.device)
        for batch in order.split(batch_size):
            optimizer.param_groups[0]["lr"] = Utils.learning_rate(
                step, base=lr, minimum=0, start=0, ramp=steps // 10, total=steps, cycles=1
            )
            # The gradient of the mean cross entropy, by hand: autograd would take half of the time
            # of such small steps.
            x = features[batch]
            error = (F.linear(x, weight, bias).softmax(1) - one_hot[labels[batch]]) / len(batch)
            weight.grad, bias.grad = error.T @ x, error.sum(0)
            optimizer.step()
            step += 1
    logits = F.linear(features_test, weight, bias)  # (n_test, n_classes)
    hits = logits.argsort(dim=1, descending=True)[:, :5] == labels_test[:, None]
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "knn": nearest_neighbors(features, labels, features_test, labels_test),
    }


def check_classes(images, purpose="a probe"):
    """An InputError for images of fewer than two classes. purpose: what needs the classes."""
    if (n := len(images.classes)) < 2:
        raise InputError(f"{purpose} needs at least two classes, there is {n}")


class FastProbe:
    """The few-shot probe that training uses. The images are chosen once; each call computes a
    model's features of these images and trains a head."""

    # fmt: off
    def __init__(
        self, images_tr, images_val, *, image_size, device, n_way, n_shot, augs_per_image=1,
        use_augs=True, images_per_pass, pool="mean", n_codes=0, lr, epochs, batch_size, seed=0,
        num_workers=0, loader_timeout=0, stopping=lambda: False, title="the probe",
    ):
        """n_way, n_shot: at most so many classes, and training images per class; pool: "mean" of
        the patch tokens, or "cls"; n_codes: features are means over so many codes, 0: no codes;
        lr, epochs, batch_size: see linear_probe; loader_timeout, stopping: see ImageLoader; title:
        for messages."""
        n_classes = len(images_tr.classes)
        check_classes(images_tr)
        smallest_class = int(torch.bincount(torch.as_tensor(images_tr.targets)).min())
        ways, shots = min(n_way, n_classes), min(n_shot, smallest_class)
        if (ways, shots) != (n_way, n_shot):
            say(f"note: {title} has --val_n_way {ways} classes of --val_n_shot {shots} images")
        train = Data.few_shot(images_tr, ways, shots, seed)
        test = Data.with_classes(images_val, train.classes)
        transform_tr, transform_te = transforms(image_size, use_augs)
        self.sets = []  # of the training and of the test images: model -> features; labels
        for images, transform, copies in (
            (train, transform_tr, augs_per_image), (test, transform_te, 1)
        ):
            indices = torch.arange(len(images)).repeat(copies)
            seeds = mix_seeds(seed, Stream.PROBE, indices, Data.occurrences(indices))
            loader = Data.ImageLoader(
                images, transform, num_workers=num_workers, timeout=loader_timeout,
                stopping=stopping,
            )
            features = partial(
                extract, loader=loader, indices=indices, seeds=seeds, device=device,
                batch_size=images_per_pass, parts=(pool,), n_codes=n_codes,
            )
            self.sets.append((features, torch.as_tensor(images.targets)[indices].to(device)))
        self.train_head = partial(
            linear_probe, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed
        )

    # fmt: on
    @property
    def sizes(self):
        """Numbers of training and test images."""
        return tuple(len(labels) for _, labels in self.sets)

    def __call__(self, model):
        """{"top1", "top5", "knn"} of the model's encoder, fractions; "rankme" of the test images'
        features."""
        train, test = ((features(model)[:, 0], labels) for features, labels in self.sets)
        accuracies = self.train_head(*train, *test)  # also checks that the features are finite
        return accuracies | {"rankme": effective_rank(test[0])}


# -------------------------------------------------------------------------------------------------
# The command.


def main(argv=None):
    """Probes an encoder. The last line of the output is the result, a JSON object."""
    adopt_slurm_step()
    run_command(lambda: start(IO.parse_probe_flags(argv)))


def start(flags):
    """Opens the data, and runs the probe in one process per device."""
    check_writable(Path(flags.save_folder).expanduser() / "probes")
    launch(run, flags.gpus, flags, *open_labelled(flags))


def open_labelled(flags):
    """The training and the validation images that the data flags name, of the same classes."""
    images_tr, images_val = Data.open_pair(
        flags.data_tr,
        flags.data_val,
        n_way=flags.train_n_way,
        n_shot=flags.train_n_shot,
        seed=flags.seed,
        image_decoder=flags.image_decoder,
        skip_bad_images=bool(flags.skip_bad_images),
        same_classes=flags.train_n_way != -1,
    )
    with naming("--data_tr"):
        check_classes(images_tr)
    with naming("--data_val"):
        extra = sorted(set(images_val.classes) - set(images_tr.classes))
        images_val = Data.with_classes(images_val, images_tr.classes)
        if extra:
            more = f" ({len(extra)} such)" * (len(extra) > 1)
            raise InputError(f"the training data has no class {extra[0]}, which this has{more}")
    return images_tr, images_val


def run(flags, images_tr, images_val):
    """One process of a probe: prints the result and appends it to results.csv."""
    start_time = time.perf_counter()
    device = join_processes(flags.gpus)
    dtype = choose_dtype(flags.sample_dtype, device)
    with naming("--model"):
        model = load_encoder(flags.model, size=flags.input_size, seed=flags.seed, dtype=dtype)
    model = model.to(device)
    for images in (images_tr, images_val):
        Data.use_channels(images, model.config.channels)
    if flags.fast:
        result = run_fast_probe(flags, model, images_tr, images_val, device)
    else:
        with StopSignal() as stop:
            result = run_full_probe(flags, model, images_tr, images_val, device, stop)
    seconds = round(time.perf_counter() - start_time, 1)
    result = {"model": flags.model, **result, "seconds": seconds}
    say(json.dumps(result))  # before the table, which the disk may refuse
    if rank() == 0:
        path = Path(flags.save_folder).expanduser() / "probes" / "results.csv"
        data = {"data_tr": flags.data_tr, "data_val": flags.data_val, "seed": flags.seed}
        append_row(path, {**result, **data})


# fmt: off
def run_fast_probe(flags, model, images_tr, images_val, device):
    """The fast probe's result."""
    probe = FastProbe(
        images_tr, images_val, image_size=model.config.image_size, use_augs=flags.use_augs,
        n_way=flags.val_n_way, n_shot=flags.val_n_shot, augs_per_image=flags.probe_augs_per_image,
        device=device, images_per_pass=flags.probe_bs_val,
        pool="mean" if flags.global_pool else "cls",
        n_codes=0 if flags.probe_ignore_z else flags.probe_codes,
        lr=flags.probe_lr, epochs=flags.probe_epochs, batch_size=flags.probe_bs, seed=flags.seed,
        num_workers=flags.num_workers, loader_timeout=flags.loader_timeout,
    )
    n_train, n_val = probe.sizes
    return {"probe": "fast", **probe(model), "n_train": n_train, "n_val": n_val}


def run_full_probe(flags, model, images_tr, images_val, device, stop):
    """The full probe's result."""
    plan = make_plan(
        model, images_tr, pools=flags.pools, default_pool="mean" if flags.global_pool else "cls",
        learning_rates=flags.lrs, weight_decays=flags.wds, hold_out=flags.hold_out,
        epochs=flags.epochs, warmup_epochs=flags.warmup_epochs, batch_size=flags.batch_size,
        seed=flags.seed,
    )
    encoder = Encoder(
        model, device, parts=plan.parts, n_codes=0 if flags.probe_ignore_z else flags.probe_codes,
        images_per_pass=flags.probe_bs_val, use_augs=flags.use_augs, seed=flags.seed,
        num_workers=flags.num_workers, loader_timeout=flags.loader_timeout, stop=stop,
    )
    settings = IO.settings(flags, IO.probe_parser())
    folder = probe_folder(
        flags.save_folder, flags.model, settings["data_tr"], model=model, settings=settings,
    )
    return full_probe(
        encoder, images_tr, images_val, plan, folder, name=flags.model, keep_gb=flags.keep_gb,
        save_minutes=flags.save_minutes, flags=vars(flags), force=bool(flags.force_resume),
    )


# fmt: on
COLUMNS = (  # of results.csv
    "model probe top1 top5 knn n_train n_held_out n_val pool lr wd epochs batch_size "
    "data_tr data_val seed seconds folder".split()
)


def append_row(path, values):
    """Appends a row to a CSV file. values: column name -> value. An existing file keeps its own
    columns; a new file gets COLUMNS. Names that are no UTF-8 are written with escapes."""
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")), open(path, "a+", **text) as file:
            file.seek(0)
            columns = next(csv.reader(file), None)
            writer = csv.DictWriter(file, columns or COLUMNS, extrasaction="ignore")
            if not columns:
                writer.writeheader()
            writer.writerow(values)
    except OSError as error:
        raise InputError(f"--save_folder: cannot write {path}: {error.strerror}") from None


if __name__ == "__main__":
    main(sys.argv[1:])

"""Fine-tunes an encoder to classify images, by timm's parts of MAE's recipe (He et al. 2022, A.1):
layer-wise decay of learning rates, Mixup and CutMix, label smoothing, stochastic depth."""

import dataclasses
import json
import time
from functools import partial

import _path  # noqa: F401 (makes the modules importable)
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2

import Data
import Utils
from Augmentation import normalize, transforms
from internals.checkpoints import Checkpoints, read_run_checkpoint, save_checkpoint
from internals.encoders import load_encoder, timm_network
from internals.processes import run_command
from internals.runs import lock
from IO import finetune_parser, parse_finetune_flags, settings
from LinearProbe import open_labelled
from Models import ImplicitMAE


# fmt: off
def labelled(images, transform, rows, seed, *, config, device, **loading):
    """Yields images (n,C,H,W), cropped by seed, normalised, and labels (n,), for each of `rows`."""
    Data.use_channels(images, config.channels)
    loader = Data.ImageLoader(images, transform, pin_memory=device.type == "cuda", **loading)
    indices, labels = torch.arange(len(images)), torch.as_tensor(images.targets)
    seeds = Utils.mix_seeds(seed, Utils.Stream.IMAGE, indices)
    loaded = Data.copied(loader.load(indices, seeds, rows), device)
    for batch, pixels in Utils.watch(loaded, "images", len(rows) * len(rows[0])):
        yield normalize(pixels, config.mean, config.std), labels[batch].to(device)


def train_epoch(network, batches, mix, optimizer, scheduler, scaler, *, first_step, seed, dtype):
    """Takes a gradient step with each batch (images, labels). Returns the mean loss."""
    losses = []
    for step, (images, labels) in enumerate(batches, first_step):
        timm.utils.random_seed(int(Utils.mix_seeds(seed, step)) % 2**32)  # for Mixup, drop path
        images, targets = mix(images, labels)
        scheduler.step_update(step)
        with Utils.autocast(images.device, dtype):
            loss = SoftTargetCrossEntropy()(network(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def accuracy(network, batches, device, dtype):
    """The share of the images in batches (images, labels) that the network classifies correctly."""
    with torch.no_grad(), Utils.autocast(device, dtype):
        right = [network(images).argmax(1) == labels for images, labels in batches]
    return torch.cat(right).double().mean().item()


def finetune(flags):
    """Fine-tunes as the flags say. Each epoch ends with a checkpoint in the file --out."""
    device, size, pair = torch.device(flags.gpus), flags.batch_size, open_labelled(flags)
    dtype, n, n_classes = Utils.fastest_dtype(device), len(pair[0]), len(pair[0].classes)
    if size > n:
        raise Utils.InputError(f"--batch_size {size}: at most {n} is allowed, the number of images")
    with Utils.naming("MODEL"):
        model = load_encoder(flags.model, seed=flags.seed)
        if not isinstance(model, ImplicitMAE):
            raise Utils.InputError(f"{flags.model} is no MAE; timm's train.py takes timm's models")
    torch.manual_seed(flags.seed)
    network = timm_network(
        model, num_classes=n_classes, global_pool="avg", fc_norm=False,
        drop_path_rate=flags.drop_path).to(device)
    optimizer = timm.optim.create_optimizer_v2(
        network, "adamw", flags.lr * size / 256, flags.wd, layer_decay=flags.layer_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=flags.epochs, warmup_epochs=flags.epochs / 20, step_on_epochs=False,
        warmup_lr=min(1e-5, flags.lr * size / 256), updates_per_epoch=(steps := n // size))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mix = timm.data.Mixup(
        flags.mixup, flags.cutmix, prob=flags.mixup + flags.cutmix > 0, num_classes=n_classes)
    c, history = dataclasses.replace(model.config, ip_spec=()), []
    checkpoint = Checkpoints(
        flags.out, model=network, optimizer=optimizer, scaler=scaler, config=dataclasses.asdict(c),
        history=history, command=[settings(flags, finetune_parser()), Data.fingerprints(*pair)])
    _lock = lock(flags.out.with_name(f".{flags.out.name}.lock"), f"--out {flags.out}")
    if flags.out.exists():
        saved = read_run_checkpoint(flags.out, checkpoint.parts.keys())
        if saved["command"] != checkpoint.parts["command"]:
            raise Utils.InputError(f"--out {flags.out}: other flags or images; choose another file")
        checkpoint.restore(saved)
        history += saved["history"]
    batches_tr, batches_val = (
        partial(labelled, images, transform, config=c, device=device,
                num_workers=flags.num_workers, timeout=flags.loader_timeout)
        for images, transform in zip(pair, transforms(c.image_size, flags.use_augs), strict=True))
    for epoch in range(len(history), flags.epochs):
        start = time.perf_counter()
        seed = Utils.mix_seeds(flags.seed, Utils.Stream.MINIBATCH, epoch)
        batches = batches_tr(Utils.permutation(n, seed).split(size)[:steps], seed)
        loss = train_epoch(
            network.train(), batches, mix, optimizer, scheduler, scaler, first_step=epoch * steps,
            seed=flags.seed, dtype=dtype)
        if not loss < float("inf"):  # or it is NaN
            raise Utils.RunError(f"the loss of epoch {epoch + 1} is not finite; try a lower --lr")
        batches = batches_val(torch.arange(len(pair[1])).split(256), 0)
        numbers = {"loss": loss, "accuracy": accuracy(network.eval(), batches, device, dtype)}
        history.append({**numbers, "seconds": round(time.perf_counter() - start, 1)})
        save_checkpoint(flags.out, checkpoint.state_dict())
        Utils.say(f"epoch {epoch + 1}/{flags.epochs}: {json.dumps(history[-1])}")
    seconds = round(sum(numbers["seconds"] for numbers in history), 1)
    result = {"steps": flags.epochs * steps, "seconds": seconds, "n_train": n}
    Utils.say(json.dumps({"model": flags.model, "accuracy": history[-1]["accuracy"], **result}))


if __name__ == "__main__":
    run_command(lambda: finetune(parse_finetune_flags()))

"""Train a masked autoencoder, made implicit by latent codes, by Implicit Maximum Likelihood
Estimation (Li & Malik 2018).

For every image keep, of many codes, the one whose completion is nearest, and take gradient steps
with it. Read `train` first, then `choose_codes`."""

import dataclasses
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

import Data
import IO
import Samplers
import Utils
from Augmentation import normalize, transforms
from internals import runs
from internals.processes import Stopped, StopSignal, adopt_slurm_step, launch, run_command
from internals.runs import locate_run
from internals.weights import PUBLISHED
from Models import PRESETS, ModelConfig, build, in_precision, masked_target, parameter_groups
from Samplers import code_passes, image_losses
from Utils import (
    RunError,
    autocast,
    choose_dtype,
    fastest_dtype,
    from_first_process,
    join_processes,
    learning_rate,
    naming,
    say,
    sum_over_processes,
    world_size,
)
from Validation import make_validation

# -------------------------------------------------------------------------------------------------
# The algorithm.


def train(
    model,
    loader,
    validate,
    keeper,
    progress,
    *,
    epochs,
    images_per_epoch,
    pooling,
    sampling,
    batching,
    stepping,
    rates,
):
    """Trains the model on the loader's images by IMLE, from where `progress` stands. `validate` and
    `keeper`, which logs and saves, are told of every step and know what is due. pooling, sampling,
    batching, stepping: keywords of the functions they go to, made in `loop_options`."""
    network = distributed(model, batching["code_free_share"])
    validate(model, progress)
    for epoch in range(progress.epoch, epochs):
        pool = Data.draw_pool(loader.images, images_per_epoch, epoch, **pooling)
        # Loads the pool's images; then IMLE: a code for each.
        codes = choose_pool_codes(model, pool, loader, progress, **sampling)
        batches = Data.minibatches(pool, codes, **batching, **progress.place)
        for batch in Utils.watch(batches, "gradient steps", batching["steps"], unit="steps"):
            progress.step_done(*train_step(network, batch, rates(progress.step), **stepping))
            keeper.after_step(progress)
            validate(model, progress)
        keeper.after_epoch(progress, rates(progress.step - 1))


@torch.no_grad()
def choose_codes(
    model,
    images,
    mask_noise,
    seeds,
    *,
    codes_per_image,
    codes_per_pass,
    mask_ratio=0.75,
    predict_ratio=1.0,
    tries=None,
    rs_epsilon=0.0,
    prefix=None,
):
    """IMLE's choice for one chunk on the model's device: of codes_per_image codes, each image's
    nearest; with `tries`, the nearest of so many that Samplers.search takes for the best.

    images (N,3,H,W) normalised, mask_noise (N,L), seeds (N,) int64 -> chosen codes (N,D), their
    losses (N,), the mean loss over all codes (N,), over those tried at random with `tries`.
    rs_epsilon: see Samplers.ranks. `prefix`: model.prefix of these images (the network up to the
    first injection, once per image), where it is known."""
    if prefix is None:
        prefix = model.prefix(images, mask_noise, mask_ratio, predict_ratio)
    attempt = partial(try_codes, model, prefix, images, seeds, codes_per_pass)
    numbers = torch.arange(codes_per_image, device=images.device).expand(len(images), -1)
    if tries is None:
        _, losses = attempt(numbers)
        mean = losses.mean(1)
    else:
        features = model.code_features(model.numbered_codes(seeds, numbers))
        kernel = Samplers.kernel_matrix(features)
        attempt = partial(attempt, keep=True)
        numbers, losses = Samplers.search(attempt, kernel, tries, rs_epsilon)
        mean = losses[:, : Samplers.n_random(tries)].mean(1)
    choice = Samplers.ranks(losses, rs_epsilon).argmin(1, keepdim=True)  # (N, 1)
    codes = model.numbered_codes(seeds, numbers.gather(1, choice))
    return codes[:, 0], losses.gather(1, choice)[:, 0], mean


def try_codes(model, prefix, images, seeds, codes_per_pass, numbers, keep=False):
    """Tries the codes of these numbers (N,k): where `keep`, the completions' residuals
    (N,k,M*P*P*3), else None; losses (N,k)."""
    kept, losses = [], []
    for pred, pass_losses in code_passes(model, prefix, images, seeds, codes_per_pass, numbers):
        losses.append(pass_losses)
        if keep:
            target = masked_target(images, prefix.mask, pred, model.config.norm_pix_loss)
            kept.append((pred - target).flatten(2))
    return torch.cat(kept, dim=1) if keep else None, torch.cat(losses, dim=1)


LEAST_SCALE = 2**-4  # of float16's loss: gradients that overflow with less are not finite at all


def train_step(
    network, batch, rates, *, optimizer, scaler, batch_size, parts, dtype, masking, clip_grad
):
    """One gradient step on this process's share of a minibatch, computed in `parts`; the loss,
    averaged over the whole minibatch, and the gradient's norm. masking: mask_ratio and
    predict_ratio. What is not finite raises a RunError before the update, but for gradients in
    float16: there the scaler leaves the step out, and scales less."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]]
    optimizer.zero_grad()
    model = getattr(network, "module", network)  # DDP's
    device = model.pos_embed.device
    total = torch.zeros((), device=device)
    shares = batch.split(parts)
    for part in shares:
        images, mask_noise, codes = part.to(device)
        # Processes exchange gradients, which DDP averages, with the last part.
        waiting = part is not shares[-1] and network is not model
        with network.no_sync() if waiting else nullcontext():
            with autocast(device, dtype):
                pred, mask = network(images, mask_noise, codes, masked_only=True, **masking)
                losses = image_losses(model, pred, images, mask)  # (n, 1), without codes (n,)
            loss = losses.sum() / batch_size
            scaler.scale(loss * world_size()).backward()
        total += loss.detach()
    sum_over_processes(total)
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_grad:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_grad, norm)
    loss, norm = torch.stack([total, norm]).tolist()
    scaled_less = scaler.is_enabled() and scaler.get_scale() > LEAST_SCALE
    for what, value in (("loss", loss), ("gradient's norm", 0.0 if scaled_less else norm)):
        if not math.isfinite(value):
            text = f"after {batch.step} gradient steps the training {what} is {value}"
            names = "\n  ".join(batch.names())
            raise RunError(f"{text}; no update was made. Its images:\n  {names}")
    scaler.step(optimizer)
    scaler.update()
    return loss, norm


# -------------------------------------------------------------------------------------------------
# An epoch's codes, and where a run stands.


def choose_pool_codes(
    model, pool, loader, progress, *, dtype, images_per_pass, forecast, stop, **options
):
    """Loads the pool's images and chooses a code for each: (n, D) on the host, None for a plain
    MAE. Codes and what to log about them stand in `progress`, where a run that was resumed inside
    this epoch finds them. options: those of choose_chunk_codes."""
    n, device = len(pool.indices), model.pos_embed.device
    choosing = model.code_dim > 0 and progress.codes is None
    codes = torch.zeros(n, model.code_dim, device=device)
    losses = torch.zeros(n, 3, device=device)
    chunks = loader.chunks(pool.indices, pool.seeds, images_per_pass)
    what, after_each = ("sampling codes", forecast) if choosing else ("loading", None)
    fast_model = in_precision(model, dtype) if choosing else None
    start = time.perf_counter()
    chunks = Data.copied(chunks, device)
    for rows, images, on_device in Utils.watch(chunks, what, n, after_each=after_each):
        pool.images[rows] = images
        if choosing:
            chunk = (on_device, pool.mask_noise[rows], pool.seeds[rows])
            codes[rows], losses[rows] = choose_chunk_codes(fast_model, *chunk, **options)
    sum_over_processes(pool.images, codes, losses)
    stop.check()
    if choosing:
        best, mean, plain = losses.double().mean(0).tolist()
        seconds = time.perf_counter() - start
        progress.codes = codes.cpu()
        progress.sampled = {
            "sampling/first_losses": mean,
            "sampling/end_losses": best,
            "sampling/delta_wrt_no_z": best - plain,
            "sampling/codes_per_sec": n * options["codes_per_image"] / seconds,
        }
    return progress.codes


@torch.no_grad()
def choose_chunk_codes(
    model, images, mask_noise, seeds, *, mask_ratio, predict_ratio=1.0, **options
):
    """choose_codes for uint8 images: codes (N, D); losses (N, 3) of the chosen code, averaged over
    codes, and without code."""
    images = normalize(images)
    mask_noise, seeds = mask_noise.to(images.device), seeds.to(images.device)
    prefix = model.prefix(images, mask_noise, mask_ratio, predict_ratio)
    codes, best, mean = choose_codes(model, images, mask_noise, seeds, prefix=prefix, **options)
    plain = image_losses(model, model.suffix(prefix, None), images, prefix.mask)
    return codes, torch.stack([best, mean, plain], dim=1)


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint needs beside model and optimizer."""

    epoch: int = 0
    step: int = 0  # gradient steps done
    validated: int = -1  # the last step that was validated
    codes: torch.Tensor | None = None  # chosen for the present epoch's pool
    sampled: dict = field(default_factory=dict)  # what to log about them
    losses: list = field(default_factory=list)  # of the present epoch's steps
    norms: list = field(default_factory=list)  # of their gradients
    seconds: float = 0.0  # of choosing codes and training, without validation

    @property
    def place(self):
        """Of the next step: its number in the run, and in the present epoch."""
        return {"step": self.step, "done": len(self.losses)}

    def step_done(self, loss, norm):
        self.step += 1
        self.losses.append(loss)
        self.norms.append(norm)

    def epoch_done(self):
        self.epoch += 1
        self.codes, self.sampled, self.losses, self.norms = None, {}, [], []

    def summary(self):
        """What to log about the present epoch, which ends."""
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return {
            "pretrain/loss_tr": sum(self.losses) / len(self.losses),
            "pretrain/grad_norm": sum(finite) / max(1, len(finite)),
            "pretrain/skipped_steps": len(self.norms) - len(finite),  # float16's overflows
            **self.sampled,
        }


# -------------------------------------------------------------------------------------------------
# Logging, saving, and putting it all together.


@dataclass
class Keeper:
    """Logs epochs and saves checkpoints when they are due."""

    record: runs.Run
    stop: StopSignal
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    flags: dict
    epochs: int
    save_minutes: float
    save_iter: int

    def __post_init__(self):
        self.started = self.epoch_started = self.counted = time.monotonic()
        self.next_save = self.started + 60 * self.save_minutes
        self.epochs_here = 0  # since this process started
        self.owed = False  # a checkpoint that stays

    def count_time(self, progress):
        """Adds the time that has passed to progress.seconds, from which validations take theirs."""
        now = time.monotonic()
        progress.seconds += now - self.counted
        self.counted = now

    def save(self, progress, keep=False):
        """Saves a checkpoint; `keep`: one that stays. An OSError where that fails."""
        state = {
            "model": self.model.state_dict(),
            "config": dataclasses.asdict(self.model.config),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(progress),
            "args": self.flags,
        }
        self.record.save(state, keep=keep)
        self.owed = False
        self.next_save = time.monotonic() + 60 * self.save_minutes

    def try_to_save(self, progress, keep=False):
        """Saves, or says that it failed, and tries again a minute later."""
        try:
            self.save(progress, keep or self.owed)
        except OSError as error:
            self.owed = self.owed or keep
            say(f"warning: no checkpoint could be saved ({error}); the next try is in a minute")
            self.next_save = time.monotonic() + min(60, 60 * self.save_minutes)

    def save_last(self, progress):
        """Saves as the run ends, on all processes together; a RunError where that fails."""
        self.count_time(progress)
        try:
            self.save(progress, self.owed)
        except OSError as error:
            raise RunError(f"the last checkpoint could not be saved: {error}") from None
        sum_over_processes(torch.zeros(()))  # none ends before it is written

    def after_step(self, progress):
        """Saves where save_minutes are over; a run that was asked to stop does it here."""
        self.stop.check()
        self.count_time(progress)
        if time.monotonic() > self.next_save:
            self.try_to_save(progress)

    def after_epoch(self, progress, rates):
        """Logs the epoch that ends, and saves what is kept for good."""
        self.count_time(progress)
        now = time.monotonic()
        values = {
            **progress.summary(),
            "pretrain/lr_mae": rates["mae"],
            "pretrain/lr_z": rates["z"],
            "time/epoch_seconds": now - self.epoch_started,
            "time/training_seconds": progress.seconds,
        }
        self.record.log(progress.step, progress.epoch, values)
        progress.epoch_done()
        self.epochs_here += 1
        left = (now - self.started) / self.epochs_here * (self.epochs - progress.epoch)
        text = f"epoch {progress.epoch}/{self.epochs}: loss {values['pretrain/loss_tr']:.4f}"
        if "sampling/end_losses" in values:
            text += f"; codes {values['sampling/first_losses']:.4f} mean, "
            text += f"{values['sampling/end_losses']:.4f} best, "
            text += f"{values['sampling/codes_per_sec']:,.0f}/s"
        text += f"; {Utils.duration(now - self.epoch_started)}, {Utils.duration(left)} left"
        say(text)
        self.epoch_started = now
        if self.save_iter > 0 and progress.epoch % self.save_iter == 0:
            self.try_to_save(progress, keep=True)


def distributed(model, code_free_share):
    """The model as gradient steps call it: gradients are averaged over the processes, if there are
    several. Steps without codes leave the injections unused, which DDP must look for."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, find_unused_parameters=code_free_share > 0)


def learning_rates(step, *, lr, lr_z, min_lr, headstart, ramp, total, cycles):
    """{"mae", "z"}: the rates of the MAE's and of the injections' parameters for gradient step
    `step`; lengths in steps."""
    shape = {"minimum": min_lr, "ramp": ramp, "total": total, "cycles": cycles}
    return {
        "mae": learning_rate(step, base=lr, start=headstart, **shape),
        "z": learning_rate(step, base=lr_z, start=0, **shape),
    }


def make_model(flags, checkpoint):
    """The model that the flags ask for: with the checkpoint's weights, pretrained ones or fresh
    ones."""
    if checkpoint is not None:
        model = build(ModelConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model
    fields = IO.model_fields(flags)
    if not flags.finetune:
        return build(ModelConfig(**fields))
    with naming("--mae_weights" if flags.mae_weights else "--finetune 1"):
        return IO.load_model(flags.mae_weights or PUBLISHED[flags.arch], **fields)


def loop_options(flags, device, optimizer, scaler, stop, train_dtype, dtype, progress):
    """The keywords of `train`, from the flags and where the run stands."""
    cosine = flags.scheduler == "linear_ramp_cosine_decay"
    size = tuple(flags.input_size)
    masking = {"mask_ratio": flags.mask_ratio, "predict_ratio": flags.predict_ratio}
    return {
        "epochs": flags.epochs,
        "images_per_epoch": flags.ex_per_epoch,
        "pooling": {
            "seed": flags.seed,
            "shuffle": bool(flags.shuffle_data),
            "fix_mask_noise": bool(flags.fix_mask_noise),
            "image_size": size,
            "n_patches": math.prod(size) // PRESETS[flags.arch].patch_size ** 2,
        },
        "sampling": {
            "dtype": dtype,
            "images_per_pass": flags.code_bs,
            "codes_per_image": flags.ns,
            "codes_per_pass": flags.sp,
            "tries": flags.tries if flags.sampler == "surrogate" else None,
            "rs_epsilon": flags.rs_epsilon,
            **masking,
            "forecast": Utils.Forecast(
                device, (flags.epochs - progress.epoch) * flags.ex_per_epoch
            ),
            "stop": stop,
        },
        "batching": {
            "steps": flags.ipe,
            "size": flags.mini_bs,
            "code_free_share": flags.code_free_share,
        },
        "stepping": {
            "optimizer": optimizer,
            "scaler": scaler,
            "batch_size": flags.mini_bs,
            "parts": flags.accum,
            "dtype": train_dtype,
            "masking": masking,
            "clip_grad": flags.clip_grad,
        },
        "rates": partial(
            learning_rates,
            lr=flags.lr,
            lr_z=flags.lr_z,
            min_lr=flags.min_lr,
            headstart=flags.headstart_z * flags.ipe,
            ramp=flags.n_ramp * flags.ipe,
            total=last_step(flags, progress),
            cycles=flags.n_cycles if cosine else 0,
        ),
    }


def last_step(flags, progress):
    """The run's last gradient step: epochs * ipe, where neither has changed on the way."""
    epochs_left = max(0, flags.epochs - progress.epoch)
    return progress.step + epochs_left * flags.ipe - min(len(progress.losses), flags.ipe)


def make_optimizer(model, flags, train_dtype, checkpoint):
    """AdamW and the loss scaler, as the checkpoint knows them, with the flags' options."""
    groups = parameter_groups(model, flags.wd)
    options = [
        {"weight_decay": g["weight_decay"], "betas": (flags.beta1, flags.beta2)} for g in groups
    ]
    optimizer = torch.optim.AdamW(groups, betas=(flags.beta1, flags.beta2), fused=True)
    scaler = torch.amp.GradScaler(model.pos_embed.device.type, enabled=train_dtype == torch.float16)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty, where the run did without
            scaler.load_state_dict(checkpoint["scaler"])
        for group, option in zip(optimizer.param_groups, options, strict=True):
            group.update(option)  # they may have been changed
    return optimizer, scaler


def run(flags, images_tr, images_val):
    """One process of a run: puts its parts together and trains."""
    device = join_processes(flags.gpus)
    flags = from_first_process(flags)  # one uid, where each process drew its own
    folder, found, checkpoint = locate_run(
        "TrainIMLE",
        flags,
        changeable=IO.changeable_flags(IO.training_parser()),
        architecture=IO.architecture_flags(),
    )
    progress = Progress() if checkpoint is None else Progress(**checkpoint["progress"])
    dtype = choose_dtype(flags.sample_dtype, device)
    train_dtype = fastest_dtype(device) if flags.fp16 else torch.float32
    record, stop = runs.Run(folder, flags, checkpoint, found), StopSignal()
    loading = {
        "num_workers": flags.num_workers,
        "timeout": flags.loader_timeout,
        "stopping": stop.asked,
    }
    data = (images_tr, images_val, device, dtype, loading, last_step(flags, progress))
    validation = make_validation(record, stop, flags, *data)
    loader = Data.ImageLoader(
        images_tr,
        transforms(tuple(flags.input_size), flags.use_augs)[0],
        persistent=True,
        pin_memory=device.type == "cuda",
        **loading,
    )

    torch.manual_seed(flags.seed)
    model = make_model(flags, checkpoint).to(device)
    optimizer, scaler = make_optimizer(model, flags, train_dtype, checkpoint)
    options = loop_options(flags, device, optimizer, scaler, stop, train_dtype, dtype, progress)
    schedule = (flags.epochs, flags.save_minutes, flags.save_iter)
    with stop, record:
        keeper = Keeper(record, stop, model, optimizer, scaler, vars(flags), *schedule)
        say(f"going on after step {progress.step} in {folder}" if checkpoint else f"new: {folder}")
        try:
            train(model, loader, validation, keeper, progress, **options)
        except Stopped as stopped:
            keeper.save_last(progress)
            message = f"stopped after step {progress.step}, saved in {folder}"
            raise Stopped(message, stopped.status) from None
        keeper.save_last(progress)
    say(f"done: {folder}")


def start(flags):
    """Opens the data, then runs in as many processes as there are devices."""
    images = Data.open_pair(
        flags.data_tr,
        flags.data_val,
        staged=flags.staged,
        n_way=flags.train_n_way,
        n_shot=flags.train_n_shot,
        seed=flags.seed,
        image_decoder=flags.image_decoder,
        skip_bad_images=bool(flags.skip_bad_images),
        same_classes=bool(flags.fast_linear_probe) or flags.train_n_way != -1,
    )
    launch(run, flags.gpus, flags, *images)


def main(argv=None):
    """Trains as the command line says."""
    adopt_slurm_step()
    run_command(lambda: start(IO.parse_flags(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])

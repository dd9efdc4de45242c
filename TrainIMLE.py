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
import Flags
import IO
import LinearProbe
import Samplers
from Augmentation import normalize, transforms
from Models import (
    PRESETS,
    ModelConfig,
    build,
    completions,
    in_precision,
    masked_target,
    parameter_groups,
    reconstruction_loss,
)
from Utils import (
    RunError,
    Stopped,
    StopSignal,
    Stream,
    autocast,
    choose_dtype,
    fastest_dtype,
    from_first_process,
    join_processes,
    launch,
    learning_rate,
    mix_seeds,
    naming,
    random_uniform,
    run_command,
    say,
    sum_over_processes,
    world_size,
)
from Weights import PUBLISHED

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
    steps_per_epoch,
    batch_size,
    pooling,
    sampling,
    stepping,
    rates,
):
    """Trains the model on the loader's images by IMLE, from where `progress` stands. `validate` and
    `keeper`, which logs and saves, are told of every step and know what is due. pooling, sampling,
    stepping: keywords of the functions they go to, made in `loop_options`."""
    network = distributed(model)
    validate(model, progress)
    for epoch in range(progress.epoch, epochs):
        pool = Data.draw_pool(loader.images, images_per_epoch, epoch, **pooling)
        # Loads the pool's images; then IMLE: a code for each.
        codes = choose_pool_codes(model, pool, loader, progress, **sampling)
        place = {"step": progress.step, "done": len(progress.losses)}
        batches = Data.minibatches(pool, codes, steps_per_epoch, batch_size, **place)
        for batch in IO.watch(batches, "gradient steps", steps_per_epoch, unit="steps"):
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


def code_passes(model, prefix, images, seeds, codes_per_pass, numbers):
    """Completes images with the codes of these numbers (N,k), codes_per_pass at a time: yields
    predictions of the masked patches (N,k,M,P*P*3), losses (N,k) float32."""
    if images.device.type == "cpu":  # whose cache holds the activations of small passes
        values_per_code = prefix.positions.numel() * model.config.decoder_dim
        codes_per_pass = min(codes_per_pass, max(1, 2**21 // values_per_code))
    for part in numbers.split(codes_per_pass, dim=1):
        pred = model.suffix(prefix, model.numbered_codes(seeds, part))
        yield pred, image_losses(model, pred, images, prefix.mask)


def image_losses(model, pred, images, mask):
    """The loss that codes are chosen by and gradients are taken of: float32 (N,) or (N,K)."""
    return reconstruction_loss(pred, images, mask, model.config.norm_pix_loss).float()


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
    for rows, images, on_device in IO.watch(chunks, what, n, after_each=after_each):
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
# Validation: deterministic, by test transforms and by masks and codes that are the same every time.


@dataclass
class Examples:
    """Images to evaluate on, evenly spaced over a data set, with their loader and seeds."""

    loader: Data.ImageLoader
    indices: torch.Tensor  # (n,)
    seeds: torch.Tensor  # (n,)


def examples(images, count, *, transform, seed, **loading):
    """At most `count` images, evenly spaced, with seeds by their index alone."""
    indices = torch.arange(min(count, len(images))) * len(images) // max(1, min(count, len(images)))
    loader = Data.ImageLoader(images, transform, **loading)
    return Examples(loader, indices, mix_seeds(seed, Stream.EVALUATION, indices))


@torch.no_grad()
def evaluate(model, images, mask_noise, seeds, *, codes_per_image, codes_per_pass, mask_ratio):
    """(N, 4) for one chunk: loss averaged over codes, of the best code, without code; standard
    deviation of the completions over codes, averaged over masked values. codes_per_image=0: without
    codes only."""
    prefix = model.prefix(images, mask_noise, mask_ratio)
    plain = model.suffix(prefix, None).float()  # (N, M, P*P*3)
    plain_loss = image_losses(model, plain, images, prefix.mask)
    if not codes_per_image:
        return torch.stack(
            [plain_loss, plain_loss, plain_loss, torch.zeros_like(plain_loss)], dim=1
        )
    best, total = torch.full_like(plain_loss, math.inf), torch.zeros_like(plain_loss)
    first_moment, second_moment = torch.zeros_like(plain), torch.zeros_like(plain)
    numbers = torch.arange(codes_per_image, device=images.device).expand(len(images), -1)
    for pred, losses in code_passes(model, prefix, images, seeds, codes_per_pass, numbers):
        total += losses.sum(1)
        best = torch.minimum(best, torch.where(losses.isfinite(), losses, math.inf).min(1).values)
        # To the completion without code: small numbers, whose squares lose nothing.
        difference = pred.float() - plain[:, None]
        first_moment += difference.sum(1)
        second_moment += difference.square().sum(1)
    variance = second_moment / codes_per_image - (first_moment / codes_per_image).square()
    spread = variance.clamp(min=0).sqrt().mean((1, 2))
    return torch.stack([total / codes_per_image, best, plain_loss, spread], dim=1)


@dataclass
class Validation:
    """What is evaluated, chosen once. Called at every step, it validates, logs and draws when that
    is due: every steps_per_eval, before the first step and after the last; steps_per_eval=0:
    never."""

    record: IO.Run
    stop: StopSignal
    loss_examples: Examples
    picture_examples: dict  # name of the grid -> Examples
    probe: LinearProbe.FastProbe | None
    steps_per_eval: int
    last_step: int
    images_per_pass: int
    codes_per_image: int
    codes_per_pass: int
    codes_per_picture: int
    mask_ratio: float
    dtype: torch.dtype
    baseline: bool  # validate the starting point without codes, too

    def __call__(self, model, progress):
        step = progress.step
        due = self.steps_per_eval and (step % self.steps_per_eval == 0 or step == self.last_step)
        if not due or progress.validated == step:
            return
        start = time.perf_counter()
        values = self.validate(model, step, with_codes=model.code_dim > 0)
        if step == 0 and self.baseline:
            plain = self.validate(model, step, with_codes=False) if model.code_dim else values
            values |= {f"{key}_baseline": value for key, value in plain.items()}
        self.stop.check()  # which may have cut this validation short
        values["time/validation_seconds"] = time.perf_counter() - start
        progress.validated = step
        self.record.log(step, progress.epoch, values)
        self.record.draw_curves()
        say(summary(step, values))

    def validate(self, model, step, with_codes):
        """The metrics and pictures of one validation."""
        model = in_precision(model, self.dtype)
        values = self.losses(model, with_codes)
        if self.probe is not None:
            accuracy = self.probe(model)
            values["fast_linear_probe/acc_te"] = accuracy["top1"]
            values["fast_linear_probe/knn_te"] = accuracy["knn"]
        for name, chosen in self.picture_examples.items():
            values[f"images/{name}"] = self.picture(model, name, chosen, step, with_codes)
        return values

    def losses(self, model, with_codes):
        """Losses and spread over codes, each image evaluated by one process."""
        chosen, device = self.loss_examples, model.pos_embed.device
        rows_of_all = torch.zeros(len(chosen.indices), 4, device=device)
        chunks = chosen.loader.chunks(chosen.indices, chosen.seeds, self.images_per_pass)
        for rows, images in IO.watch(chunks, "validation", len(chosen.indices)):
            images, mask_noise, seeds = prepare(model, images, chosen.seeds[rows])
            rows_of_all[rows] = evaluate(
                model,
                images,
                mask_noise,
                seeds,
                codes_per_image=self.codes_per_image if with_codes else 0,
                codes_per_pass=self.codes_per_pass,
                mask_ratio=self.mask_ratio,
            )
        sum_over_processes(rows_of_all)
        names = ("loss_te", "loss_te_best", "loss_te_no_z", "code_spread")
        return {
            f"pretrain/{k}": v
            for k, v in zip(names, rows_of_all.double().mean(0).tolist(), strict=True)
        }

    @torch.no_grad()
    def picture(self, model, name, chosen, step, with_codes):
        """The grid of completions, on every process."""
        k = self.codes_per_picture if with_codes else 0
        device, (height, width) = model.pos_embed.device, model.config.image_size
        cells = torch.zeros(
            len(chosen.indices), 2 + max(1, k), 3, height, width, dtype=torch.uint8, device=device
        )
        for rows, images in chosen.loader.chunks(chosen.indices, chosen.seeds, 8):
            images, mask_noise, seeds = prepare(model, images, chosen.seeds[rows])
            codes = model.sample_codes(seeds, k) if k else None
            cells[rows] = completions(model, images, mask_noise, codes, self.mask_ratio)
        sum_over_processes(cells)
        headers = ["image", "masked", *([f"code {i + 1}" for i in range(k)] or ["completion"])]
        return IO.picture_grid(
            cells.cpu(), headers, caption(name, step, model.config.norm_pix_loss)
        )


def prepare(model, images, seeds):
    """uint8 images and int64 seeds from the host -> images normalised, mask noise and seeds on the
    model's device."""
    device = model.pos_embed.device
    mask_noise = random_uniform(mix_seeds(seeds, Stream.MASK), model.pos_embed.shape[1] - 1)
    return normalize(images.to(device, non_blocking=True)), mask_noise.to(device), seeds.to(device)


def caption(name, step, norm_pix_loss):
    """What a grid shows."""
    of = "training" if name.endswith("train") else "validation"
    text = f"Completions of {of} images after {step} gradient steps, visible patches pasted in."
    return text + IO.NORMALIZED if norm_pix_loss else text


def summary(step, values):
    """One line about a validation."""
    text = f"step {step}: validation loss {values['pretrain/loss_te']:.4f} mean over codes, "
    text += f"{values['pretrain/loss_te_best']:.4f} best, "
    text += f"{values['pretrain/loss_te_no_z']:.4f} without code"
    if "fast_linear_probe/acc_te" in values:
        text += f"; probe {values['fast_linear_probe/acc_te']:.3f}"
        text += f", k-NN {values['fast_linear_probe/knn_te']:.3f}"
    return f"{text} ({IO.duration(values['time/validation_seconds'])})"


# -------------------------------------------------------------------------------------------------
# Logging, saving, and putting it all together.


@dataclass
class Keeper:
    """Logs epochs and saves checkpoints when they are due."""

    record: IO.Run
    stop: StopSignal
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    flags: dict
    epochs: int
    save_minutes: float
    save_iter: int

    def __post_init__(self):
        self.started = self.epoch_started = time.monotonic()
        self.next_save = self.started + 60 * self.save_minutes
        self.epochs_here = 0  # since this process started

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
        self.next_save = time.monotonic() + 60 * self.save_minutes

    def try_to_save(self, progress, keep=False):
        """Saves, or says that it failed, and tries again a minute later."""
        try:
            self.save(progress, keep)
        except OSError as error:
            say(f"warning: no checkpoint could be saved ({error}); the next try is in a minute")
            self.next_save = time.monotonic() + min(60, 60 * self.save_minutes)

    def save_last(self, progress):
        """Saves as the run ends, on all processes together; a RunError where that fails."""
        try:
            self.save(progress)
        except OSError as error:
            raise RunError(f"the last checkpoint could not be saved: {error}") from None
        sum_over_processes(torch.zeros(()))  # none ends before it is written

    def after_step(self, progress):
        """Saves where save_minutes are over; a run that was asked to stop does it here."""
        self.stop.check()
        if time.monotonic() > self.next_save:
            self.try_to_save(progress)

    def after_epoch(self, progress, rates):
        """Logs the epoch that ends, and saves what is kept for good."""
        now = time.monotonic()
        values = {
            **progress.summary(),
            "pretrain/lr_mae": rates["mae"],
            "pretrain/lr_z": rates["z"],
            "time/epoch_seconds": now - self.epoch_started,
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
        text += f"; {IO.duration(now - self.epoch_started)}, {IO.duration(left)} left"
        say(text)
        self.epoch_started = now
        if self.save_iter > 0 and progress.epoch % self.save_iter == 0:
            self.try_to_save(progress, keep=True)


def distributed(model):
    """The model as gradient steps call it: gradients are averaged over the processes, if there are
    several."""
    return DistributedDataParallel(model) if world_size() > 1 else model


def learning_rates(step, *, lr, lr_z, min_lr, headstart, ramp, total, cycles):
    """{"mae", "z"}: the rates of the MAE's and of the injections' parameters for gradient step
    `step`; lengths in steps."""
    shape = {"minimum": min_lr, "ramp": ramp, "total": total, "cycles": cycles}
    return {
        "mae": learning_rate(step, base=lr, start=headstart, **shape),
        "z": learning_rate(step, base=lr_z, start=0, **shape),
    }


def make_validation(record, stop, flags, images_tr, images_val, device, dtype, loading, last_step):
    """The Validation that the flags ask for; refuses data that can't be probed. loading: keywords
    of ImageLoader."""
    size = tuple(flags.input_size)
    options = {"transform": transforms(size, flags.use_augs)[1], "seed": flags.seed, **loading}
    grids = {
        "pretrain_train": (images_tr, flags.ex_for_vis_tr),
        "pretrain_test": (images_val, flags.ex_for_vis_te),
    }
    probe = None
    if flags.fast_linear_probe and flags.steps_per_eval:
        probe = LinearProbe.fast_probe(flags, images_tr, images_val, size, device, **loading)
    return Validation(
        record,
        stop,
        loss_examples=examples(images_val, flags.ex_for_mse_loss, **options),
        picture_examples={k: examples(*what, **options) for k, what in grids.items() if what[1]},
        probe=probe,
        steps_per_eval=flags.steps_per_eval,
        last_step=last_step,
        images_per_pass=flags.eval_bs,
        codes_per_image=flags.z_per_ex_loss,
        codes_per_pass=flags.sp,
        codes_per_picture=flags.z_per_ex_vis,
        mask_ratio=flags.mask_ratio,
        dtype=dtype,
        baseline=bool(flags.get_mae_baseline),
    )


def make_model(flags, checkpoint):
    """The model that the flags ask for: with the checkpoint's weights, pretrained ones or fresh
    ones."""
    if checkpoint is not None:
        model = build(ModelConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model
    fields = Flags.model_fields(flags)
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
        "steps_per_epoch": flags.ipe,
        "batch_size": flags.mini_bs,
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
            "forecast": IO.Forecast(device, (flags.epochs - progress.epoch) * flags.ex_per_epoch),
            "stop": stop,
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
        scaler.load_state_dict(checkpoint["scaler"])
        for group, option in zip(optimizer.param_groups, options, strict=True):
            group.update(option)  # they may have been changed
    return optimizer, scaler


def run(flags, images_tr, images_val):
    """One process of a run: puts its parts together and trains."""
    device = join_processes(flags.gpus)
    flags = from_first_process(flags)  # one uid, where each process drew its own
    folder, checkpoint = IO.locate_run("TrainIMLE", flags)
    progress = Progress() if checkpoint is None else Progress(**checkpoint["progress"])
    dtype = choose_dtype(flags.sample_dtype, device)
    train_dtype = fastest_dtype(device) if flags.fp16 else torch.float32
    record, stop = IO.Run(folder, flags, checkpoint), StopSignal()
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
    with record, stop:
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
    run_command(lambda: start(Flags.parse_flags(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])

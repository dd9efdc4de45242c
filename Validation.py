"""Validation: deterministic, by test transforms and by masks and codes that are the same every
time."""

import math
import time
from dataclasses import dataclass

import torch

import Data
import LinearProbe
import Utils
from Augmentation import normalize, transforms
from internals import plots, runs
from internals.processes import StopSignal
from Models import completions, in_precision
from Samplers import code_passes, image_losses
from Utils import Stream, mix_seeds, random_uniform, say, sum_over_processes


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
    """Evaluates one chunk: (N, 4) with the loss averaged over codes, the loss of the best code, the
    loss without code, and the standard deviation of completions over codes, averaged over masked
    values. codes_per_image=0: evaluates without code only."""
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
    for codes in code_passes(model, prefix, seeds, numbers, codes_per_pass):
        pred = model.suffix(prefix, codes)  # (N, k, M, P*P*3)
        losses = image_losses(model, pred, images, prefix.mask)
        total += losses.sum(1)
        best = torch.minimum(best, torch.where(losses.isfinite(), losses, math.inf).min(1).values)
        # Differences to the prediction without code keep the variance precise.
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

    record: runs.Run
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
        try:
            self.record_validation(model, progress, start)
        finally:  # all time that has passed is added there with the next step, or the last save
            progress.seconds -= time.perf_counter() - start

    def record_validation(self, model, progress, start):
        """Validates, logs and draws; a Stopped where the run was asked to stop meanwhile."""
        step = progress.step
        values = self.validate(model, step, with_codes=model.code_dim > 0)
        if step == 0 and self.baseline:
            plain = self.validate(model, step, with_codes=False) if model.code_dim else values
            values |= {f"{key}_baseline": value for key, value in plain.items()}
        self.stop.check()  # which may have cut this validation short
        values["time/validation_seconds"] = time.perf_counter() - start
        values["time/training_seconds"] = progress.seconds
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
        for rows, images in Utils.watch(chunks, "validation", len(chosen.indices)):
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
        return plots.picture_grid(
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
    return text + plots.NORMALIZED if norm_pix_loss else text


def summary(step, values):
    """One line about a validation."""
    text = f"step {step}: validation loss {values['pretrain/loss_te']:.4f} mean over codes, "
    text += f"{values['pretrain/loss_te_best']:.4f} best, "
    text += f"{values['pretrain/loss_te_no_z']:.4f} without code"
    if "fast_linear_probe/acc_te" in values:
        text += f"; probe {values['fast_linear_probe/acc_te']:.3f}"
        text += f", k-NN {values['fast_linear_probe/knn_te']:.3f}"
    return f"{text} ({Utils.duration(values['time/validation_seconds'])})"


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

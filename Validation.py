"""What is measured and drawn during training. Every validation uses the same images, test
transforms, masks and codes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import Data
import Utils
from Augmentation import normalize
from internals import plots
from internals.encoders import NotFiniteError, check_finite, effective_rank
from internals.processes import StopSignal
from internals.runs import Run
from Models import completions, in_precision
from Samplers import code_passes, image_losses
from Utils import Stream, mix_seeds, random_uniform, say, sum_over_processes


@dataclass
class Examples:
    """Images to evaluate on, evenly spaced over a data set, with their loader and seeds."""

    loader: Data.ImageLoader
    indices: torch.Tensor  # (n,)
    seeds: torch.Tensor  # (n,)


def examples(images, count, transform, *, seed, num_workers=0, timeout=0, stopping=lambda: False):
    """At most `count` images, evenly spaced; their seeds depend on their indices alone. Further
    arguments: those of Data.ImageLoader."""
    count = min(count, len(images))
    indices = torch.arange(count) * len(images) // max(1, count)
    loader = Data.ImageLoader(
        images, transform, num_workers=num_workers, timeout=timeout, stopping=stopping
    )
    return Examples(loader, indices, mix_seeds(seed, Stream.EVALUATION, indices))


# The metrics that `evaluate` computes for each image. To add a metric of an image, name it here and
# return its values from `evaluate`: its mean over the images is logged, drawn and listed.
METRICS = ("loss_te", "loss_te_best", "loss_te_no_z", "code_spread")


@torch.no_grad()
def evaluate(model, images, mask_noise, seeds, *, codes_per_image, codes_per_pass, mask_ratio):
    """METRICS of one chunk, {name: (N,)}: the loss averaged over codes, the loss of the best code,
    the loss without code, and the standard deviation of completions over codes, averaged over the
    masked values. codes_per_image=0: all three losses are the loss without code."""
    prefix = model.prefix(images, mask_noise, mask_ratio)
    plain = model.suffix(prefix, None).float()  # (N, M, P*P*C)
    plain_loss = image_losses(model, plain, images, prefix.mask)
    if not codes_per_image:
        losses = dict.fromkeys(METRICS[:3], plain_loss)
        return {**losses, "code_spread": torch.zeros_like(plain_loss)}
    best, total = torch.full_like(plain_loss, math.inf), torch.zeros_like(plain_loss)
    first_moment, second_moment = torch.zeros_like(plain), torch.zeros_like(plain)
    numbers = torch.arange(codes_per_image, device=images.device).expand(len(images), -1)
    for codes in code_passes(model, prefix, seeds, numbers, codes_per_pass):
        pred = model.suffix(prefix, codes)  # (N, k, M, P*P*C)
        losses = image_losses(model, pred, images, prefix.mask)
        total += losses.sum(1)
        best = torch.minimum(best, torch.where(losses.isfinite(), losses, math.inf).min(1).values)
        # Differences to the prediction without code keep the variance precise.
        difference = pred.float() - plain[:, None]
        first_moment += difference.sum(1)
        second_moment += difference.square().sum(1)
    variance = second_moment / codes_per_image - (first_moment / codes_per_image).square()
    spread = variance.clamp(min=0).sqrt().mean((1, 2))
    return {
        "loss_te": total / codes_per_image,
        "loss_te_best": best,
        "loss_te_no_z": plain_loss,
        "code_spread": spread,
    }


@dataclass
class Validation:
    """Measures and draws with the same images, masks and codes every time."""

    run: Run
    stop: StopSignal
    loss_examples: Examples
    picture_examples: dict  # name of a grid -> Examples
    probes: dict  # name of a data set, "" of the run's own -> LinearProbe.FastProbe
    features: Callable  # model -> features (n, 1, C) for RankMe, where the probe "" is missing
    steps_per_eval: int  # gradient steps between validations; 0: never
    images_per_pass: int
    codes_per_image: int
    codes_per_pass: int
    codes_per_picture: int
    bands: Sequence  # channels that are drawn; see Augmentation.to_pictures
    mask_ratio: float
    dtype: torch.dtype
    baseline: bool  # also validates the starting point without codes

    def if_due(self, model, progress, *, last_step):
        """Validates, logs and draws if that is due: before the first step, every steps_per_eval
        steps, and after the last step. Raises Stopped if the run was asked to stop meanwhile."""
        step = progress.step
        due = self.steps_per_eval and (step % self.steps_per_eval == 0 or step == last_step)
        if not due or progress.validated == step:
            return
        start = time.perf_counter()
        try:
            values = self.validate(model, step, with_codes=model.code_dim > 0)
            if step == 0 and self.baseline:
                plain = self.validate(model, step, with_codes=False) if model.code_dim else values
                values |= {f"{key}_baseline": value for key, value in plain.items()}
            self.stop.check()  # a stop ends loading early: `values` are then incomplete
            values["time/validation_seconds"] = time.perf_counter() - start
            values["time/training_seconds"] = progress.seconds
            progress.validated = step
            self.run.log(step, progress.epoch, values)
            self.run.draw_curves_if_due()
            say(summary(step, values))
        finally:  # Keeper.count_time will add this time, which is not training time
            progress.seconds -= time.perf_counter() - start

    def validate(self, model, step, with_codes):
        """The metrics and pictures of one validation, by name."""
        model = in_precision(model, self.dtype)
        # To add a metric, add a number to `values`: it is logged, drawn and listed. The first
        # process logs its own number.
        values = self.losses(model, with_codes)
        try:
            values |= self.encoder_metrics(model)
        except NotFiniteError as error:
            say(f"warning: no probe after {step} gradient steps: {error}")
        for name, some_examples in self.picture_examples.items():
            values[f"images/{name}"] = self.picture(model, name, some_examples, step, with_codes)
        return values

    def encoder_metrics(self, model):
        """The accuracies of the probes, and RankMe; see `probes` and `features`."""
        results = {name: probe(model) for name, probe in self.probes.items()}
        values = {}
        for name, result in results.items():
            group = f"fast_linear_probe/{name}".removesuffix("/")
            values |= {f"{group}/acc_te": result["top1"], f"{group}/knn_te": result["knn"]}
        if "" in results:
            return values | {"pretrain/rankme": results[""]["rankme"]}
        features = self.features(model)[:, 0]
        check_finite(features, "validation")
        return values | {"pretrain/rankme": effective_rank(features)}

    def losses(self, model, with_codes):
        """The means of METRICS. Each image is evaluated by one process."""
        indices, all_seeds = self.loss_examples.indices, self.loss_examples.seeds
        values = torch.zeros(len(indices), len(METRICS), device=model.pos_embed.device)
        chunks = self.loss_examples.loader.chunks(indices, all_seeds, self.images_per_pass)
        for rows, images in Utils.watch(chunks, "validation", len(indices)):
            images, mask_noise, seeds = prepare(model, images, all_seeds[rows])
            metrics = evaluate(
                model,
                images,
                mask_noise,
                seeds,
                codes_per_image=self.codes_per_image if with_codes else 0,
                codes_per_pass=self.codes_per_pass,
                mask_ratio=self.mask_ratio,
            )
            values[rows] = torch.stack([metrics[name] for name in METRICS], dim=1)
        sum_over_processes(values)  # rows of other processes are zero: a gather
        means = values.double().mean(0).tolist()
        return {f"pretrain/{name}": mean for name, mean in zip(METRICS, means, strict=True)}

    @torch.no_grad()
    def picture(self, model, name, chosen, step, with_codes):
        """The grid of completions of the examples `chosen`, as a Pillow image, the same on all
        processes; None, with a warning, if it can't be drawn."""
        k = self.codes_per_picture if with_codes else 0
        device, (height, width) = model.pos_embed.device, model.config.image_size
        cells = torch.zeros(
            len(chosen.indices), 2 + max(1, k), 3, height, width, dtype=torch.uint8, device=device
        )
        for rows, images in chosen.loader.chunks(chosen.indices, chosen.seeds, 8):
            with plots.at_most_a_warning(f"a part of the picture {name}"):  # short of memory?
                images, mask_noise, seeds = prepare(model, images, chosen.seeds[rows])
                codes = model.sample_codes(seeds, k) if k else None
                cells[rows] = completions(
                    model, images, mask_noise, codes, self.mask_ratio, self.bands
                )
        sum_over_processes(cells)
        headers = ["image", "masked", *([f"code {i + 1}" for i in range(k)] or ["completion"])]
        text = caption(name, step, model.config.norm_pix_loss)
        with plots.at_most_a_warning(f"the picture {name}"):
            return plots.picture_grid(cells.cpu(), headers, text)


def prepare(model, images, seeds):
    """Moves a chunk to the model's device: uint8 or uint16 images (N,C,H,W), seeds (N,) ->
    normalised images, mask noise (N,L), seeds."""
    device, config = model.pos_embed.device, model.config
    mask_noise = random_uniform(mix_seeds(seeds, Stream.MASK), model.pos_embed.shape[1] - 1)
    images = normalize(images.to(device, non_blocking=True), config.mean, config.std)
    return images, mask_noise.to(device), seeds.to(device)


def caption(name, step, norm_pix_loss):
    """The text below a grid of completions."""
    of = "training" if name.endswith("train") else "validation"
    text = f"Completions of {of} images after {step} gradient steps, visible patches pasted in."
    return text + plots.NORMALIZED if norm_pix_loss else text


def summary(step, values):
    """One line about a validation."""
    text = f"step {step}: validation loss {values['pretrain/loss_te']:.4f} mean over codes, "
    text += f"{values['pretrain/loss_te_best']:.4f} best, "
    text += f"{values['pretrain/loss_te_no_z']:.4f} without code"
    for key in values:
        if (group := key.removesuffix("/acc_te")) != key:
            name = group.partition("/")[2]
            text += f"; {name + ': ' if name else ''}probe {values[key]:.3f}"
            text += f", k-NN {values[f'{group}/knn_te']:.3f}"
    return f"{text} ({Utils.duration(values['time/validation_seconds'])})"

"""Train a masked autoencoder, made implicit by latent codes, by Implicit Maximum Likelihood
Estimation (Li & Malik 2018).

In each epoch, `choose_codes` tries many codes for every image and chooses the code whose completion
is nearest to the image; gradient steps then use the chosen codes. Read `train` first, then
`choose_codes`. Letters in shapes: those of Models.py and Samplers.py."""

if __name__ == "__main__":
    from internals.startup import exit_on_interrupt

    exit_on_interrupt()

import dataclasses
import math
import sys
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

import Data
import IO
import LinearProbe
import Samplers
from Augmentation import normalize, transforms
from internals import runs
from internals.checkpoints import Checkpoints, Keeper, Progress, refuse_unknown
from internals.encoders import extract
from internals.processes import StopSignal, adopt_slurm_step, launch, run_command
from internals.runs import locate_run
from internals.weights import PUBLISHED
from Models import ModelConfig, build, in_precision, parameter_groups
from Samplers import code_passes, image_losses, sort_keys
from Utils import (
    Forecast,
    InputError,
    RunError,
    autocast,
    choose_dtype,
    fastest_dtype,
    from_first_process,
    join_processes,
    learning_rate,
    max_over_processes,
    naming,
    say,
    sum_over_processes,
    total_memory,
    watch,
    world_size,
)
from Validation import Validation, examples

# -------------------------------------------------------------------------------------------------
# The algorithm.


# fmt: off
def train(flags, model, optimizer, scaler, loader, validation, keeper, *, sample_dtype, step_dtype):
    """Trains the model by IMLE on the loader's images, from where keeper.progress stands.
    sample_dtype, step_dtype: precision of sampling and of gradient steps."""
    progress, device = keeper.progress, model.pos_embed.device
    network = model if world_size() == 1 else DistributedDataParallel(model)
    last_step = progress.last_step(flags.epochs, flags.ipe)
    rates = partial(
        learning_rates, lr=flags.lr, lr_z=flags.lr_z, min_lr=flags.min_lr,
        headstart=flags.headstart_z * flags.ipe, ramp=flags.n_ramp * flags.ipe, total=last_step,
        cycles=flags.n_cycles if flags.scheduler == "linear_ramp_cosine_decay" else 0,
    )
    forecast = Forecast(device, (flags.epochs - progress.epoch) * flags.ex_per_epoch)
    validation.if_due(model, progress, last_step=last_step)
    for epoch in range(progress.epoch, flags.epochs):
        pool = Data.draw_pool(
            loader.images, flags.ex_per_epoch, epoch, n_patches=model.pos_embed.shape[1] - 1,
            seed=flags.seed, shuffle=flags.shuffle_data, fix_mask_noise=flags.fix_mask_noise,
        )
        if model.code_dim:  # IMLE: the best of ns codes for each image
            choose_pool_codes(
                model, pool, loader, keeper, forecast, dtype=sample_dtype,
                codes_per_image=flags.ns, images_per_pass=flags.code_bs, codes_per_pass=flags.sp,
                tries=flags.tries if flags.sampler == "surrogate" else None,
                rs_epsilon=flags.rs_epsilon,
                mask_ratio=flags.mask_ratio, predict_ratio=flags.predict_ratio,
            )
        batches = Data.minibatches(
            pool, loader, device, steps=flags.ipe, size=flags.mini_bs, code_numbers=progress.codes,
            step=progress.step, done=progress.epoch_step,
        )
        for batch in watch(batches, "gradient steps", flags.ipe, unit="steps"):
            metrics = train_step(
                network, batch, optimizer, scaler, rates(progress.step), dtype=step_dtype,
                images_per_step=flags.mini_bs, parts=flags.accum, clip_grad=flags.clip_grad,
                mae_loss_weight=flags.mae_loss_weight,
                mask_ratio=flags.mask_ratio, predict_ratio=flags.predict_ratio,
            )
            progress.step_done(metrics)
            keeper.after_step()
            validation.if_due(model, progress, last_step=last_step)
        keeper.after_epoch(
            *end_epoch(progress, rates(progress.step - 1)), epochs=flags.epochs,
            keep=flags.save_iter > 0 and (epoch + 1) % flags.save_iter == 0,
        )


# fmt: on
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
    rs_epsilon=0.0,
    prefix=None,
):
    """IMLE's choice (Li & Malik 2018): for each image, of codes_per_image codes from the prior, the
    code whose completion is nearest to the image. rs_epsilon: see Samplers.sort_keys; prefix:
    model.prefix of the images, if it is computed already.

    images (N,C,H,W) normalised, mask_noise (N,L), seeds (N,) int64 -> chosen codes (N,D), their
    numbers (N,) int64 in the seeds' sequences, their losses (N,), the mean loss over codes (N,)."""
    if prefix is None:  # the network up to the first injection, once per image
        prefix = model.prefix(images, mask_noise, mask_ratio, predict_ratio)
    numbers = torch.arange(codes_per_image, device=images.device).expand(len(images), -1)  # (N, S)
    losses = []
    for codes in code_passes(model, prefix, seeds, numbers, codes_per_pass):
        pred = model.suffix(prefix, codes)  # (N, k, M, P*P*C)
        losses.append(image_losses(model, pred, images, prefix.mask))
    losses = torch.cat(losses, dim=1)  # (N, S)
    chosen = sort_keys(losses, rs_epsilon).argmin(dim=1, keepdim=True)  # (N, 1)
    codes = model.numbered_codes(seeds, chosen)
    return codes[:, 0], chosen[:, 0], losses.gather(1, chosen)[:, 0], losses.mean(1)


# In float16, gradients that overflow make the scaler skip the step and halve the loss's scale. Once
# the scale is this low, gradients that overflow end the run.
LEAST_SCALE = 2**-4


def train_step(
    network,
    batch,
    optimizer,
    scaler,
    rates,
    *,
    images_per_step,
    parts=1,
    dtype=torch.float32,
    mae_loss_weight=1.0,
    mask_ratio=0.75,
    predict_ratio=1.0,
    clip_grad=0.0,
):
    """One gradient step on this process's share of a minibatch, computed in `parts` parts. The loss
    is the mean over the minibatch of: loss with the chosen code + mae_loss_weight * loss without
    code. Returns the step's metrics. A RunError, before the update, if loss or gradients are not
    finite (in float16 see LEAST_SCALE).

    rates: {"mae", "z"}, learning rates of the parameter groups; images_per_step: the minibatch's
    images, over all processes."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]]
    optimizer.zero_grad()
    model = getattr(network, "module", network)  # inside DistributedDataParallel
    device = model.pos_embed.device
    totals = torch.zeros(2, device=device)  # with the chosen code, without code
    shares = batch.split(parts)
    for share in shares:
        # DDP averages gradients over processes inside `backward`: only the last part needs that.
        skip_average = share is not shares[-1] and network is not model
        with network.no_sync() if skip_average else nullcontext():
            with autocast(device, dtype):
                losses = step_losses(
                    network,
                    model,
                    share,
                    also_without_code=mae_loss_weight > 0,
                    mask_ratio=mask_ratio,
                    predict_ratio=predict_ratio,
                )
            sums = losses.sum(0) / images_per_step  # (1,) or (2,)
            loss = sums[0] if len(sums) == 1 else sums[0] + mae_loss_weight * sums[1]
            scaler.scale(loss * world_size()).backward()  # DDP averages over processes
        totals[: len(sums)] += sums.detach()
    sum_over_processes(totals)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    if clip_grad:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_grad, norm)
    # The step's only wait for the device.
    loss, loss_without_code, norm = torch.stack([*totals, norm]).tolist()
    check_finite(batch, loss + loss_without_code, norm, scaler)
    scaler.step(optimizer)
    scaler.update()
    # To log another metric of a step, add a number here: its mean over the epoch's steps is logged.
    # The first process logs its own number: sum over processes first if each computes a share.
    metrics = {"pretrain/loss_tr": loss}
    if len(sums) == 2:
        metrics["pretrain/loss_tr_no_z"] = loss_without_code
    if math.isfinite(norm):
        metrics["pretrain/grad_norm"] = norm
    return metrics


def step_losses(network, model, share, *, also_without_code, mask_ratio, predict_ratio):
    """The losses of a gradient step on the n images of a Batch, from one pass of the encoder: (n,
    2), with the chosen code and without code; (n, 1) of a plain MAE, or with the code alone."""
    device = model.pos_embed.device
    images, codes = normalize(share.images, model.config.mean, model.config.std), None
    if share.code_numbers is not None:
        seeds = share.seeds.to(device, non_blocking=True)
        numbers = share.code_numbers.to(device, non_blocking=True)
        codes = model.numbered_codes(seeds, numbers[:, None])  # (n, 1, D)
    pred, mask = network(
        images,
        share.mask_noise.to(device, non_blocking=True),
        codes,
        mask_ratio,
        predict_ratio=predict_ratio,
        masked_only=True,
        also_without_code=also_without_code,
    )
    return image_losses(model, pred, images, mask).view(len(images), -1)


def check_finite(batch, loss, norm, scaler):
    """Refuses a training loss or a gradient's norm that is not finite, with the images' names."""
    may_overflow = scaler.is_enabled() and scaler.get_scale() > LEAST_SCALE
    for what, value in (("loss", loss), ("gradient's norm", 0.0 if may_overflow else norm)):
        if not math.isfinite(value):
            text = f"after {batch.step} gradient steps the training {what} is {value}"
            names = "\n  ".join(batch.names())
            raise RunError(f"{text}; no update was made. Its images:\n  {names}")


# -------------------------------------------------------------------------------------------------
# An epoch's codes.


def choose_pool_codes(
    model,
    pool,
    loader,
    keeper,
    forecast,
    *,
    dtype,
    codes_per_image,
    images_per_pass,
    codes_per_pass,
    tries,
    rs_epsilon,
    mask_ratio,
    predict_ratio,
):
    """Chooses a code for each image of the pool that has none yet, and stores its number and losses
    in keeper.progress. After each chunk of images_per_pass images, saves or stops the run if due.

    tries: codes that the surrogate tries; None: all codes are tried. dtype: precision."""
    progress, device = keeper.progress, model.pos_embed.device
    restore_codes(progress, model, pool, codes_per_image)
    missing = (progress.codes < 0).nonzero()[:, 0]
    if not len(missing) and progress.epoch_metrics:  # a resumed run whose codes are all chosen
        return
    choose = choose_codes
    if tries is not None:
        choose = partial(Samplers.choose_codes_surrogate, tries=tries)
    choose = partial(
        choose,
        codes_per_image=codes_per_image,
        codes_per_pass=codes_per_pass,
        rs_epsilon=rs_epsilon,
    )
    start, fast_model = time.perf_counter(), in_precision(model, dtype)
    numbers, losses = progress.codes.to(device), progress.code_losses.to(device)
    chunks = loader.chunks(pool.indices[missing], pool.seeds[missing], images_per_pass)
    chunks = watch(Data.copied(chunks, device), "sampling codes", len(missing), after_each=forecast)
    # Every process has at least so many chunks. All processes must call wants_to_save together.
    common_chunks = -(-len(missing) // images_per_pass) // world_size()
    for n_done, (part, images) in enumerate(chunks, 1):
        rows = missing[part]
        images = normalize(images, model.config.mean, model.config.std)
        host = pool.mask_noise(rows), pool.seeds[rows], rows
        mask_noise, seeds, rows = (x.to(device, non_blocking=True) for x in host)
        chosen = choose_chunk_codes(
            fast_model, images, mask_noise, seeds, choose, mask_ratio, predict_ratio
        )
        numbers[rows], losses[rows] = chosen
        if n_done <= common_chunks and keeper.wants_to_save():
            progress.codes, progress.code_losses = gathered(numbers, losses)
            keeper.after_step()
    progress.codes, progress.code_losses = gathered(numbers, losses)
    seconds = time.perf_counter() - start
    best, mean, plain = progress.code_losses.double().mean(0).tolist()
    # To log another metric of an epoch, add a line here.
    progress.epoch_metrics = {
        "sampling/first_losses": mean,
        "sampling/end_losses": best,
        "sampling/delta_wrt_no_z": best - plain,
        "sampling/codes_per_sec": len(missing) * codes_per_image / seconds,
    }


@torch.no_grad()
def choose_chunk_codes(model, images, mask_noise, seeds, choose, mask_ratio, predict_ratio):
    """The numbers (N,) of one chunk's chosen codes, and three losses of each image (N, 3): of the
    chosen code, averaged over codes, without code. choose: choose_codes, with options filled in."""
    prefix = model.prefix(images, mask_noise, mask_ratio, predict_ratio)
    _, numbers, best, mean = choose(model, images, mask_noise, seeds, prefix=prefix)
    plain = image_losses(model, model.suffix(prefix, None), images, prefix.mask)
    losses = torch.stack([best, mean, plain], dim=1)
    return numbers, torch.where(losses.isnan(), math.inf, losses)  # `gathered` can't compare NaN


def restore_codes(progress, model, pool, codes_per_image):
    """Makes sure that progress holds a code number and losses for each image: -1 and -inf where no
    code is chosen yet. Finds the numbers if a checkpoint of version 0.1.0 gave codes instead."""
    n = len(pool.indices)
    if progress.codes is None:
        progress.codes = torch.full((n,), -1)
        progress.code_losses = torch.full((n, 3), -math.inf)
    elif progress.codes.ndim == 2:
        seeds = pool.seeds.to(model.pos_embed.device)
        progress.codes = Samplers.find_numbers(model, seeds, progress.codes, codes_per_image)


def gathered(*tensors):
    """The tensors on the CPU, merged over processes: each row comes from the process that has
    chosen its code, as the other processes hold lower values there."""
    max_over_processes(*tensors)
    return [tensor.cpu() for tensor in tensors]


# -------------------------------------------------------------------------------------------------
# Putting it all together.


def end_epoch(progress, rates):
    """Ends an epoch. Returns its metrics, and a line of text about them."""
    skipped = progress.epoch_step - progress.counts.get("pretrain/grad_norm", 0)
    metrics = progress.epoch_done()
    line = f"loss {metrics['pretrain/loss_tr']:.4f}"
    if "sampling/end_losses" in metrics:
        line += f"; codes {metrics['sampling/first_losses']:.4f} mean, "
        line += f"{metrics['sampling/end_losses']:.4f} best, "
        line += f"{metrics['sampling/codes_per_sec']:,.0f}/s"
    metrics["pretrain/skipped_steps"] = skipped  # gradients overflowed in float16
    metrics |= {"pretrain/lr_mae": rates["mae"], "pretrain/lr_z": rates["z"]}
    return metrics, line


def learning_rates(step, *, lr, lr_z, min_lr, headstart, ramp, total, cycles):
    """{"mae", "z"}: the learning rates of the MAE's and of the injections' parameters for gradient
    step `step`. headstart, ramp, total: numbers of steps; the MAE's rate is 0 during headstart."""
    shape = {"minimum": min_lr, "ramp": ramp, "total": total, "cycles": cycles}
    return {
        "mae": learning_rate(step, base=lr, start=headstart, **shape),
        "z": learning_rate(step, base=lr_z, start=0, **shape),
    }


def make_model(flags, checkpoint, measure):
    """The model that the flags ask for, with pretrained or fresh weights. With a checkpoint: a
    model of the checkpoint's config, with fresh weights. measure() gives the mean and std of images
    where neither flags, nor weights, nor ImageNet do."""
    if checkpoint is not None:  # `go_on` restores the weights
        with naming("the newest checkpoint"):
            refuse_unknown(checkpoint["config"], vars(ModelConfig()), "its model")
            return build(ModelConfig(**checkpoint["config"]))
    fields = IO.model_fields(flags)
    if not flags.finetune:
        is_known = "mean" in fields or flags.channels == 3
        return build(ModelConfig(**fields, **({} if is_known else measure())))
    with naming("--mae_weights" if flags.mae_weights else "--finetune 1"):
        return IO.load_model(flags.mae_weights or PUBLISHED[flags.arch], measure=measure, **fields)


def check_surrogate(model, images_per_pass, codes_per_image, tries):
    """An InputError if the surrogate needs more memory than the model's device has."""
    device = model.pos_embed.device
    processes = world_size() if device.type == "cpu" else 1  # which share the memory
    needed = Samplers.surrogate_memory(model, images_per_pass, codes_per_image, tries) * processes
    total = total_memory(device)
    if needed > total:
        fits = images_per_pass * total // needed
        raise InputError(
            f"--ns {codes_per_image}: --sampler surrogate keeps {tries} completions of each image "
            f"of a pass, --code_bs {images_per_pass}, and compares all codes with each other: "
            f"about {needed / 2**30:,.0f} GB, but there are {total / 2**30:,.0f} GB; "
            + (f"use --code_bs {fits} or less" if fits else "lower --ns")
        )


def make_validation(flags, record, stop, images_tr, images_val, probe_pairs, device, dtype):
    """The Validation that the flags ask for; an InputError for data that can't be probed."""
    size, seed = tuple(flags.input_size), flags.seed
    transform = transforms(size, flags.use_augs)[1]
    loading = {
        "num_workers": flags.num_workers,
        "timeout": flags.loader_timeout,
        "stopping": stop.asked,
    }
    grids = {
        "pretrain_train": (images_tr, flags.ex_for_vis_tr),
        "pretrain_test": (images_val, flags.ex_for_vis_te),
    }
    pool, n_codes = "mean" if flags.global_pool else "cls", 0 if flags.probe_ignore_z else 1
    loss_examples = examples(images_val, flags.ex_for_mse_loss, transform, seed=seed, **loading)
    features = partial(
        extract,
        loader=loss_examples.loader,
        indices=loss_examples.indices,
        seeds=loss_examples.seeds,
        device=device,
        batch_size=flags.probe_bs_val,
        parts=(pool,),
        n_codes=n_codes,
    )
    return Validation(
        record,
        stop,
        loss_examples=loss_examples,
        picture_examples={
            name: examples(images, count, transform, seed=seed, **loading)
            for name, (images, count) in grids.items()
            if count
        },
        probes=make_probes(flags, images_tr, images_val, probe_pairs, device, stop, pool, n_codes),
        features=features,
        steps_per_eval=flags.steps_per_eval,
        images_per_pass=flags.eval_bs,
        codes_per_image=flags.z_per_ex_loss,
        codes_per_pass=flags.sp,
        codes_per_picture=flags.z_per_ex_vis,
        bands=flags.show_bands or (),
        mask_ratio=flags.mask_ratio,
        dtype=dtype,
        baseline=bool(flags.get_mae_baseline),
    )


def make_probes(flags, images_tr, images_val, probe_pairs, device, stop, pool, n_codes):
    """The fast probes of a Validation, {name of the data set: FastProbe}; "" is the run's own data.
    probe_pairs: see Data.open_probe_pairs; pool, n_codes: see FastProbe."""
    make_probe = partial(
        LinearProbe.FastProbe,
        image_size=tuple(flags.input_size),
        device=device,
        n_way=flags.val_n_way,
        n_shot=flags.val_n_shot,
        augs_per_image=flags.probe_augs_per_image,
        use_augs=bool(flags.use_augs),
        images_per_pass=flags.probe_bs_val,
        pool=pool,
        n_codes=n_codes,
        lr=flags.probe_lr,
        epochs=flags.probe_epochs,
        batch_size=flags.probe_bs,
        seed=flags.seed,
        num_workers=flags.num_workers,
        loader_timeout=flags.loader_timeout,
        stopping=stop.asked,
    )
    probes = {}
    if flags.fast_linear_probe and flags.steps_per_eval:
        if len(images_tr.classes) > 1:
            probes[""] = make_probe(images_tr, images_val)
        else:
            say("note: no probe on the training images: all are of one class, or without classes")
    for name, pair in probe_pairs.items() if flags.steps_per_eval else ():
        with naming(f"--probe_data {name}: TRAIN"):
            probes[name] = make_probe(*pair, title=f"the probe on {name}")
    return probes


def make_optimizer(model, *, weight_decay, betas):
    """AdamW over the groups of Models.parameter_groups."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def run(flags, images_tr, images_val, probe_pairs):
    """One process of a run: puts its parts together and trains. probe_pairs: see
    Data.open_probe_pairs."""
    device = join_processes(flags.gpus)
    flags = from_first_process(flags)  # under torchrun, each process has drawn another uid
    data = Data.fingerprints(images_tr, images_val)
    run_start = locate_run(
        "TrainIMLE",
        flags,
        data=data,
        changeable=IO.changeable_flags(IO.training_parser()),
        architecture=IO.architecture_flags(),
    )
    sample_dtype = choose_dtype(flags.sample_dtype, device)
    step_dtype = fastest_dtype(device) if flags.fp16 else torch.float32
    record, stop = runs.Run(run_start, vars(flags), wandb=flags.wandb), StopSignal()
    validation = make_validation(
        flags, record, stop, images_tr, images_val, probe_pairs, device, sample_dtype
    )
    loader = Data.ImageLoader(
        images_tr,
        transforms(tuple(flags.input_size), flags.use_augs)[0],
        num_workers=flags.num_workers,
        timeout=flags.loader_timeout,
        persistent=True,
        pin_memory=device.type == "cuda",
    )

    measure = partial(
        Data.measure_channels,
        images_tr,
        transforms(tuple(flags.input_size), flags.use_augs)[1],
        seed=flags.seed,
        num_workers=flags.num_workers,
        timeout=flags.loader_timeout,
    )
    torch.manual_seed(flags.seed)
    model = make_model(flags, run_start.checkpoint, measure).to(device)
    if flags.sampler == "surrogate":
        check_surrogate(model, min(flags.code_bs, flags.ex_per_epoch), flags.ns, flags.tries)
    optimizer = make_optimizer(model, weight_decay=flags.wd, betas=(flags.beta1, flags.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=step_dtype == torch.float16)
    progress = Progress()
    checkpoints = Checkpoints(
        run_start.folder,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        progress=progress,
        config=dataclasses.asdict(model.config),
        args=vars(flags),
        data=data,
    )
    if run_start.path:
        go_on(run_start, checkpoints, optimizer, progress)
        run_start = run_start._replace(checkpoint=None)  # gives the memory back
    keeper = Keeper(record, checkpoints, progress, stop, save_minutes=flags.save_minutes)
    with stop, record, keeper.saving_at_the_end():
        step, folder = progress.step, run_start.folder
        say(f"going on after step {step} in {folder}" if run_start.path else f"new: {folder}")
        train(
            flags,
            model,
            optimizer,
            scaler,
            loader,
            validation,
            keeper,
            sample_dtype=sample_dtype,
            step_dtype=step_dtype,
        )
    say(f"done: {run_start.folder}")


def go_on(run_start, checkpoints, optimizer, progress):
    """Restores the parts of a run from its checkpoint. The optimizer's weight_decay and betas stay
    those of the flags; codes that were chosen under other flags, or for other images, are
    dropped."""
    options = [
        {name: group[name] for name in ("weight_decay", "betas")}
        for group in optimizer.param_groups
    ]
    checkpoints.restore(run_start.checkpoint)
    for group, group_options in zip(optimizer.param_groups, options, strict=True):
        group.update(group_options)
    if run_start.changed:
        progress.forget_codes()


def start(flags):
    """Opens the data, then runs in as many processes as there are devices."""
    opening = {
        "staged": flags.staged,
        "image_decoder": flags.image_decoder,
        "skip_bad_images": bool(flags.skip_bad_images),
        "channels": flags.channels,
    }
    images = Data.open_pair(
        flags.data_tr,
        flags.data_val,
        n_way=flags.train_n_way,
        n_shot=flags.train_n_shot,
        seed=flags.seed,
        same_classes=bool(flags.fast_linear_probe) or flags.train_n_way != -1,
        **opening,
    )
    probe_pairs = Data.open_probe_pairs(IO.probe_paths(flags.probe_data), **opening)
    launch(run, flags.gpus, flags, *images, probe_pairs)


def main(argv=None):
    """Trains as the command line says."""
    adopt_slurm_step()
    run_command(lambda: start(IO.parse_flags(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])

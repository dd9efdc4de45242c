"""Passes of codes, the loss by which codes are chosen, and the surrogate, which chooses among many
codes but tries only some of them. Pure tensors in and out.

Letters in shapes: N images, S codes per image, k of these, Q predicted values."""

import math

import torch

from Models import masked_target, reconstruction_loss


def code_passes(model, prefix, seeds, numbers, codes_per_pass):
    """Yields the codes (N, k, D) with the numbers (N, S) in the sequences of seeds (N,), in passes
    of k = codes_per_pass codes per image. `prefix`: model.prefix of the images."""
    if numbers.device.type == "cpu":  # small passes: their activations fit the CPU's cache
        values_per_code = prefix.positions.numel() * model.config.decoder_dim
        codes_per_pass = min(codes_per_pass, max(1, 2**21 // values_per_code))
    for part in numbers.split(codes_per_pass, dim=1):
        yield model.numbered_codes(seeds, part)


def image_losses(model, pred, images, mask):
    """Models.reconstruction_loss in float32, (N,) or (N, K): the loss by which codes are chosen and
    of which gradients are taken."""
    return reconstruction_loss(pred, images, mask, model.config.norm_pix_loss).float()


def sort_keys(losses, rs_epsilon=0.0):
    """Sort keys of losses (N, k): the lowest wins. Losses that are not finite become inf. Losses
    below rs_epsilon come after all other finite ones, the highest first (RS-IMLE, Vashist et al.
    2024: training rejects samples nearer than epsilon, to see codes like those of inference)."""
    losses = torch.where(losses.isfinite(), losses, math.inf).double()
    return torch.where(losses < rs_epsilon, 1e9 - losses, losses)


# -------------------------------------------------------------------------------------------------
# The surrogate.


@torch.no_grad()
def choose_codes_surrogate(
    model,
    images,
    mask_noise,
    seeds,
    *,
    codes_per_image,
    codes_per_pass,
    tries,
    mask_ratio=0.75,
    predict_ratio=1.0,
    rs_epsilon=0.0,
    prefix=None,
):
    """Like TrainIMLE.choose_codes, but tries only `tries` of the codes: a third of the tries take
    the first codes, then rounds of a sixth take the codes with the lowest predicted losses. The
    mean loss is over the first third."""
    if prefix is None:
        prefix = model.prefix(images, mask_noise, mask_ratio, predict_ratio)
    numbers = torch.arange(codes_per_image, device=images.device).expand(len(images), -1)  # (N, S)
    features = model.code_features(model.numbered_codes(seeds, numbers)).float()  # (N, S, F)
    kernel = features @ features.transpose(1, 2)  # (N, S, S)

    n_first, per_round = max(1, tries // 3), max(1, tries // 6)
    tried = numbers[:, :n_first]
    residuals, losses = try_codes(model, prefix, images, seeds, tried, codes_per_pass)
    while (left := tries - tried.shape[1]) > 0:
        following = most_promising(kernel, tried, residuals, min(left, per_round), rs_epsilon)
        results = try_codes(model, prefix, images, seeds, following, codes_per_pass)
        tried = torch.cat([tried, following], dim=1)  # (N, k)
        residuals = torch.cat([residuals, results[0]], dim=1)  # (N, k, Q)
        losses = torch.cat([losses, results[1]], dim=1)  # (N, k)

    best = sort_keys(losses, rs_epsilon).argmin(dim=1, keepdim=True)  # (N, 1)
    chosen = tried.gather(1, best)
    codes = model.numbered_codes(seeds, chosen)
    return codes[:, 0], chosen[:, 0], losses.gather(1, best)[:, 0], losses[:, :n_first].mean(1)


def try_codes(model, prefix, images, seeds, numbers, codes_per_pass):
    """Residuals (N, k, Q), prediction minus target, and losses (N, k) of the codes with the numbers
    (N, k) in the sequences of seeds (N,)."""
    residuals, losses = [], []
    for codes in code_passes(model, prefix, seeds, numbers, codes_per_pass):
        pred = model.suffix(prefix, codes)  # (N, k, M, P*P*3)
        target = masked_target(images, prefix.mask, pred, model.config.norm_pix_loss)
        residuals.append((pred - target).flatten(2))
        losses.append(image_losses(model, pred, images, prefix.mask))
    return torch.cat(residuals, dim=1), torch.cat(losses, dim=1)


def most_promising(kernel, tried, residuals, count, rs_epsilon=0.0):
    """The numbers (N, count) of the codes with the lowest predicted losses that are not yet among
    the tried ones (N, k). Other arguments as of predicted_losses."""
    keys = sort_keys(predicted_losses(kernel, tried, residuals), rs_epsilon)
    keys = keys.clamp(max=1e18).scatter(1, tried, math.inf)  # inf is left for tried codes alone
    return keys.topk(count, dim=1, largest=False).indices


def predicted_losses(kernel, tried, residuals, ridge=0.1):
    """The squared error (N, S) of every code, if its completion is a weighted sum of the tried
    codes' completions, with the weights of kernel ridge regression (Saunders et al. 1998) around
    their mean.

    kernel (N, S, S) of the codes' features; tried (N, k): numbers of the tried codes; residuals
    (N, k, Q): their predictions minus the target; ridge: share of the tried codes' mean squared
    distance from their mean."""
    n, k = tried.shape
    columns = tried[:, None].expand(-1, k, -1)
    rows = kernel.gather(1, tried[:, :, None].expand(-1, -1, kernel.shape[2]))  # (N, k, S)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - rows.gather(2, columns).mean(2, keepdim=True)
    among = rows.gather(2, columns)  # (N, k, k)
    ridge = ridge * among.diagonal(dim1=1, dim2=2).mean(1)[:, None] + 1e-12
    among = among + torch.diag_embed(ridge.expand(-1, k))
    weights = torch.linalg.solve_ex(among, rows)[0]  # (N, k, S); `solve` would wait for the device
    weights = weights + (1 - weights.sum(1, keepdim=True)) / k
    errors = residuals @ residuals.transpose(1, 2) / residuals.shape[2]  # (N, k, k)
    return (weights * (errors @ weights)).sum(1)


def find_numbers(model, seeds, codes, codes_per_image):
    """The numbers (N,) of codes (N,D) among each image's first codes_per_image; seeds (N,)."""
    found = []
    for part, part_codes in zip(seeds.split(32), codes.to(seeds.device).split(32), strict=True):
        candidates = model.sample_codes(part, codes_per_image)  # (n, S, D)
        found.append((candidates - part_codes[:, None]).abs().sum(2).argmin(1))
    return torch.cat(found).cpu()

"""Passes of codes, the loss by which codes are chosen, and the surrogate, which chooses among many
codes but tries only some of them. Pure tensors in and out.

Letters in shapes: those of Models.py; S codes per image to choose from, k of these (those of one
pass, or those tried so far), Q predicted values of an image."""

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
    """Like TrainIMLE.choose_codes, but tries only `tries` of the codes: first a third of `tries`,
    the first codes of the sequence; then, in rounds of a sixth, the codes with the lowest predicted
    losses. The mean loss is over the first third only."""
    if prefix is None:
        prefix = model.prefix(images, mask_noise, mask_ratio, predict_ratio)
    numbers = torch.arange(codes_per_image, device=images.device).expand(len(images), -1)  # (N, S)
    features = model.code_features(model.numbered_codes(seeds, numbers)).float()  # (N, S, F)
    kernel = features @ features.transpose(1, 2)  # (N, S, S)

    n_first, per_round = max(1, tries // 3), max(1, tries // 6)
    tried = numbers[:, :n_first]
    residuals, losses = try_codes(model, prefix, images, seeds, tried, codes_per_pass)
    while (left := tries - tried.shape[1]) > 0:
        n_next = min(left, per_round)
        next_tried = most_promising(kernel, tried, residuals, n_next, rs_epsilon)  # (N, n_next)
        results = try_codes(model, prefix, images, seeds, next_tried, codes_per_pass)
        tried = torch.cat([tried, next_tried], dim=1)  # (N, k)
        residuals = torch.cat([residuals, results[0]], dim=1)  # (N, k, Q)
        losses = torch.cat([losses, results[1]], dim=1)  # (N, k)

    best = sort_keys(losses, rs_epsilon).argmin(dim=1, keepdim=True)  # (N, 1)
    chosen = tried.gather(1, best)
    codes = model.numbered_codes(seeds, chosen)
    return codes[:, 0], chosen[:, 0], losses.gather(1, best)[:, 0], losses[:, :n_first].mean(1)


def surrogate_memory(model, n_images, codes_per_image, tries):
    """About how many bytes choose_codes_surrogate needs at most: for codes, their features, the
    kernel and what predicted_losses makes of it, and twice for residuals, as `cat` copies them."""
    code = torch.zeros(1, 1, model.code_dim, device=model.pos_embed.device)
    n_features = model.code_features(code).shape[2]
    values_per_code = model.code_dim + n_features + 2 * codes_per_image
    residual = model.pos_embed.shape[1] * model.decoder_pred.out_features
    return 4 * n_images * (codes_per_image * values_per_code + 2 * tries * residual)


def try_codes(model, prefix, images, seeds, numbers, codes_per_pass):
    """Runs the network with the codes that have the numbers (N, k) in the sequences of seeds (N,).
    Returns residuals (N, k, Q), prediction minus target, and losses (N, k)."""
    residuals, losses = [], []
    for codes in code_passes(model, prefix, seeds, numbers, codes_per_pass):
        pred = model.suffix(prefix, codes)  # (N, k, M, P*P*C)
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
    """Predicts the loss (N, S) of every code. Kernel ridge regression (Saunders et al. 1998)
    predicts a code's completion: a weighted sum of the tried codes' completions. The predicted loss
    is the mean squared error of this sum.

    kernel (N, S, S) of the codes' features; tried (N, k): numbers of the tried codes; residuals
    (N, k, Q): their predictions minus the target; ridge: the regularisation, as a share of the
    mean squared distance of the tried codes' features from their mean."""
    n, k = tried.shape
    columns = tried[:, None].expand(-1, k, -1)
    rows = kernel.gather(1, tried[:, :, None].expand(-1, -1, kernel.shape[2]))  # (N, k, S)
    # The kernel of features minus the mean of the tried codes' features.
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - rows.gather(2, columns).mean(2, keepdim=True)
    tried_kernel = rows.gather(2, columns)  # (N, k, k)
    ridge = ridge * tried_kernel.diagonal(dim1=1, dim2=2).mean(1)[:, None] + 1e-12
    ridged_kernel = tried_kernel + torch.diag_embed(ridge.expand(-1, k))
    # `solve` would wait for the device.
    weights = torch.linalg.solve_ex(ridged_kernel, rows)[0]  # (N, k, S)
    weights = weights + (1 - weights.sum(1, keepdim=True)) / k  # the regression adds the mean
    errors = residuals @ residuals.transpose(1, 2) / residuals.shape[2]  # (N, k, k)
    return (weights * (errors @ weights)).sum(1)


def find_numbers(model, seeds, codes, codes_per_image):
    """The numbers (N,) of given codes (N, D), one per image: of the first codes_per_image codes of
    each seed's sequence, the nearest. seeds (N,)."""
    numbers = []
    for part, part_codes in zip(seeds.split(32), codes.to(seeds.device).split(32), strict=True):
        candidates = model.sample_codes(part, codes_per_image)  # (n, S, D)
        numbers.append((candidates - part_codes[:, None]).abs().sum(2).argmin(1))
    return torch.cat(numbers).cpu()

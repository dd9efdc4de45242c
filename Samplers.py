"""Trying codes in passes; and choosing among many without trying each: most are ruled out by what
the tried ones tell. Pure tensors in and out.

Letters in shapes: N images, S codes per image, k of them tried, Q predicted values."""

import math

import torch

from Models import reconstruction_loss


def ranks(losses, rs_epsilon=0.0):
    """losses (N,k) as codes compete by them, the lowest first: one that is not finite never wins;
    those below rs_epsilon come behind all others, the highest first (RS-IMLE, Vashist et al. 2024:
    samples nearer than epsilon are rejected, so that training meets the codes that inference
    will)."""
    losses = torch.where(losses.isfinite(), losses, math.inf).double()
    return torch.where(losses < rs_epsilon, 1e9 - losses, losses)


def search(attempt, kernel, tries, rs_epsilon=0.0):
    """Tries `tries` of each image's S codes: a third as they come, then, in rounds of a sixth,
    those that rank first by `predicted_losses`. attempt(numbers (N,k)) -> residuals (N,k,Q), losses
    (N,k); kernel (N,S,S) -> numbers (N,tries) of the tried codes, and their losses."""
    numbers = torch.arange(n_random(tries), device=kernel.device).expand(len(kernel), -1)
    residuals, losses = attempt(numbers)
    while (left := tries - numbers.shape[1]) > 0:
        predicted = ranks(predicted_losses(kernel, numbers, residuals), rs_epsilon)
        predicted = predicted.clamp(max=1e18).scatter(1, numbers, math.inf)  # none is tried twice
        best = predicted.topk(min(left, max(1, tries // 6)), dim=1, largest=False).indices
        parts = zip((numbers, residuals, losses), (best, *attempt(best)), strict=True)
        numbers, residuals, losses = (torch.cat(pair, dim=1) for pair in parts)
    return numbers, losses


def n_random(tries):
    """How many of the tried codes, the first ones, are taken as they come."""
    return max(1, tries // 3)


def kernel_matrix(features):
    """Linear kernel of codes' features (N,S,F) -> (N,S,S)."""
    return features.float() @ features.float().transpose(1, 2)


def predicted_losses(kernel, numbers, residuals, ridge=0.1):
    """The squared error (N,S) of every code, were its completion a sum of the tried ones, with the
    weights of kernel ridge regression (Saunders et al. 1998) around the tried codes' mean.

    kernel (N,S,S); numbers (N,k) of the tried codes, residuals (N,k,Q): prediction minus target;
    ridge: as a share of the tried codes' mean squared distance from their mean."""
    n, k = numbers.shape
    columns = numbers[:, None].expand(-1, k, -1)
    rows = kernel.gather(1, numbers[:, :, None].expand(-1, -1, kernel.shape[2]))  # (N, k, S)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - rows.gather(2, columns).mean(2, keepdim=True)
    among = rows.gather(2, columns)  # (N, k, k)
    ridge = ridge * among.diagonal(dim1=1, dim2=2).mean(1)[:, None] + 1e-12
    among = among + torch.diag_embed(ridge.expand(-1, k))
    weights = torch.linalg.solve_ex(among, rows)[0]  # (N, k, S); `solve` would wait for the device
    weights = weights + (1 - weights.sum(1, keepdim=True)) / k
    errors = residuals @ residuals.transpose(1, 2) / residuals.shape[2]  # (N, k, k)
    return (weights * (errors @ weights)).sum(1)


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


def find_numbers(model, seeds, codes, codes_per_image):
    """The numbers (N,) of codes (N,D) among each image's first codes_per_image; seeds (N,)."""
    found = []
    for part, part_codes in zip(seeds.split(32), codes.to(seeds.device).split(32), strict=True):
        candidates = model.sample_codes(part, codes_per_image)  # (n, S, D)
        found.append((candidates - part_codes[:, None]).abs().sum(2).argmin(1))
    return torch.cat(found).cpu()

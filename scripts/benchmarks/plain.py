"""The plain way to compute an implicit MAE, as in the original and facebookresearch/mae: the
baseline of the benchmarks."""

import copy

import torch
from timm.models.vision_transformer import Block

from Models import reconstruction_loss


def plain_model(model, fused):
    """A copy of the model with fused attention, or unfused attention (MAE's)."""
    model = copy.deepcopy(model)
    for block in (*model.blocks, *model.decoder_blocks):
        block.attn.fused_attn = fused
    return model


def plain_losses(model, images, mask_noise, codes, mask_ratio=0.75):
    """The losses (N, K) of codes (N, K, D) for AdaIN at the last encoder block: embeds all patches,
    copies the encoder's tokens for every code, decodes all tokens."""
    n, k, _ = codes.shape
    length = mask_noise.shape[1]
    shuffle = mask_noise.argsort(dim=1)
    restore, keep = shuffle.argsort(dim=1), shuffle[:, : int(length * (1 - mask_ratio))]
    mask = torch.ones_like(mask_noise).scatter_(1, keep, 0)

    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    cls_token = model.cls_token + model.pos_embed[:, :1]
    x = torch.cat([cls_token.expand(n, -1, -1), x], dim=1)
    for block in model.blocks:
        x = Block.forward(block, x)
    shift, scale = model.injections[str(len(model.blocks) - 1)].features(codes).chunk(2, dim=-1)
    x = x.repeat_interleave(k, dim=0)  # (N*K, 1+V, C)
    x = x * (1 + scale.flatten(0, 1)[:, None]) + shift.flatten(0, 1)[:, None]
    x = model.decoder_embed(model.norm(x))

    mask_tokens = model.mask_token.expand(n * k, length + 1 - x.shape[1], -1)
    patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
    order = restore.repeat_interleave(k, dim=0)[..., None].expand(-1, -1, x.shape[-1])
    x = torch.cat([x[:, :1], patches.gather(1, order)], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = Block.forward(block, x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:].unflatten(0, (n, k))
    return reconstruction_loss(pred, images, mask, model.config.norm_pix_loss)

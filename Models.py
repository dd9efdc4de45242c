"""A masked autoencoder (He et al. 2022) with latent codes injected into its blocks: pure tensors in
and out.

Letters in shapes: N images, K codes per image, L patches, V visible and M masked ones (V + M = L),
T tokens, C channels, D numbers per code, P pixels along a patch."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block

from Augmentation import denormalize, normalize
from Utils import InputError, Stream, mix_seeds, random_normal


class FieldError(InputError):
    """A field of ModelConfig has a value that no model can have; `reason` says what is allowed."""

    def __init__(self, field, value, reason):
        super().__init__(field, value, reason)
        self.field, self.value, self.reason = field, value, reason

    def __str__(self):
        return f"{self.field} {self.value!r:.100}: {self.reason}"


LARGEST_SIZE = 2**16  # of widths, depths and all other whole numbers in a config
ADAIN_INITS = ("original", "identity")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model, checked when made (FieldError). Every checkpoint holds its
    model's config, so that the model can be built again."""

    image_size: tuple[int, int] = (224, 224)  # height, width
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    decoder: str = "self"  # a key of DECODERS
    norm_eps: float = 1e-6  # of every LayerNorm; other values only in weights from elsewhere
    # True: predicts patches normalised by their own mean and deviation; False: predicts pixels.
    norm_pix_loss: bool = True
    # Pairs (place, method). Places: encoder blocks 0..., decoder blocks from `depth` on, "mask".
    ip_spec: tuple[tuple[int | str, str], ...] = ()
    latent_dim: int = 512
    mapping_net_layers: int = 8
    mapping_net_h_dim: int = 512
    mapping_net_lrmul: float = 0.01
    act_type: str = "leakyrelu"  # a key of ACTIVATIONS
    adain_init: str = "original"  # of ADAIN_INITS

    def __post_init__(self):
        for field, is_allowed, reason in self._rules():
            if not is_allowed:
                raise FieldError(field, getattr(self, field), reason)

    def _rules(self):
        """Yields (field, whether its value is allowed, what is allowed). Types are checked, too: a
        config may come from a hostile file. A rule may rely on the rules above it."""
        for field in dataclasses.fields(self):
            if field.type is int:
                value, reason = getattr(self, field.name), f"whole numbers from 1 to {LARGEST_SIZE}"
                yield field.name, is_size(value), f"allowed are {reason}"
        for field, heads in (("dim", self.num_heads), ("decoder_dim", self.decoder_num_heads)):
            # A position embedding has four equal parts: sine and cosine of the row and the column.
            is_allowed = getattr(self, field) % math.lcm(4, heads) == 0
            reason = f"allowed are multiples of 4 and of the number of heads, {heads}"
            yield field, is_allowed, reason
        size, patch_size = self.image_size, self.patch_size
        is_allowed = is_pair(size) and all(is_size(n) and n % patch_size == 0 for n in size)
        reason = f"allowed are a height and a width, multiples of the patch size, {patch_size}"
        yield "image_size", is_allowed, reason
        is_allowed = type(self.norm_eps) is float and 0 < self.norm_eps < 1
        yield "norm_eps", is_allowed, "allowed are numbers between 0 and 1"
        yield "norm_pix_loss", type(self.norm_pix_loss) is bool, "allowed are True and False"
        lrmul = self.mapping_net_lrmul
        is_allowed = type(lrmul) in (int, float) and 0 < lrmul < math.inf
        yield "mapping_net_lrmul", is_allowed, "allowed are finite numbers above 0"
        options = {"decoder": DECODERS, "act_type": ACTIVATIONS, "adain_init": ADAIN_INITS}
        for field, names in options.items():
            yield field, getattr(self, field) in list(names), f"allowed are {', '.join(names)}"
        yield from self._ip_spec_rules()

    def _ip_spec_rules(self):
        """The rules of `ip_spec`, as `_rules` yields them."""
        pairs, last = self.ip_spec, self.depth + self.decoder_depth - 1
        is_allowed = isinstance(pairs, (tuple, list)) and all(map(is_pair, pairs))
        yield "ip_spec", is_allowed, "allowed are pairs (place, method)"
        for place, method in pairs:
            reason = f"unknown method {method!s:.40}; allowed are {', '.join(INJECTIONS)}"
            yield "ip_spec", method in list(INJECTIONS), reason
            is_allowed = place == "mask" or (type(place) is int and 0 <= place <= last)
            reason = f"no place {place!s:.40}; allowed are 0 to {last} and mask"
            yield "ip_spec", is_allowed, reason
        is_allowed = len({place for place, _ in pairs}) == len(pairs)
        yield "ip_spec", is_allowed, "a place can be named once only"

    @property
    def grid(self):
        """Patches along the height and the width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def is_size(value):
    """Whether a value is a whole number that a config allows."""
    return type(value) is int and 1 <= value <= LARGEST_SIZE


def is_pair(value):
    """Whether a value is a tuple or list of two."""
    return isinstance(value, (tuple, list)) and len(value) == 2


# -------------------------------------------------------------------------------------------------
# Injection: how a code changes the tokens of a place in the network.

ACTIVATIONS = {"leakyrelu": partial(nn.LeakyReLU, 0.2), "relu": nn.ReLU, "gelu": nn.GELU}


class PixelNorm(nn.Module):
    """Divides codes by their root mean square (Karras et al. 2018, section 4.2)."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are drawn with std 1/lrmul and scaled at run time by
    sqrt(2/fan_in)*lrmul (StyleGAN, Karras et al. 2019). Adam's steps then are a share of about
    lr*lrmul of a weight."""

    def __init__(self, n_in, n_out, lrmul):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lrmul)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale, self.lrmul = math.sqrt(2 / n_in) * lrmul, lrmul

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias * self.lrmul)


def mapping_net(config, n_out):
    """Codes (..., latent_dim) -> (..., n_out). With adain_init="identity" its outputs start at
    zero."""
    sizes = [
        config.latent_dim,
        *[config.mapping_net_h_dim] * (config.mapping_net_layers - 1),
        n_out,
    ]
    layers = [PixelNorm()]
    for n_in, n_next in zip(sizes, sizes[1:], strict=False):
        layers += [
            EqualizedLinear(n_in, n_next, config.mapping_net_lrmul),
            ACTIVATIONS[config.act_type](),
        ]
    if config.adain_init == "identity":
        layers.pop()
        nn.init.zeros_(layers[-1].weight)
    return nn.Sequential(*layers)


class AdaIN(nn.Module):
    """One shift and one scale per channel, the same for all tokens."""

    after_norm = False

    def __init__(self, config, channels, n_positions):
        super().__init__()
        self.code_dim = config.latent_dim
        self.mapping = mapping_net(config, 2 * channels)

    def forward(self, tokens, codes, positions):
        shift, scale = self.mapping(codes)[:, :, None].chunk(2, dim=-1)  # (N, K, 1, C)
        return tokens * (1 + scale) + shift


class LocalAdaIN(nn.Module):
    """One shift and one scale per token, the same for all channels. A LayerNorm would cancel it: it
    acts behind."""

    after_norm = True

    def __init__(self, config, channels, n_positions):
        super().__init__()
        self.code_dim = config.latent_dim
        self.mapping = mapping_net(config, 2 * n_positions)

    def forward(self, tokens, codes, positions):
        pairs = self.mapping(codes).unflatten(-1, (-1, 2))  # (N, K, 1+L, 2)
        shift, scale = pick(pairs, positions).chunk(2, dim=-1)  # (N, K, T, 1)
        return tokens * (1 + scale) + shift


class Add(nn.Module):
    """A code as large as all tokens, added to them; with adain_init="identity" times one learned
    number per channel, zero at first."""

    after_norm = False

    def __init__(self, config, channels, n_positions):
        super().__init__()
        self.code_dim = n_positions * channels
        self.channels = channels
        if config.adain_init == "identity":
            self.scale = nn.Parameter(torch.zeros(channels))

    def forward(self, tokens, codes, positions):
        noise = pick(codes.unflatten(-1, (-1, self.channels)), positions)  # (N, K, T, C)
        return tokens + noise * getattr(self, "scale", 1)


# To add a method of injection, write a class like those above and name it here. It is built with
# the config, the channels C of its place and the number of positions 1+L; it has `code_dim`, how
# many numbers of a code it reads, and `after_norm`, whether it acts behind a norm that follows. It
# is called with tokens (N, K or 1, T, C), codes (N, K, code_dim) and the tokens' positions (N, T),
# 0 for the class token, 1... for the patches in raster order, and returns (N, K, T, C).
INJECTIONS = {"adain": AdaIN, "local_adain": LocalAdaIN, "add": Add}


# -------------------------------------------------------------------------------------------------


def pick(values, indices):
    """values (N, K, T, C), indices (N, S) into T -> (N, K, S, C)."""
    n, k, _, c = values.shape
    return values.gather(2, indices[:, None, :, None].expand(n, k, -1, c))


def patchify(images, patch_size):
    """images (N, 3, H, W) -> (N, L, P*P*3), patches in raster order."""
    n, c, h, w = images.shape
    x = images.reshape(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch_size**2 * c)


def unpatchify(patches, grid):
    """patches (..., L, P*P*3) -> images (..., 3, H, W) for a grid of (rows, columns) of patches."""
    patch_size = math.isqrt(patches.shape[-1] // 3)
    x = patches.unflatten(-1, (patch_size, patch_size, 3)).unflatten(-4, grid)
    x = x.movedim(-1, -5).movedim(-3, -2)  # (..., 3, rows, P, columns, P)
    return x.flatten(-4, -3).flatten(-2, -1)


def patch_statistics(patches):
    """Mean and standard deviation of each patch, as norm_pix_loss takes them (unbiased variance +
    1e-6)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def target_patches(images, patch_size, norm_pix_loss):
    """What predictions are compared with: (N, L, P*P*3)."""
    # To learn something else than pixels, change this function (and decoder_pred's width).
    patches = patchify(images, patch_size)
    if norm_pix_loss:
        mean, std = patch_statistics(patches)
        patches = (patches - mean) / std
    return patches


def masked_patches(mask, n_masked):
    """mask (N, L), 1 = removed -> indices (N, M) of the removed patches in raster order."""
    return mask.argsort(dim=1, descending=True, stable=True)[:, :n_masked]


def masked_target(images, mask, pred, norm_pix_loss):
    """What predictions of the masked patches, pred (..., M, P*P*3), are compared with: (N, 1, M,
    P*P*3)."""
    target = target_patches(images, math.isqrt(pred.shape[-1] // 3), norm_pix_loss)
    return pick(target[:, None], masked_patches(mask, pred.shape[-2]))


def reconstruction_loss(pred, images, mask, norm_pix_loss=True):
    """Mean squared error over each image's masked patches (MAE, section 3): (N,) for pred (N, L or
    M, P*P*3), (N, K) for (N, K, L or M, P*P*3). images (N,3,H,W) normalised; mask (N,L), 1 =
    removed; all images have M removed patches."""
    if pred.ndim == 3:
        return reconstruction_loss(pred[:, None], images, mask, norm_pix_loss)[:, 0]
    if pred.shape[-2] == mask.shape[1]:  # of all patches
        pred = pick(pred, masked_patches(mask, int(mask[0].sum())))
    target = masked_target(images, mask, pred, norm_pix_loss)
    # To try another loss, change this line.
    return (pred - target).square().mean((-1, -2))


class Prefix(NamedTuple):
    """What is computed once per image, before the first injection."""

    tokens: torch.Tensor  # (N, 1, T, C)
    positions: torch.Tensor  # (N, 1+V+M): class token, visible patches, masked ones in raster order
    mask: torch.Tensor  # (N, L), 1 = removed, and to be predicted
    n_visible: int  # V


class Step(NamedTuple):
    """A part of the network: tokens (N, 1 or K, T, C), codes (N, K, D) or None, positions (N, 1+L)
    -> tokens."""

    run: Callable
    reads_codes: bool = False
    narrows: bool = False  # gives only the tokens whose predictions are wanted


def attend(queries, keys, values, num_heads):
    """Attention of tokens (B, S, C) to tokens (B, T, C), without projections: (B, S, C)."""
    heads = [
        x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (queries, keys, values)
    ]  # (B, heads, S or T, C/heads)
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def run_block(block, tokens, first=0):
    """timm's Block, which knows nothing of codes, on tokens (N, K, T, C): what becomes of those
    from `first` on, which attend to all; the others are not computed."""
    x = tokens.flatten(0, 1)  # (N*K, T, C)
    if not first:
        return block(x).unflatten(0, tokens.shape[:2])
    attention, channels, x_norm = block.attn, x.shape[2], block.norm1(x)
    weights, biases = attention.qkv.weight, attention.qkv.bias
    queries = F.linear(x_norm[:, first:], weights[:channels], biases[:channels])
    keys, values = F.linear(x_norm, weights[channels:], biases[channels:]).chunk(2, dim=-1)
    mixed = attend(queries, keys, values, attention.num_heads)
    x = x[:, first:] + attention.proj(mixed)
    return (x + block.mlp(block.norm2(x))).unflatten(0, tokens.shape[:2])


class CrossBlock(nn.Module):
    """A block whose tokens attend to other ones, not to each other (the decoder of CrossMAE, Fu et
    al. 2025, section 3)."""

    def __init__(self, dim, num_heads, qkv_bias, norm_layer):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.q = nn.Linear(dim, dim, qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens, memory):
        """tokens (N, 1 or K, S, C), memory (N, 1 or K, T, C), which they attend to -> (N, 1 or K,
        S, C)."""
        n, k = len(tokens), max(tokens.shape[1], memory.shape[1])
        queries, memory = self.q(self.norm1(tokens)), self.kv(memory)
        queries, memory = (x.expand(n, k, -1, -1).flatten(0, 1) for x in (queries, memory))
        mixed = attend(queries, *memory.chunk(2, dim=-1), self.num_heads)
        x = tokens + self.proj(mixed).unflatten(0, (n, k))
        return x + self.mlp(self.norm2(x))


DECODERS = {"self": Block, "cross": CrossBlock}  # the blocks that a decoder is made of


class ImplicitMAE(nn.Module):
    """A masked autoencoder whose completions depend on latent codes. Without codes, or with an
    empty ip_spec, it is MAE, and its parameters have the names of facebookresearch/mae; those of
    injections are `injections.PLACE.*`. With the decoder "cross", masked tokens attend to the
    visible ones only: for a share of them (`predict_ratio`) the others need not be computed."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, norm = config, partial(nn.LayerNorm, eps=config.norm_eps)
        length = c.grid[0] * c.grid[1]
        self.patch_embed = PatchEmbed(c.image_size, c.patch_size, 3, c.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(sincos_position_embedding(c.grid, c.dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(c.dim, c.num_heads, qkv_bias=True, norm_layer=norm) for _ in range(c.depth)
        )
        self.norm = norm(c.dim)
        self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_position_embedding(c.grid, c.decoder_dim), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            DECODERS[c.decoder](c.decoder_dim, c.decoder_num_heads, qkv_bias=True, norm_layer=norm)
            for _ in range(c.decoder_depth)
        )
        self.decoder_norm = norm(c.decoder_dim)
        self.decoder_pred = nn.Linear(c.decoder_dim, c.patch_size**2 * 3)
        self._initialize()

        self.injections = nn.ModuleDict()
        self.code_slices = {}  # place -> its part of a code
        self.code_dim = 0  # D
        for place, method in c.ip_spec:
            in_encoder = place != "mask" and place < c.depth
            injection = INJECTIONS[method](c, c.dim if in_encoder else c.decoder_dim, 1 + length)
            self.injections[str(place)] = injection
            self.code_slices[place] = slice(self.code_dim, self.code_dim + injection.code_dim)
            self.code_dim += injection.code_dim

    def _initialize(self):
        """MAE's initial values."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.dim, -1))

    # The network is a list of steps, which is split in front of the first that reads codes. The
    # last decoder block, and all behind it, compute the tokens from `first` on only.

    def _inject(self, place, first=0):
        """The step that injects codes at a place, as a list of one; empty where nothing is
        injected. Its tokens are those from `first` on."""
        if place not in self.code_slices:
            return []

        def inject(tokens, codes, positions):
            if codes is None:
                return tokens
            codes = codes[..., self.code_slices[place]]
            positions = positions[:, first : first + tokens.shape[2]]
            return self.injections[str(place)](tokens, codes.to(tokens.dtype), positions)

        return [Step(inject, reads_codes=True)]

    def _block_steps(self, blocks, first_place, norm, first=None, run=run_block):
        """Blocks, each followed by its injection, and the norm behind the last. The last one gives
        the tokens from `first` on only, if that is given."""
        last_place = first_place + len(blocks) - 1
        steps = []
        for place, block in enumerate(blocks, first_place):
            narrows = first is not None and place == last_place
            start = first if narrows else 0
            step = lambda x, *_, block=block, start=start: run(block, x, start)  # noqa: E731
            steps += [Step(step, narrows=narrows), *self._inject(place, start)]
        behind_norm = place in self.code_slices and self.injections[str(place)].after_norm
        steps.insert(len(steps) - behind_norm, Step(lambda x, *_: norm(x)))
        return steps

    def _encoder_steps(self):
        return self._block_steps(self.blocks, 0, self.norm)

    def _decoder_steps(self, first):
        depth = len(self.blocks)
        if self.config.decoder == "cross":  # as one step
            in_decoder = any(place == "mask" or place >= depth for place in self.code_slices)
            return [Step(partial(self._decode_across, first), in_decoder, narrows=True)]
        return [
            Step(lambda x, *_: self.decoder_embed(x)),
            Step(self._append_mask_tokens, reads_codes="mask" in self.code_slices),
            *self._block_steps(self.decoder_blocks, depth, self.decoder_norm, first),
        ]

    def _decode_across(self, first, tokens, codes, positions):
        """The cross-attention decoder: the encoder's tokens (N, 1 or K, 1+V, C) -> (N, K, S, C),
        those of positions[:, first:] (N, S)."""
        seen, wanted = positions[:, : tokens.shape[2]], positions[:, first:]
        memory = self.decoder_embed(tokens) + self._decoder_positions(seen)
        x = self._mask_tokens(wanted, codes) + self._decoder_positions(wanted)
        run = lambda block, x, _: block(x, memory)  # noqa: E731
        for step in self._block_steps(
            self.decoder_blocks, len(self.blocks), self.decoder_norm, run=run
        ):
            x = step.run(x, codes, wanted)
        return x

    def _decoder_positions(self, positions):
        """positions (N, S) -> their embeddings in the decoder (N, 1, S, C)."""
        return self.decoder_pos_embed[0][positions][:, None]

    def _mask_tokens(self, positions, codes):
        """The mask token at positions (N, S), with what codes make of it: (N, 1 or K, S, C)."""
        n, s = positions.shape
        tokens = self.mask_token[None].expand(n, 1, s, -1)
        for inject in self._inject("mask"):
            tokens = inject.run(tokens, codes, positions)
        return tokens

    def _append_mask_tokens(self, tokens, codes, positions):
        """(N, 1 or K, 1+V, C) -> (N, 1 or K, 1+L, C) in the order of `positions`, with position
        embeddings."""
        mask_tokens = self._mask_tokens(positions[:, tokens.shape[2] :], codes)
        k = max(tokens.shape[1], mask_tokens.shape[1])
        tokens = torch.cat([tokens.expand(-1, k, -1, -1), mask_tokens.expand(-1, k, -1, -1)], dim=2)
        return tokens + self._decoder_positions(positions)

    def _embed(self, images, positions):
        """images (N,3,H,W) -> class token and the patches at positions[:, 1:], embedded: (N, 1, T,
        C). Other patches are not: a matrix product of the wanted ones stands for the
        convolution."""
        places, convolution = positions[:, 1:], self.patch_embed.proj
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # (C, P*P*3)
        patches = patchify(images.to(weight.dtype), self.config.patch_size)
        patches = pick(patches[:, None], places - 1)
        patches = F.linear(patches, weight, convolution.bias) + self.pos_embed[0][places][:, None]
        class_token = (self.cls_token + self.pos_embed[:, :1])[None].expand(len(images), -1, -1, -1)
        return torch.cat([class_token, patches], dim=2)

    def _split(self, first=0):
        """The steps before the first that reads codes, and the others. Where none does, the last
        decoder block is of the others, so that they can leave out what is not wanted."""
        steps = self._encoder_steps() + self._decoder_steps(first)
        at = [i for i, step in enumerate(steps) if step.reads_codes]
        at += [i for i, step in enumerate(steps) if step.narrows]
        return steps[: at[0]], steps[at[0] :]

    def prefix(self, images, mask_noise, mask_ratio=0.75, predict_ratio=1.0):
        """images (N,3,H,W) normalised, mask_noise (N,L) -> what no code changes: a Prefix for
        `suffix`. predict_ratio: the share of all patches that is to be predicted, those of the
        masked ones that come first by mask_noise, at most all; the others are not in its mask."""
        length = mask_noise.shape[1]
        n_visible = int(length * (1 - mask_ratio))
        n_predicted = max(1, min(length - n_visible, round(length * predict_ratio)))
        order = mask_noise.argsort(dim=1, stable=True)
        visible, masked = order.split([n_visible, length - n_visible], dim=1)
        masked = masked[:, :n_predicted].sort(dim=1).values
        mask = torch.zeros_like(mask_noise).scatter_(1, masked, 1)
        positions = F.pad(
            torch.cat([visible, masked], dim=1) + 1, (1, 0)
        )  # (N, 1+V+M), 0: the class token
        tokens = self._embed(images, positions[:, : 1 + n_visible])
        for step in self._split()[0]:
            tokens = step.run(tokens, None, positions)
        return Prefix(tokens, positions, mask, n_visible)

    def suffix(self, prefix, codes, masked_only=True):
        """Predictions (N, K, M or L, P*P*3) in raster order for codes (N, K, D); without codes
        there is no K."""
        first = 1 + prefix.n_visible if masked_only else 1
        steps, tokens = self._split(first)[1], prefix.tokens
        if not any(step.narrows for step in steps):  # codes enter behind the last block only
            tokens = tokens[:, :, first:]
        for step in steps:
            tokens = step.run(tokens, codes, prefix.positions)
        pred = self.decoder_pred(tokens)
        if not masked_only:
            pred = pick(pred, prefix.positions[:, 1:].argsort(dim=1))
        return pred[:, 0] if codes is None else pred

    def forward(
        self,
        images,
        mask_noise,
        codes=None,
        mask_ratio=0.75,
        *,
        masked_only=False,
        predict_ratio=1.0,
    ):
        """images (N,3,H,W) normalised, mask_noise (N,L) whose argsort is the mask as in MAE, codes
        (N,K,D) or None -> pred (N, K, L, P*P*3), without codes (N, L, P*P*3); mask (N, L), 1 =
        removed (of those, the ones that are predicted)."""
        prefix = self.prefix(images, mask_noise, mask_ratio, predict_ratio)
        return self.suffix(prefix, codes, masked_only), prefix.mask

    def encode(self, images, codes=None):
        """images (N,3,H,W) normalised, codes (N, D) or None -> unmasked tokens (N, 1+L, C) after
        the encoder's norm; codes (N, K, D) -> (N, K, 1+L, C), with 1 for K where no encoder block
        reads codes."""
        length = self.pos_embed.shape[1]
        positions = torch.arange(length, device=images.device).expand(len(images), -1)
        tokens = self._embed(images, positions)
        several = codes is not None and codes.ndim == 3
        codes = codes if codes is None or several else codes[:, None]
        for step in self._encoder_steps():
            tokens = step.run(tokens, codes, positions)
        return tokens if several else tokens[:, 0]

    def sample_codes(self, seeds, k):
        """seeds (N,) int64 -> the first k codes (N, k, D) of each seed's sequence from the prior
        N(0, I)."""
        numbers = torch.arange(k, device=seeds.device)
        return self.numbered_codes(seeds, numbers.expand(len(seeds), -1))

    def numbered_codes(self, seeds, numbers):
        """seeds (N,) int64 -> the codes (N, k, D) with these numbers (N, k), from 0, of each seed's
        sequence from the prior N(0, I)."""
        counters = numbers[..., None] * self.code_dim
        counters = counters + torch.arange(self.code_dim, device=numbers.device)  # (N, k, D)
        return random_normal(mix_seeds(seeds, Stream.CODE)[:, None, None], counters)

    def code_features(self, codes):
        """codes (N, k, D) -> (N, k, F): what the injections make of codes, before they meet tokens;
        the code itself where an injection has no mapping net."""
        parts = []
        for place, part in self.code_slices.items():
            mapping = getattr(self.injections[str(place)], "mapping", nn.Identity())
            parts.append(mapping(codes[..., part].to(self.pos_embed.dtype)))
        return torch.cat(parts, dim=-1)


# -------------------------------------------------------------------------------------------------


def sincos_position_embedding(grid, dim):
    """Fixed 2-D sine-cosine embedding (1, 1+L, dim), zero for the class token, in MAE's order (the
    column's half first)."""
    x = build_sincos2d_pos_embed(
        list(grid), dim
    )  # (L, dim) as sin(row), sin(column), cos(row), cos(column)
    x = x.unflatten(1, (2, 2, -1)).transpose(1, 2).flip(1).flatten(1)
    return F.pad(x, (0, 0, 1, 0))[None]


# To add a size, add a row; --input_size gives the image size. The published MAEs share one decoder
# (He et al. 2022, section 4); tiny and small are timm's widths.
# fmt: off
PRESETS = {
    "vit_base": ModelConfig(),
    "vit_base_vis": ModelConfig(norm_pix_loss=False),
    "vit_large": ModelConfig(dim=1024, depth=24, num_heads=16),
    "vit_huge": ModelConfig(patch_size=14, dim=1280, depth=32, num_heads=16),
    "vit_tiny": ModelConfig(dim=192, num_heads=3),
    "vit_small": ModelConfig(dim=384, num_heads=6),
    "vit_demo": ModelConfig(patch_size=4, dim=128, depth=4, num_heads=4,
                            decoder_dim=64, decoder_depth=2, decoder_num_heads=2),
}
# fmt: on


def build(config):
    """An ImplicitMAE with fresh weights, drawn from torch's global generator."""
    return ImplicitMAE(config)


def in_precision(model, dtype):
    """The model for what needs no gradients: a copy in a lower precision, itself for float32. Half
    the memory traffic of autocast, which also computes residuals and norms in float32."""
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


def parameter_groups(model, weight_decay):
    """Groups for AdamW: of the MAE ("mae") and of the injections ("z"), each with decay and, for
    biases, norms and tokens, without. Frozen position embeddings are left out."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "z" if name.startswith("injections.") else "mae"
            decay = 0.0 if parameter.ndim < 2 or name.endswith("_token") else weight_decay
            group = groups.setdefault(
                (part, decay), {"params": [], "part": part, "weight_decay": decay}
            )
            group["params"].append(parameter)
    return list(groups.values())


def pixels(pred, images, config):
    """pred (N,K,L,P*P*3) in the units of images (N,3,H,W): predicted normalised patches get the
    true ones' mean and deviation."""
    if not config.norm_pix_loss:
        return pred
    mean, std = patch_statistics(patchify(images, config.patch_size)[:, None])
    return pred * std + mean


def paste(patches, images, mask):
    """patches (N,K,L,P*P*3) pasted into images (N,3,H,W) where mask (N,L) is 1: (N,K,3,H,W)."""
    patch_size = math.isqrt(patches.shape[-1] // 3)
    grid = (images.shape[-2] // patch_size, images.shape[-1] // patch_size)
    true = patchify(images, patch_size)[:, None]
    return unpatchify(torch.where(mask[:, None, :, None].bool(), patches, true), grid)


@torch.no_grad()
def completions(model, images, mask_noise, codes, mask_ratio):
    """images (N,3,H,W) normalised, codes (N,K,D) or None -> pictures uint8 (N, 2 + K or 1, 3, H,
    W): image, masked image, the completions with the visible patches pasted in."""
    pred, mask = model(images, mask_noise, codes, mask_ratio)
    pred = pred.float() if codes is not None else pred[:, None].float()  # (N, K, L, P*P*3)
    gray = normalize(images.new_full((1, 3, 1, 1), 128)).flatten().repeat(pred.shape[-1] // 3)
    masked = paste(gray.expand_as(pred[:, :1]), images, mask)
    completed = paste(pixels(pred, images, model.config), images, mask)
    return denormalize(torch.cat([images[:, None], masked, completed], dim=1))

"""A masked autoencoder (He et al. 2022) with latent codes injected into its blocks: pure tensors in
and out.

Letters in shapes: N images, K codes per image, L patches, V visible patches, M masked patches to
predict (V + M = L if all are predicted), T tokens, C channels (of an image, or of tokens), D
numbers per code, P pixels along a patch."""

import copy
import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block

from Augmentation import MEAN, STD, normalize, to_pictures
from Utils import InputError, Stream, mix_seeds, random_normal


class FieldError(InputError):
    """No model can have this value of a ModelConfig's field; `reason` says what is allowed."""

    def __init__(self, field, value, reason):
        super().__init__(f"{field} {value!r:.100}: {reason}")
        self.field, self.reason = field, reason


ADAIN_INITS = ("original", "identity")
LARGEST_SIZE = 2**16  # the largest whole number that a config may hold


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
    norm_eps: float = 1e-6  # of every LayerNorm; differs only in weights of other repositories
    # True: predicts patches normalised by their own mean and deviation; False: predicts pixels.
    norm_pix_loss: bool = True
    # Pairs (place, method). Places: encoder blocks 0..., decoder blocks from `depth` on, "mask".
    ip_spec: tuple[tuple[int | str, str], ...] = ()
    # The injections' options. These defaults are the original's; those of the flags are in IO.py.
    latent_dim: int = 512
    mapping_net_layers: int = 8
    mapping_net_h_dim: int = 512
    mapping_net_lrmul: float = 0.01
    act_type: str = "leakyrelu"  # a key of ACTIVATIONS
    adain_init: str = "original"  # one of ADAIN_INITS
    channels: int = 3  # of an image
    # Of each channel, by which images are normalised: see Augmentation.normalize.
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self):
        for field, is_allowed, reason in self._rules():
            if not is_allowed:
                raise FieldError(field, getattr(self, field), reason)

    def _rules(self):
        """Yields a field, whether its value is allowed, and what is allowed. A rule relies on the
        rules before it. Types are checked, too, as a config may come from a hostile file."""
        for name in (field.name for field in dataclasses.fields(self) if field.type is int):
            reason = f"allowed are whole numbers from 1 to {LARGEST_SIZE}"
            yield name, is_size(getattr(self, name)), reason
        for name, heads in (("dim", self.num_heads), ("decoder_dim", self.decoder_num_heads)):
            # 4: a position embedding is the sine and cosine of the row and of the column.
            reason = f"allowed are multiples of 4 and of the number of heads, {heads}"
            yield name, getattr(self, name) % math.lcm(4, heads) == 0, reason
        size, patch_size = self.image_size, self.patch_size
        is_grid = is_pair(size) and all(is_size(side) and side % patch_size == 0 for side in size)
        reason = f"allowed are a height and a width, multiples of {patch_size}, the patch size"
        yield "image_size", is_grid, reason
        for name in ("mean", "std"):
            values, low = getattr(self, name), 0 if name == "std" else -math.inf
            are_numbers = isinstance(values, (tuple, list)) and len(values) == self.channels
            are_numbers = are_numbers and all(
                type(value) in (int, float) and low < value < math.inf for value in values
            )
            kind = "finite numbers" + " above 0" * (name == "std")
            yield name, are_numbers, f"allowed are {self.channels} {kind}, one for each channel"
        lrmul, eps = self.mapping_net_lrmul, self.norm_eps
        is_positive = type(lrmul) in (int, float) and 0 < lrmul < math.inf
        yield "mapping_net_lrmul", is_positive, "allowed are finite numbers above 0"
        is_fraction = type(eps) is float and 0 < eps < 1
        yield "norm_eps", is_fraction, "allowed are numbers between 0 and 1"
        yield "norm_pix_loss", type(self.norm_pix_loss) is bool, "allowed are True and False"
        options = {"decoder": DECODERS, "act_type": ACTIVATIONS, "adain_init": ADAIN_INITS}
        for name, names in options.items():
            yield name, getattr(self, name) in list(names), f"allowed are {', '.join(names)}"
        pairs, last = self.ip_spec, self.depth + self.decoder_depth - 1
        are_pairs = isinstance(pairs, (tuple, list)) and all(map(is_pair, pairs))
        yield "ip_spec", are_pairs, "allowed are pairs (place, method)"
        for place, method in pairs:
            reason = f"unknown method {method!s:.40}; allowed are {', '.join(INJECTIONS)}"
            yield "ip_spec", method in list(INJECTIONS), reason
            is_place = place == "mask" or (type(place) is int and 0 <= place <= last)
            reason = f"no place {place!s:.40}; allowed are 0 to {last} and mask"
            yield "ip_spec", is_place, reason
        is_distinct = len({place for place, _ in pairs}) == len(pairs)
        yield "ip_spec", is_distinct, "a place can be named once only"

    @property
    def grid(self):
        """Patches along the height and the width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def is_size(value):
    """Whether a value is a whole number from 1 to LARGEST_SIZE."""
    return type(value) is int and 1 <= value <= LARGEST_SIZE


def is_pair(value):
    """Whether a value is a tuple or list of two."""
    return isinstance(value, (tuple, list)) and len(value) == 2


# -------------------------------------------------------------------------------------------------
# Injection: how a code changes the tokens at a place of the network.

ACTIVATIONS = {"leakyrelu": partial(nn.LeakyReLU, 0.2), "relu": nn.ReLU, "gelu": nn.GELU}


class PixelNorm(nn.Module):
    """Divides codes by their root mean square (Karras et al. 2018, section 4.2)."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


class EqualizedLinear(nn.Module):
    """A linear layer with equalized learning rate (StyleGAN, Karras et al. 2019): weights are drawn
    with std 1/lrmul and multiplied by sqrt(2/fan_in)*lrmul at run time. An Adam step then changes a
    weight by a share of about lr*lrmul."""

    def __init__(self, n_in, n_out, lrmul):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lrmul)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale, self.lrmul = math.sqrt(2 / n_in) * lrmul, lrmul

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias * self.lrmul)


def mapping_net(config, n_out):
    """The network that maps codes (..., latent_dim) to (..., n_out). With adain_init="identity" its
    outputs start at zero."""
    hidden = [config.mapping_net_h_dim] * (config.mapping_net_layers - 1)
    layers = [PixelNorm()]
    for n_in, n_next in itertools.pairwise([config.latent_dim, *hidden, n_out]):
        layers.append(EqualizedLinear(n_in, n_next, config.mapping_net_lrmul))
        layers.append(ACTIVATIONS[config.act_type]())
    if config.adain_init == "identity":
        layers.pop()
        nn.init.zeros_(layers[-1].weight)
    return nn.Sequential(*layers)


class Injection(nn.Module):
    """The interface of a method of injection; other code uses nothing else of an injection. It is
    built with the config, the channels C of its place and the number of positions 1+L."""

    code_dim: int  # how many numbers of a code it reads; set in __init__
    # True: behind the last block of the encoder or decoder, acts after the LayerNorm that follows.
    after_norm = False
    surrogate_can_learn = True  # False: --sampler surrogate is refused

    def features(self, codes):
        """codes (..., code_dim) -> features (..., F), by which the surrogate compares codes."""
        return codes

    def forward(self, tokens, codes, positions):
        """tokens (N, 1 or K, T, C), codes (N, K, code_dim), positions (N, T) -> (N, K, T, C).
        Positions: 0 is the class token, 1 to L are the patches in raster order."""
        raise NotImplementedError


class AdaIN(Injection):
    """One shift and one scale per channel, the same for all tokens."""

    def __init__(self, config, channels, n_positions):
        super().__init__()
        self.code_dim = config.latent_dim
        self.mapping = mapping_net(config, 2 * channels)

    def features(self, codes):
        return self.mapping(codes)

    def forward(self, tokens, codes, positions):
        shift, scale = self.mapping(codes)[:, :, None].chunk(2, dim=-1)  # (N, K, 1, C)
        return tokens * (1 + scale) + shift


class LocalAdaIN(Injection):
    """One shift and one scale per token, the same for all channels."""

    after_norm = True  # the LayerNorm would undo a shift and a scale of the whole token

    def __init__(self, config, channels, n_positions):
        super().__init__()
        self.code_dim = config.latent_dim
        self.mapping = mapping_net(config, 2 * n_positions)

    def features(self, codes):
        return self.mapping(codes)

    def forward(self, tokens, codes, positions):
        pairs = self.mapping(codes).unflatten(-1, (-1, 2))  # (N, K, 1+L, 2)
        shift, scale = pick(pairs, positions).chunk(2, dim=-1)  # (N, K, T, 1)
        return tokens * (1 + scale) + shift


class Add(Injection):
    """A code with a number for every channel of every position, added to the tokens; with
    adain_init="identity" multiplied by one learned number per channel, which starts at zero."""

    surrogate_can_learn = False  # a code has far more numbers than there are codes to learn from

    def __init__(self, config, channels, n_positions):
        super().__init__()
        self.code_dim = n_positions * channels
        self.channels = channels
        is_identity = config.adain_init == "identity"
        self.scale = nn.Parameter(torch.zeros(channels)) if is_identity else 1

    def forward(self, tokens, codes, positions):
        noise = pick(codes.unflatten(-1, (-1, self.channels)), positions)  # (N, K, T, C)
        return tokens + noise * self.scale


# To add a method of injection, write a subclass of Injection and name it here.
INJECTIONS = {"adain": AdaIN, "local_adain": LocalAdaIN, "add": Add}


# -------------------------------------------------------------------------------------------------
# Patches, targets, and the loss.


def pick(values, indices):
    """Selects tokens: values (N, K, T, C), indices (N, S) into T -> (N, K, S, C)."""
    n, k, _, c = values.shape
    return values.gather(2, indices[:, None, :, None].expand(n, k, -1, c))


def patchify(images, patch_size):
    """images (N, C, H, W) -> patches (N, L, P*P*C) in raster order."""
    n, c, h, w = images.shape
    x = images.reshape(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch_size**2 * c)


def unpatchify(patches, grid, channels=3):
    """patches (..., L, P*P*C) -> images (..., C, H, W) for a grid of (rows, columns) of patches."""
    patch_size = math.isqrt(patches.shape[-1] // channels)
    x = patches.unflatten(-1, (patch_size, patch_size, channels)).unflatten(-4, grid)
    x = x.movedim(-1, -5).movedim(-3, -2)  # (..., C, rows, P, columns, P)
    return x.flatten(-4, -3).flatten(-2, -1)


def patch_statistics(patches):
    """Mean and standard deviation of each patch, as norm_pix_loss uses them (1e-6 is added to the
    unbiased variance)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def target_patches(images, patch_size, norm_pix_loss):
    """What the network learns to predict for images (N, C, H, W): (N, L, P*P*C)."""
    # To predict something else than pixels, change this function. If the number of values per patch
    # changes, change the width of `decoder_pred` and `masked_target`, which reads P from it; for
    # pictures change `pixels`, which turns predictions into pixels.
    patches = patchify(images, patch_size)
    if norm_pix_loss:
        mean, std = patch_statistics(patches)
        patches = (patches - mean) / std
    return patches


def masked_patches(mask, n_masked):
    """mask (N, L), 1 = removed -> indices (N, M) of the removed patches in raster order."""
    return mask.argsort(dim=1, descending=True, stable=True)[:, :n_masked]


def masked_target(images, mask, pred, norm_pix_loss):
    """The targets (N, 1, M, P*P*C) of predictions of the masked patches, pred (..., M, P*P*C)."""
    patch_size = math.isqrt(pred.shape[-1] // images.shape[1])
    target = target_patches(images, patch_size, norm_pix_loss)
    return pick(target[:, None], masked_patches(mask, pred.shape[-2]))


def reconstruction_loss(pred, images, mask, norm_pix_loss=True):
    """Mean squared error over each image's masked patches (MAE, section 3): (N,) for pred (N, L or
    M, P*P*C), (N, K) for pred (N, K, L or M, P*P*C). images (N,C,H,W) normalised; mask (N,L), 1 =
    removed; every image has M removed patches."""
    if pred.ndim == 3:
        return reconstruction_loss(pred[:, None], images, mask, norm_pix_loss)[:, 0]
    if pred.shape[-2] == mask.shape[1]:  # predictions of all patches
        pred = pick(pred, masked_patches(mask, int(mask[0].sum())))
    target = masked_target(images, mask, pred, norm_pix_loss)
    # To try another loss, change this line. Training, validation and the exhaustive choice of codes
    # then use the new loss. The surrogate still predicts squared errors to `masked_target`: change
    # Samplers.predicted_losses, too. For another target, change `target_patches`.
    return (pred - target).square().mean((-1, -2))


# -------------------------------------------------------------------------------------------------
# Blocks.


def attend(queries, keys, values, num_heads):
    """Multi-head attention: queries (B, S, C), keys and values (B, T, C) -> (B, S, C)."""
    queries, keys, values = (
        part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in (queries, keys, values)
    )  # (B, heads, S or T, C/heads)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


class SelfBlock(Block):
    """timm's Block, whose tokens attend to each other. It can compute the last tokens only."""

    def __init__(self, dim, num_heads, norm_layer):
        # To use another option of timm's Block (qk_norm, drop_path, ...), honour it in `forward`.
        super().__init__(dim, num_heads, qkv_bias=True, norm_layer=norm_layer)

    def forward(self, tokens, first=0):
        """tokens (N, K, T, C) -> (N, K, T-first, C): the outputs for the tokens from index `first`
        on, which attend to all tokens."""
        x = tokens.flatten(0, 1)  # (N*K, T, C)
        if first == 0:
            return super().forward(x).unflatten(0, tokens.shape[:2])
        normed, qkv, sizes = self.norm1(x), self.attn.qkv, [x.shape[2], 2 * x.shape[2]]
        query_weight, memory_weight = qkv.weight.split(sizes)
        query_bias, memory_bias = qkv.bias.split(sizes)
        queries = F.linear(normed[:, first:], query_weight, query_bias)
        keys, values = F.linear(normed, memory_weight, memory_bias).chunk(2, dim=-1)
        attended = attend(queries, keys, values, self.attn.num_heads)
        x = x[:, first:] + self.attn.proj(attended)
        x = x + self.mlp(self.norm2(x))
        return x.unflatten(0, tokens.shape[:2])


class CrossBlock(nn.Module):
    """A block whose tokens attend to a memory of other tokens, not to each other (the decoder of
    CrossMAE, Fu et al. 2025, section 3)."""

    def __init__(self, dim, num_heads, norm_layer):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens, memory):
        """tokens (N, 1 or K, S, C), memory (N, 1 or K, T, C) -> tokens (N, 1 or K, S, C)."""
        n, k = len(tokens), max(tokens.shape[1], memory.shape[1])
        parts = (self.q(self.norm1(tokens)), *self.kv(memory).chunk(2, dim=-1))
        queries, keys, values = (
            part.expand(n, k, -1, -1).flatten(0, 1) for part in parts
        )  # (N*K, S or T, C)
        attended = attend(queries, keys, values, self.num_heads).unflatten(0, (n, k))
        x = tokens + self.proj(attended)
        return x + self.mlp(self.norm2(x))


# ModelConfig.decoder -> class of the decoder's blocks. To add a decoder, add a class: a subclass of
# CrossBlock is called with (tokens, memory), any other with (tokens) or (tokens, first).
DECODERS = {"self": SelfBlock, "cross": CrossBlock}


# -------------------------------------------------------------------------------------------------
# The network.


class Prefix(NamedTuple):
    """The part of a forward pass that no code changes, computed once per image."""

    tokens: torch.Tensor  # (N, 1, T, C)
    positions: torch.Tensor  # (N, 1+V+M): class token, visible patches, masked ones in raster order
    mask: torch.Tensor  # (N, L), 1 = removed and to be predicted
    n_visible: int  # V


class ImplicitMAE(nn.Module):
    """A masked autoencoder whose completions depend on latent codes. Without codes, or with an
    empty ip_spec, it is MAE. Parameters have the names of facebookresearch/mae; those of injections
    are `injections.PLACE.*`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, norm = config, partial(nn.LayerNorm, eps=config.norm_eps)
        self.n_blocks = c.depth + c.decoder_depth
        self.cross_decoder = issubclass(DECODERS[c.decoder], CrossBlock)
        self.patch_embed = PatchEmbed(c.image_size, c.patch_size, c.channels, c.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(sincos_position_embedding(c.grid, c.dim), requires_grad=False)
        self.blocks = nn.ModuleList(SelfBlock(c.dim, c.num_heads, norm) for _ in range(c.depth))
        self.norm = norm(c.dim)
        self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_position_embedding(c.grid, c.decoder_dim), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            DECODERS[c.decoder](c.decoder_dim, c.decoder_num_heads, norm)
            for _ in range(c.decoder_depth)
        )
        self.decoder_norm = norm(c.decoder_dim)
        self.decoder_pred = nn.Linear(c.decoder_dim, c.patch_size**2 * c.channels)
        self._initialize()
        self._add_injections()

    def _initialize(self):
        """MAE's initial values."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.dim, -1))

    def _add_injections(self):
        """Builds the injections of ip_spec. A code holds the numbers of all injections, side by
        side, in the order of ip_spec."""
        c, n_positions = self.config, self.pos_embed.shape[1]
        self.injections = nn.ModuleDict()
        self.code_dim = 0  # D
        self.injected_at = {}  # point (see _inject) -> (key in self.injections, slice of a code)
        points_after_norm = {c.depth - 1: "norm", self.n_blocks - 1: "decoder_norm"}
        for place, method in c.ip_spec:
            in_encoder = place != "mask" and place < c.depth
            injection = INJECTIONS[method](c, c.dim if in_encoder else c.decoder_dim, n_positions)
            self.injections[str(place)] = injection
            point = points_after_norm.get(place, place) if injection.after_norm else place
            code_slice = slice(self.code_dim, self.code_dim + injection.code_dim)
            self.injected_at[point] = str(place), code_slice
            self.code_dim = code_slice.stop

        # How many blocks run in `prefix`: all up to the first injection. But the last block of a
        # model without injections and all blocks of a cross decoder run in `suffix`: there they
        # compute only the tokens to predict.
        injected_blocks = [c.depth - 1 if place == "mask" else place for place, _ in c.ip_spec]
        self.prefix_blocks = min(injected_blocks, default=self.n_blocks - 2) + 1
        if self.cross_decoder:
            self.prefix_blocks = min(self.prefix_blocks, c.depth)

    def prefix(self, images, mask_noise, mask_ratio=0.75, predict_ratio=1.0):
        """Runs the network up to the first injection: images (N,C,H,W) normalised, mask_noise (N,L)
        -> a Prefix for `suffix`. predict_ratio: number of patches to predict, as a share of L: the
        masked patches with the lowest mask_noise, or all masked patches if these are fewer."""
        length = mask_noise.shape[1]
        n_visible = int(length * (1 - mask_ratio))
        n_predicted = max(1, min(length - n_visible, round(length * predict_ratio)))
        order = mask_noise.argsort(dim=1, stable=True)
        visible, masked = order.split([n_visible, length - n_visible], dim=1)
        masked = masked[:, :n_predicted].sort(dim=1).values
        mask = torch.zeros_like(mask_noise).scatter_(1, masked, 1)
        patches = torch.cat([visible, masked], dim=1)
        positions = F.pad(patches + 1, (1, 0))  # (N, 1+V+M); 0 is the class token
        tokens = self._embed(images, positions[:, : 1 + n_visible])
        tokens = self._run(tokens, None, positions, 0, self.prefix_blocks)
        return Prefix(tokens, positions, mask, n_visible)

    def suffix(self, prefix, codes, masked_only=True, also_without_code=False):
        """Runs the rest of the network for codes (N, K, D): predictions (N, K, M, P*P*C) of the
        masked patches, with masked_only=False (N, K, L, P*P*C) of all, in raster order. Without
        codes the dimension K is missing. also_without_code: K+1 predictions, the last without."""
        positions, x = prefix.positions, prefix.tokens
        if not masked_only and positions.shape[1] != self.pos_embed.shape[1]:
            raise ValueError("with a predict_ratio below 1 only masked patches are predicted")
        first = 1 + prefix.n_visible if masked_only else 1  # the first token to predict
        if self.prefix_blocks == self.n_blocks:  # `prefix` ran the last block, for all tokens
            positions, x = positions[:, first:], x[:, :, first:]
        also = also_without_code
        x = self._inject(self.prefix_blocks - 1, x, codes, positions, also)
        x = self._run(x, codes, positions, self.prefix_blocks, self.n_blocks, first, also)
        positions = prefix.positions[:, first:]
        x = self._inject("decoder_norm", self.decoder_norm(x), codes, positions, also)
        pred = self.decoder_pred(x)
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
        also_without_code=False,
    ):
        """images (N,C,H,W) normalised, mask_noise (N,L) whose argsort is the mask as in MAE, codes
        (N,K,D) or None -> pred (N, K, L, P*P*C), without codes (N, L, P*P*C); mask (N, L), 1 =
        removed and to be predicted. also_without_code: pred (N, K+1, L, P*P*C), the last without
        code."""
        prefix = self.prefix(images, mask_noise, mask_ratio, predict_ratio)
        return self.suffix(prefix, codes, masked_only, also_without_code), prefix.mask

    def encode(self, images, codes=None):
        """Runs the encoder on all patches: images (N,C,H,W) normalised, codes (N, D) or None ->
        tokens (N, 1+L, C) after the encoder's last norm; codes (N, K, D) -> (N, K, 1+L, C), or
        (N, 1, 1+L, C) if the encoder has no injection."""
        if codes is not None and codes.ndim == 2:
            return self.encode(images, codes[:, None])[:, 0]
        positions = torch.arange(self.pos_embed.shape[1], device=images.device)
        positions = positions.expand(len(images), -1)
        x = self._run(self._embed(images, positions), codes, positions, 0, len(self.blocks))
        x = self._inject("norm", self.norm(x), codes, positions)
        return x[:, 0] if codes is None else x

    def _run(self, x, codes, positions, start, stop, first=0, also=False):
        """Runs blocks start to stop-1, numbered through encoder and decoder, each followed by its
        injection, on the tokens x (N, 1 or K, T, C) at positions[:, :T]. The last block, and every
        block of a cross decoder, computes only the tokens at positions[:, first:]. also: as of
        `_inject`."""
        blocks = [*self.blocks, *self.decoder_blocks]
        memory = None  # the tokens that a cross decoder attends to
        for place in range(start, stop):
            if place == len(self.blocks):
                x, positions, memory = self._enter_decoder(x, codes, positions, first, also)
            if memory is not None:
                x = blocks[place](x, memory)
            elif place == self.n_blocks - 1:  # no later block reads the other tokens
                x, positions = blocks[place](x, first), positions[:, first:]
            else:
                x = blocks[place](x)
            x = self._inject(place, x, codes, positions, also)
        return x

    def _inject(self, point, x, codes, positions, also=False):
        """Injects codes (N, K, D) into tokens x (N, 1 or K, T, C) at positions[:, :T] -> (N, K, T,
        C). also: x (N, 1 or K+1, T, C) -> (N, K+1, T, C), the last without code. Without codes, or
        without an injection at this point, returns x. Points: the number of a block, "norm",
        "decoder_norm" (after that module), "mask" (the mask tokens)."""
        if codes is None or point not in self.injected_at:
            return x
        key, code_slice = self.injected_at[point]
        # Up to the first injection, all codes and the completion without code share x.
        x, without_code = (x, x) if x.shape[1] == 1 else x.split([codes.shape[1], also], dim=1)
        codes = codes[..., code_slice].to(x.dtype)
        x = self.injections[key](x, codes, positions[:, : x.shape[2]])
        return torch.cat([x, without_code], dim=1) if also else x

    def _embed(self, images, positions):
        """images (N,C,H,W) -> the class token and the patches at positions[:, 1:]: (N, 1, T, C).
        Embeds only the selected patches: the same result as the convolution."""
        patch_positions, convolution = positions[:, 1:], self.patch_embed.proj
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # (C, P*P*C)
        patches = patchify(images.to(weight.dtype), self.config.patch_size)
        patches = pick(patches[:, None], patch_positions - 1)  # (N, 1, T-1, P*P*C)
        patches = F.linear(patches, weight, convolution.bias)
        patches = patches + self.pos_embed[0][patch_positions][:, None]
        class_token = (self.cls_token + self.pos_embed[:, :1])[None].expand(len(images), -1, -1, -1)
        return torch.cat([class_token, patches], dim=2)

    def _enter_decoder(self, x, codes, positions, first, also):
        """The last encoder block's tokens (N, 1 or K, 1+V, C) -> the tokens (N, 1 or K, T, C) for
        the decoder's blocks, their positions (N, T), and a memory: the visible tokens, to which the
        tokens of a cross decoder attend; None for a decoder whose tokens attend to each other."""
        x = self._inject("norm", self.norm(x), codes, positions, also)
        visible = self.decoder_embed(x)
        n_visible = visible.shape[2]  # with the class token
        position_embeddings = self.decoder_pos_embed[0][positions][:, None]  # (N, 1, 1+V+M, C)
        begin = first if self.cross_decoder else n_visible  # index of the first mask token
        masked_positions = positions[:, begin:]
        mask_tokens = self.mask_token.expand(*masked_positions.shape, -1)[:, None]
        if "mask" in self.injected_at:
            mask_tokens = mask_tokens.expand(-1, visible.shape[1], -1, -1)
        mask_tokens = self._inject("mask", mask_tokens, codes, masked_positions, also)
        if self.cross_decoder:
            memory = visible + position_embeddings[:, :, :n_visible]
            return mask_tokens + position_embeddings[:, :, begin:], masked_positions, memory
        k = max(visible.shape[1], mask_tokens.shape[1])
        x = torch.cat([part.expand(-1, k, -1, -1) for part in (visible, mask_tokens)], dim=2)
        return x + position_embeddings, positions, None

    def sample_codes(self, seeds, k):
        """seeds (N,) int64 -> the first k codes (N, k, D) of each seed's sequence from the prior
        N(0, I)."""
        numbers = torch.arange(k, device=seeds.device)
        return self.numbered_codes(seeds, numbers.expand(len(seeds), -1))

    def numbered_codes(self, seeds, numbers):
        """seeds (N,) int64, numbers (N, k) from 0 on -> the codes (N, k, D) with these numbers in
        each seed's sequence from the prior N(0, I)."""
        counters = numbers[..., None] * self.code_dim
        counters = counters + torch.arange(self.code_dim, device=numbers.device)  # (N, k, D)
        return random_normal(mix_seeds(seeds, Stream.CODE)[:, None, None], counters)

    def code_features(self, codes):
        """codes (N, k, D) -> (N, k, F): the features of all injections, side by side."""
        codes = codes.to(self.pos_embed.dtype)
        points = self.injected_at.values()
        return torch.cat([self.injections[k].features(codes[..., part]) for k, part in points], -1)


# -------------------------------------------------------------------------------------------------
# Presets, building models, parameter groups, pictures.


def sincos_position_embedding(grid, dim):
    """Fixed 2-D sine-cosine embedding (1, 1+L, dim), zero for the class token, in MAE's order: the
    column's half first."""
    x = build_sincos2d_pos_embed(list(grid), dim)  # (L, dim): sines, then cosines, rows first
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
    """The model for computing without gradients: a copy in a lower precision; for float32 the model
    itself. A copy needs half the memory traffic of autocast, whose residuals and norms are
    float32."""
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


def parameter_groups(model, weight_decay):
    """Groups for AdamW: the parameters of the MAE (part "mae") and of the injections (part "z").
    Each part has a group with weight decay, and a group without, for biases, norms and tokens.
    Frozen position embeddings are left out."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "z" if name.startswith("injections.") else "mae"
            decay = 0.0 if parameter.ndim < 2 or name.endswith("_token") else weight_decay
            group = {"params": [], "part": part, "weight_decay": decay}
            groups.setdefault((part, decay), group)["params"].append(parameter)
    return list(groups.values())


def pixels(pred, images, config):
    """Predictions (N,K,L,P*P*C) as normalised pixels of images (N,C,H,W). With norm_pix_loss they
    get the mean and deviation of the true patches, which the network does not predict."""
    if not config.norm_pix_loss:
        return pred
    mean, std = patch_statistics(patchify(images, config.patch_size)[:, None])
    return pred * std + mean


def paste(patches, images, mask):
    """Pastes patches (N,K,L,P*P*C) into images (N,C,H,W) where mask (N,L) is 1: (N,K,C,H,W)."""
    channels = images.shape[1]
    patch_size = math.isqrt(patches.shape[-1] // channels)
    grid = (images.shape[-2] // patch_size, images.shape[-1] // patch_size)
    true = patchify(images, patch_size)[:, None]
    return unpatchify(torch.where(mask[:, None, :, None].bool(), patches, true), grid, channels)


@torch.no_grad()
def completions(model, images, mask_noise, codes, mask_ratio, bands=()):
    """Pictures uint8 (N, 2 + K, 3, H, W) for images (N,C,H,W) normalised and codes (N,K,D): the
    image, the masked image, and a completion per code, with the visible patches pasted in. Without
    codes (None) K is 1. bands: the channels that are drawn, see Augmentation.to_pictures."""
    pred, mask = model(images, mask_noise, codes, mask_ratio)
    return pictures(pred if codes is not None else pred[:, None], images, mask, model.config, bands)


def pictures(pred, images, mask, config, bands=()):
    """The pictures of `completions`, for predictions (N,K,L,P*P*C) of images (N,C,H,W) normalised;
    mask (N,L), 1 = removed."""
    c, pred = config, pred.float()
    gray = normalize(images.new_full((1, c.channels, 1, 1), 128), c.mean, c.std)
    gray = gray.flatten().repeat(c.patch_size**2)
    masked = paste(gray.expand_as(pred[:, :1]), images, mask)
    completed = paste(pixels(pred, images, c), images, mask)
    cells = torch.cat([images[:, None], masked, completed], dim=1)  # (N, 2 + K, C, H, W)
    return to_pictures(cells, c.mean, c.std, bands)

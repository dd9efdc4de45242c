"""The encoders that probes take, from everywhere; their features of images; the accuracy of the
nearest neighbours among these features."""

import dataclasses
import difflib
from functools import partial
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.models
from huggingface_hub.utils import logging

import Data
import Utils
from Augmentation import MEAN, STD, channels, normalize
from internals.unwrap import split_key, unwrap
from internals.weights import fetch, load_all, load_model, read_content
from Models import PRESETS, build, in_precision
from Utils import (
    InputError,
    RunError,
    Stream,
    autocast,
    first_line,
    mix_seeds,
    naming,
    seeded,
    sum_over_processes,
)

# What a head may see of an image, as parts of `image_features`: the class token, the mean of the
# patch tokens, both side by side. Encoders without tokens have one vector for every part.
POOLS = {"cls": ("cls",), "mean": ("mean",), "both": ("cls", "mean"), "vector": ("cls",)}


def load_encoder(source, *, size=None, seed=0, dtype=torch.float32):
    """The encoder of any source, for use without gradients: an ImplicitMAE in this precision, or a
    ForeignEncoder. size: (height, width) of its images, else its own; seed: of fresh weights. An
    InputError says why it can't be loaded."""
    name = source.removeprefix("untrained:")
    trained, (library, _, rest) = name == source, name.partition(":")
    overrides = {"image_size": tuple(size)} if size else {}
    with seeded(mix_seeds(seed, Stream.PROBE)):
        if name == "pixels":
            return ForeignEncoder(nn.Flatten(), size or (32, 32), MEAN, STD, dtype)
        if library in LIBRARIES:
            return load_foreign(library, rest, trained, size, dtype)
        if trained:
            model = load_model(name, **overrides)
        else:
            config = PRESETS[name] if name in PRESETS else load_model(name).config
            model = build(dataclasses.replace(config, ip_spec=(), **overrides))
        return in_precision(model.eval(), dtype)


# -------------------------------------------------------------------------------------------------
# Encoders for elsewhere.

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


def encoder_state(model):
    """The encoder's tensors by timm's names."""
    return {n: x for n, x in model.state_dict().items() if n.startswith(ENCODER)}


def timm_arguments(config):
    """The arguments of timm's VisionTransformer for the encoder of a ModelConfig, without head."""
    c = config
    arguments = {"img_size": tuple(c.image_size), "patch_size": c.patch_size, "embed_dim": c.dim}
    arguments |= {"depth": c.depth, "num_heads": c.num_heads, "num_classes": 0}
    return arguments | ({"in_chans": c.channels} if c.channels != 3 else {})


def timm_network(model, **options):
    """timm's VisionTransformer with the encoder's weights. Its forward_features are the model's
    `encode`. options: further arguments, of a head for example."""
    options["norm_layer"] = partial(torch.nn.LayerNorm, eps=model.config.norm_eps)
    network = timm.models.VisionTransformer(**timm_arguments(model.config) | options)
    network.load_state_dict(network.state_dict() | encoder_state(model))
    return network


# -------------------------------------------------------------------------------------------------
# Encoders from elsewhere.


class EncoderSizes(NamedTuple):
    """The fields of a ModelConfig that probes read."""

    image_size: tuple[int, int]
    dim: int
    depth: int
    channels: int = 3
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


class ForeignEncoder(nn.Module):
    """A network from elsewhere with the parts of an ImplicitMAE that probes use. Computes in mixed
    precision."""

    code_dim = 0

    def __init__(self, network, image_size, mean, std, dtype, features=None):
        """features: images (N,C,H,W), normalised by mean and std -> class token and patches (N,
        1+L, C), or one vector (N, C); by default the network itself."""
        super().__init__()
        self.network, self.features = network, features or network
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        self.eval()
        with torch.no_grad():
            example = self.features(torch.zeros(1, 3, *image_size))
        self.pools = ("cls", "mean", "both") if example.ndim == 3 else ("vector",)
        depth = len(getattr(network, "blocks", ()))
        self.config = EncoderSizes(tuple(image_size), example.shape[-1], depth)

    def encode(self, images, codes=None):
        """images (N,C,H,W), normalised by our mean and std -> tokens (N, 1+L, C). A vector is given
        twice, as class token and as the only patch."""
        if (self.mean, self.std) != (MEAN, STD):
            all_values = (self.mean, self.std, MEAN, STD)
            mean, std, our_mean, our_std = (channels(x, images.device) for x in all_values)
            images = images * (our_std / std) + (our_mean - mean) / std
        with autocast(images.device, self.dtype):
            tokens = self.features(images)
        return tokens if tokens.ndim == 3 else tokens[:, None].expand(-1, 2, -1)


def load_foreign(library, name, trained, size, dtype):
    """The ForeignEncoder of a library's model NAME or NAME=FILE."""
    name, _, path = name.partition("=")
    source, (load, list_names) = f"{library}:{name}", LIBRARIES[library]
    names = list_names()
    if name.partition(".")[0] not in names and not name.startswith("hf-hub:"):
        similar = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {library}:{similar[0]}?" if similar else ""
        raise InputError(f"{library} has no model {name}{hint}")
    if path and not trained:
        raise InputError(f"untrained:{source} reads no weights; leave ={path} out")
    try:
        return load(name, trained, path, size, dtype)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"could not fetch the weights of {source} ({first_line(error)}); fetch them elsewhere "
            f"and give {source}=FILE, or take fresh ones by untrained:{source}"
        ) from None
    except Exception as error:  # a model that can't be built for this size can raise any error
        size_flag = f" with --input_size {size[0]} {size[1]}" if size else ""
        raise InputError(f"can't build {source}{size_flag}: {first_line(error)}") from None


def load_from_timm(name, trained, path, size, dtype):
    """timm's model. Features: the tokens of a ViT that has a class token, else the classifier's
    input."""
    logging.set_verbosity_error()  # hides warnings about retries; the final error says enough
    network = timm.create_model(name, pretrained=trained and not path, num_classes=0)
    if path:
        classifiers = network.pretrained_cfg.get("classifier") or ()
        classifiers = [classifiers] if isinstance(classifiers, str) else classifiers
        load_without_classifier(network, path, classifiers)
    config = timm.data.resolve_data_config(model=network)
    if size and hasattr(network, "set_input_size"):
        network.set_input_size(img_size=tuple(size))
    has_class_token = getattr(network, "cls_token", None) is not None

    def features(images):
        x = network.forward_features(images)
        if x.ndim != 3 or not has_class_token:
            return network.forward_head(x, pre_logits=True)
        return torch.cat([x[:, :1], x[:, network.num_prefix_tokens :]], dim=1)  # no registers

    size = size or config["input_size"][1:]
    return ForeignEncoder(network, size, config["mean"], config["std"], dtype, features)


def load_from_torchvision(name, trained, path, size, dtype):
    """torchvision's model. Features: the input of its classifier, the last linear layer."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    network = torchvision.models.get_model(name)
    linear = [at for at, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise InputError(f"torchvision:{name} has no linear classifier, so no features to probe")
    network.set_submodule(linear[-1], nn.Identity())
    if trained:
        load_without_classifier(network, path or fetch(weights.url), [linear[-1]])
    preset = weights.transforms()
    size = size or (preset.crop_size[0],) * 2
    return ForeignEncoder(network, size, preset.mean, preset.std, dtype)


# To probe models of another library, write a function like the two above. Name it here, with a
# function that lists the library's models.
LIBRARIES = {
    "timm": (load_from_timm, timm.list_models),
    "torchvision": (
        load_from_torchvision,
        partial(torchvision.models.list_models, torchvision.models),
    ),
}


def load_without_classifier(network, path, classifiers):
    """Loads a file's state dict, but not the layers named `classifiers`, into a network that lacks
    these layers; an InputError where it does not fit."""
    path, key = split_key(path)
    path, content = read_content(path)
    names = network.state_dict().keys()
    state, _ = unwrap(content, names, path=path, key=key, refusal=f"{path} does not fit")
    state = {n: x for n, x in state.items() if n.rpartition(".")[0] not in classifiers}
    with naming(path):
        load_all(network, state)


# -------------------------------------------------------------------------------------------------
# Features.


@torch.no_grad()
def image_features(model, images, seeds, parts, n_codes):
    """images (n,C,H,W), uint8 or uint16, on the model's device, seeds (n,) of their codes ->
    float32 (n, len(parts), C). Part "cls": the class token; "mean": the mean of the patch tokens.
    The tokens are means over n_codes codes; 0: without codes."""
    images = normalize(images, model.config.mean, model.config.std)
    if n_codes and model.code_dim:
        total, codes = 0, model.sample_codes(seeds.to(images.device), n_codes)  # (n, k, D)
        for few_codes in codes.split(8, dim=1):
            total = total + model.encode(images, few_codes).float().mean(1) * few_codes.shape[1]
        tokens = total / n_codes
    else:
        tokens = model.encode(images).float()  # (n, 1+L, C)
    features = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    return torch.stack([features[part] for part in parts], dim=1)


def extract(model, loader, indices, seeds, *, device, batch_size, parts, n_codes=0):
    """`image_features` (n, len(parts), C) of the images indices (n,), cropped by seeds (n,),
    batch_size at a time. Every process computes its share and gets all features."""
    features = torch.zeros(len(indices), len(parts), model.config.dim, device=device)
    chunks = Data.copied(loader.chunks(indices, seeds, batch_size), device)
    for rows, images in Utils.watch(chunks, "probe features", len(indices)):
        features[rows] = image_features(model, images, seeds[rows], parts, n_codes)
    sum_over_processes(features)
    return features


class NotFiniteError(RunError):
    """An encoder's features, or their variances, are not finite numbers: no accuracy can be told
    from them."""


def check_finite(features, title, advice="try --sample_dtype float32, or is the model damaged?"):
    """A NotFiniteError for features (n, ...) whose variances are not finite. title: of the images,
    for the message; advice: the message's end."""
    if not features.var(0, correction=0).isfinite().all():
        reason = f"the features of {title} images are not finite numbers, or too large to compare"
        raise NotFiniteError(f"{reason}; {advice}")


def effective_rank(features, epsilon=1e-7):
    """RankMe (Garrido et al. 2023, equation 1) of features (n, C): exp of the entropy of their
    singular values as shares of the sum, from 1 to min(n, C). It needs no labels."""
    shares = torch.linalg.svdvals(features.double())
    shares = shares / shares.sum().clamp(min=1e-300) + epsilon
    return torch.special.entr(shares).sum().exp().item()


def nearest_neighbors(features, labels, features_test, labels_test, k=20, temperature=0.07):
    """The accuracy, a fraction, of a vote of the k nearest training features by cosine similarity
    (Wu et al. 2018, section 3.4)."""
    features, features_test = F.normalize(features, dim=1), F.normalize(features_test, dim=1)
    n_classes, n_right = int(max(labels.max(), labels_test.max())) + 1, 0
    size = max(1, min(1024, 2**28 // len(features)))  # keeps the similarities below 1 GB
    for batch, truth in zip(features_test.split(size), labels_test.split(size), strict=True):
        similarity, nearest = (batch @ features.T).topk(min(k, len(features)), dim=1)
        votes = torch.zeros(len(batch), n_classes, device=features.device)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        n_right += int((votes.argmax(1) == truth).sum())
    return n_right / len(labels_test)

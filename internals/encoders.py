"""What is probed: encoders from everywhere, the features that they give of images, and how well
nearest neighbours tell classes by these."""

import dataclasses
import difflib
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import Data
import IO
import Utils
from Augmentation import MEAN, STD, channels, normalize
from internals.weights import check_config, fetch, read_state
from Models import PRESETS, build, in_precision
from Utils import InputError, Stream, autocast, first_line, mix_seeds, seeded, sum_over_processes

# What a head may see of an image, and the parts that it is made of: the class token, the mean of
# the patch tokens. Encoders without tokens have one vector.
POOLS = {"cls": ("cls",), "mean": ("mean",), "both": ("cls", "mean"), "vector": ("cls",)}


def load_encoder(source, *, size=None, seed=0, dtype=torch.float32):
    """The encoder of any source, to be used without gradients: an ImplicitMAE in this precision, or
    a Foreign, which does what a probe asks of one. size: (height, width) of its images, else its
    own; seed: of fresh weights. An InputError where it can't be had."""
    name = source.removeprefix("untrained:")
    trained, (kind, _, rest) = name == source, name.partition(":")
    with seeded(mix_seeds(seed, Stream.PROBE)):
        if name == "pixels":
            return Foreign(Parts(nn.Flatten(), nn.Flatten(), size or (32, 32)), dtype)
        if kind in FOREIGN:
            return load_foreign(kind, rest, trained, size, dtype)
        sizes = {"image_size": tuple(size)} if size else {}
        if trained:
            return in_precision(IO.load_model(name, **sizes).eval(), dtype)
        config = PRESETS[name] if name in PRESETS else IO.load_model(name).config
        config = dataclasses.replace(config, ip_spec=(), **sizes)
        check_config(config)
        return in_precision(build(config).eval(), dtype)


# -------------------------------------------------------------------------------------------------
# Encoders from elsewhere.


class Parts(NamedTuple):
    """A network from elsewhere: `features` turns images (N,3,H,W), normalised by mean and std, into
    class token and patches (N, 1+L, C), or into one vector (N, C)."""

    network: nn.Module
    features: callable
    image_size: tuple[int, int]
    mean: tuple = MEAN
    std: tuple = STD


class Shape(NamedTuple):
    """What a probe asks of a ModelConfig."""

    image_size: tuple[int, int]
    dim: int
    depth: int


class Foreign(nn.Module):
    """A network from elsewhere as probes use an ImplicitMAE, in mixed precision. A vector stands
    for class token and patches alike."""

    code_dim = 0

    def __init__(self, parts, dtype):
        super().__init__()
        self.network, self.features = parts.network.eval(), parts.features
        self.mean, self.std, self.dtype = tuple(parts.mean), tuple(parts.std), dtype
        with torch.no_grad():
            example = self.features(torch.zeros(1, 3, *parts.image_size))
        self.pools = ("cls", "mean", "both") if example.ndim == 3 else ("vector",)
        depth = len(getattr(parts.network, "blocks", ()))
        self.config = Shape(tuple(parts.image_size), example.shape[-1], depth)
        self.eval()

    def encode(self, images, codes=None):
        """images (N,3,H,W), normalised as ours are -> tokens (N, 1+L, C)."""
        if (self.mean, self.std) != (MEAN, STD):
            mean, std, our_mean, our_std = (
                channels(values, images.device) for values in (self.mean, self.std, MEAN, STD)
            )
            images = images * (our_std / std) + (our_mean - mean) / std
        with autocast(images.device, self.dtype):
            tokens = self.features(images)
        return tokens if tokens.ndim == 3 else tokens[:, None].expand(-1, 2, -1)


def load_foreign(kind, name, trained, size, dtype):
    """The Foreign for timm's or torchvision's model NAME[=FILE]."""
    name, _, path = name.partition("=")
    source, (make, names) = f"{kind}:{name}", FOREIGN[kind]
    if name.partition(".")[0] not in (known := names()) and not name.startswith("hf-hub:"):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {kind}:{near[0]}?" if near else ""
        raise InputError(f"{kind} has no model {name}{hint}")
    if path and not trained:
        raise InputError(f"untrained:{source} reads no weights; leave ={path} out")
    try:
        return Foreign(make(name, trained, path, size), dtype)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"could not fetch the weights of {source} ({first_line(error)}); fetch them elsewhere "
            f"and give {source}=FILE, or take fresh ones by untrained:{source}"
        ) from None
    except Exception as error:  # whatever a model raises that can't be built for this size
        shown = f" with --input_size {size[0]} {size[1]}" if size else ""
        raise InputError(f"can't make {source}{shown}: {first_line(error)}") from None


def from_timm(name, trained, path, size):
    """timm's model: the tokens of a ViT that has a class token, else what the classifier sees."""
    import timm
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries; what fails in the end is said in one line
    network = timm.create_model(name, pretrained=trained and not path, num_classes=0)
    if path:
        load_state(network, path, network.pretrained_cfg.get("classifier"))
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
    return Parts(network, features, size, config["mean"], config["std"])


def from_torchvision(name, trained, path, size):
    """torchvision's model: what its classifier, the last linear layer, sees."""
    from torchvision.models import get_model, get_model_weights

    weights, network = get_model_weights(name).DEFAULT, get_model(name)
    linear = [at for at, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise InputError(f"torchvision:{name} has no linear classifier, so no features to probe")
    if trained:
        load_state(network, path or fetch(weights.url), linear[-1])
    parent, _, last = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    preset = weights.transforms()
    size = size or (preset.crop_size[0],) * 2
    return Parts(network, network, size, tuple(preset.mean), tuple(preset.std))


def timm_names():
    import timm

    return timm.list_models()


def torchvision_names():
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


# To probe models of another library, write two functions like those above and name them here.
FOREIGN = {
    "timm": (from_timm, timm_names),
    "torchvision": (from_torchvision, torchvision_names),
}


def load_state(network, path, classifier):
    """Loads a file's state dict into a network, without its classifier, whose name or names these
    are; refuses one that does not fit."""
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    own, (state, _) = network.state_dict(), read_state(path)
    own, state = (
        {name: x for name, x in tensors.items() if name.rpartition(".")[0] not in heads}
        for tensors in (own, state)
    )
    wrong = own.keys() ^ state.keys()
    wrong |= {name for name in own.keys() - wrong if own[name].shape != state[name].shape}
    if wrong:
        raise InputError(f"{path} does not fit: {len(wrong)} tensors, first {min(wrong)}")
    network.load_state_dict(state, strict=False)


# -------------------------------------------------------------------------------------------------
# Features.


@torch.no_grad()
def image_features(model, images, seeds, parts, n_codes):
    """uint8 images (n,3,H,W) on the model's device, seeds (n,) of their codes -> float32
    (n, len(parts), C): of "cls" the class token, of "mean" the patch tokens' mean; averaged over
    n_codes codes, 0: without codes."""
    images = normalize(images)
    if n_codes and model.code_dim:
        total, codes = 0, model.sample_codes(seeds.to(images.device), n_codes)  # (n, k, D)
        for few in codes.split(8, dim=1):
            total = total + model.encode(images, few).float().mean(1) * few.shape[1]
        tokens = total / n_codes
    else:
        tokens = model.encode(images).float()  # (n, 1+L, C)
    made = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    return torch.stack([made[part] for part in parts], dim=1)


def extract(model, loader, indices, seeds, *, device, batch_size, parts, n_codes=0, pace=None):
    """image_features (n, len(parts), C) of images indices (n,), cropped by seeds (n,), batch_size
    at a time. Every process computes its share and gets all."""
    features = torch.zeros(len(indices), len(parts), model.config.dim, device=device)
    chunks = loader.chunks(indices, seeds, batch_size)
    chunks = Data.copied(chunks if pace is None else pace(chunks), device)
    for rows, images in Utils.watch(chunks, "probe features", len(indices)):
        features[rows] = image_features(model, images, seeds[rows], parts, n_codes)
    sum_over_processes(features)
    return features


def extract_features(
    model,
    loader,
    indices,
    seeds,
    *,
    device,
    batch_size,
    global_pool=True,
    ignore_codes=True,
    n_codes=1,
):
    """The encoder's features (n, C) float32 of images indices (n,), cropped by seeds (n,): the mean
    of the patch tokens, or the class token; unless codes are ignored, the mean over n_codes of
    them. Every process computes its share and gets all."""
    parts = ("mean",) if global_pool else ("cls",)
    n_codes = 0 if ignore_codes else n_codes
    options = {"device": device, "batch_size": batch_size, "parts": parts, "n_codes": n_codes}
    return extract(model, loader, indices, seeds, **options)[:, 0]


def nearest_neighbors(features, labels, features_test, labels_test, k=20, temperature=0.07):
    """The accuracy of the k nearest training features' vote by cosine similarity (Wu et al. 2018,
    section 3.4), a fraction."""
    features, features_test = F.normalize(features, dim=1), F.normalize(features_test, dim=1)
    n_classes, right = int(max(labels.max(), labels_test.max())) + 1, 0
    size = max(1, min(1024, 2**28 // len(features)))  # their similarities: at most 1 GB
    for test, truth in zip(features_test.split(size), labels_test.split(size), strict=True):
        similarity, nearest = (test @ features.T).topk(min(k, len(features)), dim=1)
        votes = torch.zeros(len(test), n_classes, device=features.device)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(labels_test)

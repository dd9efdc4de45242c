"""Linear heads on features, trained side by side by MAE's recipe: pure tensors in and out."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import Lars

from internals.encoders import POOLS
from Utils import Stream, mix_seeds

LOGITS = 2**26  # most that are computed at a time: 256 MB


class Head(NamedTuple):
    """What distinguishes a head. lr: base rate per 256 images."""

    pool: str
    lr: float
    wd: float


def rate(epoch, *, base, warmup, epochs):
    """MAE's rate at a point of training, in epochs with a fraction: linear warm-up from zero, then
    half a cosine down to zero."""
    if epoch < warmup:
        return base * epoch / warmup
    return base * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2


def lars(weights, biases, specs, scale):
    """timm's LARS as MAE has it: each head's weight adapts its rate, biases neither do nor decay.
    The base rates, the specs' times `scale`, become rates anew for each step."""
    groups = []
    for weight, bias, spec in zip(weights, biases, specs, strict=True):
        base = {"base": spec.lr * scale}
        groups += [
            {"params": [weight], "weight_decay": spec.wd, "always_adapt": True, **base},
            {"params": [bias], "weight_decay": 0.0, "always_adapt": False, **base},
        ]
    return Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001)


class Heads:
    """Linear heads behind one BatchNorm without affine, side by side: those of a pooling are one
    tensor, so that they are one matrix product. Each learns as if it were alone."""

    def __init__(self, specs, parts, n_classes, dim, *, scale=1.0, seed=0, device="cpu"):
        """specs: of Head, those of a pooling in a row; features will have `parts`, each of `dim`;
        scale: of the base rates, images per step / 256."""
        self.specs, self.n_classes = list(specs), n_classes
        self.mean = torch.zeros(len(parts) * dim, device=device)
        self.var = torch.ones(len(parts) * dim, device=device)
        self.stacks = []  # (columns of the features, weight, bias), one for each pooling
        for pool, group in itertools.groupby(self.specs, key=lambda spec: spec.pool):
            first, width = parts.index(POOLS[pool][0]) * dim, len(POOLS[pool]) * dim
            start = torch.empty(n_classes, width)  # the same for all: they differ in rates alone
            generator = torch.Generator().manual_seed(int(mix_seeds(seed, Stream.PROBE)))
            torch.nn.init.trunc_normal_(start, std=0.01, generator=generator)
            n = len(list(group))
            weight = start.to(device).repeat(n, 1, 1).requires_grad_()  # (heads, classes, width)
            bias = torch.zeros(n, n_classes, device=device, requires_grad=True)
            self.stacks.append((slice(first, first + width), weight, bias))
        # What LARS sees, one by one: views of the stacks.
        self.weights = [
            torch.nn.Parameter(w) for _, stack, _ in self.stacks for w in stack.detach()
        ]
        self.biases = [torch.nn.Parameter(b) for _, _, stack in self.stacks for b in stack.detach()]
        self.optimizer = lars(self.weights, self.biases, self.specs, scale)

    def normalize(self, features, training):
        """features (n, parts, C) -> (n, parts * C), in training by the statistics of these, which
        the running ones then follow."""
        statistics = features.flatten(1), self.mean, self.var
        return F.batch_norm(*statistics, training=training, momentum=0.1, eps=1e-6)

    def logits(self, x):
        """Normalised features (n, parts * C) -> (n, heads, classes)."""
        found = [
            F.linear(x[:, columns], weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)
            for columns, weight, bias in self.stacks
        ]
        return torch.cat(found, dim=1)

    def losses(self, logits, labels):
        """Each head's cross entropy, summed over images: logits (n, heads, classes) -> (heads,)."""
        n_heads = logits.shape[1]
        labels = labels.repeat_interleave(n_heads)
        losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        return losses.view(-1, n_heads).sum(0)

    def in_parts(self, *tensors):
        """Tensors (n, ...) in parts of as many images as have LOGITS logits."""
        size = max(1, LOGITS // (len(self.specs) * self.n_classes))
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def step(self, features, labels, **schedule):
        """One step on a whole batch, features (n, parts, C), labels (n,): the heads' losses
        (heads,). schedule: epoch, warmup and epochs of `rate`."""
        x, total = self.normalize(features, training=True), 0
        for _, weight, bias in self.stacks:
            weight.grad = bias.grad = None
        for part, truth in self.in_parts(x, labels):
            losses = self.losses(self.logits(part), truth) / len(x)
            losses.sum().backward()  # no head's gradient depends on another's loss
            total = total + losses.detach()
        weights = (gradient for _, stack, _ in self.stacks for gradient in stack.grad)
        biases = (gradient for _, _, stack in self.stacks for gradient in stack.grad)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            weight.grad, bias.grad = next(weights), next(biases)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(base=group["base"], **schedule)
        self.optimizer.step()
        return total

    @torch.no_grad()
    def evaluate(self, features, labels):
        """{"top1", "top5", "loss"}: lists, of all heads; accuracies as fractions."""
        total = torch.zeros(3, len(self.specs), dtype=torch.float64, device=features.device)
        for part, truth in self.in_parts(self.normalize(features, training=False), labels):
            logits = self.logits(part)
            ranked = logits.topk(min(5, self.n_classes), dim=2).indices
            hits = ranked == truth[:, None, None]  # (n, heads, 5)
            total += torch.stack(
                [hits[..., 0].sum(0), hits.any(2).sum(0), self.losses(logits, truth)]
            )
        return dict(zip(("top1", "top5", "loss"), (total / len(labels)).tolist(), strict=True))

    @torch.no_grad()
    def predict(self, features, head):
        """The classes (n,) that a head, by its number, takes the images for."""
        parts = self.in_parts(self.normalize(features, training=False))
        return torch.cat([self.logits(part)[:, head].argmax(1) for (part,) in parts])

    def state_dict(self):
        """All that changes."""
        stacks = [[weight.detach(), bias.detach()] for _, weight, bias in self.stacks]
        optimizer = self.optimizer.state_dict()
        return {"statistics": [self.mean, self.var], "stacks": stacks, "optimizer": optimizer}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Copies in what state_dict gave."""
        own = self.state_dict()
        for ours, theirs in zip(
            [own["statistics"], *own["stacks"]],
            [state["statistics"], *state["stacks"]],
            strict=True,
        ):
            for tensor, value in zip(ours, theirs, strict=True):
                tensor.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

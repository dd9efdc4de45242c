"""Linear heads, trained side by side on the same features by the recipe of MAE's linear probe."""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import Lars

from internals.encoders import POOLS
from Utils import Stream, mix_seeds

IMAGES_PER_PASS = 1024  # when heads are evaluated; limits the memory of their logits


class Head(NamedTuple):
    """The settings in which heads differ. lr: base learning rate per 256 images."""

    pool: str  # a key of POOLS
    lr: float
    wd: float  # weight decay


class Heads(nn.Module):
    """Linear heads behind one BatchNorm without affine. Each head learns as if it were alone."""

    def __init__(self, specs, parts, n_classes, dim, *, seed=0):
        """specs: a Head each; parts: names of the parts of the features; dim: width of each part.
        Heads of one pool start from the same weights, which `seed` determines."""
        super().__init__()
        self.norm = nn.BatchNorm1d(len(parts) * dim, eps=1e-6, affine=False)
        self.linears, self.columns = nn.ModuleList(), []  # columns: of the features, for each head
        for spec in specs:
            first, width = parts.index(POOLS[spec.pool][0]) * dim, len(POOLS[spec.pool]) * dim
            linear = nn.utils.skip_init(nn.Linear, width, n_classes)
            generator = torch.Generator().manual_seed(int(mix_seeds(seed, Stream.PROBE)))
            nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
            nn.init.zeros_(linear.bias)
            self.linears.append(linear)
            self.columns.append(slice(first, first + width))

    def forward(self, features):
        """Features (n, parts, dim) -> a list of logits (n, classes), one tensor per head."""
        x = self.norm(features.flatten(1))  # (n, parts * dim)
        heads = zip(self.linears, self.columns, strict=True)
        return [linear(x[:, columns]) for linear, columns in heads]

    @torch.no_grad()
    def evaluate(self, features, labels):
        """{"top1", "top5", "loss"} on features (n, parts, dim), labels (n,): a list each, one value
        per head. Accuracies are fractions."""
        self.eval()
        sums = torch.zeros(3, len(self.linears), dtype=torch.float64, device=features.device)
        passes = zip(features.split(IMAGES_PER_PASS), labels.split(IMAGES_PER_PASS), strict=True)
        for some_features, truth in passes:
            for number, logits in enumerate(self(some_features)):
                best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
                hits, loss = best == truth[:, None], F.cross_entropy(logits, truth, reduction="sum")
                sums[:, number] += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
        self.train()
        return dict(zip(("top1", "top5", "loss"), (sums / len(labels)).tolist(), strict=True))

    @torch.no_grad()
    def predict(self, features, number):
        """The classes (n,) that head `number` predicts for features (n, parts, dim)."""
        self.eval()
        logits = (self(some)[number] for some in features.split(IMAGES_PER_PASS))
        classes = torch.cat([some.argmax(1) for some in logits])
        self.train()
        return classes


def lars(heads, specs, images_per_step):
    """timm's LARS as in MAE's probe: the rate of a weight adapts to its size; the rate of a bias
    does not, and biases don't decay. `base` is each group's base rate, which train_step reads."""
    groups = []
    for linear, spec in zip(heads.linears, specs, strict=True):
        base = {"base": spec.lr * images_per_step / 256}
        weight = {"params": [linear.weight], "weight_decay": spec.wd, "always_adapt": True}
        groups += [weight | base, {"params": [linear.bias], "weight_decay": 0.0} | base]
    return Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001)


def train_step(heads, optimizer, features, labels, rate):
    """One gradient step of all heads on features (n, parts, dim), labels (n,); their losses
    (heads,). rate: of the schedule, as a share of the base rates."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["base"]
    losses = torch.stack([F.cross_entropy(logits, labels) for logits in heads(features)])
    optimizer.zero_grad()
    losses.sum().backward()  # no head's gradient depends on another head's loss
    optimizer.step()
    return losses.detach()

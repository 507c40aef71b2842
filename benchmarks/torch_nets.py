"""Small networks of the usual kinds in PyTorch, for `training_step.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def lenet5() -> nn.Module:
    """LeNet-5 with ReLU and max pooling, 61 k parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.around = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, after, H / stride, W / stride)."""
        return functional.relu(self.inner(x) + self.around(x))


def resnet18() -> nn.Module:
    """ResNet-18 with a 3x3 stem, 11.2 M parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    width = 64
    for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(width, after, stride), Residual(after, after, 1)]
        width = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def mobilenet(*, depthwise: bool = True) -> nn.Module:
    """Depthwise separable convolutions with ReLU6 and Hardswish, 50 k parameters.

    Args:
        depthwise: False leaves the depthwise convolutions out; pixels are dropped where they have
            strides. The rest works on tensors of the same sizes.
    """

    def separable(before: int, after: int, stride: int) -> list[nn.Module]:
        spatial: nn.Module = nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)
        if not depthwise:
            spatial = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        return [
            spatial,
            nn.BatchNorm2d(before),
            nn.ReLU6(),
            nn.Conv2d(before, after, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.Hardswish(),
        ]

    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        *separable(32, 64, 1),
        *separable(64, 128, 2),
        *separable(128, 128, 1),
        *separable(128, 256, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Encoder(nn.Module):
    """Two transformer layers in front of a classifier, 0.5 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 128)
        self.places = nn.Parameter(0.02 * torch.randn(1, 32, 128))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(128),
                    "qkv": nn.Linear(128, 384),
                    "out": nn.Linear(128, 128),
                    "norm2": nn.LayerNorm(128),
                    "up": nn.Linear(128, 512),
                    "down": nn.Linear(512, 128),
                }
            )
            for _ in range(2)
        )
        self.scores = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, 32) int64 -> (N, 10)."""
        count, length = tokens.shape
        x = self.words(tokens) + self.places
        mask = (tokens != 0)[:, None, None, :]
        for layer in self.layers:
            split = layer["qkv"](layer["norm1"](x)).reshape(count, length, 3, 4, 32)
            q, k, v = split.permute(2, 0, 3, 1, 4)
            weights = torch.where(mask, q @ k.transpose(-1, -2) / 32**0.5, torch.tensor(-1e4))
            mixed = (weights.softmax(-1) @ v).transpose(1, 2).reshape(count, length, 128)
            x = x + layer["out"](mixed)
            x = x + layer["down"](functional.gelu(layer["up"](layer["norm2"](x))))
        return self.scores(x[:, 0])


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet5": (lenet5, (64, 1, 28, 28)),
    "resnet18": (resnet18, (16, 3, 32, 32)),
    "mobilenet": (mobilenet, (16, 3, 32, 32)),
    "pointwise": (functools.partial(mobilenet, depthwise=False), (16, 3, 32, 32)),
    "encoder": (Encoder, (16, 32)),
}


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with seeded weights, a batch for it and labels."""
    build, shape = NETS[name]
    torch.manual_seed(0)
    net = build().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randint(0, 1000, shape) if name == "encoder" else torch.randn(*shape)
    return net, x, torch.randint(0, 10, shape[:1])

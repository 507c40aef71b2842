# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "onnx==1.23.2", "onnxscript==0.7.2", "numpy==2.4.6"]
# ///
"""Trains a small residual network on 8 x 8 digits and exports it with PyTorch's exporter.

`python models/digits_cnn_torch/train.py` takes about a minute on one core and writes model.onnx
beside this script: opset 18, input `image` float32 (batch, 1, 8, 8) in [0, 1], output `logits`
float32 (batch, 10). The exporter's optimization is cut down to constant folding, so the batch
normalizations stay nodes of their own and a compressor has them to fuse.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "calibration"
EPOCHS, BATCH = 40, 64


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch normalization, added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to the same shape."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(y)))


class DigitsNet(nn.Module):
    """Stem, residual block, max pooling, wider convolution, average pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(32)
        self.block = Residual(32)
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.wide_norm = nn.BatchNorm2d(64)
        self.hidden = nn.Linear(64 * 2 * 2, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, 8, 8) to logits (N, 10)."""
        x = functional.relu(self.stem_norm(self.stem(image)))
        x = self.pool(self.block(x))
        x = self.pool(functional.relu(self.wide_norm(self.wide(x))))
        x = torch.flatten(x, 1)
        return self.head(functional.relu(self.hidden(x)))


def load(name: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a file of the folder calibration."""
    with np.load(DATA / name) as data:
        return torch.from_numpy(data["image"]), torch.from_numpy(data["labels"])


def train(net: nn.Module, image: Tensor, labels: Tensor) -> None:
    """Adam with one cycle of the learning rate; images are moved by up to one pixel."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    steps = EPOCHS * -(-len(image) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    net.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(image)).split(BATCH):
            dy, dx = torch.randint(-1, 2, (2,)).tolist()
            moved = functional.pad(image[rows], (1, 1, 1, 1))[
                :, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx
            ]
            loss = functional.cross_entropy(net(moved), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def main() -> None:
    """Trains, exports, prints the test accuracy."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = DigitsNet()
    train(net, *load("digits.npz"))
    image, labels = load("digits_test.npz")
    with torch.no_grad():
        print("top1", (net(image).argmax(1) == labels).float().mean().item())
    program = torch.onnx.export(
        net,
        (image[:2],),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        opset_version=18,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    onnxscript.optimizer.fold_constants(program.model)
    onnxscript.optimizer.remove_unused_nodes(program.model)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with this machine's paths
    program.save(HERE / "model.onnx", external_data=False)


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "onnx==1.23.2", "numpy==2.4.6"]
# ///
"""Trains recurrent layers to tell waveforms of any length apart and exports them with PyTorch.

`python models/waves_lstm_torch/train.py` takes about a minute on one core and writes model.onnx
beside this script: opset 14, input `wave` float32 (batch, time, 1), output `logits` float32
(batch, 4): sine, square, sawtooth, chirp. A strided 1-D convolution halves the time axis, a
bidirectional LSTM and a GRU follow. The older exporter based on TorchScript is used: it writes LSTM
and GRU as one node each.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "calibration"))
from readers import WAVE_KINDS, wave_batches, waves_test  # noqa: E402  # from the line above

STEPS, BATCH = 1500, 32


class WavesNet(nn.Module):
    """Convolution, bidirectional LSTM, GRU, linear layer on the GRU's last state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 16, 5, stride=2, padding=2)
        self.lstm = nn.LSTM(16, 48, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(96, 48, batch_first=True)
        self.head = nn.Linear(48, len(WAVE_KINDS))

    def forward(self, wave: Tensor) -> Tensor:
        """(N, time, 1) to logits (N, 4)."""
        x = functional.relu(self.conv(wave.transpose(1, 2))).transpose(1, 2)
        x, _ = self.lstm(x)
        _, state = self.gru(x)
        return self.head(state[-1])


def accuracy(net: nn.Module) -> float:
    """Fraction of test waves that are told right."""
    right = total = 0
    with torch.no_grad():
        for feed in waves_test():
            found = net(torch.from_numpy(feed["wave"])).argmax(1).numpy()
            right += int((found == feed["labels"]).sum())
            total += len(found)
    return right / total


def main() -> None:
    """Trains, exports, prints the test accuracy."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = WavesNet()
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=STEPS)
    for feed in wave_batches(STEPS, BATCH, seed=0):
        logits = net(torch.from_numpy(feed["wave"]))
        loss = functional.cross_entropy(logits, torch.from_numpy(feed["labels"]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    net.eval()
    print("top1", accuracy(net))
    warnings.simplefilter("ignore")  # the older exporter announces its end
    torch.onnx.export(
        net,
        (torch.zeros(2, 50, 1),),
        HERE / "model.onnx",
        input_names=["wave"],
        output_names=["logits"],
        dynamic_axes={"wave": {0: "batch", 1: "time"}, "logits": {0: "batch"}},
        opset_version=14,
        dynamo=False,
    )


if __name__ == "__main__":
    main()

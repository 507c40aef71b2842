# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "onnx==1.23.2", "onnxscript==0.7.2", "numpy==2.4.6"]
# ///
"""Trains a transformer to tell the mood of made-up sentences and exports it with PyTorch.

`python models/sentences_transformer_torch/train.py` takes about two minutes on one core and writes
model.onnx beside this script: opset 20, input `tokens` int64 (batch, length), 0 is padding, output
`logits` float32 (batch, 2). Every one of 512 words adds -1, 0 or 1 to the mood, and one word turns
its successor around (see calibration/readers.py). The exporter writes GELU and layer normalization
as the operators of their names; the word embeddings are a `Gather`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "calibration"))
from readers import PADDING, WORDS, sentence_batches, sentences_test  # noqa: E402  # line above

STEPS, BATCH = 3000, 64
WIDTH, HEADS, LENGTH = 48, 4, 32


class Encoder(nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        """(N, T, WIDTH) to (N, HEADS, T, WIDTH / HEADS)."""
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` (N, T, WIDTH); `mask` (N, 1, 1, T) is added to the scores."""
        y = self.norm1(x)
        query, key, value = (self.heads(f(y)) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5 + mask
        x = x + self.mix((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class SentencesNet(nn.Module):
    """Word and position embeddings, two encoder layers, the mean of the words classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        nn.init.normal_(self.words.weight, std=0.1)
        self.layers = nn.ModuleList(Encoder() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) to logits (N, 2)."""
        used = (tokens != PADDING).float()
        mask = ((1 - used) * -1e4)[:, None, None, :]
        x = self.words(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        total = (self.norm(x) * used[:, :, None]).sum(1)
        return self.head(total / used.sum(1, keepdim=True))


def accuracy(net: nn.Module) -> float:
    """Fraction of test sentences that are told right."""
    right = total = 0
    with torch.no_grad():
        for feed in sentences_test():
            found = net(torch.from_numpy(feed["tokens"])).argmax(1).numpy()
            right += int((found == feed["labels"]).sum())
            total += len(found)
    return right / total


def train(net: nn.Module) -> None:
    """AdamW with one cycle of the learning rate; no sentence is seen twice."""
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
    for feed in sentence_batches(STEPS, BATCH, seed=0):
        logits = net(torch.from_numpy(feed["tokens"]))
        loss = functional.cross_entropy(logits, torch.from_numpy(feed["labels"]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    net.eval()


def main() -> None:
    """Trains, exports, prints the test accuracy."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = SentencesNet()
    train(net)
    print("top1", accuracy(net))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=LENGTH)
    program = torch.onnx.export(
        net,
        (torch.ones(3, 20, dtype=torch.int64),),
        input_names=["tokens"],
        output_names=["logits"],
        dynamic_shapes={"tokens": {0: batch, 1: length}},
        opset_version=20,
        dynamo=True,
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with this machine's paths
    program.save(HERE / "model.onnx", external_data=False)


if __name__ == "__main__":
    main()

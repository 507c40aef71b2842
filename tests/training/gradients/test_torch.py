"""Gradients beside PyTorch's, through whole networks; skipped where PyTorch is not installed."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import pytest

from onnxslim_passes import runtime
from onnxslim_passes.model import Model
from onnxslim_passes.training import Emitter, gradients, lower

torch = pytest.importorskip("torch")
nn = torch.nn


class Recurrent(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.net = kind(6, 5, num_layers=2, bidirectional=True)
        self.scores = nn.Linear(10, 4)

    def forward(self, x):
        return self.scores(self.net(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + nn.functional.gelu((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32, bias=False),
        nn.Hardswish(),
        nn.Conv2d(32, 48, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(48, 48, 3, padding=1, groups=48),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(48, 40, 3, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(40, 8, 3, stride=2, padding=1, output_padding=1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AvgPool2d(3, 2, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 5),
    )


NETS = {
    "convolutions": (convolutions, (2, 3, 16, 16)),
    "attention": (Attention, (2, 7, 8)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (7, 3, 6)),
    "GRU": (lambda: Recurrent(nn.GRU), (7, 3, 6)),
    "RNN": (lambda: Recurrent(nn.RNN), (7, 3, 6)),
}


def exported(net: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        torch.onnx.export(
            net,
            (x,),
            target,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
        )
    return onnx.load_from_string(target.getvalue())


@pytest.mark.long
@pytest.mark.parametrize("name", NETS)
def test_gradients_agree_with_torch(name: str) -> None:
    build, shape = NETS[name]
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(*shape, requires_grad=True)
    y = net(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()

    model = Model.from_proto(exported(net, x))
    lowered = lower(model).model
    emit = Emitter(lowered)
    (given,), (out,) = lowered.graph.inputs, lowered.graph.outputs
    loss = emit.reduce_sum(emit.mul(out, emit.constant(weight.numpy())))
    constants = {c.name: c for c in lowered.constants()}
    weights = {n: p for n, p in net.named_parameters() if n in constants}
    found = gradients(emit, loss, [given, *(constants[n] for n in weights)])
    emit.output(found[given], "d x")
    for label in weights:
        emit.output(found[constants[label]], f"d {label}")
    with runtime.open_session(lowered) as session:
        result = session.run({"x": x.detach().numpy()})
    for label, tensor in {"x": x, **weights}.items():
        expected = tensor.grad.numpy()
        # Float32 sums in another order.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(result[f"d {label}"], expected, atol=2e-5 * scale, rtol=1e-4)

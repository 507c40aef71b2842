"""Gradients by all weights of real networks, against finite differences along random directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxslim_passes import runtime
from onnxslim_passes.model import FLOAT_DTYPES, Model, load
from onnxslim_passes.training import Emitter, gradients, lower

OWN = Path(__file__).resolve().parents[3] / "models"
# Directions that change each weight by about this share of itself.
SHARE = 1e-3
# Corners of ReLU and of pooling lie within the step, and float32 outputs are rounded: relative to
# the root of the sum of squares over several directions.
TOLERANCE = 0.05
DIRECTIONS = 4


class Differentiated:
    """A network with the derivative of a random projection of one output by all its weights."""

    def __init__(self, model: Model, output: str | None = None, **settings: object) -> None:
        self.model = lower(model, **settings).model
        emit = Emitter(self.model)
        graph = self.model.graph
        tensors = {t.name: t for node in graph.nodes for t in node.outputs}
        out = tensors[output] if output else next(t for t in graph.outputs if emit.is_float(t))
        self.values = {
            c.name: np.array(c.values)
            for c in graph.initializers
            if c.dtype in FLOAT_DTYPES and c.size > 1
        }
        weights = [emit.promote(c) for c in list(graph.initializers) if c.name in self.values]
        factor = emit.input("factor", np.float32, emit.shape(out))
        loss = emit.reduce_sum(emit.mul(out, factor))
        found = gradients(emit, loss, weights)
        self.connected = [w.name for w in weights if w in found.connected]
        graph.outputs = []
        emit.output(out, "projected")
        for weight in weights:
            if weight in found.connected:
                emit.output(found[weight], f"d {weight.name}")
        self.model.remove_unused()

    def error(self, feed: dict[str, np.ndarray]) -> float:
        generator = np.random.default_rng(0)
        with runtime.open_session(self.model) as session:
            names = {spec.name for spec in session.inputs}
            shape = next(spec.shape for spec in session.inputs if spec.name == "factor")
            count = next(iter(feed.values())).shape[0]
            sizes = [size if isinstance(size, int) else count for size in shape]
            factor = generator.standard_normal(sizes).astype(np.float32)
            given = {"factor": factor, **feed, **self.values}
            given = {name: value for name, value in given.items() if name in names}
            found = session.run(given)
            differences, sizes_of = [], []
            for _ in range(DIRECTIONS):
                way = {
                    name: generator.standard_normal(self.values[name].shape)
                    * np.abs(self.values[name])
                    for name in self.connected
                }
                computed = sum(float((found[f"d {n}"] * way[n]).sum()) for n in way)
                ends = []
                for sign in (1, -1):
                    moved = {
                        n: (self.values[n] + sign * SHARE * way[n]).astype(np.float32) for n in way
                    }
                    outputs = session.run({**given, **moved}, ["projected"])
                    ends.append(outputs["projected"].astype(np.float64))
                measured = float(((ends[0] - ends[1]) * factor).sum()) / (2 * SHARE)
                differences.append(computed - measured)
                sizes_of.append(max(abs(computed), abs(measured)))
        return float(np.linalg.norm(differences) / np.linalg.norm(sizes_of))


def random_feed(model: Model, batch: int = 2) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    feed = {}
    for tensor in model.graph.inputs:
        shape = [size if isinstance(size, int) and size > 0 else batch for size in tensor.shape]
        if tensor.dtype.kind == "f":
            feed[tensor.name] = generator.random(shape).astype(tensor.dtype)
        else:
            feed[tensor.name] = generator.integers(1, 10, shape).astype(tensor.dtype)
    return feed


@pytest.mark.parametrize(
    "name",
    [
        "digits_cnn_keras",
        "digits_cnn_torch",
        "digits_vit_jax",
        "sentences_transformer_torch",
        "waves_lstm_torch",
    ],
)
def test_our_own_networks(name: str) -> None:
    model = load(OWN / name / "model.onnx")
    made = Differentiated(model)
    assert len(made.connected) > 3
    assert made.error(random_feed(model)) < TOLERANCE


@pytest.mark.long
def test_an_lstm_behind_nested_conditions(shared_models: Path) -> None:
    model = load(shared_models / "models" / "silero_vad_16k_op15.onnx")
    made = Differentiated(model, fixed_inputs={"sr": np.array(16000)}, sizes={"sequence": 576})
    assert len(made.connected) == 14
    generator = np.random.default_rng(1)
    feed = {
        "input": 0.3 * generator.standard_normal((2, 576)).astype(np.float32),
        "state": 0.3 * generator.standard_normal((2, 2, 128)).astype(np.float32),
    }
    assert made.error(feed) < TOLERANCE


@pytest.mark.long
def test_a_network_of_depthwise_convolutions(shared_models: Path) -> None:
    model = load(shared_models / "robust" / "vww_mobilenet_v1_025_tflite.onnx")
    made = Differentiated(model)
    assert len(made.connected) == 56
    assert made.error(random_feed(model, batch=1)) < TOLERANCE

"""fuse-batch-norm: the same outputs from fewer nodes, and a reason for each that stays."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.fold_constants import FoldConstants
from onnxslim_passes.passes.fuse_batch_norm import FuseBatchNorm
from onnxslim_passes.runtime import open_session
from tests.zoo_small import SMALL, feeds, noise, normalization, parsed

Array = npt.NDArray[Any]

# Rounding of float32 products; 100 dB is five digits.
EXACT_DB = 100.0


def model_of(text: str, **weights: Array) -> Model:
    return Model.from_proto(parsed(text, weights))


def fuse(model: Model) -> tuple[PassResult, dict[str, Decision]]:
    result = FuseBatchNorm().apply(model, Context())
    return result, {decision.where: decision for decision in result.decisions}


def operators(model: Model) -> list[str]:
    return [node.op for node in model.nodes()]


def assert_same(before: Model, after: Model, **shapes: tuple[int, ...]) -> None:
    with open_session(before, optimize="none") as a, open_session(after, optimize="none") as b:
        assert compare_outputs(a, b, feeds(**shapes)).sqnr_db >= EXACT_DB


BN = normalization("bn", 6, seed=1)
SHIFT = noise(6, seed=2, scale=1.0)
CONV = {"w": noise(6, 4, 3, 3, seed=3)}
BIASED = CONV | {"b": noise(6, seed=4, scale=1.0)}
HEAD = "g (float[N, 4, 7, 7] x) => (float[N, 6, 5, 5] y)"
FLAT = "g (float[N, 4] x) => (float[N, 6] y)"

FUSED: dict[str, tuple[str, dict[str, Array], list[str]]] = {
    "conv": (
        f"{HEAD} {{ c = Conv (x, w) y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }}",
        CONV | BN,
        ["Conv"],
    ),
    "conv with bias": (
        f"{HEAD} {{ c = Conv (x, w, b) "
        "y = BatchNormalization <epsilon = 0.1> (c, bn_s, bn_b, bn_m, bn_v) }",
        BIASED | BN,
        ["Conv"],
    ),
    "mul and add": (
        f"{HEAD} {{ c = Conv (x, w) m = Mul (c, s) y = Add (t, m) }}",
        CONV | {"s": SHIFT.reshape(6, 1, 1), "t": SHIFT.reshape(1, 6, 1, 1)},
        ["Conv"],
    ),
    "div and sub": (
        f"{HEAD} {{ c = Conv (x, w, b) m = Div (c, s) n = Sub (m, t) y = Sub (t, n) }}",
        BIASED | {"s": SHIFT.reshape(6, 1, 1), "t": SHIFT.reshape(6, 1, 1)},
        ["Conv"],
    ),
    "scalars": (
        f"{HEAD} {{ c = Conv (x, w) m = Mul (s, c) y = Add (m, t) }}",
        CONV | {"s": np.array([3], np.float32), "t": np.array(0.5, np.float32)},
        ["Conv"],
    ),
    "add to a bias of its own": (
        f"{HEAD} {{ c = Conv (x, w) y = Add (c, t) }}",
        CONV | {"t": SHIFT.reshape(6, 1, 1)},
        ["Conv"],
    ),
    "groups": (
        f"{HEAD} {{ c = Conv <group = 2> (x, w) "
        "y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        {"w": noise(6, 2, 3, 3)} | BN,
        ["Conv"],
    ),
    "transposed": (
        "g (float[N, 4, 4, 4] x) => (float[N, 6, 5, 5] y) { c = ConvTranspose (x, w) "
        "y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        {"w": noise(4, 6, 2, 2)} | BN,
        ["ConvTranspose"],
    ),
    "transposed in groups": (
        "g (float[N, 4, 4, 4] x) => (float[N, 6, 5, 5] y) { c = ConvTranspose <group = 2> "
        "(x, w, b) y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        {"w": noise(4, 3, 2, 2), "b": SHIFT} | BN,
        ["ConvTranspose"],
    ),
    "gemm": (
        f"{FLAT} {{ c = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) "
        "y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        {"w": noise(4, 6), "b": SHIFT} | BN,
        ["Gemm"],
    ),
    "gemm transposed without bias": (
        f"{FLAT} {{ c = Gemm <transB = 1> (x, w) m = Mul (c, s) y = Add (m, s) }}",
        {"w": noise(6, 4), "s": SHIFT},
        ["Gemm"],
    ),
    "gemm with a scalar bias": (
        f"{FLAT} {{ c = Gemm (x, w, b) y = Mul (c, s) }}",
        {"w": noise(4, 6), "s": SHIFT, "b": np.array(2, np.float32)},
        ["Gemm"],
    ),
    "matmul": (
        f"{FLAT} {{ c = MatMul (x, w) y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }}",
        {"w": noise(4, 6)} | BN,
        ["MatMul", "Add"],
    ),
    "matmul and add": (
        f"{FLAT} {{ c = MatMul (x, w) a = Add (b, c) "
        "n = BatchNormalization (a, bn_s, bn_b, bn_m, bn_v) y = Mul (n, s) }",
        {"w": noise(4, 6), "b": SHIFT.reshape(1, 6), "s": SHIFT} | BN,
        ["MatMul", "Add"],
    ),
    "matmul, scale only": (
        "g (float[N, 3, 4] x) => (float[N, 3, 6] y) { c = MatMul (x, w) y = Mul (c, s) }",
        {"w": noise(4, 6), "s": SHIFT},
        ["MatMul"],
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    text, weights, expected = FUSED[name]
    before, after = model_of(text, **weights), model_of(text, **weights)
    result, _ = fuse(after)
    assert result.changed
    assert operators(after) == expected
    assert all(d.taken for d in result.decisions if d.reason.count("bias of a MatMul") == 0)
    shape = next(iter(before.graph.inputs)).shape
    assert shape is not None
    assert_same(before, after, x=(2, *(int(size) for size in shape[1:])))


KEPT: dict[str, tuple[str, dict[str, Array], str]] = {
    "two consumers": (
        f"{HEAD[:-1]}, float[N, 6, 5, 5] z) {{ c = Conv (x, w) z = Relu (c) "
        "y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        CONV | BN,
        "has 2 consumers",
    ),
    "graph output": (
        f"{HEAD[:-1]}, float[N, 6, 5, 5] c) {{ c = Conv (x, w) "
        "y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        CONV | BN,
        "is an output of its graph",
    ),
    "another layer": (
        f"{HEAD} {{ c = Conv (x, w) r = Relu (c) "
        "y = BatchNormalization (r, bn_s, bn_b, bn_m, bn_v) }",
        CONV | BN,
        "follows Relu",
    ),
    "training": (
        f"{HEAD} {{ c = Conv (x, w) y, m, v = BatchNormalization <training_mode = 1> "
        "(c, bn_s, bn_b, bn_m, bn_v) }",
        CONV | BN,
        "training mode",
    ),
    "shared weight": (
        f"{HEAD[:-1]}, float[N, 6, 5, 5] z) {{ c = Conv (x, w) z = Conv (x, w) "
        "y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        CONV | BN,
        "is used 2 times",
    ),
    "along the width": (
        f"{HEAD} {{ c = Conv (x, w) y = Mul (c, s) }}",
        CONV | {"s": noise(5)},
        "shape [5] is not one value for each of the 6 channels",
    ),
    "one channel that is broadcast": (
        "g (float[N, 4, 7, 7] x) => (float[N, 6, 5, 5] y) { c = Conv (x, w) y = Mul (c, s) }",
        {"w": noise(1, 4, 3, 3), "s": SHIFT.reshape(6, 1, 1)},
        "shape [6, 1, 1] is not one value for each of the 1 channels",
    ),
    "one rank more": (
        "g (float[N, 4, 7, 7] x) => (float[1, N, 6, 5, 5] y) { c = Conv (x, w) y = Mul (c, s) }",
        CONV | {"s": np.ones((1, 1, 6, 1, 1), np.float32)},
        "is not one value for each",
    ),
    "constant divided": (
        f"{HEAD} {{ c = Conv (x, w) y = Div (s, c) }}",
        CONV | {"s": np.array(1, np.float32)},
        "divides a constant",
    ),
    "division by zero": (
        f"{HEAD} {{ c = Conv (x, w) y = Div (c, s) }}",
        CONV | {"s": np.array(0, np.float32)},
        "divides by zero",
    ),
    "no float32": (
        f"{HEAD} {{ c = Conv (x, w) y = Mul (c, s) }}",
        {"w": noise(6, 4, 3, 3, scale=1e30), "s": np.array(1e30, np.float32)},
        "does not fit into float32",
    ),
    "axis 1 is not the last": (
        "g (float[N, 6, 4] x) => (float[N, 6, 6] y) { c = MatMul (x, w) "
        "y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        {"w": noise(4, 6)} | BN,
        "not known to be the last axis",
    ),
    "weight is computed": (
        f"{HEAD} {{ v = Identity (w) c = Conv (x, v) "
        "y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }",
        CONV | BN,
        "fold-constants may make it one",
    ),
    "negative variance": (
        f"{HEAD} {{ c = Conv (x, w) y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v) }}",
        CONV | BN | {"bn_v": -np.ones(6, np.float32)},
        "variance + epsilon is not positive",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_a_reason(name: str) -> None:
    text, weights, reason = KEPT[name]
    model = model_of(text, **weights)
    source = model.to_proto().SerializeToString(deterministic=True)
    result, _ = fuse(model)
    assert not result.changed
    assert len(result.decisions) == 1
    assert reason in result.decisions[0].reason
    assert model.to_proto().SerializeToString(deterministic=True) == source


def test_a_shared_bias_is_copied() -> None:
    """Exporters merge equal biases of different layers."""
    text = f"""{HEAD[:-1]}, float[N, 6, 5, 5] z) {{
        c = Conv (x, w, b)  y = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v)
        z = Conv (x, v, b)
    }}"""
    weights = BIASED | BN | {"v": noise(6, 4, 3, 3, seed=9)}
    before, after = model_of(text, **weights), model_of(text, **weights)
    fuse(after)
    assert operators(after) == ["Conv", "Conv"]
    assert_same(before, after, x=(2, 4, 7, 7))


def test_a_fused_output_of_the_graph_is_not_passed_by() -> None:
    """After the Mul is fused, what Conv gives is the output that the Add must not change."""
    text = f"{HEAD[:-1]}, float[N, 6, 5, 5] m) {{ c = Conv (x, w) m = Mul (c, s) y = Add (m, s) }}"
    weights = CONV | {"s": SHIFT.reshape(6, 1, 1)}
    before, after = model_of(text, **weights), model_of(text, **weights)
    fuse(after)
    assert operators(after) == ["Conv", "Add"]
    assert_same(before, after, x=(2, 4, 7, 7))


def test_overridable_weights_are_left_alone() -> None:
    proto = parsed(FUSED["conv"][0], CONV | BN)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 4, 3, 3]))
    model = Model.from_proto(proto)
    result, _ = fuse(model)
    assert not result.changed
    assert "a caller may override" in result.decisions[0].reason
    model.fix_overridable_weights()
    assert fuse(model)[0].changed


def test_old_style_normalization() -> None:
    small = SMALL["conv_bn_opset7"]()
    model = Model.from_proto(small.proto)
    model.fix_overridable_weights()
    result, _ = fuse(model)
    assert [decision.taken for decision in result.decisions] == [True, True]
    assert "BatchNormalization" not in operators(model)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0, 3))
def test_any_scale(seed: int, exponent: float) -> None:
    """Channels of very different size, as small variances make them."""
    rng = np.random.default_rng(seed)
    scale = (10 ** rng.uniform(-exponent, exponent, 6)).astype(np.float32)
    text = f"{HEAD} {{ c = Conv (x, w, b) m = Mul (c, s) y = Add (m, t) }}"
    weights = BIASED | {"s": scale.reshape(6, 1, 1), "t": SHIFT.reshape(6, 1, 1)}
    before, after = model_of(text, **weights), model_of(text, **weights)
    fuse(after)
    assert_same(before, after, x=(1, 4, 7, 7))


NODES_AFTER = {
    "models/efficientnet_lite0.onnx": (115, (2, 3, 224, 224)),
    "models/resnet8_cifar10.onnx": (25, (2, 32, 32, 3)),
    "models/ppocr_v4_rec.onnx": (363, (2, 3, 48, 160)),
    "robust/ultraface_rfb320.onnx": (128, (1, 3, 240, 320)),
}


@pytest.mark.parametrize("name", NODES_AFTER)
def test_real_models(shared_models: Path, name: str) -> None:
    model = load(shared_models / name)
    work = model.copy()
    work.fix_overridable_weights()
    nodes, shape = NODES_AFTER[name]
    FoldConstants().apply(work, Context())
    fuse(work)
    assert len(operators(work)) <= nodes
    assert "BatchNormalization" not in operators(work)
    assert work.nbytes() < model.nbytes()
    with open_session(model) as a, open_session(work) as b:
        runs = [{a.inputs[0].name: noise(*shape, scale=0.5)}]
        assert compare_outputs(a, b, runs).sqnr_db >= EXACT_DB

"""Odd models and odd samples: every quantizing pass works or refuses, and says why.

Nothing crashes, no scale is NaN, zero or infinite, outputs that were finite stay finite, and every
layer has a decision with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Model, check_model
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Context, Decision, Pass, Stage
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]
Feeds = list[dict[str, Array]]

PIPELINES: dict[str, tuple[Pass, ...]] = {
    # Alone, correct-bias has no quantized layer to speak of; a lossless pass quantizes nothing.
    kind.name: (kind(),)
    for kind in PASSES.values()
    if kind.stage == Stage.QUANTIZE and not kind.lossless and kind.name != "correct-bias"
} | {
    "static-everywhere": (PASSES["quantize-static"](observer="mse", placement="everywhere"),),
    "static-all": (PASSES["quantize-static"](placement="all"),),
    "static-16-bit": (PASSES["quantize-static"](activations="uint16", placement="everywhere"),),
    "blocks": (PASSES["quantize-weights"](bits=4, per="block", scheme="asymmetric"),),
    "float16-graph": (PASSES["convert-float"](weights_only=False),),
    "equalized": (PASSES["equalize-channels"](), PASSES["quantize-static"](per_channel=False)),
    "smoothed": (PASSES["smooth-activations"](), PASSES["quantize-dynamic"]()),
    "corrected": (PASSES["quantize-static"](placement="everywhere"), PASSES["correct-bias"]()),
}


@dataclass(frozen=True)
class Odd:
    """A model, its samples, and what must be said of it by whom.

    Attributes:
        build: makes model and samples.
        said: pipeline -> a part of the reason of some decision, or of the refusal.
    """

    build: Callable[[], tuple[onnx.ModelProto, Feeds]]
    said: dict[str, str]


def noise(*shape: int, seed: int = 0, scale: float = 0.2) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def parsed(text: str, opset: int = 17, **weights: Array) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    return proto


def images(batch: int = 2, count: int = 3, **changed: Array) -> Feeds:
    return [{"x": noise(batch, 8, 10, 10, seed=i, scale=1.0), **changed} for i in range(count)]


CONVOLUTIONS = """g (float[N, 8, 10, 10] x) => (float[N, 24] y) {
    c = Conv <pads: ints = [1, 1, 1, 1]> (x, w, b)
    r = Relu (c)
    d = Conv (r, v)
    p = GlobalAveragePool (d)
    f = Flatten (p)
    y = MatMul (f, m)
}"""


def convolutions(opset: int = 17, **changed: Array) -> onnx.ModelProto:
    weights = {
        "w": noise(16, 8, 3, 3, seed=1),
        "b": noise(16, seed=2),
        "v": noise(32, 16, 1, 1, seed=3),
        "m": noise(32, 24, seed=4),
    }
    return parsed(CONVOLUTIONS, opset, **(weights | changed))


def changed(name: str, edit: Callable[[Array], None]) -> tuple[onnx.ModelProto, Feeds]:
    """The convolutions with one weight edited."""
    proto = convolutions()
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    edit(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return proto, images()


def put(index: Any, value: float) -> Callable[[Array], None]:
    return lambda values: values.__setitem__(index, value)


def branches() -> tuple[onnx.ModelProto, Feeds]:
    """An If whose else branch no sample reaches."""

    def branch(label: str, seed: int) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(f"{label}_y", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("MatMul", ["h", f"{label}_w"], [f"{label}_m"], name=f"{label}_mul"),
            helper.make_node("Relu", [f"{label}_m"], [f"{label}_y"], name=f"{label}_relu"),
        ]
        weight = numpy_helper.from_array(noise(32, 32, seed=seed), f"{label}_w")
        return helper.make_graph(nodes, label, [], [made], [weight])

    proto = parsed("g (float[N, 32] x, bool flag) => (float[N, 32] y) { }", w=noise(32, 32))
    proto.graph.node.append(helper.make_node("MatMul", ["x", "w"], ["h"], name="first"))
    proto.graph.node.append(
        helper.make_node(
            "If", ["flag"], ["y"], name="choose", then_branch=branch("then", 1),
            else_branch=branch("else", 2),
        )
    )  # fmt: skip
    flag = np.array(True)
    return proto, [{"x": noise(4, 32, seed=i, scale=1.0), "flag": flag} for i in range(3)]


MASKED = """g (float[N, 6, 32] x) => (float[N, 6, 32] y) {
    q = MatMul (x, w)
    k = Transpose <perm = [0, 2, 1]> (x)
    z = MatMul (q, k)
    s = Add (z, mask)
    p = Softmax (s)
    o = MatMul (p, x)
    y = MatMul (o, v)
}"""


def masked(low: float) -> tuple[onnx.ModelProto, Feeds]:
    """Attention whose mask holds the lowest number, or minus infinity."""
    mask = np.where(np.triu(np.ones((6, 6)), 1) > 0, np.float32(low), np.float32(0))
    feeds = [{"x": noise(2, 6, 32, seed=i, scale=1.0)} for i in range(3)]
    return parsed(MASKED, w=noise(32, 32, seed=1), v=noise(32, 32, seed=2), mask=mask), feeds


def half() -> tuple[onnx.ModelProto, Feeds]:
    proto = convolutions()
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    return proto, [{"x": feed["x"].astype(np.float16)} for feed in images()]


EMPTY = """g (float[N, 6, 32] x) => (float[N, A, 24] y) {
    c = MatMul (x, w)
    none = Slice (c, start, start, axis)
    e = MatMul (none, v)
    y = Concat <axis: int = 1> (c, e)
}"""


def empty() -> tuple[onnx.ModelProto, Feeds]:
    """A product that never gets a row."""
    weights = {"w": noise(32, 24, seed=1), "v": noise(24, 24, seed=2)}
    bounds = {"start": np.array([0]), "axis": np.array([1])}
    feeds = [{"x": noise(2, 6, 32, seed=i, scale=1.0)} for i in range(3)]
    return parsed(EMPTY, **weights, **bounds), feeds


def nothing() -> tuple[onnx.ModelProto, Feeds]:
    """A product over no elements at all."""
    text = "g (float[N, 0] x) => (float[N, 16] y) { y = MatMul (x, w) }"
    return parsed(text, w=np.zeros((0, 16), np.float32)), [{"x": np.zeros((2, 0), np.float32)}] * 2


def logarithms() -> tuple[onnx.ModelProto, Feeds]:
    """Minus infinity where a sample is 0; the outputs are finite."""
    text = """g (float[N, 32] x) => (float[N, 16] y) {
        l = Log (x)
        h = MatMul (l, w)
        e = Exp (h)
        s = Sigmoid (e)
        y = MatMul (s, v)
    }"""
    feeds = [{"x": np.abs(noise(4, 32, seed=i, scale=1.0))} for i in range(3)]
    feeds[1]["x"][0] = 0
    positive = np.abs(noise(32, 24, seed=1)) + 1  # 0 times infinity is NaN
    return parsed(text, w=positive, v=noise(24, 16, seed=2)), feeds


def constant_activation() -> tuple[onnx.ModelProto, Feeds]:
    """A layer that always sees the same number."""
    text = """g (float[N, 32] x) => (float[N, 16] y) {
        z = Mul (x, zero)
        c = Add (z, number)
        h = MatMul (c, w)
        g = MatMul (x, u)
        s = Add (h, g)
        y = MatMul (s, v)
    }"""
    scalars = {"zero": np.float32(0), "number": np.float32(0.7)}
    weights = {"w": noise(32, 24, seed=1), "u": noise(32, 24, seed=2), "v": noise(24, 16, seed=3)}
    feeds = [{"x": noise(4, 32, seed=i, scale=1.0)} for i in range(3)]
    return parsed(text, **{n: np.asarray(v) for n, v in scalars.items()}, **weights), feeds


STATIC = ("quantize-static", "static-everywhere")
ODD = {
    "branch never reached": Odd(
        branches, {"quantize-static": "", "quantize-dynamic": "int8 weights"}
    ),
    "dead channels": Odd(lambda: changed("w", put(slice(0, 4), 0.0)), {}),
    "dead layer": Odd(lambda: changed("w", put(slice(None), 0.0)), {}),
    "activations all zero": Odd(
        lambda: (convolutions(b=np.full(16, -50, np.float32)), images()),
        {"static-everywhere": "int8 weights"},
    ),
    "infinite activations": Odd(
        logarithms, dict.fromkeys(STATIC, "held NaN or infinity in calibration")
    ),
    "mask of the lowest number": Odd(lambda: masked(-3.4028235e38), {}),
    "mask of minus infinity": Odd(lambda: masked(-np.inf), {}),
    "constant activation": Odd(constant_activation, {"static-everywhere": "int8 weights"}),
    "huge outlier": Odd(lambda: changed("w", put((0, 0, 0, 0), 1e6)), {}),
    "outlier near the largest float": Odd(lambda: changed("v", put((0, 0, 0, 0), 3e38)), {}),
    "tiny weights": Odd(lambda: (convolutions(w=noise(16, 8, 3, 3, scale=1e-40)), images()), {}),
    "NaN weight": Odd(
        lambda: changed("w", put((1, 2, 0, 0), np.nan)),
        {
            "quantize-static": "holds NaN or infinity",
            "quantize-weights": "w[1, 2, 0, 0] is nan",
            "convert-float": "w[1, 2, 0, 0] is nan",
        },
    ),
    "infinite weight": Odd(
        lambda: changed("m", put((3, 4), np.inf)),
        {"quantize-dynamic": "holds NaN or infinity", "quantize-static": "holds NaN or infinity"},
    ),
    "float16 model": Odd(
        half,
        {
            "quantize-static": "float16; only float32 is quantized",
            "quantize-dynamic": "float16; only float32 is quantized",
        },
    ),
    "opset 9": Odd(
        lambda: (convolutions(opset=9), images()), {"static-everywhere": "int8 weights per channel"}
    ),
    "ragged batches": Odd(
        lambda: (convolutions(), images(1, 2) + images(3, 2) + images(2, 1)),
        {"static-everywhere": "int8 weights"},
    ),
    "batch 1 only": Odd(lambda: (fixed_batch(), images(1)), {"static-everywhere": "int8 weights"}),
    "empty tensor": Odd(empty, dict.fromkeys(STATIC, "was empty in every calibration run")),
    "no elements": Odd(
        nothing,
        {
            "quantize-weights": "has fewer elements than min_elements",
            "quantize-static": "nothing for an integer kernel",
        },
    ),
    "one sample": Odd(lambda: (convolutions(), images(1, 1)), {"static-everywhere": "int8"}),
}


def fixed_batch() -> onnx.ModelProto:
    proto = convolutions()
    for info in (*proto.graph.input, *proto.graph.output):
        dim = info.type.tensor_type.shape.dim[0]
        dim.ClearField("dim_param")
        dim.dim_value = 1
    return proto


CASES = [pytest.param(odd, name, id=f"{odd}-{name}") for odd in ODD for name in PIPELINES]


@pytest.mark.parametrize(("odd", "name"), CASES)
def test_works_or_says_why_not(odd: str, name: str) -> None:
    case = ODD[odd]
    proto, feeds = case.build()
    original = Model.from_proto(proto)
    work = original.copy()
    before = work.to_proto().SerializeToString(deterministic=True)
    try:
        decisions = apply(PIPELINES[name], work, feeds)
    except UnsupportedModelError as error:
        assert work.to_proto().SerializeToString(deterministic=True) == before
        decisions = [Decision(where="model", taken=False, reason=str(error))]
    check_said(decisions, case.said.get(name, ""))
    check_scales(work)
    check_outputs(original, work, feeds)


def apply(passes: tuple[Pass, ...], work: Model, feeds: Feeds) -> list[Decision]:
    decisions: list[Decision] = []
    context = Context(samples=Samples.from_feeds(feeds), floating=work.copy())
    for pass_ in passes:
        pass_.requires(work)
        decisions += pass_.apply(work, context).decisions
    StoreWeights().apply(work, context)
    return decisions


def check_said(decisions: list[Decision], wanted: str) -> None:
    assert all(decision.reason.strip() for decision in decisions)
    assert any(wanted in decision.reason for decision in decisions), [
        (decision.where, decision.reason) for decision in decisions
    ]


def check_scales(work: Model) -> None:
    for node in work.nodes():
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            scale = node.inputs[1]
            if hasattr(scale, "values"):
                values = scale.values.astype(np.float64)
                assert np.isfinite(values).all(), node.where
                assert (values > 0).all(), node.where


def check_outputs(original: Model, work: Model, feeds: Feeds) -> None:
    check_model(work)
    with open_session(original) as reference, open_session(work) as candidate:
        for feed in feeds:
            for (key, wanted), given in zip(
                reference.run(feed).items(), candidate.run(feed).values(), strict=True
            ):
                assert given.shape == wanted.shape
                if np.isfinite(wanted).all():
                    assert np.isfinite(given).all(), f"{key} is no longer finite"

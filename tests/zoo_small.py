"""Small networks of many kinds, with inputs to run them on: what every pass is tried with.

Weights are large enough (512 elements and more) for passes to care about, and pseudo-random but
fixed. Each network shows one thing that a pass can overlook.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]

NEWEST_OPSET = onnx.defs.onnx_opset_version()


@dataclass(frozen=True)
class Small:
    """A network and inputs that suit it.

    Attributes:
        proto: the model; a fresh message at every call of its builder.
        feeds: runs of the model.
    """

    proto: onnx.ModelProto
    feeds: tuple[dict[str, Array], ...]


Builder = Callable[[], Small]

SMALL: dict[str, Builder] = {}  # name -> what builds the network
IDLE: dict[str, Builder] = {}  # networks in which no pass has anything to do


def network(build: Builder) -> Builder:
    """Enters a builder into `SMALL` under its own name."""
    SMALL[build.__name__] = build
    return build


def idle(build: Builder) -> Builder:
    """Enters a builder into `IDLE` under its own name."""
    IDLE[build.__name__] = build
    return build


def noise(*shape: int, seed: int = 0, scale: float | None = None) -> Array:
    """Normal numbers; as a weight they keep the size of what goes through."""
    if scale is None:
        scale = 1 / np.sqrt(np.prod(shape[1:]) if len(shape) > 2 else shape[0])
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def parsed(
    text: str, weights: Mapping[str, Array], *, opset: int = 17, ir_version: int = 8, head: str = ""
) -> onnx.ModelProto:
    """A model of ONNX text with weights added where it names them, and metadata."""
    proto = onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["": {opset}{head}], '
        f'producer_name: "zoo", doc_string: "small">\n{text}'
    )
    give(proto.graph, weights)
    proto.metadata_props.add(key="labels", value="a,b,c")
    return proto


def give(graph: onnx.GraphProto, weights: Mapping[str, Array]) -> None:
    """Adds initializers; before IR version 4 as inputs, too, is the caller's business."""
    graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())


def feeds(**shapes: tuple[int, ...]) -> tuple[dict[str, Array], ...]:
    """Three runs with normal numbers, each input of the given shape."""
    return tuple(
        {
            name: noise(*shape, seed=100 * run + index, scale=1.0)
            for index, (name, shape) in enumerate(shapes.items())
        }
        for run in range(3)
    )


def normalization(name: str, channels: int, seed: int = 0) -> dict[str, Array]:
    """Parameters of a batch normalization: name_s, name_b, name_m, name_v."""
    rng = np.random.default_rng(seed)
    return {
        f"{name}_s": rng.uniform(0.5, 1.5, channels).astype(np.float32),
        f"{name}_b": rng.normal(0, 0.3, channels).astype(np.float32),
        f"{name}_m": rng.normal(0, 0.3, channels).astype(np.float32),
        f"{name}_v": rng.uniform(0.5, 1.5, channels).astype(np.float32),
    }


# ---------------- convolutions


def _conv_bn(opset: int, ir_version: int) -> Small:
    text = """
        g (float[N, 3, 12, 12] x) => (float[N, 10] y) {
            c1 = Conv <pads = [1, 1, 1, 1]> (x, w1)
            n1 = BatchNormalization (c1, bn1_s, bn1_b, bn1_m, bn1_v)
            r1 = Relu (n1)
            c2 = Conv <strides = [2, 2]> (r1, w2, b2)
            n2 = BatchNormalization <epsilon = 0.001> (c2, bn2_s, bn2_b, bn2_m, bn2_v)
            r2 = Relu (n2)
            p = GlobalAveragePool (r2)
            f = Flatten (p)
            y = Gemm <transB = 1> (f, w3, b3)
        }"""
    weights = {
        "w1": noise(16, 3, 3, 3, seed=1),
        "w2": noise(32, 16, 3, 3, seed=2),
        "b2": noise(32, seed=3, scale=0.1),
        "w3": noise(10, 32, seed=4),
        "b3": noise(10, seed=5, scale=0.1),
        **normalization("bn1", 16, seed=6),
        **normalization("bn2", 32, seed=7),
    }
    proto = parsed(text, weights, opset=opset, ir_version=ir_version)
    if proto.ir_version < 4:
        for tensor in proto.graph.initializer:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.input.append(info)
    return Small(proto, feeds(x=(2, 3, 12, 12)))


@network
def conv_bn_opset13() -> Small:
    """Convolutions with and without bias, batch normalization, a Gemm."""
    return _conv_bn(13, 7)


@network
def conv_bn_opset7() -> Small:
    """The oldest opset; every initializer is a graph input, as IR version 3 demands."""
    return _conv_bn(7, 3)


@network
def conv_bn_newest_opset() -> Small:
    """The newest opset."""
    ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", NEWEST_OPSET)])
    return _conv_bn(NEWEST_OPSET, ir_version)


@network
def conv_groups_and_transposed() -> Small:
    """Depthwise and transposed convolutions in groups; scales and shifts as Mul and Add."""
    text = """
        g (float[N, 16, 8, 8] x) => (float[N, 24, 16, 16] y) {
            c1 = Conv <group = 16, pads = [1, 1, 1, 1]> (x, depthwise)
            m1 = Mul (c1, scale)
            a1 = Add (m1, shift)
            r1 = Relu (a1)
            c2 = Conv (r1, pointwise)
            r2 = Relu (c2)
            t = ConvTranspose <group = 2, strides = [2, 2]> (r2, transposed)
            y = BatchNormalization (t, bn_s, bn_b, bn_m, bn_v)
        }"""
    weights = {
        "depthwise": noise(16, 1, 3, 3, seed=1),
        "scale": noise(1, 16, 1, 1, seed=2, scale=1.0),
        "shift": noise(16, 1, 1, seed=3, scale=0.1),
        "pointwise": noise(32, 16, 1, 1, seed=4),
        "transposed": noise(32, 12, 2, 2, seed=5),
        **normalization("bn", 24, seed=6),
    }
    return Small(parsed(text, weights), feeds(x=(2, 16, 8, 8)))


@network
def conv_float16() -> Small:
    """Everything in float16."""
    text = """
        g (float16[N, 8, 8, 8] x) => (float16[N, 10] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            n = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v)
            r = Relu (n)
            p = GlobalAveragePool (r)
            f = Flatten (p)
            m = MatMul (f, w2)
            y = Add (m, b2)
        }"""
    weights = {
        "w1": noise(32, 8, 3, 3, seed=1),
        "b1": noise(32, seed=2, scale=0.1),
        "w2": noise(32, 10, seed=3),
        "b2": noise(10, seed=4, scale=0.1),
        **normalization("bn", 32, seed=5),
    }
    half = {name: weight.astype(np.float16) for name, weight in weights.items()}
    inputs = tuple({"x": f["x"].astype(np.float16)} for f in feeds(x=(2, 8, 8, 8)))
    return Small(parsed(text, half), inputs)


# ---------------- products


def _mlp_weights() -> dict[str, Array]:
    return {
        "w1": noise(32, 48, seed=1),
        "b1": noise(48, seed=2, scale=0.1),
        "w2": noise(16, 48, seed=3),
        "b2": noise(16, seed=4, scale=0.1),
    }


_MLP = """
    g (float[N, 32] x) => (float[N, 16] y) {
        h = MatMul (x, w1)
        a = Add (h, b1)
        r = Relu (a)
        y = Gemm <transB = 1> (r, w2, b2)
    }"""


@network
def mlp() -> Small:
    """A MatMul with an Add, and a Gemm."""
    return Small(parsed(_MLP, _mlp_weights()), feeds(x=(4, 32)))


@network
def mlp_constant_nodes() -> Small:
    """The weights are `Constant` nodes."""
    proto = parsed(_MLP, {})
    for position, (name, weight) in enumerate(_mlp_weights().items()):
        tensor = numpy_helper.from_array(weight)
        proto.graph.node.insert(position, helper.make_node("Constant", [], [name], value=tensor))
    return Small(proto, feeds(x=(4, 32)))


@network
def mlp_overridable() -> Small:
    """The weights are defaults of graph inputs that a caller may override."""
    proto = parsed(_MLP, _mlp_weights())
    for tensor in proto.graph.initializer:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(info)
    return Small(proto, feeds(x=(4, 32)))


@network
def weight_is_output() -> Small:
    """A weight is an output of the graph, too."""
    proto = parsed(_MLP, _mlp_weights())
    proto.graph.output.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [32, 48]))
    return Small(proto, feeds(x=(4, 32)))


@network
def weights_shared_and_equal() -> Small:
    """One weight with two consumers, and two weights with the same values."""
    text = """
        g (float[N, 32] x) => (float[N, 32] y) {
            h = MatMul (x, w)
            r = Tanh (h)
            s = MatMul (r, w)
            t = Tanh (s)
            u = MatMul (t, twin1)
            v = Tanh (u)
            y = MatMul (v, twin2)
        }"""
    twin = noise(32, 32, seed=2)
    weights = {"w": noise(32, 32, seed=1), "twin1": twin, "twin2": twin.copy()}
    return Small(parsed(text, weights), feeds(x=(4, 32)))


@network
def transformer() -> Small:
    """Embeddings, one head of attention, layer normalization, a feed-forward block."""
    text = """
        g (int64[B, S] ids) => (float[B, S, 32] y) {
            e = Gather (table, ids)
            q = MatMul (e, wq)
            k = MatMul (e, wk)
            v = MatMul (e, wv)
            kt = Transpose <perm = [0, 2, 1]> (k)
            z = MatMul (q, kt)
            zs = Div (z, root)
            p = Softmax <axis = -1> (zs)
            c = MatMul (p, v)
            o = MatMul (c, wo)
            s1 = Add (e, o)
            n1 = LayerNormalization (s1, g1, h1)
            u = MatMul (n1, w1)
            ub = Add (u, b1)
            r = Relu (ub)
            d = MatMul (r, w2)
            s2 = Add (n1, d)
            y = LayerNormalization (s2, g2, h2)
        }"""
    squares = {name: noise(32, 32, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    weights = {
        "table": noise(40, 32, seed=10, scale=1.0),
        "root": np.array(np.sqrt(32), np.float32),
        **squares,
        "w1": noise(32, 64, seed=11),
        "b1": noise(64, seed=12, scale=0.1),
        "w2": noise(64, 32, seed=13),
        "g1": noise(32, seed=14, scale=1.0),
        "h1": noise(32, seed=15, scale=0.1),
        "g2": noise(32, seed=16, scale=1.0),
        "h2": noise(32, seed=17, scale=0.1),
    }
    ids = tuple({"ids": np.random.default_rng(i).integers(0, 40, (2, 7))} for i in range(3))
    return Small(parsed(text, weights), ids)


@network
def lstm() -> Small:
    """A recurrent layer and a Gemm on its last state."""
    text = """
        g (float[S, 2, 16] x) => (float[2, 8] y) {
            all, last, cell = LSTM <hidden_size = 24> (x, w, r, b)
            h = Squeeze (last, axis)
            y = Gemm (h, head, bias)
        }"""
    weights = {
        "w": noise(1, 96, 16, seed=1, scale=0.25),
        "r": noise(1, 96, 24, seed=2, scale=0.2),
        "b": noise(1, 192, seed=3, scale=0.1),
        "axis": np.array([0]),
        "head": noise(24, 8, seed=4),
        "bias": noise(8, seed=5, scale=0.1),
    }
    return Small(parsed(text, weights), feeds(x=(5, 2, 16)))


@network
def computed_weights() -> Small:
    """Weights that are cast, transposed and reshaped, and a shape that is known beforehand."""
    text = """
        g (float[2, 32] x) => (float[2, 4, 8] y) {
            w = Cast <to = 1> (half)
            wt = Transpose (w)
            h = MatMul (x, wt)
            size = Shape (x)
            rows = Slice (size, zero, one)
            target = Concat <axis = 0> (rows, rest)
            y = Reshape (h, target)
        }"""
    weights = {
        "half": noise(32, 32, seed=1).astype(np.float16),
        "zero": np.array([0]),
        "one": np.array([1]),
        "rest": np.array([4, 8]),
    }
    return Small(parsed(text, weights), feeds(x=(2, 32)))


# ---------------- bodies and functions


@network
def if_weights() -> Small:
    """Branches with weights of their own under one name, one of them equal to an outer weight."""

    def branch(label: str, weight: Array) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(f"{label}_y", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("MatMul", ["h", "inner"], [f"{label}_m"], name=f"{label}_product"),
            helper.make_node("Relu", [f"{label}_m"], [f"{label}_y"], name=f"{label}_relu"),
        ]
        tensor = numpy_helper.from_array(weight, "inner")
        return helper.make_graph(nodes, label, [], [made], [tensor])

    outer = noise(32, 32, seed=1)
    first = helper.make_node("MatMul", ["x", "outer"], ["h"], name="first")
    choose = helper.make_node(
        "If",
        ["flag"],
        ["y"],
        name="choose",
        then_branch=branch("then", noise(32, 32, seed=2)),
        else_branch=branch("else", outer),
    )
    proto = parsed("g (float[N, 32] x, bool flag) => (float[N, 32] y) { }", {"outer": outer})
    proto.graph.node.extend([first, choose])
    runs = feeds(x=(4, 32))
    return Small(proto, tuple({**f, "flag": np.array(i % 2 == 0)} for i, f in enumerate(runs)))


@network
def loop_weights() -> Small:
    """A Loop whose body has a weight and a constant of its own."""
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, ["N", 32])
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["m"], name="step"),
            helper.make_node("Tanh", ["m"], ["next"], name="squash"),
            helper.make_node("Identity", ["going"], ["still_going"], name="go_on"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            state,
        ],
        [
            helper.make_tensor_value_info("still_going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["N", 32]),
        ],
        [numpy_helper.from_array(noise(32, 32, seed=1), "w")],
    )
    weights = {"count": np.array(3), "yes": np.array(True)}
    proto = parsed("g (float[N, 32] x) => (float[N, 32] y) { }", weights)
    proto.graph.node.append(
        helper.make_node("Loop", ["count", "yes", "x"], ["y"], name="repeat", body=body)
    )
    return Small(proto, feeds(x=(4, 32)))


@network
def function_weights() -> Small:
    """A function that is called twice: one weight is an argument, one a constant inside."""
    text = """
        g (float[N, 32] x) => (float[N, 32] y) {
            h = local.dense (x, w1)
            y = local.dense (h, w2)
        }
        <domain: "local", opset_import: ["": 17]>
        dense (a, w) => (z) {
            m = MatMul (a, w)
            n = MatMul (m, inside)
            z = Tanh (n)
        }"""
    weights = {"w1": noise(32, 32, seed=1), "w2": noise(32, 32, seed=2)}
    proto = parsed(text, weights, head=', "local": 1')
    inside = numpy_helper.from_array(noise(32, 32, seed=3))
    constant = helper.make_node("Constant", [], ["inside"], value=inside)
    proto.functions[0].node.insert(0, constant)
    return Small(proto, feeds(x=(4, 32)))


# ---------------- nothing to do


@idle
def relu_only() -> Small:
    """No constant at all."""
    text = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }"
    return Small(parsed(text, {}), feeds(x=(2, 4)))


@idle
def tiny_weight() -> Small:
    """A weight that no pass finds worth its while, or that two values describe."""
    text = "g (float[N, 2] x) => (float[N, 2] y) { y = Gather <axis = 1> (x, order) }"
    return Small(parsed(text, {"order": np.array([1, 0])}), feeds(x=(2, 2)))

"""How large a model is: bytes, bytes as a download, parameters, zeros, multiply-accumulates."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import zstandard
from onnx import TensorProto

from onnxslim_passes.model import Constant, Model, Node, Types, Variable
from onnxslim_passes.runtime import Feed, node_runs

# `zstd -19` takes about half a second per MB: above this it must be asked for.
ZSTD_LIMIT_BYTES = 24_000_000
_ZSTD_LEVEL = 19

# Where the operands are that the multiplications are made of: (data, weight).
_OPERANDS = {
    "Conv": (0, 1),
    "ConvInteger": (0, 1),
    "QLinearConv": (0, 3),
    "ConvTranspose": (0, 1),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "LSTM": (0, 1),
    "GRU": (0, 1),
    "RNN": (0, 1),
}
_PARAMETER_INTEGERS = (
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.INT4,
    TensorProto.UINT4,
)
# Inputs that say how a quantized tensor is to be read.
_GRID_INPUTS = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
}


@dataclass(frozen=True)
class ModelSize:
    """The size of one model.

    Attributes:
        file_bytes: Bytes of the file, with its external data.
        zstd_bytes: Bytes after `zstd -19`; None if not measured.
        parameters: Elements of weights and biases, floats or quantized, without scales, zero
            points and shape arithmetic.
        nonzero_parameters: Those that stand for a value other than 0.
        macs: Multiply-accumulates of one run, of convolutions, matrix products and recurrent
            layers; None if they depend on the input's shape and no feed was given.
        macs_note: Why `macs` is None, or for what it holds.
    """

    file_bytes: int
    zstd_bytes: int | None
    parameters: int
    nonzero_parameters: int
    macs: int | None = None
    macs_note: str = ""


def measure_size(
    model: Model,
    path: str | Path | None = None,
    *,
    dense: Model | None = None,
    feed: Feed | None = None,
    zstd: bool | None = None,
) -> ModelSize:
    """Measures a model.

    Args:
        model: Stays as it is.
        path: Its file; without one the model is saved to a temporary folder to be weighed.
        dense: The model before its weights were stored: codes and tables are no parameters. By
            default `model` itself.
        feed: Inputs of one run, for exact multiply-accumulates: of the branches taken, loops
            counted as often as they run. Without it they come from the declared shapes.
        zstd: Whether to compress; by default files up to `ZSTD_LIMIT_BYTES` are, because level 19
            takes half a second per MB.

    Raises:
        RuntimeRefusedError: The model does not run on `feed`.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
            saved = Path(folder) / "model.onnx"
            model.save(saved)
            return measure_size(model, saved, dense=dense, feed=feed, zstd=zstd)
    files = _files(model, Path(path))
    file_bytes = sum(file.stat().st_size for file in files)
    if zstd is None:
        zstd = file_bytes <= ZSTD_LIMIT_BYTES
    parameters, nonzero = count_parameters(model if dense is None else dense)
    macs, note = count_macs(model, feed)
    return ModelSize(
        file_bytes, zstd_size(files) if zstd else None, parameters, nonzero, macs, note
    )


# ---------------- bytes


def _files(model: Model, path: Path) -> list[Path]:
    """The files of a model that is at `path`, without reading it again if it came from there."""
    return [path, *model.external_files()] if path == model.path else model_files(path)


def model_files(path: Path) -> list[Path]:
    """The model's file and those of its external data, each once."""
    proto = onnx.load(path, load_external_data=False)
    tensors = [t for graph in _graphs(proto.graph) for t in graph.initializer]
    files = {path: None}
    for tensor in tensors:
        for entry in tensor.external_data:
            if entry.key == "location" and (path.parent / entry.value).is_file():
                files[path.parent / entry.value] = None
    return list(files)


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graph and all bodies in it."""
    found, pending = [], [graph]
    while pending:
        current = pending.pop()
        found.append(current)
        for node in current.node:
            for attribute in node.attribute:
                pending.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
    return found


def zstd_size(files: Sequence[Path]) -> int:
    """Bytes after `zstd -19`, the files one after the other, as a stream."""
    total = 0
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    for file in files:
        with file.open("rb") as stream:
            size = file.stat().st_size
            for chunk in compressor.read_to_iter(stream, size=size):
                total += len(chunk)
    return total


# ---------------- parameters


def count_parameters(model: Model) -> tuple[int, int]:
    """The number of parameters, and of those that are not zero."""
    total = nonzero = 0
    weights = {id(weight.constant) for weight in model.weights()}
    for constant in model.constants():
        uses = [
            (node, index)
            for node in dict.fromkeys(constant.outputs)
            for index, tensor in enumerate(node.inputs)
            if tensor is constant
        ]
        uses = [(n, i) for n, i in uses if i not in _GRID_INPUTS.get(n.op, ())]
        if uses and (id(constant) in weights or _is_quantized(constant, uses)):
            total += constant.size
            nonzero += _count_nonzero(constant, uses)
    return total, nonzero


def _is_quantized(constant: Constant, uses: Sequence[tuple[Node, int]]) -> bool:
    """Whether an integer constant holds parameters: small types, and int32 biases."""
    if constant.elem_type in _PARAMETER_INTEGERS:
        return True
    biases = (("DequantizeLinear", 0), ("QLinearConv", 8))
    return constant.elem_type == TensorProto.INT32 and any((n.op, i) in biases for n, i in uses)


def _count_nonzero(constant: Constant, uses: Sequence[tuple[Node, int]]) -> int:
    """Elements that stand for a value other than 0: for integers, other than the zero point."""
    for node, index in uses:
        if node.op == "DequantizeLinear" and index == 0 and len(node.inputs) > 2:
            zero = node.inputs[2]
            if isinstance(zero, Constant) and not node.attr("block_size", 0):
                values, points = constant.values, zero.values
                if points.size > 1:
                    shape = [1] * values.ndim
                    shape[int(node.attr("axis", 1))] = points.size
                    points = points.reshape(shape)
                return int(np.count_nonzero(values != points))
    return sum(int(np.count_nonzero(piece)) for piece in constant.flat_pieces())


# ---------------- multiply-accumulates


def count_macs(model: Model, feed: Feed | None = None) -> tuple[int | None, str]:
    """Multiply-accumulates of one run, and a note on what they hold for or why there are none."""
    if feed is None:
        return _declared_macs(model)
    runs = node_runs(model, feed)
    total = sum(node_macs(r.op, r.inputs, r.outputs) for r in runs if r.op in _OPERANDS)
    shapes = ", ".join(f"{name} {np.shape(array)}" for name, array in feed.items())
    return total, f"for {shapes}"


def _declared_macs(model: Model) -> tuple[int | None, str]:
    """Multiply-accumulates as far as they follow from the declared shapes alone."""
    if model.functions:
        return None, "the model has functions of its own; give an input"
    types, total = model.types(), 0
    for node in model.nodes():
        if node.op in ("Loop", "Scan", "If"):
            return None, f"node {node.where!r} ({node.op}) may run or not; give an input"
        if node.op not in _OPERANDS:
            continue
        inputs = [_static_shape(types, tensor) for tensor in node.inputs]
        output = _static_shape(types, node.outputs[0])
        if output is None or any(inputs[i] is None for i in _OPERANDS[node.op]):
            return None, f"shapes at node {node.where!r} ({node.op}) are not fixed; give an input"
        total += node_macs(node.op, [shape or () for shape in inputs], [output])
    return total, "for the declared shapes"


def _static_shape(types: Types, tensor: Variable | Constant) -> tuple[int, ...] | None:
    """The shape if every size of it is known."""
    known = types.of(tensor)
    if known is None or known.shape is None or not known.static:
        return None
    return tuple(int(size) for size in known.shape if size is not None)


def node_macs(
    op: str, inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]]
) -> int:
    """Multiply-accumulates of one node from the shapes of its inputs and outputs.

    Conv, weights (O, I / groups, *kernel): output elements x I / groups x kernel.
    ConvTranspose, weights (I, O / groups, *kernel): input elements x O / groups x kernel.
    MatMul and Gemm: output elements x the length of the axis that is summed over.
    LSTM, GRU and RNN, X (steps, batch, I), W (directions, gates H, I), R (directions, gates H, H):
    steps x batch x (elements of W and R).
    """
    first, second = _OPERANDS[op]
    data, weight, out = inputs[first], inputs[second], outputs[0]
    if op in ("Conv", "ConvInteger", "QLinearConv"):
        return math.prod(out) * math.prod(weight[1:])
    if op == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    if op == "Gemm":  # transA does not matter: A has output rows x K elements
        return math.prod(data) * out[1]
    if op in ("LSTM", "GRU", "RNN"):
        return math.prod(data[:2]) * (math.prod(weight) + math.prod(inputs[second + 1]))
    return math.prod(out) * (data[-1] if data else 0)

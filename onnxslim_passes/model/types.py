"""Element types and shapes of tensors, inferred by ONNX."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import shape_inference, version_converter
from onnx.version_converter import ConvertError

from onnxslim_passes.model.ir import Constant, Graph, Variable, dimension_value
from onnxslim_passes.model.payload import numpy_dtype

if TYPE_CHECKING:
    from onnxslim_passes.model.model import Model

# The first opset whose Reshape is inferred from shapes that are computed in the graph. Reshape
# itself is the same as before.
_RESHAPE_OPSET = 14
_INFERENCE_ERRORS = (shape_inference.InferenceError, RuntimeError, ValueError)


@dataclass(frozen=True)
class TensorType:
    """What is known of a tensor before the model runs.

    Attributes:
        elem_type: ONNX element type; 0 if unknown.
        shape: a size, a symbol, or None for each dimension; None if even the rank is unknown.
    """

    elem_type: int
    shape: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int | None:
        """Number of dimensions, or None."""
        return None if self.shape is None else len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """NumPy (or ml_dtypes) type, or None."""
        return numpy_dtype(self.elem_type) if self.elem_type else None

    @property
    def static(self) -> bool:
        """Whether every size is known."""
        # Some exporters write -1 for a size that is not known.
        return self.shape is not None and all(
            isinstance(size, int) and size >= 0 for size in self.shape
        )


class Types:
    """The types of one moment; ask the model again after edits."""

    def __init__(self) -> None:
        self._known: dict[int, TensorType] = {}
        # Keeps tensors alive, so that an id is never reused while this table lives.
        self._tensors: list[Variable] = []

    def of(self, tensor: Variable | Constant) -> TensorType | None:
        """What is known of a tensor, or None."""
        if isinstance(tensor, Constant):
            return TensorType(tensor.elem_type, tensor.shape)
        return self._known.get(id(tensor))

    def learn(self, tensor: Variable | Constant, info: onnx.ValueInfoProto) -> None:
        """Takes over a declaration; others than tensors are passed over."""
        if isinstance(tensor, Constant) or info.type.WhichOneof("value") != "tensor_type":
            return
        declared = info.type.tensor_type
        shape = None
        if declared.HasField("shape"):
            shape = tuple(dimension_value(dim) for dim in declared.shape.dim)
        self._known[id(tensor)] = TensorType(declared.elem_type, shape)
        self._tensors.append(tensor)


def infer_types(model: "Model", outline: onnx.ModelProto) -> Types:
    """The types of all tensors of `model`, from its message without large weights.

    Where ranks stay unknown in an older opset, they are those of the same model in a newer one,
    which ONNX infers better. So a file as downloaded is as well known as one that was prepared.
    """
    inferred = _infer(outline)
    if model.opset < _RESHAPE_OPSET and not model.functions and not _is_ranked(inferred.graph):
        inferred = _infer_newer(outline) or inferred
    types = Types()
    _learn_graph(types, model.graph, inferred.graph)
    for function in model.functions:
        for tensor in function.inputs:
            if tensor.info is not None:
                types.learn(tensor, tensor.info)
    return types


def _infer(outline: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return shape_inference.infer_shapes(outline, data_prop=True)
    except _INFERENCE_ERRORS:
        # An operator the installed ONNX does not know well; the declared types still hold.
        return outline


def _infer_newer(outline: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model in a newer opset, with types; tensors keep their names. None if that fails."""
    try:
        newer = version_converter.convert_version(outline, _RESHAPE_OPSET)
        return shape_inference.infer_shapes(newer, data_prop=True)
    except (*_INFERENCE_ERRORS, ConvertError, IndexError):
        return None


def _is_ranked(graph: onnx.GraphProto) -> bool:
    """Whether the rank of every tensor that a node makes is known."""
    tensors = (*graph.value_info, *graph.output)
    ranked = {info.name for info in tensors if info.type.tensor_type.HasField("shape")}
    return all(name in ranked for node in graph.node for name in node.output if name)


def _learn_graph(types: Types, graph: Graph, proto: onnx.GraphProto) -> None:
    tensors: dict[str, Variable | Constant] = {tensor.name: tensor for tensor in graph.inputs}
    makers = {}
    for node in graph.nodes:
        for tensor in node.outputs:
            tensors[tensor.name] = tensor
            makers[tensor.name] = node
    for info in (*proto.value_info, *proto.input, *proto.output):
        if info.name in tensors:
            types.learn(tensors[info.name], info)
    for message in proto.node:
        node = makers.get(next((name for name in message.output if name), ""))
        if node is None:
            continue
        bodies = dict(node.bodies())
        for attribute in message.attribute:
            if attribute.name in bodies:
                _learn_graph(types, bodies[attribute.name], attribute.g)

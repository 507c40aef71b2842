"""Evaluates nodes of a model outside of it, in ONNX Runtime, many in one session.

`infer_sizes` tells how many bytes their outputs will have, before anything is computed; `evaluate`
computes. Both look at nodes of one scope (the main graph with its bodies, or one function with its
own) whose inputs are constants, known arrays, or outputs of each other.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper, shape_inference

from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.model import Constant, Graph, Model, Node, Variable
from onnxslim_passes.model.exporting import Exporter, held
from onnxslim_passes.model.payload import stored_bytes
from onnxslim_passes.runtime import open_session

Array: TypeAlias = npt.NDArray[Any]
Known: TypeAlias = Mapping[Variable, Array]
TensorWriter: TypeAlias = Callable[[Constant], TensorProto]

# Values that shapes are made of; ONNX infers shapes without the others.
_SHAPE_BYTES = 4096
# The first IR version whose initializers need not be inputs, too.
_FREE_INITIALIZERS_IR = 4


@dataclass
class Evaluation:
    """What came of evaluating nodes.

    Attributes:
        values: the arrays asked for.
        failures: why a node gave none.
    """

    values: dict[Variable, Array] = field(default_factory=dict)
    failures: dict[Node, str] = field(default_factory=dict)


def infer_sizes(
    model: Model, scope: Graph, nodes: Sequence[Node], known: Known
) -> dict[Variable, int]:
    """Bytes of those outputs of `nodes` whose type and shape ONNX infers; the others are left out.

    Args:
        model: the model.
        scope: its main graph or function that the nodes stand in or below.
        nodes: in topological order.
        known: outputs of other nodes, or of these, that are known already.
    """
    small = _Extract(model, scope, known, _without_large_values)
    proto, names = small.build(nodes, ())
    try:
        inferred = shape_inference.infer_shapes(proto, data_prop=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    tensors = {name: tensor for tensor, name in names.items()}
    sizes = {}
    for info in inferred.graph.value_info:
        declared, tensor = info.type.tensor_type, tensors.get(info.name)
        dims = declared.shape.dim
        sized = declared.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
        if not sized or not isinstance(tensor, Variable) or not declared.elem_type:
            continue
        count = int(np.prod([dim.dim_value for dim in dims], dtype=np.float64))
        sizes[tensor] = stored_bytes(declared.elem_type, count)
    return sizes


def evaluate(
    model: Model, scope: Graph, nodes: Sequence[Node], known: Known, wanted: Collection[Variable]
) -> Evaluation:
    """Computes outputs of nodes; what the runtime refuses is narrowed down to single nodes.

    Args:
        model: the model.
        scope: its main graph or function that the nodes stand in or below.
        nodes: in topological order.
        known: outputs of other nodes that are known already.
        wanted: the outputs to compute.
    """
    done = Evaluation()
    _evaluate(model, scope, nodes, dict(known), set(wanted), done)
    done.values = {tensor: array for tensor, array in done.values.items() if tensor in wanted}
    return done


def _evaluate(
    model: Model,
    scope: Graph,
    nodes: Sequence[Node],
    known: dict[Variable, Array],
    wanted: set[Variable],
    done: Evaluation,
) -> None:
    """Adds to `done` and to `known`."""
    nodes = _without_dependents(nodes, done)
    outputs = [tensor for node in nodes for tensor in node.outputs if tensor in wanted]
    if not outputs:
        return
    try:
        values = _run(model, scope, nodes, known, outputs)
    except RuntimeRefusedError as error:
        if len(nodes) == 1:
            done.failures[nodes[0]] = str(error)
            return
        halves = nodes[: len(nodes) // 2], nodes[len(nodes) // 2 :]
        needed = {tensor for node in halves[1] for tensor in node.inputs}
        _evaluate(model, scope, halves[0], known, wanted | needed, done)
        _evaluate(model, scope, halves[1], known, wanted, done)
        return
    known.update(values)
    done.values.update(values)


def _without_dependents(nodes: Sequence[Node], done: Evaluation) -> list[Node]:
    """The nodes that take nothing from a failed one; the others fail with it."""
    missing = {tensor: node for node in done.failures for tensor in node.outputs}
    kept = []
    for node in nodes:
        maker = next((missing[t] for t in node.inputs if t in missing), None)
        if maker is None:
            kept.append(node)
            continue
        done.failures[node] = f"takes the output of {maker.where!r}, which was not folded"
        missing.update(dict.fromkeys(node.outputs, node))
    return kept


def _run(
    model: Model, scope: Graph, nodes: Sequence[Node], known: Known, outputs: Sequence[Variable]
) -> dict[Variable, Array]:
    """One session and one run.

    Raises:
        RuntimeRefusedError: the runtime does not load or run it, or a result is no array.
    """
    proto, names = _Extract(model, scope, known, held).build(nodes, outputs)
    # Kernels as they are: fusing would change rounding, and there is nothing to gain in one run.
    with open_session(proto, optimize="none") as session:
        results = session.run({}, [names[tensor] for tensor in outputs])
    values = {}
    for tensor in outputs:
        value = results[names[tensor]]
        if not isinstance(value, np.ndarray | np.generic) or np.asarray(value).dtype.kind in "OSU":
            raise RuntimeRefusedError(f"{tensor.name!r} is text or no tensor, which is not stored")
        values[tensor] = np.asarray(value)
    return values


class _Extract:
    """Builds a model of some nodes, in which every tensor has a name of its own.

    Names are not unique across bodies in ONNX, so that those of the model cannot be used.
    """

    def __init__(self, model: Model, scope: Graph, known: Known, write: TensorWriter) -> None:
        source = scope.proto if scope.is_function else model.proto
        self._known = known
        self._write = write
        self._proto = onnx.ModelProto(ir_version=max(model.ir_version, _FREE_INITIALIZERS_IR))
        self._proto.opset_import.extend(source.opset_import)
        if not any(entry.domain in ("", "ai.onnx") for entry in source.opset_import):
            self._proto.opset_import.add(domain="", version=scope.opset)
        self._proto.graph.name = "extract"
        self._names: dict[Variable | Constant, str] = {}

    def build(
        self, nodes: Iterable[Node], outputs: Iterable[Variable]
    ) -> tuple[onnx.ModelProto, dict[Variable | Constant, str]]:
        """The model and the names in it."""
        exporter = Exporter(self._proto.ir_version)
        graph = self._proto.graph
        for node in nodes:
            if all(tensor in self._known for tensor in node.outputs if tensor.name):
                continue
            message = exporter.node(node)
            for index, tensor in enumerate(node.inputs):
                message.input[index] = self._input(tensor)
            for index, tensor in enumerate(node.outputs):
                message.output[index] = self._name(tensor) if tensor.name else ""
            graph.node.append(message)
        graph.output.extend(onnx.ValueInfoProto(name=self._name(tensor)) for tensor in outputs)
        return self._proto, self._names

    def _input(self, tensor: Variable | Constant) -> str:
        if tensor.is_empty():
            return ""
        is_new = tensor not in self._names
        name = self._name(tensor)
        if is_new and isinstance(tensor, Constant):
            message = TensorProto()
            message.CopyFrom(self._write(tensor))
            message.name = name
            self._proto.graph.initializer.append(message)
        elif is_new and tensor in self._known:
            array = self._known[tensor]
            self._proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _name(self, tensor: Variable | Constant) -> str:
        return self._names.setdefault(tensor, f"t{len(self._names)}")


def _without_large_values(constant: Constant) -> TensorProto:
    if constant.size * constant.dtype.itemsize <= _SHAPE_BYTES:
        return held(constant)
    return TensorProto(dims=constant.shape, data_type=constant.elem_type)

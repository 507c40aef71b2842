"""Element types, shapes and known values of every tensor of a graph that grows node by node.

A gradient needs to know which axes of a tensor have a fixed size and which of the others are
equal. ONNX's shape inference answers with symbols that it gives up at the first arithmetic, so it
is run twice, each time with another prime in place of every free size. A dimension that comes out
the same both times is static; two dimensions that agree in both are one symbol. Arithmetic on
shapes is computed in both worlds as well, whatever operators it is made of.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TypeProto, checker, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Constant, Model, Node, Variable
from onnxslim_passes.model.exporting import Exporter, sorted_nodes

Array = npt.NDArray[Any]
Tensor = Variable | Constant
Shape = tuple[int | str, ...]

# Two sizes of the first free dimension, of the second, ...: far from each other and from any size
# that halving them would meet. The small ones are for tables of limited length (positions).
_LARGE = (
    (7919, 4787),
    (7907, 4721),
    (7901, 4673),
    (7883, 4649),
    (7879, 4637),
    (7877, 4591),
    (7867, 4561),
    (7853, 4517),
)
_SMALL = ((61, 37), (59, 31), (53, 29), (47, 23))
_TINY = ((13, 11), (12, 9), (10, 7))
# Networks that divide a size and come back to it need a multiple: of the strides of five levels,
# of windows of 3, 5 or 7.
_SIZES = (
    _LARGE,
    _SMALL,
    _TINY,
    tuple((64 * one, 64 * other) for one, other in _SMALL),
    tuple((6720 * one, 6720 * other) for one, other in _SMALL),
)
# Of these the standard says the shape of the output, but its inference does not tell.
_SAME_SHAPE = frozenset(("Binarizer", "Normalizer", "Scaler"))
# Values of more elements than this are not followed: shapes are made of few.
_FEW = 256

_INFERENCE_ERRORS = (
    shape_inference.InferenceError,
    checker.ValidationError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
)
# What the reference implementation raises on inputs that it does not take.
_EVALUATION_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


class Shapes:
    """What is known of the tensors of a model's main graph before it runs.

    Args:
        model: the model; `learn` what is added to it later.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._symbols: dict[tuple[int, int], str] = {}
        self._worlds = _consistent_worlds(model)
        self._name_free_sizes()

    def learn(self, node: Node) -> None:
        """Infers the outputs of a node whose inputs are known."""
        message = Exporter(self._model.ir_version).node(node)
        for world in self._worlds:
            world.infer(node, message)

    def declare(self, tensor: Variable, elem_type: int, shape: Shape) -> None:
        """Takes over the type of a new graph input; known symbols keep their sizes."""
        for index, world in enumerate(self._worlds):
            sizes = [size if isinstance(size, int) else self._pair(size)[index] for size in shape]
            world.types[tensor] = helper.make_tensor_type_proto(elem_type, sizes)

    def copy(self, source: Tensor, target: Variable) -> None:
        """Lets `target` have the type of `source`."""
        for world in self._worlds:
            found = world.type_of(source)
            if found is not None:
                world.types[target] = found

    def elem_type(self, tensor: Tensor) -> int:
        """ONNX element type, 0 if unknown or not a tensor."""
        if isinstance(tensor, Constant):
            return tensor.elem_type
        found = self._worlds[0].types.get(tensor)
        return int(found.tensor_type.elem_type) if found is not None else 0

    def shape(self, tensor: Tensor) -> Shape | None:
        """Sizes and symbols, or None if not all dimensions could be inferred."""
        if isinstance(tensor, Constant):
            return tensor.shape
        pair = [world.sizes(tensor) for world in self._worlds]
        first, second = pair
        if first is None or second is None or len(first) != len(second):
            return None
        return tuple(
            one if one == other else self._symbol(one, other)
            for one, other in zip(first, second, strict=True)
        )

    def value(self, tensor: Tensor) -> Array | None:
        """The value, if it is the same whatever the free sizes are."""
        if isinstance(tensor, Constant):
            return tensor.values
        first, second = (world.value(tensor) for world in self._worlds)
        same = first is not None and second is not None and np.array_equal(first, second)
        return first if same else None

    def _symbol(self, one: int, other: int) -> str:
        return self._symbols.setdefault((one, other), f"size{len(self._symbols)}")

    def _pair(self, symbol: str) -> tuple[int, int]:
        for pair, name in self._symbols.items():
            if name == symbol:
                return pair
        # Doubled, so that a new symbol is no size of the model's own inputs.
        one, other = _pair(_LARGE, len(self._symbols))
        pair = (2 * one, 2 * other)
        self._symbols[pair] = symbol
        return pair

    def _name_free_sizes(self) -> None:
        for tensor in self._model.graph.inputs:
            first, second = (world.sizes(tensor) for world in self._worlds)
            if tensor.shape is None or first is None or second is None:
                continue
            for declared, one, other in zip(tensor.shape, first, second, strict=True):
                if isinstance(declared, str) and one != other:
                    self._symbols.setdefault((one, other), declared)


class _World:
    """One size for every free dimension, and what follows from it.

    Attributes:
        types: of the variables that are known, sizes as numbers.
        contradictions: nodes whose inputs do not go together with these sizes.
    """

    def __init__(self, model: Model) -> None:
        self._opsets = model.opsets
        self._imports = list(model.proto.opset_import)
        self._values: dict[Variable, Array | None] = {}
        self.types: dict[Variable, TypeProto] = {}
        self.contradictions = 0

    def infer(self, node: Node, message: onnx.NodeProto) -> None:
        """Infers types and shapes of the outputs of one node."""
        if any(True for _ in node.bodies()):
            return
        try:
            schema = defs.get_schema(node.op, self._opsets.get(node.domain, 1), node.domain)
        except defs.SchemaError:
            return
        named = {t.name: t for t in node.inputs if not t.is_empty()}
        types = {name: self.type_of(t) or TypeProto() for name, t in named.items()}
        data = {}
        for name, tensor in named.items():
            value = self.value(tensor) if self._may_decide_a_shape(node, tensor) else None
            if value is not None:
                data[name] = numpy_helper.from_array(np.asarray(value), name)
        try:
            found = shape_inference.infer_node_outputs(
                schema, message, types, data, opset_imports=self._imports
            )
        except _INFERENCE_ERRORS:
            self.contradictions += 1
            return
        for tensor in node.outputs:
            if tensor.name in found:
                self.types[tensor] = found[tensor.name]
        if node.op in _SAME_SHAPE and node.domain == "ai.onnx.ml":
            self._keep_shape(node)

    def _keep_shape(self, node: Node) -> None:
        sizes = self.sizes(node.inputs[0])
        if sizes is not None:
            elem_type = onnx.TensorProto.FLOAT
            self.types[node.outputs[0]] = helper.make_tensor_type_proto(elem_type, sizes)

    def believe(self, node: Node, symbols: Mapping[str, int]) -> None:
        """Takes the declared types of outputs that could not be inferred."""
        for tensor in node.outputs:
            if tensor.is_empty() or tensor.dtype is None or tensor.shape is None:
                continue
            if self.sizes(tensor) is None:
                sizes = [symbols.get(d) if isinstance(d, str) else d for d in tensor.shape]
                elem_type = helper.np_dtype_to_tensor_dtype(tensor.dtype)
                self.types[tensor] = helper.make_tensor_type_proto(elem_type, sizes)

    def type_of(self, tensor: Tensor) -> TypeProto | None:
        """The type with all sizes, or None."""
        if isinstance(tensor, Constant):
            return helper.make_tensor_type_proto(tensor.elem_type, tensor.shape)
        return self.types.get(tensor)

    def sizes(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape in this world, or None if a dimension of it is not known."""
        if isinstance(tensor, Constant):
            return tensor.shape
        found = self.types.get(tensor)
        if found is None or not found.tensor_type.HasField("shape"):
            return None
        dims = found.tensor_type.shape.dim
        if not all(dim.HasField("dim_value") for dim in dims):
            return None
        return tuple(dim.dim_value for dim in dims)

    def value(self, tensor: Tensor) -> Array | None:
        """The value of a small tensor if it is known before the run."""
        if isinstance(tensor, Constant):
            return tensor.values if tensor.size <= _FEW else None
        if tensor not in self._values:
            self._values[tensor] = None  # of a graph input, or while its own inputs are looked at
            self._values[tensor] = self._computed(tensor)
        return self._values[tensor]

    def _may_decide_a_shape(self, node: Node, tensor: Tensor) -> bool:
        if node.op in ("Resize", "Range", "OneHot"):
            return True
        found = self.type_of(tensor)
        if found is None:
            return False
        kind, rank = found.tensor_type.elem_type, len(found.tensor_type.shape.dim)
        return kind in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) and rank <= 1

    def _computed(self, tensor: Variable) -> Array | None:
        if not tensor.inputs or any(True for _ in tensor.inputs[0].bodies()):
            return None
        node = tensor.inputs[0]
        if node.op in ("Shape", "Size") and not node.domain:
            return self._measured(node)
        sizes = self.sizes(tensor)
        if sizes is None or np.prod(sizes, dtype=np.float64) > _FEW or _is_random(node):
            return None
        feed = {}
        for source in node.inputs:
            if source.is_empty():
                continue
            value = self.value(source)
            if value is None:
                return None
            feed[source.name] = np.asarray(value)
        return self._run(node, feed, tensor)

    def _measured(self, node: Node) -> Array | None:
        sizes = self.sizes(node.inputs[0])
        if sizes is None:
            return None
        if node.op == "Size":
            return np.array(np.prod(sizes, dtype=np.int64))
        return np.array(sizes[node.attr("start", 0) : node.attr("end", len(sizes))], np.int64)

    def _run(self, node: Node, feed: Mapping[str, Array], tensor: Variable) -> Array | None:
        graph = helper.make_graph(
            [Exporter(onnx.IR_VERSION).node(node)],
            "node",
            [helper.make_value_info(name, self._type_named(node, name)) for name in feed],
            [onnx.ValueInfoProto(name=tensor.name)],
        )
        model = helper.make_model(graph, opset_imports=self._imports)
        try:
            return np.asarray(ReferenceEvaluator(model).run([tensor.name], dict(feed))[0])
        except _EVALUATION_ERRORS:
            return None

    def _type_named(self, node: Node, name: str) -> TypeProto:
        source = next(tensor for tensor in node.inputs if tensor.name == name)
        return self.type_of(source) or TypeProto()


def _is_random(node: Node) -> bool:
    return node.op in ("Bernoulli", "Multinomial") or node.op.startswith("Random")


def _consistent_worlds(model: Model) -> tuple[_World, _World]:
    """Two worlds in which the fewest nodes contradict each other, none if that is possible."""
    best: tuple[_World, _World] | None = None
    for assignment in _assignments(model):
        worlds = (
            _world(model, {key: pair[0] for key, pair in assignment.items()}),
            _world(model, {key: pair[1] for key, pair in assignment.items()}),
        )
        count = sum(world.contradictions for world in worlds)
        if best is None or count < sum(world.contradictions for world in best):
            best = worlds
        if count == 0 or not assignment:
            break
    if best is None:
        raise UnsupportedModelError("The model has more free dimensions than can be told apart.")
    return best


def _assignments(model: Model) -> Iterator[dict[tuple[str, int], tuple[int, int]]]:
    """Sizes for the free dimensions of the inputs, the most independent first.

    Dimensions of one symbol are always equal. Those without a symbol may be anything, are then
    tried as one batch on the first axis, and then as equal wherever they stand on the same axis.
    """
    for share in ("nothing", "first axis", "every axis"):
        for sizes in _SIZES:
            numbers: dict[str, tuple[int, int]] = {}
            result = {}
            for tensor in model.graph.inputs:
                for axis, size in enumerate(tensor.shape or ()):
                    if isinstance(size, int) and size >= 0:
                        continue
                    label = _label(tensor.name, axis, size, share)
                    pair = _pair(sizes, len(numbers))
                    result[tensor.name, axis] = numbers.setdefault(label, pair)
            yield result


def _label(name: str, axis: int, size: int | str | None, share: str) -> str:
    if isinstance(size, str):
        return f"symbol {size}"
    if share == "every axis" or (share == "first axis" and axis == 0):
        return f"axis {axis}"
    return f"{name}/{axis}"


def _pair(sizes: Sequence[tuple[int, int]], number: int) -> tuple[int, int]:
    """The sizes of one free dimension; multiples when there are more of them than pairs."""
    one, other = sizes[number % len(sizes)]
    factor = 1 + number // len(sizes)
    return one * factor, other * factor


def _world(model: Model, sizes: Mapping[tuple[str, int], int]) -> _World:
    """Inference over the whole main graph with these sizes of the inputs."""
    world = _World(model)
    for tensor in model.graph.inputs:
        if tensor.dtype is None or tensor.shape is None:
            continue
        dims = [sizes.get((tensor.name, axis), size) for axis, size in enumerate(tensor.shape)]
        elem_type = tensor.info.type.tensor_type.elem_type
        world.types[tensor] = helper.make_tensor_type_proto(elem_type, dims)
    exporter = Exporter(model.ir_version)
    nodes = sorted_nodes(model.graph)
    _learn_outputs_of_bodies(model, nodes, sizes, world)
    symbols = {
        size: sizes[tensor.name, axis]
        for tensor in model.graph.inputs
        for axis, size in enumerate(tensor.shape or ())
        if isinstance(size, str)
    }
    for node in nodes:
        world.infer(node, exporter.node(node))
        world.believe(node, symbols)
    return world


def _learn_outputs_of_bodies(
    model: Model, nodes: list[Node], sizes: Mapping[tuple[str, int], int], world: _World
) -> None:
    """Inference over the whole model, for nodes with bodies: these cannot be asked alone."""
    held = [node for node in nodes if any(True for _ in node.bodies())]
    if not held:
        return
    outline = model.to_proto_without_weights()
    for info in outline.graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if (info.name, axis) in sizes:
                dim.dim_value = sizes[info.name, axis]
    try:
        outline = shape_inference.infer_shapes(outline, data_prop=True)
    except _INFERENCE_ERRORS:
        return
    found = {info.name: info.type for info in (*outline.graph.value_info, *outline.graph.output)}
    for node in held:
        for tensor in node.outputs:
            if tensor.name in found:
                world.types[tensor] = found[tensor.name]

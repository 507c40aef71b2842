"""Adds nodes to a graph, and knows type and shape of every tensor, old and new.

Equal small constants are one constant. Names are fresh, and begin with the scope in which they
were made. `Emitter` adds the arithmetic in which losses, gradients and optimizers are written.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnxslim_passes.errors import UnsupportedModelError, UsageError
from onnxslim_passes.model import Constant, Model, Node, Variable
from onnxslim_passes.model.inlining import graft
from onnxslim_passes.training.shapes import Array, Shape, Shapes, Tensor

Attribute = int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | Constant

# Every operator in the forms that are emitted exists from here on.
MINIMUM_OPSET = 18
# Larger constants are not compared with each other.
_SHARED_ELEMENTS = 64
_FLOATS = frozenset(
    (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    )
)


class Builder:
    """A graph under construction.

    Args:
        model: a model of opset 18 or newer, which is edited in place; see `lower`.

    Attributes:
        model: the model.
        graph: its main graph, where all nodes go.

    Raises:
        UnsupportedModelError: the opset is older.
    """

    def __init__(self, model: Model) -> None:
        if model.opset < MINIMUM_OPSET:
            raise UnsupportedModelError(
                f"Training graphs need opset {MINIMUM_OPSET} or newer, this model has "
                f"{model.opset}; convert it first."
            )
        self.model = model
        self.graph = model.graph
        self._shapes = Shapes(model)
        self._scope = "training"
        self._made = 0
        self._shared: dict[tuple[str, tuple[int, ...], bytes], Constant] = {}
        self._stopped: set[Tensor] = set()
        # What was made here and nobody outside knows by name.
        self._unnamed: set[Variable] = set()

    def learn(self) -> None:
        """Infers everything again, after edits by other hands."""
        self._shapes = Shapes(self.model)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of what is made inside begin with `name` and a slash."""
        outer, self._scope = self._scope, name
        try:
            yield
        finally:
            self._scope = outer

    # ---- nodes and constants

    def op(
        self, op: str, *inputs: Tensor | None, name: str | None = None, **attributes: Attribute
    ) -> Variable:
        """Adds a node with one output.

        Args:
            op: operator of the default domain.
            inputs: tensors; None leaves an optional one out.
            name: hint for the names of node and output, by default the operator.
            attributes: of the operator, by their names in ONNX.

        Returns:
            The output.
        """
        return self.ops(op, *inputs, count=1, name=name, **attributes)[0]

    def ops(
        self,
        op: str,
        *inputs: Tensor | None,
        count: int,
        name: str | None = None,
        **attributes: Attribute,
    ) -> tuple[Variable, ...]:
        """Adds a node with `count` outputs; as `op` otherwise."""
        self._made += 1
        hint = f"{self._scope}/{name or op.lower()}_{self._made}"
        hints = [hint] if count == 1 else [f"{hint}_{index}" for index in range(count)]
        given = [Variable("") if tensor is None else tensor for tensor in inputs]
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in attributes.items()
        }
        node = self.graph.add_node(op, given, outputs=hints, name=hint, attrs=plain)
        self._shapes.learn(node)
        self._unnamed.update(node.outputs)
        return tuple(node.outputs)

    def graft(
        self,
        model: Model,
        bindings: Mapping[str, Tensor],
        types: Mapping[str, tuple[Tensor, Shape]],
    ) -> dict[str, Tensor]:
        """Puts another model's nodes into the graph: those with bodies, which `op` cannot make.

        Args:
            model: of the same opset, without functions; it is used up.
            bindings: for each of its inputs, by name, the tensor that takes its place.
            types: for each of its outputs a tensor of the same element type, and the shape.

        Returns:
            Its outputs by name.
        """
        self._made += 1
        made = graft(self.graph, model, bindings, f"{self._scope}/{self._made}/")
        for name, (like, shape) in types.items():
            tensor = made[name]
            if isinstance(tensor, Variable):
                self._shapes.declare(tensor, self.elem_type(like), shape)
        return made

    def add_output(self, node: Node, index: int) -> Variable:
        """An optional output of an existing node, added to it if it was left out."""
        while len(node.outputs) <= index:
            node.outputs.append(Variable(""))
        if node.outputs[index].is_empty():
            self._made += 1
            hint = f"{self._scope}/{node.op.lower()}_{self._made}"
            node.outputs[index] = Variable(self.graph.fresh_name(hint))
            self._shapes.learn(node)
        made: Variable = node.outputs[index]
        return made

    def constant(self, values: npt.ArrayLike, name: str = "") -> Constant:
        """A constant; small ones without a name are shared with all that are equal."""
        array = np.asarray(values)
        if name or array.size > _SHARED_ELEMENTS:
            return self.graph.add_constant(f"{self._scope}/{name or 'constant'}", array)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.graph.add_constant("training/constant", array)
        return self._shared[key]

    def scalar(self, value: float, like: Tensor) -> Constant:
        """A rank-0 constant of the element type of `like`."""
        return self.constant(np.array(value, self.dtype(like)))

    def ints(self, *values: int) -> Constant:
        """A rank-1 int64 constant: axes, sizes, indices."""
        return self.constant(np.array(values, np.int64))

    def input(self, name: str, dtype: npt.DTypeLike, shape: Shape) -> Variable:
        """A new graph input.

        Args:
            name: its exact name.
            dtype: element type.
            shape: sizes and symbols; a symbol of the model's own inputs stands for the same size.

        Raises:
            UsageError: the model has a tensor of this name.
        """
        if name in self.graph.names:
            raise UsageError(f"The model has a tensor {name!r} already; choose another name.")
        elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        info = helper.make_tensor_value_info(name, elem_type, list(shape))
        made = Variable(self.graph.fresh_name(name), info)
        self.graph.inputs.append(made)
        self.graph.declared_inputs.append(made)
        self._shapes.declare(made, elem_type, shape)
        return made

    def output(self, tensor: Tensor, name: str) -> Variable:
        """Makes a graph output called `name` with the value of `tensor`.

        Raises:
            UsageError: the model has a tensor of this name.
        """
        if name in self.graph.names:
            raise UsageError(f"The model has a tensor {name!r} already; choose another name.")
        if not isinstance(tensor, Variable) or tensor not in self._unnamed:
            tensor = self.op("Identity", tensor)
        # A tensor of our own can take the name itself, which saves a copy at every run.
        self._unnamed.remove(tensor)
        tensor.name = self.graph.fresh_name(name)
        tensor.info = helper.make_tensor_value_info(
            name, self.elem_type(tensor), list(self.shape(tensor))
        )
        self.graph.outputs.append(tensor)
        return tensor

    def promote(self, constant: Constant) -> Variable:
        """Turns an initializer into a graph input of the same name and returns that input."""
        info = helper.make_tensor_value_info(constant.name, constant.elem_type, constant.shape)
        made = Variable(constant.name, info)
        self.model.replace_uses(constant, made)
        if constant.owner is not None:
            constant.owner.initializers.remove(constant)
        self.graph.inputs.append(made)
        self.graph.declared_inputs.append(made)
        self._shapes.declare(made, constant.elem_type, constant.shape)
        return made

    def stop(self, tensor: Tensor) -> Variable:
        """The same value, behind which no gradient goes back."""
        made = self.op("Identity", tensor, name="stop")
        self._stopped.add(made)
        return made

    def stops(self, tensor: Tensor) -> bool:
        """Whether `tensor` was made by `stop`."""
        return tensor in self._stopped

    # ---- what is known of a tensor

    def elem_type(self, tensor: Tensor) -> int:
        """ONNX element type; 0 if unknown."""
        return self._shapes.elem_type(tensor)

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """NumPy (or ml_dtypes) element type.

        Raises:
            UnsupportedModelError: it could not be inferred.
        """
        elem_type = self.elem_type(tensor)
        if not elem_type:
            raise UnsupportedModelError(f"The element type of {tensor.name!r} is not known.")
        dtype: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
        return dtype

    def is_float(self, tensor: Tensor) -> bool:
        """Whether its elements are floating-point numbers, which may have a gradient."""
        return self.elem_type(tensor) in _FLOATS

    def shape(self, tensor: Tensor) -> Shape:
        """A size for every static axis, a symbol for every other; equal symbols, equal sizes.

        Raises:
            UnsupportedModelError: it depends on more than the shapes of the inputs.
        """
        found = self._shapes.shape(tensor)
        if found is None:
            raise UnsupportedModelError(
                f"The shape of {tensor.name!r} depends on values that are not known before the "
                "run; give fixed values for the inputs that decide it."
            )
        return found

    def has_shape(self, tensor: Tensor) -> bool:
        """Whether `shape` can tell."""
        return self._shapes.shape(tensor) is not None

    def rank(self, tensor: Tensor) -> int:
        """Number of axes."""
        return len(self.shape(tensor))

    def size(self, tensor: Tensor, axis: int) -> int:
        """The static size of an axis.

        Raises:
            UnsupportedModelError: it is not static.
        """
        size = self.shape(tensor)[axis]
        if not isinstance(size, int):
            raise UnsupportedModelError(
                f"Axis {axis} of {tensor.name!r} has no fixed size; give the model a fixed input "
                "shape."
            )
        return size

    def is_static(self, tensor: Tensor) -> bool:
        """Whether every size is fixed."""
        return all(isinstance(size, int) for size in self.shape(tensor))

    def value(self, tensor: Tensor) -> Array | None:
        """The value if it is known before the run: of constants, and of arithmetic on shapes."""
        return self._shapes.value(tensor)

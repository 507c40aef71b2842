"""Which constants are parameters, what they do where they are used, and their channel axis.

A weight is one constant however many nodes take it, also through a Transpose, a cast or the call
of a model-local function. The channel axis is that of the output channels, along which scales,
codebooks and masks go; it is given in the constant's own axes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import ml_dtypes
import numpy as np

from onnxslim_passes.model.ir import Constant, Graph, Node
from onnxslim_passes.model.payload import Array

Role = Literal["weight", "recurrent", "embedding", "normalization", "bias", "other"]

ROLE_ORDER: tuple[Role, ...] = (
    "weight",
    "recurrent",
    "embedding",
    "normalization",
    "bias",
    "other",
)

FLOAT_DTYPES = tuple(
    np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
)

_ROLES: dict[str, dict[int, Role]] = {
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "DeformConv": {1: "weight", 3: "bias"},
    "FusedConv": {1: "weight", 2: "bias"},
    "Gemm": {0: "weight", 1: "weight", 2: "bias"},
    "MatMul": {0: "weight", 1: "weight"},
    "FusedMatMul": {0: "weight", 1: "weight"},
    "FusedGemm": {0: "weight", 1: "weight", 2: "bias"},
    "Attention": {1: "weight", 2: "bias"},
    "Einsum": {0: "weight", 1: "weight"},
    "LSTM": {1: "recurrent", 2: "recurrent", 3: "bias"},
    "GRU": {1: "recurrent", 2: "recurrent", 3: "bias"},
    "RNN": {1: "recurrent", 2: "recurrent", 3: "bias"},
    "Gather": {0: "embedding"},
    "BatchNormalization": dict.fromkeys(range(1, 5), "normalization"),
    "InstanceNormalization": dict.fromkeys((1, 2), "normalization"),
    "GroupNormalization": dict.fromkeys((1, 2), "normalization"),
    "LayerNormalization": dict.fromkeys((1, 2), "normalization"),
    "RMSNormalization": {1: "normalization"},
    "SimplifiedLayerNormalization": {1: "normalization"},
    "SkipLayerNormalization": {2: "normalization", 3: "normalization", 4: "bias"},
    "SkipSimplifiedLayerNormalization": {2: "normalization"},
    "PRelu": {1: "other"},
}

_SAME_VALUES = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten")
_VECTOR_ARITHMETIC: dict[str, Role] = {
    "Add": "bias",
    "Sub": "bias",
    "Mul": "normalization",
    "Div": "normalization",
}


@dataclass(frozen=True, eq=False)
class Use:
    """One input of one node that a constant reaches.

    Attributes:
        node: the consumer; inside a function body where the call passes the constant on.
        input_index: which of its inputs.
        role: what the constant does there.
        channel_axis: output-channel axis in the constant's own axes, or None.
        direct: False if a Transpose, a Reshape or the like stands between.
    """

    node: Node
    input_index: int
    role: Role
    channel_axis: int | None
    direct: bool


@dataclass(eq=False)
class Weight:
    """A floating-point constant that nodes take.

    Attributes:
        constant: the constant itself.
        uses: where it is taken.
    """

    constant: Constant
    uses: tuple[Use, ...]

    @property
    def name(self) -> str:
        """Its name in the file."""
        return str(self.constant.name)

    @property
    def where(self) -> str:
        """Its name with the path of the body it stands in."""
        return self.constant.where

    @property
    def graph(self) -> Graph:
        """The graph that owns it."""
        assert self.constant.owner is not None  # every constant of a loaded model has one
        return self.constant.owner

    @property
    def values(self) -> Array:
        """The values, read-only; assign to replace them."""
        return self.constant.values

    @values.setter
    def values(self, values: Array) -> None:
        self.constant.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.constant.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.constant.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.constant.size

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.constant.nbytes

    @cached_property
    def role(self) -> Role:
        """The strongest role among its uses."""
        return min((use.role for use in self.uses), key=ROLE_ORDER.index)

    @cached_property
    def channel_axis(self) -> int | None:
        """The output-channel axis that all uses of the strongest role agree on, or None."""
        axes = {use.channel_axis for use in self.uses if use.role == self.role}
        return axes.pop() if len(axes) == 1 else None

    @cached_property
    def input_axis(self) -> int | None:
        """The axis along which the input channels lie, or None if that is not one axis."""
        channels, rank = self.channel_axis, len(self.shape)
        if channels is None or rank < 2:
            return None
        if any("Conv" in operator for operator in self.op_types):
            return 1 - channels
        return rank - 2 if channels == rank - 1 else channels + 1

    @property
    def op_types(self) -> frozenset[str]:
        """The operators that take it."""
        return frozenset(use.node.op for use in self.uses)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that take it, each once."""
        return tuple(dict.fromkeys(use.node for use in self.uses))


@dataclass(frozen=True)
class _View:
    """A tensor on the way from a constant to its consumers.

    `axes[i]` is the constant's own axis behind axis i of the tensor, None where there is no single
    one; `axes` itself is None where a Reshape mixed them.
    """

    axes: tuple[int | None, ...] | None
    direct: bool = True


def find_weights(constants: Iterable[Constant], functions: Sequence[Graph]) -> list[Weight]:
    """The floating-point constants that nodes take, with all their uses."""
    calls = {
        (graph.proto.domain, graph.proto.name, graph.proto.overload): graph for graph in functions
    }
    weights = []
    for constant in constants:
        if constant.dtype not in FLOAT_DTYPES:
            continue
        view = _View(tuple(range(len(constant.shape))))
        uses = tuple(_uses(constant, view, constant.shape, calls))
        if uses:
            weights.append(Weight(constant, uses))
    return weights


def _uses(
    start: Any, view: _View, shape: tuple[int, ...], calls: dict[tuple[str, str, str], Graph]
) -> Iterator[Use]:
    pending = [(start, view)]
    seen: set[int] = set()
    while pending:
        tensor, view = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for node in dict.fromkeys(tensor.outputs):
            for index, taken in enumerate(node.inputs):
                if taken is not tensor:
                    continue
                function = calls.get((node.domain, node.op, node.overload))
                if function is not None and index < len(function.inputs):
                    pending.append((function.inputs[index], _View(view.axes, direct=False)))
                    continue
                passed = _passed_on(node, index, view)
                if passed is not None:
                    pending.append((node.outputs[0], passed))
                else:
                    yield _use(node, index, view, shape)


def _passed_on(node: Node, index: int, view: _View) -> _View | None:
    """The view behind a node that only moves or casts values, or None for a real consumer."""
    if index != 0 or node.domain or not node.outputs or not node.outputs[0].outputs:
        return None
    if node.op == "Transpose":
        axes = view.axes
        if axes is not None:
            order = node.attr("perm") or range(len(axes))[::-1]
            axes = tuple(axes[axis] for axis in order)
        return _View(axes, direct=False)
    if node.op in _SAME_VALUES:
        kept = view.axes if node.op in ("Identity", "Cast") else None
        return _View(kept, direct=False)
    return None


def _use(node: Node, index: int, view: _View, shape: tuple[int, ...]) -> Use:
    role: Role = _ROLES.get(node.op, {}).get(index, "other")
    if node.op in _VECTOR_ARITHMETIC and not node.domain:
        is_vector = sum(size > 1 for size in shape) <= 1
        role = _VECTOR_ARITHMETIC[node.op] if is_vector else "other"
    axis = _channel_axis(node, index, len(view.axes)) if view.axes is not None else None
    if axis is not None and view.axes is not None:
        axis = view.axes[axis] if axis < len(view.axes) else None
    return Use(node, index, role, axis, view.direct)


def _channel_axis(node: Node, index: int, rank: int) -> int | None:
    """Output-channel axis of a weight of this rank as the node sees it."""
    if node.op in ("Conv", "FusedConv", "DeformConv") and index == 1:
        return 0
    if node.op == "ConvTranspose" and index == 1:
        # With groups axis 1 holds the channels of one group only: no axis of all outputs.
        return 1 if node.attr("group", 1) == 1 else None
    if node.op in ("MatMul", "Attention") and rank >= 2:
        return rank - 1 if index == 1 else rank - 2
    if node.op in ("Gemm", "FusedGemm", "FusedMatMul") and index < 2 and rank >= 2:
        flag = "transB" if index == 1 else "transA"
        flipped = bool(node.attr(flag, 0))
        return rank - 2 if flipped == (index == 1) else rank - 1
    if node.op in ("LSTM", "GRU", "RNN") and index in (1, 2):
        return 1
    if node.op == "Gather" and index == 0 and rank >= 2:
        return int(node.attr("axis", 0)) % rank
    if node.op == "Einsum":
        return _einsum_channel_axis(node.attr("equation", ""), index)
    return None


def _einsum_channel_axis(equation: str, index: int) -> int | None:
    """The axis of an operand that the output has and no other operand, if there is just one."""
    terms, arrow, output = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if not arrow or "." in equation or index >= len(operands):
        return None
    others = {label for place, term in enumerate(operands) if place != index for label in term}
    own = [
        axis
        for axis, label in enumerate(operands[index])
        if label in output and label not in others
    ]
    return own[0] if len(own) == 1 else None

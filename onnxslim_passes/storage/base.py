"""What an encoding is: decoder expressions, their exact size, and the plan for a weight.

A decoder is an expression over standard operators whose leaves are tensors:

    Step("Gather", (Payload(codebook), Step("Cast", (Payload(codes),), {"to": INT32})))

Leaves are of two kinds. A `Payload` belongs to one weight (codes, codebook, indices); its size is
known at once and its values are made only if the encoding wins. A `Literal` is a small constant
(a shape, a shift). Expressions without a payload, such as the table that unpacks bits, are equal
wherever they are equal in structure: the writer emits them once per graph, and the choice of
encodings counts them once per graph.

What a decoder does again and again can be a `Function`: its steps are written once, as a function
of the model, and a `call` takes no more than one node. Where the model cannot have functions, a
call is the steps themselves.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import (
    AttributeProto,
    FunctionProto,
    NodeProto,
    OperatorSetIdProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
    helper,
)

from onnxslim_passes.model import short_names
from onnxslim_passes.model.payload import new_tensor, values_bytes

if TYPE_CHECKING:
    from onnxslim_passes.storage.contents import Contents

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Payload:
    """A constant that one weight brings along.

    Attributes:
        shape: dimensions.
        dtype: NumPy or ml_dtypes type.
        nbytes: bytes of the values in the file.
        make: computes the values, of this shape and type.
        sparse: stored as a sparse initializer; `nbytes` then counts values and indices, and
            `entries` their number.
        entries: elements of a sparse initializer that are stored.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    make: Callable[[], Array]
    sparse: bool = False
    entries: int = 0


@dataclass(frozen=True)
class Literal:
    """A small constant, equal to every other of the same type, shape and bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: Any, dtype: npt.DTypeLike) -> "Literal":
        """The literal for an array-like of numbers."""
        array = np.asarray(values, dtype)
        return cls(array.dtype, array.shape, array.tobytes())

    def values(self) -> Array:
        """The array."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Step:
    """One node with one output.

    Attributes:
        op: operator of the default domain, or the name of `function`.
        inputs: what it reads.
        attrs: attributes, as sorted pairs so that steps can be compared.
        shape: the shape of the output, int32, declared in the file; only where ONNX Runtime cannot
            infer it (Compress), and does not fold without.
        function: what the node calls, or None for an operator.
    """

    op: str
    inputs: tuple["Expression", ...]
    attrs: tuple[tuple[str, int | tuple[int, ...]], ...] = ()
    shape: tuple[int, ...] | None = None
    function: "Function | None" = None
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Kept: a step is hashed often, and a tensor taken twice at each of n levels would have its
        # hash computed 2^n times.
        content = (self.op, self.inputs, self.attrs, self.shape, self.function)
        object.__setattr__(self, "_hash", hash(content))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Step) or self._hash != other._hash:
            return False
        mine = (self.op, self.inputs, self.attrs, self.shape, self.function)
        return mine == (other.op, other.inputs, other.attrs, other.shape, other.function)

    @property
    def domain(self) -> str:
        """The domain of the operator."""
        return FUNCTION_DOMAIN if self.function is not None else ""

    @property
    def parts(self) -> tuple["Expression", ...]:
        """What it needs in the file besides itself."""
        return self.inputs if self.function is None else (*self.inputs, self.function)

    def declaration(self, name: str) -> ValueInfoProto | None:
        """What is declared of the output under a name, or None."""
        if self.shape is None:
            return None
        return helper.make_tensor_value_info(name, TensorProto.INT32, self.shape)


@dataclass(frozen=True)
class Argument:
    """A leaf of a function's body: the input of this number."""

    index: int


@dataclass(frozen=True)
class Function:
    """Steps that several decoders, or one several times, go through.

    Attributes:
        name: in the domain `FUNCTION_DOMAIN`.
        arity: number of inputs.
        body: from `Argument` and `Literal` leaves to the output.
        opset: of the operators in it.
    """

    name: str
    arity: int
    body: Step
    opset: int

    def to_proto(self) -> FunctionProto:
        """The function of the model, with names as short as they can be."""
        names = short_names()
        inputs = [next(names) for _ in range(self.arity)]
        known: dict[Expression, str] = {}
        nodes = []
        for part in walk(self.body):
            if isinstance(part, Argument):
                known[part] = inputs[part.index]
                continue
            known[part] = next(names)
            nodes.append(_function_node(part, known))
        proto = FunctionProto(name=self.name, domain=FUNCTION_DOMAIN, node=nodes)
        proto.input.extend(inputs)
        proto.output.append(known[self.body])
        proto.opset_import.add(domain="", version=self.opset)
        return proto


def _function_node(part: "Expression", known: Mapping["Expression", str]) -> NodeProto:
    node = NodeProto(output=[known[part]])
    if isinstance(part, Literal):
        node.op_type = "Constant"
        node.attribute.append(helper.make_attribute("value", new_tensor(part.values())))
        return node
    assert isinstance(part, Step)  # payloads belong to weights, not to functions
    node.op_type = part.op
    node.input.extend(known[operand] for operand in part.inputs)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in part.attrs)
    return node


Expression: TypeAlias = Payload | Literal | Step | Argument | Function

# Of the functions in files. Each call takes its bytes.
FUNCTION_DOMAIN = "w"


def step(op: str, *inputs: Expression, **attrs: int | tuple[int, ...]) -> Step:
    """`Step` in the notation of a call."""
    return Step(op, inputs, tuple(sorted(attrs.items())))


def call(function: Function, *inputs: Expression, site: "Site") -> Step:
    """A call of a function, or its steps where the model cannot have it."""
    if site.functions:
        return Step(function.name, inputs, function=function)
    known: dict[Expression, Expression] = {}
    for part in walk(function.body):
        if isinstance(part, Argument):
            known[part] = inputs[part.index]
        elif isinstance(part, Step):
            known[part] = replace(part, inputs=tuple(known[each] for each in part.inputs))
        else:
            known[part] = part
    result = known[function.body]
    assert isinstance(result, Step)
    return result


@dataclass(frozen=True)
class Site:
    """What the place of a weight allows.

    Attributes:
        opset: of the graph or function.
        ir_version: of the model.
        as_nodes: constants are written as `Constant` nodes: in functions, and before IR version 4.
        name_bytes: length of the names that new tensors will have, at most.
        encodings: names of those that may be used, also for the parts of another one; dense always
            may.
        strip_safe: decoders declare no shapes, so that they fold even after a tool has removed the
            declarations, at the price of slower loading.
        functions: whether decoders may call functions of the model.
    """

    opset: int
    ir_version: int = 8
    as_nodes: bool = False
    name_bytes: int = 2
    encodings: frozenset[str] | None = None
    strip_safe: bool = False
    functions: bool = False

    def allows(self, encoding: str) -> bool:
        """Whether an encoding may be used here."""
        return self.encodings is None or encoding == "dense" or encoding in self.encodings

    @property
    def sparse(self) -> bool:
        """Whether sparse initializers may stand here: from IR version 6, and not in functions."""
        return self.ir_version >= 6 and not self.as_nodes


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to store a weight, with its price.

    Attributes:
        encoding: name of the encoding.
        root: the decoder, or a bare payload: the weight itself, dense or sparse.
        figures: what the report shows beside the bytes, e.g. ``{"bits": 3}``.
    """

    encoding: str
    root: Expression
    figures: Mapping[str, int | float | str] = field(default_factory=dict)


class Encoding(abc.ABC):
    """A way to store weights; it proposes, the computed bytes decide.

    Attributes:
        name: as in the option `encodings` and in reports.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def plans(self, contents: "Contents", site: Site) -> Iterable[Plan]:
        """The plans worth pricing for a weight with these contents; none where it cannot serve."""


# ---------------- the size of expressions


def walk(root: Expression) -> Iterator[Expression]:
    """Every different expression under `root`, itself included, inputs first."""
    seen: set[Expression] = set()
    pending: list[tuple[Expression, bool]] = [(root, False)]
    while pending:
        expression, inputs_done = pending.pop()
        if expression in seen:
            continue
        if inputs_done or not isinstance(expression, Step):
            seen.add(expression)
            yield expression
        else:
            pending.append((expression, True))
            pending.extend((operand, False) for operand in reversed(expression.parts))


def own_and_common(root: Expression) -> tuple[list[Expression], list[Expression]]:
    """The parts of a decoder that are this weight's alone, and those that others may share.

    A part is the weight's own if a payload stands anywhere under it.
    """
    own: list[Expression] = []
    common: list[Expression] = []
    owned: set[Expression] = set()
    for part in walk(root):
        inputs = part.inputs if isinstance(part, Step) else ()
        if isinstance(part, Payload) or any(operand in owned for operand in inputs):
            owned.add(part)
            own.append(part)
        else:
            common.append(part)
    return own, common


def part_bytes(part: Expression, site: Site) -> int:
    """Bytes that one part takes in the file, its new name and its message's frame included."""
    if isinstance(part, Step):
        name = "x" * site.name_bytes
        node = helper.make_node(part.op, [name] * len(part.inputs), [name])
        if part.domain:
            node.domain = part.domain
        node.attribute.extend(helper.make_attribute(name, value) for name, value in part.attrs)
        declared = part.declaration(name)
        size = framed_bytes(declared.ByteSize()) if declared is not None else 0
        return framed_bytes(node.ByteSize()) + size
    if isinstance(part, Function):
        # Its field has a number above 15, and the model must import the domain.
        imported = OperatorSetIdProto(domain=FUNCTION_DOMAIN, version=1).ByteSize()
        return 1 + framed_bytes(part.to_proto().ByteSize()) + framed_bytes(imported)
    assert not isinstance(part, Argument)  # the walk does not enter functions
    if isinstance(part, Literal):
        return tensor_bytes(part.shape, part.dtype, values_bytes(part.values()), site)
    if part.sparse:
        return sparse_bytes(part, site)
    return tensor_bytes(part.shape, part.dtype, part.nbytes, site)


def tensor_bytes(shape: Sequence[int], dtype: np.dtype[Any], nbytes: int, site: Site) -> int:
    """Bytes of a dense constant whose values take `nbytes`: initializer or `Constant` node."""
    name = "x" * site.name_bytes
    tensor = TensorProto(dims=shape, data_type=_elem_type(dtype), name=name)
    size = tensor.ByteSize() + framed_bytes(nbytes)
    if site.as_nodes:
        attribute = AttributeProto(name="value", type=AttributeProto.TENSOR)
        size = attribute.ByteSize() + framed_bytes(size)
        size = NodeProto(op_type="Constant", output=[name]).ByteSize() + framed_bytes(size)
    return framed_bytes(size)


def sparse_bytes(payload: Payload, site: Site) -> int:
    """Bytes of a sparse initializer whose values and varint indices take `nbytes` together."""
    entries, dtype = payload.entries, payload.dtype
    name = "x" * site.name_bytes
    values = TensorProto(dims=[entries], data_type=_elem_type(dtype), name=name)
    indices = TensorProto(dims=[entries], data_type=TensorProto.INT64)
    value_bytes = entries * dtype.itemsize
    return framed_bytes(
        SparseTensorProto(dims=payload.shape).ByteSize()
        + framed_bytes(values.ByteSize() + framed_bytes(value_bytes))
        + framed_bytes(indices.ByteSize() + framed_bytes(payload.nbytes - value_bytes))
    )


def framed_bytes(size: int) -> int:
    """Bytes of a field of `size` bytes in the message that holds it: tag, length, content.

    Every field used here has a number below 16, so that its tag is one byte (initializers of a
    graph: 5, sparse ones: 15, nodes: 1, raw data: 9).
    """
    return 1 + varint_bytes(size) + size


def varint_bytes(value: int) -> int:
    """Bytes of a non-negative number as a protobuf varint: seven bits a byte."""
    return max(1, -(-value.bit_length() // 7))


def _elem_type(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))

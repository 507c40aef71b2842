"""Field-by-field comparison of two ONNX models.

The walk is driven by the protobuf descriptors, so a field that a later ONNX release adds is
compared too, without a line here. What may differ, because it means the same:

- how a tensor's payload is encoded: values are compared, bit by bit, not `raw_data` against
  `float_data`, dense against sparse, or embedded against external;
- a `Constant` node against an initializer of the same name, where ONNX allows an initializer (IR
  version 4 or newer, not in a function, not directly a graph output);
- the order of initializers, of `value_info` and of entries that have keys; the order of nodes only
  where the source was not sorted;
- the domain "ai.onnx" against "".

Everything else is a `Difference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, TensorProto, numpy_helper

# Repeated fields whose entries have a key; all others are compared in order.
KEYED: dict[str, Callable[[Any], object]] = {
    "onnx.ModelProto.opset_import": lambda entry: _domain(entry.domain),
    "onnx.ModelProto.functions": lambda entry: (_domain(entry.domain), entry.name, entry.overload),
    "onnx.FunctionProto.opset_import": lambda entry: _domain(entry.domain),
    "onnx.FunctionProto.attribute_proto": lambda entry: entry.name,
    "onnx.FunctionProto.value_info": lambda entry: entry.name,
    "onnx.GraphProto.value_info": lambda entry: entry.name,
    "onnx.GraphProto.quantization_annotation": lambda entry: entry.tensor_name,
    "onnx.NodeProto.attribute": lambda entry: entry.name,
}

# Fields that hold a tensor's payload, compared by value.
PAYLOAD = frozenset(
    {
        "dims",
        "data_type",
        "segment",
        "float_data",
        "int32_data",
        "string_data",
        "int64_data",
        "raw_data",
        "external_data",
        "data_location",
        "double_data",
        "uint64_data",
    }
)
# What makes a graph's constants and nodes; compared by `_Comparison.graph`.
GRAPH_CONTENT = frozenset({"node", "initializer", "sparse_initializer"})


@dataclass(frozen=True)
class Difference:
    """One place where two models differ; `expected` and `got` are short texts."""

    path: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Value:
    """A tensor's decoded value: element type, dimensions, payload bytes (or a tuple of strings)."""

    elem_type: int
    dims: tuple[int, ...]
    payload: bytes | tuple[bytes, ...]

    def __str__(self) -> str:
        size = len(self.payload)
        kind = TensorProto.DataType.Name(self.elem_type)
        shown = self.payload[:8].hex() if isinstance(self.payload, bytes) else self.payload[:2]
        return f"{kind}{list(self.dims)} of {size} bytes or strings, {shown}..."


def compare_models(
    expected: onnx.ModelProto,
    got: onnx.ModelProto,
    *,
    expected_folder: Path | None = None,
    got_folder: Path | None = None,
) -> list[Difference]:
    """Every difference between two models; empty when they say the same.

    The folders are those that external data is relative to; only needed for models that have some.
    """
    comparison = _Comparison(expected_folder, got_folder, lift=expected.ir_version >= 4)
    comparison.message(expected, got, "model")
    return comparison.differences


def tensor_value(tensor: TensorProto, folder: Path | None = None) -> Value:
    """The decoded value of a tensor, external data read from below `folder`."""
    dims = tuple(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return Value(tensor.data_type, dims, tuple(tensor.string_data))
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor = _embedded(tensor, folder)
    return Value(tensor.data_type, dims, numpy_helper.to_array(tensor).tobytes())


def sparse_value(sparse: onnx.SparseTensorProto) -> Value:
    """The dense value that a sparse tensor stands for."""
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return Value(sparse.values.data_type, tuple(sparse.dims), dense.tobytes())


def makes_constant(node: onnx.NodeProto) -> bool:
    """Whether this is a `Constant` node with a value of its own, not one that a caller gives."""
    constant = node.op_type == "Constant" and not _domain(node.domain) and len(node.attribute) == 1
    return constant and not node.attribute[0].ref_attr_name


def _attribute_value(attribute: AttributeProto, folder: Path | None) -> Value:
    """What the one attribute of a `Constant` node says."""
    if attribute.name == "value":
        return tensor_value(attribute.t, folder)
    if attribute.name == "sparse_value":
        return sparse_value(attribute.sparse_tensor)
    return _listed_value(attribute)


def _listed_value(attribute: AttributeProto) -> Value:
    """The value of `value_int`, `value_floats` and the like."""
    content = onnx.helper.get_attribute_value(attribute)
    scalar = attribute.type in (AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING)
    items = [content] if scalar else list(content)
    dims = () if scalar else (len(items),)
    if attribute.type in (AttributeProto.STRING, AttributeProto.STRINGS):
        return Value(TensorProto.STRING, dims, tuple(items))
    if attribute.type in (AttributeProto.INT, AttributeProto.INTS):
        return Value(TensorProto.INT64, dims, np.array(items, np.int64).tobytes())
    return Value(TensorProto.FLOAT, dims, np.array(items, np.float32).tobytes())


def is_sorted(graph: onnx.GraphProto) -> bool:
    """Whether every node stands after those whose outputs it, or a body inside it, uses."""
    later = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if any(name in later for name in _uses(node)):
            return False
        later.difference_update(node.output)
    return True


def _uses(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node uses, those of its bodies included (their own names too: harmless here)."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            own = {name for inner in body.node for name in inner.output}
            for inner in body.node:
                yield from (name for name in _uses(inner) if name not in own)
            yield from (output.name for output in body.output if output.name not in own)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _embedded(tensor: TensorProto, folder: Path | None) -> TensorProto:
    """A copy of `tensor` with its external data in `raw_data`."""
    if folder is None:
        raise ValueError(f"{tensor.name!r} has external data, but no folder was given")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / entries["location"]).open("rb") as file:
        file.seek(int(entries.get("offset", "0")))
        data = file.read(int(entries["length"])) if "length" in entries else file.read()
    copy = TensorProto(dims=tensor.dims, data_type=tensor.data_type)
    copy.raw_data = data
    return copy


def _short(value: object) -> str:
    text = " ".join(str(value).split()) if isinstance(value, Message) else repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


@dataclass
class _Comparison:
    """One run over two models; collects differences."""

    expected_folder: Path | None
    got_folder: Path | None
    lift: bool  # `Constant` nodes here may have become initializers
    differences: list[Difference] = field(default_factory=list)

    def note(self, path: str, expected: object, got: object) -> None:
        self.differences.append(Difference(path, _short(expected), _short(got)))

    def message(self, a: Any, b: Any, path: str) -> None:
        """Compares two messages of one type."""
        if a == b and a.SerializeToString() == b.SerializeToString() and not self._external(a):
            return
        kind = a.DESCRIPTOR.full_name
        if kind == "onnx.TensorProto":
            self.tensor(a, b, path)
        elif kind == "onnx.SparseTensorProto":
            self.values(sparse_value(a), sparse_value(b), path)
        elif kind == "onnx.GraphProto":
            self.graph(a, b, path)
        elif kind == "onnx.NodeProto" and makes_constant(a) and makes_constant(b):
            self.fields(a, b, path, skip={"attribute"})
            self.constant_attributes(a.attribute[0], b.attribute[0], path)
        elif kind == "onnx.FunctionProto":
            outer, self.lift = self.lift, False
            self.fields(a, b, path)
            self.lift = outer
        else:
            self.fields(a, b, path)

    def _external(self, a: Any) -> bool:
        """Equal descriptions of external data say nothing about the bytes in the files."""
        return self.expected_folder is not None and isinstance(
            a, onnx.ModelProto | onnx.GraphProto | TensorProto
        )

    def fields(self, a: Any, b: Any, path: str, *, skip: Iterable[str] = ()) -> None:
        """Compares all fields of two messages but those in `skip`."""
        for described in a.DESCRIPTOR.fields:
            if described.name not in skip:
                self.one_field(a, b, described, f"{path}.{described.name}")

    def one_field(self, a: Any, b: Any, described: Any, path: str) -> None:
        x, y = getattr(a, described.name), getattr(b, described.name)
        if described.message_type is None:
            self.scalar(x, y, path)
        elif not isinstance(x, Message):
            self.repeated(x, y, KEYED.get(described.full_name), path)
        elif a.HasField(described.name) != b.HasField(described.name):
            self.note(path, _presence(a, described.name), _presence(b, described.name))
        elif a.HasField(described.name):
            self.message(x, y, path)

    def constant_attributes(self, a: AttributeProto, b: AttributeProto, path: str) -> None:
        """What two Constant nodes yield, however it is spelt; the names inside where both have."""
        if a.name == b.name:
            self.message(a, b, f"{path}.attribute[{a.name}]")
        else:
            expected = _attribute_value(a, self.expected_folder)
            self.values(expected, _attribute_value(b, self.got_folder), path)

    def scalar(self, x: Any, y: Any, path: str) -> None:
        """Numbers and strings, or lists of them; NaN equals NaN, 0.0 differs from -0.0."""
        if path.endswith(".domain"):
            x, y = _domain(x), _domain(y)
        if isinstance(x, str | bytes | int | float):
            if repr(x) != repr(y):
                self.note(path, x, y)
        elif [repr(item) for item in x] != [repr(item) for item in y]:
            self.note(path, list(x), list(y))

    def repeated(
        self, xs: Sequence[Any], ys: Sequence[Any], key: Callable[[Any], object] | None, path: str
    ) -> None:
        """Repeated messages, in order or by key."""
        if len(xs) != len(ys) and key is None:
            self.note(f"{path} count", len(xs), len(ys))
        elif key is None:
            for index, (x, y) in enumerate(zip(xs, ys, strict=True)):
                self.message(x, y, f"{path}[{getattr(x, 'name', '') or index}]")
        else:
            self.keyed([(key(x), x) for x in xs], [(key(y), y) for y in ys], self.message, path)

    def keyed(
        self,
        xs: Sequence[tuple[Any, Any]],
        ys: Sequence[tuple[Any, Any]],
        compare: Callable[[Any, Any, str], None],
        path: str,
    ) -> None:
        """Entries with keys, in any order; a key may stand more than once."""
        remaining: dict[Any, list[Any]] = {}
        for key, y in ys:
            remaining.setdefault(key, []).append(y)
        for key, x in xs:
            if remaining.get(key):
                compare(x, remaining[key].pop(0), f"{path}[{key}]")
            else:
                self.note(f"{path}[{key}]", "present", "lost")
        for key, extra in remaining.items():
            for _ in extra:
                self.note(f"{path}[{key}]", "absent", "added")

    def tensor(self, a: TensorProto, b: TensorProto, path: str) -> None:
        self.fields(a, b, path, skip=PAYLOAD)
        self.values(tensor_value(a, self.expected_folder), tensor_value(b, self.got_folder), path)

    def values(self, a: Value, b: Value, path: str) -> None:
        if a != b:
            self.differences.append(Difference(f"{path} value", str(a), str(b)))

    def graph(self, a: onnx.GraphProto, b: onnx.GraphProto, path: str) -> None:
        """Graphs: constants by name and value, nodes in order, all other fields as they are."""
        self.fields(a, b, path, skip=GRAPH_CONTENT)
        constants_a, nodes_a = self.content(a)
        constants_b, nodes_b = self.content(b)
        self.keyed(constants_a, constants_b, self.constant, f"{path}.constant")
        if not is_sorted(a):
            nodes_a.sort(key=lambda node: list(node.output))
            nodes_b.sort(key=lambda node: list(node.output))
        self.repeated(nodes_a, nodes_b, None, f"{path}.node")

    def content(
        self, graph: onnx.GraphProto
    ) -> tuple[list[tuple[str, Message]], list[onnx.NodeProto]]:
        """The constants of a graph by name, and its other nodes."""
        outputs = {output.name for output in graph.output}
        constants: list[tuple[str, Message]] = [(t.name, t) for t in graph.initializer]
        constants += [(sparse.values.name, sparse) for sparse in graph.sparse_initializer]
        nodes = []
        for node in graph.node:
            liftable = self.lift and node.output[:1] and node.output[0] not in outputs
            if liftable and makes_constant(node):
                constants.append((node.output[0], node))
            else:
                nodes.append(node)
        return constants, nodes

    def constant(self, a: Message, b: Message, path: str) -> None:
        """Two constants, each an initializer, a sparse initializer or a `Constant` node."""
        if type(a) is type(b):
            self.message(a, b, path)
            return
        if isinstance(b, onnx.NodeProto):
            self.note(path, "an initializer", "a Constant node")
        self.values(_any_value(a, self.expected_folder), _any_value(b, self.got_folder), path)
        if isinstance(a, onnx.SparseTensorProto | TensorProto):
            described = a if isinstance(a, TensorProto) else a.values
            other = b if isinstance(b, TensorProto) else getattr(b, "values", described)
            self.fields(described, other, path, skip=PAYLOAD)


def _any_value(constant: Any, folder: Path | None) -> Value:
    if isinstance(constant, TensorProto):
        return tensor_value(constant, folder)
    if isinstance(constant, onnx.SparseTensorProto):
        return sparse_value(constant)
    return _attribute_value(constant.attribute[0], folder)


def _presence(message: Any, name: str) -> str:
    return "present" if message.HasField(name) else "absent"

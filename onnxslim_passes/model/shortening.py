"""Bytes that a runtime does not need: long names, notes of exporters, what goes without saying.

Names of inputs and outputs stay, those of the model as those of its bodies and functions, and so
does whatever belongs to the model as a whole.
"""

import itertools
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from onnxslim_passes.model.ir import Constant, Graph, Node, Variable
from onnxslim_passes.model.model import Model
from onnxslim_passes.model.payload import MOST_VARINTS, ArrayPayload, FilePayload, TensorPayload

Tensor = Variable | Constant

# The sizes of what these give cannot be inferred: a declaration may be all that lets it be folded.
_OF_UNKNOWN_SIZE = ("NonZero", "Compress", "Unique", "NonMaxSuppression")


# Defaults in words: so much along each spatial axis.
_SPATIAL_OPERATORS = ("Conv", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool")
_SPATIAL_DEFAULTS = {"dilations": 1, "pads": 0, "strides": 1}


@dataclass(frozen=True)
class Shortened:
    """What was shortened.

    Attributes:
        names: tensors with a new name.
        notes: nodes and tensors whose name, documentation, metadata, declaration or attributes
            without effect are gone, or whose whole numbers are written in fewer bytes.
    """

    names: int
    notes: int

    @property
    def changed(self) -> bool:
        """Whether anything was."""
        return bool(self.names or self.notes)


def short_names() -> Iterator[str]:
    """a, b, ... Z, aa, ab, ...: every name costs its length in the file at each of its uses."""
    rest = string.ascii_letters + string.digits
    for length in itertools.count():
        for first in string.ascii_letters:
            for tail in itertools.product(rest, repeat=length):
                yield first + "".join(tail)


def shorten(model: Model, *, declarations: bool = True) -> Shortened:
    """Shortens the names of inner tensors, and drops notes and declarations; nothing else changes.

    A graph whose tensors are named elsewhere in the file (`quantization_annotation`, training
    information) keeps its names.

    Args:
        model: is changed.
        declarations: False keeps what is declared of inner tensors.
    """
    graphs = [graph for graph in model.graphs() if not graph.is_function]
    notes = sum(_drop_notes(graph) for graph in graphs)
    if declarations:
        notes += sum(_drop_declarations(graph) for graph in graphs)
    named_elsewhere = model.proto.training_info or any(
        graph.proto is not None and graph.proto.quantization_annotation for graph in graphs
    )
    return Shortened(0 if named_elsewhere else _rename(graphs), notes)


def restore_names(model: Model, names: Mapping[str, str]) -> int:
    """Gives tensors other names, such as those they had before they were shortened.

    Args:
        model: is changed.
        names: present name -> wanted one; passed over where it is not in the model, or where the
            wanted one is taken.

    Returns:
        How many have their wanted name.
    """
    taken = {name for graph in model.graphs() for name in graph.names}
    restored = 0
    for graph in model.graphs():
        made = (tensor for node in graph.nodes for tensor in node.outputs)
        for tensor in [*graph.initializers, *made]:
            wanted = names.get(tensor.name)
            if wanted is not None and wanted not in taken and tensor not in graph.outputs:
                taken.add(wanted)
                tensor.name = wanted
                restored += 1
    return restored


def _drop_notes(graph: Graph) -> int:
    dropped = 0
    if graph.proto is not None:
        dropped += bool(graph.proto.doc_string or graph.proto.metadata_props)
        graph.proto.ClearField("doc_string")
        graph.proto.ClearField("metadata_props")
    for node in graph.nodes:
        noted = bool(node.name)
        node.name = ""
        if node.proto is not None:
            noted |= bool(node.proto.doc_string or node.proto.metadata_props)
            for field in ("name", "doc_string", "metadata_props"):
                node.proto.ClearField(field)
        noted |= _drop_defaults(node)
        dropped += noted
    for constant in graph.initializers:
        dropped += constant.info is not None or constant.description is not None
        constant.info = constant.description = None
        dropped += _rewrite_shorter(constant)
    return dropped + _drop_interface_metadata(graph)


def _drop_declarations(graph: Graph) -> int:
    if graph.proto is not None:
        graph.proto.ClearField("value_info")
    dropped = len(graph.foreign_infos)
    graph.foreign_infos = []
    for node in graph.nodes:
        if node.op not in _OF_UNKNOWN_SIZE:
            dropped += sum(_undeclare(tensor, graph) for tensor in node.outputs)
    return dropped


def _rewrite_shorter(constant: Constant) -> bool:
    """Writes whole numbers, such as shapes, as varints where that is shorter than what they are."""
    if (
        not isinstance(constant.payload, TensorPayload | FilePayload)
        or constant.size > MOST_VARINTS
    ):
        return False
    shorter = ArrayPayload(constant.payload.array())
    new = shorter.tensor(constant.name).ByteSize()
    if constant.dtype.kind != "i" or new >= constant.payload.tensor(constant.name).ByteSize():
        return False
    constant.payload = shorter
    return True


def _drop_defaults(node: Node) -> bool:
    """Removes the attributes whose value is the operator's default; whether there were any."""
    try:
        schema = onnx.defs.get_schema(node.op, node.graph.opset, node.domain)
    except onnx.defs.SchemaError:
        return False  # of a domain that ONNX does not know
    defaults = {
        name: onnx.helper.get_attribute_value(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type != onnx.AttributeProto.UNDEFINED
    }
    said = [name for name, default in defaults.items() if _says(node.attrs.get(name), default)]
    if node.op in _SPATIAL_OPERATORS and not node.domain and node.graph.opset >= 11:
        said += [
            name
            for name, default in _SPATIAL_DEFAULTS.items()
            if set(node.attr(name) or [None]) == {default}
        ]
    for name in said:
        del node.attrs[name]
    return bool(said)


def _says(value: Any, default: Any) -> bool:
    if isinstance(default, bytes):
        default = default.decode()
    return type(value) is type(default) and bool(value == default)


def _drop_interface_metadata(graph: Graph) -> int:
    """What exporters note on inputs and outputs; names, types and documentation stay."""
    dropped = 0
    for tensor in dict.fromkeys((*graph.inputs, *graph.outputs)):
        if isinstance(tensor, Variable) and tensor.info is not None:
            dropped += bool(tensor.info.metadata_props)
            tensor.info = _without_metadata(tensor.info)
    for name, info in graph.output_infos.items():
        dropped += bool(info.metadata_props)
        graph.output_infos[name] = _without_metadata(info)
    return dropped


def _without_metadata(info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    if not info.metadata_props:
        return info
    bare = onnx.ValueInfoProto()
    bare.CopyFrom(info)
    bare.ClearField("metadata_props")
    return bare


def _undeclare(tensor: Variable, graph: Graph) -> bool:
    if tensor.info is None or tensor in graph.outputs:
        return False
    tensor.info = None
    return True


def _rename(graphs: Iterable[Graph]) -> int:
    """Gives the most used tensors the shortest names, if that is shorter than what they have."""
    inner: list[Tensor] = []
    kept: set[str] = set()
    for graph in graphs:
        fixed = {id(tensor) for tensor in (*graph.declared_inputs, *graph.inputs, *graph.outputs)}
        made = [tensor for node in graph.nodes for tensor in node.outputs if tensor.name]
        for tensor in (*graph.initializers, *made, *graph.inputs, *graph.outputs):
            if id(tensor) in fixed:
                kept.add(tensor.name)
            else:
                inner.append(tensor)
    inner.sort(key=_uses, reverse=True)
    free = (name for name in short_names() if name not in kept)
    names = dict(zip(inner, free, strict=False))
    saved = sum((len(old.name) - len(new)) * _uses(old) for old, new in names.items())
    if saved <= 0:
        return 0
    changed = len([tensor for tensor, name in names.items() if tensor.name != name])
    for tensor, name in names.items():
        tensor.name = name
    return changed


def _uses(tensor: Tensor) -> int:
    """How often its name stands in the file."""
    nodes = dict.fromkeys(tensor.outputs)
    uses: int = sum(1 for node in nodes for taken in node.inputs if taken is tensor)
    return 1 + uses

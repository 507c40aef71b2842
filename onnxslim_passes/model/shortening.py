"""Bytes that a runtime does not need: long names, notes of exporters, inferable declarations.

Names of inputs and outputs stay, those of the model as those of its bodies and functions, and so
does whatever belongs to the model as a whole.
"""

import itertools
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from onnxslim_passes.model.ir import Constant, Graph, Variable
from onnxslim_passes.model.model import Model

Tensor = Variable | Constant

# The sizes of what these give cannot be inferred: a declaration may be all that lets it be folded.
_OF_UNKNOWN_SIZE = ("NonZero", "Compress", "Unique", "NonMaxSuppression")


@dataclass(frozen=True)
class Shortened:
    """What was shortened.

    Attributes:
        names: tensors with a new name.
        notes: nodes and tensors whose name, documentation, metadata or declaration is gone.
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


def shorten(model: Model) -> Shortened:
    """Shortens the names of inner tensors, and drops notes and declarations; nothing else changes.

    A graph whose tensors are named elsewhere in the file (`quantization_annotation`, training
    information) keeps its names.
    """
    graphs = [graph for graph in model.graphs() if not graph.is_function]
    notes = sum(_drop_notes(graph) for graph in graphs)
    named_elsewhere = model.proto.training_info or any(
        graph.proto is not None and graph.proto.quantization_annotation for graph in graphs
    )
    return Shortened(0 if named_elsewhere else _rename(graphs), notes)


def _drop_notes(graph: Graph) -> int:
    dropped = 0
    if graph.proto is not None:
        dropped += bool(graph.proto.doc_string or graph.proto.metadata_props)
        graph.proto.ClearField("doc_string")
        graph.proto.ClearField("metadata_props")
        graph.proto.ClearField("value_info")
    for node in graph.nodes:
        noted = bool(node.name)
        node.name = ""
        if node.proto is not None:
            noted |= bool(node.proto.doc_string or node.proto.metadata_props)
            for field in ("name", "doc_string", "metadata_props"):
                node.proto.ClearField(field)
        dropped += noted
        if node.op not in _OF_UNKNOWN_SIZE:
            dropped += sum(_undeclare(tensor, graph) for tensor in node.outputs)
    for constant in graph.initializers:
        dropped += constant.info is not None or constant.description is not None
        constant.info = constant.description = None
    dropped += len(graph.foreign_infos)
    graph.foreign_infos = []
    return dropped


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

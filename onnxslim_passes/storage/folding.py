"""The proof that decoders cost nothing at run time: what ONNX Runtime makes of the model.

Folding fails in silence: a decoder that is not folded runs at every inference. So the runtime is
asked for the graph it would run, of the dense model and of the stored one. They must have the same
operators and the same constants, bit for bit.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.model import Model
from onnxslim_passes.runtime import optimized_graph
from onnxslim_passes.storage.writer import Replacement


@dataclass(frozen=True)
class Folded:
    """What is left of a model after ONNX Runtime's basic optimizations.

    Attributes:
        operators: how many nodes of each operator, bodies included.
        constants: digests of all constants; type, shape and bytes.
        outputs: names of all tensors that nodes compute.
    """

    operators: Counter[str]
    constants: frozenset[bytes]
    outputs: frozenset[str]

    def same_as(self, other: "Folded") -> bool:
        """Whether both run the same operators on the same constants."""
        return self.operators == other.operators and self.constants == other.constants

    def computes(self, names: Collection[str]) -> set[str]:
        """Those of the names that a node still computes.

        The runtime inlines functions, and puts a prefix before the names of their tensors.
        """
        inlined = tuple(output for output in self.outputs if output.startswith("_inlfunc_"))
        return {
            name
            for name in names
            if name in self.outputs or any(output.endswith(f"_{name}") for output in inlined)
        }


def folded(model: Model) -> Folded:
    """Asks ONNX Runtime; levels above "basic" fuse operators but fold no more.

    Raises:
        RuntimeRefusedError: ONNX Runtime does not load the model.
    """
    graphs = list(_graphs(optimized_graph(model, level="basic").graph))
    nodes = [node for graph in graphs for node in graph.node]
    return Folded(
        Counter(f"{node.domain}:{node.op_type}" for node in nodes),
        frozenset(digest for graph in graphs for digest in _digests(graph)),
        frozenset(name for node in nodes for name in node.output),
    )


def operators(model: Model) -> Counter[str]:
    """How many nodes of each operator ONNX Runtime runs after all optimizations, bodies included.

    Raises:
        RuntimeRefusedError: ONNX Runtime does not load the model.
    """
    graphs = _graphs(optimized_graph(model, weights=False).graph)
    return Counter(f"{node.domain}:{node.op_type}" for graph in graphs for node in graph.node)


def settle(model: Model, replacements: Sequence[Replacement]) -> dict[Replacement, str]:
    """Applies the replacements that ONNX Runtime folds away; the others are left undone.

    Returns:
        Those left undone, with the reason.

    Raises:
        RuntimeRefusedError: ONNX Runtime does not load the model as it is.
    """
    dense = folded(model)
    for each in replacements:
        each.apply()
    rejected = _undo_computed(model, dense, replacements)
    kept = [each for each in replacements if each not in rejected]
    if _matches(model, dense):
        return rejected
    _undo(kept)
    culprits = _culprits(model, dense, kept)
    kept = [each for each in kept if each not in culprits]
    for each in kept:
        each.apply()
    if not _matches(model, dense):
        _undo(kept)
        culprits += kept
    reason = "with it stored, ONNX Runtime would run other operators or constants"
    return rejected | dict.fromkeys(culprits, reason)


def _undo_computed(
    model: Model, dense: Folded, replacements: Sequence[Replacement]
) -> dict[Replacement, str]:
    """Undoes those whose weight is still computed at run time."""
    names = {each.constant.name for each in replacements}
    try:
        left = folded(model).computes(names) - dense.computes(names)
    except RuntimeRefusedError:
        return {}
    unfolded = [each for each in replacements if each.constant.name in left]
    _undo(unfolded)
    return dict.fromkeys(unfolded, "ONNX Runtime does not fold its decoder")


def _culprits(
    model: Model, dense: Folded, replacements: Sequence[Replacement]
) -> list[Replacement]:
    """By bisection, those that alone change what the runtime makes of the model; all undone."""
    if not replacements:
        return []
    for each in replacements:
        each.apply()
    same = _matches(model, dense)
    _undo(replacements)
    if same:
        return []
    if len(replacements) == 1:
        return list(replacements)
    half = len(replacements) // 2
    return [
        *_culprits(model, dense, replacements[:half]),
        *_culprits(model, dense, replacements[half:]),
    ]


def _matches(model: Model, dense: Folded) -> bool:
    try:
        return folded(model).same_as(dense)
    except RuntimeRefusedError:
        return False


def _undo(replacements: Sequence[Replacement]) -> None:
    for each in reversed(replacements):
        each.undo()


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            for body in attribute.graphs:
                yield from _graphs(body)


def _digests(graph: onnx.GraphProto) -> Iterator[bytes]:
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.STRING:
            yield _digest(tensor.data_type, numpy_helper.to_array(tensor))
    for sparse in graph.sparse_initializer:
        values = numpy_helper.to_array(sparse.values)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        indices = numpy_helper.to_array(sparse.indices)
        if indices.ndim == 2:
            dense[tuple(indices.T)] = values
        else:
            dense.reshape(-1)[indices] = values
        yield _digest(sparse.values.data_type, dense)


def _digest(elem_type: int, array: npt.NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(f"{elem_type}{array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()

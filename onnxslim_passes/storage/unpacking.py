"""Stored weights back to dense ones, whatever their encoding: ONNX Runtime runs their decoders.

Nothing here knows an encoding. What a decoder is, `recognition` tells by its operators; the graph
of decoders alone is run without optimizations, and each output takes the decoder's place.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnxslim_passes.model import Constant, Model
from onnxslim_passes.runtime import open_session
from onnxslim_passes.storage.recognition import StoredWeight, stored_weights
from onnxslim_passes.storage.writer import remove_unused_makers

# Constants of at most so many elements are shapes and shifts, which all decoders share.
_SMALL = 64


@dataclass(frozen=True)
class UnpackedWeight:
    """A weight that is dense again.

    Attributes:
        where: its name, with the path of the body it stands in.
        operators: how many nodes its decoder had; 0 for a sparse initializer.
        nbytes: of the dense values.
    """

    where: str
    operators: int
    nbytes: int


def unpack_weights(model: Model) -> list[UnpackedWeight]:
    """Makes all stored weights of a model dense; their names and every bit stay.

    Raises:
        RuntimeRefusedError: ONNX Runtime does not run a decoder.
    """
    unpacked = []
    for group in _groups(list(stored_weights(model))):
        unpacked += _unpack(model, group)
    for constant in model.constants():
        if constant.sparse:
            constant.sparse = False
            unpacked.append(UnpackedWeight(constant.where, 0, constant.nbytes))
    return unpacked


def _groups(stored: Sequence[StoredWeight]) -> Iterator[list[StoredWeight]]:
    """Weights that share streams are unpacked together, others apart, which takes less memory."""
    leaders: dict[Constant, StoredWeight] = {}
    members: dict[StoredWeight, list[StoredWeight]] = defaultdict(list)
    for each in stored:
        streams = [constant for constant in each.constants if constant.size > _SMALL]
        shared = {id(leaders[c]): leaders[c] for c in streams if c in leaders}
        leader = next(iter(shared.values()), each)
        for other in shared.values():
            if other is not leader:
                members[leader] += members.pop(other)
        members[leader].append(each)
        for member in members[leader]:
            leaders.update((c, leader) for c in member.constants if c.size > _SMALL)
    yield from members.values()


def _unpack(model: Model, group: Sequence[StoredWeight]) -> list[UnpackedWeight]:
    graph = group[0].graph
    # A constant cannot be computed by a graph and be its output under the same name.
    group = [each for each in group if each.rebuilt not in graph.outputs]
    if not group:
        return []
    nodes = frozenset().union(*(each.nodes for each in group))
    constants = frozenset().union(*(each.constants for each in group))
    decoders = model.extract(graph, nodes, constants, [each.rebuilt for each in group])
    with open_session(decoders, optimize="none", lean=True) as session:
        values = session.run({})
    unpacked = []
    for each in group:
        constant = graph.add_constant(f"{each.rebuilt.name}_dense", values[each.rebuilt.name])
        model.replace_uses(each.rebuilt, constant)
        remove_unused_makers(model, graph, each.rebuilt)
        constant.name = each.rebuilt.name
        unpacked.append(UnpackedWeight(constant.where, len(each.nodes), constant.nbytes))
    return unpacked

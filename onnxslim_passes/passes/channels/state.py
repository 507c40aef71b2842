"""What is found out about the channels of a model while its nodes are walked."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from onnxslim_passes.model import Constant, Model, Node, Types, Variable
from onnxslim_passes.passes.channels.labels import Channels, Ids, Labels
from onnxslim_passes.passes.channels.layers import Layer, optional_input

__all__ = ["Resize", "Tensor", "Trace", "constant_axes"]

Tensor: TypeAlias = Variable | Constant


@dataclass(frozen=True)
class Resize:
    """A number in the file that counts channels.

    Attributes:
        node: the node.
        ids: the labels that are counted.
        position: of a Reshape, which entry of its shape; None for the attribute `group`.
    """

    node: Node
    ids: Ids
    position: int | None


class Trace:
    """What is known of the channels of a model.

    Attributes:
        model: the model.
        labels: of tensors and weights.
        order: all nodes, each behind what it needs, bodies in their place.
        layers: those that mix channels by a weight, in that order.
        resizes: where a number has to follow when channels go.
        untraced: layers whose channels are not traced, with the reason.
        covered: inputs of nodes out of which channels may be taken, as far as these nodes go.
        objections: why a node's inputs are not covered.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.labels = Labels()
        self.order: list[Node] = []
        self.layers: list[Layer] = []
        self.resizes: list[Resize] = []
        self.untraced: dict[Node, str] = {}
        self.covered: set[tuple[Node, int]] = set()
        self.objections: dict[Node, str] = {}

    @cached_property
    def types(self) -> Types:
        """Types and shapes before any edit."""
        return self.model.types()

    # ---- what rules ask and say

    def of(self, tensor: Tensor) -> Channels | None:
        """The channels of a computed tensor, or None."""
        return self.labels.tensors.get(tensor) if isinstance(tensor, Variable) else None

    def shape(self, tensor: Tensor) -> tuple[int | str | None, ...] | None:
        """The sizes of a tensor, as far as they are known."""
        known = self.types.of(tensor)
        return None if known is None else known.shape

    def give(self, tensor: Variable, channels: Channels) -> None:
        """Says what the channels of an output are."""
        self.labels.tensors[tensor] = channels

    def cover(self, node: Node, *indices: int) -> None:
        """Says that channels may be taken out of these inputs, as far as this node goes."""
        self.covered.update((node, index) for index in indices)

    def label_weight(self, node: Node, index: int, axis: int, ids: Ids) -> None:
        """Labels an axis of a constant input and covers it."""
        self.labels.label_weight(node.inputs[index], axis, ids)
        self.cover(node, index)


def constant_axes(node: Node, rank: int) -> tuple[int, ...]:
    """The axes in an attribute or in a constant second input, counted from 0; () if unknown."""
    given = node.attr("axes")
    taken = optional_input(node, 1)
    if taken is not None:
        given = taken.values.reshape(-1).tolist() if isinstance(taken, Constant) else None
    return tuple(int(axis) % rank for axis in given) if given and rank else ()

"""The number formats of nodes, and the grids of activations that follow from them.

A tensor that an integer kernel makes has that node's format; nodes behind it with another format
take it through a second pair. A tensor that a float node makes is quantized for its takers, once
for each format.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from onnxslim_passes.model import Node, Variable
from onnxslim_passes.numerics.affine import AffineGrid, choose_grid
from onnxslim_passes.passes.placement.sites import Site

Ranges = Mapping[str, tuple[float, float]]
"""Smallest and largest value of each tensor, by name."""


class Format(NamedTuple):
    """How an activation is stored: its dtype, and whether zero is in the middle of the codes."""

    dtype: np.dtype[Any]
    symmetric: bool

    @property
    def wide(self) -> bool:
        """Whether it has 16 bits, for which ONNX Runtime has no integer kernels on a CPU."""
        return self.dtype.itemsize > 1


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The number formats of one node.

    Attributes:
        activations: dtype of activations.
        weights: dtype of weights, symmetric.
        per_channel: operators whose weights get a scale for each output channel, where they have
            such an axis.
        pairs_fit: int8 weights have scales at which no pair of products saturates 16 bits.
        symmetric: zero points of activations in the middle of the range.
        integer_bias: biases as int32; else they stay float.
        for_cpu: with what this CPU's runtime needs: copies where it would otherwise move or widen
            what is quantized, and int32 addends of an Add behind a MatMul.
    """

    activations: np.dtype[Any]
    weights: np.dtype[Any]
    per_channel: frozenset[str]
    pairs_fit: bool = False
    symmetric: bool = False
    integer_bias: bool = True
    for_cpu: bool = True

    @property
    def format(self) -> Format:
        """That of activations."""
        return Format(self.activations, self.symmetric)

    @property
    def adds_pairs(self) -> bool:
        """Whether pairs of int8 weights are to fit: no kernel takes activations of 16 bits."""
        return self.pairs_fit and not self.format.wide


@dataclass(frozen=True, kw_only=True)
class Schemes:
    """The scheme of each node of one model.

    Attributes:
        default: of all nodes that are not special.
        special: of the others.
        tensors: formats of single activations, by name, whatever their nodes' are.
    """

    default: Scheme
    special: Mapping[Node, Scheme] = field(default_factory=dict)
    tensors: Mapping[str, Format] = field(default_factory=dict)

    def of(self, node: Node | None) -> Scheme:
        """A node's scheme; of None the default."""
        return self.default if node is None else self.special.get(node, self.default)

    def kind(self, tensor: Variable, node: Node | None) -> Format:
        """The format in which a node makes or takes an activation."""
        return self.tensors.get(str(tensor.name), self.of(node).format)


class Grids:
    """The grid of each tensor around some sites, in each format it is made or taken in."""

    def __init__(self, sites: Iterable[Site], ranges: Ranges, schemes: Schemes) -> None:
        self._ranges = ranges
        self._schemes = schemes
        self._known: dict[tuple[Variable, Format], AffineGrid] = {}
        for site in _in_order(sites):
            taken = [self.of(tensor, self.kind(tensor, site)) for tensor in site.inputs]
            if not site.integer_output:
                continue
            source = site.inputs[0]
            for tensor in site.outputs:
                kind = self.kind(tensor, site)
                moved = site.rule is not None and site.rule.same_grid
                if moved and kind == self.kind(source, site):
                    self._known[tensor, kind] = taken[0]
                else:
                    self.of(tensor, kind)

    def kind(self, tensor: Variable, site: Site) -> Format:
        """The format of an activation around a site."""
        return self._schemes.kind(tensor, site.node)

    def of(self, tensor: Variable, kind: Format) -> AffineGrid:
        """The grid of a tensor in a format."""
        if (tensor, kind) not in self._known:
            low, high = self._ranges[str(tensor.name)]
            grid = choose_grid(low, high, kind.dtype, symmetric=kind.symmetric)
            self._known[tensor, kind] = grid
        return self._known[tensor, kind]

    def data(self, site: Site) -> AffineGrid:
        """The grid of what a site with a weight takes."""
        return self.of(site.inputs[0], self.kind(site.inputs[0], site))


def _in_order(sites: Iterable[Site]) -> list[Site]:
    """Makers before takers, whatever the order of the nodes in the file."""
    waiting = list(sites)
    makers = {tensor: site for site in waiting for tensor in site.outputs}
    ordered: dict[Site, None] = {}
    stack = waiting[::-1]
    while stack:
        site = stack[-1]
        before = [
            makers[tensor]
            for tensor in site.inputs
            if tensor in makers and makers[tensor] not in ordered
        ]
        if before and site not in ordered:
            stack.extend(before)
        else:
            stack.pop()
            ordered[site] = None
    return list(ordered)

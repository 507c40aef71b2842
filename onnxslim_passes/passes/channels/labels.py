"""Labels of channels: positions along the axes of tensors and weights that must go together.

Every position along a traced axis has a label, a whole number. Operators that keep channels apart
pass labels on; adding two tensors makes their labels one, and so does a weight that two layers
share. A label is *pinned* where something needs every position to stay: an output of the model, an
operator that mixes channels in a way that nobody traced.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Constant, Variable

__all__ = ["Channels", "Ids", "Labels"]

Ids: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor.

    Attributes:
        ids: the label of each position along the axis; shape (C,).
        axis: which axis of the tensor, counted from 0.
        rank: number of axes of the tensor.
    """

    ids: Ids
    axis: int
    rank: int

    @property
    def from_right(self) -> int:
        """The axis counted from the last one, as broadcasting does: -1 is the last."""
        return self.axis - self.rank

    def moved(self, axis: int, rank: int) -> "Channels":
        """The same channels along an axis of another tensor."""
        return Channels(self.ids, axis, rank)


class Labels:
    """The labels of a whole model, with what is known to be one and what is pinned.

    Attributes:
        tensors: the channels of tensors that are computed.
        weights: the labels along axes of constants.
    """

    def __init__(self) -> None:
        self.tensors: dict[Variable, Channels] = {}
        self.weights: dict[tuple[Constant, int], Ids] = {}
        self._parents: list[int] = []
        self._pins: list[tuple[Ids, str]] = []

    def fresh(self, count: int) -> Ids:
        """Labels that nothing else has."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.int64)

    def join(self, first: Ids, second: Ids) -> None:
        """Makes the labels at equal positions one."""
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self._root(one), self._root(other)))
            self._parents[high] = low

    def label_weight(self, constant: Constant, axis: int, ids: Ids) -> None:
        """Gives the positions along an axis of a constant their labels."""
        known = self.weights.setdefault((constant, axis), ids)
        if known is not ids:
            self.join(known, ids)

    def pin(self, ids: Ids, reason: str) -> None:
        """Keeps these labels, whatever else may be said of them."""
        self._pins.append((ids, reason))

    @property
    def count(self) -> int:
        """How many labels there are; roots are below it."""
        return len(self._parents)

    def roots(self, ids: Ids) -> Ids:
        """The smallest label among those that are one, for each."""
        return np.fromiter((self._root(label) for label in ids.tolist()), np.int64, ids.size)

    def pinned(self) -> dict[int, str]:
        """The first reason of every pinned root."""
        reasons: dict[int, str] = {}
        for ids, reason in self._pins:
            for root in self.roots(ids).tolist():
                reasons.setdefault(root, reason)
        return reasons

    def groups(self) -> Iterable[Ids]:
        """The labels along each traced axis of each tensor and constant, as roots."""
        for channels in self.tensors.values():
            yield self.roots(channels.ids)
        for ids in self.weights.values():
            yield self.roots(ids)

    def _root(self, label: int) -> int:
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

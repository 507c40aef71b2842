"""Shared values that move together: trained quantization of Han, Mao, Dally 2016, section 3.3.

The forward graph reads ``table[assignments]``, whose gradient sums over all elements of a cluster.
Assignments stay; a zero is no cluster but a hole, and stays +0.0. Tables of single channels or
blocks lie behind each other in one table, so that one rule covers them all.

With `latent`, each element keeps a weight of its own behind its shared value, the gradient goes
straight through to it, and every `refresh_steps` steps each element joins the nearest value of its
channel again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Variable
from onnxslim_passes.training.constraints.base import Held
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.parameters import Array, Arrays, Tensors

__all__ = ["Codebook"]


@dataclass(frozen=True, eq=False)
class Codebook(Held):
    """A weight of few distinct values.

    Attributes:
        centroids: the values other than zero, float32, shape (K,), tables one behind the other.
        assignments: int32, the weight's shape: 0 for a zero, else 1 + place in `centroids`.
        tables: int32, shape (K,): which table each centroid belongs to.
        axis: the axis along which each channel has a table of its own, or None.
        latent: whether elements have weights of their own behind their shared values.
    """

    centroids: npt.NDArray[np.float32]
    assignments: npt.NDArray[np.int32]
    tables: npt.NDArray[np.int32]
    axis: int | None = None
    latent: bool = False

    kind: ClassVar[str] = "codebook"

    @property
    def density(self) -> float:
        """See `Constraint`."""
        return float((self.assignments != 0).mean()) if self.assignments.size else 1.0

    @property
    def decays(self) -> frozenset[str]:
        """See `Constraint`: a decay would act once on a value that thousands share."""
        return frozenset()

    def trainable(self) -> dict[str, Array]:
        """See `Constraint`."""
        latent = {"value": self.initial.astype(np.float32)} if self.latent else {}
        return {"centroids": self.centroids, **latent}

    def buffers(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {"assignments": self.assignments}

    def emit_value(self, emit: Emitter, tensors: Tensors) -> Variable:
        """See `Constraint`."""
        zero = emit.constant(np.zeros(1, np.float32))
        table = emit.op("Concat", zero, tensors["centroids"], axis=0)
        shared = emit.op("Gather", table, tensors["assignments"], axis=0)
        if self.latent:
            value = tensors["value"]
            shared = emit.add(shared, emit.sub(value, emit.stop(value)))  # 0, but for its gradient
        return self.in_model_type(emit, shared)

    def refreshed(self, arrays: Arrays) -> dict[str, Array]:
        """Each element other than zero joins the centroid of its own table that is nearest."""
        if not self.latent:
            return {}
        centroids, old = arrays["centroids"], arrays["assignments"]
        fresh = old.copy()
        for table in np.unique(self.tables):
            places = np.flatnonzero(self.tables == table)
            mine = np.isin(old, places + 1)
            fresh[mine] = places[_nearest(arrays["value"][mine], centroids[places])] + 1
        return {} if np.array_equal(fresh, old) else {"assignments": fresh}

    def written(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        table = np.concatenate([np.zeros(1, np.float32), arrays["centroids"]])
        return self.write(table[arrays["assignments"]])

    def table(self) -> dict[str, Any]:
        """See `Constraint`."""
        return {
            **super().table(),
            "values": int(self.centroids.size),
            "tables": int(np.unique(self.tables).size),
            "axis": self.axis,
            "density": round(self.density, 6),
        }


def _nearest(values: Array, centroids: Array) -> npt.NDArray[np.intp]:
    """Place of the nearest centroid of each value; of two equally near ones, the lower."""
    order = np.argsort(centroids, kind="stable")
    ranked = centroids[order].astype(np.float64)
    edges = (ranked[1:] + ranked[:-1]) / 2
    found: npt.NDArray[np.intp] = order[np.searchsorted(edges, values.astype(np.float64))]
    return found

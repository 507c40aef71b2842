"""Zeros that stay zeros, and latent weights behind zeros that may come back.

`Masked` is pruning as Han et al. 2015 retrain it: the survivors move, the others are +0.0 after
every step. With `latent` it is dynamic network surgery (Guo, Yao, Chen: "Dynamic Network Surgery
for Efficient DNNs", NeurIPS 2016): the forward graph reads ``value * mask``, the gradient goes
straight through to all of `value`, and every `refresh_steps` steps the mask is decided again by
magnitude, so that a weight that was cut too early comes back. The number of survivors stays.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxslim_passes.model import Variable
from onnxslim_passes.numerics.sparsity import Mask, magnitude_mask, n_of_m_mask
from onnxslim_passes.training.constraints.base import Held, straight_through
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.parameters import Array, Arrays, Tensors

__all__ = ["Groups", "Masked"]


@dataclass(frozen=True)
class Groups:
    """N:M sparsity: of every `of` neighbours along `axis`, `kept` may differ from zero."""

    kept: int
    of: int
    axis: int


@dataclass(frozen=True, eq=False)
class Masked(Held):
    """A pruned weight.

    Attributes:
        mask: True where the weight may differ from zero; the weight's shape.
        latent: whether the zeros have values behind them that keep moving.
        groups: of N:M sparsity, which a mask decided again keeps; None if there are none.
    """

    mask: Mask
    latent: bool = False
    groups: Groups | None = None

    kind: ClassVar[str] = "mask"

    @property
    def density(self) -> float:
        """See `Constraint`."""
        return float(self.mask.mean()) if self.mask.size else 1.0

    def trainable(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {"value": self.initial.astype(np.float32)}

    def buffers(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {"mask": self.mask}

    def emit_value(self, emit: Emitter, tensors: Tensors) -> Variable:
        """See `Constraint`."""
        value = tensors["value"]
        kept = emit.where(tensors["mask"], value, emit.scalar(0, value))
        if self.latent:
            kept = straight_through(emit, kept, value)
        return self.in_model_type(emit, kept)

    def emit_projection(self, emit: Emitter, tensors: Tensors) -> dict[str, Variable]:
        """See `Constraint`."""
        if self.latent:
            return {}
        value = tensors["value"]
        return {"value": emit.where(tensors["mask"], value, emit.scalar(0, value))}

    def refreshed(self, arrays: Arrays) -> dict[str, Array]:
        """The mask of the largest latent weights, as many as there are survivors now."""
        value, mask = arrays["value"], arrays["mask"].astype(np.bool_)
        if self.groups is not None:
            fresh = n_of_m_mask(value, self.groups.kept, self.groups.of, self.groups.axis)
        else:
            fresh = magnitude_mask(value, 1 - np.count_nonzero(mask) / max(1, mask.size))
        return {} if np.array_equal(fresh, mask) else {"mask": fresh}

    def written(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        value = arrays["value"]
        return self.write(np.where(arrays["mask"].astype(np.bool_), value, np.float32(0)))

    def table(self) -> dict[str, Any]:
        """See `Constraint`."""
        pattern = {"n_of_m": f"{self.groups.kept}:{self.groups.of}"} if self.groups else {}
        return {**super().table(), "density": round(self.density, 6), **pattern}

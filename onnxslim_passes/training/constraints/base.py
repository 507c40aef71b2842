"""What the constraints on floating-point weights have in common."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxslim_passes.model import Constant, Variable
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.parameters import Array, Arrays, Tensors
from onnxslim_passes.training.shapes import Tensor

__all__ = ["Held", "Tied", "plain_zeros", "straight_through"]


@dataclass(frozen=True, eq=False)
class Held:
    """A weight, or equal weights that are tied, held by a constraint.

    Attributes:
        constants: with names of their own in the whole model, all with the same values.
        places: where each stands in the original model; the first one names them.
        refresh_steps: optimizer steps between calls of `refreshed`; 0 for never.
    """

    constants: tuple[Constant, ...]
    places: tuple[str, ...]
    refresh_steps: int

    kind: ClassVar[str]

    @property
    def where(self) -> str:
        """See `Constraint`."""
        return self.places[0]

    @property
    def covers(self) -> frozenset[str]:
        """See `Constraint`."""
        return frozenset(str(constant.name) for constant in self.constants)

    @property
    def replaces(self) -> tuple[str, ...]:
        """See `Constraint`."""
        return tuple(str(constant.name) for constant in self.constants)

    @property
    def decays(self) -> frozenset[str]:
        """See `Constraint`."""
        return frozenset(("value",))

    def emit_projection(self, emit: Emitter, tensors: Tensors) -> dict[str, Variable]:
        """See `Constraint`."""
        return {}

    def refreshed(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        return {}

    def buffers(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {}

    def table(self) -> dict[str, Any]:
        """See `Constraint`."""
        return {"tied": list(self.places[1:])} if len(self.places) > 1 else {}

    @property
    def initial(self) -> Array:
        """The values in the original model."""
        return self.constants[0].values

    def write(self, values: Array) -> dict[str, Array]:
        """The same values for all constants, in their element type, without -0.0."""
        fitted = plain_zeros(values).astype(self.constants[0].dtype)
        return {str(constant.name): fitted for constant in self.constants}

    def in_model_type(self, emit: Emitter, tensor: Variable) -> Variable:
        """The tensor in the element type that the forward graph reads."""
        value = emit.cast(tensor, self.constants[0].dtype)
        assert isinstance(value, Variable)  # a cast of one
        return value


@dataclass(frozen=True, eq=False)
class Tied(Held):
    """Equal weights that nothing else holds: they stay equal."""

    kind: ClassVar[str] = "tied"
    density: ClassVar[float] = 1.0

    def trainable(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {"value": self.initial.astype(np.float32)}

    def emit_value(self, emit: Emitter, tensors: Tensors) -> Variable:
        """See `Constraint`."""
        return self.in_model_type(emit, tensors["value"])

    def written(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        values = arrays["value"].astype(self.constants[0].dtype)
        return {str(constant.name): values for constant in self.constants}


def plain_zeros(values: Array) -> Array:
    """The same values with +0.0 for -0.0."""
    zero: Array = values + values.dtype.type(0)
    return zero


def straight_through(emit: Emitter, value: Tensor, through: Tensor) -> Variable:
    """`value` to the bit, with the gradient of `through` (Bengio et al. 2013, arXiv:1308.3432)."""
    return emit.add(emit.stop(value), emit.sub(through, emit.stop(through)))

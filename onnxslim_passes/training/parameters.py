"""The weights that training moves, and the form in which each is held.

A `Constraint` holds one weight of the model (or several that are tied) as trainable tensors, gives
the value that the forward graph reads, and brings what the optimizer made of it back onto what
compression left: a mask, a codebook, a grid. `Free` is the one that constrains nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Constant, Variable, Weight
from onnxslim_passes.model.patterns import first_match, weight_names
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.options import Parameters

__all__ = ["Array", "Arrays", "Constraint", "Free", "Tensors", "objection"]

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]
Tensors: TypeAlias = Mapping[str, Variable]

# Beyond this a constant in an addition or a product is a switch, such as the -1e9 of an attention
# mask, and not a learned number.
_LARGEST_LEARNED = 1e4
# Operators whose whole tensors of constants, such as embeddings of positions, are learned.
_LEARNED_OPERATORS = frozenset(("Add", "Sub", "Mul", "PRelu", "Slice", "Split", "Concat"))


class Constraint(Protocol):
    """How one weight is trained.

    Attributes:
        where: the weight in the original model, with the path of its body.
        kind: what holds it, one word: "free", "mask", "codebook", "grid"...
        covers: names of all constants of the original model that it takes charge of.
        replaces: names of tensors of the training copy whose consumers read the emitted value.
        decays: the trainable tensors that weight decay and regularization act on.
        density: fraction of the weight's elements that may differ from zero, in (0, 1].
        refresh_steps: optimizer steps between calls of `refreshed`; 0 for never.
    """

    @property
    def kind(self) -> str:
        """See the class."""
        ...

    @property
    def density(self) -> float:
        """See the class."""
        ...

    @property
    def refresh_steps(self) -> int:
        """See the class."""
        ...

    @property
    def where(self) -> str:
        """See the class."""
        ...

    @property
    def covers(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def replaces(self) -> tuple[str, ...]:
        """See the class."""
        ...

    @property
    def decays(self) -> frozenset[str]:
        """See the class."""
        ...

    def trainable(self) -> dict[str, Array]:
        """Tensors that the optimizer moves, float32, by keys of the constraint's own."""
        ...

    def buffers(self) -> dict[str, Array]:
        """Tensors that go along in the state and are not trained: a mask, assignments."""
        ...

    def emit_value(self, emit: Emitter, tensors: Tensors) -> Variable | dict[str, Variable]:
        """The weight as the forward graph reads it, differentiable in the trainable tensors.

        One tensor for all that it replaces, or one for each by name.
        """
        ...

    def emit_projection(self, emit: Emitter, tensors: Tensors) -> dict[str, Variable]:
        """What the constraint makes of the tensors after an optimizer step; only what differs."""
        ...

    def refreshed(self, arrays: Arrays) -> dict[str, Array]:
        """Tensors decided again on the host, such as a mask; only what differs."""
        ...

    def written(self, arrays: Arrays) -> dict[str, Array]:
        """New values of constants of the original model, by name, in their own element types."""
        ...

    def table(self) -> dict[str, Any]:
        """What `training.json` says of the constraint, as plain data."""
        ...


@dataclass(frozen=True)
class Free:
    """A weight that may take any value.

    Attributes:
        constant: the weight, by the name that it has in the training copy, too.
        where: the weight in the file.
        is_matrix: whether weight decay acts on it; biases and normalization are left alone.
    """

    constant: Constant
    where: str
    is_matrix: bool

    kind = "free"
    density = 1.0
    refresh_steps = 0

    @property
    def covers(self) -> frozenset[str]:
        """See `Constraint`."""
        return frozenset((str(self.constant.name),))

    @property
    def replaces(self) -> tuple[str, ...]:
        """See `Constraint`."""
        return (str(self.constant.name),)

    @property
    def decays(self) -> frozenset[str]:
        """See `Constraint`."""
        return frozenset(("value",)) if self.is_matrix else frozenset()

    def trainable(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {"value": self.constant.values.astype(np.float32)}

    def buffers(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {}

    def emit_value(self, emit: Emitter, tensors: Tensors) -> Variable:
        """See `Constraint`."""
        value = emit.cast(tensors["value"], self.constant.dtype)
        assert isinstance(value, Variable)  # a cast of one
        return value

    def emit_projection(self, emit: Emitter, tensors: Tensors) -> dict[str, Variable]:
        """See `Constraint`."""
        return {}

    def refreshed(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        return {}

    def written(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        return {str(self.constant.name): arrays["value"].astype(self.constant.dtype)}

    def table(self) -> dict[str, Any]:
        """See `Constraint`."""
        return {}


def objection(weight: Weight, options: Parameters) -> str | None:
    """Why a weight is not trained, or None if it may be."""
    labels = weight_names(weight)
    if (pattern := first_match(options.exclude, labels)) is not None:
        return f"excluded by {pattern!r}"
    if options.include:
        return None if first_match(options.include, labels) else "not matched by include"
    if weight.constant in weight.graph.outputs:
        return "is an output of its graph, too"
    return _not_learned(weight)


def _not_learned(weight: Weight) -> str | None:
    """Why a constant of floats is no learned parameter, or None if it looks like one."""
    statistics = [
        use.node
        for use in weight.uses
        if use.node.op == "BatchNormalization" and use.input_index > 2
    ]
    if statistics:
        return "a running statistic of BatchNormalization"
    arithmetic = weight.role in ("bias", "normalization", "other")
    if arithmetic and weight.size == 1:
        return "a single number in arithmetic, not a learned parameter"
    if weight.role == "other" and not weight.op_types <= _LEARNED_OPERATORS:
        return f"taken by {', '.join(sorted(weight.op_types))}: not a learned parameter"
    values = weight.values.astype(np.float32)
    if not np.isfinite(values).all():
        return "holds NaN or infinite values"
    if weight.role == "other" and np.abs(values).max(initial=0) > _LARGEST_LEARNED:
        return "a mask, by its large values"
    return None

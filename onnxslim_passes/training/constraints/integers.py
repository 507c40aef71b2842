"""Weights of integers behind DequantizeLinear, trained as the floats that they stand for.

The latent weights begin as ``scale (code - zero point)``; the graph fake-quantizes them (see
`grids`) to the same integers, and what is written are codes of the same type and layout and,
where no other node takes the scale, the step sizes that were learned. A bias in int32 has the step
size ``scale_x scale_w``: it follows that of the weight in proportion.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Constant, Variable
from onnxslim_passes.training.constraints.base import straight_through
from onnxslim_passes.training.constraints.grids import (
    Levels,
    emit_fake_quantize,
    round_to_levels,
    rounded_scale,
)
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.parameters import Array, Arrays, Tensors

__all__ = ["Integers", "QuantizedWeight"]

_ALL_BITS = 24
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, eq=False)
class Integers:
    """A DequantizeLinear of constants.

    Attributes:
        codes: the integers.
        scale: float; a scalar, one a channel, or one a block.
        zero_point: or None.
        output: name of the tensor of floats.
        axis: of the channels or blocks, counted from 0; None for one scale.
        block: elements along `axis` that share a scale; 0 if the whole channel does.
        learned: whether no other node takes the scale, so that it may move.
    """

    codes: Constant
    scale: Constant
    zero_point: Constant | None
    output: str
    axis: int | None
    block: int
    learned: bool

    def spread(self, parameters: Array) -> Array:
        """Scales or zero points, of a shape that broadcasts with the codes."""
        if self.axis is None:
            return parameters.reshape((1,) * len(self.codes.shape))
        if self.block:
            length = self.codes.shape[self.axis]
            return np.repeat(parameters, self.block, axis=self.axis).take(
                range(length), axis=self.axis
            )
        shape = np.ones(len(self.codes.shape), np.int64)
        shape[self.axis] = -1
        return parameters.reshape(shape)

    @property
    def steps(self) -> npt.NDArray[np.int32]:
        """Codes less zero points."""
        codes = self.codes.values.astype(np.int32)
        if self.zero_point is None:
            return codes
        return codes - self.spread(self.zero_point.values.astype(np.int32))

    @property
    def floats(self) -> npt.NDArray[np.float32]:
        """What DequantizeLinear gives."""
        return self.steps.astype(np.float32) * self.spread(self.scale.values.astype(np.float32))

    def levels(self) -> Levels:
        """Integers from the smallest to the largest step in use; about zero, as far on both sides.

        Others might have no code, or saturate where the range was reduced for that.
        """
        steps = self.steps
        low, high = min(int(steps.min()), 0), max(int(steps.max()), 0)
        binary = bool((np.abs(steps) == 1).all())
        symmetric = self.zero_point is None or not self.zero_point.values.astype(np.int32).any()
        if symmetric and low < 0:
            low, high = -max(-low, high), max(-low, high)
        bounds = [np.full((1,) * steps.ndim, bound, np.int32) for bound in (low, max(high, 1))]
        return Levels(bounds[0], bounds[1], binary)

    def to_codes(self, steps: Array) -> Array:
        """Steps as codes of the type they are stored in."""
        codes = steps.astype(np.int32)
        if self.zero_point is not None:
            codes = codes + self.spread(self.zero_point.values.astype(np.int32))
        stored: Array = codes.astype(self.codes.dtype)
        return stored


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of integers, with the bias that depends on its scale.

    Attributes:
        place: where the integers stand in the original model.
        integers: the weight.
        levels: the integers it may be.
        bias: of int32, added to products of this weight alone; or None.
    """

    place: str
    integers: Integers
    levels: Levels
    bias: Integers | None

    kind: ClassVar[str] = "integers"
    refresh_steps: ClassVar[int] = 0
    density: ClassVar[float] = 1.0

    @property
    def where(self) -> str:
        """See `Constraint`."""
        return self.place

    @property
    def covers(self) -> frozenset[str]:
        """See `Constraint`."""
        parts = [self.integers, *([self.bias] if self.bias else [])]
        held = [constant for part in parts for constant in (part.codes, part.scale)]
        return frozenset(str(constant.name) for constant in held)

    @property
    def replaces(self) -> tuple[str, ...]:
        """See `Constraint`."""
        bias = (self.bias.output,) if self.bias else ()
        return (self.integers.output, *bias)

    @property
    def decays(self) -> frozenset[str]:
        """See `Constraint`."""
        return frozenset(("value",))

    def trainable(self) -> dict[str, Array]:
        """See `Constraint`."""
        found: dict[str, Array] = {"value": self.integers.floats}
        if self.integers.learned:
            found["scale"] = self.integers.scale.values.astype(np.float32)
        if self.bias is not None:
            found["bias"] = self.bias.floats
        return found

    def buffers(self) -> dict[str, Array]:
        """See `Constraint`."""
        if self.integers.learned:
            return {}
        return {"scale": self.integers.scale.values.astype(np.float32)}

    def emit_value(self, emit: Emitter, tensors: Tensors) -> dict[str, Variable]:
        """See `Constraint`."""
        part = self.integers
        scale = self._emit_spread(emit, tensors["scale"])
        count = part.codes.size // max(1, part.scale.size)
        value = emit_fake_quantize(emit, tensors["value"], scale, self.levels, count=count)
        found = {part.output: self._typed(emit, value, part)}
        if self.bias is not None:
            bias = self._emit_bias(emit, tensors)
            found[self.bias.output] = self._typed(emit, bias, self.bias)
        return found

    def emit_projection(self, emit: Emitter, tensors: Tensors) -> dict[str, Variable]:
        """Step sizes stay positive."""
        if not self.integers.learned:
            return {}
        least = emit.scalar(float(rounded_scale(np.zeros(1), _ALL_BITS)[0]), tensors["scale"])
        return {"scale": emit.op("Max", emit.op("Abs", tensors["scale"]), least)}

    def refreshed(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        return {}

    def written(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        part = self.integers
        scale = rounded_scale(arrays["scale"], _ALL_BITS).reshape(part.scale.shape)
        steps = round_to_levels(arrays["value"], part.spread(scale), self.levels)
        found = {str(part.codes.name): part.to_codes(steps)}
        if part.learned:
            found[str(part.scale.name)] = scale.astype(part.scale.dtype)
        if self.bias is not None:
            found |= self._written_bias(arrays["bias"], scale)
        return found

    def table(self) -> dict[str, Any]:
        """See `Constraint`."""
        return {
            "type": self.integers.codes.dtype.name,
            "low": int(self.levels.low.min()),
            "high": int(self.levels.high.max()),
            "axis": self.integers.axis,
            "block": self.integers.block,
            "learned_scale": self.integers.learned,
            "bias": self.bias is not None,
        }

    def _written_bias(self, latent: Array, scale: Array) -> dict[str, Array]:
        assert self.bias is not None  # asked for by `written`
        part = self.bias
        step = part.scale.values.astype(np.float32) * self._growth(scale)
        codes = np.rint(latent.astype(np.float64) / step.astype(np.float64))
        clipped = np.clip(codes, _INT32.min, _INT32.max).astype(np.int32)
        return {
            str(part.codes.name): clipped,
            str(part.scale.name): step.reshape(part.scale.shape).astype(part.scale.dtype),
        }

    def _growth(self, scale: Array) -> npt.NDArray[np.float32]:
        """By how much the step sizes of the bias grow."""
        before = self.integers.scale.values.astype(np.float32)
        growth: npt.NDArray[np.float32] = (scale.reshape(before.shape) / before).astype(np.float32)
        return growth

    def _emit_spread(self, emit: Emitter, scale: Variable) -> Variable:
        """Step sizes, of a shape that broadcasts with the codes; as `Integers.spread`."""
        part, rank = self.integers, len(self.integers.codes.shape)
        if part.axis is None:
            shaped = emit.reshape(scale, (1,) * rank)
        elif part.block:
            places = np.arange(part.codes.shape[part.axis]) // part.block
            shaped = emit.op("Gather", scale, emit.constant(places), axis=part.axis)
        else:
            shaped = emit.reshape(
                scale, tuple(-1 if axis == part.axis else 1 for axis in range(rank))
            )
        assert isinstance(shaped, Variable)  # made of one
        return shaped

    def _emit_bias(self, emit: Emitter, tensors: Tensors) -> Variable:
        """The bias on its grid, whose step sizes follow those of the weight."""
        assert self.bias is not None  # asked for by `emit_value`
        part = self.bias
        step = emit.constant(part.scale.values.astype(np.float32))
        before = emit.constant(self.integers.scale.values.astype(np.float32))
        step = emit.mul(step, emit.stop(emit.div(tensors["scale"], before)))
        ratio = emit.div(tensors["bias"], step)
        return emit.mul(straight_through(emit, emit.op("Round", ratio), ratio), step)

    def _typed(self, emit: Emitter, value: Variable, part: Integers) -> Variable:
        typed = emit.cast(value, part.scale.dtype)
        assert isinstance(typed, Variable)  # a cast of one
        return typed

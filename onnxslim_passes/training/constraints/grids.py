"""Weights on grids: fake quantization with a straight-through estimator and learned step sizes.

Esser et al.: "Learned Step Size Quantization", ICLR 2020 (LSQ). Behind each weight stands a latent
one, v, and each block has a step size s; the forward graph reads

    w = s clip(round(v / s), low, high)

The gradient passes round as if it were not there, and clip where v / s lies inside, so that

    dw/dv = 1 inside, else 0        dw/ds = round(v / s) - v / s inside, else low or high

The gradient of s is scaled by ``1 / sqrt(elements of the block * high)`` (section 2.2). Binary
weights, which have no zero, are ``s sign(v)`` with the gradient of ``s clip(v / s, -1, 1)``
(Rastegari et al., XNOR-Net, ECCV 2016). `fake_quantize` is shared with weights that are stored as
integers.

A weight of floats is recognised as quantized by its values alone (`numerics.weight_formats`), which
needs exact products: step sizes keep few significant bits. The forward graph rounds them as
written, by Veltkamp's splitting (Dekker 1971): with c = 2^(24 - b) + 1, ``cs - (cs - s)`` is s
rounded to b bits.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Variable
from onnxslim_passes.numerics.sparsity import Mask
from onnxslim_passes.numerics.weight_formats import BlockLayout
from onnxslim_passes.training.constraints.base import Held, straight_through
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.parameters import Array, Arrays, Tensors

__all__ = ["Levels", "OnGrid", "emit_fake_quantize", "round_to_levels", "rounded_scale"]

_SINGLE_BITS = 24  # of the significand of float32
_SMALLEST_SCALE = np.float32(2.0**-100)


@dataclass(frozen=True, eq=False)
class Levels:
    """The integers that a weight may be.

    Attributes:
        low: int32, broadcastable with blocks as rows, shape (1, 1) or (blocks, 1).
        high: likewise.
        binary: -1 and 1 only.
    """

    low: npt.NDArray[np.int32]
    high: npt.NDArray[np.int32]
    binary: bool = False

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return int(max(np.abs(self.low).max(), np.abs(self.high).max()))


def emit_fake_quantize(
    emit: Emitter, rows: Variable, scale: Variable, levels: Levels, *, count: int
) -> Variable:
    """The quantized rows, differentiable in the latent rows and the scale.

    Args:
        emit: the graph.
        rows: latent weights, shape (blocks, block).
        scale: step sizes, shape (blocks, 1).
        levels: the integers.
        count: elements that share a step size.
    """
    strength = 1 / math.sqrt(max(1, count) * levels.largest)
    step = straight_through(emit, scale, emit.scale(scale, strength))
    ratio = emit.div(rows, step)
    low, high = (emit.constant(bound.astype(np.float32)) for bound in (levels.low, levels.high))
    inside = emit.op("Min", emit.op("Max", ratio, low), high)
    if levels.binary:
        one = emit.scalar(1, inside)
        positive = emit.op("GreaterOrEqual", inside, emit.scalar(0, inside))
        code = emit.where(positive, one, emit.neg(one))
    else:
        code = emit.op("Round", inside)
    return emit.mul(straight_through(emit, code, inside), step)


def round_to_levels(rows: Array, scale: Array, levels: Levels) -> npt.NDArray[np.float32]:
    """The integers, as float32, that the emitted graph multiplies by the scale."""
    ratio = rows.astype(np.float32) / scale.astype(np.float32)
    inside = np.minimum(np.maximum(ratio, levels.low), levels.high).astype(np.float32)
    codes = np.where(inside >= 0, 1, -1) if levels.binary else np.rint(inside)
    return codes.astype(np.float32)


def rounded_scale(scale: Array, bits: int) -> npt.NDArray[np.float32]:
    """Step sizes with `bits` significant bits, positive."""
    single = np.maximum(np.abs(scale.astype(np.float32)), _SMALLEST_SCALE)
    if bits >= _SINGLE_BITS:
        return single
    far = single * np.float32(2 ** (_SINGLE_BITS - bits) + 1)
    return far - (far - single)


@dataclass(frozen=True, eq=False)
class OnGrid(Held):
    """A weight of floats that are small integers times a scale for each block.

    Attributes:
        layout: how the weight is cut into blocks.
        levels: the integers.
        scale: float32, shape (blocks, 1).
        significant_bits: of the scales.
        mask: where the weight was pruned before it was quantized; None if it was not.
    """

    layout: BlockLayout
    levels: Levels
    scale: npt.NDArray[np.float32]
    significant_bits: int
    mask: Mask | None = None

    kind: ClassVar[str] = "grid"

    @property
    def density(self) -> float:
        """See `Constraint`."""
        return 1.0 if self.mask is None else float(self.mask.mean())

    def trainable(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {"value": self.initial.astype(np.float32), "scale": self.scale}

    def buffers(self) -> dict[str, Array]:
        """See `Constraint`."""
        return {} if self.mask is None else {"mask": self.mask}

    def emit_value(self, emit: Emitter, tensors: Tensors) -> Variable:
        """See `Constraint`."""
        rows = self._cut(emit, tensors["value"])
        scale = self._emit_scale(emit, tensors["scale"])
        count = self.layout.block
        quantized = emit_fake_quantize(emit, rows, scale, self.levels, count=count)
        value = self._join(emit, quantized)
        if self.mask is not None:
            value = emit.where(tensors["mask"], value, emit.scalar(0, value))
        return self.in_model_type(emit, value)

    def emit_projection(self, emit: Emitter, tensors: Tensors) -> dict[str, Variable]:
        """Step sizes stay positive; what was pruned stays zero."""
        least = emit.scalar(float(_SMALLEST_SCALE), tensors["scale"])
        found = {"scale": emit.op("Max", emit.op("Abs", tensors["scale"]), least)}
        if self.mask is not None:
            value = tensors["value"]
            found["value"] = emit.where(tensors["mask"], value, emit.scalar(0, value))
        return found

    def written(self, arrays: Arrays) -> dict[str, Array]:
        """See `Constraint`."""
        scale = rounded_scale(arrays["scale"], self.significant_bits)
        codes = round_to_levels(self.layout.cut(arrays["value"]), scale, self.levels)
        values = self.layout.join(codes * scale)
        if self.mask is not None:
            values = np.where(self.mask, values, np.float32(0))
        return self.write(values)

    def table(self) -> dict[str, Any]:
        """See `Constraint`."""
        return {
            **super().table(),
            "low": int(self.levels.low.min()),
            "high": int(self.levels.high.max()),
            "axis": self.layout.axis,
            "block": self.layout.block,
            "density": round(self.density, 6),
        }

    def _emit_scale(self, emit: Emitter, scale: Variable) -> Variable:
        """The step sizes as they will be written."""
        if self.significant_bits >= _SINGLE_BITS:
            return scale
        far = emit.mul(scale, emit.scalar(2 ** (_SINGLE_BITS - self.significant_bits) + 1, scale))
        return straight_through(emit, emit.sub(far, emit.sub(far, scale)), scale)

    def _cut(self, emit: Emitter, value: Variable) -> Variable:
        """The blocks as rows, as `BlockLayout.cut` gives them."""
        axis = self.layout.axis
        moved = emit.transpose(value, _moved(len(self.layout.shape), axis)) if axis else value
        rows = emit.reshape(moved, (-1, self.layout.block))
        assert isinstance(rows, Variable)  # a reshaped variable
        return rows

    def _join(self, emit: Emitter, rows: Variable) -> Variable:
        """The weight from its rows."""
        axis = self.layout.axis
        moved = emit.reshape(rows, self.layout.moved_shape if axis else self.layout.shape)
        order = _moved(len(self.layout.shape), axis)
        back = emit.transpose(moved, np.argsort(order).tolist()) if axis else moved
        assert isinstance(back, Variable)  # a reshaped variable
        return back


def _moved(rank: int, axis: int | None) -> list[int]:
    """The permutation that puts an axis in front."""
    first = axis or 0
    return [first, *(other for other in range(rank) if other != first)]

"""Shorter floats: float16, bfloat16 or 8-bit floats for weights, float16 for a graph.

By default only the weights are rounded, and computing stays in float32: `store-weights` sees that
every value exists in the shorter type and stores it so, with a Cast that ONNX Runtime folds at
load. With ``weights_only=false`` nodes compute in the shorter type, too (`passes.float_graph`).
"""

from typing import Annotated, Any, ClassVar, Literal

import ml_dtypes
import numpy as np
from pydantic import Field, model_validator

from onnxslim_passes.model import Model, Role, Weight
from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.weight_formats import WeightFormat, block_layout, grid_block
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.float_graph import GraphConverter, check_keep
from onnxslim_passes.passes.quantized import stored_decisions
from onnxslim_passes.passes.selection import (
    Selection,
    matching_pattern,
    role_refusal,
    values_refusal,
)

__all__ = ["ConvertFloat"]

FloatName = Literal["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# Below this a weight is mostly lost, to numbers that are too small for the type.
_LEAST_DB = 3.0

_MATRICES: frozenset[Role] = frozenset({"weight", "recurrent", "embedding"})


@pass_options
class ConvertFloat(Selection, Pass):
    """Rounds float32 weights to a shorter float type, or lets the whole graph compute in it."""

    name: ClassVar[str] = "convert-float"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = "float16, bfloat16 or 8-bit floats; needs no samples"
    references: ClassVar[tuple[str, ...]] = (
        "Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740",
        "Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433",
    )

    type: Annotated[FloatName, Field(description="the shorter type")] = "float16"
    weights_only: Annotated[
        bool, Field(description="only weights are rounded; false: nodes compute in it as well")
    ] = True
    keep: Annotated[
        tuple[str, ...],
        Field(description="operators, names or patterns of nodes that stay in float32"),
    ] = ()
    keep_io: Annotated[
        bool,
        Field(description="inputs and outputs stay float32, with weights_only=false"),
    ] = True
    min_elements: Annotated[
        int, Field(ge=1, description="smaller weights are left alone, with weights_only")
    ] = 32

    @model_validator(mode="after")
    def _computes_in_type(self) -> "ConvertFloat":
        if not self.weights_only and self.type != "float16":
            raise ValueError(
                f"weights_only=false works with float16 only: ONNX Runtime's CPU provider has no "
                f"kernels for {self.type}, so no result could be verified; {self.type} weights "
                "(weights_only=true) are fine"
            )
        if not self.weights_only and (self.include or self.exclude or self.op_types):
            raise ValueError(
                "include, exclude and op_types choose weights; with weights_only=false name the "
                "nodes and operators to leave in float32 in `keep`"
            )
        return self

    def requires(self, model: Model) -> None:
        """Sees that the names in the options occur in the model."""
        self.check(model)
        check_keep(model, self.keep)

    def apply(self, model: Model, context: Context) -> PassResult:
        """A decision for every weight, or with ``weights_only=false`` for every node."""
        self.requires(model)
        if not self.weights_only:
            converter = GraphConverter(model, self._dtype, self.keep, keep_io=self.keep_io)
            return converter.run()
        weights = model.weights()
        decisions = tuple(
            self._refusal(weight) or self._round(weight)
            for weight in context.progress.track(weights, self.name, len(weights))
        )
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed, (*decisions, *stored_decisions(model, "rounding")))

    @property
    def _dtype(self) -> np.dtype[Any]:
        return _DTYPES[self.type]

    def _refusal(self, weight: Weight) -> Decision | None:
        """Why a weight is not rounded, or None."""
        early = self.verdict(weight)
        if early is None and self._dtype.itemsize == 1:
            early = role_refusal(weight, _MATRICES)
        return early or self._type_refusal(weight) or values_refusal(weight)

    def _type_refusal(self, weight: Weight) -> Decision | None:
        reason = ""
        if weight.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            reason = f"is {weight.dtype}; only float32 and float64 are rounded"
        elif matching_pattern(self.keep, weight) or weight.op_types & set(self.keep):
            reason = "is taken by a node in `keep`"
        elif _is_quantized(weight):
            reason = "lies on a grid of 8 bits or fewer, which is smaller still"
        return Decision(where=weight.where, taken=False, reason=reason) if reason else None

    def _round(self, weight: Weight) -> Decision:
        before, dtype = weight.values, self._dtype
        largest = float(ml_dtypes.finfo(dtype).max)
        peak = float(np.abs(before).max(initial=0))
        reason = ""
        if peak > largest:
            reason = f"holds {peak:.6g}, more than the largest {dtype}, {largest:.6g}"
        after = np.clip(before, -largest, largest).astype(dtype).astype(before.dtype)
        if not reason and np.array_equal(after, before):
            reason = f"every value is a {dtype} already"
        elif not reason and sqnr_db(before, after) < _LEAST_DB:
            reason = f"its values are too small for {dtype}"
        if reason:
            return Decision(where=weight.where, taken=False, reason=reason)
        weight.values = after
        figures: dict[str, int | float | str] = {
            "bits": 8 * dtype.itemsize,
            "sqnr_db": round(sqnr_db(before, after), 2),
            "before_bytes": before.nbytes,
            "after_bytes": before.size * dtype.itemsize,
        }
        reason = f"rounded to {dtype}; computed in {before.dtype}"
        return Decision(where=weight.where, taken=True, reason=reason, figures=figures)


def _is_quantized(weight: Weight) -> bool:
    """Whether a pass put it on a grid, from which rounding would move its smallest numbers."""
    if not weight.size or len(weight.shape) < 2:
        return False
    layout = block_layout(weight.shape, weight.channel_axis or 0)
    return grid_block(weight.values, layout, WeightFormat(8, "asymmetric")) is not None

"""`round-weights`: weights on the grid of a later quantization, rounded for the layer's output.

The weights stay floats. What rounds them is in `numerics.rounding`, what it needs to know of the
layers' inputs in `calibration.hessians`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator
from threadpoolctl import threadpool_limits

from onnxslim_passes.calibration.hessians import (
    Gram,
    Key,
    collect_grams,
    in_groups,
)
from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import SamplesError
from onnxslim_passes.model import Model, Weight
from onnxslim_passes.numerics.affine import minimum_pair_scale
from onnxslim_passes.numerics.common_codes import own_grid
from onnxslim_passes.numerics.rounding import (
    Levels,
    Rounded,
    block_columns,
    is_on_grid,
    round_rows,
)
from onnxslim_passes.numerics.weight_formats import block_layout
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.overrides import NodeOverride, check_overrides, given, override_names
from onnxslim_passes.passes.placement import find_target, needs_narrow_weights
from onnxslim_passes.passes.placement.pairs import adding_order, raising_scale
from onnxslim_passes.passes.rounded_layers import RoundedLayer, in_order, rounded_layer
from onnxslim_passes.passes.selection import Selection, role_refusal, values_refusal, weight_names

__all__ = ["RoundOverride", "RoundWeights"]

Array = npt.NDArray[Any]

Per = Literal["channel", "tensor", "block"]

LIMIT_BYTES = 1 << 30
"""Hessians and activations held at a time; more layers take a further run over the samples."""

_PAIR_BITS = 8
# Rounding for the layer's output moves weights by more than half a step: room for a pair to grow.
_SLACKS = (127 / 124, 127 / 120, 127 / 112)


@pass_options
class RoundOverride(NodeOverride):
    """Other options of `round-weights` for some weights."""

    bits: Annotated[int | None, Field(ge=0, le=8, description="bits; 0 leaves it")] = None
    symmetric: Annotated[bool | None, Field(description="as of the pass")] = None
    per: Annotated[Per | None, Field(description="as of the pass")] = None
    block_size: Annotated[int | None, Field(ge=2, description="as of the pass")] = None

    @field_validator("bits")
    @classmethod
    def _one_bit_is_no_grid(cls, bits: int | None) -> int | None:
        if bits == 1:
            raise ValueError("bits is 1; give 0 to leave a weight alone, or 2 to 8")
        return bits


@pass_options
class RoundWeights(Selection, Pass):
    """GPTQ and coordinate descent for the weights of MatMul, Gemm and Conv."""

    name: ClassVar[str] = "round-weights"
    # After all that changes values otherwise, before the pass that stores integers.
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = "weights rounded to a grid so that the layer's output changes least"
    references: ClassVar[tuple[str, ...]] = (
        "Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained "
        "Transformers, ICLR 2023, arXiv:2210.17323",
        "Chee et al., QuIP: 2-Bit Quantization of Large Language Models with Guarantees, "
        "NeurIPS 2023, arXiv:2307.13304",
        "Behdin et al., QuantEase: Optimization-based Quantization for Language Models, "
        "arXiv:2309.01885",
    )
    needs_samples: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=2, le=8, description="bits of the later quantization")] = 8
    symmetric: Annotated[
        bool, Field(description="as many steps on both sides of 0; else a zero point")
    ] = True
    per: Annotated[
        Per,
        Field(description="what has a grid of its own: output channel, tensor, or block of inputs"),
    ] = "channel"
    block_size: Annotated[int, Field(ge=2, description="inputs of a block, for per=block")] = 32
    search_range: Annotated[
        bool, Field(description="try narrower ranges, which clip the largest weights")
    ] = True
    damping: Annotated[
        float, Field(gt=0, le=1, description="raises the Hessian's diagonal, by a part of its mean")
    ] = 0.01
    act_order: Annotated[
        bool, Field(description="round the weights of the largest inputs first")
    ] = True
    sweeps: Annotated[
        int, Field(ge=0, le=100, description="rounds of coordinate descent after the first pass")
    ] = 1
    sequential: Annotated[
        bool,
        Field(
            description="inputs of a layer as the layers before leave them once rounded; a run "
            "over the samples for each layer"
        ),
    ] = False
    max_inputs: Annotated[
        int, Field(ge=1, description="layers with more inputs an output are left alone")
    ] = 4096

    reduce_range: Annotated[
        bool | None,
        Field(
            description="8-bit grids on which no two products saturate 16 bits, as quantize-static "
            "will want them; none: what the target wants, on cpu if the runtime here saturates"
        ),
    ] = None
    overrides: Annotated[
        tuple[RoundOverride, ...],
        Field(description="other options for some weights or nodes; 0 bits leave them"),
    ] = ()

    def preview(self, model: Model) -> tuple[Decision, ...]:
        """The candidates; their inputs decide on them."""
        return tuple(
            found
            if isinstance(found, Decision)
            else Decision(where=found.weight.where, taken=True, reason="a candidate")
            for found in self._survey(model)
        )

    def apply(self, model: Model, context: Context) -> PassResult:
        """Writes rounded values; a decision for every weight of the model, in its order."""
        self.check(model)
        check_overrides(self.overrides, model)
        if self.reduce_range is None:
            wanted = needs_narrow_weights(find_target(context.target))
            return replace(self, reduce_range=wanted).apply(model, context)
        if context.samples is None:
            raise SamplesError(
                "round-weights needs calibration samples to know the inputs of layers; give "
                "--calibration DATA. Rounding to nearest, which needs none, is what quantization "
                "does by itself."
            )
        found = list(self._survey(model))
        layers = in_order(model, [each for each in found if isinstance(each, RoundedLayer)])
        decided: dict[str, Decision] = {}
        # Rounding one group must not show in the inputs of the next, unless it was asked for.
        source = model if self.sequential else model.copy()
        # One thread: the last digits of a sum, and with them some roundings, depend on how many.
        with threadpool_limits(limits=1):
            for group in self._groups(model, layers, context.samples):
                grams = collect_grams(
                    source,
                    [key for layer in group for key in layer.keys],
                    context.samples,
                    progress=context.progress,
                )
                for layer in context.progress.track(group, self.name, len(group)):
                    decided[layer.weight.where] = self._for(layer.weight)._round(layer, grams)
        decisions = tuple(
            each if isinstance(each, Decision) else decided[each.weight.where] for each in found
        )
        return PassResult(any(decision.taken for decision in decisions), decisions)

    # ---- which layers

    def _survey(self, model: Model) -> Iterator[RoundedLayer | Decision]:
        """A layer or a refusal for each weight."""
        for weight in model.weights():
            refusal = role_refusal(weight, {"weight"}) or self.verdict(weight)
            if refusal is None and self._given(weight, "bits") == 0:
                reason = "bits=0 in `overrides` leaves it"
                refusal = Decision(where=weight.where, taken=False, reason=reason)
            refusal = refusal or values_refusal(weight)
            if refusal is not None:
                yield refusal
                continue
            layer = rounded_layer(model, weight)
            if isinstance(layer, RoundedLayer):
                yield self._for(weight)._own_refusal(layer) or layer
            else:
                yield Decision(where=weight.where, taken=False, reason=layer)

    def _given(self, weight: Weight, key: str) -> Any:
        return given(self.overrides, weight_names(weight), key)

    def _for(self, weight: Weight) -> "RoundWeights":
        """The same with what overrides say of a weight."""
        changes = {key: self._given(weight, key) for key in override_names(RoundOverride)}
        changes = {key: value for key, value in changes.items() if value is not None}
        return replace(self, **changes) if changes else self

    def _own_refusal(self, layer: RoundedLayer) -> Decision | None:
        inputs = layer.shape[1]
        if inputs > self.max_inputs:
            reason = f"{inputs} inputs make too large a Hessian; max_inputs is {self.max_inputs}"
        elif is_on_grid(layer.rows(), self._levels(layer)) or self._is_kept(layer):
            reason = f"its values lie on a grid of {self.bits} bits already"
        else:
            return None
        return Decision(where=layer.weight.where, taken=False, reason=reason)

    def _groups(
        self, model: Model, layers: list[RoundedLayer], samples: Samples
    ) -> Iterable[list[RoundedLayer]]:
        """Layers whose inputs are collected in one run."""
        if not layers:
            return []
        if not self.sequential:
            items = dict(enumerate(layer.keys for layer in layers))
            groups = in_groups(model, items, samples, LIMIT_BYTES)
            return [[layers[index] for index in group] for group in groups]
        together: list[list[RoundedLayer]] = []
        for layer in layers:
            # Layers of one input, such as query, key and value, do not depend on each other.
            if together and _tensors(together[-1][0]) == _tensors(layer):
                together[-1].append(layer)
            else:
                together.append([layer])
        return together

    # ---- rounding

    def _levels(self, layer: RoundedLayer) -> Levels:
        columns, block = layer.shape[1], None
        if self.per == "block":
            block = block_layout((1, columns), 0, self.block_size).block
        return Levels(
            bits=self.bits,
            symmetric=self.symmetric,
            block_of=block_columns(columns, block),
            tied=self.per == "tensor",
            short_scales=self.per == "block",
        )

    def _round(self, layer: RoundedLayer, grams: Mapping[Key, Gram]) -> Decision:
        """Rounds one weight."""
        where = layer.weight.where
        positions = sum(grams[key].positions for key in layer.keys)
        # An input that two nodes multiply with the weight counts twice: so do its errors.
        hessian = sum((grams[key].matrix for key in layer.keys[1:]), grams[layer.keys[0]].matrix)
        if not np.isfinite(hessian).all():
            reason = "its input holds NaN or infinity on the samples"
            return Decision(where=where, taken=False, reason=reason)
        if not positions:
            return Decision(where=where, taken=False, reason="its input was empty on all samples")
        rounded, fits = self._rounded(layer, hessian)
        values = layer.from_rows(rounded.values)
        if not np.isfinite(values).all():
            reason = f"its largest weights would exceed {layer.weight.dtype.name} on the grid"
            return Decision(where=where, taken=False, reason=reason)
        layer.weight.values = values
        reason = self._what_was_done(seen=bool(hessian.any()))
        if not fits:
            reason += "; some pairs saturate 16 bits on it, so that quantize-static widens it again"
        figures = self._figures(rounded, positions)
        return Decision(where=where, taken=True, reason=reason, figures=figures)

    def _rounded(self, layer: RoundedLayer, hessian: Array) -> tuple[Rounded, bool]:
        """Rounded rows, and whether no pair of their codes saturates, if that matters."""
        levels = self._levels(layer)
        for slack in _SLACKS if self._adds_pairs(layer) else ():
            levels = replace(levels, least=slack * _least_scales(layer))
            rounded = self._solved(layer, hessian, levels)
            if _pairs_fit(layer, layer.from_rows(rounded.values)):
                return rounded, True
        return self._solved(layer, hessian, levels), not self._adds_pairs(layer)

    def _solved(self, layer: RoundedLayer, hessian: Array, levels: Levels) -> Rounded:
        return round_rows(
            layer.rows(),
            hessian,
            levels,
            search_range=self.search_range,
            damping=self.damping,
            act_order=self.act_order,
            sweeps=self.sweeps,
        )

    def _adds_pairs(self, layer: RoundedLayer) -> bool:
        """Whether the codes will be int8 ones whose products are added in 16 bits."""
        plain = self.bits == _PAIR_BITS and self.symmetric and self.per != "block"
        fits = layer.weight.dtype == np.dtype(np.float32) and len(layer.weight.uses) == 1
        return bool(self.reduce_range) and plain and fits

    def _is_kept(self, layer: RoundedLayer) -> bool:
        """Whether a weight is on a grid already on which no pair of its codes saturates."""
        values = layer.weight.values
        return self._adds_pairs(layer) and _has_grid(layer, values) and _pairs_fit(layer, values)

    def _what_was_done(self, *, seen: bool) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        unit = f"block of {self.block_size}" if self.per == "block" else self.per
        grid = f"a {kind} grid of {self.bits} bits per {unit}"
        if not seen:
            return f"rounded to nearest on {grid}: its inputs were 0 on all samples"
        return f"rounded to {grid} for the least error of the output"

    def _figures(self, rounded: Rounded, positions: int) -> dict[str, int | float]:
        energy = float(rounded.energy.sum())
        return {
            "bits": self.bits,
            "sqnr_db": _decibels(energy, float(rounded.error.sum())),
            "nearest_sqnr_db": _decibels(energy, float(rounded.nearest_error.sum())),
            "positions": positions,
        }


def _decibels(energy: float, error: float) -> float:
    """Of a layer's output; infinite where there is no error."""
    if error <= 0:
        return math.inf
    return round(10 * (math.log10(energy) - math.log10(error)), 2) if energy > 0 else -math.inf


def _tensors(layer: RoundedLayer) -> set[str]:
    return {name for name, _ in layer.keys}


# ---------------- pairs of products


def _least_scales(layer: RoundedLayer) -> Array:
    """Scales, shape (G, N), at which no pair of the weights as they are saturates."""
    (use,) = layer.weight.uses
    scales = minimum_pair_scale(adding_order(use.node, layer.weight.values))
    # A depthwise convolution has no pairs; its weights are one row for each element there.
    rows = layer.rows().shape[:2]
    return scales.reshape(rows) if scales.size == rows[0] * rows[1] else np.zeros(rows)


def _has_grid(layer: RoundedLayer, values: Array) -> bool:
    return own_grid(values, layer.weight.uses[0].channel_axis) is not None


def _pairs_fit(layer: RoundedLayer, values: Array) -> bool:
    """Whether quantize-static will keep the grid that weights are on."""
    (use,) = layer.weight.uses
    grid = own_grid(values, use.channel_axis)
    return grid is None or not raising_scale(use.node, values, use.channel_axis, grid).any()

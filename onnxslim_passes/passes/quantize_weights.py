"""Puts weights on grids of 1 to 8 bits: small integers times a scale for each block.

Only weights are quantized; the arithmetic stays in float. This pass changes values only, in the
weights' own type; `store-weights` then finds the grid in the values and stores packed codes and
scales, which ONNX Runtime turns back into the dense weight when it loads the file.
"""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxslim_passes.model import Model, Role, Weight
from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.histograms import distinct_values
from onnxslim_passes.numerics.weight_formats import (
    BLOCK_SCALE_BITS,
    BlockLayout,
    ScaleSearch,
    Scheme,
    WeightFormat,
    block_layout,
    find_grid,
    grid_block,
    quantize_weight,
)
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.overrides import (
    NodeOverride,
    check_overrides,
    given,
    override_names,
)
from onnxslim_passes.passes.quantized import stored_decisions
from onnxslim_passes.passes.selection import (
    Selection,
    role_refusal,
    values_refusal,
    weight_names,
)

__all__ = ["QuantizeWeights", "WeightOverride"]

Per = Literal["tensor", "channel", "block"]

_ROLES: frozenset[Role] = frozenset({"weight", "recurrent", "embedding"})
# About what the nodes and tensor headers of a stored grid take in the file.
_DECODER_BYTES = 256
# Significant bits of the scales of channels, which are few.
_CHANNEL_SCALE_BITS = 11


@pass_options
class WeightOverride(NodeOverride):
    """Other options of `quantize-weights` for some weights."""

    bits: Annotated[int | None, Field(ge=0, le=8, description="bits of a code; 0 leaves it")] = None
    scheme: Annotated[Scheme | None, Field(description="as of the pass")] = None
    per: Annotated[Per | None, Field(description="as of the pass")] = None
    block_size: Annotated[int | None, Field(ge=8, le=1024, description="as of the pass")] = None
    scales: Annotated[ScaleSearch | None, Field(description="as of the pass")] = None


@pass_options
class QuantizeWeights(Selection, Pass):
    """Weight-only quantization of products, convolutions, recurrent layers and embeddings."""

    name: ClassVar[str] = "quantize-weights"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = "weights of 1 to 8 bits, float arithmetic; needs no samples"
    references: ClassVar[tuple[str, ...]] = (
        "Rastegari et al. 2016, XNOR-Net: ImageNet Classification Using Binary Convolutional "
        "Neural Networks, arXiv:1603.05279 (1 bit)",
        "Li et al. 2016, Ternary Weight Networks, arXiv:1605.04711 (2 bits, symmetric)",
        "Rouhani et al. 2023, Microscaling Data Formats for Deep Learning, arXiv:2310.10537 "
        "(short scales of short blocks)",
    )

    bits: Annotated[int, Field(ge=1, le=8, description="bits of a code")] = 8
    embedding_bits: Annotated[
        int | None,
        Field(ge=1, le=8, description="bits of embedding tables, if they are to differ"),
    ] = None
    scheme: Annotated[
        Scheme,
        Field(
            description="symmetric: as many codes below 0 as above (2 bits: -1, 0, 1; 1 bit: -1, "
            "1); asymmetric: each block has a zero point"
        ),
    ] = "symmetric"
    per: Annotated[
        Per,
        Field(description="what has a scale of its own: the tensor, a channel, or a block of it"),
    ] = "channel"
    block_size: Annotated[
        int, Field(ge=8, le=1024, description="elements of a block, with per=block")
    ] = 32
    scales: Annotated[
        ScaleSearch, Field(description="max: nothing is clipped; mse: least squared error")
    ] = "mse"
    overrides: Annotated[
        tuple[WeightOverride, ...],
        Field(description="other options for some weights or nodes; 0 bits leave them"),
    ] = ()
    min_elements: Annotated[int, Field(ge=1, description="smaller weights are left alone")] = 512

    def requires(self, model: Model) -> None:
        """Sees that the names in the options occur in the model."""
        self.check(model)
        check_overrides(self.overrides, model)

    def preview(self, model: Model) -> tuple[Decision, ...]:
        """The candidates, without the work on them."""
        return tuple(
            self._refusal(weight) or Decision(where=weight.where, taken=True, reason="a candidate")
            for weight in model.weights()
        )

    def apply(self, model: Model, context: Context) -> PassResult:
        """Writes values on grids; a decision for every weight of the model, in its order."""
        self.requires(model)
        weights = model.weights()
        decisions = tuple(
            self._refusal(weight) or self._for(weight)._quantize(weight)
            for weight in context.progress.track(weights, self.name, len(weights))
        )
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed, (*decisions, *stored_decisions(model, "quantizing")))

    def _given(self, weight: Weight) -> dict[str, Any]:
        """What `overrides` and `embedding_bits` say of one weight."""
        names = weight_names(weight)
        said = {key: given(self.overrides, names, key) for key in override_names(WeightOverride)}
        if said["bits"] is None and weight.role == "embedding":
            said["bits"] = self.embedding_bits
        return {key: value for key, value in said.items() if value is not None}

    def _for(self, weight: Weight) -> "QuantizeWeights":
        """The same for one weight, which `overrides` do not leave alone."""
        return replace(self, overrides=(), embedding_bits=None, **self._given(weight))

    def _refusal(self, weight: Weight) -> Decision | None:
        """Why a weight is not quantized, or None."""
        early = role_refusal(weight, _ROLES) or self.verdict(weight)
        if early is not None:
            return early
        if self._given(weight).get("bits") == 0:
            return Decision(where=weight.where, taken=False, reason="left alone by overrides")
        return self._for(weight)._size_refusal(weight) or values_refusal(weight)

    def _layout(self, weight: Weight) -> BlockLayout:
        axis = None if self.per == "tensor" else weight.channel_axis
        if self.per == "block" and axis is None:
            axis = 0
        block = self.block_size if self.per == "block" else None
        if not weight.shape:
            axis = None
        return block_layout(weight.shape, axis, block)

    def _format(self) -> WeightFormat:
        short = self.per == "block"
        significant = BLOCK_SCALE_BITS if short else _CHANNEL_SCALE_BITS
        return WeightFormat(self.bits, self.scheme, significant)

    def _size_refusal(self, weight: Weight) -> Decision | None:
        reason = ""
        if not weight.size:
            reason = "has no elements"
        elif self._stored_bytes(weight) >= weight.size * weight.dtype.itemsize:
            blocks = self._layout(weight).blocks
            reason = f"{self.bits}-bit codes and {blocks} scales take no less than it does"
        return Decision(where=weight.where, taken=False, reason=reason) if reason else None

    def _stored_bytes(self, weight: Weight) -> int:
        """About what codes, zero points and scales will take."""
        bits, blocks = self.bits, self._layout(weight).blocks
        side = 8 if self.per == "block" else 16
        if self.scheme == "asymmetric" and bits > 1:
            side += bits
        return (weight.size * bits + blocks * side + 7) // 8 + _DECODER_BYTES

    def _quantize(self, weight: Weight) -> Decision:
        """Quantizes one weight, unless it is on such a grid already."""
        before, layout, kind = weight.values, self._layout(weight), self._format()
        figures: dict[str, int | float | str] = {"bits": kind.bits, "block": layout.block}
        reason, block = "", grid_block(before, layout, kind)
        if block is not None:
            reason = f"is on a grid of {kind.bits} bits already"
            if block != layout.block:
                reason += f", in blocks of {block}"
        elif distinct_values(before, 1 << kind.bits) is not None:
            reason = f"has no more than {1 << kind.bits} distinct values already"
        if reason:
            return Decision(where=weight.where, taken=False, reason=reason, figures=figures)
        after = quantize_weight(before, layout, kind, search=self.scales)
        weight.values = after
        found = find_grid(after, layout)
        figures |= {
            "scales": 0 if found is None else int(np.unique(found.scale).size),
            "sqnr_db": round(sqnr_db(before, after), 2),
            "before_bytes": weight.size * weight.dtype.itemsize,
            "after_bytes": self._stored_bytes(weight),
        }
        reason = self._what_was_done(layout, kind)
        return Decision(where=weight.where, taken=True, reason=reason, figures=figures)

    def _what_was_done(self, layout: BlockLayout, kind: WeightFormat) -> str:
        done = f"{kind.bits}-bit codes, {kind.scheme}, "
        if layout.axis is None:
            done += "one scale"
            if self.per != "tensor":
                done += "; its uses agree on no channel axis"
            return done
        row = block_layout(layout.shape, layout.axis).block
        if layout.block == row:
            done += f"a scale for each channel along axis {layout.axis}"
            if self.per == "block" and row > self.block_size:
                done += f", as blocks of {self.block_size} or half, a quarter... do not divide them"
            return done
        done += f"a scale for {layout.block} elements along channels of axis {layout.axis}"
        if layout.block != self.block_size:
            done += f", as {self.block_size} do not divide the {row} of a channel"
        return done

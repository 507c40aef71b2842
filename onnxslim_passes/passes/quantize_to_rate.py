"""Puts weights on uniform grids, so fine that the file takes a wanted number of bits a weight.

No weight is clipped, and a grid has as many integers as it needs; `store-weights` codes them near
their entropy (`numerics.rates` says why that is better than integers of so many bits). With
samples, each tensor is rounded at the same rate first, alone, and what that does to the outputs is
measured; then the bits go where they lower the error of the outputs most. Weights whose inputs are
seen are rounded with feedback of their errors (`numerics.error_feedback`), others to nearest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from threadpoolctl import threadpool_limits

from onnxslim_passes.calibration.hessians import Gram, Key, collect_grams, in_groups
from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.model import Model, Role, Weight
from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.error_feedback import Wide
from onnxslim_passes.numerics.histograms import distinct_values
from onnxslim_passes.numerics.rates import HIGHEST_RATE, MOST_DISTINCT, equal_slope_rates
from onnxslim_passes.passes.base import (
    Context,
    Decision,
    Pass,
    PassResult,
    Progress,
    Stage,
    pass_options,
)
from onnxslim_passes.passes.overrides import NodeOverride, check_overrides, given
from onnxslim_passes.passes.quantized import stored_decisions
from onnxslim_passes.passes.rate_rounding import Rounded, layer_hessian, round_to_rate
from onnxslim_passes.passes.rounded_layers import RoundedLayer, rounded_layer
from onnxslim_passes.passes.selection import Selection, role_refusal, values_refusal, weight_names
from onnxslim_passes.passes.sensitivity import decibels
from onnxslim_passes.passes.weight_effects import WeightEffects, is_measurable, weight_effects
from onnxslim_passes.runtime import Feed, open_session

__all__ = ["QuantizeToRate", "RateOverride"]

_ROLES: frozenset[Role] = frozenset({"weight", "recurrent", "embedding"})
_DTYPES = frozenset((np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)))
_HESSIANS_BYTES = 1 << 30
# Feeds that effects are measured on, and how many there must be to leave them out of Hessians:
# errors look smaller than they are on what rounding was fitted to.
_MEASURED_FEEDS = 8
_ENOUGH_FEEDS = 2 * _MEASURED_FEEDS
_LOWEST_RATE = 1.0


@pass_options
class RateOverride(NodeOverride):
    """Another rate for some weights."""

    rate: Annotated[
        float | None,
        Field(ge=0, le=HIGHEST_RATE, description="bits a weight of each; 0 leaves it"),
    ] = None


@dataclass
class _Candidate:
    """A weight to be rounded.

    Attributes:
        weight: the weight.
        layer: how it is multiplied; None where errors cannot be fed back.
        why_nearest: the reason for that.
        rate: bits a weight.
        fixed: whether an override says so.
        error: of the outputs with this weight alone rounded at the common rate; None: not measured.
    """

    weight: Weight
    layer: RoundedLayer | None
    why_nearest: str
    rate: float
    fixed: bool
    error: float | None = None


@pass_options
class QuantizeToRate(Selection, Pass):
    """Uniform grids for entropy codes, with the bits where the outputs need them."""

    name: ClassVar[str] = "quantize-to-rate"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = "weights on uniform grids for entropy codes of so many bits a weight"
    references: ClassVar[tuple[str, ...]] = (
        "Gish and Pierce 1968, Asymptotically Efficient Quantizing, IEEE Trans. Information "
        "Theory 14(5) (uniform grids and entropy codes)",
        "Shoham and Gersho 1988, Efficient Bit Allocation for an Arbitrary Set of Quantizers, "
        "IEEE Trans. ASSP 36(9) (bits where they count)",
        "Frantar et al. 2023, GPTQ: Accurate Post-Training Quantization for Generative "
        "Pre-trained Transformers, arXiv:2210.17323 (feedback of errors)",
    )
    entropy_coded: ClassVar[bool] = True

    rate: Annotated[
        float,
        Field(
            gt=0,
            le=HIGHEST_RATE,
            description="bits of an ideal code for the integers, mean over the weights taken",
        ),
    ] = 4.5
    allocation: Annotated[
        Literal["effects", "equal"],
        Field(
            description="effects: where samples are given, more bits for weights that move the "
            "outputs more; equal: the same rate for each"
        ),
    ] = "effects"
    damping: Annotated[
        float, Field(gt=0, le=1, description="raises the Hessian's diagonal, by a part of its mean")
    ] = 0.1
    max_inputs: Annotated[
        int, Field(ge=1, description="layers with more inputs an output are rounded to nearest")
    ] = 4096
    overrides: Annotated[
        tuple[RateOverride, ...],
        Field(description="another rate for some weights or nodes; 0 leaves them"),
    ] = ()
    min_elements: Annotated[int, Field(ge=1, description="smaller weights are left alone")] = 512

    def requires(self, model: Model) -> None:
        """Sees that the names in the options occur in the model."""
        self.check(model)
        check_overrides(self.overrides, model)

    def preview(self, model: Model) -> tuple[Decision, ...]:
        """The candidates, without the work on them."""
        return tuple(
            found
            if isinstance(found, Decision)
            else Decision(where=found.weight.where, taken=True, reason="a candidate")
            for found in self._survey(model)
        )

    def apply(self, model: Model, context: Context) -> PassResult:
        """Writes values on grids; a decision for every weight of the model, in its order."""
        self.requires(model)
        found = list(self._survey(model))
        candidates = [each for each in found if isinstance(each, _Candidate)]
        # One thread: the last digits of a sum, and with them some roundings, depend on how many.
        with threadpool_limits(limits=1):
            done = self._rounded(model, candidates, context)
        decisions = [
            each if isinstance(each, Decision) else self._decide(each, done[each.weight.where])
            for each in found
        ]
        if done:
            decisions.append(self._sum(candidates, done))
        return PassResult(bool(done), (*decisions, *stored_decisions(model, "quantizing")))

    # ---- which weights

    def _survey(self, model: Model) -> Iterator[_Candidate | Decision]:
        """A candidate or a refusal for each weight."""
        for weight in model.weights():
            refusal = (
                role_refusal(weight, _ROLES)
                or self.verdict(weight)
                or self._own_refusal(weight)
                or values_refusal(weight)
            )
            yield refusal or self._candidate(model, weight)

    def _own_refusal(self, weight: Weight) -> Decision | None:
        reason = ""
        if not weight.size:
            reason = "has no elements"
        elif weight.dtype not in _DTYPES:
            reason = f"it is {weight.dtype.name}, whose own steps are too wide for a grid"
        elif self._own_rate(weight) == 0:
            reason = "left alone by overrides"
        elif distinct_values(weight.values, MOST_DISTINCT) is not None:
            reason = f"has no more than {MOST_DISTINCT} distinct values already"
        return Decision(where=weight.where, taken=False, reason=reason) if reason else None

    def _own_rate(self, weight: Weight) -> float | None:
        rate: float | None = given(self.overrides, weight_names(weight), "rate")
        return rate

    def _candidate(self, model: Model, weight: Weight) -> _Candidate:
        layer: RoundedLayer | str = f"its role is {weight.role}"
        if weight.role == "weight":
            layer = rounded_layer(model, weight)
        if isinstance(layer, RoundedLayer) and layer.shape[1] > self.max_inputs:
            layer = f"{layer.shape[1]} inputs make too large a Hessian"
        own = self._own_rate(weight)
        return _Candidate(
            weight=weight,
            layer=layer if isinstance(layer, RoundedLayer) else None,
            why_nearest="" if isinstance(layer, RoundedLayer) else layer,
            rate=self.rate if own is None else own,
            fixed=own is not None,
        )

    # ---- the work

    def _rounded(
        self, model: Model, candidates: list[_Candidate], context: Context
    ) -> dict[str, Rounded]:
        """Rounds all; where samples are given, with rates by what each does to the outputs."""
        if context.samples is None or not candidates:
            for each in candidates:
                each.layer, each.why_nearest = None, "no samples were given"
            hessians = _Hessians(model, [], None, context.progress)
            return self._solve(candidates, hessians, context.progress)
        layers = [each.layer for each in candidates if each.layer is not None]
        # Rounding one layer must not show in the inputs of another that is read later.
        source = model.copy() if layers else model
        hessians = _Hessians(source, layers, context.samples, context.progress)
        if self.allocation == "effects":
            self._allocate(model, candidates, hessians, context.progress)
        return self._solve(candidates, hessians, context.progress)

    def _allocate(
        self,
        model: Model,
        candidates: list[_Candidate],
        hessians: "_Hessians",
        progress: Progress,
    ) -> None:
        """Sets the rates of those that can be measured and have none of their own."""
        free = [c for c in candidates if not c.fixed and is_measurable(model, c.weight)]
        if len(free) < 2:
            return
        with weight_effects(model, [c.weight for c in free], hessians.measured) as effects:
            for candidate in progress.track(free, "Measuring effects", len(free)):
                candidate.error = self._effect(candidate, hessians, effects)
        if not any(candidate.error for candidate in free):
            return
        rates = equal_slope_rates(
            [c.weight.size for c in free],
            [self.rate] * len(free),
            [c.error or 0.0 for c in free],
            rate=self.rate,
            lowest=min(_LOWEST_RATE, self.rate),
        )
        for candidate, rate in zip(free, rates, strict=True):
            candidate.rate = float(rate)

    def _effect(
        self, candidate: _Candidate, hessians: "_Hessians", effects: WeightEffects
    ) -> float:
        hessian = hessians.without_measured(candidate.layer)
        tried = round_to_rate(
            candidate.weight, self.rate, candidate.layer, hessian, damping=self.damping
        )
        return effects.error(candidate.weight, tried.values)

    def _solve(
        self, candidates: list[_Candidate], hessians: "_Hessians", progress: Progress
    ) -> dict[str, Rounded]:
        done = {}
        for candidate in progress.track(candidates, self.name, len(candidates)):
            weight, hessian = candidate.weight, hessians.whole(candidate.layer)
            if candidate.layer is not None and hessian is None:
                candidate.why_nearest = "its inputs hold NaN or infinity, or none, on the samples"
            done[weight.where] = round_to_rate(
                weight, candidate.rate, candidate.layer, hessian, damping=self.damping
            )
        return done

    # ---- what is said

    def _decide(self, candidate: _Candidate, done: Rounded) -> Decision:
        """Writes the values of one weight."""
        weight = candidate.weight
        before, weight.values = weight.values, done.values
        figures: dict[str, int | float | str] = {
            "rate": round(candidate.rate, 3),
            "entropy_bits": round(done.bits, 3),
            "sqnr_db": round(sqnr_db(before, done.values), 2),
        }
        if candidate.error:
            figures["alone_db"] = round(decibels(candidate.error), 2)
        reason = f"multiples of one step, {done.bits:.2f} bits a weight; "
        if candidate.why_nearest:
            reason += f"rounded to nearest: {candidate.why_nearest}"
        elif done.fed_back:
            reason += "rounded for the least error of the layer's output"
        else:
            reason += "rounded to nearest, which is as good for the layer's output"
        return Decision(where=weight.where, taken=True, reason=reason, figures=figures)

    def _sum(self, candidates: Sequence[_Candidate], done: Mapping[str, Rounded]) -> Decision:
        count = sum(each.weight.size for each in candidates)
        bits = sum(done[each.weight.where].bits * each.weight.size for each in candidates)
        figures: dict[str, int | float | str] = {
            "entropy_bits": round(bits / count, 3),
            "weights": count,
            "coded_bytes": round(bits / 8),
        }
        reason = (
            f"{bits / count:.2f} bits a weight together, asked for {self.rate:g}; "
            "store-weights:level=smallest codes them so"
        )
        return Decision(where="all of them", taken=True, reason=reason, figures=figures)


@dataclass
class _Hessians:
    """What the layers' inputs were on the samples, in two parts: without and with those measured.

    Layers whose matrices do not fit into memory together take a further run over the samples each
    time another group of them is asked for.
    """

    model: Model
    layers: Sequence[RoundedLayer]
    samples: Samples | None
    progress: Progress
    measured: list[Feed] = field(init=False, default_factory=list)
    _others: Samples | None = field(init=False, default=None)
    _groups: list[list[int]] = field(init=False, default_factory=list)
    _held: int = field(init=False, default=-1)
    _grams: list[Mapping[Key, Gram]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.samples is None:
            return
        with open_session(self.model, optimize="none") as session:
            inputs = session.inputs
        samples = self.samples
        samples.check(inputs)
        self.measured = list(samples.feeds(inputs, most=_MEASURED_FEEDS))
        total = samples.feed_count or 0
        if total >= _ENOUGH_FEEDS:
            # Those that `feeds` leaves out with `most`.
            self._others = Samples.from_feeds(
                lambda: (
                    feed
                    for index, feed in enumerate(samples.feeds(inputs))
                    if index * _MEASURED_FEEDS % total >= _MEASURED_FEEDS
                ),
                name=samples.name,
            )
        if self.layers:
            items = {number: layer.keys for number, layer in enumerate(self.layers)}
            self._groups = in_groups(self.model, items, samples, _HESSIANS_BYTES // 2)

    def without_measured(self, layer: RoundedLayer | None) -> Wide | None:
        """H on the samples that effects are not measured on; None if it is of no use."""
        return self._hessian(layer, slice(0, 1))

    def whole(self, layer: RoundedLayer | None) -> Wide | None:
        """H on all samples; None if it is of no use."""
        return self._hessian(layer, slice(0, 2))

    def _hessian(self, layer: RoundedLayer | None, parts: slice) -> Wide | None:
        if layer is None:
            return None
        number = next(n for n, each in enumerate(self.layers) if each is layer)
        group = next(n for n, members in enumerate(self._groups) if number in members)
        if group != self._held:
            self._grams, self._held = self._collected(group), group
        hessian = layer_hessian(layer, self._grams[parts])
        return hessian if np.isfinite(hessian).all() and hessian.any() else None

    def _collected(self, group: int) -> list[Mapping[Key, Gram]]:
        keys = [key for number in self._groups[group] for key in self.layers[number].keys]
        parts: list[Any] = [self.samples]
        if self._others is not None:
            parts = [self._others, Samples.from_feeds(self.measured, trusted=True)]
        return [collect_grams(self.model, keys, part, progress=self.progress) for part in parts]

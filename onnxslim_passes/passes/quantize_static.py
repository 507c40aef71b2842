"""`quantize-static`: integer weights and activations, with ranges from calibration samples."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxslim_passes.calibration.observers import ObserverOptions
from onnxslim_passes.calibration.run import TensorRange, collect_ranges
from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import SamplesError, UnsupportedModelError
from onnxslim_passes.model import Model, Node, Variable
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.embeddings import (
    EmbeddingRewriter,
    is_embedding,
    keeps_float,
    objection,
)
from onnxslim_passes.passes.overrides import check_overrides
from onnxslim_passes.passes.placement import (
    BY_RULE,
    Inserted,
    Scheme,
    Schemes,
    Site,
    Survey,
    border_decisions,
    find_target,
    float_tensors,
    inputs_only,
    insert_pairs,
    needs_narrow_weights,
    pairs_decision,
    quantize_rest,
    rest_tensors,
    survey,
    takes_wide,
    target_decisions,
    unplaced,
    weights_only,
    without_flat_ends,
)
from onnxslim_passes.passes.quantized import integer_decisions
from onnxslim_passes.passes.selection import Selection
from onnxslim_passes.passes.spared import Spared, spared, spared_decisions, with_wide
from onnxslim_passes.passes.static_bodies import StaticBodies, parts
from onnxslim_passes.passes.static_decisions import Placement, comparison_decision, site_decision
from onnxslim_passes.passes.static_placement import StaticPlacer
from onnxslim_passes.passes.static_ranges import Calibrated, elements_of, limits_of
from onnxslim_passes.passes.static_schemes import (
    ActivationType,
    StaticOverride,
    WeightType,
    idle_overrides,
    schemes_of,
)

_PER_CHANNEL_OPSET = 13  # DequantizeLinear's `axis`
_PRODUCTS = ("Gemm", "MatMul")
_PER_TENSOR_OPSET = 10  # the first with QuantizeLinear
_WIDE_OPSET = 21  # QuantizeLinear to 16 bits


@pass_options
class QuantizeStatic(Selection, Pass):
    """Runs convolutions and matrix products, and what lies between, on 8-bit integers."""

    name: ClassVar[str] = "quantize-static"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = "8-bit weights and activations, ranges from calibration samples"
    references: ClassVar[tuple[str, ...]] = (
        "Jacob et al., Quantization and Training of Neural Networks for Efficient "
        "Integer-Arithmetic-Only Inference, CVPR 2018",
        "Nagel et al., A White Paper on Neural Network Quantization, arXiv:2106.08295",
    )
    needs_samples: ClassVar[bool] = True

    activations: Annotated[
        ActivationType | None,
        Field(
            description="type of activations; 16 bits need opset 21, and no CPU computes with "
            "them; none: what the target wants, uint8 on cpu"
        ),
    ] = None
    symmetric: Annotated[
        bool | None,
        Field(
            description="zero points of activations in the middle of the range; none: what the "
            "target wants, false on cpu"
        ),
    ] = None
    weights: Annotated[
        WeightType | None,
        Field(
            description="type of weights, symmetric; on x86 int8 is 2x as fast as uint8; none: "
            "what the target wants, int8 on cpu"
        ),
    ] = None
    per_channel: Annotated[
        bool | None,
        Field(
            description="a weight scale for each output channel, not one for the tensor; none: "
            "what the target wants, true on cpu"
        ),
    ] = None
    reduce_range: Annotated[
        bool | None,
        Field(
            description="int8 weights scaled so that no two products saturate 16 bits, for x86 "
            "CPUs without VNNI; none: what the target wants, on cpu if the runtime here saturates"
        ),
    ] = None
    observer: Annotated[
        Literal["min-max", "moving-average", "percentile", "entropy", "mse"],
        Field(description="how the range of an activation is chosen from its values"),
    ] = "min-max"
    placement: Annotated[
        Literal["pays", "profile", "inputs", "everywhere", "all", "nowhere"] | None,
        Field(
            description="quantize where the runtime gains time by estimate, where it does so by "
            "its profile too, the inputs of nodes with weights, all nodes with weights, every "
            "tensor, or nothing; none: what the target wants, pays on cpu"
        ),
    ] = None
    min_gain: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="least share of the model's estimated time that a node with weights has to "
            "save; those below stay in float, which is exact",
        ),
    ] = 0.0
    products: Annotated[
        Literal["static", "float"],
        Field(
            description="MatMul and Gemm on static scales, or left in float for quantize-dynamic"
        ),
    ] = "static"
    embeddings: Annotated[
        bool | None,
        Field(
            description="store embedding tables (Gather) as int8 rows with a scale each; none: "
            "what the target wants, true on cpu"
        ),
    ] = None

    hold_db: Annotated[
        float | None,
        Field(
            ge=0,
            description="SQNR of the outputs that rounding activations may not fall below, as far "
            "as it is foreseen: those that harm most get 16 bits where the target takes them, else "
            "stay float; 0: not looked at; none: what the target wants, 0 on cpu, 20 on qnn",
        ),
    ] = None
    overrides: Annotated[
        tuple[StaticOverride, ...],
        Field(description="other formats for some nodes, whose activations may have 16 bits"),
    ] = ()

    def preview(self, model: Model) -> tuple[Decision, ...]:
        """The nodes that could run on integers; calibration and the runtime decide on them."""
        return tuple(
            decision for part in parts(model) for decision in _candidates(self.survey(part))
        )

    def apply(self, model: Model, context: Context) -> PassResult:
        """Inserts Q/DQ pairs; see `docs/passes/quantize-static.md`."""
        self.check(model)
        check_overrides(self.overrides, model)
        settled = self.for_target(context.target)
        integers = integer_decisions(model)
        idle = settled._idle_overrides(model)
        bodies = StaticBodies(model, settled)
        pairs = [settled.quantize_sites(model, context), *bodies.quantize(model, context)]
        tables = settled._quantize_embeddings(model)
        results = (*pairs, tables)
        decisions = [decision for result in results for decision in result.decisions]
        said = target_decisions(model, context.target)
        placed = any(result.changed for result in pairs)
        if placed and settled.reduce_range and settled.weights == "int8":
            said.append(pairs_decision(context.target))
        return PassResult(
            changed=placed or tables.changed, decisions=(*integers, *decisions, *idle, *said)
        )

    def for_target(self, name: str) -> "QuantizeStatic":
        """The same with no option left open: what the user has not given is as the target wants.

        Raises:
            UnknownNameError: there is no such target; with the nearest name.
        """
        target = find_target(name)
        formats = target.formats
        wanted: dict[str, Any] = {
            "activations": formats.activations,
            "symmetric": formats.symmetric,
            "weights": formats.weights,
            "per_channel": formats.per_channel,
            "reduce_range": needs_narrow_weights(target),
            "placement": formats.placement,
            "hold_db": formats.hold_db,
            "embeddings": formats.placement in ("pays", "everywhere"),
        }
        given = self.options()
        wanted = {key: value for key, value in wanted.items() if given[key] is None}
        return type(self)(**(given | wanted))

    def _idle_overrides(self, model: Model) -> list[Decision]:
        """One for each override that names nothing which could run on integers."""
        if not self.overrides:
            return []
        surveys = [self.survey(part) for part in parts(model)]
        sites = [site for found in surveys for site in found.sites]
        refusals = [refusal for found in surveys for refusal in found.refusals]
        return idle_overrides(self.overrides, sites, refusals)

    def quantize_sites(self, model: Model, context: Context) -> PassResult:
        """Quantizes the main graph of a model, or a body that is a model of its own."""
        may_be_wide = bool(self.hold_db) and takes_wide(find_target(context.target))
        work, converted = self._at_opset(model, may_be_wide=may_be_wide)
        found = self.survey(work)
        if not found.sites or self.placement == "nowhere":
            kept = [unplaced(site, context.target) for site in found.sites]
            return PassResult(changed=False, decisions=(*found.refusals, *kept))
        schemes = self._schemes(work, found, context)
        ranges = self._calibrate(work, found, schemes, context)
        spare = self._spare(work, found, schemes, ranges, context)
        calibrated = Calibrated(ranges, spare)
        placed = self._place(work, found, with_wide(schemes, spare), calibrated, context)
        decisions = self._decisions(found, schemes, placed, ranges, context)
        said = spared_decisions(spare, _makers(work))
        decisions += [told for told in said if placed.chosen or not told.taken]
        if placed.chosen:
            needed = self._opset(may_be_wide=bool(spare.wide))
            if converted and model.opset < needed:
                model.convert_opset(needed)
            self._insert(model, placed.chosen, calibrated, context)
        return PassResult(changed=bool(placed.chosen), decisions=(*found.refusals, *decisions))

    def _quantize_embeddings(self, model: Model) -> PassResult:
        """Tables that are taken by Gather alone."""
        weights = {weight.constant: weight for weight in model.weights()}
        rewriter, decisions = EmbeddingRewriter(), []
        for node in [node for node in model.nodes() if is_embedding(node)]:
            weight = weights[node.inputs[0]]
            verdict = self.verdict(weight)
            others = [use.node.where for use in weight.uses if keeps_float(use)]
            if not self.embeddings:
                reason: str | None = "embeddings=false"
            elif others:
                reason = f"its table also feeds {others[0]}, so that a float copy would stay"
            else:
                reason = verdict.reason if verdict is not None else objection(node)
            if reason is None:
                decisions.append(rewriter.rewrite(node))
            else:
                decisions.append(Decision(where=node.where, taken=False, reason=reason))
        changed = any(decision.taken for decision in decisions)
        if changed:
            model.remove_unused()
        return PassResult(changed=changed, decisions=tuple(decisions))

    def survey(self, model: Model) -> Survey:
        """What of the main graph could run on integers, by the options."""

        def is_excluded(node: Node) -> bool:
            labels = {node.name, node.where} - {""}
            return any(fnmatchcase(label, pattern) for label in labels for pattern in self.exclude)

        found = survey(model, self.verdict, is_excluded)
        if self.placement == "inputs":
            return inputs_only(model, found, is_excluded)
        return weights_only(found) if self.placement == "all" else found

    def _at_opset(self, model: Model, *, may_be_wide: bool) -> tuple[Model, bool]:
        """The model, or a copy with an opset in which the pairs can be written."""
        needed = self._opset(may_be_wide=may_be_wide)
        if model.opset >= needed:
            return model, False
        work = model.copy()
        try:
            work.convert_opset(needed)
        except UnsupportedModelError as error:
            hint = " per_channel=false needs opset 10 only." if needed == _PER_CHANNEL_OPSET else ""
            hint = " 8-bit activations need opset 13 only." if needed == _WIDE_OPSET else hint
            raise UnsupportedModelError(f"quantize-static: {error}{hint}") from error
        return work, True

    def _opset(self, *, may_be_wide: bool) -> int:
        """The oldest opset in which the pairs can be written."""
        named = [other.activations for other in self.overrides]
        if may_be_wide or any(_is_wide(kind) for kind in (self.activations, *named)):
            return _WIDE_OPSET
        per_channel = self.per_channel or any(other.per_channel for other in self.overrides)
        return _PER_CHANNEL_OPSET if per_channel else _PER_TENSOR_OPSET

    def _schemes(self, model: Model, found: Survey, context: Context) -> Schemes:
        """The formats of every node of a model without pairs."""
        formats = find_target(context.target).formats
        default = Scheme(
            activations=np.dtype(self.activations),
            weights=np.dtype(self.weights),
            per_channel=frozenset(formats.per_channel_operators if self.per_channel else ()),
            pairs_fit=bool(self.reduce_range),
            symmetric=bool(self.symmetric),
            integer_bias=formats.integer_bias,
            for_cpu=self.placement not in BY_RULE,
        )
        operators = formats.per_channel_operators
        return schemes_of(model, found.sites, default, self.overrides, operators)

    @staticmethod
    def samples_of(context: Context) -> Samples:
        """The samples.

        Raises:
            SamplesError: there are none.
        """
        if context.samples is None:
            raise SamplesError(
                "quantize-static needs calibration samples to find the ranges of activations; "
                "give --calibration DATA, or use quantize-dynamic, which needs none."
            )
        return context.samples

    def _calibrate(
        self, work: Model, found: Survey, schemes: Schemes, context: Context
    ) -> dict[str, TensorRange]:
        samples = self.samples_of(context)
        levels: dict[Variable, int] = {}
        for site in found.sites:
            codes = _levels(schemes.of(site.node))
            for tensor in (*site.inputs, *site.outputs):
                levels[tensor] = min(levels.get(tensor, codes), codes)
        if self.placement == "all":
            for tensor in float_tensors(work, work.types()):
                maker = next(iter(tensor.inputs), None)
                levels.setdefault(tensor, _levels(schemes.of(maker)))
        ranges: dict[str, TensorRange] = {}
        for count in sorted(set(levels.values())):
            ranges |= collect_ranges(
                work,
                [tensor for tensor, codes in levels.items() if codes == count],
                samples,
                observer=self.observer,
                options=ObserverOptions(levels=count),
                progress=context.progress,
                strict=False,
                cache=context.cache,
            )
        return ranges

    def _spare(
        self,
        work: Model,
        found: Survey,
        schemes: Schemes,
        ranges: Mapping[str, TensorRange],
        context: Context,
    ) -> Spared:
        """The activations that are to have more bits than others."""
        if not self.hold_db or context.samples is None:
            return Spared()
        formats: dict[Variable, Node | None] = {}
        for site in found.sites:
            made = site.outputs if site.integer_output else ()
            formats |= dict.fromkeys((*site.inputs, *made), site.node)
        if self.placement == "all":
            for tensor in rest_tensors(work, work.types()):
                formats.setdefault(tensor, next(iter((*tensor.inputs, *tensor.outputs)), None))
        return spared(
            work,
            formats,
            schemes,
            limits_of(ranges),
            context.samples,
            hold_db=self.hold_db,
            may_be_wide=takes_wide(find_target(context.target)),
            progress=context.progress,
        )

    # ---- choice

    def _place(
        self,
        work: Model,
        found: Survey,
        schemes: Schemes,
        calibrated: Calibrated,
        context: Context,
    ) -> Placement:
        placer = StaticPlacer(
            options=self,
            work=work,
            found=found,
            schemes=schemes,
            calibrated=calibrated,
            elements=elements_of(calibrated.ranges, context),
            insert=partial(self._insert, calibrated=calibrated, context=context),
        )
        return placer.place(self.samples_of(context))

    def leaves(self, site: Site) -> bool:
        """Whether an option leaves a node with weights in float."""
        return self.products == "float" and site.node.op in _PRODUCTS

    def _insert(
        self,
        model: Model,
        chosen: Collection[str],
        calibrated: Calibrated,
        context: Context,
    ) -> Inserted:
        limits = calibrated.limits
        found = self.survey(model)
        made = [t for s in found.sites if s.key in chosen and s.integer_output for t in s.outputs]
        limits = without_flat_ends(model, made, limits)
        schemes = with_wide(self._schemes(model, found, context), calibrated.spare)
        inserted = insert_pairs(model, found, chosen, limits, schemes)
        if self.placement == "all":
            quantize_rest(model, limits, schemes)
        return inserted

    # ---- what is said

    def _decisions(
        self,
        found: Survey,
        schemes: Schemes,
        placed: Placement,
        ranges: Mapping[str, TensorRange],
        context: Context,
    ) -> list[Decision]:
        """One for each site, and one for each conversion that the runtime still executes."""
        elements = elements_of(ranges, context)
        decisions = [
            site_decision(site, placed, elements, self, schemes.of(site.node))
            for site in found.sites
        ]
        if placed.compared is not None:
            decisions.append(comparison_decision(placed.compared, len(placed.slower)))
        if placed.optimized is not None:
            decisions.extend(border_decisions(placed.optimized))
        return decisions


def _candidates(found: Survey) -> list[Decision]:
    sites = [site for site in found.sites if site.weight is not None]
    said = [Decision(where=site.where, taken=True, reason="a candidate") for site in sites]
    return [*found.refusals, *said]


def _is_wide(activations: str | None) -> bool:
    return activations is not None and np.dtype(activations).itemsize > 1


def _levels(scheme: Scheme) -> int:
    """How many codes an activation has."""
    return 1 << 8 * scheme.activations.itemsize


def _makers(model: Model) -> dict[str, Node]:
    return {str(tensor.name): node for node in model.graph.nodes for tensor in node.outputs}

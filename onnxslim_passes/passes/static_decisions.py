"""What `quantize-static` says of each node that could run on integers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx

from onnxslim_passes.passes.base import Decision
from onnxslim_passes.passes.placement import BY_RULE, CPU, Measured, Scheme, Site, estimate
from onnxslim_passes.passes.static_profile import Comparison

if TYPE_CHECKING:
    from onnxslim_passes.passes.quantize_static import QuantizeStatic


@dataclass(frozen=True)
class Placement:
    """Which sites run on integers, and what the runtime said.

    Attributes:
        chosen: keys of sites.
        unfused: keys of sites that were tried and that the runtime left in float.
        boundless: keys of sites beside a tensor that held NaN or infinity.
        saturated: keys of sites whose bias is too large for the scales of their stored weights.
        sensitive: keys of sites beside an activation that stays float for its effect on outputs.
        optimized: the runtime's graph with the chosen sites.
        little: keys of sites that `min_gain` leaves in float.
        measured: times by the profile, if that was asked for.
        slower: keys of sites that were chosen and that the profile finds slower on integers.
        compared: whole models with these and without.
    """

    chosen: frozenset[str]
    unfused: frozenset[str]
    boundless: frozenset[str]
    saturated: frozenset[str]
    sensitive: frozenset[str]
    optimized: onnx.GraphProto | None
    little: frozenset[str] = frozenset()
    measured: Measured = field(default_factory=Measured)
    slower: frozenset[str] = frozenset()
    compared: Comparison | None = None


def site_decision(
    site: Site,
    placed: Placement,
    elements: Mapping[str, float],
    options: "QuantizeStatic",
    scheme: Scheme,
) -> Decision:
    """Whether a site runs on integers, and why.

    Args:
        site: one that could.
        placed: what was chosen.
        elements: of each tensor around it, on an average run.
        options: of the pass.
        scheme: the formats of the site.
    """
    figures: dict[str, int | float | str] = {}
    if options.placement not in BY_RULE:
        cost = estimate(site, elements, CPU)
        figures["estimated_float_us"] = round(cost.floating / 1e3, 2)
        figures["estimated_integer_us"] = round(cost.integer / 1e3, 2)
    figures |= _measured_figures(site, placed.measured)
    taken = site.key in placed.chosen
    if site.weight is not None:
        figures["weights"] = site.weight.size
    reason = (
        _what_was_done(site, placed, options, scheme)
        if taken
        else _why_not(site, placed, elements, options, scheme)
    )
    return Decision(where=site.where, taken=taken, reason=reason, figures=figures)


def _what_was_done(site: Site, placed: Placement, options: "QuantizeStatic", scheme: Scheme) -> str:
    formats = _formats(site, scheme)
    if options.placement in BY_RULE:
        return f"{formats}; placed by rule, not run"
    if scheme.format.wide:
        return f"{formats}; ONNX Runtime has no 16-bit kernels on CPU and computes in float between"
    if site.key in placed.unfused:
        return f"{formats}; ONNX Runtime does not fuse it on this CPU and converts to float"
    times = _measured_times(site, placed.measured)
    if site.key in placed.slower:
        return f"{formats}; no gain by the profile ({times}), but the model is faster with it"
    return f"{formats}; fused by ONNX Runtime{f' ({times})' if times else ''}"


def _measured_figures(site: Site, times: Measured) -> dict[str, int | float | str]:
    """Microseconds of a run, of a site that was measured."""
    if site.key not in times.sites:
        return {}
    known, conversions = times.of([site])
    return {
        "measured_float_us": round(known.floating / 1e3, 1),
        "measured_integer_us": round(known.integer / 1e3, 1),
        "measured_conversions_us": round(conversions / 1e3, 1),
    }


def _measured_times(site: Site, times: Measured) -> str:
    """The same in words: "float 0.41 ms, integers 0.66 ms"."""
    if site.key not in times.sites:
        return ""
    known, conversions = times.of([site])
    added = f", conversions {conversions / 1e6:.3f} ms" if conversions > 0 else ""
    return f"float {known.floating / 1e6:.3f} ms, integers {known.integer / 1e6:.3f} ms{added}"


def comparison_decision(result: Comparison, slower: int) -> Decision:
    """What became of the sites that the profile finds slower."""
    nodes = f"{slower} node{'s' if slower > 1 else ''} in islands that gain nothing by the profile"
    times = f"{result.before_s * 1e3:.2f} ms with them, {result.after_s * 1e3:.2f} ms without"
    verdict = "back to float" if result.pays else "no gain, so that they stay on integers"
    return Decision(
        where="the whole graph",
        taken=result.pays,
        reason=f"{nodes}: {times}; {verdict}",
        figures={
            "with_them_us": round(result.before_s * 1e6, 1),
            "without_them_us": round(result.after_s * 1e6, 1),
        },
    )


def _why_not(
    site: Site,
    placed: Placement,
    elements: Mapping[str, float],
    options: "QuantizeStatic",
    scheme: Scheme,
) -> str:
    if scheme.format.wide and site.key in placed.unfused:
        return (
            "ONNX Runtime has no 16-bit kernels on CPU: the pairs would cost time and gain nothing "
            "over float; placement=everywhere writes them all the same"
        )
    if site.key in placed.unfused:
        return "ONNX Runtime did not fuse its Q/DQ pairs, so that they were taken out again"
    if site.key in placed.slower:
        times = _measured_times(site, placed.measured)
        return f"its island gains nothing by the profile: {times} (placement=profile)"
    if site.key in placed.boundless:
        return "a tensor around it held NaN or infinity in calibration, which no integer stands for"
    if site.key in placed.saturated:
        return "its bias is beyond int32 at the scales of the weights that are stored already"
    if site.key in placed.sensitive:
        return "an activation around it harms the outputs most when it is rounded (hold_db)"
    if not all(elements[tensor.name] for tensor in (*site.inputs, *site.outputs)):
        return "a tensor around it was empty in every calibration run"
    if site.node.op == "ConvTranspose":
        return "ONNX Runtime has no integer kernel for ConvTranspose on CPU"
    if site.weight is None:
        return "float is estimated to be as fast, and exact"
    if options.leaves(site):
        return "products=float leaves it to quantize-dynamic"
    if site.key in placed.little:
        return f"integers save too little time here (min_gain={options.min_gain:g}); float is exact"
    return (
        "float is estimated to be faster than integers with their conversions; "
        "placement=everywhere quantizes it all the same"
    )


def _formats(site: Site, scheme: Scheme) -> str:
    """The number formats of a site, in words."""
    activations = f"{scheme.activations} activations"
    if site.weight is None:
        return activations
    if site.grid is not None:
        scales = "per tensor" if site.grid.axis is None else "per channel"
        return f"{site.weight.dtype.name} weights {scales} as they were stored, {activations}"
    by_channel = site.node.op in scheme.per_channel and site.axis is not None
    scales = "per channel" if by_channel else "per tensor"
    return f"{scheme.weights} weights {scales}, {activations}"

"""What `quantize-static` says of each node that could run on integers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx

from onnxslim_passes.passes.base import Decision
from onnxslim_passes.passes.placement import BY_RULE, CPU, Scheme, Site, estimate

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
    """

    chosen: frozenset[str]
    unfused: frozenset[str]
    boundless: frozenset[str]
    saturated: frozenset[str]
    sensitive: frozenset[str]
    optimized: onnx.GraphProto | None
    little: frozenset[str] = frozenset()


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
    return f"{formats}; fused by ONNX Runtime"


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

"""Which formats `quantize-static` gives to which nodes: those of all, and its overrides."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from onnxslim_passes.model import Model, Node
from onnxslim_passes.passes.base import Decision, pass_options
from onnxslim_passes.passes.overrides import NodeOverride, given, node_names
from onnxslim_passes.passes.placement import Scheme, Schemes, Site
from onnxslim_passes.passes.selection import first_match

ActivationType = Literal["uint8", "int8", "uint16", "int16"]
WeightType = Literal["int8", "uint8"]


@pass_options
class StaticOverride(NodeOverride):
    """Other formats of `quantize-static` for some nodes."""

    activations: Annotated[ActivationType | None, Field(description="as of the pass")] = None
    symmetric: Annotated[bool | None, Field(description="as of the pass")] = None
    weights: Annotated[WeightType | None, Field(description="as of the pass")] = None
    per_channel: Annotated[bool | None, Field(description="as of the pass")] = None


def schemes_of(
    model: Model,
    sites: Iterable[Site],
    default: Scheme,
    overrides: Sequence[NodeOverride],
    per_channel_operators: Iterable[str],
) -> Schemes:
    """The scheme of each node of the main graph.

    Args:
        model: before any pair is put in.
        sites: of that model; what an override says of a node within a site is said of the site.
        default: of nodes that no override matches.
        overrides: in their order.
        per_channel_operators: which operators may have weight scales per channel.
    """
    if not overrides:
        return Schemes(default=default)
    names = {node: node_names(node) for node in model.graph.nodes}
    names |= {site.node: site_names(site) for site in sites}
    operators = frozenset(per_channel_operators)
    special = {}
    for node, labels in names.items():
        scheme = _changed(default, overrides, labels, operators)
        if scheme != default:
            special[node] = scheme
    return Schemes(default=default, special=special)


def site_names(site: Site) -> set[str]:
    """All names that a pattern may match a site by."""
    parts: list[Node | None] = [site.node, site.pad, site.bias_add, site.clamp]
    names = {name for node in parts if node is not None for name in node_names(node)}
    if site.weight is not None:
        names |= {str(site.weight.name), site.weight.where}
    return names


def _changed(
    default: Scheme,
    overrides: Sequence[NodeOverride],
    names: set[str],
    operators: frozenset[str],
) -> Scheme:
    activations = given(overrides, names, "activations")
    symmetric = given(overrides, names, "symmetric")
    weights = given(overrides, names, "weights")
    per_channel = given(overrides, names, "per_channel")
    return replace(
        default,
        activations=default.activations if activations is None else np.dtype(activations),
        symmetric=default.symmetric if symmetric is None else symmetric,
        weights=default.weights if weights is None else np.dtype(weights),
        per_channel=default.per_channel
        if per_channel is None
        else (operators if per_channel else frozenset()),
    )


def idle_overrides(
    overrides: Sequence[NodeOverride], sites: Iterable[Site], refusals: Iterable[Decision]
) -> list[Decision]:
    """A decision for each override that names no node which could run on integers."""
    names = [name for site in sites for name in site_names(site)]
    names += [decision.where for decision in refusals]
    reason = (
        "overrides name it, but nothing that it matches could run on integers: neither a node with "
        "weights nor one between two such"
    )
    return [
        Decision(where=override.nodes, taken=False, reason=reason)
        for override in overrides
        if first_match([override.nodes], names) is None
    ]

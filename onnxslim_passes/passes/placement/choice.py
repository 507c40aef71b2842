"""Which sites run on integers: the cheapest choice, found exactly.

Each site is either in integers or in float and costs time in both; each border between the two
costs a QuantizeLinear or a DequantizeLinear of the tensor that crosses it. The sum is least on a
minimum cut between "integer" (source) and "float" (sink): Greig, Porteous and Seheult, "Exact
maximum a posteriori estimation for binary images", J. R. Stat. Soc. B 51(2), 1989; Stone,
"Multiprocessor scheduling with the aid of network flow algorithms", IEEE TSE 3(1), 1977.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxslim_passes.model import Variable
from onnxslim_passes.passes.placement.operators import Costs
from onnxslim_passes.passes.placement.sites import Site, Survey

Elements = Mapping[str, float]
"""Elements of each tensor, by name, on an average run."""

_CAPACITY = 1 << 28  # of all edges together, so that no int32 flow overflows
_SOURCE, _SINK = 0, 1


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a site costs, in nanoseconds a run.

    Attributes:
        integer: on integers, without conversions.
        floating: in float.
    """

    integer: float
    floating: float


@dataclass
class _Network:
    """A flow network under construction; numbers from 2 are sites and helpers."""

    size: int = 2
    edges: list[tuple[int, int, float]] = field(default_factory=list)
    bonds: list[tuple[int, int]] = field(default_factory=list)

    def add(self) -> int:
        self.size += 1
        return self.size - 1

    def edge(self, start: int, end: int, cost: float) -> None:
        """`cost` is paid if `start` is in integers and `end` in float."""
        self.edges.append((start, end, cost))

    def bond(self, start: int, end: int) -> None:
        """Never `start` in integers and `end` in float."""
        self.bonds.append((start, end))

    def integers(self) -> set[int]:
        """The source side of the smallest minimum cut."""
        # Here, because the import takes 0.3 s and 33 MB, and only this choice needs it.
        from scipy.sparse import coo_array, csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        total = sum(cost for _, _, cost in self.edges) or 1.0
        unit = _CAPACITY / total
        edges = [(start, end, round(cost * unit)) for start, end, cost in self.edges]
        edges += [(start, end, _CAPACITY * 2) for start, end in self.bonds]
        rows, columns, capacities = (np.array(part, np.int32) for part in zip(*edges, strict=True))
        network = csr_array(coo_array((capacities, (rows, columns)), (self.size, self.size)))
        flow = maximum_flow(network, _SOURCE, _SINK).flow
        residual = csr_array(network - flow)
        residual.eliminate_zeros()
        return {int(number) for number in breadth_first_order(residual, _SOURCE)[0]}


def estimate(site: Site, elements: Elements, costs: Costs) -> Estimate:
    """The cost of a site in both ways, from its shapes and the number of elements around it."""
    taken = sum(elements[tensor.name] for tensor in site.inputs)
    made = sum(elements[tensor.name] for tensor in site.outputs)
    if site.rule is not None:
        size = max(taken, made)
        rounding = 0.0 if site.rule.same_grid else costs.rounding * made
        clamp = 0.16 * made if site.clamp is not None else 0.0
        return Estimate(
            integer=site.rule.integer_ns * size + rounding,
            floating=site.rule.float_ns * size + clamp,
        )
    return _weight_estimate(site, taken, made, costs)


def _weight_estimate(site: Site, taken: float, made: float, costs: Costs) -> Estimate:
    assert site.weight is not None
    shape, size = site.weight.shape, site.weight.size
    bytes_float, bytes_integer = 4 * size * costs.weight_byte, size * costs.weight_byte
    if site.node.op in ("MatMul", "Gemm"):
        axis = site.axis if site.axis is not None else len(shape) - 1
        macs = made * shape[axis - 1 if axis else 1]
        floating = macs * costs.float_mac
        integer = macs * costs.integer_product_mac
    elif site.node.op == "ConvTranspose":
        floating = integer = taken * size / shape[0] * costs.float_mac
    else:
        floating, integer = _convolution(site, made, costs)
        moved = (taken + made) * costs.element
        floating, integer = floating + moved, integer + made * costs.element
    return Estimate(integer=integer * costs.margin + bytes_integer, floating=floating + bytes_float)


def _convolution(site: Site, made: float, costs: Costs) -> tuple[float, float]:
    """Float and integer arithmetic of a Conv with `made` output elements."""
    assert site.weight is not None
    shape = site.weight.shape
    groups = int(site.node.attr("group", 1))
    kernel = int(np.prod(shape[2:]))
    macs = made * shape[1] * kernel
    if groups > 1 and shape[1] == 1:
        return macs * costs.float_depthwise_mac, macs * costs.integer_depthwise_mac
    taps = made / shape[0] * kernel * groups if kernel > 1 else 0.0
    rate = costs.integer_mac if groups == 1 else costs.integer_grouped_mac
    return macs * costs.float_mac, macs * rate + taps * costs.tap


def gains(found: Survey, elements: Elements, costs: Costs) -> dict[str, float]:
    """What integers save at each site with weights while all others stay on them, by its key.

    Nanoseconds a run, conversions included: in a chain of integers a float site costs two more, in
    the midst of float operators it saves two.
    """
    makers, takers = found.makers(), found.takers()
    saved = {}
    for site in found.sites:
        if site.weight is None:
            continue
        cost = estimate(site, elements, costs)
        saved[site.key] = cost.floating - cost.integer
        for tensor in site.inputs:
            maker, size = makers.get(tensor), elements[tensor.name]
            if maker is not None and maker.integer_output:
                saved[site.key] += costs.launch + size * costs.dequantize
            elif len(takers[tensor]) == 1:
                saved[site.key] -= costs.launch + size * costs.quantize
        for tensor in site.outputs if site.integer_output else ():
            size, here = elements[tensor.name], takers.get(tensor, [])
            strangers = max(_strangers(tensor, here), not here)
            saved[site.key] -= strangers * (costs.launch + size * costs.dequantize)
            if here:
                saved[site.key] += costs.launch + size * costs.quantize
    return saved


def chained(found: Survey) -> set[str]:
    """Keys of the sites that have possible integers on all sides.

    In float, such a site costs more than two conversions: the runtime goes to its layout for float
    convolutions and back, around a copy that keeps it from quantizing the weights by itself.
    """
    makers, takers = found.makers(), found.takers()

    def is_inside(site: Site) -> bool:
        behind = [makers.get(tensor) for tensor in site.inputs]
        ahead = [takers.get(tensor, []) for tensor in site.outputs]
        return all(maker is not None and maker.integer_output for maker in behind) and all(
            here and not _strangers(tensor, here)
            for tensor, here in zip(site.outputs, ahead, strict=True)
        )

    return {site.key for site in found.sites if is_inside(site)}


def choose(
    found: Survey,
    elements: Elements,
    costs: Costs,
    *,
    integer: Collection[str] = (),
    floating: Collection[str] = (),
) -> set[str]:
    """The keys of the sites that run on integers.

    Args:
        found: all sites.
        elements: for every input and output of a site.
        costs: of the target.
        integer: keys of sites that must run on integers.
        floating: keys of sites that must run in float.
    """
    if not found.sites:
        return set()
    network = _Network()
    numbers = {site: network.add() for site in found.sites}
    for site, number in numbers.items():
        cost = estimate(site, elements, costs)
        network.edge(number, _SINK, cost.integer)
        network.edge(_SOURCE, number, cost.floating)
        if site.key in floating:
            network.bond(number, _SINK)
        elif site.key in integer:
            network.bond(_SOURCE, number)
    _add_borders(network, found, numbers, elements, costs)
    _tie_shared_weights(network, numbers)
    chosen = network.integers()
    return {site.key for site, number in numbers.items() if number in chosen}


def _add_borders(
    network: _Network, found: Survey, numbers: dict[Site, int], elements: Elements, costs: Costs
) -> None:
    """Conversions: one QuantizeLinear a tensor, one DequantizeLinear a float consumer."""
    makers, takers = found.makers(), found.takers()
    for tensor in dict.fromkeys((*makers, *takers)):
        maker, size = makers.get(tensor), elements[tensor.name]
        quantize = costs.launch + size * costs.quantize
        dequantize = costs.launch + size * costs.dequantize
        here = takers.get(tensor, [])
        if here:
            stored = network.add()
            for site in here:
                network.bond(numbers[site], stored)
            made_integer = numbers[maker] if maker is not None and maker.integer_output else _SINK
            network.edge(stored, made_integer, quantize)
        if maker is not None and maker.integer_output:
            # Needed also if no consumer is a site: the graph's outputs are float.
            strangers = _strangers(tensor, here)
            network.edge(numbers[maker], _SINK, dequantize * max(strangers, not here))
            for site in here:
                network.edge(numbers[maker], numbers[site], dequantize)


def _strangers(tensor: Variable, sites: list[Site]) -> int:
    """How many consumers of a tensor are no sites."""
    nodes = {site.entry for site in sites}
    return sum(node not in nodes for node in dict.fromkeys(tensor.outputs))


def _tie_shared_weights(network: _Network, numbers: dict[Site, int]) -> None:
    """Consumers of one weight go together: else it would be stored in float and in integers."""
    first: dict[object, int] = {}
    for site, number in numbers.items():
        if site.weight is None:
            continue
        other = first.setdefault(site.weight, number)
        if other != number:
            network.bond(other, number)
            network.bond(number, other)

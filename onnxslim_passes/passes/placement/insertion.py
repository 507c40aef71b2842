"""Puts Q/DQ pairs around chosen sites: activations from ranges, weights and biases as integers.

A tensor that an integer kernel makes is quantized where it is made: its maker gets a new output,
and the DequantizeLinear behind takes over the tensor itself, with its name and all its consumers,
so that captured tensors and graph outputs keep working. A tensor that a float node makes is
quantized for its integer consumers only; the others go on taking it as it is.

Weights become int8 (or uint8) initializers behind a DequantizeLinear; biases int32 ones of scale
``input scale * weight scale``, which ONNX Runtime demands, with weight scales raised where an
int32 bias would come close to saturation.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Constant, Graph, Model, Node, Variable
from onnxslim_passes.numerics.affine import (
    AffineGrid,
    bias_scale,
    choose_grid,
    minimum_weight_scale,
    quantize,
    quantize_bias,
    weight_grid,
)
from onnxslim_passes.passes.placement.operators import (
    CLAMPS,
    SELF_QUANTIZED,
    SLOW_UPSTREAM,
)
from onnxslim_passes.passes.placement.pairs import pair_scale, pairs_fit
from onnxslim_passes.passes.placement.sites import Site, Survey

Array = npt.NDArray[Any]
Ranges = Mapping[str, tuple[float, float]]
"""Smallest and largest value of each tensor, by name."""

_LONG_NAME = 64


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The number formats.

    Attributes:
        activations: dtype of activations.
        weights: dtype of weights, symmetric.
        per_channel: operators whose weights get a scale for each output channel, where they have
            such an axis.
        pairs_fit: int8 weights have scales at which no pair of products saturates 16 bits.
        symmetric: zero points of activations in the middle of the range.
        integer_bias: biases as int32; else they stay float.
        for_cpu: with what this CPU's runtime needs: copies where it would otherwise move or widen
            what is quantized, and int32 addends of an Add behind a MatMul.
    """

    activations: np.dtype[Any]
    weights: np.dtype[Any]
    per_channel: frozenset[str]
    pairs_fit: bool = False
    symmetric: bool = False
    integer_bias: bool = True
    for_cpu: bool = True


@dataclass(frozen=True)
class Inserted:
    """What was put in, by name in the model.

    Attributes:
        makers: QuantizeLinear node behind an integer kernel -> the site that has to swallow it.
        weights: integer initializer -> the sites that take it.
    """

    makers: dict[str, Site]
    weights: dict[str, tuple[Site, ...]]


def insert_pairs(
    model: Model, found: Survey, chosen: Collection[str], ranges: Ranges, scheme: Scheme
) -> Inserted:
    """Quantizes the chosen sites of `found`, which was made from this very `model`, in place.

    Args:
        model: with opset 13 or newer, or 10 to 12 if no scale is per channel.
        found: the sites.
        chosen: keys of sites.
        ranges: for every input and output of a chosen site.
        scheme: the formats.
    """
    sites = [site for site in found.sites if site.key in chosen]
    grids = activation_grids(sites, ranges, scheme)
    weights = _insert_weights(model, sites, grids, scheme)
    makers = _insert_activations(model.graph, sites, grids, barriers=scheme.for_cpu)
    if scheme.for_cpu:
        _keep_float(model.graph)
    return Inserted(makers, weights)


def saturating_sites(found: Survey, ranges: Ranges, scheme: Scheme) -> set[str]:
    """Keys of sites whose bias does not fit into int32 next to weight scales that are given.

    A float bias is no way out: the runtime makes it int32 by itself, saturating.
    """
    keys = set()
    for site in found.sites:
        if site.grid is None or site.bias is None or site.weight is None:
            continue
        bias = _bias_values(site, _channels(site, site.weight.shape))
        low, high = ranges.get(str(site.inputs[0].name), (0.0, 0.0))
        data = choose_grid(low, high, scheme.activations, symmetric=scheme.symmetric)
        if bias is not None and not _fits(bias, data, site.grid):
            keys.add(site.key)
    return keys


def short(name: object) -> str:
    """A name to derive others from: converters give some of several hundred letters.

    Each pair needs four new names, which would be most of the bytes of a small model's file.
    """
    text = str(name)
    return text if len(text) <= _LONG_NAME else text[-_LONG_NAME:]


# ---------------- activations


def activation_grids(
    sites: Iterable[Site], ranges: Ranges, scheme: Scheme
) -> dict[Variable, AffineGrid]:
    """The grid of each tensor around the sites, which are in the order of the graph."""
    grids: dict[Variable, AffineGrid] = {}

    def grid(tensor: Variable) -> AffineGrid:
        if tensor not in grids:
            low, high = ranges[tensor.name]
            grids[tensor] = choose_grid(low, high, scheme.activations, symmetric=scheme.symmetric)
        return grids[tensor]

    for site in _in_order(sites):
        taken = [grid(tensor) for tensor in site.inputs]
        if not site.integer_output:
            continue
        for tensor in site.outputs:
            if site.rule is not None and site.rule.same_grid:
                grids[tensor] = taken[0]
            else:
                grid(tensor)
    return grids


def _in_order(sites: Iterable[Site]) -> list[Site]:
    """Makers before takers, whatever the order of the nodes in the file."""
    waiting = list(sites)
    makers = {tensor: site for site in waiting for tensor in site.outputs}
    ordered: dict[Site, None] = {}
    stack = waiting[::-1]
    while stack:
        site = stack[-1]
        before = [
            makers[tensor]
            for tensor in site.inputs
            if tensor in makers and makers[tensor] not in ordered
        ]
        if before and site not in ordered:
            stack.extend(before)
        else:
            stack.pop()
            ordered[site] = None
    return list(ordered)


class ActivationConstants:
    """Scale and zero point of each grid, stored once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[int, tuple[Constant, Constant]] = {}

    def of(self, grid: AffineGrid, name: str) -> tuple[Constant, Constant]:
        """Those of a grid; the first time named after `name`."""
        if id(grid) not in self._known:
            self._known[id(grid)] = (
                self._graph.add_constant(f"{short(name)}_scale", grid.scale),
                self._graph.add_constant(f"{short(name)}_zero_point", grid.zero_point),
            )
        return self._known[id(grid)]


def _insert_activations(
    graph: Graph, sites: list[Site], grids: Mapping[Variable, AffineGrid], *, barriers: bool
) -> dict[str, Site]:
    constants = ActivationConstants(graph)
    makers = {tensor: site for site in sites if site.integer_output for tensor in site.outputs}
    takers: dict[Variable, list[Node]] = {}
    for site in sites:
        for tensor in site.inputs:
            takers.setdefault(tensor, []).append(site.entry)
    swallowed = {}
    for tensor in dict.fromkeys((*makers, *takers)):
        parameters = constants.of(grids[tensor], tensor.name)
        if tensor in makers:
            quantizer = quantize_where_made(graph, tensor, parameters)
            swallowed[quantizer.name] = makers[tensor]
        else:
            quantize_for(graph, tensor, takers[tensor], parameters, barriers=barriers)
    return swallowed


def quantize_where_made(
    graph: Graph, tensor: Variable, parameters: tuple[Constant, Constant]
) -> Node:
    """Maker -> new tensor -> Q -> DQ -> `tensor`."""
    maker = tensor.inputs[0]
    made = Variable(graph.fresh_name(f"{short(tensor.name)}_float"))
    made.dtype, made.shape = tensor.dtype, tensor.shape
    index = next(index for index, output in enumerate(maker.outputs) if output is tensor)
    maker.outputs[index] = made
    quantizer = graph.add_node(
        "QuantizeLinear", [made, *parameters], outputs=[f"{short(tensor.name)}_quantized"]
    )
    graph.add_node("DequantizeLinear", [quantizer.outputs[0], *parameters], outputs=[tensor])
    return quantizer


def quantize_for(
    graph: Graph,
    tensor: Variable,
    takers: Iterable[Node],
    parameters: tuple[Constant, Constant],
    *,
    barriers: bool,
) -> None:
    """`tensor` -> Q -> DQ -> the takers; others keep `tensor`."""
    source = tensor
    if barriers and tensor.inputs and tensor.inputs[0].op in SLOW_UPSTREAM:
        barrier = graph.add_node("Max", [tensor], outputs=[f"{short(tensor.name)}_float"])
        source = barrier.outputs[0]
    quantizer = graph.add_node(
        "QuantizeLinear", [source, *parameters], outputs=[f"{short(tensor.name)}_quantized"]
    )
    restored = graph.add_node(
        "DequantizeLinear",
        [quantizer.outputs[0], *parameters],
        outputs=[f"{short(tensor.name)}_dequantized"],
    ).outputs[0]
    for node in dict.fromkeys(takers):
        for index, taken in enumerate(node.inputs):
            if taken is tensor:
                node.inputs[index] = restored


def _keep_float(graph: Graph) -> None:
    """Puts a copy in front of float nodes that the runtime would quantize by itself.

    Between a DequantizeLinear and a QuantizeLinear it quantizes float weights, with one scale for
    the tensor: on depthwise convolutions that cost 6 dB. A Max of one tensor is a copy that it does
    not look through.
    """
    for node in list(graph.nodes):
        fit = node.op in SELF_QUANTIZED and not node.domain and isinstance(node.inputs[1], Constant)
        if not (fit and _reaches_quantizer(node)):
            continue
        entry = node
        maker = entry.inputs[0].inputs[0] if entry.inputs[0].inputs else None
        if maker is not None and maker.op == "Pad":
            entry, maker = maker, maker.inputs[0].inputs[0] if maker.inputs[0].inputs else None
        if maker is not None and maker.op == "DequantizeLinear":
            source = entry.inputs[0]
            copy = graph.add_node("Max", [source], outputs=[f"{short(source.name)}_float"])
            entry.inputs[0] = copy.outputs[0]


def _reaches_quantizer(node: Node) -> bool:
    """Whether a QuantizeLinear takes the output, directly or behind a clamp."""
    takers = list(node.outputs[0].outputs)
    if len(takers) == 1 and takers[0].op in CLAMPS:
        takers = list(takers[0].outputs[0].outputs)
    return any(taker.op == "QuantizeLinear" for taker in takers)


# ---------------- weights and biases


def _insert_weights(
    model: Model, sites: list[Site], grids: Mapping[Variable, AffineGrid], scheme: Scheme
) -> dict[str, tuple[Site, ...]]:
    shared: dict[Constant, list[Site]] = {}
    for site in sites:
        if site.weight is not None:
            shared.setdefault(site.weight, []).append(site)
    inserted = {}
    for constant, users in shared.items():
        if users[0].grid is not None:
            # Stored as integers before: they stay, and so does their DequantizeLinear.
            saturates = scheme.pairs_fit and constant.dtype == np.int8
            if saturates and any(not pairs_fit(site.node, constant.values) for site in users):
                constant = _made_unsigned(model.graph, constant, users)
            inserted[str(constant.name)] = tuple(users)
            for site in users:
                assert site.grid is not None  # all users of these codes have one
                _insert_bias(model.graph, site, grids[site.inputs[0]], site.grid, scheme)
            continue
        axis = _scale_axis(users, scheme)
        values = constant.values * _gain(users[0].node)
        grid = _grid_without_saturation(values, axis, users, grids, scheme)
        codes = _weight_codes(model.graph, constant.name, values, grid, users)
        inserted[codes.name] = tuple(users)
        for site in users:
            _insert_bias(model.graph, site, grids[site.inputs[0]], grid, scheme)
    model.remove_unused()
    return inserted


def _made_unsigned(graph: Graph, codes: Constant, users: list[Site]) -> Constant:
    """int8 codes as uint8 ones of the same numbers: slower kernels, which do not saturate."""
    unsigned = graph.add_constant(f"{short(codes.name)}_unsigned", _shifted(codes.values))
    for site in users:
        restore = site.node.inputs[1].inputs[0]
        scale = restore.inputs[1]
        given = restore.inputs[2].values if len(restore.inputs) > 2 else np.zeros_like(scale.values)
        hint = f"{short(codes.name)}_zero_point"
        zero_point = graph.add_constant(hint, _shifted(given))
        restore.inputs = [unsigned, scale, zero_point]
    return unsigned


def _shifted(codes: Array) -> npt.NDArray[np.uint8]:
    return (codes.astype(np.int16) + 128).astype(np.uint8)


def _scale_axis(users: list[Site], scheme: Scheme) -> int | None:
    """The axis of a shared weight's scales, or None for one scale."""
    axes = {site.axis for site in users}
    allowed = all(site.node.op in scheme.per_channel for site in users)
    return axes.pop() if allowed and len(axes) == 1 else None


def _gain(node: Node) -> np.float32:
    """Gemm's alpha, which goes into the weight: the runtime's integer kernel wants 1."""
    return np.float32(node.attr("alpha", 1.0) if node.op == "Gemm" else 1.0)


def _bias_values(site: Site, channels: int) -> Array | None:
    """The bias of a site, float32, shape (channels,), Gemm's beta included."""
    if site.bias is None:
        return None
    beta = np.float32(site.node.attr("beta", 1.0) if site.node.op == "Gemm" else 1.0)
    return np.broadcast_to(site.bias.values.reshape(-1) * beta, (channels,))


def _grid_without_saturation(
    values: Array,
    axis: int | None,
    users: list[Site],
    grids: Mapping[Variable, AffineGrid],
    scheme: Scheme,
) -> AffineGrid:
    """The weights' grid, with scales raised until no bias of a user and no pair saturates."""
    grid = weight_grid(values, scheme.weights, axis)
    for site in users:
        if scheme.pairs_fit and scheme.weights == np.int8:
            grid = grid.at_least(pair_scale(site.node, values, axis))
        bias = _bias_values(site, _channels(site, values.shape))
        if bias is not None and scheme.integer_bias:
            least = minimum_weight_scale(bias, float(grids[site.inputs[0]].scale))
            grid = grid.at_least(least if axis is not None else least.max())
    return grid


def _channels(site: Site, shape: Sequence[int]) -> int:
    """How many output channels a site with a weight of this shape has."""
    if site.node.op == "ConvTranspose":
        return int(shape[1] * site.node.attr("group", 1))
    return shape[-1 if site.axis is None else site.axis]


def _weight_codes(
    graph: Graph, name: str, values: Array, grid: AffineGrid, users: list[Site]
) -> Constant:
    """Stores the codes once, with one DequantizeLinear for each user."""
    codes = graph.add_constant(f"{short(name)}_quantized", quantize(values, grid))
    parameters = (
        graph.add_constant(f"{short(name)}_scale", grid.scale),
        graph.add_constant(f"{short(name)}_zero_point", grid.zero_point),
    )
    attrs = {} if grid.axis is None else {"axis": grid.axis}
    for site in users:
        restored = graph.add_node(
            "DequantizeLinear",
            [codes, *parameters],
            outputs=[f"{short(name)}_dequantized"],
            attrs=dict(attrs),
        )
        site.node.inputs[1] = restored.outputs[0]
    return codes


def _insert_bias(
    graph: Graph, site: Site, data: AffineGrid, weight: AffineGrid, scheme: Scheme
) -> None:
    """The bias as int32, where the runtime takes it; a MatMul's stays float behind 3-D data."""
    assert site.weight is not None  # it has just been quantized
    values = _bias_values(site, _channels(site, site.weight.shape))
    scaled = site.node.op == "Gemm" and site.node.attr("beta", 1.0) != 1.0
    if site.node.op == "Gemm":
        # They are in the stored weight and bias now.
        site.node.attrs.pop("alpha", None)
        site.node.attrs.pop("beta", None)
    if site.bias is None or values is None:
        return
    owner = site.bias_add or site.node
    index = next(i for i, tensor in enumerate(owner.inputs) if tensor is site.bias)
    fits = site.grid is None or _fits(values, data, weight)
    added = site.bias_add is not None
    if not scheme.integer_bias or not fits or (added and not (site.rank_two and scheme.for_cpu)):
        if scaled:
            owner.inputs[index] = graph.add_constant(f"{short(site.bias.name)}_scaled", values)
        return
    scale = bias_scale(data.scale, weight.scale)
    hint = short(site.bias.name)
    inputs = [
        graph.add_constant(
            f"{hint}_quantized", quantize_bias(values, float(data.scale), weight.scale)
        ),
        graph.add_constant(f"{hint}_scale", scale),
    ]
    restored = graph.add_node(
        "DequantizeLinear",
        inputs,
        outputs=[f"{hint}_dequantized"],
        attrs={"axis": 0} if scale.ndim else {},
    )
    owner.inputs[index] = restored.outputs[0]


def _fits(bias: Array, data: AffineGrid, weight: AffineGrid) -> bool:
    """Whether the codes of a bias fit into int32 next to weight scales that are given."""
    return bool(np.all(minimum_weight_scale(bias, float(data.scale)) <= weight.scale))

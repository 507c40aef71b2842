"""Puts Q/DQ pairs around chosen sites: activations from ranges, weights and biases as integers.

A tensor that an integer kernel makes is quantized where it is made: its maker gets a new output,
and the DequantizeLinear behind takes over the tensor itself, with its name and all its consumers,
so that captured tensors and graph outputs keep working. A tensor that a float node makes is
quantized for its integer consumers only; the others go on taking it as it is.

Weights become int8 (or uint8) initializers behind a DequantizeLinear; biases int32 ones of scale
``input scale * weight scale``, which ONNX Runtime demands, with weight scales raised where an
int32 bias would come close to saturation.
"""

from collections.abc import Collection, Iterable, Sequence
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
)
from onnxslim_passes.numerics.common_codes import kept_grid
from onnxslim_passes.passes.placement.operators import (
    CLAMPS,
    SELF_QUANTIZED,
    SLOW_UPSTREAM,
)
from onnxslim_passes.passes.placement.pairs import pairs_fit, raising_scale
from onnxslim_passes.passes.placement.schemes import Format, Grids, Ranges, Scheme, Schemes
from onnxslim_passes.passes.placement.sites import Site, Survey

Array = npt.NDArray[Any]

_LONG_NAME = 64


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
    model: Model, found: Survey, chosen: Collection[str], ranges: Ranges, schemes: Schemes
) -> Inserted:
    """Quantizes the chosen sites of `found`, which was made from this very `model`, in place.

    Args:
        model: with opset 13 or newer, or 10 to 12 if no scale is per channel.
        found: the sites.
        chosen: keys of sites.
        ranges: for every input and output of a chosen site.
        schemes: the formats.
    """
    sites = [site for site in found.sites if site.key in chosen]
    grids = Grids(sites, ranges, schemes)
    weights = _insert_weights(model, sites, grids, schemes)
    makers = _insert_activations(model.graph, sites, grids, barriers=schemes.default.for_cpu)
    if schemes.default.for_cpu:
        _keep_float(model.graph)
    return Inserted(makers, weights)


def saturating_sites(found: Survey, ranges: Ranges, schemes: Schemes) -> set[str]:
    """Keys of sites whose bias does not fit into int32 next to weight scales that are given.

    A float bias is no way out: the runtime makes it int32 by itself, saturating.
    """
    keys = set()
    for site in found.sites:
        if site.grid is None or site.bias is None or site.weight is None:
            continue
        bias = _bias_values(site, _channels(site, site.weight.shape))
        low, high = ranges.get(str(site.inputs[0].name), (0.0, 0.0))
        kind = schemes.kind(site.inputs[0], site.node)
        data = choose_grid(low, high, kind.dtype, symmetric=kind.symmetric)
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
    graph: Graph, sites: list[Site], grids: Grids, *, barriers: bool
) -> dict[str, Site]:
    constants = ActivationConstants(graph)
    makers = {tensor: site for site in sites if site.integer_output for tensor in site.outputs}
    takers: dict[Variable, dict[Format, list[Node]]] = {tensor: {} for tensor in makers}
    for site in sites:
        for tensor in site.inputs:
            kinds = takers.setdefault(tensor, {})
            kinds.setdefault(grids.kind(tensor, site), []).append(site.entry)
    swallowed = {}
    for tensor, kinds in takers.items():
        maker = makers.get(tensor)
        if maker is not None:
            made = grids.kind(tensor, maker)
            parameters = constants.of(grids.of(tensor, made), tensor.name)
            swallowed[quantize_where_made(graph, tensor, parameters).name] = maker
            kinds.pop(made, None)
        for kind, nodes in kinds.items():
            parameters = constants.of(grids.of(tensor, kind), tensor.name)
            quantize_for(graph, tensor, nodes, parameters, barriers=barriers and maker is None)
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
    model: Model, sites: list[Site], grids: Grids, schemes: Schemes
) -> dict[str, tuple[Site, ...]]:
    shared: dict[Constant, list[Site]] = {}
    for site in sites:
        if site.weight is not None:
            shared.setdefault(site.weight, []).append(site)
    inserted = {}
    for constant, users in shared.items():
        scheme = schemes.of(users[0].node)
        if users[0].grid is not None:
            # Stored as integers before: they stay, and so does their DequantizeLinear.
            saturates = scheme.adds_pairs and constant.dtype == np.int8
            if saturates and any(not pairs_fit(site.node, constant.values) for site in users):
                constant = _made_unsigned(model.graph, constant, users)
            inserted[str(constant.name)] = tuple(users)
            for site in users:
                assert site.grid is not None  # all users of these codes have one
                _insert_bias(model.graph, site, grids.data(site), site.grid, scheme)
            continue
        axis = _scale_axis(users, scheme)
        values = constant.values * _gain(users[0].node)
        grid = _grid_without_saturation(values, axis, users, grids, scheme)
        codes = _weight_codes(model.graph, constant.name, values, grid, users)
        inserted[codes.name] = tuple(users)
        for site in users:
            _insert_bias(model.graph, site, grids.data(site), grid, scheme)
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
    grids: Grids,
    scheme: Scheme,
) -> AffineGrid:
    """The weights' grid, with scales raised until no bias of a user and no pair saturates."""
    grid = kept_grid(values, scheme.weights, axis)
    for site in users:
        if scheme.adds_pairs and scheme.weights == np.int8:
            grid = grid.at_least(raising_scale(site.node, values, axis, grid))
        bias = _bias_values(site, _channels(site, values.shape))
        if bias is not None and scheme.integer_bias:
            least = minimum_weight_scale(bias, float(grids.data(site).scale))
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

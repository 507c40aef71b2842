"""What integers cost at each site by the profile: names that survive, and times by site.

The runtime fuses nodes and invents names, but keeps parts of old ones: a fused node is called after
a node or a tensor of those it stands for. So in a scratch copy every node and tensor gets a label
that is found again in whatever name comes out:

- the time of a node goes to the node of the model that makes its output. In the model with pairs,
  nodes of the float model that had been fused there (a HardSwish into its convolution) go with
  the node that had swallowed them, so that both sums stand for the same operators;
- conversions (QuantizeLinear, DequantizeLinear, changes of layout) belong to the tensor that they
  convert.

Judged are islands, sites that quantized tensors connect: taking out a whole one brings no new
conversions, so that nothing has to be foreseen.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from onnxslim_passes.model import Model, Node, Variable
from onnxslim_passes.passes.placement.choice import Estimate
from onnxslim_passes.passes.placement.operators import WEIGHT_OPERATORS
from onnxslim_passes.passes.placement.sites import Site, Survey
from onnxslim_passes.runtime import ProfiledGraph

_LABEL = re.compile(r"@([ntc])(\d+)\.")  # of a node, a tensor, a node that was put in
_LAYOUTS = ("ReorderInput", "ReorderOutput", "Transpose")
_NANOSECONDS = 1e9

Originals = Mapping[Node, list[str]]
"""Nodes, each with the names of its outputs."""


class Labels:
    """Labels for the nodes and tensors of a model, the same for each copy of it.

    Args:
        model: before any edit; stays as it is.
    """

    def __init__(self, model: Model) -> None:
        inputs = [str(tensor.name) for tensor in model.graph.inputs]
        self._makers = {name: n for n in model.graph.nodes for name in _outputs(n)}
        self._tensors: list[str] = [*inputs, *self._makers]
        self._numbers = {name: number for number, name in enumerate(self._tensors)}

    @staticmethod
    def originals(copy: Model) -> Originals:
        """The nodes of a copy that has no pairs yet."""
        return {node: _outputs(node) for node in copy.graph.nodes}

    def attach(self, copy: Model, originals: Originals) -> None:
        """Renames the nodes and tensors of a copy, in place; inputs keep their names.

        Args:
            copy: with pairs or without.
            originals: of the copy before it got pairs.
        """
        fed = set(copy.graph.inputs)
        numbers = {tensor: self._numbers[str(tensor.name)] for tensor in fed}
        for node, names in originals.items():
            made = [tensor for tensor in node.outputs if not tensor.is_empty()]
            numbers |= {t: self._numbers[name] for t, name in zip(made, names, strict=True)}
            if made:
                node.name = f"@n{numbers[made[0]]}."
        added = [node for node in copy.graph.nodes if node not in originals]
        converted: dict[Variable, tuple[int | None, int]] = {}
        for place, node in enumerate(added):
            node.name = f"@c{place}."
            converted |= {t: (_source(t, numbers), place) for t in node.outputs}
        for tensor, number in numbers.items():
            if tensor not in fed:
                tensor.name = f"@t{number}."
        for tensor, (source, place) in converted.items():
            if source is not None and tensor not in numbers:
                tensor.name = f"@t{source}.{place}"

    def tensors_of(self, node: onnx.NodeProto) -> list[str]:
        """The tensors of the model that a node of an optimized graph is called after, or makes.

        Of one that has only its input from the model, such as a change of layout, that input.
        """
        found = [self._tensor(name) for name in (node.name, *node.output)]
        known = [tensor for tensor in found if tensor is not None]
        source = self._tensor(node.input[0]) if node.input and not known else None
        return known if source is None else [source]

    def _tensor(self, name: str) -> str | None:
        if name in self._numbers:
            return name
        found = _LABEL.search(name)
        return None if found is None or found[1] == "c" else self._tensors[int(found[2])]

    def owner(self, tensor: str, fused: Mapping[str, str]) -> str | None:
        """What a tensor was fused into: itself, a layer in front, or None.

        A layer that is not called after its own tensor is called after one behind it: a convolution
        after its Relu. Other operators are fused into the last layer in front of them.
        """
        maker = self._makers.get(tensor)
        if tensor in fused or maker is None:
            return fused.get(tensor)
        if maker.op in WEIGHT_OPERATORS:
            return self._behind(maker, fused)
        operands = [str(t.name) for t in maker.inputs if isinstance(t, Variable)]
        nearest = max(operands, key=lambda name: self._numbers.get(name, -1), default="")
        return self.owner(nearest, fused)

    def _behind(self, node: Node, fused: Mapping[str, str]) -> str | None:
        """What the first named tensor behind a node was fused into, as long as all is a chain."""
        while len(takers := list(node.outputs[0].outputs)) == 1:
            (node,) = takers
            if node.op in WEIGHT_OPERATORS:
                break
            name = str(node.outputs[0].name)
            if name in fused:
                return fused[name]
        return None


def _outputs(node: Node) -> list[str]:
    return [str(tensor.name) for tensor in node.outputs if not tensor.is_empty()]


def _source(tensor: Variable, known: Mapping[Variable, int]) -> int | None:
    """The number of the tensor that new nodes in front have converted, or None."""
    while tensor not in known:
        maker = next(iter(tensor.inputs), None)
        if maker is None or not isinstance(maker.inputs[0], Variable):
            return None
        tensor = maker.inputs[0]
    return known[tensor]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of a model with pairs beside the float one, in nanoseconds a run.

    Attributes:
        sites: by key, of sites that ran on integers.
        conversions: by tensor around such a site, what converting it takes more than in float.
    """

    sites: Mapping[str, Estimate] = field(default_factory=dict)
    conversions: Mapping[str, float] = field(default_factory=dict)

    def of(self, sites: Sequence[Site]) -> tuple[Estimate, float]:
        """Times of some sites together, and what the conversions of their tensors take."""
        known = [self.sites[site.key] for site in sites]
        tensors = {str(t.name) for site in sites for t in (*site.inputs, *site.outputs)}
        together = Estimate(
            integer=sum(cost.integer for cost in known),
            floating=sum(cost.floating for cost in known),
        )
        return together, sum(self.conversions[name] for name in tensors)


@dataclass
class _Times:
    """Nanoseconds by tensor of the model.

    Attributes:
        made: of the node that is called after it.
        fused: tensors that the same node makes or stands for -> the one it is called after.
        converted: of its conversions.
    """

    made: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    fused: dict[str, str] = field(default_factory=dict)
    converted: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def _times(profiled: ProfiledGraph, labels: Labels) -> _Times:
    times = _Times()
    for node in profiled.graph.node:
        tensors = labels.tensors_of(node)
        if not tensors:
            continue
        if _is_conversion(node):
            times.converted[tensors[0]] += _NANOSECONDS * profiled.seconds.get(node.name, 0.0)
            continue
        times.made[tensors[0]] += _NANOSECONDS * profiled.seconds.get(node.name, 0.0)
        times.fused |= dict.fromkeys(tensors, tensors[0])
    return times


def _is_conversion(node: onnx.NodeProto) -> bool:
    found = _LABEL.search(node.name)
    if found is not None and found[1] == "c":
        return True
    return node.op_type in _LAYOUTS and (found is None or found[1] != "n")


def measured(
    found: Survey,
    chosen: Collection[str],
    labels: Labels,
    floating: ProfiledGraph,
    integer: ProfiledGraph,
) -> Measured:
    """What the chosen sites cost by the profiles of both models, nodes labelled.

    Args:
        found: the sites of the model before any edit.
        chosen: keys of those that have pairs in `integer`.
        labels: of the model.
        floating: the float model.
        integer: the model with pairs.
    """
    before, after = _times(floating, labels), _times(integer, labels)
    owned: dict[str, float] = defaultdict(float)
    for tensor, time in after.made.items():
        owner = labels.owner(tensor, before.fused)
        if owner is not None:
            owned[owner] += time
    sites, claimed = {}, set[str]()
    # What a layer and an Add behind it are fused into is the layer's.
    for site in sorted(found.sites, key=lambda site: site.weight is None):
        if site.key in chosen:
            found_in = (labels.owner(tensor, before.fused) for tensor in _made_by(site))
            owners = {owner for owner in found_in if owner is not None} - claimed
            claimed |= owners
            sites[site.key] = Estimate(
                integer=sum(owned.get(name, 0.0) for name in owners),
                floating=sum(before.made.get(name, 0.0) for name in owners),
            )
    conversions = {
        str(tensor.name): after.converted[str(tensor.name)] - before.converted[str(tensor.name)]
        for site in found.sites
        if site.key in chosen
        for tensor in (*site.inputs, *site.outputs)
    }
    return Measured(sites=sites, conversions=conversions)


def _made_by(site: Site) -> list[str]:
    """The tensors that the nodes of a site make."""
    nodes = [node for node in (site.pad, site.node, site.bias_add, site.clamp) if node is not None]
    return [str(tensor.name) for node in nodes for tensor in node.outputs]


def separate_islands(found: Survey, chosen: Collection[str]) -> list[list[Site]]:
    """The chosen sites in groups that no quantized tensor and no weight connects."""
    # Here, because the import takes time and memory that only this placement needs.
    from scipy.cluster.hierarchy import DisjointSet

    sites = [site for site in found.sites if site.key in chosen]
    groups = DisjointSet(sites)
    first: dict[object, Site] = {}
    for site in sites:
        made = site.outputs if site.integer_output else ()
        weight = () if site.weight is None else (site.weight,)
        for shared in (*site.inputs, *made, *weight):
            groups.merge(first.setdefault(shared, site), site)
    return [[site for site in sites if site in group] for group in groups.subsets()]

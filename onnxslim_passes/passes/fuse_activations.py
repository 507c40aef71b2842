"""`fuse-activations`: a HardSigmoid that an exporter has spelled out becomes one node.

    min(max(x + c, 0), m) / m  =  min(max(x / m + c / m, 0), 1)  =  HardSigmoid(x; 1 / m, c / m)

With c = 3 and m = 6, and multiplied by x, it is HardSwish (Howard et al., section 5.2). Exporters
write Add, Clip, Mul and Div, four passes over the tensor where two do. The factor x may come before
or after the division.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxslim_passes.model import Constant, Model, Node, Types, Variable
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options

_OPSET = 6  # the first HardSigmoid without legacy attributes


@dataclass(frozen=True)
class _Spelled:
    """The nodes of one spelled-out HardSigmoid.

    Attributes:
        addition: x + c.
        clip: between 0 and m.
        division: by m.
        factor: the Mul between clip and division, if there is one.
        data: x.
        shift: c.
        peak: m.
    """

    addition: Node
    clip: Node
    division: Node
    factor: Node | None
    data: Variable
    shift: float
    peak: float


@pass_options
class FuseActivations(Pass):
    """Activations that are spelled out in arithmetic become the operator they stand for."""

    name: ClassVar[str] = "fuse-activations"
    stage: ClassVar[Stage] = Stage.PREPARE
    summary: ClassVar[str] = "HardSwish and HardSigmoid of four nodes become two and one"
    references: ClassVar[tuple[str, ...]] = (
        "Howard et al. 2019, Searching for MobileNetV3, section 5.2, arXiv:1905.02244",
    )
    lossless: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> PassResult:
        """Replaces in all graphs; see `docs/passes/fuse-activations.md`."""
        outputs = {tensor for graph in model.graphs() for tensor in graph.outputs}
        clips = [n for n in model.nodes() if n.op == "Clip" and not n.domain and n.inputs]
        if not clips:
            return PassResult(changed=False, decisions=())
        types, decisions = model.types(), []
        for clip in clips:
            found = _spelled(clip, model, types)
            if isinstance(found, _Spelled) and _is_shared(found, outputs):
                found = "another node takes a value from between its nodes"
            if isinstance(found, str):
                decisions.append(Decision(where=clip.where, taken=False, reason=found))
            elif found is not None:
                decisions.append(_replace(model, found))
        changed = any(decision.taken for decision in decisions)
        if changed:
            model.remove_unused()
        return PassResult(changed=changed, decisions=tuple(decisions))


def _spelled(clip: Node, model: Model, types: Types) -> _Spelled | str | None:
    """What a Clip is part of; why that cannot be replaced; None if it is no candidate."""
    addition = clip.inputs[0].inputs[0] if clip.inputs[0].inputs else None
    if addition is None or addition.op != "Add" or addition.domain:
        return None
    bounds, sum_of = _bounds(clip), _with_number(addition)
    if bounds is None or sum_of is None or bounds[0] != 0 or bounds[1] <= 0:
        return None
    (data, shift), peak = sum_of, bounds[1]
    taker = _only_taker(clip.outputs[0])
    factor = taker if taker is not None and _is_product(taker) else None
    division = _only_taker(factor.outputs[0]) if factor is not None else taker
    if division is None or not _divides(division, peak):
        return None
    known = types.of(data)
    if known is None or not known.rank:
        return "the rank of what it takes is unknown or 0"
    if known.dtype != np.float32:
        return f"HardSigmoid of {known.dtype} has no kernel in ONNX Runtime"
    if model.opset < _OPSET:
        return f"HardSigmoid needs opset {_OPSET}"
    if any(node.graph is not clip.graph for node in (addition, division)):
        return "its nodes stand in different graphs"
    return _Spelled(addition, clip, division, factor, data, shift, peak)


def _number(tensor: Variable | Constant) -> float | None:
    """The value of a constant of one float; None for anything else."""
    if not isinstance(tensor, Constant) or tensor.input_info is not None:
        return None
    if tensor.dtype != np.float32 or tensor.shape not in ((), (1,)):
        return None
    return float(tensor.values.reshape(-1)[0])


def _with_number(node: Node) -> tuple[Variable, float] | None:
    """The computed operand and the constant number of a node of two."""
    for data, other in (node.inputs, node.inputs[::-1]):
        number = _number(other)
        if number is not None and not isinstance(data, Constant):
            return data, number
    return None


def _bounds(clip: Node) -> tuple[float, float] | None:
    """Least and largest value of a Clip, as attributes or, since opset 11, as inputs."""
    if len(clip.inputs) == 3:
        low, high = (_number(tensor) for tensor in clip.inputs[1:])
        return None if low is None or high is None else (low, high)
    if "min" in clip.attrs and "max" in clip.attrs:
        return float(clip.attr("min")), float(clip.attr("max"))
    return None


def _only_taker(tensor: Variable) -> Node | None:
    takers: list[Node] = list(tensor.outputs)
    return takers[0] if len(takers) == 1 and not takers[0].domain else None


def _is_product(node: Node) -> bool:
    """Whether it multiplies two computed tensors."""
    return node.op == "Mul" and not any(isinstance(t, Constant) for t in node.inputs)


def _divides(node: Node, peak: float) -> bool:
    """Whether it divides by `peak`, or multiplies by its reciprocal as float32 has it."""
    operands = _with_number(node) if node.op in ("Div", "Mul") else None
    if operands is None:
        return False
    data, number = operands
    if node.op == "Div":
        return node.inputs[0] is data and number == peak
    return bool(np.isclose(number * peak, 1.0, rtol=1e-6, atol=0))


def _is_shared(found: _Spelled, outputs: set[Variable]) -> bool:
    inner = [node for node in (found.addition, found.clip, found.factor) if node is not None]
    return any(n.outputs[0] in outputs or len(n.outputs[0].outputs) > 1 for n in inner)


def _replace(model: Model, found: _Spelled) -> Decision:
    graph = found.clip.graph
    where = (found.factor or found.division).where
    attrs = {"alpha": 1 / found.peak, "beta": found.shift / found.peak}
    gate = graph.add_node("HardSigmoid", [found.data], attrs=attrs).outputs[0]
    if found.factor is not None:
        clipped = found.clip.outputs[0]
        found.factor.inputs = [gate if t is clipped else t for t in found.factor.inputs]
        gate = found.factor.outputs[0]
    model.replace_uses(found.division.outputs[0], gate)
    graph.remove_node(found.division)
    return Decision(
        where=where,
        taken=True,
        reason="Add, Clip and Div became HardSigmoid",
        figures={"alpha": attrs["alpha"], "beta": attrs["beta"]},
    )

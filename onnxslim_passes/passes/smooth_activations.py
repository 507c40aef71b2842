"""`smooth-activations`: outlier channels of activations are evened out into the weights behind.

    Y = (X diag(s)^-1) (diag(s) W),    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

Xiao et al., section 4, with their letters. The division goes into what makes X, where that can
hold it: the scale and shift of a normalization, a linear layer. Else it is one Mul, which is worth
its time only in front of products whose rounding reaches the outputs: that is measured, by rounding
one activation at a time.

A convolution is smoothed where its data comes through a gate, as in squeeze-and-excitation: there a
factor takes one multiplication a channel (`gates`).

Where one or two channels stand out alone, as behind the GELU of BERT-like models, only they need a
factor, and every other one makes W coarser for nothing (Wei et al., section 4.2.2):

    s_j = max(1, max|X_j| / t).

No alpha and no t suits every X: by default each has those with the best estimate of

    sum_j E[X_j^2] |W_j|^2  /  (step_X^2 / 12 |W|^2 + sum_j E[X_j^2] sum_n step_n^2 / 12),

the power of Y to that of its rounding errors, X in one scale and W in one a column. Different
alphas lie on one curve of pairs (X, W), and so do different t, so that a second run finds nothing
left to do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from onnxslim_passes.calibration import ChannelStatistics, collect_statistics
from onnxslim_passes.errors import SamplesError
from onnxslim_passes.model import Constant, Model, Node, Types, Variable, Weight
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.channel_scales import (
    Sources,
    divide,
    input_axis,
    input_channel_peaks,
    multiply_inputs,
    sources,
)
from onnxslim_passes.passes.gates import Gate, divide_gate, gate_before
from onnxslim_passes.passes.rounding_effects import rounding_effects
from onnxslim_passes.passes.selection import Selection

Array = npt.NDArray[Any]

_ALPHAS = tuple(round(0.05 * number, 2) for number in range(4, 20))
_CUTS = tuple(2.0 ** (-number / 2) for number in range(1, 14))  # t as a share of the largest max|X|
_WIDEST = 2.0**12  # a factor beyond it would trouble float16 and helps nobody
_CODES = 255.0
_FEEDS = 32  # channels that stand out do so in every sample
_WEIGHT_CODES = 127.0
_SMOOTHED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class _Group:
    """One activation with all layers that take it as their data; convolutions behind a gate."""

    tensor: Variable
    nodes: tuple[Node, ...]
    gate: Gate | None = None

    @property
    def key(self) -> str:
        """The name of the activation."""
        return str(self.tensor.name)

    @property
    def where(self) -> str:
        """The first product, for messages."""
        return self.nodes[0].where


@dataclass(frozen=True)
class _Smoothing:
    """A choice of factors.

    Attributes:
        factors: s, float64 (C,), > 0.
        made_with: the alpha or the threshold t, by name.
        before_db: estimated SQNR of the products without them.
        after_db: the same with them.
    """

    factors: Array
    made_with: Mapping[str, float]
    before_db: float
    after_db: float


class _Estimate:
    """Estimated SQNR of the products of one activation, both operands in 8 bits.

    Args:
        known: the activation's channels.
        matrices: the weights, float32 (C, N).
    """

    def __init__(self, known: ChannelStatistics, matrices: Sequence[Array]) -> None:
        self._known = known
        self._magnitudes = [np.abs(matrix) for matrix in matrices]
        self._energies = [(matrix.astype(np.float64) ** 2).sum(axis=1) for matrix in matrices]

    def db(self, factors: Array) -> float:
        """Decibels with the factors s, float64 (C,), moved into the weights."""
        low, high = (self._known.min / factors).min(), (self._known.max / factors).max()
        step = (max(high, 0.0) - min(low, 0.0)) / _CODES
        power = self._known.second_moment / factors**2
        rows = factors.astype(np.float32)[:, None]
        signal = noise = 0.0
        for magnitudes, energies in zip(self._magnitudes, self._energies, strict=True):
            energy = energies * factors**2
            steps = (magnitudes * rows).max(axis=0).astype(np.float64) / _WEIGHT_CODES
            signal += float(power @ energy)
            noise += float(step**2 * energy.sum() + power.sum() * (steps**2).sum()) / 12
        return 10 * float(np.log10(signal / noise)) if signal > 0 and noise > 0 else float("inf")


@pass_options
class SmoothActivations(Selection, Pass):
    """Moves the scale of outlier channels from activations into the weights behind."""

    name: ClassVar[str] = "smooth-activations"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    summary: ClassVar[str] = "evens out channels of activations before quantizing (SmoothQuant)"
    references: ClassVar[tuple[str, ...]] = (
        "Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large "
        "Language Models, ICML 2023",
        "Wei et al., Outlier Suppression+: Accurate Quantization of Large Language Models by "
        "Equivalent and Effective Shifting and Scaling, EMNLP 2023",
    )
    lossless: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = True

    alpha: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="share of the spread that weights take over; none: for each activation "
            "the best by an estimate, that of its largest channels alone included",
        ),
    ] = None
    min_gain_db: Annotated[
        float, Field(gt=0, description="least estimated gain of SQNR that is worth a change")
    ] = 1.0
    insert_below_db: Annotated[
        float,
        Field(
            description="an activation that no layer in front can scale gets a Mul if the outputs' "
            "SQNR, with it alone in 8 bits, is lower"
        ),
    ] = 40.0

    def apply(self, model: Model, context: Context) -> PassResult:
        """Scales constants in place; see `docs/passes/smooth-activations.md`."""
        self.check(model)
        groups, decisions = self._groups(model)
        if groups and context.samples is None:
            raise SamplesError(
                "smooth-activations needs calibration samples to find outlier channels; give "
                "--calibration DATA."
            )
        known: dict[str, ChannelStatistics] = {}
        if groups and context.samples is not None:
            tensors = [group.tensor for group in groups]
            known = collect_statistics(
                model,
                tensors,
                context.samples,
                axis={group.key: 1 if group.gate else -1 for group in groups},
                progress=context.progress,
                strict=False,
                most=_FEEDS,
            )
        effects = self._effects(model, groups, known, context)
        for group in groups:
            decided = self._smooth(model, group, known.get(group.key), effects)
            decisions.extend(replace(decided, where=node.where) for node in group.nodes)
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed=changed, decisions=tuple(decisions))

    # ---- candidates

    def _groups(self, model: Model) -> tuple[list[_Group], list[Decision]]:
        """Products by activation, and why others are passed over."""
        types = model.types()
        weights = {weight.constant: weight for weight in model.weights()}
        takers: dict[Variable, list[Node]] = {}
        decisions = []
        for weight in weights.values():
            reason = self._refusal(model, weight, types)
            if reason is not None:
                if weight.role in ("weight", "recurrent"):
                    decisions.append(Decision(where=weight.where, taken=False, reason=reason))
                continue
            for node in weight.nodes:
                takers.setdefault(node.inputs[0], []).append(node)
        groups = [
            _Group(tensor, tuple(nodes), _gate(model, nodes[0], types))
            for tensor, nodes in takers.items()
        ]
        # From the back: a product's weight is also what the activations behind it are made by, and
        # its largest rows are known once those have taken their part.
        order = {node: number for number, node in enumerate(model.graph.nodes)}
        groups.sort(key=lambda group: order[group.nodes[0]], reverse=True)
        return groups, decisions

    def _refusal(self, model: Model, weight: Weight, types: Types) -> str | None:
        verdict = self.verdict(weight)
        if verdict is not None:
            return verdict.reason
        for use in weight.uses:
            node = use.node
            if node.op not in _SMOOTHED or use.input_index != 1 or not use.direct:
                return f"it is taken by {node.op} {node.where}; MatMul and Gemm are smoothed"
            if node.graph is not model.graph:
                return "it is used in a body or function, where activations are not calibrated"
            if node.op == "Conv" and _gate(model, node, types) is None:
                return (
                    "of convolutions, those without groups behind a gate of their own are smoothed"
                )
            if not isinstance(node.inputs[0], Variable):
                return f"both operands of {node.where} are constant"
            if node.op == "Gemm" and node.attr("transA", 0):
                return f"the data of {node.where} is transposed"
            data = types.of(node.inputs[0])
            if data is None or data.rank is None:
                return f"the number of axes of {node.inputs[0].name!r} is not known"
        constant = weight.constant
        flat = len(constant.shape) == 2 or weight.nodes[0].op == "Conv"
        if not flat or constant.size == 0 or constant.dtype != np.float32:
            return (
                f"it is {constant.dtype.name} of shape {constant.shape}; a float32 matrix is needed"
            )
        if constant.input_info is not None:
            return "it is also an input of the model, which a caller may override"
        if len({node.inputs[0] for node in weight.nodes}) > 1:
            return "several activations meet it, which would need one scale"
        return None if np.isfinite(constant.values).all() else "it holds NaN or infinity"

    # ---- one activation

    def _effects(
        self,
        model: Model,
        groups: Sequence[_Group],
        known: Mapping[str, ChannelStatistics],
        context: Context,
    ) -> dict[str, float]:
        """The outputs' SQNR with one activation in 8 bits, of those that would need a Mul."""
        asked = [
            group.key
            for group in groups
            if _is_usable(known.get(group.key))
            and group.gate is None
            and isinstance(_absorbers(model, group), str)
            and self._gains(self._best(group, known[group.key]))
        ]
        if not asked or context.samples is None:
            return {}
        return rounding_effects(model, asked, context.samples, progress=context.progress)

    def _smooth(
        self,
        model: Model,
        group: _Group,
        known: ChannelStatistics | None,
        effects: Mapping[str, float],
    ) -> Decision:
        if known is None or not _is_usable(known):
            reason = "its activation held NaN or infinity, or nothing, on the samples"
            return Decision(where=group.where, taken=False, reason=reason)
        best = self._best(group, known)
        figures: dict[str, int | float | str] = {
            **best.made_with,
            "channels": int((best.factors > 1).sum()),
            "estimated_before_db": round(best.before_db, 2),
            "estimated_after_db": round(best.after_db, 2),
        }
        if group.key in effects:
            figures["output_db"] = round(effects[group.key], 2)
        objection = self._pass_over(model, group, best, effects)
        if objection is not None:
            return Decision(where=group.where, taken=False, reason=objection, figures=figures)
        told = _move(model, group, best.factors)
        return Decision(where=group.where, taken=True, reason=told, figures=figures)

    def _gains(self, best: _Smoothing) -> bool:
        return best.after_db - best.before_db >= self.min_gain_db

    def _best(self, group: _Group, known: ChannelStatistics) -> _Smoothing:
        estimate = _Estimate(known, [_matrix(node) for node in group.nodes])
        before = estimate.db(np.ones(len(known.absmax)))
        peaks = np.max([input_channel_peaks(node) for node in group.nodes], axis=0)
        alphas = _ALPHAS if self.alpha is None else (self.alpha,)
        choices = [("alpha", alpha, _factors(known.absmax, peaks, alpha)) for alpha in alphas]
        if self.alpha is None:
            largest = float(known.absmax.max(initial=0.0))
            choices += [("threshold", t, _cut(known.absmax, t)) for t in _thresholds(largest)]
        smoothings = [
            _Smoothing(factors, {kind: value}, before, estimate.db(factors))
            for kind, value, factors in choices
        ]
        return max(smoothings, key=lambda choice: choice.after_db)

    def _pass_over(
        self, model: Model, group: _Group, best: _Smoothing, effects: Mapping[str, float]
    ) -> str | None:
        """Why an activation stays as it is, or None."""
        if not self._gains(best):
            return f"its channels are even: less than min_gain_db={self.min_gain_db:g} to gain"
        if group.gate is not None:
            others = [node for node in group.tensor.outputs if node not in group.nodes]
            return f"{others[0].where} takes the activation as it is" if others else None
        found = _absorbers(model, group)
        effect = effects.get(group.key, float("inf"))
        if isinstance(found, str) and effect >= self.insert_below_db:
            return (
                f"{found}, and a Mul is not worth its time: in 8 bits it alone leaves the outputs "
                f"{effect:.1f} dB (insert_below_db={self.insert_below_db:g})"
            )
        return None


def _is_usable(known: ChannelStatistics | None) -> bool:
    """Whether an activation held finite values on the samples."""
    return known is not None and known.seen > 0


def _matrix(node: Node) -> Array:
    """A layer's weight as (inputs, outputs); each place of a kernel counts as an output."""
    values = node.inputs[1].values
    if node.op == "Conv":
        return np.asarray(np.swapaxes(values, 0, 1).reshape(values.shape[1], -1))
    return np.asarray(values.T if input_axis(node) else values)


def _factors(absmax: Array, peaks: Array, alpha: float) -> Array:
    """S of section 4, scaled to a geometric mean of 1; 1 where a channel or its weights are 0."""
    alive = (absmax > 0) & (peaks > 0)
    logs = np.zeros(len(peaks))
    logs[alive] = alpha * np.log(absmax[alive]) - (1 - alpha) * np.log(peaks[alive])
    if alive.any():
        logs[alive] -= logs[alive].mean()
    return np.asarray(np.exp(np.clip(logs, -np.log(_WIDEST), np.log(_WIDEST))))


def _thresholds(largest: float) -> tuple[float, ...]:
    """Values of t to try, for the largest max|X|."""
    return tuple(largest * cut for cut in _CUTS) if largest > 0 else ()


def _cut(absmax: Array, threshold: float) -> Array:
    """Factors that bring the channels above a threshold down to it and leave all others alone."""
    return np.asarray(np.clip(absmax.astype(np.float64) / threshold, 1.0, _WIDEST))


def _gate(model: Model, node: Node, types: Types) -> Gate | None:
    """The gate in front of a convolution, if undivided convolutions alone take what it makes."""
    tensor = node.inputs[0]
    if node.op != "Conv" or not isinstance(tensor, Variable) or tensor in model.graph.outputs:
        return None
    fit = all(
        taker.op == "Conv"
        and not taker.domain
        and taker.graph is model.graph
        and taker.inputs[0] is tensor
        and taker.attr("group", 1) == 1
        and isinstance(taker.inputs[1], Constant)
        for taker in tensor.outputs
    )
    return gate_before(model, tensor, types) if fit else None


# ---------------- edits


def _absorbers(model: Model, group: _Group) -> Sources | str:
    """What can hold the division of an activation, or why a Mul is needed."""
    others = [node for node in dict.fromkeys(group.tensor.outputs) if node not in group.nodes]
    if others:
        return f"{others[0].where} takes the activation as it is"
    if group.tensor in model.graph.outputs:
        return "the activation is an output of the model"
    if any(node.inputs.count(group.tensor) > 1 for node in group.nodes):
        return "a product takes the activation twice"
    return sources(model, group.tensor, channels=len(_matrix(group.nodes[0])), last=True)


def _move(model: Model, group: _Group, factors: Array) -> str:
    """Divides the activation and multiplies the weights; returns what was done."""
    found = group.gate or _absorbers(model, group)
    if isinstance(found, Gate):
        divide_gate(model, found, factors)
        told = f"its outlier channels moved from the gate of {found.node.where} into weights"
    elif isinstance(found, Sources):
        for place in found.places:
            divide(model, place, factors)
        told = f"its outlier channels moved from {found.maker.op} {found.maker.where} into weights"
    else:
        _insert(model, group, factors)
        told = f"its outlier channels moved into weights by a Mul, because {found}"
    for constant in dict.fromkeys(node.inputs[1] for node in group.nodes):
        _multiply_shared(model, constant, group.nodes, factors)
    return told


def _insert(model: Model, group: _Group, factors: Array) -> None:
    graph, hint = model.graph, group.tensor.name
    held = graph.add_constant(f"{hint}_smoothing", (1 / factors).astype(np.float32))
    made = graph.add_node("Mul", [group.tensor, held], outputs=[f"{hint}_smoothed"])
    for node in group.nodes:
        node.inputs[0] = made.outputs[0]


def _multiply_shared(
    model: Model, constant: Constant, nodes: Sequence[Node], factors: Array
) -> None:
    """Scales a weight once for all products of the group that share it."""
    users = [node for node in nodes if node.inputs[1] is constant]
    multiply_inputs(model, users[0], factors)
    for node in users[1:]:
        node.inputs[1] = users[0].inputs[1]
    model.remove_unused()

"""`equalize-channels`: cross-layer equalization, the ranges of channels evened out between layers.

    W(1)_i / s_i,  b(1)_i / s_i,  W(2)_,i s_i,    s_i = sqrt(r(1)_i / r(2)_i)

Nagel et al., section 4.1, with their letters: r(1)_i is the largest magnitude of output channel i
of the first layer, r(2)_i that of input channel i of the second one. After it both are
sqrt(r(1)_i r(2)_i), which maximizes sum_i p(1)_i p(2)_i, p_i = r_i / max r the share of a tensor's
range that a channel uses. Between the layers stands what f(x / s) = f(x) / s holds for. Layers in a
row depend on each other, so that the pairs take turns until none moves.

Where a channel's bias takes a larger share of all biases than its weights of all weights, r(1)_i is
that share of max r(1). Channels that training left with weights near 0 still have a bias, which
would otherwise grow a thousandfold and with it the range of the activation; the paper moves such
biases into the next layer (section 4.1.3), which changes the outputs where ReLU cuts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from onnxslim_passes.model import Model, Node, Variable, Weight
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.channel_scales import (
    LAYERS,
    Sources,
    channel_peaks,
    divide,
    multiply_inputs,
    sources,
    unfit_layer,
)
from onnxslim_passes.passes.selection import Selection

Array = npt.NDArray[Any]

_WIDEST = 2.0**12  # a factor beyond it would trouble float16 and helps nobody
_SWEEPS = 200
_SETTLED = 1.002  # the pairs have found their factors when none moves more than that


@dataclass(frozen=True, eq=False)
class _Pair:
    """A layer and those behind it that take its channels.

    Attributes:
        found: what is divided; the layer in front is its maker.
        takers: the layers behind.
    """

    found: Sources
    takers: tuple[Node, ...]

    @property
    def maker(self) -> Node:
        """The layer in front."""
        return self.found.maker


@pass_options
class EqualizeChannels(Selection, Pass):
    """Moves scales between consecutive layers until their channels have like ranges."""

    name: ClassVar[str] = "equalize-channels"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    summary: ClassVar[str] = "evens out channels of weights for scales per tensor; needs no samples"
    references: ClassVar[tuple[str, ...]] = (
        "Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, "
        "ICCV 2019, section 4.1",
    )
    lossless: ClassVar[bool] = True

    min_factor: Annotated[
        float,
        Field(
            gt=1,
            description="pairs of layers whose channels differ by less than this factor are left",
        ),
    ] = 1.1

    def apply(self, model: Model, context: Context) -> PassResult:
        """Scales constants in place; see `docs/passes/equalize-channels.md`."""
        self.check(model)
        pairs, decisions = self._pairs(model)
        balance = _Balance(pairs)
        balance.settle()
        for pair in pairs:
            decided = self._move(model, pair, balance)
            decisions.extend(replace(decided, where=node.where) for node in pair.takers)
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed=changed, decisions=tuple(decisions))

    # ---- candidates

    def _pairs(self, model: Model) -> tuple[list[_Pair], list[Decision]]:
        """Pairs of layers in the order of the graph, and why other layers are in none."""
        refused: dict[Node, str] = {}
        takers: dict[Variable, list[Node]] = {}
        decisions: list[Decision] = []
        for weight in model.weights():
            if weight.role not in ("weight", "recurrent"):
                continue
            reason = self._objection_to(model, weight)
            for node in weight.nodes:
                if reason is not None:
                    refused[node] = reason
                elif node.graph is model.graph:
                    takers.setdefault(node.inputs[0], []).append(node)
            if reason is not None:
                decisions.append(Decision(where=weight.where, taken=False, reason=reason))
        pairs = []
        for tensor, nodes in takers.items():
            found = _sources(model, tensor, nodes, refused)
            if isinstance(found, Sources):
                pairs.append(_Pair(found, tuple(nodes)))
            else:
                decisions += [Decision(where=n.where, taken=False, reason=found) for n in nodes]
        order = {node: number for number, node in enumerate(model.graph.nodes)}
        return sorted(pairs, key=lambda pair: order[pair.takers[0]]), decisions

    def _objection_to(self, model: Model, weight: Weight) -> str | None:
        """Why a weight is not to be scaled, on either side, or None."""
        verdict = self.verdict(weight)
        if verdict is not None:
            return verdict.reason
        if len(weight.uses) > 1 or weight.constant in weight.graph.outputs:
            return "it is shared, so that a factor would make a second copy of it"
        (use,) = weight.uses
        if use.node.op not in LAYERS or use.input_index != 1 or not use.direct:
            return f"it is taken by {use.node.op} {use.node.where}, whose channels are not scaled"
        if use.node.graph is not model.graph:
            return "it stands in a body or function; layers of the main graph are equalized"
        return unfit_layer(use.node)

    # ---- edits

    def _move(self, model: Model, pair: _Pair, balance: "_Balance") -> Decision:
        """Divides in front and multiplies behind, unless the channels are even."""
        factors = balance.factors(pair)
        before, after = balance.shares(pair)
        figures = {"share_before": round(before, 4), "share_after": round(after, 4)}
        where = pair.takers[0].where
        spread = float(factors.max() / factors.min())
        if spread < self.min_factor:
            reason = f"its channels are even: factors within {spread:.3g} of each other"
            return Decision(where=where, taken=False, reason=reason, figures=figures)
        for place in pair.found.places:
            divide(model, place, factors)
        for node in pair.takers:
            multiply_inputs(model, node, factors)
        moved = int((factors != 1).sum())
        reason = f"scales of {moved} channels moved from {pair.maker.op} {pair.maker.where}"
        figures["largest_factor"] = round(float(max(factors.max(), 1 / factors.min())), 3)
        return Decision(where=where, taken=True, reason=reason, figures=figures)


def _sources(
    model: Model, tensor: Variable, nodes: Sequence[Node], refused: Mapping[Node, str]
) -> Sources | str:
    """What can be divided in front of the layers that take a tensor, or why nothing can."""
    others = [node for node in dict.fromkeys(tensor.outputs) if node not in nodes]
    if others:
        reason = refused.get(others[0])
        because = f" ({reason})" if reason else ""
        return f"{others[0].where} takes its input as it is{because}"
    if tensor in model.graph.outputs:
        return "its input is an output of the model"
    if any(node.inputs.count(tensor) > 1 for node in nodes):
        return "it takes its input twice"
    kinds = {(node.op in ("Gemm", "MatMul"), _input_channels(node)) for node in nodes}
    if len(kinds) > 1:
        return "layers that take the same input see its channels differently"
    ((last, channels),) = kinds
    found = sources(model, tensor, channels=channels, last=last)
    if isinstance(found, str):
        return found
    maker = found.maker
    if maker.op not in LAYERS:
        return f"its input is made by {maker.op} {maker.where}, not by a layer with weights"
    if maker in refused:
        return f"{maker.op} {maker.where} in front is left: {refused[maker]}"
    return found


def _input_channels(node: Node) -> int:
    peaks = channel_peaks(node)
    return int(peaks.shape[0] * peaks.shape[2])


# ---------------- the factors


class _Balance:
    """The factors of all pairs, found on the largest magnitudes of weights alone.

    A layer's weight is W[g, o, i] exp(out[g, o] + inp[g, i]), for groups g: what the pair behind it
    took away, and what the pair in front of it brought.
    """

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        self._pairs = pairs
        nodes = dict.fromkeys(node for pair in pairs for node in (pair.maker, *pair.takers))
        self._peaks = {node: channel_peaks(node) for node in nodes}
        self._biases = {pair.maker: self._bias(pair) for pair in pairs}
        self._out = {node: np.zeros(peaks.shape[:2]) for node, peaks in self._peaks.items()}
        self._in = {node: np.zeros(peaks.shape[::2]) for node, peaks in self._peaks.items()}
        self._total = {pair: np.zeros(self._in[pair.takers[0]].size) for pair in pairs}
        self._before = {pair: self._share(pair) for pair in pairs}

    def settle(self) -> None:
        """Lets the pairs take turns until none moves."""
        limit = np.log(_WIDEST)
        for _ in range(_SWEEPS):
            largest = 0.0
            for pair in self._pairs:
                step = _step(*self._ranges(pair))
                step = np.clip(self._total[pair] + step, -limit, limit) - self._total[pair]
                largest = max(largest, float(np.abs(step).max(initial=0)))
                self._total[pair] += step
                self._out[pair.maker] -= step.reshape(self._out[pair.maker].shape)
                for node in pair.takers:
                    self._in[node] += step.reshape(self._in[node].shape)
            if largest < np.log(_SETTLED):
                return

    def factors(self, pair: _Pair) -> Array:
        """The s of a pair, float64 (C,), > 0."""
        return np.asarray(np.exp(self._total[pair]))

    def shares(self, pair: _Pair) -> tuple[float, float]:
        """The mean p_i of that layer of a pair where it is less, without and with the factors."""
        return self._before[pair], self._share(pair)

    def _bias(self, pair: _Pair) -> Array:
        """Magnitudes of the maker's biases, float64 (groups, outputs / groups)."""
        shape = self._peaks[pair.maker].shape[:2]
        bias = np.zeros(int(np.prod(shape)))
        for place in pair.found.places[:-1]:
            bias = bias + place.constant.values.astype(np.float64).reshape(-1)
        return np.asarray(np.abs(bias).reshape(shape))

    def _share(self, pair: _Pair) -> float:
        return min(float(r.mean() / r.max()) if r.any() else 1.0 for r in self._ranges(pair))

    def _ranges(self, pair: _Pair) -> tuple[Array, Array]:
        """r(1) and r(2), float64 (C,)."""
        first = self._scaled(pair.maker).max(axis=2)
        bias = self._biases[pair.maker] * np.exp(self._out[pair.maker])
        if bias.any():
            first = np.maximum(first, bias * (first.max() / bias.max()))
        second = [self._scaled(node).max(axis=1).reshape(-1) for node in pair.takers]
        return first.reshape(-1), np.max(second, axis=0)

    def _scaled(self, node: Node) -> Array:
        out, inp = np.exp(self._out[node]), np.exp(self._in[node])
        return np.asarray(self._peaks[node] * out[:, :, None] * inp[:, None, :])


def _step(first: Array, second: Array) -> Array:
    """Log s of geometric mean 1; 0 for a channel that is dead on one side."""
    logs = np.zeros(len(first))
    alive = (first > 0) & (second > 0)
    logs[alive] = (np.log(first[alive]) - np.log(second[alive])) / 2
    if alive.any():
        logs[alive] -= logs[alive].mean()
    return logs

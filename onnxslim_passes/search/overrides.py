"""Which options leave a layer alone, from what the passes said they did to it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from onnxslim_passes.evaluation.layers import LayerError
from onnxslim_passes.passes.base import Pass, Stage
from onnxslim_passes.passes.placement import find_target, takes_wide
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.quantize_weights import QuantizeWeights, WeightOverride
from onnxslim_passes.passes.selection import Selection
from onnxslim_passes.passes.static_schemes import StaticOverride
from onnxslim_passes.report.records import Decision

__all__ = ["Override", "Way", "leave_out", "touched", "widen"]

_WIDE_WEIGHT_BITS = 8

# Stages whose passes change values, so that leaving a layer out brings its own values back.
_LOSSY = (Stage.PRUNE, Stage.TRANSFORM, Stage.CLUSTER, Stage.QUANTIZE)


@dataclass(frozen=True)
class Override:
    """Passes that leave some layers alone.

    Attributes:
        passes: all of them, in order.
        changed: those among them that have other options now.
        labels: nodes and weights that are left alone, by the names that the passes gave them.
    """

    passes: tuple[Pass, ...]
    changed: tuple[Pass, ...]
    labels: tuple[str, ...]


Way = Callable[[Sequence[Pass], Iterable[tuple[str, Decision]], Iterable[LayerError]], "Override"]
"""How layers are spared: `leave_out`, or `widen` for a target."""


def widen(
    passes: Sequence[Pass],
    decisions: Iterable[tuple[str, Decision]],
    layers: Iterable[LayerError],
    *,
    target: str,
) -> Override:
    """Gives layers more bits where a pass took some: less is lost than by leaving them out.

    Activations get 16 bits from `quantize-static`, where the target computes with them (no CPU
    does); weights get 8 bits from `quantize-weights`.

    Args:
        passes: of a pipeline.
        decisions: what they said in a run, each with the name of its pass.
        layers: to widen.
        target: the runtime that the result is meant for.
    """

    def widened(pass_: Pass, mine: Sequence[str]) -> Pass:
        if isinstance(pass_, QuantizeWeights) and pass_.bits < _WIDE_WEIGHT_BITS:
            weights = tuple(WeightOverride(nodes=name, bits=_WIDE_WEIGHT_BITS) for name in mine)
            return dataclasses.replace(pass_, overrides=(*weights, *pass_.overrides))
        if isinstance(pass_, QuantizeStatic) and takes_wide(find_target(target)):
            signed = str(pass_.for_target(target).activations).startswith("int")
            kind: Literal["int16", "uint16"] = "int16" if signed else "uint16"
            nodes = tuple(StaticOverride(nodes=name, activations=kind) for name in mine)
            return dataclasses.replace(pass_, overrides=(*nodes, *pass_.overrides))
        return pass_

    return _changed(passes, decisions, layers, widened)


def leave_out(
    passes: Sequence[Pass],
    decisions: Iterable[tuple[str, Decision]],
    layers: Iterable[LayerError],
) -> Override:
    """Excludes layers from all passes that changed them.

    Args:
        passes: of a pipeline.
        decisions: what they said in a run, each with the name of its pass.
        layers: to leave alone.
    """

    def without(pass_: Pass, mine: Sequence[str]) -> Pass:
        if not isinstance(pass_, Selection) or pass_.stage not in _LOSSY:
            return pass_
        exclude = tuple(dict.fromkeys((*pass_.exclude, *mine)))
        return dataclasses.replace(pass_, exclude=exclude)

    return _changed(passes, decisions, layers, without)


def _changed(
    passes: Sequence[Pass],
    decisions: Iterable[tuple[str, Decision]],
    layers: Iterable[LayerError],
    change: Callable[[Pass, Sequence[str]], Pass],
) -> Override:
    """What becomes of the passes that did something to some layers."""
    wanted = {label for layer in layers for label in (*layer.nodes, *layer.weights)}
    taken = [
        (name, decision.where)
        for name, decision in decisions
        if decision.taken and decision.where in wanted
    ]
    result, changed, labels = [], [], []
    for pass_ in passes:
        mine = list(dict.fromkeys(where for name, where in taken if name == pass_.name))
        other = change(pass_, mine) if mine else pass_
        if other is not pass_:
            labels += mine
            changed.append(other)
        result.append(other)
    return Override(tuple(result), tuple(changed), tuple(dict.fromkeys(labels)))


def touched(
    passes: Sequence[Pass],
    decisions: Iterable[tuple[str, Decision]],
    layers: Iterable[LayerError],
    way: Way = leave_out,
) -> list[LayerError]:
    """The layers that a way has a hold on."""
    kept = list(decisions)
    return [layer for layer in layers if way(passes, kept, [layer]).labels]

"""Which options leave a layer alone, from what the passes said they did to it."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxslim_passes.evaluation.layers import LayerError
from onnxslim_passes.passes.base import Pass, Stage
from onnxslim_passes.passes.selection import Selection
from onnxslim_passes.report.records import Decision

__all__ = ["Override", "leave_out", "touched"]

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
    wanted = {label for layer in layers for label in (*layer.nodes, *layer.weights)}
    taken = [
        (name, decision.where)
        for name, decision in decisions
        if decision.taken and decision.where in wanted
    ]
    result, changed, labels = [], [], []
    for pass_ in passes:
        mine = list(dict.fromkeys(where for name, where in taken if name == pass_.name))
        if mine and isinstance(pass_, Selection) and pass_.stage in _LOSSY:
            labels += mine
            exclude = tuple(dict.fromkeys((*pass_.exclude, *mine)))
            pass_ = dataclasses.replace(pass_, exclude=exclude)
            changed.append(pass_)
        result.append(pass_)
    return Override(tuple(result), tuple(changed), tuple(dict.fromkeys(labels)))


def touched(
    passes: Sequence[Pass],
    decisions: Iterable[tuple[str, Decision]],
    layers: Iterable[LayerError],
) -> list[LayerError]:
    """The layers that `leave_out` has a hold on."""
    kept = list(decisions)
    return [layer for layer in layers if leave_out(passes, kept, [layer]).labels]

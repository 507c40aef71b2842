"""Short names for a stored model, and who had which: part of `store-weights`."""

from collections.abc import Iterable
from dataclasses import replace

from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.model import Model, shorten
from onnxslim_passes.passes.base import Decision
from onnxslim_passes.report.records import SHORT_NAME
from onnxslim_passes.storage.folding import folded, operators


def shortened(model: Model, decisions: Iterable[Decision]) -> list[Decision]:
    """The decisions with the names that weights of the main graph are given, and that on names."""
    made = (tensor for node in model.graph.nodes for tensor in node.outputs)
    tensors = {tensor.name: tensor for tensor in (*model.graph.initializers, *made)}
    on_names = _shorten(model)
    told = []
    for decision in decisions:
        tensor = tensors.get(decision.where)
        if tensor is not None and tensor.name != decision.where:
            decision = replace(decision, figures={**decision.figures, SHORT_NAME: tensor.name})
        told.append(decision)
    return [*told, on_names]


def _shorten(model: Model) -> Decision:
    """Shortens names and drops notes, if ONNX Runtime makes the same of the model without."""
    before = model.nbytes()
    for declarations in (True, False):
        trial = model.copy()
        done = shorten(trial, declarations=declarations)
        same = done.changed and _is_same(trial, model)
        if same or not done.changed:
            break
    if same:
        shorten(model, declarations=declarations)
        reason = "names of inner tensors shortened; notes and declarations nobody needs removed"
        if not declarations:
            reason = "names of inner tensors shortened; declarations stay: ONNX Runtime needs them"
    elif done.changed:
        reason = "names and declarations stay: without, ONNX Runtime would run another graph"
    else:
        reason = "names are short, and there are no notes"
    figures = {
        "names": done.names,
        "notes": done.notes,
        "before_bytes": before,
        "after_bytes": model.nbytes(),
    }
    return Decision(where="the whole file", taken=same, reason=reason, figures=figures)


def _is_same(trial: Model, model: Model) -> bool:
    """Whether folding gives the same graph, and fusing, which looks at declared shapes, too."""
    try:
        return folded(trial).same_as(folded(model)) and operators(trial) == operators(model)
    except RuntimeRefusedError:
        return False

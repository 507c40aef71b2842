"""What each pass could do to a model, found in seconds and without samples.

A pass that changes no output is tried on a copy. Of any other pass the candidates are counted: the
weights that its selection would take.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

from onnxslim_passes.errors import OnnxSlimError
from onnxslim_passes.model import Model
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Context, Decision, Pass, Stage
from onnxslim_passes.passes.selection import Selection

__all__ = ["Potential", "potentials"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Potential:
    """What one pass could do with its default options.

    Attributes:
        name: of the pass.
        could: in words, e.g. ``"change 12 of 40 weights"`` or ``"nothing"``.
        bytes: of the weights it would touch; 0 where that says nothing.
        note: the commonest reason why candidates are passed over, or what the pass needs.
    """

    name: str
    could: str
    bytes: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def potentials(model: Model) -> Iterator[Potential]:
    """One for each pass, by stage."""
    for kind in sorted(PASSES.values(), key=lambda kind: kind.stage):
        yield _potential(kind(), model)


def _potential(pass_: Pass, model: Model) -> Potential:
    try:
        pass_.requires(model)
        if pass_.lossless and pass_.stage is Stage.PREPARE:
            return _tried(pass_, model.copy())
    except OnnxSlimError as error:
        return Potential(name=pass_.name, could="not this model", note=str(error))
    if isinstance(pass_, Selection):
        return _counted(pass_, pass_.name, model)
    return Potential(name=pass_.name, could="decided when it runs", note=pass_.summary)


def _tried(pass_: Pass, model: Model) -> Potential:
    decisions = pass_.apply(model, Context(reference=model)).decisions
    taken = sum(decision.taken for decision in decisions)
    if not decisions:
        return Potential(name=pass_.name, could="nothing", note="no candidates")
    could = f"change {taken} of {len(decisions)} candidates" if taken else "nothing"
    return Potential(name=pass_.name, could=could, note=_commonest(decisions))


def _counted(selection: Selection, name: str, model: Model) -> Potential:
    weights = model.weights()
    verdicts = [(weight, selection.verdict(weight)) for weight in weights]
    chosen = [weight for weight, verdict in verdicts if verdict is None]
    passed_over = [verdict for _, verdict in verdicts if verdict is not None]
    could = f"change {len(chosen)} of {len(weights)} weights" if chosen else "nothing"
    needs = "needs --calibration" if PASSES[name].needs_samples else ""
    note = "; ".join(part for part in (needs, _commonest(passed_over)) if part)
    touched = sum(weight.nbytes for weight in chosen)
    return Potential(name=name, could=could, bytes=touched, note=note)


def _commonest(decisions: Iterator[Decision] | list[Decision] | tuple[Decision, ...]) -> str:
    reasons = collections.Counter(item.reason for item in decisions if not item.taken)
    if not reasons:
        return ""
    reason, count = reasons.most_common(1)[0]
    return f"{count} passed over: {reason}"

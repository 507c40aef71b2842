"""What each pass could do to a model, found in seconds and without samples.

A pass that can say so itself (`Pass.preview`) is asked; any other one that needs no samples is
tried on a copy.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from onnxslim_passes.cli.common import needed_data
from onnxslim_passes.errors import OnnxSlimError
from onnxslim_passes.model import Model
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Context, Decision, Pass

__all__ = ["Potential", "potentials"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Potential:
    """What one pass could do with its default options.

    Attributes:
        name: of the pass.
        stage: of the pass.
        candidates: how many it would change.
        looked_at: how many it would decide on.
        bytes_after: size of the model after it, if it was tried; None if it was only asked.
        note: why it cannot work, what it needs, or the commonest reason for passing over.
    """

    name: str
    stage: str
    candidates: int = 0
    looked_at: int = 0
    bytes_after: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def potentials(model: Model) -> Iterator[Potential]:
    """One for each pass, by stage."""
    for kind in sorted(PASSES.values(), key=lambda kind: kind.stage):
        yield _potential(kind(), model)


def _potential(pass_: Pass, model: Model) -> Potential:
    named = Potential(name=pass_.name, stage=pass_.stage.name.lower())
    size = None
    try:
        pass_.requires(model)
        decisions = pass_.preview(model)
        if decisions is None and not needed_data(pass_):
            work = model.copy()
            decisions = pass_.apply(work, Context(reference=model)).decisions
            size = work.nbytes()
    except OnnxSlimError as error:
        return dataclasses.replace(named, note=f"cannot: {error}")
    if decisions is None:
        return dataclasses.replace(named, note=f"needs {needed_data(pass_)} to tell")
    notes = [f"needs {needed_data(pass_)}"] if needed_data(pass_) else []
    return dataclasses.replace(
        named,
        candidates=sum(decision.taken for decision in decisions),
        looked_at=len(decisions),
        bytes_after=size,
        note="; ".join([*notes, *_commonest(decisions)]),
    )


def _commonest(decisions: Sequence[Decision]) -> Iterator[str]:
    """The commonest reason for passing over, if there is one."""
    reasons = collections.Counter(item.reason for item in decisions if not item.taken)
    for reason, count in reasons.most_common(1):
        yield f"{count} passed over: {reason}"

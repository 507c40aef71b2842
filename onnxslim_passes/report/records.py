"""What a run says: decisions, a record a pass, and the report, as plain data that JSON can hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a pass decided about one candidate, and why.

    Attributes:
        where: the node or weight, by the name a user finds in the file.
        taken: True if the candidate was changed.
        reason: why; a whole phrase in the field's terms.
        figures: numbers behind the reason, e.g. ``{"sparsity": 0.8, "before_bytes": 4096}``.
    """

    where: str
    taken: bool
    reason: str
    figures: Mapping[str, int | float | str] = field(default_factory=dict)

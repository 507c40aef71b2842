"""The range of one tensor, as a calibration run found it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Something that shows how far a loop has come."""

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterable[Item]:
        """The same items."""
        ...


@dataclass(frozen=True)
class TensorRange:
    """What one tensor held.

    Attributes:
        lo: The lowest value to be represented, with the observer "min-max" the smallest one; NaN if
            the tensor was empty in every run.
        hi: The highest value likewise.
        seen: How many elements were looked at.
        rank: Its number of axes.
        finite: False if it held NaN or infinity; then there is no use in `lo` and `hi`.
    """

    lo: float
    hi: float
    seen: int
    rank: int
    finite: bool = True

"""What the package wants to reach, held against the rows of one run."""

from collections.abc import Iterator
from dataclasses import dataclass

from peers.results import Row, Rows
from peers.tools import OWN

BOTH = ("int8", "int8-accurate")


@dataclass(frozen=True)
class Wanted:
    """Least fidelity in dB, most points of the score lost, least speed, largest file."""

    sqnr_db: float | None = None
    lost_points: float | None = None
    speed: float | None = None
    mb: float | None = None


STATIC = {
    "ppocr_v4_rec": Wanted(sqnr_db=20, speed=1.35),
    "ppocr_v4_det": Wanted(sqnr_db=23, speed=1.35),
    "minilm_l6": Wanted(sqnr_db=22, speed=2.2, mb=23),
    "efficientnet_lite0": Wanted(lost_points=0.5, speed=1.4),
    "silero_vad_16k_op15": Wanted(lost_points=0.2),
}
WEIGHTS = {
    ("minilm_l6", "int8-weights"): Wanted(sqnr_db=30, mb=23),
    ("minilm_l6", "int4-rounded"): Wanted(sqnr_db=20, mb=13),
}


@dataclass(frozen=True)
class Verdict:
    """One goal: where, what was wanted, what was found, and whether it is met."""

    model: str
    variant: str
    goal: str
    found: str
    met: bool


def verdicts(rows: Rows) -> Iterator[Verdict]:
    """All goals for which there are figures."""
    for model, wanted in STATIC.items():
        for variant in ("prepared", "raw"):
            group = _Group(rows, model, variant)
            if group.own:
                yield from group.fidelity(wanted)
                yield from group.limits(wanted)
                yield from group.costs()
    for (model, recipe), wanted in WEIGHTS.items():
        for variant in ("prepared", "raw"):
            row = rows.get((model, variant, f"{OWN}:{recipe}"))
            if row and row.sqnr_db is not None and row.mb is not None:
                met = row.sqnr_db >= (wanted.sqnr_db or 0) and row.mb <= (wanted.mb or 0)
                goal = f"{recipe}: at least {wanted.sqnr_db:g} dB, at most {wanted.mb:g} MB"
                yield Verdict(model, variant, goal, f"{row.sqnr_db:.1f} dB, {row.mb:.1f} MB", met)


class _Group:
    """The rows of one file."""

    def __init__(self, rows: Rows, model: str, variant: str) -> None:
        self._rows, self.model, self.variant = rows, model, variant
        found = {recipe: self._row(f"{OWN}:{recipe}") for recipe in BOTH}
        self.own = {recipe: row for recipe, row in found.items() if row and row.speed is not None}

    def _row(self, tool: str) -> Row | None:
        return self._rows.get((self.model, self.variant, tool))

    def fidelity(self, wanted: Wanted) -> Iterator[Verdict]:
        """The better of both recipes counts."""
        if wanted.sqnr_db is not None:
            best = max(row.sqnr_db or 0 for row in self.own.values())
            goal = f"fidelity of the better recipe at least {wanted.sqnr_db:g} dB"
            yield self._verdict(goal, f"{best:.1f} dB", best >= wanted.sqnr_db)
        reference = self._row("float")
        if wanted.lost_points is not None and reference and reference.score is not None:
            best = max(row.score or 0 for row in self.own.values())
            lost = reference.score - best
            goal = f"at most {wanted.lost_points:g} points of the score lost by the better recipe"
            yield self._verdict(goal, f"{lost:.2f}", lost <= wanted.lost_points + 1e-9)

    def limits(self, wanted: Wanted) -> Iterator[Verdict]:
        """The slower and the larger of both recipes count."""
        if wanted.speed is not None:
            found = ", ".join(f"{name} {row.speed:.2f}x" for name, row in self.own.items())
            met = all((row.speed or 0) >= wanted.speed for row in self.own.values())
            yield self._verdict(f"speed of both recipes at least {wanted.speed:g}x", found, met)
        if wanted.mb is not None:
            found = ", ".join(f"{name} {row.mb:.1f} MB" for name, row in self.own.items())
            met = all((row.mb or 0) <= wanted.mb for row in self.own.values())
            yield self._verdict(f"both files at most {wanted.mb:g} MB", found, met)

    def costs(self) -> Iterator[Verdict]:
        """CPU seconds and memory beside the peers; on the prepared file where they fail on it."""
        static = self._peer("onnxruntime:static")
        rivals = {"int8": static, "int8-accurate": self._peer("nncf:mixed")}
        for recipe, row in self.own.items():
            rival = rivals[recipe]
            if rival and row.cpu_s is not None and rival.cpu_s is not None:
                found = f"{row.cpu_s:.1f} s against {rival.cpu_s:.1f} s"
                goal = f"{recipe}: CPU seconds at most those of {rival.tool}"
                yield self._verdict(goal, found, row.cpu_s <= rival.cpu_s)
            if static and row.peak_mb is not None and static.peak_mb is not None:
                found = f"{row.peak_mb:.0f} MB against {static.peak_mb:.0f} MB"
                goal = f"{recipe}: peak memory at most half of {static.tool}"
                yield self._verdict(goal, found, row.peak_mb <= static.peak_mb / 2)

    def _peer(self, tool: str) -> Row | None:
        row = self._row(tool)
        return self._rows.get((self.model, "prepared", tool)) if not row or row.failure else row

    def _verdict(self, goal: str, found: str, met: bool) -> Verdict:
        return Verdict(self.model, self.variant, goal, found, met)

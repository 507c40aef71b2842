"""What a quantized model is worth beside the float one."""

from dataclasses import dataclass
from pathlib import Path

from onnxslim_passes.evaluation import compare_latency, compare_outputs
from onnxslim_passes.runtime import Session, open_session
from peers.cases import Case
from peers.feeds import Feed

_TIMED_FEEDS = 3
_SECONDS = 1.5  # for each timed feed


@dataclass(frozen=True)
class Worth:
    """Figures of a result.

    Attributes:
        mb: size of the file in MB (10^6 bytes).
        sqnr_db: of the worst float output on the held-out samples; infinity if all are identical.
        cosine: likewise.
        score: of the case.
        speed: float time / its time, CPU time on one thread.
    """

    mb: float
    sqnr_db: float
    cosine: float
    score: float
    speed: float


def measure(case: Case, reference: Path, result: Path) -> Worth:
    """Compares `result` with the float model that it was made of.

    Raises:
        OnnxSlimError: ONNX Runtime refuses the result.
    """
    held_out = list(case.held_out())
    with open_session(reference) as original, open_session(result) as candidate:
        fidelity = compare_outputs(original, candidate, held_out)
        return Worth(
            mb=result.stat().st_size / 1e6,
            sqnr_db=fidelity.sqnr_db,
            cosine=fidelity.cosine,
            score=case.score(candidate),
            speed=speed(original, candidate, held_out),
        )


def speed(original: Session, candidate: Session, feeds: list[Feed]) -> float:
    """Ratio of the summed medians on three feeds: small, middle and large."""
    by_size = sorted(feeds, key=lambda feed: sum(array.nbytes for array in feed.values()))
    chosen = [
        by_size[len(by_size) * (2 * i + 1) // (2 * _TIMED_FEEDS)] for i in range(_TIMED_FEEDS)
    ]
    times = [compare_latency(original, candidate, feed, seconds=_SECONDS) for feed in chosen]
    before = sum(time.reference_s for time in times)
    return before / sum(time.candidate_s for time in times)

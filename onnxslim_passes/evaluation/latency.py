"""How long two models take, measured in turn so that both see the same machine."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from onnxslim_passes.runtime import Feed, Session

_WARM_UP = 2
_FEWEST_RUNS = 5


@dataclass(frozen=True)
class Latency:
    """The time of one run of two models.

    Attributes:
        reference_s: Median seconds of the reference.
        candidate_s: Median seconds of the candidate.
        speedup: reference_s / candidate_s; above 1 the candidate is faster.
        runs: Counted runs of each.
        threads: 1: seconds of CPU time; more: seconds on the clock.
    """

    reference_s: float
    candidate_s: float
    speedup: float
    runs: int
    threads: int = 1


def compare_latency(
    reference: Session,
    candidate: Session,
    feed: Feed,
    *,
    seconds: float = 1.0,
    threads: int = 1,
) -> Latency:
    """Runs both models in turn, first one and then the other first.

    Args:
        reference: The model before.
        candidate: The model after.
        feed: Inputs of both.
        seconds: How long to measure, on the clock; but 5 runs of each are always made.
        threads: The threads that both sessions were opened with. With one, the CPU time of this
            thread is measured, which other processes hardly disturb.

    Raises:
        RuntimeRefusedError: One of them does not run.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    wanted = [spec.name for spec in candidate.inputs]
    feeds = (feed, {name: feed[name] for name in wanted if name in feed})
    sessions = (reference, candidate)
    for session, own in zip(sessions, feeds, strict=True):
        for _ in range(_WARM_UP):
            session.run(own)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < _FEWEST_RUNS or time.perf_counter() < end:
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for index in order:
            times[index].append(_time(sessions[index], feeds[index], clock))
    before, after = statistics.median(times[0]), statistics.median(times[1])
    return Latency(before, after, before / max(after, 1e-9), len(times[0]), threads)


def _time(session: Session, feed: Feed, clock: Callable[[], float]) -> float:
    """Seconds of one run."""
    start = clock()
    session.run(feed)
    return clock() - start

"""Keeps a task metric: the layers that cost most get more bits or go back to float, few as may be.

Where a target or a pass has wider formats, these are tried first: they cost less size and speed.

The metric says when to stop, not which layer is next: layers are ranked by what each of them alone
does to the outputs, on the calibration samples. The number of layers doubles until the metric
holds and is then bisected, so that few runs of the pipeline are enough for any number of layers.

The data that the metric is measured on chooses the layers here, so that it is no longer quite held
out. What is chosen is one number (how many layers of a fixed order), which fits little; still, a
figure for a publication wants data that this search has not seen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from onnxslim_passes.calibration import Samples
from onnxslim_passes.evaluation.layers import LayerError, compare_layers
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Pass, RunSettings
from onnxslim_passes.pipeline import Pipeline, Result
from onnxslim_passes.report.records import Report
from onnxslim_passes.runtime import open_session
from onnxslim_passes.search.overrides import Override, Way, leave_out, touched, widen

__all__ = ["MAX_RUNS", "Restored", "restore"]

# Runs of the pipeline for one way to spare layers, and one that measures size and latency: doubling
# reaches 32 layers in six, and nearly all of them in one more.
MAX_RUNS = 8

# Layers whose effect on the outputs is tried one by one; the rest follow by their local error.
_TRIED_LAYERS = 20

# More names than these do not help in a line; the decisions have them all.
_NAMED = 8


@dataclass(frozen=True)
class Restored:
    """A result that keeps the metric, or the best that was found.

    Attributes:
        result: the model and its report, whose warnings say what was left in float.
        drop: of the metric.
        labels: nodes and weights that were left alone, by the names that passes gave them.
        runs: of the pipeline, the given one not counted.
        candidates: how many layers could have been left alone.
    """

    result: Result
    drop: float
    labels: tuple[str, ...]
    runs: int
    candidates: int


def restore(
    pipeline: Pipeline,
    model: Model,
    result: Result,
    settings: RunSettings,
    *,
    drop_of: Callable[[Model], float],
    limit: float,
    ranking: Samples | None = None,
) -> Restored:
    """Widens the worst layers, or leaves them in float, until the drop of a metric is in a limit.

    Args:
        pipeline: what `result` came from.
        model: the original.
        result: its first result.
        settings: those of the run that gave `result`.
        drop_of: the drop of the metric of a model; larger is worse.
        limit: the largest drop allowed.
        ranking: what layers are ranked on, if not on the calibration samples; random inputs if
            there is neither.

    Returns:
        A result within the limit, with the fewest layers widened that were found to do, or else the
        fewest in float; if none is, that of the run with the smallest drop, or the given one.

    Raises:
        OnnxSlimError: as `Pipeline.run`.
    """
    ranked = _ranked(pipeline, model, result, settings, ranking)
    decisions = list(result.report.decisions())

    def run(passes: Sequence[Pass], *, measure: bool) -> Result:
        again = Pipeline(
            passes,
            store=False,
            verify_each=pipeline.verify_each,
            reproducer=pipeline.reproducer,
        )
        return again.run_with(model, settings, measure=measure)

    first, runs = drop_of(result.model), 0
    found: list[_Spared] = []
    for words, way in _ways(settings.target):
        layers = touched(pipeline.passes, decisions, ranked, way)
        counts = _Counts(_most(layers, way), {0: first}, limit)
        for count in settings.progress.track(counts, "Restoring layers", MAX_RUNS - 1):
            passes = way(pipeline.passes, decisions, layers[:count]).passes
            counts.drops[count] = drop_of(run(passes, measure=False).model)
            runs += 1
        spared = layers[: counts.best()]
        chosen = way(pipeline.passes, decisions, spared)
        found.append(_Spared(words, chosen, tuple(spared), first, counts.drops[len(spared)]))
        if found[-1].after <= limit:
            break
    best = min(found, key=lambda each: (max(each.after, limit), len(each.layers)))
    if not best.layers:
        return Restored(result, first, (), runs, len(ranked))
    final = run(best.override.passes, measure=True)
    report = _told(final.report, best, limit)
    labels = best.override.labels
    return Restored(replace(final, report=report), best.after, labels, runs + 1, len(ranked))


def _most(layers: Sequence[LayerError], way: Way) -> int:
    """How many layers may be spared: with all weights in float nothing would be left."""
    if way is not leave_out:
        return len(layers)
    return max((rank for rank, layer in enumerate(layers) if layer.weights), default=0)


@dataclass(frozen=True)
class _Spared:
    """The fewest layers that one way found.

    Attributes:
        words: what was done to them.
        override: the passes that do it.
        layers: the worst first.
        before: the drop without it.
        after: the drop with it.
    """

    words: str
    override: Override
    layers: tuple[LayerError, ...]
    before: float
    after: float


def _ways(target: str) -> tuple[tuple[str, Way], ...]:
    """What is tried, the cheapest first."""
    return (
        ("given more bits", partial(widen, target=target)),
        ("left in float", leave_out),
    )


def _ranked(
    pipeline: Pipeline,
    model: Model,
    result: Result,
    settings: RunSettings,
    ranking: Samples | None,
) -> list[LayerError]:
    """The layers that passes can be told to leave alone, the worst first."""
    with open_session(model) as session:
        data = ranking or settings.samples or Samples.runnable_random(session, seed=settings.seed)
        inputs = session.inputs
    errors = compare_layers(
        model,
        result.model,
        lambda: data.feeds(inputs),
        top=_TRIED_LAYERS,
        progress=settings.progress,
    )
    return touched(pipeline.passes, list(result.report.decisions()), errors.ranked())


class _Counts:
    """How many layers to try next: 1, 2, 4... until the limit is kept, then halves in between.

    Args:
        most: the largest number of layers.
        drops: what was measured so far, by count; filled in between two steps.
        limit: the largest drop allowed.
    """

    def __init__(self, most: int, drops: dict[int, float], limit: float) -> None:
        self._most, self.drops, self._limit = most, drops, limit

    def __iter__(self) -> Iterator[int]:
        for left in range(MAX_RUNS - 1, 0, -1):
            count = self._next(left)
            if count is None:
                return
            yield count

    def _next(self, left: int) -> int | None:
        kept = [count for count, drop in self.drops.items() if drop <= self._limit]
        failed = max((c for c in self.drops if not kept or c < min(kept)), default=0)
        if not kept:
            # The last chance is spent on as many as there are.
            upper = self._most if left == 1 else min(2 * failed or 1, self._most)
            return upper if upper > failed else None
        middle = (failed + min(kept)) // 2
        return middle if middle > failed else None

    def best(self) -> int:
        """The fewest layers that keep the limit; else the count with the smallest drop."""
        kept = [count for count, drop in self.drops.items() if drop <= self._limit]
        if kept:
            return min(kept)
        return min(self.drops, key=lambda count: (self.drops[count], count))


def _told(report: Report, found: _Spared, limit: float) -> Report:
    count = len(found.layers)
    what = "1 layer was" if count == 1 else f"{count} layers were"
    names = ", ".join(layer.name for layer in found.layers[:_NAMED])
    more = f" and {count - _NAMED} more" if count > _NAMED else ""
    line = (
        f"{what} {found.words} to keep the drop at {found.after:.4g} (at most {limit:g} allowed, "
        f"{found.before:.4g} without that): {names}{more}. The evaluation data chose how many, so "
        "that it is not quite held out any more."
    )
    return replace(report, warnings=(*report.warnings, line))

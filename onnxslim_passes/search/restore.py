"""Keeps a task metric: the layers that cost most go back to float, as few as will do.

The metric says when to stop, not which layer is next: layers are ranked by what each of them alone
does to the outputs, on the calibration samples. The number of layers doubles until the metric
holds and is then bisected, so that few runs of the pipeline are enough for any number of layers.

The data that the metric is measured on chooses the layers here, so that it is no longer quite held
out. What is chosen is one number (how many layers of a fixed order), which fits little; still, a
figure for a publication wants data that this search has not seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnxslim_passes.calibration import RangeCache, Samples
from onnxslim_passes.evaluation.layers import LayerError, compare_layers
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import NoProgress, Pass, Progress
from onnxslim_passes.pipeline import Pipeline, Result
from onnxslim_passes.report.records import Report
from onnxslim_passes.runtime import open_session
from onnxslim_passes.search.overrides import Override, leave_out, touched

__all__ = ["MAX_RUNS", "Restored", "restore"]

# Runs of the pipeline behind the first one, the last of which measures size and latency: doubling
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
    *,
    samples: Samples | None,
    drop_of: Callable[[Model], float],
    limit: float,
    ranking: Samples | None = None,
    training: Samples | None = None,
    target: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    cache: RangeCache | None = None,
) -> Restored:
    """Leaves the worst layers in float until the drop of a metric is at most `limit`.

    Args:
        pipeline: what `result` came from.
        model: the original.
        result: its first result.
        samples: what the pipeline runs on.
        ranking: what layers are ranked on, if not on `samples`; random inputs if there is neither.
        training: what passes that train run on; as for the pipeline.
        drop_of: the drop of the metric of a model; larger is worse.
        limit: the largest drop allowed.
        target: as for the pipeline.
        seed: as for the pipeline.
        progress: is shown the layers and the runs.
        cache: as for the pipeline.

    Returns:
        A result within the limit, with the fewest layers in float that were found to do; if none
        is, that of the run with the smallest drop, or the given one.

    Raises:
        OnnxSlimError: as `Pipeline.run`.
    """
    shown = progress or NoProgress()
    ranked = _ranked(pipeline, model, result, ranking or samples, seed, shown)
    decisions = list(result.report.decisions())

    def override(count: int) -> Override:
        return leave_out(pipeline.passes, decisions, ranked[:count])

    def run(passes: Sequence[Pass], *, measure: bool) -> Result:
        again = Pipeline(
            passes,
            store=False,
            verify_each=pipeline.verify_each,
            reproducer=pipeline.reproducer,
        )
        return again.run(
            model,
            samples=samples,
            training=training,
            target=target,
            seed=seed,
            progress=progress,
            measure=measure,
            cache=cache,
        )

    drops = {0: drop_of(result.model)}
    # With all weights in float nothing would be left of what was asked for.
    most = max((rank for rank, layer in enumerate(ranked) if layer.weights), default=0)
    counts = _Counts(most, drops, limit)
    for count in shown.track(counts, "Restoring layers", MAX_RUNS - 1):
        drops[count] = drop_of(run(override(count).passes, measure=False).model)
    best = counts.best()
    if best == 0:
        return Restored(result, drops[0], (), len(drops) - 1, len(ranked))
    chosen = override(best)
    final = run(chosen.passes, measure=True)
    report = _told(final.report, ranked[:best], drops, limit)
    return Restored(
        replace(final, report=report), drops[best], chosen.labels, len(drops), len(ranked)
    )


def _ranked(
    pipeline: Pipeline,
    model: Model,
    result: Result,
    samples: Samples | None,
    seed: int,
    progress: Progress,
) -> list[LayerError]:
    """The layers that passes can be told to leave alone, the worst first."""
    with open_session(model) as session:
        data = samples or Samples.runnable_random(session, seed=seed)
        inputs = session.inputs
    errors = compare_layers(
        model,
        result.model,
        lambda: data.feeds(inputs),
        top=_TRIED_LAYERS,
        progress=progress,
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
        self._most, self._drops, self._limit = most, drops, limit

    def __iter__(self) -> Iterator[int]:
        for left in range(MAX_RUNS - 1, 0, -1):
            count = self._next(left)
            if count is None:
                return
            yield count

    def _next(self, left: int) -> int | None:
        kept = [count for count, drop in self._drops.items() if drop <= self._limit]
        failed = max((c for c in self._drops if not kept or c < min(kept)), default=0)
        if not kept:
            # The last chance is spent on as many as there are.
            upper = self._most if left == 1 else min(2 * failed or 1, self._most)
            return upper if upper > failed else None
        middle = (failed + min(kept)) // 2
        return middle if middle > failed else None

    def best(self) -> int:
        """The fewest layers that keep the limit; else the count with the smallest drop."""
        kept = [count for count, drop in self._drops.items() if drop <= self._limit]
        if kept:
            return min(kept)
        return min(self._drops, key=lambda count: (self._drops[count], count))


def _told(
    report: Report, layers: Sequence[LayerError], drops: Mapping[int, float], limit: float
) -> Report:
    count, after = len(layers), drops[len(layers)]
    what = "1 layer was" if count == 1 else f"{count} layers were"
    names = ", ".join(layer.name for layer in layers[:_NAMED])
    more = f" and {count - _NAMED} more" if count > _NAMED else ""
    line = (
        f"{what} left in float to keep the drop at {after:.4g} (at most {limit:g} allowed, "
        f"{drops[0]:.4g} without that): {names}{more}. The evaluation data chose how many, so that "
        "it is not quite held out any more."
    )
    return replace(report, warnings=(*report.warnings, line))

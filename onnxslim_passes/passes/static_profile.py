"""`quantize-static:placement=profile`: integers stay where they were measured to be faster.

The model with pairs and the float model run in turn with the runtime's profiler on. Islands of
integers that gain nothing go back to float, if that makes the whole model faster. Wall-clock times
differ from run to run, so that this is asked for by name: every other placement gives the same
bytes twice.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from onnxslim_passes.calibration import Samples
from onnxslim_passes.evaluation.latency import compare_latency
from onnxslim_passes.model import Model
from onnxslim_passes.passes.placement import Labels, Measured, Survey, measured, separate_islands
from onnxslim_passes.runtime import open_session, profile_in_turn

__all__ = ["Comparison", "ProfiledTrial", "slower_sites"]

_FEEDS = 3
_ROUNDS = 8
_SECONDS = 0.7  # for the comparison of whole models on each feed
_CLEAR = 0.95  # of the float time: what saves less is within the noise of profiles


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Whole models in turn: CPU seconds of one run, summed over the feeds.

    Attributes:
        before_s: with all sites that were chosen by estimates.
        after_s: without those that were measured to be slower.
    """

    before_s: float
    after_s: float

    @property
    def pays(self) -> bool:
        """Whether the model without them is faster."""
        return self.after_s < self.before_s


class ProfiledTrial:
    """Scratch copies of a model that are run to see what integers cost.

    Args:
        work: the model before any edit; stays as it is.
        found: its sites.
        insert: puts pairs around the sites of some keys, in place.
        samples: a few of them are run.
    """

    def __init__(
        self,
        work: Model,
        found: Survey,
        insert: Callable[[Model, Collection[str]], object],
        samples: Samples,
    ) -> None:
        self._work, self._found, self._insert = work, found, insert
        with open_session(work) as session:
            self._feeds = list(samples.feeds(session.inputs, most=_FEEDS))

    def times(self, chosen: Collection[str]) -> Measured:
        """What the chosen sites cost on integers and in float, node by node.

        Raises:
            RuntimeRefusedError: a model does not load or run.
        """
        labels = Labels(self._work)
        floating, integer = self._work.copy(), self._work.copy()
        originals = labels.originals(integer)
        self._insert(integer, chosen)
        labels.attach(floating, labels.originals(floating))
        labels.attach(integer, originals)
        profiles = profile_in_turn([floating, integer], self._feeds, rounds=_ROUNDS)
        return measured(self._found, chosen, labels, profiles[0], profiles[1])

    def compare(self, before: Collection[str], after: Collection[str]) -> Comparison:
        """Times of two whole models, each with pairs around some sites, run in turn.

        Raises:
            RuntimeRefusedError: a model does not load or run.
        """
        models = [self._work.copy(), self._work.copy()]
        for model, chosen in zip(models, (before, after), strict=True):
            if chosen:
                self._insert(model, chosen)
        with open_session(models[0]) as first, open_session(models[1]) as second:
            found = [compare_latency(first, second, feed, seconds=_SECONDS) for feed in self._feeds]
        return Comparison(
            before_s=sum(latency.reference_s for latency in found),
            after_s=sum(latency.candidate_s for latency in found),
        )


def slower_sites(found: Survey, chosen: Collection[str], times: Measured) -> set[str]:
    """Keys of the sites of islands that gain nothing clear over float, which is exact."""
    slower = set()
    for sites in separate_islands(found, chosen):
        cost, conversions = times.of(sites)
        if cost.integer + conversions > _CLEAR * cost.floating:
            slower |= {site.key for site in sites}
    return slower

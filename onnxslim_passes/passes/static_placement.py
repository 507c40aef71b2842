"""Which sites `quantize-static` puts on integers: estimated, built, and asked of the runtime."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import RuntimeRefusedError, UnsupportedModelError
from onnxslim_passes.model import Model
from onnxslim_passes.passes.placement import (
    BY_RULE,
    CPU,
    Inserted,
    Schemes,
    Site,
    Survey,
    chained,
    choose,
    estimate,
    gains,
    saturating_sites,
    unfused_sites,
)
from onnxslim_passes.passes.static_decisions import Placement
from onnxslim_passes.passes.static_profile import ProfiledTrial, slower_sites
from onnxslim_passes.passes.static_ranges import Calibrated
from onnxslim_passes.runtime import optimized_graph

if TYPE_CHECKING:
    from onnxslim_passes.passes.quantize_static import QuantizeStatic

__all__ = ["StaticPlacer"]

# The runtime either fuses a site or not; what a removed neighbour changes shows in the next round.
_ROUNDS = 5


@dataclass(frozen=True)
class StaticPlacer:
    """The choice for one graph.

    Attributes:
        options: of the pass, none left open.
        work: the model before any pair; stays as it is.
        found: its sites.
        schemes: their formats.
        calibrated: what the samples said of their tensors.
        elements: of each tensor, on an average run.
        insert: puts pairs around the sites of some keys, in place.
    """

    options: "QuantizeStatic"
    work: Model
    found: Survey
    schemes: Schemes
    calibrated: Calibrated
    elements: Mapping[str, float]
    insert: Callable[[Model, Collection[str]], Inserted]

    def place(self, samples: Samples) -> Placement:
        """The choice by the option `placement`.

        Args:
            samples: for placement=profile, which runs models on a few of them.

        Raises:
            UnsupportedModelError: the runtime does not load the model with pairs.
        """
        none, floating = self._obstacles()
        if self.options.placement in BY_RULE:
            chosen = {site.key for site in self.found.sites} - floating
            return replace(none, chosen=frozenset(chosen))
        forced = {site.key for site in self.found.sites if self._is_forced(site)} - floating
        little = self._of_little_gain() - forced
        none, floating = replace(none, little=frozenset(little)), floating | little
        placed = self._fused(none, forced, floating)
        if self.options.placement == "profile" and placed.chosen:
            return self._profiled(placed, none, forced, floating, samples)
        return placed

    def _obstacles(self) -> tuple[Placement, set[str]]:
        """Nothing chosen yet, and the keys of all sites that cannot be."""
        sites, calibrated = self.found.sites, self.calibrated
        saturated = saturating_sites(self.found, calibrated.limits, self.schemes)
        none = Placement(
            chosen=frozenset(),
            unfused=frozenset(),
            boundless=frozenset(site.key for site in sites if calibrated.is_boundless(site)),
            saturated=frozenset(saturated),
            sensitive=frozenset(site.key for site in sites if calibrated.spare.touches(site)),
            optimized=None,
        )
        left = {s.key for s in sites if calibrated.is_unseen(s) or self.options.leaves(s)}
        return none, left | none.boundless | none.saturated | none.sensitive

    def _is_forced(self, site: Site) -> bool:
        """Whether an option wants a site on integers, whatever it costs."""
        everywhere = self.options.placement == "everywhere" and site.weight is not None
        # Asked for by name: no CPU gains time by it.
        named = self.schemes.of(site.node).format.wide and not self.schemes.default.format.wide
        return everywhere or named

    def _of_little_gain(self) -> set[str]:
        """Keys of the nodes with weights that save less than `min_gain` of all nodes' float time.

        Those in the midst of integers are not among them.
        """
        share, found = self.options.min_gain, self.found
        if not share:
            return set()
        total = sum(estimate(site, self.elements, CPU).floating for site in found.sites)
        saved = gains(found, self.elements, CPU)
        return {key for key, gain in saved.items() if gain < share * total} - chained(found)

    def _fused(self, none: Placement, forced: set[str], floating: set[str]) -> Placement:
        """The cheapest choice, without what the runtime did not fuse of it."""
        unfused: set[str] = set()
        for _ in range(_ROUNDS):
            left = floating | unfused - forced
            chosen = choose(self.found, self.elements, CPU, integer=forced, floating=left)
            if not chosen:
                return replace(none, unfused=frozenset(unfused))
            trial = self.work.copy()
            inserted = self.insert(trial, chosen)
            try:
                optimized = optimized_graph(trial, weights=False).graph
            except RuntimeRefusedError as error:
                # The newest opset can be ahead of the kernels of the installed runtime.
                raise UnsupportedModelError(f"with Q/DQ pairs, {error}") from error
            failed = {site.key for site in unfused_sites(optimized, inserted)}
            unfused |= failed
            if not failed - forced:
                break
        return replace(
            none, chosen=frozenset(chosen), unfused=frozenset(unfused), optimized=optimized
        )

    def _profiled(
        self,
        placed: Placement,
        none: Placement,
        forced: set[str],
        floating: set[str],
        samples: Samples,
    ) -> Placement:
        """Without the islands that run slower on integers, if that is faster as a whole."""
        trial = ProfiledTrial(self.work, self.found, self.insert, samples)
        placed = replace(placed, measured=trial.times(placed.chosen))
        slower = slower_sites(self.found, placed.chosen, placed.measured) - forced
        if not slower:
            return placed
        others = {site.key for site in self.found.sites} - placed.chosen
        fewer = self._fused(none, forced, floating | others | slower)
        compared = trial.compare(placed.chosen, fewer.chosen)
        kept = replace(fewer, measured=placed.measured) if compared.pays else placed
        return replace(kept, slower=placed.chosen - fewer.chosen, compared=compared)

"""What `quantize-static` learnt of activations from the samples."""

from collections.abc import Mapping
from dataclasses import dataclass

from onnxslim_passes.calibration.run import TensorRange
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.placement import Ranges, Site
from onnxslim_passes.passes.spared import Spared


@dataclass(frozen=True)
class Calibrated:
    """What the samples said of activations.

    Attributes:
        ranges: of all.
        spare: those that are to have more bits than others.
    """

    ranges: Mapping[str, TensorRange]
    spare: Spared

    @property
    def limits(self) -> Ranges:
        """The ranges of those that may be quantized."""
        return {
            n: ends for n, ends in limits_of(self.ranges).items() if n not in self.spare.floating
        }

    def is_unseen(self, site: Site) -> bool:
        """Whether a tensor of a site was empty in every run, so that it has no range."""
        return any(self.ranges[t.name].seen == 0 for t in (*site.inputs, *site.outputs))

    def is_boundless(self, site: Site) -> bool:
        """Whether a tensor of a site held NaN or infinity, so that no grid can hold its values."""
        return not all(self.ranges[t.name].finite for t in (*site.inputs, *site.outputs))


def limits_of(ranges: Mapping[str, TensorRange]) -> Ranges:
    """The smallest and largest value of each tensor that has both."""
    return {
        name: (known.lo, known.hi) for name, known in ranges.items() if known.seen and known.finite
    }


def elements_of(ranges: Mapping[str, TensorRange], context: Context) -> dict[str, float]:
    """Elements of each tensor in an average run of the model."""
    runs = (context.samples.feed_count if context.samples is not None else None) or 1
    return {name: known.seen / runs for name, known in ranges.items()}

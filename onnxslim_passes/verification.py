"""What passes made of a model is believed after ONNX Runtime ran it beside the original."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import (
    InvalidModelError,
    RuntimeRefusedError,
    SamplesError,
    VerificationError,
)
from onnxslim_passes.evaluation import (
    Fidelity,
    OutputFidelity,
    RecordedOutputs,
    compare_latency,
    compare_outputs,
)
from onnxslim_passes.evaluation.recorded import ChangedFeedsError
from onnxslim_passes.model import Model, check_model
from onnxslim_passes.passes.base import RunSettings
from onnxslim_passes.passes.placement import find_target
from onnxslim_passes.runtime import Feed, Optimization, Session, open_session

# A pass that claims to be lossless reorders float sums at most; 60 dB is three digits, far above
# any real fault and below what float16 models lose by reordering.
LOSSLESS_DB = 60.0

# Where an output is close to zero everywhere, as that of a sigmoid on noise, rounding alone is a
# large part of it: errors of a few float32 steps at 1.0 are faults only if little else is left.
ROUNDING_ERROR = 1e-6
ROUNDING_DB = 20.0

# Feeds that the outputs are compared on, spread over the samples. A quarter of them would not do:
# on text lines a few carry most of the error, and 16 of 64 gave 24.3 dB instead of 19.9 dB.
VERIFICATION_FEEDS = 64


class Judge:
    """Compares what became of a model with the model, one of the two open at a time.

    The original runs once, when the judge is made.

    Args:
        model: the original.
        reference: its session; not needed afterwards.
        settings: of the run; outputs are compared on its samples, on random inputs if there are
            none.

    Attributes:
        warnings: what a report should say about the comparison.
        first_feed: the first feed, or None if there are none.
        description: how many feeds of what.

    Raises:
        RuntimeRefusedError: the original does not run.
    """

    def __init__(self, model: Model, reference: Session, settings: RunSettings) -> None:
        self._model, self._progress = model, settings.progress
        self._optimize = _optimization(settings.target)
        self._inputs = reference.inputs
        self.warnings: tuple[str, ...] = ()
        samples = settings.samples
        self._samples = self._random(reference, settings.seed) if samples is None else samples
        self.first_feed: Feed | None = next(iter(self._feeds()), None)
        self._count = sum(1 for _ in self._feeds())
        self.description = _description(self._samples, self._count)
        feeds = self._progress.track(self._feeds(), "Running the original", self._count)
        self._expected = RecordedOutputs(reference, feeds)

    def _random(self, reference: Session, seed: int) -> Samples | None:
        try:
            samples = Samples.runnable_random(reference, seed=seed)
        except SamplesError as error:
            self.warnings += (f"The outputs were not compared: {error}",)
            return None
        self.warnings += (
            "No samples were given: outputs were compared on random inputs, which shows that the "
            "model runs but not how good it is.",
        )
        return samples

    def _feeds(self) -> Iterable[Mapping[str, Any]]:
        if self._samples is None:
            return ()
        return self._samples.feeds(self._inputs, most=VERIFICATION_FEEDS)

    def verdict(self, model: Model, label: str) -> Fidelity | None:
        """The error against the original; None without feeds.

        Raises:
            VerificationError: refused by the checker or ONNX Runtime, or not a number.
        """
        _check(model, label)
        with _opened(model, label, self._optimize) as candidate:
            fidelity = self._compared(None, candidate, label)
        if fidelity is not None and fidelity.sqnr_db == -math.inf:
            worst = next(o for o in fidelity.outputs if o.sqnr_db == -math.inf)
            raise VerificationError(
                f"After {label} output {worst.name!r} has NaN or infinite values where the "
                "original has none."
            )
        return fidelity

    def hold_lossless(self, before: Model, model: Model, label: str) -> None:
        """Holds a pass that promises equal outputs to it.

        Args:
            before: what the pass was given.
            model: what it made.
            label: its name.

        Raises:
            VerificationError: the outputs differ.
        """
        with (
            _opened(before, label, self._optimize) as reference,
            _opened(model, label, self._optimize) as candidate,
        ):
            hold_equal(self._compared(reference, candidate, label), label)

    def _compared(
        self, reference: Session | None, candidate: Session, label: str
    ) -> Fidelity | None:
        """Against a session, or against what was recorded of the original."""
        if self._samples is None:
            return None
        feeds = self._progress.track(self._feeds(), "Verifying", self._count)
        try:
            if reference is not None:
                return compare_outputs(reference, candidate, feeds)
            return self._expected.compare(candidate, feeds)
        except ChangedFeedsError:
            with open_session(self._model) as original:
                return self._compared(original, candidate, label)
        except RuntimeRefusedError as error:
            raise VerificationError(f"After {label} the model does not run: {error}") from error

    def latency(self, model: Model) -> dict[str, Any]:
        """Times of the original and the result in turn; empty without a feed."""
        if self.first_feed is None:
            return {}
        # One step: a bar that moved would cost time that is measured.
        with open_session(self._model) as reference, open_session(model) as candidate:
            for feed in self._progress.track((self.first_feed,), "Measuring latency"):
                figures = asdict(compare_latency(reference, candidate, feed))
        return figures


def hold_equal(fidelity: Fidelity | None, label: str) -> None:
    """Raises VerificationError if passes that promise equal outputs did not give them."""
    for output in fidelity.outputs if fidelity is not None else ():
        if is_faulty(output):
            raise VerificationError(
                f"{label} must leave the outputs as they are, but {output.name!r} has an SQNR "
                f"of {output.sqnr_db:.1f} dB (at least {LOSSLESS_DB:.0f} expected)."
            )


def is_faulty(output: OutputFidelity) -> bool:
    """Whether an output is further off than sums in another order can make it.

    Outputs that are no floats (labels, texts) may differ where two scores tie, which is rare.
    """
    if output.agreement is not None:
        return False
    only_rounding = output.max_error <= ROUNDING_ERROR and output.sqnr_db >= ROUNDING_DB
    return output.sqnr_db < LOSSLESS_DB and not only_rounding


def _optimization(target: str) -> Optimization:
    """How far the runtime here may fuse a result whose outputs are compared.

    For a target that is not run here, Q/DQ pairs are computed as they stand: this CPU's integer
    kernels may saturate where the target's do not.
    """
    return "all" if find_target(target).runs_here else "basic"


def _description(samples: Samples | None, used: int) -> str:
    if samples is None:
        return ""
    total = samples.feed_count
    return (
        f"{used} feeds of {samples.name}"
        if used == total
        else (f"{used} of {total} feeds of {samples.name}")
    )


def _check(model: Model, label: str) -> None:
    try:
        check_model(model)
    except InvalidModelError as error:
        raise VerificationError(f"After {label}: {error}") from error


def _opened(model: Model, label: str, optimize: Optimization) -> Session:
    try:
        return open_session(model, optimize=optimize)
    except RuntimeRefusedError as error:
        raise VerificationError(f"After {label}: {error}") from error

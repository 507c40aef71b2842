"""The pass manager: checks the order, runs the passes, and believes only what ONNX Runtime ran.

The model it is given is never changed. Where a pass fails, or its result does, the model before it
and the rest of the recipe are left in a folder with which the failure can be repeated.
"""

import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from onnxslim_passes.calibration import RangeCache, Samples
from onnxslim_passes.errors import (
    InvalidModelError,
    OnnxSlimError,
    PassFailedError,
    RecipeError,
    RuntimeRefusedError,
    SamplesError,
    UsageError,
    VerificationError,
)
from onnxslim_passes.evaluation import (
    Fidelity,
    ModelSize,
    OutputFidelity,
    compare_latency,
    compare_outputs,
    count_parameters,
    measure_size,
)
from onnxslim_passes.model import Model, check_model, restore_names
from onnxslim_passes.passes.base import Context, NoProgress, Pass, Progress, RunSettings, Stage
from onnxslim_passes.passes.placement import find_target
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.report.manifest import Manifest, read_manifest, write_manifest
from onnxslim_passes.report.provenance import source_file, source_sha256, versions
from onnxslim_passes.report.records import AT_LOAD, Decision, PassRecord, Report
from onnxslim_passes.runtime import MODEL_LIMIT_BYTES, Optimization, Session, open_session
from onnxslim_passes.storage.unpacking import unpack_weights

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


@dataclass(frozen=True)
class Result:
    """What a pipeline returns.

    Attributes:
        model: the compressed model.
        report: the account of it.
    """

    model: Model
    report: Report


def default_storing(passes: Iterable[Pass]) -> StoreWeights:
    """The storing pass that is appended to others that have none."""
    coded = any(pass_.entropy_coded for pass_ in passes)
    return StoreWeights(level="smallest") if coded else StoreWeights()


class Pipeline:
    """Passes in order.

    Args:
        passes: in the order they run; stages must not go back, except that fine-tuning may stand
            anywhere before storing.
        store: append `store-weights` unless a pass of that stage is there.
        verify_each: compare the outputs after every pass, not only at the end.
        reproducer: folder for the reproducer of a failure; by default a new temporary one.

    Raises:
        RecipeError: the order is impossible, or there is no pass.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        store: bool = True,
        verify_each: bool = False,
        reproducer: Path | None = None,
    ) -> None:
        chosen = list(passes)
        if store and not any(pass_.stage == Stage.STORE for pass_ in chosen):
            chosen.append(default_storing(chosen))
        _check_order(chosen)
        self.passes = tuple(chosen)
        self.verify_each = verify_each
        self.reproducer = reproducer

    def run(
        self,
        model: Model,
        *,
        samples: Samples | None = None,
        training: Samples | None = None,
        target: str = "cpu",
        seed: int = 0,
        progress: Progress | None = None,
        measure: bool = True,
        checkpoints: Path | None = None,
        cache: RangeCache | None = None,
    ) -> Result:
        """Compresses a copy of `model`; `RunSettings` says what each argument is.

        Args:
            model: stays as it is.
            samples: calibration data; without them random inputs are tried, for the comparison
                only.
            training: data for passes that train.
            target: the runtime the result is meant for.
            seed: of everything random.
            progress: shows how far long work has come.
            measure: whether latency and compressed sizes go into the report.
            checkpoints: folder for the state of passes that train.
            cache: of ranges of activations.

        Raises:
            UsageError: a pass needs samples and there are none.
            RuntimeRefusedError: ONNX Runtime does not load the model as it came.
            PassFailedError: a pass raised; the message names it and the reproducer folder.
            VerificationError: the result is refused, or its outputs are wrong.
        """
        settings = RunSettings(
            samples=samples,
            training=training,
            target=target,
            seed=seed,
            progress=progress or NoProgress(),
            checkpoints=checkpoints,
            cache=cache,
        )
        return self.run_with(model, settings, measure=measure)

    def run_with(self, model: Model, settings: RunSettings, *, measure: bool = True) -> Result:
        """As `run`, with all that a run has in one value, to be handed on and used again."""
        judge = self._judge(model, settings)
        if settings.checkpoints is not None:
            settings.checkpoints.mkdir(parents=True, exist_ok=True)
        work = model.copy()
        preparations = (*_fix_overridable(work), *self._unpack(work))
        dense = work.copy() if preparations else model
        records, unstored = self._run_passes(work, Context.of(settings, dense), judge)
        digest = source_sha256(model)
        _write_account(work, model, digest, settings.seed, self.passes, preparations, records)
        fidelity = self._verify_result(work, judge)
        judge.release()
        zstd = None if measure else False
        size = measure_size(work, feed=judge.first_feed, zstd=zstd)
        before = measure_size(model, source_file(model), feed=judge.first_feed, zstd=zstd)
        report = Report(
            source=model.path.name if model.path else "",
            source_sha256=digest,
            versions=versions(),
            seed=settings.seed,
            target=settings.target,
            samples=judge.description,
            passes=tuple(records),
            preparations=preparations,
            fidelity=_fidelity_figures(fidelity),
            before=asdict(_with_parameters_of(dense, before)),
            after=asdict(_with_parameters_of(unstored, size)),
            latency=judge.latency(work) if measure else {},
            warnings=judge.warnings,
        )
        return Result(work, report)

    def _judge(self, model: Model, settings: RunSettings) -> "_Judge":
        """Who compares outputs; the data is checked against the model on the way."""
        self._check_samples(settings.samples, settings.training)
        reference = open_session(model)
        for data in (settings.samples, settings.training):
            if data is not None:
                data.check(reference.inputs)
        judge = _Judge(model, reference, settings)
        judge.release()
        return judge

    def _run_passes(
        self, work: Model, context: Context, judge: "_Judge"
    ) -> tuple[list[PassRecord], Model]:
        """What each pass did to `work`, and `work` as it was before weights were stored."""
        records = []
        unstored = work
        for index, pass_ in enumerate(self.passes):
            if pass_.stage == Stage.STORE:
                unstored = work.copy()
            if pass_.stage == Stage.QUANTIZE and context.floating is None:
                context = replace(context, floating=work.copy())
            records.append(self._run_pass(index, work, context, judge))
        return records, unstored

    def _unpack(self, work: Model) -> tuple[Decision, ...]:
        """Makes stored weights dense, if a pass is to see or to store them."""
        if all(pass_.stage == Stage.PREPARE for pass_ in self.passes):
            return ()
        manifest = read_manifest(work)
        if manifest is not None:
            restore_names(work, manifest.short_names)
        return tuple(
            Decision(
                where=weight.where,
                taken=True,
                reason="was stored; now dense, so that passes see its values",
                figures={"operators": weight.operators, "dense_bytes": weight.nbytes},
            )
            for weight in unpack_weights(work)
        )

    def _check_samples(self, samples: Samples | None, training: Samples | None) -> None:
        needy = [pass_.name for pass_ in self.passes if pass_.needs_samples]
        if needy and samples is None:
            raise UsageError(
                f"{' and '.join(needy)} needs calibration samples: give --calibration DATA "
                "(an .npz, a folder or file.py:function), or samples= in Python; "
                "`--calibration random` is for smoke tests only."
            )
        learners = [pass_.name for pass_ in self.passes if pass_.needs_training]
        given = training or samples
        if learners and (given is None or given.is_random):
            raise UsageError(
                f"{' and '.join(learners)} needs samples to train on: give --training DATA or "
                "--calibration DATA (an .npz, a folder or file.py:function), or training= in "
                "Python; labels are not needed as long as it learns from the original model."
            )

    def _run_pass(self, index: int, work: Model, context: Context, judge: "_Judge") -> PassRecord:
        pass_ = self.passes[index]
        before, before_bytes, start = work.copy(), work.nbytes(), time.perf_counter()
        try:
            pass_.requires(work)
        except OnnxSlimError as error:
            raise type(error)(f"{pass_.name}: {error}") from error
        try:
            result = pass_.apply(work, context)
            fidelity = None
            if self.verify_each:
                fidelity = judge.verdict(work, pass_.name)
                if pass_.lossless and result.changed:
                    judge.hold_lossless(before, work, pass_.name)
        except UsageError as error:
            raise type(error)(f"{pass_.name}: {error}") from error
        except SamplesError:
            raise
        except (OnnxSlimError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise self._failure(index, before, error) from error
        return PassRecord(
            name=pass_.name,
            options={key: value for key, value in pass_.to_table().items() if key != "name"},
            changed=result.changed,
            seconds=time.perf_counter() - start,
            before_bytes=before_bytes,
            after_bytes=work.nbytes(),
            decisions=result.decisions,
            fidelity=_fidelity_figures(fidelity, outputs=False) if fidelity else None,
        )

    def _verify_result(self, work: Model, judge: "_Judge") -> Fidelity | None:
        """The verdict on the whole result; a pass that broke it is found by running them again."""
        lossless = all(pass_.lossless for pass_ in self.passes)
        names = ", ".join(pass_.name for pass_ in self.passes)
        try:
            fidelity = judge.verdict(work, names)
            if lossless:
                judge.hold_lossless(None, work, names)
        except VerificationError as error:
            if self.verify_each:
                raise
            hint = " Run again with verify_each (--verify-each) to find the pass at fault."
            raise VerificationError(f"{error}{hint}") from error
        return fidelity

    def _failure(self, index: int, before: Model, error: Exception) -> OnnxSlimError:
        pass_ = self.passes[index]
        folder = write_reproducer(self.reproducer, before, self.passes[index:], error)
        known = isinstance(error, OnnxSlimError)
        told = str(error) if known else f"{type(error).__name__}: {error}"
        kind = type(error) if isinstance(error, OnnxSlimError) else PassFailedError
        return kind(
            f"{pass_.name}: {told} (the model before this pass and the rest of the recipe are in "
            f"{folder})"
        )


def _check_order(passes: Sequence[Pass]) -> None:
    if not passes:
        raise RecipeError("There is no pass to run; give --recipe or --pass.")
    latest: Pass | None = None
    for pass_ in passes:
        # Also first: on new data, with labels, the original itself may have something to learn.
        if pass_.stage == Stage.TUNE:
            continue
        if latest is not None and pass_.stage < latest.stage:
            raise RecipeError(
                f"{pass_.name} (stage {pass_.stage.name}) cannot stand after {latest.name} (stage "
                f"{latest.stage.name}); the order is {' < '.join(stage.name for stage in Stage)}."
            )
        latest = pass_
    stores = [pass_.name for pass_ in passes if pass_.stage == Stage.STORE]
    if len(stores) > 1 or (stores and passes[-1].stage != Stage.STORE):
        raise RecipeError(f"{stores[0]} must be the last pass, and the only one of its stage.")


def _with_parameters_of(dense: Model, size: ModelSize) -> ModelSize:
    """Codes and tables of a stored weight are no parameters: counts what they stand for."""
    parameters, nonzero = count_parameters(dense)
    return replace(size, parameters=parameters, nonzero_parameters=nonzero)


def _fix_overridable(work: Model) -> tuple[Decision, ...]:
    return tuple(
        Decision(
            where=constant.where,
            taken=True,
            reason="was a graph input with a default; now a plain initializer, so that its value "
            "is certain",
        )
        for constant in work.fix_overridable_weights()
    )


def _optimization(target: str) -> Optimization:
    """How far the runtime here may fuse a result whose outputs are compared.

    For a target that is not run here, Q/DQ pairs are computed as they stand: this CPU's integer
    kernels may saturate where the target's do not.
    """
    return "all" if find_target(target).runs_here else "basic"


class _Judge:
    """Runs the original and what became of it on the same feeds."""

    def __init__(self, model: Model, reference: Session, settings: RunSettings) -> None:
        self._model, self._progress = model, settings.progress
        self._session: Session | None = reference
        self._inputs = reference.inputs
        self._optimize = _optimization(settings.target)
        self.warnings: tuple[str, ...] = ()
        samples = settings.samples
        if samples is None:
            samples = self._random(reference, settings.seed)
        self._samples = samples
        self.first_feed = next(iter(self._feeds()), None)
        self._count = sum(1 for _ in self._feeds())
        self.description = _description(samples, self._count)

    @property
    def _reference(self) -> Session:
        """The original; opened again if it was released."""
        if self._session is None:
            self._session = open_session(self._model)
        return self._session

    def release(self) -> None:
        """Lets go of a large original until it is needed: passes open large sessions themselves."""
        if self._session is not None and self._model.nbytes() > MODEL_LIMIT_BYTES:
            self._session.close()
            self._session = None

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
        """The error against the original.

        Raises:
            VerificationError: refused by the checker or ONNX Runtime, or not a number.
        """
        _check(model, label)
        with _opened(model, label, self._optimize) as candidate:
            fidelity = self._compared(self._reference, candidate, label)
        if fidelity is not None and fidelity.sqnr_db == -math.inf:
            worst = next(o for o in fidelity.outputs if o.sqnr_db == -math.inf)
            raise VerificationError(
                f"After {label} output {worst.name!r} has NaN or infinite values where the "
                "original has none."
            )
        return fidelity

    def hold_lossless(self, before: Model | None, model: Model, label: str) -> None:
        """Raises VerificationError if passes that promise equal outputs do not give them."""
        with _opened(model, label, self._optimize) as candidate:
            if before is None:
                fidelity = self._compared(self._reference, candidate, label)
            else:
                with _opened(before, label, self._optimize) as reference:
                    fidelity = self._compared(reference, candidate, label)
        for output in fidelity.outputs if fidelity is not None else ():
            if _is_faulty(output):
                raise VerificationError(
                    f"{label} must leave the outputs as they are, but {output.name!r} has an SQNR "
                    f"of {output.sqnr_db:.1f} dB (at least {LOSSLESS_DB:.0f} expected)."
                )

    def _compared(self, reference: Session, candidate: Session, label: str) -> Fidelity | None:
        if self._samples is None:
            return None
        try:
            feeds = self._progress.track(self._feeds(), "Verifying", self._count)
            return compare_outputs(reference, candidate, feeds)
        except RuntimeRefusedError as error:
            raise VerificationError(f"After {label} the model does not run: {error}") from error

    def latency(self, model: Model) -> dict[str, Any]:
        """Times of the original and the result in turn; empty without a feed."""
        if self.first_feed is None:
            return {}
        # One step: a bar that moved would cost time that is measured.
        with open_session(model) as candidate:
            for feed in self._progress.track((self.first_feed,), "Measuring latency"):
                figures = asdict(compare_latency(self._reference, candidate, feed))
        return figures


def _description(samples: Samples | None, used: int) -> str:
    if samples is None:
        return ""
    total = samples.feed_count
    return (
        f"{used} feeds of {samples.name}"
        if used == total
        else (f"{used} of {total} feeds of {samples.name}")
    )


def _is_faulty(output: OutputFidelity) -> bool:
    """Whether an output is further off than sums in another order can make it.

    Outputs that are no floats (labels, texts) may differ where two scores tie, which is rare.
    """
    if output.agreement is not None:
        return False
    only_rounding = output.max_error <= ROUNDING_ERROR and output.sqnr_db >= ROUNDING_DB
    return output.sqnr_db < LOSSLESS_DB and not only_rounding


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


def _fidelity_figures(fidelity: Fidelity | None, *, outputs: bool = True) -> dict[str, Any]:
    if fidelity is None:
        return {}
    figures: dict[str, Any] = {
        "sqnr_db": fidelity.sqnr_db,
        "cosine": fidelity.cosine,
        "max_error": fidelity.max_error,
    }
    if outputs:
        figures["outputs"] = [asdict(output) for output in fidelity.outputs]
    return figures


def _write_account(
    work: Model,
    source: Model,
    digest: str,
    seed: int,
    passes: Iterable[Pass],
    preparations: Sequence[Decision],
    records: Iterable[PassRecord],
) -> None:
    decisions = [(AT_LOAD, decision) for decision in preparations]
    decisions += [(record.name, d) for record in records for d in record.decisions]
    manifest = Manifest(
        source=source.path.name if source.path else "",
        source_sha256=digest,
        versions=versions(),
        seed=seed,
        recipe=[pass_.to_table() for pass_ in passes],
        counts=(len(preparations), *(len(record.decisions) for record in records)),
        decisions=tuple(decisions),
    )
    write_manifest(work, manifest)


def write_reproducer(
    folder: Path | None, before: Model, passes: Sequence[Pass], error: Exception
) -> Path:
    """A folder with which a failure can be repeated.

    Args:
        folder: made if missing; None makes a temporary one.
        before: the model as the first of `passes` got it.
        passes: the failed one and those after it.
        error: what happened.

    Returns:
        The folder, with ``model.onnx``, ``recipe.toml`` and ``error.txt``.
    """
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="onnxslim-passes-reproducer-"))
    folder.mkdir(parents=True, exist_ok=True)
    before.save(folder / "model.onnx")
    recipe = {
        "name": "reproducer",
        "description": f"What was left to do when {passes[0].name} failed.",
        "pass": [pass_.to_table() for pass_ in passes],
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    (folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
    return folder

"""The pass manager: checks the order, runs the passes, and believes only what ONNX Runtime ran.

The model it is given is never changed. Where a pass fails, or its result does, the model before it
and the rest of the recipe are left in a folder with which the failure can be repeated.
"""

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from onnxslim_passes.calibration import RangeCache, Samples
from onnxslim_passes.errors import (
    OnnxSlimError,
    PassFailedError,
    RecipeError,
    SamplesError,
    UsageError,
    VerificationError,
)
from onnxslim_passes.evaluation import (
    Fidelity,
    measure_size,
)
from onnxslim_passes.heap import trim_heap
from onnxslim_passes.model import Model, restore_names
from onnxslim_passes.passes.base import Context, NoProgress, Pass, Progress, RunSettings, Stage
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.report.manifest import Manifest, read_manifest, write_manifest
from onnxslim_passes.report.provenance import source_file, source_sha256, versions
from onnxslim_passes.report.records import AT_LOAD, Decision, PassRecord, Report
from onnxslim_passes.runtime import open_session
from onnxslim_passes.storage.unpacking import unpack_weights
from onnxslim_passes.verification import Judge, hold_equal


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
            measure: whether latency, compressed sizes and multiply-accumulates of a run go into
                the report; without it the latter come from declared shapes, where these are fixed.
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
        # Counting exactly takes a run of each model.
        feed, zstd = (judge.first_feed, None) if measure else (None, False)
        before = measure_size(model, source_file(model), dense=dense, feed=feed, zstd=zstd)
        after = measure_size(work, dense=unstored, feed=feed, zstd=zstd)
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
            before=asdict(before),
            after=asdict(after),
            latency=judge.latency(work) if measure else {},
            warnings=judge.warnings,
        )
        return Result(work, report)

    def _judge(self, model: Model, settings: RunSettings) -> Judge:
        """Who compares outputs; the data is checked against the model on the way."""
        self._check_samples(settings.samples, settings.training)
        with open_session(model) as reference:
            for data in (settings.samples, settings.training):
                if data is not None:
                    data.check(reference.inputs)
            return Judge(model, reference, settings)

    def _run_passes(
        self, work: Model, context: Context, judge: Judge
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
            trim_heap()
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

    def _run_pass(self, index: int, work: Model, context: Context, judge: Judge) -> PassRecord:
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

    def _verify_result(self, work: Model, judge: Judge) -> Fidelity | None:
        """The verdict on the whole result; a pass that broke it is found by running them again."""
        lossless = all(pass_.lossless for pass_ in self.passes)
        names = ", ".join(pass_.name for pass_ in self.passes)
        try:
            fidelity = judge.verdict(work, names)
            if lossless:
                hold_equal(fidelity, names)
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

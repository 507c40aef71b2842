"""`compress`: run passes, verify, measure, check the guards, save, and say what happened.

Nothing is written before all checks have passed.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from rich.text import Text

from onnxslim_passes.calibration import RangeCache, Samples
from onnxslim_passes.cli.common import (
    RANDOM,
    Flag,
    ModelPath,
    TargetName,
    check_output,
    open_samples,
)
from onnxslim_passes.cli.guards import Guards, check_guards
from onnxslim_passes.cli.task import TaskResult, open_task
from onnxslim_passes.errors import UsageError
from onnxslim_passes.evaluation import Metric
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Pass, RunSettings
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.pipeline import Pipeline, default_storing
from onnxslim_passes.recipe import Recipe, build_pass, format_pass, parse_pass, ready_recipes
from onnxslim_passes.report.records import Report, check_report_suffix
from onnxslim_passes.report.terminal import (
    TerminalProgress,
    print_json,
    report_view,
    result_console,
)
from onnxslim_passes.report.wording import headline
from onnxslim_passes.runtime import Session, open_session
from onnxslim_passes.search import Restored, restore

__all__ = ["compress"]

_WHAT = Group("What to do", sort_key=1)
_DATA = Group("Data", sort_key=2)
_OUTPUT = Group("Output", sort_key=0)


@Parameter(name="*", group=_WHAT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class What:
    """Which passes run.

    Attributes:
        recipe: A ready recipe (prune, codebook, int8, int8-dynamic, small) or a TOML file.
        passes: Passes as text.
        target: The runtime the result is meant for; docs/targets.md says what each one changes.
        seed: For everything random; one seed, the same bytes.
        min_runtime: The oldest ONNX Runtime that must fold the stored weights, such as 1.17.
        no_store: Leave out the lossless storage that is appended by default.
        verify_each: Check and run the model after every pass, not only at the end.
        reproducer: A folder for the model and the rest of the recipe if a pass fails.
        dry_run: Check the arguments, the model and the data, print the passes, and stop.
    """

    recipe: str | None = None
    passes: Annotated[
        tuple[str, ...],
        Parameter(
            name="--pass",
            negative="",
            show_default=False,
            help="One pass, such as prune-magnitude:sparsity=0.8,include=[conv*]; may be repeated. "
            "With --recipe it replaces the recipe's pass of that name, or joins at its stage.",
        ),
    ] = ()
    target: TargetName = "cpu"
    seed: int = 0
    min_runtime: str | None = None
    no_store: Flag = False
    verify_each: Flag = False
    reproducer: Path | None = None
    dry_run: Flag = False


@Parameter(name="*", group=_DATA)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What the model is run on.

    Attributes:
        calibration: Samples, or "random".
        calibration_cache: A folder that keeps ranges of activations: the same model, samples and
            observer are not calibrated twice.
        training: Samples for passes that train, such as fine-tune; by default those of calibration.
        checkpoints: A folder where training leaves its state after each epoch; the same command
            goes on from there. It is not removed.
        evaluation: Held-out samples with labels, for --metric.
        metric: A task metric: top1, mse, cosine... or file.py:function(session) -> float.
    """

    calibration: Annotated[
        str | None,
        Parameter(
            help="Samples: .npz, folder or file.py:function. Passes and the measured error use "
            "them. 'random' is for smoke tests only: its figures mean nothing."
        ),
    ] = None
    calibration_cache: Annotated[Path | None, Parameter(negative="")] = None
    training: str | None = None
    checkpoints: Annotated[Path | None, Parameter(negative="")] = None
    evaluation: str | None = None
    metric: str | None = None


@Parameter(name="*", group=_OUTPUT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go.

    Attributes:
        output: The file to write; never the input itself. Not needed with --dry-run.
        report: A .html or .json file with every figure and decision.
        json: Print the report as JSON on stdout, and nothing else there.
    """

    output: Annotated[Path | None, Parameter(name=["--output", "-o"], negative="")] = None
    report: Annotated[Path | None, Parameter(negative="")] = None
    json: Flag = False


_NOTHING_WHAT, _NO_DATA, _NO_GUARDS, _NO_OUTPUT = What(), Data(), Guards(), Output()


def compress(
    model: ModelPath,
    /,
    *,
    output: Output = _NO_OUTPUT,
    what: What = _NOTHING_WHAT,
    data: Data = _NO_DATA,
    guards: Guards = _NO_GUARDS,
) -> None:
    """Make a model smaller: run passes, verify, measure and save.

    Every figure is measured on what ONNX Runtime runs. If a guard is not met, or anything fails, no
    file is written or changed.
    """
    recipe = _recipe(what)
    pipeline = Pipeline(
        recipe.passes,
        store=not what.no_store,
        verify_each=what.verify_each,
        reproducer=what.reproducer,
    )
    _check_usage(model, output, what, data, guards, pipeline)
    loaded = load(model)
    with open_session(model) as reference:
        samples = _samples(data, what, reference)
        training = _training(data, reference)
        metric = open_task(data.metric, data.evaluation, reference) if data.metric else None
        if what.dry_run:
            _print_plan(recipe, pipeline, as_json=output.json)
            return
        before = metric(reference) if metric is not None else float("nan")
    tried = ""
    with TerminalProgress() as progress:
        settings = RunSettings(
            samples=samples,
            training=training,
            target=what.target,
            seed=what.seed,
            progress=progress,
            checkpoints=data.checkpoints,
            cache=_cache(data),
        )
        result = pipeline.run_with(loaded, settings)
        task = _task(metric, before, result.model) if metric is not None else None
        if metric is not None and task is not None and guards.drops_too_much(task):
            restored = restore(
                pipeline,
                loaded,
                result,
                settings,
                drop_of=_drop_of(metric, before),
                limit=guards.max_drop or 0.0,
                ranking=_ranking(data, samples),
            )
            result, task = restored.result, _task(metric, before, restored.result.model)
            tried = _tried(restored)
    report = result.report
    if task is not None:
        report = dataclasses.replace(report, metric=task.to_dict())
    speedup = report.latency.get("speedup")
    check_guards(guards, task=task, speedup=speedup, ratio=report.ratio, tried=tried)
    assert output.output is not None  # checked with the usage; only a dry run goes without
    _write(result.model, report, output.output, output.report)
    _print(report, output.output, as_json=output.json)


# ---------------- before the run


def _recipe(what: What) -> Recipe:
    """The passes that the command line names, in order."""
    passes = [parse_pass(text) for text in what.passes]
    if what.recipe is None and not passes:
        raise UsageError(
            "Say what to do: --recipe NAME (ready ones: "
            f"{', '.join(ready_recipes())}), --recipe FILE.toml, or --pass NAME; "
            "`onnxslim-passes passes` lists them."
        )
    if what.recipe is None:
        recipe = Recipe("command line", "", tuple(passes))
    else:
        recipe = Recipe.open(what.recipe)
        for pass_ in passes:
            recipe = recipe.with_pass(pass_)
    return recipe if what.min_runtime is None else _for_runtime(recipe, what)


def _for_runtime(recipe: Recipe, what: What) -> Recipe:
    """The recipe with `min_runtime` in its storing pass, which is appended if there is none."""
    if what.no_store:
        raise UsageError("--min-runtime chooses how weights are stored; it goes without --no-store")
    stored = [pass_ for pass_ in recipe.passes if isinstance(pass_, StoreWeights)]
    table = (stored[0] if stored else default_storing(recipe.passes)).to_table()
    name = table.pop("name")
    return recipe.with_pass(build_pass(name, {**table, "min_runtime": what.min_runtime}))


def _check_usage(
    model: Path, output: Output, what: What, data: Data, guards: Guards, pipeline: Pipeline
) -> None:
    """Everything that can be refused before the model is read."""
    guards.check_usage(metric=data.metric)
    _check_cache(data)
    if data.evaluation is not None and data.metric is None:
        raise UsageError("--evaluation is for a --metric, such as --metric top1; none is given")
    if data.evaluation == RANDOM:
        raise UsageError("--evaluation needs real samples with labels; random ones have none")
    if what.dry_run and output.output is None and output.report is None:
        return
    if output.output is None:
        raise UsageError("-o OUT is missing: where to write the result (or --dry-run)")
    check_output(output.output, [model])
    if output.report is not None:
        check_report_suffix(output.report)
        check_output(output.report, [model, output.output], "--report")
    needy = _names(pass_ for pass_ in pipeline.passes if pass_.needs_samples)
    if needy and data.calibration is None:
        raise UsageError(
            f"{needy} needs samples: give --calibration DATA (an .npz with an array "
            "for each input, a folder of .npz or .npy, or file.py:function); for a smoke test "
            "only, --calibration random"
        )
    learners = _names(pass_ for pass_ in pipeline.passes if pass_.needs_training)
    if learners and data.training is None and data.calibration in (None, RANDOM):
        raise UsageError(
            f"{learners} needs samples to train on: give --training DATA (an .npz "
            "with an array for each input, a folder of .npz or .npy, or file.py:function)"
        )
    if data.training is not None and not learners:
        raise UsageError("--training is for passes that train, such as fine-tune; there is none")
    if data.checkpoints is not None:
        _check_checkpoints(data.checkpoints, learners)


def _check_checkpoints(folder: Path, learners: str) -> None:
    if not learners:
        raise UsageError("--checkpoints is for passes that train, such as fine-tune; there is none")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--checkpoints {folder} is a file; expected a folder, or one to make")


def _check_cache(data: Data) -> None:
    folder = data.calibration_cache
    if folder is None:
        return
    if data.calibration is None:
        raise UsageError("--calibration-cache keeps what --calibration found; give both")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--calibration-cache {folder} is a file; expected a folder")


def _cache(data: Data) -> RangeCache | None:
    return None if data.calibration_cache is None else RangeCache(data.calibration_cache)


def _names(passes: Iterable[Pass]) -> str:
    return ", ".join(dict.fromkeys(pass_.name for pass_ in passes))


def _training(data: Data, reference: Session) -> Samples | None:
    """What passes that train run on, checked against the model."""
    if data.training is None:
        return None
    samples = Samples.open(data.training)
    samples.check(reference.inputs)
    return samples


def _samples(data: Data, what: What, reference: Session) -> Samples | None:
    if data.calibration is None:
        return None
    return open_samples(data.calibration, reference, seed=what.seed, option="--calibration")


def _print_plan(recipe: Recipe, pipeline: Pipeline, *, as_json: bool) -> None:
    steps = [format_pass(pass_) for pass_ in pipeline.passes]
    if as_json:
        print_json({"dry_run": True, "passes": steps, "recipe": recipe.to_toml()})
        return
    lines = [f"{number}. {step}" for number, step in enumerate(steps, start=1)]
    text = "\n".join(["Arguments, model and data are in order. These passes would run:", *lines])
    result_console().print(Text(text))


# ---------------- after the run


def _task(metric: Metric, before: float, model: Model) -> TaskResult:
    with open_session(model) as candidate:
        after = metric(candidate)
    return TaskResult(metric.name, before, after, metric.higher_is_better)


def _drop_of(metric: Metric, before: float) -> Callable[[Model], float]:
    return lambda model: _task(metric, before, model).drop


def _ranking(data: Data, samples: Samples | None) -> Samples | None:
    """What layers are ranked on: the calibration samples or, without any, the evaluation data."""
    if samples is None and data.evaluation is not None:
        return Samples.open(data.evaluation)
    return samples


def _tried(restored: Restored) -> str:
    """What was done in vain, for the message of the guard."""
    if not restored.runs:
        return "; with the layers that cost it in float nothing would be left of the compression"
    return (
        f", and leaving layers in float ({restored.runs} runs, {restored.candidates} layers) did "
        "not keep it"
    )


def _write(model: Model, report: Report, output: Path, report_path: Path | None) -> None:
    """Both files or none: the report waits beside its place until the model is there."""
    if report_path is None:
        model.save(output)
        return
    waiting = report_path.with_name(f".{report_path.stem}.{os.getpid()}{report_path.suffix}")
    try:
        report.save(waiting, result=output.name)
        model.save(output)
        waiting.replace(report_path)
    finally:
        waiting.unlink(missing_ok=True)


def _print(report: Report, output: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), **report.to_dict()})
        return
    console = result_console()
    # One line, however narrow the terminal: scripts take the first line of the output.
    console.print(Text(headline(report, output.name), "bold"), soft_wrap=True)
    console.print(report_view(report))
    console.print(Text(f"Every decision: onnxslim-passes explain {output}"))

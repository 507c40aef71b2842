"""`fine-tune`: train a model, or a folder of `train-graph`, and write the tuned values back."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter
from rich.table import Table
from rich.text import Text

from onnxslim_passes.calibration import Samples
from onnxslim_passes.cli.common import Flag, check_output
from onnxslim_passes.cli.train_graph import ObjectiveOptions, ParameterOptions, UpdateOptions
from onnxslim_passes.errors import UsageError
from onnxslim_passes.model import Model, check_model, load
from onnxslim_passes.report.records import Decision
from onnxslim_passes.report.terminal import TerminalProgress, print_json, result_console, table
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training.export import is_exported, open_program, read_layout
from onnxslim_passes.training.journal import Epoch
from onnxslim_passes.training.layout import MetricSpec
from onnxslim_passes.training.loop import Tuned
from onnxslim_passes.training.options import Course, Objective, Parameters, Update
from onnxslim_passes.training.tuning import Listener, Session, prepare, prepare_program, run
from onnxslim_passes.training.writing_back import write_back

__all__ = ["fine_tune"]

_DATA = Group("Data", sort_key=0)
_COURSE = Group("Course", sort_key=1)

CourseOptions = Annotated[Course, Parameter(name="*", group=_COURSE)]


@Parameter(name="*", group=_DATA)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What the model learns from.

    Attributes:
        data: Samples to train on: .npz, folder or file.py:function, with 'labels' where the loss
            needs them. Not needed with --epochs 0.
        validation: Samples to choose the best epoch by; by default a part of the data.
        teacher: The model before it was compressed, for distillation.
        source: The model that a folder of train-graph was made of, if it lies elsewhere.
    """

    data: str | None = None
    validation: str | None = None
    teacher: Path | None = None
    source: Path | None = None


@Parameter(name="*", group=Group("Output", sort_key=0))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go.

    Attributes:
        output: The file to write; never the input itself.
        checkpoint: Written after each epoch, and what a killed run goes on from; by default
            OUT.checkpoint.safetensors, removed at the end.
        checkpoint_steps: Write it every so many steps, too.
        json: Print the result as JSON on stdout, and nothing else there.
    """

    output: Annotated[Path, Parameter(name=["--output-file", "-o"], negative="")]
    checkpoint: Path | None = None
    checkpoint_steps: int | None = None
    json: Flag = False


_NO_DATA = Data()
_OBJECTIVE, _UPDATE, _PARAMETERS, _DEFAULT_COURSE = Objective(), Update(), Parameters(), Course()


def fine_tune(
    model: Annotated[Path, Parameter(help="An ONNX model, or a folder that train-graph wrote.")],
    /,
    *,
    output: Output,
    data: Data = _NO_DATA,
    course: CourseOptions = _DEFAULT_COURSE,
    objective: ObjectiveOptions = _OBJECTIVE,
    update: UpdateOptions = _UPDATE,
    parameters: ParameterOptions = _PARAMETERS,
    threads: Annotated[
        int, Parameter(help="Threads of one operator; another number may change last digits.")
    ] = 1,
    seed: Annotated[int, Parameter(help="Of everything random; one seed, the same bytes.")] = 0,
) -> None:
    """Train a model on ONNX Runtime, keeping what compression made of its weights.

    The result is the same graph with other values. Without labels a teacher is enough. The epoch
    that validates best is kept, the model as it came among them. Progress goes to stderr.
    """
    source_path = _source(model, data)
    _check_usage(model, source_path, output, data, course, (objective, update, parameters))
    source = load(source_path)
    samples = Samples.open(data.data) if data.data is not None else None
    if is_exported(model):
        program = open_program(model, source)
        if course.epochs == 0:
            _finish(source, output, write_back(source, program.constraints, program.state), None)
            return
        assert samples is not None  # checked with the usage
        session = prepare_program(
            program, samples, course=course, validation=_opened(data.validation), seed=seed
        )
    else:
        assert samples is not None
        session = prepare(
            source,
            samples,
            objective=objective,
            update=update,
            parameters=parameters,
            course=course,
            teacher=load(data.teacher) if data.teacher is not None else None,
            validation=_opened(data.validation),
            seed=seed,
        )
    _say_start(session)
    tuned = _trained(session, output, threads)
    _finish(
        source,
        output,
        write_back(source, session.program.constraints, tuned.state),
        (session, tuned),
    )
    _checkpoint(output).unlink(missing_ok=True)


def _source(model: Path, data: Data) -> Path:
    """The model whose values are tuned."""
    if not model.is_dir():
        if data.source is not None:
            raise UsageError("--source is for a folder of train-graph; MODEL is a file")
        return model
    name = read_layout(model).source
    for path in (data.source, model.parent / name, Path(name)):
        if path is not None and path.is_file():
            return path
    raise UsageError(f"{model} was made of {name!r}, which is not beside it; give it with --source")


def _check_usage(
    model: Path,
    source: Path,
    output: Output,
    data: Data,
    course: Course,
    built_in: tuple[Objective, Update, Parameters],
) -> None:
    """Everything that can be refused before the model is read."""
    check_output(output.output, [source, *([data.teacher] if data.teacher else [])])
    if output.checkpoint is not None:
        check_output(output.checkpoint, [source, output.output], "--checkpoint")
    if model.is_dir():
        if built_in != (_OBJECTIVE, _UPDATE, _PARAMETERS) or data.teacher is not None:
            raise UsageError(
                f"{model} is a training graph with objective, optimizer, weights and teacher built "
                "in; give those options to train-graph"
            )
    elif course.epochs == 0:
        raise UsageError("--epochs 0 writes back what a folder of train-graph holds; name one")
    if data.data is None and course.epochs:
        raise UsageError(
            "--data is missing: an .npz, a folder or file.py:function, with 'labels' where the "
            "loss needs them"
        )


def _opened(spec: str | None) -> Samples | None:
    return Samples.open(spec) if spec is not None else None


def _checkpoint(output: Output) -> Path:
    return output.checkpoint or output.output.with_name(
        f"{output.output.name}.checkpoint.safetensors"
    )


# ---------------- the run


def _say_start(session: Session) -> None:
    layout, validation = session.program.layout, session.validation
    held = f", {validation.count} to choose by" if validation is not None else ""
    loss = layout.options["objective"]["loss"]
    _say(f"{len(layout.weights)} weights, {session.data.count} samples{held}; loss {loss}")


def _trained(session: Session, output: Output, threads: int) -> Tuned:
    metric = session.program.layout.metric
    with TerminalProgress() as progress:
        counter = progress.counter()
        listener = Listener(
            on_epoch=lambda epoch: progress.say(_epoch_text(epoch, metric)),
            on_step=lambda loss: counter.advance(f"Training, loss {loss:.4g}"),
            on_start=counter.start,
        )
        tuned = run(
            session,
            checkpoint=_checkpoint(output),
            checkpoint_steps=output.checkpoint_steps,
            threads=threads,
            listener=listener,
        )
    if tuned.resumed is not None:
        _say(f"taken up from {_checkpoint(output)} at step {tuned.resumed}")
    return tuned


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _epoch_text(epoch: Epoch, metric: MetricSpec) -> str:
    """An epoch in one line: ``epoch  3  loss 0.1203  top1 97.40  validation 0.1410  96.80``."""
    parts = [f"epoch {epoch.number:>3}" if epoch.number else "as it came"]
    if epoch.loss is not None and epoch.metric is not None:
        parts.append(f"loss {epoch.loss:.4g}, {metric.name} {epoch.metric:.4g}")
    if epoch.validation_loss is not None and epoch.validation_metric is not None:
        found = f"loss {epoch.validation_loss:.4g}, {metric.name} {epoch.validation_metric:.4g}"
        parts.append(f"validation: {found}")
    return "; ".join(parts)


# ---------------- the result


def _finish(
    model: Model,
    output: Output,
    decisions: tuple[Decision, ...],
    trained: tuple[Session, Tuned] | None,
) -> None:
    """Verifies, saves and tells."""
    check_model(model)
    open_session(model).close()
    model.save(output.output)
    if output.json:
        print_json({"output": str(output.output), **_plain(trained, decisions)})
        return
    console = result_console()
    if trained is not None:
        console.print(_epochs_table(*trained))
        console.print(Text(_verdict(*trained)))
    changed = sum(decision.taken for decision in decisions)
    console.print(Text(f"{changed} of {len(decisions)} weights changed -> {output.output}"))


def _plain(
    trained: tuple[Session, Tuned] | None, decisions: tuple[Decision, ...]
) -> dict[str, Any]:
    plain: dict[str, Any] = {"decisions": [dataclasses.asdict(decision) for decision in decisions]}
    if trained is not None:
        session, tuned = trained
        plain |= {
            "metric": session.program.layout.metric.name,
            "best_epoch": tuned.best,
            "resumed_at_step": tuned.resumed,
            "epochs": [dataclasses.asdict(epoch) for epoch in tuned.epochs],
            "passed_over": [
                dataclasses.asdict(decision)
                for decision in session.program.decisions
                if not decision.taken
            ],
        }
    return plain


def _epochs_table(session: Session, tuned: Tuned) -> Table:
    metric = session.program.layout.metric.name
    listed = table("epoch", "loss", metric, "validation loss", f"validation {metric}")
    for epoch in tuned.epochs:
        mark = " *" if epoch.number == tuned.best else ""
        figures = (epoch.loss, epoch.metric, epoch.validation_loss, epoch.validation_metric)
        shown = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        listed.add_row(f"{epoch.number}{mark}", *shown)
    return listed


def _verdict(session: Session, tuned: Tuned) -> str:
    """What was kept, in one line."""
    if session.validation is None:
        return "The last epoch was kept: there was nothing to choose by (--validation)."
    if tuned.best == 0:
        return "No epoch validated better than the model as it came; it was kept as it is."
    name = session.program.layout.metric.name
    before, after = tuned.epochs[0].validation_metric, tuned.epochs[tuned.best].validation_metric
    return f"Epoch {tuned.best} was kept: validation {name} {before:.4g} -> {after:.4g}."

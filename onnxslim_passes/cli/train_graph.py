"""`train-graph`: the training step of a model as ONNX files that any runtime can run."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Group, Parameter
from rich.text import Text

from onnxslim_passes.cli.common import Flag, JsonFlag, ModelPath
from onnxslim_passes.errors import UsageError, unknown_name
from onnxslim_passes.model import Model, load
from onnxslim_passes.report.terminal import print_json, result_console, table
from onnxslim_passes.report.wording import bytes_text
from onnxslim_passes.training.export import export
from onnxslim_passes.training.layout import Layout
from onnxslim_passes.training.losses import LOSSES, check_teacher_options
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.parameters import Array
from onnxslim_passes.training.program import TrainingProgram, build

__all__ = ["train_graph"]

_OBJECTIVE = Group("Objective", sort_key=1)
_UPDATE = Group("Optimizer", sort_key=2)
_PARAMETERS = Group("Weights", sort_key=3)

ObjectiveOptions = Annotated[Objective, Parameter(name="*", group=_OBJECTIVE)]
UpdateOptions = Annotated[Update, Parameter(name="*", group=_UPDATE)]
ParameterOptions = Annotated[Parameters, Parameter(name="*", group=_PARAMETERS)]


@Parameter(name="*", group=Group("Output", sort_key=0))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where the files go.

    Attributes:
        output: The folder to write; it is made if it is not there.
        gradients: Write gradients.onnx, too: loss and derivatives, for an optimizer of your own.
        json: Print what was written as JSON on stdout, and nothing else there.
    """

    output: Annotated[Path, Parameter(name=["--output-folder", "-o"], negative="")]
    gradients: Flag = False
    json: JsonFlag = False


def train_graph(
    model: ModelPath,
    /,
    *,
    output: Output,
    teacher: Annotated[
        Path | None, Parameter(help="The model before it was compressed, for distillation.")
    ] = None,
    fix: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            show_default=False,
            help="NAME=VALUE: an input that has one value in all of training, such as a sampling "
            "rate that decides a branch; may be repeated.",
        ),
    ] = (),
    shape: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            show_default=False,
            help="NAME=SIZES: sizes of an input that are the same in all of training, ? for the "
            "others, such as x=?,3,48,?; may be repeated.",
        ),
    ] = (),
    objective: ObjectiveOptions = Objective(),  # noqa: B008  # frozen
    update: UpdateOptions = Update(),  # noqa: B008
    parameters: ParameterOptions = Parameters(),  # noqa: B008
    seed: Annotated[int, Parameter(help="Of dropout.")] = 0,
) -> None:
    """Write the training step of a model as ONNX: forward, loss, backward and optimizer.

    The folder holds training.onnx, evaluation.onnx, checkpoint.safetensors, training.json (what
    maps where) and train.py, which trains with nothing but onnxruntime and numpy. When a program
    of yours has trained the checkpoint, `fine-tune FOLDER --epochs 0 -o OUT` writes it back.
    """
    if objective.loss == "auto":
        raise UsageError(f"--loss is missing: one of {', '.join(LOSSES[1:])} or file.py:function.")
    check_teacher_options(objective, has_teacher=teacher is not None)
    if not output.output.parent.is_dir():
        raise UsageError(f"-o {output.output}: there is no folder {output.output.parent}")
    if output.output.exists() and not output.output.is_dir():
        raise UsageError(f"-o {output.output} is a file; name a folder")
    loaded = load(model)
    program = build(
        loaded,
        objective=objective,
        update=update,
        parameters=parameters,
        teacher=load(teacher) if teacher is not None else None,
        fixed_inputs=_fixed(loaded, fix),
        sizes=_sizes(shape),
        seed=seed,
        with_gradients=output.gradients,
    )
    files = export(program, output.output)
    _print(program, files, as_json=output.json)


def _fixed(model: Model, texts: tuple[str, ...]) -> dict[str, Array]:
    """Inputs with one value, from NAME=VALUE."""
    inputs = {str(tensor.name): tensor for tensor in model.graph.inputs}
    fixed = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--fix {text}: expected NAME=VALUE")
        if name not in inputs:
            raise unknown_name("input in --fix:", name, inputs)
        try:
            fixed[name] = np.array(float(value)).astype(inputs[name].dtype)
        except ValueError as error:
            raise UsageError(f"--fix {text}: {value!r} is not a number") from error
    return fixed


def _sizes(texts: tuple[str, ...]) -> dict[str, list[int | None]]:
    """Sizes of inputs, from NAME=SIZES."""
    sizes = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        parts = [part.strip() for part in listed.split(",")]
        if not equals or not all(part == "?" or part.isdecimal() for part in parts):
            raise UsageError(f"--shape {text}: expected NAME=SIZES, such as x=?,3,48,?")
        sizes[name] = [None if part == "?" else int(part) for part in parts]
    return sizes


def _print(program: TrainingProgram, files: list[Path], *, as_json: bool) -> None:
    layout = program.layout
    if as_json:
        print_json(
            {
                "files": [str(path) for path in files],
                "weights": list(layout.weights),
                "decisions": [dataclasses.asdict(decision) for decision in program.decisions],
            }
        )
        return
    console = result_console()
    listed = table("file", "size")
    for path in files:
        listed.add_row(str(path), bytes_text(path.stat().st_size))
    console.print(listed)
    console.print(Text(_summary(layout, program)))


def _summary(layout: Layout, program: TrainingProgram) -> str:
    numbers = sum(int(np.prod(spec.shape)) for spec in layout.state if spec.role == "trainable")
    left = sum(not decision.taken for decision in program.decisions)
    loss = layout.options["objective"]["loss"]
    return (
        f"{len(layout.weights)} weights are trained ({numbers:,} numbers), {left} are not; loss "
        f"{loss}, optimizer {layout.options['update']['optimizer']}."
    )

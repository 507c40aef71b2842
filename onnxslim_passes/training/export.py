"""A training program as a folder of files, for any language that has ONNX Runtime."""

from importlib import resources
from pathlib import Path

import numpy as np

from onnxslim_passes.errors import InvalidModelError, OutputError, UsageError
from onnxslim_passes.model import Model, load
from onnxslim_passes.report.provenance import source_sha256
from onnxslim_passes.training.checkpoint import read_tensors, write_atomically, write_tensors
from onnxslim_passes.training.layout import Layout
from onnxslim_passes.training.options import Parameters
from onnxslim_passes.training.parameters import Array
from onnxslim_passes.training.program import TrainingProgram, find_constraints

__all__ = ["CHECKPOINT", "LAYOUT", "export", "is_exported", "open_program"]

TRAINING, EVALUATION, GRADIENTS = "training.onnx", "evaluation.onnx", "gradients.onnx"
CHECKPOINT, FROZEN, LAYOUT, EXAMPLE = (
    "checkpoint.safetensors",
    "frozen.safetensors",
    "training.json",
    "train.py",
)


def export(program: TrainingProgram, folder: Path) -> list[Path]:
    """Writes a program into a folder, which is made if it is not there.

    Args:
        program: what to write.
        folder: may hold an older program, whose files are replaced.

    Returns:
        The files that were written.

    Raises:
        OutputError: a file cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}.") from error
    frozen = {s.input: program.state[s.input] for s in program.layout.state if s.role == "frozen"}
    moving = {name: array for name, array in program.state.items() if name not in frozen}
    graphs = {TRAINING: program.training, EVALUATION: program.evaluation}
    if program.gradients is not None:
        graphs[GRADIENTS] = program.gradients
    for name, graph in graphs.items():
        graph.save(folder / name)
    write_tensors(folder / CHECKPOINT, moving)
    states = [CHECKPOINT]
    if frozen:
        write_tensors(folder / FROZEN, frozen)
        states.append(FROZEN)
    text = program.layout.to_text({"graphs": list(graphs), "state": states})
    write_atomically(folder / LAYOUT, text.encode())
    template = resources.files("onnxslim_passes.training").joinpath("templates", EXAMPLE)
    write_atomically(folder / EXAMPLE, template.read_bytes())
    return [folder / name for name in (*graphs, *states, LAYOUT, EXAMPLE)]


def is_exported(path: Path) -> bool:
    """Whether a path is a folder that `export` wrote."""
    return path.is_dir() and (path / LAYOUT).is_file()


def open_program(folder: Path, source: Model) -> TrainingProgram:
    """Reads an exported program back, with its checkpoint as the state to begin with.

    Args:
        folder: what `export` wrote; the checkpoint may have been trained by any program.
        source: the model that it was made of.

    Raises:
        InvalidModelError: a file is missing or damaged, or the checkpoint has other tensors.
        UsageError: `source` is another model.
    """
    layout = read_layout(folder)
    if source_sha256(source) != layout.source_sha256:
        raise UsageError(
            f"{folder} was made of {layout.source or 'a model'} with another content than "
            f"{source.path or 'the one given'}; give the model that it was made of with --source."
        )
    parameters = Parameters(**layout.options["parameters"])
    found, _ = find_constraints(
        source, parameters, fixed_inputs=_fixed(layout), sizes=_sizes(layout)
    )
    trained = {row["weight"] for row in layout.weights}
    constraints = [constraint for constraint in found if constraint.where in trained]
    state, _ = read_tensors(folder / CHECKPOINT)
    if (folder / FROZEN).exists():
        state |= read_tensors(folder / FROZEN)[0]
    _check_state(layout, state, folder)
    return TrainingProgram(
        training=load(folder / TRAINING),
        evaluation=load(folder / EVALUATION),
        gradients=None,
        state={spec.input: state[spec.input] for spec in layout.state},
        layout=layout,
        constraints=tuple(constraints),
        decisions=(),
    )


def read_layout(folder: Path) -> Layout:
    """The layout of an exported program.

    Raises:
        InvalidModelError: it is missing or damaged.
    """
    path = folder / LAYOUT
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidModelError(
            f"{folder} is no folder of train-graph: {LAYOUT} cannot be read ({error.strerror})."
        ) from error
    return Layout.from_text(text, str(path))


def _fixed(layout: Layout) -> dict[str, Array]:
    return {name: np.array(value) for name, value in layout.fixed_inputs.items()}


def _sizes(layout: Layout) -> dict[str, list[int | None]]:
    """Sizes that were fixed when the program was made."""
    return {
        spec.name: [size if isinstance(size, int) else None for size in spec.shape]
        for spec in layout.inputs
    }


def _check_state(layout: Layout, state: dict[str, Array], folder: Path) -> None:
    for spec in layout.state:
        found = state.get(spec.input)
        if found is None or found.shape != spec.shape or found.dtype.name != spec.dtype:
            told = "is missing" if found is None else f"is {found.dtype.name} {found.shape}"
            raise InvalidModelError(
                f"{folder / CHECKPOINT}: {spec.input!r} {told}, expected {spec.dtype} {spec.shape}."
            )

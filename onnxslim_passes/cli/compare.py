"""`compare`: two models side by side: size, outputs, latency, operators, metric, layers."""

import collections
import dataclasses
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.text import Text

from onnxslim_passes.cli.common import Flag, JsonFlag, open_samples
from onnxslim_passes.cli.layers import LayerComparison, layer_comparison, layers_view, remedy_lines
from onnxslim_passes.cli.task import TaskResult, open_task
from onnxslim_passes.errors import ModelError, UsageError
from onnxslim_passes.evaluation import (
    Fidelity,
    Latency,
    ModelSize,
    compare_latency,
    compare_outputs,
    measure_size,
)
from onnxslim_passes.model import Model, load
from onnxslim_passes.report.manifest import read_manifest
from onnxslim_passes.report.terminal import (
    TerminalProgress,
    fidelity_table,
    print_json,
    result_console,
    section,
    table,
)
from onnxslim_passes.report.wording import (
    NOT_MEASURED,
    bytes_text,
    count_text,
    seconds_text,
    times_text,
)
from onnxslim_passes.runtime import Feed, Session, open_session, optimized_graph

__all__ = ["compare"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything measured of two models, A the reference.

    Attributes:
        paths: of A and B.
        sizes: of A and B.
        operators: nodes by operator of A and B.
        fidelity: error of B's outputs on the data; None without data.
        latency: of both, measured in turn; None without data.
        task: the metric of both; None without one.
        random: True if the data was made up.
        layers: error layer by layer; None if it was not asked for.
    """

    paths: tuple[Path, Path]
    sizes: tuple[ModelSize, ModelSize]
    operators: tuple[collections.Counter[str], collections.Counter[str]]
    fidelity: Fidelity | None
    latency: Latency | None
    task: TaskResult | None
    random: bool
    layers: LayerComparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "models": [str(path) for path in self.paths],
            "sizes": [dataclasses.asdict(size) for size in self.sizes],
            "ratio": self.sizes[0].file_bytes / self.sizes[1].file_bytes,
            "operators": [dict(counts) for counts in self.operators],
            "fidelity": dataclasses.asdict(self.fidelity) if self.fidelity else None,
            "latency": dataclasses.asdict(self.latency) if self.latency else None,
            "metric": self.task.to_dict() if self.task else None,
            "random_data": self.random,
            "layers": self.layers.to_dict() if self.layers else None,
        }


def compare(
    a: Annotated[Path, Parameter(help="The reference model.")],
    b: Annotated[Path, Parameter(help="The model to hold against it.")],
    /,
    *,
    data: Annotated[
        str | None,
        Parameter(
            help="Samples to run both on: .npz, folder or file.py:function; 'random' shows "
            "latency, and errors that mean nothing."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        Parameter(
            help="A task metric: top1, mse, cosine... of --data with labels, or "
            "file.py:function(session) -> float."
        ),
    ] = None,
    layers: Annotated[
        Flag,
        Parameter(
            help="Which layers cost the fidelity: each one alone and accumulated, and the option "
            "that would mend it. A is the float model. Needs --data."
        ),
    ] = False,
    top: Annotated[
        int, Parameter(help="With --layers: how many are tried one by one in the whole model.")
    ] = 16,
    seed: Annotated[int, Parameter(help="For random data.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Compare two models: size, outputs, latency, task metric, error layer by layer."""
    if layers and data is None:
        raise UsageError("--layers runs both models: give --data (an .npz, a folder or file.py:f)")
    if top < 1:
        raise UsageError(f"--top is {top}, expected 1 or more")
    result = _measure((a, b), data, metric, seed, top if layers else 0)
    if json:
        print_json(result.to_dict())
        return
    console = result_console()
    console.print(_view(result, top))
    if result.layers is not None:
        for line in remedy_lines(result.layers):
            console.print(Text(line), soft_wrap=True)


def _measure(
    paths: tuple[Path, Path], data: str | None, metric: str | None, seed: int, top: int
) -> Comparison:
    """Everything; layers only if `top` is not 0."""
    models = load(paths[0]), load(paths[1])
    fidelity = latency = task = layers = None
    with (
        TerminalProgress() as progress,
        open_session(paths[0]) as reference,
        open_session(paths[1]) as candidate,
    ):
        _check_same_inputs(paths, reference, candidate)
        measured = open_task(metric, data, reference) if metric else None
        feed = None
        if data is not None:
            samples = open_samples(data, reference, seed=seed, option="--data")
            feeds = samples.feeds(reference.inputs)
            shown = progress.track(feeds, "comparing outputs", samples.count)
            fidelity = compare_outputs(reference, candidate, shown)
            feed = next(iter(samples.feeds(reference.inputs)))
            latency = compare_latency(reference, candidate, feed)
            if top:
                layers = layer_comparison(models, samples, reference, top=top, progress=progress)
        if measured is not None:
            values = measured(reference), measured(candidate)
            task = TaskResult(measured.name, *values, measured.higher_is_better)
    return Comparison(
        paths=paths,
        sizes=(
            _size(models[0], paths[0], feed),
            _size(models[1], paths[1], feed),
        ),
        operators=(_operators(models[0]), _operators(models[1])),
        fidelity=fidelity,
        latency=latency,
        task=task,
        random=data == "random",
        layers=layers,
    )


def _size(model: Model, path: Path, feed: Feed | None) -> ModelSize:
    """The size, with the parameters that stored codes stand for instead of the codes."""
    # The runtime rebuilds them at load.
    stored = read_manifest(model) is not None
    dense = load(optimized_graph(path, level="basic")) if stored else None
    return measure_size(model, path, dense=dense, feed=feed)


def _operators(model: Model) -> collections.Counter[str]:
    return collections.Counter(
        f"{node.domain}.{node.op}" if node.domain else node.op for node in model.nodes()
    )


def _check_same_inputs(paths: tuple[Path, Path], reference: Session, candidate: Session) -> None:
    """Raises ModelError if the two cannot be fed alike or give outputs of other names."""
    for kind in ("inputs", "outputs"):
        ours = {spec.name: spec.type for spec in getattr(reference, kind)}
        theirs = {spec.name: spec.type for spec in getattr(candidate, kind)}
        if ours != theirs:
            raise ModelError(
                f"{paths[0]} and {paths[1]} have different {kind}: {_named(ours)} against "
                f"{_named(theirs)}; only models with the same ones can be compared"
            )


def _named(specs: dict[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in specs.items()) or "none"


# ---------------- the view


def _view(result: Comparison, top: int) -> RenderableType:
    parts: list[RenderableType] = [_sizes_view(result)]
    if result.fidelity is not None:
        title = f"B's outputs against A's on {result.fidelity.samples} feeds"
        outputs = [dataclasses.asdict(output) for output in result.fidelity.outputs]
        parts.append(section(title, fidelity_table(outputs)))
    else:
        hint = "Give --data for the error of the outputs and the latency."
        parts += [Text(hint), Text()]
    if result.layers is not None:
        parts.append(layers_view(result.layers, top))
    return Group(*parts, _operators_view(result))


def _sizes_view(result: Comparison) -> RenderableType:
    a, b = result.sizes
    listed = table("", "A", "B", "A / B", right=["A", "B", "A / B"])
    for label, ours, theirs, text in (
        ("file", a.file_bytes, b.file_bytes, bytes_text),
        ("file after zstd -19", a.zstd_bytes, b.zstd_bytes, bytes_text),
        ("parameters", a.parameters, b.parameters, count_text),
        ("non-zero parameters", a.nonzero_parameters, b.nonzero_parameters, count_text),
        ("multiply-adds", a.macs, b.macs, count_text),
    ):
        if ours is not None and theirs is not None:
            ratio = times_text(ours / theirs) if theirs else "-"
            listed.add_row(label, text(ours), text(theirs), ratio)
        elif ours is not None or theirs is not None:  # zstd -19 takes too long on large files
            known = [NOT_MEASURED if size is None else text(size) for size in (ours, theirs)]
            listed.add_row(label, *known, "-")
    if result.latency is not None:
        latency = result.latency
        times = seconds_text(latency.reference_s), seconds_text(latency.candidate_s)
        listed.add_row("latency, one thread", *times, times_text(latency.speedup))
    if result.task is not None:
        task = result.task
        listed.add_row(task.name, f"{task.before:.4g}", f"{task.after:.4g}", "")
    head = Text(f"A {result.paths[0]}\nB {result.paths[1]}")
    return Group(head, Text(), listed, Text())


def _operators_view(result: Comparison) -> RenderableType:
    ours, theirs = result.operators
    listed = table("operator", "A", "B", right=["A", "B"])
    differing = [op for op in sorted({*ours, *theirs}) if ours[op] != theirs[op]]
    if not differing:
        return Text("Both have the same operators.")
    for op in differing:
        listed.add_row(op, str(ours[op]), str(theirs[op]))
    return section("Operators whose number differs", listed)

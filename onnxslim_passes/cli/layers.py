"""`compare --layers`: which layers cost the fidelity, and the options that leave them alone."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from onnxslim_passes.calibration import Samples
from onnxslim_passes.evaluation.layers import LayerError, LayerErrors, compare_layers
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Pass, Progress
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.recipe import build_pass, format_pass
from onnxslim_passes.report.manifest import read_manifest
from onnxslim_passes.report.terminal import section, table
from onnxslim_passes.report.wording import db_text
from onnxslim_passes.runtime import Session
from onnxslim_passes.search import leave_out

__all__ = ["LayerComparison", "layer_comparison", "layers_view", "remedy_lines"]

# A remedy that brings less than this is none: the error is spread over the network.
_WORTH_DB = 1.0

# Above this two models differ by the rounding of float32 alone.
_ROUNDING_DB = 90.0


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """Errors of layers and what to do.

    Attributes:
        errors: of all layers.
        overrides: passes that leave the worst layers alone, as `--pass` takes them; empty if none
            of ours had a hand in them.
    """

    errors: LayerErrors
    overrides: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, the worst layer first."""
        errors = self.errors
        mended = errors.mended
        return {
            "samples": errors.samples,
            "effect_samples": errors.effect_samples,
            "ranked": [dataclasses.asdict(layer) for layer in errors.ranked()],
            "accumulated": [
                {"name": x.name, "accumulated_db": x.accumulated_db} for x in errors.layers
            ],
            "remedy": None
            if mended is None
            else {
                "layers": [layer.name for layer in mended.layers],
                "before_db": mended.before_db,
                "after_db": mended.after_db,
                "overrides": list(self.overrides),
            },
        }


def layer_comparison(
    models: tuple[Model, Model],
    samples: Samples,
    session: Session,
    *,
    top: int,
    progress: Progress,
) -> LayerComparison:
    """Measures the layers of two models, the reference first."""
    errors = compare_layers(
        *models, lambda: samples.feeds(session.inputs), top=top, progress=progress
    )
    worst = errors.mended.layers if errors.mended is not None else ()
    return LayerComparison(errors, _overrides(models[1], worst))


def _overrides(model: Model, layers: Sequence[LayerError]) -> tuple[str, ...]:
    """The passes that made `model`, if they are known, such that they leave the layers alone."""
    if not layers:
        return ()
    manifest = read_manifest(model)
    if manifest is None:
        nodes = tuple(dict.fromkeys(node for layer in layers for node in layer.nodes))
        return (format_pass(QuantizeStatic(exclude=nodes)),)
    passes: list[Pass] = []
    for entry in manifest.recipe:
        options = {key: value for key, value in entry.items() if key != "name"}
        passes.append(build_pass(str(entry["name"]), options))
    changed = leave_out(passes, manifest.decisions, layers).changed
    return tuple(format_pass(pass_) for pass_ in changed)


# ---------------- the view


def layers_view(result: LayerComparison, top: int) -> RenderableType:
    """The tables."""
    errors = result.errors
    ranked = errors.ranked()
    if not ranked:
        return Text("Both models compute all layers alike.\n")
    parts: list[RenderableType] = [_ranking_view(errors, ranked, top)]
    parts.append(_falls_view(errors))
    return Group(*parts)


def remedy_lines(result: LayerComparison) -> list[str]:
    """What to do, and the options to copy, a line each, to be printed without wrapping them."""
    mended = result.errors.mended
    if mended is None:
        return []
    names = ", ".join(layer.name for layer in mended.layers)
    before, after = db_text(mended.before_db), db_text(mended.after_db)
    few = "this layer" if len(mended.layers) == 1 else f"these {len(mended.layers)} layers"
    lines = [f"Remedy: with {few} in float the outputs go from {before} to {after}: {names}."]
    if not mended.after_db - mended.before_db >= _WORTH_DB:
        lines.append("No few layers are to blame: the error is spread over the network.")
    elif result.overrides:
        lines.append("Add to the command that made B:")
        lines += [f"    --pass {shlex.quote(override)}" for override in result.overrides]
    else:
        lines.append("No pass that made B says that it changed them.")
    return lines


def _ranking_view(errors: LayerErrors, ranked: Sequence[LayerError], top: int) -> RenderableType:
    right = ["own output", "model's output", "accumulated"]
    listed = table("layer", "operator", *right, right=right)
    for layer in ranked[:top]:
        alone = "-" if layer.output_db is None else _text(layer.output_db)
        figures = _text(layer.local_db), alone, _text(layer.accumulated_db)
        listed.add_row(Text(layer.name), layer.operator, *figures)
    changed = len(ranked)
    shown = f"the worst {top} of {changed}" if changed > top else f"{changed}"
    note = Text(
        f"SQNR with this layer alone compressed, all others float: of its own output "
        f"({errors.samples} samples) and of the model's ({errors.effect_samples} samples; '-' was "
        "not tried). Accumulated: its output in the compressed model."
    )
    return section(f"Changed layers, {shown}, by what they cost the model's output", listed, note)


def _falls_view(errors: LayerErrors) -> RenderableType:
    listed = table("layer", "operator", "accumulated", right=["accumulated"])
    for layer in errors.falls():
        listed.add_row(Text(layer.name), layer.operator, _text(layer.accumulated_db))
    return section("Where the SQNR falls off, in the order of the network", listed)


def _text(decibels: float) -> str:
    return "rounding" if decibels > _ROUNDING_DB else db_text(decibels)

"""`explain`: why a node or weight of a compressed model was, or was not, compressed.

Everything comes from the manifest that the file carries; the model is not run.
"""

import fnmatch
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.text import Text

from onnxslim_passes.cli.common import JsonFlag
from onnxslim_passes.errors import ModelError, unknown_name
from onnxslim_passes.model import Constant, Model, Node, Variable, load
from onnxslim_passes.recipe import format_option
from onnxslim_passes.report.manifest import Manifest, read_manifest
from onnxslim_passes.report.records import Decision
from onnxslim_passes.report.terminal import (
    pairs,
    print_json,
    reason_lines,
    result_console,
    table,
)

__all__ = ["explain"]

# No decoder of one weight has more tensors than this; a chain of layers soon has.
DECODER_TENSORS = 256

Decided = tuple[str, Decision]
Tensor = Constant | Variable


def explain(
    model: Annotated[Path, Parameter(help="A model that `compress` wrote.")],
    name: Annotated[
        str | None, Parameter(help="A node or weight, or a pattern such as 'conv*'.")
    ] = None,
    /,
    *,
    json: JsonFlag = False,
) -> None:
    """Why a node or weight of a compressed model was, or was not, compressed."""
    loaded = load(model)
    manifest = read_manifest(loaded)
    if manifest is None:
        raise ModelError(
            f"{model} carries no manifest, so that it was not written by onnxslim-passes, or "
            "another tool removed its metadata; compress the original again"
        )
    if name is None:
        data, view = _summary_data(manifest), _summary_view(manifest)
    else:
        decided, note = _about(loaded, manifest, name)
        data, view = _about_data(name, decided, note), _about_view(name, decided, note)
    if json:
        print_json(data)
    else:
        result_console().print(view)


# ---------------- the whole file


def _summary_data(manifest: Manifest) -> dict[str, Any]:
    return {
        "source": manifest.source,
        "source_sha256": manifest.source_sha256,
        "versions": manifest.versions,
        "seed": manifest.seed,
        "recipe": list(manifest.recipe),
        "decisions": [_decision_data(*item) for item in manifest.decisions],
    }


def _decision_data(name: str, decision: Decision) -> dict[str, Any]:
    return {
        "pass": name,
        "where": decision.where,
        "taken": decision.taken,
        "reason": decision.reason,
        "figures": dict(decision.figures),
    }


def _summary_view(manifest: Manifest) -> RenderableType:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    head = pairs(
        [
            ("source", f"{manifest.source or 'not a file'}, SHA-256 {manifest.source_sha256}"),
            ("made with", versions),
            ("seed", str(manifest.seed)),
        ]
    )
    parts: list[RenderableType] = [head, Text(), Text("Passes and what they decided", "bold")]
    for name, options in _steps(manifest):
        mine = [decision for by, decision in manifest.decisions if by == name]
        taken = sum(decision.taken for decision in mine)
        parts += [Text(), Text(f"{name}{options}", "bold"), *_reasons(mine, taken)]
    hint = "One in full: onnxslim-passes explain FILE NAME, or a pattern such as 'conv*'"
    return Group(*parts, Text(), Text(hint))


def _steps(manifest: Manifest) -> Iterable[tuple[str, str]]:
    """Every pass with its options as text, in order; first what was decided at load."""
    named = {name for name, _ in manifest.decisions}
    if "load" in named:
        yield "load", ""
    for step in manifest.recipe:
        options = [f"{key}={format_option(value)}" for key, value in step.items() if key != "name"]
        yield str(step["name"]), f" ({', '.join(options)})" if options else ""


def _reasons(decisions: list[Decision], taken: int) -> Iterable[Text]:
    if not decisions:
        yield Text("  no candidates")
        return
    yield Text(f"  changed {taken} of {len(decisions)} candidates")
    for word, wanted in (("changed", True), ("left", False)):
        chosen = [decision for decision in decisions if decision.taken is wanted]
        yield from (Text(f"  {word} {line}") for line in reason_lines(chosen))


# ---------------- one name


def _about(model: Model, manifest: Manifest, name: str) -> tuple[list[Decided], str]:
    """The decisions on a name, and a note on how they were found.

    Raises:
        UnknownNameError: neither the manifest nor the model knows it; with the nearest name.
    """
    wanted = [item for item in manifest.decisions if item[1].where == name]
    if wanted:
        return wanted, ""
    nodes = {label: node for node in model.nodes() for label in (node.where, node.name) if label}
    if name in nodes:
        sources = _constants_behind(nodes[name])
        wanted = [item for item in manifest.decisions if item[1].where in sources]
        note = f"{name} is a {nodes[name].op} node; these are the decisions on its weights."
        return wanted, note if wanted else f"No pass had {name} or its weights as a candidate."
    constants = {label for item in model.constants() for label in (item.where, item.name)}
    if name in constants:
        return [], f"{name} is a constant of this file; no pass had it as a candidate."
    matching = [item for item in manifest.decisions if fnmatch.fnmatchcase(item[1].where, name)]
    if matching:
        return matching, ""
    places = {decision.where for _, decision in manifest.decisions}
    raise unknown_name("node or weight", name, sorted(places | set(nodes) | constants))


def _constants_behind(node: Node) -> set[str]:
    """Names of the constants that a node takes, also through decoders and Q/DQ."""
    found: set[str] = set()
    for tensor in node.inputs:
        ancestors = _ancestors(tensor)
        if all(isinstance(item, Constant) or item.inputs for item in ancestors):
            found.update(item.name for item in ancestors)
            found.update(item.where for item in ancestors if isinstance(item, Constant))
    return found


def _ancestors(tensor: Tensor) -> set[Tensor]:
    """A tensor and all it is computed from; none if they are too many for a decoder."""
    pending, seen = [tensor], {tensor}
    while pending:
        item = pending.pop()
        fresh = {taken for maker in item.inputs for taken in maker.inputs} - seen
        seen |= fresh
        pending.extend(fresh)
        if len(seen) > DECODER_TENSORS:
            return set()
    return seen


def _about_data(name: str, decided: list[Decided], note: str) -> dict[str, Any]:
    return {
        "name": name,
        "note": note,
        "decisions": [_decision_data(*item) for item in decided],
    }


def _about_view(name: str, decided: list[Decided], note: str) -> RenderableType:
    if not decided:
        return Text(note)
    listed = table("where", "pass", "changed", "why", "figures")
    for by, decision in decided:
        figures = ", ".join(f"{key} {_figure(value)}" for key, value in decision.figures.items())
        cells = (decision.where, by, "yes" if decision.taken else "no", decision.reason, figures)
        listed.add_row(*(Text(cell) for cell in cells))
    return Group(Text(note or name, "bold"), listed)


def _figure(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

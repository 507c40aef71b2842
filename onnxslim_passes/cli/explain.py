"""`explain`: why a node or weight of a compressed model was, or was not, compressed.

Everything comes from the manifest that the file carries; the model is not run.
"""

import fnmatch
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxslim_passes.cli.common import JsonFlag
from onnxslim_passes.errors import ModelError, unknown_name
from onnxslim_passes.model import Constant, Model, Node, Variable, load
from onnxslim_passes.recipe import format_option
from onnxslim_passes.report.manifest import Manifest, read_manifest
from onnxslim_passes.report.records import AT_LOAD, Decision
from onnxslim_passes.report.terminal import (
    pairs,
    print_json,
    reasons_grid,
    result_console,
    section,
    table,
)
from onnxslim_passes.report.wording import bytes_text, reason_rows

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
        data, view = _about_data(name, decided, note), _about_view(decided, note)
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
    parts: list[RenderableType] = [head, Text()]
    waiting = iter(manifest.decisions)
    for (name, options), count in zip(_steps(manifest), manifest.counts, strict=True):
        mine = [decision for _, decision in islice(waiting, count)]
        if name == AT_LOAD and not mine:
            continue
        parts.append(section(f"{name}{options}", _reasons(mine)))
        stored = _by_encoding(mine)
        if stored is not None:
            parts.append(section("Bytes by encoding", stored))
    hint = "One in full: onnxslim-passes explain FILE NAME, or a pattern such as 'conv*'"
    return Group(*parts, Text(hint))


def _steps(manifest: Manifest) -> Iterable[tuple[str, str]]:
    """Every pass with its options as text, in order; first what was decided at load."""
    yield AT_LOAD, ""
    for step in manifest.recipe:
        options = [f"{key}={format_option(value)}" for key, value in step.items() if key != "name"]
        yield str(step["name"]), f" ({', '.join(options)})" if options else ""


def _by_encoding(decisions: Iterable[Decision]) -> RenderableType | None:
    """Weights, bytes before and after, and the entropy bound, encoding by encoding; None if none.

    The bound is that of an ideal code of order 0, without a table; it is known where a weight has
    at most 256 values.
    """
    rows: dict[str, list[Decision]] = {}
    for decision in decisions:
        if "encoding" in decision.figures and "before_bytes" in decision.figures:
            rows.setdefault(str(decision.figures["encoding"]), []).append(decision)
    if not rows:
        return None
    listed = table("encoding", "weights", "before", "after", "entropy bound", right=("weights",))
    for encoding, members in sorted(rows.items()):
        before, after = (
            sum(int(member.figures[key]) for member in members)
            for key in ("before_bytes", "after_bytes")
        )
        bounds = [_bound_bytes(member) for member in members]
        known = sum(bound for bound in bounds if bound is not None)
        bound = bytes_text(known) if None not in bounds else ""
        listed.add_row(encoding, str(len(members)), bytes_text(before), bytes_text(after), bound)
    return listed


def _bound_bytes(decision: Decision) -> int | None:
    figures = decision.figures
    if "entropy_bits" not in figures:
        return None
    elements = 8 * float(figures["after_bytes"]) / float(figures["bits_per_weight"])
    return round(float(figures["entropy_bits"]) * elements / 8)


def _reasons(decisions: list[Decision]) -> RenderableType:
    """What was changed and what was left, counted by reason."""
    if not decisions:
        return Text("no candidates")
    return reasons_grid(
        (word, *row)
        for word, wanted in (("changed", True), ("left", False))
        for row in reason_rows(item for item in decisions if item.taken is wanted)
    )


# ---------------- one name


def _about(model: Model, manifest: Manifest, name: str) -> tuple[list[Decided], str]:
    """The decisions on a name, and a note if there are none.

    A node brings the decisions on its weights along, a weight those on the nodes that take it.

    Raises:
        UnknownNameError: neither the manifest nor the model knows it; with the nearest name.
    """
    name = manifest.short_names.get(name, name)
    places = {decision.where for _, decision in manifest.decisions}
    nodes = {label: node for node in model.nodes() for label in (node.where, node.name) if label}
    names = _related(model, nodes, name)
    decided = [item for item in manifest.decisions if item[1].where in {name, *names}]
    if decided:
        return decided, ""
    if names:
        return [], f"{name} is in this file, but no pass had it as a candidate."
    decided = [item for item in manifest.decisions if fnmatch.fnmatchcase(item[1].where, name)]
    if decided:
        return decided, ""
    constants = {label for item in model.constants() for label in (item.where, item.name)}
    raise unknown_name("node or weight", name, sorted(places | set(nodes) | constants))


def _related(model: Model, nodes: dict[str, Node], name: str) -> set[str]:
    """The name itself and what belongs to it in the file; empty if the file has no such name."""
    if name in nodes:
        return {name, nodes[name].where, *_constants_behind(nodes[name])}
    constants = [item for item in model.constants() if name in (item.name, item.where)]
    if not constants:
        # A stored or quantized weight goes by other names: w_quantized, w_scale, w_codes...
        constants = [item for item in model.constants() if item.name.startswith(f"{name}_")]
    related = {label for item in constants for label in (item.name, item.where)}
    for node in _takers(constants):
        related |= {node.where, node.name}
    return related - {""}


def _takers(constants: list[Constant], hops: int = 4) -> Iterator[Node]:
    """The nodes that take constants, through decoders and Q/DQ of at most so many hops."""
    tensors: list[Tensor] = list(constants)
    for _ in range(hops):
        taken_by = dict.fromkeys(node for tensor in tensors for node in tensor.outputs)
        yield from taken_by
        tensors = [
            tensor
            for node in taken_by
            if all(isinstance(item, Constant) or item in tensors for item in node.inputs)
            for tensor in node.outputs
        ]


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


def _about_view(decided: list[Decided], note: str) -> RenderableType:
    """One block a place, one entry a decision; reads well at any width."""
    if not decided:
        return Text(note)
    parts: list[RenderableType] = []
    for place in dict.fromkeys(decision.where for _, decision in decided):
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for by, decision in decided:
            if decision.where == place:
                word = "changed" if decision.taken else "left"
                grid.add_row(Text(by), word, Text(decision.reason))
                figures = ", ".join(f"{k} {_figure(v)}" for k, v in decision.figures.items())
                if figures:
                    grid.add_row("", "", Text(figures, "dim"))
        parts.append(section(place, grid))
    return Group(*parts)


def _figure(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

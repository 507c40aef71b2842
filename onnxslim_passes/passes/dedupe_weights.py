"""Stores equal constants once.

Constants are equal if element type, shape and every bit are. The one that stays belongs to the
innermost graph around all consumers, since a body sees the constants of the graphs around it; a
function sees only its own. Values are read only where another constant has the same type, shape
and size.
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from onnxslim_passes.model import Constant, Graph, Model
from onnxslim_passes.model.payload import ExternalPayload, FilePayload, stored_bytes
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options

__all__ = ["DedupeWeights"]


@pass_options
class DedupeWeights(Pass):
    """Equal payloads are stored once and shared by their consumers."""

    name: ClassVar[str] = "dedupe-weights"
    stage: ClassVar[Stage] = Stage.PREPARE
    summary: ClassVar[str] = "equal constants are stored once"
    references: ClassVar[tuple[str, ...]] = (
        "ONNX IR specification, names within a graph: bodies see the values of outer graphs",
    )
    lossless: ClassVar[bool] = True

    min_bytes: Annotated[
        int,
        Field(
            ge=1,
            description="smaller constants are left alone: shared, they save little, and passes "
            "that change one of them must part them again",
        ),
    ] = 64

    def apply(self, model: Model, context: Context) -> PassResult:
        """Shares constants within the main graph and its bodies, and within each function."""
        outputs = {tensor for graph in model.graphs() for tensor in graph.outputs}
        decisions: list[Decision] = []
        for root in (model.graph, *model.functions):
            decisions.extend(self._share(model, root, outputs, context))
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed, tuple(decisions))

    def _share(
        self, model: Model, root: Graph, outputs: set[object], context: Context
    ) -> Iterator[Decision]:
        constants = [held for graph in _family(root) for held in graph.initializers]
        used = [held for held in constants if held.outputs or held in outputs]
        large = [held for held in used if _dense_bytes(held) >= self.min_bytes]
        if len(large) < len(used):
            count = len(used) - len(large)
            reason = f"constants of fewer than min_bytes={self.min_bytes} bytes: {count}"
            yield Decision(where=root.path or "graph", taken=False, reason=reason)
        for equal in _equal(context.progress.track(large, self.name, len(large))):
            yield from _merge(model, equal, outputs)


def _family(root: Graph) -> Iterator[Graph]:
    """A graph and all bodies in it, outer ones first."""
    pending = [root]
    while pending:
        graph = pending.pop(0)
        yield graph
        pending.extend(body for node in graph.nodes for _, body in node.bodies())


def _dense_bytes(constant: Constant) -> int:
    """Bytes of the values, however the file holds them."""
    if constant.dtype == object:
        return constant.nbytes
    return stored_bytes(constant.elem_type, constant.size)


def _equal(constants: Iterable[Constant]) -> Iterator[list[Constant]]:
    """The groups of at least two equal constants, in order of their first."""
    alike: dict[Hashable, list[Constant]] = defaultdict(list)
    for constant in constants:
        kind = (constant.elem_type, constant.shape, constant.sparse)
        alike[kind].append(constant)
    for candidates in alike.values():
        groups: dict[bytes, list[Constant]] = defaultdict(list)
        if len(candidates) > 1:
            for constant in candidates:
                groups[_digest(constant)].append(constant)
        yield from (group for group in groups.values() if len(group) > 1)


def _digest(constant: Constant) -> bytes:
    """SHA-256 of the values; those beside the model are read in pieces."""
    digest = hashlib.sha256()
    payload = constant.payload
    whole_bytes = constant.dtype.itemsize * constant.size == _dense_bytes(constant)
    if constant.dtype == object:
        digest.update(repr(constant.values.tolist()).encode())
    elif isinstance(payload, ExternalPayload | FilePayload) and whole_bytes:
        for piece in payload.chunks():
            digest.update(piece)
    else:
        digest.update(np.ascontiguousarray(constant.values).tobytes())
    return digest.digest()


def _merge(model: Model, equal: Sequence[Constant], outputs: set[object]) -> Iterator[Decision]:
    """Lets the consumers of equal constants share one."""
    free = []
    for constant in equal:
        reason = _obstacle(constant, outputs)
        if reason:
            twin = next(other for other in equal if other is not constant)
            reason = f"equals {twin.where!r}, but {reason}"
            yield Decision(where=constant.where, taken=False, reason=reason)
        else:
            free.append(constant)
    if len(free) < 2:
        return
    owner = _innermost_around([constant.owner for constant in free if constant.owner is not None])
    kept = next((constant for constant in free if constant.owner is owner), None)
    # The label is that of the file, also if what stays has to move outwards.
    where, copies = (kept or free[0]).where, [held.where for held in free if held is not kept]
    if kept is None:
        kept, copies = _moved(free[0], owner), copies[1:]
    saved = 0
    for constant in free:
        if constant is kept:
            continue
        model.replace_uses(constant, kept)
        assert constant.owner is not None  # or it would have no place in a file
        constant.owner.initializers.remove(constant)
        saved += constant.nbytes
    if kept not in free:
        saved -= kept.nbytes
    yield Decision(
        where=where,
        taken=True,
        reason=f"stored once for {_listed(copies)}, too",
        figures={"copies": len(copies), "saved_bytes": saved},
    )


def _obstacle(constant: Constant, outputs: set[object]) -> str:
    """Why a constant can be no other's stand-in, nor be replaced, or ""."""
    if constant.input_info is not None:
        return "is a graph input, whose value a caller may override"
    if constant in outputs:
        return "is an output of its graph"
    return ""


def _innermost_around(graphs: Sequence[Graph]) -> Graph:
    """The innermost graph that is, or is around, each of these."""
    paths = [_lineage(graph) for graph in graphs]
    common = paths[0][0]
    for level in zip(*paths, strict=False):
        if any(graph is not level[0] for graph in level):
            break
        common = level[0]
    return common


def _lineage(graph: Graph) -> list[Graph]:
    """From the main graph or function down to a body."""
    lineage = [graph]
    while lineage[-1].parent is not None:
        lineage.append(lineage[-1].parent)
    return lineage[::-1]


def _moved(constant: Constant, owner: Graph) -> Constant:
    """A constant with the same payload in an outer graph, under a name that shadows nothing."""
    moved = Constant(owner.fresh_name(constant.name), constant.payload, owner)
    moved.description = constant.description
    owner.initializers.append(moved)
    return moved


def _listed(names: Sequence[str]) -> str:
    """The first names of a list."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more

"""Replaces what depends on constants alone by its value.

A node is evaluated once, in ONNX Runtime with its own kernels, if all its inputs are constants or
results of such nodes; `Shape` and `Size` of a tensor whose sizes are all known count as constants.
Exporters leave such arithmetic behind: paddings computed from shapes, weights that are cast,
transposed or reshaped, and the decoders that `store-weights` wrote.

ONNX Runtime does the same when it loads a model, so that the gain is not time, but that other
passes see a plain weight instead of a computation, and that the file is smaller. A file must not
grow by it: a result larger than the constants that it makes superfluous is left to the runtime.
Equal computations (branches of an If that slice one weight alike) have one result between them,
stored once.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import numpy as np
import onnx
from pydantic import Field

from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.model import Constant, Graph, Model, Node, Variable
from onnxslim_passes.model.exporting import Exporter, sorted_nodes
from onnxslim_passes.model.types import Types, infer_types
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.folding import Array, evaluate, infer_sizes
from onnxslim_passes.runtime import open_session
from onnxslim_passes.storage.recognition import decoder_constants

__all__ = ["FoldConstants"]

_RANDOM = frozenset(
    [
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        *("Multinomial", "Bernoulli", "Dropout"),
    ]
)
_DOMAINS = frozenset(["", "ai.onnx.ml"])
# An intermediate result larger than this must not be out of proportion to what it is made of.
_LARGE_BYTES = 64 << 20
_PROPORTION = 16
# Constants up to this size are compared by content.
_COMPARED_BYTES = 256


@dataclass
class _Scope:
    """The main graph or one function, with its bodies, and what can be said of its nodes.

    Attributes:
        root: the main graph or function.
        evaluable: nodes that depend on constants alone, in topological order.
        refused: why other nodes that take constants only stay as they are.
        values: results that are known.
        sizes: bytes of the outputs of `evaluable`.
        twins: for each output the first one that is computed in the same way.
    """

    root: Graph
    evaluable: list[Node] = field(default_factory=list)
    refused: dict[Node, str] = field(default_factory=dict)
    values: dict[Variable, Array] = field(default_factory=dict)
    sizes: dict[Variable, int] = field(default_factory=dict)
    twins: dict[Variable, Variable] = field(default_factory=dict)

    def refuse(self, reasons: Mapping[Node, str]) -> None:
        """Takes nodes out, and all that depend on them."""
        self.refused.update(reasons)
        lost = {tensor for node in reasons for tensor in node.outputs}
        kept = []
        for node in self.evaluable:
            if node in reasons:
                continue
            if any(tensor in lost for tensor in node.inputs):
                lost.update(node.outputs)
            else:
                kept.append(node)
        self.evaluable = kept


@pass_options
class FoldConstants(Pass):
    """Computes at once what does not depend on the inputs."""

    name: ClassVar[str] = "fold-constants"
    stage: ClassVar[Stage] = Stage.PREPARE
    summary: ClassVar[str] = "what depends on constants alone becomes a constant"
    references: ClassVar[tuple[str, ...]] = (
        "ONNX Runtime, Graph optimizations: constant folding, "
        "https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html",
    )
    lossless: ClassVar[bool] = True

    max_growth: Annotated[
        int,
        Field(
            ge=0,
            description="bytes by which a result may be larger than the constants that nobody "
            "needs after it is folded",
        ),
    ] = 1024
    unpack: Annotated[
        bool,
        Field(
            description="fold the decoders that store-weights wrote, too, whatever the size, so "
            "that passes see the weights; store-weights packs them again"
        ),
    ] = True

    def apply(self, model: Model, context: Context) -> PassResult:
        """Folds in the main graph, in bodies and in functions; then removes what nobody uses."""
        if any(node.op == "If" for node in model.nodes()):
            trial = model.copy()
            account = self._fold_all(trial)
            if account.changed and (refusal := _refused_since(model, trial)):
                decisions = tuple(
                    replace(decision, taken=False, reason=refusal) if decision.taken else decision
                    for decision in account.decisions
                )
                return PassResult(changed=False, decisions=decisions)
        return self._fold_all(model)

    def _fold_all(self, model: Model) -> PassResult:
        taken: list[Decision] = []
        while True:
            # What is folded lets ONNX infer more shapes, and frees constants that pay for more.
            folded, decisions = self._fold(model)
            taken.extend(decision for decision in decisions if decision.taken)
            if not folded:
                break
        passed_over = [decision for decision in decisions if not decision.taken]
        return PassResult(bool(taken), (*taken, *passed_over))

    def _fold(self, model: Model) -> tuple[bool, list[Decision]]:
        """One round over the whole model; whether a node was folded."""
        shapes = _static_shapes(model)
        outputs = {tensor for graph in model.graphs() for tensor in graph.outputs}
        packed = decoder_constants(model)
        decisions: list[Decision] = []
        folded = False
        for root in (model.graph, *model.functions):
            scope = _collect(root, shapes, outputs, packed if not self.unpack else set())
            self._measure(model, scope)
            chosen = self._compute(model, scope, outputs, packed if self.unpack else set())
            decisions.extend(_decisions(scope, chosen))
            _replace(model, chosen, scope)
            folded |= bool(chosen)
        removed = model.remove_unused()
        if removed and not folded:
            reason = "nodes and constants that nothing used were removed"
            figures = {"removed": removed}
            decisions.append(Decision(where="graph", taken=True, reason=reason, figures=figures))
        return folded, decisions

    def _measure(self, model: Model, scope: _Scope) -> None:
        """Fills in all sizes; what ONNX cannot infer is computed, from known inputs outwards."""
        while scope.evaluable:
            sizes = infer_sizes(model, scope.root, scope.evaluable, scope.values)
            scope.sizes.update(sizes)
            scope.sizes.update({t: int(a.nbytes) for t, a in scope.values.items()})
            scope.refuse(_out_of_proportion(scope))
            unknown = [node for node in scope.evaluable if not _is_sized(node, scope.sizes)]
            first = [node for node in unknown if _inputs_sized(node, scope)]
            if not first:
                return
            wanted = {tensor for node in first for tensor in node.outputs if tensor.name}
            nodes = _cone(first, scope)
            done = evaluate(model, scope.root, nodes, scope.values, wanted)
            scope.values.update(done.values)
            scope.refuse(done.failures)

    def _compute(
        self,
        model: Model,
        scope: _Scope,
        outputs: Collection[Variable | Constant],
        packed: Collection[Constant],
    ) -> list[Node]:
        """The nodes to replace, with their results in `scope.values`."""
        while True:
            scope.twins = _twins(scope, model.ir_version)
            chosen, stay = self._settle(scope, outputs, packed)
            wanted = {scope.twins[tensor] for tensor in _frontier(chosen)} - scope.values.keys()
            nodes = _cone([tensor.inputs[0] for tensor in wanted], scope)
            done = evaluate(model, scope.root, nodes, scope.values, wanted)
            scope.values.update(done.values)
            if not done.failures:
                scope.refused.update(stay)
                return chosen
            scope.refuse(done.failures)

    def _settle(
        self,
        scope: _Scope,
        outputs: Collection[Variable | Constant],
        packed: Collection[Constant],
    ) -> tuple[list[Node], dict[Node, str]]:
        """Which of the evaluable nodes to replace such that the file does not grow."""
        stay = {
            node: "its result is an output of its graph"
            for node in scope.evaluable
            if any(tensor in outputs for tensor in node.outputs)
        }
        while True:
            chosen = [node for node in scope.evaluable if node not in stay]
            growing = self._growing(chosen, scope, outputs, packed)
            if not growing:
                return chosen, stay
            stay.update(growing)

    def _growing(
        self,
        chosen: list[Node],
        scope: _Scope,
        outputs: Collection[Variable | Constant],
        packed: Collection[Constant],
    ) -> dict[Node, str]:
        """Nodes with results that take more bytes than the constants they make superfluous.

        A constant pays for one result only, so that two transposed copies of a weight are not
        taken for one.
        """
        replaced = set(chosen)
        credit: dict[Constant, int] = {}
        growing = {}
        for tensor, tensors in _results(chosen, scope).items():
            size = scope.sizes[tensor]
            if size <= self.max_growth:
                continue
            leaves = _leaves(tensors, scope)
            # An Expand of one value is not worth unpacking: no pass could do better.
            is_packed = leaves and all(leaf in packed for leaf in leaves)
            if is_packed and tensor.inputs[0].op != "Expand":
                continue
            missing = size - self.max_growth
            for leaf in leaves:
                if leaf not in credit:
                    freed = leaf not in outputs and all(node in replaced for node in leaf.outputs)
                    credit[leaf] = leaf.nbytes if freed else 0
                paid = min(missing, credit[leaf])
                credit[leaf] -= paid
                missing -= paid
            if missing > 0:
                reason = (
                    f"its result of {size:,} bytes is larger than the constants that would be "
                    f"spared, by more than max_growth={self.max_growth}; left to the runtime"
                )
                growing.update({twin.inputs[0]: reason for twin in tensors})
        return growing


# ---------------- candidates


def _static_shapes(model: Model) -> Types:
    """Types inferred from inputs and operators alone, without what the file says in between.

    A file may declare sizes that its exporter saw in one run; they must not be taken for constant.
    """
    if not any(node.op in ("Shape", "Size") for node in model.nodes()):
        return Types()
    outline = model.to_proto_without_weights()
    pending = [outline.graph]
    while pending:
        graph = pending.pop()
        del graph.value_info[:]
        for output in graph.output:
            if output.type.WhichOneof("value") == "tensor_type":
                output.type.tensor_type.ClearField("shape")
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    pending.append(attribute.g)
    return infer_types(model, outline)


def _collect(
    root: Graph,
    shapes: Types,
    outputs: Collection[Variable | Constant],
    packed: Collection[Constant],
) -> _Scope:
    """The candidates of one scope."""
    scope = _Scope(root)
    pending = [(root, True)]
    known: set[Variable] = set()
    while pending:
        graph, runs_once = pending.pop(0)
        for node in sorted_nodes(graph):
            bodies = [body for _, body in node.bodies()]
            pending.extend((body, runs_once and node.op == "If") for body in bodies)
            value = _static_value(node, shapes) if runs_once else None
            if value is not None and not any(tensor in outputs for tensor in node.outputs):
                scope.values[node.outputs[0]] = value
            elif not node.inputs or not all(
                isinstance(t, Constant) or t.is_empty() or t in known for t in node.inputs
            ):
                continue
            elif reason := _refusal(node, packed):
                scope.refused[node] = reason
                continue
            scope.evaluable.append(node)
            known.update(node.outputs)
    return scope


def _static_value(node: Node, shapes: Types) -> Array | None:
    """The result of Shape or Size, if the sizes are known before the model runs."""
    if node.op not in ("Shape", "Size") or node.domain or len(node.inputs) != 1:
        return None
    if isinstance(node.inputs[0], Constant):
        return None
    known = shapes.of(node.inputs[0])
    if known is None or known.shape is None:
        return None
    sizes = [size for size in known.shape if isinstance(size, int) and size >= 0]
    if len(sizes) < len(known.shape):
        return None
    if node.op == "Size":
        return np.array(int(np.prod(sizes, dtype=np.int64)), np.int64)
    return np.array(sizes[node.attr("start", 0) : node.attr("end")], np.int64)


def _refusal(node: Node, packed: Collection[Constant]) -> str:
    """Why a node whose inputs are constants is not evaluated, or ""."""
    overridable = [t for t in node.inputs if isinstance(t, Constant) and t.input_info is not None]
    if overridable:
        return f"takes {overridable[0].name!r}, a graph input whose value a caller may override"
    if node.domain not in _DOMAINS:
        return f"is an operator of the domain {node.domain!r}"
    if any(True for _ in node.bodies()):
        return "holds bodies, which are not evaluated"
    if node.op in _RANDOM:
        return "draws random numbers"
    if node.op == "DequantizeLinear":
        return "its integers are the smaller form, and what runtimes compute with"
    raw = (value for value in node.attrs.values() if isinstance(value, onnx.AttributeProto))
    if any(value.ref_attr_name for value in raw):
        return "an attribute comes from the call of its function"
    if any(tensor in packed for tensor in node.inputs if isinstance(tensor, Constant)):
        return "decodes a stored weight, and unpack=false"
    return ""


# ---------------- sizes


def _is_sized(node: Node, sizes: Mapping[Variable, int]) -> bool:
    return all(tensor in sizes for tensor in node.outputs if tensor.name)


def _inputs_sized(node: Node, scope: _Scope) -> bool:
    return all(isinstance(t, Constant) or t.is_empty() or t in scope.sizes for t in node.inputs)


def _out_of_proportion(scope: _Scope) -> dict[Node, str]:
    """Nodes whose results would fill the memory, although little goes in."""
    found = {}
    for node in scope.evaluable:
        taken = [_bytes(tensor, scope) for tensor in node.inputs]
        given = sum(scope.sizes.get(tensor, 0) for tensor in node.outputs)
        if given > _LARGE_BYTES and given > _PROPORTION * sum(taken):
            found[node] = f"its result of {given:,} bytes is out of proportion to its inputs"
    return found


def _bytes(tensor: Variable | Constant, scope: _Scope) -> int:
    return int(tensor.nbytes) if isinstance(tensor, Constant) else scope.sizes.get(tensor, 0)


# ---------------- cones


def _frontier(chosen: Sequence[Node]) -> Iterator[Variable]:
    """The outputs of replaced nodes that other nodes take."""
    replaced = set(chosen)
    for node in chosen:
        for tensor in node.outputs:
            if any(consumer not in replaced for consumer in tensor.outputs):
                yield tensor


def _cone(nodes: Iterable[Node], scope: _Scope) -> list[Node]:
    """These nodes and what they need that is not known yet, in topological order."""
    needed: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        pending.extend(
            maker
            for tensor in node.inputs
            if not isinstance(tensor, Constant) and tensor not in scope.values
            for maker in tensor.inputs
        )
    return [node for node in scope.evaluable if node in needed]


def _results(chosen: Sequence[Node], scope: _Scope) -> dict[Variable, list[Variable]]:
    """The frontier, by what is stored for it once."""
    results: dict[Variable, list[Variable]] = {}
    for tensor in _frontier(chosen):
        results.setdefault(scope.twins[tensor], []).append(tensor)
    return results


def _twins(scope: _Scope, ir_version: int) -> dict[Variable, Variable]:
    """The first of all outputs that are computed by equal operators from equal inputs."""
    exporter = Exporter(ir_version)
    first: dict[tuple[Hashable, ...], Variable] = {}
    twins: dict[Variable, Variable] = {}
    for node in scope.evaluable:
        message = exporter.node(node)
        for part in ("name", "input", "output", "doc_string", "metadata_props"):
            message.ClearField(part)
        known = scope.values.get(node.outputs[0])
        operation: tuple[Hashable, ...] = (
            (message.SerializeToString(deterministic=True), *(_key(t, twins) for t in node.inputs))
            if known is None
            else (known.tobytes(), known.dtype, known.shape)
        )
        for index, tensor in enumerate(node.outputs):
            twins[tensor] = first.setdefault((index, operation), tensor)
    return twins


def _key(tensor: Variable | Constant, twins: Mapping[Variable, Variable]) -> Hashable:
    """Equal for equal values: of small constants by content, of large ones by identity."""
    if not isinstance(tensor, Constant):
        return "" if tensor.is_empty() else twins[tensor]
    if tensor.nbytes > _COMPARED_BYTES or tensor.dtype == object:
        return tensor
    return (tensor.elem_type, tensor.shape, tensor.values.tobytes())


def _leaves(tensors: Iterable[Variable], scope: _Scope) -> list[Constant]:
    """The constants that results are made of, each once."""
    leaves: dict[Constant, None] = {}
    seen: set[Variable | Constant] = set()
    pending: list[Variable | Constant] = list(tensors)
    evaluable = set(scope.evaluable)
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if isinstance(current, Constant):
            leaves[current] = None
        else:
            makers = [maker for maker in current.inputs if maker in evaluable]
            pending.extend(operand for maker in makers for operand in maker.inputs)
    return list(leaves)


# ---------------- edit


def _refused_since(before: Model, after: Model) -> str:
    """Why ONNX Runtime refuses what it loaded before, or "".

    It inlines a branch of an If whose condition it knows, and then looks at shapes that it did not
    look at before: a model that is wrong there still loads as long as less is known.
    """
    try:
        open_session(after).close()
    except RuntimeRefusedError as error:
        refusal = str(error)
    else:
        return ""
    try:
        open_session(before).close()
    except RuntimeRefusedError:
        return ""
    return f"with the constants in place, {refusal}"


def _replace(model: Model, chosen: Sequence[Node], scope: _Scope) -> None:
    """Puts constants, under the old names, where the results were."""
    made: list[tuple[Constant, str]] = []
    for result, tensors in _results(chosen, scope).items():
        graphs = {tensor.inputs[0].graph for tensor in tensors}
        # What several bodies take is owned by the graph around all of them.
        owner = graphs.pop() if len(graphs) == 1 else scope.root
        constant = owner.add_constant(tensors[0].name, scope.values[result])
        if owner is tensors[0].inputs[0].graph:
            made.append((constant, tensors[0].name))
        for tensor in tensors:
            model.replace_uses(tensor, constant)
    for node in chosen:
        node.graph.remove_node(node)
    for constant, name in made:
        constant.name = name


def _decisions(scope: _Scope, chosen: Sequence[Node]) -> Iterator[Decision]:
    for node in chosen:
        size = sum(scope.sizes.get(tensor, 0) for tensor in node.outputs)
        yield Decision(
            where=node.where,
            taken=True,
            reason=f"{node.op} of constants: computed",
            figures={"result_bytes": size},
        )
    for node, reason in scope.refused.items():
        yield Decision(where=node.where, taken=False, reason=f"{node.op} of constants: {reason}")

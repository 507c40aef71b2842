"""Stores each weight in the fewest bytes that standard operators turn back into it, bit for bit.

The values are not changed. A weight of K distinct values becomes a table and codes of
ceil(log2 K) bits that a Gather looks up; a weight of many zeros a mask or the gaps between the
others, and those others; most weights stay as they are. The choice is made by computed bytes, the
decoder's nodes included, so that a file never grows. ONNX Runtime folds the decoders when it loads
the file: the graph that runs is the one of the dense model, which is checked before this pass
returns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import ml_dtypes
import numpy as np
from pydantic import Field

from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.model import Constant, Graph, Model, Use, Weight
from onnxslim_passes.model.payload import TensorPayload
from onnxslim_passes.passes.base import (
    Context,
    Decision,
    Pass,
    PassResult,
    Stage,
    pass_options,
)
from onnxslim_passes.passes.selection import Selection
from onnxslim_passes.passes.shortened import shortened
from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import Plan, Site, framed_bytes
from onnxslim_passes.storage.choice import Candidate, Offer, choose, common_bytes
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.folding import settle
from onnxslim_passes.storage.pools import pool_offers
from onnxslim_passes.storage.recognition import decoder_constants
from onnxslim_passes.storage.runtimes import (
    encoding_release,
    file_release,
    parse_release,
    release_text,
)
from onnxslim_passes.storage.writer import Replacement, Writer, may_have_functions, short_names

__all__ = ["StoreWeights"]

EncodingName = Literal[
    "dense",
    "sparse",
    "fill",
    "narrow",
    "codebook-uint8",
    "codebook-uint4",
    "codebook-uint2",
    "codebook-packed",
    "codebook-sparse",
    "codebook-huffman",
    "codebook-vectors",
    "codebook-blocks",
    "bitmask",
    "rice",
    "gaps-huffman",
    "grid",
    "chunks",
    "pool",
]

# Tensors and operators that every runtime has had for years.
_PORTABLE: tuple[EncodingName, ...] = (
    *("sparse", "fill", "narrow", "codebook-uint8", "codebook-uint4", "codebook-uint2"),
    *(
        "codebook-packed",
        "codebook-sparse",
        "codebook-vectors",
        "codebook-blocks",
        "grid",
        "chunks",
    ),
)
_COMPACT: tuple[EncodingName, ...] = (*_PORTABLE, "bitmask", "rice")
Level = Literal["portable", "compact", "smallest"]
_LEVELS: dict[Level, tuple[EncodingName, ...]] = {
    "portable": _PORTABLE,
    "compact": _COMPACT,
    "smallest": (*_COMPACT, "codebook-huffman", "gaps-huffman", "pool"),
}

_TYPES = frozenset(
    np.dtype(kind)
    for kind in (
        *(np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.bool_),
        *(np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64),
    )
)
# Beyond this many weights in a model, new names may take three letters.
_TWO_LETTER_WEIGHTS = 250


@dataclass(eq=False)
class _Item:
    """One constant on its way to a decision."""

    constant: Constant
    site: Site
    contents: Contents
    offers: list[Offer]
    chosen: Offer = field(init=False)
    rejected: str = ""

    def __post_init__(self) -> None:
        self.chosen = self.offers[0]

    @property
    def replaced(self) -> bool:
        return self.chosen is not self.offers[0]

    def reject(self, reason: str) -> None:
        """Takes the chosen encoding out of the offers; the first one, as it is, stays."""
        encoding = self.chosen.plan.encoding
        present, *others = self.offers
        self.offers = [present, *(o for o in others if o.plan.encoding != encoding)]
        told = f"{encoding} was rejected: {reason}"
        self.rejected = f"{self.rejected}; {told}" if self.rejected else told


class _Survey:
    """What is known of a model before any of its constants is priced, and the decisions so far."""

    def __init__(self, model: Model, context: Context, options: "StoreWeights") -> None:
        self._encodings = frozenset(options.allowed)
        self._strip_safe = options.strip_safe
        self.stored = decoder_constants(model)
        self.weights = {weight.constant: weight for weight in model.weights()}
        self.progress = context.progress
        self.decisions: list[Decision] = []
        self._ir_version = model.ir_version
        self._functions = may_have_functions(model)
        count = sum(constant.size > 1 for constant in model.constants())
        self._name_bytes = 2 if count <= _TWO_LETTER_WEIGHTS else 3

    def site(self, graph: Graph) -> Site:
        """What this graph allows."""
        as_nodes = graph.is_function or self._ir_version < 4
        # In functions ONNX Runtime does not read what is declared of inner tensors.
        strip_safe = self._strip_safe or graph.is_function
        return Site(
            graph.opset,
            self._ir_version,
            as_nodes,
            self._name_bytes,
            encodings=self._encodings,
            strip_safe=strip_safe,
            functions=self._functions and not graph.is_function,
        )


@pass_options
class StoreWeights(Selection, Pass):
    """Lossless; stands last, and is appended to every pipeline that does not say otherwise."""

    name: ClassVar[str] = "store-weights"
    stage: ClassVar[Stage] = Stage.STORE
    summary: ClassVar[str] = "lossless: the smallest encoding of each weight"
    references: ClassVar[tuple[str, ...]] = (
        "Han, Mao and Dally 2016, Deep Compression: Compressing Deep Neural Networks with Pruning, "
        "Trained Quantization and Huffman Coding, arXiv:1510.00149",
        "ONNX IR specification, sparse initializers (IR version 6)",
    )
    lossless: ClassVar[bool] = True

    level: Annotated[
        Level,
        Field(
            description="portable: tables and sparse initializers, which every runtime rebuilds at "
            "once; compact: masks and gaps too, which ONNX Runtime folds at load; smallest: "
            "Huffman codes and functions too, which load slower and need more memory"
        ),
    ] = "compact"
    encodings: Annotated[
        tuple[EncodingName, ...] | None,
        Field(
            description="ways to store a weight that may be chosen, instead of those of the level; "
            "dense always may"
        ),
    ] = None
    strip_safe: Annotated[
        bool,
        Field(
            description="rely on no declared shapes, so that files fold even after a tool has "
            "removed those; loads slower"
        ),
    ] = False
    min_runtime: Annotated[
        str | None,
        Field(
            pattern=r"^\d+\.\d+(\.\d+)?$",
            description="a release of ONNX Runtime, such as 1.17, with which the file must fold: "
            "only encodings that were tested with it or with older ones are taken",
        ),
    ] = None
    min_elements: Annotated[
        int, Field(ge=2, description="smaller constants are left as they are")
    ] = 32

    @property
    def allowed(self) -> tuple[EncodingName, ...]:
        """The encodings that may be chosen."""
        wanted = _LEVELS[self.level] if self.encodings is None else self.encodings
        if self.min_runtime is None:
            return wanted
        release = parse_release(self.min_runtime)
        return tuple(name for name in wanted if encoding_release(name) <= release)

    def requires(self, model: Model) -> None:
        """Sees that names in `include`, `exclude` and `op_types` occur in the model."""
        self.check(model)

    def apply(self, model: Model, context: Context) -> PassResult:
        """Stores what gets smaller by it, after proof that the runtime folds it."""
        survey = _Survey(model, context, self)
        items: list[_Item] = []
        replacements: dict[Replacement, _Item] = {}
        names = short_names()
        for graph in list(model.graphs()):
            writer = Writer(model, graph, names)
            found = self._candidates(graph, survey)
            _choose_offers(found)
            if "pool" in self.allowed and found:
                _choose_pool(found, survey.site(graph))
            for item in found:
                if item.replaced:
                    root = item.chosen.plan.root
                    replacements[Replacement(item.constant, root, writer)] = item
            items.extend(found)
        self._prove(model, replacements)
        decisions = [*survey.decisions, *map(_decision, items), *_shared_parts(items)]
        if replacements:
            decisions.append(self._needs(model, items))
        if self.level == "smallest":
            decisions = shortened(model, decisions)
        return PassResult(any(decision.taken for decision in decisions), tuple(decisions))

    def _needs(self, model: Model, items: Iterable[_Item]) -> Decision:
        """Says which release of ONNX Runtime the file needs, and whether that is what was asked."""
        used = {item.chosen.plan.encoding for item in items if item.replaced}
        needed = file_release(model.opset, model.ir_version, used)
        text = f"needs ONNX Runtime {release_text(needed)} and opset {model.opset}"
        if self.min_runtime is not None:
            asked = parse_release(self.min_runtime)
            left = [name for name in _LEVELS[self.level] if encoding_release(name) > asked]
            if left:
                text += f"; for min_runtime={self.min_runtime} without {', '.join(left)}"
            if needed > asked:
                text += f"; opset or IR version are newer than min_runtime={self.min_runtime}"
        figures: dict[str, int | float | str] = {
            "min_runtime": release_text(needed),
            "opset": model.opset,
        }
        return Decision(where="the file", taken=False, reason=text, figures=figures)

    def _candidates(self, graph: Graph, survey: "_Survey") -> list[_Item]:
        """The constants of one graph that could be smaller; the survey says why others cannot.

        What no encoding serves is not kept in memory.
        """
        site = survey.site(graph)
        items: list[_Item] = []
        small = 0
        label = f"{self.name} {graph.path}".strip()
        for constant in survey.progress.track(list(graph.initializers), label):
            if constant.size < self.min_elements:
                small += 1
                continue
            verdict = self._passed_over(constant, survey)
            if verdict is not None:
                survey.decisions.append(verdict)
                continue
            item = self._priced(constant, site)
            if len(item.offers) > 1:
                items.append(item)
            else:
                survey.decisions.append(_decision(item))
        if small:
            reason = f"constants of fewer than min_elements={self.min_elements} elements: {small}"
            survey.decisions.append(
                Decision(where=graph.path or "graph", taken=False, reason=reason)
            )
        return items

    def _passed_over(self, constant: Constant, survey: "_Survey") -> Decision | None:
        """Why a constant is no candidate, or None."""
        reason = ""
        if constant in survey.stored:
            reason = "is part of a stored weight already"
        elif constant.dtype not in _TYPES:
            reason = f"its type {constant.dtype} is left as it is"
        elif constant.input_info is not None:
            reason = "is also a graph input, whose value a caller may override"
        elif constant.owner is not None and constant in constant.owner.outputs:
            reason = "is an output of its graph"
        elif not constant.outputs:
            reason = "no node takes it"
        if reason:
            return Decision(where=constant.where, taken=False, reason=reason)
        return self.verdict(survey.weights.get(constant) or _as_weight(constant))

    def _priced(self, constant: Constant, site: Site) -> _Item:
        """Its offers: as it is, and all that is allowed and takes fewer bytes."""
        contents = Contents(constant.values)
        offers = [
            Offer(plan, site)
            for name, encoding in ENCODINGS.items()
            if site.allows(name)
            for plan in encoding.plans(contents, site)
        ]
        present = offers[0]
        if constant.sparse:
            plan = next(iter(ENCODINGS["sparse"].plans(contents, site)), None)
            present = offers[0] if plan is None else Offer(plan, site)
        elif isinstance(constant.payload, TensorPayload):
            # Numbers written as varints can be shorter than raw data.
            message = constant.payload.nbytes - len(constant.name.encode()) + site.name_bytes
            present.own_bytes = min(present.own_bytes, framed_bytes(message))
        smaller = [offer for offer in offers if offer.own_bytes < present.own_bytes]
        return _Item(constant, site, contents, [present, *smaller])

    def _prove(self, model: Model, replacements: dict[Replacement, _Item]) -> None:
        """Applies those that fold; the other weights get what else is small and folds.

        What no encoding is left for goes back to what it was.
        """
        while replacements:
            try:
                rejected = settle(model, list(replacements))
            except RuntimeRefusedError as error:
                reason = f"ONNX Runtime refuses the model, so folding cannot be proved: {error}"
                for item in replacements.values():
                    item.reject(reason)
                    item.chosen = item.offers[0]
                return
            for replacement, reason in rejected.items():
                replacements[replacement].reject(reason)
            _choose_by_graph([replacements[each] for each in rejected])
            replacements = {
                each.with_root(replacements[each].chosen.plan.root): replacements[each]
                for each in rejected
                if replacements[each].replaced
            }


def _choose_offers(items: list[_Item]) -> None:
    offers = choose([Candidate(item.offers) for item in items])
    for item, offer in zip(items, offers, strict=True):
        item.chosen = offer


def _choose_by_graph(items: Iterable[_Item]) -> None:
    """Chooses again; what decoders share is counted as if no other weight had it yet."""
    graphs: dict[Graph | None, list[_Item]] = {}
    for item in items:
        graphs.setdefault(item.constant.owner, []).append(item)
    for found in graphs.values():
        _choose_offers(found)


def _choose_pool(items: list[_Item], site: Site) -> None:
    pooled = pool_offers([(item.contents, item.chosen) for item in items], ENCODINGS, site)
    for at, offer in pooled.items():
        items[at].chosen = offer


def _as_weight(constant: Constant) -> Weight:
    """Any constant, integers included, with the nodes that take it directly."""
    uses = (
        Use(node, index, "other", None, direct=True)
        for node in dict.fromkeys(constant.outputs)
        for index, taken in enumerate(node.inputs)
        if taken is constant
    )
    return Weight(constant, tuple(uses))


def _decision(item: _Item) -> Decision:
    before, after = item.offers[0].own_bytes, item.chosen.own_bytes
    figures: dict[str, int | float | str] = {
        "encoding": item.chosen.plan.encoding,
        "before_bytes": before,
        "after_bytes": after,
        "bits_per_weight": round(8 * after / item.contents.size, 3),
        **item.chosen.plan.figures,
    }
    shared = item.contents.shared
    if shared is not None:
        figures["entropy_bits"] = round(shared.entropy_bits, 3)
    if item.replaced:
        reason = "; ".join(filter(None, (_describe(item.chosen.plan), item.rejected)))
    else:
        reason = item.rejected or f"{item.chosen.plan.encoding} is smallest: {_obstacle(item)}"
    return Decision(where=item.constant.where, taken=item.replaced, reason=reason, figures=figures)


def _describe(plan: Plan) -> str:
    figures = plan.figures
    parts = []
    if "density" in figures:
        parts.append(f"{figures['density']:.1%} stored")
    if "pool" in figures:
        parts.append(f"with {figures['weights']} weights in one stream, {figures['pool']}")
    elif "clusters" in figures:
        values = f"groups of {figures['group']} values" if "group" in figures else "values"
        parts.append(f"{figures['clusters']} {values} per {figures['per']}")
        parts.append(f"{figures['bits']}-bit codes")
    if "values" in figures:
        parts.append(f"values {figures['values']}")
    if "type" in figures:
        parts.append(f"as {figures['type']}")
    if "block" in figures:
        parts.append(f"{figures['bits']}-bit codes, {figures['scales']} scales")
        parts.append(f"blocks of {figures['block']}")
    return f"{plan.encoding}: {', '.join(parts)}" if parts else plan.encoding


def _obstacle(item: _Item) -> str:
    """What keeps a weight from being smaller."""
    contents = item.contents
    if not contents.folds:
        return "its decoder would not fold, because a node output over 1 GiB would be needed"
    zeros = 1 - contents.entries / contents.size
    values = f"{contents.shared.clusters}" if contents.shared else "more than 256"
    return f"{values} distinct values among {contents.size:,}, {zeros:.1%} zeros"


def _shared_parts(items: list[_Item]) -> Iterator[Decision]:
    """What the decoders of a graph share, as one decision, so that the bytes add up."""
    by_graph: dict[Graph | None, list[Offer]] = {}
    for item in items:
        if item.replaced:
            by_graph.setdefault(item.constant.owner, []).append(item.chosen)
    for graph, offers in by_graph.items():
        size = common_bytes(offers)
        if size:
            where = graph.path if graph is not None and graph.path else "graph"
            figures = {"after_bytes": size, "weights": len(offers)}
            reason = "tables and shapes that decoders share"
            yield Decision(where=where, taken=True, reason=reason, figures=figures)

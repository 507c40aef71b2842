"""The layers of two models, and the models that show what each layer does."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.evaluation.transplant.building import Builder
from onnxslim_passes.evaluation.transplant.matching import FLOATS, matched
from onnxslim_passes.evaluation.transplant.side import Side
from onnxslim_passes.model import Constant, Model, Node

# Operators whose constant operand is a weight, by the place it has.
_WEIGHT_PLACES = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "Einsum": (0, 1),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Gather": (0,),
}

_CHAIN, _LOCAL = "chain", "local"


@dataclass(frozen=True)
class Layer:
    """What lies between matched tensors.

    Attributes:
        name: of its first node with weights in the reference, or of the node that makes `tensor`;
            with the number of the other nodes with weights, if there are any.
        operator: of that node.
        nodes: the reference's nodes with weights in it, or the one that makes `tensor`.
        weights: names of the constants that these nodes take.
        weighted: whether `nodes` have weights.
        pairs: what it makes, by the names in the reference and in the candidate; one tensor but
            for nodes such as LSTM.
        changed: False if both models compute it alike, node by node and bit by bit.
    """

    name: str
    operator: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    weighted: bool
    pairs: tuple[tuple[str, str], ...]
    changed: bool

    @property
    def tensor(self) -> str:
        """The first that it makes, by its name in the reference."""
        return self.pairs[0][0]

    @property
    def twin(self) -> str:
        """The same by its name in the candidate."""
        return self.pairs[0][1]


class Twins:
    """A reference and what became of it.

    Args:
        reference: the float model; stays as it is.
        candidate: the compressed one; stays as it is.

    Raises:
        UnsupportedModelError: the models have different opsets that ONNX cannot convert, or no
            tensors to compare.
    """

    def __init__(self, reference: Model, candidate: Model) -> None:
        self._labels = {t.name: node for node in reference.graph.nodes for t in node.outputs}
        opset = max(reference.opset, candidate.opset)
        self._a = Side(_at_opset(reference, opset), suffix="")
        self._b = Side(_at_opset(candidate, opset), suffix="_candidate")
        self._twins = matched(self._a, self._b)
        if not self._twins:
            raise UnsupportedModelError(
                "The two models have no tensors of the same name and shape behind a node, so that "
                "layers cannot be compared; compare a model with what was made from it."
            )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """In the order of the reference."""
        made: dict[int, list[str]] = {}
        for name in self._twins:
            made.setdefault(self._a.maker[name], []).append(name)
        return tuple(self._layer(tensors) for _, tensors in sorted(made.items()))

    def part(self, tensor: str) -> None:
        """Matches a tensor no longer: what has its name in the candidate is something else."""
        del self._twins[tensor]

    def before(self, layer: Layer) -> set[str]:
        """The matched tensors that a layer of the candidate takes, by names in the reference."""
        back = {twin: name for name, twin in self._twins.items()}
        inside = self._b.between(layer.twin, back)
        taken = {name for tensor in inside for name in self._b.uses[self._b.maker[tensor]]}
        return {back[name] for name in taken - {layer.twin} if name in back}

    def _layer(self, tensors: Sequence[str]) -> Layer:
        tensor = tensors[0]
        inside = self._a.between(tensor, self._twins)
        # Nodes as they are called in the file, which conversion to another opset may have lost.
        known = [self._labels[name] for name in inside if name in self._labels]
        weighted = [node for node in known if _has_weight(node)]
        maker = self._labels.get(tensor)
        nodes = list(dict.fromkeys(weighted or ([maker] if maker is not None else known[:1])))
        first = nodes[0].where if nodes else tensor
        rest = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        return Layer(
            name=f"{first}{rest}",
            operator=str(nodes[0].op) if nodes else "",
            nodes=tuple(node.where for node in nodes),
            weights=tuple(dict.fromkeys(w for node in nodes for w in _constants_of(node))),
            weighted=bool(weighted),
            pairs=tuple((name, self._twins[name]) for name in tensors),
            changed=not all(self._same(name) for name in tensors),
        )

    def _same(self, tensor: str) -> bool:
        """Whether the nodes that make a tensor are the same down to matched tensors."""
        back = {twin: name for name, twin in self._twins.items()}
        pending, seen = [(tensor, self._twins[tensor], True)], set()
        while pending:
            left, right, start = pending.pop()
            if (left, right) in seen or (not start and back.get(right) == left):
                continue
            seen.add((left, right))
            if not self._a.looks_like(self._b, left, right):
                return False
            pending.extend((x, y, False) for x, y in self._a.operands(self._b, left, right))
        return True

    # ---- models

    def values(self, layers: Sequence[Layer]) -> onnx.ModelProto:
        """A model that returns two float32 tensors a layer.

        What the layer makes in the reference, and what the candidate's makes of the same inputs.
        """
        built = self._alone(layers)
        for layer in layers:
            built.value(layer.tensor)
            built.value(built.named(self._b, layer.twin, _LOCAL))
        return built.model()

    def probing(self, layers: Sequence[Layer]) -> onnx.ModelProto:
        """As `values`, but the sums of squares of the first and of the difference."""
        built = self._alone(layers)
        for layer in layers:
            built.sum_of_squares(layer.tensor, None)
            built.sum_of_squares(layer.tensor, built.named(self._b, layer.twin, _LOCAL))
        return built.model()

    def _alone(self, layers: Sequence[Layer]) -> Builder:
        """The reference, and layers of the candidate that take its tensors."""
        built = Builder(self._a, self._b)
        built.add(self._a, [layer.tensor for layer in layers], prefix="")
        boundary = built.boundary({twin: name for name, twin in self._twins.items()})
        changed = [layer.twin for layer in layers if layer.changed]
        built.add(self._b, changed, prefix=_LOCAL, boundary=boundary)
        return built

    def measuring(self, layers: Sequence[Layer]) -> onnx.ModelProto:
        """A model that returns sums of squares, float32 scalars, three a layer.

        Of the reference's tensor; of its difference from the candidate's layer alone (not there
        for layers that are not changed); of its difference from the whole candidate.
        """
        built = self._alone(layers)
        built.add(self._b, [layer.twin for layer in layers], prefix=_CHAIN)
        for layer in layers:
            name = layer.tensor
            built.sum_of_squares(name, None)
            if layer.changed:
                built.sum_of_squares(name, built.named(self._b, layer.twin, _LOCAL))
            built.sum_of_squares(name, built.named(self._b, layer.twin, _CHAIN))
        return built.model()

    def hybrid(
        self, layers: Iterable[Layer], base: Literal["reference", "candidate"]
    ) -> onnx.ModelProto:
        """The base with these layers of the other model."""
        if base == "reference":
            ours, theirs = self._a, self._b
            twins = {twin: name for name, twin in self._twins.items()}
            moved = {name: twin for layer in layers for name, twin in layer.pairs}
        else:
            ours, theirs = self._b, self._a
            twins = self._twins
            moved = {twin: name for layer in layers for name, twin in layer.pairs}
        built = Builder(ours, theirs)
        built.add(ours, ours.outputs, prefix="", replaced=moved)
        built.add(theirs, moved.values(), prefix=_LOCAL, boundary=built.boundary(twins))
        for tensor, twin in moved.items():
            built.stand_in(tensor, built.named(theirs, twin, _LOCAL), ours.elem_type(tensor))
        built.keep_outputs()
        return built.model()


def _at_opset(model: Model, opset: int) -> Model:
    if model.opset == opset:
        return model
    work = model.copy()
    try:
        work.convert_opset(opset)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"Layers can be compared in models of one opset only: {error}"
        ) from error
    return work


def _has_weight(node: Node) -> bool:
    places = () if node.domain else _WEIGHT_PLACES.get(str(node.op), ())
    return any(
        place < len(node.inputs) and _is_weight(node.inputs[place], node.op) for place in places
    )


def _is_weight(tensor: object, op: str) -> bool:
    """A constant, or one behind nodes that only restore it."""
    if isinstance(tensor, Constant):
        return op != "Gather" or (tensor.elem_type in FLOATS and len(tensor.shape) > 1)
    makers = list(getattr(tensor, "inputs", ()))
    return bool(makers) and all(isinstance(held, Constant) for held in makers[0].inputs)


def _constants_of(node: Node) -> list[str]:
    return [held.where for held in node.inputs if isinstance(held, Constant)]

"""Two models of one network, float and compressed, cut into layers that can change places.

Tensors are matched by name; compressing keeps the names of what the layers make. A tensor that a
Q/DQ pair rounds right where it is made is matched as it is before the pair, so that rounding
belongs to the layers that take it: a layer on integers is its rounded inputs, its weights and its
arithmetic. Between matched tensors lies a **layer**, whatever nodes it is made of in either model.
So any pair of models will do: static or dynamic quantization, pruned or clustered weights, other
float types, made by this package or another.

Two kinds of models are built from such twins:

- the *measuring* one holds the reference, every changed layer of the candidate fed with the
  reference's tensors, and the whole candidate; its outputs are sums of squares, so that no
  activation leaves it;
- a *hybrid* is one of the two with some layers of the other.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Constant, Model, Node, TensorType

__all__ = ["Layer", "Twins"]

Names = Callable[[str], str]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

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

# Operators that move or select values: what they do to an error says nothing, so that they belong
# to the layers that take their results.
_MOVING = frozenset(
    (
        *("Cast", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool"),
        *("Pad", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    )
)

# What a layer with weights can take in.
_AFFINE = frozenset(("Add", "BatchNormalization", "Div", "Mul", "Sub"))

_CLAMPS = frozenset(("Clip", "Max", "Min", "Relu"))

_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial")
)

_DONOR, _CHAIN, _LOCAL, _OLD = "donor", "chain", "local", "replaced"


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
        self._a = _Side(_at_opset(reference, opset), suffix="")
        self._b = _Side(_at_opset(candidate, opset), suffix="_candidate")
        self._twins = _matched(self._a, self._b)
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

    def _alone(self, layers: Sequence[Layer]) -> "_Builder":
        """The reference, and layers of the candidate that take its tensors."""
        built = _Builder(self._a, self._b)
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
        built = _Builder(ours, theirs)
        built.add(ours, ours.outputs, prefix="", replaced=moved)
        built.add(theirs, moved.values(), prefix=_LOCAL, boundary=built.boundary(twins))
        for tensor, twin in moved.items():
            built.stand_in(tensor, built.named(theirs, twin, _LOCAL), ours.elem_type(tensor))
        built.keep_outputs()
        return built.model()


# ---------------- matching


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
        return op != "Gather" or (tensor.elem_type in _FLOATS and len(tensor.shape) > 1)
    makers = list(getattr(tensor, "inputs", ()))
    return bool(makers) and all(isinstance(held, Constant) for held in makers[0].inputs)


def _constants_of(node: Node) -> list[str]:
    return [held.where for held in node.inputs if isinstance(held, Constant)]


def _matched(a: "_Side", b: "_Side") -> dict[str, str]:
    """Float tensors that both make from their inputs: name in A -> name in B, in A's order."""
    twins: dict[str, str] = {}
    for name in a.made:
        if name not in b.maker:
            continue
        twin = b.before_pair(name)
        if twin in a.maker or a.before_pair(name) != name:
            twin = name
        meant = _meant(a, b, name, twin)
        moving = a.node(meant).op_type in _MOVING and meant not in a.outputs
        fixed = meant in a.fixed or twin in b.fixed
        if not moving and not fixed and _alike(a, b, meant, twin):
            twins.setdefault(meant, twin)
    order = {name: number for number, name in enumerate(a.made)}
    return dict(sorted(twins.items(), key=lambda pair: order[pair[0]]))


def _meant(a: "_Side", b: "_Side", name: str, twin: str) -> str:
    """The tensor of A that the one called `name` in B is.

    A convolution that a BatchNormalization was merged into makes what that one made, under its own
    name. One that a Relu was removed behind, because saturation does its work, may have the
    Relu's.
    """
    maker = a.node(name)
    if maker.op_type in _CLAMPS and b.node(twin).op_type not in _CLAMPS:
        before = maker.input[0]
        same = before in a.maker and before not in b.maker
        if same and a.node(before).op_type == b.node(twin).op_type:
            return str(before)
    taken = b.results_of(twin)
    meant = name
    while (taker := a.only_taker(meant)) is not None:
        made = taker.output[0]
        others = {entry for entry in taker.input if entry and entry != meant}
        if made in b.maker or taker.op_type not in _AFFINE or not others <= a.fixed:
            break
        meant = made
    ours = {output for node in a.takers.get(meant, ()) for output in node.output}
    return meant if meant != name and (taken & ours or meant in a.outputs) else name


def _alike(a: "_Side", b: "_Side", name: str, twin: str) -> bool:
    """Whether both are floats, of shapes that may be the same."""
    if twin not in b.maker:
        return False
    ours, theirs = a.types.get(name), b.types.get(twin) or b.types.get(name)
    if ours is None or theirs is None:
        return False
    if ours.elem_type not in _FLOATS or theirs.elem_type not in _FLOATS:
        return False
    if ours.shape is None or theirs.shape is None:
        return True
    return len(ours.shape) == len(theirs.shape) and not any(
        isinstance(x, int) and isinstance(y, int) and x != y
        for x, y in zip(ours.shape, theirs.shape, strict=True)
    )


class _Side:
    """One of the two models, as messages.

    Attributes:
        proto: the model.
        nodes: of its main graph, in order.
        initializers: of its main graph, by name.
        inputs: names of what it is fed.
        outputs: names of its outputs.
        maker: tensor -> the number of its node.
        made: tensors that nodes make, in order.
        takers: tensor -> the nodes that take it.
        fixed: tensors that do not depend on inputs.
        types: element types and shapes, as far as they are known.
    """

    def __init__(self, model: Model, *, suffix: str) -> None:
        self.proto = model.to_proto(dense=True)
        graph = self.proto.graph
        _rename_functions(self.proto, suffix)
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [entry.name for entry in graph.input if entry.name not in self.initializers]
        self.outputs = [entry.name for entry in graph.output]
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.made = list(self.maker)
        self.uses = [_free_names(node) for node in self.nodes]
        self.takers: dict[str, list[onnx.NodeProto]] = {}
        for node, used in zip(self.nodes, self.uses, strict=True):
            for name in used:
                self.takers.setdefault(name, []).append(node)
        self.fixed = set(self.initializers)
        for node, used in zip(self.nodes, self.uses, strict=True):
            if used <= self.fixed and node.op_type not in _RANDOM:
                self.fixed.update(node.output)
        self.types: dict[str, TensorType] = {}
        types = model.types()
        for node in model.graph.nodes:
            for tensor in node.outputs:
                known = types.of(tensor)
                if known is not None:
                    self.types[str(tensor.name)] = known

    def node(self, tensor: str) -> onnx.NodeProto:
        """The node that makes a tensor."""
        return self.nodes[self.maker[tensor]]

    def only_taker(self, tensor: str) -> onnx.NodeProto | None:
        """The node that takes a tensor, if it is one."""
        takers = self.takers.get(tensor, ())
        return takers[0] if len(takers) == 1 else None

    def results_of(self, tensor: str) -> set[str]:
        """What the nodes that take a tensor make, with all that Q/DQ pairs make of either."""
        found: set[str] = set()
        pending = [(node, True) for node in self.takers.get(tensor, ())]
        while pending:
            node, before = pending.pop()
            pair = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            if pair or before:
                found.update(node.output)
                takers = [taker for name in node.output for taker in self.takers.get(name, ())]
                pending.extend((taker, pair and before) for taker in takers)
        return found

    def elem_type(self, tensor: str) -> int:
        """The element type of a tensor; float32 where it is not known."""
        known = self.types.get(tensor)
        return int(known.elem_type) if known is not None else int(TensorProto.FLOAT)

    def before_pair(self, tensor: str) -> str:
        """The tensor itself, or what it is before a Q/DQ pair that makes it."""
        if tensor not in self.maker or self.node(tensor).op_type != "DequantizeLinear":
            return tensor
        codes = self.node(tensor).input[0]
        if codes not in self.maker or self.node(codes).op_type != "QuantizeLinear":
            return tensor
        source = str(self.node(codes).input[0])
        return source if source in self.maker else tensor

    def between(self, tensor: str, boundary: Collection[str]) -> list[str]:
        """Names of what the nodes make from which a tensor follows, down to `boundary`."""
        found: dict[str, None] = {}
        pending = [tensor]
        while pending:
            name = pending.pop()
            if name in found or name not in self.maker or (name in boundary and name != tensor):
                continue
            found[name] = None
            pending.extend(sorted(self.uses[self.maker[name]]))
        return sorted(found, key=lambda name: self.maker[name])

    def looks_like(self, other: "_Side", left: str, right: str) -> bool:
        """Whether a tensor here and one there are the same input, constant, or node's output."""
        if left in self.initializers and right in other.initializers:
            return _equal(self.initializers[left], other.initializers[right])
        if left in self.maker and right in other.maker:
            return _alike_nodes(self.node(left), other.node(right), left, right)
        return left == right and left in self.inputs and right in other.inputs

    def operands(self, other: "_Side", left: str, right: str) -> list[tuple[str, str]]:
        """The inputs of the nodes that make two tensors, in pairs."""
        if left not in self.maker:
            return []
        pairs = zip(self.node(left).input, other.node(right).input, strict=True)
        return [(x, y) for x, y in pairs if x or y]


def _alike_nodes(a: onnx.NodeProto, b: onnx.NodeProto, left: str, right: str) -> bool:
    """Whether two nodes do the same to their inputs; bodies are held to be different."""
    if (a.op_type, a.domain, len(a.input)) != (b.op_type, b.domain, len(b.input)):
        return False
    if list(a.output).index(left) != list(b.output).index(right):
        return False
    if any(attribute.HasField("g") or attribute.graphs for attribute in a.attribute):
        return False
    return _attributes(a) == _attributes(b)


def _attributes(node: onnx.NodeProto) -> list[bytes]:
    return sorted(entry.SerializeToString(deterministic=True) for entry in node.attribute)


def _equal(a: TensorProto, b: TensorProto) -> bool:
    if a.data_type != b.data_type or list(a.dims) != list(b.dims):
        return False
    return bool(numpy_helper.to_array(a).tobytes() == numpy_helper.to_array(b).tobytes())


# ---------------- building


class _Builder:
    """A graph made of nodes of two models.

    Args:
        base: its tensors keep their names, its constants too.
        donor: the other one.
    """

    def __init__(self, base: _Side, donor: _Side) -> None:
        self._base, self._donor = base, donor
        taken = [*base.maker, *base.initializers, *base.inputs, *donor.maker]
        self._mark = ":"
        while any(self._mark in name[:16] for name in taken):
            self._mark += ":"
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._infos: dict[str, onnx.ValueInfoProto] = {}
        self._made: set[str] = set()
        self._outputs: list[onnx.ValueInfoProto] = []

    def named(self, side: _Side, name: str, prefix: str) -> str:
        """What a tensor of a side is called here."""
        if not name or name in side.inputs:
            return name
        if name in side.fixed:
            return name if side is self._base else f"{_DONOR}{self._mark}{name}"
        return f"{prefix}{self._mark}{name}" if prefix else name

    def boundary(self, twins: Mapping[str, str]) -> dict[str, str]:
        """What the donor takes from the base: its own name -> the name here, of its own type."""
        return {
            theirs: self._cast(ours, self._base.elem_type(ours), self._donor.elem_type(theirs))
            for theirs, ours in twins.items()
        }

    def _cast(self, tensor: str, elem_type: int, wanted: int) -> str:
        if elem_type == wanted:
            return tensor
        name = f"cast{self._mark}{wanted}{self._mark}{tensor}"
        if name not in self._made:
            self._append(helper.make_node("Cast", [tensor], [name], to=wanted))
        return name

    def _append(self, node: onnx.NodeProto) -> None:
        self._nodes.append(node)
        self._made.update(node.output)

    def add(
        self,
        side: _Side,
        wanted: Iterable[str],
        *,
        prefix: str,
        boundary: Mapping[str, str] | None = None,
        replaced: Collection[str] = (),
    ) -> None:
        """Copies the nodes that lead to some tensors.

        Args:
            side: where they come from.
            wanted: names there.
            prefix: of the names here.
            boundary: tensors that are not made but taken: name there -> name here.
            replaced: tensors that are made under another name, so that others can stand in.
        """
        stop = boundary or {}

        def used(name: str) -> str:
            return stop.get(name) or self.named(side, name, prefix)

        def made(name: str) -> str:
            return f"{_OLD}{self._mark}{name}" if name in replaced else used_here(name)

        def used_here(name: str) -> str:
            return self.named(side, name, prefix)

        pending, seen = [(name, True) for name in wanted], set()
        while pending:
            name, start = pending.pop()
            if name in side.initializers:
                self._keep_initializer(side, name, prefix)
            if name not in side.maker or (name in stop and not start):
                continue
            number = side.maker[name]
            outputs = [made(output) for output in side.nodes[number].output]
            if number in seen or any(output in self._made for output in outputs if output):
                continue
            seen.add(number)
            self._append(_renamed(side.nodes[number], used, outputs))
            pending.extend((x, False) for x in sorted(side.uses[number]))
        self._keep_infos(side, prefix)

    def _keep_initializer(self, side: _Side, name: str, prefix: str) -> None:
        here = self.named(side, name, prefix)
        if here in self._initializers:
            return
        tensor = side.initializers[name]
        if here != name:
            tensor = TensorProto()
            tensor.CopyFrom(side.initializers[name])
            tensor.name = here
        self._initializers[here] = tensor

    def _keep_infos(self, side: _Side, prefix: str) -> None:
        """Shapes of what is made from constants: ONNX Runtime needs them to fold decoders."""
        for info in side.proto.graph.value_info:
            here = self.named(side, info.name, prefix)
            if info.name in side.fixed and here in self._made:
                kept = onnx.ValueInfoProto()
                kept.CopyFrom(info)
                kept.name = here
                self._infos[here] = kept

    def stand_in(self, tensor: str, source: str, elem_type: int) -> None:
        """Makes a tensor of the base from another one."""
        self._append(helper.make_node("Cast", [source], [tensor], to=elem_type))

    def sum_of_squares(self, tensor: str, other: str | None) -> None:
        """Adds the output sum(tensor^2) or sum((tensor - other)^2), a float32 scalar."""
        value = self._as_float32(tensor)
        number = f"{len(self._outputs)}"
        if other is not None:
            name = f"error{self._mark}{number}"
            self._append(helper.make_node("Sub", [value, self._as_float32(other)], [name]))
            value = name
        total = f"sum{self._mark}{number}"
        self._append(helper.make_node("ReduceSumSquare", [value], [total], keepdims=0))
        self._outputs.append(helper.make_tensor_value_info(total, TensorProto.FLOAT, []))

    def value(self, tensor: str) -> None:
        """Adds a tensor to the outputs, as float32."""
        name = f"value{self._mark}{len(self._outputs)}"
        self._append(helper.make_node("Identity", [self._as_float32(tensor)], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def _as_float32(self, tensor: str) -> str:
        # ONNX Runtime drops casts from a type to itself.
        return self._cast(tensor, TensorProto.UNDEFINED, TensorProto.FLOAT)

    def keep_outputs(self) -> None:
        """The outputs are those of the base."""
        self._outputs.extend(self._base.proto.graph.output)

    def model(self) -> onnx.ModelProto:
        """The model built."""
        model = onnx.ModelProto()
        protos = (self._base.proto, self._donor.proto)
        model.ir_version = max(proto.ir_version for proto in protos)
        opsets: dict[str, int] = {}
        for proto in protos:
            for entry in proto.opset_import:
                domain = "" if entry.domain == "ai.onnx" else entry.domain
                opsets[domain] = max(entry.version, opsets.get(domain, 0))
            model.functions.extend(proto.functions)
        model.opset_import.extend(helper.make_opsetid(*entry) for entry in opsets.items())
        graph = model.graph
        graph.name = "layers"
        graph.input.extend(
            entry
            for entry in self._base.proto.graph.input
            if entry.name not in self._base.initializers
        )
        graph.initializer.extend(self._initializers.values())
        graph.value_info.extend(self._infos.values())
        graph.node.extend(_sorted(self._nodes))
        graph.output.extend(self._outputs)
        return model


def _sorted(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Makers before takers."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    before = [{maker[name] for name in _free_names(node) if name in maker} for node in nodes]
    takers: list[list[int]] = [[] for _ in nodes]
    for number, needed in enumerate(before):
        for other in needed:
            takers[other].append(number)
    waiting = [len(needed) for needed in before]
    ready = [number for number, count in enumerate(waiting) if not count][::-1]
    ordered = []
    while ready:
        number = ready.pop()
        ordered.append(nodes[number])
        for taker in takers[number]:
            waiting[taker] -= 1
            if not waiting[taker]:
                ready.append(taker)
    if len(ordered) < len(nodes):
        raise UnsupportedModelError(
            "The layers of the two models do not follow each other in the same order, so that they "
            "cannot be compared one by one."
        )
    return ordered


# ---------------- names in messages


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [
        body
        for attribute in node.attribute
        for body in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
    ]


def _defined(graph: onnx.GraphProto) -> set[str]:
    names = {entry.name for entry in (*graph.input, *graph.initializer)}
    return names | {name for node in graph.node for name in node.output}


def _free_names(node: onnx.NodeProto) -> set[str]:
    """What a node and its bodies take from outside."""
    names = {name for name in node.input if name}
    for body in _bodies(node):
        inner = {name for held in body.node for name in _free_names(held)}
        names |= (inner | {entry.name for entry in body.output}) - _defined(body)
    return names


def _renamed(node: onnx.NodeProto, names: Names, outputs: Sequence[str]) -> onnx.NodeProto:
    """A copy of a node that takes and makes tensors of other names."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = ""
    copy.input[:] = [names(name) if name else "" for name in node.input]
    copy.output[:] = outputs
    for body in _bodies(copy):
        _rename_outer(body, names, frozenset())
    return copy


def _rename_outer(graph: onnx.GraphProto, names: Names, inner: frozenset[str]) -> None:
    """Renames what a body takes from outside."""
    inner = inner | _defined(graph)
    for node in graph.node:
        node.input[:] = [name if not name or name in inner else names(name) for name in node.input]
        for body in _bodies(node):
            _rename_outer(body, names, inner)


def _rename_functions(proto: onnx.ModelProto, suffix: str) -> None:
    """Gives model-local functions other names, so that those of two models do not meet."""
    if not suffix or not proto.functions:
        return
    local = {(function.domain, function.name) for function in proto.functions}
    for function in proto.functions:
        function.name += suffix
    pending = [proto.graph.node, *(function.node for function in proto.functions)]
    while pending:
        for node in pending.pop():
            if (node.domain, node.op_type) in local:
                node.op_type += suffix
            pending.extend(body.node for body in _bodies(node))

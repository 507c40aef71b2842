"""Models made of nodes of two models."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.evaluation.transplant.names import free_names, renamed_node
from onnxslim_passes.evaluation.transplant.side import Side

_DONOR, _OLD = "donor", "replaced"


class Builder:
    """A graph made of nodes of two models.

    Args:
        base: its tensors keep their names, its constants too.
        donor: the other one.
    """

    def __init__(self, base: Side, donor: Side) -> None:
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

    def named(self, side: Side, name: str, prefix: str) -> str:
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
        side: Side,
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
            self._append(renamed_node(side.nodes[number], used, outputs))
            pending.extend((x, False) for x in sorted(side.uses[number]))
        self._keep_infos(side, prefix)

    def _keep_initializer(self, side: Side, name: str, prefix: str) -> None:
        here = self.named(side, name, prefix)
        if here in self._initializers:
            return
        tensor = side.initializers[name]
        if here != name:
            tensor = TensorProto()
            tensor.CopyFrom(side.initializers[name])
            tensor.name = here
        self._initializers[here] = tensor

    def _keep_infos(self, side: Side, prefix: str) -> None:
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
    before = [{maker[name] for name in free_names(node) if name in maker} for node in nodes]
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

"""What the recurrent rules have in common: directions, lengths, steps, and Scan nodes.

Everything that does not depend on the step before is done for all steps at once: the hidden states
are known from the forward run, so that all gates are one product, and so are all gradients of
weights. Only the way back through the states is a loop, a Scan from the last step to the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import parser

from onnxslim_passes.model import Model
from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.movement import reversed_along
from onnxslim_passes.training.gradients.step import Step

_ACTIVATIONS = ("Sigmoid", "Tanh", "Relu")


@dataclass(frozen=True)
class Direction:
    """One direction of a recurrent node, with time from its first step to its last.

    Attributes:
        step: the node and the gradients of its outputs.
        index: which direction, 0 or 1.
        backward: it reads the sequence from the end.
        x: input (T, B, I).
        before: hidden state before each step (T, B, H).
        after: hidden state after each step (T, B, H); 0 behind the end of a sequence.
        dy: gradient of the hidden states as outputs (T, B, H).
        mask: 1 within each sequence, else 0, (T, B, 1); None if all have full length.
        w: (G H, I), the input weights of its G gates.
        r: (G H, H), the recurrent weights.
        bias: (2 G H), or None.
    """

    step: Step
    index: int
    backward: bool
    x: Tensor
    before: Tensor
    after: Tensor
    dy: Tensor
    mask: Tensor | None
    w: Tensor
    r: Tensor
    bias: Tensor | None

    @property
    def emit(self) -> Emitter:
        """Where nodes go."""
        return self.step.emit

    @property
    def hidden(self) -> int:
        """H, the number of hidden units."""
        return self.emit.size(self.r, 1)

    def split(self, tensor: Tensor, count: int, axis: int = -1) -> Sequence[Tensor]:
        """The parts of `count` gates along an axis."""
        sizes = self.emit.ints(*([self.hidden] * count))
        return self.emit.ops("Split", tensor, sizes, count=count, axis=axis)

    def state(self, tensor: Tensor | None) -> Tensor:
        """The part (B, H) of a state (D, B, H) that is this direction's; zeros if it is None."""
        emit = self.emit
        if tensor is None:
            first = emit.op("Gather", self.after, emit.constant(0), axis=0)
            return emit.zeros_like(first)
        return emit.op("Gather", tensor, emit.constant(self.index), axis=0)

    def preactivation(
        self, x: Tensor, before: Tensor, w: Tensor, r: Tensor, bias: Tensor | None
    ) -> Tensor:
        """X w^T + before r^T + bias, for all steps: (T, B, ...)."""
        emit = self.emit
        total = emit.add(
            emit.op("MatMul", x, emit.transpose(w, [1, 0])),
            emit.op("MatMul", before, emit.transpose(r, [1, 0])),
        )
        return total if bias is None else emit.add(total, bias)


def directions_of(step: Step, gates: int) -> list[Direction]:
    """The directions of an LSTM, GRU or RNN node.

    Raises:
        DifferentiationError: the node has an attribute that no rule covers.
    """
    _check(step, gates)
    kind = step.attr("direction", "forward")
    count = 2 if kind == "bidirectional" else 1
    return [
        _direction(step, index, backward=kind == "reverse" or index == 1) for index in range(count)
    ]


def _check(step: Step, gates: int) -> None:
    if step.attr("layout", 0):
        raise step.refusal("layout=1 has no kernel in ONNX Runtime; export with layout=0")
    if step.attr("clip") is not None or step.attr("input_forget", 0):
        raise step.refusal("no gradient with clip or input_forget")
    for name in step.attr("activations", []):
        if name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise step.refusal(f"no gradient with activation {name!r}; there is one for {known}")


def _direction(step: Step, index: int, *, backward: bool) -> Direction:
    emit = step.emit
    node = step.node
    lengths = step.input(4)
    number = emit.constant(index)

    def in_time(tensor: Tensor) -> Tensor:
        if not backward:
            return tensor
        return _turned(emit, tensor, lengths)

    def pick(tensor: Tensor, axis: int) -> Tensor:
        return emit.op("Gather", tensor, number, axis=axis)

    after = in_time(pick(emit.add_output(node, 0), 1))
    first = step.input(5)
    initial = (
        emit.zeros_like(emit.op("Slice", after, emit.ints(0), emit.ints(1), emit.ints(0)))
        if first is None
        else emit.unsqueeze(pick(first, 0), [0])
    )
    before = emit.op("Concat", initial, without_last(emit, after), axis=0)
    dy = step.dys[0]
    bias = step.input(3)
    return Direction(
        step,
        index,
        backward,
        x=in_time(step.x),
        before=before,
        after=after,
        dy=emit.zeros_like(after) if dy is None else in_time(pick(dy, 1)),
        mask=None if lengths is None else _mask(emit, after, lengths),
        w=pick(step.inputs[1], 0),
        r=pick(step.inputs[2], 0),
        bias=None if bias is None else pick(bias, 0),
    )


def without_last(emit: Emitter, tensor: Tensor) -> Tensor:
    """All steps but the last."""
    return emit.op("Slice", tensor, emit.ints(0), emit.ints(-1), emit.ints(0))


def _mask(emit: Emitter, like: Tensor, lengths: Tensor) -> Tensor:
    steps = emit.op("Squeeze", emit.op("Shape", like, start=0, end=1))
    zero, one = (emit.constant(number) for number in (0, 1))
    numbers = emit.unsqueeze(emit.op("Range", zero, steps, one), [1])
    within = emit.op("Less", numbers, emit.cast(lengths, np.int64))
    return emit.unsqueeze(emit.mask(within, like), [2])


def slope(emit: Emitter, activation: str, output: Tensor) -> Tensor:
    """The derivative of an activation from its output."""
    if activation == "Sigmoid":
        return emit.mul(output, emit.one_minus(output))
    if activation == "Tanh":
        return emit.one_minus(emit.square(output))
    return emit.mask(emit.op("Greater", output, emit.scalar(0, output)), output)


def scan(
    direction: Direction,
    *,
    states: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    captured: Mapping[str, Tensor],
    body: str,
    results: Mapping[str, int],
    backward: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """A Scan over the steps.

    Args:
        direction: gives the sizes.
        states: name in the body -> first value (B, H).
        sequences: name in the body -> values for all steps (T, B, ...).
        captured: name in the body -> tensor that is the same at every step.
        body: statements in ONNX's text format; the next value of state `s` is `next_s`.
        results: name in the body of what is collected at each step -> its last size.
        backward: from the last step to the first.

    Returns:
        The last values of the states, and the collected results (T, B, size).
    """
    emit = direction.emit
    kind = {"float32": "float", "float64": "double", "float16": "float16"}[
        emit.dtype(direction.after).name
    ]
    steps, batch = emit.shape(direction.after)[:2]
    taken = [f"{kind}[b_{name}, h_{name}] {name}" for name in (*states, *sequences)]
    made = [f"{kind}[b_n{name}, h_n{name}] next_{name}" for name in states]
    made += [f"{kind}[b_n{name}, h_n{name}] {name}" for name in results]
    order = f"scan_input_directions = {[int(backward)] * len(sequences)}, "
    order += f"scan_output_directions = {[int(backward)] * len(results)}, " if results else ""
    outer = [f"last_{name}" for name in states] + [f"all_{name}" for name in results]
    given = [f"first_{name}" for name in states] + [f"each_{name}" for name in sequences]
    shapes = [f"{kind}[b_o{name}, h_o{name}] {name}" for name in outer[: len(states)]]
    shapes += [f"{kind}[t_o{n}, b_o{n}, h_o{n}] {n}" for n in outer[len(states) :]]
    inputs = [f"{kind}[b_i{name}, h_i{name}] {name}" for name in given[: len(states)]]
    inputs += [f"{kind}[t_i{name}, b_i{name}, h_i{name}] {name}" for name in given[len(states) :]]
    inputs += [f"{kind}[a_{name}, c_{name}] {name}" for name in captured]
    text = f"""<ir_version: 8, opset_import: ["" : {emit.model.opset}]>
    steps ({", ".join(inputs)}) => ({", ".join(shapes)}) {{
        {", ".join(outer)} = Scan<num_scan_inputs = {len(sequences)}, {order}
            body = step ({", ".join(taken)}) => ({", ".join(made)}) {{ {body} }}
        >({", ".join(given)})
    }}"""
    bindings = {f"first_{name}": tensor for name, tensor in states.items()}
    bindings |= {f"each_{name}": tensor for name, tensor in sequences.items()}
    bindings |= captured
    like = direction.after
    types = {f"last_{name}": (like, (batch, direction.hidden)) for name in states}
    sizes = {f"all_{name}": (like, (steps, batch, size)) for name, size in results.items()}
    model = Model.from_proto(_parsed(text))
    found = emit.graft(model, bindings, {**types, **sizes})
    return [found[name] for name in types], [found[name] for name in sizes]


def _parsed(text: str) -> onnx.ModelProto:
    model: onnx.ModelProto = parser.parse_model(text)
    return model


def weight_product(emit: Emitter, dz: Tensor, tensor: Tensor) -> Tensor:
    """Sum over steps and batch of dz^T tensor: (columns of dz, columns of tensor)."""
    rows = emit.reshape(dz, [-1, emit.size(dz, 2)])
    columns = emit.reshape(tensor, [-1, emit.size(tensor, 2)])
    return emit.op("Gemm", rows, columns, transA=1)


def collect(
    step: Step, directions: Sequence[Direction], parts: Sequence[Mapping[int, Tensor]]
) -> list[Tensor | None]:
    """The gradients of the inputs from those that each direction found, by number of the input."""
    emit = step.emit
    result: list[Tensor | None] = [None] * len(step.inputs)
    for index in range(len(step.inputs)):
        found = [part[index] for part in parts if index in part]
        if not found or not step.wants(index):
            continue
        if index:
            each = [emit.unsqueeze(tensor, [0]) for tensor in found]
            result[index] = each[0] if len(each) == 1 else emit.op("Concat", *each, axis=0)
            continue
        lengths = step.input(4)
        inputs = [
            _turned(emit, tensor, lengths) if direction.backward else tensor
            for tensor, direction in zip(found, directions, strict=True)
        ]
        result[0] = inputs[0] if len(inputs) == 1 else emit.add(*inputs)
    return result


def _turned(emit: Emitter, tensor: Tensor, lengths: Tensor | None) -> Tensor:
    """Every sequence from its end to its beginning."""
    if lengths is None:
        return reversed_along(emit, tensor, 0)
    numbers = emit.cast(lengths, np.int64)
    return emit.op("ReverseSequence", tensor, numbers, time_axis=0, batch_axis=1)

"""Gradients of sums of products in index notation.

Y[o] = sum A[a] B[b] ...: the gradient of one operand is again such a sum, of dY and the other
operands, with the indices of this operand as the result (dA[a] = sum dY[o] B[b] ...). An index that
only this operand has was summed alone: its gradient is the same along it. An index that stands
twice in an operand picks a diagonal: the gradient lies on it.
"""

import string

import numpy as np

from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.step import Rule, Step


def einsum(step: Step) -> list[Tensor | None]:
    """Any equation, with an ellipsis, repeated indices or without an arrow."""
    operands, result = _parsed(step)
    return [
        _operand_gradient(step, operands, result, index) if step.wants(index) else None
        for index in range(len(operands))
    ]


def _parsed(step: Step) -> tuple[list[str], str]:
    """The indices of all operands and of the result, each a letter, ellipses written out."""
    equation = step.attr("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    used = set(equation)
    spare = [letter for letter in string.ascii_letters if letter not in used]
    longest = ""
    for index, indices in enumerate(operands):
        if "..." in indices:
            count = step.emit.rank(step.inputs[index]) - len(indices.replace("...", ""))
            # Aligned at the right, as in broadcasting.
            dots = "".join(spare[place] for place in reversed(range(count)))
            longest = max(longest, dots, key=len)
            operands[index] = indices.replace("...", dots)
    if arrow:
        return operands, right.replace("...", longest)
    joined = "".join(operands)
    once = sorted({letter for letter in joined if joined.count(letter) == 1} - set(longest))
    return operands, longest + "".join(once)


def _operand_gradient(step: Step, operands: list[str], result: str, index: int) -> Tensor:
    emit, operand = step.emit, step.inputs[index]
    indices = operands[index]
    wanted = "".join(dict.fromkeys(indices))
    others = [text for place, text in enumerate(operands) if place != index]
    tensors = [tensor for place, tensor in enumerate(step.inputs) if place != index]
    known = "".join(letter for letter in wanted if letter in result + "".join(others))
    equation = f"{','.join([result, *others])}->{known}"
    made: Tensor = emit.op("Einsum", step.dy, *tensors, equation=equation)
    made = emit.unsqueeze(made, [wanted.index(letter) for letter in wanted if letter not in known])
    if wanted == indices:
        return _fitted(emit, made, operand)
    return _on_diagonal(emit, made, operand, indices, wanted)


def _fitted(emit: Emitter, made: Tensor, operand: Tensor) -> Tensor:
    """Repeated along the indices that were summed alone; summed where the operand was broadcast."""
    sizes = zip(emit.shape(made), emit.shape(operand), strict=True)
    broadcast = [axis for axis, (one, other) in enumerate(sizes) if other == 1 and one != 1]
    summed = emit.reduce_sum(made, broadcast, keepdims=True)
    return emit.expand_like(summed, operand)


def _on_diagonal(emit: Emitter, made: Tensor, operand: Tensor, indices: str, wanted: str) -> Tensor:
    """Spread over all axes of an index, then zero but where they agree."""
    # Each index at its first axis, size 1 at its others.
    later = [axis for axis, letter in enumerate(indices) if letter in indices[:axis]]
    order = sorted(range(len(wanted)), key=lambda place: indices.index(wanted[place]))
    spread = emit.unsqueeze(emit.transpose(made, order), later)
    full = emit.expand_like(spread, operand)
    for axis in later:
        first = indices.index(indices[axis])
        size = emit.size(operand, axis)
        eye = np.eye(size, dtype=emit.dtype(operand))
        shape = [size if place in (first, axis) else 1 for place in range(len(indices))]
        full = emit.mul(full, emit.constant(eye.reshape(shape)))
    return full


EINSUM: dict[str, Rule] = {
    "Einsum": einsum,
}

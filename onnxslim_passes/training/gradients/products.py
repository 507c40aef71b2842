"""Gradients of matrix products.

For Y = A B: dA = dY B^T and dB = A^T dY; a batch axis along which an operand was repeated is
summed over.
"""

from onnxslim_passes.training.emitter import Tensor
from onnxslim_passes.training.gradients.step import Rule, Step


def gemm(step: Step) -> list[Tensor | None]:
    """For Y = alpha A' B' + beta C, where ' is a transposition if the attribute says so."""
    emit, dy = step.emit, step.dy
    a, b = step.inputs[:2]
    alpha, beta = step.attr("alpha", 1.0), step.attr("beta", 1.0)
    across_a, across_b = step.attr("transA", 0), step.attr("transB", 0)
    result: list[Tensor | None] = [None, None, None]
    if step.wants(0):
        if across_a:
            result[0] = emit.op("Gemm", b, dy, transA=across_b, transB=1, alpha=alpha)
        else:
            result[0] = emit.op("Gemm", dy, b, transB=1 - across_b, alpha=alpha)
    if step.wants(1):
        if across_b:
            result[1] = emit.op("Gemm", dy, a, transA=1, transB=across_a, alpha=alpha)
        else:
            result[1] = emit.op("Gemm", a, dy, transA=1 - across_a, alpha=alpha)
    if step.wants(2):
        result[2] = emit.scale(emit.sum_to(dy, step.inputs[2]), beta)
    return result


def matmul(step: Step) -> list[Tensor | None]:
    """Products of matrices, batches of matrices, and vectors."""
    emit = step.emit
    a, b = step.inputs
    # A vector is a matrix of one row (on the left) or one column (on the right).
    row, column = emit.rank(a) == 1, emit.rank(b) == 1
    dy = step.dy
    if column:
        dy = emit.unsqueeze(dy, [emit.rank(dy)])
    if row:
        dy = emit.unsqueeze(dy, [emit.rank(dy) - 1])
    left = emit.unsqueeze(a, [0]) if row else a
    right = emit.unsqueeze(b, [1]) if column else b
    da = db = None
    if step.wants(0):
        da = emit.sum_to(emit.op("MatMul", dy, emit.swap_last(right)), left)
        da = emit.squeeze(da, [0]) if row else da
    if step.wants(1):
        db = _right_gradient(step, left, right, dy)
        db = emit.squeeze(db, [1]) if column else db
    return [da, db]


def _right_gradient(step: Step, left: Tensor, right: Tensor, dy: Tensor) -> Tensor:
    """A^T dY; for one matrix B behind a batch of A, one product over all rows of the batch."""
    emit = step.emit
    sizes, columns = emit.shape(left), emit.shape(dy)[-1]
    if emit.rank(right) == 2 and isinstance(sizes[-1], int) and isinstance(columns, int):
        if len(sizes) > 2:
            left = emit.reshape(left, [-1, sizes[-1]])
            dy = emit.reshape(dy, [-1, columns])
        return emit.op("Gemm", left, dy, transA=1)
    return emit.sum_to(emit.op("MatMul", emit.swap_last(left), dy), right)


PRODUCTS: dict[str, Rule] = {
    "Gemm": gemm,
    "MatMul": matmul,
}

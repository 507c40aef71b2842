"""The arithmetic in which losses, gradients and optimizers are written."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from onnx import helper

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Constant, Variable
from onnxslim_passes.training.builder import Builder
from onnxslim_passes.training.shapes import Shape, Tensor

__all__ = ["Emitter", "Tensor"]


class Emitter(Builder):
    """A graph under construction with operations on its tensors; each adds at least one node.

    Binary operations broadcast as ONNX does.
    """

    # ---- elementwise

    def add(self, one: Tensor, other: Tensor) -> Variable:
        """Sum."""
        return self.op("Add", self._aligned(one, other), self._aligned(other, one))

    def sub(self, one: Tensor, other: Tensor) -> Variable:
        """Difference."""
        return self.op("Sub", self._aligned(one, other), self._aligned(other, one))

    def mul(self, one: Tensor, other: Tensor) -> Variable:
        """Product."""
        return self.op("Mul", self._aligned(one, other), self._aligned(other, one))

    def div(self, one: Tensor, other: Tensor) -> Variable:
        """Quotient."""
        return self.op("Div", self._aligned(one, other), self._aligned(other, one))

    def _aligned(self, tensor: Tensor, other: Tensor) -> Tensor:
        """A single element with as many axes as `other`, if the last axis of that has size 1.

        ONNX Runtime broadcasts over such axes element by element, 40 times slower, unless both
        operands have them.
        """
        if not self.has_shape(tensor) or not self.has_shape(other):
            return tensor
        shape, wanted = self.shape(tensor), self.shape(other)
        if wanted[-1:] != (1,) or len(shape) >= len(wanted) or any(size != 1 for size in shape):
            return tensor
        if isinstance(tensor, Constant):
            return self.constant(tensor.values.reshape([1] * len(wanted)))
        return self.reshape(tensor, [1] * len(wanted))

    def neg(self, tensor: Tensor) -> Variable:
        """Negative."""
        return self.op("Neg", tensor)

    def square(self, tensor: Tensor) -> Variable:
        """Product with itself."""
        return self.mul(tensor, tensor)

    def scale(self, tensor: Tensor, factor: float) -> Tensor:
        """Product with a number; by 1 it is the tensor itself."""
        return tensor if factor == 1 else self.mul(tensor, self.scalar(factor, tensor))

    def shift(self, tensor: Tensor, term: float) -> Tensor:
        """Sum with a number; with 0 it is the tensor itself."""
        return tensor if term == 0 else self.add(tensor, self.scalar(term, tensor))

    def one_minus(self, tensor: Tensor) -> Variable:
        """1 - tensor."""
        return self.sub(self.scalar(1, tensor), tensor)

    def where(self, condition: Tensor, one: Tensor, other: Tensor) -> Variable:
        """`one` where the condition holds, else `other`; a product with `mask` is faster."""
        return self.op("Where", condition, one, other)

    def mask(self, condition: Tensor, like: Tensor) -> Variable:
        """1 where the condition holds, else 0, in the element type of `like`."""
        return self.op("Cast", condition, to=self.elem_type(like))

    def cast_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The tensor in the element type of `like`."""
        if self.elem_type(tensor) == self.elem_type(like):
            return tensor
        return self.op("Cast", tensor, to=self.elem_type(like))

    def cast(self, tensor: Tensor, dtype: npt.DTypeLike) -> Tensor:
        """The tensor in another element type."""
        wanted = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        if self.elem_type(tensor) == wanted:
            return tensor
        return self.op("Cast", tensor, to=wanted)

    # ---- reductions

    def reduce_sum(
        self, tensor: Tensor, axes: Sequence[int] | None = None, *, keepdims: bool = False
    ) -> Tensor:
        """Sum over some axes, all by default, none if empty."""
        return self.reduce("ReduceSum", tensor, axes, keepdims=keepdims)

    def reduce_mean(
        self, tensor: Tensor, axes: Sequence[int] | None = None, *, keepdims: bool = False
    ) -> Tensor:
        """Mean over some axes, all by default, none if empty."""
        return self.reduce("ReduceMean", tensor, axes, keepdims=keepdims)

    def reduce(
        self, op: str, tensor: Tensor, axes: Sequence[int] | None = None, *, keepdims: bool = False
    ) -> Tensor:
        """One of the `Reduce` operators over some axes, all by default, none if empty."""
        if axes is None:
            return self.op(op, tensor, keepdims=int(keepdims))
        if not axes:
            return tensor
        return self.op(op, tensor, self.ints(*axes), keepdims=int(keepdims))

    def sum_to(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Undoes a broadcast: sums over the axes along which `like` was repeated.

        Args:
            tensor: of a shape to which that of `like` broadcasts.
            like: gives the shape of the result.

        Raises:
            UnsupportedModelError: whether an axis was repeated depends on a free size.
        """
        given, wanted = self.shape(tensor), self.shape(like)
        lead = len(given) - len(wanted)
        repeated = list(range(lead))
        for axis, size in enumerate(wanted):
            if given[lead + axis] == size:
                continue
            if size != 1:
                raise UnsupportedModelError(
                    f"{like.name!r} of shape {list(wanted)} is broadcast to {list(given)}; whether "
                    f"its axis {axis} is repeated is not known. Give the model fixed input shapes."
                )
            repeated.append(lead + axis)
        if not repeated:
            return tensor
        if len(repeated) == lead:
            return self.reduce_sum(tensor, repeated)
        summed = self.reduce_sum(tensor, repeated, keepdims=True)
        return self.squeeze(summed, range(lead)) if lead else summed

    def element_count(self, tensor: Tensor, axes: Sequence[int] | None = None) -> Tensor:
        """How many elements the tensor has along some axes, all by default: rank 0, its type."""
        shape = self.shape(tensor)
        along = range(len(shape)) if axes is None else axes
        static = math.prod(size for axis in along if isinstance(size := shape[axis], int))
        free = [axis for axis in along if not isinstance(shape[axis], int)]
        if not free:
            return self.scalar(static, tensor)
        sizes = self.op("Gather", self.op("Shape", tensor), self.ints(*free))
        count = self.op("ReduceProd", sizes, keepdims=0)
        return self.scale(self.op("Cast", count, to=self.elem_type(tensor)), static)

    # ---- shapes

    def shape_of(self, tensor: Tensor) -> Tensor:
        """The shape, rank 1 int64: a constant if it is static."""
        if self.is_static(tensor):
            return self.ints(*(int(size) for size in self.shape(tensor)))
        return self.op("Shape", tensor)

    def reshape(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """The elements in another shape; -1 once, 0 for a size that stays, as in ONNX."""
        return self.op("Reshape", tensor, self.ints(*sizes))

    def reshape_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The elements in the shape of `like`."""
        wanted = self.shape(like)
        if self.shape(tensor) == wanted:
            return tensor
        return self.op("Reshape", tensor, self.target_shape(wanted, like))

    def target_shape(self, wanted: Shape, like: Tensor) -> Tensor:
        """A shape operand for Reshape: -1 in place of a free size if it is the only one."""
        free = sum(not isinstance(size, int) for size in wanted)
        if free == 0 or (free == 1 and 0 not in wanted):
            return self.ints(*(size if isinstance(size, int) else -1 for size in wanted))
        return self.op("Shape", like)

    def transpose(self, tensor: Tensor, perm: Sequence[int]) -> Tensor:
        """Axes in another order; the tensor itself if it is the same order."""
        if list(perm) == list(range(len(perm))):
            return tensor
        return self.op("Transpose", tensor, perm=list(perm))

    def swap_last(self, tensor: Tensor) -> Tensor:
        """The last two axes exchanged: the transposes of a batch of matrices."""
        rank = self.rank(tensor)
        return self.transpose(tensor, [*range(rank - 2), rank - 1, rank - 2])

    def squeeze(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        """Without axes of size 1."""
        return self.op("Squeeze", tensor, self.ints(*axes)) if axes else tensor

    def unsqueeze(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        """With new axes of size 1, counted in the result."""
        return self.op("Unsqueeze", tensor, self.ints(*axes)) if axes else tensor

    def expand_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Broadcast to the shape of `like`."""
        if self.shape(tensor) == self.shape(like):
            return tensor
        return self.op("Expand", tensor, self.shape_of(like))

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros in shape and type of `tensor`."""
        return self.expand_like(self.scalar(0, tensor), tensor)

    def ones_like(self, tensor: Tensor) -> Tensor:
        """Ones in shape and type of `tensor`."""
        return self.expand_like(self.scalar(1, tensor), tensor)

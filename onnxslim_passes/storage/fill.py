"""Fill: one value, repeated. `Expand(value, shape)`."""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from onnx import TensorProto, helper

from onnxslim_passes.storage.base import Encoding, Literal, Payload, Plan, Site, step
from onnxslim_passes.storage.contents import Contents


class Fill(Encoding):
    """A tensor whose elements are all the same, bit for bit."""

    name: ClassVar[str] = "fill"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """One for such a tensor; none for bfloat16, for which ONNX Runtime lacks the kernel."""
        elem_type = helper.np_dtype_to_tensor_dtype(contents.dtype)
        if site.opset < 8 or elem_type == TensorProto.BFLOAT16 or not contents.folds:
            return
        if contents.size < 2 or not (contents.bits == contents.bits[0]).all():
            return
        first = contents.values.reshape(-1)[:1].reshape(())
        value = Payload((), contents.dtype, contents.dtype.itemsize, lambda: first)
        yield Plan(self.name, step("Expand", value, Literal.of(contents.shape, np.int64)))

"""Sparse initializer: the elements that are not +0.0, and their linear indices.

The runtime makes it dense when it loads the model, so it saves bytes of the file, neither memory
nor time. Indices are protobuf varints: an index below 2^7 takes one byte, below 2^14 two, below
2^21 three, below 2^28 four. With i bytes an index and v bytes a value it wins below the density
v / (v + i): 4/7 for float32 and 1/4 for int8 in tensors of up to two million elements.
"""

from collections.abc import Iterable
from typing import ClassVar

from onnxslim_passes.storage.base import Encoding, Payload, Plan, Site
from onnxslim_passes.storage.contents import Contents


class Sparse(Encoding):
    """A sparse initializer in place of the dense one."""

    name: ClassVar[str] = "sparse"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """One, below the break-even density; none for scalars and inside functions."""
        entries, itemsize = contents.entries, contents.dtype.itemsize
        if not site.sparse or not contents.shape or entries * (itemsize + 1) >= contents.nbytes:
            return
        nbytes = entries * itemsize + contents.index_bytes
        values = contents.values
        root = Payload(
            contents.shape, contents.dtype, nbytes, lambda: values, sparse=True, entries=entries
        )
        yield Plan(self.name, root, {"density": entries / contents.size})

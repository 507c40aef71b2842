"""Fill: one value, repeated. `Expand(value, shape)`."""

from collections.abc import Iterable
from typing import ClassVar

from onnxslim_passes.storage.base import Encoding, Plan, Site
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.streams import filled


class Fill(Encoding):
    """A tensor whose elements are all the same, bit for bit."""

    name: ClassVar[str] = "fill"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """One for such a tensor."""
        if site.opset < 8 or contents.size < 2 or not contents.folds:
            return
        if (contents.bits == contents.bits[0]).all():
            yield Plan(self.name, filled(contents.values.reshape(-1)[0], contents.shape))

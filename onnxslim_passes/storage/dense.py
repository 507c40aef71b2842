"""Dense: raw data, as every exporter writes it. What the others have to beat."""

from collections.abc import Iterable
from typing import ClassVar

from onnxslim_passes.storage.base import Encoding, Payload, Plan, Site
from onnxslim_passes.storage.contents import Contents


class Dense(Encoding):
    """An initializer with raw data."""

    name: ClassVar[str] = "dense"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """Always one."""
        values = contents.values
        root = Payload(contents.shape, contents.dtype, contents.nbytes, lambda: values)
        yield Plan(self.name, root)

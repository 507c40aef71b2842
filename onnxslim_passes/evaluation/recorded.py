"""Outputs that outlive their model's session, so that two models need not be open at once.

Both together hold twice the weights and twice the activations, more than any pass needs.
"""

import pickle
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator

from onnxslim_passes.evaluation.fidelity import Fidelity, compare_results, flatten
from onnxslim_passes.runtime import Array, Feed, Session

# Beyond this they go to a file: the outputs of segmentation are as large as the samples.
_MEMORY_BYTES = 4 << 20


class ChangedFeedsError(Exception):
    """Feeds are not those that were recorded."""


class RecordedOutputs:
    """The outputs of one model on some feeds, in memory or in a temporary file.

    Args:
        session: The model; may be closed afterwards.
        feeds: What it is run on.

    Raises:
        RuntimeRefusedError: The model does not run.
    """

    def __init__(self, session: Session, feeds: Iterable[Feed]) -> None:
        self._label = session.label
        self._names = [spec.name for spec in session.outputs]
        self._stream = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115
        weakref.finalize(self, self._stream.close)
        self._count = 0
        for feed in feeds:
            values = {name: flatten(value) for name, value in session.run(feed).items()}
            # Protocol 5 writes arrays without copies, and those of ml_dtypes with their types.
            pickle.dump((_mark(feed), values), self._stream, protocol=5)
            self._count += 1

    def compare(self, candidate: Session, feeds: Iterable[Feed]) -> Fidelity:
        """As `compare_outputs`, with what was recorded.

        Args:
            candidate: The other model.
            feeds: Those that were recorded, in the same order.

        Raises:
            ChangedFeedsError: They are others, as those of a function that draws them anew.
            VerificationError: The models have different numbers of outputs.
            RuntimeRefusedError: The candidate does not run.
        """
        return compare_results(self._names, self._label, self._matched(feeds), candidate)

    def _matched(self, feeds: Iterable[Feed]) -> Iterator[tuple[Feed, dict[str, Array]]]:
        self._stream.seek(0)
        count = 0
        for feed in feeds:
            if count == self._count:
                raise ChangedFeedsError
            mark, values = pickle.load(self._stream)
            if mark != _mark(feed):
                raise ChangedFeedsError
            yield feed, values
            count += 1
        if count < self._count:
            raise ChangedFeedsError


def _mark(feed: Feed) -> int:
    """A checksum by which a feed is known again; three times as fast as a cryptographic hash."""
    mark = 0
    for name, value in feed.items():
        flat = flatten(value)
        mark = zlib.crc32(f"{name}\0{flat.dtype}\0{flat.shape}\0".encode(), mark)
        payload = repr(flat.tolist()).encode() if flat.dtype.hasobject else flat.tobytes()
        mark = zlib.crc32(payload, mark)
    return mark

"""Where samples come from: an `.npz`, a folder of files, a function, feeds in memory.

Each reader turns its data into `Item`s, one a feed, in a fixed order, as often as asked and without
holding more than the item at hand. Whether an item fits the model is checked in `samples.py`.
"""

import hashlib
import inspect
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np

from onnxslim_passes.errors import SamplesError
from onnxslim_passes.evaluation.functions import UserFunction
from onnxslim_passes.runtime import Array, InputSpec

LABELS = "labels"
Feeds: TypeAlias = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Item:
    """One feed as read.

    Attributes:
        where: For messages: "calib.npz, samples 0 to 15".
        arrays: Input name -> array.
        labels: What belongs to it, if the data has labels.
        samples: How many samples the feed holds.
    """

    where: str
    arrays: Mapping[str, Any]
    labels: Array | None
    samples: int = 1


class Reader(Protocol):
    """A restartable source of items."""

    name: str

    def items(self, inputs: Sequence[InputSpec]) -> Iterator[Item]:
        """Reads from the start; the model's `inputs` say how arrays are cut into feeds."""
        ...

    def digest(self) -> str:
        """A hash that changes when the data does: 64 hexadecimal digits."""
        ...


# ---------------- .npz


class NpzReader:
    """One `.npz` whose arrays hold all samples along their first axis.

    An array of the model input's rank is cut into batches of `batch_size`, or of the batch that the
    model fixes. An array of one rank more holds whole inputs, fed one by one; all others then go
    sample by sample too. An array of rank 0 is the same for all feeds. Members are read as a stream
    unless their memory order forbids it.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        self.path = path
        self.name = str(path)
        self.batch_size = batch_size

    def items(self, inputs: Sequence[InputSpec]) -> Iterator[Item]:
        """See `Reader`."""
        if not zipfile.is_zipfile(self.path):
            raise SamplesError(f"{self.name}: not an .npz file; write it with numpy.savez.")
        with _reading(self.name), ExitStack() as stack:
            archive = stack.enter_context(np.load(self.path, allow_pickle=False))
            members = {n: _Member(self.path, n, archive, stack) for n in archive.files}
            specs = {i.name: i for i in inputs}
            total = self._count(members)
            group = self._group(members, specs, total)
            for start in range(0, total, group or 1):
                count = min(group or 1, total - start)
                arrays = {
                    n: m.read(count, whole=group is None and _is_whole(m, specs.get(n)))
                    for n, m in members.items()
                }
                labels = None if LABELS in specs else arrays.pop(LABELS, None)
                yield Item(_range(self.name, start, count), arrays, labels, count)

    def _count(self, members: Mapping[str, "_Member"]) -> int:
        """The number of samples, on which all arrays must agree."""
        counts = {n: m.shape[0] for n, m in members.items() if m.shape}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{n} {c}" for n, c in counts.items())
            raise SamplesError(
                f"{self.name}: the arrays hold different numbers of samples ({listed}); "
                "the first axis of each must count the samples."
            )
        return next(iter(counts.values()), 1 if members else 0)

    def _group(
        self, members: Mapping[str, "_Member"], specs: Mapping[str, InputSpec], total: int
    ) -> int | None:
        """Samples a feed; None where each sample is a whole input."""
        if any(_is_whole(m, specs.get(n)) for n, m in members.items()):
            return None
        fixed = {
            n: s.shape[0]
            for n, s in specs.items()
            if n in members and s.shape and isinstance(s.shape[0], int)
        }
        sizes = set(fixed.values())
        if not sizes:
            return self.batch_size
        size = min(sizes)
        if len(sizes) > 1 or size == 0:
            listed = ", ".join(f"{n} {d}" for n, d in fixed.items())
            raise SamplesError(
                f"{self.name}: the model fixes different first axes ({listed}), so that they "
                "cannot all be the batch; add an axis in front of each array that counts samples."
            )
        if total % size:
            raise SamplesError(
                f"{self.name}: {total} samples, but the model takes batches of exactly {size}; "
                f"{total % size} are left over. Give a multiple of {size}."
            )
        return size

    def digest(self) -> str:
        """See `Reader`."""
        return _digest([self.path], self.name)


class _Member:
    """One array of an `.npz`, read from front to back in pieces."""

    def __init__(
        self, path: Path, name: str, archive: "np.lib.npyio.NpzFile", stack: ExitStack
    ) -> None:
        # A second handle: zipfile allows several open members, NumPy's own handle stays free.
        self._stream = _open_member(path, name, stack)
        version = np.lib.format.read_magic(self._stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        self.shape, fortran, self.dtype = read(self._stream)
        self._position = 0
        # Read at once: Fortran order has no contiguous rows; Python objects are refused by NumPy.
        streams = self.shape and not fortran and not self.dtype.hasobject
        self._array: Array | None = None if streams else archive[name]

    def read(self, count: int, *, whole: bool) -> Array:
        """The next `count` samples; with `whole` a single one, without the first axis."""
        if not self.shape:
            assert self._array is not None
            return self._array
        rows = self._next(count)
        return rows[0] if whole else rows

    def _next(self, count: int) -> Array:
        start, self._position = self._position, self._position + count
        if self._array is not None:
            return self._array[start : start + count]
        shape = (count, *self.shape[1:])
        size = int(np.prod(shape)) * self.dtype.itemsize
        payload = self._stream.read(size)
        if len(payload) != size:
            raise ValueError(f"it ends after {start} of {self.shape[0]} samples")
        values: Array = np.frombuffer(bytearray(payload), self.dtype).reshape(shape)
        return values


def _open_member(path: Path, name: str, stack: ExitStack) -> IO[bytes]:
    archive = stack.enter_context(zipfile.ZipFile(path))
    file = f"{name}.npy" if f"{name}.npy" in archive.namelist() else name
    return stack.enter_context(archive.open(file))


def _is_whole(member: _Member, spec: InputSpec | None) -> bool:
    """Whether each row of the array is a whole input."""
    if spec is None:
        return False
    if not spec.shape:  # rank 0, or a rank that the model leaves open
        return len(member.shape) == 1
    return len(member.shape) == len(spec.shape) + 1


# ---------------- a folder


class FolderReader:
    """A folder of `.npz` and `.npy` files, a sample each, in the order of their names.

    An array of one rank less than the model's input gets a batch axis of 1. `.npy` files are for
    models with one input.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.files = sorted(
            f for f in path.iterdir() if f.suffix in (".npz", ".npy") and not f.name.startswith(".")
        )
        if not self.files:
            raise SamplesError(f"{self.name}: the folder holds no .npz or .npy file.")

    def items(self, inputs: Sequence[InputSpec]) -> Iterator[Item]:
        """See `Reader`."""
        specs = {i.name: i for i in inputs}
        for file in self.files:
            with _reading(str(file)):
                arrays = self._load(file, inputs)
            labels = None if LABELS in specs else arrays.pop(LABELS, None)
            for name, array in arrays.items():
                spec = specs.get(name)
                if spec is not None and spec.shape and array.ndim == len(spec.shape) - 1:
                    arrays[name] = array[None]
            if labels is not None and labels.ndim == 0:
                labels = labels[None]
            yield Item(str(file), arrays, labels)

    def _load(self, file: Path, inputs: Sequence[InputSpec]) -> dict[str, Array]:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if len(inputs) != 1:
            raise SamplesError(
                f"{file}: a .npy holds one array, but the model has {len(inputs)} inputs "
                f"({', '.join(i.name for i in inputs)}); use an .npz with an array for each."
            )
        return {inputs[0].name: np.load(file, allow_pickle=False)}

    def digest(self) -> str:
        """See `Reader`."""
        return _digest(self.files, self.name)


# ---------------- a function, or feeds in memory


class FunctionReader:
    """A function of the user's that yields feeds: `{input name: array}` or `(feed, labels)`.

    Attributes:
        has_epochs: Whether it has an argument `epoch`: then it may yield other samples for each.
    """

    def __init__(self, spec: str, *, epoch: int = 0) -> None:
        self.name = spec
        self._function = UserFunction(spec, SamplesError, optional=["epoch"])
        self._epoch = epoch
        self.has_epochs = "epoch" in self._function.takes

    def items(self, inputs: Sequence[InputSpec]) -> Iterator[Item]:
        """See `Reader`."""
        names = {i.name for i in inputs}
        result = self._function(epoch=self._epoch)
        with self._function.guarded("the call"):
            iterator = _iterator(result, self.name)
        for index in range(2**62):
            with self._function.guarded(f"feed {index}"):
                try:
                    feed = next(iterator)
                except StopIteration:
                    return
            yield _item(feed, f"{self.name}, feed {index}", names)

    def in_epoch(self, epoch: int) -> "FunctionReader":
        """What the function yields in an epoch of training, from 1; 0 is outside of training."""
        return FunctionReader(self.name, epoch=epoch)

    def digest(self) -> str:
        """See `Reader`; runs the function once."""
        return _digest_items(self.items(()))


class FeedsReader:
    """Feeds held in memory, or made by a callable.

    Attributes:
        has_epochs: As of `FunctionReader`.
    """

    def __init__(self, feeds: Feeds | Callable[..., Feeds], name: str, *, epoch: int = 0) -> None:
        self.name = name
        # A one-shot iterator could not be read twice.
        self._feeds = feeds if callable(feeds) else list(feeds)
        self._epoch = epoch
        self.has_epochs = callable(feeds) and _takes_epoch(feeds)

    def items(self, inputs: Sequence[InputSpec]) -> Iterator[Item]:
        """See `Reader`."""
        names = {i.name for i in inputs}
        for index, feed in enumerate(_iterator(self._made(), self.name)):
            yield _item(feed, f"{self.name}, feed {index}", names)

    def _made(self) -> Feeds:
        if not callable(self._feeds):
            return self._feeds
        return self._feeds(epoch=self._epoch) if self.has_epochs else self._feeds()

    def in_epoch(self, epoch: int) -> "FeedsReader":
        """As of `FunctionReader`."""
        return FeedsReader(self._feeds, self.name, epoch=epoch)

    def digest(self) -> str:
        """See `Reader`."""
        return _digest_items(self.items(()))


def _takes_epoch(function: Callable[..., Any]) -> bool:
    try:
        return "epoch" in inspect.signature(function).parameters
    except ValueError:
        return False  # a builtin without a signature


def _iterator(result: Any, name: str) -> Iterator[Any]:
    """An iterator over feeds; a single dict is a slip that deserves its own message."""
    if isinstance(result, Mapping) or not isinstance(result, Iterable):
        raise SamplesError(
            f"{name}: expected a generator of {{input name: array}}, got {type(result).__name__}; "
            "`yield` each feed."
        )
    return iter(result)


def _item(feed: Any, where: str, names: set[str]) -> Item:
    """A feed as the user gave it, with or without labels."""
    labels: Any = None
    if isinstance(feed, tuple) and len(feed) == 2 and isinstance(feed[0], Mapping):
        feed, labels = feed
    if not isinstance(feed, Mapping):
        raise SamplesError(
            f"{where}: expected a dict {{input name: array}}, got {type(feed).__name__}."
        )
    arrays = dict(feed)
    if LABELS in arrays and LABELS not in names:
        labels = arrays.pop(LABELS)
    return Item(where, arrays, None if labels is None else np.asarray(labels))


# ---------------- shared


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Errors of NumPy and of the file system, with the file's name."""
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SamplesError(f"{name}: cannot be read: {error}") from error


def _range(name: str, start: int, count: int) -> str:
    """A stretch of samples for messages."""
    end = start + count - 1
    return f"{name}, sample {start}" if count == 1 else f"{name}, samples {start} to {end}"


def _digest(files: Sequence[Path], name: str) -> str:
    """The hash of files, names included."""
    total = hashlib.sha256()
    with _reading(name):
        for file in files:
            total.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _digest_items(items: Iterable[Item]) -> str:
    """The hash of feeds: names, types, shapes and values."""
    total = hashlib.sha256()
    for item in items:
        total.update(b"feed")
        values = {**item.arrays, "\0labels": item.labels}
        for name in sorted(values):
            array = np.asarray(values[name])
            text = array.dtype.hasobject
            payload = repr(array.tolist()).encode() if text else array.tobytes()
            total.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode() + payload)
    return total.hexdigest()

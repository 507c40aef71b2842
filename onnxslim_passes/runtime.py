"""Everything asked of ONNX Runtime: sessions, runs, the graph it really executes, time per node.

All sessions use the CPU provider, one thread unless told otherwise, deterministic kernels, and no
messages on the terminal: what the runtime has to say becomes a `RuntimeRefusedError` of one line.
"""

import contextlib
import ctypes
import functools
import json
import re
import shutil
import statistics
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.heap import trim_heap
from onnxslim_passes.model import Model

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]
Optimization = Literal["all", "extended", "basic", "none"]
Shape = tuple[int | str | None, ...]

# Serialized protobufs end at 2 GB, and a copy in memory of one that large hurts before that.
PROTO_LIMIT_BYTES = 1_500_000_000
# A Model streams its payloads when saved, and the runtime maps the file: bytes would be held three
# times, in messages, serialized and parsed again.
MODEL_LIMIT_BYTES = 16_000_000

_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_SILENT = 4  # only "fatal" is logged

# ONNX Runtime's exceptions have no common base; ValueError is a missing input, TypeError and
# RuntimeError come from its conversion of Python objects.
_REFUSALS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.EngineError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    TypeError,
    ValueError,
)

_NUMPY_TYPES: dict[str, npt.DTypeLike] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8e5m2": ml_dtypes.float8_e5m2,
    "float8e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "string": np.object_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
# Types that NumPy knows through ml_dtypes only: fed and read as OrtValue.
_EXTENDED_TYPES = ("bfloat16", "float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz")


_Spec = TypeVar("_Spec", bound="InputSpec")

AnyModel: TypeAlias = Model | onnx.ModelProto | bytes | str | Path


@dataclass(frozen=True)
class InputSpec:
    """One input that a session must be fed.

    Attributes:
        name: The input's name.
        dtype: Its NumPy type (`object` for strings); None unless `kind` is "tensor".
        shape: A number for a fixed axis, a name or None for a free one.
        kind: "tensor", "sequence", "map", "optional" or "sparse_tensor".
        type: The type as ONNX Runtime writes it, e.g. "tensor(float)".
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: Shape
    kind: str = "tensor"
    type: str = ""

    def __str__(self) -> str:
        if self.dtype is None:
            return self.type
        shape = ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{_type_name(self.dtype)} ({shape})"


@dataclass(frozen=True)
class OutputSpec(InputSpec):
    """One output of a session; the fields of `InputSpec`."""


@dataclass(frozen=True)
class NodeTime:
    """The median time of one node of the optimized graph.

    Attributes:
        name: The node's name; fused and unnamed nodes have names made by ONNX Runtime.
        op: The operator.
        provider: The execution provider that ran it.
        seconds: Wall-clock seconds in one run of the model; ONNX Runtime counts microseconds.
    """

    name: str
    op: str
    provider: str
    seconds: float


@dataclass(frozen=True)
class NodeRun:
    """One execution of one node, in a body as often as the body ran.

    Attributes:
        op: The operator.
        inputs: The shapes of its inputs; absent optional ones are left out.
        outputs: The shapes of its outputs.
    """

    op: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ProfiledGraph:
    """What ONNX Runtime ran, and how long.

    Attributes:
        graph: Its optimized graph; initializers of 1 kB and more without payload.
        seconds: Node name -> wall-clock seconds in one run, bodies included.
    """

    graph: onnx.GraphProto
    seconds: Mapping[str, float]


class Session:
    """A model loaded in ONNX Runtime; use as a context manager, or `close()`, or just drop it.

    Attributes:
        label: How messages call the model.
        raw: The `onnxruntime.InferenceSession`.
        inputs: What must be fed. Initializers that may be overridden are not among them.
        outputs: What comes out.
    """

    def __init__(self, raw: ort.InferenceSession, label: str, folder: Path | None) -> None:
        self.raw = raw
        self.label = label
        self.inputs = tuple(_spec(i, InputSpec) for i in raw.get_inputs())
        self.outputs = tuple(_spec(o, OutputSpec) for o in raw.get_outputs())
        self._extended = any(
            _element(s.type) in _EXTENDED_TYPES for s in (*self.inputs, *self.outputs)
        )
        self._cleanup = weakref.finalize(self, _remove, folder) if folder else None

    def run(self, feed: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs the model once.

        Args:
            feed: Input name -> array (a list of arrays for a sequence).
            outputs: The names wanted, all by default.

        Returns:
            Output name -> array; a list for a sequence, a list of dicts for a sequence of maps.

        Raises:
            RuntimeRefusedError: The run failed; the message names the node.
        """
        names = [o.name for o in self.outputs] if outputs is None else list(outputs)
        options = ort.RunOptions()
        options.log_severity_level = _SILENT
        try:
            if self._extended:
                return dict(zip(names, self._run_extended(feed, names, options), strict=True))
            return dict(zip(names, self.raw.run(names, dict(feed), options), strict=True))
        except _REFUSALS as error:
            raise RuntimeRefusedError(
                f"ONNX Runtime could not run {self.label}: {reason(error)}"
            ) from error

    def _run_extended(
        self, feed: Mapping[str, Any], names: list[str], options: ort.RunOptions
    ) -> list[Array]:
        """As `run`, for models with bfloat16 or float8 inputs or outputs."""
        values = {name: _to_ort_value(np.asarray(array)) for name, array in feed.items()}
        return [_from_ort_value(v) for v in self.raw.run_with_ort_values(names, values, options)]

    def close(self) -> None:
        """Drops the session, its memory and its temporary files; it cannot be run afterwards."""
        del self.raw
        trim_heap()
        if self._cleanup is not None:
            self._cleanup()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Recurrence:
    """A session some of whose outputs are inputs of its next run, and stay in its memory.

    Args:
        session: the session.
        state: first values, by input name.
        next_of: the output that is the next value of an input; inputs without one stay as they are.
    """

    def __init__(
        self, session: Session, state: Mapping[str, Array], next_of: Mapping[str, str]
    ) -> None:
        taken = {spec.name for spec in session.inputs}
        self._session = session
        self._state = {n: _to_ort_value(a) for n, a in state.items() if n in taken}
        self._next_of = {n: output for n, output in next_of.items() if n in taken}
        self._taken = taken
        given = set(self._next_of.values())
        self._results = [spec.name for spec in session.outputs if spec.name not in given]

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Runs once, moves the state on, and returns the outputs that are none of it.

        Raises:
            RuntimeRefusedError: the run failed; the state is as before.
        """
        values = {n: _to_ort_value(np.asarray(a)) for n, a in feed.items() if n in self._taken}
        names = [*self._results, *self._next_of.values()]
        options = ort.RunOptions()
        options.log_severity_level = _SILENT
        try:
            made = self._session.raw.run_with_ort_values(names, values | self._state, options)
        except _REFUSALS as error:
            raise RuntimeRefusedError(
                f"ONNX Runtime could not run {self._session.label}: {reason(error)}"
            ) from error
        found = dict(zip(names, made, strict=True))
        self._state |= {n: found[output] for n, output in self._next_of.items()}
        return {name: _from_ort_value(found[name]) for name in self._results}

    def read(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Copies of state tensors, all by default."""
        wanted = self._state if names is None else names
        return {name: np.array(_from_ort_value(self._state[name])) for name in wanted}

    def write(self, arrays: Mapping[str, Array]) -> None:
        """Replaces state tensors; those that the session does not take are passed over."""
        self._state |= {n: _to_ort_value(a) for n, a in arrays.items() if n in self._taken}


def open_session(
    model: AnyModel,
    *,
    optimize: Optimization = "all",
    threads: int = 1,
    lean: bool = False,
) -> Session:
    """Loads a model.

    Args:
        model: A path goes to ONNX Runtime as a path, so that external data is found beside it.
            Large models go through a temporary folder that lives as long as the session.
        optimize: How far ONNX Runtime may fold and fuse.
        threads: Threads of one operator.
        lean: Free each activation as soon as it is not needed, and consume it as soon as it is
            there. By default ONNX Runtime keeps buffers for the next run, which is faster, but
            grows with every new shape, and runs side branches last.

    Raises:
        RuntimeRefusedError: ONNX Runtime does not load the model.
    """
    options = _options(optimize, threads)
    if lean:
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return _load(model, options)


def optimized_graph(
    model: AnyModel, *, level: Optimization = "all", weights: bool = True
) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs after its own folding and fusing.

    Args:
        model: As for `open_session`.
        level: How far it may go. "all" includes layouts and kernels of this machine's processor.
        weights: False leaves initializers of 1 kB and more without payload; much cheaper when only
            nodes are looked at.

    Raises:
        RuntimeRefusedError: ONNX Runtime does not load the model.
    """
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
        options = _options(level, 1)
        path = _write_optimized(options, Path(folder))
        with _load(model, options):
            return onnx.load(path, load_external_data=weights)


def profile_in_turn(
    models: Sequence[AnyModel], feeds: Sequence[Feed], *, rounds: int = 10
) -> list[ProfiledGraph]:
    """The time of each node of several models that are run in turn, so that all see one machine.

    Of each node the least time over the rounds counts: whatever else the machine does only adds.

    Args:
        models: As for `open_session`; nodes are told apart by name.
        feeds: Inputs of all; seconds are means over them.
        rounds: Counted runs of each model with each feed, after one that warms up.

    Raises:
        RuntimeRefusedError: A model does not load or run.
    """
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as name, contextlib.ExitStack() as stack:
        paths, sessions = [], []
        for number, model in enumerate(models):
            folder = Path(name) / str(number)
            folder.mkdir()
            options = _options("all", 1)
            options.enable_profiling = True
            options.profile_file_prefix = str(folder / "profile")
            paths.append(_write_optimized(options, folder))
            sessions.append(stack.enter_context(_load(model, options)))
        for _ in range(rounds + 1):
            for session in sessions:
                for feed in feeds:
                    session.run({spec.name: feed[spec.name] for spec in session.inputs})
        return [
            ProfiledGraph(
                onnx.load(path, load_external_data=False).graph,
                _least_times(_kernel_events(session), rounds + 1, len(feeds)),
            )
            for path, session in zip(paths, sessions, strict=True)
        ]


def profile(
    model: AnyModel,
    feed: Feed,
    *,
    optimize: Optimization = "all",
    threads: int = 1,
    runs: int = 10,
) -> list[NodeTime]:
    """The time of each node that ONNX Runtime executes, in the order of execution.

    The first run warms up and is not counted. Nodes of If, Loop and Scan bodies are counted in
    their own right and in the node that holds the body.

    Args:
        model: As for `open_session`.
        feed: Inputs of one run.
        optimize: How far ONNX Runtime may fold and fuse.
        threads: Threads of one operator.
        runs: Counted runs; the median over them is returned.

    Raises:
        RuntimeRefusedError: The model does not load or run.
    """
    return _node_times(_profiled(model, feed, _options(optimize, threads), runs + 1), runs)


def node_runs(model: AnyModel, feed: Feed) -> list[NodeRun]:
    """Every execution of every node in one run, with the shapes of what went in and out.

    Nothing is fused, so that the nodes are the model's own.

    Raises:
        RuntimeRefusedError: The model does not load or run.
    """
    options = _options("none", 1)
    # Weights that a kernel has packed for itself are missing from the profile.
    options.add_session_config_entry("session.disable_prepacking", "1")
    runs = []
    for event in _profiled(model, feed, options, 1):
        shapes = [
            tuple(
                tuple(next(iter(entry.values()))) for entry in event["args"].get(key, ()) if entry
            )
            for key in ("input_type_shape", "output_type_shape")
        ]
        runs.append(NodeRun(event["args"]["op_name"], shapes[0], shapes[1]))
    return runs


def _write_optimized(options: ort.SessionOptions, folder: Path) -> Path:
    """Has the runtime write its optimized graph into a folder, large initializers beside it."""
    path = folder / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    config = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(config + "file_name", "optimized.data")
    options.add_session_config_entry(config + "min_size_in_bytes", "1024")
    return path


def _shapes(args: dict[str, Any], key: str) -> tuple[tuple[int, ...], ...]:
    """Shapes in the profile: [{"float": [1, 3]}, ...]."""
    return tuple(tuple(next(iter(entry.values()))) for entry in args.get(key, ()) if entry)


def _profiled(
    model: AnyModel, feed: Feed, options: ort.SessionOptions, runs: int
) -> list[dict[str, Any]]:
    """The kernel events in ONNX Runtime's profile of some runs."""
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        with _load(model, options) as session:
            for _ in range(runs):
                session.run(feed)
            return _kernel_events(session)


def _kernel_events(session: Session) -> list[dict[str, Any]]:
    """The kernel events of a session that profiles; it stops doing so."""
    events = json.loads(Path(session.raw.end_profiling()).read_text(encoding="utf8"))
    return [
        e
        for e in events
        if e.get("cat") == "Node" and str(e.get("name", "")).endswith("_kernel_time")
    ]


@functools.cache
def saturates_pairs() -> bool:
    """Whether this CPU's kernels add two products of uint8 and int8 in saturating 16 bits.

    x86 CPUs without VNNI do (VPMADDUBSW). Found by trying: 255 * 127 + 255 * 127 is twice as large
    as 16 bits can hold.
    """
    data = helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1, 64])
    total = helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [1, 16])
    weights = numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w")
    product = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph([product], "pairs", [data], [total], [weights])
    opset = helper.make_opsetid("", 13)
    with open_session(helper.make_model(graph, opset_imports=[opset], ir_version=8)) as session:
        found = session.run({"x": np.full((1, 64), 255, np.uint8)})
    return bool(np.any(next(iter(found.values())) != 64 * 255 * 127))


def reason(error: Exception) -> str:
    """The message of one of ONNX Runtime's exceptions in one line, without its C++ noise."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(
        r"Non-zero status code returned while running (\S+) node\. Name:'([^']*)' Status Message: ",
        lambda m: f"node {m[2] or 'without name'!r} ({m[1]}): ",
        text,
    )
    # /onnxruntime_src/onnxruntime/core/x.cc:12 void onnxruntime::F(int) const [with T = float] ...
    text = re.sub(
        r"(?:/\S+|\b\w+)\.(?:cc|cpp|h):\d+ (?:[^()]*\([^()]*(?:\([^()]*\)[^()]*)*\)(?: const)?"
        r"(?: \[with [^\]]*\])? )?",
        "",
        text,
    )
    text = text.removeprefix("This is an invalid model. ").strip(" .")
    return f"{text[:600]}."


# ---------------- loading


def _options(optimize: Optimization, threads: int) -> ort.SessionOptions:
    """Silent, deterministic, one operator at a time."""
    options = ort.SessionOptions()
    options.graph_optimization_level = _LEVELS[optimize]
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    options.use_deterministic_compute = True
    return options


def _load(model: AnyModel, options: ort.SessionOptions) -> Session:
    """A session; its temporary folder, if any, is removed with it."""
    folder: Path | None = None
    source: bytes | str
    if isinstance(model, str | Path):
        source, label = str(model), f"{str(model)!r}"
    elif isinstance(model, bytes):
        source, label = model, "the model"
    elif _is_large(model):
        folder = Path(tempfile.mkdtemp(prefix="onnxslim-"))
        source, label = str(folder / "model.onnx"), "the model"
    else:
        proto = model if isinstance(model, onnx.ModelProto) else model.to_proto()
        source, label = proto.SerializeToString(), "the model"
    try:
        if folder is not None and not isinstance(model, str | Path | bytes):
            _save(model, folder / "model.onnx")
        raw = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return Session(raw, label, folder)
    except _REFUSALS as error:
        _remove(folder)
        raise RuntimeRefusedError(f"ONNX Runtime refuses {label}: {reason(error)}") from error
    except BaseException:
        _remove(folder)
        raise


def _is_large(model: Model | onnx.ModelProto) -> bool:
    """Whether the model goes through a file."""
    if isinstance(model, onnx.ModelProto):
        return bool(model.ByteSize() > PROTO_LIMIT_BYTES)
    return model.nbytes() > MODEL_LIMIT_BYTES


def _save(model: Model | onnx.ModelProto, path: Path) -> None:
    """Writes the model with its large tensors in a file beside it; `model` stays as it is."""
    if not isinstance(model, onnx.ModelProto):
        model.save(path, external=True)
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # onnx moves the payloads out of the model that it saves
    onnx.save_model(copy, path, save_as_external_data=True, location="model.data")


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------- types and values


def _element(type_text: str) -> str:
    """The element type in "tensor(float)"; "" for other kinds."""
    match = re.fullmatch(r"tensor\((\w+)\)", type_text)
    return match[1] if match else ""


def _type_name(dtype: np.dtype[Any]) -> str:
    """The name of a NumPy type for messages."""
    return "string" if dtype.kind in "OSU" else dtype.name


def _spec(node: ort.NodeArg, kind: type[_Spec]) -> _Spec:
    """The description of one input or output."""
    element = _element(node.type)
    name = _NUMPY_TYPES.get(element)
    # ONNX Runtime writes an axis of unknown length as None, and some exporters as -1 or "".
    shape = tuple(
        d if (isinstance(d, str) and d) or (isinstance(d, int) and d >= 0) else None
        for d in (node.shape or ())
    )
    return kind(
        name=node.name,
        dtype=None if name is None else np.dtype(name),
        shape=shape,
        kind=re.sub(r"\W.*", "", node.type).replace("seq", "sequence"),
        type=node.type,
    )


def _to_ort_value(array: Array) -> ort.OrtValue:
    """The array as ONNX Runtime holds it, for the types that NumPy alone does not have."""
    plain = np.asarray(array, order="C")  # np.ascontiguousarray would add an axis to rank 0
    for element in _EXTENDED_TYPES:
        if array.dtype == _NUMPY_TYPES[element]:
            code = onnx.TensorProto.DataType.Value(element.upper())
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain, code)
    return ort.OrtValue.ortvalue_from_numpy(plain)


def _from_ort_value(value: ort.OrtValue) -> Array:
    """A copy of the value with its own type; `OrtValue.numpy` refuses bfloat16."""
    element = _element(value.data_type())
    if element not in _EXTENDED_TYPES:
        plain: Array = value.numpy()
        return plain
    shape, dtype = tuple(value.shape()), np.dtype(_NUMPY_TYPES[element])
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)
    payload = ctypes.string_at(value.data_ptr(), size)
    values: Array = np.frombuffer(payload, np.uint8).view(dtype).reshape(shape).copy()
    return values


def _least_times(events: list[dict[str, Any]], rounds: int, feeds: int) -> dict[str, float]:
    """Seconds by node name: the least of all rounds but the first, averaged over the feeds.

    A node in a body that does not run equally often in every run is left out.
    """
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = str(event["name"]).removesuffix("_kernel_time")
        durations[name].append(event["dur"] / 1e6)
    return {
        name: float(np.reshape(times, (rounds, feeds, -1)).sum(-1)[1:].min(0).mean())
        for name, times in durations.items()
        if len(times) % (rounds * feeds) == 0
    }


def _node_times(events: list[dict[str, Any]], runs: int) -> list[NodeTime]:
    """Medians over the profile of `runs` runs and a warming one before them."""
    seconds: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for event in events:
        name, args = str(event["name"]).removesuffix("_kernel_time"), event["args"]
        key = (name, args["op_name"], args.get("provider", ""), args.get("node_index", ""))
        seconds[key].append(event["dur"] / 1e6)
    result = []
    for (name, op, provider, _), times in seconds.items():
        each = max(1, len(times) // (runs + 1))  # a node in a Loop body runs more than once
        result.append(NodeTime(name, op, provider, each * statistics.median(times[each:] or times)))
    return result

"""What a round trip must keep: the fields, the verdicts of checker and runtime, the outputs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxslim_passes.errors import ModelError
from onnxslim_passes.model import Model, load
from onnxslim_passes.model.ir import Constant

from .cases import EXPECTED_REFUSALS, Case, Feed
from .compare import compare_models

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]

# Tensors that ONNX Runtime's Python binding returns only as an OrtValue.
NO_ARRAY_TYPES = frozenset(
    f"tensor({name})"
    for name in (
        *("bfloat16", "float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"),
        *("float8e8m0", "float4e2m1", "int4", "uint4", "int2", "uint2"),
    )
)

ort.set_default_logger_severity(4)  # refusals are expected and compared, not printed


@dataclass
class Tally:
    """Counts over many cases, and every problem with the name of its model."""

    problems: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # names, as expected
    judged: int = 0
    verbatim: int = 0  # the same bytes: nothing left to compare
    checker_refusals: int = 0  # original and result alike
    runtime_refusals: int = 0
    run: int = 0  # outputs compared bit by bit
    not_run: int = 0  # the original itself fails on the inputs

    def __str__(self) -> str:
        return (
            f"{self.judged} models: {self.verbatim} byte-identical, {self.run} run and equal, "
            f"{self.runtime_refusals} refused by ONNX Runtime before and after, "
            f"{self.not_run} fail on the inputs before and after, "
            f"{self.checker_refusals} refused by the checker before and after; "
            f"{len(self.refused)} refused on load; {len(self.problems)} problems"
        )


def judge_all(cases: Iterable[Case], convert: Convert) -> Tally:
    """Round-trips every case by `convert`."""
    tally = Tally()
    for case in cases:
        judge(case, convert, tally)
    return tally


def judge(case: Case, convert: Convert, tally: Tally) -> None:
    """Round-trips one case and notes in `tally` what differs."""
    original = case.model()
    before = original.SerializeToString(deterministic=True)
    tally.judged += 1
    words = EXPECTED_REFUSALS.get(case.name)
    try:
        result = convert(original)
    except ModelError as error:
        if words is not None and words in str(error):
            tally.refused.append(case.name)
        else:
            tally.problems.append(f"{case.name}: refused: {error}")
        return
    except Exception as error:  # any exception of any kind is what is looked for
        tally.problems.append(f"{case.name}: {type(error).__name__}: {error}")
        return
    if words is not None:
        tally.problems.append(f"{case.name}: expected to be refused with {words!r}, but it loads")
    if original.SerializeToString(deterministic=True) != before:
        tally.problems.append(f"{case.name}: the model that was given has been changed")
    if result.SerializeToString(deterministic=True) == before:
        tally.verbatim += 1
        return
    found = [str(difference) for difference in compare_models(original, result)]
    found += verdicts(case, original, result, tally)
    tally.problems += [f"{case.name}: {text}" for text in found]


def verdicts(
    case: Case, original: onnx.ModelProto, result: onnx.ModelProto, tally: Tally
) -> list[str]:
    """Checker, runtime and outputs of both models."""
    found = []
    checked, checked_result = checker_verdict(original), checker_verdict(result)
    tally.checker_refusals += bool(checked)
    if checked_result and not checked:  # sorting may make an invalid model valid: no harm
        found.append(f"checker said {checked or 'valid'!r}, now {checked_result or 'valid'!r}")
    session, refusal = open_session(original)
    session_result, refusal_result = open_session(result)
    if session is None or session_result is None:
        tally.runtime_refusals += session is None
        if refusal_result and not refusal:
            found.append(f"ONNX Runtime said {refusal!r}, now {refusal_result!r}")
        return found
    for feed in case.feeds(original, session):
        found += _outputs(session, session_result, feed, tally)
    return found


def checker_verdict(model: onnx.ModelProto) -> str:
    """The reason why the checker refuses the model, or ""."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker raises several unrelated types
        return f"{type(error).__name__}: {error}"
    return ""


def open_session(model: onnx.ModelProto) -> tuple[ort.InferenceSession | None, str]:
    """A session without optimizations, or None and ONNX Runtime's reason."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        return None, f"{type(error).__name__}: {str(error)[:300]}"
    return session, ""


def _outputs(
    session: ort.InferenceSession, result: ort.InferenceSession, feed: Feed, tally: Tally
) -> list[str]:
    known = {spec.name for spec in (*session.get_inputs(), *session.get_overridable_initializers())}
    feed = {name: value for name, value in feed.items() if name in known}
    outputs, failure = _run(session, feed)
    outputs_result, failure_result = _run(result, feed)
    if failure or failure_result:
        tally.not_run += bool(failure)
        if failure_result and not failure:
            return [f"run said {failure!r}, now {failure_result!r}"]
        return []
    tally.run += 1
    return [] if same(outputs, outputs_result) else ["outputs differ"]


def _run(session: ort.InferenceSession, feed: Feed) -> tuple[Any, str]:
    """The outputs, or None and the reason why the run fails."""
    try:
        if _needs_ort_values(session, feed):
            return session.run_with_ort_values(None, _ort_values(feed)), ""
        return session.run(None, feed), ""
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        return None, f"{type(error).__name__}: {str(error)[:300]}"


def _needs_ort_values(session: ort.InferenceSession, feed: Feed) -> bool:
    """Whether an input or output has a type that ONNX Runtime does not exchange as an array."""
    odd_output = any(spec.type in NO_ARRAY_TYPES for spec in session.get_outputs())
    return odd_output or any(
        isinstance(value, ort.OrtValue) or _is_extension(value) for value in feed.values()
    )


def _is_extension(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.type.__module__ == "ml_dtypes"


def _ort_values(feed: Feed) -> dict[str, ort.OrtValue]:
    """The inputs as OrtValues.

    2- and 4-bit elements take a byte each in NumPy while ONNX Runtime reads them packed: the values
    it sees are others, but the same for both models, which is all that is needed here.
    """
    values = {}
    for name, value in feed.items():
        if isinstance(value, ort.OrtValue):
            values[name] = value
        elif _is_extension(value):
            elem_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, elem_type)
        else:
            values[name] = ort.OrtValue.ortvalue_from_numpy(np.asarray(value))
    return values


def _content(value: ort.OrtValue) -> tuple[Any, ...]:
    """Type, shape and bytes of a tensor; the elements themselves where they are strings."""
    kind = value.data_type()
    if kind == "tensor(string)":
        return kind, value.numpy().tolist()
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return kind, value.shape(), data


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal bit by bit: arrays, or sequences and maps of them."""
    if isinstance(a, ort.OrtValue) and isinstance(b, ort.OrtValue):
        return _content(a) == _content(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bool(a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b or (a != a and b != b))


def keep(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Loads and writes; nothing is read of the constants."""
    return load(proto).to_proto()


def touch(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Loads, reads every constant, assigns a copy of what was read, and writes."""
    model = load(proto)
    for constant in (*model.constants(), *attribute_constants(model)):
        constant.values = constant.values.copy()
    return model.to_proto()


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Loads, copies and writes the copy."""
    return load(proto).copy().to_proto()


def attribute_constants(model: Model) -> Iterator[Constant]:
    """The tensors that are attributes of nodes."""
    for node in model.nodes():
        for value in node.attrs.values():
            if isinstance(value, Constant):
                yield value


CONVERSIONS: dict[str, Convert] = {"keep": keep, "touch": touch, "copy": copied}

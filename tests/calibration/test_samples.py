"""Readers of samples and their checks."""

import os
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import SamplesError
from onnxslim_passes.runtime import InputSpec, open_session


def spec(name: str = "x", dtype: Any = np.float32, shape: tuple = ("N", 3)) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape, "tensor", "tensor(?)")


X = (spec(),)


def savez(path: Path, **arrays: Any) -> Path:
    np.savez(path / "calib.npz", **arrays)
    return path / "calib.npz"


def rows(count: int, *, columns: int = 3) -> np.ndarray:
    return np.arange(count * columns, dtype=np.float32).reshape(count, columns)


def joined(samples: Samples, inputs: tuple[InputSpec, ...] = X) -> np.ndarray:
    return np.concatenate([f["x"] for f in samples.feeds(inputs)])


def script(path: Path, text: str) -> str:
    (path / "mine.py").write_text(textwrap.dedent(text))
    return f"{path / 'mine.py'}:feeds"


# ---------------- .npz


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_npz_is_cut_into_batches_with_a_ragged_last(tmp_path: Path, batch_size: int) -> None:
    samples = Samples.open(savez(tmp_path, x=rows(10)), batch_size=batch_size)
    sizes = [len(f["x"]) for f in samples.feeds(X)]
    assert sizes == [min(batch_size, 10 - i) for i in range(0, 10, batch_size)]
    assert np.array_equal(joined(samples), rows(10))
    assert samples.count == 10
    assert not samples.is_random


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_in_any_memory_order(tmp_path: Path, order: str, compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "c.npz", x=np.asarray(rows(10), order=order))
    assert np.array_equal(joined(Samples.open(tmp_path / "c.npz", batch_size=3)), rows(10))


def test_npz_follows_the_fixed_batch(tmp_path: Path) -> None:
    fixed = (spec(shape=(2, 3)),)
    samples = Samples.open(savez(tmp_path, x=rows(10)))
    assert [len(f["x"]) for f in samples.feeds(fixed)] == [2] * 5


def test_npz_that_does_not_fill_the_fixed_batch(tmp_path: Path) -> None:
    samples = Samples.open(savez(tmp_path, x=rows(10)))
    with pytest.raises(SamplesError, match=r"10 samples.*exactly 4; 2 are left over"):
        samples.check((spec(shape=(4, 3)),))


def test_npz_of_one_more_axis_holds_whole_inputs(tmp_path: Path) -> None:
    state = np.arange(24, dtype=np.float32).reshape(3, 2, 4, 1)
    inputs = (
        spec("x", shape=("N", 2)),
        spec("state", shape=(2, "N", 1)),
        spec("rate", np.int64, ()),
    )
    path = savez(tmp_path, x=state[:, 0, :2, 0], state=state, rate=np.array([1, 2, 3]))
    feeds = list(Samples.open(path).feeds(inputs))
    assert [f["x"].shape for f in feeds] == [(1, 2)] * 3
    assert [f["rate"].shape for f in feeds] == [()] * 3
    assert [int(f["rate"]) for f in feeds] == [1, 2, 3]
    assert np.array_equal(feeds[2]["state"], state[2])


def test_npz_scalar_is_the_same_for_all_feeds(tmp_path: Path) -> None:
    inputs = (*X, spec("rate", np.int64, ()))
    path = savez(tmp_path, x=rows(5), rate=np.array(16000))
    feeds = list(Samples.open(path, batch_size=4).feeds(inputs))
    assert [int(f["rate"]) for f in feeds] == [16000] * 2


def test_npz_labels_are_cut_alike_and_not_fed(tmp_path: Path) -> None:
    path = savez(tmp_path, x=rows(5), labels=np.arange(5))
    samples = Samples.open(path, batch_size=2)
    assert [list(f) for f in samples.feeds(X)] == [["x"]] * 3
    assert [labels.tolist() for _, labels in samples.labelled(X)] == [[0, 1], [2, 3], [4]]


def test_npz_labels_are_fed_to_a_model_that_has_them(tmp_path: Path) -> None:
    path = savez(tmp_path, x=rows(5), labels=np.arange(5))
    inputs = (*X, spec("labels", np.int64, ("N",)))
    samples = Samples.open(path)
    assert sorted(next(samples.feeds(inputs))) == ["labels", "x"]
    with pytest.raises(SamplesError, match="labels are needed"):
        list(samples.labelled(inputs))


def test_npz_is_read_as_a_stream(tmp_path: Path) -> None:
    path = savez(tmp_path, x=np.zeros((2000, 3000), np.float32))
    samples = Samples.open(path)
    tracemalloc.start()
    try:
        samples.check((spec(shape=("N", 3000)),))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays", "inputs", "text"),
    [
        ({"image": rows(2)}, (spec("images"),), r"'image' is not an input.*mean 'images'"),
        ({"y": rows(2)}, X, r"'y' is not an input.*It has: x: float32 \(N, 3\)"),
        (
            {"x": rows(2)},
            (*X, spec("mask", np.int64)),
            r"input 'mask' of the model is missing; expected int64 \(N, 3\)",
        ),
        ({"x": rows(2).astype(np.float64)}, X, r"'x' is float64, expected float32 \(N, 3\)"),
        ({"x": np.array([["a"] * 3])}, X, r"'x' is str\d+, expected float32"),
        ({"x": rows(2, columns=4)}, X, r"'x' has length 4 along axis 1, shape \(2, 4\)"),
        ({"x": np.zeros(3, np.float32)}, X, r"'x' has 1 axes, shape \(3,\); expected 2"),
        ({"x": rows(4), "z": rows(3)}, (*X, spec("z")), r"different numbers.*x 4, z 3"),
        ({"x": rows(0)}, X, "holds no samples"),
        ({}, X, "holds no samples"),
        ({"x": np.array([[1, np.nan, 1]], np.float32)}, X, "'x' holds 1 values that are NaN"),
        ({"x": np.array([[np.inf, -np.inf, 1]], np.float32)}, X, "'x' holds 2 values"),
        ({"x": np.array([None, 1])}, X, "allow_pickle"),
        (
            {"x": rows(4), "z": rows(4)},
            (spec(shape=(2, 3)), spec("z", shape=(1, 3))),
            "fixes different first axes",
        ),
    ],
)
def test_npz_that_does_not_fit(
    tmp_path: Path, arrays: dict[str, Any], inputs: tuple[InputSpec, ...], text: str
) -> None:
    path = savez(tmp_path, **arrays)
    with pytest.raises(SamplesError, match=text) as caught:
        Samples.open(path).check(inputs)
    assert "calib.npz" in str(caught.value)


def test_error_names_the_samples(tmp_path: Path) -> None:
    values = rows(10)
    values[7, 1] = np.nan
    with pytest.raises(SamplesError, match="samples 4 to 7"):
        Samples.open(savez(tmp_path, x=values), batch_size=4).check(X)


def test_types_that_npz_forgets_or_swaps(tmp_path: Path) -> None:
    half = rows(2).astype(ml_dtypes.bfloat16)
    path = savez(tmp_path, x=half, z=rows(2).astype(">f4"))
    inputs = (spec(dtype=ml_dtypes.bfloat16), spec("z"))
    feed = next(Samples.open(path).feeds(inputs))
    assert feed["x"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(feed["x"], half)
    assert feed["z"].dtype.isnative
    assert np.array_equal(feed["z"], rows(2))


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"\x93NUMPY"])
def test_broken_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "calib.npz").write_bytes(content)
    with pytest.raises(SamplesError, match=r"calib.npz: (not an .npz|cannot be read)"):
        Samples.open(tmp_path / "calib.npz").check(X)


def test_truncated_npz(tmp_path: Path) -> None:
    path = savez(tmp_path, x=rows(1000))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SamplesError, match=r"calib\.npz"):
        Samples.open(path).check(X)


# ---------------- a folder


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, count in (("b", 1), ("a", 4), ("c", 2)):
        np.savez(tmp_path / f"{name}.npz", x=rows(count))
    np.savez(tmp_path / "d.npz", x=rows(1)[0])
    (tmp_path / "README.txt").write_text("not data")
    samples = Samples.open(tmp_path)
    assert [len(f["x"]) for f in samples.feeds(X)] == [4, 1, 2, 1]
    assert samples.count == 4


def test_folder_of_npy_for_one_input_only(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(2))
    assert np.array_equal(joined(Samples.open(tmp_path)), rows(2))
    with pytest.raises(SamplesError, match=r"a.npy: .*the model has 2 inputs \(x, z\)"):
        Samples.open(tmp_path).check((*X, spec("z")))


def test_folder_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(1)[0], labels=3)
    assert [labels.tolist() for _, labels in Samples.open(tmp_path).labelled(X)] == [[3]]


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match=r"holds no .npz or .npy"):
        Samples.open(tmp_path)


def test_broken_file_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(SamplesError, match=r"bad\.npy: cannot be read"):
        Samples.open(tmp_path).check(X)


# ---------------- file.py:function


def test_function_is_run_again_for_each_reading(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("COLUMNS = 3")
    text = script(
        tmp_path,
        """
        from __future__ import annotations
        from dataclasses import dataclass
        import numpy as np

        @dataclass
        class Line:
            width: int

        def feeds():
            from beside_mine import COLUMNS
            for length in (2, 5):
                yield {"x": np.ones((Line(length).width, COLUMNS), np.float32)}
        """,
    )
    samples = Samples.open(text)
    for _ in range(2):
        assert [f["x"].shape for f in samples.feeds(X)] == [(2, 3), (5, 3)]
    assert samples.count == 2


def test_function_may_yield_labels(tmp_path: Path) -> None:
    text = script(
        tmp_path,
        """
        import numpy as np
        def feeds():
            yield {"x": np.ones((1, 3), np.float32)}, [7]
            yield {"x": np.ones((1, 3), np.float32), "labels": np.array([8])}
        """,
    )
    assert [int(labels[0]) for _, labels in Samples.open(text).labelled(X)] == [7, 8]


def test_function_may_yield_other_samples_in_each_epoch(tmp_path: Path) -> None:
    text = script(
        tmp_path,
        """
        import numpy as np
        def feeds(epoch, scale=2):
            yield {"x": np.full((1, 3), scale * epoch, np.float32)}
        """,
    )
    samples = Samples.open(text)
    assert samples.has_epochs

    def first(samples: Samples) -> float:
        return float(next(samples.feeds(X))["x"][0, 0])

    assert [first(samples), first(samples.in_epoch(3)), first(samples.in_epoch(0))] == [0, 6, 0]


def test_a_callable_may_make_other_feeds_in_each_epoch() -> None:
    samples = Samples.from_feeds(lambda epoch: [{"x": np.full((1, 3), epoch, np.float32)}])
    assert samples.has_epochs
    found = [next(one.feeds(X))["x"][0, 0] for one in (samples, samples.in_epoch(2))]
    assert found == [0, 2]
    assert not Samples.from_feeds(lambda: [{"x": np.ones((1, 3), np.float32)}]).has_epochs
    assert not Samples.from_feeds(iter).has_epochs  # a builtin that tells no signature


def test_other_data_is_the_same_in_each_epoch(tmp_path: Path) -> None:
    samples = Samples.open(savez(tmp_path, x=rows(1)))
    assert not samples.has_epochs
    assert samples.in_epoch(3) is samples


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("def feed(): yield {}", r"has no function 'feeds'. Did you mean 'feed'\?"),
        ("def feeds(path): yield {}", "called with 0 arguments, but missing a required argument"),
        ("import no_such_module_here", r"ModuleNotFoundError.*\(mine.py, line 1\)"),
        ("def feeds(:", "SyntaxError"),
        ("def feeds():\n  yield [1]", r"feed 0: expected a dict .*, got list"),
        ("def feeds():\n  return {}", "expected a generator.*got dict"),
        ("def feeds():\n  return 3", "expected a generator.*got int"),
        ("def feeds():\n  yield from ()", "holds no samples"),
        ("def feeds():\n  yield {}\n  1 / 0", r"input 'x' of the model is missing"),
        (
            "import numpy as np\ndef feeds():\n  yield {'x': np.ones((1, 3), 'f')}\n  [][4]",
            r"feed 1 failed with IndexError: .*\(mine.py, line 4\)",
        ),
        ("def feeds():\n  yield {'y': 1}", "'y' is not an input"),
        ("def feeds():\n  yield {'x': [[1.0, 2.0, 3.0]]}", "'x' is float64, expected float32"),
    ],
)
def test_function_that_does_not_fit(tmp_path: Path, code: str, text: str) -> None:
    spec_text = script(tmp_path, code)
    with pytest.raises(SamplesError, match=text):
        Samples.open(spec_text).check(X)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("calib.np", r"Did you mean 'calib.npz'\?"),
        ("nowhere/calib.npz", "no such file or folder"),
        ("nofile.py:feeds", "there is no file"),
        ("mine.py", "which function"),
        ("notes.txt", "expected an .npz file.*got a .txt file"),
    ],
)
def test_no_such_data(tmp_path: Path, name: str, text: str) -> None:
    savez(tmp_path, x=rows(1))
    script(tmp_path, "")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SamplesError, match=text):
        Samples.open(tmp_path / name)


def test_batch_size_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="batch_size is 0"):
        Samples.open(tmp_path, batch_size=0)


def test_real_generator(shared_models: Path) -> None:
    session = open_session(shared_models / "models" / "minilm_l6.onnx", optimize="none")
    samples = Samples.open(f"{shared_models / 'tasks.py'}:calibration_minilm_l6")
    samples.check(session.inputs)
    assert samples.count == 32


# ---------------- in memory, fingerprints, random


def test_feeds_in_memory_are_restartable() -> None:
    once = Samples.from_feeds({"x": rows(n)} for n in (1, 2))
    again = Samples.from_feeds(lambda: ({"x": rows(n)} for n in (1, 2)))
    for samples in (once, again):
        for _ in range(2):
            assert [len(f["x"]) for f in samples.feeds(X)] == [1, 2]
    assert once.fingerprint() == again.fingerprint()


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (3, [1, 4, 7]), (9, list(range(1, 10))), (20, [*range(1, 10)])]
)
def test_at_most_so_many_feeds_evenly_spread(most: int, expected: list[int]) -> None:
    samples = Samples.from_feeds({"x": rows(n)} for n in range(1, 10))
    assert [len(f["x"]) for f in samples.feeds(X, most=most)] == expected


def test_fingerprint_follows_the_data(tmp_path: Path) -> None:
    path = savez(tmp_path, x=rows(3))
    first = Samples.open(path).fingerprint()
    assert first == Samples.open(path).fingerprint()
    assert len(first) == 64
    savez(tmp_path, x=rows(4))
    assert Samples.open(path).fingerprint() != first
    kinds = [rows(2), rows(2).astype(np.float64), rows(2).reshape(3, 2), rows(2) + 1]
    prints = {Samples.from_feeds([{"x": k}]).fingerprint() for k in kinds}
    assert len(prints) == len(kinds)


def test_random_is_seeded_and_says_so() -> None:
    inputs = (
        spec("ids", np.int64, ("batch", "sequence")),
        spec("mask", np.bool_, ("batch", "sequence")),
        spec("image", np.float16, ("batch", 3, None, None)),
        spec("text", np.object_, (None,)),
        spec("rate", np.float32, ()),
    )
    samples = Samples.random(inputs, seed=3, count=4)
    samples.check(inputs)
    assert samples.is_random
    assert samples.count == 4
    feed = next(samples.feeds(inputs))
    assert feed["ids"].shape == feed["mask"].shape == (1, 16)
    assert set(np.unique(feed["ids"])) <= {0, 1}
    assert feed["image"].shape == (1, 3, 64, 64)
    assert feed["text"].tolist() == ["text"]
    assert samples.fingerprint() == Samples.random(inputs, seed=3, count=4).fingerprint()
    assert samples.fingerprint() != Samples.random(inputs, seed=4, count=4).fingerprint()


def graph(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g {text}')


def test_runnable_random_tries_until_the_model_runs() -> None:
    model = graph(
        "(float[N, K] x) => (float[N, 8] y)"
        "{ c = Constant<value = float[128, 8] {"
        + ", ".join(["0"] * 1024)
        + "}>() y = MatMul(x, c) }"
    )
    # Nothing declared says that K is 128: only running tells.
    session = open_session(model, optimize="none")
    samples = Samples.runnable_random(session)
    assert next(samples.feeds(session.inputs))["x"].shape == (1, 128)


def test_runnable_random_gives_up_with_the_reason() -> None:
    text = "(float[N, K] x) => (float[N, 1013] y) { s = Constant<value = int64[2] {-1, 1013}>()"
    session = open_session(graph(text + " y = Reshape(x, s) }"))
    with pytest.raises(SamplesError, match=r"none of \d+ guesses.*calibration data.*Reshape"):
        Samples.runnable_random(session)


def test_random_for_a_sequence_is_refused() -> None:
    session = open_session(graph("(seq(float[N]) x) => (int64 n) { n = SequenceLength(x) }"))
    with pytest.raises(SamplesError, match=r"'x' \(seq\(tensor\(float\)\)\)"):
        Samples.runnable_random(session)


def test_unreadable_file(tmp_path: Path) -> None:
    path = savez(tmp_path, x=rows(1))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(SamplesError, match="cannot be read"):
        Samples.open(path).check(X)

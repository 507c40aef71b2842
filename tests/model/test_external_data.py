"""External data: only from below the model's folder, read when needed, never lost on writing."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.errors import ExternalDataError, OutputError, UnsupportedModelError
from onnxslim_passes.model import load

VALUES = np.arange(4, dtype=np.float32).reshape(2, 2)


def write_model(path: Path, entries: dict[str, str], dims: tuple[int, ...] = (2, 2)) -> Path:
    """y = x @ W, with W described by `entries` of external data."""
    tensor = TensorProto(
        name="W", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL
    )
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def weights_of(path: Path) -> Any:
    """What onnx itself reads back as the first initializer of a saved model."""
    return numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def read_all(path: Path) -> None:
    for constant in load(path).constants():
        _ = constant.values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a secret beside it, a data file in it, and links of all kinds."""
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    (inside / "w.bin").write_bytes(VALUES.tobytes())
    (inside / "sub" / "w.bin").write_bytes(VALUES.tobytes())
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "link_inside.bin").symlink_to(inside / "w.bin")
    (inside / "dangling.bin").symlink_to(tmp_path / "nothing")
    (inside / "folder_link").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe")
    return inside


@pytest.mark.parametrize("location", ["w.bin", "sub/w.bin", "./w.bin", "sub/./w.bin", "sub//w.bin"])
def test_files_below_the_folder_are_read(folder: Path, location: str) -> None:
    model = load(write_model(folder / "m.onnx", {"location": location}))
    (constant,) = model.constants()
    np.testing.assert_array_equal(constant.values, VALUES)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("/etc/passwd", "absolute"),
        ("//etc/passwd", "absolute"),
        ("\\etc\\passwd", "absolute"),
        ("\\\\server\\share\\w.bin", "absolute"),
        ("C:\\w.bin", "absolute"),
        ("file:///w.bin", "absolute"),
        ("../secret.bin", "'..'"),
        ("sub/../../secret.bin", "'..'"),
        ("sub/../w.bin", "'..'"),
        ("sub/./.././../secret.bin", "'..'"),
        ("sub\\..\\..\\secret.bin", "'..'"),
        ("..\\secret.bin", "'..'"),
        ("link.bin", "link"),
        ("link_inside.bin", "link"),
        ("dangling.bin", "link"),
        ("folder_link/secret.bin", "link"),
        ("folder_link/model/w.bin", "link"),
        ("sub", "not a regular file"),
        ("pipe", "not a regular file"),
        ("missing.bin", "cannot be read"),
        ("w.bin/more", "cannot be read"),
        ("", "not a path"),
        (".", "not a path"),
        ("w.bin\0.txt", "not a path"),
    ],
)
def test_other_places_are_refused(folder: Path, location: str, words: str) -> None:
    path = write_model(folder / "m.onnx", {"location": location})
    with pytest.raises(ExternalDataError, match=r"Tensor 'W'") as caught:
        read_all(path)
    assert words in str(caught.value)


def test_an_absolute_path_into_the_folder_is_refused_too(folder: Path) -> None:
    path = write_model(folder / "m.onnx", {"location": str(folder / "w.bin")})
    with pytest.raises(ExternalDataError, match="absolute"):
        read_all(path)


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "1"},
        {"offset": "16"},
        {"offset": "99999999999999999999"},
        {"offset": "-4"},
        {"length": "17"},
        {"length": "15"},
        {"length": "-1"},
        {"length": "0"},
        {"offset": "zero"},
        {"offset": "8", "length": "16"},
        {"offset": "", "length": ""},
    ],
)
def test_a_range_that_does_not_fit_is_refused(folder: Path, entries: dict[str, str]) -> None:
    path = write_model(folder / "m.onnx", {"location": "w.bin", **entries})
    with pytest.raises(ExternalDataError, match="'W'"):
        read_all(path)


@pytest.mark.parametrize("dims", [(-1, 2), (2**32, 2**32), (3, 2), (2**62, 4)])
def test_dimensions_that_do_not_fit_the_file_are_refused(
    folder: Path, dims: tuple[int, ...]
) -> None:
    path = write_model(folder / "m.onnx", {"location": "w.bin"}, dims)
    with pytest.raises(ExternalDataError, match="'W'"):
        read_all(path)


def test_no_location_at_all_is_refused(folder: Path) -> None:
    with pytest.raises(ExternalDataError, match="not a path"):
        read_all(write_model(folder / "m.onnx", {"offset": "0"}))


def test_a_message_without_a_folder_is_refused(folder: Path) -> None:
    path = write_model(folder / "m.onnx", {"location": "w.bin"})
    with pytest.raises(ExternalDataError, match="load the model by its path"):
        load(path.read_bytes())


def test_paths_are_relative_to_the_model_not_to_the_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_model(folder / "m.onnx", {"location": "w.bin"})
    (tmp_path / "w.bin").write_bytes(bytes(16))  # must not be taken instead
    monkeypatch.chdir(tmp_path)
    (constant,) = load("model/m.onnx").constants()
    np.testing.assert_array_equal(constant.values, VALUES)


def test_a_model_loaded_by_a_relative_path_survives_a_change_of_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_model(folder / "m.onnx", {"location": "w.bin"})
    monkeypatch.chdir(tmp_path)
    (constant,) = load("model/m.onnx").constants()
    monkeypatch.chdir(folder)
    np.testing.assert_array_equal(constant.values, VALUES)


def test_data_cut_after_loading_is_noticed(folder: Path, tmp_path: Path) -> None:
    model = load(write_model(folder / "m.onnx", {"location": "w.bin"}))
    (folder / "w.bin").write_bytes(b"short")
    (constant,) = model.constants()
    with pytest.raises(ExternalDataError, match="truncated"):
        _ = constant.values
    with pytest.raises(ExternalDataError, match="truncated"):
        model.save(tmp_path / "out.onnx")
    assert not list(tmp_path.glob("*out.onnx*"))


def test_data_replaced_by_a_link_after_loading_is_noticed(folder: Path) -> None:
    model = load(write_model(folder / "m.onnx", {"location": "w.bin"}))
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to(folder.parent / "secret.bin")
    (constant,) = model.constants()
    with pytest.raises(ExternalDataError):
        _ = constant.values


def _in_training_info(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor)


def _in_a_sparse_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)


def _in_a_list_of_tensors(model: onnx.ModelProto, tensor: TensorProto) -> None:
    attribute = model.graph.node[0].attribute.add()
    attribute.name, attribute.type = "list", onnx.AttributeProto.TENSORS
    attribute.tensors.append(tensor)


@pytest.mark.parametrize(
    "hide", [_in_training_info, _in_a_sparse_initializer, _in_a_list_of_tensors]
)
def test_external_data_that_saving_would_lose_is_refused(
    folder: Path, hide: Callable[[onnx.ModelProto, TensorProto], None]
) -> None:
    path = write_model(folder / "m.onnx", {"location": "w.bin"})
    model = onnx.load(path, load_external_data=False)
    hidden = TensorProto()
    hidden.CopyFrom(model.graph.initializer[0])
    hidden.name = "hidden"
    hide(model, hidden)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModelError, match="'hidden' has external data"):
        load(path)


# ---------------- writing


def big_model(path: Path, rows: int = 1024, fill: float = 1.0) -> Path:
    """y = x @ W with W (rows, 64) embedded in the file."""
    weight = numpy_helper.from_array(np.full((rows, 64), fill, np.float32), "W")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 64])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_never_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "m.onnx.data").symlink_to(victim)
    with pytest.raises(OutputError, match="link"):
        load(big_model(tmp_path / "m.onnx")).save(out / "m.onnx", external=True)
    assert victim.read_bytes() == b"precious"
    assert sorted(p.name for p in out.iterdir()) == ["m.onnx.data"]


def test_the_model_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "out.onnx").symlink_to(victim)
    load(big_model(tmp_path / "m.onnx")).save(tmp_path / "out.onnx")
    assert victim.read_bytes() == b"precious"
    assert weights_of(tmp_path / "out.onnx").shape == (1024, 64)


def test_saving_over_the_data_still_to_be_read_is_refused(tmp_path: Path) -> None:
    load(big_model(tmp_path / "m.onnx")).save(tmp_path / "e.onnx", external=True)
    before = (tmp_path / "e.onnx.data").read_bytes()
    with pytest.raises(OutputError, match="still reads"):
        load(tmp_path / "e.onnx").save(tmp_path / "e.onnx", external=True)
    assert (tmp_path / "e.onnx.data").read_bytes() == before
    assert weights_of(tmp_path / "e.onnx").shape == (1024, 64)


def test_saving_over_another_pair_replaces_both(tmp_path: Path) -> None:
    target = tmp_path / "e.onnx"
    load(big_model(tmp_path / "old.onnx", rows=2048, fill=1)).save(target, external=True)
    load(big_model(tmp_path / "new.onnx", rows=512, fill=2)).save(target, external=True)
    np.testing.assert_array_equal(weights_of(target), np.full((512, 64), 2, np.float32))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("external", [False, True])
def test_an_impossible_folder_is_an_output_error(tmp_path: Path, external: bool) -> None:
    model = load(big_model(tmp_path / "m.onnx"))
    (tmp_path / "file").write_bytes(b"")
    for parent in (tmp_path / "file", tmp_path / "none", Path("/proc")):
        with pytest.raises(OutputError, match=r"o\.onnx"):
            model.save(parent / "o.onnx", external=external)


def test_a_folder_as_target_is_an_output_error(tmp_path: Path) -> None:
    target = tmp_path / "folder.onnx"
    target.mkdir()
    with pytest.raises(OutputError, match="folder"):
        load(big_model(tmp_path / "m.onnx")).save(target)
    assert not list(tmp_path.glob(".*"))


FULL_DISK = """
    import resource, sys
    from onnxslim_passes.errors import OutputError
    from onnxslim_passes.model import load

    source, target, external, limit = sys.argv[1:]
    model = load(source)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        model.save(target, external=external == "True")
    except OutputError as error:
        print(error)
        sys.exit(3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("limit", [0, 1, 100, 4096, 100_000])
def test_a_full_disk_loses_nothing(tmp_path: Path, external: bool, limit: int) -> None:
    """The process may not write files above `limit` bytes, as if the disk were full."""
    out = tmp_path / "out"
    out.mkdir()
    target = out / "e.onnx"
    load(big_model(tmp_path / "old.onnx", rows=100, fill=1)).save(target, external=external)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    new = big_model(tmp_path / "new.onnx", rows=2000, fill=2)
    done = _python(FULL_DISK, str(new), str(target), str(external), str(limit))
    assert done.returncode == 3, done.stderr
    assert "cannot be written" in done.stdout
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_disk_full_at_the_model_file_keeps_the_old_pair(tmp_path: Path) -> None:
    """The data fits, the model file beside it does not: the old data must not be replaced yet."""
    out = tmp_path / "out"
    out.mkdir()
    target = out / "e.onnx"
    load(big_model(tmp_path / "old.onnx", rows=20, fill=1)).save(target, external=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    new = load(big_model(tmp_path / "new.onnx", rows=5, fill=2))
    new.set_metadata("long", "x" * 5000)  # the data has 1,280 bytes
    new.save(tmp_path / "long.onnx")
    done = _python(FULL_DISK, str(tmp_path / "long.onnx"), str(target), "True", "2000")
    assert done.returncode == 3, done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


MEMORY = """
    import resource, sys
    from onnxslim_passes.model import load

    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load(sys.argv[1])
    weight = next(iter(model.constants()))
    weight.values = weight.values * 2
    model.save(sys.argv[2], external=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_touching_one_of_sixteen_weights_does_not_load_the_others(tmp_path: Path) -> None:
    """60 MB of weights; 4 MB of them are changed. The benchmark does it with 3 GB."""
    source, target = tmp_path / "big.onnx", tmp_path / "touched.onnx"
    _write_chain(source, weights=16, side=1000)
    done = _python(MEMORY, str(source), str(target))
    assert done.returncode == 0, done.stderr
    # The changed weight twice (old and new values) and pieces on their way: not 60 MB.
    assert int(done.stdout) < 30 * 1024, "KiB above the interpreter with its modules"
    before = {t.name: t for t in onnx.load(source).graph.initializer}
    for tensor in onnx.load(target).graph.initializer:
        factor = 2 if tensor.name == "W0" else 1
        expected = numpy_helper.to_array(before[tensor.name]) * factor
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)


def _write_chain(path: Path, weights: int, side: int) -> None:
    """A chain of MatMuls whose float32 weights (side, side) lie in one file."""
    generator = np.random.default_rng(0)
    nodes, tensors, length = [], [], 4 * side * side
    with path.with_suffix(".bin").open("wb") as stream:
        for index in range(weights):
            stream.write(generator.standard_normal((side, side), dtype=np.float32).tobytes())
            tensor = TensorProto(
                name=f"W{index}",
                data_type=TensorProto.FLOAT,
                dims=(side, side),
                data_location=TensorProto.EXTERNAL,
            )
            place = {"location": f"{path.stem}.bin", "offset": index * length, "length": length}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"t{index}", f"W{index}"], [f"t{index + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, side])
        for name in ("t0", f"t{weights}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def _python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, without bytecode files (their size may be limited)."""
    return subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )

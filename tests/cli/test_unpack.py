"""`unpack`: dense again, the same bits, or nothing written."""

import onnx
import pytest
from onnx import numpy_helper


@pytest.fixture
def small(run, model, tmp_path):
    out = tmp_path / "small.onnx"
    passes = ["--pass", "prune-magnitude:sparsity=0.8,min_elements=1"]
    passes += ["--pass", "cluster-weights:bits=3,min_elements=1"]
    assert run("compress", model, "-o", out, *passes).code == 0
    return out


def weights(path):
    graph = onnx.load(path).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_weights_are_dense_again(run, model, small, tmp_path):
    out = tmp_path / "dense.onnx"
    result = run("unpack", small, "-o", out)
    assert result.code == 0, result.err
    assert "weights dense again" in result.out.splitlines()[0]
    assert "head_weight" in result.out
    assert {name: w.shape for name, w in weights(out).items()} == {
        name: w.shape for name, w in weights(model).items()
    }
    assert [node.op_type for node in onnx.load(out).graph.node] == [
        node.op_type for node in onnx.load(model).graph.node
    ]
    data = run("unpack", small, "-o", out, "--json").json
    assert data["after_bytes"] > data["before_bytes"]
    assert "head_weight" in {weight["where"] for weight in data["weights"]}


def test_compressing_a_stored_file_again_loses_nothing(run, small, tmp_path):
    dense, direct, again = (tmp_path / f"{name}.onnx" for name in ("dense", "direct", "again"))
    assert run("unpack", small, "-o", dense).code == 0
    text = ["--pass", "store-weights:level=portable", "--json"]
    assert run("compress", dense, "-o", direct, *text).code == 0
    report = run("compress", small, "-o", again, *text)
    assert report.code == 0, report.err
    reasons = {item["reason"] for item in report.json["preparations"]}
    assert reasons == {"was stored; now dense, so that passes see its values"}
    assert report.json["after"]["parameters"] == report.json["before"]["parameters"]
    for path in (direct, again):
        out = tmp_path / f"{path.stem}_dense.onnx"
        assert run("unpack", path, "-o", out).code == 0
        for name, values in weights(dense).items():
            assert weights(out)[name].tobytes() == values.tobytes()


def test_a_dense_model_stays_as_it_is(run, model, tmp_path):
    out = tmp_path / "out.onnx"
    result = run("unpack", model, "-o", out)
    assert result.code == 0, result.err
    assert "0 weights" in result.out
    assert onnx.load(out) == onnx.load(model)


@pytest.mark.parametrize("place", ["itself", "nowhere", None])
def test_bad_outputs_are_refused(run, small, tmp_path, place):
    before = small.read_bytes()
    targets = {"itself": small, "nowhere": tmp_path / "no" / "x.onnx"}
    options = ["-o", targets[place]] if place else []
    result = run("unpack", small, *options)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert small.read_bytes() == before


def test_a_broken_file_is_refused(run, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07no model")
    result = run("unpack", broken, "-o", tmp_path / "out.onnx")
    assert result.code == 3
    assert not (tmp_path / "out.onnx").exists()


def test_weights_of_the_smallest_level_have_their_names_again(run, model, tmp_path):
    out, dense, again = (tmp_path / f"{name}.onnx" for name in ("smallest", "dense", "again"))
    passes = ["--pass", "prune-magnitude:sparsity=0.8,min_elements=1"]
    passes += ["--pass", "store-weights:level=smallest,min_elements=2"]
    assert run("compress", model, "-o", out, *passes).code == 0
    data = run("explain", out, "head_weight", "--json").json
    (short,) = {item["figures"]["name"] for item in data["decisions"] if "name" in item["figures"]}
    assert len(short) <= 2
    assert run("explain", out, short, "--json").json["decisions"] == data["decisions"]
    result = run("unpack", out, "-o", dense)
    assert result.code == 0, result.err
    assert "names they had before" in result.out
    assert set(weights(dense)) >= {"head_weight"}
    assert "head_weight" in result.out
    exact = ["--pass", "cluster-weights:bits=3,include=[head_weight],min_elements=1"]
    assert run("compress", out, "-o", again, *exact).code == 0

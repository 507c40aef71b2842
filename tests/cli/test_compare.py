import onnx
import pytest


@pytest.fixture
def small(run, model, tmp_path):
    out = tmp_path / "small.onnx"
    assert run("compress", model, "-o", out, "--recipe", "codebook").code == 0
    return out


def test_sizes_without_data_and_a_hint(run, model, small):
    result = run("compare", model, small)
    assert result.code == 0, result.err
    assert "non-zero parameters" in result.out
    assert "--data" in result.out


def test_outputs_latency_and_metric_with_data(run, model, small, samples):
    argv = ["compare", model, small, "--data", samples, "--metric", "top1"]
    data = run(*argv, "--json").json
    assert data["fidelity"]["outputs"][0]["name"] == "scores"
    assert data["latency"]["speedup"] > 0
    assert data["metric"]["name"] == "top1"
    assert data["ratio"] > 3
    result = run(*argv)
    assert "scores" in result.out
    assert "latency" in result.out


def test_a_model_is_identical_to_itself(run, model, samples):
    data = run("compare", model, model, "--data", samples, "--json").json
    assert data["fidelity"]["outputs"][0]["sqnr_db"] == "inf"
    assert "identical" in run("compare", model, model, "--data", samples).out


def test_random_data_is_said_to_mean_nothing(run, model, small):
    result = run("compare", model, small, "--data", "random")
    assert result.code == 0
    assert "MEAN NOTHING" in result.err


def test_models_with_other_inputs_are_refused(run, model, tmp_path):
    proto = onnx.load(model)
    proto.graph.input[0].name = "picture"
    proto.graph.node[0].input[0] = "picture"
    other = tmp_path / "other.onnx"
    onnx.save(proto, other)
    result = run("compare", model, other)
    assert result.code == 3
    assert "different inputs" in result.err
    assert "picture" in result.err


def test_a_named_metric_needs_data(run, model, small):
    result = run("compare", model, small, "--metric", "top1")
    assert result.code == 2
    assert result.err.startswith("error: ")

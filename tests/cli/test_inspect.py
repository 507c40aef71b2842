import onnx
import pytest


def test_what_is_in_the_model_is_shown(run, model):
    result = run("inspect", model)
    assert result.code == 0
    assert result.err == ""
    assert "image: float32 (batch, 1, 8, 8)" in result.out
    assert "scores: float32 (batch, 10)" in result.out
    assert "Conv 1, Flatten 1, Gemm 1, Relu 1" in result.out
    assert "head_weight" in result.out


def test_json_holds_every_weight_with_its_consumers(run, model):
    data = run("inspect", model, "--json").json
    assert data["bytes"] == model.stat().st_size
    assert data["parameters"] == 16 * 9 + 16 + 5760 + 10
    weights = {weight["name"]: weight for weight in data["weights"]}
    assert weights["head_weight"]["shape"] == [576, 10]
    assert weights["head_weight"]["role"] == "weight"
    assert weights["head_weight"]["used_by"] == [{"node": "head", "op": "Gemm"}]
    assert weights["conv_bias"]["role"] == "bias"
    assert sum(role["count"] for role in data["roles"]) == 4


def test_every_pass_says_what_it_could_do(run, model):
    from onnxslim_passes.passes import PASSES

    passes = {row["name"]: row for row in run("inspect", model, "--json").json["passes"]}
    assert set(passes) == set(PASSES)
    assert passes["prune-magnitude"]["looked_at"] == 4
    assert passes["prune-magnitude"]["candidates"] == 1
    assert passes["quantize-static"]["candidates"] == 2
    assert "needs --calibration" in passes["quantize-static"]["note"]
    assert passes["quantize-dynamic"]["bytes_after"] < model.stat().st_size


def test_top_limits_the_list_of_weights(run, model):
    assert "conv_weight" not in run("inspect", model, "--top", "1").out
    assert "conv_weight" in run("inspect", model, "--top", "0").out


def test_an_empty_weight_is_no_error(run, model):
    proto = onnx.load(model)
    empty = onnx.helper.make_tensor("empty", onnx.TensorProto.FLOAT, [0], [])
    proto.graph.initializer.append(empty)
    proto.graph.node.append(onnx.helper.make_node("Identity", ["empty"], ["nothing"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("nothing", 1, [0]))
    onnx.save(proto, model)
    result = run("inspect", model)
    assert result.code == 0, result.err


def test_external_data_counts_as_size(run, model, tmp_path):
    outside = tmp_path / "outside.onnx"
    proto = onnx.load(model)
    onnx.save(proto, outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    data = run("inspect", outside, "--json").json
    assert data["external_bytes"] == 4 * data["parameters"]
    assert data["bytes"] > data["external_bytes"]


@pytest.mark.long
def test_every_real_model_is_inspected(run, shared_models):
    for path in sorted(shared_models.glob("*/*.onnx")):
        result = run("inspect", path)
        assert result.code == 0, f"{path}: {result.err}"
        assert result.err == ""


def test_target_lists_what_its_documents_want_otherwise(run, model):
    result = run("inspect", model, "--target", "qnn")
    assert result.code == 0
    assert "Target qnn" in result.out
    assert "static-shapes" in result.out
    assert "Checked by rule, not run" in result.out
    data = run("inspect", model, "--target", "qnn", "--json").json["target"]
    assert data["runs_here"] is False
    assert {row["rule"] for row in data["violations"]} == {"static-shapes", "all-quantized"}
    assert all(row["reference"]["url"].startswith("https://") for row in data["violations"])


def test_target_of_which_no_rule_is_broken(run, model):
    assert "No rule is broken." in run("inspect", model, "--target", "cpu").out
    assert "target" not in run("inspect", model, "--json").json


def test_every_target_of_the_table_has_its_name_on_the_command_line():
    from typing import get_args

    from onnxslim_passes.cli.common import TargetName
    from onnxslim_passes.passes.placement import TARGETS

    assert list(get_args(TargetName)) == list(TARGETS)

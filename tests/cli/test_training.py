"""`train-graph` and `fine-tune` as a user meets them."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest

from tests.training.nets import points, with_weights
from tests.training.test_export import WIDE

CODE = "import sys; from onnxslim_passes.cli import main; sys.exit(main())"


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(with_weights(WIDE), path)
    return path


@pytest.fixture
def data(tmp_path):
    x, labels = points(120)
    path = tmp_path / "data.npz"
    np.savez(path, x=x, labels=labels)
    return path


QUICK = ("--epochs", "3", "--learning-rate", "0.01", "--batch-size", "8")


def test_a_model_is_tuned_and_only_values_differ(run, net, data, tmp_path):
    out = tmp_path / "tuned.onnx"
    result = run("fine-tune", net, "--data", data, "-o", out, *QUICK)
    assert result.code == 0, result.err
    assert "Epoch 3 was kept: validation top1" in result.out
    assert "epoch   3; loss" in result.err
    before, after = onnx.load(net), onnx.load(out)
    for proto in (before, after):
        for tensor in proto.graph.initializer:
            tensor.ClearField("raw_data")
    assert before == after
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data.npz",
        "net.onnx",
        "tuned.onnx",
    ]


def test_json_and_the_same_bytes_twice(run, net, data, tmp_path):
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    found = run("fine-tune", net, "--data", data, "-o", one, *QUICK, "--json").json
    assert found["metric"] == "top1"
    assert [epoch["number"] for epoch in found["epochs"]] == [0, 1, 2, 3]
    run("fine-tune", net, "--data", data, "-o", two, *QUICK)
    assert one.read_bytes() == two.read_bytes()


def test_a_folder_is_trained_and_written_back(run, net, data, tmp_path):
    folder, out = tmp_path / "graph", tmp_path / "tuned.onnx"
    result = run("train-graph", net, "-o", folder, "--loss", "cross-entropy", "--gradients")
    assert result.code == 0, result.err
    assert "gradients.onnx" in result.out
    assert run("fine-tune", folder, "--epochs", "0", "-o", out).code == 0
    assert onnx.load(out) == onnx.load(net)
    result = run("fine-tune", folder, "--data", data, "-o", out, *QUICK)
    assert result.code == 0, result.err
    direct = tmp_path / "direct.onnx"
    run("fine-tune", net, "--data", data, "-o", direct, *QUICK, "--loss", "cross-entropy")
    assert onnx.load(out) == onnx.load(direct)


def wait_for(path, process):
    for _ in range(2000):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("no checkpoint was written")


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_bytes(run, net, data, tmp_path):
    whole, out = tmp_path / "whole.onnx", tmp_path / "tuned.onnx"
    options = ("--epochs", "12", "--batch-size", "4", "--checkpoint-steps", "9")
    assert run("fine-tune", net, "--data", data, "-o", whole, *options).code == 0
    argv = [sys.executable, "-c", CODE, "fine-tune", net, "--data", data, "-o", out, *options]
    process = subprocess.Popen(
        [str(part) for part in argv], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    wait_for(tmp_path / "tuned.onnx.checkpoint.safetensors", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    result = run("fine-tune", net, "--data", data, "-o", out, *options)
    assert result.code == 0, result.err
    assert "taken up from" in result.err
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--loss", "cros-entropy"), 2, "Did you mean 'cross-entropy'"),
        (("--learning-rate", "-1"), 2, "'learning_rate' is '-1', expected"),
        (("--optimizer", "adan"), 2, "adan"),
        (("--include", "frist"), 2, "Did you mean 'first'"),
        (("--batch-size", "500"), 2, "batch_size 500 is more than the 108 samples"),
        (("--loss", "distill"), 2, "needs a teacher"),
        (("--output", "yy"), 2, "Did you mean 'y'"),
        (("--nesterov",), 2, "nesterov is not for adam"),
        (("--momentum", "0.5"), 2, "momentum is not for adam"),
        (("--decay-epochs", "3"), 2, "decay_epochs is for schedule=step"),
        (("--temperature", "3"), 2, "temperature is about a teacher"),
        (("--epochs", "0"), 2, "writes back what a folder"),
        (("--source", "net.onnx"), 2, "--source is for a folder"),
        (("--learning-rate", "1e30", "--optimizer", "sgd"), 3, "became"),
        (("--loss", "mse"), 3, r"'labels' have shape (120,)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_written(
    run, net, data, tmp_path, options, code, message
):
    out = tmp_path / "tuned.onnx"
    result = run("fine-tune", net, "--data", data, "-o", out, *options)
    assert result.code == code, result.err
    assert message in result.err.splitlines()[-1]
    assert not out.exists()


def test_sizes_of_inputs_can_be_fixed(run, net, tmp_path):
    folder = tmp_path / "graph"
    result = run("train-graph", net, "-o", folder, "--loss", "mse", "--shape", "x=7,?", "--json")
    assert result.code == 0, result.err
    reasons = [decision["reason"] for decision in result.json["decisions"]]
    assert "axis 0 has size 7 in all of training" in reasons
    shapes = onnx.load(folder / "training.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shapes.dim] == [7, 4]


def test_labels_out_of_range_are_refused(run, net, tmp_path):
    x, labels = points(40)
    np.savez(tmp_path / "wrong.npz", x=x, labels=labels + 1)
    result = run("fine-tune", net, "--data", tmp_path / "wrong.npz", "-o", tmp_path / "o.onnx")
    assert result.code == 3
    assert "run from 1 to 3, but the model has 3 classes" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--loss is missing"),
        (("--loss", "mse", "--fix", "z=1"), "Unknown input in --fix: 'z'"),
        (("--loss", "mse", "--fix", "x"), "expected NAME=VALUE"),
        (("--loss", "mse", "--shape", "x=a"), "expected NAME=SIZES"),
        (("--loss", "mse", "--shape", "xx=?"), "Did you mean 'x'"),
        (("--loss", "mse", "--shape", "x=?,5"), "has size 4 along axis 1, got 5"),
    ],
)
def test_train_graph_refuses_what_it_cannot_use(run, net, tmp_path, options, message):
    result = run("train-graph", net, "-o", tmp_path / "graph", *options)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "graph").exists()


def test_a_recipe_that_trains_needs_training_samples(run, net, data, tmp_path):
    argv = ["compress", net, "-o", tmp_path / "small.onnx", "--pass", "prune-magnitude"]
    tuning = ["--pass", "fine-tune:epochs=1"]
    for calibration in ([], ["--calibration", "random"]):
        result = run(*argv, *tuning, *calibration)
        assert result.code == 2
        assert "fine-tune needs samples to train on: give --training" in result.err
    result = run(*argv, "--training", data)
    assert result.code == 2
    assert "--training is for passes that train" in result.err
    result = run(*argv, *tuning, "--training", data)
    assert result.code == 0, result.err
    assert "tuned" in run("explain", tmp_path / "small.onnx", "w1").out


def test_training_in_a_recipe_leaves_checkpoints_on_request(run, net, data, tmp_path):
    argv = ["compress", net, "-o", tmp_path / "small.onnx", "--checkpoints", tmp_path / "runs"]
    result = run(*argv, "--pass", "prune-magnitude")
    assert result.code == 2
    assert "--checkpoints is for passes that train" in result.err
    tuning = ("--training", data, "--pass", "prune-magnitude", "--pass", "fine-tune:epochs=1")
    assert run(*argv, *tuning).code == 0
    once = (tmp_path / "small.onnx").read_bytes()
    names = list((tmp_path / "runs").iterdir())
    assert len(names) == 1
    assert run(*argv, *tuning).code == 0
    assert (tmp_path / "small.onnx").read_bytes() == once
    assert list((tmp_path / "runs").iterdir()) == names
    result = run(*argv[:-1], data, *tuning)
    assert result.code == 2
    assert "is a file; expected a folder" in result.err


@pytest.mark.long
def test_a_killed_recipe_goes_on_to_the_same_bytes(run, net, data, tmp_path):
    whole, out, runs = (tmp_path / name for name in ("whole.onnx", "small.onnx", "runs"))
    passes = ("prune-gradually:sparsity=0.5,epochs=12,batch_size=4", "fine-tune:epochs=2")
    options = ("--training", data, *(part for text in passes for part in ("--pass", text)))
    assert run("compress", net, "-o", whole, *options).code == 0
    argv = ["compress", net, "-o", out, *options, "--checkpoints", runs]
    command = [sys.executable, "-c", CODE, *map(str, argv)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(runs, process)
    while not list(runs.glob("*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    result = run(*argv)
    assert result.code == 0, result.err
    assert out.read_bytes() == whole.read_bytes()


def test_what_can_be_trained_is_seen_beforehand(run, net):
    rows = {row["name"]: row for row in run("inspect", net, "--json").json["passes"]}
    assert rows["fine-tune"]["candidates"] == 4
    assert "needs --training" in rows["fine-tune"]["note"]
    assert "needed (--training)" in run("passes", "fine-tune").out

"""`compare --layers` and `compress --max-drop` at the command line."""

import re
import shlex

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.evaluation.test_layers import MODEL, built, feeds


@pytest.fixture
def outlier(tmp_path):
    """A network with one huge value in the weight of node "three"."""
    proto = built(MODEL)
    for tensor in proto.graph.initializer:
        if tensor.name == "w3":
            values = numpy_helper.to_array(tensor).copy()
            values[0, 0, 0, 0] = 60.0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = tmp_path / "outlier.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def images(tmp_path):
    """Data for `outlier`."""
    path = tmp_path / "images.npz"
    np.savez(path, image=np.concatenate([feed["image"] for feed in feeds()]))
    return path


INT8 = "quantize-static:per_channel=false,placement=everywhere"


def test_the_bad_layer_comes_first_and_its_override_mends_it(run, outlier, images, tmp_path):
    out, again = tmp_path / "int8.onnx", tmp_path / "again.onnx"
    assert run("compress", outlier, "-o", out, "--pass", INT8, "--calibration", images).code == 0
    result = run("compare", outlier, out, "--data", images, "--layers")
    assert result.code == 0, result.err
    text = result.out
    rows = text[text.index("Changed layers") :].splitlines()
    assert rows[3].startswith("three ")
    assert "Where the SQNR falls off" in text
    (line,) = [line for line in text.splitlines() if line.startswith("    --pass ")]
    option, override = shlex.split(line)
    assert "exclude=[three]" in override
    before, after = map(float, re.findall(r"from (\S+) dB to (\S+) dB", text)[0])
    assert after > before + 6
    argv = ["compress", outlier, "-o", again, option, override, "--calibration", images, "--json"]
    mended = run(*argv).json
    assert mended["fidelity"]["sqnr_db"] == pytest.approx(after, abs=1)


def test_layers_as_json(run, outlier, images, tmp_path):
    out = tmp_path / "int8.onnx"
    run("compress", outlier, "-o", out, "--pass", INT8, "--calibration", images)
    result = run("compare", outlier, out, "--data", images, "--layers", "--top", "1", "--json")
    layers = result.json["layers"]
    ranked = layers["ranked"]
    assert ranked[0]["nodes"] == ["three"]
    assert ranked[1]["output_db"] is None
    assert layers["remedy"]["overrides"] == [
        "quantize-static:exclude=[three],per_channel=false,placement=everywhere"
    ]
    assert {"local_db", "accumulated_db"} <= set(ranked[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--layers"], "give --data"), (["--layers", "--top", "0"], "--data")],
)
def test_layers_need_data(run, model, argv, message):
    result = run("compare", model, model, *argv)
    assert result.code == 2
    assert message in result.err


def test_equal_models_have_no_layers_to_show(run, model, samples):
    result = run("compare", model, model, "--data", samples, "--layers")
    assert "Both models compute all layers alike." in result.out


def test_parameters_of_stored_codes_are_those_of_the_weights(run, model, tmp_path):
    out = tmp_path / "small.onnx"
    run("compress", model, "-o", out, "--recipe", "codebook")
    before, after = run("compare", model, out, "--json").json["sizes"]
    assert after["parameters"] == before["parameters"]


def test_max_drop_leaves_the_worst_layer_in_float(run, outlier, images, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def score(session):\n"
        f"    image = np.load({str(images)!r})['image']\n"
        "    scores = session.run(None, {'image': image})[0]\n"
        f"    expected = np.load({str(tmp_path / 'expected.npy')!r})\n"
        "    return -float(np.abs(scores - expected).mean())\n"
    )
    image = np.load(images)["image"]
    expected = onnxruntime.InferenceSession(str(outlier)).run(None, {"image": image})[0]
    np.save(tmp_path / "expected.npy", expected)
    out = tmp_path / "int8.onnx"
    argv = ["compress", outlier, "-o", out, "--pass", INT8, "--calibration", images]
    argv += ["--metric", f"{tmp_path}/mine.py:score"]
    drop = run(*argv, "--json").json["metric"]["drop"]
    out.unlink()
    result = run(*argv, "--max-drop", drop / 2)
    assert result.code == 0, result.err
    assert "warning: 1 layer was left in float to keep the drop at" in result.out
    assert out.is_file()
    assert "excluded by 'three'" in run("explain", out, "three").out
    out.unlink()
    hopeless = run(*argv, "--max-drop", drop / 1e6)
    assert hopeless.code == 4
    assert "leaving layers in float" in hopeless.err
    assert not out.exists()

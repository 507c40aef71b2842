import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxslim_passes.model import Model

CODEBOOK = ["--recipe", "codebook"]


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_the_first_line_says_size_speed_and_fidelity(run, model, samples, tmp_path):
    out = tmp_path / "small.onnx"
    result = run("compress", model, "-o", out, *CODEBOOK, "--calibration", samples)
    assert result.code == 0, result.err
    first = result.out.splitlines()[0]
    assert re.match(r"net\.onnx 2\d\.\d kB -> small\.onnx \d\.\d+ kB \(\d\.\dx\), ", first)
    assert "faster" in first or "SLOWER than the original" in first or "same speed" in first
    assert "dB SQNR" in first
    assert out.stat().st_size < model.stat().st_size / 3
    onnx.checker.check_model(str(out))


@pytest.mark.parametrize("recipe", ["prune", "codebook", "int8", "int8-dynamic", "small"])
def test_every_ready_recipe_runs(run, model, samples, tmp_path, recipe):
    out = tmp_path / "out.onnx"
    result = run("compress", model, "-o", out, "--recipe", recipe, "--calibration", samples)
    assert result.code == 0, result.err
    assert out.is_file()


def test_one_pass_with_options(run, model, tmp_path):
    out = tmp_path / "out.onnx"
    text = "prune-magnitude:sparsity=0.75,include=[head*],min_elements=1"
    data = run("compress", model, "-o", out, "--pass", text, "--json").json
    record = data["passes"][0]
    assert record["options"]["sparsity"] == 0.75
    taken = {item["where"] for item in record["decisions"] if item["taken"]}
    assert taken == {"head_weight"}
    assert data["after"]["nonzero_parameters"] <= 5760 * 0.25 + 170


def test_a_pass_replaces_that_of_the_recipe(run, model):
    data = run(
        "compress", model, "--dry-run", "--json", *CODEBOOK, "--pass", "cluster-weights:bits=2"
    ).json
    named = [text for text in data["passes"] if text.startswith("cluster-weights")]
    assert named == ["cluster-weights:bits=2"]


def test_a_pass_joins_a_recipe_at_its_stage(run, model):
    data = run(
        "compress", model, "--dry-run", "--json", *CODEBOOK, "--pass", "prune-magnitude"
    ).json
    names = [text.partition(":")[0] for text in data["passes"]]
    assert names.index("prune-magnitude") == names.index("cluster-weights") - 1
    assert names[-1] == "store-weights"


def test_no_store_leaves_the_last_stage_out(run, model):
    data = run("compress", model, "--dry-run", "--json", *CODEBOOK, "--no-store").json
    assert "store-weights" not in data["passes"]


def test_a_dry_run_checks_and_writes_nothing(run, model, samples, tmp_path):
    before = files(tmp_path)
    out = tmp_path / "out.onnx"
    result = run(
        "compress", model, "-o", out, "--recipe", "int8", "--calibration", samples, "--dry-run"
    )
    assert result.code == 0
    assert "quantize-static" in result.out
    assert files(tmp_path) == before


def test_the_same_seed_gives_the_same_bytes(run, model, samples, tmp_path):
    outputs = []
    for name in ("one.onnx", "two.onnx"):
        out = tmp_path / name
        run("compress", model, "-o", out, "--recipe", "small", "--calibration", samples)
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]


def test_json_is_the_only_thing_on_stdout_and_the_report_file_says_the_same(
    run, model, samples, tmp_path
):
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    argv = ["compress", model, "-o", out, *CODEBOOK, "--calibration", samples]
    result = run(*argv, "--json", "--report", report)
    data = result.json
    assert data.pop("output") == str(out)
    assert json.loads(report.read_text()) == data
    assert data["source"] == "net.onnx"
    assert sorted(files(tmp_path)) == ["net.onnx", "out.onnx", "report.json", "samples.npz"]


def test_an_existing_output_is_replaced(run, model, tmp_path):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    assert run("compress", model, "-o", out, *CODEBOOK).code == 0
    onnx.checker.check_model(str(out))


def test_a_metric_is_measured_before_and_after(run, model, samples, tmp_path):
    result = run(
        *("compress", model, "-o", tmp_path / "out.onnx", *CODEBOOK, "--json"),
        *("--metric", "top1", "--evaluation", samples),
    )
    metric = result.json["metric"]
    assert metric["name"] == "top1"
    assert metric["drop"] == pytest.approx(metric["before"] - metric["after"])


def test_a_metric_of_one_s_own(run, model, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(session):\n    return float(len(session.get_outputs()))\n"
    )
    result = run(
        *("compress", model, "-o", tmp_path / "out.onnx", *CODEBOOK, "--json"),
        *("--metric", f"{tmp_path}/mine.py:score", "--max-drop", "0"),
    )
    assert result.code == 0, result.err
    assert result.json["metric"]["after"] == 1


def test_random_calibration_warns_loudly(run, model, tmp_path):
    out = tmp_path / "out.onnx"
    result = run("compress", model, "-o", out, "--recipe", "int8", "--calibration", "random")
    assert result.code == 0
    assert result.err.startswith("warning: ")
    assert "MEAN NOTHING" in result.err


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        (["--require-ratio", "1000"], "--require-ratio asks for 1000x"),
        (["--require-speedup", "1000"], "--require-speedup asks for 1000x"),
    ],
)
def test_a_guard_that_is_not_met_leaves_no_file(run, model, samples, tmp_path, guard, message):
    before = files(tmp_path)
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    result = run(
        *("compress", model, "-o", out, *CODEBOOK, "--calibration", samples, *guard),
        *("--report", report),
    )
    assert result.code == 4
    assert result.out == ""
    assert message in result.err
    assert files(tmp_path) == before


def test_a_drop_beyond_the_limit_leaves_the_old_file(run, model, samples, tmp_path):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    text = "prune-magnitude:sparsity=0.99,min_elements=1"
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def score(session):\n"
        "    image = np.ones((1, 1, 8, 8), np.float32)\n"
        "    return float(abs(session.run(None, {'image': image})[0]).sum())\n"
    )
    result = run(
        *("compress", model, "-o", out, "--pass", text),
        *("--metric", f"{tmp_path}/mine.py:score", "--max-drop", "0.001"),
    )
    assert result.code == 4
    assert "--max-drop allows 0.001" in result.err
    assert "leaving layers in float" in result.err
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--recipe NAME"),
        (["--recipe", "int9"], "Did you mean 'int8'?"),
        (["--recipe", "absent.toml"], "no such recipe file"),
        (["--pass", "prune-magnitude:sparsiti=1"], "Did you mean 'sparsity'?"),
        (["--pass", "prune-magnitude:sparsity=1.5"], "expected number"),
        (["--pass", "cluster-weights", "--pass", "prune-magnitude"], "cannot stand after"),
        (["--pass", "prune-magnitude:include=[haed*]"], "haed*"),
        (["--recipe", "int8"], "quantize-static needs samples: give --calibration DATA"),
        ([*CODEBOOK, "--max-drop", "0.1"], "--max-drop needs --metric"),
        ([*CODEBOOK, "--metric", "top1"], "--evaluation"),
        ([*CODEBOOK, "--evaluation", "samples.npz"], "--metric"),
        ([*CODEBOOK, "--metric", "topp1", "--evaluation", "samples.npz"], "'top1'"),
        ([*CODEBOOK, "--require-ratio", "0"], "expected a number > 0"),
        ([*CODEBOOK, "--report", "report.pdf"], "a report is .json or .html"),
        ([*CODEBOOK, "--report", "absent/report.json"], "there is no folder"),
        ([*CODEBOOK, "--report", "net.onnx"], "a report is .json or .html"),
        ([*CODEBOOK, "--target", "gpu"], "gpu"),
        ([*CODEBOOK, "-o", "absent/out.onnx"], "there is no folder"),
        ([*CODEBOOK, "-o", "."], "is a folder"),
        ([*CODEBOOK, "-o", "net.onnx"], "the same file"),
        ([*CODEBOOK, "-o", "./sub/../net.onnx"], "the same file"),
    ],
)
def test_wrong_usage_writes_nothing(run, model, samples, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    before = files(tmp_path)
    if "-o" not in argv:
        argv = [*argv, "-o", "out.onnx"]
    result = run("compress", "net.onnx", *argv)
    assert result.code == 2, result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert message in result.err
    assert files(tmp_path) == before


def test_the_output_is_required(run, model):
    result = run("compress", model, *CODEBOOK)
    assert result.code == 2
    assert "-o OUT is missing" in result.err


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_input_is_never_overwritten_through_a_link(run, model, tmp_path, link):
    linked = tmp_path / "linked.onnx"
    link(model, linked)
    before = model.read_bytes()
    result = run("compress", model, "-o", linked, *CODEBOOK)
    assert result.code == 2
    assert "the same file" in result.err
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imgae": np.zeros((4, 1, 8, 8), np.float32)}, "Did you mean 'image'?"),
        ({"image": np.zeros((4, 1, 8, 8))}, "float64"),
        ({"image": np.zeros((0, 1, 8, 8), np.float32)}, "no samples"),
        ({"image": np.full((4, 1, 8, 8), np.nan, np.float32)}, "NaN"),
    ],
)
def test_samples_that_do_not_fit_are_refused(run, model, tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    before = files(tmp_path)
    result = run(
        *("compress", model, "-o", tmp_path / "out.onnx", "--recipe", "int8"),
        *("--calibration", tmp_path / "wrong.npz"),
    )
    assert result.code == 3
    assert "image" in result.err or "no samples" in result.err
    assert message in result.err
    assert files(tmp_path) == before


def test_an_interrupt_while_saving_leaves_nothing(run, model, tmp_path, monkeypatch):
    before = files(tmp_path)

    def interrupted(self, path, *, external=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "save", interrupted)
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    result = run("compress", model, "-o", out, *CODEBOOK, "--report", report)
    assert result.code == 130
    assert "interrupted" in result.err
    assert files(tmp_path) == before


@pytest.mark.parametrize(("release", "stored"), [("1.17", "bitmask"), ("1.16.2", "dense")])
def test_min_runtime_restricts_how_weights_are_stored(run, model, tmp_path, release, stored):
    out = tmp_path / "small.onnx"
    text = "prune-magnitude:sparsity=0.9,min_elements=1"
    options = ["--pass", text, "--min-runtime", release, "--json"]
    report = run("compress", model, "-o", out, *options).json
    decisions = report["passes"][-1]["decisions"]
    head = next(item for item in decisions if item["where"] == "head_weight")
    assert head["figures"]["encoding"] == stored
    told = [item["figures"]["min_runtime"] for item in decisions if item["where"] == "the file"]
    assert told == (["1.17"] if stored == "bitmask" else [])


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--min-runtime", "new"], "min_runtime"), (["--min-runtime", "1.17", "--no-store"], "store")],
)
def test_bad_min_runtime_is_refused(run, model, tmp_path, options, words):
    out = tmp_path / "small.onnx"
    result = run("compress", model, "-o", out, "--pass", "prune-magnitude", *options)
    assert result.code == 2
    assert words in result.err
    assert not out.exists()


def test_a_second_run_takes_its_ranges_from_the_cache(run, model, samples, tmp_path, monkeypatch):
    cache, first, second = (tmp_path / name for name in ("cache", "first.onnx", "second.onnx"))
    options = ["--recipe", "int8", "--calibration", samples, "--calibration-cache", cache]
    assert run("compress", model, "-o", first, *options).code == 0
    (entry,) = cache.iterdir()
    before = entry.read_bytes()

    def forbidden(*_, **__):
        raise AssertionError("the samples were run for ranges")

    monkeypatch.setattr("onnxslim_passes.calibration.run._reduce", forbidden)
    assert run("compress", model, "-o", second, *options).code == 0
    assert [path.name for path in cache.iterdir()] == [entry.name]
    assert entry.read_bytes() == before
    assert first.read_bytes() == second.read_bytes()


def test_another_observer_has_another_entry(run, model, samples, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out.onnx"
    options = ["--calibration", samples, "--calibration-cache", cache, "-o", out]
    for observer in ("min-max", "percentile"):
        text = f"quantize-static:observer={observer}"
        assert run("compress", model, "--pass", text, *options).code == 0
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_is_refused(run, model, samples, tmp_path):
    out, options = tmp_path / "out.onnx", ["--recipe", "int8", "--calibration", samples]
    result = run("compress", model, "-o", out, *options, "--calibration-cache", samples)
    assert result.code == 2
    assert "is a file; expected a folder" in result.err
    result = run("compress", model, "-o", out, *CODEBOOK, "--calibration-cache", tmp_path)
    assert result.code == 2
    assert "give both" in result.err
    assert not out.exists()

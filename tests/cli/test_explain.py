import pytest


@pytest.fixture
def small(run, model, tmp_path):
    out = tmp_path / "small.onnx"
    text = "prune-magnitude:sparsity=0.75,include=[head*],min_elements=1"
    assert run("compress", model, "-o", out, "--pass", text).code == 0
    return out


def test_the_whole_file_is_explained(run, small):
    result = run("explain", small)
    assert result.code == 0, result.err
    assert "net.onnx" in result.out
    assert "sparsity=0.75" in result.out
    assert "changed  1  " in result.out


def test_json_holds_every_decision(run, small):
    data = run("explain", small, "--json").json
    assert data["source"] == "net.onnx"
    assert len(data["source_sha256"]) == 64
    assert data["recipe"][0]["name"] == "prune-magnitude"
    assert {"pass", "where", "taken", "reason", "figures"} <= set(data["decisions"][0])


@pytest.mark.parametrize("name", ["head_weight", "head", "head*"])
def test_a_weight_its_node_and_a_pattern_find_the_decision(run, small, name):
    data = run("explain", small, name, "--json").json
    pruned = [item for item in data["decisions"] if item["pass"] == "prune-magnitude"]
    assert any(item["where"] == "head_weight" and item["taken"] for item in pruned)
    assert "head_weight" in run("explain", small, name).out


def test_what_was_passed_over_has_its_reason(run, small):
    data = run("explain", small, "conv_weight", "--json").json
    decision = next(item for item in data["decisions"] if item["pass"] == "prune-magnitude")
    assert not decision["taken"]
    assert decision["reason"]


def test_a_node_without_decisions_is_said_to_have_none(run, small):
    result = run("explain", small, "flatten")
    assert result.code == 0
    assert "no pass had it as a candidate" in result.out


def test_an_unknown_name_gets_the_nearest(run, small):
    result = run("explain", small, "haed_weight")
    assert result.code == 2
    assert "Did you mean 'head_weight'?" in result.err


def test_a_file_without_manifest_is_refused_with_advice(run, model):
    result = run("explain", model)
    assert result.code == 3
    assert "carries no manifest" in result.err


def test_bytes_by_encoding_beside_the_entropy_bound(run, small):
    lines = run("explain", small).out.splitlines()
    at = lines.index("Bytes by encoding")
    heads = lines[at + 1].split()
    assert heads == ["encoding", "weights", "before", "after", "entropy", "bound"]
    told = {line.split()[0]: line.split()[1] for line in lines[at + 2 :] if len(line.split()) > 5}
    assert told.get("bitmask") == "1"  # head_weight, a quarter of it


def test_a_pass_that_stands_twice_has_two_accounts(run, model, tmp_path):
    out = tmp_path / "out.onnx"
    recipe = tmp_path / "twice.toml"
    step = '[[pass]]\nname = "prune-magnitude"\nmin_elements = 1\nsparsity = '
    recipe.write_text(f"{step}0.3\n{step}0.6\n")
    assert run("compress", model, "-o", out, "--recipe", recipe).code == 0
    text = run("explain", out).out
    first, second = text.split("prune-magnitude (")[1:]
    assert "0.3 of its magnitudes" in first
    assert "0.6 of its magnitudes" not in first
    assert "0.6 of its magnitudes" in second

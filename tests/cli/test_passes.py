import pytest

from onnxslim_passes.passes import PASSES
from onnxslim_passes.recipe import Recipe, options_of, ready_recipes


def test_all_passes_and_recipes_are_listed(run):
    result = run("passes")
    assert result.code == 0
    for name in [*PASSES, *ready_recipes()]:
        assert name in result.out


@pytest.mark.parametrize("name", sorted(PASSES))
def test_one_pass_shows_its_options_and_references(run, name):
    result = run("passes", name)
    assert result.code == 0
    for option in options_of(PASSES[name]):
        assert option.name in result.out
    for reference in PASSES[name].references:
        assert reference.split()[0] in result.out


@pytest.mark.parametrize("name", sorted(PASSES))
def test_one_pass_as_json(run, name):
    data = run("passes", name, "--json").json
    assert data["name"] == name
    assert {option["name"] for option in data["options"]} == {
        option.name for option in options_of(PASSES[name])
    }


def test_a_ready_recipe_is_shown_as_toml_that_opens(run, tmp_path):
    toml = run("passes", "int8", "--json").json["toml"]
    file = tmp_path / "mine.toml"
    file.write_text(toml)
    assert Recipe.open(file) == Recipe.open("int8")
    assert "[[pass]]" in run("passes", "int8").out

import re
from typing import Annotated, ClassVar, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import Field

from onnxslim_passes.errors import RecipeError, UnknownNameError, UsageError
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Pass, PassResult, Stage, pass_options
from onnxslim_passes.recipe import (
    Recipe,
    build_pass,
    format_pass,
    options_of,
    parse_pass,
    ready_recipes,
)


@pass_options
class Example(Pass):
    name: ClassVar[str] = "example-pass"
    stage: ClassVar[Stage] = Stage.PRUNE
    summary: ClassVar[str] = "Has an option of every kind."

    fraction: Annotated[float, Field(ge=0, lt=1, description="Fraction of\n    zeros.")] = 0.5
    count: Annotated[int, Field(ge=1)] | None = None
    exact: bool = False
    scope: Literal["tensor", "global"] = "tensor"
    bits: Literal[2, 4, 8] = 8
    include: tuple[str, ...] = ()
    axes: tuple[int, ...] = (0,)
    label: str = ""
    threshold: float | Literal["auto"] = "auto"
    limit: int | None = 7
    share: Annotated[float | None, Field(gt=0, le=1)] = None

    def apply(self, model, context):
        return PassResult(changed=False)


@pytest.fixture(autouse=True)
def _example(monkeypatch):
    monkeypatch.setitem(PASSES, "example-pass", Example)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("example-pass", Example()),
        (" example-pass : fraction = 0.25 , exact = true ", Example(fraction=0.25, exact=True)),
        ("example-pass:fraction=0", Example(fraction=0.0)),
        ("example-pass:count=3,bits=4", Example(count=3, bits=4)),
        ("example-pass:include=[conv*,fc?]", Example(include=("conv*", "fc?"))),
        ("example-pass:include=conv*", Example(include=("conv*",))),
        ("example-pass:include=[conv[12]*,x]", Example(include=("conv[12]*", "x"))),
        ("example-pass:include=/a/b:0", Example(include=("/a/b:0",))),
        ("example-pass:include=[]", Example()),
        ('example-pass:include=["a,b","c]"]', Example(include=("a,b", "c]"))),
        ("example-pass:include=[1,true,none]", Example(include=("1", "true", "none"))),
        ("example-pass:axes=[1,-2]", Example(axes=(1, -2))),
        ("example-pass:axes=3", Example(axes=(3,))),
        ('example-pass:label="",scope=global', Example(scope="global")),
        ("example-pass:label=4", Example(label="4")),
        ("example-pass:threshold=auto", Example()),
        ("example-pass:threshold=2", Example(threshold=2.0)),
        ("example-pass:limit=none", Example(limit=None)),
    ],
)
def test_text_becomes_a_pass(text, expected):
    assert parse_pass(text) == expected


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "exampel-pass",
            UnknownNameError,
            "Unknown pass 'exampel-pass'. Did you mean 'example-pass'?",
        ),
        ("", UnknownNameError, "Unknown pass ''"),
        (
            "example-pass:fractoin=1",
            UnknownNameError,
            "Unknown option of example-pass 'fractoin'. Did you mean 'fraction'?",
        ),
        ("example-pass:fraction", RecipeError, "expected key=value at 'fraction'"),
        ("example-pass:0.5", RecipeError, "expected key=value at '0.5'"),
        ("example-pass:fraction=", RecipeError, "a value is missing"),
        (
            "example-pass:fraction=0.5,,exact=true",
            RecipeError,
            "expected key=value at ',exact=true'",
        ),
        ("example-pass:fraction=0.1,fraction=0.2", RecipeError, "'fraction' is given twice"),
        ("example-pass:include=[a,b", RecipeError, "no closing ']'"),
        ("example-pass:include=[a]b", RecipeError, "expected a comma before 'b'"),
        ("example-pass:label=a]", RecipeError, "']' without '['"),
        ('example-pass:label="a', RecipeError, "no closing double quote"),
        (
            "example-pass:fraction=1",
            RecipeError,
            "example-pass: option 'fraction' is 1, expected number >= 0 and < 1",
        ),
        ("example-pass:fraction=half", RecipeError, "is 'half', expected number >= 0 and < 1"),
        ("example-pass:fraction=[0.5]", RecipeError, "expected number"),
        ("example-pass:fraction=nan", RecipeError, "expected number"),
        ("example-pass:count=0", RecipeError, "is 0, expected integer >= 1 or none"),
        ("example-pass:scope=gobal", RecipeError, "is 'gobal', expected tensor | global"),
        ("example-pass:bits=3", RecipeError, "is 3, expected 2 | 4 | 8"),
        ("example-pass:axes=[a]", RecipeError, "expected list of integer"),
    ],
)
def test_wrong_text_is_refused_with_the_reason(text, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        parse_pass(text)
    assert caught.value.exit_code == 2


def test_options_are_described_from_the_fields():
    described = {option.name: option for option in options_of(Example)}
    assert list(described)[:3] == ["fraction", "count", "exact"]
    assert described["fraction"].expected == "number >= 0 and < 1"
    assert described["fraction"].default == 0.5
    assert described["fraction"].description == "Fraction of zeros."
    assert described["count"].expected == "integer >= 1 or none"
    assert described["share"].expected == "number > 0 and <= 1 or none"
    assert described["include"].expected == "list of text"
    assert described["threshold"].expected == "number or auto"


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=12)
examples = st.builds(
    Example,
    fraction=st.floats(0, 1, exclude_max=True),
    count=st.none() | st.integers(1, 10**12),
    exact=st.booleans(),
    scope=st.sampled_from(["tensor", "global"]),
    bits=st.sampled_from([2, 4, 8]),
    include=st.lists(names, max_size=4).map(tuple),
    axes=st.lists(st.integers(-9, 9), max_size=4).map(tuple),
    label=names,
    threshold=st.just("auto") | st.floats(allow_nan=False, allow_infinity=False),
    limit=st.none() | st.integers(),
)


@given(examples)
def test_text_of_a_pass_round_trips(example):
    assert parse_pass(format_pass(example)) == example


@given(st.lists(examples, min_size=1, max_size=3), names, names)
def test_toml_of_a_recipe_round_trips(passes, name, description):
    recipe = Recipe(name, description, tuple(passes))
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_text_states_only_what_differs_from_the_defaults():
    assert format_pass(Example()) == "example-pass"
    assert format_pass(Example(bits=4, include=("a*", "b c"))) == (
        'example-pass:bits=4,include=[a*,"b c"]'
    )


@pytest.mark.parametrize("name", sorted(ready_recipes()))
def test_ready_recipes_open_and_round_trip(name):
    recipe = Recipe.open(name)
    assert recipe.name == name
    assert recipe.description
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    # Training may stand behind any stage that costs fidelity.
    stages = [step.stage for step in recipe.passes if step.stage != Stage.TUNE]
    assert stages == sorted(stages)


def test_the_promised_recipes_are_there():
    assert set(ready_recipes()) >= {"prune", "codebook", "int8", "int8-dynamic", "small"}


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_round_trips_and_describes_its_options(name):
    kind = PASSES[name]
    assert kind.name == name
    assert kind.summary
    assert parse_pass(format_pass(kind())) == kind()
    for option in options_of(kind):
        assert option.description, f"{name}: option {option.name} has no description"
        assert "typing" not in option.expected


def test_recipe_file_is_read(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[[pass]]\nname = "example-pass"\ninclude = ["a*"]\nlimit = "none"\n')
    recipe = Recipe.open(file)
    assert recipe.name == "mine"
    assert recipe.passes == (Example(include=("a*",), limit=None),)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[[pass", "not a TOML file"),
        ("", "needs at least one [[pass]] table"),
        ('[pass]\nname = "example-pass"', "needs at least one [[pass]] table"),
        ("[[pass]]\nfraction = 0.5", "pass 1: a [[pass]] table needs a `name`"),
        ('[[passes]]\nname = "example-pass"', "'passes'. Did you mean 'pass'?"),
        ('name = 3\n[[pass]]\nname = "example-pass"', "`name` is 3, expected text"),
        ('[[pass]]\nname = "example-pass"\nbits = 3', "pass 1: example-pass: option 'bits' is 3"),
        ('[[pass]]\nname = "example"', "pass 1: Unknown pass 'example'"),
    ],
)
def test_wrong_recipe_file_is_refused_with_the_reason(tmp_path, toml, message):
    file = tmp_path / "mine.toml"
    file.write_text(toml)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        Recipe.open(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        Recipe.open(file)


def test_unknown_recipe_names_the_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match=r"Unknown recipe 'int88'. Did you mean 'int8'\?"):
        Recipe.open("int88")
    with pytest.raises(UsageError, match="no such recipe file"):
        Recipe.open(tmp_path / "absent.toml")


def test_build_pass_wants_finite_numbers():
    with pytest.raises(RecipeError, match="expected number >= 0 and < 1"):
        build_pass("example-pass", {"fraction": float("inf")})


# ---------------- overrides

OVERRIDES = {
    "head*=8": {"nodes": "head*", "bits": 8},
    "/enc/0=bits:3+per:block": {"nodes": "/enc/0", "bits": 3, "per": "block"},
    "a=b=scheme:asymmetric": {"nodes": "a=b", "scheme": "asymmetric"},
    "x[01]*=0": {"nodes": "x[01]*", "bits": 0},
}


@pytest.mark.parametrize(("text", "table"), OVERRIDES.items(), ids=OVERRIDES.keys())
def test_an_override_as_text_and_as_table(text, table):
    pass_ = parse_pass(f"quantize-weights:overrides=[{text}]")
    assert pass_ == build_pass("quantize-weights", {"overrides": [table]})
    assert pass_.to_table()["overrides"] == [table]
    assert parse_pass(format_pass(pass_)) == pass_


def test_overrides_in_a_file_for_several_patterns():
    recipe = Recipe.from_toml(
        """
        [[pass]]
        name = "quantize-weights"
        bits = 4

        [[pass.overrides]]
        nodes = ["head*", "a name, with a comma"]
        bits = 8
        per = "tensor"

        [[pass.overrides]]
        nodes = "stem*"
        scheme = "asymmetric"

        [[pass]]
        name = "store-weights"
        """
    )
    overrides = recipe.passes[0].overrides
    assert [override.nodes for override in overrides] == ["head*", "a name, with a comma", "stem*"]
    assert [override.bits for override in overrides] == [8, 8, None]
    assert Recipe.from_toml(recipe.to_toml()).passes == recipe.passes
    assert parse_pass(format_pass(recipe.passes[0])) == recipe.passes[0]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("head*", RecipeError, "expected pattern=value or pattern=key:value"),
        ("=8", RecipeError, "expected pattern=value"),
        ("head*=bits:8+", RecipeError, "expected pattern=value"),
        ("head*=bitz:8", UnknownNameError, "'bitz'. Did you mean 'bits'"),
        ("head*=9", RecipeError, "overrides: bits is 9, expected integer >= 0 and <= 8$"),
        ("head*=per:row", RecipeError, "overrides: per is 'row', expected tensor | channel"),
    ],
)
def test_wrong_overrides_are_refused_with_the_reason(text, error, message):
    with pytest.raises(error, match=message):
        parse_pass(f"quantize-weights:overrides=[{text}]")


def test_wrong_keys_of_an_override_table_name_the_nearest():
    table = {"nodes": "head*", "bit": 8}
    with pytest.raises(UnknownNameError, match="Did you mean 'bits'"):
        build_pass("quantize-weights", {"overrides": [table]})
    with pytest.raises(RecipeError, match="changes nothing; give one of bits, scheme"):
        build_pass("quantize-weights", {"overrides": [{"nodes": "head*"}]})
    with pytest.raises(RecipeError, match="nodes"):
        build_pass("quantize-weights", {"overrides": [{"bits": 8}]})

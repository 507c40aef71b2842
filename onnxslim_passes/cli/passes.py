"""`passes`: what passes and ready recipes there are, and the options of one."""

import inspect as introspection
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.text import Text

from onnxslim_passes.cli.common import JsonFlag, needed_data
from onnxslim_passes.errors import unknown_name
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Pass
from onnxslim_passes.recipe import Recipe, format_option, format_pass, options_of, ready_recipes
from onnxslim_passes.report.terminal import (
    pairs,
    print_json,
    result_console,
    section,
    table,
)

__all__ = ["passes"]


def passes(
    name: Annotated[str | None, Parameter(help="A pass, or a ready recipe.")] = None,
    /,
    *,
    json: JsonFlag = False,
) -> None:
    """List the passes and ready recipes, or one pass with its options."""
    if name is None:
        data, view = _listing()
    elif name in PASSES:
        data, view = _pass_data(PASSES[name]), _pass_view(PASSES[name])
    elif name in ready_recipes():
        recipe = Recipe.open(name)
        data, view = _recipe_data(recipe), _recipe_view(recipe)
    else:
        raise unknown_name("pass", name, [*PASSES, *ready_recipes()])
    if json:
        print_json(data)
    else:
        result_console().print(view)


def _listing() -> tuple[Any, RenderableType]:
    kinds = sorted(PASSES.values(), key=lambda kind: kind.stage)
    recipes = [Recipe.open(name) for name in ready_recipes()]
    listed = table("pass", "stage", "needs samples", "what it does")
    for kind in kinds:
        listed.add_row(
            kind.name, kind.stage.name.lower(), "yes" if needed_data(kind) else "", kind.summary
        )
    ready = table("recipe", "what it does")
    for recipe in recipes:
        steps = ", ".join(format_pass(step) for step in recipe.passes)
        ready.add_row(recipe.name, f"{recipe.description}\n{steps}")
    hint = Text("One in full: onnxslim-passes passes NAME")
    data = {
        "passes": [_pass_data(kind) for kind in kinds],
        "recipes": [_recipe_data(recipe) for recipe in recipes],
    }
    return data, Group(section("Passes", listed), section("Ready recipes", ready), hint)


def _pass_data(kind: type[Pass]) -> dict[str, Any]:
    return {
        "name": kind.name,
        "stage": kind.stage.name.lower(),
        "summary": kind.summary,
        "lossless": kind.lossless,
        "needs_samples": kind.needs_samples,
        "needs_training": kind.needs_training,
        "options": [
            {
                "name": option.name,
                "expected": option.expected,
                "default": option.default,
                "description": option.description,
            }
            for option in options_of(kind)
        ],
        "references": list(kind.references),
    }


def _pass_view(kind: type[Pass]) -> RenderableType:
    data = needed_data(kind)
    outputs = "unchanged within float rounding" if kind.lossless else "change: measured, reported"
    head = [
        ("stage", kind.stage.name.lower()),
        ("outputs", outputs),
        ("samples", f"needed ({data})" if data else "not needed"),
    ]
    parts: list[RenderableType] = [Text(kind.name, "bold"), Text(kind.summary), Text()]
    parts += [pairs(head), *_details(kind)]
    options = options_of(kind)
    if options:
        listed = table("option", "expected", "default", "what it does")
        for option in options:
            default = format_option(option.default)
            listed.add_row(option.name, option.expected, default, option.description)
        parts += [Text(), section("Options", listed)]
    else:
        parts += [Text(), Text("No options.")]
    if kind.references:
        parts += [Text("References", "bold"), *(Text(f"- {line}") for line in kind.references)]
    return Group(*parts)


def _details(kind: type[Pass]) -> list[RenderableType]:
    """The docstring without its first line, which is the summary again, and its attributes."""
    lines = introspection.cleandoc(kind.__doc__ or "").partition("\n")[2].strip()
    text = lines.partition("Attributes:")[0].strip()
    return [Text(), Text(text)] if text else []


def _recipe_data(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "description": recipe.description,
        "passes": [format_pass(step) for step in recipe.passes],
        "toml": recipe.to_toml(),
    }


def _recipe_view(recipe: Recipe) -> RenderableType:
    return Group(
        Text(f"Recipe {recipe.name}; save it as a .toml file to make your own."),
        Text(),
        Text(recipe.to_toml().rstrip()),
    )

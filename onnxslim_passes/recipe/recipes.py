"""Recipes: passes in order, as TOML files."""

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from onnxslim_passes.errors import RecipeError, UsageError, unknown_name
from onnxslim_passes.passes.base import Pass
from onnxslim_passes.recipe.text import build_pass


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Passes in order, with a name and a description.

    As TOML::

        name = "mine"
        description = "Half of the weights become zero."

        [[pass]]
        name = "prune-magnitude"
        sparsity = 0.5
    """

    name: str
    description: str
    passes: tuple[Pass, ...]

    @classmethod
    def open(cls, name_or_path: str | Path) -> "Recipe":
        """A ready recipe by its name, or the TOML file at a path.

        Raises:
            UnknownNameError: neither a ready recipe nor a file; with the nearest name.
            RecipeError: the file is not a recipe.
        """
        text = str(name_or_path)
        ready = ready_recipes()
        if text in ready:
            return cls.from_toml(ready[text], where=text)
        path = Path(name_or_path)
        if path.is_file():
            try:
                return cls.from_toml(path.read_text(encoding="utf-8"), where=text)
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"{text}: cannot be read as text: {error}") from error
        if path.suffix == ".toml" or path.parent != Path():
            raise UsageError(f"{text}: no such recipe file")
        raise unknown_name("recipe", text, ready)

    @classmethod
    def from_toml(cls, text: str, *, where: str = "recipe") -> "Recipe":
        """A recipe from TOML text; `where` names it in messages.

        Raises:
            RecipeError: malformed TOML, no `[[pass]]`, or wrong options.
            UnknownNameError: unknown key, pass or option; with the nearest name.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{where}: not a TOML file: {error}") from error
        for key in document:
            if key not in ("name", "description", "pass"):
                raise unknown_name(f"key in {where}", key, ["name", "description", "pass"])
        tables = document.get("pass")
        if not isinstance(tables, list) or not tables:
            raise RecipeError(f"{where}: a recipe needs at least one [[pass]] table with a `name`")
        passes = tuple(
            _pass_from_table(table, f"{where}, pass {number}")
            for number, table in enumerate(tables, start=1)
        )
        name = document.get("name", Path(where).stem)
        description = document.get("description", "")
        for key, value in (("name", name), ("description", description)):
            if not isinstance(value, str):
                raise RecipeError(f"{where}: `{key}` is {value!r}, expected text")
        return cls(name, description, passes)

    def with_pass(self, pass_: Pass) -> "Recipe":
        """The recipe with one more pass, or with another in the place of the one of its name.

        A new pass joins behind the last one of its stage or of an earlier stage.
        """
        same = [at for at, known in enumerate(self.passes) if known.name == pass_.name]
        if len(same) == 1:
            passes = (*self.passes[: same[0]], pass_, *self.passes[same[0] + 1 :])
        else:
            earlier = [at for at, known in enumerate(self.passes) if known.stage <= pass_.stage]
            place = earlier[-1] + 1 if earlier else 0
            passes = (*self.passes[:place], pass_, *self.passes[place:])
        return dataclasses.replace(self, passes=passes)

    def to_toml(self) -> str:
        """The recipe as TOML with the options that differ from defaults; `from_toml` reads it."""
        head = tomli_w.dumps({"name": self.name, "description": self.description})
        # tomli-w would write short tables inline; one below the other is easier to edit.
        return "\n".join([head, *(_table_text("pass", pass_.to_table()) for pass_ in self.passes)])


def _table_text(path: str, table: Mapping[str, Any]) -> str:
    """A table of an array of tables as TOML, with tables of its own behind it."""

    def is_tables(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict)

    plain = {key: value for key, value in table.items() if not is_tables(value)}
    inner = [
        _table_text(f"{path}.{key}", item)
        for key, value in table.items()
        if is_tables(value)
        for item in value
    ]
    return "\n".join([f"[[{path}]]\n{tomli_w.dumps(plain)}", *inner])


def _pass_from_table(table: Any, where: str) -> Pass:
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise RecipeError(f"{where}: a [[pass]] table needs a `name`, such as 'prune-magnitude'")
    options = {key: value for key, value in table.items() if key != "name"}
    try:
        return build_pass(table["name"], options)
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from error


def ready_recipes() -> dict[str, str]:
    """The recipes that come with the package: name to TOML text, sorted by name."""
    folder = resources.files("onnxslim_passes") / "recipes"
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".toml")),
        key=lambda entry: entry.name,
    )
    return {entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8") for entry in files}

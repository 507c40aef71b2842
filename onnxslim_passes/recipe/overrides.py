"""Overrides of options for some nodes, as text and as tables.

As text, one override is::

    override = pattern "=" setting { "+" setting }
    setting  = [ key ":" ] value                   # without a key, the first one is meant

such as ``head*=8`` or ``/encoder/*=bits:4+per:block``: the last equals sign counts, as names may
hold others. As a table it has the key ``nodes``, a pattern or a list of them, and one key for each
option.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from onnxslim_passes.errors import RecipeError, unknown_name
from onnxslim_passes.passes.overrides import NodeOverride, override_names
from onnxslim_passes.recipe.options import from_bare, leaves, options_of


def override_kind(annotation: Any) -> type[NodeOverride] | None:
    """The kind of override that an option holds, or None."""
    kinds = [leaf for leaf in leaves(annotation) if isinstance(leaf, type)]
    return next((kind for kind in kinds if issubclass(kind, NodeOverride)), None)


def read_overrides(value: Any, kind: type[NodeOverride]) -> Iterator[Any]:
    """Overrides for `kind` to check, one a pattern, from what text or TOML gives.

    Raises:
        RecipeError: text that is no override.
        UnknownNameError: a key that `kind` has not; with the nearest name.
    """
    for item in value if isinstance(value, tuple | list) else [value]:
        table = _table_of(item, kind) if isinstance(item, str) else item
        if not isinstance(table, Mapping):
            yield table
            continue
        for key in table:
            if key not in ("nodes", *override_names(kind)):
                raise unknown_name("key in `overrides`:", key, ["nodes", *override_names(kind)])
        nodes = table.get("nodes", "")
        for pattern in nodes if isinstance(nodes, tuple | list) else [nodes]:
            yield {**table, "nodes": pattern}


def _table_of(text: str, kind: type[NodeOverride]) -> dict[str, Any]:
    names = override_names(kind)
    known = {option.name: option for option in options_of(kind)}
    pattern, _, settings = text.rpartition("=")
    table: dict[str, Any] = {"nodes": pattern.strip()}
    for setting in settings.split("+"):
        key, colon, value = setting.partition(":")
        key, value = (key.strip(), value.strip()) if colon else (names[0], setting.strip())
        if not table["nodes"] or not value:
            raise RecipeError(
                f"overrides holds {text!r}; expected pattern=value or pattern=key:value+key:value "
                f"with keys {', '.join(names)}"
            )
        if key not in names:
            raise unknown_name(f"key in the override {text!r}:", key, names)
        table[key] = from_bare(value, known[key].annotation)
    return table


def format_override(override: NodeOverride) -> str:
    """The text that `read_overrides` reads."""
    names = override_names(type(override))
    given = {name: getattr(override, name) for name in names}
    words = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
        if value is not None
    }
    if list(words) == [names[0]]:
        return f"{override.nodes}={words[names[0]]}"
    return f"{override.nodes}={'+'.join(f'{name}:{word}' for name, word in words.items())}"

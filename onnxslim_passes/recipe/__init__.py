"""Text to passes and back: `--pass name:key=value,...` and recipes as TOML files.

This is the only place where text becomes passes. One pass as text::

    pass     = name [ ":" option { "," option } ]
    option   = key "=" value
    value    = list | scalar                    # a scalar stands for a list of one
    list     = "[" [ scalar { "," scalar } ] "]"
    scalar   = JSON string in double quotes | bare text

Bare text ends at a comma or, in a list, at its closing bracket; brackets inside it must balance, so
that the pattern ``conv[12]*`` needs no quotes. Numbers, ``true``, ``false`` and ``none`` are
understood where the option's type allows them.
"""

from onnxslim_passes.recipe.options import Option, options_of
from onnxslim_passes.recipe.recipes import Recipe, ready_recipes
from onnxslim_passes.recipe.text import (
    build_pass,
    find_pass,
    format_option,
    format_pass,
    parse_pass,
)

__all__ = [
    "Option",
    "Recipe",
    "build_pass",
    "find_pass",
    "format_option",
    "format_pass",
    "options_of",
    "parse_pass",
    "ready_recipes",
]

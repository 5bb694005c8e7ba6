"""Recipes: one module per kind of source, each with `RECIPE_VERSION`, `REQUIRES`, `ASSETS` and
`steps`.

`steps(source, folder, assets)` gives the short list of datatrove steps that ends in clean
documents. `REQUIRES` names the packages that they import only at the first document, which would be
too late, `ASSETS` the files that no package brings. A recipe with lists that all workers share has
`preload(source, assets)`. `RECIPE_VERSION` keys finished data: raise it with any change that makes
other text of the same input (tests/data/test_recipe_versions.py sees many), and leave it with any
other change.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from core.entry import fix
from core.errors import InputError

FOLDER = Path(__file__).resolve().parent
MEGATRON = "megatron"


def check_known(name: str) -> None:
    """Raises InputError where no recipe has this name."""
    known = [
        path.stem
        for path in sorted(FOLDER.glob("*.py"))
        if "\ndef steps(" in path.read_text(encoding="utf-8")
    ]
    known.append(MEGATRON)  # tokenized already: no steps
    if name not in known:
        raise InputError(
            f"recipe {name} is unknown: data.sources.<name>.recipe is one of {', '.join(known)}"
        )


def require(packages: Iterable[str], who: str) -> None:
    """Import packages; raises InputError with what to install."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"{who} needs {package} ({error}): {fix(package)}") from error


def load(name: str) -> ModuleType:
    """The module of a recipe; raises InputError when a package it requires cannot be imported."""
    check_known(name)
    module = importlib.import_module(f"data.recipes.{name}")
    require(module.REQUIRES, f"recipe {name}")
    return module

"""Recipes that clean raw documents: one module per kind of source.

Each module defines:

- `steps(source, folder, assets)`: the datatrove steps that read and clean the documents. `folder`
  has the pinned list of input files; what the reader cannot parse goes to its `quarantine/`.
- `REQUIRES`: packages that the steps import only at the first document; they are checked earlier.
- `ASSETS`: required files that no package provides.
- `RECIPE_VERSION`: part of the key of finished data. Raise it with every change that makes other
  text of the same input (tests/data/test_recipe_versions.py detects many), and with no other.
- `preload(source, assets)`, optional: loads lists that all workers share.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from core.entry import install_command
from core.errors import InputError

RECIPES_DIR = Path(__file__).resolve().parent
MEGATRON = "megatron"


def check_known(name: str) -> None:
    """Raise InputError if no recipe has this name."""
    known = [
        path.stem
        for path in sorted(RECIPES_DIR.glob("*.py"))
        if "\ndef steps(" in path.read_text(encoding="utf-8")
    ]
    known.append(MEGATRON)  # has no steps, since its input is tokenized
    if name not in known:
        raise InputError(
            f"unknown recipe {name}: set data.sources.<name>.recipe to one of {', '.join(known)}"
        )


def require(packages: Iterable[str], user: str) -> None:
    """Import packages that `user` needs; raises InputError with the command that installs one."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"{user} needs {package} ({error}): {install_command(package)}"
            ) from error


def load(name: str) -> ModuleType:
    """Import a recipe's module; raises InputError if a package it requires is missing."""
    check_known(name)
    module = importlib.import_module(f"data.recipes.{name}")
    require(module.REQUIRES, f"recipe {name}")
    return module

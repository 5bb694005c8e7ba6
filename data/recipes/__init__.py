"""Recipes: one module per kind of source, each with `REQUIRES` and `steps(source, folder)`.

`steps` gives the short list of datatrove steps that ends in clean documents; `REQUIRES` names the packages that they
import only at the first document, which would be too late.
"""

import importlib
from pathlib import Path
from types import ModuleType

from data.config import InputError

FOLDER = Path(__file__).resolve().parent


def path_of(name: str) -> Path:
    """The file of a recipe; raises InputError when there is none."""
    paths = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
    known = [stem for stem, path in paths.items() if "\ndef steps(" in path.read_text(encoding="utf-8")]
    if name not in known:
        raise InputError(f"recipe {name} is unknown: data.sources.<name>.recipe is one of {', '.join(known)}")
    return paths[name]


def load(name: str) -> ModuleType:
    """The module of a recipe; raises InputError when a package that it requires cannot be imported."""
    path_of(name)
    module = importlib.import_module(f"data.recipes.{name}")
    for package in module.REQUIRES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"recipe {name} needs {package} ({error}): `pip install {package}`") from error
    return module

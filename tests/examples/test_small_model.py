"""The cells of the notebook, in their order; as in a new notebook, whose folder is examples/."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT

NOTEBOOK = ROOT / "examples" / "small_model.ipynb"


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(cell["cell_type"] == "markdown" or not cell["outputs"] for cell in cells)
    namespace: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), namespace)
    assert namespace["last"] < 4 < namespace["first"]

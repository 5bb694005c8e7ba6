"""Who changes what a recipe puts out is reminded to raise its version, which keys finished data."""

import json
from pathlib import Path
from typing import Any

import pytest

from data import recipes
from tests.data.recipe_outputs import RECORD, outputs

WRITE = "then write the record anew: python -m tests.data.recipe_outputs"
RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return outputs(tmp_path_factory.mktemp("outputs"))


@pytest.mark.parametrize("name", RECORDED)
def test_other_text_has_another_version(found: dict[str, dict[str, Any]], name: str) -> None:
    now, before = found[name], RECORDED[name]
    if now["sha256"] != before["sha256"]:
        assert now["versions"] != before["versions"], (
            f"{name} makes other text of the same input: raise its RECIPE_VERSION (or VERSION, of a pass), so that "
            f"finished data is not taken for the new one's; {WRITE}"
        )
    assert now == before, f"{name} has other versions or other text than recorded: if both are meant, {WRITE}"


def test_every_recipe_is_recorded() -> None:
    names = {path.stem for path in recipes.FOLDER.glob("*.py") if "\ndef steps(" in path.read_text()}
    assert {*names, "megatron", "passes", "sharding", "vocabulary"} == set(RECORDED)
    assert all(entry.get("documents", 1) for entry in RECORDED.values()), "what puts out nothing shows no change"
    assert all(recipes.load(name).RECIPE_VERSION >= 1 for name in names)


def test_a_key_does_not_hold_our_source_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reformatting a module leaves finished data as it is; a raised version does not."""
    from data.config import Assets, Source
    from data.pipeline import fingerprints

    source = Source("curated", str(tmp_path), "CC0-1.0", 1.0, 1)
    before = fingerprints.digest(fingerprints.settings_of("a", source, Assets()))
    module = recipes.load("curated")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "nowhere.py"))
    assert fingerprints.digest(fingerprints.settings_of("a", source, Assets())) == before
    monkeypatch.setattr(module, "RECIPE_VERSION", 2)
    assert fingerprints.digest(fingerprints.settings_of("a", source, Assets())) != before

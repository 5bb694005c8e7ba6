"""A changed recipe output or rule fails until the version, part of the data's key, is raised."""

import json
from pathlib import Path
from typing import Any

import pytest

from data import recipes
from data.pipeline import fingerprints, shard, substrings
from data.pipeline.clean import Build
from data.recipes import (
    classifiers,
    decontamination,
    filters,
    licences,
    lines,
    manuals,
    mathematics,
    urls,
)
from tests.data import recipe_outputs
from tests.data.recipe_outputs import RECORD, compute_outputs, hash_rules, make_builds

REWRITE = "rewrite the record with `python -m tests.data.recipe_outputs`"
RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())
ENTRY: dict[str, Any] = {"versions": {"a": 1}, "input": "in", "rules": "rules", "sha256": "out"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def builds(root: Path) -> dict[str, Build]:
    return make_builds(root)


@pytest.fixture(scope="module")
def current(root: Path, builds: dict[str, Build]) -> dict[str, dict[str, Any]]:
    return compute_outputs(root, builds)


def explain_change(name: str, now: dict[str, Any], before: dict[str, Any]) -> str | None:
    """What changed in an entry and what to do about it; None if nothing changed."""
    if now["input"] != before["input"]:
        return f"{name} has another input than recorded, so its output is not compared: {REWRITE}"
    if now["versions"] != before["versions"]:
        return f"{name} has other versions than recorded: if this is intended, {REWRITE}"
    raise_version = (
        "raise its RECIPE_VERSION (or VERSION, of a pass), so that finished data is rebuilt"
    )
    if now["sha256"] != before["sha256"]:
        return f"{name} has another output for the same input: {raise_version}; then {REWRITE}"
    if now["rules"] != before["rules"]:
        return (
            f"a rule of {name} changed, which this input does not show: {raise_version}; then "
            f"{REWRITE}. Only if every input gives the same output (a rename), {REWRITE} without "
            "raising the version"
        )
    return None if now == before else f"{name} is not as recorded: {REWRITE}"


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_and_rules_are_as_recorded(current: dict[str, dict[str, Any]], name: str) -> None:
    explanation = explain_change(name, current[name], RECORDED[name])
    assert explanation is None, explanation


def test_a_change_is_explained() -> None:
    assert explain_change("a", ENTRY, ENTRY) is None
    output = explain_change("a", ENTRY | {"sha256": "other", "rules": "others"}, ENTRY)
    assert output is not None and "another output" in output
    rules = explain_change("a", ENTRY | {"rules": "others"}, ENTRY)
    assert rules is not None and rules.startswith("a rule of a changed")
    assert "raise its RECIPE_VERSION" in rules and "rename" in rules
    raised = ENTRY | {"sha256": "other", "rules": "others", "versions": {"a": 2}}
    assert "other versions" in str(explain_change("a", raised, ENTRY))
    other_input = ENTRY | {"input": "other", "sha256": "other"}
    assert "another input" in str(explain_change("a", other_input, ENTRY))


@pytest.mark.parametrize(
    ("owner", "name", "value", "changed"),
    [
        (classifiers, "MIN_LANGUAGE_SCORE", 0.95, {"web"}),
        (classifiers, "MIN_MATH_SCORE", 0.9, {"mathematics"}),
        (urls, "CURATED_SITES", frozenset(), {"web", "mathematics"}),
        (lines, "MAX_REMOVED", 0.5, {"web"}),
        (lines, "SHORT_WORDS", 3, {"web"}),
        (lines, "COUNTER", lines.NUMERIC, {"web"}),
        (
            licences,
            "PERMISSIVE",
            licences.PERMISSIVE | {"gpl-3.0"},
            {"source_code"},
        ),
        (manuals, "QUALITY", {}, {"manuals"}),
        (manuals, "REPETITION", {}, {"manuals"}),
        (decontamination, "NGRAM_WORDS", 12, {"passes"}),
        (substrings, "LEAST_CHARACTERS", 200, {"passes"}),
        (shard.pieces_of, "__defaults__", (64,), {"sharding"}),
        (mathematics, "RECIPE_VERSION", 99, set()),
    ],
)
def test_a_changed_rule_changes_only_the_entries_that_use_it(
    root: Path,
    builds: dict[str, Build],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    value: Any,
    changed: set[str],
) -> None:
    before = hash_rules(root, builds)
    monkeypatch.setattr(owner, name, value)
    after = hash_rules(root, builds)
    assert {entry for entry in before if after[entry] != before[entry]} == changed


def test_an_argument_of_a_step_is_a_rule(
    root: Path, builds: dict[str, Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds that `steps` passes as literals are hashed too."""
    before = hash_rules(root, builds)
    original = filters.CodeLineFilter.__init__

    def with_longer_lines(
        self: filters.CodeLineFilter, max_mean: float, min_alphanumeric: float
    ) -> None:
        original(self, 2 * max_mean, min_alphanumeric)

    monkeypatch.setattr(filters.CodeLineFilter, "__init__", with_longer_lines)
    after = hash_rules(root, builds)
    assert [name for name in before if after[name] != before[name]] == ["source_code"]


@pytest.mark.parametrize(
    ("change", "exit_code"),
    [
        ({"sha256": "other"}, 1),
        ({"sha256": "other", "versions": {"a": 2}}, 0),
        ({"sha256": "other", "input": "other"}, 0),
        ({"rules": "others"}, 0),
    ],
)
def test_the_record_is_not_rewritten_over_an_unversioned_change(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    exit_code: int,
) -> None:
    """Refuses another output for the same input and versions; accepts a new entry."""
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"a": ENTRY, "b": ENTRY}))
    monkeypatch.setattr(recipe_outputs, "RECORD", record)
    monkeypatch.setattr(recipe_outputs, "make_builds", lambda root: {})
    now = {"a": ENTRY | change, "b": ENTRY, "c": ENTRY}
    monkeypatch.setattr(recipe_outputs, "compute_outputs", lambda root, builds: now)
    assert recipe_outputs.main() == exit_code
    refusal = "not written: the same input gives another output in a. "
    assert capsys.readouterr().out.startswith(refusal if exit_code else "written to")
    assert json.loads(record.read_text()) == ({"a": ENTRY, "b": ENTRY} if exit_code else now)


def test_every_recipe_is_recorded() -> None:
    names = {
        path.stem for path in recipes.RECIPES_DIR.glob("*.py") if "\ndef steps(" in path.read_text()
    }
    assert {*names, "megatron", "passes", "sharding", "vocabulary"} == set(RECORDED)
    assert all(entry.get("documents", 1) for entry in RECORDED.values()), (
        "an entry without documents cannot detect a change"
    )
    assert all(recipes.load(name).RECIPE_VERSION >= 1 for name in names)


def test_the_key_has_the_version_and_not_the_source_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reformatting a module keeps finished data; raising its version does not."""
    from data.config import Assets, Source

    source = Source("curated", str(tmp_path), "CC0-1.0", 1.0, 1)
    before = fingerprints.digest(fingerprints.settings_of("a", source, Assets()))
    module = recipes.load("curated")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "nowhere.py"))
    assert fingerprints.digest(fingerprints.settings_of("a", source, Assets())) == before
    monkeypatch.setattr(module, "RECIPE_VERSION", 2)
    assert fingerprints.digest(fingerprints.settings_of("a", source, Assets())) != before


def test_any_required_package_counts_with_its_version() -> None:
    assert fingerprints.distributions("hypothesis") == ("hypothesis",)
    assert fingerprints.distributions("trafilatura") == ("trafilatura", "lxml", "justext")
    assert fingerprints.distributions("no_such_module") == ()  # recipes.load refuses it earlier

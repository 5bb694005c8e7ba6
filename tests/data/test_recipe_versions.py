"""Who changes what a recipe puts out is reminded to raise its version, which keys finished data."""

import json
from pathlib import Path
from typing import Any

import pytest

from data import recipes
from data.pipeline import fingerprints, shard, substrings
from data.pipeline.clean import Build
from data.recipes import classifiers, decontamination, filters, lines, manuals, mathematics, urls
from tests.data import recipe_outputs
from tests.data.recipe_outputs import RECORD, material, outputs, rules_of

WRITE = "write the record anew: python -m tests.data.recipe_outputs"
RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())
ENTRY: dict[str, Any] = {"versions": {"a": 1}, "input": "in", "rules": "by these", "sha256": "out"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def builds(home: Path) -> dict[str, Build]:
    return material(home)


@pytest.fixture(scope="module")
def found(home: Path, builds: dict[str, Build]) -> dict[str, dict[str, Any]]:
    return outputs(home, builds)


def complaint(name: str, now: dict[str, Any], before: dict[str, Any]) -> str | None:
    """What to do about an entry that is not as recorded; None where it is."""
    if now["input"] != before["input"]:
        return f"{name} has another input than recorded, so nothing is said of its text: {WRITE}"
    if now["versions"] != before["versions"]:
        return f"{name} has other versions than recorded: if they are meant, {WRITE}"
    raised = (
        "raise its RECIPE_VERSION (or VERSION, of a pass), so that finished data is not taken "
        "for the new one's"
    )
    if now["sha256"] != before["sha256"]:
        return f"{name} makes other text of the same input: {raised}; then {WRITE}"
    if now["rules"] != before["rules"]:
        return (
            f"a rule of {name} changed, which this input does not show: {raised}; then {WRITE}. "
            "Only where the same text comes out of every input (a rename), write the record "
            "without it"
        )
    return None if now == before else f"{name} is not as recorded: {WRITE}"


@pytest.mark.parametrize("name", RECORDED)
def test_other_text_or_rules_have_another_version(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    said = complaint(name, found[name], RECORDED[name])
    assert said is None, said


def test_what_is_said_of_a_change() -> None:
    assert complaint("a", ENTRY, ENTRY) is None
    assert "makes other text" in str(
        complaint("a", ENTRY | {"sha256": "other", "rules": "others"}, ENTRY)
    )
    changed = str(complaint("a", ENTRY | {"rules": "others"}, ENTRY))
    assert (
        changed.startswith("a rule of a changed")
        and "raise its RECIPE_VERSION" in changed
        and "rename" in changed
    )
    raised = ENTRY | {"sha256": "other", "rules": "others", "versions": {"a": 2}}
    assert "other versions" in str(complaint("a", raised, ENTRY))
    assert "another input" in str(
        complaint("a", ENTRY | {"input": "other", "sha256": "other"}, ENTRY)
    )


@pytest.mark.parametrize(
    ("owner", "name", "value", "changed"),
    [
        (classifiers, "MIN_LANGUAGE_SCORE", 0.95, {"web"}),
        (classifiers, "MIN_MATH_SCORE", 0.9, {"mathematics"}),
        (urls, "CURATED_SITES", frozenset(), {"web", "mathematics"}),
        (lines, "MAX_REMOVED", 0.5, {"web"}),
        (lines, "SHORT_WORDS", 3, {"web"}),
        (lines, "COUNTER", lines.NUMERIC, {"web"}),
        (filters.Permissive, "ALLOWED", filters.Permissive.ALLOWED | {"gpl-3.0"}, {"source_code"}),
        (manuals, "QUALITY", {}, {"manuals"}),
        (manuals, "REPETITION", {}, {"manuals"}),
        (decontamination, "N", 12, {"passes"}),
        (substrings, "LEAST_CHARACTERS", 200, {"passes"}),
        (shard.pieces_of, "__defaults__", (64,), {"sharding"}),
        (mathematics, "RECIPE_VERSION", 99, set()),
    ],
)
def test_a_changed_rule_is_seen_in_the_entries_that_go_by_it_alone(
    home: Path,
    builds: dict[str, Build],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    value: Any,
    changed: set[str],
) -> None:
    before = rules_of(home, builds)
    monkeypatch.setattr(owner, name, value)
    after = rules_of(home, builds)
    assert {entry for entry in before if after[entry] != before[entry]} == changed


def test_an_argument_of_a_step_is_a_rule(
    home: Path, builds: dict[str, Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that `steps` writes down have no names."""
    before, plain = rules_of(home, builds), filters.Lines.__init__

    def wider(self: filters.Lines, max_mean: float, min_alphanumeric: float) -> None:
        plain(self, 2 * max_mean, min_alphanumeric)

    monkeypatch.setattr(filters.Lines, "__init__", wider)
    after = rules_of(home, builds)
    assert [name for name in before if after[name] != before[name]] == ["source_code"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"sha256": "other"}, 1),
        ({"sha256": "other", "versions": {"a": 2}}, 0),
        ({"sha256": "other", "input": "other"}, 0),
        ({"rules": "others"}, 0),
    ],
)
def test_the_record_does_not_hide_other_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    code: int,
) -> None:
    """Other text of the same input under the same versions is refused; a new entry is not."""
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"a": ENTRY, "b": ENTRY}))
    monkeypatch.setattr(recipe_outputs, "RECORD", record)
    monkeypatch.setattr(recipe_outputs, "material", lambda home: {})
    now = {"a": ENTRY | change, "b": ENTRY, "c": ENTRY}
    monkeypatch.setattr(recipe_outputs, "outputs", lambda home, builds: now)
    assert recipe_outputs.main() == code
    said = capsys.readouterr().out
    assert said.startswith(
        "not written, for other text came of the same input: a. " if code else "written to"
    )
    assert json.loads(record.read_text()) == ({"a": ENTRY, "b": ENTRY} if code else now)


def test_every_recipe_is_recorded() -> None:
    names = {
        path.stem for path in recipes.FOLDER.glob("*.py") if "\ndef steps(" in path.read_text()
    }
    assert {*names, "megatron", "passes", "sharding", "vocabulary"} == set(RECORDED)
    assert all(entry.get("documents", 1) for entry in RECORDED.values()), (
        "what puts out nothing shows no change"
    )
    assert all(recipes.load(name).RECIPE_VERSION >= 1 for name in names)


def test_a_key_does_not_hold_our_source_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reformatting a module leaves finished data as it is; a raised version does not."""
    from data.config import Assets, Source

    source = Source("curated", str(tmp_path), "CC0-1.0", 1.0, 1)
    before = fingerprints.digest(fingerprints.settings_of("a", source, Assets()))
    module = recipes.load("curated")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "nowhere.py"))
    assert fingerprints.digest(fingerprints.settings_of("a", source, Assets())) == before
    monkeypatch.setattr(module, "RECIPE_VERSION", 2)
    assert fingerprints.digest(fingerprints.settings_of("a", source, Assets())) != before


def test_a_package_of_a_recipe_of_ones_own_counts_with_its_version() -> None:
    assert fingerprints.distributions("hypothesis") == ("hypothesis",)
    assert fingerprints.distributions("trafilatura") == ("trafilatura", "lxml", "justext")
    assert fingerprints.distributions("no_such_module") == ()  # recipes.load has refused it before

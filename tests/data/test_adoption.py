"""A folder that bd3e05a prepared (tests/fixtures) is taken over as it is, or refused with nothing
changed.
"""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from data import recipes, tokenizer
from data.config import DataConfig, Source, Stage, TokenizerConfig, VerifySettings
from data.pipeline import fingerprints
from data.pipeline.adoption import adopt
from data.prepare import prepare
from data.stream.manifests import open_manifests
from data.verify import verify

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def old(tmp_path: Path) -> DataConfig:
    """A copy of the old folder, with the config that it was prepared with."""
    shutil.copytree(FIXTURES / "prepared", tmp_path / "prepared")
    return DataConfig(
        folder=str(tmp_path / "prepared"),
        seed=3,
        block_tokens=64,
        heldout_percent=20.0,
        reset_state=True,
        workers=1,
        tokenizer=TokenizerConfig(None, None, 300, 1),
        sources={
            name: Source("curated", str(FIXTURES / "raw" / name), "CC0-1.0", 4.0, 1)
            for name in ("left", "right")
        },
        stages=[Stage("only", 128, 64, {"left": 1.0, "right": 1.0})],
    )


def contents(cfg: DataConfig) -> dict[str, bytes]:
    """Every file of the folder but the lock and what workers print."""
    home = Path(cfg.folder)
    paths = [
        path
        for path in home.rglob("*")
        if path.is_file() and "logs" not in path.parts and path.name != "lock"
    ]
    return {str(path.relative_to(home)): path.read_bytes() for path in paths}


def test_an_old_folder_is_adopted_by_its_hashes(
    old: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(old)
    adopt(old)
    prepare(old)
    assert capsys.readouterr().out.count("reused") == 5
    after = contents(old)
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    keyed = {f"clean/{name}/built.json" for name in old.sources} | {
        f"shards/{n}/manifest.json" for n in old.sources
    }
    assert changed <= {*keyed, "tokenizer/built.json", "report.json"}
    for name in old.sources:
        one, other = (
            json.loads(files[f"shards/{name}/manifest.json"]) for files in (before, after)
        )
        assert other["versions"] == {"sharding": 1, "tokenizers": version("tokenizers")}
        assert one == {key: value for key, value in other.items() if key != "versions"} | {
            "recipe_sha256": one["recipe_sha256"]
        }


def test_old_shards_are_read_as_they_are(old: DataConfig) -> None:
    """Training asks for no key."""
    assert sum(manifest.tokens("train") for manifest in open_manifests(old).values()) == 12_733


def test_old_shards_verify(old: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Every byte hashed, every end token counted, ids decoded and encoded again."""
    verify(old, VerifySettings(samples=50, hashes=True))
    said = capsys.readouterr().out
    assert said.count("hashed, ") == 4 and "all is what the manifests say" in said


def test_without_adoption_an_old_folder_is_not_replaced(old: DataConfig) -> None:
    before = contents(old)
    with pytest.raises(
        InputError, match=r"left by a version of this project before 0.2; .* prepare.adopt=true to"
    ):
        prepare(old)
    assert contents(old) == before
    prepare(old, rebuild=True)
    after = contents(old)
    shards = [name for name in before if name.endswith((".ds", ".index", "tokenizer.json"))]
    assert len(shards) == 9 and all(after[name] == before[name] for name in shards)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"recipe": "technical"},
            "shards of left have recipe curated, not technical: give the config",
        ),
        ({"licence": "MIT"}, "licence CC0-1.0, not MIT"),
        ({"tasks": 2}, "was begun with 1 tasks, not 2"),
        ({"near_duplicates": "14x8"}, "was made without near_duplicates"),
        ({"replace_pii": True}, "was made without replace_pii"),
    ],
)
def test_another_source_is_refused(old: DataConfig, changed: dict[str, Any], message: str) -> None:
    refused(
        replace(old, sources={**old.sources, "left": replace(old.sources["left"], **changed)}),
        message,
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "shards of left are not those that this config makes"),
        ({"heldout_percent": 40.0}, "shards of left are not those that this config makes"),
        (
            {"tokenizer": TokenizerConfig(None, None, 400, 1)},
            "has 300 ids, data.tokenizer.vocab_size is 400",
        ),
    ],
)
def test_another_config_is_refused(old: DataConfig, changed: dict[str, Any], message: str) -> None:
    refused(replace(old, **changed), message)


def test_another_vocabulary_is_refused(old: DataConfig, tmp_path: Path) -> None:
    tokenizer.train(["another text, of other words " * 9], 270, tmp_path / "other")
    other = TokenizerConfig(str(tmp_path / "other" / tokenizer.FILE), None, 300, 1)
    refused(replace(old, tokenizer=other), "is another vocabulary than data.tokenizer.path")


def test_another_list_of_inputs_is_refused(old: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "raw" / "left", tmp_path / "raw")
    (tmp_path / "raw" / "1.jsonl").write_text('{"text": "one more"}\n')
    left = replace(old.sources["left"], input=str(tmp_path / "raw"))
    refused(replace(old, sources={**old.sources, "left": left}), "was made from other input files")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "shards/right/train_00000.ds",
            r"right/train_00000.ds does not hash to its manifest's SHA-256",
        ),
        ("shards/right/train_00000.ds.index", "is not the index of train_00000.ds"),
        ("clean/left/built.json", "has a damaged built.json or input.json"),
        ("clean/left/00000.jsonl.gz", "holds other files than were written there"),
        ("shards/left/manifest.json", "is not a manifest"),
    ],
)
def test_damage_is_refused(old: DataConfig, file: str, message: str) -> None:
    path = Path(old.folder) / file
    content = path.read_bytes()
    hashed = path.suffix == ".ds"
    path.write_bytes(bytes([content[0] ^ 1, *content[1:]]) if hashed else content[:-8])
    refused(old, message)


def refused(cfg: DataConfig, message: str) -> None:
    """Nothing of the folder is another after an adoption that fails."""
    before = contents(cfg)
    with pytest.raises(InputError, match=message):
        adopt(cfg)
    assert contents(cfg) == before


def test_no_folder_is_made(old: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        adopt(replace(old, folder=str(tmp_path / "typo")))
    assert not (tmp_path / "typo").exists()


def test_what_nothing_shows_is_left_with_its_shards(
    old: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Preparing would clean again and make other shards, so the command stops here; the rest is
    taken over.
    """
    shutil.rmtree(Path(old.folder) / "clean" / "left")
    before = contents(old)
    adopt(old)
    assert "left is left as it is, for its clean documents are not there" in capsys.readouterr().out
    after = contents(old)
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    # the vocabulary has both texts
    assert changed == {"clean/right/built.json", "shards/right/manifest.json"}


def test_a_source_without_shards_does_not_keep_the_others_from_it(
    old: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(Path(old.folder) / "shards" / "left")
    adopt(old)
    said = capsys.readouterr().out
    assert "left is left as it is, for it has no shards" in said and "adopted    right" in said


def test_shards_that_are_left_are_hashed_too(old: DataConfig) -> None:
    shutil.rmtree(Path(old.folder) / "clean" / "left")
    path = Path(old.folder) / "shards" / "left" / "train_00000.ds"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1, *path.read_bytes()[1:]]))
    refused(old, r"left/train_00000.ds does not hash")


def test_what_records_of_today_hold_is_compared(old: DataConfig, tmp_path: Path) -> None:
    """How far a pass went, the column of the text, the input's sizes: records before 0.2 had none
    of them.
    """
    shutil.copytree(FIXTURES / "raw", tmp_path / "raw")
    sources = {
        name: replace(source, input=str(tmp_path / "raw" / name))
        for name, source in old.sources.items()
    }
    cfg = replace(old, sources=sources)
    adopt(cfg)
    refused(
        replace(cfg, sources={**sources, "left": replace(sources["left"], text_key="body")}),
        "made with text_key",
    )
    with (tmp_path / "raw" / "right" / "0.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    refused(cfg, "was made from other input files")


def test_an_upgrade_replaces_nothing_unasked(
    old: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt(old)
    before = contents(old)
    monkeypatch.setattr(fingerprints, "version", lambda package: "99.0")
    with pytest.raises(
        InputError, match=r"left by datatrove .*, now 99.0, tokenizers .*, now 99.0; right by"
    ):
        prepare(old)
    assert contents(old) == before
    adopt(old)
    prepare(old)
    assert {name for name, content in contents(old).items() if content != before.get(name)} <= {
        *(f"clean/{name}/built.json" for name in old.sources),
        *(f"shards/{name}/manifest.json" for name in old.sources),
        "tokenizer/built.json",
        "report.json",
    }


def test_text_of_other_rules_is_left(
    old: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when an adoption is asked for again after a version was raised: it must not hide
    that.
    """
    adopt(old)
    monkeypatch.setattr(recipes.load("curated"), "RECIPE_VERSION", 2)
    before = contents(old)
    adopt(old)
    assert capsys.readouterr().out.count("another version of its rules (curated 1, now 2)") == 2
    assert contents(old) == before


def test_other_packages_are_named(
    old: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adopt(old)
    monkeypatch.setattr(fingerprints, "version", lambda package: "99.0")
    adopt(old)
    said = capsys.readouterr().out
    for package in ("datatrove", "tokenizers"):
        assert said.count(f"was made by {package} {version(package)}, now 99.0: taken for") == 2

"""A folder that bd3e05a prepared (tests/fixtures) is taken over as it is, or refused with nothing changed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from data.config import DataConfig, Source, Stage, TokenizerConfig
from data.pipeline.adoption import adopt
from data.prepare import prepare
from data.stream.manifests import open_manifests

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
            name: Source("curated", str(FIXTURES / "raw" / name), "CC0-1.0", 4.0, 1) for name in ("left", "right")
        },
        stages=[Stage("only", 128, 64, {"left": 1.0, "right": 1.0})],
    )


def contents(cfg: DataConfig) -> dict[str, bytes]:
    """Every file of the folder but the lock and what workers print."""
    home = Path(cfg.folder)
    paths = [path for path in home.rglob("*") if path.is_file() and "logs" not in path.parts and path.name != "lock"]
    return {str(path.relative_to(home)): path.read_bytes() for path in paths}


def test_an_old_folder_is_adopted_by_its_hashes(old: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(old)
    adopt(old)
    prepare(old)
    assert capsys.readouterr().out.count("reused") == 5
    after = contents(old)
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    keyed = {f"clean/{name}/built.json" for name in old.sources} | {f"shards/{n}/manifest.json" for n in old.sources}
    assert changed <= {*keyed, "tokenizer/built.json", "report.json"}
    for name in old.sources:
        one, other = (json.loads(files[f"shards/{name}/manifest.json"]) for files in (before, after))
        assert one | {"recipe_sha256": ""} == other | {"recipe_sha256": ""}


def test_old_shards_are_read_as_they_are(old: DataConfig) -> None:
    """Training asks for no key."""
    assert sum(manifest.tokens("train") for manifest in open_manifests(old).values()) == 12_733


def test_without_adoption_an_old_folder_gives_the_same_shards(old: DataConfig) -> None:
    before = contents(old)
    prepare(old)
    after = contents(old)
    shards = [name for name in before if name.endswith((".ds", ".index", "tokenizer.json"))]
    assert len(shards) == 9 and all(after[name] == before[name] for name in shards)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": "technical"}, "shards of left have recipe curated, not technical: give the config"),
        ({"licence": "MIT"}, "licence CC0-1.0, not MIT"),
        ({"tasks": 2}, "was begun with 1 tasks, not 2"),
        ({"near_duplicates": "14x8"}, "was made without near_duplicates"),
    ],
)
def test_another_config_is_refused(old: DataConfig, changed: dict[str, Any], message: str) -> None:
    before = contents(old)
    sources = {**old.sources, "left": replace(old.sources["left"], **changed)}
    with pytest.raises(InputError, match=message):
        adopt(replace(old, sources=sources))
    assert contents(old) == before


def test_a_damaged_shard_is_refused(old: DataConfig) -> None:
    shard = Path(old.folder) / "shards" / "right" / "train_00000.ds"
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    before = contents(old)
    with pytest.raises(InputError, match=r"right/train_00000.ds does not hash to its manifest's SHA-256"):
        adopt(old)
    assert contents(old) == before

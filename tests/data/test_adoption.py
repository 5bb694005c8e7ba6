"""A folder prepared by commit bd3e05a (tests/fixtures) is adopted, or refused without a change."""

import gzip
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
    """A copy of the old folder and the config that it was prepared with."""
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
    """Every file of the folder except the lock and the workers' logs."""
    folder = Path(cfg.folder)
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file() and "logs" not in path.parts and path.name != "lock"
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_an_old_folder_is_adopted(old: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
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
        old_manifest, new_manifest = (
            json.loads(files[f"shards/{name}/manifest.json"]) for files in (before, after)
        )
        assert new_manifest.pop("versions") == {
            "sharding": 1,
            "tokenizers": version("tokenizers"),
        }
        assert old_manifest == {**new_manifest, "recipe_sha256": old_manifest["recipe_sha256"]}


def test_training_reads_old_shards_without_adoption(old: DataConfig) -> None:
    assert sum(manifest.tokens("train") for manifest in open_manifests(old).values()) == 12_733


def test_old_shards_verify(old: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """`verify` hashes every byte, counts end tokens, and decodes and re-encodes documents."""
    verify(old, VerifySettings(samples=50, hashes=True))
    out = capsys.readouterr().out
    assert out.count("hashed, ") == 4 and "all shards match their manifests" in out


def test_without_adoption_an_old_folder_is_not_replaced(old: DataConfig) -> None:
    before = contents(old)
    with pytest.raises(
        InputError,
        match=r"left by a version of this project before 0.2; .* prepare.adopt=true to keep it",
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
            "shards of left have recipe curated, not technical: use the config",
        ),
        ({"licence": "MIT"}, "licence CC0-1.0, not MIT"),
        ({"tasks": 2}, "was started with 1 tasks, not 2"),
        ({"near_duplicates": "14x8"}, "was made without near_duplicates"),
        ({"replace_pii": True}, "was made without replace_pii"),
    ],
)
def test_changed_source_settings_are_refused(
    old: DataConfig, changed: dict[str, Any], message: str
) -> None:
    check_refused(
        replace(old, sources={**old.sources, "left": replace(old.sources["left"], **changed)}),
        message,
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "shards of left differ from those that this config makes"),
        ({"heldout_percent": 40.0}, "shards of left differ from those that this config makes"),
        (
            {"tokenizer": TokenizerConfig(None, None, 400, 1)},
            "has 300 ids, data.tokenizer.vocab_size is 400",
        ),
    ],
)
def test_a_changed_config_is_refused(
    old: DataConfig, changed: dict[str, Any], message: str
) -> None:
    check_refused(replace(old, **changed), message)


def test_another_tokenizer_is_refused(old: DataConfig, tmp_path: Path) -> None:
    tokenizer.train(["another text, of other words " * 9], 270, tmp_path / "other")
    other = TokenizerConfig(str(tmp_path / "other" / tokenizer.FILE), None, 300, 1)
    check_refused(replace(old, tokenizer=other), "differs from data.tokenizer.path")


def test_other_input_files_are_refused(old: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "raw" / "left", tmp_path / "raw")
    (tmp_path / "raw" / "1.jsonl").write_text('{"text": "one more"}\n')
    left = replace(old.sources["left"], input=str(tmp_path / "raw"))
    cfg = replace(old, sources={**old.sources, "left": left})
    check_refused(cfg, "was made from other input files")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "shards/right/train_00000.ds",
            r"right/train_00000.ds has another SHA-256 than its manifest",
        ),
        ("shards/right/train_00000.ds.index", "is not the index of train_00000.ds"),
        ("clean/left/built.json", r"built.json: Invalid JSON: .*: remove "),
        ("clean/left/00000.jsonl.gz", "clean/left differ from its built.json"),
        ("shards/left/manifest.json", "is not a manifest"),
    ],
)
def test_damage_is_refused(old: DataConfig, file: str, message: str) -> None:
    path = Path(old.folder) / file
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1, *content[1:]])
    path.write_bytes(flipped if path.suffix == ".ds" else content[:-8])
    check_refused(old, message)


def check_refused(cfg: DataConfig, message: str) -> None:
    """Adoption fails with this message and changes no file."""
    before = contents(cfg)
    with pytest.raises(InputError, match=message):
        adopt(cfg)
    assert contents(cfg) == before


def test_a_missing_folder_is_not_created(old: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="typo does not exist"):
        adopt(replace(old, folder=str(tmp_path / "typo")))
    assert not (tmp_path / "typo").exists()


def test_a_source_without_clean_documents_is_skipped(
    old: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shards stay, since nothing shows how they were made; the other source is adopted."""
    shutil.rmtree(Path(old.folder) / "clean" / "left")
    before = contents(old)
    adopt(old)
    assert "left is not adopted: its clean documents, the only record" in capsys.readouterr().out
    after = contents(old)
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    # the tokenizer was trained on both sources
    assert changed == {"clean/right/built.json", "shards/right/manifest.json"}


def test_a_source_without_shards_is_skipped(
    old: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(Path(old.folder) / "shards" / "left")
    adopt(old)
    out = capsys.readouterr().out
    assert "left is not adopted: it has no shards" in out and "adopted    right" in out


def test_shards_of_skipped_sources_are_hashed(old: DataConfig) -> None:
    shutil.rmtree(Path(old.folder) / "clean" / "left")
    path = Path(old.folder) / "shards" / "left" / "train_00000.ds"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1, *path.read_bytes()[1:]]))
    check_refused(old, r"left/train_00000.ds has another SHA-256")


def test_records_of_this_version_are_compared(old: DataConfig, tmp_path: Path) -> None:
    """Settings and input sizes, which records before 0.2 do not hold, are compared."""
    shutil.copytree(FIXTURES / "raw", tmp_path / "raw")
    sources = {
        name: replace(source, input=str(tmp_path / "raw" / name))
        for name, source in old.sources.items()
    }
    cfg = replace(old, sources=sources)
    adopt(cfg)
    check_refused(
        replace(cfg, sources={**sources, "left": replace(sources["left"], text_key="body")}),
        "made with text_key",
    )
    with (tmp_path / "raw" / "right" / "0.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    check_refused(cfg, "was made from other input files")


def test_an_upgrade_does_not_replace_data_unasked(
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


def test_text_of_another_recipe_version_is_skipped(
    old: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second adoption after a version was raised must not hide the change."""
    adopt(old)
    monkeypatch.setattr(recipes.load("curated"), "RECIPE_VERSION", 2)
    before = contents(old)
    adopt(old)
    assert (
        capsys.readouterr().out.count("recipe or passes had another version (curated 1, now 2)")
        == 2
    )
    assert contents(old) == before


@pytest.mark.parametrize(
    ("text", "dropped", "message"),
    [
        ("A line.\r\nAnother line.", {}, "would read other characters"),
        ("A line.", {"corrupt": 1}, "would read more rows"),
        ("A line.\n\x0cAnother line.", {"empty": 1}, None),
    ],
)
def test_old_text_is_kept_if_the_readers_make_the_same(
    old: DataConfig,
    capsys: pytest.CaptureFixture[str],
    text: str,
    dropped: dict[str, int],
    message: str | None,
) -> None:
    """The documents of cleaning version 1 are compared with the rules of version 2."""
    folder = Path(old.folder) / "clean" / "left"
    built = json.loads((folder / "built.json").read_text())
    (file,) = built["files"]
    lines = gzip.decompress((folder / file).read_bytes()).splitlines()
    row = json.dumps(json.loads(lines[-1]) | {"text": text}).encode()
    (folder / file).write_bytes(gzip.compress(b"\n".join([*lines[:-1], row])))
    built["files"][file] = (folder / file).stat().st_size
    built["steps"][0]["dropped"] = dropped
    (folder / "built.json").write_text(json.dumps(built))
    if message is None:  # kept so far, the shards of the changed text differ
        check_refused(old, "shards of left differ from those that this config makes")
        return
    adopt(old)
    out = capsys.readouterr().out
    assert "left is not adopted: its recipe or passes had another version" in out
    assert message in out and "adopted    right" in out


def test_changed_package_versions_are_logged(
    old: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adopt(old)
    monkeypatch.setattr(fingerprints, "version", lambda package: "99.0")
    adopt(old)
    out = capsys.readouterr().out
    for package in ("datatrove", "tokenizers"):
        assert out.count(f"was made with {package} {version(package)}, now 99.0: assuming") == 2

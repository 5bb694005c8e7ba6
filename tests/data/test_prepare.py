"""Preparation: data is reused while its key matches, and a killed run ends with the same bytes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import InputError
from core.files import sha256_of
from data import tokenizer
from data.config import Asset, Assets, DataConfig, Source, Stage, TokenizerConfig
from data.pipeline.shard import split_of
from data.prepare import clean_sources, prepare
from data.stream.manifests import SPLITS, read_manifest
from data.stream.shards import Shards
from tests.commands import python

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "river stone cloud lantern meadow copper window harvest thunder silver garden winter".split()
)


def document(number: int) -> dict[str, str]:
    """A document with distinct text; three share a group, every fourth contains the end token."""
    words = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(60)]
    end = tokenizer.EOS_TOKEN if number % 4 == 0 else "end"
    return {
        "text": f"Document {number}: {' '.join(words)} {end}",
        "id": str(number),
        "group": f"g{number // 3}",
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources of 120 documents each, and an existing tokenizer; not prepared."""
    root = tmp_path_factory.mktemp("prepare")
    for source, name in enumerate(("left", "right")):
        (root / name).mkdir()
        for file in range(3):
            rows = [json.dumps(document(source * 120 + file * 40 + i)) for i in range(40)]
            (root / name / f"{file}.jsonl").write_text("\n".join(rows) + "\n")
    tokenizer.train((document(i)["text"] for i in range(50)), 300, root / "vocabulary")
    sources = {
        name: Source("curated", str(root / name), "CC0-1.0", 1.0, 2) for name in ("left", "right")
    }
    return DataConfig(
        folder=str(root / "data"),
        seed=3,
        block_tokens=64,
        heldout_percent=20.0,
        reset_state=True,
        workers=2,
        tokenizer=TokenizerConfig(str(root / "vocabulary" / tokenizer.FILE), None, 300, 1),
        sources=sources,
        stages=[Stage("only", 128, 64, {"left": 1.0, "right": 1.0})],
    )


@pytest.fixture(scope="module")
def built(base: DataConfig) -> DataConfig:
    prepare(base)
    return base


def outputs(cfg: DataConfig, *names: str) -> dict[str, bytes]:
    """Every shard and manifest of some sources, by default of all."""
    folders = [Path(cfg.folder) / "shards" / name for name in names or cfg.sources]
    return {
        f"{folder.name}/{path.name}": path.read_bytes()
        for folder in folders
        for path in folder.glob("*.*")
    }


def mtimes(cfg: DataConfig) -> dict[str, int]:
    """mtime in ns of every finished file."""
    folders = (Path(cfg.folder) / name for name in ("clean", "shards", "tokenizer"))
    return {
        str(path): path.stat().st_mtime_ns
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def texts(cfg: DataConfig, name: str, split: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    folder = Path(cfg.folder) / "shards" / name
    shards = Shards(folder, read_manifest(folder), split)
    ids = shards.read(0, shards.tokens)
    vocabulary = tokenizer.load(Path(cfg.folder) / "tokenizer" / tokenizer.FILE)
    ends = np.flatnonzero(ids == tokenizer.EOS)
    assert ends[-1] == len(ids) - 1
    documents = np.split(ids, ends + 1)[:-1]
    return [vocabulary.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in documents]


def test_every_document_is_whole_in_the_split_of_its_group(built: DataConfig) -> None:
    for source, name in enumerate(built.sources):
        rows = [document(source * 120 + i) for i in range(120)]
        for split in SPLITS:
            expected = [
                row["text"]
                for row in rows
                if split_of(row["group"], built.heldout_percent) == split
            ]
            sharded = texts(built, name, split)
            assert sorted(sharded) == sorted(expected), "complete"
            assert sharded != expected, "and shuffled"


def test_heldout_split_has_its_share_and_only_grows() -> None:
    groups = [f"group {i}" for i in range(5000)]
    small = {group for group in groups if split_of(group, 4.0) == "heldout"}
    large = {group for group in groups if split_of(group, 8.0) == "heldout"}
    assert 150 < len(small) < 250 and small < large


def test_manifest_pins_the_files(built: DataConfig) -> None:
    for name in built.sources:
        folder = Path(built.folder) / "shards" / name
        manifest = read_manifest(folder)
        assert manifest.tokenizer_sha256 == sha256_of(
            Path(built.folder) / "tokenizer" / tokenizer.FILE
        )
        files = [file for split in SPLITS for file in manifest.splits[split]]
        assert sum(file.documents for file in files) == 120
        assert all(sha256_of(folder / file.name) == file.sha256 for file in files)
        assert {path.name for path in folder.glob("*.ds")} == {file.name for file in files}


def test_second_run_writes_nothing(built: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = mtimes(built)
    prepare(built)
    assert mtimes(built) == before
    assert capsys.readouterr().out.count("reused") == 5


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_damaged_file_of_the_tokenizer_is_made_again(
    built: DataConfig, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(built.folder) / "tokenizer" / name
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    prepare(built)
    assert path.read_bytes() == content
    assert capsys.readouterr().out.count("reused") == 4  # clean documents and shards, twice


def test_changed_settings_rebuild_their_source_only(
    base: DataConfig, built: DataConfig, tmp_path: Path
) -> None:
    cfg = replace(base, folder=str(tmp_path))
    prepare(cfg)
    before, left = mtimes(cfg), outputs(cfg, "left")
    sources = {**cfg.sources, "right": replace(cfg.sources["right"], tasks=3)}
    changed = replace(cfg, sources=sources)
    with pytest.raises(
        InputError,
        match=r"was started with 2 tasks, not 3: set data.sources.right.tasks=2, or remove",
    ):
        prepare(changed)
    assert mtimes(cfg) == before
    (tmp_path / "locks" / "right.json").unlink()
    prepare(changed)
    assert outputs(cfg, "left") == left
    assert {path for path, mtime in mtimes(changed).items() if before.get(path) == mtime} == {
        path for path in before if "/right/" not in path
    }
    assert len(list((tmp_path / "shards" / "right").glob("train_*.ds"))) == 3
    assert sorted(texts(changed, "right", "train")) == sorted(texts(base, "right", "train"))
    (tmp_path / "locks" / "right.json").unlink()
    prepare(cfg)
    assert outputs(cfg) == outputs(base)


def test_a_damaged_shard_is_rebuilt(base: DataConfig, built: DataConfig, tmp_path: Path) -> None:
    cfg = replace(base, folder=str(tmp_path))
    prepare(cfg)
    shard = next((tmp_path / "shards" / "left").glob("train_*.ds"))
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    # a file that no record lists
    (tmp_path / "clean" / "right" / "stale.jsonl.gz").write_bytes(b"no gzip")
    prepare(cfg)
    assert outputs(cfg) == outputs(built)


def test_changed_input_is_rebuilt(base: DataConfig, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [document(i) for i in range(60)]
    (raw / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    left = {"left": replace(base.sources["left"], input=str(raw))}
    stages = [Stage("only", 128, 64, {"left": 1.0})]
    cfg = replace(base, folder=str(tmp_path / "data"), sources=left, stages=stages)
    prepare(cfg)
    (raw / "b.jsonl").write_text(
        "\n".join(json.dumps(document(i)) for i in range(60, 90)) + "\n{broken\n"
    )
    prepare(cfg)
    assert len(texts(cfg, "left", "train") + texts(cfg, "left", "heldout")) == 90


def test_input_added_during_a_run_waits_for_the_next_run(
    base: DataConfig, built: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Input is listed once: a new file that sorts first would shift the files of every task."""
    shutil.copytree(base.sources["left"].input, tmp_path / "raw")
    left = replace(base.sources["left"], input=str(tmp_path / "raw"))
    cfg = replace(base, folder=str(tmp_path / "data"), sources={**base.sources, "left": left})

    def add_file_then_clean(*arguments: Any) -> Any:
        rows = [json.dumps(document(1000 + i)) for i in range(40)]
        (tmp_path / "raw" / "+late.jsonl").write_text("\n".join(rows) + "\n")
        return clean_sources(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.clean_sources", add_file_then_clean)
        prepare(cfg)
    assert outputs(cfg) == outputs(built), "the new file is ignored, in the recipe hash too"
    right = outputs(cfg, "right")
    prepare(cfg)
    assert len(texts(cfg, "left", "train") + texts(cfg, "left", "heldout")) == 160
    assert outputs(cfg, "right") == right


def test_vocab_size_is_checked_for_an_existing_tokenizer(base: DataConfig, tmp_path: Path) -> None:
    cfg = replace(base, folder=str(tmp_path))
    prepare(replace(cfg, tokenizer=replace(cfg.tokenizer, vocab_size=400)))
    before = outputs(cfg)
    assert read_manifest(tmp_path / "shards" / "left").vocab_size == 300
    with pytest.raises(
        InputError, match="has 300 ids: set data.tokenizer.vocab_size, now 280, to 300 or more"
    ):
        prepare(replace(cfg, tokenizer=replace(cfg.tokenizer, vocab_size=280)))
    assert outputs(cfg) == before


@pytest.mark.parametrize(
    "mark", ["clean/*/*/logs/clean/completions/*", "shards/*/*/logs/completions/*"]
)
def test_killed_run_resumes_to_the_same_bytes(
    base: DataConfig, built: DataConfig, tmp_path: Path, mark: str
) -> None:
    cfg = replace(base, folder=str(tmp_path), workers=1)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom data.config import *\nfrom "
        "data.prepare import prepare\nprepare(DataConfig(**eval(sys.argv[2])))\n"
    )
    fields = {field: getattr(cfg, field) for field in cfg.__dataclass_fields__}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(ROOT), repr(fields)], stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not list((tmp_path / "building").glob(mark)):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepare(cfg)
    assert outputs(cfg) == outputs(built)
    assert not [path for path in (tmp_path / "building").rglob("*") if path.is_file()]


def test_training_a_tokenizer_is_reproducible(base: DataConfig, tmp_path: Path) -> None:
    hashes = []
    for name, workers in (("one", 1), ("two", 2)):
        cfg = replace(base, folder=str(tmp_path / name), workers=workers)
        prepare(replace(cfg, tokenizer=TokenizerConfig(None, None, 290, 1)))
        hashes.append(sha256_of(tmp_path / name / "tokenizer" / tokenizer.FILE))
    assert hashes[0] == hashes[1]


def test_mistakes_name_their_fix(base: DataConfig, tmp_path: Path) -> None:
    cfg = replace(base, folder=str(tmp_path))

    def with_left(**changed: str) -> DataConfig:
        return replace(
            cfg, sources={**cfg.sources, "left": replace(cfg.sources["left"], **changed)}
        )

    with pytest.raises(InputError, match="set data.sources.<name>.input to a folder"):
        prepare(with_left(input=str(tmp_path / "nowhere")))
    assert not (tmp_path / "locks").exists(), "nothing was started"
    with pytest.raises(
        InputError,
        match="unknown recipe poems: .* one of books, curated, documents, .*, web, megatron",
    ):
        prepare(with_left(recipe="poems"))
    with pytest.raises(InputError, match="set data.heldout_percent"):
        prepare(replace(cfg, heldout_percent=0.001))


def test_mistakes_are_found_before_the_first_document(base: DataConfig, tmp_path: Path) -> None:
    """Tokenizer, assets, plan and file system: nothing is cleaned for them."""
    given = base.tokenizer
    (tmp_path / "text.json").write_text("text")
    stage = replace(base.stages[0], mixture={"left": 1.0, "right": 1e-6})
    few = replace(base.sources["left"], expected_tokens=64)
    mistakes: list[tuple[str, dict[str, Any]]] = [
        ("no tokenizer at", {"tokenizer": replace(given, path=str(tmp_path / "none.json"))}),
        ("not a valid tokenizer", {"tokenizer": replace(given, path=str(tmp_path / "text.json"))}),
        ("has sha256", {"tokenizer": replace(given, sha256="0" * 64)}),
        ("data.tokenizer.vocab_size", {"tokenizer": replace(given, vocab_size=280)}),
        ("data.assets.url_blocklist.path", {"assets": Assets(url_blocklist=Asset("/none"))}),
        ("a share below", {"stages": [stage]}),
        ("data.sources.left.max_epochs", {"sources": {**base.sources, "left": few}}),
    ]
    for number, (message, changes) in enumerate(mistakes):
        folder = tmp_path / str(number)
        with pytest.raises(InputError, match=message):
            prepare(replace(base, folder=str(folder), **changes))
        assert not (folder / "building").exists(), message


def test_a_folder_is_locked_during_preparation(base: DataConfig, tmp_path: Path) -> None:
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
        "from data.pipeline.workers import lock_folder\nwith lock_folder(Path(sys.argv[2])):\n"
        "    print('locked', flush=True); time.sleep(3600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match="another preparation is running in"):
            prepare(replace(base, folder=str(tmp_path)))
    finally:
        process.kill()
        process.wait()


def test_command_prints_one_line_for_a_user_error(tmp_path: Path) -> None:
    overrides = [
        "+experiment=demo",
        f"data.folder={tmp_path / 'out'}",
        f"data.sources.web.input={tmp_path / 'none'}",
    ]
    result = python("data/prepare.py", *overrides)
    assert result.returncode == 2
    assert result.stderr.startswith("error: input folder") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("fault", ["pages", "evaluations", "duplicates"])
def test_what_a_recipe_cannot_take_is_an_error_before_the_first_document(
    base: DataConfig, tmp_path: Path, fault: str
) -> None:
    """In the last source, when the first would take weeks."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / ("a.html" if fault == "pages" else "a.txt")).write_text("Some text.")
    evaluations = tmp_path / "evaluations.jsonl"
    evaluations.write_text("{no json")
    recipe = "mathematics" if fault == "duplicates" else "curated"
    last = Source(recipe, str(raw), "CC0-1.0", 1.0, 1)
    last.decontaminate = fault == "evaluations"
    last.near_duplicates = "14x8" if fault == "duplicates" else None
    cfg = replace(
        base,
        folder=str(tmp_path / "data"),
        sources={"left": base.sources["left"], "right": base.sources["right"], "last": last},
        assets=Assets(evaluations=Asset(str(evaluations))),
    )
    expected = {
        "pages": "has web pages",
        "evaluations": "is not JSON",
        "duplicates": "MinHash treats all numbers as equal",
    }
    with pytest.raises(InputError, match=expected[fault]):
        prepare(cfg)
    assert not list((tmp_path / "data").rglob("*.jsonl.gz"))

"""Preparation: built once, reused while right, rebuilt when not, and the same bytes however
often it was killed.
"""

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
from data.config import DataConfig, Source, Stage, TokenizerConfig
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
    """A document of its own words; every third shares its group with two others, some spell the
    end token.
    """
    words = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(60)]
    end = tokenizer.EOS_TOKEN if number % 4 == 0 else "end"
    return {
        "text": f"Document {number}: {' '.join(words)} {end}",
        "id": str(number),
        "group": f"g{number // 3}",
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two folders of 120 documents each, and a vocabulary made beforehand."""
    home = tmp_path_factory.mktemp("prepare")
    for place, name in enumerate(("left", "right")):
        (home / name).mkdir()
        for part in range(3):
            rows = [json.dumps(document(place * 120 + part * 40 + i)) for i in range(40)]
            (home / name / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    tokenizer.train((document(i)["text"] for i in range(50)), 300, home / "vocabulary")
    sources = {
        name: Source("curated", str(home / name), "CC0-1.0", 1.0, 2) for name in ("left", "right")
    }
    return DataConfig(
        folder=str(home / "data"),
        seed=3,
        block_tokens=64,
        heldout_percent=20.0,
        reset_state=True,
        workers=2,
        tokenizer=TokenizerConfig(str(home / "vocabulary" / tokenizer.FILE), None, 300, 1),
        sources=sources,
        stages=[Stage("only", 128, 64, {"left": 1.0, "right": 1.0})],
    )


@pytest.fixture(scope="module")
def built(base: DataConfig) -> DataConfig:
    """The same, prepared."""
    prepare(base)
    return base


def outputs(cfg: DataConfig, *names: str) -> dict[str, bytes]:
    """Every shard and manifest of some sources."""
    homes = [Path(cfg.folder) / "shards" / name for name in names or cfg.sources]
    return {
        f"{home.name}/{path.name}": path.read_bytes() for home in homes for path in home.glob("*.*")
    }


def changes(cfg: DataConfig) -> dict[str, int]:
    """Time of the last change of every finished file."""
    folder = Path(cfg.folder)
    parts = (folder / part for part in ("clean", "shards", "tokenizer"))
    return {
        str(path): path.stat().st_mtime_ns
        for part in parts
        for path in part.rglob("*")
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
    pieces = np.split(ids, ends + 1)[:-1]
    return [vocabulary.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


def test_every_document_arrives_whole_in_the_split_of_its_group(built: DataConfig) -> None:
    for place, name in enumerate(built.sources):
        rows = [document(place * 120 + i) for i in range(120)]
        for split in SPLITS:
            expected = [
                row["text"]
                for row in rows
                if split_of(row["group"], built.heldout_percent) == split
            ]
            found = texts(built, name, split)
            assert sorted(found) == sorted(expected) and found != expected, (
                "all there, and shuffled"
            )


def test_split_holds_its_share_and_never_moves() -> None:
    groups = [f"group {i}" for i in range(5000)]
    few = {group for group in groups if split_of(group, 4.0) == "heldout"}
    more = {group for group in groups if split_of(group, 8.0) == "heldout"}
    assert 150 < len(few) < 250 and few < more


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
    before = changes(built)
    prepare(built)
    assert changes(built) == before
    assert capsys.readouterr().out.count("reused") == 5


def test_changed_settings_rebuild_their_source_only(
    base: DataConfig, built: DataConfig, tmp_path: Path
) -> None:
    cfg = replace(base, folder=str(tmp_path))
    prepare(cfg)
    before, left = changes(cfg), outputs(cfg, "left")
    more = {**cfg.sources, "right": replace(cfg.sources["right"], tasks=3)}
    changed = replace(cfg, sources=more)
    with pytest.raises(
        InputError,
        match=r"was begun with 2 tasks, not 3: set data.sources.right.tasks=2, or remove",
    ):
        prepare(changed)
    assert changes(cfg) == before
    (tmp_path / "locks" / "right.json").unlink()
    prepare(changed)
    assert outputs(cfg, "left") == left
    assert {path for path, when in changes(changed).items() if before.get(path) == when} == {
        path for path in before if "/right/" not in path
    }
    assert len(list((tmp_path / "shards" / "right").glob("train_*.ds"))) == 3
    assert sorted(texts(changed, "right", "train")) == sorted(texts(base, "right", "train"))
    (tmp_path / "locks" / "right.json").unlink()
    prepare(cfg)
    assert outputs(cfg) == outputs(base)


def test_damaged_shard_is_made_again(base: DataConfig, built: DataConfig, tmp_path: Path) -> None:
    cfg = replace(base, folder=str(tmp_path))
    prepare(cfg)
    shard = next((tmp_path / "shards" / "left").glob("train_*.ds"))
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    # left behind by somebody
    (tmp_path / "clean" / "right" / "stale.jsonl.gz").write_bytes(b"no gzip")
    prepare(cfg)
    assert outputs(cfg) == outputs(built)


def test_changed_input_is_seen(base: DataConfig, tmp_path: Path) -> None:
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


def test_input_that_arrives_meanwhile_waits_for_the_next_launch(
    base: DataConfig, built: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of files is taken once: a later name that sorts first would displace the files of
    every later task.
    """
    shutil.copytree(base.sources["left"].input, tmp_path / "raw")
    left = replace(base.sources["left"], input=str(tmp_path / "raw"))
    cfg = replace(base, folder=str(tmp_path / "data"), sources={**base.sources, "left": left})

    def late(*arguments: Any) -> Any:
        rows = [json.dumps(document(1000 + i)) for i in range(40)]
        (tmp_path / "raw" / "+late.jsonl").write_text("\n".join(rows) + "\n")
        return clean_sources(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.clean_sources", late)
        prepare(cfg)
    assert outputs(cfg) == outputs(built), "as if it had not been there, recipe hash and all"
    right = outputs(cfg, "right")
    prepare(cfg)
    assert len(texts(cfg, "left", "train") + texts(cfg, "left", "heldout")) == 160
    assert outputs(cfg, "right") == right


def test_vocabulary_must_fit_even_when_it_is_there_already(
    base: DataConfig, tmp_path: Path
) -> None:
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
def test_killed_run_ends_with_the_same_bytes(
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


def test_trained_vocabulary_is_the_same_again(base: DataConfig, tmp_path: Path) -> None:
    shas = []
    for name, workers in (("one", 1), ("two", 2)):
        cfg = replace(base, folder=str(tmp_path / name), workers=workers)
        prepare(replace(cfg, tokenizer=TokenizerConfig(None, None, 290, 1)))
        shas.append(sha256_of(tmp_path / name / "tokenizer" / tokenizer.FILE))
    assert shas[0] == shas[1]


def test_mistakes_name_their_fix(base: DataConfig, tmp_path: Path) -> None:
    cfg = replace(base, folder=str(tmp_path))

    def with_left(**changed: str) -> DataConfig:
        return replace(
            cfg, sources={**cfg.sources, "left": replace(cfg.sources["left"], **changed)}
        )

    with pytest.raises(InputError, match="set data.sources.<name>.input to a folder"):
        prepare(with_left(input=str(tmp_path / "nowhere")))
    assert not (tmp_path / "locks").exists(), "nothing was begun"
    with pytest.raises(InputError, match="is one of books, curated, forums, .*, web, megatron"):
        prepare(with_left(recipe="poems"))
    with pytest.raises(InputError, match="set data.heldout_percent"):
        prepare(replace(cfg, heldout_percent=0.001))


def test_two_preparations_do_not_share_a_folder(base: DataConfig, tmp_path: Path) -> None:
    hold = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
        "from data.pipeline.workers import exclusive\nwith exclusive(Path(sys.argv[2])):\n"
        "    print('held', flush=True); time.sleep(3600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another preparation works in"):
            prepare(replace(base, folder=str(tmp_path)))
    finally:
        process.kill()
        process.wait()


def test_command_ends_with_one_line_on_a_mistake(tmp_path: Path) -> None:
    overrides = [
        "+experiment=demo",
        f"data.folder={tmp_path / 'out'}",
        f"data.sources.web.input={tmp_path / 'none'}",
    ]
    result = python("data/prepare.py", *overrides)
    assert result.returncode == 2
    assert result.stderr.startswith("error: input folder") and result.stderr.count("\n") == 1

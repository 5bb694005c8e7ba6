"""experiment=own: sizes by the rule of data/own.py, any mix of files, a record of the input."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.compose import compose_config, convert
from core.errors import InputError
from data import own
from data.config import PrepareConfig
from data.prepare import prepare
from data.recipes.documents import split
from data.stream.manifests import read_manifest
from examples.demo_corpus.archives import write_archive
from model.flops import parameter_count
from tests.commands import python
from tests.data.recipe_outputs import PAGE, STORY
from train.config import RunConfig

MINUTES = ["run.flops_per_second=4e10"]


def composed(schema: type, *overrides: str) -> Any:
    words = ["+experiment=own", *MINUTES, *overrides]
    return convert(schema, compose_config(words, schemas=[schema]))


@pytest.fixture
def sized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: the run's config for so many bytes of text."""

    def for_bytes(size: int, *overrides: str) -> RunConfig:
        monkeypatch.setattr(own, "text_bytes", lambda source: size)
        folder = f"data.folder={tmp_path / 'none'}"
        config: RunConfig = composed(RunConfig, folder, "data.input=texts", *overrides)
        return config

    return for_bytes


@pytest.mark.parametrize(
    ("size", "vocab_size", "width", "epochs", "percent"),
    [
        (20_000, 512, 96, 16, 10),
        (5_000_000, 4096, 96, 4, 5),
        (200_000_000, 8192, 96, 0.1, 5),
        (10**10, 8192, 96, 0.002, 1),
    ],
)
def test_sizes_follow_from_the_text(
    sized: Any, size: int, vocab_size: int, width: int, epochs: float, percent: float
) -> None:
    run = sized(size)
    assert (run.data.tokenizer.vocab_size, run.data.heldout_percent) == (vocab_size, percent)
    assert run.model.d_model == width and run.model.vocab_size == vocab_size
    assert run.tokens / (size / own.BYTES_PER_TOKEN) == pytest.approx(epochs, rel=0.25)
    batch = run.schedule.batch_end_sequences * run.data.stages[0].seq_len
    assert 100 < run.tokens / batch < 1300
    assert run.schedule.decay_tokens == run.data.stages[1].tokens
    assert run.optim.lr / run.schedule.min_lr == pytest.approx(256)


def test_more_time_gives_a_larger_model_and_every_value_can_be_set(sized: Any) -> None:
    day = sized(200_000_000, "run.minutes=1440")
    hour = sized(200_000_000, "run.minutes=60")
    assert parameter_count(day.model) > parameter_count(hour.model) and day.tokens > hour.tokens
    given = sized(200_000_000, "model=4m", "optim.lr=1e-3", "data.stages.0.seq_len=64")
    assert (given.model.d_model, given.model.vocab_size, given.optim.lr) == (256, 8192, 1e-3)
    assert given.tokens < sized(200_000_000).tokens


def test_without_text_the_error_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="set data.input to a folder of it") as error:
        composed(PrepareConfig, f"data.folder={tmp_path}")
    assert "\n" not in str(error.value).split("full_key")[0].strip()
    result = python("train/pretrain.py", "+experiment=own", f"data.folder={tmp_path}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "set data.input to a folder" in result.stderr, result.stderr


def test_the_input_of_another_experiment_is_that_of_a_source() -> None:
    with pytest.raises(InputError, match="set data.sources.NAME.input of a source"):
        convert(PrepareConfig, compose_config(["+experiment=demo", "++data.input=x"]))


def test_a_started_run_keeps_its_number_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["+experiment=own", f"run.dir={tmp_path}", f"data.input={mixed(tmp_path / 'texts')}"]
    (tmp_path / "config.yaml").write_text("run: {flops_per_second: 3.0e9}")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(64))
    assert convert(RunConfig, compose_config(words)).run.flops_per_second == 3e9
    (tmp_path / "config.yaml").unlink()
    own.recorded_flops.cache_clear()
    assert convert(RunConfig, compose_config(words)).run.flops_per_second == 64 * own.CORE_FLOPS


def mixed(folder: Path) -> Path:
    """A folder with a file of every kind."""
    folder.mkdir()
    (folder / "notes.txt").write_text(STORY)
    (folder / "chapter.md").write_text(f"# Rivers\n\n{STORY}")
    (folder / "page.html").write_text(PAGE)
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"{number} {STORY}"}) + "\n" for number in range(4))
    pq.write_table(
        pa.table({"text": [STORY, "A short note, but not too short."]}), folder / "t.parquet"
    )
    with (folder / "crawl.warc.gz").open("wb") as archive:
        write_archive(archive, {"http://a.invalid/1": PAGE}.items())
    return folder


def test_any_mix_of_files_is_prepared_and_remembered(tmp_path: Path) -> None:
    texts = mixed(tmp_path / "texts")
    folder = f"data.folder={tmp_path / 'data'}"
    config = composed(PrepareConfig, folder, f"data.input={texts}")
    prepare(config.data)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    reader, *_, splitter = report["steps"]["own"][:-1]
    assert reader["total"] == 10 and reader["dropped"] == {}
    assert splitter["added"] > 20
    manifest = read_manifest(tmp_path / "data" / "shards" / "own")
    assert 0 < manifest.tokens("heldout") < manifest.tokens("train")
    again = composed(RunConfig, folder)  # without data.input
    assert again.data.sources["own"].input == str(texts)
    assert again.tokens > manifest.tokens("train")
    with pytest.raises(InputError, match="has the text of .*: set another run.name"):
        prepare(composed(PrepareConfig, folder, f"data.input={tmp_path}").data)


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = mixed(tmp_path / "texts")
    config = composed(PrepareConfig, f"data.folder={tmp_path / 'data'}", "data.input=~/texts")
    assert config.data.sources["own"].input == str(texts)


@pytest.mark.parametrize("text", ["", "a", "a\n" * 500, "x" * 5000, f"{STORY}\n\n" * 9])
def test_parts_together_are_the_text(text: str) -> None:
    parts = split(text, 300)
    assert "".join(parts) == text
    assert all(len(part) >= 300 for part in parts[:-1])
    assert len(parts) > 1 or len(text) <= 600 or "\n" not in text

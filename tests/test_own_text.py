"""The two commands of the README on text of one's own, and what follows them."""

from pathlib import Path
from pydoc_data.topics import topics

from core.run import RunFiles
from tests.commands import python
from train.metrics.records import read_lines
from train.resilience.incidents import read_outcome


def run(script: str, folder: Path, *overrides: str) -> str:
    result = python(
        script,
        "+experiment=own",
        f"data.folder={folder / 'data'}",
        f"run.dir={folder / 'run'}",
        "run.minutes=0.2",
        *overrides,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_two_commands_train_on_a_folder_of_text(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    text = "\n\n".join(topics.values())
    (tmp_path / "texts" / "notes.txt").write_text(text[:15_000])
    (tmp_path / "texts" / "more.md").write_text(text[15_000:20_000])
    printed = run("data/prepare.py", tmp_path, f"data.input={tmp_path / 'texts'}")
    assert "train/pretrain.py +experiment=own" in printed
    printed = run("train/pretrain.py", tmp_path)
    assert "sized for 0.2 minutes" in printed
    outcome = read_outcome(tmp_path / "run")
    assert outcome is not None and outcome.reason.startswith("finished: ")
    lines = read_lines(RunFiles(tmp_path / "run").metrics)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert "reused: the run is complete" in run("train/pretrain.py", tmp_path)
    assert run("eval/generate.py", tmp_path, "generate.new_tokens=8").strip()

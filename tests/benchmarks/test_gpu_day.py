"""The scripts of a GPU day, as far as they can run without one: what they name exists, and the
smoke test runs.
"""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, timing
from benchmarks.gpu import SECTIONS
from benchmarks.gpu_day.old_torch import CHANGES, change
from tests.commands import forked, python
from tests.compose import run_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_day" / "gpu_day.sh"


def test_the_smoke_test_runs_on_a_cpu() -> None:
    result = forked("-m", "benchmarks.gpu_day.smoke", "--device", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout
    assert said.endswith("all right\n") and said.count("\nok   ") == 5 and "FAIL" not in said


def test_the_script_parses_and_names_what_exists() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    text = SCRIPT.read_text()
    for path in re.findall(r"\b(?:tests|train|launch|benchmarks)/[\w/]+\.(?:py|sh)\b", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"-m (benchmarks\.[\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for module, names in re.findall(
        r"^from ((?:benchmarks|model|tests)[\w.]*) import (.+)$", text, re.M
    ):
        missing = set(names.split(", ")) - set(vars(importlib.import_module(module)))
        assert not missing, f"{module} has no {missing}"
    for line in re.findall(r"--sections ([a-z ]+)", text):
        assert set(line.split()) <= set(SECTIONS), line


def benchmarks() -> list[list[str]]:
    """The options of every `python3 -m benchmarks.gpu`."""
    return [words.split() for words in re.findall(r"-m benchmarks\.gpu (.+)", SCRIPT.read_text())]


def test_each_of_its_benchmarks_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "measure", lambda bench, arguments: None)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    for words in benchmarks():
        monkeypatch.setattr(sys, "argv", ["gpu", *words, "--device", "cpu", "--small"])
        gpu.main()
    assert len(list(tmp_path.glob("gpu-*.json"))) == len(benchmarks()) == 3


RIVAL = """import array, fcntl, os, signal, termios, time
print(row, flush=True)
unread = array.array("i", [1])
while unread[0]:  # the benchmark has not taken the row from the pipe yet
    fcntl.ioctl(1, termios.FIONREAD, unread)
    time.sleep(0.1)
time.sleep(1)
for _ in range(2):
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(3600)
"""


def test_a_benchmark_that_its_limit_stops_has_written_what_it_measured(tmp_path: Path) -> None:
    """By SIGTERM as `timeout` sends it, twice, while the rival is at its second batch."""
    row = json.dumps({"batch": 1, "runs": 30, "forward": 1.0, "both": 3.0})
    rival = tmp_path / "python"
    rival.write_text(f"#!{sys.executable}\nrow = {row!r}\n{RIVAL}")
    rival.chmod(0o755)
    (words,) = [words for words in benchmarks() if "--jax-python" in words]
    words[words.index("--jax-python") + 1] = str(rival)
    code = (
        "import pathlib, runpy, sys; from benchmarks import timing; timing.RESULTS = "
        "pathlib.Path(sys.argv.pop(1));runpy.run_module('benchmarks.gpu', run_name='__main__', "
        "alter_sys=True)"
    )
    stopped = python("-c", code, tmp_path, *words, "--device", "cpu", "--small")
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    (record,) = tmp_path.glob("gpu-*-jax-*.json")
    assert [row["seconds"] for row in json.loads(record.read_text())["rows"]] == [1.0, 3.0]


def variable(name: str) -> str:
    """What the script sets a variable to."""
    found = re.search(rf"^{name}=(['\"])(.*?)\1$", SCRIPT.read_text(), re.M | re.S)
    assert found is not None, name
    return found[2]


def test_its_trainings_have_configs() -> None:
    """Every `train NAME TOKENS SEQ_LEN SEQUENCES OVERRIDES`, with the overrides that all of them
    share.
    """
    shared = [word for word in variable("RUN").split() if not word.startswith("+experiment")]
    lines = re.findall(
        r"^\s+(?:LIMIT=\d+ )?train (\S+) (\d+) (\d+) (\d+) ([^#\n]*)", SCRIPT.read_text(), re.M
    )
    assert len(lines) == 5
    for name, tokens, length, sequences, more in lines:
        stage = variable("ONE") % (int(tokens), int(length))
        words = [
            f"schedule.batch_start_sequences={sequences}",
            f"schedule.batch_end_sequences={sequences}",
            f"run.name={name}",
        ]
        run = run_config("demo", *shared, stage, *words, *more.split())
        assert run.data.stages[0].seq_len == int(
            length
        ) and run.schedule.batch_end_sequences == int(sequences)


def test_the_code_can_be_changed_for_an_older_torch(tmp_path: Path) -> None:
    for name in CHANGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    change(tmp_path)
    for name in CHANGES:
        compile((tmp_path / name).read_text(), name, "exec")
        assert (tmp_path / name).read_text() != (ROOT / name).read_text()
    with pytest.raises(ValueError, match="does not hold"):
        change(tmp_path)

"""The scripts of gpu_day/, checked without a GPU: names exist and the smoke test runs."""

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
from benchmarks.gpu_day.old_torch import PATCHES, patch
from tests.commands import forked, python
from tests.compose import run_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_day" / "gpu_day.sh"


def test_the_smoke_test_runs_on_a_cpu() -> None:
    result = forked("-m", "benchmarks.gpu_day.smoke", "--device", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    output = result.stdout
    assert output.endswith("all right\n") and output.count("\nok   ") == 5
    assert "FAIL" not in output


def test_the_script_parses_and_its_names_exist() -> None:
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


def gpu_benchmark_options() -> list[list[str]]:
    """Options of every `python3 -m benchmarks.gpu` in the script."""
    return [words.split() for words in re.findall(r"-m benchmarks\.gpu (.+)", SCRIPT.read_text())]


def test_each_benchmark_writes_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "measure", lambda bench, arguments: None)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    for words in gpu_benchmark_options():
        monkeypatch.setattr(sys, "argv", ["gpu", *words, "--device", "cpu", "--small"])
        gpu.main()
    assert len(list(tmp_path.glob("gpu-*.json"))) == len(gpu_benchmark_options()) == 3


FAKE_JAX_PYTHON = """import array, fcntl, os, signal, termios, time
print(row, flush=True)
unread = array.array("i", [1])
while unread[0]:  # the benchmark has not read the row from the pipe yet
    fcntl.ioctl(1, termios.FIONREAD, unread)
    time.sleep(0.1)
time.sleep(1)
for _ in range(2):
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(3600)
"""


def test_results_are_written_after_a_timeout(tmp_path: Path) -> None:
    """SIGTERM arrives twice, as from `timeout`, during the second batch size of the jax scan."""
    row = json.dumps({"batch": 1, "runs": 30, "forward": 1.0, "both": 3.0})
    fake_python = tmp_path / "python"
    fake_python.write_text(f"#!{sys.executable}\nrow = {row!r}\n{FAKE_JAX_PYTHON}")
    fake_python.chmod(0o755)
    (words,) = [words for words in gpu_benchmark_options() if "--jax-python" in words]
    words[words.index("--jax-python") + 1] = str(fake_python)
    code = (
        "import pathlib, runpy, sys; from benchmarks import timing; timing.RESULTS = "
        "pathlib.Path(sys.argv.pop(1));runpy.run_module('benchmarks.gpu', run_name='__main__', "
        "alter_sys=True)"
    )
    stopped = python("-c", code, tmp_path, *words, "--device", "cpu", "--small")
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    (record,) = tmp_path.glob("gpu-*-jax-*.json")
    assert [row["seconds"] for row in json.loads(record.read_text())["rows"]] == [1.0, 3.0]


def script_variable(name: str) -> str:
    """Value of a variable in the script."""
    match = re.search(rf"^{name}=(['\"])(.*?)\1$", SCRIPT.read_text(), re.M | re.S)
    assert match is not None, name
    return match[2]


def test_the_training_runs_have_valid_configs() -> None:
    """Compose every `train NAME TOKENS SEQ_LEN SEQUENCES OVERRIDES` with the shared overrides."""
    shared = [word for word in script_variable("RUN").split() if not word.startswith("+experiment")]
    lines = re.findall(
        r"^\s+(?:LIMIT=\d+ )?train (\S+) (\d+) (\d+) (\d+) ([^#\n]*)", SCRIPT.read_text(), re.M
    )
    assert len(lines) == 5
    for name, tokens, length, sequences, more in lines:
        stage = script_variable("ONE") % (int(tokens), int(length))
        words = [
            f"schedule.batch_start_sequences={sequences}",
            f"schedule.batch_end_sequences={sequences}",
            f"run.name={name}",
        ]
        run = run_config("demo", *shared, stage, *words, *more.split())
        assert run.data.stages[0].seq_len == int(length)
        assert run.schedule.batch_end_sequences == int(sequences)


def test_the_code_can_be_patched_for_an_older_torch(tmp_path: Path) -> None:
    for name in PATCHES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    patch(tmp_path)
    for name in PATCHES:
        compile((tmp_path / name).read_text(), name, "exec")
        assert (tmp_path / name).read_text() != (ROOT / name).read_text()
    with pytest.raises(ValueError, match="does not contain"):
        patch(tmp_path)

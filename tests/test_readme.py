"""The commands of the README on a shorter run, and what they write."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

from tests.commands import ROOT, python

STAGES = (
    "data.stages=[{name: short, tokens: 160000, seq_len: 128, mixture: {code: 50, math: 35, web: "
    "15}},{name: decay, tokens: 80000, seq_len: 256, mixture: {code: 35, math: 35, curated: 15, "
    "technical: 15}}]"
)
SHORTER_RUN = [
    "schedule.warmup_tokens=10000",
    "schedule.ramp_tokens=60000",
    "schedule.decay_tokens=80000",
    "checkpoint.every_tokens=60000",
    "validation.every_tokens=100000",
    "eval.max_tokens=8000",
    "generate.new_tokens=16",
]


def commands() -> list[list[str]]:
    """Commands of the demo in the README."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    block = next(block for block in blocks if "eval/run.py" in block)
    return [line.split() for line in block.strip().splitlines()]


def processor_seconds(tree: psutil.Process) -> float:
    """Processor time of a process and its children, which does not depend on load."""
    seconds = 0.0
    for process in (tree, *tree.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:4])
    return seconds


class Demo:
    """Runs the commands of the README; keeps the output of each."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.data = folder / "data"
        self.overrides = [f"run.dir={self.run}", f"data.folder={self.data}", STAGES, *SHORTER_RUN]
        self.outputs: dict[str, str] = {}
        self.max_silence: dict[str, float] = {}  # seconds between two lines

    def run_all(self) -> None:
        for command in commands():
            self.run_command(command)

    def run_command(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        makes_corpus = command[-1] == "examples/make_demo_corpus.py"
        arguments = [str(self.data / "raw")] if makes_corpus else self.overrides
        lines = []
        silence = 0.0
        last = (0.0, time.monotonic())
        with subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            tree = psutil.Process(process.pid)
            for line in process.stdout:
                # of several processes the first is larger, on a busy machine the second
                now = (max(last[0], processor_seconds(tree)), time.monotonic())
                silence = max(silence, min(now[0] - last[0], now[1] - last[1]))
                last = now
                lines.append(line)
        name = next(word for word in command if word.endswith(".py"))
        self.outputs[name] = "".join(lines)
        self.max_silence[name] = silence
        assert process.returncode == 0, f"{command}:\n{self.outputs[name]}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    demo = Demo(tmp_path_factory.mktemp("demo"))
    demo.run_all()
    return demo


def test_readme_has_five_commands() -> None:
    scripts = [next(word for word in command if word.endswith(".py")) for command in commands()]
    assert scripts == [
        "examples/make_demo_corpus.py",
        "data/prepare.py",
        "train/pretrain.py",
        "eval/export.py",
        "eval/run.py",
    ]


def test_run_folder_has_all_files(demo: Demo) -> None:
    names = (
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "eval.json",
        "hf/config.json",
        "hf/model.safetensors",
        "hf/tokenizer.json",
        "hf/generation_config.json",
    )
    assert [name for name in names if not (demo.run / name).is_file()] == []
    assert list((demo.run / "checkpoints").glob("step-*/manifest.json"))
    assert not (demo.run / "wandb").exists()


def test_loss_decreases(demo: Demo) -> None:
    steps = [json.loads(line) for line in (demo.run / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] - steps[-1]["loss"] > 2.0
    heldout = json.loads((demo.run / "eval.json").read_text())["heldout"]
    assert set(heldout) == {"web", "code", "technical", "curated", "math", "all"}
    assert heldout["all"]["bits_per_byte"] < 0.95 * heldout["all"]["unigram_bits_per_byte"]


def test_records_have_all_keys(demo: Demo) -> None:
    steps = [json.loads(line) for line in (demo.run / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "loss",
        "source_loss",
        "source_tokens",
        "grad_norm",
        "lr",
        "batch",
        "seq_len",
        "stage",
        "tokens",
        "tokens_per_second",
        "memory_gib",
        "data_wait_seconds",
        "step",
        "step_seconds",
        "skipped",
    }
    assert all(set(step) - {"validation"} == keys for step in steps)
    assert all(
        sum(step["source_tokens"].values()) == step["batch"] * step["seq_len"] for step in steps
    )
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert {step["stage"] for step in steps} == {"short", "decay"} and {
        step["seq_len"] for step in steps
    } == {128, 256}
    validated = [step for step in steps if step.get("validation")]
    assert len(validated) == 3 and validated[-1] is steps[-1]  # the end, too
    assert demo.outputs["train/pretrain.py"].count("held-out at step") == 3
    assert all(
        set(step["validation"]) == {"web", "code", "technical", "curated", "math"}
        for step in validated
    )
    assert all(0 < step["memory_gib"] < 24 for step in steps)


def test_commands_print_progress(demo: Demo) -> None:
    assert max(demo.max_silence.values()) < 20, demo.max_silence


def test_no_warnings_or_tracebacks_are_printed(demo: Demo) -> None:
    for name, output in demo.outputs.items():
        assert "Traceback" not in output, name
        warnings = [
            line
            for line in output.splitlines()
            if "arning" in line and "OMP_NUM_THREADS" not in line
        ]
        assert warnings == [], (name, warnings)


def test_second_run_of_the_commands_reuses_results(demo: Demo) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in demo.run.rglob("*")
        if path.is_file() and path.suffix != ".png"
    }
    before_usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    demo.run_all()
    after_usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sum(after_usage[:2]) - sum(before_usage[:2])  # user and system time
    assert seconds < 60
    assert all("reused" in output for output in demo.outputs.values())
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= {"config.yaml", "outcome.json"}


def test_readme_is_short_and_its_links_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.isascii() and text.count("\n") <= 120
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert len(links) > 30
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_python_of_the_readme_runs_on_the_export(demo: Demo) -> None:
    text = (ROOT / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(code) == 1 and "runs/demo" in code[0]
    names: dict[str, Any] = {}
    exec(code[0].replace("runs/demo", str(demo.run)), names)
    assert len(names["ids"]) == 8


def test_pictures_are_drawn_from_a_run(demo: Demo, tmp_path: Path) -> None:
    result = python("docs/pictures.py", str(demo.run), "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("demo_curves.svg", "console.svg"):
        drawn = tmp_path / name
        committed = ROOT / "docs" / "pages" / "images" / name
        for path in (drawn, committed):
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
            assert 10_000 < path.stat().st_size < 150_000
            text = path.read_text()
            assert "@font-face" not in text and "@import" not in text  # loads nothing
    console = (tmp_path / "console.svg").read_text().replace("&#160;", " ")
    assert "torchrun --nproc-per-node 2" in console and "100.0%" in console and " saved " in console

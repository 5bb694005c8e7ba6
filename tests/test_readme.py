"""The README's commands, as a newcomer types them, on a shorter run: everything comes out, and
means something.
"""

import json
import os
import re
import resource
import subprocess
import sys
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
SHORTER = [
    "schedule.warmup_tokens=10000",
    "schedule.ramp_tokens=60000",
    "schedule.decay_tokens=80000",
    "checkpoint.every_tokens=60000",
    "validation.every_tokens=100000",
    "eval.max_tokens=8000",
    "generate.new_tokens=16",
]


def commands() -> list[list[str]]:
    """The block of the README that holds the demo's plain commands."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    block = next(block for block in blocks if "eval/run.py" in block)
    return [line.split() for line in block.strip().splitlines()]


def processor_seconds(tree: psutil.Process) -> float:
    """What a process and its children have computed, which a busy machine does not change."""
    seconds = 0.0
    for process in (tree, *tree.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:4])
    return seconds


class Demo:
    """One run of all commands, and what each printed."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.data = folder / "data"
        self.overrides = [f"run.dir={self.run}", f"data.folder={self.data}", STAGES, *SHORTER]
        self.outputs: dict[str, str] = {}
        self.silences: dict[str, float] = {}  # seconds of a processor between two lines

    def all(self) -> None:
        for command in commands():
            self.one(command)

    def one(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        lines, silence, last = [], 0.0, 0.0
        corpus = command[-1] == "examples/make_demo_corpus.py"
        arguments = [*command, str(self.data / "raw")] if corpus else [*command, *self.overrides]
        with subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            tree = psutil.Process(process.pid)
            for line in process.stdout:
                now = max(last, processor_seconds(tree))
                silence, last = max(silence, now - last), now
                lines.append(line)
        name = next(word for word in command if word.endswith(".py"))
        self.outputs[name], self.silences[name] = "".join(lines), silence
        assert process.returncode == 0, f"{command}:\n{self.outputs[name]}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    run = Demo(tmp_path_factory.mktemp("demo"))
    run.all()
    return run


def test_the_readme_has_the_five_commands() -> None:
    scripts = [next(word for word in command if word.endswith(".py")) for command in commands()]
    assert scripts == [
        "examples/make_demo_corpus.py",
        "data/prepare.py",
        "train/pretrain.py",
        "eval/export.py",
        "eval/run.py",
    ]


def test_everything_lies_in_the_run_folder(demo: Demo) -> None:
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
    assert list((demo.run / "wandb").glob("offline-run-*"))


def test_it_learns(demo: Demo) -> None:
    steps = [json.loads(line) for line in (demo.run / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] - steps[-1]["loss"] > 2.0
    heldout = json.loads((demo.run / "eval.json").read_text())["heldout"]
    assert set(heldout) == {"web", "code", "technical", "curated", "math", "all"}
    assert heldout["all"]["bits_per_byte"] < 0.95 * heldout["all"]["unigram_bits_per_byte"]


def test_every_record_is_whole(demo: Demo) -> None:
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
    assert validated and all(
        set(step["validation"]) == {"web", "code", "technical", "curated", "math"}
        for step in validated
    )
    assert all(0 < step["memory_gib"] < 24 for step in steps)


def test_progress_is_shown_all_along(demo: Demo) -> None:
    assert max(demo.silences.values()) < 20, demo.silences


def test_nothing_ugly_is_printed(demo: Demo) -> None:
    for name, output in demo.outputs.items():
        assert "Traceback" not in output, name
        own = [
            line
            for line in output.splitlines()
            if "arning" in line and "OMP_NUM_THREADS" not in line
        ]
        assert own == [], (name, own)


def test_a_second_time_reuses_finished_stages(demo: Demo) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in demo.run.rglob("*")
        if path.is_file() and path.suffix != ".png"
    }
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    demo.all()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime < 60
    assert all("reused" in output for output in demo.outputs.values())
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= {"config.yaml", "outcome.json"}


def test_the_readme_is_short_and_links_to_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.isascii() and text.count("\n") <= 120
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert len(links) > 30
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_python_runs_on_the_export(demo: Demo) -> None:
    text = (ROOT / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(code) == 1 and "runs/demo/hf" in code[0]
    names: dict[str, Any] = {}
    exec(code[0].replace("runs/demo/hf", str(demo.run / "hf")), names)
    assert len(names["ids"]) == 8


def test_the_pictures_are_drawn_from_a_run(demo: Demo, tmp_path: Path) -> None:
    result = python("docs/pictures.py", str(demo.run), "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("demo_curves.svg", "console.svg"):
        drawn, committed = tmp_path / name, ROOT / "docs" / "pages" / "images" / name
        for path in (drawn, committed):
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
            assert 10_000 < path.stat().st_size < 150_000
            text = path.read_text()
            assert "@font-face" not in text and "@import" not in text  # nothing to load
    shown = (tmp_path / "console.svg").read_text().replace("&#160;", " ")
    assert "torchrun --nproc-per-node 2" in shown and "100.0%" in shown and " saved " in shown

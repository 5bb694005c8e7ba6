"""The house rules that a reader relies on: which room imports which, what stays torch-free, and plain text."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "data", "eval", "train", "launch")
MAY_IMPORT = {
    "model": {"model"},
    "data": {"data"},
    "eval": {"eval", "model", "data"},
    "train": {"train", "eval", "model", "data"},
}
# of train, launch sees the config and pure functions; the command line comes from data
LAUNCH = {"train.config", "train.plan", "train.schedule", "train.traffic", "train.incidents", "train.records",
          "model.config", "model.flops", "core.command", "data.config", "launch"}  # fmt: skip
DOCTOR = {
    "model.kernels",
    "data.stream.loader",
}  # what a machine must be able to run is tried, by launch/checks.py alone
DRY_RUN = {"train.dryrun"}  # and what a run would do, by launch/dryrun.py alone: a function of config and ranks
TORCH_FREE = ("model/config.py", "model/flops.py", "data/config.py", "eval/config.py", "train/config.py",
              "train/schedule.py", "train/plan.py", "train/traffic.py", "launch/plan.py", "launch/estimate.py",
              "launch/layouts.py", "launch/dryrun.py", "model/parameters.py")  # fmt: skip
SOURCES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules of the house that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module in ROOMS or (node.module and (ROOT / node.module.replace(".", "/")).is_dir()):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif node.module:
                found.add(node.module)
    return {name for name in found if name.split(".")[0] in ROOMS}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    room = path.parts[0]
    for name in imports(path):
        assert name not in ROOMS, f"{path}: import {name} hides which part is used"
        if room == "launch":
            may = LAUNCH | {"checks.py": DOCTOR, "dryrun.py": DRY_RUN}.get(path.name, set())
            assert any(name == allowed or name.startswith(allowed + ".") for allowed in may), f"{path}: {name}"
        else:
            assert name.split(".")[0] in MAY_IMPORT[room], f"{path} imports {name}"


def test_no_training_takes_the_cpu_for_a_gpu() -> None:
    """The dry run alone does, whose tensors hold nothing."""
    assert [str(path) for path in SOURCES if "train.cuda_on_cpu" in imports(path)] == ["train/dryrun.py"]


def test_some_imports_are_seen() -> None:
    assert "model.mamba" in imports(Path("train/engines/deepspeed.py")) and "train.config" in imports(
        Path("launch/estimate.py")
    )


def test_configuration_needs_no_torch() -> None:
    modules = [name.removesuffix(".py").replace("/", ".") for name in TORCH_FREE]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_packages_resolve_to_this_checkout() -> None:
    code = f"import importlib; print([importlib.import_module(m).__file__ for m in {ROOMS}])"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert all(str(ROOT / room) in result.stdout for room in ROOMS), result.stdout + result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_file_hides_the_standard_library(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names, f"{path} would break the scripts beside it"


def test_sizes_stay_readable() -> None:
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text.isascii(), f"{path} is not ASCII"
        assert text.count("\n") <= 300, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, f"{path}: {node.name} is too long"


def test_no_pickle_is_read() -> None:
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        for word in ("torch.load", "torch.save", "import pickle", "allow_pickle", "shell=True"):
            assert word not in text, f"{path} uses {word}"

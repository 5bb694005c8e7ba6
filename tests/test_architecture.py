"""The house rules that a reader relies on: what lies where, which room imports which, what stays
torch-free.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from core.run import RunFiles
from tests.commands import PATIENCE, python

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("core", "model", "data", "eval", "train", "launch")

# which import the house, and which nobody in it imports
OUTSIDE = ("benchmarks", "docs", "examples", "tests")

# Commands at the door, rooms behind: what lies in the root of a folder. (command, not command)
DOORS: dict[str, tuple[set[str], set[str]]] = {
    "core": (
        set(),
        {"command", "entry", "errors", "files", "log", "old_keys", "run", "templates"},
    ),
    "model": (
        set(),
        {
            "checkpoint",
            "config",
            "decode",
            "flops",
            "generation",
            "hf",
            "hf_writer",
            "init",
            "mamba",
            "parameters",
            "sharding",
        },
    ),
    "data": (
        {"browse", "download", "mixture_report", "prepare", "verify"},
        {"config", "tokenizer"},
    ),
    "eval": (
        {"check_leakage", "export", "generate", "push", "run"},
        {"config", "heldout", "model_source"},
    ),
    "train": (
        {"checkpoints", "collect_scores", "pretrain", "report"},
        {
            "batches",
            "build",
            "config",
            "device",
            "distributed",
            "phases",
            "run_context",
            "schedule",
            "step_stats",
            "trainer",
        },
    ),
    "launch": ({"attempt", "collect", "doctor", "dryrun", "plan", "submit"}, {"config"}),
}
MOST = {"train": 14, "data": 12, "eval": 12, "launch": 12}
MOVED = {  # scripts that answer with their new place, until version 0.3
    "data/plan.py": "data/mixture_report.py",
    "data/prefetch.py": "data/download.py",
    "eval/validation.py": "eval/check_leakage.py",
    "eval/bench_generate.py": "benchmarks.generation",
    "train/checkpoint.py": "train/checkpoints.py",
    "train/scores.py": "train/collect_scores.py",
}
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if str(path.relative_to(ROOT)) not in MOVED
)

MAY_IMPORT = {
    "core": {"core"},
    "model": {"core", "model"},
    "data": {"core", "data"},
    "eval": {"core", "eval", "model", "data"},
    "train": {"core", "train", "eval", "model", "data"},
}
# of what trains, launch sees configuration and arithmetic, and reads and shows the records of
# runs
LAUNCH = {
    *(
        "core",
        "launch",
        "data.config",
        "model.config",
        "model.flops",
        "train.config",
        "train.costs",
    ),
    *(
        "train.engines.partition",
        "train.schedule",
        "train.metrics.page",
        "train.metrics.records",
        "train.resilience.incidents",
    ),
}
# what a machine must be able to run is tried by the doctor's checks; what a run would do, by the
# simulation
LAUNCH_ROOMS = {
    "launch/planning/checks.py": {"model.kernels", "data.stream"},
    "launch/simulation": {"data", "model", "train"},
}
TORCH_FREE = (
    "core/command.py",
    "core/entry.py",
    "core/run.py",
    "model/config.py",
    "model/flops.py",
    "model/parameters.py",
    "data/config.py",
    "eval/config.py",
    "train/config.py",
    "train/schedule.py",
    "train/costs/memory.py",
    "train/costs/traffic.py",
    "train/engines/partition.py",
    "launch/attempt.py",
    "launch/dryrun.py",
    "launch/plan.py",
    "launch/planning/estimate.py",
    "launch/planning/layouts.py",
    "launch/submit.py",
)


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Modules of the house that a file imports, wherever in the file; of a package, what is taken
    from it.
    """
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return {name for name in found if name.split(".")[0] in (*FOLDERS, *OUTSIDE)}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    folder = path.parts[0]
    for name in imports(path):
        assert name not in FOLDERS, f"{path}: import {name} hides which part is used"
        if folder == "launch":
            room = next(
                (more for place, more in LAUNCH_ROOMS.items() if str(path).startswith(place)), set()
            )
            assert any(name == may or name.startswith(may + ".") for may in LAUNCH | room), (
                f"{path} imports {name}"
            )
        else:
            assert name.split(".")[0] in MAY_IMPORT[folder], f"{path} imports {name}"


def test_no_files_import_each_other_in_a_circle() -> None:
    below = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    left = set(below)
    while ground := {name for name in left if not below[name] & left}:
        left -= ground
    assert not left, f"in circles, or above one: {sorted(left)}"


def test_some_imports_are_seen() -> None:
    assert "model.mamba" in imports(Path("train/engines/deepspeed.py"))
    assert "train.config" in imports(Path("launch/planning/estimate.py"))
    assert "data.pipeline.accounting" in imports(Path("data/prepare.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_commands_are_at_the_door_and_rooms_behind(folder: str) -> None:
    commands, others = DOORS[folder]
    moved = {Path(path).stem for path in MOVED if path.startswith(f"{folder}/")}
    found = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert found - moved == commands | others, "list it here, or put it into a room"
    assert len(found - moved) <= MOST.get(folder, len(found))
    runnable = {
        path
        for path in SOURCES
        if path.parts[0] == folder and "__main__" in (ROOT / path).read_text()
    }
    # which only name it
    runnable -= {Path("core/command.py"), Path("core/entry.py"), Path("core/log.py")}
    assert {str(path) for path in runnable} == {f"{folder}/{name}.py" for name in commands}


def test_an_imported_file_is_never_runnable() -> None:
    commands = {f"{folder}.{name}" for folder, (names, _) in DOORS.items() for name in names}
    for path in SOURCES:
        assert not imports(path) & commands, f"{path} imports a command"


def test_the_files_of_a_run_are_named_once() -> None:
    """In core/run.py; config.yaml and README.md have namesakes elsewhere (in configs/, in a folder
    to upload).
    """
    names = {path.name for path in vars(RunFiles(Path("run"))).values() if path.suffix} - {
        "config.yaml",
        "README.md",
    }
    assert {"metrics.jsonl", "outcome.json"} <= names
    for path in SOURCES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        spelled = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in names
        }
        assert not spelled or path == Path("core/run.py"), (
            f"{path} spells {sorted(spelled)}: take it from RunFiles"
        )


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_answers_with_the_new_one(old: str) -> None:
    result = python(old, "+experiment=demo")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: this is now: python ") and result.stderr.endswith(
        " +experiment=demo\n"
    )
    assert (
        MOVED[old] in result.stderr
        and (ROOT / MOVED[old].replace(".generation", "/generation.py")).is_file()
    )


def test_no_training_takes_the_cpu_for_a_gpu() -> None:
    """The dry run alone does, whose tensors hold nothing."""
    found = [str(path) for path in SOURCES if "launch.simulation.cuda_on_cpu" in imports(path)]
    assert found == ["launch/simulation/dry_run.py"]


def test_configuration_needs_no_torch() -> None:
    modules = [module_of(Path(name)) for name in TORCH_FREE]
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert python("-c", code).returncode == 0


def test_packages_resolve_to_this_checkout() -> None:
    code = f"import importlib; print([importlib.import_module(m).__file__ for m in {FOLDERS}])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=PATIENCE
    )
    assert all(str(ROOT / folder) in result.stdout for folder in FOLDERS), (
        result.stdout + result.stderr
    )


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_file_hides_the_standard_library(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names, f"{path} would break the scripts beside it"


def test_sizes_stay_readable() -> None:
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text.isascii(), f"{path} is not ASCII"
        assert text.count("\n") <= 350, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 75, f"{path}: {node.name} is too long"


def test_no_pickle_is_read() -> None:
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        for word in ("torch.load", "torch.save", "import pickle", "allow_pickle", "shell=True"):
            assert word not in text, f"{path} uses {word}"

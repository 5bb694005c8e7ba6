"""Rules of the code base: files of each folder, allowed imports, modules without torch, sizes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from core.run import RunFiles
from tests.commands import TIMEOUT_SECONDS, python

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("core", "model", "data", "eval", "train", "launch")

# these import FOLDERS, which must not import them
OUTSIDE = ("benchmarks", "docs", "examples", "tests")

# commands and other modules directly in each folder; all others are in subfolders
TOP_LEVEL: dict[str, tuple[set[str], set[str]]] = {
    "core": (
        set(),
        {
            "command",
            "compose",
            "config_errors",
            "console",
            "credentials",
            "entry",
            "errors",
            "files",
            "launcher",
            "log",
            "old_keys",
            "overrides",
            "quote",
            "ranges",
            "records",
            "run",
            "schema",
            "sweep",
            "templates",
            "units",
        },
    ),
    "model": (
        set(),
        {
            "checkpoint",
            "checkpoint_records",
            "config",
            "decode",
            "find_checkpoint",
            "flops",
            "generation",
            "hf",
            "hf_accelerate",
            "hf_writer",
            "init",
            "mamba",
            "parameters",
            "pretrained",
            "sharding",
        },
    ),
    "data": (
        {"browse", "download", "mixture_report", "prepare", "verify"},
        {"config", "own", "tokenizer", "vocabulary"},
    ),
    "eval": (
        {"check_leakage", "export", "generate", "push", "run"},
        {"config", "heldout", "model_source", "short_keys"},
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
    "launch": (
        {"attempt", "collect", "demo_summary", "doctor", "dryrun", "plan", "status", "submit"},
        {"config"},
    ),
}
MAX_FILES = {"train": 14, "data": 12, "eval": 12, "launch": 12}
MOVED = {  # old paths of commands, which print the new path until version 0.3
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
# sizes a run for a folder of text, which takes the FLOPs of a model
DATA_EXCEPTIONS = {"data/own.py": {"model.config", "model.flops"}}
# launch imports configs and arithmetic of the other folders, and reads the records of runs
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
# exceptions: the doctor tries kernels, the loader and initial weights, the dry run simulates a run
LAUNCH_EXCEPTIONS = {
    "launch/planning/checks.py": {"model.kernels"},
    "launch/planning/run_checks.py": {
        "data.pipeline.settings",
        "data.stream",
        "model.find_checkpoint",
        "model.hf",
    },
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
    "launch/status.py",
    "launch/planning/estimate.py",
    "launch/planning/layouts.py",
    "launch/submit.py",
)


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Modules of this repository that a file imports anywhere, by full name."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in members}
    return {name for name in names if name.split(".")[0] in (*FOLDERS, *OUTSIDE)}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    folder = path.parts[0]
    for name in imports(path):
        assert name not in FOLDERS, f"{path}: import {name} hides which module is used"
        if folder == "launch":
            exceptions = next(
                (
                    names
                    for prefix, names in LAUNCH_EXCEPTIONS.items()
                    if str(path).startswith(prefix)
                ),
                set(),
            )
            assert any(
                name == allowed or name.startswith(allowed + ".") for allowed in LAUNCH | exceptions
            ), f"{path} imports {name}"
        else:
            allowed = name in DATA_EXCEPTIONS.get(str(path), ())
            assert allowed or name.split(".")[0] in MAY_IMPORT[folder], f"{path} imports {name}"


def test_no_circular_imports() -> None:
    imported = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    remaining = set(imported)
    while leaves := {name for name in remaining if not imported[name] & remaining}:
        remaining -= leaves
    assert not remaining, f"in an import cycle, or importing one: {sorted(remaining)}"


def test_imports_are_found() -> None:
    assert "model.mamba" in imports(Path("train/engines/deepspeed.py"))
    assert "train.config" in imports(Path("launch/planning/estimate.py"))
    assert "data.pipeline.accounting" in imports(Path("data/prepare.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_of_each_folder(folder: str) -> None:
    commands, others = TOP_LEVEL[folder]
    moved = {Path(path).stem for path in MOVED if path.startswith(f"{folder}/")}
    names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert names - moved == commands | others, "list it in TOP_LEVEL or move it to a subfolder"
    assert len(names - moved) <= MAX_FILES.get(folder, len(names))
    runnable = {
        path
        for path in SOURCES
        if path.parts[0] == folder and "__main__" in (ROOT / path).read_text()
    }
    # these mention it without being commands
    runnable -= {Path("core/command.py"), Path("core/entry.py"), Path("core/log.py")}
    assert {str(path) for path in runnable} == {f"{folder}/{name}.py" for name in commands}


def test_no_module_imports_a_command() -> None:
    commands = {f"{folder}.{name}" for folder, (names, _) in TOP_LEVEL.items() for name in names}
    for path in SOURCES:
        assert not imports(path) & commands, f"{path} imports a command"


def test_file_names_of_a_run_are_defined_once() -> None:
    """They are defined in core/run.py. config.yaml and README.md also name other files."""
    names = {path.name for path in vars(RunFiles(Path("run"))).values() if path.suffix} - {
        "config.yaml",
        "README.md",
    }
    assert {"metrics.jsonl", "outcome.json"} <= names
    for path in SOURCES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        literals = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in names
        }
        assert not literals or path == Path("core/run.py"), (
            f"{path} contains {sorted(literals)}: use RunFiles"
        )


@pytest.mark.parametrize("old", MOVED)
def test_old_path_of_a_command_names_the_new_one(old: str) -> None:
    result = python(old, "+experiment=demo")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: this is now: python ") and result.stderr.endswith(
        " +experiment=demo\n"
    )
    assert (
        MOVED[old] in result.stderr
        and (ROOT / MOVED[old].replace(".generation", "/generation.py")).is_file()
    )


def test_only_the_dry_run_imports_cuda_on_cpu() -> None:
    paths = [str(path) for path in SOURCES if "launch.simulation.cuda_on_cpu" in imports(path)]
    assert paths == ["launch/simulation/dry_run.py"]


def test_torch_free_modules_do_not_import_torch() -> None:
    modules = [module_of(Path(name)) for name in TORCH_FREE]
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert python("-c", code).returncode == 0


def test_packages_resolve_to_this_checkout() -> None:
    code = f"import importlib; print([importlib.import_module(m).__file__ for m in {FOLDERS}])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert all(str(ROOT / folder) in result.stdout for folder in FOLDERS), (
        result.stdout + result.stderr
    )


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_file_shadows_the_standard_library(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names, (
        f"{path} shadows a module of the standard library"
    )


def test_file_and_function_sizes() -> None:
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text.isascii(), f"{path} is not ASCII"
        assert text.count("\n") <= 350, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 75, f"{path}: {node.name} is too long"


def test_no_pickle_and_no_shell() -> None:
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        for word in ("torch.load", "torch.save", "import pickle", "allow_pickle", "shell=True"):
            assert word not in text, f"{path} uses {word}"

"""The wheel: its files, the dependencies without extras, and commands from a user's folder."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.commands import TIMEOUT_SECONDS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("core", "model", "data", "eval", "train", "launch", "configs", "examples")
PACKAGED = (
    "*.py",
    "*.yaml",
    "*.jinja",
    "*.sbatch",
    "*.cpp",
    "*.h",
    "*.cu",
    "*.cuh",
    "py.typed",
    "env.sh",
)
# packages of the extras that no base package depends on
NOT_IN_BASE = (
    "hydra omegaconf megatron deepspeed wandb rich matplotlib psutil datatrove spacy xxhash "
    "tldextract fasttext pyarrow orjson loguru warcio tokenizers transformers lm_eval accelerate "
    "huggingface_hub mamba_ssm"
).split()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / "sources" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "sources" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "-w", str(folder), str(folder / "sources")], check=True, timeout=TIMEOUT_SECONDS
    )
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A working folder whose files have the names of our packages."""
    (tmp_path / "data").mkdir()
    for name in ("data/__init__.py", "model.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of the user was imported')\n")
    (tmp_path / "configs").mkdir()
    return tmp_path


def python(
    site: Path, user_folder: Path, *arguments: str, absent: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in the user's folder with the wheel, and with the `absent` packages blocked."""
    path_entry = user_folder / "first-on-the-path"
    path_entry.mkdir(exist_ok=True)
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({absent or []}))\n"
    (path_entry / "sitecustomize.py").write_text(blocked)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{path_entry}:{site}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=user_folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def test_files_that_commands_read_are_packaged(site: Path) -> None:
    expected = {
        path.relative_to(ROOT)
        for name in SOURCES
        for pattern in PACKAGED
        for path in (ROOT / name).rglob(pattern)
    }
    assert {path.suffix for path in expected} >= {
        ".py",
        ".yaml",
        ".sbatch",
        ".cpp",
        ".cu",
        ".typed",
    }
    assert sorted(path for path in expected if not (site / path).is_file()) == []


def test_install_without_extras_trains_saves_loads_and_generates(
    site: Path, user_folder: Path
) -> None:
    """The example runs from a user's folder without packages of any extra."""
    result = python(site, user_folder, "-m", "examples.train_by_hand", absent=NOT_IN_BASE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("after 5 6 7: 8 9 10 11 12 13 14 15\n")
    assert "cpu kernels" in result.stdout


def test_install_without_extras_imports_every_module_of_the_model(
    site: Path, user_folder: Path
) -> None:
    code = """import importlib, pkgutil
import model
# these import megatron-core, and transformers
further = ("model.parallel.tensor", "model.parallel.sequence", "model.hf_accelerate")
names = [module.name for module in pkgutil.walk_packages(model.__path__, "model.")]
print(len([importlib.import_module(name) for name in names if name not in further]))"""
    result = python(site, user_folder, "-P", "-c", code, absent=NOT_IN_BASE)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20


@pytest.mark.parametrize(
    "module, absent, extra",
    [
        ("train.pretrain", "hydra", "train"),
        ("launch.plan", "rich", "train"),
        ("data.prepare", "datatrove", "data"),
        ("data.download", "fsspec", "data"),
        ("eval.run", "omegaconf", "eval"),
        ("examples.make_demo_corpus", "warcio", "data"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(
    site: Path, user_folder: Path, module: str, absent: str, extra: str
) -> None:
    result = python(site, user_folder, "-P", "-m", module, "+experiment=demo", absent=[absent])
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith(f": pip install 'falcon-mamba-pretrain[{extra}]'\n")


def test_a_missing_module_of_no_extra_keeps_its_traceback(site: Path, user_folder: Path) -> None:
    code = "from core.entry import explain_missing_extras as x; x(); import no_such_module"
    result = python(site, user_folder, "-P", "-c", code)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_files_of_the_user_do_not_shadow_ours(site: Path, user_folder: Path) -> None:
    """The run reports its missing data, and names the file that makes -P necessary."""
    result = python(site, user_folder, "-m", "train.pretrain", "+experiment=demo")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "`python -P -m data.prepare`" in result.stderr
    assert result.stderr.endswith("(-P: data/__init__.py shadows our package data)\n")
    (user_folder / "data" / "__init__.py").unlink()
    result = python(site, user_folder, "-m", "train.pretrain", "+experiment=demo")
    assert "`python -m data.prepare`" in result.stderr and "shadows" not in result.stderr


def test_torchrun_names_the_file_that_shadows_its_command(site: Path, user_folder: Path) -> None:
    (user_folder / "train.py").write_text("raise SystemExit('a file of the user was imported')\n")
    torchrun = ["-P", "-m", "torch.distributed.run", "--standalone", "-m", "train.pretrain"]
    result = python(site, user_folder, *torchrun, "+experiment=demo")
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == (
        "error: train.py shadows our package train: rename it, or PYTHONSAFEPATH=1 torchrun ..."
    )


@pytest.mark.parametrize("module", ["data.prepare", "train.pretrain"])
def test_help_shows_commands_of_a_wheel(site: Path, user_folder: Path, module: str) -> None:
    """Includes commands that continue on a second line."""
    result = python(site, user_folder, "-P", "-m", module, "--help")
    assert result.returncode == 0, result.stderr
    assert f"-m {module} +experiment=" in result.stdout
    examples = result.stdout.split("examples:")[1].split("A run is chosen")[0]
    assert not re.search(r"[a-z]/\w+\.py \+", examples), examples


def test_the_falcon_mamba_script_ignores_files_of_the_user(site: Path, user_folder: Path) -> None:
    """Runs the entry point that the wheel installs as `falcon-mamba`."""
    shutil.copy(user_folder / "model.py", user_folder / "core.py")
    # Python puts the folder of the script on the path, not the working folder
    script = user_folder / "bin" / "falcon-mamba"
    script.parent.mkdir()
    script.write_text("from core.entry import run_command\nrun_command()\n")
    result = python(
        site, user_folder, str(script), "data.prepare", "+experiment=demo", "data.sources=3"
    )
    assert result.returncode == 2 and result.stderr.startswith("error: data.sources"), result.stderr
    result = python(site, user_folder, str(script), "data.no_such_command")
    assert result.returncode == 2 and "falcon-mamba data.prepare" in result.stderr


def test_a_copy_of_the_example_uses_the_installed_packages(site: Path, user_folder: Path) -> None:
    (user_folder / "scripts").mkdir()
    copy = shutil.copy(
        ROOT / "examples" / "train_by_hand.py", user_folder / "scripts" / "example.py"
    )
    result = python(site, user_folder, str(copy))
    assert result.returncode == 0, result.stderr

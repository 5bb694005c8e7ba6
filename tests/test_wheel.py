"""The wheel: what travels in it, what its base needs, and what a command says in a folder of the
user's.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.commands import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("core", "model", "data", "eval", "train", "launch", "configs", "examples")
TRAVELS = (
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
# of the extras; tqdm and the like come along with others
NOT_IN_BASE = (
    "hydra omegaconf megatron deepspeed wandb rich matplotlib psutil datatrove spacy xxhash "
    "tldextract fasttext pyarrow orjson loguru warcio tokenizers transformers lm_eval accelerate "
    "huggingface_hub mamba_ssm"
).split()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / "sources" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "sources" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "-w", str(folder), str(folder / "sources")], check=True, timeout=PATIENCE
    )
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of the user's with a package, a module and a folder of our packages' names."""
    (tmp_path / "data").mkdir()
    for name in ("data/__init__.py", "model.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of the user was imported')\n")
    (tmp_path / "configs").mkdir()
    return tmp_path


def python(
    site: Path, home: Path, *words: str, absent: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Start Python in the user's folder with the wheel installed and some packages not."""
    first = home / "first-on-the-path"
    first.mkdir(exist_ok=True)
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({absent or []}))\n"
    (first / "sitecustomize.py").write_text(blocked)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{first}:{site}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *words],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_what_commands_read_travels(site: Path) -> None:
    wanted = {
        path.relative_to(ROOT)
        for name in SOURCES
        for pattern in TRAVELS
        for path in (ROOT / name).rglob(pattern)
    }
    assert {path.suffix for path in wanted} >= {".py", ".yaml", ".sbatch", ".cpp", ".cu", ".typed"}
    assert sorted(path for path in wanted if not (site / path).is_file()) == []


def test_the_base_trains_saves_loads_and_generates(site: Path, home: Path) -> None:
    """By an example, from a folder of the user's, with no package of any extra."""
    result = python(site, home, "-m", "examples.train_by_hand", absent=NOT_IN_BASE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("after 5 6 7: 8 9 10 11 12 13 14 15\n")
    assert "cpu kernels" in result.stdout and "reference kernels" in result.stdout


def test_the_base_imports_every_part_of_the_model(site: Path, home: Path) -> None:
    code = """import importlib, pkgutil
import model
sharded = ("model.parallel.tensor", "model.parallel.sequence")  # on megatron-core's groups
names = [part.name for part in pkgutil.walk_packages(model.__path__, "model.")]
print(len([importlib.import_module(name) for name in names if name not in sharded]))"""
    result = python(site, home, "-P", "-c", code, absent=NOT_IN_BASE)
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
    site: Path, home: Path, module: str, absent: str, extra: str
) -> None:
    result = python(site, home, "-P", "-m", module, "+experiment=demo", absent=[absent])
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith(f": pip install 'falcon-mamba-pretrain[{extra}]'\n")


def test_a_foreign_module_keeps_its_traceback(site: Path, home: Path) -> None:
    code = "from core.entry import explain_missing_extras as x; x(); import no_such_module"
    result = python(site, home, "-P", "-c", code)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_files_of_the_user_do_not_hide_ours(site: Path, home: Path) -> None:
    """The run gets as far as its missing data, and names the file that forbids a plain -m."""
    result = python(site, home, "-m", "train.pretrain", "+experiment=demo")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "`python -P -m data.prepare`" in result.stderr
    assert result.stderr.endswith("(-P: data/__init__.py shadows our package data)\n")
    (home / "data" / "__init__.py").unlink()
    result = python(site, home, "-m", "train.pretrain", "+experiment=demo")
    assert "`python -m data.prepare`" in result.stderr and "shadows" not in result.stderr


def test_torchrun_names_the_file_that_hides_its_command(site: Path, home: Path) -> None:
    (home / "train.py").write_text("raise SystemExit('a file of the user was imported')\n")
    torchrun = ["-P", "-m", "torch.distributed.run", "--standalone", "-m", "train.pretrain"]
    result = python(site, home, *torchrun, "+experiment=demo")
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == (
        "error: train.py shadows our package train: rename it, or PYTHONSAFEPATH=1 torchrun ..."
    )


@pytest.mark.parametrize("module", ["data.prepare", "train.pretrain"])
def test_help_shows_commands_as_a_wheel_has_them(site: Path, home: Path, module: str) -> None:
    """Also where a command goes on in a second line."""
    result = python(site, home, "-P", "-m", module, "--help")
    assert result.returncode == 0, result.stderr
    assert f"-m {module} +experiment=" in result.stdout
    examples = result.stdout.split("examples:")[1].split("A run is chosen")[0]
    assert not re.search(r"[a-z]/\w+\.py \+", examples), examples


def test_one_script_starts_every_command_beside_any_file(site: Path, home: Path) -> None:
    """By what the wheel installs as `falcon-mamba`, with the working folder first on the path."""
    shutil.copy(home / "model.py", home / "core.py")
    script = home / "bin" / "falcon-mamba"  # a script's own folder is first, not the working one
    script.parent.mkdir()
    script.write_text("from core.entry import run_command\nrun_command()\n")
    result = python(site, home, str(script), "data.prepare", "+experiment=demo", "data.sources=3")
    assert result.returncode == 2 and result.stderr.startswith("error: data.sources"), result.stderr
    result = python(site, home, str(script), "data.no_such_command")
    assert result.returncode == 2 and "falcon-mamba data.prepare" in result.stderr


def test_a_copy_of_the_example_finds_what_is_installed(site: Path, home: Path) -> None:
    (home / "mine").mkdir()
    copy = shutil.copy(ROOT / "examples" / "train_by_hand.py", home / "mine" / "mine.py")
    result = python(site, home, str(copy))
    assert result.returncode == 0, result.stderr

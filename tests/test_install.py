"""launch/install.sh, and constraints.txt compared with the installed packages."""

import os
import re
import shutil
import subprocess
import sysconfig
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# from the metadata of PyPI's wheels: torch -> cuda-toolkit, and cuda-toolkit -> nvrtc
TOOLKIT = {"2.13.0": "13.0.3.0"}
NVRTC = {"13.0.3.0": "13.0.88"}
# a fake python, and a fake pip in the venv that it creates
FAKE_PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && exit
mkdir -p .venv/bin
cat > .venv/bin/pip <<'END'
#!/usr/bin/env bash
for number in $(seq 300); do echo "Collecting package-$number"; done
echo "last line: $*"
exit "$PIP_EXIT_CODE"
END
chmod +x .venv/bin/pip
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return {
        canonical(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)
    }


def test_cuda_toolkit_and_nvrtc_match_torch() -> None:
    """With another NVRTC, `make install` finds no solution on a GPU machine."""
    pinned = pins("constraints.txt")
    assert pinned["cuda-toolkit"] == TOOLKIT[pinned["torch"]]
    assert pinned["nvidia-cuda-nvrtc"] == NVRTC[pinned["cuda-toolkit"]]
    for requirement in requires("torch") or []:  # a CPU build requires no toolkit
        if match := re.match(r"cuda-toolkit\S*?==([\d.]+)", requirement):
            assert pinned["cuda-toolkit"] == f"{match[1]}.0"


def test_constraints_in_is_a_subset_of_constraints_txt() -> None:
    direct = pins("constraints.in")
    closure = pins("constraints.txt")
    assert len(closure) > 4 * len(direct) > 0
    assert {name: closure.get(name) for name in direct} == direct


def test_installed_versions_are_the_pinned_ones() -> None:
    """A local version such as 2.13.0+cpu counts as 2.13.0."""
    closure = pins("constraints.txt")
    # not sys.path, to which setuptools adds its vendored packages
    installed = distributions(path=[sysconfig.get_path("purelib")])
    versions = {canonical(each.metadata["Name"]): each.version for each in installed}
    shared = versions.keys() & closure.keys()
    different = {
        name: versions[name] for name in shared if versions[name].split("+")[0] != closure[name]
    }
    assert len(shared) > 100 and different == {}, (
        "make install installs the versions of constraints.txt"
    )


def install(
    folder: Path, torch: str = "", pip_exit_code: str = "0", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run launch/install.sh with fake python and pip."""
    (folder / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "install.sh", folder / "launch")
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / "python").write_text(FAKE_PYTHON)
    (folder / "python").chmod(0o755)
    environment = {**os.environ, "PYTHON": str(folder / "python"), "TORCH": torch}
    return subprocess.run(
        [folder / "launch" / "install.sh"],
        env={**environment, "PIP_EXIT_CODE": pip_exit_code, **more},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_install_prints_little_and_logs_everything(tmp_path: Path) -> None:
    result = install(tmp_path)
    assert result.returncode == 0 and result.stdout.count("\n") < 10, result.stdout
    assert result.stdout.startswith("installing into .venv")
    log = (tmp_path / ".venv" / "install.log").read_text().splitlines()
    assert len(log) == 301
    assert log[-1].endswith("-c constraints.txt -e .[all,dev]")


def test_without_a_compiler_it_installs_with_a_word(tmp_path: Path) -> None:
    result = install(tmp_path, CXX="/none -O2")
    assert result.returncode == 0 and "no /none: the CPU kernels" in result.stdout


def test_failed_install_shows_the_end_of_the_log(tmp_path: Path) -> None:
    result = install(tmp_path, pip_exit_code="1")
    assert result.returncode == 1
    assert "last line: install" in result.stderr and "package-1\n" not in result.stderr
    assert result.stderr.endswith("error: pip failed; see .venv/install.log\n")


def test_cpu_torch_comes_from_its_own_index(tmp_path: Path) -> None:
    assert install(tmp_path, torch="cpu").returncode == 0
    log = (tmp_path / ".venv" / "install.log").read_text().splitlines()
    first, second = (line for line in log if line.startswith("last line"))
    index = "--index-url https://download.pytorch.org/whl/cpu"
    release = pins("constraints.txt")["torch"]
    assert first.endswith(f"-c constraints.txt --no-deps {index} torch=={release}+cpu")
    assert second.endswith("-c constraints.txt -e .[all,dev]")


def test_unknown_torch_is_refused(tmp_path: Path) -> None:
    result = install(tmp_path, torch="rocm")
    assert result.returncode == 2 and "TORCH=rocm is unknown" in result.stderr


@pytest.mark.parametrize("recipe", ["Dockerfile", "falcon-mamba.def"])
def test_containers_install_pinned_versions_and_are_marked_untested(recipe: str) -> None:
    text = (ROOT / "launch" / "containers" / recipe).read_text(encoding="utf-8")
    assert text.startswith("# UNTESTED")
    commands = re.findall(r"pip install .*", text)
    assert len(commands) == 2 and all("-c /src/constraints.txt" in line for line in commands)
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in text and "--no-build-isolation" in commands[1]

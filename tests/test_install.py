"""What `make install` does, and what constraints.txt pins: all that the tests run with, beside a
torch that brings CUDA along, seen without one.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# read in the metadata of PyPI's wheels: a torch -> its cuda-toolkit, and a cuda-toolkit -> its
# nvrtc
TOOLKIT = {"2.13.0": "13.0.3.0"}
NVRTC = {"13.0.3.0": "13.0.88"}
# stands for python and for the pip that `python -m venv` brings
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && exit
mkdir -p .venv/bin
cat > .venv/bin/pip <<'END'
#!/usr/bin/env bash
for number in $(seq 300); do echo "Collecting package-$number"; done
echo "said last: $*"
exit "$PIP_ENDS"
END
chmod +x .venv/bin/pip
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return {canonical(name): is_ for name, is_ in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}


def test_the_compiler_is_of_the_toolkit_that_torch_asks_for() -> None:
    """A new torch is first looked up: another NVRTC here, and `make install` finds no solution on a
    GPU machine.
    """
    pinned = pins("constraints.txt")
    assert pinned["cuda-toolkit"] == TOOLKIT[pinned["torch"]]
    assert pinned["nvidia-cuda-nvrtc"] == NVRTC[pinned["cuda-toolkit"]]
    for requirement in requires("torch") or []:  # names no toolkit where the build is for CPUs
        if found := re.match(r"cuda-toolkit\S*?==([\d.]+)", requirement):
            assert pinned["cuda-toolkit"] == f"{found[1]}.0"


def test_what_is_pinned_by_hand_is_in_the_closure() -> None:
    direct, closure = pins("constraints.in"), pins("constraints.txt")
    assert len(closure) > 4 * len(direct) > 0
    assert {name: closure.get(name) for name in direct} == direct


def test_the_tests_run_with_the_closure() -> None:
    """A local build of a release (torch 2.13.0+cpu) is that release."""
    closure = pins("constraints.txt")
    # not sys.path, to which setuptools adds packages of its own when somebody imports it
    installed = distributions(path=[sysconfig.get_path("purelib")])
    have = {canonical(each.metadata["Name"]): each.version for each in installed}
    shared = have.keys() & closure.keys()
    other = {name: have[name] for name in shared if have[name].split("+")[0] != closure[name]}
    assert len(shared) > 100 and other == {}, "make install brings what constraints.txt has"


def install(folder: Path, torch: str = "", pip_ends: str = "0") -> subprocess.CompletedProcess[str]:
    """launch/install.sh with stand-ins for python and pip."""
    (folder / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "install.sh", folder / "launch")
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    environment = {**os.environ, "PYTHON": str(folder / "python"), "TORCH": torch}
    return subprocess.run(
        [folder / "launch" / "install.sh"],
        env={**environment, "PIP_ENDS": pip_ends},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_installing_says_little_and_logs_all(tmp_path: Path) -> None:
    result = install(tmp_path)
    assert result.returncode == 0 and result.stdout.count("\n") < 10, result.stdout
    assert result.stdout.startswith("installing into .venv")
    log = (tmp_path / ".venv" / "install.log").read_text().splitlines()
    assert len(log) == 301
    assert log[-1].endswith("-c constraints.txt -e .[all,dev]")


def test_a_failed_installation_shows_its_end_and_where_the_rest_is(tmp_path: Path) -> None:
    result = install(tmp_path, pip_ends="1")
    assert result.returncode == 1
    assert "said last: install" in result.stderr and "package-1\n" not in result.stderr
    assert result.stderr.endswith("error: pip failed; .venv/install.log has all it said\n")


def test_a_torch_without_cuda_comes_from_its_own_index(tmp_path: Path) -> None:
    assert install(tmp_path, torch="cpu").returncode == 0
    log = (tmp_path / ".venv" / "install.log").read_text().splitlines()
    first, second = (line for line in log if line.startswith("said last"))
    index = "--index-url https://download.pytorch.org/whl/cpu"
    release = pins("constraints.txt")["torch"]
    assert first.endswith(f"-c constraints.txt --no-deps {index} torch=={release}+cpu")
    assert second.endswith("-c constraints.txt -e .[all,dev]")


def test_another_torch_is_refused(tmp_path: Path) -> None:
    result = install(tmp_path, torch="rocm")
    assert result.returncode == 2 and "TORCH=rocm is unknown" in result.stderr


@pytest.mark.parametrize("recipe", ["Dockerfile", "falcon-mamba.def"])
def test_containers_install_what_is_pinned_and_say_that_nobody_tried(recipe: str) -> None:
    text = (ROOT / "launch" / "containers" / recipe).read_text(encoding="utf-8")
    assert text.startswith("# UNTESTED")
    commands = re.findall(r"pip install .*", text)
    assert len(commands) == 2 and all("-c /src/constraints.txt" in line for line in commands)
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in text and "--no-build-isolation" in commands[1]

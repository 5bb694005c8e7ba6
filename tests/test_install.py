"""What constraints.txt pins can be installed beside a torch that brings CUDA along, seen without
one.
"""

import re
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# read in the metadata of PyPI's wheels: a torch -> its cuda-toolkit, and a cuda-toolkit -> its
# nvrtc
TOOLKIT = {"2.13.0": "13.0.3.0"}
NVRTC = {"13.0.3.0": "13.0.88"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_compiler_is_of_the_toolkit_that_torch_asks_for() -> None:
    """A new torch is first looked up: another NVRTC here, and `make install` finds no solution on a
    GPU machine.
    """
    pinned = pins()
    assert pinned["cuda-toolkit"] == TOOLKIT[pinned["torch"].removesuffix("+cpu")]
    assert pinned["nvidia-cuda-nvrtc"] == NVRTC[pinned["cuda-toolkit"]]
    for requirement in requires("torch") or []:  # names no toolkit where the build is for CPUs
        if found := re.match(r"cuda-toolkit\S*?==([\d.]+)", requirement):
            assert pinned["cuda-toolkit"] == f"{found[1]}.0"

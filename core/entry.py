"""What every command does first, and how commands are called in a checkout and from a wheel.

Neither hydra nor any other package of an extra is imported here.
"""

import os
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import TracebackType

from core.errors import exit_with_error
from core.files import ROOT

DISTRIBUTION = "falcon-mamba-pretrain"
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()
# packages that are imported by another name than they are installed by
DISTRIBUTION_OF_MODULE = {
    "ahocorasick": "pyahocorasick",
    "cuda": "cuda-core",
    "fasttext": "fasttext-numpy2-wheel",
    "hydra": "hydra-core",
    "megatron": "megatron-core",
}
COMMAND_FOLDERS = ("data", "eval", "examples", "launch", "train")
EXTRA_OF_FOLDER = {"launch": "train", "examples": "data"}  # others are named like their extra
COMMAND_PATTERN = re.compile(
    r"\b(python|torchrun\b(?:[^\n]|\\\n)*?) +(data|eval|examples|launch|train)/(\w+)\.py"
)


def explain_missing_extras() -> None:
    """End the process in one line when an import fails for want of an extra.

    Commands call this between the line that mends sys.path and their other imports.
    """
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ModuleNotFoundError) and extra_for_module(error.name or ""):
            exit_with_error(f"{error}: {install_command(error.name or '')}")
        shown(kind, error, trace)

    sys.excepthook = hook


def run_command() -> None:
    """`falcon-mamba FOLDER.COMMAND ...`: a command of ours, whatever the working folder holds."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    folder, _, command = name.partition(".")
    if folder not in COMMAND_FOLDERS or not (ROOT / folder / f"{command}.py").is_file():
        exit_with_error("name a command, such as falcon-mamba data.prepare +experiment=demo")
    del sys.argv[1]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def install_command(module: str) -> str:
    """The command that installs what brings a module: an extra, or the package of that name."""
    extra = extra_for_module(module)
    return f"pip install {module}" if extra is None else f"pip install '{DISTRIBUTION}[{extra}]'"


def extra_for_module(module: str) -> str | None:
    """The extra that brings a module: that of the running command's folder if it does, else the
    first. None for a module of no extra, and where the package was not installed by pip.
    """
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    top = module.split(".")[0]
    name = normalize_name(DISTRIBUTION_OF_MODULE.get(top, top))
    listed = [re.match(r"([\w.-]+).*\bextra == ['\"](\w+)", line) for line in requirements]
    extras = [found[2] for found in listed if found and normalize_name(found[1]) == name]
    folder = Path(sys.argv[0]).resolve().parent.name
    wanted = EXTRA_OF_FOLDER.get(folder, folder)
    return wanted if wanted in extras else next(iter(extras), None)


def normalize_name(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def shadowing_file(package: str) -> Path | None:
    """The file in the working folder that `python -m` imports in place of our package, or None.

    A folder without __init__.py hides nothing, and neither does any with PYTHONSAFEPATH.
    """
    if os.environ.get("PYTHONSAFEPATH") or Path.cwd() == ROOT:
        return None
    files = (Path(package, "__init__.py"), Path(f"{package}.py"))
    return next((path for path in files if path.is_file()), None)


def format_commands(text: str) -> str:
    """A text whose commands are called as they are here: `python -m data.prepare` from a wheel,
    `python data/prepare.py` in a checkout; and which of the user's files forbids a plain -m.
    """
    if IS_CHECKOUT:
        return text
    hidden = {
        name: file for _, name, _ in COMMAND_PATTERN.findall(text) if (file := shadowing_file(name))
    }

    def call(found: re.Match[str]) -> str:
        start, package, command = found.groups()
        safe = " -P" if package in hidden and start == "python" else ""
        return f"{start}{safe} -m {package}.{command}"

    reasons = [f" (-P: {file} hides our package {name})" for name, file in hidden.items()]
    return COMMAND_PATTERN.sub(call, text) + "".join(reasons)

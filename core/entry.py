"""Entry of every command: missing extras, and command lines in a checkout or from a wheel.

Imports neither hydra nor any other package of an extra.
"""

import locale
import os
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import TracebackType

from core.errors import InputError, exit_with_error, print_error
from core.files import ROOT

DISTRIBUTION = "falcon-mamba-pretrain"
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()
# import names that differ from the distribution's name
DISTRIBUTION_OF_MODULE = {
    "ahocorasick": "pyahocorasick",
    "cchardet": "faust-cchardet",
    "cuda": "cuda-core",
    "fasttext": "fasttext-numpy2-wheel",
    "hydra": "hydra-core",
    "megatron": "megatron-core",
}
COMMAND_FOLDERS = ("data", "eval", "examples", "launch", "train")
EXTRA_OF_FOLDER = {"launch": "train", "examples": "data"}  # other folders: an extra of their name
COMMAND_PATTERN = re.compile(
    r"\b(python|torchrun\b(?:[^\n]|\\\n)*?) +(data|eval|examples|launch|train)/(\w+)\.py"
)


def explain_missing_extras() -> None:
    """Exit with a one-line error when an import fails because an extra is not installed.

    Ctrl-C is one line, too, until a command handles it. Under a locale without UTF-8, in which
    torch cannot be imported, the command starts again in Python's UTF-8 mode. Commands call this
    after they set sys.path and before their other imports.
    """
    if locale.getencoding().lower() != "utf-8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    default_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ModuleNotFoundError) and extra_for_module(error.name or ""):
            exit_with_error(f"{error}: {install_command(error.name or '')}")
        if issubclass(kind, InputError | OSError) and os.environ.get("HYDRA_FULL_ERROR") != "1":
            exit_with_error(format_commands(str(error)))
        if kind is KeyboardInterrupt:
            print_error("stopped by Ctrl-C")
            return  # Python then ends by SIGINT, as shells expect
        default_hook(kind, error, trace)

    sys.excepthook = hook


def run_command() -> None:
    """`falcon-mamba FOLDER.COMMAND ...`: run a command; the working folder cannot shadow it."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    folder, _, command = name.partition(".")
    if folder not in COMMAND_FOLDERS or not (ROOT / folder / f"{command}.py").is_file():
        exit_with_error("name a command, such as falcon-mamba data.prepare +experiment=demo")
    del sys.argv[1]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def install_command(module: str) -> str:
    """The pip command that installs a module: by its extra, or else by the module's own name."""
    extra = extra_for_module(module)
    return f"pip install {module}" if extra is None else f"pip install '{DISTRIBUTION}[{extra}]'"


def extra_for_module(module: str) -> str | None:
    """The extra that installs a module, preferably that of the running command's folder.

    None if no extra has the module, or if this package was not installed by pip.
    """
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    top = module.split(".")[0]
    name = normalize_name(DISTRIBUTION_OF_MODULE.get(top, top))
    matches = [re.match(r"([\w.-]+).*\bextra == ['\"](\w+)", line) for line in requirements]
    extras = [match[2] for match in matches if match and normalize_name(match[1]) == name]
    folder = Path(sys.argv[0]).resolve().parent.name
    preferred = EXTRA_OF_FOLDER.get(folder, folder)
    return preferred if preferred in extras else next(iter(extras), None)


def normalize_name(name: str) -> str:
    """Normalize a distribution's name as package indexes do (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def shadowing_file(package: str) -> Path | None:
    """The file in the working folder that `python -m` would import instead of our package, or None.

    A folder without __init__.py shadows nothing, and with PYTHONSAFEPATH no file does.
    """
    if os.environ.get("PYTHONSAFEPATH") or Path.cwd() == ROOT:
        return None
    files = (Path(package, "__init__.py"), Path(f"{package}.py"))
    return next((path for path in files if path.is_file()), None)


def format_commands(text: str) -> str:
    """Rewrite the commands in a text for this installation: unchanged in a checkout,
    `python -m data.prepare` from a wheel, with -P and the reason where a user's file shadows it.
    """
    if IS_CHECKOUT:
        return text
    shadowed = {
        name: file for _, name, _ in COMMAND_PATTERN.findall(text) if (file := shadowing_file(name))
    }

    def replacement(match: re.Match[str]) -> str:
        start, package, command = match.groups()
        safe = " -P" if package in shadowed and start == "python" else ""
        return f"{start}{safe} -m {package}.{command}"

    reasons = [f" (-P: {file} shadows our package {name})" for name, file in shadowed.items()]
    return COMMAND_PATTERN.sub(replacement, text) + "".join(reasons)

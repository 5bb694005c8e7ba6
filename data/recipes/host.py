"""The text every Python carries: which standard modules exist, and which source may read which.

A module's source text, its docstrings and its rendered help share sentences, so every module belongs to exactly one
source: otherwise a held-out page would be trained on as code. Submodules go with their top-level package.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Test suites, programs, bundled wheels, and the topics, which are the curated source.
SKIPPED_PARTS = {"__pycache__", "test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages"}
SKIPPED_PARTS |= {"_bundled", "pydoc_data", "__main__.py", "__phello__"}

# Rendering help imports the module, so only these may become web pages: importing them starts nothing and opens no
# window or browser (`this` prints, `antigravity` browses, tkinter wants a display).
IMPORTABLE = frozenset(
    "abc argparse ast asyncio base64 bdb bisect bz2 calendar cmd codecs codeop collections colorsys compileall "  # noqa: SIM905
    "concurrent configparser contextlib contextvars copy copyreg csv dataclasses datetime dbm decimal difflib dis "
    "doctest email enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob "
    "graphlib gzip hashlib heapq hmac html http imaplib inspect io ipaddress json keyword linecache locale logging "
    "lzma mailbox mimetypes modulefinder multiprocessing netrc numbers opcode operator optparse pathlib pdb pickle "
    "pickletools pkgutil plistlib poplib posixpath pprint profile pstats py_compile pyclbr queue quopri random re "
    "reprlib runpy sched secrets selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat "
    "statistics string stringprep struct subprocess symtable tabnanny tarfile tempfile textwrap threading timeit "
    "token tokenize tomllib trace traceback tracemalloc types typing unittest urllib uuid venv wave weakref "
    "webbrowser wsgiref xml xmlrpc zipapp zipfile zoneinfo".split()
)

# Of a hundred top-level modules: how many become web pages, and how many of the rest technical text; what remains is
# source code. Chosen so that the demo reads no source more than a few times.
WEB_SHARE, TECHNICAL_SHARE = 50, 20  # of the importable ones
OTHER_TECHNICAL_SHARE = 25


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the running Python's standard library that is prose or code of its own."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata holds the paths of the machine that built Python.
        if SKIPPED_PARTS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        found[".".join(relative.with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def recipe_of(module: str) -> str:
    """The one recipe that may read a module: "web", "technical" or "source_code"; depends on nothing but the name."""
    top = module.split(".")[0]
    bucket = int(hashlib.sha256(top.encode()).hexdigest(), 16) % 100
    if top not in IMPORTABLE:
        return "technical" if bucket < OTHER_TECHNICAL_SHARE else "source_code"
    if bucket < WEB_SHARE:
        return "web"
    return "technical" if bucket < WEB_SHARE + TECHNICAL_SHARE else "source_code"


def modules_of(recipe: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of the modules that a recipe may read, in a fixed order."""
    return ((name, path) for name, path in modules().items() if recipe_of(name) == recipe)

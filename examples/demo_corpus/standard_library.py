"""Text of Python's standard library: help pages, code, reference pages and language chapters.

The code, docstrings and help page of a module share sentences. Every module therefore belongs to
one source only; otherwise a held-out page would be trained on as code. Submodules belong to the
source of their top-level package.
"""

import ast
import hashlib
import importlib
import inspect
import pydoc
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

Row = dict[str, Any]

# test suites, programs, bundled wheels, and the topics, which are the curated source
SKIPPED_NAMES = {
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "turtledemo",
    "site-packages",
    "dist-packages",
}
SKIPPED_NAMES |= {"_bundled", "pydoc_data", "__main__.py", "__phello__"}

# Rendering help imports the module, so web pages come only from modules without side effects on
# import (`this` prints, `antigravity` opens a browser, tkinter needs a display).
IMPORTABLE = frozenset(
    "abc argparse ast asyncio base64 bdb bisect bz2 calendar cmd codecs codeop collections "
    "colorsys compileall concurrent configparser contextlib contextvars copy copyreg csv "
    "dataclasses datetime dbm decimal difflib dis doctest email enum filecmp fileinput fnmatch "
    "fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib "
    "heapq hmac html http imaplib inspect io ipaddress json keyword linecache locale logging "
    "lzma mailbox mimetypes modulefinder multiprocessing netrc numbers opcode operator optparse "
    "pathlib pdb pickle pickletools pkgutil plistlib poplib posixpath pprint profile pstats "
    "py_compile pyclbr queue quopri random re reprlib runpy sched secrets selectors shelve shlex "
    "shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string stringprep "
    "struct subprocess symtable tabnanny tarfile tempfile textwrap threading timeit token "
    "tokenize tomllib trace traceback tracemalloc types typing unittest urllib uuid venv wave "
    "weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zoneinfo".split()
)

# Percent of top-level modules per source; the others are code. Chosen so that the demo repeats no
# source more than a few times.
WEB_PERCENT = 50  # of importable modules
TECHNICAL_PERCENT = 20  # of importable modules
OTHER_TECHNICAL_PERCENT = 25  # of the other modules


def modules() -> dict[str, Path]:
    """Map dotted names to files of the running Python's standard library, without SKIPPED_NAMES."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata contains paths of the machine that built Python
        if SKIPPED_NAMES & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        paths[".".join(relative.with_suffix("").parts).removesuffix(".__init__")] = path
    return paths


def source_of(module: str) -> str:
    """Source of a module, from its name only: "web", "technical" or "code"."""
    top = module.split(".")[0]
    bucket = int(hashlib.sha256(top.encode()).hexdigest(), 16) % 100
    if top not in IMPORTABLE:
        return "technical" if bucket < OTHER_TECHNICAL_PERCENT else "code"
    if bucket < WEB_PERCENT:
        return "web"
    return "technical" if bucket < WEB_PERCENT + TECHNICAL_PERCENT else "code"


def modules_of(source: str) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) of a source's modules, in a fixed order."""
    return ((name, path) for name, path in modules().items() if source_of(name) == source)


class Page(pydoc.HTMLDoc):
    """Help page of one module, without local data and without text of other modules.

    Values of data are left out, because they contain this machine's environment and paths. Members
    that another module defines are left out too: their text belongs to another page, which may be
    in the other split.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def is_defined_here(self, member: object) -> bool:
        """Whether the module, or its C implementation, defines a member."""
        return getattr(member, "__module__", None) in (self.module, "_" + self.module)

    def docother(self, object, name=None, mod=None, *ignored):  # type: ignore[no-untyped-def]
        """Show the name of data without its value."""
        return f"<strong>{name}</strong>" if name else ""

    def filelink(self, url, path):  # type: ignore[no-untyped-def]
        """Omit the path."""
        return ""

    def formattree(self, tree, modname, parent=None):  # type: ignore[no-untyped-def]
        """Omit the list of class names."""
        return ""

    def docclass(self, object, name=None, mod=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Show a class that the module defines, with members that the class itself defines."""
        if not self.is_defined_here(object):
            return ""

        def classify_without_inherited(cls):  # type: ignore[no-untyped-def]
            return [member for member in classify(cls) if member[2] is cls]

        classify = pydoc.classify_class_attrs
        with mock.patch.object(pydoc, "classify_class_attrs", classify_without_inherited):
            return super().docclass(object, name, mod, *args, **kwargs)

    def docroutine(  # type: ignore[no-untyped-def]
        self,
        object,
        name=None,
        mod=None,
        funcs={},  # noqa: B006  pydoc's own defaults
        classes={},  # noqa: B006
        methods={},  # noqa: B006
        cl=None,
        *rest,
    ):
        """Show a function that the module defines, or a method of a class on the page."""
        if cl is None and not self.is_defined_here(object):
            return ""
        return super().docroutine(object, name, mod, funcs, classes, methods, cl, *rest)


def help_page(name: str) -> str | None:
    """Render help of a standard module as HTML; None if this system lacks the module."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    page = Page(name)
    html = page.page(name, page.docmodule(module, name))
    # memory addresses in default arguments change with every process
    return re.sub(r"(&nbsp;| )at(&nbsp;| )0x[0-9a-fA-F]+", "", html)


def help_pages() -> Iterator[tuple[str, str | None]]:
    """Yield (dotted name, HTML) of every help page; None for a module that this system lacks."""
    return ((name, help_page(name)) for name, _ in modules_of("web"))


def code_files() -> Iterator[Row]:
    """Yield the modules of the source "code"."""
    for name, path in modules_of("code"):
        # a few files declare an older encoding; replace bytes that are not UTF-8
        text = path.read_text(encoding="utf-8", errors="replace")
        yield {"id": name, "text": text, "group": name}


def chapters() -> Iterator[Row]:
    """Yield the chapters of the language reference that interactive help contains."""
    from pydoc_data.topics import topics

    # "if" and "else" are names of one chapter; a duplicate could be in both splits
    names = {text: name for name, text in sorted(topics.items(), reverse=True)}
    for text, name in sorted(names.items(), key=lambda item: item[1]):
        yield {"id": name, "text": text, "group": f"topic {name}"}


def signature(node: ast.AST) -> str:
    """Format `class A(B)` or `def f(x, y=1) -> int` on one line."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def reference_page(name: str, source: str) -> str:
    """All docstrings of a module under their signatures; the source is parsed, not imported."""
    tree = ast.parse(source)
    parts = [f"{name}\n{'=' * len(name)}", ast.get_docstring(tree) or ""]

    def visit(parent: ast.AST, depth: int) -> None:
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node, clean=False)
            if text:
                lines = [
                    signature(node),
                    *("    " + line for line in inspect.cleandoc(text).splitlines()),
                ]
                parts.append("\n".join(("    " * depth + line).rstrip() for line in lines))
            visit(node, depth + 1)

    visit(tree, 0)
    return "\n\n".join(part for part in parts if part) + "\n" if any(parts[1:]) else ""


def reference_pages() -> Iterator[Row]:
    """Yield one reference page per module of the source "technical"; it may be empty."""
    for name, path in modules_of("technical"):
        text = reference_page(name, path.read_text(encoding="utf-8", errors="replace"))
        yield {"id": name, "text": text, "group": name}

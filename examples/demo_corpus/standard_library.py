"""The text every Python carries, in four kinds: pages of help, code, reference pages, chapters of
the language.

A module's source text, its docstrings and its rendered help share sentences, so every module
belongs to exactly one source: otherwise a held-out page would be trained on as code. Submodules go
with their top-level package.
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

# Test suites, programs, bundled wheels, and the topics, which are the curated source.
SKIPPED_PARTS = {
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "turtledemo",
    "site-packages",
    "dist-packages",
}
SKIPPED_PARTS |= {"_bundled", "pydoc_data", "__main__.py", "__phello__"}

# Rendering help imports the module, so only these may become web pages: importing them starts
# nothing and opens no window or browser (`this` prints, `antigravity` browses, tkinter wants a
# display).
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

# Of a hundred top-level modules: how many become web pages, and how many of the rest technical
# text; what remains is source code. Chosen so that the demo reads no source more than a few times.
WEB_SHARE, TECHNICAL_SHARE = 50, 20  # of the importable ones
OTHER_TECHNICAL_SHARE = 25


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the running Python's standard library that is prose
    or code of its own.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata holds the paths of the machine that built Python.
        if SKIPPED_PARTS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        found[".".join(relative.with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def source_of(module: str) -> str:
    """The one source that may have a module: "web", "technical" or "code"; depends on nothing
    but the name.
    """
    top = module.split(".")[0]
    bucket = int(hashlib.sha256(top.encode()).hexdigest(), 16) % 100
    if top not in IMPORTABLE:
        return "technical" if bucket < OTHER_TECHNICAL_SHARE else "code"
    if bucket < WEB_SHARE:
        return "web"
    return "technical" if bucket < WEB_SHARE + TECHNICAL_SHARE else "code"


def modules_of(source: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of the modules that a source may have, in a fixed order."""
    return ((name, path) for name, path in modules().items() if source_of(name) == source)


class Page(pydoc.HTMLDoc):
    """The help page of one module, without what would leak or repeat.

    Values of data stay out: they hold this machine's environment and paths. So do members defined
    elsewhere: their text belongs to another page, which may be on the other side of the held-out
    split.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def own(self, thing: object) -> bool:
        """Whether the module, or the C module behind it, defines the thing."""
        return getattr(thing, "__module__", None) in (self.module, "_" + self.module)

    def docother(self, object, name=None, mod=None, *ignored):  # type: ignore[no-untyped-def]
        """The name of a datum without its value."""
        return f"<strong>{name}</strong>" if name else ""

    def filelink(self, url, path):  # type: ignore[no-untyped-def]
        """No path of this machine."""
        return ""

    def formattree(self, tree, modname, parent=None):  # type: ignore[no-untyped-def]
        """No list of class names."""
        return ""

    def docclass(self, object, name=None, mod=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        """A class that the module defines; its own members only."""
        if not self.own(object):
            return ""

        def own_members(cls):  # type: ignore[no-untyped-def]
            return [member for member in classify(cls) if member[2] is cls]

        classify = pydoc.classify_class_attrs
        with mock.patch.object(pydoc, "classify_class_attrs", own_members):
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
        """A function that the module defines, or any method of a class that is shown."""
        if cl is None and not self.own(object):
            return ""
        return super().docroutine(object, name, mod, funcs, classes, methods, cl, *rest)


def help_page(name: str) -> str | None:
    """Help of a standard module as HTML, or None where the module does not exist on this system."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    page = Page(name)
    # Addresses in default arguments change with every process.
    return re.sub(
        r"(&nbsp;| )at(&nbsp;| )0x[0-9a-fA-F]+", "", page.page(name, page.docmodule(module, name))
    )


def help_pages() -> Iterator[tuple[str, str | None]]:
    """(dotted name, HTML) of every help page; no HTML of a module that this system lacks."""
    return ((name, help_page(name)) for name, _ in modules_of("web"))


def code_files() -> Iterator[Row]:
    """The modules that are read as code."""
    for name, path in modules_of("code"):
        # A few files declare an older encoding; what is not UTF-8 is replaced rather than lost.
        text = path.read_text(encoding="utf-8", errors="replace")
        yield {"id": name, "text": text, "group": name}


def chapters() -> Iterator[Row]:
    """Chapters of the language reference that the interactive help carries."""
    from pydoc_data.topics import topics

    # "if" and "else" are one chapter under two names; twice, it could be trained on and held out.
    names = {text: name for name, text in sorted(topics.items(), reverse=True)}
    for text, name in sorted(names.items(), key=lambda item: item[1]):
        yield {"id": name, "text": text, "group": f"topic {name}"}


def signature(node: ast.AST) -> str:
    """`class A(B)` or `def f(x, y=1) -> int` as written, on one line."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def reference_page(name: str, source: str) -> str:
    """All docstrings of a module under their signatures, in the order of the file; parsed, never
    imported.
    """
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
    """One reference page per module that is read as technical text; some modules have none."""
    for name, path in modules_of("technical"):
        text = reference_page(name, path.read_text(encoding="utf-8", errors="replace"))
        yield {"id": name, "text": text, "group": name}

"""Technical prose: papers (arXiv as TeX or text, PubMed), patents (USPTO), manuals, reference pages."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.recipes import host
from data.recipes.filters import Plausible
from data.recipes.papers import PaperBody
from data.recipes.readers import HOST, Rows, open_input

REQUIRES = ("orjson",)
RECIPE_VERSION = 1


def signature(node: ast.AST) -> str:
    """`class A(B)` or `def f(x, y=1) -> int` as written, on one line."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def reference_page(name: str, source: str) -> str:
    """All docstrings of a module under their signatures, in the order of the file; parsed, never imported."""
    tree = ast.parse(source)
    parts = [f"{name}\n{'=' * len(name)}", ast.get_docstring(tree) or ""]

    def visit(parent: ast.AST, depth: int) -> None:
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node, clean=False)
            if text:
                lines = [signature(node), *("    " + line for line in inspect.cleandoc(text).splitlines())]
                parts.append("\n".join(("    " * depth + line).rstrip() for line in lines))
            visit(node, depth + 1)

    visit(tree, 0)
    return "\n\n".join(part for part in parts if part) + "\n" if any(parts[1:]) else ""


def host_pages() -> Iterator[dict[str, Any]]:
    """One reference page per standard module that is read as technical text."""
    for name, path in host.modules_of("technical"):
        text = reference_page(name, path.read_text(encoding="utf-8", errors="replace"))
        yield {"id": name, "text": text, "group": name}


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`."""
    plausible = Plausible(min_chars=200, min_letters=0.5, max_line=5000)
    if source.input == HOST:
        return [Rows(host_pages), plausible]
    # a paragraph of a paper or a patent may be one line
    return [open_input(source, folder), PaperBody(), Plausible(min_chars=200, min_letters=0.4, max_line=100_000)]

"""Render jinja2 templates."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from core.quote import markdown_cell


def render(template: Path, **values: Any) -> str:
    """Render a jinja2 template. Missing values are errors; values in *.html.jinja are escaped.

    The filter `cell` quotes a value in a table of Markdown.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = markdown_cell
    return environment.get_template(template.name).render(values)

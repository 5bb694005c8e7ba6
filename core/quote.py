"""Quote text for the languages that we write: Hydra overrides, sbatch options, Markdown tables.

One function per language: shlex.quote for shells, jinja2's autoescape for HTML, yaml for YAML.
Texts of a config have no control characters (core/schema.py).
"""

import re
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from core.errors import InputError

CONTROL = re.compile(r"[\x00-\x08\n-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
PLAIN_OPTION = re.compile(r"[\w./:=,@%+-]+", re.A)


def hydra_override(key: str, text: str) -> str:
    """The override that sets a key to a text, which is neither parsed nor interpolated."""
    return f"{key}={QuotedString(uninterpolated(text), Quote.single).with_quotes()}"


def uninterpolated(text: str) -> str:
    """A value of a config that stands for the text itself, also where it has `${`."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def sbatch_directive(option: str) -> str:
    """A line of a batch script that sets an option of sbatch.

    sbatch takes a backslash before any character, within quotes of both kinds too, and begins a
    comment at #. Raises InputError for a line break, which would end the comment for the shell.
    """
    if CONTROL.search(option):
        raise InputError(f"sbatch takes no control characters in an option: {option!r}")
    if not PLAIN_OPTION.fullmatch(option):
        option = '"' + re.sub(r'([\\"#])', r"\\\1", option) + '"'
    return f"#SBATCH {option}"


def sbatch_output(folder: Path, name: str) -> str:
    """The option --output for a file of a folder; `name` may hold patterns such as %j.

    Raises InputError for a backslash in the folder, which sbatch removes from file names.
    """
    path = str(folder.resolve())
    if "\\" in path:
        raise InputError(f"{path} has a backslash, which sbatch removes: choose another run.dir")
    return f"--output={path.replace('%', '%%')}/{name}"


def markdown_cell(value: object) -> str:
    """A value as the text of a table's cell: one line, no cell separator, no HTML."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\|])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")

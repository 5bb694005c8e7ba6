"""Texts of a config in other languages: each is read back by the language's own reader."""

import html.parser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from core.compose import compose_config
from core.errors import InputError
from core.quote import (
    CONTROL,
    hydra_override,
    markdown_cell,
    sbatch_directive,
    sbatch_output,
)
from core.run import NAME
from core.templates import render
from tests.compose import run_config

NASTY = [
    "a b",
    "it's",
    'say "x"',
    "50% of %j",
    "a\\",
    "\\\\b\\'",
    "Größe 日本",
    "--flag",
    "-n",
    "$(touch PWNED)",
    "`touch PWNED`",
    "# comment",
    "a#b",
    "!!",
    "{a,b}",
    "[1]",
    "a=b",
    "${oc.env:HOME}",
    "\\${x}",
    "~",
    "null",
    "1e3",
    "a|b<i>&amp;",
    "@SETTINGS@",
    "a: b",
    "*",
    ";",
]
texts = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1)


def of_hydra(word: str) -> Any:
    """The value that a config gets from an override."""
    override = OverridesParser.create().parse_override(word)
    return OmegaConf.create({"key": override.value()}).key


@given(texts)
@example("\\${a}")
@example("${a}\\\\${b}\\")
@example("x\\'${a}'")
def test_hydra_reads_a_text_back(text: str) -> None:
    assert of_hydra(hydra_override("run.dir", text)) == text


@pytest.mark.parametrize("text", NASTY)
def test_a_config_reads_a_text_back(text: str) -> None:
    assert of_hydra(hydra_override("run.dir", text)) == text


def test_a_command_for_the_shell_has_the_same_words() -> None:
    """A composed config of the words that bash hands on has the texts."""
    words = [hydra_override("run.dir", text) for text in NASTY]
    command = shlex.join(["printf", "%s\\0", *words])
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert shown.stdout.split("\0")[:-1] == words
    config = compose_config(["+experiment=demo", words[NASTY.index("${oc.env:HOME}")]])
    assert config.run.dir == "${oc.env:HOME}"


def words_of_sbatch(line: str) -> list[str]:
    """The options in a line of a batch script, as _get_argument of Slurm's sbatch/opt.c finds them:
    a backslash escapes anywhere, quotes of two kinds group, # outside of quotes ends the line.
    """
    words: list[str] = []
    word: str | None = None
    quote = ""
    characters = iter(line.removeprefix("#SBATCH"))
    for character in characters:
        if character == "\\":
            word = (word or "") + next(characters)
        elif quote:
            quote, word = ("", word) if character == quote else (quote, (word or "") + character)
        elif character in "\"'":
            quote, word = character, word or ""
        elif character == "#":
            break
        elif character.isspace():
            words, word = [*words, *([] if word is None else [word])], None
        else:
            word = (word or "") + character
    assert not quote
    return [*words, *([] if word is None else [word])]


@given(texts)
def test_sbatch_reads_an_option_back(text: str) -> None:
    line = sbatch_directive(f"--comment={text}")
    assert line.startswith("#SBATCH ") and len(line.splitlines()) == 1
    assert words_of_sbatch(line) == [f"--comment={text}"]


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="no Slurm")
def test_the_real_sbatch_reads_an_option_back(tmp_path: Path) -> None:
    """It shows what it found in a script before it asks a controller, which is not there."""
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=1\n"
    )
    script = tmp_path / "job.sh"
    lines = [sbatch_directive(f"--comment={text}") for text in NASTY]
    script.write_text("\n".join(["#!/bin/bash", *lines, "--no-such-option", ""]))
    shown = subprocess.run(
        ["sbatch", "-vvvv", "--test-only", script],
        env={**os.environ, "SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.findall(r'Found in script, argument "(.*)"$', shown.stderr, re.M)
    assert found == [f"--comment={text}" for text in NASTY], shown.stderr


def test_a_folder_in_the_name_of_a_log_keeps_its_percent_signs(tmp_path: Path) -> None:
    assert sbatch_output(tmp_path / "50%j", "x-%j.out") == f"--output={tmp_path}/50%%j/x-%j.out"
    with pytest.raises(InputError, match="backslash"):
        sbatch_output(tmp_path / "a\\b", "x-%j.out")
    with pytest.raises(InputError, match="control characters"):
        sbatch_directive("--comment=a\nrm -rf /")


@given(st.text())
def test_a_cell_of_markdown_is_one_line_without_html(text: str) -> None:
    cell = markdown_cell(text)
    assert len(cell.splitlines()) <= 1 and "<" not in cell
    assert not re.search(r"(?<!\\)(?:\\\\)*\|", cell)
    read = re.sub(r"\\(.)", r"\1", cell.replace("&lt;", "<").replace("&amp;", "&"))
    assert read == " ".join(text.split())


class Texts(html.parser.HTMLParser):
    """Collects the texts of a page and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_pages_show_texts_and_run_none(tmp_path: Path) -> None:
    template = tmp_path / "x.html.jinja"
    template.write_text("<ul>{% for text in texts %}<li>{{ text }}</li>{% endfor %}</ul>")
    parser = Texts()
    texts = [*NASTY, "<script>alert(1)</script>", "'\"><img src=x onerror=y>"]
    parser.feed(render(template, texts=texts))
    assert parser.texts == texts and set(parser.tags) == {"ul", "li"}
    root = Path(__file__).parents[2]
    templates = [
        path
        for folder in ("core", "data", "eval", "launch", "model", "train")
        for path in (root / folder).rglob("*.jinja")
    ]
    assert templates
    for path in templates:
        assert path.name.endswith((".html.jinja", ".md.jinja")), f"{path}: escaped, or Markdown?"


@pytest.mark.parametrize("text", [*NASTY, "a\nb: c", "---\nx: y"])
def test_the_head_of_a_model_card_reads_a_text_back(text: str) -> None:
    card = ModelCardData(model_name=text, tags=[text], license_name=text)
    read = yaml.safe_load(card.to_yaml())
    assert read["license_name"] == text and read["tags"] == [text]


@pytest.mark.parametrize(
    "name", ["a b", "-x", ".x", "a/b", "a\nb", "é", "a%j", "a'b", "$x", "a" * 201, "a#", "a:b", "~"]
)
def test_a_run_does_not_start_under_a_name_that_another_place_changes(name: str) -> None:
    with pytest.raises(ValueError, match=r"^run\.name is ") as raised:
        run_config("demo", hydra_override("run.name", name), "run.dir=runs/x")
    assert "\n" not in str(raised.value)


def test_names_of_sweeps_are_names_of_runs() -> None:
    for name in (
        "demo",
        "7b_32k",
        "demo-lr.lr-1e-4_clip-0.5",
        "a=1,b=2",
        "user@x",
        "130m+",
        "a" * 200,
    ):
        assert NAME.fullmatch(name), name


@pytest.mark.parametrize("key", ["run.dir", "data.folder", "metrics.wandb_project"])
@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x7f", "\u2028"])
def test_a_control_character_in_a_text_is_refused(key: str, character: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(key)} is .*: remove its line break"):
        run_config("demo", hydra_override(key, f"a{character}b"))
    assert CONTROL.search(character)

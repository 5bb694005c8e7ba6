"""The pages of docs/ are about this code: files, names, keys, commands and links on them exist, and
their snippets run.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from core.compose import CONFIGS, compose_config, convert
from eval.short_keys import expand_short_keys
from tests.commands import ROOT, TIMEOUT_SECONDS
from train.config import RunConfig

DOCS = ROOT / "docs" / "pages"
PAGES = sorted(DOCS.glob("*.md"))
DESIGN = sorted((ROOT / "docs" / "design").glob("*.md"))
FOLDERS = "core|model|data|train|eval|launch|configs|examples|benchmarks|tests"
GENERATED = "config.md"
# pages that docs/reference.py copies
READMES = {f"{name}.md": ROOT / name / "README.md" for name in ("data", "train", "eval")}
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"\n]+)\")?\n(.*?)^```$", re.M | re.S)
OVERRIDE = re.compile(r"[+~]?[\w./@]+=")
NAME = re.compile(  # dotted, snake_case or CamelCase
    r"(?:(?:[A-Za-z_]\w*\.)+\w+|\w*[a-z]_[a-z]\w*)(?:\(\))?|[A-Z][a-z]\w*[A-Z]\w*"
)
LINK = re.compile(r"\]\(([\w./-]*)(?:#([\w-]+))?\)")
# on the pages, and neither a name of our code nor a key
FOREIGN = set(
    """FalconMambaForCausalLM AutoModelForCausalLM afterok tmux MaxArraySize megatron_core tokens[i]
    CXX selective_scan_cuda logits_cache mixer_rms_eps""".split()
)
# their code names the fields of rows in strings
ROW_RECIPES = ("forums", "instructions")


def ident(path: Path) -> str:
    return path.stem


def blocks(path: Path, language: str = "") -> list[tuple[str, str]]:
    """(title, text) of the fenced blocks of a page in a language."""
    return [
        (title, text) for kind, title, text in FENCE.findall(path.read_text()) if kind == language
    ]


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@cache
def known_keys() -> set[str]:
    """Every config key and section, with and without the values of lists."""
    found: set[str] = set()

    def add(value: object, prefix: str) -> None:
        found.add(prefix)
        for key, inner in value.items() if isinstance(value, dict) else ():
            add(inner, f"{prefix}.{key}")

    for experiment in ("7b", "demo"):
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            config = compose("config", [f"+experiment={experiment}"])
        for section in config:
            add(yaml.safe_load(yaml.safe_dump(_plain(config[section]))), str(section))
    return found


def _plain(value: object) -> object:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text())["nav"]

    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return list(chain.from_iterable(map(leaves, inner)))  # type: ignore[call-overload]

    written = [str(path.relative_to(DOCS)) for path in PAGES]
    written += [f"design/{path.name}" for path in DESIGN]
    written += [f"log/{path.name}" for path in (ROOT / "docs" / "log").glob("*.md")]
    assert sorted(leaves(nav)) == sorted([*written, GENERATED, *READMES])


@pytest.mark.parametrize("path", [*PAGES, *DESIGN], ids=ident)
def test_files_and_links_exist(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    for file in re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w/]+\.(?:py|sh|yaml)\b", text):
        assert (ROOT / file).is_file(), file
    shown = {"NAME", "mine", *(Path(title).stem for title, _ in blocks(path, "yaml"))}
    for name in re.findall(r"\+(?:experiment|sweep)=(\w+)", text):
        assert name in shown or list(ROOT.glob(f"configs/*/{name}.yaml")), name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target
    for link, anchor in LINK.findall(text):
        file = READMES.get(link, path.parent / link) if link else path
        if link == GENERATED:
            assert not anchor or anchor in known_keys(), anchor
            continue
        assert file.is_file(), link
        assert not anchor or anchor in slugs(file.read_text()), (link, anchor)


@pytest.mark.parametrize("path", PAGES, ids=ident)
def test_commands_are_accepted(path: Path) -> None:
    """Scripts exist, options are theirs, and overrides compose to a config."""
    for line in chain.from_iterable(_lines(text) for _, text in blocks(path)):
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if re.fullmatch(rf"(?:{FOLDERS})/[\w/]+\.py", word)]
        if not scripts:
            continue
        given = words[words.index(scripts[0]) + 1 :]
        source = (ROOT / scripts[0]).read_text()
        for option in (word for word in given if word.startswith("--")):
            hydra = "@command(" in source or "= command(" in source
            assert f'"{option}"' in source or (hydra and option == "--config-dir"), line
        if "--config-dir" in given:
            continue  # the page's own config, of which a test below makes a run
        given = expand_short_keys(given) if "expand_short_keys" in source else given
        own = [word for word in given if f'"{word}"' in source]  # that no config sees
        overrides = [word for word in given if OVERRIDE.match(word) and word not in own]
        swept = [word for word in overrides if "-m" in given and ("," in word or "+sweep=" in word)]
        assert bool(swept) == ("-m" in given), line
        for key in (word.partition("=")[0] for word in swept):
            assert key == "+sweep" or key in known_keys(), line
        composed(tuple(sorted(set(overrides) - set(swept))))


composed = cache(compose_config)


def _lines(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", text).splitlines()


@cache
def defined() -> set[str]:
    """Names that our code defines or takes: functions, classes, variables, arguments, fields."""
    found: set[str] = set()
    for folder in (*FOLDERS.split("|"), "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= {path.stem, *path.relative_to(ROOT).parts[:-1]}
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        found.add(name)
                    case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                        found.add(name)
                    case ast.Attribute(attr=name, ctx=ast.Store()):
                        found.add(name)
                    case ast.Constant(value=str(name)) if path.stem in ROW_RECIPES:
                        found.add(name)
    return found


@pytest.mark.parametrize("path", PAGES, ids=ident)
def test_names_and_keys_exist(path: Path) -> None:
    """In backticks: `section.key` is a key; other names are defined or keys too."""
    text = FENCE.sub("", path.read_text())
    sections = {key for key in known_keys() if "." not in key}
    missing = []
    for code in re.findall(r"`([^`\n]+)`", text):
        name, given, _ = code.partition("=")
        if not NAME.fullmatch(name):
            continue
        parts = name.removesuffix("()").split(".")
        if parts[-1] in ("py", "json", "jsonl", "txt", "html", "yaml"):
            continue  # a file
        if parts[0] in sections and (len(parts) > 1 or given):
            if ".".join(parts) not in known_keys() and not _is_name(parts):
                missing.append(code)
        elif not _is_name(parts) and not set(parts) <= FOREIGN:
            missing.append(code)
    assert missing == []


def _is_name(parts: list[str]) -> bool:
    leaf_keys = {key.rsplit(".", 1)[-1] for key in known_keys()}
    return set(parts) <= defined() | leaf_keys


def test_the_api_page_names_what_exists() -> None:
    text = (DOCS / "api.md").read_text()
    names = re.findall(r"^::: ([\w.]+)$", text, re.M)
    assert len(names) == len(set(names)) > 40
    for name in names:
        module, _, last = name.rpartition(".")
        file = ROOT / module.replace(".", "/")
        source = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        assert source.is_file(), name
        tree = ast.parse(source.read_text()).body
        assert any(
            isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == last for n in tree
        ), name
    for members in re.findall(r"members: \[(.+)\]", text):
        assert set(members.split(", ")) <= defined(), members


@pytest.mark.parametrize("drawing", ["token", "tensor_parallel"])
def test_drawings_name_files_that_exist(drawing: str) -> None:
    text = (DOCS / "images" / f"{drawing}.svg").read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    files = re.findall(rf">((?:{FOLDERS})/[\w./]*)<", text)
    assert len(files) > 5 and [file for file in files if not (ROOT / file).exists()] == []
    for name in re.findall(r">((?:[A-Z][a-z]+){2,}|\w+_norm|\w+_scan|\w+_conv1d)<", text):
        assert name in defined() | FOREIGN, name


def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snippets in their order, with a recorded run in the place of runs/demo."""
    fixtures = ROOT / "tests" / "fixtures"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(fixtures / "runs" / "zero1-dp2")
    (tmp_path / "corpus").symlink_to(fixtures / "corpus")
    monkeypatch.chdir(tmp_path)
    snippets = [text for _, text in blocks(DOCS / "python.md", "python")]
    assert len(snippets) > 8
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/pages/python.md", "exec"), namespace)
    assert (tmp_path / "my_model" / "config.json").is_file()


def own_text(folder: Path) -> None:
    """Write the files of the page, and texts: Python's help topics."""
    from pydoc_data.topics import topics

    (folder / "texts").mkdir()
    for name, text in topics.items():
        (folder / "texts" / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    page = DOCS / "own_text.md"
    for title, text in (*blocks(page, "python"), *blocks(page, "yaml")):
        (folder / title).parent.mkdir(parents=True, exist_ok=True)
        (folder / title).write_text(text)


def test_own_text_is_built_and_looked_at(tmp_path: Path) -> None:
    own_text(tmp_path)
    section = (DOCS / "own_text.md").read_text().partition("## 3. ")[2].partition("## 4. ")[0]
    for line in FENCE.findall(section)[0][2].splitlines():
        script, *words = line.split()[1:]
        file = ROOT / script if (ROOT / script).is_file() else tmp_path / script
        result = subprocess.run(
            [sys.executable, file, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        assert result.returncode == 0, (line, result.stdout + result.stderr)
    assert (tmp_path / "mine.html").is_file()


def test_own_experiment_is_a_run(tmp_path: Path) -> None:
    own_text(tmp_path)
    searchpath = f"hydra.searchpath=[file://{tmp_path / 'my'}]"
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = convert(RunConfig, compose("config", ["+experiment=mine", searchpath]))
    assert config.run.name == "mine" and list(config.data.sources) == ["mine"]
    assert config.model.vocab_size == config.data.tokenizer.vocab_size


def test_the_continued_demo_is_a_run(tmp_path: Path) -> None:
    for title, text in blocks(DOCS / "continue.md", "yaml"):
        (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / title).write_text(text)
    searchpath = f"hydra.searchpath=[file://{tmp_path / 'my'}]"
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = convert(RunConfig, compose("config", ["+experiment=perl", searchpath]))
    old = {name for name, source in config.data.sources.items() if source.old}
    assert config.run.init_from == "runs/demo" and set(config.data.sources) - old == {"perl"}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict, and everything that a page loads comes from the site itself."""
    pytest.importorskip("mkdocs", reason="make docs installs it")
    pytest.importorskip("mkdocstrings", reason="make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", "docs/mkdocs.yml", "-d"]
    result = subprocess.run(
        [*command, tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]* (?:src|href)=\"([^\"]+)", page.read_text())
        assert [url for url in loaded if url.startswith(("http", "//"))] == [], page.name

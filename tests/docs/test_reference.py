"""Every config key has a meaning on the generated page, every command has examples."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from core.compose import CONFIGS
from tests.commands import python

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT))  # the hook's, which needs it without an installed package
    return module


def leaves(config: DictConfig, prefix: str = "") -> set[str]:
    """Keys of a config down to its values; entries of tables with names of their own count as
    one.
    """
    found = set()
    for name in config:
        key = f"{prefix}{name}"
        value = config._get_node(name)
        if key in ("data.sources", "leaderboard.suite"):
            continue
        found |= leaves(value, f"{key}.") if isinstance(value, DictConfig) and len(value) else {key}
    return found


def test_every_key_is_there_with_its_meaning(reference: ModuleType) -> None:
    rows = [line for line in reference.page().splitlines() if line.startswith("| `")]
    meanings = {row.split("`")[1]: re.split(r"(?<!\\)\|", row)[4].strip() for row in rows}
    assert [key for key, meaning in meanings.items() if not meaning] == []
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        composed = compose("config", ["+experiment=7b"])
    shown = {key.replace("[]", "").replace(".NAME", "") for key in meanings}
    missing = {
        key
        for key in leaves(composed)
        if key not in shown and not any(key.startswith(f"{s}.") for s in shown)
    }
    assert missing == set() and "data.sources.NAME.recipe" in meanings
    types = {row.split("`")[1]: re.split(r"(?<!\\)\|", row)[2].strip() for row in rows}
    assert types["optim.beta1"] == "float, at least 0 and below 1"
    assert types["data.stages[].mixture"] == "dict[str, float], at least 0"
    assert types["health.stop_after_seconds"] == "Optional[float], above 0"
    numeric = {key: text for key, text in types.items() if re.search(r"\b(int|float)\b", text)}
    assert [key for key, text in numeric.items() if ", " not in text.split("]")[-1]] == []


SCRIPTS = [
    path
    for room in ("data", "train", "eval", "launch")
    for path in sorted((ROOT / room).glob("*.py"))
    if "\nif __name__ ==" in path.read_text() and "exit_with_new_command(" not in path.read_text()
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_entry_script_has_examples(path: Path) -> None:
    text = path.read_text()
    examples = text.partition("examples:\n")[2].partition('"""')[0]
    assert f"{path.parent.name}/{path.name} " in examples
    for group, name in re.findall(r"\+(experiment|sweep)=(\w+)", examples):
        assert (ROOT / "configs" / group / f"{name}.yaml").is_file(), name


@pytest.mark.parametrize(
    "script", ["data/mixture_report.py", "launch/attempt.py"]
)  # by Hydra, and by argparse
def test_help_shows_them(script: str) -> None:
    help = python(script, "--help")
    assert help.returncode == 0 and f"\nexamples:\n  python {script} " in help.stdout, (
        help.stdout + help.stderr
    )


@pytest.mark.parametrize("folder", ["data", "train", "eval"])
def test_readmes_link_to_pages_that_exist(reference: ModuleType, folder: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", reference.readme_page(folder))
    assert links and all((ROOT / "docs" / "pages" / link).is_file() for link in links)

"""Damage to JSON files, for tests that every reader of our records is total."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# what no schema of ours has in a place, or has in few; as JSON text
VALUES = (
    *("null", "true", "-1", "0", "1", "0.5", "NaN", "Infinity", "-Infinity", "1e400"),
    *(str(2**100), "9" * 5000, str(2**63), str(-(2**63)), '""', '"x"', '"../x"', '"/etc/passwd"'),
    *('"\\ud800"', '"\\u0000"', "[]", "{}", "[1]", '{"a": 1}', "[" * 1000 + "]" * 1000),
)
MARK = "the value that a mutation replaces"


def damage_json(path: Path, rng: random.Random) -> str:
    """Damage a JSON file in one random way; return what was done."""
    raw = json.loads(path.read_text())
    container, key = rng.choice(list(places(raw)))
    action = rng.choice(["drop", "add", "cut", "bytes", "folder", *["replace"] * 8])
    if action == "drop":
        del container[key]
    elif action == "add" and isinstance(container, dict):
        container["unknown"] = 1
    elif action == "add":
        container.append(container[key])
    elif action == "replace":
        container[key] = MARK
    text, value = json.dumps(raw), rng.choice(VALUES)
    if action == "folder":
        path.unlink()
        path.mkdir()
    elif action == "cut":
        path.write_text(text[: rng.randrange(len(text))])
    elif action == "bytes":
        data = bytearray(text.encode())
        data[rng.randrange(len(data))] = rng.randrange(128, 256)
        path.write_bytes(data)
    else:
        path.write_text(text.replace(f'"{MARK}"', value))
    return f"{path.name}: {action} {key} {value[:20]}"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a JSON value with each of its keys or indices."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from places(value[key])


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file with what `change` returns, or did in place."""
    raw = json.loads(path.read_text())
    changed = change(raw)
    path.write_text(json.dumps(raw if changed is None else changed))


def fresh_copy(source: Path, target: Path) -> Path:
    """Copy a folder to a path, in place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target

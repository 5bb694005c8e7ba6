"""Errors of a config as one line, with the key or file and what to change."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue
from yaml import MarkedYAMLError, YAMLError

from core.errors import InputError
from core.old_keys import REMOVED_GROUPS
from core.schema import ENTRY

UNKNOWN_GROUP = re.compile(
    r".*Could not override '(\w+)(?:@[^']*)?'\.\s*No match in the defaults", re.S
)
UNKNOWN_CHOICE = re.compile(
    r"Could not find '(\w+)/([^']+)'\s+Available options in [^\n]*:((?:\n\t[^\n]+)+)"
)
UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
# starts of lines that repeat the key or list Hydra's folders
OMITTED = ("full_key:", "object_type=", "reference_type=", "Config search path:", "provider=")


def format_error(error: Exception, keys: Iterable[str] = ()) -> str:
    """Format an error as one line, with the full config key if known.

    For an unknown key the line suggests those of `keys` that are near.
    """
    # hydra advises to append the key with a +, which would be the next error
    key = getattr(error, "full_key", None)
    match = UNKNOWN_KEY.match(str(error))
    if match or (key and isinstance(error, ConfigKeyError)):
        unknown = match[1] if match else str(key)
        near = near_keys(unknown, keys)
        hints = [f"did you mean {' or '.join(near)}?"] if near else []
        return " ".join([f"the config has no key {unknown};", *hints, "--cfg job prints all keys"])
    if match := UNKNOWN_CHOICE.search(str(error)):
        return f"{match[1]} has no {match[2]}; it has {', '.join(match[3].split())}"
    if (match := UNKNOWN_GROUP.match(str(error))) and match[1] in REMOVED_GROUPS:
        suite = " (a leaderboard: override /suite)" if match[1] == "eval" else ""
        return (
            f"{match[1]} is now a section of config.yaml, not a config group: remove "
            f"'override /{match[1]}'{suite}"
        )
    if key and isinstance(error, MissingMandatoryValue):
        return f"{key} has no value: set it, or correct the name before its last part"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(OMITTED)]
    if error.__cause__ is not None and isinstance(error, HydraException):
        lines += [
            line.strip()
            for line in str(error.__cause__).splitlines()[:1]
            if line.strip() not in lines
        ]
    return (f"{key}: " if key else "") + "; ".join(lines or [type(error).__name__])


def near_keys(unknown: str, keys: Iterable[str]) -> list[str]:
    """Keys that may be meant: all whose last part is the unknown one's, else the nearest."""
    parts = unknown.split(".")
    known = [fill_entries(key, parts) for key in keys]
    last = {key: key.rpartition(".")[2] for key in known}
    if same := [key for key in known if last[key] == parts[-1]]:
        return same
    if near := difflib.get_close_matches(unknown, known, 1):
        return near
    near = difflib.get_close_matches(parts[-1], set(last.values()), 1, cutoff=0.75)
    return [key for key in known if last[key] in near]


def fill_entries(key: str, given: list[str]) -> str:
    """A schema's key with the names of entries that are given at the same places."""
    parts = key.split(".")
    for place in range(min(len(parts), len(given))):
        if parts[place] == ENTRY:
            parts[place] = given[place]
        elif parts[place] != given[place]:
            break
    return ".".join(parts)


def explain_unreadable(error: Exception, folders: Iterable[Path]) -> InputError:
    """The error of a config that cannot be composed, with the file if one cannot be read."""
    reason = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        reason = "a file names itself in its defaults, or an anchor of YAML holds itself"
    elif isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        reason = " ".join(" ".join(filter(None, [error.context, error.problem])).split())
        place = f"{mark.name}, line {mark.line + 1}: " if mark is not None else ""
        return InputError(f"{place}{reason}")
    if isinstance(error, YAMLError | UnicodeError | OSError):  # these do not name the file
        paths = [path for folder in folders for path in sorted(folder.rglob("*.yaml"))]
        for path in (path for path in paths if raises_same(path, error)):
            if isinstance(error, UnicodeError):
                return InputError(f"{path} is not UTF-8 ({reason}): save it as UTF-8")
            return InputError(f"{path} is no config: {reason}")
    return InputError(f"the config cannot be composed: {reason or type(error).__name__}")


def raises_same(path: Path, error: Exception) -> bool:
    """Whether loading a file fails with this error."""
    try:
        OmegaConf.load(path)
    except Exception as found:
        return type(found) is type(error) and str(found) == str(error)
    return False

"""Licences of source files: SPDX expressions, names and lists."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.recipes.licences import LicenceFilter, is_permissive
from tests.data.samples import make_source, run_recipe, write_rows

PERMISSIVE = [
    "MIT",
    "mit",
    " Apache-2.0 ",
    "MIT OR Apache-2.0",
    "mit or apache-2.0",
    "MIT/Apache-2.0",
    "GPL-3.0-only OR MIT",
    "MIT OR GPL-3.0-only AND LGPL-2.1-only",  # AND binds more strongly
    "MIT AND (BSD-3-Clause OR GPL-2.0-or-later)",
    "((MIT))",
    "Apache-2.0 WITH LLVM-exception",
    "Apache-2.0 WITH LLVM-exception OR GPL-2.0-only",
    "Apache-2.0+",
    "MIT License",
    'BSD 3-Clause "New" or "Revised" License',
]
OTHERS = [
    "GPL-3.0",
    "GPL-2.0+",
    "GPL-2.0-or-later",
    "MIT AND GPL-3.0",
    "(MIT OR Apache-2.0) AND AGPL-3.0-only",
    "GPL-2.0-only WITH Classpath-exception-2.0",
    "GPL-2.0-only WITH Classpath-exception-2.0 AND MIT",
    "MIT GPL-3.0",
    "MIT, GPL-3.0",
    "MIT OR",
    "(MIT",
    "NOASSERTION",
    "None",
    "other",
    "",
    "LicenseRef-Proprietary",
    "not MIT",
    "(" * 400 + "MIT" + ")" * 400,
    "MIT OR " * 100_000 + "MIT",
]


@pytest.mark.parametrize("licence", PERMISSIVE)
def test_permissive_licences(licence: str) -> None:
    assert is_permissive(licence)


@pytest.mark.parametrize("licence", OTHERS, ids=lambda licence: licence[:40])
def test_other_licences(licence: str) -> None:
    assert not is_permissive(licence)


@pytest.mark.parametrize(
    ("metadata", "verdict"),
    [
        ({"license": "MIT"}, True),
        ({"max_stars_repo_licenses": ["MIT", "Apache-2.0 OR GPL-2.0-only"]}, True),
        ({"license": {"key": "mit", "spdx_id": "MIT", "name": "MIT License"}}, True),
        ({"licenses": ["mit", "agpl-3.0"]}, "licence_not_permissive"),
        ({"license": "MIT", "detected_licenses": ["GPL-3.0"]}, "licence_not_permissive"),
        ({"licenses": [None]}, "licence_not_permissive"),
        ({"license": "NOASSERTION"}, "licence_not_permissive"),
        ({"license": None, "licenses": []}, "licence_unknown"),
        ({}, "licence_unknown"),
    ],
)
def test_every_licence_of_a_file_counts(metadata: dict[str, Any], verdict: bool | str) -> None:
    document: Any = SimpleNamespace(metadata=metadata)
    assert LicenceFilter().filter(document) == (verdict is True or (False, verdict))


def test_a_permissive_source_checks_the_licence_of_each_file(tmp_path: Path) -> None:
    code = "def area(width, height):\n    return width * height  # of a rectangle\n" * 4
    rows = [
        {"text": code, "id": "kept", "license": "MIT", "repo_name": "ann/area"},
        {"text": code, "license": "GPL-3.0"},
        {"text": code, "licenses": ["mit", "agpl-3.0"]},
        {"text": code},
        {"text": "# do not edit\n" + code, "license": "MIT"},
        {"text": "x = [" + "1, " * 300 + "]\n" + code, "license": "MIT"},
    ]
    write_rows(tmp_path / "raw" / "a.jsonl", rows)
    source = replace(make_source("source_code", tmp_path / "raw"), licence="permissive")
    kept, steps = run_recipe(source, tmp_path / "clean")
    assert [(row["id"], row["group"]) for row in kept] == [("kept", "ann/area")]
    assert steps[1].dropped == {"licence_not_permissive": 2, "licence_unknown": 1}
    assert len(run_recipe(make_source("source_code", tmp_path / "raw"), tmp_path / "ours")[0]) == 4

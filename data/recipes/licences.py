"""Licences of source files: SPDX expressions, of which the permissive ones are kept.

An expression is permissive if an alternative of OR is, or all parts of AND are, with parentheses;
"MIT/ISC" is Cargo's older form of OR. An exception (WITH) only adds permissions, and the + of
"Apache-2.0+" adds later versions. The names that GitHub shows, such as "MIT License", stand for
their identifiers. Whatever is no expression, such as NOASSERTION, is not permissive.
"""

import re
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

# common SPDX identifiers of the Blue Oak Council's list
PERMISSIVE = frozenset(
    "mit mit-0 apache-2.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear 0bsd isc zlib unlicense "
    "cc0-1.0 psf-2.0 python-2.0 bsl-1.0 artistic-2.0 ncsa x11 postgresql upl-1.0 blueoak-1.0.0 "
    "curl ms-pl".split()
)
NAMES = {
    "mit license": "mit",
    "the mit license": "mit",
    "apache license 2.0": "apache-2.0",
    "apache license, version 2.0": "apache-2.0",
    'bsd 2-clause "simplified" license': "bsd-2-clause",
    'bsd 3-clause "new" or "revised" license': "bsd-3-clause",
    "isc license": "isc",
    "zlib license": "zlib",
    "the unlicense": "unlicense",
    "boost software license 1.0": "bsl-1.0",
    "creative commons zero v1.0 universal": "cc0-1.0",
}
MAX_LENGTH = 1000  # characters of an expression; bounds its depth too


def is_permissive(licence: str) -> bool:
    """Whether a licence, an SPDX expression in any case, is permissive."""
    name = licence.strip().lower()
    name = NAMES.get(name, name).replace("/", " or ")
    if len(name) > MAX_LENGTH:
        return False
    try:
        expression = canonicalize_license_expression(name)
    except InvalidLicenseExpression:
        return False
    return any_permissive(re.findall(r"[()]|[^\s()]+", expression)[::-1])


def any_permissive(tokens: list[str]) -> bool:
    """Evaluate alternatives; removes their tokens from the end of a valid, reversed expression."""
    result = all_permissive(tokens)
    while tokens and tokens[-1] == "OR":
        tokens.pop()
        result = all_permissive(tokens) or result
    return result


def all_permissive(tokens: list[str]) -> bool:
    """Evaluate what AND joins, which binds more strongly than OR."""
    result = one_permissive(tokens)
    while tokens and tokens[-1] == "AND":
        tokens.pop()
        result = one_permissive(tokens) and result
    return result


def one_permissive(tokens: list[str]) -> bool:
    """Evaluate an identifier, with its exception, or an expression in parentheses."""
    token = tokens.pop()
    if token == "(":
        result = any_permissive(tokens)
        tokens.pop()
        return result
    if tokens and tokens[-1] == "WITH":
        del tokens[-2:]
    return token.lower().removesuffix("+") in PERMISSIVE


def licence_names(value: Any) -> list[str]:
    """Return the expressions in a field: a text, a list, or GitHub's object of a licence."""
    if isinstance(value, list | tuple):
        return [name for item in value for name in licence_names(item)]
    if isinstance(value, dict):
        value = value.get("spdx_id") or value.get("key") or value.get("name")
    return [str(value)]


class LicenceFilter(BaseFilter):
    """Keeps files whose licences are all permissive, and sets their repository as group."""

    name = "Licence"
    LICENCE_KEYS = (
        "license",
        "licenses",
        "licence",
        "detected_licenses",
        "max_stars_repo_licenses",
        "gha_license_id",
    )
    REPOSITORY_KEYS = ("repo_name", "repository_name", "max_stars_repo_name", "repo_path")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        values = [doc.metadata[key] for key in self.LICENCE_KEYS if doc.metadata.get(key)]
        names = licence_names(values)
        if not names:
            return False, "licence_unknown"
        if not all(map(is_permissive, names)):
            return False, "licence_not_permissive"
        repository = next(
            (doc.metadata[key] for key in self.REPOSITORY_KEYS if doc.metadata.get(key)), None
        )
        if repository is not None:
            doc.metadata.setdefault("group", str(repository))
        return True

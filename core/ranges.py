"""Ranges of numbers in configs and records, declared beside a field: `lr: Positive`.

core/schema.py checks them in every composed config, core/records.py in records, and
docs/reference.py shows them. NaN is in no range.
"""

from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any

from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Le, Lt
from pydantic import Field

LIMIT = 2**53  # beyond it a float, and with it JSON in other languages, skips integers
SECONDS_LIMIT = 1e9  # 32 years; timeouts of threads and sockets overflow beyond some 300


@dataclass(frozen=True)
class Range(GroupedMetadata):
    """The numbers from `low` to `high` that a field takes."""

    low: float = 0
    high: float = LIMIT
    above: bool = False  # without `low`
    below: bool = False  # without `high`
    infinite: bool = False  # infinity switches off what the field limits
    hint: str = ""  # for the error, such as what disables the feature

    def __iter__(self) -> Iterator[BaseMetadata]:
        """The two limits, as pydantic reads them."""
        yield Gt(self.low) if self.above else Ge(self.low)
        if not self.infinite:
            yield Lt(self.high) if self.below else Le(self.high)

    def __contains__(self, value: float) -> bool:
        if not (value > self.low or (value == self.low and not self.above)):
            return False
        is_below_high = value < self.high or (value == self.high and not self.below)
        return is_below_high or (self.infinite and value == inf)

    def text(self, value: float = 0) -> str:
        """The range in words; a limit that no sensible value reaches only if `value` exceeds it."""
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high in (LIMIT, SECONDS_LIMIT) and value <= self.high:
            text = low
        elif not self.above and not self.below:
            text = f"from {self.low:g} to {self.high:.16g}"
        else:
            text = f"{low} and {'below' if self.below else 'at most'} {self.high:.16g}"
        return f"{text}, or inf" if self.infinite else text

    def problem(self, value: Any, kind: type = float) -> str | None:
        """What is wrong with a value and what to set instead; None for a `kind` of the range."""
        shown = repr(value)
        limits = self.text()
        if isinstance(value, int | float) and not isinstance(value, bool):
            if value in self and kind in (float, type(value)):
                return None
            # an int may exceed every float
            shown = "beyond 1e300" if 1e300 <= abs(value) < inf else f"{value:.16g}"
            limits = self.text(value)
        what = "number" if kind is float else "whole number"
        of = "of " if limits.startswith("at least") else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"is {shown}: set a {what} {of}{limits}{hint}"

    def parse(self, text: str) -> int:
        """A whole number of the range, as the type of an argument of argparse."""
        if problem := self.problem(number(text, int), int):
            raise ArgumentTypeError(problem)
        return int(text)


def number(text: str, kind: type) -> Any:
    """The number in a text, or the text if there is none."""
    with suppress(ValueError):
        return kind(text)
    return text


def range_of(hint: Any) -> Range | None:
    """The range in an annotated type; None for other types."""
    metadata = getattr(hint, "__metadata__", ())
    return next((each for each in metadata if isinstance(each, Range)), None)


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]  # of a record
Seed = Annotated[int, Range(0, 2**63 - 1)]
Positive = Annotated[float, Range(0, above=True)]
PositiveOrInf = Annotated[float, Range(0, above=True, infinite=True)]
NotNegative = Annotated[float, Range(0)]
# added to a divisor: not 0 in fp32
Epsilon = Annotated[float, Range(1e-37, 1)]
Share = Annotated[float, Range(0, 1)]
Seconds = Annotated[float, Range(0, SECONDS_LIMIT)]
PositiveSeconds = Annotated[float, Range(0, SECONDS_LIMIT, above=True)]

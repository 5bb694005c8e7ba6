"""Worked arithmetic: problems solved step by step by a seeded generator."""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

TOTAL_CHARS = 3_000_000

NAMES = (
    "Ada",
    "Boris",
    "Chen",
    "Dalia",
    "Emeka",
    "Farah",
    "Goran",
    "Hana",
    "Imani",
    "Jonas",
    "Keiko",
    "Lina",
    "Mateo",
)
GOODS = (
    "apples",
    "pencils",
    "stamps",
    "marbles",
    "books",
    "tickets",
    "lemons",
    "bricks",
    "seeds",
    "cards",
    "buttons",
)
PLACES = (
    "the harbour",
    "the village",
    "the station",
    "the mill",
    "the lighthouse",
    "the old bridge",
    "the quarry",
)


def addition(r: Random) -> str:
    """Column addition, digit by digit with the carry."""
    a, b = r.randrange(100, 10**6), r.randrange(100, 10**6)
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        digit_sum = x + y + carry
        with_carry = f" + {carry}" if carry else ""
        lines.append(
            f"{x} + {y}{with_carry} = {digit_sum}: write {digit_sum % 10}, carry {digit_sum // 10}."
        )
        carry = digit_sum // 10
    if carry:
        lines.append(f"Write the last carry {carry}.")
    return (
        f"Add {a} and {b}, from the last digit to the first.\n"
        + "\n".join(lines)
        + f"\n{a} + {b} = {a + b}"
    )


def subtraction(r: Random) -> str:
    """A difference by steps of tens and hundreds."""
    a, b = sorted((r.randrange(1000, 10**6), r.randrange(1000, 10**6)), reverse=True)
    lines, left = [], a
    for place in reversed(range(len(str(b)))):
        part = b // 10**place % 10 * 10**place
        if part:
            lines.append(f"{left} - {part} = {left - part}")
            left -= part
    return (
        f"What is {a} minus {b}?\nTake the parts of {b} away one after another.\n"
        + "\n".join(lines)
        + f"\nAnswer: {left}"
    )


def multiplication(r: Random) -> str:
    """A product by partial products."""
    a, b = r.randrange(12, 5000), r.randrange(12, 1000)
    digits = [(b // 10**place % 10) * 10**place for place in range(len(str(b)))]
    parts = [(a * part, part) for part in reversed(digits) if part]
    lines = [f"{a} * {part} = {product}" for product, part in parts]
    total = " + ".join(str(product) for product, _ in parts)
    return (
        f"Multiply {a} by {b}.\n"
        + "\n".join(lines)
        + f"\n{total} = {a * b}\nSo {a} * {b} = {a * b}."
    )


def division(r: Random) -> str:
    """Long division with remainder and the check."""
    b, a = r.randrange(3, 100), r.randrange(1000, 10**6)
    lines, rest = [], 0
    for digit in str(a):
        current = rest * 10 + int(digit)
        quotient, rest = divmod(current, b)
        lines.append(f"Bring down {digit}: {current} / {b} is {quotient}, rest {rest}.")
    body = "\n".join(lines)
    return (
        f"Divide {a} by {b}.\n{body}\n{a} = {b} * {a // b} + {rest}\nThe quotient is {a // b} "
        f"and the remainder {rest}."
    )


def fraction(r: Random) -> str:
    """A sum of two fractions, reduced."""
    a, b, c, d = (r.randrange(1, 40) for _ in range(4))
    b, d = b + 1, d + 1
    top, bottom = a * d + c * b, b * d
    x, y = top, bottom
    lines = [
        f"Common denominator: {b} * {d} = {bottom}.",
        f"{a} * {d} + {c} * {b} = {a * d} + {c * b} = {top}.",
    ]
    while y:
        lines.append(f"{x} mod {y} = {x % y}")
        x, y = y, x % y
    lines.append(f"The greatest common divisor of {top} and {bottom} is {x}.")
    return (
        f"Compute {a}/{b} + {c}/{d}.\n"
        + "\n".join(lines)
        + f"\n{a}/{b} + {c}/{d} = {top // x}/{bottom // x}"
    )


def equation(r: Random) -> str:
    """A linear equation in one unknown."""
    a, x, b = r.randrange(2, 60), r.randrange(-90, 91), r.randrange(1, 500)
    return (
        f"Solve {a}x + {b} = {a * x + b} for x.\nSubtract {b} from both sides: {a}x = "
        f"{a * x + b} - {b} = {a * x}.\nDivide both sides by {a}: x = {a * x} / {a} = "
        f"{x}.\nCheck: {a} * ({x}) + {b} = {a * x} + {b} = {a * x + b}."
    )


def shopping(r: Random) -> str:
    """Two purchases and the change."""
    name, (first, second) = r.choice(NAMES), r.sample(GOODS, 2)
    n, p, m, q = r.randrange(2, 40), r.randrange(2, 60), r.randrange(2, 40), r.randrange(2, 60)
    total = n * p + m * q
    paid = total + r.randrange(1, 100)
    return (
        f"{name} buys {n} {first} at {p} cents each and {m} {second} at {q} cents each, and pays "
        f"with {paid} cents. How much change does {name} get?\nThe {first} cost {n} * {p} = "
        f"{n * p} cents.\nThe {second} cost {m} * {q} = {m * q} cents.\nTogether that is {n * p} "
        f"+ {m * q} = {total} cents.\nThe change is {paid} - {total} = {paid - total} cents."
    )


def journey(r: Random) -> str:
    """Distance, speed and time over two legs."""
    name, (start, end) = r.choice(NAMES), r.sample(PLACES, 2)
    v, w, hours, more = (
        r.randrange(3, 30),
        r.randrange(31, 120),
        r.randrange(1, 9),
        r.randrange(1, 9),
    )
    far = v * hours + w * more
    return (
        f"{name} leaves {start} and cycles for {hours} hours at {v} km per hour, then takes a "
        f"train for {more} hours at {w} km per hour to {end}. How long is the way?\nBy bicycle: "
        f"{v} * {hours} = {v * hours} km.\nBy train: {w} * {more} = {w * more} km.\nAltogether: "
        f"{v * hours} + {w * more} = {far} km."
    )


def sharing(r: Random) -> str:
    """Equal shares with a rest, in two steps."""
    one, other, thing = *r.sample(NAMES, 2), r.choice(GOODS)
    a, b, friends = r.randrange(20, 900), r.randrange(20, 900), r.randrange(3, 25)
    each, rest = divmod(a + b, friends)
    return (
        f"{one} has {a} {thing} and {other} has {b}. They put them together and share them "
        f"equally among {friends} children. How many does each child get, and how many are "
        f"left?\nTogether they have {a} + {b} = {a + b}.\n{friends} * {each} = {friends * each}, "
        f"and {a + b} - {friends * each} = {rest}.\nEach child gets {each} {thing}; {rest} are "
        "left."
    )


def percentage(r: Random) -> str:
    """A price after a reduction."""
    name, thing = r.choice(NAMES), r.choice(GOODS)
    percent, price = r.randrange(1, 20) * 5, r.randrange(2, 500) * 20
    off = price * percent // 100
    return (
        f"A box of {thing} costs {price} cents. {name} gets {percent} percent off. What does "
        f"{name} pay?\nOne percent of {price} is {price / 100:g}, so {percent} percent are "
        f"{percent} * {price / 100:g} = {off}.\n{price} - {off} = {price - off}. {name} pays "
        f"{price - off} cents."
    )


FAMILIES: tuple[Callable[[Random], str], ...] = (
    *(addition, subtraction, multiplication, division, fraction),
    *(equation, shopping, journey, sharing, percentage),
)


def problems(total_chars: int = TOTAL_CHARS) -> Iterator[dict[str, Any]]:
    """Distinct problems of all families by turns, about `total_chars` characters; the same ones on
    every machine.
    """
    seen: set[str] = set()
    chars = index = 0
    while chars < total_chars:
        make = FAMILIES[index % len(FAMILIES)]
        group = f"{make.__name__} {index // len(FAMILIES)}"
        index += 1
        text = make(Random(group)) + "\n"
        if text not in seen:  # the same problem twice could be trained on and held out
            seen.add(text)
            chars += len(text)
            yield {"id": group, "text": text, "group": group}

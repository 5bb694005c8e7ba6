"""Arithmetic problems with step-by-step solutions, from a seeded generator."""

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
    lines = []
    carry = 0
    for power in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**power % 10, b // 10**power % 10
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
    """Subtraction of one decimal place after another."""
    a, b = sorted((r.randrange(1000, 10**6), r.randrange(1000, 10**6)), reverse=True)
    lines = []
    remainder = a
    for power in reversed(range(len(str(b)))):
        term = b // 10**power % 10 * 10**power
        if term:
            lines.append(f"{remainder} - {term} = {remainder - term}")
            remainder -= term
    return (
        f"What is {a} minus {b}?\nTake the parts of {b} away one after another.\n"
        + "\n".join(lines)
        + f"\nAnswer: {remainder}"
    )


def multiplication(r: Random) -> str:
    """Multiplication by partial products."""
    a, b = r.randrange(12, 5000), r.randrange(12, 1000)
    terms = [(b // 10**power % 10) * 10**power for power in range(len(str(b)))]
    products = [(a * term, term) for term in reversed(terms) if term]
    lines = [f"{a} * {term} = {product}" for product, term in products]
    total = " + ".join(str(product) for product, _ in products)
    return (
        f"Multiply {a} by {b}.\n"
        + "\n".join(lines)
        + f"\n{total} = {a * b}\nSo {a} * {b} = {a * b}."
    )


def division(r: Random) -> str:
    """Long division with remainder, and its check."""
    b, a = r.randrange(3, 100), r.randrange(1000, 10**6)
    lines = []
    remainder = 0
    for digit in str(a):
        current = remainder * 10 + int(digit)
        quotient, remainder = divmod(current, b)
        lines.append(f"Bring down {digit}: {current} / {b} is {quotient}, rest {remainder}.")
    body = "\n".join(lines)
    return (
        f"Divide {a} by {b}.\n{body}\n{a} = {b} * {a // b} + {remainder}\nThe quotient is {a // b} "
        f"and the remainder {remainder}."
    )


def fraction(r: Random) -> str:
    """Sum of two fractions, reduced."""
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
    """Linear equation in one unknown."""
    a = r.randrange(2, 60)
    x = r.randrange(-90, 91)
    b = r.randrange(1, 500)
    return (
        f"Solve {a}x + {b} = {a * x + b} for x.\nSubtract {b} from both sides: {a}x = "
        f"{a * x + b} - {b} = {a * x}.\nDivide both sides by {a}: x = {a * x} / {a} = "
        f"{x}.\nCheck: {a} * ({x}) + {b} = {a * x} + {b} = {a * x + b}."
    )


def shopping(r: Random) -> str:
    """Two purchases and the change."""
    name, (first, second) = r.choice(NAMES), r.sample(GOODS, 2)
    n, p = r.randrange(2, 40), r.randrange(2, 60)
    m, q = r.randrange(2, 40), r.randrange(2, 60)
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
    v, w = r.randrange(3, 30), r.randrange(31, 120)
    hours, train_hours = r.randrange(1, 9), r.randrange(1, 9)
    total = v * hours + w * train_hours
    return (
        f"{name} leaves {start} and cycles for {hours} hours at {v} km per hour, then takes a "
        f"train for {train_hours} hours at {w} km per hour to {end}. How long is the way?\n"
        f"By bicycle: {v} * {hours} = {v * hours} km.\n"
        f"By train: {w} * {train_hours} = {w * train_hours} km.\n"
        f"Altogether: {v * hours} + {w * train_hours} = {total} km."
    )


def sharing(r: Random) -> str:
    """Equal shares with a remainder, in two steps."""
    one, other = r.sample(NAMES, 2)
    thing = r.choice(GOODS)
    a, b = r.randrange(20, 900), r.randrange(20, 900)
    friends = r.randrange(3, 25)
    each, rest = divmod(a + b, friends)
    return (
        f"{one} has {a} {thing} and {other} has {b}. They put them together and share them "
        f"equally among {friends} children. How many does each child get, and how many are "
        f"left?\nTogether they have {a} + {b} = {a + b}.\n{friends} * {each} = {friends * each}, "
        f"and {a + b} - {friends * each} = {rest}.\nEach child gets {each} {thing}; {rest} are "
        "left."
    )


def percentage(r: Random) -> str:
    """Price after a discount."""
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
    addition,
    subtraction,
    multiplication,
    division,
    fraction,
    equation,
    shopping,
    journey,
    sharing,
    percentage,
)


def problems(total_chars: int = TOTAL_CHARS) -> Iterator[dict[str, Any]]:
    """Yield distinct problems of all families in turn, about `total_chars` characters in all.

    The problems are the same on every machine.
    """
    seen: set[str] = set()
    chars = index = 0
    while chars < total_chars:
        make = FAMILIES[index % len(FAMILIES)]
        group = f"{make.__name__} {index // len(FAMILIES)}"
        index += 1
        text = make(Random(group)) + "\n"
        if text not in seen:  # a duplicate could be in both splits
            seen.add(text)
            chars += len(text)
            yield {"id": group, "text": text, "group": group}

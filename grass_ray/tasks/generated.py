"""Generated arithmetic word problems: nine kinds, small numbers, one or two steps.

For tests, and for machines without a data folder or a network. The text of a problem decides whether it is a training
or a test problem, so the two are disjoint for all seeds and sizes::

    train = generate("train", rows=2000, seed=0)
    test = generate("test", rows=200, seed=0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from random import Random
from typing import Literal

from grass_ray.config import ConfigError, GeneratedSource
from grass_ray.tasks.row_source import LoadedRows, RowSource
from grass_ray.tasks.rows import Row, hash_rows

MAX_ROWS = 100_000
TEST_SHARE = 5  # one problem in five is a test problem

NAMES = (
    "Ana", "Ben", "Carla", "Dan", "Ella", "Finn", "Gina", "Hugo", "Ines", "Jack", "Kate", "Leo",
    "Maya", "Nina", "Omar", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Yusuf", "Zoe", "Ivan",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "cards", "eggs", "shells", "pens", "stamps",
    "marbles", "cookies", "balls", "flowers", "plates", "stickers", "pears", "candles",
)  # fmt: skip
HOLDERS = ("boxes", "bags", "baskets", "jars", "shelves", "rows")
PLACES = ("school", "club", "park", "library", "bus", "garden")

Problem = tuple[str, tuple[str, ...], int]  # question, worked steps, result


def _add(rng: Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(3, 49), rng.randint(3, 49)
    return (
        f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
        (f"{a} + {b} = {a + b}",),
        a + b,
    )


def _subtract(rng: Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a = rng.randint(12, 90)
    b = rng.randint(3, a - 2)
    return f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?", (f"{a} - {b} = {a - b}",), a - b


def _multiply(rng: Random) -> Problem:
    thing, holder = rng.choice(THINGS), rng.choice(HOLDERS)
    a, b = rng.randint(3, 9), rng.randint(3, 11)
    return (
        f"There are {a} {holder} with {b} {thing} each. How many {thing} are there in all?",
        (f"{a} x {b} = {a * b}",),
        a * b,
    )


def _share(rng: Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    friends, each = rng.randint(2, 9), rng.randint(2, 11)
    total = friends * each
    return (
        f"{name} shares {total} {thing} equally among {friends} friends. How many {thing} does each friend get?",
        (f"{total} / {friends} = {each}",),
        each,
    )


def _compare(rng: Random) -> Problem:
    first, second = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a = rng.randint(14, 80)
    b = rng.randint(3, a - 2)
    return (
        f"{first} has {a} {thing} and {second} has {b}. How many more {thing} does {first} have than {second}?",
        (f"{a} - {b} = {a - b}",),
        a - b,
    )


def _part(rng: Random) -> Problem:
    place = rng.choice(PLACES)
    total = rng.randint(20, 95)
    adults = rng.randint(4, total - 4)
    return (
        f"There are {total} people in the {place}, and {adults} of them are adults. How many are children?",
        (f"{total} - {adults} = {total - adults}",),
        total - adults,
    )


def _gain_and_loss(rng: Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(5, 40), rng.randint(3, 30)
    c = rng.randint(2, a + b - 2)
    return (
        f"{name} has {a} {thing}, finds {b} more and then loses {c}. How many {thing} does {name} have now?",
        (f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"),
        a + b - c,
    )


def _packs(rng: Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(2, 8), rng.randint(3, 9), rng.randint(2, 20)
    return (
        f"{name} buys {a} packs of {b} {thing} and {c} single {thing}. How many {thing} is that?",
        (f"{a} x {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"),
        a * b + c,
    )


def _change(rng: Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, price = rng.randint(2, 7), rng.randint(2, 9)
    paid = a * price + rng.randint(1, 30)
    return (
        f"{name} buys {a} {thing} for {price} dollars each and pays with {paid} dollars. How much is the change?",
        (f"{a} x {price} = {a * price}", f"{paid} - {a * price} = {paid - a * price}"),
        paid - a * price,
    )


KINDS: Mapping[str, Callable[[Random], Problem]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "share": _share,
    "compare": _compare,
    "part": _part,
    "gain_and_loss": _gain_and_loss,
    "packs": _packs,
    "change": _change,
}


def split_of(question: str) -> Literal["train", "test"]:
    """Return the split of a problem, which depends only on its text."""
    return "test" if int(hashlib.sha256(question.encode()).hexdigest(), 16) % TEST_SHARE == 0 else "train"


def generate(split: Literal["train", "test"], *, rows: int, seed: int) -> tuple[Row, ...]:
    """Generate ``rows`` distinct problems. Equal arguments give equal problems, and more rows begin with the same ones.

    Raises:
        ConfigError: more than ``MAX_ROWS`` rows.
    """
    if rows > MAX_ROWS:
        raise ConfigError(
            f"{rows} generated rows were asked for; the generator makes at most {MAX_ROWS} different ones"
        )
    rng = Random(f"{split} {seed}")
    makers = list(KINDS.values())
    found: dict[str, Row] = {}
    while len(found) < rows:
        question, steps, result = rng.choice(makers)(rng)
        if split_of(question) == split and question not in found:
            output = f"{'. '.join(steps)}. The answer is {result}."
            found[question] = Row(instruction=question, input="", output=output, answer=str(result))
    return tuple(found.values())


class GeneratedRows(RowSource[GeneratedSource]):
    """Rows of ``source: {kind: generated}``."""

    def train_rows(self) -> LoadedRows:
        """The training problems."""
        return self._generate("train", self.source.train_rows)

    def test_rows(self, task: str) -> LoadedRows:
        """The test problems."""
        return self._generate("test", self.source.test_rows)

    def _generate(self, split: Literal["train", "test"], number: int) -> LoadedRows:
        if self.data.tasks != ("generated",):
            raise ConfigError(
                f"the generated source makes only the task 'generated', not {', '.join(self.data.tasks)}; "
                "give a folder (--data-dir DIR; in a configuration, source: {kind: folder, path: DIR}) "
                "or the hub (source: {kind: hub})"
            )
        seed = self.source.seed
        rows = generate(split, rows=number, seed=seed)
        entry = {"name": f"generated/{split}-seed{seed}", "sha256": hash_rows(rows), "rows": len(rows)}
        return LoadedRows(rows=rows, files=[entry], description=f"generated with seed {seed}")

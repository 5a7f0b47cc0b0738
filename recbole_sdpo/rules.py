"""What a value must be: a check, the words for it, and examples."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recbole_sdpo.errors import UserError, meant
from recbole_sdpo.values import is_a, shown


@dataclass(frozen=True)
class Rule:
    """A set of values.

    Attributes:
        must_be: the words that end "key=value must be …".
        holds: is a value, of any type, one of them?
        examples: some of them.
    """

    must_be: str
    holds: Callable[[Any], bool]
    examples: tuple[Any, ...]

    def check(self, key: str, value: Any) -> None:
        """Refuse ``value`` if the rule does not hold.

        Raises:
            UserError: naming ``key``, ``value`` and what it must be.
        """
        if not self.holds(value):
            raise UserError(f"{key}={shown(value)} must be {self.must_be}.")

    def or_null(self) -> Rule:
        """The same, or null."""
        return Rule(
            f"{self.must_be}, or null",
            lambda value: value is None or self.holds(value),
            (None, *self.examples),
        )

    def or_else(self, other: Rule) -> Rule:
        """What this or ``other`` allows."""
        both = lambda value: self.holds(value) or other.holds(value)  # noqa: E731
        return Rule(f"{self.must_be}, or {other.must_be}", both, self.examples + other.examples)


FLAG = Rule("true or false", lambda value: isinstance(value, bool), (True, False))
ANY = Rule("anything", lambda value: True, (None,))


def whole(least: int, most: int = 10**9) -> Rule:
    """A whole number."""
    examples = tuple(dict.fromkeys(min(max(least, number), most) for number in (least, 1, 2, 8)))
    words = f"a whole number from {least:,} to {most:,}"
    return Rule(
        words,
        lambda value: _is_number(value) and isinstance(value, int) and least <= value <= most,
        examples,
    )


def number(least: float = -1e9, most: float = 1e9, above: bool = False) -> Rule:
    """A number from ``least``, or above it, to ``most``."""
    ends = [f"{end:,.0f}" if end == int(end) else f"{end:g}" for end in (least, most)]
    words = f"a number {'above {} and at most {}' if above else 'from {} to {}'}".format(*ends)
    examples = tuple(
        item
        for item in dict.fromkeys((least, min(0.1, most), most / 2))
        if abs(item) < 1e6 and (item > least or not above)
    )
    return Rule(
        words,
        lambda value: (
            _is_number(value) and (least < value if above else least <= value) and value <= most
        ),
        examples,
    )


def _is_number(value: Any) -> bool:
    return is_a(value, (int, float)) and math.isfinite(value)


def text(words: str = "text, and not blank", pattern: str = r"(?s).*\S.*", *examples: str) -> Rule:
    """Text that ``pattern`` matches as a whole."""
    return Rule(
        words,
        lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None,
        examples,
    )


def one_of(*choices: str, any_case: bool = False) -> Rule:
    """One of these words."""
    words = {word.lower() for word in choices} if any_case else set(choices)
    words_of = "one of " + ", ".join(choices)
    return Rule(
        words_of,
        lambda value: isinstance(value, str) and (value.lower() if any_case else value) in words,
        choices,
    )


def list_of(rule: Rule, words: str, least: int = 0, most: int = 10_000) -> Rule:
    """A list of values of which each is one of ``rule``'s."""
    examples = [[item] * max(least, 1) for item in rule.examples[:2]] + ([[]] if least == 0 else [])

    def holds(value: Any) -> bool:
        return (
            isinstance(value, list) and least <= len(value) <= most and all(map(rule.holds, value))
        )

    return Rule(words, holds, tuple(examples))


def dict_of(keys: Rule, values: Rule, words: str, least: int = 0, most: int = 1000) -> Rule:
    """A dictionary."""
    examples = tuple({keys.examples[0]: item} for item in values.examples[:3])

    def holds(value: Any) -> bool:
        sized = isinstance(value, dict) and least <= len(value) <= most
        return sized and all(map(keys.holds, value)) and all(map(values.holds, value.values()))

    return Rule(words, holds, examples)


@dataclass(frozen=True)
class Parts:
    """A dictionary whose keys have each a rule of their own; of these, ``needed`` must be there."""

    parts: dict[str, Rule]
    needed: frozenset[str] = frozenset()
    null: bool = False

    @property
    def must_be(self) -> str:
        return f"a dictionary of {', '.join(self.parts)}{', or null' if self.null else ''}"

    @property
    def examples(self) -> tuple[Any, ...]:
        base = {key: self.parts[key].examples[0] for key in self.needed}
        return tuple(
            base | {key: example} for key, rule in self.parts.items() for example in rule.examples
        )

    def holds(self, value: Any) -> bool:
        try:
            self.check("value", value)
        except UserError:
            return False
        return True

    def check(self, key: str, value: Any) -> None:
        """Refuse ``value``, naming the part that is wrong.

        Raises:
            UserError: it is no dictionary, or a part is unknown, missing or wrong.
        """
        if value is None and self.null:
            return
        if not isinstance(value, dict):
            raise UserError(f"{key}={shown(value)} must be {self.must_be}.")
        for part, item in value.items():
            if part not in self.parts:
                raise UserError(
                    f"{key}={shown(value)}: there is no part {part!r}; "
                    f"{meant(part, sorted(self.parts))}"
                )
            self.parts[part].check(f"{key}.{part}", item)
        for part in sorted(self.needed - set(value)):
            raise UserError(f"{key}={shown(value)} must have {part}.")

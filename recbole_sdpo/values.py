"""Values of settings are data: what a user, a file or a checkpoint says is read, and never
evaluated."""

from __future__ import annotations

import ast
import math
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from recbole_sdpo.errors import UserError, reason

WORDS = {"true": True, "false": False, "null": None, "~": None}
"""As YAML writes them, in any case; Python's True, False and None are literals."""

MOST_VALUES = 100_000
"""More than that in one setting is a fault, such as a list of YAML that holds itself."""

LARGEST = 2**63 - 1


KINDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a dictionary",
    type(None): "null",
}
"""What data are made of, in words."""


def is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """``isinstance``, but that true and false, which are numbers to Python, are none here."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def value(text: str) -> Any:
    """A number, a list, … as Python or YAML writes it, or else ``text`` itself."""
    word = text.strip().lower()
    if word in WORDS:
        return WORDS[word]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            literal = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return text if _fault(literal) else literal


def value_of(key: str, text: str) -> Any:
    """The :func:`value` of a setting; an interval such as ``[4,7]`` is text, as RecBole reads it,
    and no list."""
    return text if key.endswith("_inter_num_interval") else value(text)


def several(setting: Any) -> list[Any]:
    """The values of a setting that may be one or several, or the text of either; none of null."""
    read = value(setting) if isinstance(setting, str) else setting
    if read is None:
        return []
    return [*read] if isinstance(read, list | tuple) else [read]


def shown(value: Any) -> str:
    """``value`` as an error shows it: not too long for a sentence."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_values(settings: Any, origin: str = "") -> dict[str, Any]:
    """A copy of ``settings``, of which each is text, a number, true, false, null, or a list or
    dictionary of these.

    Args:
        settings: a dictionary.
        origin: what an error begins with, such as the name of a file and a colon.

    Raises:
        UserError: it is no dictionary, or one of them is something else.
    """
    if not isinstance(settings, dict):
        raise UserError(
            f"{origin}settings must be a dictionary of names and values, not "
            f"{type(settings).__name__}."
        )
    values = {}
    for key, item in settings.items():
        if not isinstance(key, str):
            raise UserError(f"{origin}the key {shown(key)} must be text.")
        values[key] = os.fspath(item) if isinstance(item, os.PathLike) else item
        if fault := _fault(key) or _fault(values[key]):
            raise UserError(f"{origin}{ascii(key)[1:-1]} {fault}.")
    return values


def _fault(value: Any) -> str:
    """What keeps ``value`` from being data, or nothing."""
    rest, number = [value], 0
    while rest:
        item = rest.pop()
        number += 1
        if number > MOST_VALUES:
            return f"must not hold more than {MOST_VALUES:,} values, nor itself"
        if isinstance(item, dict):
            if any(not isinstance(key, str | int) for key in item):
                return "must hold no key but text and whole numbers"
            rest += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        elif isinstance(item, str):
            if "\0" in item or re.search("[\ud800-\udfff]", item):
                return f"must be text that UTF-8 can hold, without NUL, not {ascii(item)[:200]}"
        elif isinstance(item, int):
            if abs(item) > LARGEST:
                return "must not be a number of more than 64 bits"
        elif isinstance(item, float):
            if not math.isfinite(item):
                return f"must be a finite number, not {item}"
        elif item is not None:
            return (
                "must be text, a number, true, false, null, or a list or dictionary of these, "
                f"not {type(item).__name__}"
            )
    return ""


def read_arguments(arguments: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings of a command line, ``--name=value``, of which the value may hold ``=``; and the
    arguments that are none.

    Raises:
        UserError: one is given twice, with different values, or is not data.
    """
    texts: dict[str, str] = {}
    rest: list[str] = []
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name or not equals:
            rest.append(argument)
        elif texts.setdefault(name, text) != text:
            raise UserError(
                f"--{name} is given twice, as {shown(texts[name])} and as {shown(text)}; give it "
                "once."
            )
    return check_values({name: value_of(name, text) for name, text in texts.items()}), rest


class Loader(yaml.SafeLoader):
    """YAML of data alone, where ``1e-3`` is a number, as for RecBole, and no key is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number that says what it is: YAML 1.1 reads 010 in base 8, and 1:30 in base 60."""
        text = node.value
        if ":" in text or re.fullmatch(r"[-+]?0[0-7_]+", text):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{text} is a number of another base; write another or quote it",
                node.start_mark,
            )
        whole = node.tag.endswith("int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)

Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(file: str | Path, name: str = "") -> dict[str, Any]:
    """The settings in a YAML file.

    Args:
        name: what an error calls the file, such as the setting that names it.

    Raises:
        UserError: it cannot be read, is not YAML, or holds no settings; the message names the file.
    """
    name = name or str(file)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} must be text in UTF-8: {error.reason} at byte {error.start}."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {reason(error)}.") from error
    try:
        settings = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark, problem = (
            getattr(error, "problem_mark", None),
            getattr(error, "problem", None) or getattr(error, "reason", ""),
        )
        raise UserError(
            f"{name} is not YAML{f', line {mark.line + 1}' if mark else ''}: {problem}."
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        # What PyYAML raises for a value that does not go with its tag, such as the date 2020-13-01,
        # and for lists too deep.
        raise UserError(f"{name} is not YAML: {type(error).__name__}: {error}.") from error
    if settings is None:
        raise UserError(f"{name} holds no settings; give some, or leave it out.")
    return check_values(settings, f"{name}: ")

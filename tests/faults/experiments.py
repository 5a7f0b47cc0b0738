"""Broken experiment files: what a hand, an editor or a half-written copy makes of a good one."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import yaml

Place = tuple[Any, ...]

HOSTILE = [
    None, True, False, 0, 1, 5, -1, 2**31, 2**32, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"),
    "", " ", "x", "$x$", "a_$b", "_x", "a|b", "a\nb", "x" * 300, "x" * 20_000, "é ☃ 日本", "שלום", "<script>", "../x", "a/b",
    "uni5", "uni0", "uni19", "full", "labeled", "HR@0", "HR@-1", "HR@1e3", "NDCG@99999", "HR", "@", "@1", "MRR@5@5", "GenHit",
    "self", "None", "[1,", "__import__('os').system('touch /tmp/ran')", "!!python/name:os.system", "SDPO-LLM", "Pop", "toy",
    [], {}, [[]], [None], [1, 1], ["a", "a"], [{}], {"a": 1}, {"": None}, {1: 2}, {None: 1}, {True: 1}, [1, "1"], ["uni5", "uni5"],
]  # fmt: skip
"""Values that some places may hold, and most may not."""

KEYS = [
    "name",
    "names",
    "model",
    "settings",
    "setting",
    "vary",
    "tune",
    "axis",
    "seed",
    "seeds",
    "base",
    "title",
    "beta",
    "",
    "x" * 300,
]

LINES = [
    "\t", "- ", ": ", "? ", "&a [*a]", "*a", "<<: *a", "%YAML 9.9", "---", "...", "!!binary aGk=", "a: b: c", "{", "]", "'", "é",
    "date: 2020-01-01", "date: 2020-13-45", "n: .nan", "n: 1" + "0" * 5000, "title: a\ntitle: b", "? [a]\n: 1", "seeds: [1_0]",
    "base: try.yaml", "base: .", "base: /dev/null", "o: !!python/object/apply:os.system ['touch /tmp/ran']",
]  # fmt: skip
"""Text that breaks a file, or means something in YAML."""


def good(settings: dict[str, Any]) -> dict[str, Any]:
    """A small experiment with each of its keys, on the dataset ``toy``; ``settings`` are those
    of all runs."""
    return {
        "title": "A try",
        "dataset": "toy",
        "seeds": [1, 2],
        "candidates": ["uni5", "pop3"],
        "metrics": ["NDCG@5", "HR@1"],
        "baselines": ["Pop"],
        "tries": 2,
        "settings": copy.deepcopy(settings),
        "runs": [
            {"name": "Pop", "model": "Pop"},
            {
                "name": "S-DPO",
                "settings": {"train_neg_sample_args": {"sample_num": 2}},
                "vary": {"beta": [0.5, 2.0]},
            },
            {
                "name": "SFT",
                "settings": {"objective": "sft"},
                "tune": {"sft_learning_rate": [0.1, 0.2]},
            },
        ],
    }


def broken(seed: int, settings: dict[str, Any]) -> bytes:
    """A file of one to three changes to a good one, always the same for a seed. A few are still
    right."""
    draw, content = random.Random(f"experiment {seed}"), good(settings)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        draw.choice([_replace, _replace, _replace, _remove, _rename, _add, _repeat])(draw, content)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()
    return (
        draw.choice([_cut, _insert, _insert, _flip, _twice])(draw, text)
        if draw.random() < 0.35
        else text
    )


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    yield place
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from _places(item, (*place, key))


def _at(content: Any, place: Place) -> Any:
    for key in place:
        content = content[key]
    return content


def _one(draw: random.Random, content: Any, kind: type = object) -> Place | None:
    """A place below the top whose parent is of ``kind``; settings are others' to break, so that
    most are outside of them."""
    places = [
        place for place in _places(content) if place and isinstance(_at(content, place[:-1]), kind)
    ]
    outside = [place for place in places if place[0] != "settings"]
    chosen = outside if outside and draw.random() < 0.8 else places
    return draw.choice(chosen) if chosen else None


def _replace(draw: random.Random, content: Any) -> None:
    if place := _one(draw, content):
        _at(content, place[:-1])[place[-1]] = copy.deepcopy(draw.choice(HOSTILE))


def _remove(draw: random.Random, content: Any) -> None:
    if place := _one(draw, content):
        del _at(content, place[:-1])[place[-1]]


def _rename(draw: random.Random, content: Any) -> None:
    if place := _one(draw, content, dict):
        mapping = _at(content, place[:-1])
        mapping[draw.choice([*KEYS, 5, None, 1.5, f"{place[-1]}s"])] = mapping.pop(place[-1])


def _add(draw: random.Random, content: Any) -> None:
    if place := _one(draw, content, dict):
        _at(content, place[:-1])[draw.choice(KEYS)] = copy.deepcopy(draw.choice(HOSTILE))


def _repeat(draw: random.Random, content: Any) -> None:
    if place := _one(draw, content, list):
        items = _at(content, place[:-1])
        items.append(copy.deepcopy(items[place[-1]]))


def _cut(draw: random.Random, text: bytes) -> bytes:
    return text[: draw.randrange(len(text))]


def _insert(draw: random.Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    lines.insert(
        draw.randrange(len(lines) + 1),
        b" " * draw.choice([0, 0, 2, 3]) + draw.choice(LINES).encode(),
    )
    return b"\n".join(lines)


def _flip(draw: random.Random, text: bytes) -> bytes:
    place = draw.randrange(len(text))
    return text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :]


def _twice(draw: random.Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    place = draw.randrange(len(lines))
    return b"\n".join([*lines[:place], lines[place], *lines[place:]])

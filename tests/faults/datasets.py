"""Broken and odd datasets: pure functions of a generator of random numbers, and what a slow
reader finds in them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

Files = dict[str, bytes]
"""The content of each file by the end of its name, such as ``inter`` or ``train.inter``."""

HEADS = {
    "inter": b"user_id:token\titem_id:token\ttimestamp:float",
    "item": b"item_id:token\ttitle:token_seq",
}


def sound(rng: np.random.Generator) -> Files:
    """A dataset without a fault: 30 users of 5 to 9 events, some seconds apart, in any order in
    the file; some times are ties."""
    start = int(rng.choice([0, 1_700_000_000, -5_000_000, 1_700_000_000_000_000_000]))
    events = [
        b"u%d\ti%d\t%d" % (user, item, start + int(time))
        for user in range(30)
        for item, time in zip(
            rng.permutation(50)[: rng.integers(5, 10)], rng.integers(0, 300, 9), strict=False
        )
    ]
    rng.shuffle(events)
    items = [b"i%d\tThing %d" % (item, item % 45) for item in range(50)]
    return {
        end: b"\n".join([HEADS[end], *rows]) + b"\n"
        for end, rows in (("inter", events), ("item", items))
    }


def broken(rng: np.random.Generator) -> tuple[Files, dict[str, Any], str]:
    """A dataset to which one thing or more has been done: its files, settings that go with it,
    and what was done."""
    files, settings, what = sound(rng), {}, []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
        end = str(rng.choice(["inter", "inter", "item"]))
        files[end] = mutation(files[end], rng)
        what.append(f"{mutation.__name__} in {end}")
    if rng.random() < 0.3:
        key, value = SETTINGS[rng.integers(len(SETTINGS))]
        settings[key] = value
        what.append(f"{key}={value}")
    return files, settings, ", ".join(what)


def last_items(files: Files, separator: str = "\t", encoding: str = "utf-8") -> dict[str, str]:
    """By a slow reader: the last item of each user who has more than one event, where ties stand
    as in the file."""
    text = files["inter"].decode(encoding).lstrip("\ufeff")
    head, *rows = [
        line.split(separator)
        for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        if line
    ]
    place = [
        [field.split(":")[0] for field in head].index(name)
        for name in ("user_id", "item_id", "timestamp")
    ]
    met: dict[str, list[tuple[Fraction, int, str]]] = {}
    for number, row in enumerate(rows):
        user, item, time = (row[column] for column in place)
        met.setdefault(user, []).append((Fraction(time), number, item))
    return {user: max(events)[2] for user, events in met.items() if len(events) > 1}


def _line(
    mutate: Callable[[bytes, np.random.Generator], bytes], header: bool = False
) -> Callable[[bytes, np.random.Generator], bytes]:
    """Do it to one line: the header, or one below it."""

    def mutated(content: bytes, rng: np.random.Generator) -> bytes:
        lines = content.split(b"\n")
        place = 0 if header or len(lines) < 3 else int(rng.integers(1, len(lines) - 1))
        lines[place] = mutate(lines[place], rng)
        return b"\n".join(lines)

    mutated.__name__ = mutate.__name__
    return mutated


def _field(
    value: Callable[[bytes, np.random.Generator], bytes], place: int | None = None
) -> Callable:
    def field(line: bytes, rng: np.random.Generator) -> bytes:
        parts = line.split(b"\t")
        which = min(len(parts) - 1, int(rng.integers(len(parts))) if place is None else place)
        parts[which] = value(parts[which], rng)
        return b"\t".join(parts)

    field.__name__ = value.__name__
    return _line(field)


def _put(text: bytes) -> Callable[[bytes, np.random.Generator], bytes]:
    def put(content: bytes, rng: np.random.Generator) -> bytes:
        place = int(rng.integers(len(content) + 1))
        return content[:place] + text + content[place:]

    put.__name__ = f"put_{text!r}"
    return put


def _is(text: bytes) -> Callable[[bytes, np.random.Generator], bytes]:
    def becomes(content: bytes, rng: np.random.Generator) -> bytes:
        return text

    becomes.__name__ = f"is_{text!r}"
    return becomes


def byte_order_mark(content: bytes, rng: np.random.Generator) -> bytes:
    return b"\xef\xbb\xbf" + content


def flipped_byte(content: bytes, rng: np.random.Generator) -> bytes:
    if not content:
        return content
    place = int(rng.integers(len(content)))
    return content[:place] + bytes([int(rng.integers(256))]) + content[place + 1 :]


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def commas(content: bytes, rng: np.random.Generator) -> bytes:
    return content.replace(b"\t", b",")


def dos_lines(content: bytes, rng: np.random.Generator) -> bytes:
    return content.replace(b"\n", b"\r\n")


def mac_lines(content: bytes, rng: np.random.Generator) -> bytes:
    return content.replace(b"\n", b"\r")


def utf16(content: bytes, rng: np.random.Generator) -> bytes:
    return content.decode("latin-1").encode("utf-16")


def header_alone(content: bytes, rng: np.random.Generator) -> bytes:
    return content.split(b"\n")[0] + b"\n"


def no_header(content: bytes, rng: np.random.Generator) -> bytes:
    return content.split(b"\n", 1)[-1]


def no_types(content: bytes, rng: np.random.Generator) -> bytes:
    return content.replace(b":token_seq", b"").replace(b":token", b"").replace(b":float", b"")


def few_rows(content: bytes, rng: np.random.Generator) -> bytes:
    return b"\n".join(content.split(b"\n")[: int(rng.integers(1, 8))]) + b"\n"


def quoted_text(content: bytes, rng: np.random.Generator) -> bytes:
    return b'"' + content.replace(b'"', b'""') + b'"'


def other_column(line: bytes, rng: np.random.Generator) -> bytes:
    names = [
        b"when:float",
        b"timestamp:token",
        b"timestamp:float_seq",
        b"user_id:token",
        b"item_id:float",
        b"a:b:token",
        b"x:number",
        b"",
    ]
    parts = line.split(b"\t")
    parts[int(rng.integers(len(parts)))] = names[int(rng.integers(len(names)))]
    return b"\t".join(parts)


def swapped_columns(content: bytes, rng: np.random.Generator) -> bytes:
    return b"\n".join(b"\t".join(line.split(b"\t")[::-1]) for line in content.split(b"\n"))


def repeated_line(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    return b"\n".join([*lines[:-1], lines[int(rng.integers(len(lines)))], b""])


WORDS = (
    b"",
    b" ",
    b"NA",
    b"nan",
    b"inf",
    b"-inf",
    b"1e400",
    b"text",
    b"1_000",
    b"2024-01-31",
    b"[PAD]",
    b'"',
    b'"a',
    b"\xe9",
    b"\xc3\xa9",
)

MUTATIONS: list[Callable[[bytes, np.random.Generator], bytes]] = [
    *(
        byte_order_mark,
        flipped_byte,
        cut,
        commas,
        dos_lines,
        mac_lines,
        utf16,
        header_alone,
        no_header,
        no_types,
        few_rows,
    ),
    *(swapped_columns, repeated_line, _is(b""), _is(b"\n"), _is(b"\xff\xfe")),
    *(
        _put(text)
        for text in (b"\t", b'"', b"\0", b"\n", b"\n\n", b"\r", b"\xe9", b"\xe2\x80\xa8", b"\x0b")
    ),
    *(_field(_is(word)) for word in WORDS),
    *(_field(_is(word), place=2) for word in WORDS),
    _field(quoted_text),
    *(_line(other_column, header=True) for _ in range(4)),
]
"""What can be done to the content of a file."""

SETTINGS: list[tuple[str, Any]] = [
    *(("field_separator", separator) for separator in (",", ";", "", "::")),
    *(("encoding", encoding) for encoding in ("latin-1", "utf-16", "none")),
    *(("user_inter_num_interval", interval) for interval in ("[7,inf)", "[100,inf)")),
    ("rm_dup_inter", "first"),
    ("val_interval", {"timestamp": "[0,inf)"}),
    ("val_interval", {"rating": "[3,inf)"}),
    ("normalize_all", True),
    ("load_col", {"inter": ["user_id", "item_id"]}),
    ("load_col", {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}),
    ("benchmark_filename", ["train", "valid", "test"]),
]
"""Settings that go with data."""

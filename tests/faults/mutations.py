"""Broken or odd atomic files: each user is tested on the last event, or a sentence names the
file."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal

from tests.faults import oracle, toy
from tests.faults.judge import Wrong, ended_well
from tests.faults.trial import Trial

LONG, SHORT = 100, 4

MODELS = ["SDPO-LLM", "SDPO-LLM", "SDPO-LLM", "BPR", "SASRec", "Pop"]


@dataclass
class Data:
    """A dataset as it is to be written.

    Attributes:
        events: user, item and time of each row.
        titles: of each item.
        spoil: what is done to the bytes of the files at the end.
        may_run: False where only an error is right; True where both are.
        needs_titles: a model without titles may leave the file of items unread.
    """

    events: list[tuple[str, str, str]]
    titles: dict[str, str]
    draw: random.Random
    needs_titles: bool
    spoil: list[tuple[str, Callable[[bytes], bytes]]] = field(default_factory=list)
    head: str = "user_id:token\titem_id:token\ttimestamp:float"
    may_run: bool = True

    def files(self) -> dict[str, bytes]:
        """The bytes of each file, by the end of its name."""
        files = {
            "inter": "\n".join([self.head, *map("\t".join, self.events)]) + "\n",
            "item": "\n".join(
                ["item_id:token\ttitle:token_seq", *map("\t".join, self.titles.items())]
            )
            + "\n",
        }
        content = {end: text.encode("utf-8", "surrogateescape") for end, text in files.items()}
        for end, spoil in self.spoil:
            content[end] = spoil(content[end])
        return content


def _times(data: Data, time: Callable[[int, str], str]) -> None:
    """Give the n-th event of each user in time another time, in the same order."""
    order: dict[str, int] = {}
    times = {}
    for user, item, old in sorted(data.events, key=lambda event: Decimal(event[2])):
        order[user] = order.get(user, -1) + 1
        times[user, item, old] = time(order[user], old)
    data.events = [(user, item, times[user, item, old]) for user, item, old in data.events]


def close_times(data: Data) -> None:
    """Events of one user seconds apart, which float32 cannot tell from each other."""
    _times(data, lambda number, old: str(1_700_000_000 + 7 * number))


def fractions(data: Data) -> None:
    """Times with fractions, some of which float64 cannot tell from each other."""
    _times(data, lambda number, old: f"1700000000.{number:0{data.draw.choice([3, 9])}d}")


def nanoseconds(data: Data) -> None:
    """Times in nanoseconds."""
    _times(data, lambda number, old: str(1_700_000_000_000_000_000 + number))


def negative_times(data: Data) -> None:
    """Times before 1970."""
    _times(data, lambda number, old: str(-1000 + 10 * number))


def ties(data: Data) -> None:
    """Two last events of one time: the later row is the later event."""
    _times(data, lambda number, old: str(1_000_000 + 100 * min(number, toy.EVENTS - 2)))


def repeated_rows(data: Data) -> None:
    """Rows that are there twice."""
    data.events += data.draw.sample(data.events, 5)


def no_time(data: Data) -> None:
    """A time that is none."""
    place = data.draw.randrange(len(data.events))
    user, item, _ = data.events[place]
    data.events[place] = (
        user,
        item,
        data.draw.choice(["", "nan", "NaN", "inf", "-inf", "never", "2024-01-31"]),
    )
    data.may_run = False


def odd_ids(data: Data) -> None:
    """Ids that look like numbers, like nothing, or like neither."""
    odd = data.draw.sample(
        ["007", "1e5", "0x10", "-1", "é", "日本", "a b", "a,b", "a'b", "[PAD]", "3.0", "'"],
        2,
    )
    names = dict(zip(("u3", "i5"), odd, strict=True))
    data.events = [
        (names.get(user, user), names.get(item, item), time) for user, item, time in data.events
    ]
    data.titles = {names.get(item, item): title for item, title in data.titles.items()}


def missing_ids(data: Data) -> None:
    """Ids that pandas takes for missing."""
    odd = data.draw.choice(["nan", "NA", "null", "None", ""])
    data.events = [(odd if user == "u3" else user, item, time) for user, item, time in data.events]


def short_users(data: Data) -> None:
    """Users of one to three events."""
    for user, count in (("u1", 1), ("u2", 2), ("u4", 3)):
        mine = [event for event in data.events if event[0] == user]
        data.events = [event for event in data.events if event not in mine[count:]]


def all_short(data: Data) -> None:
    """All users have three events or fewer."""
    count = data.draw.choice([1, 2, 3])
    order: dict[str, int] = {}
    rows = []
    for event in data.events:
        order[event[0]] = order.get(event[0], 0) + 1
        rows += [event] if order[event[0]] <= count else []
    data.events = rows


def one_user(data: Data) -> None:
    """A single user."""
    data.events = [event for event in data.events if event[0] == "u0"]


def one_item(data: Data) -> None:
    """A single item."""
    data.events = [(user, "i0", time) for user, _, time in data.events]


def no_rows(data: Data) -> None:
    """A header and nothing else."""
    data.events, data.may_run = [], False


def _spoil_one(data: Data, spoil: Callable[[bytes], bytes]) -> None:
    """Make one of the files unreadable."""
    end = data.draw.choice(["inter", "item"])
    data.spoil.append((end, spoil))
    data.may_run &= end == "item" and not data.needs_titles


def empty(data: Data) -> None:
    """A file of no bytes."""
    _spoil_one(data, lambda content: b"")


def mark(data: Data) -> None:
    """A byte-order mark."""
    data.spoil.append(
        (data.draw.choice(["inter", "item"]), lambda content: b"\xef\xbb\xbf" + content)
    )


def commas(data: Data) -> None:
    """Commas for tabs."""
    _spoil_one(data, lambda content: content.replace(b"\t", b","))


def latin_1(data: Data) -> None:
    """A title in another encoding."""
    data.spoil.append(("item", lambda content: content + b"i99\tcaf\xe9\n"))
    data.may_run = not data.needs_titles


def stray_tab(data: Data) -> None:
    """A tab too many, or a value too few."""
    end, spoilt = data.draw.choice(["inter", "item"]), data.draw.randrange(2, 9)
    many = data.draw.random() < 0.5

    def spoil(content: bytes) -> bytes:
        lines = content.split(b"\n")
        lines[spoilt] = lines[spoilt] + b"\tx" if many else lines[spoilt].rpartition(b"\t")[0]
        return b"\n".join(lines)

    data.spoil.append((end, spoil))


def quotes(data: Data) -> None:
    """A quote that opens a title, an id, or a row."""
    item = data.draw.choice([*data.titles])
    data.titles[item] = data.draw.choice(['"The "Gold" Edition', '"', 'a "b" c', '"a"', "''"])


def windows(data: Data) -> None:
    """Lines that end as on Windows."""
    data.spoil += [
        (end, lambda content: content.replace(b"\n", b"\r\n")) for end in ("inter", "item")
    ]


def no_column(data: Data) -> None:
    """A column that is called otherwise, or a header without types."""
    data.head = data.draw.choice(
        [
            "user_id:token\titem_id:token\ttime:float",
            "user_id\titem_id\ttimestamp",
            "user:token\titem_id:token\ttimestamp:float",
            "",
        ]
    )
    data.may_run = False


def time_as_text(data: Data) -> None:
    """A time column of another type."""
    data.head = data.head.replace(
        "timestamp:float",
        f"timestamp:{data.draw.choice(['token', 'token_seq', 'float_seq', 'int', ''])}",
    )


def long_title(data: Data) -> None:
    """A title as long as a book."""
    data.titles["i3"] = data.draw.choice(["x", "word ", "é"]) * data.draw.choice(
        [2_000, 20_000, 100_000]
    )


def hostile_titles(data: Data) -> None:
    """Titles that are markup, control tokens, or invisible."""
    for item in data.draw.sample([*data.titles], 6):
        data.titles[item] = data.draw.choice(
            [
                "<s>",
                "</s>",
                "<|endoftext|>",
                "<unk>",
                "",
                " ",
                "\u200b",
                "\u202etxt",
                "a\u0000b",
                "ﬁ",
                "<b>x</b>",
                "$x^2$",
            ]
        )


def one_title(data: Data) -> None:
    """Items of one title."""
    data.titles = {
        item: data.draw.choice(["red cube", title]) for item, title in data.titles.items()
    }


def untitled(data: Data) -> None:
    """Items that have no row in the file of items, and others that no event names."""
    for item in ("i1", "i2"):
        del data.titles[item]
    data.titles["i99"] = "new cube"


MUTATIONS = [
    close_times, fractions, nanoseconds, negative_times, ties, repeated_rows, no_time, odd_ids,
    missing_ids, short_users, all_short, one_user, one_item, no_rows, empty, mark, commas, latin_1,
    stray_tab, quotes, windows, no_column, time_as_text, long_title,
    hostile_titles, one_title, untitled,
]  # fmt: skip


def attempt(trial: Trial) -> str:
    """One or two of these, under one model."""
    draw = trial.draw
    model = draw.choice(MODELS)
    data = Data(toy.rows(draw.randrange(100)), toy.titles(), draw, model == "SDPO-LLM")
    chosen = draw.sample(MUTATIONS, draw.choice([1, 1, 2]))
    for mutation in sorted(chosen, key=MUTATIONS.index):
        mutation(data)
    trial.what = f"{model}: {'; '.join(mutation.__doc__.rstrip('.') for mutation in chosen)}"
    folder = trial.folder / "data" / "toy"
    folder.mkdir(parents=True)
    for end, content in data.files().items():
        (folder / f"toy.{end}").write_bytes(content)
    ending = trial.run(toy.settings(model, data_path="data", run_dir="run"), model=model)
    names = [".inter", ".item", "title", "timestamp", "users", "items", "max_item_list_length"]
    names += ["eval_args", "train_neg_sample_args", "topk"]
    if not ended_well(ending, names):
        return "sentence"
    if not data.may_run:
        raise Wrong("wrong result", "it was taken as if nothing were wrong")
    _check(trial, data)
    return "result"


def _check(trial: Trial, data: Data) -> None:
    """Users of three events and more are tested on their last."""
    counts: dict[str, int] = {}
    for user, _, _ in data.events:
        counts[user] = counts.get(user, 0) + 1
    targets = oracle.last_items(event for event in data.events if counts[event[0]] > 2)
    oracle.check_metrics(trial.folder / "run")
    oracle.check_targets(trial.folder / "run", targets)

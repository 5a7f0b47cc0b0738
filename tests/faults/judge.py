"""What is right: the correct result, or one sentence that names what is wrong; and what is not."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.faults.warm import Ending

SORTS = {
    "traceback": "it ended in a traceback",
    "vague": "its error does not name what was wrong",
    "hang": "it ran for more than a minute",
    "memory": "it ran out of memory",
    "killed": "a signal ended it",
    "wrong result": "it ended well, with a result that is not right",
    "code ran": "text from a setting or a file was run as code",
    "dead": "what was interrupted can neither go on nor begin again",
    "left behind": "files that only a run that goes on needs are there after its end",
    "asked": "it read its standard input",
}
"""The ways of being wrong."""

OUT_OF_MEMORY = re.compile(
    r"MemoryError|can't allocate memory|Cannot allocate memory|out of memory|bad_alloc",
    re.IGNORECASE,
)


class Wrong(AssertionError):
    """An outcome that is not right.

    Args:
        sort: one of ``SORTS``.
        why: what was seen.
    """

    def __init__(self, sort: str, why: str) -> None:
        assert sort in SORTS, sort
        super().__init__(why)
        self.sort, self.why = sort, why


def ended_well(ending: Ending, names: Iterable[str] = (), codes: Iterable[int] = (1,)) -> bool:
    """True where the program ended without an error; False where it ended as it should with one.

    Args:
        names: words of which one must stand in the sentence: the key, the file; none for any.
        codes: exit codes of an error.

    Raises:
        Wrong: it ended in any other way.
    """
    last = last_line(ending.err, 10**6)
    if ending.asked:
        raise Wrong("asked", last)
    if ending.code is None:
        raise Wrong("hang", last)
    if ending.code < 0 and ending.code not in codes:
        raise Wrong("killed", f"signal {-ending.code} after: {last}")
    if "Traceback (most recent call last)" in ending.err:
        sort = "memory" if OUT_OF_MEMORY.search(ending.err[-4000:]) else "traceback"
        raise Wrong(sort, f"{last[:500]} ({_place(ending.err)})")
    if ending.code == 0:
        return True
    names = [*names]
    errors = re.findall(r"^error: .+$", ending.err, re.MULTILINE)
    if ending.code not in codes or len(errors) != 1 or not last.startswith("error: "):
        raise Wrong("vague", f"exit code {ending.code} after: {ending.err.strip()[-300:]!r}")
    if not re.search(r"\w+ \w+", last.removeprefix("error: ")):
        raise Wrong("vague", last[:500])
    if names and not any(name.lower() in last.lower() for name in names):
        raise Wrong("vague", f"{last[:500]} (it names none of {', '.join(names[:9])})")
    return False


def interrupted_well(ending: Ending, number: int) -> None:
    """Did the program end as one should that got the signal ``number``: a sentence, and the usual
    code?

    Raises:
        Wrong: it did not.
    """
    if "Traceback" in ending.err:
        raise Wrong("traceback", f"{last_line(ending.err)} ({_place(ending.err)})")
    last = last_line(ending.err) or last_line(ending.out)
    if ending.code != 128 + number or len(last.split()) < 4 or " INFO " in last:
        raise Wrong("vague", f"exit code {ending.code} after: {last}")


def last_line(text: str, width: int = 500) -> str:
    """The last line that is not empty."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:width] if lines else ""


def _place(err: str) -> str:
    """Where a traceback ends: file and line."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', err)
    ours = [frame for frame in frames if "recbole" in frame[0]] or frames or [("?", "?")]
    file, line = ours[-1]
    return f"{'/'.join(file.split('/')[-3:])}:{line}"

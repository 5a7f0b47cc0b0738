"""The harness itself: does it see what is wrong?"""

import os
import random
import signal
import sys
import time

import pytest

from tests.faults import oracle
from tests.faults.crashes import CRASH, Writes
from tests.faults.judge import Wrong, ended_well
from tests.faults.tampering import DAMAGE
from tests.faults.warm import Ending, Program

TRACEBACK = "Traceback (most recent call last):\n  File 'x', line 1\nKeyError: 'seed'\n"


@pytest.mark.parametrize(
    ("code", "err", "sort"),
    [
        (1, TRACEBACK, "traceback"),
        (0, TRACEBACK, "traceback"),
        (1, TRACEBACK + "MemoryError\n", "memory"),
        (1, "error: seed='x' must be a number.\nand more\n", "vague"),
        (1, "error: a.\nerror: seed='x' must be a number.\n", "vague"),
        (1, "error: 'x' must be a number.\n", "vague"),
        (1, "error: seed\n", "vague"),
        (1, "", "vague"),
        (2, "error: seed='x' must be a number.\n", "vague"),
        (-9, "", "killed"),
        (None, "", "hang"),
    ],
)
def test_it_sees_what_is_wrong(code, err, sort):
    with pytest.raises(Wrong) as wrong:
        ended_well(Ending(code, "", err, False), ["seed"])
    assert wrong.value.sort == sort


def test_it_sees_who_reads_standard_input():
    with pytest.raises(Wrong) as wrong:
        ended_well(Ending(0, "", "", True))
    assert wrong.value.sort == "asked"


def test_a_result_or_a_sentence_is_right():
    assert ended_well(Ending(0, "", "some log\n", False), ["seed"])
    said = Ending(1, "", "some log\nerror: seed='x' must be a number.\n", False)
    assert not ended_well(said, ["topk", "seed"])


def _exit(what):
    return lambda: sys.exit(what)


def _fail():
    raise KeyError("seed")


def _loop():
    time.sleep(60)


def test_a_program_ends_as_python_ends_it(tmp_path):
    def end(name, call, **how):
        return Program(tmp_path / name, call, **how).ending(0.5)

    assert end("fine", lambda: print("out")) == Ending(0, "out\n", "", False)
    assert end("text", _exit("error: x")) == Ending(1, "", "error: x\n", False)
    assert end("code", _exit(7)).code == 7
    assert "KeyError: 'seed'" in end("fails", _fail).err
    assert end("reads", input).asked
    assert end("hangs", _loop).code is None
    assert (
        end("where", lambda: print(os.getcwd(), *sys.argv[1:]), arguments=["--a=1"]).out
        == f"{tmp_path / 'where'} --a=1\n"
    )


def test_a_program_can_be_killed(tmp_path):
    program = Program(tmp_path, _loop)
    assert not program.ended(0.05)
    program.send(signal.SIGKILL)
    assert program.ending(5).code == -signal.SIGKILL


def test_a_crash_comes_before_each_change_and_takes_what_was_not_flushed(tmp_path):
    def write():
        os.mkdir("run")
        for name in ("safe", "lost"):
            with open(f"run/{name}", "w") as stream:
                stream.write("x" * 100)
                stream.flush()
                if name == "safe":
                    os.fsync(stream.fileno())
        os.replace("run/lost", "run/renamed")
        os.remove("run/safe")

    def end(at, seed=0):
        folder = tmp_path / f"{at} {seed}"
        writes = Writes(folder, at, random.Random(seed))
        code = Program(folder, write, first=writes.watch).ending().code
        return code, {file.name: file.stat().st_size for file in (folder / "run").glob("*")}

    left = [end(at) for at in range(7)]
    assert [code for code, _ in left] == [CRASH] * 6 + [0]
    names = [set(files) for _, files in left]
    both, renamed = {"safe", "lost"}, {"safe", "renamed"}
    assert names == [set(), set(), {"safe"}, {"safe"}, both, renamed, {"renamed"}]
    assert all(files.get("safe", 100) == 100 for _, files in left[3:])
    sizes = {end(5, seed)[1]["renamed"] for seed in range(6)}
    assert min(sizes) < 100 == max(sizes)


def test_damage_damages():
    draw, data = random.Random(0), bytes(range(1, 255))
    for name, damage in DAMAGE.items():
        assert damage(data, draw) != data, name


def test_the_last_event_is_told_exactly():
    events = [("u", "a", "17e8"), ("u", "b", "1700000000.0000001"), ("u", "c", "1700000000")]
    assert oracle.last_items(events) == {"u": "b"}
    assert oracle.last_items([("u", "a", "1"), ("u", "b", "1.0")]) == {"u": "b"}

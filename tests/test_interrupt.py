"""The command ends with a sentence, the line that goes on, and the code that shells expect."""

import errno
import os
import signal
import time

import pytest

from recbole_sdpo import interrupt
from recbole_sdpo.interrupt import (
    Stopped,
    asked_to_stop,
    endings,
    finishing_steps,
    say_how_to_go_on,
)


@pytest.fixture(autouse=True)
def in_a_terminal():
    """Ctrl-C is heard: a shell starts what goes on behind it with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_command_with_a_sentence(capsys, signum, code):
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    with pytest.raises(SystemExit) as ended, endings():
        os.kill(os.getpid(), signum)
        pytest.fail("went on")
    said = (
        f"stopped by {signal.Signals(signum).name}; nothing was begun, so give the command again.\n"
    )
    assert ended.value.code == code and capsys.readouterr().err == said
    assert [
        signal.getsignal(number) for number in interrupt.SIGNALS
    ] == before and not asked_to_stop()


def test_a_signal_that_a_finalizer_swallows_comes_again(capsys):
    class Final:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    with pytest.raises(SystemExit) as ended, endings():
        final = Final()
        del final
        time.sleep(5)
        pytest.fail("went on")
    assert ended.value.code == 143 and "Traceback" not in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with endings():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_step_is_finished_first_and_a_second_signal_of_the_launcher_hastens_nothing(capsys):
    steps = []
    with pytest.raises(SystemExit) as ended, endings(), finishing_steps():
        for step in range(5):
            if step == 2:
                for signum in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
                    os.kill(os.getpid(), signum)
            steps.append(step)
            if asked_to_stop():
                raise Stopped(asked_to_stop())
    assert steps == [0, 1, 2] and ended.value.code == 130


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    monkeypatch.setattr(interrupt, "LAUNCHERS_REPEAT_S", 0.0)
    with pytest.raises(SystemExit) as ended, endings(), finishing_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    assert ended.value.code == 130


def test_a_signal_that_no_step_saw_takes_effect_after_the_last():
    with pytest.raises(SystemExit) as ended, endings():
        with finishing_steps():
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")
    assert ended.value.code == 143


@pytest.mark.parametrize(
    ("program", "start"),
    [
        ("run_recbole_sdpo.py", "python run_recbole_sdpo.py"),
        ("/x/recbole_sdpo/__main__.py", "python -m recbole_sdpo"),
        ("/bin/recbole-sdpo", "recbole-sdpo"),
    ],
)
def test_the_line_that_goes_on_is_the_command_as_it_was_given(
    monkeypatch, capsys, tmp_path, program, start
):
    monkeypatch.setattr("sys.argv", [program, "--eval_args={'mode': 'full'}", "--resume=old"])
    with pytest.raises(SystemExit), endings():
        error = OSError(errno.ENOSPC, "No space left on device", "a/file")
        say_how_to_go_on(error, tmp_path)
        raise error
    line = f"{start} '--eval_args={{'\"'\"'mode'\"'\"': '\"'\"'full'\"'\"'}}' --resume={tmp_path}"
    expected = (
        "error: cannot use a/file: No space left on device; free some space, then go on with: "
        f"{line}\n"
    )
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("processes", "here", "start"),
    [
        ("2", "2", ["torchrun", "--nproc_per_node=2"]),
        (
            *("6", "2"),
            [
                *("torchrun", "--nnodes=3", "--rdzv_backend=c10d", "--rdzv_endpoint=first:29500"),
                "--nproc_per_node=2",
            ],
        ),
        (
            *("2", "1"),
            [
                *("torchrun", "--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=first:29500"),
                "--nproc_per_node=1",
            ],
        ),
    ],
)
def test_the_line_of_several_processes_starts_as_many(monkeypatch, processes, here, start):
    monkeypatch.setattr("sys.argv", ["run.py", "--seed=1"])
    place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "first"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)
    assert interrupt.as_given() == [*start, "run.py", "--seed=1"]


def test_a_fault_of_ours_shows_its_traceback():
    with pytest.raises(BrokenPipeError), endings():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_in_python_ctrl_c_is_what_it_is_elsewhere():
    with pytest.raises(KeyboardInterrupt) as raised, finishing_steps():
        os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(raised.value, Stopped)

"""What README prints is done: every command, with small budgets."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path

import pandas as pd

from recbole_sdpo.command.program import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = (
    "--backbone=scratch --scratch_hidden_size=32 --scratch_heads=2 --show_progress=False"
    " --MAX_ITEM_LIST_LENGTH=8 --sft_epochs=1 --sdpo_epochs=1"
    " --max_train_targets=24 --max_eval_targets=24"
)
# `make test` tells the programs that it starts how it was called itself.
OUTSIDE_MAKE = {
    key: value for key, value in os.environ.items() if "MAKE" not in key and key != "MFLAGS"
}
IN_THE_CHECKOUT = {"cwd": ROOT, "capture_output": True, "text": True, "env": OUTSIDE_MAKE}
OFFLINE = "--dry-run --no-index --no-deps --no-build-isolation --quiet"
OF_BPR = "--epochs=1 --train_batch_size=8192 --max_eval_targets=24"
APPENDED = {
    "make run": f'ARGS="{SMALL}"',
    "make test": "ARGS=--version",
    ". .venv/bin/activate": "",
    "python3 -m venv": "--help",
    "python run_recbole_sdpo.py --model=BPR": OF_BPR,
    "recbole-sdpo run --model=BPR": OF_BPR,
    "recbole-sdpo recommend": "",
    "pip install": OFFLINE,
}
"""What a command gets besides, by its beginning."""


def commands() -> list[str]:
    """The lines of README's blocks that have no language, and what its text tells to make."""
    blocks = re.findall(r"^```\n((?:(?!```).*\n)*)```$", README, flags=re.M)
    named = re.findall(r"`(make [a-z]+)`", README)
    return list(dict.fromkeys([*"".join(blocks).splitlines(), *named]))


def steps(command: str) -> str:
    """The last program that ``make`` would run, or the command itself."""
    if not command.startswith("make"):
        return command
    told = subprocess.run(["bash", "-c", command.replace("make", "make -n", 1)], **IN_THE_CHECKOUT)
    program = r"\S*venv/bin/(python|recbole-sdpo)"  # wherever VENV says that it is
    programs = [line for line in told.stdout.splitlines() if re.search(program, line)]
    assert programs, told.stdout + told.stderr
    return re.sub(program, r"\1", programs[-1])


def call(command: str, monkeypatch) -> None:
    """Do ``command``: in this process where it is a program of ours, which spares the imports."""
    program, *arguments = [
        path for word in shlex.split(command) for path in (sorted(glob(word)) or [word])
    ]
    if program not in ("python", "recbole-sdpo"):
        shell = re.sub(r"\bpython3?\b", sys.executable, command)
        shell = shell.replace("pip", f"{sys.executable} -m pip")
        ended = subprocess.run(["bash", "-c", shell], **IN_THE_CHECKOUT)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return
    monkeypatch.setattr("sys.argv", arguments if program == "python" else [program, *arguments])
    try:
        if program == "recbole-sdpo":
            main()
        elif arguments[0] == "-c":
            exec(arguments[1], {})
        elif arguments[0] == "-m":
            monkeypatch.setattr("sys.argv", arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code


def test_every_command_does_what_it_says(monkeypatch, tmp_path, capfd, caplog):
    caplog.set_level("INFO")  # pytest has taken the log, which the program would print
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = commands()
    for command in done:
        (more,) = (APPENDED[start] for start in APPENDED if command.startswith(start))
        if not command.startswith("."):
            call(steps(f"{command} {more}"), monkeypatch)
    printed = "".join([*capfd.readouterr(), caplog.text])
    rows = r"^\| *((?:SDPO-LLM after|popularity|BPR)[^|,]*?) *\|"
    shown = set(re.findall(rows, README, flags=re.M))
    assert len(done) >= 6 and len(shown) == 4
    assert {name for name in shown if f"| {name} " not in printed} == set()
    assert "| item " in printed


def test_its_numbers_are_in_the_pages_that_it_links_to():
    bullets = README.split("## What it is good for")[1].split("##")[0].split("\n* ")[1:]
    assert len(bullets) == 6
    for bullet in bullets:
        (link,) = re.findall(r"\]\(([\w/.]+)", bullet)
        page = (ROOT / link).read_text(encoding="utf-8")
        numbers = re.findall(r"\d+[.,]\d+(?:e-\d)?|\d{2,}", bullet.split("](")[0])
        assert numbers and all(re.search(rf"(?<![\d.]){number}(?!\d)", page) for number in numbers)
    table = (ROOT / "results/ml-100k/main/table.md").read_text(encoding="utf-8")
    rows = re.findall(r"0\.\d{4}", README.split("## Results")[1].split("##")[0])
    assert len(rows) > 20 and all(number in table for number in rows)


def test_it_is_short_and_its_links_lead_somewhere():
    words = [word for word in README.split() if re.search(r"\w", word)]
    assert len(README.splitlines()) <= 200 and len(words) <= 1000
    missing = []
    pages = (ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("results/**/*.md"))
    for file in pages:
        text = file.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target, _, anchor = link.partition("#")
            place = (file.parent / target) if target else file
            if "://" in target:
                continue
            if not place.exists() or (anchor and anchor not in anchors(place)):
                missing.append(f"{file.relative_to(ROOT)}: {link}")
    assert not missing


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_says_what_the_pretrained_alternative_gives():
    """As the results have it, where it stands."""
    (line,) = re.findall(r"^PRETRAINED = (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    (config,) = re.findall(r"configs/\S+\.yaml", line)
    assert (ROOT / config).is_file()
    table = pd.read_csv(ROOT / "results" / "ml-100k" / Path(config).stem / "table.csv")
    row = table.query("model == 'S-DPO' and metric == 'HR@1'").iloc[0]
    assert f"HR@1 {row['mean']:.4f} on ml-100k after {row['train_s'] / 60:.0f} minutes" in line


def test_another_python_is_not_taken_for_the_one_that_is_asked_for(tmp_path):
    """README: PYTHON chooses it. A .venv that is there has one already."""
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho Python 3.9.0\n")
    other.chmod(0o755)
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / ".ready").touch()
    for asked in (sys.executable, other):
        command = ["make", f"{venv}/.ready", f"VENV={venv}", f"PYTHON={asked}"]
        told = subprocess.run(command, **IN_THE_CHECKOUT)
        assert (told.returncode == 0) == (asked != other), told.stderr
    assert f"PYTHON={other} is Python 3.9.0: remove {venv}" in told.stderr

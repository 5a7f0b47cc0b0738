"""Every command that a page prints is done with a small budget, or its beginning stands in a list
that says why it is not. They are done in the order of their page, in one folder, as by a reader."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import recbole

from recbole_sdpo import quick_start
from recbole_sdpo.experiment import run as experiment_run
from recbole_sdpo.experiment.runner import Runner
from tests.test_docs import PAGES, blocks
from tests.test_paper import save_backbone
from tests.test_readme import ROOT, call

LINE = r"^ *((?:[A-Z_]+=\S+ +)?(?:\.|make|pip|python3?|torchrun|jupyter|recbole-sdpo) .*)$"

ELSEWHERE = {
    ".": "it is the shell's, and .venv may be elsewhere",
    "pip": "it wants the network",
    "jupyter": "it is none of the tests' packages; test_notebook runs the cells",
    "torchrun": "of several processes; test_docs reads the settings, trainer/ starts two",
    "python -m pytest": "these are these tests",
    "python3 -m venv": "whoever runs this has one",
    "python benchmarks/run.py": "it measures for minutes; test_benchmarks runs it small",
}
"""How commands begin that are not done here, and why."""

EARLY = "{'timestamp':'[881250000,881520000)'}"
"""When user 196 of ml-100k and 33 others chose their films, and all users of the shop."""

SMALL = {
    "--backbone": "scratch",
    "--scratch_hidden_size": 32,
    "--scratch_heads": 2,
    "--scratch_vocab_size": 300,
    "--lora_rank": 2,
    "--MAX_ITEM_LIST_LENGTH": 5,
    "--epochs": 1,
    "--sft_epochs": 1,
    "--sdpo_epochs": 1,
    "--max_new_tokens": 2,
    "--show_progress": False,
    "--val_interval": EARLY,
}
"""What a run gets that its command does not give."""

BUDGET = "--max_train_targets=8 --sdpo_max_train_targets=8 --max_eval_targets=8"
"""What it gets in any case."""

STANDS_FOR = {
    r"--backbone=(smollm2-135m|Qwen/\S+|<model>)": "--backbone=model",
    r"--config_files=(?!\S*baseline)(\".*\"|\S+)": r"\g<0> --backbone=model --quantization=none",
    "--objective=hinge": "--objective=dpo",  # hinge is for the page's reader to write
    r"--resume=saved/<run>": "--resume=saved/cut",
    r"saved/<run>(?=.* --user 13426)": "saved/shop",
    "saved/<run>": "saved/one",
    r"--max_(train|eval)_targets=\d+": "",
}
"""What is not here, or is large, and what is taken instead."""


def commands() -> list[str]:
    """Each command in a block without a language, once."""
    found = [
        re.sub(r" +# .*", "", line)
        for page in sorted(PAGES)
        for block in blocks(page)
        for line in re.findall(LINE, block, flags=re.M)
    ]
    return list(dict.fromkeys(found))


DONE_HERE = [
    command
    for command in commands()
    if not any(f"{command} ".startswith(f"{start} ") for start in ELSEWHERE)
]

PRINTED = {
    r"(\S+=\S+ )?make": "",
    r"python -c": "recbole_sdpo",
    r".*settings$": "`sft_epochs`",
    r".*( experiment |--experiment=)": "planned: ",
    r".*recommend ": "title",
    r".*import --lists": " for the test",
    r".*import ": " users and ",
    r".*audit ": "| nearest lists",
    r".*": "result",
}
"""What a kind of command prints: the first whose beginning fits."""

A_RUN = ".*"

RUN = "python run_recbole_sdpo.py --run_dir="
IMPORT = "recbole-sdpo import"


def kind(command: str) -> str:
    return next(beginning for beginning in PRINTED if re.match(beginning, command))


def in_shell(found: re.Match[str]) -> str:
    return subprocess.run(["bash", "-c", found[1]], capture_output=True, text=True).stdout.strip()


def small(command: str) -> str:
    """The same with what is here; and a run with little to do."""
    command = re.sub(r"\$\((.*?)\)", in_shell, command)
    for what, instead in STANDS_FOR.items():
        command = re.sub(what, instead, command)
    if kind(command) != A_RUN:
        return command
    # files that are split already take no filter
    without = {"--val_interval"} if "--dataset=lists" in command else set()
    more = [
        f"{name}={shlex.quote(str(value))}"
        for name, value in SMALL.items()
        if f"{name}=" not in command and name not in without
    ]
    return " ".join([command, *more, BUDGET])


def write_lists(folder: Path) -> None:
    """Candidate lists of ``EARLY``'s last films, and some as LLaRA has them."""
    events = pd.read_csv(
        Path(recbole.__path__[0], "dataset_example", "ml-100k", "ml-100k.inter"),
        sep="\t",
        dtype=str,
    )
    events.columns = ["user", "item", "rating", "time"]
    events = events[events.time.between("881250000", "881519999")]
    last = events.sort_values("time", kind="stable").groupby("user").item.last()
    film = events.item.unique()
    rows = [
        f"{user},{target},{target},{','.join(film[film != target][n : n + 4])}"
        for n, (user, target) in enumerate(last.items())
    ]
    head = "user,target,candidate_1,candidate_2,candidate_3,candidate_4,candidate_5"
    (folder / "lists.csv").write_text("\n".join([head, *rows]))
    lists = [
        {
            "historyList": ["Alien"],
            "itemList": [f"Film {n}", f"Film {n + 1}"],
            "trueSelection": f"Film {n}",
        }
        for n in range(9)
    ]
    for name in ("test", "val", "train"):
        (folder / f"{name}.json").write_text(json.dumps(lists))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages' readers have: a model, files of a shop, a run, and one that was killed."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(ROOT / "configs")
    save_backbone(folder / "model", "smollm2-135m")
    users = [13426, *range(29)]
    events = [(user, (3 * user + 2 * n) % 60, 881250000 + n) for user in users for n in range(9)]
    columns = ["user_id", "item_id", "timestamp"]
    pd.DataFrame(events, columns=columns).to_csv(folder / "events.csv", index=False)
    items = pd.DataFrame({"item_id": range(60), "title": [f"Game {n}" for n in range(60)]})
    items.to_csv(folder / "items.csv", index=False)
    items = items.rename(columns={"item_id": "sku"}).assign(shelf="Console")
    items.to_csv(folder / "items2.csv", index=False)
    (example,) = blocks("your-own-data.md", "json")
    titles = [f"Game {n}" for n in range(30)]
    rows = [
        json.loads(example)
        | {"historyList": "::".join(titles[n : n + 3]), "itemList": titles[n + 3 : n + 6]}
        | {"trueSelection": titles[n + 4]}
        for n in range(25)
    ]
    for phase in ("train", "val", "test"):
        (folder / f"{phase}.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_lists(folder)
    for page, name in (("experiments.md", "mine.yaml"), ("your-own-data.md", "shop.yaml")):
        (folder / name).write_text(blocks(page, "yaml")[0], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(small("python run_recbole_sdpo.py --run_dir=saved/one"), patch)
        call(f"{IMPORT} --events events.csv --items items.csv --name games --output bought", patch)
        call(
            small(
                "python run_recbole_sdpo.py --dataset=games --data_path=bought --run_dir=saved/shop"
            ),
            patch,
        )
        patch.setattr(quick_start, "_test", killed)
        with pytest.raises(Killed):
            call(small(RUN + "saved/cut"), patch)
    return folder


class Killed(Exception):
    pass


def killed(*_, **__):
    raise Killed


@pytest.mark.parametrize("command", DONE_HERE)
def test_a_command_of_a_page_does_what_it_says(command, folder, monkeypatch, capfd, caplog):
    caplog.set_level("INFO")  # pytest has taken the log, which the program would print
    monkeypatch.chdir(folder)
    # Of an experiment all is checked that is checked before its first run.
    monkeypatch.setattr(Runner, "run_all", lambda self, runs: print("planned:", len(runs)) or [])
    monkeypatch.setattr(experiment_run, "tune", lambda experiment, *_: (experiment, []))
    call(re.sub(r"\bmake ", "make -n ", small(command)), monkeypatch)
    assert PRINTED[kind(command)] in "".join([*capfd.readouterr(), caplog.text])


def test_what_is_not_done_is_printed_somewhere():
    assert len(DONE_HERE) > 30
    for start in ELSEWHERE:
        assert any(f"{command} ".startswith(f"{start} ") for command in commands()), start


@pytest.mark.parametrize(
    ("heading", "place"),
    [("What a run leaves", "saved/one"), ("What a checkpoint holds", "saved/one/sdpo")],
)
def test_what_is_left_is_what_the_page_lists(heading, place, folder):
    section = PAGES["quick-start.md"].split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, flags=re.M)
    listed = {name.rstrip("/") for cell in cells for name in re.findall(r"`(.*?)`", cell)}
    left = {path.name for path in (folder / place).iterdir()}
    assert left <= listed and len(left) >= 5

"""The documentation says what is so: commands, files, links, messages, drawings and code."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from html import unescape
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from markdown.extensions.toc import slugify

from recbole_sdpo import objectives
from recbole_sdpo.checks.given import check_given
from recbole_sdpo.checks.recbole_rules import RECBOLE, properties
from recbole_sdpo.evaluator import ranks
from recbole_sdpo.experiment.file import Experiment
from recbole_sdpo.lm.forest import plant
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.settings import SETTINGS, Settings, StageSettings
from recbole_sdpo.values import read_arguments
from tests.test_rooms import ROOMS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "recbole_sdpo"
PAGES = {
    str(page.relative_to(ROOT / "docs")): page.read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md")
}

OF_THE_COMMAND = {
    "model",
    "dataset",
    "config_files",
    "experiment",
    "output",
    "jobs",
    "tune",
    "settings",
}
OF_OTHERS = {
    *("help", "no", "nproc_per_node", "num_processes", "cpu", "logdir", "check", "same"),
    *("nnodes", "rdzv_backend", "rdzv_endpoint", "nodes", "ntasks", "gpus"),
}
"""Options of pip, torchrun, accelerate, Slurm and the like, to the first hyphen."""

OF_THE_READER = ("objective", "hinge")
"""What add-an-objective.md lets its reader write."""


def blocks(page: str, language: str = "") -> list[str]:
    """The fenced code of a page in that language; of "" that which names none."""
    fenced = re.findall(r"(?ms)^ *```([^\n]*)\n(.*?)^ *```$", PAGES[page])
    return [text for named, text in fenced if named == language]


def commands() -> list[list[str]]:
    """The words after ``run_recbole_sdpo.py``, or its like, of every command in the pages."""
    texts = [line for page in PAGES for block in blocks(page) for line in block.splitlines()]
    texts += [code for page in PAGES.values() for code in re.findall(r"`([^`\n]+)`", page)]
    program = r"(?:run_recbole_sdpo\.py|-m recbole_sdpo|recbole-sdpo)"
    called = rf"^\s*(?:python |torchrun \S+ )?{program} (?:run |experiment \S+ )?(--.*)"
    return [
        shlex.split(found[1], comments=True) for text in texts if (found := re.search(called, text))
    ]


def source_texts() -> list[str]:
    """Every text in the package's code, with … for what is put into it."""

    def text(node: ast.expr) -> str:
        return node.value if isinstance(node, ast.Constant) else "…"

    nodes = [
        node
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    joined = ["".join(map(text, node.values)) for node in nodes if isinstance(node, ast.JoinedStr)]
    return joined + [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_every_page_is_in_the_navigation_once():
    def pages(part):
        if isinstance(part, str):
            return [part]
        return [
            page
            for value in (part.values() if isinstance(part, dict) else part)
            for page in pages(value)
        ]

    assert sorted(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / "docs" / page).parent / path if path else ROOT / "docs" / page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(
                r"(?m)^#+ (.*)",
                re.sub(r"(?ms)^ *```.*?^ *```$", "", file.read_text(encoding="utf-8")),
            )
            assert anchor in {slugify(heading.replace("`", ""), "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    text = re.sub(r"https?://\S+", "", PAGES[page])
    for name in re.findall(
        r"(?<![\w/<.])((?:configs|recbole_sdpo|tests|results|benchmarks|docs)/[\w./-]*[\w/])", text
    ):
        assert (ROOT / name).exists(), name
    for name in re.findall(
        r"`((?:data|lm|model|trainer|evaluator|report)/\w+\.py|\w+\.py|report/)`", text
    ):
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence of a page; headings, tables and code apart."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$|<!--.*?-->", "", text)
    text = re.sub(r"\]\([^)]*\)", "", re.sub(r"`[^`]*`", "code", text))
    # A blank line, an item of a list, a row and a heading begin anew.
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) |[|#!])", text)
    told = [part.strip() for part in parts if not re.match(r"\s*[|#!]", part)]
    found = [one.split() for part in told for one in re.split(r"(?<=[.!?])\s+", part)]
    return [[word for word in words if re.search(r"\w", word)] for words in found if words]


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        "../README.md",
        *(f"../results/{name}.md" for name in ("README", "claims", "further")),
    ],
)
def test_sentences_are_short(page):
    lengths = {
        " ".join(words): len(words)
        for words in sentences((ROOT / "docs" / page).read_text(encoding="utf-8"))
    }
    assert {one: length for one, length in lengths.items() if length > 30} == {}
    assert not lengths or np.mean(list(lengths.values())) < 16


def test_options_are_known():
    sources = [*PACKAGE.rglob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]
    declared = {
        option
        for file in sources
        for option in re.findall(r'add_argument\(\s*"--(\w+)', file.read_text(encoding="utf-8"))
    }
    known = {*SETTINGS, *RECBOLE, *properties()[0]} | declared | OF_OTHERS
    for page, text in PAGES.items():
        for option in re.findall(r"(?<![\w-])--([A-Za-z_]\w*)", text):
            assert option in known, f"{page}: --{option}"


def test_commands_have_settings_of_the_right_kind():
    assert len(commands()) > 30
    for words in commands():
        given = [
            word
            for word in words
            if word.startswith("--") and re.match(r"--(\w+)", word)[1] not in OF_THE_COMMAND
        ]
        assert [word for word in words if not word.startswith("--")] == [], words
        settings, others = read_arguments(given)
        assert not others, words
        check_given(settings)
        Settings.from_mapping(
            {key: value for key, value in settings.items() if (key, value) != OF_THE_READER}
        )


@pytest.mark.parametrize(("page", "number"), [("experiments.md", 0), ("your-own-data.md", 0)])
def test_experiments_that_are_shown_are_read(page, number, tmp_path):
    (tmp_path / "shown.yaml").write_text(blocks(page, "yaml")[number], encoding="utf-8")
    assert Experiment.load(tmp_path / "shown.yaml").entries()


def test_every_setting_is_on_its_page_once():
    shown = [
        name
        for found in re.findall(r"<!-- settings: (.*?) -->", PAGES["settings.md"])
        for name in found.split()
    ]
    second = {f"sdpo_{f.name}" for f in fields(StageSettings)}
    assert sorted(shown) == sorted(set(SETTINGS) - second)
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    made = hooks.on_page_markdown(PAGES["settings.md"])
    assert "<!--" not in made and "<checkpoint_dir>" not in made  # a browser would hide it
    told = re.findall(r"(?m)^\| ((?:`\w+`(?:, )?)+) \|", made)
    assert {name for row in told for name in re.findall(r"\w+", row)} == set(SETTINGS)


@pytest.fixture(scope="module")
def forest():
    """The one that speed.md draws, and the words of its tokens."""
    words = [
        "",
        "Seen:",
        "Alien",
        "⏎",
        "Star",
        "Wars",
        "Heat",
        "Trek",
        "Jaws",
        "Toy",
        "Soldiers",
        "Story",
    ]
    trunk, *rows = (
        [words.index(word) for word in text.split()]
        for text in (
            "Seen: Alien ⏎ Star Wars ⏎ Heat ⏎",
            *("Star Wars ⏎", "Star Trek ⏎", "Jaws ⏎"),
            *("Heat ⏎", "Toy Story ⏎", "Toy Soldiers ⏎"),
        )
    )
    start = np.array([3, 3, 3, 6, 6, 6])
    sequences = sum(int(first) + len(row) for first, row in zip(start, rows, strict=True))
    return (
        plant(Ragged.from_rows([trunk]), np.zeros(6, int), start, Ragged.from_rows(rows)),
        words,
        sequences,
    )


def test_the_forest_in_numbers_is_planted_so(forest):
    planted, words, sequences = forest
    rows = re.findall(
        r"(?m)^\| (\d+) \| (\S+) \| (\d+) \| (\d+) \| ([\d ]+) \|(.*)\|$", PAGES["speed.md"]
    )
    column, token, depth, end, seen, predicted = zip(*rows, strict=True)
    assert list(map(int, column)) == list(range(planted.size))
    assert list(token) == [words[number] for number in planted.tokens[0]]
    assert [list(map(int, part)) for part in (depth, end)] == [
        planted.positions[0].tolist(),
        planted.end[0].tolist(),
    ]
    assert [list(map(int, row.split())) for row in seen] == [
        row.nonzero().flatten().tolist() for row in planted.attention()[0]
    ]
    edges = [[] for _ in column]
    for state, number in zip(planted.edge_state, planted.edge_token, strict=True):
        edges[planted.states[state]].append(words[number])
    assert [sorted(row.split()) for row in predicted] == [sorted(row) for row in edges]
    assert (
        f"six sequences of {sequences} tokens. The forest has {planted.size}." in PAGES["speed.md"]
    )
    assert f"{len(planted.states)} states and {len(planted.edge_state)} edges" in PAGES["speed.md"]


def test_the_drawing_counts_what_is_planted():
    """Each title of the drawing goes on with a line break, which needs no box."""
    svg = "{http://www.w3.org/2000/svg}"
    drawing = ElementTree.parse(ROOT / "docs" / "images" / "prefix-forest.svg").getroot()
    history = [text.text for text in drawing.find(".//*[@id='history']").iter(f"{svg}text")]
    usual, shared = (
        list(group.iter(f"{svg}text")) for group in drawing.findall(f"{svg}g[@class='token']")
    )
    titles = {}
    for text in usual:
        titles.setdefault(text.get("y"), []).append(text.text)
    words = [*history, *dict.fromkeys(text.text for text in usual), "\n"]
    trunk, *rows = (
        [words.index(word) for word in row]
        for row in (history, *([*title, "\n"] for title in titles.values()))
    )
    start = np.full(len(rows), len(trunk))
    planted = plant(Ragged.from_rows([trunk]), 0 * start, start, Ragged.from_rows(rows))
    assert sorted(words[token] for token in planted.tokens[0]) == sorted(
        history + [text.text for text in shared]
    )
    sums = [text.text for text in drawing.findall(f"{svg}text[@class='sum']")]
    full = sum(len(history) + len(title) for title in titles.values())
    assert sums == [f"{n} tokens, and {n} more for the reference" for n in (full, planted.size)]


def test_every_room_is_at_its_level():
    shown = re.findall(r"(?m)^\| (\d+) \| `(\w+)` \|", PAGES["architecture.md"])
    assert shown == [
        (str(level), room) for level, line in enumerate(ROOMS) for room in line.split()
    ]


def test_messages_are_those_of_the_code():
    said = source_texts()
    rows = [
        row
        for page in ("troubleshooting.md", "add-a-backbone.md")
        for row in re.findall(r"(?m)^\| `([^`]+)` \|", PAGES[page])
    ]
    for message in rows:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        ordered = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(ordered.search(text) for text in said), message


def test_the_objective_that_is_shown_is_one(monkeypatch):
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    for block in blocks("add-an-objective.md", "python"):
        exec(block, vars(objectives))
    pos, neg = (
        torch.tensor([-1.0, -2.0], requires_grad=True),
        torch.tensor([[-3.0, -0.5], [-2.0, -9.0]]),
    )
    ref_pos, ref_neg = torch.tensor([-1.5, -1.5]), torch.tensor([[-2.0, -2.0], [-1.0, -1.0]])
    kind = objectives.OBJECTIVES["hinge"]
    ones = torch.ones_like(pos), torch.ones_like(neg)
    logps = objectives.Logps(pos, neg, ref_pos, ref_neg, *ones)
    loss = kind.loss(logps, objectives.Constants(beta=0.5))
    rows = zip(*(part.tolist() for part in (pos, neg, ref_pos, ref_neg)), strict=True)
    each = [
        [max(0.0, 1 + 0.5 * ((n - rn) - (p - rp))) for n, rn in zip(ns, rns, strict=True)]
        for p, ns, rp, rns in rows
    ]
    assert loss.tolist() == pytest.approx([sum(row) / 2 for row in each])
    loss.sum().backward()
    assert pos.grad.isfinite().all()
    monkeypatch.delattr(objectives, "hinge")


def test_the_metric_that_is_shown_is_one(monkeypatch):
    monkeypatch.setattr(ranks, "METRICS", dict(ranks.METRICS))
    _, shown = blocks("add-a-metric.md", "python")
    exec(shown, vars(ranks))
    assert ranks.metric_of_ranks("RR2@10", np.array([1, 2, 11])).tolist() == [1.0, 0.25, 0.0]


def test_two_runs_are_compared_as_is_shown(tmp_path, capsys):
    for folder, rank in (("one run", [1, 1, 1, 2]), ("another", [2, 2, 2, 1])):
        path = tmp_path / "saved" / f"<{folder}>" / "ranks.csv"
        path.parent.mkdir(parents=True)
        rows = [f"u{user},i{user},{place},sdpo,uni19" for user, place in enumerate(rank)]
        path.write_text("\n".join(["user,item,rank,stage,candidates", *rows]) + "\n")
    (shown,) = blocks("evaluation.md", "python")
    exec(shown, {})
    assert "mean=0.5" in capsys.readouterr().out


def test_it_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    page = unescape((tmp_path / "site" / "settings" / "index.html").read_text(encoding="utf-8"))
    assert all(f"<code>{name}</code>" in page for name in SETTINGS)
    for html in (tmp_path / "site" / "api").rglob("*.html"):
        assert not re.search(
            ":(func|class|meth|data|mod):<code>", html.read_text(encoding="utf-8")
        ), html
    assert not (tmp_path / "site" / "hooks.py").exists()

"""The pages under results/: their numbers are those of the tables, and what is kept is small."""

import gzip
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGE, CLAIMS, FURTHER = (
    (RESULTS / name).read_text(encoding="utf-8")
    for name in ("README.md", "claims.md", "further.md")
)
"""The last has numbers that are nowhere else."""

FOUR_DIGITS = re.compile(r"(?<![\d.])0\.\d{4}(?!\d)")
DIFFERENCE = re.compile(r"\| *\**(0\.\d{4})\**[*°]? *\| *\**(0\.\d{4})\**[*°]? *\| *([+-]0\.\d{3})")


def sections() -> dict[str, str]:
    """The text under each heading whose numbers are those of tables."""
    parts = re.split(r"^(##+ .*)$", f"{PAGE}\n{CLAIMS}", flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def numbers(folder: Path) -> set[str]:
    """What the table of ``folder`` says, or where it has none, what its runs do."""
    table = folder / "table.md"
    if table.is_file():
        return set(FOUR_DIGITS.findall(table.read_text(encoding="utf-8")))
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return {f"{float(number):.4f}" for number in re.findall(r": (\d\.\d+)", text)}


WITH_NUMBERS = [name for name, text in sections().items() if FOUR_DIGITS.search(text)]


@pytest.mark.parametrize("heading", WITH_NUMBERS)
def test_the_numbers_of_a_section_are_in_the_tables_that_it_links_to(heading):
    text = sections()[heading]
    links = re.findall(r"\]\(([\w/-]+)/(?:table\.md|results\.jsonl)\)", text)
    folders = {RESULTS / link for link in links}
    assert folders, f"{heading} has numbers and links to no table"
    assert set(FOUR_DIGITS.findall(text)) <= set().union(*map(numbers, folders))


FOUND = re.split(r"^## ", (ROOT / "docs/found.md").read_text(encoding="utf-8"), flags=re.M)


@pytest.mark.parametrize("section", FOUND, ids=lambda text: text.splitlines()[0])
def test_the_numbers_of_what_was_found_are_in_the_files_that_it_names(section):
    found = set(FOUR_DIGITS.findall(section))
    named = re.findall(r"`results/([\w/-]+)/(?:table\.md|results\.jsonl)`", section)
    kept = [numbers(RESULTS / name) for name in named]
    if "`results/further.md`" in section:
        kept.append(set(FOUR_DIGITS.findall(FURTHER)))
    assert found <= set().union(*kept)
    # A difference would be in no table; and a p-value stands in results/ alone.
    assert not re.search(r"[+-]0\.\d|\bp = |p-value", section)


def test_a_difference_is_that_of_the_two_numbers_before_it():
    """The tables round to four digits, and a difference of the page is that of the rounded or of
    the exact ones."""
    found = DIFFERENCE.findall(PAGE + CLAIMS + FURTHER)
    assert len(found) > 50
    for row in found:
        ours, other, difference = map(float, row)
        assert abs(ours - other - difference) < 0.00065, row


def test_the_verdicts_are_of_three_kinds():
    claims = PAGE.split("## The claims of the paper, here")[1].split("## ")[0]
    lines = [line for line in claims.splitlines() if line.startswith("|")][2:]
    verdicts = [line.split("|")[2].strip() for line in lines]
    assert len(verdicts) >= 10 and set(verdicts) == {"holds", "not shown", "fails"}


def test_a_further_test_is_of_rows_that_differ_by_so_much():
    key, compared = ["table", "candidates", "metric", "model"], 0
    tables = {str(file.parent.relative_to(RESULTS)): file for file in RESULTS.rglob("table.csv")}
    rows = pd.concat([pd.read_csv(file).assign(table=name) for name, file in tables.items()])
    means = rows.set_index(key)["mean"].to_dict()
    for row in pd.read_csv(RESULTS / "further-tests.csv").to_dict("records"):
        *place, model = (row[name] for name in key)
        if {(*place, model), (*place, row["against"])} <= means.keys():
            compared += 1
            difference = means[(*place, model)] - means[(*place, row["against"])]
            assert abs(difference - row["difference"]) < 0.00051, row
    assert compared > 40


def test_the_numbers_of_the_gpu_page_are_those_of_its_files():
    page = (RESULTS / "gpu" / "README.md").read_text(encoding="utf-8")
    text = (RESULTS / "gpu" / "smollm2.jsonl").read_text() + (ROOT / "README.md").read_text()
    ranked = set(FOUR_DIGITS.findall(page))
    others = ranked - numbers(RESULTS / "amazon-games" / "three-seeds")
    assert len(others) > 10 and all(number.rstrip("0") in text for number in others)
    lines = (RESULTS / "gpu" / "speed-h200.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "targets/s" in row and "tokens" in row]
    assert len(steps) == 9
    for row in steps:
        measured = (row["tokens"], row["ms"], row["tokens/s"], row["targets/s"])
        share = f"{row['share of matrix rate']:.1%}".replace("%", " %")
        cells = [*(f"{number:,.0f}" for number in measured), share, f"{row['MiB'] / 1024:.1f}"]
        assert f"| {' | '.join(cells)} |" in page, row["row"]


def test_the_figures_are_drawn_from_the_tables():
    spec = importlib.util.spec_from_file_location("draw", RESULTS / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    means = pd.read_csv(RESULTS / "ml-100k/main/table.csv").set_index(
        ["candidates", "model", "metric"]
    )["mean"]
    for axes, candidates in zip(draw.main_table().axes, ("uni19", "pop19"), strict=True):
        shown = {round(patch.get_width(), 3) for patch in axes.patches}
        assert shown == {round(means[candidates, name, "HR@1"], 3) for name in draw.SHOWN}
    for axes in draw.negatives().axes:
        assert all(len(line[0].get_xdata()) == 5 for line in axes.containers)


def test_every_line_of_results_is_a_run():
    for file in RESULTS.rglob("results.jsonl*"):
        content = file.read_bytes()
        lines = gzip.decompress(content) if file.suffix == ".gz" else content
        for line in lines.splitlines():
            assert {"name", "stages", "settings", "versions"} <= json.loads(line).keys(), file


def tracked() -> list[Path]:
    """Files that git has, or would take; outside of a repository, what is under results/."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() if listed.returncode == 0 else map(str, RESULTS.rglob("*"))
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_what_is_tracked_is_small():
    sizes = {file: file.stat().st_size for file in tracked()}
    assert {str(file): size for file, size in sizes.items() if size > 300_000} == {}
    assert sum(size for file, size in sizes.items() if file.is_relative_to(RESULTS)) < 2_000_000
    assert all(size < 100_000 for file, size in sizes.items() if file.suffix == ".png")
    assert all(size < 60_000 for file, size in sizes.items() if file.suffix == ".svg")

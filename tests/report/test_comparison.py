"""Tables and figures say what the ranks say."""

import dataclasses
import errno
import html
import math
import re
import string
from pathlib import Path

import markdown_it
import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recbole_sdpo.evaluator.significance import holm, interval, paired_difference
from recbole_sdpo.report import figures
from recbole_sdpo.report.comparison import FinishedRun, Published, compare, kept_starts, unfair
from recbole_sdpo.report.experiment import write_report
from recbole_sdpo.report.groups import group_frame, group_table
from recbole_sdpo.report.table import (
    comparison_frame,
    comparison_html,
    comparison_latex,
    comparison_markdown,
    markdown_table,
    markdown_text,
)
from recbole_sdpo.result import write_result

USERS = 200
METRICS = ["HR@1", "NDCG@5"]


def finished(name, seed, strength, axis=None, users=USERS, targets=100, sha="a" * 16, steps=False):
    """A run whose targets rank higher the larger ``strength`` is."""
    rng = np.random.default_rng([seed, int(100 * strength)])
    rank = 1 + np.minimum(rng.geometric(strength, users) - 1, 19)
    order = rng.permutation(users)  # files need not be in the same order
    ranks = pd.DataFrame(
        {"user": [f"u{u}" for u in order], "item": "i", "rank": rank[order], "candidates": "uni19"}
    )
    step = {
        "stage": "sdpo",
        "step": range(40),
        "targets": range(0, 400, 10),
        "reward_positive": 0.1,
        "reward_negative": 0.0,
    }
    rows = pd.DataFrame(
        {
            **step,
            "margin": np.linspace(0, 1, 40),
            "logp_positive": -3.0,
            "accuracy": 0.5,
            "kl": 0.1,
            "hardest_negative_weight": 0.5,
        }
    )
    result = {
        **{
            key: None
            for key in (
                "model",
                "dataset",
                "seed",
                "stages",
                "peak_memory_gib",
                "machine",
                "versions",
            )
        },
        "candidates_sha256": {"uni19": sha},
        "training_targets": targets,
        "settings": {"objective": "sdpo", "train_neg_sample_args": {"sample_num": 3}},
    }
    return FinishedRun(name, axis, seed, result, ranks, rows[: None if steps else 0], 60.0)


@pytest.fixture
def runs():
    strengths = {"weak": 0.2, "rival": 0.3, "ours": 0.6, "same": 0.29}
    return [
        finished(name, seed, strength) for seed in (1, 2) for name, strength in strengths.items()
    ]


def per_user(runs, name, metric):
    rows = []
    for run in runs:
        if run.name == name:
            rank = run.ranks.set_index("user")["rank"].sort_index().to_numpy()
            rows.append(
                rank == 1 if metric == "HR@1" else np.where(rank <= 5, 1 / np.log2(1 + rank), 0)
            )
    return np.array(rows, float)


def test_means_deviations_and_tests_are_over_the_right_things(runs):
    found = compare(runs, "uni19", METRICS, ["weak", "rival"])
    assert found.best_baseline == {"HR@1": "rival", "NDCG@5": "rival"}
    p = []
    for row in found.rows:
        for metric in METRICS:
            users = per_user(runs, row.name, metric)
            assert row.mean(metric) == pytest.approx(users.mean()) and row.std(
                metric
            ) == pytest.approx(users.mean(1).std(ddof=1))
            if row.name != "rival":
                difference = paired_difference(users, per_user(runs, "rival", metric))
                assert row.differences[metric] == difference
                p.append((row, metric, difference.p))
    for (row, metric, _), corrected in zip(p, holm([value for *_, value in p])):
        assert row.p[metric] == pytest.approx(corrected)
    by_name = {row.name: row for row in found.rows}
    assert by_name["ours"].significant("HR@1") and not by_name["same"].significant("HR@1")
    assert by_name["ours"].improvement == pytest.approx(
        per_user(runs, "ours", "HR@1").mean() / per_user(runs, "rival", "HR@1").mean() - 1
    )
    assert by_name["rival"].differences == {} and math.isnan(by_name["rival"].improvement)


def test_rows_that_are_alike_share_their_mark(runs):
    twins = [dataclasses.replace(run, name="twin") for run in runs if run.name == "ours"]
    lines = comparison_markdown(
        compare([*runs, *twins], "uni19", ["HR@1"], ["weak", "rival"])
    ).splitlines()
    marked = {
        line.split("|")[1].strip(): ("**" in line, "<u>" in line) for line in lines if "±" in line
    }
    assert marked["ours"] == marked["twin"] == (True, False) and marked["rival"] == (False, True)


def test_tables_mark_the_best_the_second_and_the_significant(runs):
    found = compare(runs, "uni19", METRICS, ["weak", "rival"])
    rows = {row.name: row for row in found.rows}
    lines = {line.split("|")[1].strip(): line for line in comparison_markdown(found).splitlines()}
    (second,) = (row.name for row in found.rows if found.place(row, "HR@1") == 1)
    assert f"**{rows['ours'].mean('HR@1'):.4f} ± {rows['ours'].std('HR@1'):.4f}***" in lines["ours"]
    assert f"<u>{rows[second].mean('HR@1'):.4f}" in lines[second] and "<u>" not in lines["weak"]
    assert f"{100 * rows['ours'].improvement:+.1f} %" in lines["ours"] and "%" not in lines["rival"]
    latex = comparison_latex(found)
    assert (
        latex.count(r"\textbf{") == 2
        and latex.count(r"\underline{") == 2
        and r"$^{*}$" in latex
        and "\\%" in latex
    )
    frame = comparison_frame(found)
    assert (
        len(frame) == 8
        and frame[frame.model == "rival"].p.isna().all()
        and (frame.users == USERS).all()
    )


def test_published_values_stand_beside_ours_with_their_source(runs, tmp_path):
    found = compare(runs, "uni19", METRICS, ["weak", "rival"])
    plain = [comparison_frame(found), comparison_latex(found)]
    assert "published" not in f"{plain} {comparison_markdown(found)} {comparison_html(found)}"
    evil = "A_b & <i>*"
    found.published = {
        "ours": [Published("HR@1", 0.66, "One, table 2"), Published("NDCG@5", 0.7251, evil)],
        "weak": [Published("HR@1", 0.5, evil)],
        "failed": [Published("HR@1", 0.4, "of no row")],
    }
    table, *notes = comparison_markdown(found).split("\n\n")
    cells = {(line := [*map(str.strip, row.split("|"))])[1]: line for row in table.splitlines()}
    # ours, and what it is compared with, before; minutes after
    assert cells["uni19"][-4:-1] == ["HR@1 vs rival", "published", "minutes"]
    assert cells["ours"][-3] == "HR@1 0.66 (2), NDCG@5 0.7251 (1)"
    assert cells["weak"][-3] == "HR@1 0.5 (1)" and cells["same"][-3] == ""
    assert notes == [r"(1) A_b & \<i>\*", "(2) One, table 2"]
    page = comparison_html(found)
    assert "<td>HR@1 0.5 (1)</td>" in page
    assert "<p class='note'>(1) A_b &amp; &lt;i&gt;*</p>" in page
    latex = comparison_latex(found)
    assert r"\begin{tabular}{lrrrrr}" in latex and "& HR@1 0.5 (1) &" in latex
    assert latex.splitlines()[-2] == (
        r"\par{\footnotesize (1) A\_b \& \textless{}i\textgreater{}{*}}"
    )
    frame = comparison_frame(found).set_index(["model", "metric"])
    theirs = frame[frame["published"].notna()]
    assert theirs["published"].to_dict() == {
        ("ours", "HR@1"): 0.66,
        ("ours", "NDCG@5"): 0.7251,
        ("weak", "HR@1"): 0.5,
    }
    assert theirs["source"].tolist() == [evil, "One, table 2", evil]
    write_report(tmp_path, "published", [found], runs, [], "made")
    assert "0.7251,A_b & <i>*" in (tmp_path / "table.csv").read_text()


def test_one_seed_has_no_deviation(runs):
    found = compare([run for run in runs if run.seed == 1], "uni19", METRICS, ["rival"])
    assert math.isnan(found.rows[0].std("HR@1")) and "±" not in comparison_markdown(found)
    assert {row.differences["HR@1"].test for row in found.rows if row.differences} == {
        "McNemar, exact"
    }


def test_names_are_text_in_every_format(runs):
    for run in runs:
        run.name = run.name.replace("ours", "A & B_50% <b>")
    found = compare(runs, "uni19", METRICS, ["rival"])
    assert r"A \& B\_50\% \textless{}b\textgreater{}" in comparison_latex(found)
    assert "<td>A &amp; B_50% &lt;b&gt;</td>" in comparison_html(found)


def test_what_is_not_alike_is_said(runs):
    assert unfair(runs, ["uni19"]) == []
    assert (
        "not the same candidates uni19: aaaaaaaaaaaa for weak, rival, ours, same; bbbb for odd"
        in unfair([*runs, finished("odd", 1, 0.2, sha="bbbb")], ["uni19"])
    )
    assert (
        "not the same training targets an epoch: 100 for weak, rival, ours, same; 7 for odd"
        in unfair([*runs, finished("odd", 1, 0.2, targets=7)], ["uni19"])
    )
    (users,) = unfair([*runs, finished("odd", 1, 0.2, users=50)], ["uni19"])
    assert users.startswith("not the same test users (uni19): 200 ") and "for odd" in users
    lengths = {"weak": ("SEQUENTIAL", 50), "rival": ("GENERAL", 10)}
    for run in runs:
        kind, length = lengths.get(run.name, ("SEQUENTIAL", 20))
        run.result["settings"] |= {
            "MODEL_TYPE": f"ModelType.{kind}",
            "MAX_ITEM_LIST_LENGTH": length,
        }
    assert unfair(runs, ["uni19"]) == [
        "not the same items of history: 50 for weak; 20 for ours, same"
    ]


def test_a_star_of_which_not_all_seeds_agree_says_so():
    """The test is over users, and one seed of three can make it."""
    strengths = {1: 0.9, 2: 0.29, 3: 0.29}
    runs = [finished("ours", seed, strength) for seed, strength in strengths.items()]
    for name, strength in {"far": 0.45, "below": 0.1, "rival": 0.3}.items():
        runs += [finished(name, seed, strength) for seed in strengths]
    runs += [finished("elsewhere", 4, 0.9)]
    table = compare(runs, "uni19", METRICS, ["rival"])
    frame = comparison_frame(table).set_index(["model", "metric"])
    rival, agree = per_user(runs, "rival", "NDCG@5").mean(1), {}
    for name in ("ours", "far", "below"):
        seeds = per_user(runs, name, "NDCG@5").mean(1) - rival
        shown = [float(one) for one in frame.loc[(name, "NDCG@5"), "by_seed"].split()]
        assert shown == pytest.approx(seeds, abs=5.1e-5)
        assert frame.loc[(name, "NDCG@5"), "p_holm"] < 0.05
        agree[name] = (np.sign(seeds) == np.sign(seeds.mean())).sum()
        (exact,) = (row.differences_by_seed["NDCG@5"] for row in table.rows if row.name == name)
        assert exact == shown, "what is shown is what is counted"
    assert agree["ours"] < 3 and agree["far"] == agree["below"] == 3
    assert frame.loc[("rival", "NDCG@5"), "by_seed"] == ""
    marked = {"ours": f" ({agree['ours']}/3)", "far": "", "below": "", "elsewhere": " (0/0)"}
    shown = markdown_it.MarkdownIt().enable("table").render(comparison_markdown(table))
    for text in (shown, comparison_html(table), comparison_latex(table)):
        for name, mark in marked.items():
            (line,) = (line for line in re.split(r"\n(?!<td>)|<tr>", text) if name in line)
            assert re.findall(r" \(\d/\d\)", line) == [mark] * 2 * bool(mark)
    assert shown.count("<strong>") == len(METRICS)


def test_an_alignment_that_kept_its_start_is_named(runs):
    def stage(uni19, pop19, targets=9):
        valid = {"uni19": uni19, "pop19": pop19}
        return {
            "targets": targets,
            "candidates": {mode: {"valid": hit and {"hit@1": hit}} for mode, hit in valid.items()},
        }

    start = stage(0.2, 0.2)
    for run in runs:
        run.result["stages"] = {
            "weak": {"test": start},  # a baseline has one
            "rival": {"sft": start, "sdpo": stage(0.2, 0.2, targets=0)},  # nothing was trained
            "ours": {"sft": start, "sdpo": stage(0.3, 0.2)},
            "same": {"sft": start, "sdpo": stage(0.2, 0.2 if run.seed == 1 else 0.3)},
        }[run.name]
    start = "no epoch was better than the start, which was kept:"
    assert kept_starts(runs, ["uni19", "pop19"]) == [
        f"uni19: {start} same",
        f"pop19: {start} ours; same (1 of 2 seeds)",
    ]
    assert kept_starts([run for run in runs if run.name == "ours"], ["uni19"]) == []
    for run in runs:
        run.result["stages"] = {"sft": stage(None, None), "sdpo": stage(None, None)}
    assert kept_starts(runs, ["uni19"]) == [], "nothing was validated"


def test_rows_of_other_users_are_compared_on_those_in_common(runs):
    some = [finished("some", seed, 0.6, users=USERS // 2) for seed in (1, 2)]
    row = compare([*runs, *some], "uni19", METRICS, ["rival"]).rows[-1]
    common = sorted(set(some[0].ranks.user))
    theirs = [
        run.ranks.set_index("user").loc[common, "rank"] == 1 for run in runs if run.name == "rival"
    ]
    mine = [run.ranks.set_index("user").loc[common, "rank"] == 1 for run in some]
    mine, theirs = np.array(mine, float), np.array(theirs, float)
    assert row.differences["HR@1"] == paired_difference(mine, theirs)
    assert row.differences_by_seed["HR@1"] == pytest.approx((mine - theirs).mean(1), abs=5.1e-5)
    none = finished("none", 1, 0.6)
    none.ranks["user"] = "other " + none.ranks["user"]
    assert compare([*runs, none], "uni19", METRICS, ["rival"]).rows[-1].differences == {}


def test_without_a_baseline_the_first_row_stands_in(runs):
    found = compare(runs, "uni19", METRICS, ["failed"])
    assert found.best_baseline == {"HR@1": "weak", "NDCG@5": "weak"}


def test_a_baseline_without_a_hit_gives_no_improvement(runs):
    for run in runs:
        run.ranks["rank"] = 20
    found = compare(runs, "uni19", METRICS, ["rival"])
    assert all(
        math.isnan(row.improvement) for row in found.rows
    ) and "nan" not in comparison_markdown(found)


def test_figures_show_the_numbers(tmp_path, runs):
    swept = [
        finished(
            f"K = {k}",
            1,
            0.2 + k / 20,
            ("S-DPO", "train_neg_sample_args.sample_num", k),
            steps=True,
        )
        for k in (8, 1, 3)
    ]
    found = compare([*runs, *swept], "uni19", METRICS, ["rival"])
    bars = figures.bars(found)
    widths = [patch.get_width() for patch in bars.axes[1].patches]
    assert widths == pytest.approx([row.mean("NDCG@5") for row in found.rows])
    lists = compare(runs, "uni19", ["HR@1"], ["rival"])
    for row in lists.rows:
        row.lists = {"GiniIndex@10": np.array([0.0123]), "ItemCoverage@10": np.array([120.25])}
    lists.metrics += ["GiniIndex@10", "ItemCoverage@10"]
    _, gini, coverage = figures.bars(lists).axes
    assert (gini.get_xlabel(), coverage.get_xlabel()) == ("GiniIndex@10 ↓", "ItemCoverage@10 ↑")
    assert {text.get_text() for text in gini.texts} == {" 0.0123"}
    assert {text.get_text() for text in coverage.texts} == {" 120.2"}
    line = figures.sweep([found], "train_neg_sample_args.sample_num").axes[0].lines[0]
    means = {row.name: row.mean("HR@1") for row in found.rows}
    assert line.get_xdata().tolist() == [0, 1, 2] and line.get_ydata().tolist() == pytest.approx(
        [means[f"K = {k}"] for k in (1, 3, 8)]
    )
    for row, drawn in zip(found.rows, figures.against_time([found]).axes[0].containers):
        point, _, (whiskers,) = drawn.lines
        (whisker,) = whiskers.get_segments()
        assert point.get_xydata()[0] == pytest.approx([row.wall_s / 60, row.mean("HR@1")])
        hits, users = row.users["HR@1"].mean(0), len(row.user)
        if set(hits) <= {0, 1}:  # Wilson's interval, by its formula
            z, p = 1.959964, hits.mean()
            middle = (p + z**2 / 2 / users) / (1 + z**2 / users)
            half = np.sqrt(p * (1 - p) / users + (z / 2 / users) ** 2) * z / (1 + z**2 / users)
            assert whisker[:, 1] == pytest.approx([middle - half, middle + half])
        else:
            half = stats.t.ppf(0.975, users - 1) * hits.std(ddof=1) / np.sqrt(users)
            ends = np.clip([hits.mean() - half, hits.mean() + half], 0, 1)
            assert whisker[:, 1] == pytest.approx(ends)
    margin = figures.curves(swept[:1]).axes[2].lines[0]
    smooth = swept[0].steps["margin"].rolling(2, min_periods=1).mean()
    assert (
        margin.get_ydata().tolist() == pytest.approx(smooth.tolist())
        and margin.get_xdata()[-1] == 390
    )
    write_report(tmp_path / "out", "A & B", [found], [*runs, *swept], ["not alike"], "made by hand")
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "<title>A &amp; B</title>" in page
        and "Warning: not alike" in page
        and page.count("<img") == 5
    )
    write_report(
        tmp_path / "again", "A & B", [found], [*runs, *swept], ["not alike"], "made by hand"
    )
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert "by-sample_num.svg" in files and files == sorted(
        file.name for file in (tmp_path / "again").iterdir()
    )
    assert all(
        (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        for name in files
    )


def test_markdown_tables_line_up():
    lines = markdown_table(["a", "bb"], [["x", 0.5], ["longer", 1]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and "0.5000" in lines[2]


def test_answers_are_compared_where_there_are_any(runs, tmp_path):
    """A model that writes nothing has empty cells; the first row that writes is the baseline."""
    for run in runs:
        if run.name in ("ours", "same"):
            draw = np.random.default_rng(run.seed).random(USERS)
            run.ranks["item"], run.ranks["answer"] = "i", "some text"
            run.ranks["named"] = np.where(
                draw < (0.6 if run.name == "ours" else 0.2), "i", np.where(draw < 0.8, "j", "")
            )
    metrics = ["HR@1", "GenHit", "ValidRatio"]
    found = compare(runs, "uni19", metrics, ["weak", "rival"])
    assert found.best_baseline == {"HR@1": "rival", "GenHit": "ours", "ValidRatio": "ours"}
    rows = {row.name: row for row in found.rows}
    for name in ("ours", "same"):
        mine = [run.ranks for run in runs if run.name == name]
        assert rows[name].mean("GenHit") == pytest.approx(
            np.mean([(ranks["named"] == "i").mean() for ranks in mine])
        )
        assert rows[name].mean("ValidRatio") == pytest.approx(
            np.mean([(ranks["named"] != "").mean() for ranks in mine])
        )
    assert (
        rows["same"].significant("GenHit")
        and "GenHit" not in rows["ours"].differences
        and "GenHit" not in rows["weak"].p
    )
    assert [found.place(rows[name], "GenHit") for name in ("ours", "same")] == [0, 1]
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in comparison_markdown(found).splitlines()
    }
    assert (
        cells["weak"][1:] == ["", ""]
        and cells["ours"][1].startswith("**0.")
        and cells["same"][1].startswith("<u>0.")
    )
    frame = comparison_frame(found)
    assert set(frame[frame.metric == "GenHit"].model) == {"ours", "same"}
    write_report(tmp_path / "report", "answers", [found], runs, [], "made")
    assert (tmp_path / "report" / "bars-uni19.png").is_file()
    weak = [run for run in runs if run.name == "weak"]
    assert compare(weak, "uni19", metrics, ["weak"]).metrics == ["HR@1"], (
        "all that write answers failed"
    )
    with pytest.raises(ValueError, match="metrics GenHit: no run has one of them"):
        compare(weak, "uni19", ["GenHit"], ["weak"])


NAMES = [
    "$x$",
    r"a_$b \frac{$",
    "$",
    "_hidden",
    "a|b *c* `d` [e](f) ~g~",
    "<script>alert(1)</script> &lt;",
    "推荐模型",
    "נוסחה",
    "long " * 40 + "1",
    "long " * 40 + "2",
    "[x] * {y} \\",
]


@pytest.fixture
def named():
    """Runs of hostile names, of a sweep and of alignments."""
    return [
        finished(
            name,
            seed,
            0.2 + place / 20,
            (name, "train_neg_sample_args.sample_num", value),
            steps=True,
        )
        for seed in (1, 2)
        for place, name in enumerate(NAMES)
        for value in ["$1$"]
    ]


def test_names_are_never_read_as_anything_else(named, tmp_path):
    found = compare(named, "uni19", METRICS, NAMES[:1])
    with matplotlib.rc_context({"text.parse_math": False}):
        curves, bars = figures.curves(named[: len(NAMES)]), figures.bars(found)
        sweep = figures.sweep([found], "train_neg_sample_args.sample_num")
    shown = [figures._short(name) for name in NAMES]
    assert [text.get_text() for text in curves.legends[0].get_texts()] == shown
    assert [text.get_text() for text in sweep.axes[0].get_legend().get_texts()] == shown and len(
        set(shown)
    ) == len(shown)
    assert [text.get_text() for text in bars.axes[0].get_yticklabels()] == shown
    warnings = write_report(tmp_path, "$title_ *", [found], named, [], "made ``` by hand")
    assert all(
        "boxes for letters that matplotlib's font lacks" in warning for warning in warnings
    ), warnings
    assert len(list(tmp_path.glob("*.png"))) == 5
    page = (tmp_path / "report.html").read_text()
    for name in NAMES:
        assert f"<td>{html.escape(name)}</td>" in page
    assert "<script>" not in page and "<td>a|b *c* `d` [e](f) ~g~</td>" in page
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("| ")]
    assert {len(row) for row in rows} == {len(METRICS) + 5}
    unescaped = [
        re.sub(rf"\\([{re.escape(string.punctuation)}])", r"\1", row[1].strip()) for row in rows[1:]
    ]
    assert unescaped == [name.strip() for name in NAMES]
    assert "# \\$title\\_ \\*" in lines and lines[-1] == "````"


def test_all_text_of_users_is_escaped_in_the_page(tmp_path):
    evil = "<img src=x onerror=alert(1)> ' \" & | done"
    swept = [finished(f"{evil} {k}", 1, 0.2 + k / 20, (evil, f"a.{evil}", evil)) for k in (1, 2)]
    write_report(tmp_path, evil, [compare(swept, "uni19", METRICS, [])], swept, [evil], evil)
    page = (tmp_path / "report.html").read_text()
    assert page.count(html.escape(evil)) == 7  # two titles and rows, a head, warning, origin
    assert "<img src" not in page and page.count("<h2>") == 3
    assert len(re.findall(r"<img alt='[\w-]+' src='data:image/png;base64,[^']*'>", page)) == 3


def test_markdown_shows_names_as_they_are():
    for name in [*NAMES, "snake_case_name", "A & B, beta = 0.5", "_x_", "5 < 6"]:
        shown = (
            markdown_it.MarkdownIt("commonmark").enable("table").renderInline(markdown_text(name))
        )
        assert html.unescape(shown) == name.strip()
    assert markdown_text("A & B_50%, beta = 0.5 (LoRA)") == "A & B_50%, beta = 0.5 (LoRA)"


def test_latex_has_no_command_but_ours(named):
    latex = comparison_latex(compare(named, "uni19", METRICS, NAMES[:1]))
    plain = re.sub(r"\\[&%$#_{}]", "", latex)
    assert (
        plain.count("{") == plain.count("}")
        and not re.search(r"\\\\\n[\[*]", plain)
        and "<" not in plain
    )
    ours = {"begin", "end", "toprule", "midrule", "bottomrule", "pm", "textbf", "underline"}
    assert set(re.findall(r"\\([a-z]+)", plain)) == ours | {
        "text" + end for end in ("backslash", "asciitilde", "less", "greater", "bar")
    }


def test_a_figure_that_fails_costs_that_figure_alone(runs, tmp_path, monkeypatch):
    found = compare(runs, "uni19", METRICS, ["rival"])
    aligned = [finished("ours", 1, 0.6, steps=True)]
    write_report(tmp_path, "whole", [found], aligned, [], "made")
    assert (tmp_path / "curves.png").is_file()

    def curves(runs):
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(figures, "curves", curves)
    (warning,) = write_report(tmp_path, "less", [found], aligned, [], "made")
    assert warning == "the figure curves could not be drawn: RuntimeError: no room"
    assert not (tmp_path / "curves.png").exists(), "nor is that of another report left"
    page = (tmp_path / "report.html").read_text()
    assert (
        warning in page
        and page.count("<img") == 3
        and warning in (tmp_path / "table.md").read_text()
    )


def test_a_report_that_cannot_be_written_leaves_the_one_before(runs, tmp_path, monkeypatch):
    write_report(tmp_path, "first", [compare(runs, "uni19", METRICS, ["rival"])], runs, [], "made")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write, written = Path.write_bytes, []

    def full(self, content):
        written.append(self)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        write_report(
            tmp_path, "second", [compare(runs, "uni19", METRICS, ["weak"])], runs, [], "made"
        )
    assert (
        len(written) == 4
        and {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    )


def test_what_a_run_costs_is_shown_on_request(runs):
    for run in runs:
        run.cost = {"targets_per_s": 100.0 * run.seed, "peak_memory_gib": 1.5, "top10_ms": math.nan}
    found = compare(runs, "uni19", METRICS, ["weak"], costs=True)
    head, _, line, *_ = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in comparison_markdown(found).splitlines()
    )
    assert head[-4:] == ["minutes", "targets/s", "GiB", "top 10, ms"]
    assert line[-4:] == ["1.0", "150", "1.5", ""]
    assert comparison_latex(found).startswith(r"\begin{tabular}{l" + "r" * 7 + "}")
    assert comparison_frame(found)["targets_per_s"].unique().tolist() == [150.0]
    found = compare(runs, "uni19", METRICS, ["weak"])
    assert "GiB" not in comparison_markdown(found) and "GiB" not in comparison_latex(found)


def test_the_cost_of_a_run_holds_that_of_its_sft(tmp_path):
    def write(folder, targets, train_s, peak, top10):
        folder.mkdir()
        stages = {"fit": {"targets": targets, "train_s": train_s, "wall_s": 60.0}}
        ranks = pd.DataFrame({"user": ["u"], "stage": "fit", "rank": 1, "candidates": "full"})
        ranks.to_csv(folder / "ranks.csv", index=False)
        about = {"stages": stages, "peak_memory_gib": peak, "top10": top10}
        write_result(folder, about, ["ranks.csv"])

    write(tmp_path / "sft", 300, 2.0, 5.0, {"ms": 9.0, "users": 32})
    write(tmp_path / "sdpo", 100, 6.0, 4.0, {"ms": 7.0, "users": 32})
    run = FinishedRun.read(tmp_path / "sdpo", tmp_path / "sft", "a", None, 1)
    assert run.cost == {"targets_per_s": 50.0, "peak_memory_gib": 5.0, "top10_ms": 7.0}
    assert run.wall_s == 120
    write(tmp_path / "old", 100, 0.0, 4.0, None)
    cost = FinishedRun.read(tmp_path / "old", None, "a", None, 1).cost
    assert math.isnan(cost["targets_per_s"]) and math.isnan(cost["top10_ms"])


def test_what_all_users_get_is_one_number_without_a_test_or_a_mark(runs, tmp_path):
    value = {"weak": 0.9, "rival": 0.1, "ours": 0.2, "same": 0.3}
    for run in runs:
        at = {"itemcoverage@5": value[run.name] + 0.01 * run.seed, "giniindex@5": 0.5}
        run.result["stages"] = {"first": {}, "last": {"candidates": {"uni19": {"test": at}}}}
    metrics = ["HR@1", "ItemCoverage@5", "GiniIndex@5"]
    found = compare(runs, "uni19", metrics, ["weak", "rival"])
    assert found.metrics == metrics and found.best_baseline == {"HR@1": "rival"}
    rows = {row.name: row for row in found.rows}
    for name, row in rows.items():
        assert row.mean("ItemCoverage@5") == pytest.approx(value[name] + 0.015)
        assert row.std("ItemCoverage@5") == pytest.approx(0.01 / math.sqrt(2))
        assert set(row.differences) <= {"HR@1"}
    head, _, *lines = comparison_markdown(found).splitlines()
    assert "ItemCoverage@5 ↑" in head and "GiniIndex@5 ↓" in head
    assert all("*" not in cell for line in lines for cell in line.split("|")[3:5])
    assert r"GiniIndex@5 $\downarrow$" in comparison_latex(found)
    frame = comparison_frame(found).set_index(["model", "metric"])
    assert frame.loc[("ours", "GiniIndex@5"), ["test", "p", "best_baseline"]].isna().all()
    write_report(tmp_path, "lists", [found], runs, [], "made")
    assert "no test over users is made" in (tmp_path / "table.md").read_text()
    for run in runs:  # nor is there a column where the candidates are a sample
        run.result["stages"]["last"]["candidates"]["uni19"]["test"] = {"hit@1": 0.5}
    assert compare(runs, "uni19", metrics, ["weak"]).metrics == ["HR@1"]


GROUPED = {
    "met": lambda row: (
        "0" if row.met == 0 else "1-4" if row.met < 5 else "5-19" if row.met < 20 else "20 or more"
    ),
    "popularity": lambda row: row.popularity,
    "history": lambda row: (
        "3-6" if row.history < 7 else "7-11" if row.history < 12 else "12 or more"
    ),
}
GAIN = {"HR@1": lambda r: r == 1, "NDCG@5": lambda r: (r <= 5) / math.log2(r + 1)}


@pytest.fixture
def grouped():
    """Runs of users whose targets and histories differ."""
    runs = [
        finished(name, seed, strength)
        for seed in (1, 2)
        for name, strength in {"base": 0.3, "mine": 0.6}.items()
    ]
    for run in runs:
        number = run.ranks["user"].str[1:].astype(int)
        run.ranks["met"] = np.array([0, 1, 4, 5, 19, 20, 400])[number % 7]
        run.ranks["popularity"] = np.array(["cold", "tail", "middle", "head"])[number % 4]
        run.ranks["history"] = np.array([3, 7, 12])[number % 3]
    return runs


def test_groups_hold_what_a_loop_over_targets_finds(grouped):
    table = compare(grouped, "uni19", METRICS, ["base"])
    frame = group_frame([table], grouped, [*GROUPED])
    assert len(frame) == 2 * len(METRICS) * (4 + 4 + 3)
    for row in frame.itertuples():
        gains = {
            name: {
                user: np.mean([GAIN[row.metric](target.rank) for target in targets])
                for user, targets in of_users(grouped, name, GROUPED[row.grouping], row.group)
            }
            for name in ("base", "mine")
        }
        mine = np.array([*gains[row.model].values()])
        assert row.targets == len(mine) and row.mean == pytest.approx(mine.mean())
        half = 1.96 * mine.std(ddof=1) / math.sqrt(len(mine))
        assert row.high - row.mean == pytest.approx(half, rel=0.1)
        assert row.mean - row.low == pytest.approx(row.high - row.mean)
        if row.model == "mine":
            gap = np.mean([gains["mine"][user] - gains["base"][user] for user in gains["base"]])
            assert row.difference == pytest.approx(gap)
            assert row.difference_low < gap < row.difference_high
        else:
            assert math.isnan(row.p)
    for _, part in frame.groupby("grouping"):
        part = part.dropna(subset="p")
        np.testing.assert_allclose(part["p_holm"], holm(part["p"].tolist()))
    orders = {name: list(part["group"].unique()) for name, part in frame.groupby("grouping")}
    assert orders == {
        "met": ["0", "1-4", "5-19", "20 or more"],
        "popularity": ["head", "middle", "tail", "cold"],
        "history": ["3-6", "7-11", "12 or more"],
    }


def of_users(runs, name, group_of, group):
    """Each user of a group, with the targets of all seeds."""
    targets = [target for run in runs if run.name == name for target in run.ranks.itertuples()]
    users = sorted({target.user for target in targets if group_of(target) == group})
    return [(user, [target for target in targets if target.user == user]) for user in users]


def test_a_group_is_shown_with_its_interval_and_star(grouped):
    frame = group_frame([compare(grouped, "uni19", METRICS, ["base"])], grouped, ["popularity"])
    head, *lines = group_table(frame, "uni19", "popularity", "HR@1")
    assert head == ["uni19, HR@1, target", "head", "middle", "tail", "cold"]
    assert [line[0] for line in lines] == ["base", "mine", "targets"]
    part = frame.query("model == 'mine' and metric == 'HR@1'")
    for row, cell in zip(part.itertuples(), lines[1][1:], strict=True):
        star = "*" * (row.p_holm < 0.05)
        assert cell == f"{row.mean:.4f} [{row.low:.4f}, {row.high:.4f}]{star}"
    assert any(cell.endswith("*") for cell in lines[1]) and not any("*" in c for c in lines[0])
    assert lines[2][1:] == ["50"] * 4
    two = {"By popularity": part.assign(mean=0.0, high=0.0), "Again": part}
    first, last = figures.in_groups(two, "HR@1").axes
    assert first.get_ylim() == last.get_ylim()
    assert last.get_ylim()[0] == 0 and last.get_ylim()[1] > part["high"].max()
    few = part.assign(targets=[1, *part["targets"][1:]], mean=0.01, low=0.0)
    few["high"] = [0.9, *[0.05] * (len(few) - 1)]
    assert figures.in_groups({"By popularity": few}, "HR@1").axes[0].get_ylim()[1] < 0.06
    figure = figures.in_groups({"By popularity": part}, "HR@1")
    (drawn,) = figure.axes[0].containers
    np.testing.assert_allclose(drawn[0].get_ydata().astype(float), part["mean"])


def test_groups_stand_in_their_order_whichever_the_first_row_has(grouped):
    for run in grouped:
        if run.name == "base":
            run.ranks = run.ranks[(run.ranks["met"] > 0) & (run.ranks["popularity"] != "head")]
    frame = group_frame([compare(grouped, "uni19", ["HR@1"], ["base"])], grouped, [*GROUPED])
    for grouping, order in (
        ("met", ["0", "1-4", "5-19", "20 or more"]),
        ("popularity", ["head", "middle", "tail", "cold"]),
        ("history", ["3-6", "7-11", "12 or more"]),
    ):
        assert group_table(frame, "uni19", grouping, "HR@1")[0][1:] == order
        part = frame[frame["grouping"] == grouping]
        ticks = figures.in_groups({"all": part}, "HR@1").axes[0].get_xticklabels()
        assert [text.get_text().split("\n")[0] for text in ticks] == order


def test_a_sweep_draws_each_line_from_left_to_right_and_the_metrics_of_each_candidate_set():
    swept = {"A": (1.0, 3.0), "B": (10.0, 0.3, 1)}
    runs = [
        finished(f"{name}, beta = {value}", 1, 0.2 + value / 20, (name, "beta", value))
        for name, values in swept.items()
        for value in values
    ]
    found = compare(runs, "uni19", ["HR@1"], [])
    lists = compare(runs, "uni19", ["HR@1"], [])
    for row in lists.rows:
        row.lists = {"ItemCoverage@10": np.array([0.5])}
    lists.metrics.append("ItemCoverage@10")
    for tables in ([found, lists], [lists, found]):
        drawing = figures.sweep(tables, "beta")
        panels = drawing.axes
        legends = [axes.get_legend() for axes in panels]
        assert [text.get_text() for text in legends[0].get_texts()] == ["A", "B"]
        assert legends[1:] == [None, None]
        shown = sorted(axes.get_ylabel() for axes in panels)
        assert shown == ["HR@1", "HR@1", "ItemCoverage@10"]
        first = next(axes for axes in panels if axes.get_ylabel() == "HR@1")
        ticks = [text.get_text() for text in first.get_xticklabels()]
        assert ticks == ["0.3", "1", "3", "10"], "1 and 1.0 are one value"
        mean = {row.name: row.mean("HR@1") for row in found.rows}
        for (name, values), line in zip(swept.items(), first.containers, strict=True):
            places = [[0.3, 1.0, 3.0, 10.0].index(value) for value in sorted(values)]
            assert line[0].get_xdata().tolist() == places
            expected = [mean[f"{name}, beta = {value}"] for value in sorted(values)]
            assert line[0].get_ydata().tolist() == pytest.approx(expected)


def test_many_rows_are_drawn_and_told_apart(tmp_path, grouped):
    """There are ten colours, and times that differ by less than ten times."""
    runs = [
        dataclasses.replace(grouped[number % 2], name=f"row {number}", wall_s=300.0 + number)
        for number in range(16)
    ]
    tables = [compare(runs, "uni19", METRICS, ["row 0"])]
    assert write_report(tmp_path, "many", tables, runs, [], "made", [*GROUPED]) == []
    figure = figures.against_time(tables)
    figure.canvas.draw()
    (axes,) = figure.axes
    labels = [tick.get_text() for tick in axes.get_xticklabels(which="both")]
    assert any(labels) and not any("$" in label for label in labels)
    drawn = [bar.lines[0] for bar in axes.containers]
    assert len({(line.get_color(), line.get_alpha()) for line in drawn}) == 16


def test_a_report_leaves_no_figure_of_the_one_before_and_nobody_elses(tmp_path):
    swept = [finished(f"S, beta = {b}", 1, 0.3, ("S", "beta", b)) for b in (1, 2)]
    write_report(tmp_path, "a", [compare(swept, "uni19", ["HR@1"], [])], swept, [], "made")
    (tmp_path / "by-hand.png").write_text("mine")
    (tmp_path / "report.html").write_bytes((tmp_path / "report.html").read_bytes() + b"\xff")
    assert (tmp_path / "by-beta.png").is_file() and (tmp_path / "by-beta.svg").is_file()
    runs = [finished("one", 1, 0.3)]
    write_report(tmp_path, "b", [compare(runs, "uni19", ["HR@1"], [])], runs, [], "made")
    assert not [*tmp_path.glob("by-beta.*")] and (tmp_path / "by-hand.png").is_file()
    assert (tmp_path / "bars-uni19.png").is_file()


def test_histories_of_one_length_stay_together(grouped):
    for run in grouped:
        run.ranks["history"] = np.where(run.ranks["user"] == "u7", 9, 4)
    frame = group_frame([compare(grouped, "uni19", ["HR@1"], [])], grouped, ["history"])
    assert frame.query("model == 'mine'")["group"].tolist() == ["4 or more"]
    assert frame["low"].notna().all()


def test_no_groups_of_runs_that_do_not_say_who_met_the_target(tmp_path):
    runs = [finished("mine", 1, 0.4)]
    tables = [compare(runs, "uni19", METRICS, [])]
    assert group_frame(tables, runs, [*GROUPED]).empty
    write_report(tmp_path, "groups", tables, runs, [], "made", [*GROUPED])
    assert "met the target" not in (tmp_path / "table.md").read_text()
    runs[0].ranks["met"] = 3
    write_report(tmp_path, "groups", tables, runs, [], "made", [*GROUPED])
    for file in ("table.md", "report.html"):
        assert "met the target" in (tmp_path / file).read_text()
    assert pd.read_csv(tmp_path / "groups.csv")["group"].unique().tolist() == ["1-4"]
    assert (tmp_path / "groups-uni19.png").is_file()


def test_the_interval_of_what_is_0_or_1_stays_between_them():
    low, high = interval(np.array([1.0, 0.0, 0.0]))
    # Wilson's, by its formula
    n, p, z = 3, 1 / 3, 1.959964
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert [low, high] == pytest.approx(expected, abs=1e-6) and 0 < low < high < 1
    assert interval(np.zeros(3))[0] == 0 < interval(np.zeros(3))[1]
    assert interval(np.array([0.0, 0.63, 0.0])) == (0.0, pytest.approx(1.0, abs=0.3))


def test_a_report_warns_of_lists_that_give_their_targets_away():
    runs = [finished("a", 1, 0.2), finished("b", 1, 0.4)]
    guess = {"guesser": "nearest lists", "hit": (0.58, 0.5, 0.6), "ndcg": (0.6, 0.5, 0.7)}
    guess |= {"p": 0.0, "explained": 0.1, "p_beyond": 1e-9}
    found = {"lists": 900, "reference": 900, "halves": False, "chance": (0.05, 0.15)}
    found |= {"knows_popularity": True, "guesses": [guess]}
    before = unfair(runs, ["uni19"])
    for run in runs:
        run.result["audit"] = {"uni19": found}
    (warning,) = set(unfair(runs, ["uni19"])) - {*before}
    assert "a guesser by nearest lists has HR@1 0.580, where popularity explains 0.100" in warning

"""Two rows against each other."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recbole_sdpo.evaluator.significance import holm
from recbole_sdpo.report.comparison import compare
from recbole_sdpo.report.experiment import write_report
from recbole_sdpo.report.pairs import COLUMNS, pair_frame, pair_table
from tests.report.test_comparison import METRICS, finished, per_user

PAIRS = [("ours", "weak"), ("same", "rival")]


@pytest.fixture
def runs():
    strengths = {"weak": 0.2, "rival": 0.3, "ours": 0.6, "same": 0.29}
    return [
        finished(name, seed, strength) for seed in (1, 2) for name, strength in strengths.items()
    ]


def test_each_pair_is_tested_over_users(runs):
    frame = pair_frame([compare(runs, "uni19", METRICS, ["rival"])], PAIRS)
    assert frame.columns.tolist() == COLUMNS and len(frame) == len(PAIRS) * len(METRICS)
    for row in frame.itertuples():
        mine, other = (
            per_user(runs, name, row.metric).mean(0) for name in (row.model, row.against)
        )
        assert row.difference == pytest.approx((mine - other).mean())
        assert row.low < row.difference < row.high
        seeds = [
            per_user(runs, row.model, row.metric)[seed].mean()
            - per_user(runs, row.against, row.metric)[seed].mean()
            for seed in (0, 1)
        ]
        assert [float(one) for one in row.by_seed.split()] == pytest.approx(seeds, abs=5.1e-5)
        if row.metric == "NDCG@5":
            assert row.p == pytest.approx(stats.ttest_rel(mine, other).pvalue)
    assert frame["p_holm"].tolist() == pytest.approx(holm(frame["p"].tolist()))
    far, near = (frame[frame["model"] == name] for name, _ in PAIRS)
    assert (far["p_holm"] < 0.001).all() and (near["p_holm"] > 0.05).all()


def test_a_report_shows_them(runs, tmp_path):
    tables = [compare(runs, mode, METRICS, ["rival"]) for mode in ("uni19",)]
    write_report(tmp_path, "pairs", tables, runs, [], "made", pairs=PAIRS)
    frame = pd.read_csv(tmp_path / "pairs.csv")
    assert frame["against"].tolist() == ["weak", "weak", "rival", "rival"]
    text = (tmp_path / "table.md").read_text()
    assert "## Further pairs" in text and "| ours less weak " in text
    row = frame.iloc[0]
    ends = f"{row['difference']:+.4f} \\[{row['low']:+.4f}, {row['high']:+.4f}] p"
    assert f"{ends} \\< .001\\*, 2 of 2 seeds" in text
    assert "<td>ours less weak</td>" in (tmp_path / "report.html").read_text()
    write_report(tmp_path, "none", tables, runs, [], "made")
    assert "Further pairs" not in (tmp_path / "table.md").read_text()
    assert pd.read_csv(tmp_path / "pairs.csv").columns.tolist() == COLUMNS


def test_a_pair_of_which_one_failed_is_left_out(runs):
    tables = [compare(runs, "uni19", METRICS, [])]
    frame = pair_frame(tables, [("ours", "failed"), ("ours", "ours twice"), PAIRS[0]])
    assert set(frame["model"] + frame["against"]) == {"oursweak"}
    assert pair_table(pair_frame(tables, []), "uni19") == []


def test_equal_rows_have_no_difference_and_chance(runs):
    twin = [finished("twin", seed, 0.6) for seed in (1, 2)]
    frame = pair_frame([compare([*runs, *twin], "uni19", METRICS, [])], [("ours", "twin")])
    assert (frame["difference"] == 0).all() and (frame["p_holm"] == 1).all()
    (_, line) = pair_table(frame, "uni19")
    assert line == ["ours less twin", *["+0.0000 [+0.0000, +0.0000] p = 1.000"] * len(METRICS)]
    assert np.isfinite(frame[["low", "high"]]).all(axis=None)


def test_it_says_how_many_seeds_agree():
    """A mean over seeds may be that of one of them, and the users' test does not tell."""
    runs = [finished("ours", seed, 0.6 if seed == 1 else 0.2) for seed in (1, 2)]
    runs += [finished("rival", seed, 0.3) for seed in (1, 2)]
    frame = pair_frame([compare(runs, "uni19", ["NDCG@5"], [])], [("ours", "rival")])
    first, second = map(float, frame["by_seed"][0].split())
    assert first > 0 > second and frame["difference"][0] > 0
    (_, (_, cell)) = pair_table(frame, "uni19")
    assert cell.endswith(", 1 of 2 seeds")


def test_a_seed_that_one_row_lacks_is_left_out():
    runs = [finished("ours", seed, 0.6) for seed in (1, 2)] + [finished("rival", 2, 0.3)]
    frame = pair_frame([compare(runs, "uni19", ["NDCG@5"], [])], [("ours", "rival")])
    second = per_user(runs, "ours", "NDCG@5")[1] - per_user(runs, "rival", "NDCG@5")[0]
    assert [float(one) for one in frame["by_seed"][0].split()] == [round(second.mean(), 4)]
    (_, (_, cell)) = pair_table(frame, "uni19")
    assert "seeds" not in cell

import json
import random
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recbole_sdpo.command import program
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator import audit as module
from recbole_sdpo.evaluator.audit import Lists, audit
from recbole_sdpo.report.comparison import Comparison
from recbole_sdpo.report.table import comparison_frame, comparison_markdown

ITEMS, EACH = 30, 6
LENGTHS = np.random.default_rng(9).integers(3, 50, ITEMS)


def popularity(power):
    share = 1 / np.arange(1.0, ITEMS + 1) ** power
    return share / share.sum()


def targets(rng, number, power):
    return rng.choice(ITEMS, number, p=popularity(power))


def clean(rng, number, power=0.8):
    """Negatives drawn anew for each target, and shuffled."""
    target = targets(rng, number, power)
    keys = rng.random((number, ITEMS))
    keys[np.arange(number), target] = -1
    return Lists(target, rng.permuted(np.argsort(keys, 1)[:, :EACH], axis=1))


def leaky(rng, number, power=0.8):
    """The same after ``random.seed(target)``."""
    target, rows = targets(rng, number, power), []
    for item in target.tolist():
        random.seed(item)
        negatives = random.sample([other for other in range(ITEMS) if other != item], EACH - 1)
        rows.append(random.sample([*negatives, item], EACH))
    return Lists(target, np.array(rows))


def over_seeds(make, power, halves):
    """Of 100 audits how many warn, and in how many a guesser is above chance; and of whom."""
    warned, above, who = 0, 0, Counter()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        lists, reference = make(rng, 60, power), None if halves else make(rng, 60, power)
        found = audit(lists, reference, popularity(power), LENGTHS)
        warned += bool(found.warnings("x"))
        above += any(guess.p < 0.05 for guess in found.guesses)
        who.update(guess.guesser for guess in found.guesses if guess.gives_away)
    return warned, above, who


MOST = int(stats.binom.ppf(0.999, 100, 0.05))
"""False alarms of 100 at a level of 0.05, but for bad luck."""


@pytest.mark.parametrize(("power", "halves"), [(0.0, False), (1.0, False), (1.0, True)])
def test_clean_lists_alarm_no_more_often_than_their_level_says(power, halves):
    warned, above, _ = over_seeds(clean, power, halves)
    assert warned <= MOST
    assert above > 90 if power else above <= MOST  # popular items are targets more often


@pytest.mark.parametrize("drawn_by", [0.0, 1.0])
def test_what_has_become_popular_since_is_no_alarm(drawn_by):
    """Targets of today, negatives drawn uniformly or by the popularity of the training."""
    known, alarms, lately = popularity(1.0), 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        now = np.roll(known, 10)

        def today(rng=rng, now=now):
            target = rng.choice(ITEMS, 200, p=now)
            keys = np.log(rng.random((200, ITEMS))) / known**drawn_by
            keys[np.arange(200), target] = 1
            return Lists(target, np.argsort(-keys, 1)[:, :EACH], ordered=False)

        audited = audit(today(), today(), known)
        alarms += bool(audited.warnings("x"))
        hits = {guess.guesser: guess.hit[0] for guess in audited.guesses}
        lately.append(hits["share as target"] - hits["popularity"])
    assert alarms <= MOST
    assert np.mean(lately) > 0.1


@pytest.mark.parametrize("known", [None, popularity(0.0)])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_negatives_that_are_seldom_targets_are_found(known, share):
    """A share of the negatives is of the half of the items that is never a target."""

    def lists(rng):
        target, half = rng.integers(0, ITEMS // 2, 300), np.arange(ITEMS) >= ITEMS // 2
        chance = np.where(half, 1 + share, 1 - share + 1e-6)
        keys = np.log(rng.random((300, ITEMS))) / chance
        keys[np.arange(300), target] = 1
        return Lists(target, np.argsort(-keys, 1)[:, :EACH], ordered=False)

    for seed in range(10):
        rng = np.random.default_rng(seed)
        audited = audit(lists(rng), lists(rng), known)
        assert "share as target" in {guess.guesser for guess in audited.guesses if guess.gives_away}


@pytest.mark.parametrize("each", [4, 15, 16, ITEMS])
def test_lists_are_drawn_anew_by_popularity(each):
    """Few of the items, or most of them; those that the lists hold often come often."""
    rng, known = np.random.default_rng(0), np.arange(ITEMS)
    target = rng.integers(0, ITEMS, 500)
    keys = np.log(rng.random((500, ITEMS))) / (1.0 + known)
    keys[np.arange(500), target] = 1
    lists = Lists(target, np.argsort(-keys, 1)[:, :each])
    anew = module._drawn_anew(lists, lists.take(np.arange(0)), known, rng)
    assert (anew.items[:, 0] == anew.target).all()
    assert (anew.target.reshape(-1, 500) == target).all()
    assert (np.diff(np.sort(anew.items, 1), axis=1) > 0).all()
    times, before = (
        np.bincount(of.items[~of.own], minlength=ITEMS) / len(of) for of in (anew, lists)
    )
    # of most items, flatter: what is drawn already cannot be drawn more often
    assert np.abs(times - before).max() < 0.15


def test_lists_drawn_after_seeding_with_the_target_are_found():
    _, _, who = over_seeds(leaky, 0.8, halves=False)
    assert who["nearest lists"] >= 99
    assert who["title length"] <= MOST


def test_other_ways_to_give_a_target_away_are_found():
    rng = np.random.default_rng(0)
    lists, reference = clean(rng, 400, 0.0), clean(rng, 400, 0.0)

    def found(change):
        each = [change(part) for part in (lists, reference)]
        return {
            guess.guesser
            for guess in audit(*each, title_length=LENGTHS).guesses
            if guess.gives_away
        }

    def first(part):  # a third of the targets stand first
        items = part.items.copy()
        some = np.arange(len(items)) % 3 == 0
        place = part.own.argmax(1)
        rows = np.arange(len(items))[some]
        items[rows, place[some]], items[rows, 0] = items[rows, 0], part.target[some]
        return Lists(part.target, items)

    assert found(lambda part: part) == set()
    assert found(first) == {"position"}


@given(st.lists(st.integers(0, 3), min_size=2, max_size=7))
def test_candidates_of_one_score_share_their_ranks(scores):
    hit, ndcg = module._gains(np.array([scores], float))
    orders = [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    for item in range(len(scores)):
        ranks = [order.index(item) + 1 for order in orders]
        assert hit[0, item] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
        gains = [1 / np.log2(rank + 1) if rank <= 5 else 0 for rank in ranks]
        assert ndcg[0, item] == pytest.approx(np.mean(gains))


def test_the_nearest_lists_are_those_that_hold_most_of_the_candidates(monkeypatch):
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 7 * 20**2)
    rng = np.random.default_rng(1)
    lists, reference = clean(rng, 30), clean(rng, 50)
    got = module._nearest(lists, reference, rng)
    for row, items in enumerate(lists.items):
        for place, item in enumerate(items):
            theirs = reference.items[reference.target == item]
            overlaps = [len(set(other) & set(items)) for other in theirs]
            assert got[row, place] == pytest.approx(np.mean(overlaps) if overlaps else 0)
    example = Lists(np.array([0, 1, 1]), np.array([[0, 1, 2, 3], [1, 3, 4, 5], [1, 0, 4, 5]]))
    (scores,) = module._nearest(Lists(np.array([1]), np.array([[0, 1, 4, 5]])), example, rng)
    assert scores.tolist() == [2, 3.5, 0, 0]  # as drawn in its docstring


@pytest.mark.parametrize("ordered", [False, True])
def test_of_long_lists_some_candidates_are_looked_for_and_tell_the_target_no_less(
    monkeypatch, ordered
):
    """Those that a list is compared by must not depend on which the target is."""
    monkeypatch.setattr(module, "FELLOWS", 3)
    for make, gives_away in ((clean, 0), (leaky, 20)):
        alarms = 0
        for seed in range(20):
            rng = np.random.default_rng(seed)
            lists, reference = make(rng, 150), make(rng, 150)
            if not ordered:  # the target first
                lists, reference = (
                    Lists(
                        each.target,
                        np.column_stack([each.target, each.items[~each.own].reshape(150, -1)]),
                        ordered=False,
                    )
                    for each in (lists, reference)
                )
            found = audit(lists, reference, popularity(0.8))
            alarms += any(g.gives_away for g in found.guesses if g.guesser == "nearest lists")
        assert alarms >= gives_away if gives_away else alarms <= 3


def test_a_rare_groups_share_of_targets_is_near_chance():
    rng = np.random.default_rng(8)
    lists, reference = clean(rng, 20), clean(rng, 20)
    got = module._learned(reference, lists.items, reference.items)
    for item in range(ITEMS):
        hits, seen = (reference.target == item).sum(), (reference.items == item).sum()
        assert (got[lists.items == item] == (hits + 1) / (seen + EACH)).all()


def test_no_guesser_knows_the_targets_that_it_guesses():
    rng = np.random.default_rng(2)
    lists, reference = leaky(rng, 60), leaky(rng, 60)
    others = Lists(lists.items[np.arange(60), rng.integers(0, EACH, 60)], lists.items)
    known = reference, popularity(1), LENGTHS
    once, again = (module._scores(each, *known, rng) for each in (lists, others))
    assert once.keys() == again.keys() and len(once) == 5
    for name in once:
        np.testing.assert_array_equal(once[name], again[name])


def test_what_popularity_explains_is_what_it_makes_of_the_lists():
    rng, number = np.random.default_rng(3), 4000
    items = np.argsort(rng.random((number, ITEMS)), 1)[:, :EACH]
    weight = popularity(1.0)[items]
    p = weight / weight.sum(1, keepdims=True)
    own = np.arange(EACH) == (p.cumsum(1) > rng.random((number, 1))).argmax(1)[:, None]
    found = module._explained([popularity(1.0)[items], rng.random(items.shape)], own)
    assert np.abs(found.sum(1) - 1).max() < 1e-9
    assert np.abs(found - p).mean() < 0.01
    hit, _ = module._gains(rng.random(items.shape))
    draws = [
        hit[np.arange(EACH) == (p.cumsum(1) > rng.random((number, 1))).argmax(1)[:, None]]
        for _ in range(50)
    ]
    p_value, expected = module._above(hit, own, p)
    assert expected == pytest.approx(np.mean(draws), abs=0.003)
    simulated = stats.norm(np.mean(draws) * number, np.std([draw.sum() for draw in draws]))
    assert p_value == pytest.approx(simulated.sf(hit[own].sum() - 0.5), abs=0.15)


def test_of_many_lists_some_are_drawn(monkeypatch):
    monkeypatch.setattr(module, "MOST_LISTS", 50)
    monkeypatch.setattr(module, "MOST_LEARNED", 70 * EACH)
    rng = np.random.default_rng(4)
    lists, reference = leaky(rng, 200), leaky(rng, 200)
    found = audit(lists, reference)
    assert (found.lists, found.reference, found.halves) == (50, 70, False)
    assert found == audit(lists, reference)
    found = audit(lists)
    assert (found.lists, found.reference, found.halves) == (50, 70, True)
    assert not found.knows_popularity and "how often items are targets" in found.warnings("x")[0]


def test_lists_without_an_order_have_no_guesser_by_position():
    rng = np.random.default_rng(5)
    lists = clean(rng, 50)
    found = audit(Lists(lists.target, lists.items, ordered=False), popularity=popularity(1))
    assert [guess.guesser for guess in found.guesses] == [
        "popularity",
        "share as target",
        "nearest lists",
    ]


def test_the_floor_stands_below_a_comparison_of_runs():
    floor = {"audit: nearest lists": {"HR@1": 0.58}}
    table = Comparison("file", ["HR@1", "MRR@10"], [], {"HR@1": "a"}, floor=floor)
    last = comparison_markdown(table).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:4]] == ["audit: nearest lists", "0.5800", ""]
    (row,) = comparison_frame(table).to_dict("records")
    assert row == {
        "candidates": "file",
        "model": "audit: nearest lists",
        "metric": "HR@1",
        "mean": 0.58,
    }


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["recbole-sdpo", "audit", *words])
    program.main.__wrapped__()
    return capsys.readouterr().out


def llara(file, lists, history):
    rows = [
        {
            "historyList": history,
            "itemList": [f"title {item}" for item in items],
            "trueSelection": f"title {target}",
        }
        for target, items in zip(lists.target, lists.items.tolist(), strict=True)
    ]
    file.write_text(json.dumps(rows))
    return str(file)


def test_the_command_audits_files_of_llara(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(6)
    files = {
        name: llara(tmp_path / f"{name}.json", leaky(rng, 150), ["title 1", "title 2"])
        for name in ("test", "valid", "train")
    }
    out = call(monkeypatch, capsys, files["test"], f"--valid={files['valid']}")
    assert "150 lists of 6 candidates; guessers learned from 150 lists of other parts" in out
    assert "warning: candidates test.json: a guesser by nearest lists has HR@1 " in out
    assert "The guesser by popularity is left out; it needs --dataset or --train." in out
    assert "| title length" in out
    out = call(monkeypatch, capsys, files["test"], f"--train={files['train']}")
    assert "| popularity" in out and "where popularity explains" in out
    out = call(monkeypatch, capsys, files["test"])
    assert "75 lists of 6 candidates; guessers learned from 75 lists of their other half" in out


def test_the_command_knows_a_datasets_titles_and_refuses_what_it_cannot_use(
    ring, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "lists.csv"
    rows = [f"u{n},i{1 + n % 24},i{1 + n % 24},i{1 + (n + 5) % 24},grey ring" for n in range(4)]
    file.write_text("\n".join(["user,target,candidate_1,candidate_2,candidate_3", *rows]))
    data = ["--dataset=toy", f"--data_path={ring['data_path']}"]
    out = call(monkeypatch, capsys, str(file), *data)
    assert (
        "| popularity" in out
        and "| title length" in out
        and "Fewer than 60 lists are too few to tell" in out
    )
    for words, message in (
        ([str(file), data[1]], "--data_path is for a dataset; give --dataset, too"),
        ([str(file), f"--valid={tmp_path}/no.json"], "no.json cannot be read: there is no such"),
        ([str(file), f"--train={file}"], "is the file of the test; it must be another"),
        ([str(tmp_path / "lists.txt")], "must be a file of candidate lists: .csv, .json or .jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, capsys, *words)
    file.write_text("\n".join(file.read_text().splitlines()[:2]))
    with pytest.raises(UserError, match="has 1 list of the test; it must have two or more"):
        call(monkeypatch, capsys, str(file))


def csv_lists(file, lists, *phases):
    """Of these phases in turn, or without a column of them."""
    head = ["user", "target", *(f"candidate_{n + 1}" for n in range(EACH))]
    rows = [head + ["phase"] * bool(phases)]
    for user, (target, items) in enumerate(zip(lists.target, lists.items.tolist(), strict=True)):
        phase = [phases[user % len(phases)]] if phases else []
        rows.append([f"u{user}", target, *items, *phase])
    file.write_text("\n".join(",".join(map(str, row)) for row in rows))
    return str(file)


def test_the_command_learns_from_the_lists_of_the_phase_alone(tmp_path, monkeypatch, capsys):
    lists = clean(np.random.default_rng(6), 300)
    thirds = [lists.take(np.arange(300) % 3 == n) for n in range(3)]
    every = csv_lists(tmp_path / "all.csv", lists, *("train", "valid", "test"))
    train, valid, test = (csv_lists(tmp_path / f"{n}.csv", third) for n, third in enumerate(thirds))
    apart = call(monkeypatch, capsys, test, f"--train={train}", f"--valid={valid}")
    assert "100 lists of 6 candidates; guessers learned from 200 lists of other" in apart
    assert call(monkeypatch, capsys, test, f"--train={every}", f"--valid={every}") == apart
    named = csv_lists(tmp_path / "named.csv", thirds[1], "valid")
    with pytest.raises(UserError, match="--train=.*named.csv has no lists of the phase train; it"):
        call(monkeypatch, capsys, test, f"--train={named}")


def test_the_command_says_what_title_length_needs(ring, tmp_path, monkeypatch, capsys):
    file = tmp_path / "lists.csv"
    rows = [f"u{n},i{1 + n % 24},i{1 + n % 24},i{1 + (n + 5) % 24}" for n in range(4)]
    file.write_text("\n".join(["user,target,candidate_1,candidate_2", *rows]))
    data = [str(file), "--dataset=toy", f"--data_path={ring['data_path']}"]
    with pytest.raises(UserError, match="title_fields=.* has no column 'class'"):
        call(monkeypatch, capsys, *data, "--title_fields=['class']")
    items = next(Path(ring["data_path"]).rglob("toy.item"))
    items.rename(tmp_path / "gone")
    out = call(monkeypatch, capsys, *data)
    (tmp_path / "gone").rename(items)
    assert "The guesser by title length is left out; it needs a --dataset with titles." in out


def test_files_of_two_kinds_are_not_audited_together(tmp_path, monkeypatch, capsys):
    test = llara(tmp_path / "test.json", clean(np.random.default_rng(0), 5), ["title 1"])
    (tmp_path / "lists.csv").write_text("user,target,candidate_1,candidate_2\nu,a,a,b\nv,a,a,b")
    with pytest.raises(UserError, match="test.json has titles in itemList, and .*lists.csv has no"):
        call(monkeypatch, capsys, test, f"--train={tmp_path / 'lists.csv'}")


def test_the_exit_code_says_whether_lists_give_their_targets_away(tmp_path, monkeypatch, capsys):
    rng, codes = np.random.default_rng(7), {}
    for make in (clean, leaky):
        file = llara(tmp_path / f"{make.__name__}.json", make(rng, 300), ["title 1"])
        monkeypatch.setattr("sys.argv", ["recbole-sdpo", "audit", file])
        codes[make], out = program.main(), capsys.readouterr().out
        assert ("warning: " in out) == bool(codes[make])
    assert codes == {clean: 0, leaky: 3}


def test_long_lists_are_compared_in_bounded_memory(monkeypatch):
    """So many lists as their pairs of candidates allow, and so many pairs at a time."""
    sizes, blocks = [], module._blocks

    def seen(lists, each):
        sizes.extend((part.stop - part.start) * each**2 for part in blocks(lists, each))
        return blocks(lists, each)

    monkeypatch.setattr(module, "_blocks", seen)
    rng = np.random.default_rng(1)
    items = np.stack([rng.permutation(2_000)[:1_000] for _ in range(600)])
    judged = audit(Lists(items[:, 0], items, ordered=False), popularity=np.arange(2_000))
    assert judged.lists == 200 and max(sizes) <= max(module.PAIRS_AT_ONCE, 1_000**2)


def test_a_guesser_that_hits_none_may_yet_hit_some():
    """Its interval is Wilson's: 0 of n says no more than that it is below z^2 / (n + z^2)."""
    n, z = 100, stats.norm.ppf(0.975)
    assert module._interval(np.zeros(n)) == pytest.approx((0, 0, z**2 / (n + z**2)))
    assert module._interval(np.ones(n)) == pytest.approx((1, n / (n + z**2), 1))
    assert module._interval(np.full(n, 0.05)) == pytest.approx((0.05, 0.05, 0.05))

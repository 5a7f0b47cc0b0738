import numpy as np
import pandas as pd
import pytest
from recbole.data import create_dataset, data_preparation
from scipy import stats

from recbole_sdpo import quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data import whole_catalogue as whole
from recbole_sdpo.data.candidates import (
    FrozenCandidates,
    PopulationSampler,
    evaluation_loader,
    fingerprint,
    freeze,
)
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.negatives import NegativeSampler
from recbole_sdpo.data.sequences import met_items
from recbole_sdpo.data.whole_catalogue import LEFT_OUT
from recbole_sdpo.errors import UserError
from recbole_sdpo.loaders import evaluation_loaders
from recbole_sdpo.random import generator, recbole_draws
from tests.conftest import TINY, write_dataset

TWINS = (1, 2)


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    sequences = [(1 + rng.permutation(40)[: rng.integers(6, 15)]).tolist() for _ in range(50)]
    titles = {i: f"title {i}" for i in range(1, 41)} | {2: "title 1"}
    return write_dataset(tmp_path / "d", sequences, titles)


def frozen(path, model, disturb=False, **settings):
    config = RunConfig(model, "toy", config_dict=TINY | {"data_path": str(path)} | settings)
    dataset = create_dataset(config)
    catalogue = Catalogue.from_dataset(dataset, ["title"])
    loaders = data_preparation(config, dataset)
    if disturb:
        np.random.seed(99)
        np.random.random(17)
    parts = [loader._dataset for loader in loaders]
    for number, loader in ((2, loaders[1]), (3, loaders[2])):
        freeze(
            loader, parts[:number], catalogue, 5, settings.get("candidates_exclude_history", True)
        )
    return loaders, catalogue


@pytest.mark.parametrize("mode", ["uni5", "pop5"])
def test_candidates_are_distinct_unmet_and_of_distinct_titles(path, mode):
    loaders, catalogue = frozen(path, "GRU4Rec", eval_args={"mode": mode})
    met = {
        p: set(zip(*met_items(*[x._dataset for x in loaders[:n]]), strict=True))
        for p, n in (("valid", 2), ("test", 3))
    }
    for loader in loaders[1:]:
        sampler = loader._sampler
        assert len(sampler.user) == 50
        for user, target, negatives in zip(
            sampler.user, sampler.target, sampler.negatives, strict=True
        ):
            titles = [catalogue.titles[i] for i in [target, *negatives]]
            assert len(set(titles)) == 6
            assert not {(user, item) for item in negatives} & met[sampler.phase]


def test_history_items_may_be_candidates_if_asked(path):
    loaders, _ = frozen(path, "GRU4Rec", candidates_exclude_history=False)
    sampler = loaders[2]._sampler
    met = set(zip(*met_items(*[x._dataset for x in loaders]), strict=True))
    assert any(
        (u, i) in met for u, row in zip(sampler.user, sampler.negatives, strict=True) for i in row
    )
    assert all(t not in row for t, row in zip(sampler.target, sampler.negatives, strict=True))


def whole_catalogue(path, model, split=None, **settings):
    args = {"mode": "full"} | ({"split": split} if split else {})
    config = RunConfig(
        model, "toy", config_dict=TINY | {"data_path": str(path), "eval_args": args} | settings
    )
    dataset = create_dataset(config)
    catalogue = Catalogue.from_dataset(dataset, ["title"])
    train, *rest = data_preparation(config, dataset)
    return evaluation_loaders(config, train, rest, catalogue)["full"], catalogue


def ranked(loader):
    """Of a full ranking: for each user and target, in the data's ids, what is no candidate."""
    dataset, rows = loader._dataset, {}
    user_token, item_token = (dataset.field2id_token[key] for key in ("user_id", "item_id"))
    for interaction, out, row, target in loader:
        user = user_token[interaction["user_id"].numpy()]
        assert row.tolist() == list(range(len(user)))
        for place, item in enumerate(target.tolist()):
            left_out = [] if out is None else item_token[out[1][out[0] == place].numpy()].tolist()
            assert len({*left_out}) == len(left_out)
            assert out is None or interaction[LEFT_OUT][place] == len(left_out)
            rows.setdefault((user[place], item_token[item]), set()).update(left_out)
    return rows


@pytest.mark.parametrize("split", [{"LS": "valid_and_test"}, {"RS": [0.5, 0.25, 0.25]}])
@pytest.mark.parametrize("model", ["SDPO-LLM", "GRU4Rec", "BPR", "Pop"])
def test_the_whole_catalogue_is_what_the_user_has_not_met(tmp_path, model, split):
    """Against the sequences that the test writes: a target that the user had met before stays,
    and another item of a title that was met, too, is out."""
    draw = np.random.default_rng(1)
    sequences = [(1 + draw.permutation(20)[:12]).tolist() for _ in range(12)]
    sequences[0][-1] = sequences[0][2]
    titles = {i: f"title {i}" for i in range(1, 21)} | {2: "title 1"}
    path = write_dataset(tmp_path / "d", sequences, titles)
    loaders, _ = whole_catalogue(path, model, split=split)
    for loader in loaders:
        rows = ranked(loader)
        assert len(rows) == len(loader._dataset.inter_feat)
        assert (len({user for user, _ in rows}) < len(rows)) == ("RS" in split)
        for (user, target), left_out in rows.items():
            held = [f"i{item}" for item in sequences[int(user[1:])]]
            asked = {item for other, item in rows if other == user}
            met = set(held[: 1 + max(place for place, item in enumerate(held) if item in asked)])
            twins = {f"i{item}" for item in TWINS}
            assert left_out == (met | twins if met & twins else met) - {target}


@pytest.mark.parametrize("model", ["SDPO-LLM", "BPR"])
def test_the_whole_catalogue_has_what_was_met_if_asked(path, model):
    every, _ = whole_catalogue(path, model, candidates_exclude_history=False)
    assert not any(ranked(every[1]).values())
    assert fingerprint(*every) != fingerprint(*whole_catalogue(path, model)[0])


@pytest.mark.parametrize("model", ["GRU4Rec", "BPR"])
def test_lists_are_no_longer_than_what_a_user_has_not_met(path, model):
    asked = {"metrics": ["NDCG", "GiniIndex"], "valid_metric": "NDCG@5"}
    whole_catalogue(path, model, **asked, topk=[5, 25])
    whole_catalogue(path, model, **asked, topk=[5, 30], candidates_exclude_history=False)
    whole_catalogue(path, model, topk=[5, 30], valid_metric="NDCG@5")
    with pytest.raises(
        ValueError, match=r"lists of 30 items, but for user 'u\d+' only 2\d are left"
    ):
        whole_catalogue(path, model, **asked, topk=[5, 30])


@pytest.mark.parametrize("model", ["GRU4Rec", "SDPO-LLM"])
@pytest.mark.parametrize(("most", "batches"), [(41 * 9, 6), (41, 50), (3, 50), (2**26, 1)])
def test_a_batch_of_scores_has_a_bounded_size(path, model, most, batches, monkeypatch):
    """RecBole takes as many users, however many items there are."""
    monkeypatch.setattr(whole, "SCORES_AT_MOST", most)
    (_, test), _ = whole_catalogue(path, model)
    assert len(test) == batches and len(ranked(test)) == 50


@pytest.mark.parametrize(("model", "batches"), [("BPR", 1), ("GRU4Rec", 50)])
def test_a_batch_of_scores_is_of_many_users(path, model, batches):
    (_, test), _ = whole_catalogue(path, model, eval_batch_size=1)
    assert len(test) == batches and len(ranked(test)) == 50


@pytest.mark.parametrize("mode", ["uni5", "pop5", "full"])
def test_all_kinds_of_models_meet_the_same_candidates_whatever_else_is_drawn(path, mode):
    settings = {"eval_args": {"mode": mode}}
    hashes = [
        fingerprint(*frozen(path, "GRU4Rec", **settings)[0][1:]),
        fingerprint(*frozen(path, "GRU4Rec", MAX_ITEM_LIST_LENGTH=3, **settings)[0][1:]),
        fingerprint(*frozen(path, "BPR", disturb=True, **settings)[0][1:]),
        fingerprint(
            *frozen(
                path,
                "SDPO-LLM",
                train_neg_sample_args={"distribution": "popularity", "alpha": 0.3},
                **settings,
            )[0][1:]
        ),
    ]
    assert len(set(hashes)) == 1


@pytest.mark.parametrize("mode", ["uni5", "pop5", "full"])
@pytest.mark.parametrize("few", [(1,), (2,), (3,), (1, 2, 3, 3)])
def test_users_of_few_events_change_nothing_between_kinds_of_models(tmp_path, few, mode, caplog):
    """RecBole gives them other targets under BPR than under GRU4Rec. What is drawn for the others
    depends on who is asked, and on what users met."""
    rng, lengths = np.random.default_rng(1), [7, 4, *few, 9, 4, 12]
    sequences = [(1 + rng.permutation(30)[:length]).tolist() for length in lengths]
    path = write_dataset(tmp_path / "d", sequences, {i: f"title {i}" for i in range(1, 31)})
    settings = TINY | {"data_path": str(path), "eval_args": {"mode": mode}}
    hashes = set()
    for model in ("BPR", "GRU4Rec", "SDPO-LLM"):
        config = RunConfig(model, "toy", config_dict=settings)
        dataset = create_dataset(config)
        train, *rest = data_preparation(config, dataset)
        catalogue = Catalogue.from_dataset(dataset, ["title"])
        loaders = evaluation_loaders(config, train, rest, catalogue)[mode]
        hashes.add(fingerprint(*loaders))
        for loader, fewest in zip(loaders, (4, 3), strict=True):
            asked = loader._dataset.inter_feat["user_id"].numpy()
            assert set(loader._dataset.field2id_token["user_id"][asked]) == {
                f"u{user}" for user, length in enumerate(lengths) if length >= fewest
            }
        left_out = "1 of 6 valid targets are left out: they are of users with fewer than 4"
        assert (left_out in caplog.text) == (model == "BPR" and few == (3,))
        assert model == "BPR" or "targets are left out" not in caplog.text  # as RecBole splits
        caplog.clear()
    assert len(hashes) == 1


def test_where_all_users_have_few_events_a_sentence_says_so(tmp_path):
    path = write_dataset(tmp_path / "d", [[1, 2, 3], [2, 3, 4]], {i: f"t{i}" for i in range(1, 5)})
    config = RunConfig("BPR", "toy", config_dict=TINY | {"data_path": str(path)})
    loader = data_preparation(config, create_dataset(config))[1]
    with pytest.raises(UserError, match="'toy': all valid targets are of users with fewer than 4"):
        evaluation_loader(loader, "valid", None, 5)


def test_another_split_or_mode_has_another_fingerprint(path):
    hashes = {
        fingerprint(*frozen(path, "GRU4Rec", eval_args={"mode": mode})[0][1:])
        for mode in ("uni5", "uni6", "pop5", "full")
    }
    assert len(hashes) == 4


def test_a_full_ranking_counts_with_its_catalogue(path):
    hashes = []
    for extra in ("", "i99\ttitle 99\n"):
        file = path / "toy" / "toy.item"
        file.write_text(file.read_text() + extra)
        loaded = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
        hashes.append(
            fingerprint(
                *frozen(path, "GRU4Rec", eval_args={"mode": "full"}, load_col=loaded)[0][1:]
            )
        )
    assert hashes[0] != hashes[1]


def test_every_pass_over_a_loader_gives_the_same_candidates(path):
    loader = frozen(path, "GRU4Rec")[0][2]
    first, second = ([batch[0]["item_id"].tolist() for batch in loader] for _ in range(2))
    assert first == second
    user, item = (next(iter(loader))[0][key].tolist() for key in ("user_id", "item_id"))
    sampler = loader._sampler
    rows = {
        u: [t, *n]
        for u, t, n in zip(sampler.user, sampler.target, sampler.negatives.tolist(), strict=True)
    }
    assert all(rows[u] == [i for v, i in zip(user, item, strict=True) if v == u] for u in set(user))


def test_too_many_negatives_say_how_many_there_are(path):
    with pytest.raises(
        ValueError,
        match=r"mode='uni39' asks for 39 negatives.* for user 'u\d+' only (\d+) .* at most \1,",
    ):
        frozen(path, "GRU4Rec", eval_args={"mode": "uni39"})


def test_the_pool_is_counted_exactly(path):
    loaders, catalogue = frozen(path, "GRU4Rec")
    user, target, met = np.array([1]), np.array([4]), (np.array([1, 1]), np.array([4, 5]))
    sampler = NegativeSampler(
        PopulationSampler(np.arange(1, 41), 41, "uniform"), catalogue, met, "x", np.array(["", "u"])
    )
    left = len(
        {catalogue.titles[i] for i in range(1, 41)} - {catalogue.titles[4], catalogue.titles[5]}
    )
    with recbole_draws(0, "test"):
        assert len(set(catalogue.group[sampler.draw(user, target, left)[0]])) == left
        with pytest.raises(ValueError, match=f"at most {left}"):
            sampler.draw(user, target, left + 1)


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_draws_follow_recboles_distribution(distribution):
    catalogue = Catalogue(("", *"abcdefgh"), np.array([]))
    population = np.repeat(np.arange(1, 9), [1, 2, 3, 4, 5, 6, 7, 8])
    sampler = NegativeSampler(
        PopulationSampler(population, 9, distribution),
        catalogue,
        (np.array([0]), np.array([3])),
        "x",
        np.array(["u"]),
    )
    with recbole_draws(1, "test"):
        drawn = sampler.draw(np.zeros(20_000, int), np.full(20_000, 5), 1)[:, 0]
    seen = np.bincount(drawn, minlength=9)
    allowed = [1, 2, 4, 6, 7, 8]
    weight = np.bincount(population)[allowed] if distribution == "popularity" else np.ones(6)
    assert seen[[0, 3, 5]].sum() == 0
    assert stats.chisquare(seen[allowed], weight / weight.sum() * len(drawn)).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_training_negatives_follow_popularity_to_the_power_that_is_asked_for(path, alpha):
    args = {"distribution": "popularity", "alpha": alpha}
    (train, *_), catalogue = frozen(
        path, "SDPO-LLM", eval_args={"mode": "pop5"}, train_neg_sample_args=args
    )
    nobody = (np.array([0]), np.array([0]))
    sampler = NegativeSampler(train._sampler, catalogue, nobody, "x", np.array(["u"]))
    with recbole_draws(1, "test"):
        drawn = sampler.draw(np.zeros(20_000, int), np.zeros(20_000, int), 1)[:, 0]
    # RecBole counts the targets of a sequential model, those held out included.
    count = np.bincount(train._sampler.dataset.inter_feat["item_id"], minlength=41)
    expected = count[count > 0] ** alpha
    assert (
        stats.chisquare(
            np.bincount(drawn, minlength=41)[count > 0], expected / expected.sum() * len(drawn)
        ).pvalue
        > 1e-3
    )


def test_purposes_have_generators_of_their_own():
    assert generator(1, "a").random() == generator(1, "a").random() != generator(1, "b").random()
    np.random.seed(3)
    expected = np.random.RandomState(3).random()
    with recbole_draws(1, "a"):
        np.random.random()
    assert np.random.random() == expected


def test_frozen_candidates_know_whom_they_were_frozen_for():
    frozen = FrozenCandidates(
        "test", np.array([3, 1, 3]), np.array([7, 9, 2]), np.arange(6).reshape(3, 2)
    )
    assert frozen.sample_by_user_ids([3, 3, 1], [2, 7, 9], 2).tolist() == [4, 0, 2, 5, 1, 3]
    for user, item in ((3, 9), (2, 7), (9, 9), (1, 30)):
        with pytest.raises(KeyError, match="not frozen for"):
            frozen.sample_by_user_ids([user], [item], 2)


def evaluated(path, model, **settings):
    given = TINY | {
        "data_path": str(path),
        "run_dir": f"run-{model}-{len(settings)}",
        "epochs": 1,
        "sft_epochs": 1,
        "objective": "sft",
    }
    given["max_train_targets"] = 20
    result = quick_start.run(model, "toy", config_dict=given | settings)
    return result, pd.read_csv(f"{given['run_dir']}/ranks.csv")


@pytest.mark.parametrize("mode", ["uni5", "full"])
def test_every_model_meets_the_same_part_of_the_targets(path, mode):
    found = {
        m: evaluated(path, m, max_eval_targets=11, eval_args={"mode": mode})
        for m in ("SDPO-LLM", "GRU4Rec", "BPR", "Pop")
    }
    asked = {
        model: set(zip(ranks.user, ranks.item, strict=True)) for model, (_, ranks) in found.items()
    }
    assert len(asked["BPR"]) == 11 and len(set(map(frozenset, asked.values()))) == 1
    assert len({result["candidates_sha256"][mode] for result, _ in found.values()}) == 1
    for result, ranks in found.values():
        assert result["test_result"]["hit@1"] == pytest.approx(
            (ranks["rank"] == 1).mean(), abs=6e-5
        )
    _, other = evaluated(
        path, "Pop", max_eval_targets=11, eval_args={"mode": mode}, candidates_seed=9
    )
    assert set(zip(other.user, other.item, strict=True)) != asked["Pop"]


def test_a_user_more_moves_no_other_target_out_of_the_drawn_ones(path):
    config = RunConfig("GRU4Rec", "toy", config_dict=TINY | {"data_path": str(path)})
    loader = data_preparation(config, create_dataset(config))[2]
    rows = loader._dataset.inter_feat

    def drawn(kept):
        loader._dataset = loader._dataset.copy(rows[kept])
        some = evaluation_loader(loader, "test", 9, 5)._dataset.inter_feat
        return set(some[loader._dataset.uid_field].tolist())

    every = np.arange(len(rows))
    whole = drawn(every)
    assert len(whole) == 9
    for out in every:
        fewer = drawn(np.delete(every, out))
        assert len(fewer) == 9 and len(fewer - whole) <= 1


def test_what_users_met_counts_whole_where_a_part_of_the_targets_is_evaluated(path):
    """The negatives of a drawn target are none of the items that its user meets later, or that
    lie in rows left out."""
    config = RunConfig("GRU4Rec", "toy", config_dict=TINY | {"data_path": str(path)})
    loaders = data_preparation(config, create_dataset(config))
    parts = [loader._dataset for loader in loaders]
    small = evaluation_loader(loaders[1], "valid", 9, 5)
    freeze(small, parts[:2], Catalogue.from_dataset(create_dataset(config), ["title"]), 5)
    met = set(zip(*met_items(*parts[:2]), strict=True))
    frozen = small._sampler
    assert len(frozen.user) == 9
    assert (
        not {
            (user, item)
            for user, row in zip(frozen.user, frozen.negatives, strict=True)
            for item in row
        }
        & met
    )

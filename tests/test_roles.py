"""What a setting's roles promise, each tried on every setting, or on all that have it at once."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from recbole.data import data_preparation

from recbole_sdpo.checks import configuration
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.identity import identity
from recbole_sdpo.files import write_record
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.quick_start import run
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.settings import SETTINGS, Role, Settings, having
from recbole_sdpo.trainer.state import read_state_of, resume_identity

VALUES = [True, False, 1, 2, 3, 16, 300, 400, 0.25, 0.5, ["pop4"], ["name"], [0], "elsewhere"]
VALUES += [{"popularity": 1.0}]


def other(key, given):
    """Another value than a run has that is given these settings, and one that it may have, too."""
    setting = SETTINGS[key]
    now = given.get(key, setting.default)
    for value in [*setting.choices, *VALUES]:
        try:
            value = setting.read(value)
        except (ValueError, TypeError):
            continue
        if value != now and key != "objective":
            return value
    return {"objective": "dpo", "scratch_hidden_size": 64}[key]


def identity_of(model, given):
    config = RunConfig(model, "toy", config_dict=dict(given))
    return identity(config, Inputs.of(config), None)


def test_every_role_is_had():
    for role in Role:
        assert having(role), role
    assert not having(Role.POLICY) & having(Role.ADAPTER)
    assert having(Role.OF_THIS_RUN) & set(SETTINGS) <= having(Role.IDLE)


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_what_has_no_influence_leaves_a_runs_identity_alone_and_all_else_changes_it(
    ring, monkeypatch, key
):
    # one setting at a time, whatever else it needs
    monkeypatch.setattr(configuration, "check_backbone", lambda *_: None)
    ring |= {"scratch_hidden_size": 24, "fixed_negatives": True, "parallel": "fsdp"}
    change = ring | {key: other(key, ring)}
    same = identity_of("SDPO-LLM", ring) == identity_of("SDPO-LLM", change)
    assert same == (key in having(Role.IDLE)), change[key]
    if key != "resume":  # which is for ours alone
        for given in (ring, change):
            given.pop("train_neg_sample_args")  # its loss has no use for them
        same = identity_of("SASRec", ring) == identity_of("SASRec", change)
        assert same == (key not in having(Role.EVERY_MODEL)), change[key]


def others(role, given):
    """Another value of each setting of ours that has ``role``."""
    return {key: other(key, given) for key in having(role) & set(SETTINGS)}


def test_alignments_may_differ_in_all_that_counts_in_the_second_stage_alone(ring):
    given = ring | {"scratch_dropout": 0.1, "sft_epochs": 1}
    changed = given | others(Role.ALIGNMENT, given) | {"train_neg_sample_args": {"sample_num": 2}}
    changed.pop("sdpo_gradient_accumulation")  # goes with no sdpo_targets_per_step
    run("SDPO-LLM", "toy", config_dict=given | {"run_dir": "one"})
    run("SDPO-LLM", "toy", config_dict=changed | {"run_dir": "other"})
    weights = [Path(name, "sft", "model.safetensors").read_bytes() for name in ("one", "other")]
    steps = [
        pd.read_csv(Path(name, "steps.csv")).query("stage == 'sft'") for name in ("one", "other")
    ]
    assert weights[0] == weights[1] and steps[0].loss.tolist() == steps[1].loss.tolist()


def test_no_number_depends_on_what_is_idle_or_free(ring):
    small = {"fixed_negatives": True, "max_train_targets": 80, "sdpo_tokens_per_batch": 200}
    given = ring | small | {"eval_args": {"mode": "full"}}
    changed = given | others(Role.IDLE, given) | others(Role.FREE, given)
    changed["parallel"] = "fsdp"  # which offload asks for
    assert changed.pop("resume") and changed.pop("sft_checkpoint")  # count by what is in them
    results = [run("SDPO-LLM", "toy", config_dict=each) for each in (given, changed)]
    one, other = (pd.read_csv(Path(each["run_dir"], "steps.csv")) for each in results)
    assert one.stage.value_counts()["sdpo"] > 2  # the first knows no beta
    columns = ["loss", "gradient_norm", "margin"]
    np.testing.assert_allclose(one[columns], other[columns], rtol=1e-4, atol=1e-5)
    assert results[0]["test_result"] == pytest.approx(results[1]["test_result"])


def test_a_resumed_run_may_have_another_value_of_what_is_free_and_of_nothing_else(ring, tmp_path):
    ring |= {"scratch_hidden_size": 24}
    config = RunConfig("SDPO-LLM", "toy", config_dict=dict(ring))
    data = data_preparation(config, create_dataset(config))[0]._dataset

    def now(changed, dtype="float32"):
        settings = Settings.from_mapping(ring | changed)
        encoder = SimpleNamespace(tokens=Ragged.from_matrix(np.ones((3, 2), np.int64)))
        backbone = SimpleNamespace(dtype=dtype)  # what auto is on this machine
        model = SimpleNamespace(
            config=config, settings=settings, encoder=encoder, backbone=backbone
        )
        return resume_identity(model, data, processes=1)

    (tmp_path / "state").mkdir()
    write_record(tmp_path / "state" / "state.json", {"settings": now({})})
    refused = set()
    for key in SETTINGS:
        try:
            read_state_of(tmp_path, now({key: other(key, ring)}))
        except UserError as error:
            assert f"that run had {key}=" in str(error)
            refused.add(key)
    assert set(SETTINGS) - refused == having(Role.FREE)
    for key in having(Role.FIXED):
        config.final_config_dict[key], before = "other", config[key]
        with pytest.raises(UserError, match=f"that run had {key}=.*now 'other'"):
            read_state_of(tmp_path, now({}))
        config.final_config_dict[key] = before
    with pytest.raises(UserError, match=r"\(dtype\)='float32' \(now 'bfloat16'\)"):
        read_state_of(tmp_path, now({}, "bfloat16"))
    older = {key: value for key, value in now({}).items() if "(dtype)" not in key}
    write_record(tmp_path / "state" / "state.json", {"settings": older})
    read_state_of(tmp_path, now({}, "bfloat16"))  # of which nothing is known


def test_a_run_is_not_resumed_with_titles_or_scores_that_are_read_otherwise(ring, tmp_path):
    path = Path(ring["data_path"], "toy", "toy.item")
    path.write_text(path.read_text(encoding="utf-8").replace("red", "réd"), encoding="utf-8")

    def identity(**change):
        config = RunConfig("SDPO-LLM", "toy", config_dict=ring | change)
        data = data_preparation(config, create_dataset(config))[0]._dataset
        return resume_identity(SDPOLLM(config, data), data, processes=1)

    as_it_was, now = identity(), identity(encoding="latin-1")
    assert {key for key in now if now[key] != as_it_was[key]} == {"titles"}
    (tmp_path / "state").mkdir()
    write_record(tmp_path / "state" / "state.json", {"settings": as_it_was})
    assert read_state_of(tmp_path, identity())
    with pytest.raises(UserError, match="that run had titles="):
        read_state_of(tmp_path, now)
    with pytest.raises(UserError, match=r"that run had metric_decimal_place=4 \(now 1\)"):
        read_state_of(tmp_path, identity(metric_decimal_place=1))  # rounds what chooses the best


def test_a_state_of_before_title_prior_had_none(tmp_path):
    (tmp_path / "state").mkdir()
    identity = {"title_prior": 1.0, "beta": Settings().beta}
    write_record(tmp_path / "state" / "state.json", {"settings": {}})
    with pytest.raises(UserError, match=r"that run had title_prior=0.0 \(now 1.0\)"):
        read_state_of(tmp_path, identity)
    assert read_state_of(tmp_path, identity | {"title_prior": 0.0})

"""What only a GPU shows; without one these are skipped. python -m pytest -m gpu"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.objectives import Constants, Logps, sdpo
from recbole_sdpo.quick_start import run
from recbole_sdpo.ragged import Ragged
from tests.lm.test_architectures import build, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda")


@pytest.fixture
def exactness(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import exactness

    yield exactness
    del sys.modules["exactness"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_a_forest_is_as_near_to_the_truth_as_one_sequence_at_a_time(
    exactness, name, attention, dtype
):
    exactness.compare(name, dtype, attention, name == "Llama", GPU)


def test_auto_takes_flex_attention_for_long_rows_and_gives_the_same_numbers(exactness, monkeypatch):
    work, model = (
        exactness.Work.draw(),
        exactness.build("Llama", lora=False).to(GPU, torch.bfloat16),
    )
    expected = LanguageModel(model, None, "sdpa")(work.forest())
    monkeypatch.setattr("recbole_sdpo.lm.attention.FLEX_FROM", 128)
    lm = LanguageModel(model, None, "auto")
    torch.testing.assert_close(lm(work.forest()), expected, rtol=0, atol=0.1)
    assert lm.causal_lm.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_compiled_layers_give_the_same_numbers(exactness, lora):
    work, model = exactness.Work.draw(), exactness.build("Llama", lora).to(GPU, torch.float32)
    expected = LanguageModel(model, None, "sdpa")(work.forest())
    lm = LanguageModel(model, None, "sdpa", compiled=True)
    lm.freeze_reference()
    policy, reference = lm.policy_and_reference(work.forest())
    torch.testing.assert_close(policy, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-3)


def test_nothing_waits_for_the_device_between_forward_and_backward():
    lm = LanguageModel(build("Llama", "sdpa", True, torch.float32).to(GPU), None)
    lm.freeze_reference()
    trunks, tree, start, responses = sample(np.random.default_rng(0))
    width = 4
    forest = plant(
        Ragged.from_rows(trunks),
        tree[: 8 * width],
        start[: 8 * width],
        Ragged.from_rows(responses[: 8 * width]),
    ).to(GPU)

    def step() -> None:
        policy, reference = (part.view(-1, width) for part in lm.policy_and_reference(forest))
        logps = Logps.of(policy, reference, torch.ones_like(policy))
        sdpo(logps, Constants()).mean().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


LEARNS = {
    "objective": "sdpo",
    "sft_epochs": 12,
    "sdpo_epochs": 2,
    "sft_learning_rate": 1e-2,
    "scratch_vocab_size": 400,
}
"""Settings with which a whole run learns the rule of the ring."""


@pytest.fixture
def one_process_of_nccl(monkeypatch, tmp_path):
    """A group of this process alone, which takes it for one of several as a model is made."""
    dist.init_process_group("cuda:nccl,cpu:gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    several = iter([SimpleNamespace(num_processes=2)])
    monkeypatch.setattr(
        "recbole_sdpo.model.sdpo_llm.PartialState", lambda: next(several, None) or PartialState()
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "settings",
    [
        {"peft": "none", "dtype": "float32"},
        {"peft": "none", "dtype": "mixed"},
        {"peft": "lora", "dtype": "float32"},
        {"peft": "lora", "dtype": "bfloat16"},
        {"peft": "none", "item_tokens": "whole", "dtype": "mixed"},
        {"peft": "none", "negative_sources": {"uniform": 0.5, "self": 0.5}},
        {"peft": "none", "item_tokens": "whole", "compile": True, "dtype": "float32"},
    ],
    ids=str,
)
def test_a_whole_run_on_the_gpu_learns_the_rule(ring, settings):
    result = run("SDPO-LLM", "toy", config_dict=ring | LEARNS | settings)
    assert result["machine"]["device"].startswith("cuda")
    assert result["test_result"]["hit@1"] > 0.8
    assert result["peak_memory_gib"] > 0


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_in_parts_on_the_gpu_learns_the_rule(ring, one_process_of_nccl, offload):
    settings = {"peft": "none", "item_tokens": "whole", "parallel": "fsdp", "offload": offload}
    result = run("SDPO-LLM", "toy", config_dict=ring | LEARNS | settings)
    assert result["test_result"]["hit@1"] > 0.8

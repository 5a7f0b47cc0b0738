"""What the benchmark measures with."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.ragged import Ragged
from tests.lm.test_architectures import build, one_by_one, sample

CPU = torch.device("cpu")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import measure
    import plain
    import run

    yield measure, plain, run
    for name in ("measure", "plain", "run"):
        del sys.modules[name]


def test_the_plain_way_is_one_sequence_at_a_time(benchmarks):
    model = build("Llama", "sdpa", False, torch.float64)
    trunks, tree, start, responses = sample(np.random.default_rng(1))
    prompts = [trunks[t][:s] for t, s in zip(tree, start, strict=True)]
    found = benchmarks[1].sequence_logps(model, prompts, responses)
    torch.testing.assert_close(found.double(), one_by_one(model, trunks, tree, start, responses), rtol=0, atol=1e-4)


def test_trees_in_one_row_are_the_same_trees(benchmarks):
    lm = LanguageModel(build("Llama", "sdpa", False, torch.float64), None)
    trunks, tree, start, responses = sample(np.random.default_rng(2))
    forest = plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses))
    together = benchmarks[2].in_one_row(forest)
    assert together.tokens.shape == (1, forest.size) and forest.tokens.numel() > forest.size
    torch.testing.assert_close(lm(together), lm(forest), rtol=0, atol=1e-9)


def test_peak_memory_is_what_is_held_at_a_time(benchmarks):
    def side():
        first = torch.ones(2**20)
        del first
        second, third = torch.ones(2**20), torch.ones(2**19)
        return second, third

    assert benchmarks[0].peak_mib(side, CPU) == pytest.approx(6, abs=0.1)


def test_multiplications_alone_are_those_of_the_side(benchmarks):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    )

    def side():
        model(input_ids=torch.arange(5)[None], use_cache=False).logits.sum().backward()

    noted = benchmarks[0]._Multiplications()
    with noted:
        benchmarks[0].multiplications_alone(side)()
    # Seven linear layers to a layer and the output layer; forward, and in backward one for the weight and one for the input.
    assert len(noted.calls) == 2 * 3 * (7 * 2 + 1)
    shares = benchmarks[0].shares(side, 50)
    assert sum(shares.values()) == pytest.approx(1) and shares["vocabulary projection"] > 0 and shares["attention"] > 0

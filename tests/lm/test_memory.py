"""How many tokens at a time suit a device; the GPUs are made up."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from recbole_sdpo.lm.memory import tokens_at_once

SMOLLM2 = LlamaConfig(hidden_size=576, num_hidden_layers=30)
LLAMA2_7B = LlamaConfig(hidden_size=4096, num_hidden_layers=32)
GPT2 = GPT2Config(n_embd=768, n_layer=12)


@pytest.mark.parametrize(
    ("config", "gib", "training"),
    [
        (SMOLLM2, 80, 16384),
        (SMOLLM2, 141, 16384),
        (SMOLLM2, 16, 4096),
        (GPT2, 24, 16384),
        (LLAMA2_7B, 80, 4096),
        (LLAMA2_7B, 8, 1024),
    ],
)
def test_a_gpu_takes_what_its_memory_holds(monkeypatch, config, gib, training):
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(total_memory=gib * 2**30),
    )
    model, device = SimpleNamespace(config=config), torch.device("cuda", 0)
    assert tokens_at_once(model, device) == (training, 4 * training)


def test_a_cpu_takes_what_it_took():
    assert tokens_at_once(SimpleNamespace(config=SMOLLM2), torch.device("cpu")) == (1024, 8192)

"""The KL divergence of the policy from the reference, against all logits of whole sequences."""

import copy

import numpy as np
import pytest
import torch

from recbole_sdpo.lm import projection
from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.ragged import Ragged
from tests.lm.test_architectures import build, sample


@pytest.mark.parametrize("at_once", [1, 2**22], ids=["state by state", "all at once"])
@pytest.mark.parametrize("kind", ["full", "lora", "lora and its head"])
def test_it_is_that_of_the_token_after_each_prompt(kind, at_once, monkeypatch):
    lm = LanguageModel(build("Llama", "sdpa", kind != "full", torch.float64), None)
    if kind == "lora and its head":  # as where titles are tokens
        lm.causal_lm.get_output_embeddings().weight.requires_grad_()
    trunks, tree, start, responses = sample(np.random.default_rng(4))
    forest = plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses))
    lm.freeze_reference()
    before = copy.deepcopy(lm.causal_lm)
    with torch.no_grad():
        for weight in lm.trainable().values():
            weight.add_(0.1 * torch.randn_like(weight))
    monkeypatch.setattr(projection, "LOGITS_AT_ONCE", (at_once, at_once))
    watched = torch.tensor([31, 0, 7, 7])
    policy, reference, kl = lm.compared(forest, watched)
    assert policy.requires_grad and not kl.requires_grad
    torch.testing.assert_close((policy, reference), lm.policy_and_reference(forest))

    expected = []
    for response in watched.tolist():
        prompt = torch.from_numpy(trunks[tree[response]][: start[response]])[None]
        with torch.no_grad():
            now, then = (
                model(input_ids=prompt).logits[0, -1].log_softmax(-1).numpy()
                for model in (lm.causal_lm, before)
            )
        expected.append(sum(np.exp(p) * (p - q) for p, q in zip(now, then, strict=True)))
    assert min(expected) > 1e-4
    np.testing.assert_allclose(kl.numpy(), expected, rtol=1e-9)
    assert lm.compared(forest, watched[:0])[2].shape == (0,)

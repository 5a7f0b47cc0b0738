"""A parted model of one process: what each part is, and that passes and files are those of a whole
one. tests/trainer/test_distributed.py has two processes."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from recbole_sdpo.lm.body import decoder_layers
from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.parts import all_of, gathered, is_parted, own, part, parted_as
from recbole_sdpo.ragged import Ragged
from tests.lm.test_architectures import build as build_adapted
from tests.lm.test_body import TOKENS, build


@pytest.fixture(autouse=True)
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_a_parted_model_computes_and_gathers_what_a_whole_one_does(name):
    model = build(name)
    plain = copy.deepcopy(model)
    assert not is_parted(model)
    part(model, decoder_layers(model), [], torch.device("cpu"))
    assert is_parted(model)
    loss, expected = (
        each(input_ids=TOKENS).logits.log_softmax(-1)[0, :, 3].sum() for each in (model, plain)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    state, truth = gathered(model.state_dict().items()), plain.state_dict()
    assert state.keys() == truth.keys()
    assert all(state[name].equal(truth[name]) for name in truth)
    tied, tied_in_truth = (
        len(each) - len({weight.data_ptr() for weight in each.values()}) for each in (state, truth)
    )
    assert tied == tied_in_truth
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(all_of(mine.grad), theirs.grad)


class Both(nn.Module):
    """Policy and reference of a language model, in one pass."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, forest):
        return self.lm.compared(forest, torch.tensor([1]))


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_policy_and_reference_of_a_parted_model_are_those_of_a_whole_one(lora, offload):
    results = []
    forest = plant(
        Ragged.from_rows([[1, 2, 3]]),
        np.array([0, 0]),
        np.array([3, 2]),
        Ragged.from_rows([[4], [5]]),
    )
    for parted in (False, True):
        lm = LanguageModel(build_adapted("Llama", "sdpa", lora, torch.float32), None)
        lm.freeze_reference()
        both = Both(lm)
        if parted:
            lm.take_parts(torch.device("cpu"))
            part(both, lm.layers, [], torch.device("cpu"), offload)
        with torch.no_grad():
            for weight in lm.trainable().values():
                own(weight).mul_(1.1)
        moved = both(forest)
        (moved[0] - moved[1]).sum().backward()
        lm.freeze_reference()  # anew, in place
        same = both(forest)
        torch.testing.assert_close(same[0], same[1])
        assert moved[2] > 1e-4 > same[2]
        gradients = [all_of(p.grad) for p in lm.trainable().values()]
        results.append([*(each.detach() for each in moved), *gradients])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_who_is_not_to_keep_what_is_gathered_has_nothing():
    assert gathered(build("Llama").state_dict().items(), keep=False) == {}


def test_what_is_offloaded_is_kept_by_torch_on_the_cpu():
    for offload in (False, True):
        model = build("Llama")
        layers = decoder_layers(model)
        part(model, layers, [], torch.device("cpu"), offload)
        for each in (model, *layers):
            policy = fully_shard.state(each)._fsdp_param_group.offload_policy
            assert isinstance(policy, CPUOffloadPolicy) is offload


def test_a_weight_is_parted_as_another_and_its_own_part_is_the_same_memory():
    model = build("Llama")
    part(model, decoder_layers(model), [], torch.device("cpu"))
    weight = next(model.parameters())
    value = torch.arange(weight.numel(), dtype=torch.float32).view(weight.shape)
    with torch.no_grad():
        weight.copy_(parted_as(weight, value))
    assert all_of(weight).equal(value)
    own(weight).zero_()
    assert not all_of(weight).any()
    assert parted_as(value, value) is value and own(value).data_ptr() == value.data_ptr()

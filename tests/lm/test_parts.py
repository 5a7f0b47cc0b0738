"""A parted model of one process: what each part is, and that passes and files are those of a whole
one. tests/trainer/test_distributed.py has two processes."""

import copy

import pytest
import torch
import torch.distributed as dist

from recbole_sdpo.lm.body import decoder_layers
from recbole_sdpo.lm.parts import all_of, gathered, is_parted, own, part, parted_as
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


def test_who_is_not_to_keep_what_is_gathered_has_nothing():
    assert gathered(build("Llama").state_dict().items(), keep=False) == {}


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

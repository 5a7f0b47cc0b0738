"""torch's engines around a policy, in a launch of one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.parts import all_of, part
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.trainer.engine import adding_up, joined
from tests.lm.test_body import build, with_pictures

FOREST = plant(
    Ragged.from_rows([[1, 2, 3]]), np.array([0]), np.array([3]), Ragged.from_rows([[4, 5]])
)


class Policy(nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, forest):
        return self.lm(forest)


@pytest.fixture
def launch(monkeypatch):
    """Of one process, which the engine takes for several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    yield Accelerator(cpu=True)
    dist.destroy_process_group()


def test_what_no_title_reaches_keeps_no_process_waiting(launch):
    """torch refuses the second step of a model of which a part got no gradient in the first."""
    torch.manual_seed(0)
    policy = Policy(LanguageModel(with_pictures(), tokenizer=None))
    engine = joined(policy, launch)
    for _ in range(2):
        engine(FOREST).sum().backward()
    assert {name.split(".")[3] for name, p in policy.named_parameters() if p.grad is None} >= {
        "vision_tower"
    }


def test_no_process_has_all_gradients_or_a_copy_of_all_weights_of_a_parted_model(launch):
    """Be the step of several batches, and the arithmetic bfloat16."""
    policy = Policy(LanguageModel(build("Llama"), tokenizer=None, mixed=True))
    policy.lm.take_parts(torch.device("cpu"))
    part(policy, policy.lm.layers, [], torch.device("cpu"))
    engine = joined(policy, launch)
    with policy.lm.arithmetic():
        assert not torch.is_autocast_cache_enabled()
    gradients = []
    for last in (False, True):
        with adding_up(engine, last):
            engine(FOREST).sum().backward()
        gradients.append([all_of(p.grad).clone() for p in policy.parameters()])
        assert all(isinstance(p.grad, DTensor) for p in policy.parameters())
    for one, both in zip(*gradients):
        torch.testing.assert_close(2 * one, both, rtol=0.02, atol=1e-4)

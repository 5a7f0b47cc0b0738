"""torch's engines around a policy, in a launch of one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.trainer.engine import joined
from tests.lm.test_body import with_pictures


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
    forest = plant(
        Ragged.from_rows([[1, 2, 3]]), np.array([0]), np.array([3]), Ragged.from_rows([[4, 5]])
    )
    for _ in range(2):
        engine(forest).sum().backward()
    assert {name.split(".")[3] for name, p in policy.named_parameters() if p.grad is None} >= {
        "vision_tower"
    }

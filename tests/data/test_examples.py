"""Batches of training examples."""

import numpy as np
import pytest
from recbole.data import data_preparation

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.model import SDPOLLM


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_what_a_batch_takes_does_not_grow_with_the_training_set(ring, monkeypatch, distribution):
    """An epoch has as many batches as it is long: what each looks through must not be all."""
    ring |= {"train_neg_sample_args": {"distribution": distribution, "sample_num": 3}}
    config = RunConfig("SDPO-LLM", "toy", config_dict=ring)
    train = data_preparation(config, create_dataset(config))[0]
    model = SDPOLLM(config, train._dataset)
    examples = model.examples(train._dataset, train._sampler, 3)

    def batch() -> None:
        model.encoder.forest(*examples.batch(np.array([2]), 0, "test"))

    batch()  # what stays is made
    sizes = []

    def watched(function):
        return lambda values, *args, **kwargs: (
            sizes.append(np.size(values)) or function(values, *args, **kwargs)
        )

    for name in ("argsort", "bincount", "cumsum", "divmod", "repeat", "unique"):
        monkeypatch.setattr(np, name, watched(getattr(np, name)))
    batch()
    assert 0 < max(sizes) < len(train._dataset) / 4

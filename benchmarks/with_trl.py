"""TRL's DPOTrainer on given token sequences; needs the extra ``benchmark``."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import numpy as np
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from recbole_sdpo.model import SDPOLLM


def dpo_loss(
    recommender: SDPOLLM, prompts: list[np.ndarray], titles: list[np.ndarray]
) -> Callable[[], Tensor]:
    """The loss of one step of ``DPOTrainer`` with beta 1 on copies of policy and reference.

    Args:
        prompts: tokens of each of the T prompts.
        titles: for each prompt the tokens of the chosen title and, after it, of the rejected one; 2
            T in all.
    """
    with recommender.lm.reference() as model:
        reference = copy.deepcopy(model)
    on_cpu = recommender.lm.device.type == "cpu"
    config = DPOConfig(
        tempfile.mkdtemp(), beta=1.0, use_cpu=on_cpu, bf16=False, report_to="none", max_length=None
    )
    # it wants some; ours are tokens already
    words = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    policy = copy.deepcopy(recommender.lm.causal_lm)
    trainer = DPOTrainer(
        policy, reference, config, train_dataset=words, processing_class=recommender.lm.tokenizer
    )
    pairs = [
        {
            "prompt_ids": prompt.tolist(),
            "chosen_ids": chosen.tolist(),
            "rejected_ids": rejected.tolist(),
        }
        for prompt, chosen, rejected in zip(prompts, titles[::2], titles[1::2], strict=True)
    ]
    inputs = trainer._prepare_inputs(trainer.data_collator(pairs))
    return lambda: trainer.compute_loss(trainer.model, inputs)

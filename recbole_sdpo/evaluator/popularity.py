"""Popularity: the floor under every table."""

from __future__ import annotations

import copy

import torch
from recbole.config import Config
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.model.general_recommender.pop import Pop
from recbole.trainer import Trainer

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.sequences import popularity
from recbole_sdpo.evaluator.answers import OF_ANSWERS
from recbole_sdpo.evaluator.titles import TitleCollector


def popularity_result(
    config: Config,
    train_data: AbstractDataLoader,
    eval_data: AbstractDataLoader,
    catalogue: Catalogue,
) -> dict[str, float]:
    """Metrics on ``eval_data`` of ranking by popularity in training."""
    dataset, config = train_data._dataset, copy.copy(config)
    # It writes no answers.
    metrics = [metric for metric in config["metrics"] if metric.lower() not in OF_ANSWERS]
    # What a run logs to Weights & Biases is of its own model.
    own = {"metrics": metrics, "log_wandb": False}
    config.final_config_dict = config.final_config_dict | own
    pop = Pop(config, dataset)
    pop.item_cnt = torch.from_numpy(popularity(dataset))[:, None].to(pop.device)
    pop.max_cnt = pop.item_cnt.max(dim=0)[0]
    trainer = Trainer(config, pop.to(config["device"]))
    trainer.tensorboard.close()
    trainer.eval_collector = TitleCollector(config, catalogue)
    trainer.eval_collector.data_collect(train_data)
    return dict(trainer.evaluate(eval_data, load_best_model=False))

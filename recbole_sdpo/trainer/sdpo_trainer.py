"""``SDPOTrainer``: SFT, then alignment, inside RecBole's trainer."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from recbole.config import Config
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import calculate_valid_score, dict2str, early_stopping, get_local_time, set_color

from recbole_sdpo.data.candidates import freeze
from recbole_sdpo.lm.backbone import restore_policy, save_backbone
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.trainer.stage import Stage


@dataclass
class StageReport:
    """What a stage did.

    Attributes:
        valid: RecBole's metrics of the weights that were kept.
        wall_s: seconds, validation included.
        targets, tokens: trained on, repeats counted.
    """

    valid: dict[str, float] | None
    wall_s: float
    targets: int
    tokens: int


class SDPOTrainer(Trainer):
    """Runs the stages of ``SDPO-LLM`` on ``accelerate``, and keeps the weights with the best validation metric.

    Checkpoints are folders ``sft`` and ``sdpo`` under ``run_dir``, which ``peft`` or ``transformers`` load.
    """

    def __init__(self, config: Config, model: SDPOLLM) -> None:
        super().__init__(config, model)
        settings = model.settings
        mixed = "bf16" if model.backbone.peft == "none" and settings.dtype == "auto" and _bf16(model.lm.device) else "no"
        self.accelerator = Accelerator(cpu=model.lm.device.type == "cpu", mixed_precision=mixed)
        self.device = self.accelerator.device
        self.model.to(self.device)
        self.run_dir = run_folder(config)
        self.saved_model_file = str(self.run_dir)
        self.reports: dict[str, StageReport] = {}
        self._parts: list = []
        if not self.accelerator.is_main_process:
            self.tensorboard.close()
            self.tensorboard = None

    @property
    def stages(self) -> list[str]:
        """``sft``, and ``sdpo`` unless the objective is SFT."""
        return ["sft", "sdpo"] if self.model.settings.reaches_alignment else ["sft"]

    def fit(
        self,
        train_data: AbstractDataLoader,
        valid_data: AbstractDataLoader | None = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn=None,
    ) -> tuple[float, dict | None]:
        """Run all stages; arguments and result as in RecBole: the best validation score, and its metrics."""
        for stage in self.stages:
            self.fit_stage(stage, train_data, valid_data, verbose, saved, show_progress, callback_fn)
        return self.best_valid_score, self.best_valid_result

    def fit_stage(
        self,
        name: str,
        train_data: AbstractDataLoader,
        valid_data: AbstractDataLoader | None = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn=None,
    ) -> StageReport:
        """Run one stage and leave the model with its best weights. A checkpoint given as ``sft_checkpoint`` replaces SFT.

        The second stage is judged against its own start: if no epoch improves on it, the start is kept.
        """
        began = time.time()
        self._prepare(train_data, valid_data)
        settings = self.model.settings
        given = settings.sft_checkpoint if name == "sft" else None
        if given:
            folder = Path(given).expanduser()
            restore_policy(self.model.lm, folder / "sft" if (folder / "sft").is_dir() else folder)
        aligning = name == "sdpo"
        objective = settings.objective if aligning else "sft"
        kind = OBJECTIVES[objective]
        if kind.reference:
            self.model.lm.freeze_reference()
        examples = self.model.examples(train_data._dataset, train_data._sampler, self.model.negatives if kind.negatives else 0)
        stage = Stage(
            name,
            objective,
            getattr(settings, name),
            settings.targets_limit(name),
            self.model,
            examples,
            self.accelerator,
            self.tensorboard,
        )
        epochs = 0 if given else stage.settings.epochs
        self._log(
            f"{name}: objective {objective}, {epochs} epochs at most of {stage.targets_per_epoch:,} targets"
            + (
                f", {self.model.negatives} negatives each ({self.config['train_neg_sample_args']['distribution']})"
                if kind.negatives
                else ""
            ),
            verbose,
        )
        best = self._snapshot()
        self.best_valid_score = -float("inf") if self.valid_metric_bigger else float("inf")
        self.best_valid_result, self.cur_step = None, 0
        if aligning and self.reports.get("sft") and self.reports["sft"].valid:
            self.best_valid_result = self.reports["sft"].valid
            self.best_valid_score = calculate_valid_score(self.best_valid_result, self.valid_metric)
        elif valid_data and epochs == 0:
            self.best_valid_score, self.best_valid_result = self._valid_epoch(valid_data, show_progress)
        for epoch in range(epochs):
            epoch_began = time.time()
            loss = stage.run_epoch(epoch, show_progress and self.accelerator.is_main_process)
            self.train_loss_dict[len(self.train_loss_dict)] = loss
            self._log(self._generate_train_loss_output(epoch, epoch_began, time.time(), loss), verbose)
            if not valid_data:
                best = self._snapshot()
                self._save(name, saved)
                continue
            if (epoch + 1) % max(self.config["eval_step"], 1) and epoch + 1 < epochs:
                continue
            score, result = self._valid_epoch(valid_data, show_progress and self.accelerator.is_main_process)
            self._log(set_color(f"{name} epoch {epoch} valid", "blue") + f": {dict2str(result)}", verbose)
            self.best_valid_score, self.cur_step, stop, better = early_stopping(
                score,
                self.best_valid_score,
                self.cur_step,
                max_step=self.stopping_step,
                bigger=self.valid_metric_bigger,
            )
            if better:
                self.best_valid_result, best = result, self._snapshot()
                self._save(name, saved)
            if callback_fn:
                callback_fn(epoch, score)
            if stop:
                self._log(f"{name}: {self.stopping_step} evaluations without a better {self.valid_metric}; stopping.", verbose)
                break
        self._restore(best)
        if not (self.run_dir / name).is_dir():  # no epoch was better than the start
            self._save(name, saved)
        report = StageReport(self.best_valid_result, time.time() - began, stage.targets, stage.tokens)
        self.reports[name] = report
        return report

    def evaluate(
        self,
        eval_data: AbstractDataLoader,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> OrderedDict | None:
        """RecBole's metrics. The best weights are in the model already after :meth:`fit`; ``model_file`` loads a checkpoint folder."""
        if not eval_data:
            return None
        if model_file is not None:
            restore_policy(self.model.lm, Path(model_file))
        self._freeze(eval_data)
        with self.accelerator.autocast():
            return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)

    def _spilt_predict(self, interaction: Interaction, batch_size: int) -> torch.Tensor:
        """The model cuts its batches by tokens itself, and a user's candidates stay together."""
        return self.model.predict(interaction.to(self.device))

    def resume_checkpoint(self, resume_file: str) -> None:
        """Load a policy that a run saved; its folder ``sft`` or ``sdpo``."""
        restore_policy(self.model.lm, Path(resume_file))

    def _prepare(self, train_data: AbstractDataLoader, valid_data: AbstractDataLoader | None) -> None:
        if not self._parts:
            self.eval_collector.data_collect(train_data)
            self._parts = [train_data._dataset]
            self.model.check_negatives(train_data._dataset, train_data._sampler)
        if valid_data:
            self._freeze(valid_data)

    def _freeze(self, loader: AbstractDataLoader) -> None:
        """Freeze candidates where ``run_recbole`` of RecBole itself called us; our own command has done it."""
        if loader._dataset not in self._parts:
            self._parts.append(loader._dataset)
        settings = self.model.settings
        seed = self.config["seed"] if settings.candidates_seed is None else settings.candidates_seed
        freeze(loader, self._parts, self.model.catalogue, seed, settings.candidates_exclude_history)

    def _snapshot(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().cpu().clone() for name, weight in self.model.lm.trainable().items()}

    @torch.no_grad()
    def _restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        for name, weight in self.model.lm.trainable().items():
            weight.copy_(snapshot[name])

    def _save(self, stage: str, saved: bool) -> None:
        if saved and self.accelerator.is_main_process:
            folder = self.run_dir / stage
            save_backbone(self.model.lm, folder)
            (folder / "settings.json").write_text(json.dumps(self.model.settings.to_flat(), indent=2), encoding="utf-8")

    def _log(self, message: str, verbose: bool) -> None:
        if verbose:
            self.logger.info(message)


def run_folder(config: Config) -> Path:
    """Where a run keeps its checkpoints and its result."""
    name = f"{config['model']}-{config['dataset']}-{get_local_time()}"
    return Path(config["run_dir"] or Path(config["checkpoint_dir"]) / name)


def _bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()

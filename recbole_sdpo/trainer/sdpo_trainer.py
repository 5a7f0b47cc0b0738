"""``SDPOTrainer``: SFT, then alignment, inside RecBole's trainer."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from recbole.config import Config
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import calculate_valid_score, dict2str, set_color
from torch.utils.tensorboard import SummaryWriter

from recbole_sdpo.data.candidates import candidates_seed, freeze, samples_candidates
from recbole_sdpo.data.examples import FixedExamples
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.ranks import RankCollector
from recbole_sdpo.files import user_path
from recbole_sdpo.lm.parts import is_parted
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.model.sdpo_llm import TARGET_ROW
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.settings import kind_of_negatives
from recbole_sdpo.trainer.best_weights import restore, snapshot
from recbole_sdpo.trainer.checkpoint import load_checkpoint, load_sft, save_checkpoint
from recbole_sdpo.trainer.folder import STAGES, run_folder
from recbole_sdpo.trainer.reference import ReferenceCache, reference_folder
from recbole_sdpo.trainer.stage import Stage
from recbole_sdpo.trainer.state import (
    holds_state,
    load_state,
    read_state_of,
    resume_identity,
    save_state,
)
from recbole_sdpo.trainer.step_file import StepFile

STILL_HIGH = 0.2
"""Share of the peak learning rate at which the last and best part of a fall is still to come."""


@dataclass
class StageReport:
    """What a stage did.

    Attributes:
        valid: RecBole's metrics of the weights that were kept.
        wall_s: seconds, validation included.
        targets, tokens: trained on, repeats counted.
        train_s: seconds of its epochs, without validation.
    """

    valid: dict[str, float] | None
    wall_s: float
    targets: int
    tokens: int
    train_s: float = 0.0


@dataclass
class Course:
    """How a stage goes, over all the processes that were interrupted in it.

    Attributes:
        began: when it began, as if there had been no interruption.
        epoch_began: when the epoch that runs began, or was resumed.
        saved_at: when the state was written last.
        train_s: seconds of its whole epochs, without validation.
        best: the best weights.
        improved: are they better than the start, so that there is a checkpoint?
    """

    began: float
    epoch_began: float
    saved_at: float
    train_s: float = 0.0
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    improved: bool = False


class SDPOTrainer(Trainer):
    """Runs the stages of ``SDPO-LLM`` on ``accelerate``, and keeps the weights with the best
    validation metric.

    Checkpoints are folders ``sft`` and ``sdpo`` under ``run_dir``, which ``peft`` or
    ``transformers`` load.
    """

    model: SDPOLLM
    tensorboard: SummaryWriter | None

    def __init__(self, config: Config, model: SDPOLLM) -> None:
        super().__init__(config, model)
        self.eval_collector = RankCollector(config, model.catalogue, model)
        # The model knows its precision: that of accelerate is one for all runs of a process.
        self.accelerator = Accelerator(cpu=model.lm.device.type == "cpu", mixed_precision="no")
        self.device = self.accelerator.device
        self.model.to(self.device)
        self.run_dir = run_folder(config)
        self.saved_model_file = str(self.run_dir)
        self.reports: dict[str, StageReport] = {}
        self._parts: list[Dataset] = []
        self._frozen: list[AbstractDataLoader] = []
        self._step_file: StepFile | None = None
        if self.tensorboard and not self.accelerator.is_main_process:
            self.tensorboard.close()
            self.tensorboard = None

    @property
    def stages(self) -> list[str]:
        """``sft``, and ``sdpo`` unless the objective is SFT."""
        return list(STAGES if self.model.settings.reaches_alignment else STAGES[:1])

    def rank_for(self, stage: str) -> None:
        """Take off popularity in evaluations of the last stage alone: what suits its scores does
        not suit those before."""
        discount = self.model.settings.popularity_discount
        self.eval_collector.popularity_discount = discount if stage == self.stages[-1] else 0.0

    def fit(
        self,
        train_data: AbstractDataLoader,
        valid_data: AbstractDataLoader | None = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn=None,
    ) -> tuple[float, dict | None]:
        """Run all stages; arguments and result as in RecBole: the best validation score, and its
        metrics."""
        for stage in self.stages:
            self.fit_stage(
                stage, train_data, valid_data, verbose, saved, show_progress, callback_fn
            )
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
        """Run one stage and leave the model with its best weights. A checkpoint given as
        ``sft_checkpoint`` replaces SFT.

        The second stage is judged against its own start: if no epoch improves on it, the start is
        kept.
        """
        if self.config["eval_step"] < 1:  # as in RecBole: no validation, the last weights count
            valid_data = None
        self.prepare(train_data, valid_data)
        self.rank_for(name)
        resumed, main = self._resumed(), self.accelerator.is_main_process
        if main and resumed.get("steps") and self._step_file is None:
            self._step_file = StepFile(self.run_dir, resumed["steps"])
        if name in resumed.get("reports", {}):
            load_checkpoint(self.run_dir / name, self.model)
            self.reports[name] = StageReport(**resumed["reports"][name])
            self._log(f"{name}: already done in {self.run_dir}.", verbose)
            return self.reports[name]
        show_progress = show_progress and main
        now = time.time()  # what the reference is asked before the first step counts, too
        course = Course(began=now, epoch_began=now, saved_at=now)
        stage = self._open(name, train_data, verbose, show_progress)
        course.best = snapshot(self.model)
        if resumed.get("stage") == name:
            self._go_on(stage, course, resumed, verbose)
        else:
            self._start_score(stage, valid_data, show_progress)

        if main and stage.settings.epochs and self._step_file is None:
            self._step_file = StepFile(self.run_dir, None)
        stage.step_file = self._step_file
        if saved and not self._agreed(holds_state(self.run_dir)):
            self._save_state(stage, course)  # a folder with a checkpoint can be resumed
        while stage.epoch < stage.settings.epochs and self._is_patient(stage):
            self._train_epoch(stage, course, verbose, saved, show_progress)
            with stage.titles_near_words():
                if self._judge(stage, valid_data, verbose, show_progress, callback_fn):
                    course.best, course.improved = snapshot(self.model), True
                    self._save(name, saved)
            if saved:
                self._save_state(stage, course)
        if not self._is_patient(stage):
            self._say_stopped(stage, verbose)
        restore(self.model, course.best)
        if not course.improved:
            self._log(
                f"{name}: its start is kept, as no epoch was better.",
                verbose and stage.settings.epochs > 0,
            )
            self._save(name, saved)
        self.reports[name] = StageReport(
            self.best_valid_result,
            time.time() - course.began,
            stage.targets,
            stage.tokens,
            course.train_s,
        )
        if saved:
            self._save_state(stage, course)
        if self._step_file and name == self.stages[-1]:
            self._step_file.close()
        return self.reports[name]

    def _train_epoch(
        self, stage: Stage, course: Course, verbose: bool, saved: bool, show_progress: bool
    ) -> None:
        """Train for what is left of an epoch; keep the state meanwhile, wherever it is due."""

        def after_step(last: bool) -> None:
            due = time.time() - course.saved_at > 60 * self.model.settings.save_minutes
            if saved and (last or self._agreed(due)):
                self._save_state(stage, course)

        epoch, course.epoch_began = stage.epoch, time.time()
        loss = stage.run_epoch(show_progress, after_step)
        now = time.time()
        course.train_s += now - course.epoch_began
        self.train_loss_dict[len(self.train_loss_dict)] = loss
        output = self._generate_train_loss_output(epoch, course.epoch_began, now, loss)
        self._log(f"{stage.name} {output}", verbose)

    def _go_on(self, stage: Stage, course: Course, resumed: dict[str, Any], verbose: bool) -> None:
        """Put ``stage``, its course and the score to beat where the interrupted run left them."""
        course.began -= resumed["wall_s"]
        course.train_s = resumed.get("train_s", 0.0)  # an older state has none
        course.improved = resumed["improved"]
        if course.improved:
            load_checkpoint(self.run_dir / stage.name, self.model)
            course.best = snapshot(self.model)
        load_state(self.run_dir, stage)
        self.accelerator.wait_for_everyone()  # before the first writes another
        self.best_valid_score, self.best_valid_result, self.cur_step = resumed["best"]
        self._log(f"{stage.name}: resumed at step {stage.step}, epoch {stage.epoch}.", verbose)

    def _is_patient(self, stage: Stage) -> bool:
        """May ``stage`` go on, although its last evaluations were no better?"""
        own = stage.settings.stopping_step
        return self.cur_step <= (self.stopping_step if own is None else own)

    def _say_stopped(self, stage: Stage, verbose: bool) -> None:
        """Log that ``stage`` was stopped early, and warn where that was long before its end."""
        name, settings = stage.name, stage.settings
        self._log(
            f"{name}: no better {self.valid_metric} in {self.cur_step} evaluations; stopped.",
            verbose,
        )
        rate, peak = stage.scheduler.get_last_lr()[0], settings.learning_rate
        if settings.schedule != "constant" and rate > STILL_HIGH * peak:
            self.logger.warning(
                f"{name} ended after {stage.epoch} of {settings.epochs} epochs, at "
                f"{rate / peak:.0%} of its learning rate. The rate falls over all of them, and "
                f"the end gains most; with a larger {name}_stopping_step it may become better."
            )

    def _judge(
        self,
        stage: Stage,
        valid_data: AbstractDataLoader | None,
        verbose: bool,
        show_progress: bool,
        callback_fn,
    ) -> bool:
        """Validate after an epoch for which that is due; returns whether to keep its weights.
        Without validation the last are kept."""
        if not valid_data:
            return True
        if stage.epoch % self.config["eval_step"] and stage.epoch < stage.settings.epochs:
            return False
        score, result = self._valid_epoch(valid_data, show_progress)
        self._log(
            set_color(f"{stage.name} epoch {stage.epoch - 1} valid", "blue")
            + f": {dict2str(result)}",
            verbose,
        )
        # As RecBole's early stopping, but that an equal score is no better one.
        better = (
            score > self.best_valid_score
            if self.valid_metric_bigger
            else score < self.best_valid_score
        )
        self.cur_step = 0 if better else self.cur_step + 1
        if better:
            self.best_valid_score, self.best_valid_result = score, dict(result)
        if callback_fn:
            callback_fn(stage.epoch - 1, score)
        return better

    def _open(
        self, name: str, train_data: AbstractDataLoader, verbose: bool, show_progress: bool
    ) -> Stage:
        """The stage before its first step: policy and reference in place, examples and optimizer
        built."""
        settings, stage_settings = self.model.settings, getattr(self.model.settings, name)
        if name == "sft" and settings.sft_checkpoint:
            try:
                load_sft(user_path(settings.sft_checkpoint), self.model)
            except UserError as error:
                raise UserError(f"sft_checkpoint={settings.sft_checkpoint!r}: {error}") from error
            stage_settings = replace(stage_settings, epochs=0)
        objective = settings.objective if name == "sdpo" else "sft"
        kind = OBJECTIVES[objective]
        if kind.reference:
            self.model.lm.freeze_reference()
        drawn = self.model.negatives * self.model.draws if kind.negatives else 0
        examples = self.model.examples(train_data._dataset, train_data._sampler, drawn)
        limit = settings.targets_limit(name)
        cache = None
        if (
            kind.reference
            and settings.caches_reference
            and not is_parted(self.model)
            and isinstance(examples, FixedExamples)
        ):
            cache = ReferenceCache(
                reference_folder(settings.backbone.cache_dir),
                self.model.lm,
                examples,
                self.model.encoder.tokens,
                self.model.backbone.dtype,
            )
        stage = Stage(
            name,
            objective,
            stage_settings,
            limit,
            self.model,
            examples,
            self.accelerator,
            self.tensorboard,
            cache,
            self._workers(),
        )
        sources = kind_of_negatives(self.config["train_neg_sample_args"], self.model.sources)
        negatives = f", {self.model.negatives} negatives each ({sources})"
        self._log(
            f"{name}: objective {objective}, {stage_settings.epochs} epochs at most of "
            f"{stage.targets_per_epoch:,} targets" + (negatives if kind.negatives else ""),
            verbose,
        )
        if cache:
            known = int((~cache.missing()).sum())
            self._log(
                f"{name}: of {known:,} targets the reference's log-probabilities are in "
                f"{cache.folder} already",
                verbose,
            )
            cache.fill(stage.batches, stage_settings.epochs, self.accelerator, show_progress)
        return stage

    def _workers(self) -> int:
        """Processes that prepare batches: RecBole's ``worker``; where it is not given, one while
        a GPU computes."""
        if "worker" in self.config.external_config_dict or self.device.type != "cuda":
            return self.config["worker"]
        return 1

    def _start_score(
        self, stage: Stage, valid_data: AbstractDataLoader | None, show_progress: bool
    ) -> None:
        """The score to beat: of the SFT model for alignment, of the start for a stage that will
        not train, else the worst."""
        self.best_valid_score = -float("inf") if self.valid_metric_bigger else float("inf")
        self.best_valid_result, self.cur_step = None, 0
        sft = self.reports.get("sft")
        if (
            stage.name == "sdpo"
            and sft
            and sft.valid
            and not self.eval_collector.popularity_discount
        ):
            self.best_valid_result = sft.valid
            self.best_valid_score = calculate_valid_score(sft.valid, self.valid_metric)
        elif valid_data and (stage.name == "sdpo" or stage.settings.epochs == 0):
            self.best_valid_score, result = self._valid_epoch(valid_data, show_progress)
            self.best_valid_result = dict(result)

    def _save_state(self, stage: Stage, course: Course) -> None:
        in_epoch = time.time() - course.epoch_began if stage.epoch_steps else 0.0
        rest = {
            "improved": course.improved,
            "best": [self.best_valid_score, self.best_valid_result, self.cur_step],
            "reports": {name: asdict(report) for name, report in self.reports.items()},
            "wall_s": time.time() - course.began,
            "train_s": course.train_s + in_epoch,
            "settings": self._identity,
        }
        save_state(self.run_dir, stage, rest)
        course.saved_at = time.time()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return resume_identity(self.model, self._parts[0], self.accelerator.num_processes)

    def _resumed(self) -> dict[str, Any]:
        """The state of the run to resume, or nothing.

        Raises:
            UserError: it had other settings, or is damaged.
        """
        if not self.model.settings.resume or not holds_state(self.run_dir):
            return {}  # it died before there was one
        return read_state_of(self.run_dir, self._identity)

    def validated(self, stage: str) -> bool:
        """Had the run to resume trained in ``stage``, and validated?"""
        state = self._resumed()
        if report := state.get("reports", {}).get(stage):
            return report["valid"] is not None and report["targets"] > 0
        return (
            state.get("stage") == stage
            and state["best"][1] is not None
            and state["progress"]["targets"] > 0
        )

    def evaluate(
        self,
        eval_data: AbstractDataLoader,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> OrderedDict | None:
        """RecBole's metrics. The best weights are in the model already after :meth:`fit`;
        ``model_file`` loads a checkpoint folder."""
        if not eval_data:
            return None
        if model_file is not None:
            load_checkpoint(Path(model_file), self.model)
        self._freeze(eval_data)
        return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)

    def _neg_sample_batch_eval(self, batched_data: tuple) -> tuple:
        interaction, row, *_ = batched_data
        if row is not None:  # labelled rows are candidates for nothing
            interaction.update(Interaction({TARGET_ROW: row}))
        return super()._neg_sample_batch_eval(batched_data)

    def _spilt_predict(self, interaction: Interaction, batch_size: int) -> torch.Tensor:
        """The model cuts its batches by tokens itself, and a user's candidates stay together."""
        return self.model.predict(interaction.to(self.device))

    def resume_checkpoint(self, resume_file: str) -> None:
        """Load a policy that a run saved, from its folder ``sft`` or ``sdpo``; the setting
        ``resume`` continues a run."""
        load_checkpoint(Path(resume_file), self.model)

    def prepare(
        self, train_data: AbstractDataLoader, *eval_data: AbstractDataLoader | None
    ) -> None:
        """Check what could fail late, and freeze the candidates of the given loaders, in the order
        of the split.

        Raises:
            UserError: a user has too few negatives left, a prompt is too long for the backbone, or
                nothing can be kept in ``cache_dir``.
        """
        if not self._parts:
            self.eval_collector.data_collect(train_data)
            self._parts = [train_data._dataset]
            self.model.check_negatives(train_data._dataset, train_data._sampler)
            self.model.check_ratings(train_data._dataset)
            self.model.check_prompts(train_data._dataset, self.model.settings.prompt_candidates)
            if self.model.settings.caches_reference:
                reference_folder(self.model.settings.backbone.cache_dir)
        for loader in eval_data:
            if loader:
                self._freeze(loader)

    def _freeze(self, loader: AbstractDataLoader) -> None:
        """Candidates are frozen here where RecBole's ``run_recbole`` called us; our own command
        has done it before."""
        if any(loader is known for known in self._frozen):
            return
        if not self._parts:
            raise RuntimeError(
                "The candidates depend on what users met in training; call fit() or prepare() "
                "before evaluate()."
            )
        self._frozen.append(loader)
        self._parts.append(loader._dataset)
        seed, exclude = (
            candidates_seed(self.config),
            self.model.settings.candidates_exclude_history,
        )
        freeze(loader, self._parts, self.model.catalogue, seed, exclude)
        self.model.check_prompts(loader._dataset, loader.times if samples_candidates(loader) else 0)

    def _agreed(self, due: bool) -> bool:
        """As the first process has it: what all do together, each must know of."""
        if not is_parted(self.model):
            return due
        return bool(broadcast(torch.tensor(int(due), device=self.device)))

    def _save(self, stage: str, saved: bool) -> None:
        if saved:
            save_checkpoint(self.run_dir / stage, self.model)

    def _log(self, message: str, verbose: bool) -> None:
        if verbose:
            self.logger.info(message)

"""One stage's training loop: its batches in order, and the optimizer's steps."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from recbole.utils import set_color
from torch.nn.utils import clip_grad_norm_
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import get_scheduler

from recbole_sdpo.data.examples import Examples, HistoryExamples
from recbole_sdpo.errors import UserError
from recbole_sdpo.interrupt import Stopped, asked_to_stop, finishing_steps
from recbole_sdpo.lm.parts import all_of, own, parted_as
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import OBJECTIVES, Diagnostics, Logps, diagnostics
from recbole_sdpo.random import derive_seed
from recbole_sdpo.settings import CompleteStage
from recbole_sdpo.trainer.batches import Batch, Plan, StageBatches
from recbole_sdpo.trainer.engine import adding_up, joined
from recbole_sdpo.trainer.reference import ReferenceCache
from recbole_sdpo.trainer.step_file import KL, StepFile

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}

BETAS = (0.9, 0.98)
"""AdamW's; the second below torch's 0.999, as stages may have a few hundred steps."""

PROGRESS = (
    "targets",
    "tokens",
    "step",
    "epoch",
    "epoch_steps",
    "epoch_targets",
    "epoch_loss",
)
"""What of a stage changes as it runs, but for weights and optimizer; sums and counts."""


@dataclass
class Stage:
    """Trains the policy of ``model`` on ``examples`` with one objective.

    Args:
        name: ``sft`` or ``sdpo``.
        objective: a key of ``OBJECTIVES``.
        limit: targets to an epoch, or None for all.
        writer: a TensorBoard writer, or None.
        cache: what the reference said of the examples, filled (:meth:`ReferenceCache.fill`), or
            None to ask it at every step.
        workers: processes that prepare batches ahead; 0 for none.
    """

    name: str
    objective: str
    settings: CompleteStage
    limit: int | None
    model: SDPOLLM
    examples: Examples
    accelerator: Accelerator
    writer: SummaryWriter | None
    cache: ReferenceCache | None = None
    workers: int = 0
    step_file: StepFile | None = field(default=None, init=False)
    targets: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    step: int = field(default=0, init=False)
    epoch: int = field(default=0, init=False)
    epoch_steps: int = field(default=0, init=False)
    epoch_targets: int = field(default=0, init=False)
    epoch_loss: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.batches = StageBatches(
            stage=self.name,
            settings=self.settings,
            limit=self.limit,
            examples=self.examples,
            encoder=self.model.encoder,
            seed=self.model.seed,
            process=(self.accelerator.process_index, self.accelerator.num_processes),
            workers=self.workers,
            pinned=self.model.lm.device.type == "cuda",
        )
        self._parameters = list(self.model.lm.trainable().values())
        self._policy = joined(self.model, self.accelerator)
        # Biases and the scales of norms do not decay.
        matrices = [p for p in self._parameters if p.ndim > 1]
        others = [p for p in self._parameters if p.ndim <= 1]
        tables, shares = self.model.lm.title_tables(), self.model.title_shares
        titles = {id(table) for table in tables}
        rate = self.settings.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": [p for p in matrices if id(p) not in titles]},
            {"params": others, "weight_decay": 0.0},
            {
                "params": [p for p in matrices if id(p) in titles],
                "lr": self.settings.title_rate * rate,
            },
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=rate,
            weight_decay=self.settings.weight_decay,
            betas=BETAS,
            fused=True,
        )
        # Of which a share is kept, each as the stage begins, and its shares.
        self._leaning = [
            (own(table), own(table).clone(), own(parted_as(table, _rows(shares, table.ndim))))
            for table in tables
            if shares is not None
        ]
        # Each epoch draws its own order, and may have another number of steps.
        total = sum(len(self.batches.plan(epoch)) for epoch in range(self.settings.epochs))
        self.scheduler = get_scheduler(
            SCHEDULES[self.settings.schedule],
            self.optimizer,
            int(self.settings.warmup * total),
            total,
        )

    @property
    def targets_per_epoch(self) -> int:
        """Training targets in an epoch."""
        return self.batches.targets(self.batches.plan(0))

    def progress(self) -> dict[str, float]:
        """How far the stage is, for :meth:`continue_from`."""
        return {name: getattr(self, name) for name in PROGRESS}

    def continue_from(self, progress: dict[str, float]) -> None:
        """Go on where ``progress`` was taken."""
        for name in PROGRESS:
            setattr(self, name, progress[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it steps without the optimizer, to catch up
            for _ in range(self.step):
                self.scheduler.step()

    def run_epoch(
        self, show_progress: bool, after_step: Callable[[bool], None] = lambda last: None
    ) -> float:
        """Train for an epoch, or for what is left of it; returns the mean loss over its targets.

        Args:
            after_step: called after each optimizer step; of each, is it the last, as a signal asked
                one of the processes to end?

        Raises:
            UserError: the loss is no longer finite.
            Stopped: a signal asked one of the processes to end.
        """
        self.model.train()
        self.model.objective = self.objective
        plan = self.batches.plan(self.epoch)
        bar = tqdm(
            total=self.batches.targets(plan),
            initial=self.epoch_targets,
            ncols=110,
            unit="target",
            disable=not show_progress,
            desc=set_color(f"{self.name} epoch {self.epoch}", "pink"),
        )
        if not self.epoch_steps:  # a resumed run has those of the epoch that it goes on with
            self._renew_favourites(plan)
        began, tokens_before = time.time(), self.tokens
        todo = plan[self.epoch_steps :]
        with finishing_steps():
            coming = iter(self.batches.loader(todo, self.step))
            for step in todo:
                planned = self.batches.targets([step])
                loss, targets, last = self._step([next(coming) for _ in step], planned)
                self.epoch_steps, self.epoch_loss = self.epoch_steps + 1, self.epoch_loss + loss
                self.epoch_targets += targets
                bar.update(targets)
                rate = (self.tokens - tokens_before) / (time.time() - began)
                bar.set_postfix_str(
                    f"loss {loss / targets:.3f}, {rate:,.0f} tokens/s", refresh=False
                )
                after_step(last)
                if last:
                    self.accelerator.wait_for_everyone()  # until the state is on the disk
                    raise Stopped(asked_to_stop() or signal.SIGTERM)
        bar.close()
        mean = self.epoch_loss / max(self.epoch_targets, 1)
        self.epoch += 1
        self.epoch_steps, self.epoch_loss, self.epoch_targets = 0, 0.0, 0
        return mean

    def _renew_favourites(self, plan: Plan) -> None:
        """Ask the policy, as it now is, for its own negatives of the targets of an epoch (SPRec,
        Gao et al., WWW 2025, section 3): what it ranks highest in the whole catalogue."""
        if not isinstance(self.examples, HistoryExamples) or not self.examples.own:
            return
        self.model.eval()
        trees = np.concatenate([trees for step in plan for trees in step])
        self.examples.renew(np.sort(trees), self.model.favourites)
        self.model.train()

    @contextmanager
    @torch.no_grad()
    def titles_near_words(self) -> Iterator[None]:
        """Meanwhile each title has its share of what the stage has added to it
        (:attr:`SDPOLLM.title_shares`): so the policy is judged, kept and saved; it trains on with
        all of it."""
        trained = [table.clone() for table, _, _ in self._leaning]
        for table, begun, share in self._leaning:
            table.copy_(torch.lerp(begun, table, share))
        try:
            yield
        finally:
            for (table, _, _), weights in zip(self._leaning, trained, strict=True):
                table.copy_(weights)

    def _step(self, step: list[Batch], targets: int) -> tuple[float, int, bool]:
        """One optimizer step on this process's parts of some batches with so many ``targets``.

        Returns:
            the sum of the losses, the number of targets, over all processes, and whether one of
            them was asked to stop.
        """
        objective, model, settings = OBJECTIVES[self.objective], self.model, self.settings
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        # By the step's number, so that a resumed run drops what the uninterrupted one does.
        torch.manual_seed(derive_seed(model.seed, "dropout", self.name, self.step, process))
        self.optimizer.zero_grad()
        # Sums: losses, tokens, processes asked to stop, so that all stop at one step, divergences
        # and their number, diagnostics.
        width = 5 + len(Diagnostics._fields)
        sums = torch.zeros(width, device=model.lm.device, dtype=torch.float64)
        for number, batch in enumerate(step, 1):
            if objective.negatives and model.draws > 1:
                batch = self._hardest(batch)
            with adding_up(self._policy, last=number == len(step)):
                logps, kl = self._logps(batch, objective.reference)
                losses = objective.losses(logps, model.settings.constants) * batch.counts
                # Summed over batches, and by the engine the mean over processes, this is the mean
                # over the step's targets.
                # Not accelerate's, which divides by what its environment says of accumulation.
                (losses.sum() * (processes / targets)).backward()
            sums[0] += losses.detach().sum()
            if batch.counts:
                sums[1] += batch.forest.size
            if batch.counts and objective.negatives:
                means = diagnostics(logps.detach(), model.settings.beta)
                sums[3] += kl.sum()
                sums[4] += len(kl)
                sums[5:] += torch.stack(means).double() * len(losses)
        sums[2] = bool(asked_to_stop())
        sums = self.accelerator.reduce(sums, "sum")
        norm = all_of(clip_grad_norm_(self._parameters, settings.clip_norm or float("inf")))
        # All that the host wants to know, at once: each question waits for the GPU.
        norm, loss, tokens, stops, kl, ends, *watched = torch.cat(
            [norm.to(sums)[None], sums]
        ).tolist()
        # Before the optimizer's step: weights that it spoils would be saved for a resumed run.
        if not np.isfinite([loss, norm]).all():
            raise UserError(
                f"{self.name} step {self.step}: the loss is {loss / targets} and the gradient's "
                f"norm {norm}; lower {self.name}_learning_rate (now {settings.learning_rate}) or "
                f"{self.name}_title_rate (now {settings.title_rate})."
            )
        self.optimizer.step()
        values = {"loss": loss / targets, "gradient_norm": norm}
        if objective.negatives:
            named = zip(Diagnostics._fields, watched, strict=True)
            values |= {name: total / targets for name, total in named}
        if ends:
            values[KL] = kl / ends
        self._write(values)
        self.scheduler.step()
        self.step, self.targets = self.step + 1, self.targets + targets
        self.tokens += int(tokens)
        return loss, targets, bool(stops)

    @torch.no_grad()
    def _hardest(self, batch: Batch) -> Batch:
        """``batch`` with, of each negative's draws, the one that the policy scores highest, as
        RecBole's ``dynamic`` has it."""
        self.model.eval()
        scores = self._policy(batch.forest, batch.width, False)[0].policy_neg
        self.model.train()
        drawn = batch.items[:, 1:].reshape(len(scores), -1, self.model.draws)
        best = scores.view(drawn.shape).argmax(-1, keepdim=True).cpu().numpy()
        hardest = np.take_along_axis(drawn, best, 2).squeeze(2)
        items = np.concatenate([batch.items[:, :1], hardest], axis=1)
        forest = self.model.encoder.forest(batch.prompts, items)
        return replace(batch, forest=forest, items=items)

    def _logps(self, batch: Batch, reference: bool) -> tuple[Logps, torch.Tensor]:
        """As :meth:`SDPOLLM.forward` gives them for ``batch``, with the users' ratings."""
        known = None
        if self.cache:
            known = self.cache.read(batch.targets).to(self.model.lm.device, non_blocking=True)
        logps, kl = self._policy(batch.forest, batch.width, reference, known, batch.ends)
        if self.examples.ratings is not None:
            rating = torch.from_numpy(self.examples.ratings[batch.targets])
            logps = logps._replace(rating=rating.to(logps.policy_pos, non_blocking=True))
        return logps, kl

    def _write(self, values: dict[str, float]) -> None:
        values = values | {"learning_rate": self.scheduler.get_last_lr()[0]}
        if self.step_file is not None:
            self.step_file.write(self.name, self.step, self.targets, values)
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(f"{self.name}/{name}", value, self.step)


def _rows(values: torch.Tensor, dimensions: int) -> torch.Tensor:
    """One value for each row of what has so many dimensions."""
    return values.view(-1, *[1] * (dimensions - 1))

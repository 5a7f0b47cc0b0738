"""One stage's training loop: which batches, in which order, shared out how, and the optimizer's steps."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator
from recbole.utils import set_color
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import get_scheduler

from recbole_sdpo.data.examples import Examples
from recbole_sdpo.data.prompts import Prompts, batches
from recbole_sdpo.errors import UserError
from recbole_sdpo.interrupt import Stopped, asked_to_stop, finishing_steps
from recbole_sdpo.lm.forest import Forest
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.model.encoder import Encoder
from recbole_sdpo.objectives import OBJECTIVES, Diagnostics, Logps, diagnostics
from recbole_sdpo.ragged import exclusive_cumsum, steps
from recbole_sdpo.random import derive_seed, generator
from recbole_sdpo.settings import StageSettings
from recbole_sdpo.trainer.reference import ReferenceCache
from recbole_sdpo.trainer.steps import StepFile

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}

BETAS = (0.9, 0.98)
"""AdamW's; the second below torch's 0.999, as stages may have a few hundred steps."""

SORTED_TOGETHER = 256
"""Trees, for each 1,024 tokens of a batch, that are sorted by size together, so that it holds trees of about one size: less padding."""

KEPT_TOGETHER = 64
"""Batches after each of which what the reference said is written down."""

PROGRESS = ("targets", "tokens", "step", "epoch", "epoch_steps", "epoch_targets", "epoch_loss")
"""What of a stage changes as it runs, but for weights and optimizer; sums and counts."""


@dataclass(frozen=True)
class Batch:
    """A process's part of a batch.

    Attributes:
        forest: of its trees.
        prompts: of the forest.
        items: int64 ``[T, 1 + K]``, its responses: each target and its negatives.
        targets: int64 ``[T]``, the numbers of its targets among all of the examples'.
    """

    forest: Forest
    prompts: Prompts
    items: np.ndarray
    targets: np.ndarray

    @property
    def width(self) -> int:
        """Responses to a target, 1 + K."""
        return self.items.shape[1]

    def pin_memory(self) -> Batch:
        """The same batch, from which a GPU copies while the host goes on."""
        return replace(self, forest=self.forest.pin_memory())


@dataclass
class Batches(Dataset):
    """The batches of an epoch, drawn and planted as they are asked for, which may be in another process.

    Args:
        plan: for each batch the trees for which draws are made together, which of them are its own, the number of its optimizer step,
            and the number of the draws in that step.
        process: this process's number and how many there are; it takes every n-th tree.
    """

    plan: list[tuple[np.ndarray, np.ndarray, int, int]]
    examples: Examples
    encoder: Encoder
    name: str
    seed: int
    process: tuple[int, int]

    def __post_init__(self) -> None:
        self.first_target = exclusive_cumsum(self.examples.targets)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Batch | None:
        """The batch, or None where it has fewer trees than there are processes and none is left for this one."""
        trees, own, step, part = self.plan[number]
        prompts, items = self.examples.batch(trees, self.seed, self.name, step, part)
        mine = own[self.process[0] :: self.process[1]]
        if not len(mine):
            return None
        prompts, items = prompts.select(mine), items[prompts.target_index(mine)]
        each = self.examples.targets[trees[mine]]
        targets = np.repeat(self.first_target[trees[mine]], each) + steps(each)
        return Batch(self.encoder.forest(prompts, items), prompts, items, targets)


@dataclass
class Stage:
    """Trains the policy of ``model`` on ``examples`` with one objective.

    Args:
        name: ``sft`` or ``sdpo``.
        objective: a key of ``OBJECTIVES``.
        limit: targets to an epoch, or None for all.
        writer: a TensorBoard writer, or None.
        cache: what the reference said of the examples (see :meth:`fill_cache`), or None to ask it at every step.
        workers: processes that prepare batches ahead; 0 for none.
    """

    name: str
    objective: str
    settings: StageSettings
    limit: int | None
    model: SDPOLLM
    examples: Examples
    accelerator: Accelerator
    writer: object | None
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
        self._sizes = self.examples.sizes(self.model.encoder.tokens.lengths)
        self._parameters = list(self.model.lm.trainable().values())
        decayed = [p for p in self._parameters if p.ndim > 1]
        other = [p for p in self._parameters if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": other, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, betas=BETAS, fused=True
        )
        steps = sum(len(self.plan(epoch)) for epoch in range(self.settings.epochs))
        self.scheduler = get_scheduler(SCHEDULES[self.settings.schedule], self.optimizer, int(self.settings.warmup * steps), steps)

    @property
    def targets_per_epoch(self) -> int:
        """Training targets in an epoch."""
        return self._targets(self.plan(0))

    def _targets(self, plan: list[list[np.ndarray]]) -> int:
        return sum(int(self.examples.targets[trees].sum()) for step in plan for trees in step)

    def plan(self, epoch: int) -> list[list[np.ndarray]]:
        """The trees of each batch of each optimizer step, the same on every process."""
        rng = generator(self.model.seed, "batches", self.name, epoch)
        order = rng.permutation(len(self.examples.targets))
        if self.limit is not None:
            order = order[: 1 + int(np.searchsorted(np.cumsum(self.examples.targets[order]), self.limit))]
        if size := self.settings.targets_per_step:
            before = np.cumsum(self.examples.targets[order]) - self.examples.targets[order]
            groups = np.split(order, np.flatnonzero(np.diff(before // size)) + 1)
            return [[own[rows] for rows in batches(self._sizes[own], self.settings.tokens_per_batch)] for own in groups]
        together = SORTED_TOGETHER * max(1, self.settings.tokens_per_batch // 1024)
        pools = np.array_split(order, max(1, round(len(order) / together)))
        order = np.concatenate([pool[np.argsort(self._sizes[pool], kind="stable")] for pool in pools])
        cut = batches(self._sizes, self.settings.tokens_per_batch, order)
        cut = [cut[i] for i in rng.permutation(len(cut))]
        each = self.settings.gradient_accumulation
        return [cut[i : i + each] for i in range(0, len(cut), each)]

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

    def run_epoch(self, show_progress: bool, after_step: Callable[[bool], None] = lambda last: None) -> float:
        """Train for an epoch, or for what is left of it; returns the mean loss over its targets.

        Args:
            after_step: called after each optimizer step; of each, is it the last, as a signal asked one of the processes to end?

        Raises:
            UserError: the loss is no longer finite.
            Stopped: a signal asked one of the processes to end.
        """
        self.model.train()
        self.model.objective = self.objective
        plan = self.plan(self.epoch)
        bar = tqdm(
            total=self._targets(plan),
            initial=self.epoch_targets,
            ncols=110,
            unit="target",
            disable=not show_progress,
            desc=set_color(f"{self.name} epoch {self.epoch}", "pink"),
        )
        began, tokens_before = time.time(), self.tokens
        todo = plan[self.epoch_steps :]
        with finishing_steps():
            coming = iter(self._loader(todo))
            for step in todo:
                loss, targets, last = self._step([next(coming) for _ in step], self._targets([step]))
                self.epoch_steps, self.epoch_loss = self.epoch_steps + 1, self.epoch_loss + loss
                self.epoch_targets += targets
                bar.update(targets)
                rate = (self.tokens - tokens_before) / (time.time() - began)
                bar.set_postfix_str(f"loss {loss / targets:.3f}, {rate:,.0f} tokens/s", refresh=False)
                after_step(last)
                if last:
                    self.accelerator.wait_for_everyone()  # until the state is on the disk
                    raise Stopped(asked_to_stop() or signal.SIGTERM)
        bar.close()
        mean = self.epoch_loss / max(self.epoch_targets, 1)
        self.epoch, self.epoch_steps, self.epoch_loss, self.epoch_targets = self.epoch + 1, 0, 0.0, 0
        return mean

    def _loader(self, plan: list[list[np.ndarray]]) -> DataLoader:
        state = self.accelerator
        flat = []
        for number, step in enumerate(plan, self.step):
            together, end = np.concatenate(step), 0
            for part, trees in enumerate(step):
                if self.settings.targets_per_step:  # however it is cut
                    flat.append((together, np.arange(end, end + len(trees)), number, 0))
                else:
                    flat.append((trees, np.arange(len(trees)), number, part))
                end += len(trees)
        data = Batches(flat, self.examples, self.model.encoder, self.name, self.model.seed, (state.process_index, state.num_processes))
        # Its own generator: torch's loaders draw from the global one else.
        return DataLoader(
            data,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            generator=torch.Generator(),
            pin_memory=self.model.lm.device.type == "cuda",
        )

    def _step(self, step: list[Batch | None], targets: int) -> tuple[float, int, bool]:
        """One optimizer step; returns the sum of the losses and the number of targets, over all processes, and whether one of them was
        asked to stop."""
        objective, model, settings = OBJECTIVES[self.objective], self.model, self.settings
        torch.manual_seed(derive_seed(model.seed, "dropout", self.name, self.step, self.accelerator.process_index))
        self.optimizer.zero_grad()
        # Sums: loss, tokens, how many processes were asked to stop, so that all stop at one step, and diagnostics.
        sums = torch.zeros(3 + len(Diagnostics._fields), device=model.lm.device, dtype=torch.float64)
        for batch in filter(None, step):
            if objective.negatives and model.draws > 1:
                batch = self._hardest(batch)
            logps = self._logps(batch, objective.reference)
            losses = objective.loss(logps, model.settings.beta)
            # Summed over batches and processes, this is the mean over the step's targets.
            self.accelerator.backward(losses.sum() / targets)
            sums[0] += losses.detach().sum()
            sums[1] += batch.forest.size
            if objective.negatives:
                means = diagnostics(logps.detach(), model.settings.beta)
                sums[3:] += torch.stack(means).double() * len(losses)
        sums[2] = bool(asked_to_stop())
        if self.accelerator.num_processes > 1:
            for parameter in self._parameters:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(grad, "sum")
            sums = self.accelerator.reduce(sums, "sum")
        norm = clip_grad_norm_(self._parameters, settings.clip_norm or float("inf"))
        # All that the host wants to know, at once: each question waits for the GPU.
        norm, loss, tokens, stops, *watched = torch.cat([norm.double()[None], sums]).tolist()
        if not np.isfinite([loss, norm]).all():
            raise UserError(
                f"{self.name} step {self.step}: the loss is {loss / targets} and the gradient's norm {norm}; lower "
                f"{self.name}_learning_rate (now {settings.learning_rate})."
            )
        self.optimizer.step()
        means = Diagnostics(*(value / targets for value in watched)) if objective.negatives else None
        self._write(loss / targets, means, norm)
        self.scheduler.step()
        self.step, self.targets, self.tokens = self.step + 1, self.targets + targets, self.tokens + int(tokens)
        return loss, targets, bool(stops)

    def fill_cache(self, show_progress: bool) -> None:
        """Ask the reference once for all that the stage will train on and that is not known yet."""
        state, each = self.accelerator, self.examples.targets
        of_tree = np.repeat(np.arange(len(each)), each)
        missing = self.cache.missing()
        if state.num_processes > 1:  # each process reads the files at a moment of its own
            missing = state.reduce(torch.from_numpy(missing).int().to(state.device), "sum").bool().cpu().numpy()
        planned = [trees for epoch in range(self.settings.epochs) for step in self.plan(epoch) for trees in step]
        planned = np.intersect1d(np.concatenate(planned), of_tree[missing]) if planned else np.empty(0, np.int64)
        cut = [planned[rows] for rows in batches(self._sizes[planned], self.settings.tokens_per_batch)]
        coming = iter(self._loader([[trees] for trees in cut]))
        bar = tqdm(total=len(planned), ncols=110, unit="tree", disable=not show_progress or not cut, desc="asking the reference")
        for first in range(0, len(cut), KEPT_TOGETHER):
            part = cut[first : first + KEPT_TOGETHER]
            targets = np.flatnonzero(np.isin(of_tree, np.concatenate(part)))
            found = torch.zeros(len(targets), self.model.negatives + 1, device=self.model.lm.device)
            for batch in filter(None, (next(coming) for _ in part)):
                logps = self.model.lm.reference_logps(batch.forest).view(-1, batch.width)
                found[torch.from_numpy(np.searchsorted(targets, batch.targets)).to(found.device)] = logps.to(found.dtype)
            found = state.reduce(found, "sum") if state.num_processes > 1 else found
            self.cache.add(targets, found, state.is_local_main_process)
            bar.update(sum(map(len, part)))
        bar.close()
        state.wait_for_everyone()

    @torch.no_grad()
    def _hardest(self, batch: Batch) -> Batch:
        """``batch`` with, of each negative's draws, the one that the policy scores highest, as RecBole's ``dynamic`` has it."""
        self.model.eval()
        scores = self.model.lm(batch.forest).view(-1, batch.width)[:, 1:]
        self.model.train()
        drawn = batch.items[:, 1:].reshape(len(scores), -1, self.model.draws)
        best = scores.view(drawn.shape).argmax(-1, keepdim=True).cpu().numpy()
        items = np.concatenate([batch.items[:, :1], np.take_along_axis(drawn, best, 2).squeeze(2)], axis=1)
        return Batch(self.model.encoder.forest(batch.prompts, items), batch.prompts, items, batch.targets)

    def _logps(self, batch: Batch, reference: bool) -> Logps:
        known = self.cache.read(batch.targets).to(self.model.lm.device) if self.cache else None
        return self.model.logps(batch.forest, batch.width, reference, known)

    def _write(self, loss: float, watched: Diagnostics | None, norm: float) -> None:
        rate = self.scheduler.get_last_lr()[0]
        values = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        values |= watched._asdict() if watched else {}
        if self.step_file is not None:
            self.step_file.write(self.name, self.step, self.targets, values)
        for name, value in values.items() if self.writer is not None else ():
            self.writer.add_scalar(f"{self.name}/{name}", value, self.step)


def _unchanged(batch: Batch | None) -> Batch | None:
    return batch

"""What the reference said of fixed examples, kept on disk across epochs and runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.numpy import load, save
from torch import Tensor
from tqdm import tqdm

from recbole_sdpo.data.examples import FixedExamples
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import user_path, whole_file
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.trainer.batches import Batch, StageBatches

WRITTEN_TOGETHER = 64
"""Batches after each of which what the reference said is written down."""

FORMAT = 2
"""To be raised when scores change, so that files of before are not read."""


def reference_folder(cache_dir: str) -> Path:
    """Where ``cache_dir`` has what references said.

    Raises:
        UserError: nothing can be kept there.
    """
    folder = user_path(cache_dir) / "reference"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache_dir={cache_dir!r} cannot hold files ({error}); give another folder."
        ) from error
    return folder


class ReferenceCache:
    """Log-probabilities of the reference, float32 ``[targets, 1 + K]``, as far as they are known.

    They are kept in a folder that is named by a digest of all that they depend on, so that a run
    with another beta or learning rate finds what an earlier one computed, and a run with another
    reference, title or negative does not. Each of its files holds some targets and what was said of
    them, and is named by the digest of its bytes: files are whole and never change, several runs
    may add theirs at once, and of a file that does not fit its name nothing is believed.

    Args:
        folder: where such folders are (:func:`reference_folder`).
        lm: its policy is the reference, as it is just after ``freeze_reference``.
        examples: with their negatives.
        tokens: the tokens of every unit.
        precision: of weights and arithmetic, as the setting ``dtype`` names it.
    """

    def __init__(
        self,
        folder: Path,
        lm: LanguageModel,
        examples: FixedExamples,
        tokens: Ragged,
        precision: str,
    ) -> None:
        self._lm, self._trees = lm, np.repeat(np.arange(len(examples.targets)), examples.targets)
        self.folder = folder / _digest(lm, examples, tokens, precision)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._values = np.full(examples.items.shape, np.nan, np.float32)
        for file in sorted(self.folder.glob("*.safetensors")):
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != file.stem:
                getLogger().warning(
                    f"{file} is damaged; the reference is asked again for what it held."
                )
                continue
            held = load(content)
            # A log-probability is below 0; an exact 0 is rather a value that was never written.
            sound = (np.isfinite(held["logps"]) & (held["logps"] < 0)).all(1)
            self._values[held["targets"][sound]] = held["logps"][sound]

    def missing(self) -> np.ndarray:
        """Of which targets something is not known, bool ``[targets]``."""
        return np.isnan(self._values).any(1)

    def read(self, targets: np.ndarray) -> Tensor:
        """What was said of the given targets, float32 ``[len(targets), 1 + K]``; all are known."""
        return torch.from_numpy(self._values[targets])

    def add(self, targets: np.ndarray, logps: Tensor, to_disk: bool) -> None:
        """Keep the log-probabilities of the given targets, in place of any that are there; in a
        file, too, if ``to_disk``."""
        self._values[targets] = logps.float().cpu().numpy()
        if to_disk:
            content = save({"targets": targets, "logps": self._values[targets]})
            with whole_file(
                self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
            ) as part:
                part.write_bytes(content)

    def fill(
        self, batches: StageBatches, epochs: int, accelerator: Accelerator, show_progress: bool
    ) -> None:
        """Ask the reference once for all that so many epochs will train on and that is not known.

        Args:
            batches: of the same examples.
        """
        cut = batches.cut(self._unknown_trees(batches, epochs, accelerator))
        coming = iter(batches.loader([[trees] for trees in cut], first_step=0))
        bar = tqdm(
            total=sum(map(len, cut)),
            ncols=110,
            unit="tree",
            disable=not show_progress or not cut,
            desc="asking the reference",
        )
        for first in range(0, len(cut), WRITTEN_TOGETHER):
            part = cut[first : first + WRITTEN_TOGETHER]
            targets = np.flatnonzero(np.isin(self._trees, np.concatenate(part)))
            logps = self._ask(targets, (next(coming) for _ in part))
            logps = accelerator.reduce(logps, "sum")
            self.add(targets, logps, accelerator.is_local_main_process)
            bar.update(sum(map(len, part)))
        bar.close()
        accelerator.wait_for_everyone()

    def _unknown_trees(
        self, batches: StageBatches, epochs: int, accelerator: Accelerator
    ) -> np.ndarray:
        """Trees of the epochs' plans of which something is not known, int64, sorted."""
        # Each process reads the files at a moment of its own.
        here = torch.from_numpy(self.missing()).int().to(accelerator.device)
        missing = accelerator.reduce(here, "sum").bool().cpu().numpy()
        plans = (batches.plan(epoch) for epoch in range(epochs))
        planned = [trees for plan in plans for step in plan for trees in step]
        none = np.empty(0, np.int64)
        return np.intersect1d(np.concatenate([none, *planned]), self._trees[missing])

    def _ask(self, targets: np.ndarray, batches: Iterable[Batch]) -> Tensor:
        """What the reference says of ``targets``, as far as they are in ``batches``, else 0."""
        width = self._values.shape[1]
        logps = torch.zeros(len(targets), width, device=self._lm.device)
        for batch in batches:
            if not batch.counts:
                continue
            said = self._lm.reference_logps(batch.forest).view(-1, width)
            place = torch.from_numpy(np.searchsorted(targets, batch.targets))
            logps[place.to(logps.device)] = said.to(logps.dtype)
        return logps


def _digest(lm: LanguageModel, examples: FixedExamples, tokens: Ragged, precision: str) -> str:
    adapter = lm.model.peft_config["default"].to_dict() if isinstance(lm.model, PeftModel) else {}
    for key in ("base_model_name_or_path", "inference_mode"):
        adapter.pop(key, None)
    of_adapter = json.dumps(adapter, sort_keys=True, default=_plain)
    facts = [FORMAT, precision, lm.causal_lm.config.to_json_string(), of_adapter]
    digest = hashlib.sha256(json.dumps(facts).encode())
    prompts = examples.prompts
    for array in (
        tokens.values,
        tokens.lengths,
        prompts.trunks.values,
        prompts.trunks.lengths,
        prompts.tree,
        prompts.before,
        examples.items,
    ):
        digest.update(np.ascontiguousarray(array).data)
    lm.add_to(digest)
    return digest.hexdigest()[:32]


def _plain(value: object) -> object:
    """Sets in one order, and what JSON does not know as text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)

"""What the reference said of fixed examples, kept on disk across epochs and runs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor

from recbole_sdpo.data.examples import FixedExamples
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.ragged import Ragged

FORMAT = 1
"""To be raised when scores change, so that files of before are not read."""


class ReferenceCache:
    """Log-probabilities of the reference, float32 ``[targets, 1 + K]`` in a memory-mapped ``.npy`` file, NaN where not known.

    The file is named by a digest of all that the values depend on, so that a run with another beta or learning rate finds
    what an earlier one computed, and a run with another reference, title or negative does not.

    Args:
        folder: where such files are kept.
        lm: its policy is the reference, as it is just after ``freeze_reference``.
        examples: with their negatives.
        tokens: the tokens of every unit.
        precision: of mixed precision, as ``accelerate`` names it.

    Raises:
        UserError: the file is there but not whole.
    """

    def __init__(self, folder: Path, lm: LanguageModel, examples: FixedExamples, tokens: Ragged, precision: str) -> None:
        self.file = folder / f"{_digest(lm, examples, tokens, precision)}.npy"
        with PartialState().local_main_process_first():
            if not self.file.is_file():
                part = self.file.with_suffix(f".{os.getpid()}.part")
                with part.open("wb") as stream:
                    np.save(stream, np.full(examples.items.shape, np.nan, np.float32))
                os.replace(part, self.file)  # whole or not at all
        # Mapping a file that was cut short would lengthen it with zeros, which are log-probabilities.
        try:
            whole = np.load(self.file, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{self.file} in cache_dir cannot be read ({error}); delete it, and the run makes it anew.") from error
        if whole.shape != examples.items.shape or whole.dtype != np.float32:
            raise UserError(f"{self.file} in cache_dir is not what this run wrote there; delete it, and the run makes it anew.")
        self._values = np.load(self.file, mmap_mode="r+")

    def missing(self) -> np.ndarray:
        """Of which targets something is not known, bool ``[targets]``."""
        return np.isnan(self._values).any(1)

    def read(self, targets: np.ndarray) -> Tensor:
        """What was said of the given targets, float32 ``[len(targets), 1 + K]``.

        Raises:
            KeyError: of one of them nothing is known.
        """
        values = torch.from_numpy(self._values[targets])
        if values.isnan().any():
            raise KeyError(f"{self.file} does not have all that this run asks of it; delete it, and the run makes it anew.")
        return values

    def write(self, targets: np.ndarray, logps: Tensor) -> None:
        """Keep the log-probabilities of the given targets, in place of any that are there."""
        self._values[targets] = logps.float().cpu().numpy()
        self._values.flush()


def _digest(lm: LanguageModel, examples: FixedExamples, tokens: Ragged, precision: str) -> str:
    adapter = lm.model.peft_config["default"].to_dict() if isinstance(lm.model, PeftModel) else {}
    adapter = {key: value for key, value in adapter.items() if key not in ("base_model_name_or_path", "inference_mode")}
    facts = [FORMAT, precision, lm.causal_lm.config.to_json_string(), json.dumps(adapter, sort_keys=True, default=_plain)]
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
    for name, weight in lm.policy_weights():
        digest.update(f"{name} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _plain(value: object) -> object:
    """Sets in one order, and what JSON does not know as text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)

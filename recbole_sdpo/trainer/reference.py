"""What the reference said of fixed examples, kept on disk across epochs and runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from recbole_sdpo.data.examples import FixedExamples
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.ragged import Ragged


class ReferenceCache:
    """Log-probabilities of the reference, float32 ``[targets, 1 + K]`` in a memory-mapped ``.npy`` file, NaN where not known.

    The file is named by a digest of all that the values depend on, so that a run with another beta or learning rate finds
    what an earlier one computed, and a run with another reference, title or negative does not.

    Args:
        folder: where such files are kept.
        lm: its policy is the reference, as it is just after ``freeze_reference``.
        examples: with their negatives.
        tokens: the tokens of every unit.
    """

    def __init__(self, folder: Path, lm: LanguageModel, examples: FixedExamples, tokens: Ragged) -> None:
        self.file = folder / f"{_digest(lm, examples, tokens)}.npy"
        with PartialState().local_main_process_first():
            if not self.file.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as stream:
                    np.save(stream, np.full(examples.items.shape, np.nan, np.float32))
                os.replace(stream.name, self.file)  # whole or not at all
        self._known = np.load(self.file, mmap_mode="r+")

    def read(self, targets: np.ndarray) -> Tensor | None:
        """What is known of the given targets, float32 ``[len(targets), 1 + K]``; None unless all of it is."""
        known = torch.from_numpy(self._known[targets])
        return None if known.isnan().any() else known

    def write(self, targets: np.ndarray, logps: Tensor) -> None:
        """Keep the log-probabilities of the given targets."""
        self._known[targets] = logps.float().cpu().numpy()


def _digest(lm: LanguageModel, examples: FixedExamples, tokens: Ragged) -> str:
    prompts = examples.prompts
    arrays = [tokens.values, tokens.lengths, prompts.trunks.values, prompts.trunks.lengths, prompts.tree, prompts.before, examples.items]
    digest = hashlib.sha256(lm.causal_lm.config.to_json_string().encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    for name, weight in lm.policy_weights():
        digest.update(f"{name} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]

"""A policy as a folder: writing it, and loading it into a backbone again."""

from __future__ import annotations

import copy
from logging import INFO, WARNING, getLogger
from pathlib import Path

import torch
from peft import (
    PeftModel,
    get_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import read_json
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.parts import all_of, parted_as
from recbole_sdpo.lm.reading import WEIGHTS_ALONE, check_finite, reading
from recbole_sdpo.lm.text import shorten
from recbole_sdpo.lm.whole import (
    is_whole,
    matched,
    table_names,
)

ADAPTER_FILE = "adapter_config.json"


def save_backbone(
    lm: LanguageModel, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write the policy (its adapter, or all weights) and the tokenizer, as ``peft`` and
    ``transformers`` write them.

    Args:
        weights: the model's, where they are not in it.
    """
    # Left to itself, peft would ask the hub whether the embeddings were changed, too.
    adapter = {"selected_adapters": ["default"], "save_embedding_layers": is_whole(lm.tokenizer)}
    lm.model.save_pretrained(
        folder, state_dict=weights, **(adapter if isinstance(lm.model, PeftModel) else {})
    )
    lm.tokenizer.save_pretrained(folder)


def restore_policy(lm: LanguageModel, folder: Path, new_titles: bool = False) -> None:
    """Load the policy's weights from a folder that :func:`save_backbone` wrote.

    Nothing but weights is taken from it: which classes read them, and how they are used, this run's
    backbone says. Where titles are tokens, each takes the weights that its text has there.

    Args:
        new_titles: titles that have no token there keep what they began with, the mean of their
            pieces.

    Raises:
        UserError: the folder holds no such checkpoint, one of another shape or tokenizer, or a
            damaged one.
    """
    adapted = isinstance(lm.model, PeftModel)
    wanted = ADAPTER_FILE if adapted else "config.json"
    if not (folder / wanted).is_file() or (not adapted and (folder / ADAPTER_FILE).is_file()):
        raise UserError(
            f"checkpoint {str(folder)!r} has no {wanted}; it must be a folder 'sft' or 'sdpo' "
            f"of a run with peft={'lora' if adapted else 'none'}."
        )
    what = f"checkpoint {str(folder)!r}"
    with reading(what, "it must be a folder that a run wrote"):
        tokenizer = type(lm.tokenizer).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        written = read_json(folder / wanted)
    whole, saved = is_whole(lm.tokenizer), tokenizer.get_vocab()
    _check_titles(lm, tokenizer, what, new_titles)
    if not adapted and written.get("model_type") != lm.model.config.model_type:
        raise UserError(
            f"{what} holds a model of type {written.get('model_type')!r} and this run's backbone "
            f"is {lm.model.config.model_type!r}; use the settings it was made with."
        )
    with reading(what, "it must be a folder that a run wrote"):
        if adapted:
            weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
            mine = get_peft_model_state_dict(lm.model, save_embedding_layers=whole)
        else:
            weights = _full_weights(lm.model, folder, len(saved) - 1 if whole else None)
            mine = lm.model.state_dict()
    for name in table_names(lm.causal_lm, mine) if whole else ():
        if name in weights and weights[name].shape == (len(saved) - 1, *mine[name].shape[1:]):
            weights[name] = matched(weights[name], all_of(mine[name]), tokenizer, lm.tokenizer)
    for name in sorted(mine.keys() | weights.keys()):
        if name not in mine or name not in weights or weights[name].shape != mine[name].shape:
            raise UserError(
                f"{what} does not fit this backbone at {name!r}; use the settings it was made with."
            )
    check_finite(weights.items(), what)
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(parted_as(weight, weights[name]))


def _check_titles(
    lm: LanguageModel, tokenizer: PreTrainedTokenizerBase, what: str, new_titles: bool
) -> None:
    """Can the policy that ``tokenizer`` came with take the place of ``lm``'s? Where titles are
    tokens, some may be new if that is allowed, which is logged then.

    Raises:
        UserError: it cannot.
    """
    saved, here = tokenizer.get_vocab(), lm.tokenizer.get_vocab()
    if saved != here and not (is_whole(lm.tokenizer) and is_whole(tokenizer)):
        raise UserError(
            f"{what} has another tokenizer than this run; use the data, backbone, settings and "
            "version of this package that it was made with."
        )
    unmet = here.keys() - saved
    if unmet and not new_titles:
        raise UserError(
            f"{what} has no token for {shorten(min(unmet))} ({len(unmet)} such titles), and this "
            "backbone makes none of a title's words; train on the data as they are now."
        )
    if isinstance(lm.model, PeftModel) and not new_titles and len(saved) != len(here):
        raise UserError(
            f"{what} is an adapter on random weights, which were drawn for {len(saved)} titles and "
            f"texts, and there are {len(here)}; use the data it was made with."
        )
    if unmet:
        getLogger().log(
            WARNING if 2 * len(unmet) > len(here) else INFO,
            f"{what} has no token for {len(unmet)} of {len(here)} titles and texts, such as "
            f"{shorten(min(unmet))}; each begins as the mean of its pieces.",
        )


def _full_weights(
    model: PreTrainedModel, folder: Path, tokens: int | None = None
) -> dict[str, Tensor]:
    """The weights in ``folder``, read as those of ``model``, or of one with so many ``tokens``;
    what is not there, or of another shape, is not in them."""
    config = copy.deepcopy(model.config)
    if tokens is not None:
        config.get_text_config().vocab_size = tokens
    read, report = type(model).from_pretrained(
        folder,
        config=config,
        generation_config=GenerationConfig(),
        dtype=model.dtype,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        **WEIGHTS_ALONE,
    )
    absent = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    weights = {name: weight for name, weight in read.state_dict().items() if name not in absent}
    return weights | dict.fromkeys(report["unexpected_keys"], torch.empty(0))

"""Which settings go with a backbone whose ``auto`` are resolved, and which do nothing with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import PartialState

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.attention import FLEX
from recbole_sdpo.settings import BackboneSettings, Settings


def check_parts(settings: Settings, backbone: BackboneSettings) -> None:
    """Refuse what does not go with ``parallel=fsdp``.

    Raises:
        UserError: naming it.
    """
    beside = backbone.peft == "lora" and backbone.item_tokens == "whole"
    refused = {
        "quantization": (backbone.quantization, backbone.quantization != "none", "'none'"),
        "compile": (backbone.compile, backbone.compile, "False"),
        "attention": (backbone.attention, backbone.attention == FLEX, "auto, sdpa or eager"),
        "full_sort": (settings.full_sort, settings.full_sort == "topk", "'exact'"),
        "item_tokens": (backbone.item_tokens, beside, "'pieces' with peft=lora"),
    }
    for key, (value, wrong, right) in refused.items():
        if wrong:
            raise UserError(
                f"{key}={value!r} does not go with parallel='fsdp'; it must be {right}, or set "
                "parallel=ddp."
            )


def without_effect(chosen: Mapping[str, Any], backbone: BackboneSettings) -> Iterator[str]:
    """A sentence for each kind of settings that do nothing with ``backbone``, whose ``auto`` are
    resolved; what is ``chosen`` as it is anyway does no harm."""
    defaults = Settings().to_flat()
    does_nothing = {
        "parallel": (
            PartialState().num_processes == 1,
            "one process; start several, as in torchrun --nproc_per_node=2",
        ),
        "offload": (
            PartialState().num_processes == 1,
            "one process, whose model is in no parts; start several",
        ),
        "lora_": (
            backbone.peft != "lora",
            "peft='none', which trains all weights; set peft=lora",
        ),
        "backbone_": (
            backbone.name == "scratch",
            "backbone='scratch', which has scratch_layers and scratch_dropout; set a backbone",
        ),
        "scratch_": (
            backbone.name != "scratch",
            f"backbone={backbone.name!r}, which has its own shape; set backbone=scratch",
        ),
        "scratch_vocab_size": (
            backbone.name == "scratch" and backbone.item_tokens == "whole",
            "item_tokens='whole', where each title is a token; set item_tokens=pieces",
        ),
        "title_rate": (
            backbone.item_tokens != "whole",
            "item_tokens='pieces', where no token is a title; set item_tokens=whole",
        ),
        "title_prior": (
            backbone.kind != "whole titles" or backbone.weights != "pretrained",
            "titles that do not begin as words of a pretrained backbone; set a backbone, "
            "item_tokens=whole and backbone_weights=pretrained",
        ),
    }
    for kind, (nothing, why) in does_nothing.items():
        named = {key for key in chosen if key.startswith(kind) or key.endswith(f"_{kind}")}
        keys = [key for key in chosen if key in named and chosen[key] != defaults.get(key)]
        if keys and nothing:
            have = "have" if len(keys) > 1 else "has"
            yield f"{', '.join(keys)} {have} no effect with {why}."

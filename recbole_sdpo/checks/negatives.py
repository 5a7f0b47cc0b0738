"""Can a stage draw its negatives where the settings say?"""

from __future__ import annotations

from collections.abc import Mapping
from logging import getLogger
from typing import Any

from recbole.config import Config

from recbole_sdpo.data.negatives import SELF, shares
from recbole_sdpo.errors import UserError
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.settings import Settings


def check_negatives(config: Config, settings: Settings) -> None:
    """Are there negatives for an objective or a prompt that wants some, and does each setting of
    them count?

    Raises:
        UserError: there are none, or settings of them do not go together.
    """
    in_text = settings.prompt_style == "candidates"
    aligned = OBJECTIVES[settings.objective].negatives
    if not (in_text or aligned):
        if settings.negative_sources:
            getLogger().warning(
                f"negative_sources={settings.negative_sources!r} has no effect on "
                f"objective={settings.objective!r}, which has no negatives."
            )
        return
    args = config["train_neg_sample_args"]
    negatives = args["sample_num"]
    if not isinstance(negatives, int) or negatives < 1:
        raise UserError(
            f"train_neg_sample_args.sample_num={negatives!r}: objective={settings.objective!r} "
            f"with prompt_style={settings.prompt_style!r} needs 1 or more negatives; or set "
            "objective=sft and prompt_style=history."
        )
    sources = settings.negative_sources or {args["distribution"]: 1.0}
    if args["alpha"] != 1 and "popularity" not in sources:
        getLogger().warning(
            f"train_neg_sample_args.alpha={args['alpha']} has no effect on "
            f"{' and '.join(map(repr, sources))} negatives."
        )
    if settings.negative_sources and args["distribution"] != "uniform":
        getLogger().warning(
            f"train_neg_sample_args.distribution={args['distribution']!r} has no effect with "
            f"negative_sources={settings.negative_sources!r}."
        )
    _check_dynamic(args, settings)
    _check_sources(args, settings)
    if in_text and aligned and negatives >= settings.prompt_candidates:
        raise UserError(
            f"train_neg_sample_args.sample_num={negatives}: the negatives are among the "
            f"{settings.prompt_candidates} candidates of the prompt (prompt_candidates); it must "
            f"be 1 to {settings.prompt_candidates - 1}."
        )


def _check_sources(args: Mapping[str, Any], settings: Settings) -> None:
    """Can negatives come from where ``negative_sources`` says?"""
    sources = settings.negative_sources
    if not sources:
        return
    given, objective = f"negative_sources={sources!r}", OBJECTIVES[settings.objective]
    if SELF in sources and settings.prompt_style == "candidates":
        raise UserError(
            f"{given}: {SELF!r} ranks the whole catalogue, and prompt_style='candidates' shows a "
            "few; use prompt_style='history'."
        )
    if not objective.negatives:
        return
    if args["dynamic"]:
        raise UserError(
            f"{given}: train_neg_sample_args.dynamic=True picks among draws of one source; leave "
            "one of the two out."
        )
    each = shares(sources, objective.taking(args["sample_num"]))
    for name, share in each.items():
        if not share:
            raise UserError(
                f"{given}: of {sum(each.values())} negatives, {name!r} would give none; raise its "
                "weight, or train_neg_sample_args.sample_num."
            )
    if SELF in sources and settings.fixed_negatives:
        raise UserError(
            f"{given}: {SELF!r} changes as the policy learns; set fixed_negatives=False."
        )


def _check_dynamic(args: Mapping[str, Any], settings: Settings) -> None:
    """Each negative is then the one of ``candidate_num`` draws that the model scores highest."""
    if not args["dynamic"]:
        return
    draws = args["candidate_num"]
    if not isinstance(draws, int) or draws < 2:
        raise UserError(
            f"train_neg_sample_args.candidate_num={draws!r}: with dynamic=True, give 2 or more "
            "draws to a negative."
        )
    if settings.fixed_negatives or settings.prompt_style == "candidates":
        raise UserError(
            "train_neg_sample_args.dynamic=True draws negatives anew by the model's scores; it "
            "needs fixed_negatives=False and prompt_style='history' (now "
            f"{settings.fixed_negatives} and {settings.prompt_style!r})."
        )

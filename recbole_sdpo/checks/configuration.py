"""A whole configuration, RecBole's settings and ours together."""

from __future__ import annotations

from logging import getLogger

from recbole.config import Config
from recbole.utils import EvaluatorType, InputType, ModelType

from recbole_sdpo.checks import machine
from recbole_sdpo.checks.metrics import (
    check_answers,
    check_full_sort,
    check_lists,
    check_valid_metric,
    is_of_answers,
)
from recbole_sdpo.checks.negatives import check_negatives
from recbole_sdpo.checks.unknown import check_unknown
from recbole_sdpo.data.columns import check_columns
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.backbone import check_backbone, resolved
from recbole_sdpo.objectives import OBJECTIVES, Constants
from recbole_sdpo.settings import (
    FILE_MODE,
    LEAVE_ONE_OUT,
    MODEL,
    NO_FULL_RANKING,
    RECBOLE_KEYS,
    SETTINGS,
    WITHOUT_EFFECT,
    Role,
    Settings,
    having,
)

OF_TRANSFORM = {
    "mask_itemseq": ("mask_ratio", "ft_ratio"),
    "crop_itemseq": ("eta",),
    "reorder_itemseq": ("beta",),
}
"""What each of RecBole's ``transform`` reads; the first it must have."""

OF_OUR_LOADERS = ("candidates_file", "more_candidates", "max_eval_targets")
"""Who is asked, and against which candidates, as our own command has it alone."""


def check_settings(config: Config) -> Settings:
    """Our settings from a configuration, checked, together with what they ask of RecBole's.

    Raises:
        UserError: a key that nobody reads, or a value that is wrong or does not go with another.
    """
    ours, of_every_model = config["model"] == MODEL, having(Role.EVERY_MODEL)
    known = (
        set(config.internal_config_dict)
        | {key for keys in config.parameters.values() for key in keys}
        | RECBOLE_KEYS
        | (WITHOUT_EFFECT if ours else set(OF_TRANSFORM.get(config["transform"], ())))
    ) - {"config_file"}  # which RecBole lists, and nobody reads
    if ours:
        check_unknown(config.external_config_dict, known, SETTINGS)
    else:
        check_unknown(config.external_config_dict, known, of_every_model, config.model_class)
    check_valid_metric(config)
    check_columns(config)
    _check_model(config)
    _check_negatives_of_baselines(config)
    _check_transform(config)
    theirs = keys_of_recbole(config)
    settings = Settings.from_mapping(
        {key: value for key, value in config.final_config_dict.items() if key not in theirs}
    )
    _check_more_candidates(config, settings)
    check_lists(config, settings)
    check_answers(config, settings)
    _check_evaluation(config, settings)
    if ours:
        _check_language_model(config, settings)
        check_full_sort(config, settings)
        _check_stages(config, settings)
        _warn_of_constants(settings)
        check_negatives(config, settings)
        _check_prompts(config, settings)
    elif settings.resume:
        raise UserError(
            f"resume={settings.resume!r} is for {MODEL}; {config['model']} starts anew."
        )
    return settings


def settings_of_run_recbole(config: Config) -> Settings:
    """:func:`check_settings` where RecBole's own ``run_recbole`` makes the loaders.

    Raises:
        UserError: as there; or a setting is one that RecBole's loaders know nothing of.
    """
    settings = check_settings(config)
    for key in OF_OUR_LOADERS:
        if getattr(settings, key):
            raise UserError(
                f"{key}={getattr(settings, key)!r} has no effect in RecBole's run_recbole; use "
                "recbole_sdpo.quick_start.run, or leave it out."
            )
    if settings.parallel == "fsdp":
        raise UserError(
            "parallel='fsdp' is not for RecBole's run_recbole, which copies the model; use "
            "recbole_sdpo.quick_start.run, or leave it out."
        )
    return settings


def keys_of_recbole(config: Config) -> set[str]:
    """What a model of RecBole reads as its own, although one of our settings may have the name,
    such as the beta of AsymKNN; nothing for ours."""
    if config["model"] == MODEL:
        return set()
    return set(config.internal_config_dict) - having(Role.EVERY_MODEL)


def _check_evaluation(config: Config, settings: Settings) -> None:
    """What is ranked, and which items are held out for it."""
    ranks = config["eval_type"] == EvaluatorType.RANKING
    if settings.popularity_discount and (not ranks or all(map(is_of_answers, config["metrics"]))):
        raise UserError(
            f"popularity_discount={settings.popularity_discount} is for metrics of a ranking, and "
            f"{config['metrics']} are none."
        )
    args = config["eval_args"]
    if settings.held_out_items and (
        args["split"] != LEAVE_ONE_OUT or args["order"] != "TO" or config["benchmark_filename"]
    ):
        raise UserError(
            f"held_out_items={settings.held_out_items} needs eval_args with split={LEAVE_ONE_OUT} "
            "and order=TO, and no benchmark_filename: the tests are users' last events."
        )


def _check_language_model(config: Config, settings: Settings) -> None:
    """Do the backbone's settings go together, is there memory for a scratch one, something that a
    cached reference can keep, and something to offload?"""
    backbone = resolved(settings.backbone, config["device"])
    check_backbone(backbone, config["device"])
    # Weights, gradients, AdamW's two moments.
    bytes_needed = 16 * 12 * backbone.scratch_layers * backbone.scratch_hidden_size**2
    if backbone.name == "scratch" and bytes_needed > machine.memory():
        raise UserError(
            f"scratch_hidden_size={backbone.scratch_hidden_size} with "
            f"scratch_layers={backbone.scratch_layers} must be smaller: "
            f"training takes {bytes_needed / 2**30:,.0f} GiB and more, and this machine has "
            f"{machine.memory() / 2**30:,.0f}."
        )
    if settings.offload and settings.parallel != "fsdp":
        raise UserError(
            f"offload=True needs parallel=fsdp (now {settings.parallel!r}), which parts the model "
            "over several processes; set it, or leave offload out."
        )
    if settings.reference == "cache" and not settings.fixed_negatives:
        raise UserError(
            "reference='cache' needs negatives that stay the same; set fixed_negatives=True, or "
            "reference='auto'."
        )


def _check_stages(config: Config, settings: Settings) -> None:
    """When the optimizer steps; warns of RecBole's settings of a single stage."""
    for stage in ("sft", "sdpo"):
        own = getattr(settings, stage)
        if own.targets_per_step and own.gradient_accumulation > 1:
            raise UserError(
                f"{stage}_targets_per_step={own.targets_per_step} and "
                f"{stage}_gradient_accumulation={own.gradient_accumulation} both say "
                "when the optimizer steps; give one of them."
            )
    for key in sorted(WITHOUT_EFFECT & set(config.external_config_dict)):
        own = (
            f"its stages have sft_{key} and sdpo_{key}"
            if f"sft_{key}" in SETTINGS
            else "see recbole-sdpo settings"
        )
        getLogger().warning(f"{key}={config[key]!r} has no effect on {MODEL}; {own}.")


def _check_prompts(config: Config, settings: Settings) -> None:
    """A prompt that shows candidates cannot show the whole catalogue."""
    in_text = settings.prompt_style == "candidates"
    if in_text and "full" in (*config["eval_args"]["mode"].values(), *settings.more_candidates):
        raise UserError(
            f"eval_args.mode={config['eval_args']['mode']}, "
            f"more_candidates={settings.more_candidates}: {NO_FULL_RANKING}"
        )


def _warn_of_constants(settings: Settings) -> None:
    """Say which of those that were given the objective does not read."""
    objective = OBJECTIVES[settings.objective]
    read = {*objective.reads, *(["sft_weight"] if objective.negatives else [])}
    for key in Constants._fields:
        value = getattr(settings, key)
        if value != Constants._field_defaults[key] and key not in read:
            getLogger().warning(
                f"{key}={value:g} has no effect on objective={settings.objective!r}, which reads "
                f"{', '.join(sorted(read & {*Constants._fields})) or 'no such setting'}."
            )


def _check_model(config: Config) -> None:
    """What RecBole's models find out when they are built, or never."""
    width, heads = config["hidden_size"], config["n_heads"]
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        raise UserError(f"hidden_size={width} must be a multiple of n_heads={heads}.")
    if isinstance(config["reg_weight"], list) and config["weight_decay"]:
        raise UserError(
            f"weight_decay={config['weight_decay']} must be 0 for {config['model']}, whose "
            "reg_weight is a list."
        )
    if config["enable_amp"] and config["model"] != MODEL and config["device"].type == "cpu":
        raise UserError(
            "enable_amp=True must be false on a CPU, where RecBole's mixed precision fails for "
            "some models."
        )


def _check_negatives_of_baselines(config: Config) -> None:
    args = config["train_neg_sample_args"]
    if config["model"] == MODEL:
        return
    if args["distribution"] != "none":
        if args["sample_num"] < 1:
            raise UserError(
                f"train_neg_sample_args.sample_num={args['sample_num']} must be 1 or more for "
                f"{config['model']}."
            )
        if args["dynamic"] and args["candidate_num"] < 1:
            raise UserError(
                "train_neg_sample_args.candidate_num=0 must be 1 or more with dynamic=True."
            )
    pairs = config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE and config["loss_type"] != "CE"
    if args["distribution"] == "none" and pairs:
        raise UserError(
            "train_neg_sample_args must ask for negatives, such as {'sample_num': 1}: "
            f"{config['model']} learns from pairs."
        )


def _check_transform(config: Config) -> None:
    transform, sequential = config["transform"], config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    if transform == config.internal_config_dict["transform"]:
        return
    needs, *_ = OF_TRANSFORM.get(transform, (None,))
    if transform and (not sequential or config["model"] == MODEL):
        raise UserError(
            f"transform={transform!r} must be null for {config['model']}: it is for RecBole's "
            "sequential models."
        )
    if needs and not isinstance(config[needs], int | float):
        raise UserError(f"transform={transform!r} needs {needs}, a number from 0 to 1.")
    if config.internal_config_dict["transform"]:
        raise UserError(
            f"transform={transform!r} must be {config.internal_config_dict['transform']!r} for "
            f"{config['model']}."
        )


def _check_more_candidates(config: Config, settings: Settings) -> None:
    file, mode = settings.candidates_file, config["eval_args"]["mode"]
    if file and (config["eval_type"] != EvaluatorType.RANKING or "labeled" in mode.values()):
        raise UserError(
            f"candidates_file={file!r} is for metrics of a ranking; eval_args.mode={mode} must "
            f"rank items and metrics={config['metrics']} be of their order."
        )
    modes = [FILE_MODE if file else mode["test"], *settings.more_candidates]
    if settings.more_candidates and (
        config["eval_type"] != EvaluatorType.RANKING or len(set(modes)) < len(modes)
    ):
        raise UserError(
            f"more_candidates={settings.more_candidates} must differ from each other and from "
            f"eval_args.mode={config['eval_args']['mode']['test']!r}, and both must rank items."
        )

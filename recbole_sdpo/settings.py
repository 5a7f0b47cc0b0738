"""The plugin's own settings: each with a default, a type, a check and a line of explanation, all of them here.

``recbole-sdpo --settings`` prints them as a table. RecBole's settings (data, split, evaluation, seed) are RecBole's.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from logging import getLogger
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from recbole.config import Config
from recbole.evaluator.register import metrics_dict
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import EvaluatorType

from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.answers import OF_ANSWERS
from recbole_sdpo.objectives import OBJECTIVES

MODEL = "SDPO-LLM"
"""The name under which RecBole knows the model."""

NO_FULL_RANKING = "prompt_style='candidates' cannot rank the whole catalogue; use prompt_style='history', or a mode such as uni19."

LEAVE_ONE_OUT = {"LS": "valid_and_test"}
"""RecBole's split that leaves the last two targets of each user to validation and test."""

# Keys that RecBole reads without naming them in its defaults.
RECBOLE_KEYS = {
    "model",
    "dataset",
    "config_files",
    "config_file",
    "encoding",
    "tail_ratio",
    "wandb_project",
    "embedding_size",
    "reg_weight",
    "mask_ratio",
    "ft_ratio",
    "eta",
}

# Keys of RecBole's training loop that our stages do without: what they have in place of each is among their own settings.
WITHOUT_EFFECT = {"epochs", "learning_rate", "weight_decay", "train_batch_size", "learner", "clip_grad_norm", "enable_amp", "enable_scaler"}

OF_EVERY_MODEL = {
    "title_fields",
    "title_article_first",
    "candidates_exclude_history",
    "candidates_seed",
    "more_candidates",
    "max_eval_targets",
    "popularity_discount",
}
"""Settings of ours that count for the baselines, too: all meet the same targets and candidates."""

# What RecBole's dictionaries may hold; it ignores anything else.
PARTS = {
    "eval_args": {"split", "order", "group_by", "mode"},
    "train_neg_sample_args": {"distribution", "sample_num", "alpha", "dynamic", "candidate_num"},
}


MODE = r"full|(uni|pop)[1-9][0-9]*"
"""Evaluation modes of RecBole that rank a target among items."""


def _setting(default: Any, help: str, check: Callable[[Any], bool] = lambda value: True, valid: str = "") -> Any:
    metadata = {"help": help, "check": check, "valid": valid}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _choice(default: str, help: str, *choices: str) -> Any:
    return _setting(default, help, choices.__contains__, "one of " + ", ".join(choices))


def _above(bound: float, default: Any, help: str) -> Any:
    return _setting(default, help, lambda value: value is None or value > bound, f"more than {bound}")


def _at_least(bound: float, default: Any, help: str) -> Any:
    return _setting(default, help, lambda value: value is None or value >= bound, f"{bound} or more")


def _share(default: float, help: str) -> Any:
    return _setting(default, help, lambda value: 0 <= value < 1, "from 0 to below 1")


@dataclass(frozen=True)
class StageSettings:
    """Settings of one training stage; in a configuration their names begin with ``sft_`` or ``sdpo_``."""

    epochs: int | None = _at_least(
        0, None, "passes over the training targets at most (stopping_step may end it sooner), or null for what suits the backbone"
    )
    learning_rate: float | None = _at_least(0, None, "peak learning rate of AdamW, or null for what suits the backbone")
    schedule: str = _choice("cosine", "what the learning rate does after its warm-up", "cosine", "linear", "constant")
    warmup: float = _share(0.05, "share of the stage's steps over which the learning rate rises to its peak")
    tokens_per_batch: int = _at_least(1, 1024, "tokens in a batch over all processes, padding included")
    gradient_accumulation: int = _at_least(1, 1, "batches to an optimizer step")
    targets_per_step: int | None = _at_least(
        1, None, "training targets to an optimizer step, in as many batches as they need, or null for gradient_accumulation batches"
    )
    clip_norm: float | None = _above(0, 1.0, "largest norm of the gradient, or null for no limit")
    weight_decay: float = _at_least(0, 0.01, "weight decay of AdamW")
    stopping_step: int | None = _at_least(
        0, None, "evaluations without a better valid_metric before the stage ends, or null for RecBole's stopping_step"
    )


# For scratch tuned on the validation set of ml-100k, the second stage for S-DPO with 15 uniform negatives; for pretrained backbones, usual
# values for LoRA.
SUITED: dict[str, dict[str, dict[str, Any]]] = {
    "scratch": {"sft": {"epochs": 30, "learning_rate": 3e-3}, "sdpo": {"epochs": 10, "learning_rate": 3e-3}},
    "pretrained": {"sft": {"epochs": 2, "learning_rate": 5e-4}, "sdpo": {"epochs": 1, "learning_rate": 1e-4}},
}


@dataclass(frozen=True)
class Settings:
    """All settings of ``SDPO-LLM``."""

    # Data and prompts; those in OF_EVERY_MODEL also count for the baselines.
    title_fields: list[str] = _setting(
        ["title"],
        "columns of the .item file that make a title; what follows the first goes in parentheses",
        bool,
        "a non-empty list",
    )
    title_article_first: bool = _setting(True, "read 'Godfather, The' as 'The Godfather'")
    candidates_exclude_history: bool = _setting(True, "keep items that the user has met out of the sampled candidates")
    candidates_seed: int | None = _at_least(0, None, "seed of the candidates, or null for RecBole's seed")
    more_candidates: list[str] = _setting(
        [],
        "further evaluation modes, such as ['pop19']; each is tested with the weights that are best on its own validation set",
        lambda modes: all(re.fullmatch(MODE, mode) for mode in modes),
        "a list of full, uniN and popN, such as ['pop19']",
    )
    max_eval_targets: int | None = _at_least(
        1, None, "validate and test on so many targets, drawn by the candidates' seed, or null for all"
    )
    popularity_discount: float = _setting(
        0.0,
        "how many times log popularity (users who met an item in training, plus 1) comes off the scores by which the last stage's "
        "evaluations rank, all candidate sets alike; answers and recommendations are as they were",
        lambda times: 0 <= times <= 1000,  # float32 holds no more without loss
        "0 to 1000",
    )
    prompt_style: str = _choice("history", "titles in order, or also the candidates in the text", "history", "candidates")
    prompt_templates: str = _setting("items", "a domain of recbole_sdpo/properties/prompts, or a .yaml file of one's own", bool, "a name")
    prompt_candidates: int = _at_least(2, 20, "candidates in the text of a training prompt (style 'candidates')")

    # Backbone
    backbone: str = _setting(
        "auto",
        "scratch, smollm2-135m, a folder, a Hugging Face id or a .gguf file; auto: smollm2-135m on a GPU, else scratch",
        bool,
        "a name or path",
    )
    trust_remote_code: bool = _setting(False, "run code that comes with a backbone's files")
    cache_dir: str = _setting(
        "~/.cache/recbole_sdpo", "where converted GGUF files and the reference's log-probabilities are kept", bool, "a folder"
    )
    dtype: str = _choice(
        "auto",
        "of the weights; auto: bfloat16 where a GPU has it, else float32",
        "auto",
        "float32",
        "bfloat16",
    )
    attention: str = _choice(
        "auto",
        "attention of transformers; auto: FlexAttention for long rows on a GPU, else sdpa",
        "auto",
        "sdpa",
        "eager",
        "flex_attention",
    )
    quantization: str = _choice(
        "none", "of a pretrained backbone's weights under the adapter; nf4: four bits, by bitsandbytes", "none", "nf4"
    )
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward pass to save memory")
    peft: str = _choice("auto", "train an adapter or all weights; auto: lora, but none for scratch", "auto", "lora", "none")
    lora_rank: int = _at_least(1, 16, "rank of the adapter")
    lora_alpha: float = _above(0, 32, "scale of the adapter, divided by its rank")
    lora_dropout: float = _share(0.0, "dropout before the adapter")
    lora_target_modules: str | list[str] = _setting("all-linear", "modules to adapt, as in peft", bool, "'all-linear' or a list of names")
    lora_layers: list[int] | None = _setting(None, "numbers of the layers to adapt, or null for all")
    scratch_hidden_size: int = _at_least(8, 64, "width of the scratch backbone")
    scratch_layers: int = _at_least(1, 2, "its layers")
    scratch_heads: int = _at_least(1, 2, "its attention heads")
    scratch_vocab_size: int = _at_least(258, 12288, "tokens of the BPE from which its vocabulary is chosen")
    scratch_dropout: float = _share(0.3, "its dropout, of embeddings, attention and layers")

    # Answers, which the metrics ValidRatio and GenHit ask for
    decoding: str = _choice("free", "greedy decoding of an answer: of any text, or only of the candidates' titles", "free", "constrained")
    max_new_tokens: int | None = _at_least(1, None, "tokens of a free answer at most, or null for those of the longest title")

    # Training
    objective: str = _choice("sdpo", "of the second stage; sft stops after the first", *OBJECTIVES)
    beta: float = _above(0, 1.0, "scale of the rewards")
    fixed_negatives: bool = _setting(False, "let each target of the second stage keep its negatives and prompt over all epochs")
    reference: str = _choice(
        "auto",
        "log-probabilities of the reference; cache keeps those of fixed negatives, auto does so where they are fixed",
        "auto",
        "compute",
        "cache",
    )
    full_sort: str = _choice(
        "exact", "ranking the catalogue: score every title, or find the exact top k and bound the rest", "exact", "topk"
    )
    train_targets: str = _choice("all", "each item of a user's training sequence after the first, or only the last", "all", "last")
    max_train_targets: int | None = _at_least(1, None, "targets to an epoch, drawn anew each epoch, or null for all")
    sdpo_max_train_targets: int | None = _at_least(1, None, "the same for the second stage alone, or null for max_train_targets")
    sft_checkpoint: str | None = _setting(None, "start at the second stage from this folder")
    resume: str | None = _setting(None, "folder of an interrupted run to go on with, under the settings that it had")
    save_minutes: float = _at_least(0, 10.0, "minutes between two savings of the state that resume needs; also after each epoch")
    run_dir: str | None = _setting(None, "folder of the run, or null for <checkpoint_dir>/<model>-<dataset>-<time>")
    eval_tokens_per_batch: int = _at_least(1, 8192, "tokens in a batch when scoring")

    sft: StageSettings = field(default_factory=StageSettings)
    sdpo: StageSettings = field(default_factory=StageSettings)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from a configuration, of which only the keys named here are read.

        Raises:
            UserError: a value is of the wrong type or out of range.
        """
        defaults = cls()
        own = _read(cls, values, "", defaults)
        stages = {name: StageSettings(**_read(StageSettings, values, f"{name}_", getattr(defaults, name))) for name in ("sft", "sdpo")}
        width, unit = own["scratch_hidden_size"], 2 * own["scratch_heads"]
        if width % unit:
            raise UserError(
                f"scratch_hidden_size={width} must be a multiple of twice scratch_heads={unit // 2}; "
                f"valid is {max(unit, width - width % unit)}."
            )
        return cls(**own, **stages)

    def suited_to(self, backbone: str) -> Settings:
        """With epochs and learning rates that suit ``backbone`` in place of null."""
        suited = SUITED["scratch" if backbone == "scratch" else "pretrained"]
        given = {stage: {key: value for key, value in vars(getattr(self, stage)).items() if value is not None} for stage in suited}
        return replace(self, **{stage: replace(getattr(self, stage), **(suited[stage] | given[stage])) for stage in suited})

    def to_flat(self) -> dict[str, Any]:
        """All settings under the names that a configuration uses."""
        flat = {f.name: getattr(self, f.name) for f in _own_fields(type(self))}
        for stage in ("sft", "sdpo"):
            flat |= {f"{stage}_{f.name}": getattr(getattr(self, stage), f.name) for f in fields(StageSettings)}
        return flat

    @property
    def reaches_alignment(self) -> bool:
        """Is there a second stage?"""
        return self.objective != "sft"

    @property
    def caches_reference(self) -> bool:
        """Are the reference's log-probabilities kept?"""
        return self.fixed_negatives and self.reference != "compute"

    def targets_limit(self, stage: str) -> int | None:
        """Training targets to an epoch of ``stage``, or None for all."""
        return (self.sdpo_max_train_targets if stage == "sdpo" else None) or self.max_train_targets


def names() -> list[str]:
    """Every key of ours."""
    return list(Settings().to_flat())


def check_settings(config: Config) -> Settings:
    """Our settings from a configuration, checked, together with what they ask of RecBole's.

    Raises:
        UserError: a key that nobody reads, or a value that is wrong or does not go with another.
    """
    known = set(config.internal_config_dict) | {key for keys in config.parameters.values() for key in keys} | RECBOLE_KEYS
    ours = config["model"] == MODEL
    if ours:
        check_unknown(config.external_config_dict, known, names())
    else:
        check_unknown(config.external_config_dict, known, OF_EVERY_MODEL, config.model_class)
    _check_recbole(config)
    settings = Settings.from_mapping(config.final_config_dict)
    _check_more_candidates(config, settings)
    _check_answers(config, settings)
    ranks = config["eval_type"] == EvaluatorType.RANKING and not all(metric.lower() in OF_ANSWERS for metric in config["metrics"])
    if settings.popularity_discount and not ranks:
        raise UserError(
            f"popularity_discount={settings.popularity_discount} is for metrics of a ranking, and {config['metrics']} are none."
        )
    if not ours:
        if settings.resume:
            raise UserError(f"resume={settings.resume!r} is for {MODEL}; {config['model']} starts anew.")
        return settings
    if settings.reference == "cache" and not settings.fixed_negatives:
        raise UserError("reference='cache' needs negatives that stay the same; set fixed_negatives=True, or reference='auto'.")
    _check_full_sort(config, settings)
    for stage in ("sft", "sdpo"):
        own = getattr(settings, stage)
        if own.targets_per_step and own.gradient_accumulation > 1:
            raise UserError(
                f"{stage}_targets_per_step={own.targets_per_step} and {stage}_gradient_accumulation={own.gradient_accumulation} both say "
                "when the optimizer steps; give one of them."
            )
    for key in sorted(WITHOUT_EFFECT & set(config.external_config_dict)):
        own = f"its stages have sft_{key} and sdpo_{key}" if f"sft_{key}" in names() else "see recbole-sdpo --settings"
        getLogger().warning(f"{key}={config[key]!r} has no effect on {MODEL}; {own}.")
    in_text, aligned = settings.prompt_style == "candidates", OBJECTIVES[settings.objective].negatives
    if aligned or in_text:
        args = config["train_neg_sample_args"]
        number = args["sample_num"]
        if not isinstance(number, int) or number < 1:
            raise UserError(
                f"train_neg_sample_args.sample_num={number!r}: objective={settings.objective!r} with prompt_style="
                f"{settings.prompt_style!r} needs 1 or more negatives; or set objective=sft and prompt_style=history."
            )
        _check_alpha(args)
        _check_dynamic(args, settings)
        if in_text and aligned and number >= settings.prompt_candidates:
            raise UserError(
                f"train_neg_sample_args.sample_num={number}: the negatives are among the {settings.prompt_candidates} candidates "
                f"of the prompt (prompt_candidates); valid is 1 to {settings.prompt_candidates - 1}."
            )
    if in_text and "full" in (*config["eval_args"]["mode"].values(), *settings.more_candidates):
        raise UserError(f"eval_args.mode={config['eval_args']['mode']}, more_candidates={settings.more_candidates}: {NO_FULL_RANKING}")
    return settings


def merged_parts(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the settings that have parts, those that both give: who gives one part means to keep the others."""
    both = [key for key in PARTS if isinstance(lower.get(key), dict) and isinstance(upper.get(key), dict)]
    return {key: lower[key] | upper[key] for key in both}


def _check_alpha(args: Mapping[str, Any]) -> None:
    """Negatives by popularity are drawn by its power ``alpha``."""
    alpha = args["alpha"]
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 <= alpha < math.inf:
        raise UserError(f"train_neg_sample_args.alpha={alpha!r} must be a number, 0 or more.")
    if alpha != 1 and args["distribution"] != "popularity":
        getLogger().warning(f"train_neg_sample_args.alpha={alpha} has no effect with distribution={args['distribution']!r}.")


def kind_of_negatives(args: Mapping[str, Any]) -> str:
    """The sampler that ``train_neg_sample_args`` asks for, in a word: "none", "uniform", "popularity" or "popularity^2"."""
    kind = args["distribution"]
    return f"{kind}^{args['alpha']:g}" if kind == "popularity" and args["alpha"] != 1 else kind


def _check_dynamic(args: Mapping[str, Any], settings: Settings) -> None:
    """Each negative is then the one of ``candidate_num`` draws that the model scores highest."""
    if not args["dynamic"]:
        return
    draws = args["candidate_num"]
    if not isinstance(draws, int) or draws < 2:
        raise UserError(f"train_neg_sample_args.candidate_num={draws!r}: with dynamic=True, give 2 or more draws to a negative.")
    if settings.fixed_negatives or settings.prompt_style == "candidates":
        raise UserError(
            "train_neg_sample_args.dynamic=True draws negatives anew by the model's scores; it needs fixed_negatives=False and "
            f"prompt_style='history' (now {settings.fixed_negatives} and {settings.prompt_style!r})."
        )


def check_given(given: Mapping[str, Any]) -> None:
    """Check of what the user gave to RecBole that on which its ``Config`` itself would stumble.

    Raises:
        UserError: a metric, a top k, a split or an evaluation mode is none.
    """
    if not isinstance(given.get("valid_metric", ""), str):
        raise UserError(f"valid_metric={given['valid_metric']!r} must be the name of a metric, such as NDCG@5.")
    metrics = given.get("metrics", ["NDCG"])
    if metrics == []:
        raise UserError("metrics=[] must have one or more, such as NDCG.")
    for metric in metrics if isinstance(metrics, list | tuple) else [metrics]:
        if str(metric).lower() not in metrics_dict:
            hint = "it is called Hit here" if str(metric).upper() == "HR" else f"valid are {', '.join(sorted(metrics_dict))}"
            raise UserError(f"metrics={metrics!r}: there is no {metric!r}; {hint}.")
    eval_args = given.get("eval_args", {})
    if not isinstance(eval_args, dict):
        raise UserError(f"eval_args={eval_args!r} must be a dictionary, such as {{'mode': 'full'}}.")
    topk = given.get("topk", 1)
    for k in topk if isinstance(topk, list | tuple) else [topk]:
        if not isinstance(k, int) or k < 1:
            raise UserError(f"topk={topk!r} must be a whole number of 1 or more, or a list of them, such as [1, 5, 10].")
    split = eval_args.get("split", LEAVE_ONE_OUT)
    if not _is_split(split):
        raise UserError(
            f"eval_args.split={split!r}: valid are {LEAVE_ONE_OUT}, and {{'RS': [0.8, 0.1, 0.1]}} or TS with three shares above 0."
        )
    modes = eval_args.get("mode", "full")
    for mode in modes.values() if isinstance(modes, dict) else [modes]:
        if not re.fullmatch(f"labeled|{MODE}", str(mode)):
            raise UserError(f"eval_args.mode={mode!r}: valid are full, labeled, and uniN or popN for N sampled items, such as uni19.")


def _is_split(split: Any) -> bool:
    """Are there to be parts for training, validation and test?"""
    kind, shares = next(iter(split.items())) if isinstance(split, dict) and len(split) == 1 else (None, None)
    numbers = isinstance(shares, list) and all(isinstance(share, int | float) and share > 0 for share in shares)
    return split == LEAVE_ONE_OUT or (kind in ("RS", "TS") and numbers and len(shares) == 3)


def _check_recbole(config: Config) -> None:
    """Check what RecBole would find out late, or never."""
    for key, least in (
        ("seed", 0),
        ("MAX_ITEM_LIST_LENGTH", 1),
        ("eval_batch_size", 1),
        ("stopping_step", 0),
        ("eval_step", -1),
        ("worker", 0),
        ("epochs", 0),
        ("train_batch_size", 1),
    ):
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{key}={value!r} must be a whole number, {least} or more.")
    rate = config["learning_rate"]
    if not isinstance(rate, int | float) or isinstance(rate, bool) or rate <= 0:
        raise UserError(f"learning_rate={rate!r} must be a number above 0, such as 0.001.")
    for key, parts in PARTS.items():
        for part in config.external_config_dict.get(key) or ():
            if part not in parts:
                raise UserError(f"{key} has no part {part!r}; valid are {', '.join(sorted(parts))}.")
    metrics = [metric.lower() for metric in config["metrics"]]
    ranked = config["eval_type"] == EvaluatorType.RANKING
    computed = [
        name
        for metric in metrics
        for name in ([metric] if not ranked or metric in OF_ANSWERS else [f"{metric}@{k}" for k in config["topk"]])
    ]
    if str(config["valid_metric"]).lower() not in computed:
        raise UserError(
            f"valid_metric={config['valid_metric']!r} is not computed; with these metrics and topk, valid are {', '.join(computed)}."
        )


def _check_more_candidates(config: Config, settings: Settings) -> None:
    modes = [config["eval_args"]["mode"]["test"], *settings.more_candidates]
    if settings.more_candidates and (config["eval_type"] != EvaluatorType.RANKING or len(set(modes)) < len(modes)):
        raise UserError(
            f"more_candidates={settings.more_candidates} must differ from each other and from eval_args.mode="
            f"{config['eval_args']['mode']['test']!r}, and both must rank items."
        )


def _check_answers(config: Config, settings: Settings) -> None:
    asked = [metric for metric in config["metrics"] if metric.lower() in OF_ANSWERS]
    if asked and config["model"] != MODEL:
        raise UserError(
            f"metrics={config['metrics']}: {asked[0]} needs an answer in words, and {config['model']} writes none; leave it out."
        )
    modes = [*config["eval_args"]["mode"].values(), *settings.more_candidates]
    if asked and not all(re.fullmatch("(uni|pop)[0-9]+", mode) for mode in modes):
        raise UserError(
            f"metrics={config['metrics']}: {asked[0]} needs sampled candidates, such as eval_args.mode=uni19 (now {', '.join(modes)})."
        )
    if asked and settings.decoding == "constrained" and settings.max_new_tokens:
        getLogger().warning(
            f"max_new_tokens={settings.max_new_tokens} has no effect with decoding='constrained', which writes whole titles."
        )
    if config["model"] == MODEL and not asked:
        for key in sorted({"decoding", "max_new_tokens"} & set(config.external_config_dict)):
            getLogger().warning(f"{key}={config[key]!r} has no effect without answers; add ValidRatio or GenHit to metrics.")


def check_topk(config: Config, items: int) -> None:
    """RecBole's top k must not ask for more items than there are.

    Args:
        items: of the catalogue, without the padding.

    Raises:
        UserError: it does; RecBole would find out at its first evaluation.
    """
    if config["eval_type"] == EvaluatorType.RANKING and max(config["topk"]) > items:
        raise UserError(f"topk={config['topk']} asks for more than the {items} items that there are; give smaller ones.")


def _check_full_sort(config: Config, settings: Settings) -> None:
    """Bounds in place of scores serve metrics of the top k alone."""
    if settings.full_sort == "topk":
        modes = {*config["eval_args"]["mode"].values(), *settings.more_candidates}
        if "full" not in modes:
            getLogger().warning(f"full_sort='topk' has no effect on {', '.join(sorted(modes))}: candidates that are a sample.")
            return
        for metric in config["metrics"]:
            needed = set(metrics_dict[metric.lower()].metric_need)
            if needed & {"rec.score", "rec.meanrank"}:
                raise UserError(f"full_sort='topk' finds the top k alone, and metric {metric} needs all scores; set full_sort='exact'.")
        if settings.popularity_discount:
            raise UserError(
                f"full_sort='topk' finds the top k by log-probability, which popularity_discount={settings.popularity_discount} does "
                "not rank by; set full_sort='exact'."
            )


def check_unknown(given: Mapping[str, Any], known: set[str], ours: Collection[str], model_class: type | None = None) -> None:
    """Refuse keys that nobody reads.

    Args:
        given: what the user set.
        known: RecBole's keys.
        ours: those of our settings that count for the model; the others do no harm.
        model_class: of RecBole's, of which a few read keys that are not in their defaults.

    Raises:
        UserError: naming the key and the nearest right one.
    """
    for key in given:
        if key in known or key in names() or (model_class and _reads(model_class, key)):
            continue
        near = difflib.get_close_matches(str(key), [*sorted(ours), *sorted(known)], 1)
        hint = f"did you mean {near[0]!r}?" if near else "recbole-sdpo --settings lists ours, RecBole's documentation its own."
        raise UserError(f"Unknown setting {key!r}={given[key]!r}; {hint}")


def _reads(model_class: type, key: str) -> bool:
    """Does the module of a model name the key, or one of those of RecBole that it builds on?"""
    modules = {inspect.getmodule(cls) for cls in model_class.__mro__ if issubclass(cls, AbstractRecommender)}
    texts = [inspect.getsource(module) for module in modules if getattr(module, "__file__", None)]
    return any(f'"{key}"' in text or f"'{key}'" in text for text in texts)


def _own_fields(cls: type) -> list[Field]:
    return [f for f in fields(cls) if f.metadata]


def _read(cls: type, values: Mapping[str, Any], prefix: str, defaults: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    read = {}
    for f in _own_fields(cls):
        name = prefix + f.name
        value = values[name] if name in values else getattr(defaults, f.name)
        if f.name == "title_fields" and isinstance(value, str):
            value = [value]
        if isinstance(value, tuple):
            value = list(value)
        if float in _kinds(hints[f.name]) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not any(_is_a(value, kind) for kind in _kinds(hints[f.name])):
            raise UserError(f"{name}={value!r} must be {_type_name(hints[f.name])}; the default is {getattr(defaults, f.name)!r}.")
        if not f.metadata["check"](value):
            raise UserError(f"{name}={value!r} is out of range; valid is {f.metadata['valid']}.")
        read[f.name] = value
    return read


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # Python's bool is an int


def _type_name(hint: Any) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(words.get(kind) or f"a list of {words[get_args(kind)[0]]} values" for kind in _kinds(hint))


def table() -> str:
    """The settings as a Markdown table."""
    defaults = Settings()
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for prefix, owner in (("", defaults), ("sft_", defaults.sft), ("sdpo_", defaults.sdpo)):
        for f in _own_fields(type(owner)):
            value = getattr(owner, f.name)
            valid = f" ({f.metadata['valid']})" if f.metadata["valid"] else ""
            rows.append(f"| `{prefix}{f.name}` | `{'null' if value is None else value}` | {f.metadata['help']}{valid} |")
    return "\n".join(rows)

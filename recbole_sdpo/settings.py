"""The plugin's own settings: each with a default, a type, a check and a line of explanation, all of them here.

``recbole-sdpo --settings`` prints them as a table. RecBole's settings (data, split, evaluation, seed) are RecBole's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from recbole_sdpo.errors import UserError
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.values import shown

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


LARGEST = 10**9
"""No number of ours may be larger; those that take memory have lower bounds."""

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


def _within(least: float, most: float, default: Any, help: str) -> Any:
    """For what takes memory, or goes into a number of 32 bits."""
    return _setting(default, help, lambda value: value is None or least <= value <= most, f"{least} to {most}")


def _share(default: float, help: str) -> Any:
    return _setting(default, help, lambda value: 0 <= value < 1, "from 0 to below 1")


TOKENS_PER_BATCH = 1024
"""What suits a CPU, and ``scratch`` everywhere."""


@dataclass(frozen=True)
class StageSettings:
    """Settings of one training stage; in a configuration their names begin with ``sft_`` or ``sdpo_``."""

    epochs: int | None = _at_least(
        0, None, "passes over the training targets at most (stopping_step may end it sooner), or null for what suits the backbone"
    )
    learning_rate: float | None = _within(0, 1000, None, "peak learning rate of AdamW, or null for what suits the backbone")
    schedule: str = _choice("cosine", "what the learning rate does after its warm-up", "cosine", "linear", "constant")
    warmup: float = _share(0.05, "share of the stage's steps over which the learning rate rises to its peak")
    tokens_per_batch: int | None = _at_least(
        1, None, "tokens in a batch over all processes, padding included, or null for what suits the device"
    )
    gradient_accumulation: int = _at_least(1, 1, "batches to an optimizer step")
    targets_per_step: int | None = _at_least(
        1,
        None,
        "training targets to an optimizer step, in as many batches as they need, or null for gradient_accumulation batches; a pretrained "
        "backbone whose batches are not given, either, takes as many as suit it, the same on every device",
    )
    clip_norm: float | None = _above(0, 1.0, "largest norm of the gradient, or null for no limit")
    weight_decay: float = _within(0, 1000, 0.01, "weight decay of AdamW")
    stopping_step: int | None = _at_least(
        0, None, "evaluations without a better valid_metric before the stage ends, or null for RecBole's stopping_step"
    )

    def completed(self, suited: Mapping[str, Any]) -> StageSettings:
        """With what is ``suited`` in place of null. Where batches make a step, as many as are given, no device has a say in them."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        if self.gradient_accumulation > 1:
            given = {"tokens_per_batch": TOKENS_PER_BATCH} | given
        chosen = {**suited, **given}
        if "tokens_per_batch" in given and self.targets_per_step is None:
            chosen.pop("targets_per_step", None)
        return replace(self, **chosen)


# For scratch tuned on the validation set of ml-100k, the second stage for S-DPO with 15 uniform negatives; for pretrained backbones, usual
# values for LoRA. Where the size of a batch follows from the device, that of a step must not: alignment takes the 128 targets of the paper
# on S-DPO, which with 15 negatives are 24,000 tokens of ml-100k; SFT twice as many, 6,000 tokens, for fewer leave a GPU idle.
SUITED: dict[str, dict[str, dict[str, Any]]] = {
    "scratch": {
        "sft": {"epochs": 30, "learning_rate": 3e-3, "tokens_per_batch": TOKENS_PER_BATCH},
        "sdpo": {"epochs": 10, "learning_rate": 3e-3, "tokens_per_batch": TOKENS_PER_BATCH},
    },
    "pretrained": {
        "sft": {"epochs": 2, "learning_rate": 5e-4, "targets_per_step": 256},
        "sdpo": {"epochs": 1, "learning_rate": 1e-4, "targets_per_step": 128},
    },
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
    candidates_seed: int | None = _within(0, 2**32 - 1, None, "seed of the candidates, or null for RecBole's seed")
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
    prompt_candidates: int = _within(2, 1000, 20, "candidates in the text of a training prompt (style 'candidates')")

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
        "of weights and arithmetic; mixed: float32 weights, bfloat16 arithmetic; auto: float32, but of a pretrained backbone on a GPU "
        "that has bfloat16 bfloat16 under an adapter, and mixed without one. An adapter's weights are always float32",
        "auto",
        "float32",
        "bfloat16",
        "mixed",
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
    compile: bool = _setting(False, "compile each layer of the backbone (torch.compile): fewer passes over memory, after a minute or so")
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward pass to save memory")
    peft: str = _choice("auto", "train an adapter or all weights; auto: lora, but none for scratch", "auto", "lora", "none")
    lora_rank: int = _within(1, 1024, 16, "rank of the adapter")
    lora_alpha: float = _above(0, 32, "scale of the adapter, divided by its rank")
    lora_dropout: float = _share(0.0, "dropout before the adapter")
    lora_target_modules: str | list[str] = _setting("all-linear", "modules to adapt, as in peft", bool, "'all-linear' or a list of names")
    lora_layers: list[int] | None = _setting(None, "numbers of the layers to adapt, or null for all")
    scratch_hidden_size: int = _within(8, 8192, 64, "width of the scratch backbone")
    scratch_layers: int = _within(1, 128, 2, "its layers")
    scratch_heads: int = _within(1, 512, 2, "its attention heads")
    scratch_vocab_size: int = _within(258, 1_000_000, 12288, "tokens of the BPE from which its vocabulary is chosen")
    scratch_dropout: float = _share(0.3, "its dropout, of embeddings, attention and layers")

    # Answers, which the metrics ValidRatio and GenHit ask for
    decoding: str = _choice("free", "greedy decoding of an answer: of any text, or only of the candidates' titles", "free", "constrained")
    max_new_tokens: int | None = _within(1, 100_000, None, "tokens of a free answer at most, or null for those of the longest title")

    # Training
    objective: str = _choice("sdpo", "of the second stage; sft stops after the first", *OBJECTIVES)
    beta: float = _setting(1.0, "scale of the rewards", lambda beta: 0 < beta <= 1000, "more than 0 and at most 1000")
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
    eval_tokens_per_batch: int | None = _at_least(1, None, "tokens in a batch when scoring, or null for what suits the device")

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
                f"scratch_hidden_size={width} must be a multiple of twice scratch_heads={unit // 2}, "
                f"such as {max(unit, width - width % unit)}."
            )
        return cls(**own, **stages)

    def suited_to(self, backbone: str) -> Settings:
        """With epochs, learning rates and sizes of batches or steps that suit ``backbone`` in place of null."""
        suited = SUITED["scratch" if backbone == "scratch" else "pretrained"]
        return replace(self, **{stage: getattr(self, stage).completed(suited[stage]) for stage in suited})

    def suited_to_device(self, training: int, scoring: int) -> Settings:
        """With so many tokens to a batch in place of null."""
        stages = {stage: getattr(self, stage).completed({"tokens_per_batch": training}) for stage in ("sft", "sdpo")}
        return replace(self, **stages, eval_tokens_per_batch=self.eval_tokens_per_batch or scoring)

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


def merged_parts(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the settings that have parts, those that both give: who gives one part means to keep the others."""
    both = [key for key in PARTS if isinstance(lower.get(key), dict) and isinstance(upper.get(key), dict)]
    return {key: lower[key] | upper[key] for key in both}


def kind_of_negatives(args: Mapping[str, Any]) -> str:
    """The sampler that ``train_neg_sample_args`` asks for, in a word: "none", "uniform", "popularity" or "popularity^2"."""
    kind = args["distribution"]
    return f"{kind}^{args['alpha']:g}" if kind == "popularity" and args["alpha"] != 1 else kind


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
        if float in _kinds(hints[f.name]) and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
            value = float(value)
        if not any(_is_a(value, kind) for kind in _kinds(hints[f.name])):
            raise UserError(f"{name}={shown(value)} must be {_type_name(hints[f.name])}; the default is {getattr(defaults, f.name)!r}.")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and not item.strip():
                raise UserError(f"{name}={value!r} must not be blank; leave it out for the default, {getattr(defaults, f.name)!r}.")
            if isinstance(item, int | float) and not abs(item) <= LARGEST:
                raise UserError(f"{name}={shown(value)} must be a finite number, {LARGEST:,} at most.")
        if not f.metadata["check"](value):
            raise UserError(f"{name}={shown(value)} must be {f.metadata['valid']}.")
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

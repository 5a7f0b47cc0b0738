"""The plugin's own settings: each with a default, a type, a check, an explanation and its roles.

``recbole-sdpo settings`` prints them as a table. RecBole's settings (data, split, evaluation,
seed) are RecBole's; those that have a role in what we do are listed here, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Flag, auto
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from recbole_sdpo.errors import UserError
from recbole_sdpo.objectives import Constants, objectives
from recbole_sdpo.values import KINDS, is_a, shown

MODEL = "SDPO-LLM"
"""The name under which RecBole knows the model."""

NO_FULL_RANKING = (
    "prompt_style='candidates' cannot rank the whole catalogue; use prompt_style='history', "
    "or a mode such as uni19."
)

LEAVE_ONE_OUT = {"LS": "valid_and_test"}
"""RecBole's split that leaves the last two targets of each user to validation and test."""

# Keys that RecBole reads without naming them in its defaults.
RECBOLE_KEYS = {
    "model",
    "dataset",
    "config_files",
    "encoding",
    "tail_ratio",
    "wandb_project",
}

# Keys of RecBole's training loop, and of its models, that ours does without: what it has in place
# of some is among its own settings.
WITHOUT_EFFECT = {
    "epochs",
    "learning_rate",
    "weight_decay",
    "train_batch_size",
    "learner",
    "clip_grad_norm",
    "enable_amp",
    "enable_scaler",
    "shuffle",
    "require_pow",
    "embedding_size",
    "reg_weight",
    "mask_ratio",
    "ft_ratio",
    "eta",
}

# Of which a user may give one part alone.
PARTS = ("eval_args", "train_neg_sample_args")


class Role(Flag):
    """What a setting is to a run.

    One without a role counts for ``SDPO-LLM`` alone, in both stages: a run with another value is
    another run, and none that had another value is resumed.
    """

    EVERY_MODEL = auto()
    """It counts for the baselines, too: all meet the same targets and candidates."""
    ALIGNMENT = auto()
    """It counts in the second stage alone: alignments that differ in it begin from one SFT."""
    IDLE = auto()
    """It says where and how to run, and no result depends on it; of files the contents count."""
    FREE = auto()
    """A resumed run may have another value."""
    FIXED = auto()
    """A setting of RecBole's that a resumed run may not have otherwise; the others are free."""
    POLICY = auto()
    """A run loads policies only that were made with its own value; no weight shows it."""
    ADAPTER = auto()
    """The same, of policies that are an adapter."""
    SERVED = auto()
    """Whoever serves a checkpoint takes it from there."""
    CALLER = auto()
    """Whoever serves a checkpoint says it: where things are, and whom to trust."""
    OF_THIS_RUN = auto()
    """It says where a run begins and writes, which is nothing to those that load its data again."""
    EXPERIMENT = auto()
    """An experiment sets it for each of its runs."""
    PATH = auto()
    """It may name a file or a folder."""


NONE = Role(0)

LARGEST = 2**32 - 1
"""No number of ours may be larger, and no seed; those that take memory have lower bounds."""

SOURCES = {"uniform", "popularity", "self"}
"""Of negatives."""

MODE = r"full|(uni|pop)[1-9][0-9]*"
"""Evaluation modes of RecBole that rank a target among items."""

FILE_MODE = "file"
"""What stands for the mode where ``candidates_file`` gives the candidates."""


def _setting(
    default: Any,
    help: str,
    roles: Role = NONE,
    check: Callable[[Any], bool] = lambda value: True,
    valid: str | Callable[[], str] = "",
    key: str = "",
) -> Any:
    """``key`` is its name in a configuration, if that is not the attribute's; ``valid`` is asked
    each time if others may add to what is."""
    metadata = {"help": help, "roles": roles, "check": check, "valid": valid, "key": key}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _above(bound: float, default: Any, help: str, roles: Role = NONE) -> Any:
    above = lambda value: value is None or value > bound  # noqa: E731
    return _setting(default, help, roles, above, f"more than {bound}")


def _at_least(bound: float, default: Any, help: str, roles: Role = NONE, key: str = "") -> Any:
    at_least = lambda value: value is None or value >= bound  # noqa: E731
    return _setting(default, help, roles, at_least, f"{bound} or more", key)


def _within(least: float, most: float, default: Any, help: str, roles: Role = NONE) -> Any:
    """For what takes memory, or goes into a number of 32 bits."""
    within = lambda value: value is None or least <= value <= most  # noqa: E731
    return _setting(default, help, roles, within, f"{least} to {most}")


def _share(default: float, help: str, roles: Role = NONE, key: str = "") -> Any:
    return _setting(default, help, roles, lambda value: 0 <= value < 1, "from 0 to below 1", key)


def _group(kind: type, prefix: str, roles: Role = NONE) -> Any:
    """Settings of ``kind``, whose names in a configuration have ``prefix``; all have ``roles``."""
    return field(default_factory=kind, metadata={"prefix": prefix, "roles": roles})


TOKENS_PER_BATCH = 1024
"""What suits a CPU, and ``scratch`` everywhere."""


@dataclass(frozen=True)
class StageSettings:
    """Settings of one training stage; in a configuration they have a prefix, such as ``sft_``."""

    epochs: int | None = _at_least(
        0,
        None,
        "passes over the training targets at most (stopping_step may end it sooner), or null for "
        "what suits the backbone",
    )
    learning_rate: float | None = _within(
        0, 1000, None, "peak learning rate of AdamW, or null for what suits the backbone"
    )
    title_rate: float = _above(
        0,
        1.0,
        "learning rate of titles that are tokens (item_tokens=whole), as a multiple of the stage's",
    )
    schedule: Literal["cosine", "linear", "constant"] = _setting(
        "cosine", "what the learning rate does after its warm-up"
    )
    warmup: float = _share(
        0.05, "share of the stage's steps over which the learning rate rises to its peak"
    )
    tokens_per_batch: int | None = _at_least(
        1,
        None,
        "tokens in a batch over all processes, padding included, or null for what suits them",
    )
    gradient_accumulation: int = _at_least(1, 1, "batches to an optimizer step")
    targets_per_step: int | None = _at_least(
        1,
        None,
        "training targets to an optimizer step, in as many batches as they need, or null for "
        "gradient_accumulation batches; a pretrained backbone whose batches are not given, either, "
        "takes as many as suit it, the same on every device",
    )
    clip_norm: float | None = _above(0, 1.0, "largest norm of the gradient, or null for no limit")
    weight_decay: float = _within(0, 1000, 0.01, "weight decay of AdamW")
    stopping_step: int | None = _at_least(
        0,
        None,
        "evaluations without a better valid_metric that a stage bears, and the next one ends it; "
        "null for RecBole's stopping_step; a small one may end a schedule that falls before its "
        "best part",
    )

    def completed(self, suited: Mapping[str, Any]) -> StageSettings:
        """With what is ``suited`` in place of null.

        Where batches make a step, as many as are given, no device has a say in them.
        """
        own = {key: value for key, value in vars(self).items() if value is not None}
        if self.gradient_accumulation > 1:
            own = {"tokens_per_batch": TOKENS_PER_BATCH} | own
        chosen = {**suited, **own}
        if "tokens_per_batch" in own and self.targets_per_step is None:
            chosen.pop("targets_per_step", None)
        return replace(self, **chosen)


@dataclass(frozen=True, kw_only=True)
class CompleteStage(StageSettings):
    """Settings of a stage with what suits it in place of null."""

    epochs: int
    learning_rate: float
    tokens_per_batch: int


# For scratch tuned on the validation set of ml-100k, the second stage for S-DPO with 15 uniform
# negatives; for pretrained backbones, usual values for LoRA. Where the size of a batch follows from
# the device, that of a step must not: alignment takes the 128 targets of the paper on S-DPO, which
# with 15 negatives are 24,000 tokens of ml-100k; SFT twice as many, 6,000 tokens, for fewer leave a
# GPU idle. Titles as tokens learn by many small steps: on the validation set of ml-100k, SFT of all
# weights of SmolLM2-135M had NDCG@5 0.664 after an epoch of 160 targets to a step, and 0.595 of 500
# (with histories of 50, not 20).
SUITED: dict[str, dict[str, dict[str, Any]]] = {
    "scratch": {
        "sft": {"epochs": 30, "learning_rate": 3e-3, "tokens_per_batch": TOKENS_PER_BATCH},
        "sdpo": {"epochs": 10, "learning_rate": 3e-3, "tokens_per_batch": TOKENS_PER_BATCH},
    },
    "pretrained": {
        "sft": {"epochs": 2, "learning_rate": 5e-4, "targets_per_step": 256},
        "sdpo": {"epochs": 1, "learning_rate": 1e-4, "targets_per_step": 128},
    },
    "whole titles": {
        "sft": {"epochs": 2, "learning_rate": 3e-4, "targets_per_step": 160},
        "sdpo": {"epochs": 1, "learning_rate": 1e-4, "targets_per_step": 160},
    },
}


@dataclass(frozen=True)
class BackboneSettings:
    """What to load and what to train of it."""

    name: str = _setting(
        "auto",
        "scratch, smollm2-135m, a folder, a Hugging Face id or a .gguf file; auto: smollm2-135m on "
        "a GPU, else scratch",
        Role.POLICY | Role.PATH | Role.CALLER,
        bool,
        "a name or path",
        key="backbone",
    )
    layers: int | None = _at_least(
        1,
        None,
        "how many of a pretrained backbone's layers to use, from the lowest up, or null for all",
        Role.POLICY,
        key="backbone_layers",
    )
    weights: Literal["pretrained", "body", "random"] = _setting(
        "pretrained",
        "which of a pretrained backbone's weights to begin with: all, all but those of the "
        "tokens (embeddings and head), or none: a control of the same shape, fully trained",
        key="backbone_weights",
    )
    dropout: float = _share(
        0.0,
        "dropout, in training, of a pretrained backbone's embeddings and of what each layer adds",
        key="backbone_dropout",
    )
    trust_remote_code: bool = _setting(
        False, "run code that comes with a backbone's files", Role.CALLER
    )
    cache_dir: str = _setting(
        "~/.cache/recbole_sdpo",
        "where converted GGUF files and the reference's log-probabilities are kept",
        Role.IDLE | Role.FREE | Role.PATH | Role.CALLER,
        bool,
        "a folder",
    )
    item_tokens: Literal["auto", "pieces", "whole"] = _setting(
        "auto",
        "a title is the backbone's own tokens, or one new token, whose embedding begins as the "
        "mean of theirs and is trained; auto: pieces, but whole where backbone=auto takes a "
        "pretrained one, all of which is trained",
        Role.POLICY,
    )
    dtype: Literal["auto", "float32", "bfloat16", "mixed"] = _setting(
        "auto",
        "of weights and arithmetic; mixed: float32 weights, bfloat16 arithmetic; auto: float32, "
        "but of a pretrained backbone where bfloat16 is fast (a GPU that has it, a CPU with AMX) "
        "mixed, or bfloat16 where an adapter is all that is trained. An adapter's weights are "
        "always float32",
    )
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = _setting(
        "auto",
        "attention of transformers; auto: FlexAttention for long rows on a GPU, else sdpa",
    )
    quantization: Literal["none", "nf4"] = _setting(
        "none",
        "of a pretrained backbone's weights under the adapter; nf4: four bits, by bitsandbytes",
        Role.ADAPTER,
    )
    compile: bool = _setting(
        False,
        "compile each layer of the backbone (torch.compile): fewer passes over memory, after a "
        "minute or so",
    )
    gradient_checkpointing: bool = _setting(
        False, "recompute activations in the backward pass to save memory"
    )
    peft: Literal["auto", "lora", "none"] = _setting(
        "auto",
        "train an adapter or all weights; auto: lora, but none for scratch, and for backbone=auto "
        "unless its weights are in four bits or bfloat16",
        Role.POLICY,
    )
    lora_rank: int = _within(1, 1024, 16, "rank of the adapter", Role.ADAPTER)
    lora_alpha: float = _above(0, 32, "scale of the adapter, divided by its rank", Role.ADAPTER)
    lora_dropout: float = _share(0.0, "dropout before the adapter")
    lora_target_modules: str | list[str] = _setting(
        "all-linear",
        "modules to adapt, as in peft",
        Role.ADAPTER,
        bool,
        "'all-linear' or a list of names",
    )
    lora_layers: list[int] | None = _setting(
        None, "numbers of the layers to adapt, or null for all", Role.ADAPTER
    )
    scratch_hidden_size: int = _within(8, 8192, 64, "width of the scratch backbone")
    scratch_layers: int = _within(1, 128, 2, "its layers")
    scratch_heads: int = _within(1, 512, 2, "its attention heads")
    scratch_vocab_size: int = _within(
        258, 1_000_000, 12288, "tokens of the BPE from which its vocabulary is chosen"
    )
    scratch_dropout: float = _share(0.3, "its dropout, of embeddings, attention and layers")

    @property
    def kind(self) -> str:
        """Which of :data:`SUITED` suits it, once its name is known."""
        pretrained = "whole titles" if self.item_tokens == "whole" else "pretrained"
        return "scratch" if self.name == "scratch" else pretrained


@dataclass(frozen=True)
class Settings:
    """All settings of ``SDPO-LLM``."""

    # Data and prompts
    title_fields: list[str] = _setting(
        ["title"],
        "columns of the .item file that make a title; what follows the first goes in parentheses",
        Role.EVERY_MODEL | Role.POLICY | Role.SERVED,
        bool,
        "a list of columns, one or more",
    )
    title_article_first: bool = _setting(
        True,
        "read 'Godfather, The' as 'The Godfather'",
        Role.EVERY_MODEL | Role.POLICY | Role.SERVED,
    )
    candidates_exclude_history: bool = _setting(
        True,
        "keep items that the user has met out of the candidates, sampled or the whole catalogue",
        Role.EVERY_MODEL,
    )
    candidates_seed: int | None = _within(
        0, 2**32 - 1, None, "seed of the candidates, or null for RecBole's seed", Role.EVERY_MODEL
    )
    candidates_file: str | None = _setting(
        None,
        "rank each test target among the candidates that this .csv, .json or .jsonl file gives, "
        "and each validation target where it has lists of them, or null for drawn candidates",
        Role.EVERY_MODEL | Role.PATH,
    )
    held_out_items: float = _within(
        0,
        0.5,
        0.0,
        "share of the items, drawn by the candidates' seed, that no history holds and that are no "
        "target but where a user's last event is one: how a model ranks what nobody has met",
        Role.EVERY_MODEL | Role.POLICY,
    )
    more_candidates: list[str] = _setting(
        [],
        "further evaluation modes, such as ['pop19']; each is tested with the weights that are "
        "best on its own validation set",
        Role.EVERY_MODEL | Role.EXPERIMENT,
        lambda modes: all(re.fullmatch(MODE, mode) for mode in modes),
        "a list of full, uniN and popN, such as ['pop19']",
    )
    max_eval_targets: int | None = _at_least(
        1,
        None,
        "validate and test on so many targets, drawn by the candidates' seed, or null for all",
        Role.EVERY_MODEL,
    )
    popularity_discount: float = _setting(
        0.0,
        "how many times log popularity (users who met an item in training, plus 1) comes off the "
        "scores by which the last stage's evaluations rank, all candidate sets alike; answers and "
        "recommendations are as they were",
        Role.EVERY_MODEL,
        lambda times: 0 <= times <= 1000,  # float32 holds no more without loss
        "0 to 1000",
    )
    fairness_groups: str = _setting(
        "popularity",
        "groups of items that the metrics MGU and DGU compare: popularity, or a column of the "
        ".item file, such as a genre",
        Role.EVERY_MODEL,
        bool,
        "popularity or the name of a column",
    )
    audit: bool = _setting(
        False,
        "show in the tables how well the targets are guessed without a history and a model; "
        "result.json has it always",
        Role.IDLE | Role.FREE,
    )
    prompt_style: Literal["history", "candidates"] = _setting(
        "history", "titles in order, or also the candidates in the text", Role.POLICY | Role.SERVED
    )
    prompt_templates: str = _setting(
        "items",
        "a domain of recbole_sdpo/properties/prompts, or a .yaml file of one's own",
        Role.POLICY | Role.PATH,  # a checkpoint holds the prompt itself
        bool,
        "a name",
    )
    prompt_candidates: int = _within(
        2, 1000, 20, "candidates in the text of a training prompt (style 'candidates')"
    )

    backbone: BackboneSettings = _group(BackboneSettings, "", Role.SERVED)

    # Answers, which the metrics ValidRatio and GenHit ask for
    decoding: Literal["free", "constrained"] = _setting(
        "free", "greedy decoding of an answer: of any text, or only of the candidates' titles"
    )
    max_new_tokens: int | None = _within(
        1,
        100_000,
        None,
        "tokens of a free answer at most, or null for those of the longest title",
    )

    # Training
    objective: str = _setting(
        "sdpo",
        "of the second stage; sft stops after the first",
        Role.ALIGNMENT,
        lambda name: name in objectives(),
        lambda: "one of " + ", ".join(objectives()),
    )
    beta: float = _setting(
        1.0,
        "scale of the rewards",
        Role.ALIGNMENT,
        lambda beta: 0 < beta <= 1000,
        "more than 0 and at most 1000",
    )
    reward_margin: float = _within(
        0,
        1000,
        0.0,
        "by how much the reward of a target is to be above those of its negatives",
        Role.ALIGNMENT,
    )
    label_smoothing: float = _setting(
        0.0,
        "share of the preferences that the second stage takes to be the wrong way round",
        Role.ALIGNMENT,
        lambda share: 0 <= share < 0.5,
        "from 0 to below 0.5",
    )
    sft_weight: float = _within(
        0,
        1000,
        0.0,
        "how many times SFT's loss is added to that of the second stage",
        Role.ALIGNMENT,
    )
    rating_margin: float = _within(
        0,
        1000,
        1.0,
        "how many times RecPO's margin of ratings counts (objectives recpo and recpo_ratio)",
        Role.ALIGNMENT,
    )
    unrated_score: float = _setting(
        0.9045,
        "what counts as the rating of a negative, which the user has not rated; the default is for "
        "ratings from 1 to 5",
        Role.ALIGNMENT,
        lambda score: 0 < score <= 1000,
        "more than 0 and at most 1000",
    )
    negative_sources: dict[str, float] | None = _setting(
        None,
        "weights of the sources of negatives, such as {'uniform': 0.5, 'self': 0.5}; self: the "
        "titles that the policy ranks highest, found anew each epoch; or null for "
        "train_neg_sample_args.distribution",
        Role.ALIGNMENT,
        lambda weights: (
            weights is None
            or (
                len(weights) > 0
                and weights.keys() <= SOURCES
                and all(weight > 0 for weight in weights.values())
            )
        ),
        "a dictionary of weights above 0 for " + ", ".join(sorted(SOURCES)),
    )
    fixed_negatives: bool = _setting(
        False,
        "let each target of the second stage keep its negatives and prompt over all epochs",
        Role.ALIGNMENT,
    )
    reference: Literal["auto", "compute", "cache"] = _setting(
        "auto",
        "log-probabilities of the reference; cache keeps those of fixed negatives, auto does so "
        "where they are fixed",
        Role.ALIGNMENT | Role.FREE,
    )
    full_sort: Literal["exact", "topk"] = _setting(
        "exact",
        "ranking the catalogue: score every title, or find the exact top k and bound the rest",
        Role.FREE,
    )
    train_targets: Literal["all", "last"] = _setting(
        "all", "each item of a user's training sequence after the first, or only the last"
    )
    max_train_targets: int | None = _at_least(
        1, None, "targets to an epoch, drawn anew each epoch, or null for all"
    )
    sdpo_max_train_targets: int | None = _at_least(
        1,
        None,
        "the same for the second stage alone, or null for max_train_targets",
        Role.ALIGNMENT,
    )
    title_prior: float = _within(
        0,
        LARGEST,
        1.0,
        "of what a stage adds to the token of a title that n users met in training, n / (n "
        "+ title_prior) is kept (item_tokens=whole): rare titles stay near their words, and one "
        "that nobody met has nothing else; 0 keeps all",
    )
    sft_checkpoint: str | None = _setting(
        None,
        "start at the second stage from this folder",
        Role.IDLE | Role.OF_THIS_RUN | Role.PATH,
    )
    resume: str | None = _setting(
        None,
        "folder of an interrupted run to go on with, under the settings that it had",
        Role.IDLE | Role.FREE | Role.OF_THIS_RUN | Role.EXPERIMENT | Role.PATH,
    )
    parallel: Literal["auto", "ddp", "fsdp"] = _setting(
        "auto",
        "of several processes; ddp: each has the whole model; fsdp: each has a part of it, for "
        "models that one GPU has no room to train; auto: ddp",
        Role.IDLE | Role.FREE | Role.OF_THIS_RUN,
    )
    offload: bool = _setting(
        False,
        "with parallel=fsdp: keep weights, gradients and AdamW's moments in the host's memory, and "
        "step there; a GPU has the layer that it computes",
        Role.IDLE | Role.FREE | Role.OF_THIS_RUN,
    )
    save_minutes: float = _at_least(
        0,
        10.0,
        "minutes between two savings of the state that resume needs; also after each epoch",
        Role.IDLE | Role.FREE,
    )
    run_dir: str | None = _setting(
        None,
        "folder of the run, or null for <checkpoint_dir>/<model>-<dataset>-<time>",
        Role.IDLE | Role.FREE | Role.OF_THIS_RUN | Role.EXPERIMENT | Role.PATH,
    )
    eval_tokens_per_batch: int | None = _at_least(
        1, None, "tokens in a batch when scoring, or null for what suits the device", Role.FREE
    )

    sft: StageSettings = _group(StageSettings, "sft_")
    sdpo: StageSettings = _group(StageSettings, "sdpo_", Role.ALIGNMENT)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from a configuration, of which only the keys named here are read.

        Raises:
            UserError: a value is of the wrong type or out of range.
        """
        read: dict[str, dict[str, Any]] = {}
        for key, setting in SETTINGS.items():
            value = setting.read(values.get(key, setting.default))
            read.setdefault(setting.group, {})[setting.name] = value
        own, backbone = read.pop(""), read["backbone"]
        width, unit = backbone["scratch_hidden_size"], 2 * backbone["scratch_heads"]
        if width % unit:
            raise UserError(
                f"scratch_hidden_size={width} must be a multiple of twice "
                f"scratch_heads={unit // 2}, such as {max(unit, width - width % unit)}."
            )
        return cls(**own, **{name: GROUPS[name](**group) for name, group in read.items()})

    def suited_to(self, backbone: BackboneSettings) -> Settings:
        """With epochs, learning rates and sizes that suit ``backbone`` in place of null."""
        suited = SUITED[backbone.kind]
        stages = {stage: getattr(self, stage).completed(suited[stage]) for stage in suited}
        return replace(self, **stages)

    def suited_to_device(self, training: int, scoring: int) -> CompleteSettings:
        """With so many tokens to a batch in place of null; the rest suits a backbone already."""
        suited = {"tokens_per_batch": training}
        complete = {
            "sft": CompleteStage(**vars(self.sft.completed(suited))),
            "sdpo": CompleteStage(**vars(self.sdpo.completed(suited))),
            "eval_tokens_per_batch": self.eval_tokens_per_batch or scoring,
        }
        return CompleteSettings(**vars(self) | complete)

    def to_flat(self) -> dict[str, Any]:
        """All settings under the names that a configuration uses."""
        return {key: setting.of(self) for key, setting in SETTINGS.items()}

    @property
    def reaches_alignment(self) -> bool:
        """Is there a second stage?"""
        return self.objective != "sft"

    @property
    def constants(self) -> Constants:
        """Of the second stage's loss."""
        return Constants(*(getattr(self, name) for name in Constants._fields))

    @property
    def caches_reference(self) -> bool:
        """Are the reference's log-probabilities kept?"""
        return self.fixed_negatives and self.reference != "compute"

    def targets_limit(self, stage: str) -> int | None:
        """Training targets to an epoch of ``stage``, or None for all."""
        return (self.sdpo_max_train_targets if stage == "sdpo" else None) or self.max_train_targets


@dataclass(frozen=True, kw_only=True)
class CompleteSettings(Settings):
    """Settings that suit a backbone and a device (:meth:`Settings.suited_to_device`)."""

    sft: CompleteStage
    sdpo: CompleteStage
    eval_tokens_per_batch: int


@dataclass(frozen=True)
class Setting:
    """A setting as it is declared.

    Attributes:
        key: its name in a configuration.
        group, name: the attribute of :class:`Settings` that has it, or "", and its name there.
        kinds: the types that its value may be of.
        choices: the words that it is one of, or none if it is no such setting.
        valid: what its value must be, beside of one of these types, in words; or "".
        check: is a value so?
    """

    key: str
    group: str
    name: str
    default: Any
    kinds: tuple[Any, ...]
    choices: tuple[str, ...]
    help: str
    valid: str | Callable[[], str]
    check: Callable[[Any], bool]
    roles: Role

    def of(self, settings: Settings) -> Any:
        """Its value there."""
        return getattr(getattr(settings, self.group) if self.group else settings, self.name)

    def read(self, value: Any) -> Any:
        """``value`` in the form that we keep it in.

        Raises:
            UserError: it is of the wrong type or out of range.
        """
        if self.key == "title_fields" and isinstance(value, str):
            value = [value]
        if isinstance(value, list | tuple):
            value = list(value)
        if float in self.kinds and is_a(value, int) and abs(value) <= LARGEST:
            value = float(value)
        if isinstance(value, dict):  # in one order, which counts
            value = {
                key: float(each) if is_a(each, int) and abs(each) <= LARGEST else each
                for key, each in sorted(value.items(), key=lambda part: str(part[0]))
            }
        given = f"{self.key}={shown(value)}"
        if not any(_is_a(value, kind) for kind in self.kinds):
            raise UserError(f"{given} must be {self.must_be}.")
        parts = value.values() if isinstance(value, dict) else value
        for item in parts if isinstance(value, list | dict) else [value]:
            if isinstance(item, str) and not item.strip():
                raise UserError(
                    f"{self.key}={value!r} must not be blank; leave it out for the default, "
                    f"{self.default!r}."
                )
            if isinstance(item, int | float) and not abs(item) <= LARGEST:
                raise UserError(f"{given} must be a finite number, {LARGEST:,} at most.")
        if not self.check(value):
            raise UserError(f"{given} must be {self.must_be}.")
        return value

    @property
    def valid_words(self) -> str:
        """:attr:`valid`, as it is now."""
        return self.valid if isinstance(self.valid, str) else self.valid()

    @property
    def must_be(self) -> str:
        """Its values in words; of null also what it stands for."""
        kinds = [kind for kind in self.kinds if kind is not type(None)]
        words = self.valid_words
        if not words or {int, float} & set(kinds):
            words = ", ".join(filter(None, [" or ".join(WORDS[kind] for kind in kinds), words]))
        if len(kinds) == len(self.kinds):
            return words
        null = re.search(r"or (null for [^;]*)", self.help)
        return f"{words}, or {null[1] if null else 'null'}"


def _declared(
    cls: type, group: str = "", prefix: str = "", roles: Role = NONE
) -> Iterator[Setting]:
    hints = get_type_hints(cls)
    for f in fields(cls):
        about, hint = f.metadata, hints[f.name]
        if "prefix" in about:
            yield from _declared(hint, f.name, about["prefix"], about["roles"])
            continue
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        kinds = (str,) if choices else get_args(hint) if isinstance(hint, UnionType) else (hint,)
        yield Setting(
            prefix + (about["key"] or f.name),
            group,
            f.name,
            f.default if f.default_factory is MISSING else f.default_factory(),
            kinds,
            choices,
            about["help"],
            "one of " + ", ".join(choices) if choices else about["valid"],
            choices.__contains__ if choices else about["check"],
            about["roles"] | roles,
        )


SETTINGS = {setting.key: setting for setting in _declared(Settings)}
"""Every setting of ours, by its name in a configuration."""

GROUPS: dict[str, Any] = {
    f.name: f.default_factory for f in fields(Settings) if "prefix" in f.metadata
}
"""The class of each attribute of :class:`Settings` that is a group of settings."""

RECBOLE_ROLES = {
    "MAX_ITEM_LIST_LENGTH": Role.FIXED,
    "checkpoint_dir": Role.IDLE | Role.OF_THIS_RUN | Role.PATH,
    "config_files": Role.IDLE | Role.OF_THIS_RUN,
    "data_path": Role.IDLE | Role.PATH,
    "dataset": Role.FIXED | Role.OF_THIS_RUN,
    "eval_args": Role.FIXED,
    "eval_step": Role.FIXED,
    "gpu_id": Role.IDLE | Role.OF_THIS_RUN,
    "log_wandb": Role.IDLE,
    "metric_decimal_place": Role.FIXED,  # a validation's score is rounded, too
    "pre_model_path": Role.PATH,
    "saved": Role.IDLE,
    "seed": Role.FIXED | Role.EXPERIMENT,
    "show_progress": Role.IDLE | Role.OF_THIS_RUN,
    "state": Role.IDLE | Role.OF_THIS_RUN,
    "stopping_step": Role.FIXED,
    "train_neg_sample_args": Role.FIXED | Role.ALIGNMENT,
    "valid_metric": Role.FIXED,
    "verbose": Role.IDLE,
    "wandb_project": Role.IDLE,
}
"""RecBole's settings that have a role in what we do."""


def having(role: Role) -> frozenset[str]:
    """The keys, of ours and of RecBole's, that have ``role``."""
    roles = {key: setting.roles for key, setting in SETTINGS.items()} | RECBOLE_ROLES
    return frozenset(key for key, own in roles.items() if role in own)


def merged_parts(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the settings that have parts, those that both give.

    Who gives one part means to keep the others.
    """
    both = [
        key
        for key in PARTS
        if isinstance(lower.get(key), dict) and isinstance(upper.get(key), dict)
    ]
    return {key: lower[key] | upper[key] for key in both}


def kind_of_negatives(args: Mapping[str, Any], numbers: Mapping[str, int] | None = None) -> str:
    """Where negatives come from, in a word, such as "none", "uniform", "popularity^2" or "8 self +
    7 uniform".

    Args:
        args: ``train_neg_sample_args``.
        numbers: of each of ``negative_sources``, if they are given.
    """

    def named(kind: str) -> str:
        return f"{kind}^{args['alpha']:g}" if kind == "popularity" and args["alpha"] != 1 else kind

    if not numbers:
        return named(args["distribution"])
    return " + ".join(f"{number} {named(kind)}" for kind, number in numbers.items())


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is dict:
        of_key, of_value = get_args(kind)
        return isinstance(value, dict) and all(
            _is_a(key, of_key) and _is_a(each, of_value) for key, each in value.items()
        )
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    return is_a(value, kind)


WORDS: dict[Any, str] = KINDS | {
    list[int]: "a list of whole numbers",
    list[str]: "a list of texts",
    dict[str, float]: "a dictionary of numbers",
}
"""Types of settings in words."""


def _suited(key: str) -> str:
    """What of :data:`SUITED` takes the place of null, in words; empty for most settings."""
    stage, _, name = key.partition("_")
    stages = {kind: suited.get(stage, {}) for kind, suited in SUITED.items()}
    values = [f"{kind} {of[name]}" for kind, of in stages.items() if name in of]
    return f"; suited: {', '.join(values)}" if values else ""


def table(word: str = "", suited: bool = True) -> str:
    """The settings with ``word`` in their row, as a Markdown table.

    Args:
        suited: say what suits each kind of backbone in place of null.

    Raises:
        UserError: there is none.
    """
    rows = []
    for key, setting in SETTINGS.items():
        default = "null" if setting.default is None else setting.default
        valid = f" ({setting.valid_words})" if setting.valid else ""
        rows.append(f"| `{key}` | `{default}` | {setting.help}{valid}{_suited(key) * suited} |")
    rows = [row for row in rows if word.lower() in row.lower()]
    if not rows:
        raise UserError(f"No setting has {word!r} in its name or explanation.")
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])

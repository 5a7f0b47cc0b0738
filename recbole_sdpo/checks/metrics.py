"""Which metrics there are, and what each asks of the other settings."""

from __future__ import annotations

import re
from logging import getLogger
from typing import Any

from recbole.config import Config
from recbole.evaluator.register import metrics_dict
from recbole.utils import EvaluatorType

from recbole_sdpo.errors import UserError, meant
from recbole_sdpo.settings import FILE_MODE, MODEL, Settings
from recbole_sdpo.values import shown

ALIASES = {"hr": "Hit", "hitrate": "Hit", "hitratio": "Hit"}
"""Other names of RecBole's metrics, in lower case."""


def without_aliases(key: str, value: Any) -> Any:
    """``metrics`` and ``valid_metric`` by RecBole's names."""
    if isinstance(value, list):
        names = [without_aliases(key, item) for item in value]
        return [name for place, name in enumerate(names) if name not in names[:place]]
    if not isinstance(value, str):
        return value
    name, at, k = value.partition("@")
    if key == "metrics" and at:  # no name, as the error will say
        return value
    return ALIASES.get(name.lower(), name) + at + k


def metric_key(metric: str) -> str:
    """A metric with its cut-off, such as ``HR@1``, as RecBole's results have it: ``hit@1``."""
    return str(without_aliases("valid_metric", metric)).lower()


def check_metrics(metrics: Any) -> None:
    """There must be such metrics.

    Raises:
        UserError: naming one that there is not, and the nearest right one.
    """
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        if isinstance(metric, str) and metric.lower() not in metrics_dict:
            known = [kind.__name__ for _, kind in sorted(metrics_dict.items())]
            name, _, k = metric.partition("@")
            if k.isdecimal() and name.lower() in [*map(str.lower, known), *ALIASES]:
                hint = f"the cut-off is topk's to say: metrics=[{name!r}] and topk=[{k}]."
            else:
                hint = meant(metric, known)
            raise UserError(f"metrics={shown(metrics)}: there is no metric {metric!r}; {hint}")


def is_of_lists(metric: str) -> bool:
    """Is ``metric``, such as ``ItemCoverage@10``, of what all users get, and not of each target's
    rank?"""
    kind = metrics_dict.get(metric.lower().partition("@")[0])
    return kind is not None and "rec.items" in kind.metric_need


def is_of_answers(metric: str) -> bool:
    """Does the model have to write for it?"""
    return any(need.startswith("answers.") for need in metrics_dict[metric.lower()].metric_need)


def check_valid_metric(config: Config) -> None:
    """It must be one that is computed.

    Raises:
        UserError: it is not.
    """
    metrics = [metric.lower() for metric in config["metrics"]]
    ranked = config["eval_type"] == EvaluatorType.RANKING
    computed = []
    for metric in metrics:
        needed = metrics_dict[metric].metric_need
        alone = not ranked or is_of_answers(metric) or "rec.meanrank" in needed
        computed += [metric] if alone else [f"{metric}@{k}" for k in config["topk"]]
    if config["valid_metric"].lower() not in computed:
        raise UserError(
            f"valid_metric={config['valid_metric']!r} is not computed; with these metrics and "
            f"topk, it must be one of {', '.join(computed)}."
        )


def _modes(config: Config, settings: Settings) -> set[str]:
    """Those of all candidates of a run. A file has the test's, and may have no validation's."""
    given = {"test": FILE_MODE} if settings.candidates_file else {}
    return {*(config["eval_args"]["mode"] | given).values(), *settings.more_candidates}


def check_lists(config: Config, settings: Settings) -> None:
    """What all users get is judged where they get it from the whole catalogue alone.

    Raises:
        UserError: ``valid_metric`` is of lists, and there are other candidates.
    """
    modes = _modes(config, settings)
    if is_of_lists(config["valid_metric"]) and modes != {"full"}:
        raise UserError(
            f"valid_metric={config['valid_metric']!r} must be of a target's rank, such as NDCG@5: "
            f"there are candidates ({', '.join(sorted(modes))}) that it does not judge."
        )


def check_answers(config: Config, settings: Settings) -> None:
    """Metrics of answers in words need a model that writes, and sampled candidates.

    Raises:
        UserError: they have not.
    """
    asked = [metric for metric in config["metrics"] if is_of_answers(metric)]
    if asked and config["model"] != MODEL:
        raise UserError(
            f"metrics={config['metrics']}: {asked[0]} needs an answer in words, and "
            f"{config['model']} writes none; leave it out."
        )
    modes = [*config["eval_args"]["mode"].values(), *settings.more_candidates]
    if asked and not all(re.fullmatch("(uni|pop)[0-9]+", mode) for mode in modes):
        raise UserError(
            f"metrics={config['metrics']}: {asked[0]} needs sampled candidates, such as "
            f"eval_args.mode=uni19 (now {', '.join(modes)})."
        )
    if asked and settings.decoding == "constrained" and settings.max_new_tokens:
        getLogger().warning(
            f"max_new_tokens={settings.max_new_tokens} has no effect with decoding='constrained', "
            "which writes whole titles."
        )
    if config["model"] == MODEL and not asked:
        for key in sorted({"decoding", "max_new_tokens"} & set(config.external_config_dict)):
            getLogger().warning(
                f"{key}={config[key]!r} has no effect without answers; add ValidRatio or GenHit "
                "to metrics."
            )


def check_topk(config: Config, items: int) -> None:
    """RecBole's top k must not ask for more items than there are.

    Args:
        items: of the catalogue, without the padding.

    Raises:
        UserError: it does; RecBole would find out at its first evaluation.
    """
    if config["eval_type"] == EvaluatorType.RANKING and max(config["topk"]) > items:
        raise UserError(
            f"topk={config['topk']} asks for more than the {items} items that there are; give "
            "smaller ones."
        )


def warn_of_hits_of_all(config: Config, mode: str, candidates: int) -> None:
    """Among as many candidates as the cut-off or fewer, each target is a hit."""
    counts = sorted({metric.lower() for metric in config["metrics"]} & {"hit", "recall"})
    for k in config["topk"]:
        if counts and k >= candidates:
            names = " and ".join(f"{name.title()}@{k}" for name in counts)
            getLogger().warning(
                f"topk={k}: {names} of {mode} is 1 for every model, as it has {candidates} "
                "candidates."
            )


def check_full_sort(config: Config, settings: Settings) -> None:
    """Bounds in place of scores serve metrics of the top k alone.

    Raises:
        UserError: a metric or a setting needs all scores.
    """
    if settings.full_sort == "topk":
        modes = _modes(config, settings)
        if "full" not in modes:
            getLogger().warning(
                f"full_sort='topk' has no effect on {', '.join(sorted(modes))}: candidates that "
                "are a sample."
            )
            return
        for metric in config["metrics"]:
            needed = set(metrics_dict[metric.lower()].metric_need)
            if needed & {"rec.score", "rec.meanrank"}:
                raise UserError(
                    f"full_sort='topk' finds the top k alone, and metric {metric} needs all "
                    "scores; set full_sort='exact'."
                )
        if settings.popularity_discount:
            raise UserError(
                "full_sort='topk' finds the top k by log-probability, which "
                f"popularity_discount={settings.popularity_discount} does "
                "not rank by; set full_sort='exact'."
            )

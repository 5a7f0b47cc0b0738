"""What a run says of itself: at its beginning what it is, at its end the table of its tests."""

from __future__ import annotations

from logging import getLogger
from typing import Any

import numpy as np
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import set_color

from recbole_sdpo.checks.metrics import is_of_lists
from recbole_sdpo.config import RunConfig
from recbole_sdpo.evaluator.answers import OF_ANSWERS
from recbole_sdpo.evaluator.audit import BY_POPULARITY, floor_rows
from recbole_sdpo.evaluator.lists import OF_LISTS
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.report.table import markdown_table
from recbole_sdpo.settings import FILE_MODE, MODEL, kind_of_negatives


def log_head(
    config: RunConfig,
    model: AbstractRecommender,
    targets: int,
    test_data: AbstractDataLoader,
    sha256: dict[str, str],
) -> None:
    """Log what is trained on what, and the candidates of each mode.

    Args:
        targets: of an epoch.
        sha256: of the candidates, by mode.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = {
        "model": config["model"],
        "parameters trained": f"{trained:,}",
        "training targets": f"{targets:,}",
    }
    if config["model"] == MODEL:
        total = sum(p.numel() for p in model.parameters())
        backbone = model.backbone
        why = (
            f" (backbone=auto on {config['device']}; choose with --backbone, --item_tokens, --peft)"
            if model.settings.backbone.name == "auto"
            else ""
        )
        lines["backbone"] = (
            f"{backbone.name}{why}, {total:,} parameters in {backbone.dtype}, "
            f"item_tokens {backbone.item_tokens}, peft {backbone.peft}"
        )
        if model.negatives:
            kind = kind_of_negatives(config["train_neg_sample_args"], model.sources)
            lines["negatives"] = (
                f"{model.negatives} to a target, {kind}, never of the user's training items"
            )
    if config.settings.popularity_discount:
        lines["ranked by"] = (
            f"score less {config.settings.popularity_discount:g} times log popularity"
        )
    lines["device"] = str(config["device"])
    met = "without" if config.settings.candidates_exclude_history else "with"
    drawn, given = f"{met} what their users have met", f"of {config.settings.candidates_file}"
    for mode, digest in sha256.items():
        lines[f"candidates {mode}"] = (
            f"{len(test_data._dataset):,} test targets, {given if mode == FILE_MODE else drawn}, "
            f"sha256 {digest[:16]}…"
        )
    getLogger().info(
        "\n".join(f"{set_color(key, 'blue')}: {value}" for key, value in lines.items())
    )


def table_of_tests(result: dict[str, Any]) -> str:
    """The tests of a run's ``result`` in Markdown, a row for each stage, popularity first."""
    tested = result["test_result"]
    metrics = [
        name for name in ("hit@1", "ndcg@5", "mrr@10", *OF_ANSWERS) if name in tested
    ] or list(tested)[:3]
    longest = max(np.atleast_1d(result["settings"]["topk"]))
    metrics += [name for name in tested if is_of_lists(name) and name.endswith(f"@{longest}")]
    after = {"sft": "SFT", "sdpo": OBJECTIVES[result["settings"].get("objective", "sdpo")].title}
    rows = [("popularity", result["popularity"])]
    for stage, report in result["stages"].items():
        rows.append(
            (
                f"{result['model']} after {after[stage]}" if stage in after else result["model"],
                report["test"],
            )
        )
    if discount := result["settings"]["popularity_discount"]:
        rows[-1] = (f"{rows[-1][0]}, less {discount:g} x log popularity", rows[-1][1])
    if result["settings"]["audit"]:
        audit = result["audit"].get(next(iter(result["candidates_sha256"])))
        floor = floor_rows(audit) if audit else {}
        rows[1:1] = [row for row in floor.items() if not row[0].startswith(BY_POPULARITY)]
    return markdown_table(
        ["test", *map(_column, metrics)],
        [[label, *(values.get(name, "") for name in metrics)] for label, values in rows],
    )


def _column(metric: str) -> str:
    """A metric, which RecBole writes in lower case, as the head of a column."""
    name, at, k = metric.partition("@")
    if kind := (OF_ANSWERS | OF_LISTS).get(name):
        return f"{kind.__name__}{at}{k}"
    return metric.upper().replace("HIT", "HR")

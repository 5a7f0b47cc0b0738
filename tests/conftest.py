"""Tiny datasets and models; nothing here reaches a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import sys
from copy import deepcopy
from pathlib import Path

import hypothesis
import pytest
import torch

import recbole_sdpo  # noqa: F401  registers the plugin
from recbole_sdpo.lm import backbone

torch.set_num_threads(1)  # tiny models are slower on more
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is slow at times
hypothesis.settings.load_profile("any machine")

TINY = {
    "backbone": "scratch",
    "scratch_hidden_size": 32,
    "scratch_layers": 2,
    "scratch_heads": 2,
    "scratch_vocab_size": 300,
    "scratch_dropout": 0.0,
    "show_progress": False,
    "MAX_ITEM_LIST_LENGTH": 8,
    "eval_args": {"mode": "uni5"},
    "train_neg_sample_args": {"sample_num": 3},
    "sft_epochs": 2,
    "sft_learning_rate": 1e-3,
    "sft_tokens_per_batch": 1024,
    "sdpo_epochs": 1,
    "sdpo_learning_rate": 3e-4,
    "sdpo_tokens_per_batch": 1024,
}


def write_dataset(
    folder: Path, sequences: list[list[int]], titles: dict[int, str] | None, name: str = "toy"
) -> Path:
    """Atomic files of the given item sequences; returns the data path for RecBole."""
    target = folder / name
    target.mkdir(parents=True)
    rows = [
        f"u{u}\ti{item}\t{step}"
        for u, items in enumerate(sequences)
        for step, item in enumerate(items)
    ]
    (target / f"{name}.inter").write_text(
        "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n"
    )
    if titles is not None:
        lines = [f"i{item}\t{title}" for item, title in titles.items()]
        (target / f"{name}.item").write_text(
            "\n".join(["item_id:token\ttitle:token_seq", *lines]) + "\n", encoding="utf-8"
        )
    return folder


LONGEST = ["test_distributed", "test_runner", "test_faults", "test_versions", "test_benchmarks"]
"""Files that take minutes, which go first, so that no process waits for another's at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    """RecBole reads sys.argv and writes logs into the working directory."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # caches, too
    # the same on every machine, with AMX or without
    monkeypatch.setattr(backbone, "bf16_is_fast", lambda device: device.type == "cuda")
    torch.manual_seed(0)


@pytest.fixture
def ring(tmp_path) -> dict:
    """A dataset with a rule, item n is followed by n + 1, and the settings to train on it."""
    items, length = 24, 12
    sequences = [
        [1 + (start + step) % items for step in range(length)]
        for start in range(items)
        for _ in range(3)
    ]
    words = ["red", "green", "blue", "black", "white", "grey"]
    shapes = ["cube", "ball", "cone", "ring"]
    titles = {i + 1: f"{words[i % 6]} {shapes[i // 6]}" for i in range(items)}
    return deepcopy(TINY) | {  # RecBole itself fills in dictionaries that it is given
        "data_path": str(write_dataset(tmp_path / "data", sequences, titles)),
        "checkpoint_dir": str(tmp_path / "saved"),
    }


@pytest.fixture
def rated(ring) -> dict:
    """The toy data with a rating of 1 to 5 and a class of its items."""
    folder = Path(ring["data_path"]) / "toy"
    for name, column in (("toy.inter", "rating:float"), ("toy.item", "class:token")):
        head, *rows = (folder / name).read_text().splitlines()
        (folder / name).write_text(
            "\n".join([f"{head}\t{column}", *(f"{row}\t{1 + n % 5}" for n, row in enumerate(rows))])
            + "\n"
        )
    return ring

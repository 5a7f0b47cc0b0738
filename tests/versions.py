"""What this Python, with its libraries, makes of one and the same data, for two of them to be
compared.

python -m tests.versions old.json
    on one stack; a minute or two on one core
python -m tests.versions new.json --same-as old.json
    on another: says what differs, and ends with 1 if anything does
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import argparse
import contextlib
import copy
import hashlib
import io
import json
import platform
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import recbole
import scipy
import torch
import yaml
from recbole.data import data_preparation
from recbole.data.dataset import Dataset
from recbole.utils import init_seed

import recbole_sdpo  # noqa: F401  registers the plugin
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.digests import package_versions
from recbole_sdpo.quick_start import run

USERS, EVENTS, ITEMS = 30, 10, 60

HOLES: dict[str, Any] = {
    "load_col": None,
    "show_progress": False,
    "state": "error",
    "MAX_ITEM_LIST_LENGTH": 6,
    "eval_args": {"mode": "uni5"},
    "topk": [1, 5],
    "epochs": 1,
    "train_batch_size": 64,
    "numerical_features": ["price", "age", "rating"],
}
"""Settings under which a model of RecBole's runs on the data of :func:`write_holes` in a second."""

OWN = {"selected_features": ["brand", "genres"], "item_attribute": "genres", "pretrain_epochs": 1}
"""More of them, for the models that have such a setting."""

MORE: dict[str, dict[str, Any]] = {
    "as they are": {},
    "first of each item": {"rm_dup_inter": "first"},
    "last of each item": {"rm_dup_inter": "last"},
    "filtered": {
        "user_inter_num_interval": "[4,inf)",
        "item_inter_num_interval": "[2,inf)",
        "val_interval": {"rating": "[2,inf)"},
    },
    "normalised": {"normalize_all": True},
    "discretised": {
        "discretization": {"price": {"method": "ED", "bucket": 4}, "age": {"method": "LD"}}
    },
    "split by ratio": {
        "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "user", "mode": "uni5"}
    },
    "with strangers": {"filter_inter_by_user_or_item": False},
}
"""Settings of RecBole's data, each with its own code."""

SHORT = {"max_train_targets": 3000, "sft_epochs": 2, "sdpo_epochs": 1}
"""Settings of a short run of SDPO-LLM on ml-100k: half a minute on one core."""


def write_holes(folder: Path) -> str:
    """Files of every kind and columns of every type; of each but ids and times a fifth is
    missing. Returns the data path."""
    draw = random.Random(5)

    def some(value: object) -> str:
        return "" if draw.random() < 0.2 else str(value)

    def words(kinds: str) -> str:
        return some(" ".join(draw.choices(kinds, k=draw.randint(1, 3))))

    # Items come again, and three events have one time.
    events = [
        (f"u{n}", f"i{(7 * n + step % 7) % ITEMS}", 10**9 + 60 * (step // 3) + n)
        for n in range(USERS)
        for step in range(EVENTS)
    ]
    draw.shuffle(events)
    files = {
        "inter": (
            "user_id:token item_id:token timestamp:float rating:float mood:token notes:token_seq",
            [
                (*event, some(draw.randint(1, 5)), some(draw.choice("xyz")), words("abc"))
                for event in events
            ],
        ),
        "item": (  # of some items there is no row
            "item_id:token title:token_seq genres:token_seq brand:token price:float "
            "shape:float_seq",
            [
                (
                    f"i{item}",
                    words("klmn"),
                    words("defg"),
                    some(draw.choice("pqr")),
                    some(draw.random()),
                    some(f"{draw.random()} 2"),
                )
                for item in range(ITEMS - 2)
            ],
        ),
        "user": (
            "user_id:token age:float town:token",
            [
                (f"u{user}", some(draw.randint(9, 99)), some(draw.choice("st")))
                for user in range(USERS - 2)
            ],
        ),
        "kg": (
            "head_id:token relation_id:token tail_id:token",
            [
                (f"e{item % ITEMS}", f"r{draw.randrange(3)}", f"e{draw.randrange(2 * ITEMS)}")
                for item in range(2 * ITEMS)
            ],
        ),
        "link": (
            "item_id:token entity_id:token",
            [(f"i{item}", f"e{item}") for item in range(ITEMS)],
        ),
    }
    (folder / "holes").mkdir(parents=True)
    for end, (head, rows) in files.items():
        lines = ["\t".join(map(str, row)) for row in [head.split(" "), *rows]]
        (folder / "holes" / f"holes.{end}").write_text("\n".join(lines) + "\n")
    return str(folder)


def model_settings() -> dict[str, dict[str, Any]]:
    """What RecBole has for each of its models."""
    files = sorted((Path(recbole.__file__).parent / "properties" / "model").glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) or {} for file in files}


def fate(model: str, names: Iterable[str], data_path: str, folder: Path) -> dict[str, float] | str:
    """The metrics of ``model``, with settings of ``names``, after an epoch on the data with
    holes, or the error that it ends with."""
    given = (
        copy.deepcopy(HOLES)
        | {name: OWN[name] for name in names if name in OWN}
        | {"data_path": data_path}
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run(
                model, "holes", config_dict=given | {"run_dir": str(folder / model)}, saved=False
            )["test_result"]
    # RecBole's models fail in many ways, and each must fail alike on all stacks
    except Exception as error:
        first, *_ = [*str(error).replace(str(folder), "").splitlines(), ""]
        return f"{type(error).__name__}: {first}"


def digest(dataset: Dataset) -> str:
    """Of all tables and ids of a dataset that is split."""
    found = hashlib.sha256()
    for name in dataset.feat_name_list:
        table = getattr(dataset, name)
        for field in sorted(table.columns):
            values = table[field]
            values = (
                values.numpy() if isinstance(values, torch.Tensor) else np.array(values.tolist())
            )
            found.update(
                f"{name} {field} {values.dtype.kind} {values.shape}".encode() + values.tobytes()
            )
    for field, tokens in sorted(dataset.field2id_token.items()):
        found.update(f"{field} {list(map(str, tokens))}".encode())
    return found.hexdigest()


def splits(model: str, dataset: str, **given: Any) -> list[str]:
    """Digests of what ``model`` trains, validates and tests on."""
    config = RunConfig(model, dataset, config_dict=given)
    init_seed(config["seed"], config["reproducibility"])
    return [digest(loader._dataset) for loader in data_preparation(config, create_dataset(config))]


def figures(model: str, folder: Path, **given: Any) -> dict[str, Any]:
    """What a run on ml-100k finds: candidates, mean losses, metrics."""
    run_dir = folder / f"ml-100k {model}"
    result = run(
        model,
        "ml-100k",
        config_dict=given | {"show_progress": False, "state": "error", "run_dir": str(run_dir)},
        saved=False,
    )
    of_stages = {
        name: {key: stage[key] for key in ("valid", "test", "targets", "tokens")}
        for name, stage in result["stages"].items()
    }
    if (run_dir / "steps.csv").is_file():
        for stage, loss in (
            pd.read_csv(run_dir / "steps.csv").groupby("stage")["loss"].mean().items()
        ):
            of_stages[stage]["loss"] = round(loss, 4)
    return {
        key: result[key] for key in ("candidates_sha256", "popularity", "training_targets")
    } | of_stages


def found(folder: Path) -> dict[str, Any]:
    """All that is compared."""
    data_path = write_holes(folder)
    split = {f"{model}, ml-100k": splits(model, "ml-100k") for model in ("BPR", "SASRec")}
    for model in ("FM", "SASRec", "KGAT"):
        for name, given in MORE.items():
            split[f"{model}, holes {name}"] = splits(
                model, "holes", **copy.deepcopy(HOLES | given), data_path=data_path
            )
    return {
        "splits": split,
        "figures": {
            "Pop": figures("Pop", folder),
            "SDPO-LLM": figures("SDPO-LLM", folder, **SHORT),
        },
        "models": {
            model: fate(model, names, data_path, folder)
            for model, names in model_settings().items()
        },
    }


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two findings are not the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in one | other
            for line in differences(one.get(key), other.get(key), f"{at} / {key}" if at else key)
        ]
    return [] if one == other else [f"{at}: {one} and {other}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where to write what is found")
    parser.add_argument("--same-as", type=Path, help="what another stack found")
    args, sys.argv = parser.parse_args(), sys.argv[:1]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = json.loads(json.dumps(found(Path(folder))))
    stack = (
        {"python": platform.python_version()} | package_versions() | {"scipy": scipy.__version__}
    )
    args.file.write_text(json.dumps({"stack": stack, "found": made}, indent=1) + "\n")
    trained = sum(isinstance(result, dict) for result in made["models"].values())
    print(
        f"{len(made['models'])} models: {trained} with metrics, {len(made['models']) - trained} "
        "with an error."
    )
    if args.same_as:
        lines = differences(json.loads(args.same_as.read_text())["found"], made)
        print("\n".join(lines) or "Nothing differs.")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()

"""Checkpoints, data, caches and YAML from elsewhere hold what would run; none of it does."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

from tests.faults import crashes, kills, toy
from tests.faults.judge import ended_well
from tests.faults.trial import Trial, command, recommend
from tests.faults.warm import Program

LONG, SHORT = 150, 5


class Evil:
    """Pickled, it runs an expression when it is read."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __reduce__(self) -> tuple:
        return eval, (self.expression,)


def attempt(trial: Trial) -> str:
    """One thing from elsewhere, used in one way; code that ran has left a marker."""
    way = trial.draw.choice(
        [
            a_checkpoint,
            a_checkpoint,
            a_backbone,
            pickled_data,
            a_cache,
            a_state,
            yaml_files,
            an_experiment,
            atomic_files,
        ]
    )
    return "result" if way(trial) else "sentence"


def _poison(value: Any, evil: str, draw: random.Random) -> Any:
    """JSON in which one value is replaced by text that would run where it is evaluated."""
    texts = [
        evil,
        f"[{evil}]",
        f"{{'mode': {evil}}}",
        f'!!python/object/apply:eval ["{evil}"]',
        f"{{{{ {evil} }}}}",
    ]
    if isinstance(value, dict) and value:
        key = draw.choice([*value])
        return value | {key: _poison(value[key], evil, draw)}
    return draw.choice(texts)


def _module(folder: Path, evil: str) -> dict[str, Any]:
    """A module of a model's own in ``folder``; returns what names it in ``config.json``."""
    text = (
        f"{evil}\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    )
    text += "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
    text += "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
    text += "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "evil.py").write_text(text)
    return {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer"] * 2,
    }


def _infect(folder: Path, trial: Trial) -> str:
    """Put something into a folder that ``transformers`` loads; returns what."""
    evil, draw = trial.evil, trial.draw
    sort = draw.choice(
        ["a module", "a module", "a module under another type", "pickled weights", "a template"]
    )
    config = folder / (
        "adapter_config.json" if (folder / "adapter_config.json").is_file() else "config.json"
    )
    if sort.startswith("a module"):
        named = _module(folder, evil)
        for file in (folder / "config.json", folder / "tokenizer_config.json", config):
            content = json.loads(file.read_text()) if file.is_file() else {}
            content["auto_map"] = named
            if file.name == "config.json" and "another" in sort:
                content["model_type"] = "evil"
            file.write_text(json.dumps(content))
    elif sort == "pickled weights":
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        for name in ("pytorch_model.bin", "adapter_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Evil(evil)))
    else:
        (folder / "chat_template.jinja").write_text(
            f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{% {evil} %}}"
        )
    return sort


def a_checkpoint(trial: Trial) -> bool:
    """A run's folder from elsewhere: to recommend from, to align from, or to load as a backbone."""
    variant = trial.draw.choice(["scratch", "lora"])
    kills.alone(trial, variant)
    shutil.copytree(
        trial.folder.parent / "shared" / f"alone-{variant}" / "run", trial.folder / "run"
    )
    use = trial.draw.choice(["recommend", "recommend", "sft_checkpoint", "backbone"])
    part = trial.folder / "run" / ("sft" if use == "sft_checkpoint" else "sdpo")
    sort = trial.draw.choice(
        ["data.json", "data.json", "settings.json", "trust", "files", "saved data"]
    )
    if sort.endswith(".json"):
        file = part / sort
        content = json.loads(file.read_text())
        for _ in range(trial.draw.choice([1, 1, 3])):
            content = _poison(content, trial.evil, trial.draw)
        if (
            sort == "data.json"
            and isinstance(content, dict)
            and isinstance(content.get("settings"), dict)
        ):
            known = [
                "title_fields",
                "load_col",
                "seq_len",
                "metrics",
                "eval_args",
                "run_dir",
                "backbone",
                "prompt_templates",
                "benchmark_filename",
            ]
            content["settings"][trial.draw.choice(known)] = trial.draw.choice(
                [trial.evil, f"[{trial.evil}]"]
            )
        file.write_text(json.dumps(content))
    elif sort == "trust":
        backbone = trial.folder / "elsewhere"
        shutil.copytree(trial.backbone, backbone)
        _infect(backbone, trial)
        for name, other in (
            ("settings.json", {"trust_remote_code": True, "backbone": str(backbone)}),
            ("data.json", {"backbone": str(backbone)}),
        ):
            content = json.loads((part / name).read_text()) | other
            if name == "data.json":
                content["settings"] |= {"trust_remote_code": True, "backbone": str(backbone)}
            (part / name).write_text(json.dumps(content))
    elif sort == "files":
        sort = _infect(part, trial)
    else:
        content = json.loads((part / "data.json").read_text())
        content["settings"] |= {"checkpoint_dir": str(trial.folder / "saved")} | {
            key: str(trial.folder / "saved" / "toy.pth")
            for key in ("dataset_save_path", "dataloaders_save_path")
        }
        (part / "data.json").write_text(json.dumps(content))
        _pickles(trial.folder / "saved", trial.evil)
    trial.what = f"{use} of {variant} with {sort}"
    if use == "recommend":
        return ended_well(
            Program(trial.folder, recommend, ["--checkpoint=run/sdpo", "--user=u1"]).ending()
        )
    _, settings = kills.settings_of(trial, variant)
    other = {"sft_checkpoint": "run"} if use == "sft_checkpoint" else {"backbone": "run/sdpo"}
    return ended_well(trial.run(settings | other | {"run_dir": "mine"}))


def _pickles(folder: Path, evil: str) -> None:
    """Every file that RecBole would unpickle unasked."""
    folder.mkdir(exist_ok=True)
    models = ["SDPO-LLM", "BPR", "SASRec", "Pop"]
    kinds = [
        "Dataset",
        "SequentialDataset",
        *(f"{model}Dataset" for model in models),
        *(f"for-{model}-dataloader" for model in models),
    ]
    for name in [f"toy-{kind}.pth" for kind in kinds] + ["toy.pth"]:
        (folder / name).write_bytes(pickle.dumps(Evil(evil)))


def pickled_data(trial: Trial) -> bool:
    """Files that RecBole would unpickle lie where it looks, and are named or not."""
    model = trial.draw.choice(["SDPO-LLM", "BPR", "SASRec", "Pop"])
    _pickles(trial.folder / "saved", trial.evil)
    shutil.copytree(trial.data, trial.folder / "data")
    _pickles(trial.folder / "data" / "toy", trial.evil)
    trial.what = f"pickles where {model} looks for saved data"
    return ended_well(trial.run(toy.settings(model, data_path="data"), model=model))


def a_backbone(trial: Trial) -> bool:
    """A backbone that brings code, and nobody asked to run it."""
    shutil.copytree(trial.backbone, trial.folder / "elsewhere")
    sort = _infect(trial.folder / "elsewhere", trial)
    trial.what = f"backbone with {sort}"
    _, settings = kills.settings_of(trial, "lora")
    return ended_well(trial.run(settings | {"backbone": "elsewhere"}), ["backbone"])


def a_cache(trial: Trial) -> bool:
    """A cache that somebody filled before."""
    kills.alone(trial, "fixed negatives")
    shutil.copytree(
        trial.folder.parent / "shared" / "alone-fixed negatives" / "cache", trial.folder / "cache"
    )
    trial.what = "a pickle in the reference cache"
    for file in (trial.folder / "cache").rglob("*.*"):
        if file.is_file():
            file.write_bytes(
                _pickled_array(trial.evil)
                if trial.draw.random() < 0.7
                else pickle.dumps(Evil(trial.evil))
            )
    _, settings = kills.settings_of(trial, "fixed negatives")
    return ended_well(trial.run(settings))


def _pickled_array(evil: str) -> bytes:
    header = str({"descr": "|O", "fortran_order": False, "shape": (1,)}).ljust(117) + "\n"
    return (
        b"\x93NUMPY\x01\x00"
        + len(header).to_bytes(2, "little")
        + header.encode()
        + pickle.dumps(Evil(evil))
    )


def a_state(trial: Trial) -> bool:
    """An interrupted run from elsewhere goes on."""
    variant = "more candidates"
    _, settings = kills.settings_of(trial, variant)

    def make(folder: Path) -> None:
        at = int(0.8 * len(crashes.moments(trial, variant)))
        trial.start(settings, folder=folder, first=crashes.Writes(folder, at).watch).ending()

    shutil.copytree(trial.shared(f"interrupted-{variant}-0.8", make) / "run", trial.folder / "run")
    files = sorted(
        file
        for file in (trial.folder / "run").rglob("*")
        if file.suffix in (".json", ".safetensors")
    )
    file = trial.draw.choice(files)
    trial.what = f"resume of a run with evil in {file.relative_to(trial.folder)}"
    if file.suffix == ".json":
        file.write_text(json.dumps(_poison(json.loads(file.read_text()), trial.evil, trial.draw)))
    else:
        file.write_bytes(pickle.dumps(Evil(trial.evil)))
    del settings["run_dir"]
    return ended_well(trial.run(settings | {"resume": "run"}))


TAGS = [
    "!!python/object/apply:eval",
    "!!python/object/new:eval",
    "!!python/object/apply:builtins.eval",
]


def yaml_files(trial: Trial) -> bool:
    """A file of settings, or of templates, with YAML that makes objects."""
    tag = trial.draw.choice(TAGS)
    place = trial.draw.choice(["settings", "templates"])
    trial.what = f"{tag} in a file of {place}"
    evil = f'seed: {tag} ["{trial.evil}"]\n'
    name = "evil.yaml"
    (trial.folder / name).write_text(evil)
    if place == "templates":
        return ended_well(
            trial.run(toy.settings("SDPO-LLM", data_path=str(trial.data), prompt_templates=name))
        )
    (trial.folder / name).write_text(evil + f"data_path: {trial.data}\n")
    return ended_well(
        Program(
            trial.folder, command, ["--model=Pop", "--dataset=toy", f"--config_files={name}"]
        ).ending()
    )


def an_experiment(trial: Trial) -> bool:
    """An experiment's file with text or YAML that would run; it is planned, and no run of it
    begins."""
    key = trial.draw.choice(
        [
            "title",
            "dataset",
            "seeds",
            "candidates",
            "metrics",
            "baselines",
            "tries",
            "base",
            "name",
            "model",
            "seed_",
            "title_fields",
            "sft_epochs",
        ]
    )
    text = trial.draw.choice(
        [
            json.dumps(trial.evil),
            f'{trial.draw.choice(TAGS)} ["{trial.evil}"]',
            json.dumps(f"[{trial.evil}]"),
        ]
    )
    trial.what = f"{key} of an experiment is {text[:40]}"
    run = {"name": "a", "model": "Pop"}
    lines = ["title: t", "dataset: toy"]
    if key in ("name", "model"):
        run[key] = "EVIL"
    elif key in ("title_fields", "sft_epochs", "seed_"):
        run["settings"] = {key: "EVIL"}
    else:
        lines = [line for line in lines if not line.startswith(key)] + [f"{key}: {text}"]
    lines.append(f"runs: [{json.dumps(run)}]".replace('"EVIL"', text))
    if key not in ("title_fields", "sft_epochs", "seed_", "model"):
        lines[-1] = f"runs: [{json.dumps(run | {'settings': {'no_such_setting': 1}})}]".replace(
            '"EVIL"', text
        )
    (trial.folder / "evil.yaml").write_text("\n".join(lines) + "\n")
    return ended_well(Program(trial.folder, command, ["--experiment=evil.yaml"]).ending())


def atomic_files(trial: Trial) -> bool:
    """Data whose names, types and texts would run where they are evaluated."""
    shutil.copytree(trial.data, trial.folder / "data")
    place = trial.draw.choice(["header", "title", "id", "time"])
    trial.what = f"evil in the {place} of a dataset"
    end = "item" if place == "title" else "inter"
    file = trial.folder / "data" / "toy" / f"toy.{end}"
    lines = file.read_text().splitlines()
    row = 0 if place == "header" else trial.draw.randrange(1, len(lines))
    cells = lines[row].split("\t")
    column = {"title": 1, "id": 0, "time": 2, "header": trial.draw.randrange(len(cells))}[place]
    cells[column] = cells[column] + ":" + trial.evil if place == "header" else trial.evil
    lines[row] = "\t".join(cells)
    file.write_text("\n".join(lines) + "\n")
    model = trial.draw.choice(["SDPO-LLM", "BPR", "SASRec"])
    return ended_well(trial.run(toy.settings(model, data_path="data"), model=model))

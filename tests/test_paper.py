"""The recipes of configs/paper: each on two layers of its architecture, with a tokenizer of its
kind, one step of each stage."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from recbole_sdpo import quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.prompts import Templates
from tests.conftest import TINY, write_dataset

PAPER = Path(__file__).parents[1] / "configs" / "paper"
TITLES = {
    i + 1: f"{word} {shape}"
    for i, (word, shape) in enumerate(
        (w, s) for w in ("red", "blue", "grey", "pink") for s in "abcdef"
    )
}

FOUR_BITS = {"llama2-7b", "llama3-8b", "mistral-7b", "pythia-2.8b"}
SHAPE = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = {"model_type": "llama", "num_key_value_heads": 4}
# Architecture, and of the tokenizer its kind and its opening token.
BACKBONES = {
    "llama2-7b": (LLAMA, "sentencepiece", "<s>"),
    "llama3-8b": (
        LLAMA | {"num_key_value_heads": 2, "rope_theta": 5e5},
        "bytes",
        "<|begin_of_text|>",
    ),
    "mistral-7b": (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 4096},
        "sentencepiece",
        "<s>",
    ),
    "pythia-2.8b": ({"model_type": "gpt_neox", "use_parallel_residual": True}, "bytes", None),
    "qwen2.5-1.5b": (
        {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
        "bytes",
        None,
    ),
    "smollm2-135m": (
        LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "bytes",
        None,
    ),
}


def tokenizer(kind: str, opening: str | None) -> PreTrainedTokenizerFast:
    """Blanks as ▁ with bytes to fall back on, as in SentencePiece's BPE; or BPE over bytes, as
    in GPT-2's."""
    special = [opening or "<|endoftext|>", "<unk>"]
    if kind == "sentencepiece":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    made.train_from_iterator([*TITLES.values(), "The next item chosen is one of these"], trainer)
    if opening:
        made.post_processor = processors.TemplateProcessing(
            f"{opening} $A", special_tokens=[(opening, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=opening, eos_token=special[0], unk_token="<unk>"
    )


def save_backbone(folder: Path, name: str) -> str:
    architecture, kind, opening = BACKBONES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **architecture, **SHAPE, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(kind, opening).save_pretrained(folder)
    return str(folder)


def sequences():
    return [[1 + (start + step) % 24 for step in range(12)] for start in range(24)]


def recipe(*names: str) -> list[str]:
    return [str(PAPER / f"{name}.yaml") for name in ("s-dpo", *names)]


SMALL = {
    "show_progress": False,
    "prompt_candidates": 5,
    "max_new_tokens": 8,
    "eval_args": {"mode": "uni4"},
    "max_train_targets": 6,
    "max_eval_targets": 8,
    "sft_epochs": 1,
    "sdpo_epochs": 1,
    "run_dir": "run",
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_recipe_takes_a_step_of_each_stage(name, tmp_path):
    data = write_dataset(tmp_path / "data", sequences(), TITLES)
    given = SMALL | {"data_path": str(data), "backbone": save_backbone(tmp_path / "backbone", name)}
    seen = {}
    build = quick_start.get_trainer

    def keep(*kind):
        return lambda config, model: seen.setdefault("trainer", build(*kind)(config, model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick_start, "get_trainer", keep)
        result = quick_start.run("SDPO-LLM", "toy", recipe(name), given)
    settings, model = result["settings"], seen["trainer"].model
    assert pd.read_csv("run/steps.csv").groupby("stage").size().to_dict() == {"sft": 1, "sdpo": 1}
    assert {"ndcg@5", "validratio", "genhit"} <= set(result["test_result"])
    published = {
        "beta": 1.0,
        "lora_rank": 32,
        "sdpo_learning_rate": 1e-5,
        "sdpo_schedule": "cosine",
        "sdpo_warmup": 0.05,
    }
    assert {key: settings[key] for key in published} == published and settings[
        "sdpo_targets_per_step"
    ] == 128
    kinds = {type(part).__name__ for part in model.lm.causal_lm.modules()}
    assert ("Linear4bit" in kinds) == (settings["quantization"] == "nf4") == (name in FOUR_BITS)
    adapted = {
        n.rsplit(".lora_A", 1)[0].rsplit(".", 1)[-1]
        for n, _ in model.lm.model.named_parameters()
        if ".lora_A." in n
    }
    head = model.lm.causal_lm.get_output_embeddings()
    linear = {
        n.rsplit(".", 1)[-1]
        for n, p in model.lm.causal_lm.named_modules()
        if hasattr(p, "lora_A") and p is not head
    }
    assert adapted == linear and len(adapted) >= 4
    # The tokens of a prompt open as this tokenizer opens any text, and spell the title that is
    # asked for.
    opening, encoder = BACKBONES[name][2], model.encoder
    first = [layout[0] for layout in model.units.templates]
    assert all((encoder.tokens[unit][0] == 0) == bool(opening) for unit in first)
    assert [model.lm.tokenizer.decode(encoder.tokens[item]) for item in (1, 24)] == [
        model.catalogue.titles[item] + "\n" for item in (1, 24)
    ]


@pytest.mark.parametrize("name", ["lastfm", "goodreads"])
@pytest.mark.parametrize("split", [[], ["split-by-time"]])
def test_datasets_and_splits_go_with_a_recipe(name, split, tmp_path):
    data = write_dataset(tmp_path / "data", sequences(), TITLES, name)
    fields = yaml.safe_load((PAPER / f"{name}.yaml").read_text())["title_fields"]
    file = data / name / f"{name}.item"
    file.write_text(file.read_text().replace("title:token_seq", f"{fields[0]}:token_seq"))
    small = (
        {key: TINY[key] for key in TINY if key.startswith(("scratch", "backbone"))}
        | SMALL
        | {"data_path": str(data), "peft": "none"}
    )
    small["eval_args"] = {
        **RunConfig("SDPO-LLM", name, recipe(name, *split), {"data_path": str(data)})["eval_args"],
        "mode": "uni4",
    }
    result = quick_start.run("SDPO-LLM", name, recipe(name, *split), small)
    ranks = pd.read_csv("run/ranks.csv", keep_default_na=False)
    assert (
        len(ranks) == 2 * 8
        and ranks["answer"].str.len().gt(0).any()
        and "validratio" in result["test_result"]
    )


def test_every_recipe_is_one_that_is_tested():
    others = {"s-dpo", "split-by-time", "two-cores", "one-template", "lastfm", "goodreads"}
    assert {file.stem for file in PAPER.glob("*.yaml")} == {*BACKBONES, *others}


def test_the_budget_for_two_cores_trains_on_the_prompt_that_is_tested(monkeypatch):
    monkeypatch.chdir(PAPER.parents[1])
    settings = RunConfig("SDPO-LLM", "ml-100k", recipe("smollm2-135m", "two-cores")).settings
    own, movies = Templates.load(settings.prompt_templates), Templates.load("movies")
    assert own.candidates == movies.candidates[:1] and settings.title_fields == ["movie_title"]

"""Titles as tokens, against the pieces that they are made of."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

from recbole_sdpo import quick_start
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.backbone import load_backbone, resolved
from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.policy import restore_policy, save_backbone
from recbole_sdpo.lm.scratch import build_model
from recbole_sdpo.lm.text import encode_texts, opening_tokens
from recbole_sdpo.lm.whole import UNKNOWN, TitleHead, make_whole, tables, whole_tokenizer
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.recommend import Recommender
from recbole_sdpo.settings import Settings
from tests.conftest import TINY, write_dataset
from tests.lm.tokenizers import byte_level
from tests.test_paper import save_backbone as save_tiny

CPU = torch.device("cpu")
TEXTS = ["Alien (1979)\n", "The green ball\n", "a\tb <s>\n", "Movies, in order:\n", "x\n", "y\n"]
TEXTS += [f"title {number}\n" for number in range(6)]
ARCHITECTURES = {
    "Llama": {"tie_word_embeddings": False},
    "Gemma3": {"head_dim": 8, "tie_word_embeddings": True},
    "Phi": {"tie_word_embeddings": False},  # its head has a bias
    "GPTNeoX": {"tie_word_embeddings": False},
}


def build(name):
    tokenizer = byte_level()
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=3,
        **ARCHITECTURES[name],
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval(), tokenizer


def load(folder, texts=TEXTS, **given):
    settings = Settings.from_mapping(
        {"backbone": str(folder), "item_tokens": "whole", "dtype": "float32", **given}
    )
    return load_backbone(
        resolved(settings.backbone, CPU), CPU, byte_level, lambda purpose: 7, texts
    )


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = build("Llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_token_begins_as_the_mean_of_its_pieces(name):
    model, old = build(name)
    before = [table.detach().clone() for table in tables(model)]
    new = make_whole(model, old, [*TEXTS, TEXTS[0]])
    assert len(new) == len(TEXTS) + 1 + len(opening_tokens(old))
    for text, (own,) in zip(TEXTS, encode_texts(new, TEXTS), strict=True):
        (pieces,) = encode_texts(old, [text])
        for table, was in zip(tables(model), before, strict=True):
            mean = sum(was[piece] for piece in pieces) / len(pieces)
            torch.testing.assert_close(table[own], mean, rtol=0, atol=1e-6)
    for table, was in zip(tables(model), before, strict=True):
        for mine, theirs in zip(opening_tokens(new), opening_tokens(old), strict=True):
            assert table[mine].equal(was[theirs])
    tied = ARCHITECTURES[name]["tie_word_embeddings"]
    assert (model.get_output_embeddings().weight is tables(model)[0]) == tied
    assert len({id(table) for table in tables(model)}) == len(tables(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_row_is_trained(name):
    """Also that which was the padding's, of which an embedding would have no gradient."""
    model, old = build(name)
    make_whole(model, old, TEXTS)
    tokens = torch.arange(len(TEXTS))
    embedded = model.get_input_embeddings()(tokens)
    (grad,) = torch.autograd.grad(embedded.sum(), model.get_input_embeddings().weight)
    assert (grad[tokens] != 0).all()


def test_no_text_is_a_control_token_and_none_is_cut():
    tokenizer = whole_tokenizer(TEXTS, ["<s>", "[INST]"])
    nasty = ["<s>", "[INST]", f"{UNKNOWN}"[1:], "\n"]
    tokenizer = whole_tokenizer([*TEXTS, *nasty], ["<s>", "[INST]"])
    rows = encode_texts(tokenizer, [*TEXTS, *nasty])
    assert [len(row) for row in rows] == [1] * len(rows)
    assert tokenizer.batch_decode(rows) == [*TEXTS, *nasty]
    assert opening_tokens(tokenizer) == [0, 1]
    with pytest.raises(UserError, match="control token"):
        encode_texts(tokenizer, ["never met"])


def forest_of(lm, texts):
    """Each text after the first two."""
    (first,), (second,) = encode_texts(lm.tokenizer, TEXTS[:2])
    rows = Ragged.from_rows(encode_texts(lm.tokenizer, texts))
    none = np.zeros(len(texts), int)
    return plant(Ragged.from_rows([[first, second]]), none, none + 2, rows)


def responses_of(lm, texts):
    """log pi of each text after the first two, by the forest."""
    return lm(forest_of(lm, texts))


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_log_pi_is_a_softmax_over_the_texts(folder, peft):
    lm = load(folder, peft=peft).eval()
    names = [text for text, _ in sorted(lm.tokenizer.get_vocab().items(), key=lambda row: row[1])]
    logps = responses_of(lm, names[:-1])  # the last is the unknown one
    torch.testing.assert_close(logps.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_reference_has_its_own_tokens(folder, peft):
    lm = load(folder, peft=peft).eval()
    lm.freeze_reference()
    assert {id(table) for table in tables(lm.causal_lm)} <= {
        id(weight) for weight in lm.trainable().values()
    }
    before = responses_of(lm, TEXTS).detach()
    with torch.no_grad():
        for weight in lm.trainable().values():
            weight += 0.1 * torch.randn_like(weight)
    forest = forest_of(lm, TEXTS)
    policy, reference = lm.policy_and_reference(forest)
    torch.testing.assert_close(reference, before, rtol=0, atol=1e-6)
    assert (policy - before).abs().min() > 1e-3
    policy.sum().backward()  # goes into the policy's tables, not the reference's
    assert all(table.grad.abs().sum() > 0 for table in tables(lm.causal_lm))
    torch.testing.assert_close(responses_of(lm, TEXTS), policy, rtol=0, atol=1e-6)


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_checkpoint_serves_titles_that_came_later(folder, tmp_path, peft):
    lm, fresh = load(folder, peft=peft).eval(), load(folder, peft=peft).eval()
    with torch.no_grad():
        for weight in lm.trainable().values():
            weight += 0.1 * torch.randn_like(weight)
    lm.freeze_reference()
    save_backbone(lm, tmp_path / "saved")
    restore_policy(fresh, tmp_path / "saved")
    assert responses_of(fresh, TEXTS).equal(responses_of(lm, TEXTS))

    later = load(folder, [*TEXTS[::-1], "A new one\n"], peft=peft).eval()
    new = encode_texts(later.tokenizer, ["A new one\n"])[0][0]
    begun = [table[new].clone() for table in tables(later.causal_lm)]
    with pytest.raises(UserError, match=r"no token for 'A new one\\n' \(1 such titles\)"):
        restore_policy(later, tmp_path / "saved")
    restore_policy(later, tmp_path / "saved", new_titles=True)
    assert all(
        table[new].equal(row) for table, row in zip(tables(later.causal_lm), begun, strict=True)
    )
    # One more title takes its share of the softmax, and changes nothing else.
    before, after = responses_of(lm, TEXTS), responses_of(later, TEXTS)
    share = torch.log1p(-responses_of(later, ["A new one\n"]).exp())
    torch.testing.assert_close(after - share, before, rtol=0, atol=1e-5)


def test_bfloat16_weights_are_refused(folder):
    with pytest.raises(UserError, match="dtype='bfloat16' loses small changes"):
        load(folder, dtype="bfloat16")


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_shallower_backbone_with_dropout_is_saved_and_read_again(folder, tmp_path, peft):
    settings = {"peft": peft, "backbone_layers": 1, "backbone_dropout": 0.5}
    lm, other = load(folder, **settings), load(folder, **settings)
    lm.freeze_reference()
    with torch.no_grad():
        for weight in lm.trainable().values():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    texts = TEXTS[2:]
    reference = responses_of(other.eval(), texts)
    save_backbone(lm, tmp_path / "saved")
    restore_policy(other, tmp_path / "saved")
    lm.eval()
    torch.testing.assert_close(responses_of(other, texts), responses_of(lm, texts))
    lm.train()
    assert not responses_of(lm, texts).equal(responses_of(lm, texts))  # dropout
    forest = forest_of(lm, texts)
    for _ in range(2):  # the reference has none, also while the policy trains
        torch.testing.assert_close(lm.policy_and_reference(forest)[1], reference)


def test_a_control_begins_without_the_language(folder):
    pretrained, body, nothing = (
        dict(load(folder, peft="none", backbone_weights=weights).model.named_parameters())
        for weights in ("pretrained", "body", "random")
    )
    for name, weight in pretrained.items():
        titles = "embed_tokens" in name or "lm_head" in name
        assert weight.equal(body[name]) == (not titles)
        assert weight.equal(nothing[name]) == (weight.ndim == 1)  # norms begin at 1
    with pytest.raises(UserError, match="backbone_weights='random' needs peft=none"):
        load(folder, peft="lora", backbone_weights="random")


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_run_aligns_goes_on_and_recommends_what_is_new(ring, tmp_path, peft, monkeypatch):
    settings = ring | {
        "backbone": save_tiny(tmp_path / "tiny", "llama2-7b"),
        "item_tokens": "whole",
        "dtype": "float32",
        "peft": peft,
        "lora_rank": 2,
        "sft_learning_rate": 1e-2,
        "sft_epochs": 3,
        "run_dir": "run",
    }
    result = quick_start.run("SDPO-LLM", "toy", config_dict=settings)
    assert set(result["stages"]) == {"sft", "sdpo"}
    again = quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=settings | {"run_dir": "again", "sft_checkpoint": "run/sft"},
    )
    assert again["stages"]["sdpo"]["test"] == result["stages"]["sdpo"]["test"]
    before = Recommender.load("run").recommend("u1", k=24)
    item_file = Path(ring["data_path"]) / "toy" / "toy.item"
    item_file.write_text(item_file.read_text() + "i99\tpink cube\n")
    after = Recommender.load("run").recommend("u1", k=25)
    assert set(after["item"]) - set(before["item"]) == {"i99"}
    old = after[after["item"] != "i99"].reset_index(drop=True)
    pd.testing.assert_series_equal(old["item"], before["item"])


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Phi"])
def test_logits_of_titles_do_not_tie_in_bfloat16(tmp_path, name):
    model, tokenizer = build(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)  # logits of 10 and more
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    lm = load(tmp_path / "model", dtype="mixed", peft="none")
    states = torch.randn(40, 32)
    with torch.no_grad(), lm.arithmetic():
        logits = lm.causal_lm.get_output_embeddings()(states)
    head = lm.causal_lm.get_output_embeddings()
    expected = states.double() @ head.weight.double().T
    expected = expected if head.bias is None else expected + head.bias
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert logits.abs().max() > 10
    tied = ARCHITECTURES[name]["tie_word_embeddings"]
    assert (head.weight is lm.causal_lm.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("name", "peft"), [("Llama", "none"), ("Llama", "lora"), ("Gemma3", "none"), ("Phi", "none")]
)
def test_rare_titles_stay_near_their_words(tmp_path, name, peft):
    """By how often each title stands in the sequences that the test has written."""
    rng, share = np.random.default_rng(1), np.arange(1, 13) ** 2.0
    rows = [rng.choice(12, 6, replace=False, p=share / share.sum()).tolist() for _ in range(9)]
    rows.append([*range(5, 11), 0, 11])  # nobody meets item 0 in training
    names = {item: f"film {'abcdefghijkk'[item]}" for item in range(12)}  # two have one name
    model, tokenizer = build(name)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    settings = TINY | {
        "data_path": str(write_dataset(tmp_path / "data", rows, names)),
        "backbone": str(tmp_path / "model"),
        "item_tokens": "whole",
        "dtype": "float32",
        "peft": peft,
        "lora_rank": 2,
        "sft_epochs": 2,
        "sdpo_epochs": 2,
        "eval_step": 0,
        "eval_args": {"mode": "uni3"},
    }

    def tables_after(stage, **given):
        run_dir = f"run{len(list(Path().glob('run*')))}"
        quick_start.run("SDPO-LLM", "toy", config_dict=settings | given | {"run_dir": run_dir})
        folder = Path(run_dir, stage)
        weights = load_file(next(folder.glob("*model.safetensors")))
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        near = len(vocabulary) - 1  # what is unknown has no row
        return vocabulary, {key: weight for key, weight in weights.items() if len(weight) == near}

    vocabulary, begun = tables_after("sft", sft_epochs=0, objective="sft")
    _, all_of_it = tables_after("sft", title_prior=0, objective="sft")
    _, share_of_it = tables_after("sft", title_prior=2, objective="sft")
    aligned = [
        tables_after("sdpo", title_prior=prior, sft_checkpoint="run2/sft")[1] for prior in (0, 2)
    ]
    count = {title: 0 for title in names.values()}
    for row in rows:
        for item in row[:-2]:
            count[names[item]] += 1
    assert min(count.values()) == 0 and count["film k"] > 9
    assert begun and begun.keys() == all_of_it.keys()
    for first, whole, part in ((begun, all_of_it, share_of_it), (share_of_it, *aligned)):
        for key in first:
            assert first is share_of_it or (whole[key] - first[key]).abs().max() > 1e-3
            for title, number in count.items():
                row = vocabulary[f"{title}\n"]
                move = whole[key][row] - first[key][row]
                expected = first[key][row] + number / (number + 2) * move
                torch.testing.assert_close(part[key][row], expected, rtol=1e-4, atol=1e-6)
            texts = [number for text, number in vocabulary.items() if not text.startswith("film")]
            texts = [number for number in texts if number < len(first[key])]
            torch.testing.assert_close(part[key][texts], whole[key][texts])


@pytest.mark.parametrize("titles", [1, 3, 8])
def test_a_catalogue_of_few_titles_is_one(titles):
    tokenizer = whole_tokenizer([f"title {number}\n" for number in range(titles)])
    model = build_model(len(tokenizer) - 1, 32, 2, 4, 0.0, 0)
    model.set_output_embeddings(TitleHead.of(model.get_output_embeddings()))
    LanguageModel(model, tokenizer)  # scores a tree


def test_scratch_knows_no_words(ring):
    quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=ring | {"item_tokens": "whole", "run_dir": "run", "objective": "sft"},
    )
    assert len(Recommender.load("run").recommend("u1", k=24)) == 24
    item_file = Path(ring["data_path"]) / "toy" / "toy.item"
    item_file.write_text(item_file.read_text() + "i99\tpink cube\n")
    with pytest.raises(UserError, match="no token for 'pink cube"):
        Recommender.load("run")


def test_an_adapter_on_random_weights_keeps_to_as_many_titles(ring):
    settings = ring | {"item_tokens": "whole", "peft": "lora", "run_dir": "run"}
    quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"objective": "sft"})
    here = Recommender.load("run").recommend("u1", k=24)
    item_file = Path(ring["data_path"]) / "toy" / "toy.item"
    lines = item_file.read_text().splitlines()
    item_file.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    pd.testing.assert_frame_equal(Recommender.load("run").recommend("u1", k=24), here)
    item_file.write_text("\n".join(lines).replace("grey ring", "grey cube") + "\n")
    with pytest.raises(UserError, match="drawn for 26 titles and texts, and there are 25"):
        Recommender.load("run")


def test_what_begins_from_its_pieces_is_told(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    save_backbone(load(folder), tmp_path / "saved")
    restore_policy(load(folder, [*TEXTS, "new\n"]), tmp_path / "saved", new_titles=True)
    (told,) = (record for record in caplog.records if "mean of its pieces" in record.message)
    assert told.levelname == "INFO" and "no token for 1 of" in told.message
    others = [f"other {number}\n" for number in range(20)]
    restore_policy(load(folder, others), tmp_path / "saved", new_titles=True)
    assert caplog.records[-1].levelname == "WARNING" and "for 20 of" in caplog.records[-1].message

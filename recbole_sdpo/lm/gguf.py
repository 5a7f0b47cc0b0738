"""GGUF files: dequantised once, into a folder that ``transformers`` reads."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import tempfile
from logging import getLogger
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import check_seal, seal, sha256, whole_folder
from recbole_sdpo.lm.reading import WEIGHTS_ALONE, check_complete, reading


def convert_gguf(file: Path, cache: Path) -> Path:
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
                "that its weights could be anybody's; give a cache_dir of your own, or take it "
                "from them (chown, chmod go-w)."
            )


def _dequantise(file: Path, folder: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file as ``transformers`` keeps them."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"backbone={str(file)!r} is a GGUF file, which needs the package gguf; pip install "
            "'recbole-sdpo[gguf]'."
        )
    what = f"backbone={str(file)!r}"
    with (
        tempfile.TemporaryDirectory() as alone,
        reading(what, "it must be a whole GGUF file of a causal language model"),
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
    check_complete(report, what)
    # transformers refuses to save a model that came from a GGUF file; a plain model with the same
    # weights it saves.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

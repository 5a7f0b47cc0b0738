"""Checkpoints as a stranger, or a broken disk, may hand them over: pure functions from a
folder's files to changed ones."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
"""The files of a checkpoint's folder, by name."""

ADDED = (
    ("data.json", ("settings", "trust_remote_code"), True),
    ("data.json", ("settings", "state"), "x"),
    ("data.json", ("settings", "gpu_id"), ["0"]),
    ("data.json", ("settings", "checkpoint_dir"), "elsewhere"),
    ("data.json", ("settings", "dataset_save_path"), "evil.pth"),
    ("data.json", ("settings", "save_dataset"), True),
    ("data.json", ("settings", "log_wandb"), True),
    ("data.json", ("settings", "run_dir"), "elsewhere"),
    ("data.json", ("settings", "resume"), "elsewhere"),
    ("data.json", ("settings", "sft_checkpoint"), "elsewhere"),
    ("data.json", ("settings", "cache_dir"), "elsewhere"),
    ("data.json", ("settings", "config_files"), "evil.yaml"),
    ("data.json", ("settings", "model"), "GRU4Rec"),
    ("data.json", ("settings", "no_such_key"), 1),
    ("settings.json", ("trust_remote_code",), True),
    ("settings.json", ("cache_dir",), "elsewhere"),
    ("settings.json", ("backbone",), "."),
    ("config.json", ("attn_implementation",), "evil/kernel"),
    ("config.json", ("transformers_weights",), "evil.bin"),
    ("tokenizer_config.json", ("tokenizer_class",), "EvilTokenizer"),
)
"""What no file of a checkpoint may set: file, path and value."""


class Touch:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def evil_texts(marker: Path) -> list[str]:
    """Texts that make ``marker`` where they are run, by whatever reads them so."""
    call = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return [
        call,
        f"[{call}]",
        f"(lambda: {call})()",
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"$(touch {marker})",
        f"`touch {marker}`",
        f"; touch {marker}",
        f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{% set x = {call} %}}",
    ]


def junk(draw: random.Random, marker: Path) -> Any:
    """A value that a key of JSON may have in a file that is not as a run wrote it."""
    values = [
        *evil_texts(marker),
        *(
            None,
            True,
            False,
            0,
            -1,
            1,
            2,
            3.5,
            10**9,
            10**30,
            -(10**30),
            1e308,
            float("nan"),
            float("inf"),
        ),
        *(
            "",
            " ",
            "x",
            "\0",
            "a" * 5000,
            "../../etc",
            "/etc/passwd",
            "..",
            ".",
            "scratch",
            "latin-1",
            "\ud800",
            "[4,",
            "(",
            "\t",
            ",",
        ),
        *(
            [],
            {},
            [None],
            [[]],
            {"x": 1},
            ["x", 1],
            {"inter": "x"},
            {"inter": [1]},
            {"rating": [1, 2]},
            {"": ""},
        ),
    ]
    return draw.choice(values)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value in a JSON value, itself included."""
    yield path
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


def replaced(value: Any, path: tuple, new: Any) -> Any:
    """``value`` with ``new`` at ``path``, which may be a new key."""
    if not path:
        return new
    if isinstance(value, dict):
        return value | {path[0]: replaced(value.get(path[0]), path[1:], new)}
    if isinstance(value, list):
        return [
            replaced(child, path[1:], new) if number == path[0] else child
            for number, child in enumerate(value)
        ]
    return {path[0]: replaced(None, path[1:], new)}


def tampered(draw: random.Random, files: Mapping[str, bytes], marker: Path) -> tuple[str, Files]:
    """``files`` with one thing changed, and what that is; the seal is left out, or made anew,
    for a stranger can make one."""
    change = draw.choice(
        [_value, _value, _value, _value, _value, _key, _bytes, _bytes, _code, _pickle]
    )
    what, changed = change(draw, dict(files), marker)
    changed.pop("SHA256SUMS", None)
    return what, sealed(changed) if draw.random() < 0.5 else changed


def sealed(files: Files) -> Files:
    """``files`` with the digests that a run would have written."""
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    return files | {"SHA256SUMS": "".join(lines).encode()}


def _value(draw: random.Random, files: Files, marker: Path) -> tuple[str, Files]:
    name = draw.choice(
        [
            name
            for name in sorted(files)
            if name.endswith(".json")
            for _ in range(1 + 3 * (name in OURS))
        ]
    )
    content = json.loads(files[name])
    path, new = draw.choice([*places(content)][:200]), junk(draw, marker)
    return f"{name}: {path} = {new!r:.80}", files | {
        name: json.dumps(replaced(content, path, new)).encode()
    }


OURS = ("data.json", "settings.json")


def _key(draw: random.Random, files: Files, marker: Path) -> tuple[str, Files]:
    name, path, new = draw.choice([added for added in ADDED if added[0] in files])
    new = draw.choice([new, draw.choice(evil_texts(marker))])
    return f"{name}: {path} = {new!r:.80}", files | {
        name: json.dumps(replaced(json.loads(files[name]), path, new)).encode()
    }


def _bytes(draw: random.Random, files: Files, marker: Path) -> tuple[str, Files]:
    name = draw.choice(sorted(files))
    data, place = files[name], draw.randrange(max(1, len(files[name])))
    forms = {
        "empty": b"",
        "cut": data[:place],
        "a flipped bit": data[:place]
        + bytes([(data + b"\0")[place] ^ 1 << draw.randrange(8)])
        + data[place + 1 :],
        "zeros": data[:place] + bytes(len(data) - place),
        "not UTF-8": data[:place] + b"\xff\xfe\xff" + data[place:],
        "a list": b"[]",
        "null": b"null",
        "deep": b"[" * 100_000,
        "digits": b"1" * 100_000,
        "gone": None,
    }
    form = draw.choice(sorted(forms))
    if forms[form] is None:
        return f"{name} is gone", {other: files[other] for other in files if other != name}
    return f"{name}: {form} at {place}", files | {name: forms[form]}


def _code(draw: random.Random, files: Files, marker: Path) -> tuple[str, Files]:
    """A module beside the weights, which configs name as those of ``transformers`` name such
    modules."""
    module = (
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import GPTNeoXConfig as EvilConfig, GPTNeoXForCausalLM as EvilModel, "
        "PreTrainedTokenizerFast as EvilTokenizer\n"
        "def generate(*args, **kwargs):\n    pass\n"
    ).encode()
    classes = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    }
    changed = files | {"evil.py": module, "custom_generate/generate.py": module}
    for name in (
        "config.json",
        "tokenizer_config.json",
        "adapter_config.json",
        "generation_config.json",
    ):
        content = json.loads(changed.get(name, b"{}"))
        if draw.random() < 0.7:
            content |= {"auto_map": classes, "custom_generate": "evil"}
            if draw.random() < 0.5:
                content |= {
                    "model_type": "evil",
                    "architectures": ["EvilModel"],
                    "tokenizer_class": "EvilTokenizer",
                }
            if name in files or name in ("config.json", "generation_config.json"):
                changed[name] = json.dumps(content).encode()
    return "a module that auto_map names", changed


def _pickle(draw: random.Random, files: Files, marker: Path) -> tuple[str, Files]:
    data = pickle.dumps(Touch(marker))
    changed = {
        name: content
        for name, content in files.items()
        if not name.endswith(".safetensors") or draw.random() < 0.3
    }
    names = (
        "adapter_model.bin",
        "pytorch_model.bin",
        "training_args.bin",
        "saved/toy-SequentialDataset.pth",
    )
    return "pickles", changed | dict.fromkeys(names, data)

"""Reading a model from files that may hold anything: weights alone, and whole, or an error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from recbole_sdpo.errors import UserError

WEIGHTS_ALONE = {
    "use_safetensors": True,
    "attn_implementation": "eager",
    "output_loading_info": True,
}
"""How ``transformers`` reads a model: no pickle, no kernel that its config names, and with a
list of what was missing."""


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
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


def check_complete(report: Mapping[str, Collection[str]], what: str) -> None:
    """Did each weight come from the file, and each of the file's go into the model? The rest
    ``transformers`` draws or leaves out.

    Raises:
        UserError: one did not.
    """
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


def check_finite(weights: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Is each of the named weights a number? Else a UserError tells which of ``what`` is not."""
    for name, weight in weights:
        if not weight.isfinite().all():
            raise UserError(f"{what} has weights {name!r} that are not finite; give another one.")

"""``result.json``: what a run found, and the digests by which damage to it and to the files
beside it is seen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import read_record, sha256, write_record

RESULT_FILE, RANKS_FILE, INPUTS_FILE = "result.json", "ranks.csv", "inputs.json"
"""In a run's folder: its result, the rank of each target, and digests of what it read."""


def write_result(folder: Path, result: dict[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """Write ``result.json``, the last of a run's files: where it is whole, the run is done.

    Args:
        folder: of the run.
        result: what JSON can hold.
        files: names in ``folder`` whose digests it keeps, such as ``ranks.csv``; all are on the
            disk already.

    Returns:
        what the file holds: ``result`` with ``files``, and ``sha256`` of all the rest.
    """
    return write_record(
        folder / RESULT_FILE, {**result, "files": {name: sha256(folder / name) for name in files}}
    )


def read_result(folder: Path) -> dict[str, Any]:
    """What :func:`write_result` wrote.

    Raises:
        UserError: it is not there, or it or a file beside it is not as it was written; the message
            names the file.
    """
    file = folder / RESULT_FILE
    if not file.is_file():
        raise UserError(f"{file} does not exist: the run has not ended.")
    result = read_record(file)
    if result is None:
        raise UserError(f"{file} is damaged: it is not what the run wrote; run it again.")
    for name, digest in result["files"].items():
        beside = folder / name
        if not beside.is_file() or sha256(beside) != digest:
            raise UserError(
                f"{beside} is {'damaged' if beside.is_file() else 'missing'}: it is not what the "
                "run wrote; run it again."
            )
    return result

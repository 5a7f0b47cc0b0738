"""What a run reads, as digests, so that nobody changes it unseen."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.prompts import template_file
from recbole_sdpo.digests import (
    OF_SDPO_LLM,
    ONLOOKERS,
    digest,
    hashed,
    known,
    meaning,
    package_versions,
    sources,
)
from recbole_sdpo.errors import UserError, reason
from recbole_sdpo.files import user_path, write_text
from recbole_sdpo.lm.backbone import resolved, weights_source
from recbole_sdpo.objectives import BUILT_IN, OBJECTIVES
from recbole_sdpo.result import INPUTS_FILE
from recbole_sdpo.settings import MODEL
from recbole_sdpo.trainer.checkpoint import sft_folder
from recbole_sdpo.trainer.state import holds_state, read_state
from recbole_sdpo.values import shown

OF_RECBOLE = ("pre_model_path", "mf_pretrain_path", "mlp_pretrain_path", "pretrain_path", "warm_up")
"""Settings of RecBole that name a file to read."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        config: of the run.
        files: by what each is to the run, wherever it lies.
        digests: sha256 of each of them, of the package's ``sources``, the ``versions`` of
            packages, and the ``objective``, if it is from outside of the package.
            A model of the hub is not among them: its name stands for it.
    """

    config: RunConfig
    files: dict[str, Path]
    digests: dict[str, str]

    @classmethod
    def of(cls, config: RunConfig) -> Inputs:
        """As they are now.

        Raises:
            UserError: the dataset has no files, or a file cannot be read.
        """
        files = _files(config)
        ours = config["model"] == MODEL
        code = {"sources": sources(ONLOOKERS if ours else ONLOOKERS | OF_SDPO_LLM)}
        code |= _objective_of_others(config) if ours else {}
        versions = {
            f"versions/{name}": str(version) for name, version in package_versions().items()
        }
        return cls(
            config, files, {name: digest(file) for name, file in files.items()} | code | versions
        )

    def changed(self, digests: Mapping[str, str | None], but_for: str = "") -> str | None:
        """The first file or package whose digest differs from that in ``digests``, or is in one of
        the two alone; files of the kind ``but_for`` may differ."""
        for name in [*self.digests, *digests]:
            if self.digests.get(name) != digests.get(name) and name.partition("/")[0] != but_for:
                return self.named(name)
        return None

    def changed_now(self) -> str | None:
        """What :meth:`changed` names, against the files as they are now.

        Raises:
            UserError: a file is gone, or cannot be read.
        """
        return self.changed(Inputs.of(self.config).digests)

    def named(self, name: str) -> str:
        """What a user calls the file, package or setting that is ``name`` here."""
        if name == "sources":
            return "a source file of recbole_sdpo"
        if name == "objective":
            return f"objective={self.config.settings.objective!r}, or its source,"
        kind, _, package = name.partition("/")
        return (
            f"the version of {package}" if kind == "versions" else str(self.files.get(name, name))
        )

    def check(self) -> None:
        """Are they still what they were?

        Raises:
            UserError: naming the file that is not.
        """
        if name := self.changed_now():
            raise UserError(f"{name} changed while this run was reading it; start it again.")

    def keep(self, run_dir: Path, write: bool) -> list[dict[str, str]]:
        """Write the digests into the folder of a run that begins; one that has a state goes on
        with no other files, and says so where it goes on with other code.

        Args:
            write: this process is the one that writes.

        Returns:
            of each code that was at the run before, earliest first, what is not as it is now.

        Raises:
            UserError: a file is not what the run began with.
        """
        now = _code(self.digests)
        files, before = _without(self.digests, now), list[dict[str, str]]()
        if holds_state(run_dir):
            self._check_unchanged(run_dir)
            files, before = _record(run_dir)
            if not before:
                getLogger().warning(
                    f"{run_dir} does not say with which sources and versions its run began: "
                    "a release wrote it that did not note them."
                )
        if write and now not in before:
            record = {"files": files, "code": [*before, now]}
            write_text(run_dir / INPUTS_FILE, json.dumps(record, indent=2))
        others = [dict(code.items() - now.items()) for code in before if code != now]
        for name in dict.fromkeys(chain.from_iterable(others)):
            getLogger().warning(
                f"{self.named(name)} is not what it was earlier in the run in {run_dir}, whose "
                "result is of both, and may not be what one of them alone would give."
            )
        return others

    def _check_unchanged(self, run_dir: Path) -> None:
        """Does the run in ``run_dir`` go on with the files that it began with?

        Raises:
            UserError: it does not.
        """
        # Another file is read where another is named: that is what to say then.
        now = {"dataset": self.config["dataset"]}
        if self.config["model"] == MODEL:
            flat = self.config.settings.to_flat()
            files = ("backbone", "prompt_templates", "candidates_file", "sft_checkpoint")
            now |= {key: flat[key] for key in files}
        began = read_state(run_dir)["settings"]
        for key, value in now.items():
            if began.get(key, value) != value:
                raise UserError(
                    f"resume={str(run_dir)!r}: that run had {key}={began[key]!r} (now "
                    f"{value!r}); give the options that it had."
                )
        name = self.changed_since(run_dir)
        if name:
            raise UserError(
                f"{name} changed since the run in {run_dir} began; put it back, or begin the "
                "run anew in another folder."
            )

    def changed_since(self, run_dir: Path, but_for: str = "") -> str | None:
        """The first file that the run in ``run_dir`` began with otherwise.

        Raises:
            UserError: it cannot be told.
        """
        began = self.digests | dict.fromkeys(self.files) | began_with(run_dir)
        return self.changed(began, but_for)


def _code(digests: Mapping[str, str]) -> dict[str, str]:
    """Those of the package's sources and of versions."""
    return {
        name: value
        for name, value in digests.items()
        if name == "sources" or name.startswith("versions/")
    }


def _without(digests: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Those that ``others`` lacks, or has with another value."""
    return {name: value for name, value in digests.items() if others.get(name) != value}


def began_with(run_dir: Path) -> dict[str, str]:
    """The digests of the files that the run in ``run_dir``, which has a state, began with.

    Raises:
        UserError: they are missing or damaged.
    """
    return _record(run_dir)[0]


def _record(run_dir: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What :meth:`Inputs.keep` wrote: the digests of files, and those of all code that was at the
    run.

    Raises:
        UserError: it is missing or damaged.
    """
    file = run_dir / INPUTS_FILE
    if not file.is_file():
        raise UserError(
            f"{file} is missing, which tells whether the data are those that the run began with; "
            "put it back, or begin the run anew in another folder."
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        # A release before 2026-11-28 wrote the files alone.
        return dict(record.get("files", record)), list(record.get("code", []))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged: it is not what the run wrote; begin the run anew."
        ) from error


def _files(config: RunConfig) -> dict[str, Path]:
    """All files that the run reads, but for a model of the hub."""
    places = {key: config[key] for key in OF_RECBOLE}
    places["candidates_file"] = config.settings.candidates_file
    if config["model"] == MODEL:
        own = config.settings
        backbone = resolved(own.backbone, config["device"]).name
        places |= {
            "backbone": backbone != "scratch" and weights_source(backbone),
            "prompt_templates": template_file(own.prompt_templates),
            "sft_checkpoint": own.sft_checkpoint,
        }
    files = _data_files(config)
    for role, place in places.items():
        try:
            files |= _in_place(role, user_path(place)) if place else {}
        except OSError as error:  # such as a name that is too long
            raise UserError(
                f"{role}={shown(str(place))} cannot be read: {reason(error)}."
            ) from error
    return files


def _objective_of_others(config: RunConfig) -> dict[str, str]:
    """Of an objective that was registered from outside of the package, what it says of itself, and
    the source of its loss."""
    name = config.settings.objective
    if name in BUILT_IN:
        return {}
    objective = OBJECTIVES[name]
    loss: Any = objective.loss
    parts = [repr((objective.negatives, objective.reference, objective.reads))]
    while isinstance(loss, functools.partial):
        parts += [_plain(value) for value in (*loss.args, *chain(*sorted(loss.keywords.items())))]
        loss = loss.func
    kind = loss if inspect.isfunction(loss) else type(loss)
    parts.append(f"{kind.__module__}.{kind.__qualname__}")
    try:
        file = inspect.getsourcefile(kind)
    except TypeError:  # of what is not written in Python
        file = None
    if file and Path(file).is_file():
        parts.append(known(Path(file), meaning))
    else:  # of a notebook's cell Python may know the text
        with suppress(OSError, TypeError):
            parts.append(inspect.getsource(kind))
    return {"objective": hashed("\n".join(parts))}


def _plain(value: Any) -> str:
    """What of an argument is the same in another process: not where it lies in memory."""
    if isinstance(value, (str, int, float, tuple, type(None))):
        return repr(value)
    return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"


def _data_files(config: RunConfig) -> dict[str, Path]:
    folder, name = Path(config["data_path"]), config["dataset"]
    ends = {
        ".inter",
        ".item",
        ".user",
        ".kg",
        ".link",
        ".net",
        *(f".{end}" for end in config["additional_feat_suffix"] or ()),
    }
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        f"data/{file.name}": file
        for file in inside
        if file.name.startswith(f"{name}.") and file.suffix in ends
    }


def _in_place(role: str, place: Path) -> dict[str, Path]:
    """A file, or those in a folder, where models are saved side by side; none where there is none,
    as for a name of the hub.

    Of a run's folder its SFT checkpoint is meant.
    """
    if role == "sft_checkpoint":
        place = sft_folder(place)
    if place.is_dir():
        return {
            f"{role}/{file.name}": file
            for file in sorted(place.iterdir())
            if file.is_file() and not file.name.startswith(".")
        }
    return {role: place} if place.is_file() else {}

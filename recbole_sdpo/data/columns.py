"""The files and columns that settings ask of a dataset: a check that reads headers alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import recbole
import yaml
from recbole.config import Config
from recbole.utils import ModelType

from recbole_sdpo.data.ratings import rating_field
from recbole_sdpo.data.tables import read_header
from recbole_sdpo.errors import UserError

FLOATS, TOKENS, ROWS = ("float", "float_seq"), ("token", "token_seq"), ("token_seq", "float_seq")

NAMING = {
    "threshold": ("float",),
    "normalize_field": FLOATS,
    "numerical_features": FLOATS,
    "discretization": FLOATS,
    "alias_of_user_id": TOKENS,
    "alias_of_item_id": TOKENS,
    "preload_weight": ("token",),
    "seq_len": ROWS,
}
"""Settings that name columns, and the types that serve."""

IDS = {
    "inter": ("USER_ID_FIELD", "ITEM_ID_FIELD"),
    "user": ("USER_ID_FIELD",),
    "item": ("ITEM_ID_FIELD",),
}
"""The ids that each file must have."""

UNFILTERED = (None, "None", "[0,inf)")
"""Values of RecBole's filters that let everything pass."""

FILTERS = ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter")


@dataclass(frozen=True)
class File:
    """One of a dataset's files.

    Attributes:
        suffix: by which settings name it: inter, user, item or another one.
        types: RecBole's type of each column, in the order of the file.
        loaded: those of them that load_col and unload_col leave.
    """

    config: Config
    suffix: str
    path: Path

    @cached_property
    def types(self) -> dict[str, str]:
        return read_header(self.path, self.config["field_separator"], self.config["encoding"])

    @cached_property
    def loaded(self) -> dict[str, str]:
        load, out = self.config["load_col"], self.left_out
        wanted = "*" if load is None else load.get(self.suffix)
        if not wanted:  # RecBole does not open it
            return {}
        keep = self.types if wanted == "*" else wanted
        return {
            field: kind for field, kind in self.types.items() if field in keep and field not in out
        }

    @property
    def left_out(self) -> Sequence[str]:
        """What unload_col names."""
        return (self.config["unload_col"] or {}).get(self.suffix) or ()

    def need(self, what: str, field: str, types: Sequence[str], why: str = "") -> None:
        """The column must be there, of one of the ``types``, and loaded.

        Args:
            what: begins the sentence that says it is not, with the setting and the column.
            why: ends it.

        Raises:
            UserError: it is not.
        """
        if self.types.get(field) not in types:
            columns = ", ".join(map(":".join, self.types.items()))
            raise UserError(
                f"{what} must be a column of type {' or '.join(types)} of {self.path}, "
                f"whose columns are {columns}{why}."
            )
        if field not in self.loaded:
            remedy = "leave it out of un" if field in self.left_out else "add it to "
            raise UserError(
                f"{what} must be loaded from {self.path}: {remedy}load_col.{self.suffix}{why}."
            )


def by_time(config: Config) -> bool:
    """Is it time that orders the events? In files that are split already they stand in order."""
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    ordered = sequential or config["eval_args"]["order"] == "TO"
    return ordered and config["benchmark_filename"] is None


def list_field(config: Config) -> str:
    """The column of each event's history, in files that are split already."""
    return f"{config['ITEM_ID_FIELD']}{config['LIST_SUFFIX']}"


def check_columns(config: Config) -> None:
    """The files and columns that settings name must be there, loaded, and of a type that serves.

    Raises:
        UserError: naming the setting, the column and the file.
    """
    _check_additional(config)
    _check_split_files(config)
    _check_files(config)
    files = [
        File(config, suffix, path)
        for suffix, paths in _paths(config).items()
        for path in paths
        if path.is_file()
    ]
    _check_load_col(config, files)
    _check_ids(config, files)
    _check_time(config, files)
    _check_histories(config, files)
    _check_unused(config, files)
    _check_aliases(config)
    _check_named(config, files)
    _check_preloaded(config, files)
    _check_labels(config, files)
    _check_ratings(config, files)


def _is(config: Config, key: str) -> str:
    return f"{key}={config[key]!r}"


def _paths(config: Config) -> dict[str, list[Path]]:
    """For each suffix by which settings may name a file its path, whether or not it is there.

    Of events that are split already there are three.
    """
    folder, name = Path(config["data_path"]), config["dataset"]
    graph = ["kg"] if config["MODEL_TYPE"] == ModelType.KNOWLEDGE else []
    ends = [*IDS, *graph, *(config["additional_feat_suffix"] or ()), *(config["load_col"] or ())]
    paths = {end: [folder / f"{name}.{end}"] for end in ends}
    if parts := config["benchmark_filename"]:
        paths["inter"] = [folder / f"{name}.{part}.inter" for part in parts]
    return paths


def _check_additional(config: Config) -> None:
    suffixes = config["additional_feat_suffix"] or ()
    for suffix in IDS:
        if suffix in suffixes:
            raise UserError(
                f"additional_feat_suffix={suffixes} must not name {suffix}, which is loaded anyway."
            )


def _check_split_files(config: Config) -> None:
    """There are three, and they are taken as they are."""
    parts = config["benchmark_filename"]
    if parts is None:
        return
    if not (isinstance(parts, list) and [*map(type, parts)] == [str] * 3):
        raise UserError(
            f"benchmark_filename={parts!r} must be a list of three: those of training, validation "
            "and test."
        )
    for key in FILTERS:
        if str(config[key]).replace(" ", "") not in map(str, UNFILTERED):
            raise UserError(
                f"{_is(config, key)} must be left out: files of benchmark_filename are taken as "
                "they are, unfiltered."
            )


def _check_files(config: Config) -> None:
    """RecBole would fetch some datasets from the network, and may ask on standard input."""
    paths, more = _paths(config), config["additional_feat_suffix"] or ()
    split = config["benchmark_filename"]
    key = f"benchmark_filename={split}" if split else f"dataset={config['dataset']!r}"
    needed = [(key, path) for path in paths["inter"]]
    needed += [(f"additional_feat_suffix={more}", path) for end in more for path in paths[end]]
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        stem = Path(config["data_path"], config["dataset"])
        needed += [(f"model={config['model']!r}", Path(f"{stem}.{end}")) for end in ("kg", "link")]
    for key, path in needed:
        if not path.is_file():
            where = _where_else(path.parent, config["dataset"])
            raise UserError(f"{key}: there is no file {path}{where}.")


def _where_else(folder: Path, name: str) -> str:
    """How the error about a missing file ends."""
    if folder.is_dir():
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:9])
        return f", which must be there; the folder holds {inside or 'nothing'}"
    urls = Path(recbole.__path__[0], "properties", "dataset", "url.yaml")
    urls = yaml.safe_load(urls.read_text(encoding="utf-8"))
    known = f"; RecBole's copy of it is {urls[name]}, to unpack there" if name in urls else ""
    above = folder.parent
    siblings = [path.name for path in above.iterdir() if path.is_dir()] if above.is_dir() else []
    near = difflib.get_close_matches(name, siblings, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"; data_path must be the folder that holds {name}/{name}.inter{known}{hint}"


def _check_load_col(config: Config, files: list[File]) -> None:
    """What the user's load_col names must be there; of ours, what is needed, as is seen later."""
    load = config["load_col"] or {}
    for file in files:
        fields = load.get(file.suffix)
        if not fields or fields == "*":
            continue
        if file.left_out:
            raise UserError(
                f"load_col and unload_col both name columns of {file.path}; only one must."
            )
        for field in fields if "load_col" in config.external_config_dict else ():
            if field not in file.types:
                raise UserError(
                    f"load_col.{file.suffix} names {field!r}, which must be a column of "
                    f"{file.path}; it has {', '.join(file.types)}."
                )


def _check_ids(config: Config, files: list[File]) -> None:
    for file in files:
        for key in IDS.get(file.suffix, ()) if file.suffix == "inter" or file.loaded else ():
            file.need(_is(config, key), config[key], ["token"])


def _check_time(config: Config, files: list[File]) -> None:
    if by_time(config):
        why = "; time puts the events in order, so number them in their order if there is none"
        for file in _events(files):
            file.need(_is(config, "TIME_FIELD"), config["TIME_FIELD"], ["float"], why)
    split, order = config["eval_args"]["split"], config["eval_args"]["order"]
    if "TS" in split and order != "TO" and config["benchmark_filename"] is None:
        raise UserError(
            f"eval_args.split={split} is by time, so eval_args.order={order!r} must be 'TO'."
        )
    for key in ("threshold", "discretization"):
        if config["TIME_FIELD"] in (config[key] or ()):
            raise UserError(
                f"{key}={config[key]} must not name {_is(config, 'TIME_FIELD')}: different times "
                "would be one."
            )


def _check_histories(config: Config, files: list[File]) -> None:
    """Files that are split already must be alike, and a sequential model needs their histories."""
    if config["benchmark_filename"] is None:
        return
    first, *_ = events = list(_events(files))
    for file in events:
        if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            why = "; a sequential model needs each event's history"
            field = list_field(config)
            file.need(f"ITEM_ID_FIELD with LIST_SUFFIX, {field!r},", field, ["token_seq"], why)
        if unlike := first.loaded.items() ^ file.loaded.items():
            field = min(unlike)[0]
            raise UserError(
                f"benchmark_filename={config['benchmark_filename']}: {file.path} must have the "
                f"columns of {first.path}, of the same types; {field!r} differs."
            )


def _events(files: list[File]) -> Iterator[File]:
    return (file for file in files if file.suffix == "inter")


def _check_unused(config: Config, files: list[File]) -> None:
    suffixes = {file.suffix for file in files if file.loaded}
    for suffix, fields in (config["unused_col"] or {}).items():
        if suffix not in suffixes:
            raise UserError(
                f"unused_col names the {suffix} file, which must be there, and one of load_col."
            )
        for key in IDS.get(suffix, ()):
            if config[key] in fields:
                raise UserError(f"unused_col.{suffix} must not name {_is(config, key)}.")


def _check_aliases(config: Config) -> None:
    users, items = (
        {config[f"{kind.upper()}_ID_FIELD"], *(config[f"alias_of_{kind}_id"] or ())}
        for kind in ("user", "item")
    )
    if users & items:
        raise UserError(
            f"alias_of_user_id and alias_of_item_id must not share {min(users & items)!r}: users "
            "and items are numbered apart."
        )


def _named(config: Config) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Each key that names a column, the column, and the types that serve."""
    for field, wanted in (config["val_interval"] or {}).items():
        yield "val_interval", field, ["float" if isinstance(wanted, str) else "token"]
    for key, types in NAMING.items():
        for field in config[key] or ():
            yield key, field, types
    for field in (config["preload_weight"] or {}).values():
        yield "preload_weight", field, FLOATS


def _check_named(config: Config, files: list[File]) -> None:
    for key, field, types in _named(config):
        may_be_in = list(_events(files)) if key == "threshold" else files
        # Headers of files that are not loaded are only read to say where the column is.
        inside = [file for file in may_be_in if field in file.loaded] or [
            file for file in may_be_in if field in file.types
        ]
        if not inside:
            columns = "; ".join(f"{file.path} has {', '.join(file.types)}" for file in may_be_in)
            raise UserError(f"{key} names {field!r}, which must be a column; {columns}.")
        for file in inside:
            file.need(f"{key} names {field!r}, which", field, types)
    for field in config["discretization"] or ():
        if field not in config["numerical_features"]:
            raise UserError(
                f"discretization names {field!r}, which numerical_features must name, too."
            )


def _check_preloaded(config: Config, files: list[File]) -> None:
    for pair in (config["preload_weight"] or {}).items():
        for key in IDS["inter"]:
            if config[key] == pair[0]:
                raise UserError(
                    f"preload_weight={config['preload_weight']} must not name {_is(config, key)}."
                )
        if not any(file.loaded.keys() >= set(pair) for file in files):
            raise UserError(
                f"preload_weight={config['preload_weight']}: {pair[0]!r} and {pair[1]!r} must be "
                "columns of one file; see RecBole on additional_feat_suffix."
            )


def _check_labels(config: Config, files: list[File]) -> None:
    if config["threshold"] or "labeled" not in str(config["eval_args"]["mode"]):
        return
    for file in _events(files):
        why = (
            "; eval_args.mode=labeled needs a label, which can also be made of another column, "
            "by threshold={'rating': 4}"
        )
        file.need(_is(config, "LABEL_FIELD"), config["LABEL_FIELD"], ["float"], why)


def _check_ratings(config: Config, files: list[File]) -> None:
    if (field := rating_field(config)) is None:
        return
    for file in _events(files):
        if file.types.get(field) != "float":
            columns = ", ".join(map(":".join, file.types.items()))
            raise UserError(
                f"{_is(config, 'objective')} reads ratings, so {_is(config, 'RATING_FIELD')} must "
                f"be a column of type float of {file.path}, whose columns are {columns}; name it, "
                "or choose another objective."
            )

"""Who is asked for what, against which candidates: the catalogue of a run, and its loaders for
validation and test, frozen and audited before any model is built."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from logging import INFO, WARNING, getLogger
from typing import Any

from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.utils import set_color

from recbole_sdpo.checks.metrics import is_of_lists, warn_of_hits_of_all
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.candidate_lists import (
    CandidateLists,
    KnownItems,
    KnownUsers,
    read_lists,
)
from recbole_sdpo.data.candidates import (
    FrozenCandidates,
    candidates_seed,
    evaluation_loader,
    freeze,
    listed,
    share_met_before,
    with_lists,
    with_mode,
)
from recbole_sdpo.data.catalogue import Catalogue, NoTitles
from recbole_sdpo.data.published import PHASES
from recbole_sdpo.data.sequences import met_items, popularity
from recbole_sdpo.data.whole_catalogue import check_length_of_lists
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.audit import Audit, audit_loaders
from recbole_sdpo.files import user_path
from recbole_sdpo.settings import FILE_MODE, MODEL, Settings

REPEATED = 0.05
"""Share of test targets that their user has met before, above which a run warns of them."""

Loaders = dict[str, tuple[AbstractDataLoader, AbstractDataLoader]]
"""For each evaluation mode the loaders for validation and test; the first is the one that
``eval_args`` names, or :data:`FILE_MODE`."""


def catalogue_of(config: RunConfig, dataset: Any) -> Catalogue:
    """The titles of a run's items; a baseline does without where there are none.

    Raises:
        NoTitles: a language model has none to read.
    """
    settings = config.settings
    try:
        catalogue = Catalogue.from_dataset(
            dataset, settings.title_fields, settings.title_article_first
        )
    except NoTitles as error:
        if config["model"] == MODEL:
            raise
        getLogger().warning(
            f"{error} {config['model']} needs no titles, but items of one title may meet in a "
            "candidate set."
        )
        return Catalogue.without_titles(dataset)
    mostly_untitled = 2 * len(catalogue.untitled) > len(catalogue.titles)
    getLogger().log(
        WARNING if mostly_untitled else INFO,
        set_color("catalogue", "blue") + f": {catalogue.describe()}",
    )
    return catalogue


def _given_lists(
    settings: Settings, dataset: Any, catalogue: Catalogue
) -> dict[str, CandidateLists]:
    """What ``candidates_file`` holds, by phase, in the ids of ``dataset``."""
    file = settings.candidates_file
    if not file:
        return {}
    lists = read_lists(user_path(file), KnownUsers(dataset), KnownItems(dataset, catalogue))
    if not len(lists.of("test")):
        raise UserError(
            f"candidates_file={file!r} has no list of the phase test; it must have some, or no "
            "phase at all."
        )
    twins = lists.holding_twins(catalogue)
    if twins:
        getLogger().warning(
            f"candidates_file={file!r}: {twins:,} of {len(lists):,} lists hold another item of "
            "their target's title, which does not count against it."
        )
    return {phase: own for phase in PHASES if len(own := lists.of(phase))}


def _say_met(
    loaders: dict[str, AbstractDataLoader],
    parts: Sequence[Any],
    given: Collection[str],
    file: str,
) -> None:
    """Warn of the ``given`` lists that hold items which their user has met: drawn ones never do."""
    counts = []
    for number, (phase, loader) in enumerate(loaders.items(), 2):
        if phase in given and (holding := loader._sampler.holding_met(*met_items(*parts[:number]))):
            counts.append(f"{holding:,} of {len(loader._sampler.user):,} {phase} lists")
    if counts:
        getLogger().warning(
            f"candidates_file={file!r}: {' and '.join(counts)} hold items that their user has met "
            "before the target; they stay, and a model that knows them well may put them first."
        )


def evaluation_loaders(
    config: RunConfig,
    train_data: AbstractDataLoader,
    rest: list[AbstractDataLoader],
    catalogue: Catalogue,
) -> Loaders:
    """Of RecBole's loaders for validation and test, ``rest``, one of each for every evaluation
    mode, their candidates frozen; where ``candidates_file`` has lists of a phase, its targets that
    have none are left out.

    Raises:
        UserError: the file cannot be used, or no target has a list.
    """
    settings, parts = config.settings, [loader._dataset for loader in (train_data, *rest)]
    seed, file = candidates_seed(config), str(settings.candidates_file)
    given = _given_lists(settings, parts[0], catalogue)
    phases = dict(zip(("valid", "test"), rest, strict=True))
    for phase, loader in phases.items():
        loader = listed(loader, given[phase], file) if phase in given else loader
        phases[phase] = evaluation_loader(loader, phase, settings.max_eval_targets, seed)
    valid_data, test_data = phases.values()
    main = [
        with_lists(loader, given[phase]) if phase in given else loader
        for phase, loader in phases.items()
    ]
    _say_met(dict(zip(phases, main, strict=True)), parts, given, file)
    if given and "valid" not in given:
        getLogger().info(
            f"candidates_file={file!r} has no lists of validation, which is by "
            f"{config['eval_args']['mode']['valid']}."
        )
    mode = FILE_MODE if given else config["eval_args"]["mode"]["test"]
    loaders = {mode: (main[0], main[1])}
    loaders |= {
        mode: (with_mode(valid_data, mode), with_mode(test_data, mode))
        for mode in settings.more_candidates
    }
    exclude, without_history = settings.candidates_exclude_history, []
    for mode, pair in loaders.items():
        setting = "more_candidates" if mode in settings.more_candidates else "eval_args.mode"
        for number, loader in enumerate(pair, 2):
            left_out = freeze(loader, parts[:number], catalogue, seed, exclude, setting)
            if mode == "full" and any(map(is_of_lists, config["metrics"])):
                check_length_of_lists(loader, max(config["topk"]))
        if isinstance(frozen := pair[1]._sampler, FrozenCandidates):
            warn_of_hits_of_all(config, mode, 1 + frozen.negatives.shape[1])
        without_history.append(left_out)  # from the candidates of the test, which come last
    if any(without_history) and (share := share_met_before(parts)) > REPEATED:
        files = parts[-1].benchmark_filename_list is not None
        remedy = "Take them out of the files" if files else "Give rm_dup_inter=first"
        getLogger().warning(
            f"{share:.0%} of the test targets are items that their user has met before, and drawn "
            f"candidates never are: who repeats the history wins. {remedy}, or give "
            "candidates_exclude_history=False."
        )
    return loaders


def audits_of(
    loaders: Loaders, train_data: AbstractDataLoader, catalogue: Catalogue
) -> dict[str, Audit]:
    """The audits of all candidates that are frozen, by mode; warns of those that give their
    targets away."""
    met, audits = popularity(train_data._dataset), {}
    for mode, pair in loaders.items():
        audit = audit_loaders(pair, met, catalogue)
        if audit:
            audits[mode] = audit
            for warning in audit.warnings(mode):
                getLogger().warning(warning)
    return audits

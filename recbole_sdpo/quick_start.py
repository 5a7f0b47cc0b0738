"""Run one experiment: any model of RecBole, or ``SDPO-LLM``, on one split and one set of
candidates."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import PartialState
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.trainer import Trainer
from recbole.utils import dict2str, get_trainer, init_seed, set_color

from recbole_sdpo import compat
from recbole_sdpo.checks.machine import check_folders, check_memory
from recbole_sdpo.checks.metrics import check_topk, is_of_lists
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.candidate_lists import (
    CandidateLists,
    KnownItems,
    KnownUsers,
    read_lists,
)
from recbole_sdpo.data.candidates import (
    candidates_seed,
    evaluation_loader,
    fingerprint,
    freeze,
    listed,
    with_lists,
    with_mode,
)
from recbole_sdpo.data.catalogue import Catalogue, NoTitles
from recbole_sdpo.data.dataset import check_users, create_dataset, data_preparation
from recbole_sdpo.data.published import PHASES
from recbole_sdpo.data.sequences import met_items, popularity
from recbole_sdpo.data.whole_catalogue import check_lists
from recbole_sdpo.device import check_device
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.answers import OF_ANSWERS
from recbole_sdpo.evaluator.audit import BY_POPULARITY, Audit, audit_loaders, floor_rows
from recbole_sdpo.evaluator.cost import top_time
from recbole_sdpo.evaluator.lists import OF_LISTS
from recbole_sdpo.evaluator.popularity import popularity_result
from recbole_sdpo.evaluator.ranks import RankCollector
from recbole_sdpo.files import user_path, whole_file
from recbole_sdpo.inputs import Inputs, package_versions
from recbole_sdpo.interrupt import say_how_to_go_on
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.processes import check_alike, lost
from recbole_sdpo.report.table import markdown_table
from recbole_sdpo.result import RESULT_FILE, write_result
from recbole_sdpo.settings import FILE_MODE, MODEL, Role, Settings, having, kind_of_negatives
from recbole_sdpo.trainer.best_weights import FOLDER, BestWeights, restore, snapshot
from recbole_sdpo.trainer.folder import LOG_FILE, alone_in, run_folder, tidy
from recbole_sdpo.trainer.one_pass import with_one_pass
from recbole_sdpo.trainer.state import holds_state
from recbole_sdpo.trainer.step_file import FILE as STEPS_FILE

RANKS_FILE = "ranks.csv"


def run(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """Train and evaluate one model and write ``result.json`` into its run folder; returns what the
    file holds.

    The folder, which no other run may use meanwhile, holds all that a run writes, but for what it
    keeps in ``cache_dir``. A run that has ended leaves there

    * ``result.json``, the last of its files, with the digests of the next two;
    * ``ranks.csv``, and of SDPO-LLM ``steps.csv``, a row for each optimizer step;
    * ``sft`` and ``sdpo``, checkpoints with their digests in ``SHA256SUMS``, or of another model
      RecBole's ``.pth`` with its best weights (neither unless ``saved``);
    * ``run.log``, and ``tensorboard`` with the curves (``tensorboard --logdir saved``).

    While it goes on, SDPO-LLM also has ``state`` there, from which ``resume`` goes on, and
    ``selection``, the best weights so far on each of ``more_candidates``. A folder holds a run from
    its first state on.

    Args:
        model: a model of RecBole, or ``SDPO-LLM``.
        dataset: its name; the files are in ``data_path``, but ml-100k comes with RecBole.
        config_file_list: YAML files of settings, as in RecBole; a later one overrides an earlier
            one.
        config_dict: settings, over those of the files; the command line overrides both.
        saved: keep checkpoints.

    Raises:
        UserError: a setting is wrong; the message names it and what would be valid.
        OSError, KeyboardInterrupt: a note on it says how the run goes on.
    """
    compat.quiet_warnings()
    transformers.utils.logging.disable_progress_bar()
    compat.check_launcher()
    with ExitStack() as stack:
        early = stack.enter_context(compat.early_records())
        # RecBole sets the visible GPUs by gpu_id, which must come before anything looks at them.
        config = RunConfig(
            model,
            dataset,
            list(config_file_list or []),
            {**(config_dict or {}), **_process_settings()},
        )
        check_device(config)
        state = PartialState(cpu=config["device"].type == "cpu")
        compat.leave_group_at_exit()
        if state.num_processes > 1 and config["model"] != MODEL:
            raise UserError(
                f"A launch of {state.num_processes} processes serves {MODEL} only; start "
                f"{config['model']} with plain python."
            )
        check_folders(config)
        run_dir = run_folder(config)
        # RecBole names its files by the second; here they are alone
        config["run_dir"] = config["checkpoint_dir"] = str(run_dir)
        if state.is_main_process:
            stack.enter_context(alone_in(run_dir))
        state.wait_for_everyone()
        stack.enter_context(compat.records_in(run_dir, LOG_FILE, config, early))
        try:
            return _run(config, state, run_dir, saved)
        except RuntimeError as error:
            if state.num_processes == 1 or not lost(error):
                raise
            ended = UserError("another process of this launch has ended before its time")
            say_how_to_go_on(ended, run_dir if holds_state(run_dir) else None)
            raise ended from error
        except (OSError, KeyboardInterrupt) as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(run_dir)  # where all that a run writes lies
            say_how_to_go_on(error, run_dir if holds_state(run_dir) else None)
            raise


def _run(config: RunConfig, state: PartialState, run_dir: Path, saved: bool) -> dict[str, Any]:
    """:func:`run`, in its folder."""
    logger = getLogger()
    if config["resume"] and not holds_state(run_dir):
        logger.info(
            f"The run in {run_dir} ended before there was a state to go on from; it begins anew."
        )
    init_seed(config["seed"], config["reproducibility"])
    inputs = Inputs.of(config)
    check_alike(config, inputs)
    inputs.keep(run_dir, write=state.is_main_process)
    raw = create_dataset(config)
    described = str(raw)  # RecBole changes the dataset as it splits it
    catalogue = _catalogue(config, raw)
    check_topk(config, raw.item_num - 1)
    check_memory(config, len(raw))
    train_data, *rest = data_preparation(config, raw)
    loaders = evaluation_loaders(config, train_data, rest, catalogue)
    _, test_data = next(iter(loaders.values()))
    if config["train_stage"] not in (None, "finetune"):
        logger.warning(
            f"train_stage={config['train_stage']!r} ends before {config['model']} has learned its "
            "task; see RecBole on it."
        )
    sha256 = {mode: fingerprint(*pair) for mode, pair in loaders.items()}
    audits = _audits(loaders, train_data, catalogue)

    init_seed(config["seed"], config["reproducibility"])
    recommender = compat.model_class(config["model"])(config, train_data._dataset).to(
        config["device"]
    )
    ours = config["model"] == MODEL
    if not ours:
        check_users(recommender, [loader._dataset for loader in (train_data, *rest)])
    trainer_class = (
        get_trainer(config["MODEL_TYPE"], MODEL)
        if ours
        else with_one_pass(compat.trainer_class(config))
    )
    trainer = trainer_class(config, recommender)
    if not ours:  # our trainer has one
        trainer.eval_collector = RankCollector(
            config, catalogue, popularity_discount=config.settings.popularity_discount
        )
        # RecBole's trainers that only pretrain do not
        trainer.eval_collector.data_collect(train_data)
    inputs.check()
    targets = (
        recommender.targets_per_epoch(train_data._dataset) if ours else len(train_data._dataset)
    )
    _log_head(config, recommender, targets, test_data, sha256)
    logger.info(described)

    # A trainer of RecBole's has its best weights on the first candidates in a file, or not at all.
    modes = config.settings.more_candidates if ours or saved else loaders
    best_weights = BestWeights(
        trainer,
        {mode: loaders[mode][0] for mode in modes},
        run_dir / FOLDER if ours and saved else None,
    )
    train = _run_stages if ours else _fit
    stages, ranks = train(trainer, train_data, loaders, best_weights, saved)
    settings = recommender.settings if ours else config.settings  # the model's are complete
    own = {
        key: value
        for key, value in settings.to_flat().items()
        if ours or key in {*having(Role.EVERY_MODEL), "audit"}
    }
    result = {
        "model": config["model"],
        "dataset": config["dataset"],
        "seed": config["seed"],
        "stages": stages,
        "test_result": list(stages.values())[-1]["test"],
        "popularity": popularity_result(config, train_data, test_data, catalogue),
        "audit": {mode: audit.to_json() for mode, audit in audits.items()},
        "candidates_sha256": sha256,
        "training_targets": targets,
        "top10": _top_time(trainer, loaders, state),
        "peak_memory_gib": _peak_memory_gib(),
        "machine": _machine(trainer.device, state),
        "versions": package_versions(),
        "inputs": inputs.digests,
        "settings": {key: _plain(value) for key, value in sorted(config.final_config_dict.items())}
        | own,
        "command": sys.argv,
        "run_dir": str(run_dir),
    }
    if state.is_main_process:
        with whole_file(run_dir / RANKS_FILE) as part:
            pd.concat(ranks).to_csv(part, index=False)
        result = write_result(
            run_dir,
            result,
            [file for file in (RANKS_FILE, STEPS_FILE) if (run_dir / file).is_file()],
        )
        tidy(run_dir)
        logger.info(
            f"{set_color('result', 'yellow')}: {run_dir / RESULT_FILE}\n\n{_table(result)}\n"
        )
    return result


def _top_time(trainer: Trainer, loaders: Loaders, state: PartialState) -> dict[str, Any] | None:
    """Where the whole catalogue has been ranked already, by one process."""
    if "full" not in loaders or state.num_processes > 1:
        return None
    return top_time(trainer, loaders["full"][1])


def _process_settings() -> dict[str, Any]:
    """RecBole stays single-process; the other processes of a launch are quiet, and each sees all
    GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return {}
    quiet = {"state": "error", "show_progress": False} if os.environ.get("RANK", "0") != "0" else {}
    devices = ",".join(map(str, range(torch.cuda.device_count())))
    return quiet | ({"gpu_id": devices} if devices else {})


def _catalogue(config: RunConfig, dataset: Any) -> Catalogue:
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


Loaders = dict[str, tuple[AbstractDataLoader, AbstractDataLoader]]
"""For each evaluation mode the loaders for validation and test; the first is the one that
``eval_args`` names, or :data:`FILE_MODE`."""


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
    """Of the ``given`` lists, how many hold what their user has met, which drawn ones never do?"""
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
    for phase in given.keys() & phases.keys():
        phases[phase] = listed(phases[phase], given[phase], file)
    for phase, loader in phases.items():
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
    for mode, pair in loaders.items():
        for number, loader in enumerate(pair, 2):
            freeze(loader, parts[:number], catalogue, seed, settings.candidates_exclude_history)
            if mode == "full" and any(map(is_of_lists, config["metrics"])):
                check_lists(loader, max(config["topk"]))
    return loaders


def _audits(
    loaders: Loaders, train_data: AbstractDataLoader, catalogue: Catalogue
) -> dict[str, Audit]:
    """Of all candidates that are frozen; warns of those that give their targets away."""
    met, audits = popularity(train_data._dataset), {}
    for mode, pair in loaders.items():
        audit = audit_loaders(pair, met, catalogue)
        if audit:
            audits[mode] = audit
            for warning in audit.warnings(mode):
                getLogger().warning(warning)
    return audits


def _run_stages(
    trainer: Any,
    train_data: AbstractDataLoader,
    loaders: Loaders,
    best_weights: BestWeights,
    saved: bool,
) -> tuple[dict, list]:
    show = trainer.config["show_progress"]
    trainer.prepare(train_data, *(loader for pair in loaders.values() for loader in pair))
    valid_data, _ = next(iter(loaders.values()))
    stages: dict[str, dict] = {}
    ranks: list[pd.DataFrame] = []
    for name in trainer.stages:
        before = best_weights.valid
        best_weights.begin(name, trainer.validated(name))
        trainer.rank_for(name)
        if name == "sdpo" and trainer.config["eval_step"] > 0 and not best_weights.valid:
            # no epoch may be better than its start
            if stages["sft"]["targets"] or trainer.model.settings.popularity_discount:
                best_weights()
            else:  # which has just been validated, by the same scores
                best_weights.begin_with(before)
        report = trainer.fit_stage(
            name, train_data, valid_data, saved=saved, show_progress=show, callback_fn=best_weights
        )
        tests = _test(trainer, loaders, best_weights, name, ranks)
        stages[name] = {
            **vars(report),
            **_of_main(tests, _plain(report.valid)),
            "candidates": tests,
        }
    return stages, ranks


def _fit(
    trainer: Trainer,
    train_data: AbstractDataLoader,
    loaders: Loaders,
    best_weights: BestWeights,
    saved: bool,
) -> tuple[dict, list]:
    valid_data, _ = next(iter(loaders.values()))
    best_weights.begin("fit", validated=False)
    began = time.time()
    ranks: list[pd.DataFrame] = []
    # what is there afterwards this process has written
    Path(trainer.saved_model_file).unlink(missing_ok=True)
    _, valid = trainer.fit(
        train_data,
        valid_data,
        saved=saved,
        show_progress=trainer.config["show_progress"],
        callback_fn=best_weights,
    )
    wall = time.time() - began
    if saved:
        compat.load_best(trainer)
    tests = _test(trainer, loaders, best_weights, "fit", ranks)
    targets = len(train_data._dataset) * len(trainer.train_loss_dict)
    fit = {
        **_of_main(tests, _plain(valid)),
        "wall_s": wall,
        "targets": targets,
        "tokens": 0,
        "train_s": trainer.train_s,
        "candidates": tests,
    }
    return {"fit": fit}, ranks


def _of_main(tests: dict[str, dict], valid: Any) -> dict[str, Any]:
    """Metrics on the candidates that ``eval_args`` names; ``valid`` are those that the trainer
    found."""
    main = next(iter(tests.values()))
    main["valid"] = valid
    return dict(main)


def _test(
    trainer: Trainer,
    loaders: Loaders,
    best_weights: BestWeights,
    stage: str,
    ranks: list[pd.DataFrame],
) -> dict[str, dict]:
    """Metrics for each candidate set, of the weights that are best on it; the ranks behind them
    are added to ``ranks``."""
    if trainer.config["eval_step"] > 0 and not best_weights.valid:
        best_weights()  # nothing was trained: the weights are the best there are
    last_weights, metrics = snapshot(trainer.model) if best_weights.loaders else {}, {}
    for mode, (_, test_data) in loaders.items():
        if mode in best_weights.valid:
            best_weights.restore(mode)
        tokens = test_data._dataset.field2id_token
        collected = (tokens[test_data._dataset.uid_field], tokens[test_data._dataset.iid_field])
        test = trainer.evaluate(
            test_data, load_best_model=False, show_progress=trainer.config["show_progress"]
        )
        ranks.append(
            trainer.eval_collector.pop_ranks(*collected).assign(stage=stage, candidates=mode)
        )
        getLogger().info(set_color(f"{stage} test {mode}", "yellow") + f": {dict2str(test)}")
        metrics[mode] = {"valid": _plain(best_weights.valid.get(mode)), "test": _plain(test)}
    restore(trainer.model, last_weights)
    return metrics


def _log_head(
    config: RunConfig,
    model: AbstractRecommender,
    targets: int,
    test_data: AbstractDataLoader,
    sha256: dict[str, str],
) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = {
        "model": config["model"],
        "parameters trained": f"{trained:,}",
        "training targets": f"{targets:,}",
    }
    if config["model"] == MODEL:
        total = sum(p.numel() for p in model.parameters())
        backbone = model.backbone
        why = (
            f" (backbone=auto on {config['device']}; choose with --backbone, --item_tokens, --peft)"
            if model.settings.backbone.name == "auto"
            else ""
        )
        lines["backbone"] = (
            f"{backbone.name}{why}, {total:,} parameters in {backbone.dtype}, "
            f"item_tokens {backbone.item_tokens}, peft {backbone.peft}"
        )
        if model.negatives:
            kind = kind_of_negatives(config["train_neg_sample_args"], model.sources)
            lines["negatives"] = (
                f"{model.negatives} to a target, {kind}, never of the user's training items"
            )
    if config.settings.popularity_discount:
        lines["ranked by"] = (
            f"score less {config.settings.popularity_discount:g} times log popularity"
        )
    lines["device"] = str(config["device"])
    met = "without" if config.settings.candidates_exclude_history else "with"
    drawn, given = f"{met} what their users have met", f"of {config.settings.candidates_file}"
    for mode, digest in sha256.items():
        lines[f"candidates {mode}"] = (
            f"{len(test_data._dataset):,} test targets, {given if mode == FILE_MODE else drawn}, "
            f"sha256 {digest[:16]}…"
        )
    getLogger().info(
        "\n".join(f"{set_color(key, 'blue')}: {value}" for key, value in lines.items())
    )


def _table(result: dict[str, Any]) -> str:
    tested = result["test_result"]
    metrics = [
        name for name in ("hit@1", "ndcg@5", "mrr@10", *OF_ANSWERS) if name in tested
    ] or list(tested)[:3]
    longest = max(np.atleast_1d(result["settings"]["topk"]))
    metrics += [name for name in tested if is_of_lists(name) and name.endswith(f"@{longest}")]
    after = {"sft": "SFT", "sdpo": OBJECTIVES[result["settings"].get("objective", "sdpo")].title}
    rows = [("popularity", result["popularity"])]
    for stage, report in result["stages"].items():
        rows.append(
            (
                f"{result['model']} after {after[stage]}" if stage in after else result["model"],
                report["test"],
            )
        )
    if discount := result["settings"]["popularity_discount"]:
        rows[-1] = (f"{rows[-1][0]}, less {discount:g} x log popularity", rows[-1][1])
    if result["settings"]["audit"]:
        audit = result["audit"].get(next(iter(result["candidates_sha256"])))
        floor = floor_rows(audit) if audit else {}
        rows[1:1] = [row for row in floor.items() if not row[0].startswith(BY_POPULARITY)]
    return markdown_table(
        ["test", *map(_column, metrics)],
        [[label, *(values.get(name, "") for name in metrics)] for label, values in rows],
    )


def _column(metric: str) -> str:
    """A metric, which RecBole writes in lower case, as the head of a column."""
    name, at, k = metric.partition("@")
    if kind := (OF_ANSWERS | OF_LISTS).get(name):
        return f"{kind.__name__}{at}{k}"
    return metric.upper().replace("HIT", "HR")


def _machine(device: torch.device, state: PartialState) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "device": str(device),
        "processes": state.num_processes,
    }


def _peak_memory_gib() -> float:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
    return round(used / 2**30, 3)


def _plain(value: Any) -> Any:
    """``value`` as JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)

"""Run one experiment: any model of RecBole, or ``SDPO-LLM``, on one split and one set of
candidates."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from logging import getLogger
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from accelerate import PartialState
from recbole.data import data_preparation
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.trainer import Trainer
from recbole.utils import dict2str, get_trainer, init_seed, set_color

from recbole_sdpo import compat
from recbole_sdpo.checks.machine import check_folders, check_memory
from recbole_sdpo.checks.metrics import check_topk
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.candidates import fingerprint
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.dataset import check_users, create_dataset
from recbole_sdpo.device import check_device
from recbole_sdpo.digests import package_versions
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.cost import top_time
from recbole_sdpo.evaluator.popularity import popularity_result
from recbole_sdpo.evaluator.ranks import RankCollector
from recbole_sdpo.files import whole_file
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.interrupt import say_how_to_go_on
from recbole_sdpo.loaders import Loaders, audits_of, catalogue_of, evaluation_loaders
from recbole_sdpo.processes import check_alike, lost
from recbole_sdpo.report.summary import log_head, table_of_tests
from recbole_sdpo.result import RANKS_FILE, RESULT_FILE, write_result
from recbole_sdpo.settings import MODEL, Role, having
from recbole_sdpo.trainer.best_weights import SELECTION, BestWeights, restore, snapshot
from recbole_sdpo.trainer.folder import LOG_FILE, alone_in, run_folder, tidy
from recbole_sdpo.trainer.one_pass import OnePass
from recbole_sdpo.trainer.sdpo_trainer import StageReport
from recbole_sdpo.trainer.state import holds_state
from recbole_sdpo.trainer.step_file import STEPS_FILE


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
        # A backbone on a GPU lowers it, and the caller's next model is another's. Where the caller
        # has set it by torch's newer names, there is none to tell.
        with suppress(RuntimeError):
            products = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, products)
        early = stack.enter_context(compat.early_records())
        # RecBole sets the visible GPUs by gpu_id, which must come before anything looks at them.
        config = RunConfig(
            model,
            dataset,
            list(config_file_list or []),
            {**(config_dict or {}), **_process_settings()},
        )
        check_device(config)
        state = _process_group(config)
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
    other_code = inputs.keep(run_dir, write=state.is_main_process)
    raw = create_dataset(config)
    described = str(raw)  # RecBole changes the dataset as it splits it
    catalogue = catalogue_of(config, raw)
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
    audits = audits_of(loaders, train_data, catalogue)

    trainer, ours = _trainer(config, train_data, rest, catalogue), config["model"] == MODEL
    recommender = trainer.model
    inputs.check()
    targets = (
        recommender.targets_per_epoch(train_data._dataset) if ours else len(train_data._dataset)
    )
    log_head(config, recommender, targets, test_data, sha256)
    logger.info(described)

    # A trainer of RecBole's has its best weights on the first candidates in a file, or not at all.
    modes = config.settings.more_candidates if ours or saved else loaders
    best_weights = BestWeights(
        trainer,
        {mode: loaders[mode][0] for mode in modes},
        run_dir / SELECTION if ours and saved else None,
        later_of_equals=not ours,
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
        "other_code": other_code,
        "settings": {key: _plain(value) for key, value in sorted(config.final_config_dict.items())}
        | own,
        "command": sys.argv,
        "run_dir": str(run_dir),
    }
    if state.is_main_process:
        with whole_file(run_dir / RANKS_FILE) as part:
            ranks.to_csv(part, index=False)
        result = write_result(
            run_dir,
            result,
            [file for file in (RANKS_FILE, STEPS_FILE) if (run_dir / file).is_file()],
        )
        tidy(run_dir)
        where = f"{set_color('result', 'yellow')}: {run_dir / RESULT_FILE}"
        logger.info(f"{where}\n\n{table_of_tests(result)}\n")
    return result


def _trainer(
    config: RunConfig,
    train_data: AbstractDataLoader,
    rest: Sequence[AbstractDataLoader],
    catalogue: Catalogue,
) -> Trainer:
    """The model with weights as drawn, and the trainer around it: ours, or RecBole's, which gets
    what ours has of its own."""
    init_seed(config["seed"], config["reproducibility"])
    kind = compat.model_class(config["model"])
    model = kind(config, train_data._dataset).to(config["device"])
    if config["model"] == MODEL:
        return get_trainer(config["MODEL_TYPE"], MODEL)(config, model)
    check_users(model, [loader._dataset for loader in (train_data, *rest)])
    trainer = compat.trainer_class(config)(config, model)
    trainer._neg_sample_batch_eval = OnePass(model, trainer._neg_sample_batch_eval)
    discount = config.settings.popularity_discount
    trainer.eval_collector = RankCollector(config, catalogue, popularity_discount=discount)
    trainer.eval_collector.data_collect(train_data)  # RecBole's that only pretrain do not
    return trainer


def _top_time(trainer: Trainer, loaders: Loaders, state: PartialState) -> dict[str, Any] | None:
    """:func:`top_time` on the test set; None unless one process has ranked the whole catalogue."""
    if "full" not in loaders or state.num_processes > 1:
        return None
    return top_time(trainer, loaders["full"][1])


def _process_group(config: RunConfig) -> PartialState:
    """Join the other processes of a launch, if there are."""
    on_cpu, launched = config["device"].type == "cpu", os.environ.get("LOCAL_RANK", "-1") != "-1"
    # what lies in the host's memory has sums there, too, such as the gradient's norm
    both = {"backend": "cuda:nccl,cpu:gloo"}
    offloads = config.settings.offload and launched and not on_cpu
    # The others wait while the first writes a state, which takes minutes of a large model. One that
    # dies is told of by the launcher.
    patience = {"timeout": timedelta(hours=1)} if launched else {}
    return PartialState(cpu=on_cpu, **patience, **(both if offloads else {}))


def _process_settings() -> dict[str, Any]:
    """Settings that keep all processes of a launch but the first one quiet."""
    first = os.environ.get("RANK", "0") == "0" or int(os.environ.get("WORLD_SIZE", 1)) == 1
    return {} if first else {"state": "error", "show_progress": False}


def _run_stages(
    trainer: Any,
    train_data: AbstractDataLoader,
    loaders: Loaders,
    best_weights: BestWeights,
    saved: bool,
) -> tuple[dict[str, dict], pd.DataFrame]:
    """Train stage by stage; what each did and found, by its name, and all ranks."""
    show = trainer.config["show_progress"]
    trainer.prepare(train_data, *(loader for pair in loaders.values() for loader in pair))
    valid_data, _ = next(iter(loaders.values()))
    stages: dict[str, dict] = {}
    every: list[pd.DataFrame] = []
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
        tests, ranks = _test(trainer, loaders, best_weights, name, report.valid)
        stages[name] = _stage(report, tests)
        every.append(ranks)
    return stages, pd.concat(every)


def _fit(
    trainer: Trainer,
    train_data: AbstractDataLoader,
    loaders: Loaders,
    best_weights: BestWeights,
    saved: bool,
) -> tuple[dict[str, dict], pd.DataFrame]:
    """Train a model of RecBole; as :func:`_run_stages`, of one stage."""
    valid_data, _ = next(iter(loaders.values()))
    best_weights.begin("fit", validated=False)
    began = time.time()
    # RecBole's name has the time: what a run that was killed left here has another.
    weights = Path(trainer.saved_model_file)
    for before in weights.parent.glob(f"{trainer.config['model']}-*.pth"):
        before.unlink()
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
    tests, ranks = _test(trainer, loaders, best_weights, "fit", valid)
    targets = len(train_data._dataset) * len(trainer.train_loss_dict)
    report = StageReport(valid, wall, targets, tokens=0, train_s=trainer.train_s)
    return {"fit": _stage(report, tests)}, ranks


def _stage(report: StageReport, tests: dict[str, dict]) -> dict[str, Any]:
    """What ``result.json`` says of a stage: its own validation and test are those of the first
    candidates."""
    return {**vars(report), **next(iter(tests.values())), "candidates": tests}


def _test(
    trainer: Trainer,
    loaders: Loaders,
    best_weights: BestWeights,
    stage: str,
    valid: dict[str, float] | None,
) -> tuple[dict[str, dict], pd.DataFrame]:
    """Metrics for each candidate set, of the weights that are best on it, and the ranks behind
    them.

    Args:
        valid: what the trainer found on the first set, which is its own.
    """
    if trainer.config["eval_step"] > 0 and not best_weights.valid:
        best_weights()  # nothing was trained: the weights are the best there are
    last_weights, metrics = snapshot(trainer.model) if best_weights.loaders else {}, {}
    ranks: list[pd.DataFrame] = []
    validated = dict.fromkeys(loaders) | best_weights.valid | {next(iter(loaders)): valid}
    for mode, (_, test_data) in loaders.items():
        if mode in best_weights.valid:
            best_weights.restore(mode)
        dataset = test_data._dataset
        ids = (dataset.field2id_token[field] for field in (dataset.uid_field, dataset.iid_field))
        test = trainer.evaluate(
            test_data, load_best_model=False, show_progress=trainer.config["show_progress"]
        )
        ranks.append(trainer.eval_collector.pop_ranks(*ids).assign(stage=stage, candidates=mode))
        getLogger().info(set_color(f"{stage} test {mode}", "yellow") + f": {dict2str(test)}")
        metrics[mode] = {"valid": _plain(validated[mode]), "test": _plain(test)}
    restore(trainer.model, last_weights)
    return metrics, pd.concat(ranks)


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

"""What must be worked round in RecBole 1.2.1 and its neighbours. tests/test_compat.py tells when
an entry is no longer needed."""

from __future__ import annotations

import atexit
import builtins
import importlib
import importlib.util
import io
import logging
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any, NoReturn

import colorama
import colorlog
import numpy as np
import pandas as pd
import recbole.trainer.trainer
import torch
from accelerate import PartialState
from recbole.config import Config
from recbole.data import utils as data_utils
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.evaluator import metrics
from recbole.evaluator.collector import Collector, DataStruct
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.context_aware_recommender import kd_dagfm
from recbole.model.general_recommender import pop
from recbole.trainer import Trainer
from recbole.utils import get_model, get_trainer
from recbole.utils.logger import RemoveColorFilter, log_colors_config
from scipy.sparse import dok_matrix
from scipy.stats import entropy
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import config_file, naming, whole_file
from recbole_sdpo.settings import merged_parts
from recbole_sdpo.values import Loader, check_values, read_arguments, read_yaml, value_of

# Of kernels that bitsandbytes would like to have, and that a run here does without, it speaks as it
# is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
"""What the shell says, before a ``Config`` of RecBole's says otherwise."""

TEACHERS = ("CrossNet", "CIN")
"""Of KD_DAGFM, the classes that may teach it."""


NUMPY_1 = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_, "bool8": np.bool_}
"""Names that NumPy 2 dropped: what RecBole's ``Config`` takes
(https://github.com/RUCAIBox/RecBole/pull/2203), and last ray 2.6.3."""


def meet_newer_libraries() -> None:
    """Give RecBole back what it knew of NumPy 1, pandas 2, SciPy 1.12 and ray, where the installed
    ones no longer have it.

    * NumPy: :data:`NUMPY_1`.
    * SciPy 1.13 dropped a method that fills the matrices of LightGCN and its kin
      (https://github.com/RUCAIBox/RecBole/issues/2034).
    * pandas 3: ``column.agg(len)`` is the height of the column, and no longer the length of each
      entry, which RecBole means (https://github.com/pandas-dev/pandas/pull/57332). That ``fillna``
      in place no longer fills is mended with the other methods of ``Dataset``, in
      :mod:`recbole_sdpo.data.dataset`. Neither is reported to RecBole, as far as we found.
    * ray: RecBole wants 2.6.3 or older, which has no wheel from Python 3.12 on
      (https://github.com/RUCAIBox/RecBole/issues/1820).
    """
    for name, kind in NUMPY_1.items():
        if not hasattr(np, name):
            setattr(np, name, kind)
    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, entries: self._dict.update(entries)
    if int(pd.__version__.partition(".")[0]) >= 3:
        for module in ("dataset", "kg_dataset", "sequential_dataset"):
            vars(importlib.import_module(f"recbole.data.dataset.{module}"))["len"] = _len
    if importlib.util.find_spec("ray") is None:
        _import_quick_start()


def _len(sized: Any) -> int | pd.Series:
    """``len``, but of a column that of each entry."""
    return sized.map(builtins.len) if isinstance(sized, pd.Series) else builtins.len(sized)


def _import_quick_start() -> None:
    """Import ``recbole.quick_start`` without ray, of whose Tune it uses one function, in a
    search for settings."""
    ray = ModuleType("ray")
    vars(ray)["tune"] = SimpleNamespace(report=_refuse_search)
    sys.modules["ray"] = ray
    try:
        importlib.import_module("recbole.quick_start")
    finally:
        del sys.modules["ray"]  # others ask by importing it whether it is there


def _refuse_search(**result: float) -> NoReturn:
    raise UserError(
        "RecBole's search by ray's Tune needs ray, which is not installed; install it, or use "
        "--experiment with --tune."
    )


def trainer_class(config: Config) -> type[Trainer]:
    """RecBole's trainer for a model of RecBole, but that of its weights it keeps the best alone, in
    one file that is whole.

    RecBole's own checkpoint also pickles its ``Config`` and the optimizer: three times the bytes,
    and torch >= 2.6, which by default loads weights only, refuses it: in the evaluation after
    training (https://github.com/RUCAIBox/RecBole/issues/2215), and where NeuMF starts from those of
    its two halves (https://github.com/RUCAIBox/RecBole/issues/2212). Its name ends with the second,
    which two runs may share; reported nowhere that we found.
    """

    base: Any = get_trainer(config["MODEL_TYPE"], config["model"])

    class WeightsOnly(base):
        train_s = 0.0
        """Seconds of its epochs, without validation."""

        def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            loss = super()._train_epoch(*args, **kwargs)
            self.train_s += time.perf_counter() - began
            return loss

        def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
            self._save_weights(Path(self.saved_model_file))

        def save_pretrained_model(self, epoch: int, saved_model_file: str) -> None:
            """RecBole's models read such a file by ``pre_model_path``."""
            self._save_weights(Path(saved_model_file))
            self.saved_model_file = saved_model_file

        def _save_weights(self, file: Path) -> None:
            weights = {
                "state_dict": self.model.state_dict(),
                "other_parameter": self.model.other_parameter(),
            }
            content = io.BytesIO()  # to a full disk torch.save says "unexpected pos"
            torch.save(weights, content)
            with whole_file(file) as part:
                part.write_bytes(content.getbuffer())

    return WeightsOnly


def load_best(trainer: Trainer) -> None:
    """Load the weights that ``trainer``, of :func:`trainer_class`, has just written, this
    process's own; without any, keep the last."""
    if Path(trainer.saved_model_file).is_file():
        weights = torch.load(
            trainer.saved_model_file, map_location=trainer.device, weights_only=False
        )
        trainer.model.load_state_dict(weights["state_dict"])
        load_rest(trainer.model, weights["other_parameter"])


def load_rest(model: AbstractRecommender, rest: dict[str, Any] | None) -> None:
    """Put back what RecBole keeps of ``model`` beside its weights, after those were loaded.

    Representations of all users and items that are not in it are forgotten. KGIN and MCCLK name
    none, and would rank the whole catalogue by those of the last validation, whatever weights are
    loaded; reported nowhere that we found.
    """
    for name in vars(model):
        if name.startswith("restore_"):
            setattr(model, name, None)
    model.load_other_parameter(rest)


class _LogFile(logging.FileHandler):
    """Ends the run where nothing can be written, such as on a full disk; ``logging`` would print
    a traceback at each message."""

    def handleError(self, record: logging.LogRecord) -> None:
        with naming(Path(self.baseFilename)):
            raise


class EarlyRecords(logging.Handler):
    """Keeps what is said before a run has a log, and prints it as ``logging`` does where nobody
    listens."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        alone, printer = logging.getLogger().handlers == [self], logging.lastResort
        if alone and printer and record.levelno >= printer.level:
            printer.handle(record)


@contextmanager
def early_records() -> Iterator[EarlyRecords]:
    """Keep what is said until :func:`records_in`."""
    early = EarlyRecords()
    logging.getLogger().addHandler(early)
    try:
        yield early
    finally:
        logging.getLogger().removeHandler(early)


@contextmanager
def records_in(folder: Path, log: str, config: Config, early: EarlyRecords) -> Iterator[None]:
    """Let RecBole log into the file ``log`` in ``folder``, what was said ``early`` before all else,
    and draw curves into ``tensorboard`` there; on the screen as ever.

    RecBole names both by the second, in the working directory, and the first run of a process keeps
    its log file for all that come after. Reported nowhere that we found; recbole/utils/logger.py,
    ``init_logger``, and utils.py, ``get_tensorboard``.
    """
    colorama.init(autoreset=True)
    level = getattr(logging, str(config["state"] or "info").upper(), logging.INFO)
    screen, file = logging.StreamHandler(), _LogFile(folder / log, encoding="utf-8")
    line = "%(asctime)-15s %(levelname)s  %(message)s"
    screen.setFormatter(
        colorlog.ColoredFormatter(
            f"%(log_color)s{line}", "%d %b %H:%M", log_colors=log_colors_config
        )
    )
    file.setFormatter(logging.Formatter(line, "%a %d %b %Y %H:%M:%S"))
    file.addFilter(RemoveColorFilter())
    root = logging.getLogger()
    root.removeHandler(early)
    # where somebody else's handlers are, these are the screen
    handlers: list[logging.Handler] = [file] if root.handlers else [screen, file]
    before = root.level
    for record in early.records:
        if record.levelno >= level:
            file.handle(record)
    root.setLevel(level)
    for handler in handlers:
        handler.setLevel(level)
        root.addHandler(handler)
    theirs, hook = recbole.trainer.trainer.get_tensorboard, threading.excepthook

    def of_threads(args: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands what went wrong, such as a full disk, to the main thread,
        and need not print it, too."""
        if type(args.thread).__name__ != "_AsyncWriterThread":
            hook(args)

    recbole.trainer.trainer.get_tensorboard = lambda logger: SummaryWriter(
        str(folder / "tensorboard")
    )
    threading.excepthook = of_threads
    try:
        yield
    finally:
        recbole.trainer.trainer.get_tensorboard, threading.excepthook = theirs, hook
        for handler in handlers:
            root.removeHandler(handler)
        root.setLevel(before)
        file.close()


def take_values_as_data() -> None:
    """Have RecBole's ``Config`` read values, which it evaluates as Python:
    ``__import__('os').system(…)`` runs, ``self`` is its ``self``.

    Its YAML loader also builds Python's objects, and changes the loader of the whole process.
    Reported nowhere that we found; recbole/config/configurator.py, lines 97 to 140.
    """
    Config._build_yaml_loader = lambda self: Loader
    Config._convert_config_dict = _convert_config_dict
    Config._load_config_files = _load_config_files
    Config._load_cmd_line = _load_cmd_line
    # KD_DAGFM evaluates its setting teacher, line 44 of its module; reported nowhere that we found.
    kd_dagfm.eval = {name: getattr(kd_dagfm, name) for name in TEACHERS}.__getitem__


def _convert_config_dict(self: Config, config_dict: dict[str, Any]) -> dict[str, Any]:
    given = check_values(config_dict).items()
    return check_values(
        {key: value_of(key, item) if isinstance(item, str) else item for key, item in given}
    )


def _load_config_files(self: Config, files: list[str] | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for file in files or ():
        given = read_yaml(config_file(file), f"config_files={str(file)!r}")
        if "config_files" in given:
            raise UserError(
                f"config_files={str(file)!r} must not name config_files; give them all on the "
                "command line, or from Python."
            )
        settings |= given | merged_parts(settings, given)
        if settings.get("trust_remote_code"):
            raise UserError(
                f"config_files={str(file)!r} must not set trust_remote_code; give it on the "
                "command line, or from Python."
            )
    return settings


def _load_cmd_line(self: Config) -> dict[str, Any]:
    program, *arguments = sys.argv
    if "ipykernel_launcher" in program:
        return {}
    if arguments[:1] == ["run"]:  # our sub-command
        del arguments[0]
    for option in ("--model", "--dataset", "--config_files"):
        if option in arguments:  # argparse took the word after it, too
            place = arguments.index(option)
            del arguments[place : place + 2]
    settings, rest = read_arguments(arguments)
    if rest:
        getLogger().warning(f"command line args [{' '.join(rest)}] will not be used in RecBole")
    return settings


def heed_visible_gpus() -> None:
    """Have a run without ``gpu_id`` take the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves it, and each
    process of a launch all that there are, where nobody says which.

    RecBole puts its default in the place of that: the first GPU of the machine, whoever works there
    (https://github.com/RUCAIBox/RecBole/issues/1955).
    """
    theirs = Config._init_device

    def _init_device(self: Config) -> None:
        if "gpu_id" not in self.external_config_dict:
            several = int(os.environ.get("WORLD_SIZE", 1)) > 1
            every = ",".join(map(str, range(torch.cuda.device_count() if several else 0)))
            default = every or self.final_config_dict["gpu_id"]
            self.final_config_dict["gpu_id"] = default if VISIBLE_GPUS is None else VISIBLE_GPUS
        theirs(self)

    Config._init_device = _init_device


def never_unpickle() -> None:
    """Have RecBole's data functions load no pickle, which they do unasked wherever one lies in
    ``checkpoint_dir``.

    That runs code, and later runs ignore what the data's files hold
    (https://github.com/RUCAIBox/RecBole/issues/1602). Its ``load_split_dataloaders`` finds none,
    and its ``create_dataset``, which ours does not call, refuses.
    """
    data_utils.load_split_dataloaders = lambda config: None
    data_utils.pickle = SimpleNamespace(load=_refuse, dump=pickle.dump)


def _refuse(stream: IO[bytes]) -> NoReturn:
    raise UserError(
        f"{stream.name} is a pickle, which runs code as it is loaded and does not follow the "
        "data's files; delete it, and they are read."
    )


def import_models() -> None:
    """Import RecBole's sequential models and leave autograd's anomaly detection as it was.

    The module of SINE turns it on as it is imported, for every model of the process: each backward
    pass then looks for NaN and records stack traces. Reported nowhere that we found;
    recbole/model/sequential_recommender/sine.py, line 25.
    """
    before = torch.is_anomaly_enabled()
    importlib.import_module("recbole.model.sequential_recommender")
    torch.autograd.set_detect_anomaly(before)


class Pop(pop.Pop):
    """RecBole's, which counts an item once a batch, however often it is there
    (https://github.com/RUCAIBox/RecBole/issues/2198).

    And it counts the negatives that RecBole's loader puts among the items of a model that learns
    from labels; reported nowhere that we found.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.label = config["LABEL_FIELD"]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        item = interaction[self.ITEM_ID]
        met = item[interaction[self.label] > 0] if self.label in interaction else item
        self.item_cnt += torch.bincount(met, minlength=self.n_items)[:, None]
        self.max_cnt = self.item_cnt.max(dim=0)[0]
        return self.fake_loss.new_zeros(1, requires_grad=True)


class GAUC(metrics.GAUC):
    """RecBole's, which returns a number of NumPy's with 32 bits, neither rounded nor fit for
    JSON. Reported nowhere that we found."""

    def calculate_metric(self, dataobject: DataStruct) -> dict[str, float]:
        return {
            name: round(float(result), self.decimal_place)
            for name, result in super().calculate_metric(dataobject).items()
        }


def hand_out_counts() -> None:
    """Have RecBole's collector hand out what is no tensor: the numbers and counters that
    ItemCoverage, GiniIndex, AveragePopularity and TailPercentage need.

    RecBole asks for their ``.cpu()`` (https://github.com/RUCAIBox/RecBole/issues/2194).
    """
    Collector.get_data_struct = _get_data_struct


_recbole_get_data_struct = Collector.get_data_struct


def _get_data_struct(self: Collector) -> DataStruct:
    held = self.data_struct._data_dict
    counts = {key: held.pop(key) for key in list(held) if not isinstance(held[key], Tensor)}
    handed_out = _recbole_get_data_struct(self)
    for struct in (self.data_struct, handed_out):
        struct._data_dict.update(counts)
    return handed_out


class _OfLists:
    """A metric of the items that all users get, which means nothing where each chooses among a few
    of the catalogue: RecBole's are silent about it, these have no value there."""

    def calculate_metric(self, dataobject: DataStruct) -> dict[str, float]:
        return super().calculate_metric(dataobject) if "rec.items" in dataobject else {}  # type: ignore[misc]


class _OfCatalogue(_OfLists):
    """RecBole's, which counts its padding among the items. Reported nowhere that we found;
    recbole/evaluator/collector.py, line 84."""

    def used_info(self, dataobject: DataStruct) -> tuple[np.ndarray, int]:
        lists, items = super().used_info(dataobject)  # type: ignore[misc]
        return lists, items - 1


class ItemCoverage(_OfCatalogue, metrics.ItemCoverage):
    """The share of the catalogue that any user gets."""


class GiniIndex(_OfCatalogue, metrics.GiniIndex):
    """How unequally often items are recommended: 0 is alike, 1 is one item alone."""


class AveragePopularity(_OfLists, metrics.AveragePopularity):
    """The mean popularity in training of what users get."""


class ShannonEntropy(_OfLists, metrics.ShannonEntropy):
    """The entropy of the items that users get, in nats.

    RecBole divides it by the number of different items, which its own formula does not. Reported
    nowhere that we found; recbole/evaluator/metrics.py, line 630.
    """

    def get_entropy(self, item_matrix: np.ndarray) -> float:
        return float(entropy(np.unique(item_matrix, return_counts=True)[1]))


class TailPercentage(_OfLists, metrics.TailPercentage):
    """The share of rare items among what users get: the rarest ``tail_ratio`` of the catalogue, or
    if that is above 1 the items that occur so often at most.

    RecBole looks each of them up in a list of all rare items. Reported nowhere that we found;
    recbole/evaluator/metrics.py, line 753.
    """

    def get_tail(self, item_matrix: np.ndarray, count_items: dict[int, int]) -> np.ndarray:
        item, count = (np.array(part) for part in zip(*sorted(count_items.items()), strict=True))
        rarest = item[np.argsort(count, kind="stable")[: max(int(len(item) * self.tail), 1)]]
        return np.isin(item_matrix, item[count <= self.tail] if self.tail > 1 else rarest)


OF_LISTS = (ItemCoverage, AveragePopularity, GiniIndex, ShannonEntropy, TailPercentage)
"""RecBole's metrics of what all users get."""


def model_class(name: str) -> type[AbstractRecommender]:
    """The model that RecBole has under ``name``, or what stands in for it here."""
    return Pop if name == "Pop" else get_model(name)


@contextmanager
def no_arguments() -> Iterator[None]:
    """Hide the arguments of the program, which RecBole takes for its settings wherever a
    ``Config`` is made."""
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = arguments


@contextmanager
def same_gpus() -> Iterator[None]:
    """Leave the visible GPUs as they are: RecBole sets them by ``gpu_id``, for the whole
    process, wherever a ``Config`` is made."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def environment() -> dict[str, str]:
    """The environment for a process that is to find the visible GPUs as this one did, whatever a
    ``Config`` has made of them since."""
    rest = {key: text for key, text in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return rest if VISIBLE_GPUS is None else rest | {"CUDA_VISIBLE_DEVICES": VISIBLE_GPUS}


def check_launcher() -> None:
    """Refuse ``accelerate launch --cpu --num_processes 2``, which starts a single process, and
    variables of a launcher that are no numbers, or not all there.

    The former leaves a master address without a world size
    (https://github.com/huggingface/accelerate/issues/2741).

    Raises:
        UserError: naming the command that does start several, or the variable.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name)
        if text == "-1":  # none of several
            continue
        if text is not None and not text.isdecimal():
            raise UserError(
                f"{name}={text!r} in the environment must be a whole number, as torchrun sets it; "
                "unset it, or start with torchrun."
            )
        if text and (name == "LOCAL_RANK" or int(text) > 1) and "MASTER_ADDR" not in os.environ:
            raise UserError(
                f"{name}={text} in the environment says that this is one of several processes, and "
                "MASTER_ADDR is not there; unset it, or start with torchrun."
            )
    if (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        and "MASTER_ADDR" in os.environ
        and "WORLD_SIZE" not in os.environ
    ):
        raise UserError(
            "accelerate launch --cpu starts one process whatever --num_processes says; use "
            "torchrun --nproc_per_node=2 run_recbole_sdpo.py …, which accelerate joins."
        )


def leave_group_at_exit() -> None:
    """Leave a group of gloo while Python still stands.

    A thread of gloo may hold tensors, and a process that frees them later is aborted at its end,
    now and then, whatever it had to say (https://github.com/pytorch/pytorch/pull/179291). One of
    NCCL may wait there for its peers (https://github.com/pytorch/pytorch/issues/196968), so that a
    process that failed would not end.
    """
    state = PartialState()
    if state.backend == "gloo":
        atexit.register(state.destroy_process_group)


def quiet_warnings() -> None:
    """Hide warnings that a user can do nothing about: of RecBole's own code, and of what peft
    0.21 reads of transformers 5.23."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"recbole\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"recbole\.")

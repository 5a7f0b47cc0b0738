"""How time and memory grow, one factor at a time: python benchmarks/scaling.py [--sizes full]

The data are synthetic, and the backbone is scratch. README.md beside this file says what each row
means.
"""

from __future__ import annotations

import os

# Of one core, whatever a library would start as it is imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

import argparse
import gc
import json
import logging
import multiprocessing
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd
import recbole
import torch
from accelerate import Accelerator, PartialState
from recbole.data import data_preparation
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction

import recbole_sdpo
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.candidates import fingerprint
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.dataset import create_dataset, user_histories
from recbole_sdpo.data.examples import Examples
from recbole_sdpo.loaders import evaluation_loaders
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.recommend import Recommender
from recbole_sdpo.recommend_all import recommend_all
from recbole_sdpo.report.table import markdown_table
from recbole_sdpo.trainer.batches import StageBatches
from recbole_sdpo.trainer.stage import Stage

FORK = multiprocessing.get_context("fork")
"""Its children begin with the imports of their parent."""

STEP, STEPS = 128, 5
"""Targets to an optimizer step, and steps of which the median counts, but for the first."""

ONE_IN = 100
"""Of so many users one is recommended to."""


@dataclass(frozen=True)
class Point:
    """Where a piece of work is measured.

    Attributes:
        each: events of a user.
        items: titles in the catalogue.
        history: titles in a prompt at most.
        negatives: K.
        ranked: users for whom candidates or the catalogue are ranked.
        learned: targets of SFT before the catalogue is ranked. A search leaves out what is
            improbable, and to random weights nothing is.
        processes: one thread each.
    """

    users: int
    each: int
    items: int
    history: int
    negatives: int
    ranked: int
    learned: int
    processes: int = 1


BASE = {
    "small": Point(1_000, 10, 500, 20, 3, ranked=2, learned=500),
    "full": Point(10_000, 10, 10_000, 20, 3, ranked=4, learned=60_000),
}

FACTORS: dict[str, tuple[Callable[[Point, int], Point], dict[str, tuple[int, ...]]]] = {
    # The same users have more each.
    "events": (
        lambda base, size: replace(base, each=size // base.users),
        {"small": (10_000, 30_000), "full": (100_000, 1_000_000, 10_000_000)},
    ),
    # Each with as many events.
    "users": (
        lambda base, size: replace(base, users=size),
        {"small": (1_000, 3_000), "full": (10_000, 100_000, 1_000_000)},
    ),
    "items": (
        lambda base, size: replace(base, items=size),
        {"small": (500, 1_500), "full": (1_000, 10_000, 100_000, 1_000_000)},
    ),
    # Of fewer users with more events each, so that prompts are full.
    "history": (
        lambda base, size: replace(base, users=base.users // 20, each=200, history=size),
        {"small": (20, 40), "full": (10, 20, 40, 80, 160)},
    ),
    "K": (
        lambda base, size: replace(base, negatives=size),
        {"small": (3, 7), "full": (1, 3, 7, 15, 31, 63)},
    ),
    # Batches of those who are ranked for, and parts of 500 users, go to processes whole: so there
    # are several.
    "processes": (
        lambda base, size: replace(
            base, users=10 * base.users, each=4, ranked=22 * base.ranked, processes=size
        ),
        {"small": (1, 2), "full": (1, 2)},
    ),
}
"""For each factor, what the base point becomes at one of its sizes, and the sizes."""


def data(point: Point, data_path: Path) -> str:
    """The name of random data in ``data_path``, which are written unless they are there.

    Items are as popular as Zipf's law has it, and so are the words of their titles: two to eight,
    30 characters together, between the titles of ml-100k and those of amazon-games. What is there
    already has a number, as sequels have.
    """
    name = f"{point.users}-{point.each}-{point.items}"
    folder = data_path / name
    if folder.exists():
        return name
    folder.mkdir()
    rng = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    drawn = rng.choice(syllables, (5_000, 3)).tolist()
    words = np.array(["".join(row[: 2 + n % 2]).title() for n, row in enumerate(drawn)], object)
    lengths = 2 + rng.binomial(6, 0.4, point.items)
    texts = np.split(words[_zipf(rng, len(words), lengths.sum())], np.cumsum(lengths)[:-1])
    titles = pd.Series([" ".join(text) for text in texts])
    copy = titles.groupby(titles).cumcount()
    items = {
        "item_id:token": np.arange(point.items),
        "title:token_seq": titles.where(copy == 0, titles + " " + (copy + 1).astype(str)),
    }
    events = {
        "user_id:token": np.tile(np.arange(point.users), point.each),
        "item_id:token": _zipf(rng, point.items, point.users * point.each),
        "timestamp:float": np.arange(point.users * point.each),
    }
    for kind, columns in (("item", items), ("inter", events)):
        pd.DataFrame(columns).to_csv(folder / f"{name}.{kind}", sep="\t", index=False)
    return name


def _zipf(rng: np.random.Generator, values: int, number: int) -> np.ndarray:
    """Numbers from 0 to below ``values``; the n-th of these comes in proportion to 1/n."""
    shares = np.cumsum(1 / np.arange(1, values + 1))
    return np.searchsorted(shares, shares[-1] * rng.random(number))


@dataclass
class Bench:
    """What a run has at ``point``, each part made when it is asked for first.

    Args:
        data_path: the folder of all data.
    """

    point: Point
    data_path: Path

    def make(self, parts: Sequence[str]) -> None:
        """Have the named parts there."""
        for part in parts:
            getattr(self, part)

    @cached_property
    def config(self) -> RunConfig:
        """Titles have several tokens, whatever the catalogue's size.

        With a million titles nobody gives each a token of its own, for which a step would compute
        a logit and train a row. So the vocabulary is as small as that of run.py, and does not grow.
        """
        given = {
            "data_path": str(self.data_path),
            # The catalogue has all titles, also those of no event.
            "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
            "MAX_ITEM_LIST_LENGTH": self.point.history,
            "backbone": "scratch",
            "scratch_vocab_size": 2048,
            "sft_epochs": 1,
            "sdpo_epochs": 1,
            "sdpo_targets_per_step": STEP,
            "use_gpu": False,
            "show_progress": False,
        }
        name = data(self.point, self.data_path)
        return RunConfig("SDPO-LLM", name, config_dict=given)

    @cached_property
    def dataset(self) -> Dataset:
        return create_dataset(self.config)

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue.from_dataset(self.dataset, self.config.settings.title_fields)

    @cached_property
    def loaders(self) -> tuple[AbstractDataLoader, ...]:
        """Of training, validation and test."""
        return data_preparation(self.config, self.dataset)

    @cached_property
    def model(self) -> SDPOLLM:
        """Its weights are random."""
        torch.manual_seed(0)
        return SDPOLLM(self.config, self.loaders[0]._dataset)

    @cached_property
    def examples(self) -> Examples:
        """What S-DPO trains on."""
        train = self.loaders[0]
        return self.model.examples(train._dataset, train._sampler, self.point.negatives)

    @cached_property
    def searched(self) -> SDPOLLM:
        """The model after some SFT, its titles in a tree."""
        model, train = self.model, self.loaders[0]
        examples = model.examples(train._dataset, train._sampler, 0)
        sft = model.settings.sft
        alone = Accelerator(cpu=True)
        stage = Stage("sft", "sft", sft, self.point.learned, model, examples, alone, None)
        stage.run_epoch(False, lambda last: None)
        len(model.title_tree.blocks), len(model.title_tree.spans)  # made as they are asked for
        return model.eval()

    @cached_property
    def recommender(self) -> Recommender:
        """Of the same policy."""
        model, data = self.searched, create_dataset(self.config)
        tokens, window = data.field2id_token[data.iid_field], self.point.history
        users = user_histories(data)
        return Recommender(model.lm, model.catalogue, model.units, tokens, users, window)

    @property
    def asked(self) -> Interaction:
        """Rows of the test, of the users who are ranked for."""
        return self.loaders[2]._dataset.inter_feat[: self.point.ranked]


Parts = dict[str, float]
"""Seconds of a piece of work, under "", and of its parts."""


def load(bench: Bench) -> Parts:
    """What a run begins with: files, titles, RecBole's augmentation and split."""
    began = time.perf_counter()
    with seconds_by_package(recbole_sdpo, recbole) as seconds:
        bench.make(("catalogue", "loaders"))
    whole = time.perf_counter() - began
    return {"": whole, ", RecBole's part": seconds["recbole"], ", ours": seconds["recbole_sdpo"]}


def freeze(bench: Bench) -> Parts:
    """Twenty candidates for each target of validation and test, and their fingerprint."""
    train, *rest = bench.loaders

    def side() -> None:
        (pair,) = evaluation_loaders(bench.config, train, rest, bench.catalogue).values()
        fingerprint(*pair)

    return least(side, 1)


def pack(bench: Bench) -> Parts:
    """The batches of a step: their negatives drawn and their forests planted."""
    model, settings = bench.model, bench.model.settings.sdpo
    batches = StageBatches("sdpo", settings, STEP, bench.examples, model.encoder, 0)
    loader = batches.loader(batches.plan(0)[:1], 0)
    return least(lambda: list(loader), 3)


def step(bench: Bench) -> Parts:
    """A step of S-DPO: packing, policy and reference, backward, optimizer."""
    model, settings, alone = bench.model, bench.model.settings.sdpo, Accelerator(cpu=True)
    model.lm.freeze_reference()
    limit = STEPS * STEP
    stage = Stage("sdpo", "sdpo", settings, limit, model, bench.examples, alone, None)
    ends: list[float] = []
    stage.run_epoch(False, lambda last: ends.append(time.perf_counter()))
    return {"": statistics.median(np.diff(ends))}


def rank(bench: Bench) -> Parts:
    """Scores of 20 random candidates for each user."""
    model = bench.model.eval()
    rows = bench.asked.repeat_interleave(20)
    rows.update(Interaction({"item_id": torch.randint(1, model.n_items, (len(rows),))}))
    return least(lambda: model.predict(rows), 3)


def exact(bench: Bench) -> Parts:
    """Scores of all titles for each user."""
    return least(lambda: bench.searched.full_sort_predict(bench.asked), 1)


def top(bench: Bench) -> Parts:
    """The ten best titles of each user, and bounds for the rest."""
    model = bench.searched
    model.settings = replace(model.settings, full_sort="topk")
    return least(lambda: model.full_sort_predict(bench.asked), 1)


def recommend(bench: Bench) -> Parts:
    """The ten best titles of every hundredth user, in a file; the catalogue's tree is planted."""
    state, recommender = PartialState(), bench.recommender
    users = list(recommender.users)[::ONE_IN]
    share = state.process_index, state.num_processes
    file = bench.data_path / "best.csv"
    parts = least(lambda: recommend_all(recommender, file, users, share=share), 1)
    if state.is_main_process:
        file.unlink()
    return parts


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        title: what the table calls it.
        do: does and times it.
        needs: what of :class:`Bench` must be there before; that is neither timed nor weighed.
        bounds: by factor, what bounds it; no other factor is measured.
    """

    title: str
    do: Callable[[Bench], Parts]
    needs: tuple[str, ...]
    bounds: dict[str, str]


AUGMENTED = "RecBole's augmentation: a history for each event"

WORKS = {
    "load": Work(
        "loading and splitting", load, (),
        {
            "events": AUGMENTED,
            "users": AUGMENTED,
            "items": "titles read and numbered",
            "history": AUGMENTED,
        },
    ),
    "freeze": Work(
        "freezing candidates", freeze, ("catalogue", "loaders"),
        {
            "events": "what users met, from RecBole's histories",
            "users": "targets drawn for and fingerprinted",
            "items": "titles compared",
            "history": "what users met, from RecBole's histories",
        },
    ),
    "pack": Work(
        "packing", pack, ("examples",),
        {
            "events": "forest tokens",
            "users": "forest tokens",
            "items": "forest tokens",
            "history": "forest tokens",
            "K": "forest tokens",
        },
    ),
    "step": Work(
        "a training step", step, ("examples",),
        {
            "events": "forest tokens",
            "users": "forest tokens",
            "items": "forest tokens",
            "history": "forest tokens and their attention",
            "K": "forest tokens",
            "processes": "packing, the sum of gradients and the optimizer are each process's",
        },
    ),
    "rank": Work(
        "ranking 20 candidates", rank, ("model",),
        {
            "items": "forest tokens",
            "history": "forest tokens and their attention",
            "processes": "batches go to processes whole",
        },
    ),
    "exact": Work(
        "ranking the catalogue, exact", exact, ("searched",),
        {
            "items": "tokens of all titles",
            "history": "tokens of all titles, each of which sees the prompt",
            "processes": "batches go to processes whole",
        },
    ),
    "topk": Work(
        "ranking the catalogue, topk", top, ("searched",),
        {
            "items": "a score or bound for each title",
            "history": "the prompt",
            "processes": "batches go to processes whole",
        },
    ),
    "recommend": Work(
        "recommend --users", recommend, ("recommender",),
        {
            "users": "a search for each",
            "items": "the tree of titles, planted once",
            "history": "the prompt",
            "processes": "parts of 500 users go to processes whole; each plants the tree",
        },
    ),
}  # fmt: skip
"""In the order of what they need, so that what one has is there for the next."""


def least(side: Callable[[], object], repeats: int) -> Parts:
    """The least seconds of so many turns: what else the machine does only adds."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        side()
        seconds.append(time.perf_counter() - began)
    return {"": min(seconds)}


@contextmanager
def seconds_by_package(*packages: ModuleType) -> Iterator[dict[str, float]]:
    """Seconds of each package's code meanwhile, other code that it calls included: whoever is
    innermost as a timer rings has the time since it last rang."""
    seconds: dict[str, float] = defaultdict(float)
    folders = {f"{package.__path__[0]}{os.sep}": package.__name__ for package in packages}
    last = time.perf_counter()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal last
        began, last = last, time.perf_counter()
        while frame:
            for folder, name in folders.items():
                if frame.f_code.co_filename.startswith(folder):
                    seconds[name] += last - began
                    return
            frame = frame.f_back

    before = signal.signal(signal.SIGALRM, note)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        yield seconds
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


Result = dict[str, Any]
"""``seconds``, by part, and ``MiB``; or ``why`` there are none."""


def measure(work: Work, bench: Bench) -> Result:
    """The seconds of ``work``, and how many MiB its process came to have beyond what it had."""
    gc.collect()
    with suppress(OSError):  # Linux forgets the peak; a fork's own begins with what it has
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mib()
    seconds = work.do(bench)
    return {"seconds": seconds, "MiB": _peak_mib() - before}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def in_child(function: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
    """What ``function(*args)`` yields, in a process of its own, which begins with what this has.

    Raises:
        ChildProcessError: it ended before that did, and has said why on standard error.
    """
    receiver, sender = FORK.Pipe(duplex=False)

    def work() -> None:
        for value in function(*args):
            sender.send(value)

    process = FORK.Process(target=work)
    process.start()
    sender.close()
    with suppress(EOFError):
        while True:
            yield receiver.recv()
    process.join()
    if process.exitcode:
        raise ChildProcessError(f"failed, exit code {process.exitcode}")


Found = tuple[str, Result]
"""Which piece of work, and what was found."""


def each_alone(bench: Bench, names: Sequence[str]) -> Iterator[Found]:
    """Each piece of work in a process of its own, which begins with what it needs."""

    def alone(work: Work) -> Iterator[Result]:
        yield measure(work, bench)

    for name in names:
        bench.make(WORKS[name].needs)
        try:
            (result,) = in_child(alone, WORKS[name])
            yield name, result
        except ChildProcessError as error:
            yield name, {"why": str(error)}


def launched(point: Point, names: Sequence[str], data_path: Path) -> Iterator[Found]:
    """All in processes that torchrun starts, one after another."""
    data(point, data_path)  # once, and not by each
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={point.processes}", __file__, "--only", *names]
    command += ["--at", json.dumps(asdict(point)), "--data", str(data_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("["):
                name, result = json.loads(line)
                yield name, result
    if process.returncode:
        raise ChildProcessError(f"failed, exit code {process.returncode}")


def in_this_process(point: Point, names: Sequence[str], data_path: Path) -> None:
    """What :func:`launched` starts."""
    bench = Bench(point, data_path)
    for name in names:
        bench.make(WORKS[name].needs)
        PartialState(cpu=True).wait_for_everyone()
        result = measure(WORKS[name], bench)
        if PartialState().is_main_process:
            print(json.dumps([name, result]), flush=True)


OVER = {"why": "not measured: over the limit"}


def measure_factor(
    factor: str, sizes: str, names: Sequence[str], limit: float, data_path: Path
) -> dict[str, dict[int, Result]]:
    """For each of the named pieces of work for which the factor counts, the results by size; none
    of a size after one that took more than ``limit`` seconds, what it needs included."""
    grow, by_sizes = FACTORS[factor]
    results: dict[str, dict[int, Result]] = {n: {} for n in names if factor in WORKS[n].bounds}
    todo = list(results)
    for size in by_sizes[sizes]:
        point, began = grow(BASE[sizes], size), time.perf_counter()
        found = (
            launched(point, todo, data_path)
            if factor == "processes"
            else in_child(each_alone, Bench(point, data_path), todo)
        )
        missing = dict.fromkeys(results.keys() - todo, OVER)
        try:
            for name, result in found:
                results[name][size] = result
                took, began = time.perf_counter() - began, time.perf_counter()
                print(f"{factor} {size:,}, {name}: {took:.1f} s", file=sys.stderr)
                if took > limit:
                    todo = [other for other in todo if other != name]
        except ChildProcessError as error:
            missing |= {name: {"why": str(error)} for name in todo if size not in results[name]}
        for name, result in missing.items():
            results[name][size] = result
    return results


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The n of size^n: the slope through the larger half of the sizes, two or more, by least
    squares between logarithms. None where there are fewer, or a value is not above 0."""
    first = min(len(sizes) // 2, len(sizes) - 2)
    if first < 0 or min(values[first:]) <= 0:
        return None
    return float(np.polyfit(np.log(sizes[first:]), np.log(values[first:]), 1)[0])


def rows_of(factor: str, results: dict[str, dict[int, Result]]) -> Iterator[dict[str, Any]]:
    """A row of the table for each part of each piece of work."""
    for name, by_size in results.items():
        measured = {size: result for size, result in by_size.items() if "seconds" in result}
        parts = next(iter(measured.values()))["seconds"] if measured else [""]
        for part in parts:
            seconds = [result["seconds"][part] for result in measured.values()]
            mib = [result["MiB"] for result in measured.values() if not part]
            yield {
                "work": WORKS[name].title + part,
                "factor": factor,
                "seconds": dict(zip(measured, seconds)),
                "MiB": dict(zip(measured, mib)),
                "not measured": {n: r["why"] for n, r in by_size.items() if n not in measured},
                "exponent of seconds": exponent(list(measured), seconds),
                # of less than that it is noise
                "exponent of MiB": exponent(list(measured), mib)
                if min(mib, default=0) > 1
                else None,
                "bounded by": "" if part else WORKS[name].bounds[factor],
            }


def table(factor: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one factor, in Markdown."""
    sizes = list(rows[0]["seconds"] | rows[0]["not measured"])

    def cell(row: dict[str, Any], size: int) -> str:
        if size in row["not measured"]:
            return row["not measured"][size]
        mib = f", {row['MiB'][size]:,.0f} MiB" if size in row["MiB"] else ""
        return f"{row['seconds'][size]:,.3g} s{mib}"

    def power(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    head = [factor, *(f"{size:,}" for size in sizes), "time", "memory", "bounded by"]
    body = [
        [
            row["work"],
            *(cell(row, size) for size in sizes),
            *(power(row[f"exponent of {what}"]) for what in ("seconds", "MiB")),
            row["bounded by"],
        ]
        for row in rows
    ]
    return markdown_table(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=WORKS,
        default=list(WORKS),
        metavar="NAME",
        help=f"pieces of work: {', '.join(WORKS)}; default all",
    )
    parser.add_argument(
        "--factor",
        nargs="+",
        choices=FACTORS,
        default=list(FACTORS),
        metavar="NAME",
        help=f"factors: {', '.join(FACTORS)}; default all",
    )
    parser.add_argument(
        "--sizes",
        choices=BASE,
        default="small",
        help="small: minutes; full: an hour on a quiet machine",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        metavar="LIMIT",
        help="measure no larger size once one took longer; default 600",
    )
    parser.add_argument("--at", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it, too
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.at:
        in_this_process(Point(**args.at), args.only, args.data)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for factor in args.factor:
            names = [name for name in WORKS if name in args.only]
            results = measure_factor(factor, args.sizes, names, args.seconds, Path(folder))
            if found := list(rows_of(factor, results)):
                print(table(factor, found), flush=True)
                print()
            rows += found
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

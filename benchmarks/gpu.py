"""What one visit to a GPU settles: is it right, how fast is it, and does a pretrained language
model win?

    python benchmarks/gpu.py --backbone smollm2-135m --output DIR [--stages exact speed] [--minutes
    6] [--continue]

Each stage writes its rows to DIR/<stage>.jsonl, one as soon as it is measured, so that a cut loses
nothing; --continue leaves out what is there. The last stage is an experiment, with its report in
DIR/train; its runs are kept in saved/runs, and go on from their last state. On a CPU the same
program runs with `--tokens 64 128 256 --matrix 256 --users 4`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stage:
    """Rows that are measured together.

    Attributes:
        minutes: it may take at most.
        processes: that share its rows; one where times are measured.
    """

    minutes: float
    processes: int


STAGES = {"exact": Stage(2.0, 10), "speed": Stage(5.0, 1), "train": Stage(30.0, 1)}
"""In the order of their worth."""

EXPERIMENT = ROOT / "configs" / "ml-100k" / "gpu" / "smollm2-135m.yaml"

BROKEN = 3
"""Exit code of a process whose device no longer answers, and which must begin anew."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="smollm2-135m", help="as the setting of that name")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=60.0, help="for all stages together")
    parser.add_argument(
        "--continue", action="store_true", dest="goes_on", help="keep the rows that are there"
    )
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument(
        "--tokens", type=int, nargs=3, default=[4096, 16384, 65536], help="in a batch"
    )
    parser.add_argument(
        "--matrix", type=int, default=8192, help="rows and columns of the matrices of the product"
    )
    parser.add_argument("--users", type=int, default=943, help="that are ranked for")
    parser.add_argument("--repeats", type=int, default=3, help="turns of which the median is taken")
    parser.add_argument(
        "--experiment", type=Path, default=EXPERIMENT, help="what the last stage trains"
    )
    parser.add_argument(
        "--jobs", type=int, default=4, help="runs of the experiment that go on at once"
    )
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        help="for the experiment, such as --setting=--sft_epochs=1",
    )
    # of a stage, as a process of its own: stage, number, of how many
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return measure_part(args)
    args.output.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * args.minutes
    faults = 0
    for name in args.stages:
        limit = min(ends, time.monotonic() + 60 * STAGES[name].minutes)
        if name == "train":
            faults += train(args, limit)
            continue
        file = args.output / f"{name}.jsonl"
        if not args.goes_on:
            file.unlink(missing_ok=True)
        faults += run_stage(name, file, limit)
    print(f"failures: {faults}; the log is {args.output / 'log.txt'}")
    return int(faults > 0)


def train(args: argparse.Namespace, ends: float) -> int:
    """Run the experiment until ``ends``, when its runs save their state; returns 1 if it did not
    end, or a run failed."""
    command = [
        sys.executable,
        str(ROOT / "run_recbole_sdpo.py"),
        f"--experiment={args.experiment}",
        f"--output={args.output / 'train'}",
    ]
    command += [f"--jobs={args.jobs}", f"--backbone={args.backbone}", *args.setting]
    with subprocess.Popen(command, env=_environment(args.jobs)) as process:
        try:
            return int(process.wait(max(0.0, ends - time.monotonic())) != 0)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
            return 1


def run_stage(name: str, file: Path, ends: float) -> int:
    """Measure a stage's rows that ``file`` does not hold, until ``ends``; returns how many
    failed."""
    number, lock = min(STAGES[name].processes, os.cpu_count() or 1), threading.Lock()

    def part(which: int) -> None:
        while True:
            command = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--part",
                f"{name},{which},{number}",
            ]
            with (file.parent / "log.txt").open("a") as log:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(number)
                )
            killer = threading.Timer(max(0.0, ends - time.monotonic()), process.kill)
            killer.start()
            for line in process.stdout:
                if line.startswith("{"):
                    with lock, file.open("a", encoding="utf-8") as rows:
                        rows.write(line)
                    print(line, end="", flush=True)
            killer.cancel()
            if process.wait() != BROKEN or time.monotonic() > ends:
                return

    threads = [threading.Thread(target=part, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum("error" in row for row in read_rows(file))


def measure_part(args: argparse.Namespace) -> int:
    """Measure, in this process, every n-th row of a stage that its file does not hold, and print
    each as JSON."""
    name, which, number = args.part.split(",")
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    sys.argv = sys.argv[:1]  # RecBole reads it, too
    import logging

    import torch

    import recbole_sdpo  # noqa: F401

    logging.disable(logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done = {row["row"] for row in read_rows(args.output / f"{name}.jsonl")}
    for position, (row, measured) in enumerate(cases(name, args, device)):
        if position % int(number) != int(which) or row in done or args.only not in row:
            continue
        began = time.perf_counter()
        try:
            values = measured()
        except Exception as error:
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {error}"[:500]}
        took = round(time.perf_counter() - began, 2)
        print(json.dumps({"row": row} | values | {"seconds": took}, default=str), flush=True)
        if "error" in values and device.type == "cuda" and not _answers(device):
            return BROKEN
    return 0


def cases(
    stage: str, args: argparse.Namespace, device
) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    """The rows of a stage by name."""
    if stage == "exact":
        import exactness

        yield "machine", lambda: machine(device)
        yield from exactness.cases(device)
    else:
        import throughput

        yield from throughput.cases(args, device)


def machine(device) -> dict[str, object]:
    """Where and with what this is measured."""
    import platform
    from importlib.metadata import version

    import torch

    names = ("torch", "transformers", "peft", "accelerate", "numpy", "pandas", "scipy")
    of_gpu = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        of_gpu = {
            "device": torch.cuda.get_device_name(device),
            "GiB": torch.cuda.mem_get_info(device)[1] / 2**30,
        }
    return of_gpu | {
        "CPU cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def read_rows(file: Path) -> list[dict[str, object]]:
    """What is measured already."""
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if file.is_file()
        else []
    )


def _answers(device) -> bool:
    """Does the device still compute? After some errors it never does again in the same process."""
    import torch

    try:
        return bool(torch.ones(1, device=device).sum() == 1)
    except RuntimeError:
        return False


def _environment(processes: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    } | os.environ


if __name__ == "__main__":
    sys.exit(main())

"""Many runs from one YAML file: which they are, running them, and a small search of their settings."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from recbole_sdpo.experiment.plan import Experiment, plan, written
from recbole_sdpo.experiment.runner import Failure, Runner, check_writable
from recbole_sdpo.experiment.tune import tune
from recbole_sdpo.inputs import package_versions
from recbole_sdpo.report.comparison import Finished, compare, unfair
from recbole_sdpo.report.experiment import write_report
from recbole_sdpo.report.table import comparison_markdown

STORE = Path("saved") / "runs"
"""Where runs are kept, by identity, for every experiment that has them."""


def run_experiment(
    file: Path, output: Path, overrides: dict[str, Any] | None = None, search: bool = False, jobs: int = 1, command: str = ""
) -> list[Failure]:
    """Run all of an experiment that has no result yet, and write its report into ``output``.

    Args:
        file: YAML, with the keys of :class:`Experiment`.
        overrides: settings over those of every run.
        search: try the settings under ``tune`` first.
        jobs: how many runs go on at once.
        command: for the report, how it was called.

    Returns:
        the runs that failed; the report is of the others.

    Raises:
        ValueError: a setting of any run is wrong; nothing has run yet.
    """
    experiment, runner, failures = Experiment.load(file, overrides), Runner(STORE, jobs), []
    text = written(file)  # as it is now, whatever becomes of it until all have run
    check_writable(output)
    runs = plan(experiment)  # which checks all settings before any run begins
    if search:
        experiment, failures = tune(experiment, runner, output)
        runs = plan(experiment)
    axes = {entry.name: entry.axis for entry in experiment.entries()}
    failures += runner.run_all(runs)
    done = [run for run in runs if runner.done(run) and (run.start is None or runner.done(run.start))]
    starts = [run.start and runner.folder(run.start) for run in done]
    finished = [Finished.read(runner.folder(run), start, run.name, axes[run.name], run.seed) for run, start in zip(done, starts)]
    warnings = [f"{failure.run.name}, seed {failure.run.seed} failed: {failure.why}" for failure in failures]
    if finished:
        warnings = unfair(finished, experiment.candidates) + warnings
        comparisons = [compare(finished, mode, experiment.metrics, experiment.baseline_names()) for mode in experiment.candidates]
        warnings = write_report(output, experiment.title, comparisons, finished, warnings, _made(text, command, finished))
        print("", *(comparison_markdown(comparison) + "\n" for comparison in comparisons), f"report: {output / 'report.html'}", sep="\n")
    for warning in warnings:
        print(f"warning: {warning}")
    return failures


def _made(text: str, command: str, finished: list[Finished]) -> str:
    """How the results came about, in lines."""
    machines = {f"{run.result['machine']['device']}, {run.result['machine']['cpus']} CPU cores ({_processor()})" for run in finished}
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    hours = sum({run.result["run_dir"]: run.wall_s for run in finished}.values()) / 3600
    lines = [command, f"training: {hours:.1f} hours, shared SFT counted in each run", *sorted(machines)]
    return "\n".join([*lines, f"Python {platform.python_version()}, {versions}", "", text])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

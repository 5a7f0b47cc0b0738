"""The wheel, in an environment of its own and away from the checkout: it holds all that README
names, and trains."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

from recbole_sdpo.digests import ONLOOKERS, sources
from recbole_sdpo.version import __version__
from tests.conftest import TINY, write_dataset

ROOT = Path(__file__).parents[1]
SOURCE = (
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "recbole_sdpo",
    "configs",
    "tests/__init__.py",
)


def call(*command, cwd):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a source distribution of a copy of the checkout, as ``make dist`` does it,
    without a network."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCE:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                folder / "copy" / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copy(ROOT / name, folder / "copy" / name)
    call(
        sys.executable,
        "-c",
        "from setuptools import build_meta; build_meta.build_sdist('..')",
        cwd=folder / "copy",
    )
    shutil.rmtree(folder / "copy")
    (sdist,) = folder.glob("*.tar.gz")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    )
    call(*pip, sdist.name, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """Its ``bin``: an environment with the wheel, whose libraries are those of the one that runs
    the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder)
    python = folder / "bin" / "python"
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    site = Path(
        sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    )
    # What a .pth file names is on the path, but the .pth files there, such as one that leads to the
    # checkout, are not read.
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return folder / "bin"


def test_it_holds_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    here = [
        Path(folder, file)
        for folder, _, files in os.walk(ROOT / "recbole_sdpo", followlinks=True)
        for file in files
    ]
    assert held == {str(file.relative_to(ROOT)) for file in here if file.suffix != ".pyc"}
    assert "recbole_sdpo/py.typed" in held and "recbole_sdpo/configs/paper/s-dpo.yaml" in held


def test_its_metadata_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("recbole-sdpo", __version__)
    assert (
        metadata.get_payload().startswith("# recbole-sdpo")
        and metadata["Description-Content-Type"] == "text/markdown"
    )
    assert {"gguf", "quantization", "test", "docs", "benchmark"} <= set(
        metadata.get_all("Provides-Extra")
    )
    for key in (
        "Summary",
        "Author",
        "License-Expression",
        "License-File",
        "Keywords",
        "Project-URL",
        "Classifier",
        "Requires-Python",
    ):
        assert metadata[key], key


def test_it_is_imported_from_there_with_what_readme_names(fresh, tmp_path):
    """Code that says the same gives a run the same identity, wherever it lies."""
    shows = """
import importlib.metadata, json, sys
import recbole_sdpo
from recbole_sdpo.files import config_file
from recbole_sdpo.digests import ONLOOKERS, sources
files = {name: str(config_file(name).absolute()) for name in sys.argv[1:]}
print(json.dumps([recbole_sdpo.__file__, importlib.metadata.version("recbole-sdpo"), sources(ONLOOKERS), files]))
"""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.yaml")]
    names = {
        name
        for page in pages
        for name in re.findall(r"configs/[\w./-]+\.yaml", page.read_text(encoding="utf-8"))
    }
    assert len(names) > 10
    place, version, digest, files = json.loads(
        call(fresh / "python", "-c", shows, *sorted(names), cwd=tmp_path).stdout
    )
    assert (
        Path(place).is_relative_to(fresh.parent)
        and version == __version__
        and digest == sources(ONLOOKERS)
    )
    assert all(
        Path(file).is_file() and Path(file).is_relative_to(fresh.parent) for file in files.values()
    ), files


def test_the_command_trains_with_the_configs_that_came_along(fresh, tmp_path):
    titles = {i + 1: f"{'abcdef'[i % 6]}{'wxyz'[i // 6]} film" for i in range(24)}
    data = write_dataset(
        tmp_path / "data",
        [[1 + (start + step) % 24 for step in range(12)] for start in range(24)],
        titles,
    )
    small = {key: TINY[key] for key in TINY if key.startswith(("scratch", "backbone"))} | {
        "data_path": str(data),
        "show_progress": False,
        "run_dir": "run",
        "peft": "none",
        "prompt_candidates": 5,
        "prompt_templates": "configs/paper/one-template.yaml",
        "eval_args": {"mode": "uni4"},
        "max_train_targets": 6,
        "max_eval_targets": 8,
        "max_new_tokens": 8,
        "sft_epochs": 1,
        "sdpo_epochs": 1,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    ended = call(
        fresh / "recbole-sdpo",
        "run",
        "--dataset=toy",
        "--config_files=configs/paper/s-dpo.yaml small.yaml",
        cwd=tmp_path,
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    # of the recipe
    assert result["settings"]["beta"] == 1.0 and result["settings"]["sdpo_targets_per_step"] == 128
    assert set(result["stages"]) == {"sft", "sdpo"} and "SDPO-LLM after S-DPO" in ended.stderr
    assert (tmp_path / "run" / "sdpo" / "SHA256SUMS").is_file() and result["versions"][
        "recbole-sdpo"
    ] == __version__


def test_an_experiment_of_the_package_is_found_from_anywhere(fresh, tmp_path):
    """Its runs are checked before the first begins, and none can be trained: the data are not
    there."""
    command = [fresh / "recbole-sdpo", "experiment", "configs/amazon-games/gpu/compare.yaml"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (
        ended.returncode == 1 and "run 'Pop'" in ended.stderr and "amazon-games" in ended.stderr
    ), ended.stderr

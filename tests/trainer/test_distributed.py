"""Two processes train as one does: same global batches, losses and metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]


def launch(processes, settings, folder, model="SDPO-LLM"):
    folder.mkdir()
    (folder / "settings.yaml").write_text(
        yaml.safe_dump(settings | {"run_dir": str(folder / "run")})
    )
    script = [
        str(ROOT / "run_recbole_sdpo.py"),
        f"--model={model}",
        "--dataset=toy",
        "--config_files=settings.yaml",
    ]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*start, *script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = {}
    for events in (folder / "run" / "tensorboard").rglob("events*"):
        reader = EventAccumulator(str(events)).Reload()
        for tag in reader.Tags()["scalars"]:
            losses[tag] = [point.value for point in reader.Scalars(tag)]
    return json.loads((folder / "run" / "result.json").read_text()), losses


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_two_processes_are_one(ring, tmp_path, peft):
    # One batch of many trees, and batches of one tree, of which the second process has no share.
    settings = ring | {
        "peft": peft,
        "sft_tokens_per_batch": 250,
        "sdpo_tokens_per_batch": 100,
        "max_train_targets": 150,
    }
    settings |= {
        "sft_gradient_accumulation": 2,
        "prompt_style": "history",
        "fixed_negatives": peft == "lora",
    }
    one, losses_of_one = launch(1, settings, tmp_path / "one")
    two, losses_of_two = launch(2, settings, tmp_path / "two")
    assert two["machine"]["processes"] == 2
    assert two["candidates_sha256"] == one["candidates_sha256"]
    for stage in ("sft", "sdpo"):
        assert (two["stages"][stage]["targets"], two["stages"][stage]["tokens"]) == (
            one["stages"][stage]["targets"],
            one["stages"][stage]["tokens"],
        )
        assert two["stages"][stage]["test"] == pytest.approx(one["stages"][stage]["test"], abs=1e-3)
        assert two["stages"][stage]["valid"] == pytest.approx(
            one["stages"][stage]["valid"], abs=1e-3
        )
        for name in ("loss", "gradient_norm"):
            tag = f"{stage}/{name}"
            assert len(losses_of_one[tag]) > 1
            assert losses_of_two[tag] == pytest.approx(losses_of_one[tag], rel=1e-3)


def test_baselines_ask_for_one_process(ring, tmp_path):
    with pytest.raises(AssertionError, match="serves SDPO-LLM only; start Pop with plain python"):
        launch(2, ring, tmp_path / "pop", model="Pop")

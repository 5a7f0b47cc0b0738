"""Each test fails when the entry of compat.py, or the pin, that it guards is no longer needed."""

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import setuptools
import torch
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender import pop
from recbole.model.general_recommender.bpr import BPR
from recbole.trainer import Trainer

from recbole_sdpo import compat
from recbole_sdpo.config import RunConfig


def test_recbole_still_cannot_load_its_own_checkpoints(ring):
    config = RunConfig("BPR", "toy", config_dict=ring | {"epochs": 1})
    train, valid, test = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, BPR(config, train._dataset))
    trainer.fit(train, valid)
    best = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    with torch.no_grad():
        next(trainer.model.parameters()).zero_()
    with pytest.raises(Exception, match="[Ww]eights.only"):
        trainer.evaluate(test, load_best_model=True)
    compat.load_best(trainer)
    assert all(torch.equal(p, best[name]) for name, p in trainer.model.state_dict().items())


def test_recboles_pop_still_counts_an_item_once_a_batch_and_negatives_too(ring):
    config = RunConfig("Pop", "toy", config_dict=ring)
    dataset = create_dataset(config)
    batch = {dataset.iid_field: torch.tensor([3, 5, 3, 7]), config["LABEL_FIELD"]: torch.tensor([1.0, 1.0, 1.0, 0.0])}
    theirs, ours = (kind(config, dataset) for kind in (pop.Pop, compat.Pop))
    for _ in range(2):
        theirs.calculate_loss(batch)
        ours.calculate_loss(batch).backward()
    assert theirs.item_cnt[[3, 5, 7], 0].tolist() == [2, 2, 2]
    assert ours.item_cnt[[3, 5, 7], 0].tolist() == [4, 2, 0] and ours.max_cnt.tolist() == [4] and ours.item_cnt.sum() == 6


def test_recbole_still_takes_a_programs_arguments_for_its_settings(ring, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--seed=5"])
    assert RunConfig("BPR", "toy", config_dict=ring)["seed"] == 5
    with compat.no_arguments():
        assert RunConfig("BPR", "toy", config_dict=ring)["seed"] == 2020
    assert sys.argv == ["serve.py", "--seed=5"]


def test_accelerate_launch_still_starts_one_process_on_cpus(tmp_path):
    (tmp_path / "who.py").write_text("import os; print('world', os.environ.get('WORLD_SIZE'), 'master', 'MASTER_ADDR' in os.environ)")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "who.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["world None master True"]


def test_such_a_launch_is_refused(monkeypatch):
    compat.check_launcher()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="use torchrun --nproc_per_node=2"):
        compat.check_launcher()
    monkeypatch.setenv("WORLD_SIZE", "2")
    compat.check_launcher()


def test_importing_recboles_models_still_turns_anomaly_detection_on_and_ours_does_not():
    ask = "import torch, {}; print(torch.is_anomaly_enabled())"
    for module, expected in (("recbole.model.sequential_recommender", "True"), ("recbole_sdpo", "False")):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", ask.format(module)], capture_output=True, text=True, timeout=120)
        assert done.stdout.split()[-1] == expected, done.stderr


def test_pins_are_still_needed():
    """np.bool8 in ray, fillna(inplace=True) on a column and dok_matrix._update in RecBole: what the pins keep alive."""
    import ray
    import recbole.data.dataset.dataset as dataset
    import recbole.model.general_recommender.lightgcn as lightgcn

    assert ray.__version__ == "2.6.3" and np.__version__ < "2" and int(setuptools.__version__.split(".")[0]) < 81
    with open(dataset.__file__, encoding="utf-8") as stream:
        assert re.search(r"\]\.fillna\(.*inplace=True\)", stream.read())
    assert int(pd.__version__.split(".")[0]) < 3
    with open(lightgcn.__file__, encoding="utf-8") as stream:
        assert "A._update(" in stream.read()
    assert hasattr(scipy.sparse.dok_matrix((1, 1)), "_update")


def test_recbole_still_sets_the_visible_gpus(monkeypatch):
    """Where it does not, same_gpus has had its day."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with compat.same_gpus():
        RunConfig("BPR", "ml-100k")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"

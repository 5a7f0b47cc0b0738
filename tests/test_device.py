"""A GPU that cannot serve is refused in one sentence, before data are read. The GPUs are made
up: what torch says of them counts."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recbole_sdpo import compat, device, quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.device import check_device, is_served
from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.file import Entry, Experiment
from recbole_sdpo.experiment.plan import plan


@pytest.fixture
def gpus(monkeypatch):
    """Has torch find GPUs of these compute capabilities, or none."""

    def found(*capabilities):
        made = [
            SimpleNamespace(name="Test", major=major, minor=minor) for major, minor in capabilities
        ]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(made))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(made))
        monkeypatch.setattr(torch.cuda, "get_device_properties", made.__getitem__)
        monkeypatch.setattr(
            torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"]
        )
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)

    found()
    return found


def check(ring, **given):
    check_device(RunConfig("SDPO-LLM", "toy", config_dict=ring | given))


@pytest.mark.parametrize("asked", [0, "0", "5", "0,1", (0, 1)])
def test_a_gpu_that_is_not_there_is_refused(ring, gpus, asked):
    with pytest.raises(
        UserError,
        match=r"gpu_id='[\d,]+' asks for . of this .* torch .* finds 0: see in nvidia-smi .*13.0",
    ):
        check(ring, gpu_id=asked)


def test_a_build_without_cuda_is_named(ring, gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="it is built without CUDA; install a build that has it"):
        check(ring, gpu_id=0)


def test_one_of_two_is_missing(ring, gpus):
    gpus((9, 0))
    with pytest.raises(
        UserError, match="gpu_id='0,7' asks for 2 of this machine's GPUs and torch .* finds 1"
    ):
        check(ring, gpu_id="0,7")


@pytest.mark.parametrize(
    "given", [{}, {"gpu_id": ""}, {"gpu_id": -1}, {"gpu_id": "-1"}, {"use_gpu": False}]
)
def test_a_cpu_serves_who_asks_for_no_gpu(ring, gpus, given):
    check(ring, **given)


@pytest.mark.parametrize("given", [{}, {"gpu_id": 0}, {"gpu_id": "0,-1"}, {"dtype": "bfloat16"}])
def test_a_gpu_that_is_there_serves(ring, gpus, given):
    gpus((8, 6))
    check(ring, **given)


@pytest.mark.parametrize("value", ["cuda", "cpu", "cuda:1"])
@pytest.mark.parametrize("model", ["SDPO-LLM", "Pop"])
def test_device_is_not_a_setting(ring, model, value):
    with pytest.raises(UserError, match=f"device='{value}' must be left out; gpu_id says"):
        RunConfig(model, "toy", config_dict={"data_path": ring["data_path"], "device": value})


def test_use_gpu_has_no_effect_on_a_gpu(ring, gpus):
    gpus((9, 0))
    with pytest.raises(UserError, match="use_gpu=False has no effect in RecBole; give gpu_id=''"):
        check(ring, use_gpu=False)


def test_a_gpu_that_the_build_has_no_kernels_for(ring, gpus):
    gpus((6, 1))
    with pytest.raises(
        UserError,
        match=r"GPU 0 \(Test, of compute capability 6.1\) is none that torch .* is built for "
        r"\(sm_75, sm_80",
    ):
        check(ring)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_bfloat16_where_it_would_be_emulated(ring, gpus, dtype):
    gpus((7, 5))
    check(ring)
    with pytest.raises(
        UserError,
        match=rf"dtype='{dtype}' needs a GPU of compute capability 8.0 or later, and GPU 0 \(Test",
    ):
        check(ring, dtype=dtype)


def test_more_processes_than_gpus(ring, gpus, monkeypatch):
    gpus((9, 0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="A launch of 2 processes needs as many GPUs, and there are 1"
    ):
        check(ring)


def test_a_gpu_out_of_torchs_reach_is_warned_of(ring, gpus, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(device, "DRIVER", tmp_path)
    check(ring, gpu_id="")
    assert not caplog.messages
    check(ring)
    assert "This run is on the CPU, as torch" in caplog.text


@pytest.mark.parametrize(
    ("capability", "built_for", "served"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((10, 0), ["sm_90"], False),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120a"], False),
        ((6, 1), ["compute_75"], False),
    ],
)
def test_kernels_serve_their_generation(capability, built_for, served):
    assert is_served(capability, built_for) == served


def test_a_run_and_an_experiment_ask_first(ring, gpus):
    with pytest.raises(UserError, match="gpu_id='5' asks for"):
        quick_start.run("SDPO-LLM", "toy", config_dict=ring | {"gpu_id": 5})
    with pytest.raises(UserError, match="run 'one': gpu_id='5' asks for"):
        plan(Experiment("title", "toy", [Entry("one")], settings=ring | {"gpu_id": 5}))


@pytest.mark.parametrize("visible", ["3", "2,3", "GPU-8f1a", ""])
def test_the_gpus_that_the_shell_leaves_are_taken(ring, monkeypatch, visible):
    """RecBole's default is the first of the machine."""
    monkeypatch.setattr(compat, "VISIBLE_GPUS", visible)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # and as it was, afterwards
    assert RunConfig("BPR", "toy", config_dict=ring)["gpu_id"] == visible
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert RunConfig("BPR", "toy", config_dict=ring | {"gpu_id": "1"})["gpu_id"] == "1"


@pytest.mark.parametrize(
    ("visible", "given", "taken"),
    [(None, {}, "0,1"), ("2,3", {}, "2,3"), (None, {"gpu_id": "4,5"}, "4,5")],
)
def test_and_by_each_process_of_a_launch(ring, gpus, monkeypatch, visible, given, taken):
    """What files and programs say of it counts, too."""
    gpus((9, 0), (9, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(compat, "VISIBLE_GPUS", visible)
    assert RunConfig("SDPO-LLM", "toy", config_dict=ring | given)["gpu_id"] == taken


def test_planning_leaves_the_visible_gpus_to_the_runs(ring, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    rows = [Entry("one", "Pop"), Entry("another", "BPR", {"gpu_id": ""})]
    plan(Experiment("title", "toy", rows, settings=ring))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_of_the_gpus_that_the_shell_names_none_may_be_missing(ring, gpus, monkeypatch, caplog):
    monkeypatch.setattr(compat, "VISIBLE_GPUS", "2,3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    gpus((9, 0))
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES='2,3' asks for 2 .* finds 1"):
        check(ring)
    gpus()
    monkeypatch.setattr(device, "DRIVER", Path("/"))
    check(ring)
    assert "cannot use the GPU that is here by CUDA_VISIBLE_DEVICES='2,3': see in" in caplog.text


@pytest.mark.parametrize("visible", [None, "5"])
def test_an_earlier_run_leaves_the_gpus_of_an_experiment_alone(ring, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(compat, "VISIBLE_GPUS", visible)
    RunConfig("BPR", "toy", config_dict=ring | {"gpu_id": ""})
    assert compat.environment().get("CUDA_VISIBLE_DEVICES") == visible

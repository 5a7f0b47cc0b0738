"""Each test fails when the entry of compat.py, or the pin, that it guards is no longer needed."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import recbole
import scipy.sparse
import torch
import yaml
from recbole.config import Config, configurator
from recbole.data import create_dataset, data_preparation, utils
from recbole.data.dataset import Dataset
from recbole.evaluator import collector, metrics
from recbole.evaluator.collector import DataStruct
from recbole.model.context_aware_recommender import kd_dagfm
from recbole.model.general_recommender import pop
from recbole.model.general_recommender.bpr import BPR
from recbole.trainer import Trainer

from recbole_sdpo import compat
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data import dataset
from recbole_sdpo.errors import UserError
from tests.conftest import TINY, write_dataset


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
    data = create_dataset(config)
    batch = {
        data.iid_field: torch.tensor([3, 5, 3, 7]),
        config["LABEL_FIELD"]: torch.tensor([1.0, 1.0, 1.0, 0.0]),
    }
    theirs, ours = (kind(config, data) for kind in (pop.Pop, compat.Pop))
    for _ in range(2):
        theirs.calculate_loss(batch)
        ours.calculate_loss(batch).backward()
    assert theirs.item_cnt[[3, 5, 7], 0].tolist() == [2, 2, 2]
    assert (
        ours.item_cnt[[3, 5, 7], 0].tolist() == [4, 2, 0]
        and ours.max_cnt.tolist() == [4]
        and ours.item_cnt.sum() == 6
    )


CODE = "__import__('pathlib').Path('pwned').touch()"


def test_recbole_still_evaluates_what_it_reads():
    with open(configurator.__file__, encoding="utf-8") as stream:
        source = stream.read()
    assert "value = eval(param)" in source and "loader = yaml.FullLoader" in source


@pytest.mark.parametrize("kind", [Config, RunConfig])
def test_and_here_reads_it_on_every_route(kind, tmp_path, monkeypatch):
    """The route of ``run_recbole`` after ``import recbole_sdpo``, and ours."""
    (tmp_path / "a.yaml").write_text(f"wandb_project: {CODE}\nseed: 1e0\nlearning_rate: 1e-2\n")
    given = {"checkpoint_dir": CODE, "LABEL_FIELD": "self"}
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "run.py",
            f"--data_path={CODE}",
            "--TIME_FIELD=param",
            "--show_progress=false",
            "--worker=0",
        ],
    )
    (tmp_path / CODE / "x").mkdir(parents=True)  # RunConfig looks at the data
    (tmp_path / CODE / "x" / "x.inter").write_text(
        "user_id:token\titem_id:token\tparam:float\n1\t1\t1\n"
    )
    config = kind("BPR", "x", [str(tmp_path / "a.yaml")] if kind is Config else None, dict(given))
    assert (
        config["checkpoint_dir"] == CODE
        and config["data_path"].startswith(CODE)
        and config["show_progress"] is False
    )
    assert (
        config["LABEL_FIELD"] == "self"
        and config["TIME_FIELD"] == "param"
        and given["checkpoint_dir"] == CODE
    )
    assert kind is RunConfig or (config["wandb_project"], config["learning_rate"]) == (CODE, 0.01)
    assert not (tmp_path / "pwned").exists()
    # RecBole changes the loader of the whole process
    assert yaml.load("1e0", yaml.FullLoader) == "1e0"


def test_recboles_kd_dagfm_still_evaluates_its_teacher_and_here_only_names_are():
    assert "eval(" in inspect.getsource(kd_dagfm)
    for name in compat.TEACHERS:
        assert kd_dagfm.eval(name) is getattr(kd_dagfm, name)
    with pytest.raises(KeyError):
        kd_dagfm.eval(CODE)
    with pytest.raises(UserError, match="teacher=.* must be one of CrossNet, CIN"):
        RunConfig("KD_DAGFM", "ml-100k", config_dict={"teacher": CODE})


def test_a_file_of_settings_trusts_nobodys_code(tmp_path):
    (tmp_path / "a.yaml").write_text("trust_remote_code: true\n")
    for kind in (Config, RunConfig):
        with pytest.raises(
            UserError,
            match="config_files='.*a.yaml' must not set trust_remote_code; give it on the command",
        ):
            kind("BPR", "ml-100k", [str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_and_builds_no_objects_of_python(tag, tmp_path):
    (tmp_path / "a.yaml").write_text(f"seed: {tag}\n")
    with pytest.raises(UserError, match="config_files='.*a.yaml' is not YAML, line 1"):
        Config("BPR", "ml-100k", [str(tmp_path / "a.yaml")])
    assert not (tmp_path / "pwned").exists()


def test_recbole_still_takes_times_of_a_minute_for_one(tmp_path, monkeypatch):
    """And it sorts in no stable way for rm_dup_inter, and reads files as quoted CSV: why its
    Dataset's methods are replaced."""
    path = write_dataset(tmp_path / "d", [list(range(1, 9))] * 3, None)
    lines = [f"u\ti{item}\t{1_700_000_000 - item}" for item in range(8)]
    (path / "toy" / "toy.inter").write_text(
        "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *lines]) + "\n"
    )

    def order():
        made = create_dataset(RunConfig("BPR", "toy", config_dict=TINY | {"data_path": str(path)}))
        made._change_feat_format()
        made.sort("timestamp")
        return made.field2id_token["item_id"][made.inter_feat["item_id"]].tolist()

    assert order() == [f"i{item}" for item in range(8)][::-1]
    monkeypatch.setattr(Dataset, "_change_feat_format", dataset.RECBOLE["_change_feat_format"])
    assert order() == [f"i{item}" for item in range(8)]
    source = inspect.getsource(inspect.getmodule(Dataset))
    assert 'engine="python"' in source and "quoting" not in source and 'kind="stable"' not in source


def test_recbole_still_unpickles_what_lies_in_checkpoint_dir():
    for function in (utils.create_dataset, utils.data_preparation):
        assert "pickle.load" in inspect.getsource(
            function
        ) or "load_split_dataloaders(config)" in inspect.getsource(function)


def test_recboles_gauc_is_still_a_number_of_numpys():
    data = DataStruct()
    data.set("rec.meanrank", torch.tensor([[1.0, 4.0, 1.0], [2.0, 4.0, 1.0], [2.0, 4.0, 1.0]]))
    theirs, ours = (
        kind({"metric_decimal_place": 4}).calculate_metric(data)["gauc"]
        for kind in (metrics.GAUC, compat.GAUC)
    )
    assert isinstance(theirs, np.float32) and type(ours) is float and ours == 0.7778


def test_recbole_still_takes_a_programs_arguments_for_its_settings(ring, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--seed=5"])
    assert RunConfig("BPR", "toy", config_dict=ring)["seed"] == 5
    with compat.no_arguments():
        assert RunConfig("BPR", "toy", config_dict=ring)["seed"] == 2020
    assert sys.argv == ["serve.py", "--seed=5"]


def test_accelerate_launch_still_starts_one_process_on_cpus(tmp_path):
    (tmp_path / "who.py").write_text(
        "import os; print('world', os.environ.get('WORLD_SIZE'), 'master', 'MASTER_ADDR' in "
        "os.environ)"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("WORLD_SIZE", "", "WORLD_SIZE='' in the environment must be a whole number"),
        ("RANK", "one", "RANK='one' in the environment must be a whole number"),
        ("WORLD_SIZE", "2", "WORLD_SIZE=2 in the environment .*MASTER_ADDR is not there"),
        ("LOCAL_RANK", "0", "LOCAL_RANK=0 in the environment .*MASTER_ADDR is not there"),
    ],
)
def test_half_a_launch_is_refused(monkeypatch, name, text, message):
    monkeypatch.setenv("LOCAL_RANK", "-1")
    compat.check_launcher()
    monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=message):
        compat.check_launcher()


def test_importing_recboles_models_still_turns_anomaly_detection_on_and_ours_does_not():
    ask = "import torch, {}; print(torch.is_anomaly_enabled())"
    for module, expected in (
        ("recbole.model.sequential_recommender", "True"),
        ("recbole_sdpo", "False"),
    ):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ask.format(module)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.split()[-1] == expected, done.stderr


def source(module):
    return inspect.getsource(importlib.import_module(f"recbole.{module}"))


def test_recbole_still_takes_names_that_numpy_2_dropped():
    taken = set(re.findall(r"np\.(float_|complex_|unicode_)\b", source("config.configurator")))
    assert taken | {"bool8"} == set(compat.NUMPY_1)
    for name, kind in compat.NUMPY_1.items():
        assert getattr(np, name) is kind


@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="ray 2.6.3 has no wheel from Python 3.12 on"
)
def test_ray_2_6_still_takes_one():
    """And pkg_resources, for which pyproject.toml has setuptools<81."""
    import ray
    from ray import tune  # it takes the name as it is imported

    folder = Path(ray.__file__).parent
    assert ray.__version__ == "2.6.3" and callable(tune.report)
    assert "np.bool8" in (folder / "tune" / "logger" / "tensorboardx.py").read_text()
    assert "pkg_resources" in (folder / "_private" / "utils.py").read_text()


def test_run_recbole_without_ray(ring):
    """RecBole still imports ray with its quick_start; ours leaves no trace of a ray that is not
    there."""
    assert "from ray import tune" in source("quick_start.quick_start")
    code = f"""
import sys
sys.modules["ray"] = None  # as if it were not installed
import recbole_sdpo
from recbole.quick_start import quick_start, run_recbole
assert "ray" not in sys.modules
print(run_recbole(model="LightGCN", dataset="toy", config_dict={ring | {"epochs": 1}}, saved=False)["test_result"])
try:
    quick_start.tune.report(loss=1)
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (
        "ndcg@10" in done.stdout
        and "search by ray's Tune needs ray, which is not installed" in done.stdout
    ), done.stderr


def test_recbole_still_fills_matrices_by_a_method_that_scipy_1_13_dropped():
    for module in (
        "general_recommender.lightgcn",
        "general_recommender.ngcf",
        "general_recommender.gcmc",
    ):
        assert "A._update(" in source(f"model.{module}")
    matrix = scipy.sparse.dok_matrix((2, 3))
    matrix._update({(0, 1): 5.0, (1, 2): 7.0})
    assert matrix.toarray().tolist() == [[0, 5, 0], [0, 0, 7]]


def test_recbole_still_asks_a_column_for_the_lengths_of_its_entries():
    """From pandas 3 on the column answers with its own."""
    column, newer = pd.Series([[1, 2], [], [3]]), int(pd.__version__.split(".")[0]) >= 3
    assert np.ndim(column.agg(len)) != newer
    for module in ("dataset", "kg_dataset", "sequential_dataset"):
        assert ".agg(len)" in source(f"data.dataset.{module}")
        asked = vars(importlib.import_module(f"recbole.data.dataset.{module}")).get("len", len)
        assert (
            column.agg(asked).tolist() == [2, 0, 1]
            and asked([1, 2]) == 2
            and asked(column.to_frame()) == 3
        )


def test_recbole_still_fills_in_place_and_ours_fills_what_is_missing(tmp_path):
    """From pandas 3 on RecBole's fills nothing, not even the row of the padding."""
    assert re.search(r"feat\[field\]\.fillna\(.*inplace=True\)", source("data.dataset.dataset"))
    path = write_dataset(tmp_path / "d", [list(range(1, 6))] * 3, None)
    head = "item_id:token\tprice:float\tbrand:token\tgenres:token_seq\tshape:float_seq"
    rows = ["i1\t1\ta\td e\t1 2", "i2\t\t\t\t", "i3\t4\tb\te\t3", "i4\t\ta\t\t", "i5\t\t\t\t"]
    (path / "toy" / "toy.item").write_text("\n".join([head, *rows]) + "\n")
    made = create_dataset(
        RunConfig("FM", "toy", config_dict=TINY | {"data_path": str(path), "load_col": None})
    )
    made._change_feat_format()
    items = made.item_feat
    assert made.field2id_token["item_id"].tolist() == ["[PAD]", "i1", "i2", "i3", "i4", "i5"]
    assert items["price"].tolist() == [2.5, 1, 2.5, 4, 2.5, 2.5]  # the first is the padding's
    assert made.field2id_token["brand"][items["brand"]].tolist() == [
        "[PAD]",
        "a",
        "[PAD]",
        "b",
        "a",
        "[PAD]",
    ]
    assert made.field2id_token["genres"][items["genres"]].tolist() == [
        ["[PAD]"] * 2,
        ["d", "e"],
        ["[PAD]"] * 2,
        ["e", "[PAD]"],
        ["[PAD]"] * 2,
        ["[PAD]"] * 2,
    ]
    assert items["shape"].tolist() == [[0, 0], [1, 2], [0, 0], [3, 0], [0, 0], [0, 0]]


def test_recbole_still_sets_the_visible_gpus(monkeypatch):
    """Where it does not, same_gpus and heed_visible_gpus have had their day."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(compat, "VISIBLE_GPUS", None)
    with compat.same_gpus():
        RunConfig("BPR", "ml-100k")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(("backend", "left"), [("gloo", 1), ("nccl", 0), (None, 0)])
def test_a_group_of_gloo_alone_is_left_at_exit(monkeypatch, backend, left):
    """NCCL's end may wait for processes that wait for this one."""
    state, registered = SimpleNamespace(backend=backend, destroy_process_group=len), []
    monkeypatch.setattr(compat, "PartialState", lambda: state)
    monkeypatch.setattr(compat.atexit, "register", registered.append)
    compat.leave_group_at_exit()
    assert registered == [len] * left


def test_torch_still_keeps_its_group_to_the_end():
    """Where it does not, leave_group_at_exit has had its day."""
    code = (
        "import atexit; atexit.register(lambda: print(group.is_initialized()))\n"
        "import torch.distributed as group\n"
        "group.init_process_group('gloo', store=group.HashStore(), rank=0, world_size=1)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout == "True\n"


@pytest.mark.parametrize("model", ["kgin", "mcclk"])
def test_recbole_still_names_nothing_that_these_keep_of_their_scores(model):
    folder = Path(recbole.__path__[0]) / "model" / "knowledge_aware_recommender"
    source = (folder / f"{model}.py").read_text(encoding="utf-8")
    assert "self.restore_user_e" in source and "other_parameter_name" not in source


def test_recboles_collector_still_hands_out_tensors_alone():
    """https://github.com/RUCAIBox/RecBole/issues/2194"""
    config = {"metrics": ["ItemCoverage"], "eval_args": {"mode": "full"}, "topk": [1]}
    held = collector.Collector(config | {"device": "cpu"})
    held.data_struct.set("data.num_items", 5)
    held.data_struct.set("rec.items", torch.tensor([[1]]))
    with pytest.raises(AttributeError, match="cpu"):
        compat._recbole_get_data_struct(held)
    for _ in range(2):  # it is known to the next evaluation, too
        held.data_struct.set("rec.items", torch.tensor([[1]]))
        handed_out = held.get_data_struct()
        assert handed_out.get("data.num_items") == 5 and handed_out.get("rec.items").tolist() == [
            [1]
        ]
        assert "rec.items" not in held.data_struct


def test_recboles_metrics_of_lists_still_are_not_their_formulas():
    config = {"topk": [1], "metric_decimal_place": 4, "tail_ratio": None}
    struct = DataStruct()
    struct.set("rec.items", torch.tensor([[1], [2]]))
    struct.set("data.num_items", 3)  # two, and the padding
    theirs, ours = (
        [kind(config).calculate_metric(struct) for kind in kinds]
        for kinds in (
            (metrics.ItemCoverage, metrics.GiniIndex, metrics.ShannonEntropy),
            (compat.ItemCoverage, compat.GiniIndex, compat.ShannonEntropy),
        )
    )
    entropy = round(float(np.log(2)), 4)
    assert theirs == [
        {"itemcoverage@1": 0.6667},
        {"giniindex@1": 0.3333},
        {"shannonentropy@1": pytest.approx(entropy / 2, abs=1e-4)},
    ]
    assert ours == [{"itemcoverage@1": 1.0}, {"giniindex@1": 0.0}, {"shannonentropy@1": entropy}]
    assert "in tail_items else" in inspect.getsource(metrics.TailPercentage)  # a list

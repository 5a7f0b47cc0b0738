"""What the benchmark measures with."""

import argparse
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from recbole_sdpo.config import RunConfig
from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.ragged import Ragged
from tests.conftest import write_dataset
from tests.lm.test_architectures import build, one_by_one, sample

CPU = torch.device("cpu")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import candidates
    import exactness
    import gpu
    import measure
    import plain
    import run
    import throughput
    import words

    modules = (measure, plain, run, exactness, throughput, gpu, words, candidates)
    yield modules
    for module in modules:
        del sys.modules[module.__name__]


def test_the_plain_way_is_one_sequence_at_a_time(benchmarks):
    model = build("Llama", "sdpa", False, torch.float64)
    trunks, tree, start, responses = sample(np.random.default_rng(1))
    prompts = [trunks[t][:s] for t, s in zip(tree, start, strict=True)]
    found = benchmarks[1].sequence_logps(model, prompts, responses)
    torch.testing.assert_close(
        found.double(), one_by_one(model, trunks, tree, start, responses), rtol=0, atol=1e-4
    )


def test_trees_in_one_row_are_the_same_trees(benchmarks):
    lm = LanguageModel(build("Llama", "sdpa", False, torch.float64), None)
    trunks, tree, start, responses = sample(np.random.default_rng(2))
    forest = plant(Ragged.from_rows(trunks), tree, start, Ragged.from_rows(responses))
    together = benchmarks[2].in_one_row(forest)
    assert together.tokens.shape == (1, forest.size) and forest.tokens.numel() > forest.size
    torch.testing.assert_close(lm(together), lm(forest), rtol=0, atol=1e-9)


def test_peak_memory_is_what_is_held_at_a_time(benchmarks):
    def side():
        first = torch.ones(2**20)
        del first
        second, third = torch.ones(2**20), torch.ones(2**19)
        return second, third

    assert benchmarks[0].peak_mib(side, CPU) == pytest.approx(6, abs=0.1)


def test_multiplications_alone_are_those_of_the_side(benchmarks):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=50,
        )
    )

    def side():
        model(input_ids=torch.arange(5)[None], use_cache=False).logits.sum().backward()

    noted = benchmarks[0]._Multiplications()
    with noted:
        benchmarks[0].multiplications_alone(side)()
    # Seven linear layers to a layer and the output layer; forward, and in backward one for the
    # weight and one for the input.
    linear = [call for call, _ in noted.calls if call._schema.name != "aten::bmm"]  # of angles
    assert len(linear) == 2 * 3 * (7 * 2 + 1)
    shares = benchmarks[0].shares(side, 50)
    assert (
        sum(shares.values()) == pytest.approx(1)
        and shares["vocabulary projection"] > 0
        and shares["attention"] > 0
    )


@pytest.mark.parametrize(
    "row",
    [
        "Llama, LoRA, sdpa, mixed",
        "Llama, sdpa, mixed",
        "Gemma3Text, eager, bf16",
        "Llama, ranking and answers, float32",
    ],
)
def test_exactness_holds_here(benchmarks, row):
    values = dict(benchmarks[3].cases(CPU))[row]()
    assert "scores" in values or values["repeats bit for bit"]


def test_exactness_takes_exact_products_whatever_a_run_before_took(benchmarks):
    before = torch.get_float32_matmul_precision()
    try:
        for row in ("Llama, sdpa, float32", "Llama, ranking and answers, float32"):
            torch.set_float32_matmul_precision("high")  # as a model does that goes to a GPU
            dict(benchmarks[3].cases(CPU))[row]()
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_candidates_are_timed_by_both_ways_and_nothing_else(benchmarks):
    args = argparse.Namespace(dataset="ml-100k", data_path=None, repeats=1)
    took = benchmarks[7].seconds("Caser", args)
    assert took.keys() == {"ours", "RecBole"} and min(took.values()) > 0
    with pytest.raises(AssertionError, match="BPR is asked for each candidate on both sides"):
        benchmarks[7].seconds("BPR", args)


def test_exactness_notices_a_wrong_mask(benchmarks, monkeypatch):
    monkeypatch.setattr(LanguageModel, "_check_scores", lambda self, choice: None)
    whole = plant

    def blind(*args):
        forest = whole(*args)
        # every token sees all before it
        return replace(forest, end=torch.full_like(forest.end, forest.tokens.shape[1]))

    monkeypatch.setattr(benchmarks[3], "plant", blind)
    with pytest.raises(AssertionError, match="the forest is off by"):
        dict(benchmarks[3].cases(CPU))["Llama, sdpa, float32"]()


def test_operations_are_counted(benchmarks):
    left, right = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    assert benchmarks[0].operations(lambda: (left @ right).sum().backward()) == 2 * 2 * 3 * 5 * 7


def test_what_is_measured_on_a_gpu_is_measured_here(benchmarks):
    args = argparse.Namespace(
        backbone="scratch", tokens=[64, 128, 256], matrix=64, users=3, repeats=1
    )
    rows = dict(benchmarks[4].cases(args, CPU))
    for name in ("full, SFT, 128 tokens, sdpa", "LoRA, S-DPO, K = 3, 128 tokens, sdpa"):
        assert 0 < rows[name]()["tokens"] <= 128
    assert rows["LoRA, against full sequences, K = 3"]()["ratio"] > 0
    assert rows["LoRA, ranking"]()["ten best, users/s"] > 0


def test_a_row_that_fails_costs_itself_and_what_is_measured_stays(
    benchmarks, tmp_path, monkeypatch, capsys
):
    gpu, measured = benchmarks[5], []

    def rows(stage, args, device):
        yield "first", lambda: measured.append("first") or {"value": 1}
        yield "second", lambda: 1 / 0
        yield "third", lambda: {"value": 3}

    monkeypatch.setattr(gpu, "cases", rows)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "exact.jsonl").write_text('{"row": "first", "value": 0}\n')
    args = argparse.Namespace(part="exact,0,1", output=tmp_path, only="")
    assert gpu.measure_part(args) == 0 and not measured
    second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert second["error"].startswith("ZeroDivisionError") and third["value"] == 3


def test_the_gpu_program_runs_as_a_command(tmp_path):
    program = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    command = [
        sys.executable,
        str(program),
        f"--output={tmp_path}",
        "--stages",
        "exact",
        "--only=Qwen3, sdpa, float32",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    (row,) = map(json.loads, (tmp_path / "exact.jsonl").read_text().splitlines())
    assert row["row"] == "Qwen3, sdpa, float32" and row["logps, forest"] < 1e-4


def test_the_last_stage_trains_and_goes_on(benchmarks, tmp_path, ring, monkeypatch):
    gpu = benchmarks[5]
    file = tmp_path / "toy.yaml"
    given = {
        key: value
        for key, value in ring.items()
        if key not in ("backbone", "eval_args", "checkpoint_dir")
    }
    runs = [{"name": "SFT", "settings": {"objective": "sft"}}]
    file.write_text(
        yaml.safe_dump({"dataset": "toy", "candidates": ["uni5"], "runs": runs, "settings": given})
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["gpu.py", f"--output={tmp_path / 'out'}", "--stages", "train", f"--experiment={file}"],
    )
    monkeypatch.setattr(
        sys, "argv", [*sys.argv, "--backbone=scratch", "--jobs=1", "--setting=--sft_epochs=1"]
    )
    assert gpu.main() == 0
    assert "SFT" in (tmp_path / "out" / "train" / "table.md").read_text()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes=0"])
    assert gpu.main() == 1  # no time is left


def test_the_cpu_program_compares_steps_with_their_products(benchmarks, monkeypatch, capsys):
    import cpu

    monkeypatch.setattr(logging, "disable", lambda level: None)
    options = ["--backbone=scratch", "--tokens", "64", "--repeats=1", "--trained"]
    monkeypatch.setattr(sys, "argv", ["cpu.py", *options, "full, whole titles"])
    cpu.main()
    table, _, machine = capsys.readouterr().out.rpartition("\n\n")
    _, _, *rows = table.splitlines()
    assert len(rows) == 2 and json.loads(machine)["backbone"] == "scratch"
    shares = [float(row.split("|")[-2]) for row in rows]
    assert all(0 < share < 1 for share in shares)


@pytest.mark.parametrize("alike", [True, False])
def test_a_floor_of_words_knows_words_alone(benchmarks, tmp_path, alike):
    """Each user stays with one word, or all titles have one."""
    colours = ["red", "green", "blue", "black", "white"]
    rng = np.random.default_rng(1)
    titles = {item: f"{colours[item // 8] if alike else 'no'} {10 + item}" for item in range(40)}
    rows = [
        [8 * (user % 5) + item for item in rng.permutation(8)[:6].tolist()] for user in range(400)
    ]
    config = RunConfig(
        "SASRec",
        "toy",
        config_dict={
            "data_path": str(write_dataset(tmp_path / "d", rows, titles)),
            "eval_args": {"mode": "uni5"},
            "show_progress": False,
        },
    )
    (ranks,) = benchmarks[6].ranks_by_words(config).values()
    assert len(ranks) == len(rows) and (ranks["met"] > 0).all()
    first = (ranks["rank"] == 1).mean()
    # Of five others, some are of the user's colour; without words it is one of six by chance.
    assert first > 0.6 if alike else 0.1 < first < 0.25


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    import scaling

    yield scaling
    del sys.modules["scaling"]


def test_the_exponent_is_that_of_a_power_law(scaling):
    sizes = [1e3, 1e4, 1e5, 1e6]
    assert scaling.exponent(sizes, [7 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    # what does not grow is nothing at the larger sizes
    assert scaling.exponent(sizes, [1e4 + size for size in sizes]) == pytest.approx(1, abs=0.05)
    assert scaling.exponent(sizes[:1], [1]) is None and scaling.exponent(sizes, [0] * 4) is None


def test_what_grows_is_measured(scaling, tmp_path, monkeypatch, capsys):
    sizes = {"small": (40, 80)}
    small = scaling.Point(40, 6, 60, 5, 2, ranked=2, learned=10)
    monkeypatch.setattr(scaling, "BASE", {"small": small})
    grow = {name: (scaling.FACTORS[name][0], sizes) for name in ("users", "items")}
    monkeypatch.setattr(scaling, "FACTORS", grow)
    file = tmp_path / "rows.json"
    options = [
        "--factor",
        "users",
        "items",
        "--only",
        "load",
        "freeze",
        "topk",
        "--json",
        str(file),
    ]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *options])
    scaling.main()
    rows = json.loads(file.read_text())
    for row in rows:
        assert not row["not measured"] and min(row["seconds"].values()) >= 0
    table = capsys.readouterr().out
    assert table.count("| freezing candidates ") == 2 and table.count(", RecBole's part") == 2
    whole, recboles, ours = (list(row["seconds"].values())[-1] for row in rows[:3])
    assert 0 < recboles + ours <= whole


def test_larger_sizes_than_the_limit_allows_are_named(scaling, tmp_path, monkeypatch):
    def done(bench, names):
        yield from ((name, {"seconds": {"": 1.0}, "MiB": 2.0}) for name in names)

    def dies(bench, names):
        yield from done(bench, names[:1])
        raise SystemExit(3)

    monkeypatch.setattr(scaling, "each_alone", done)
    found = scaling.measure_factor("K", "small", ["step"], 0.0, tmp_path)
    (row,) = scaling.rows_of("K", found)
    assert row["seconds"] == {3: 1.0} and row["not measured"] == {7: "not measured: over the limit"}
    assert "not measured: over the limit" in scaling.table("K", [row])
    monkeypatch.setattr(scaling, "each_alone", dies)
    found = scaling.measure_factor("K", "small", ["pack", "step"], 60.0, tmp_path)
    assert found["pack"][7]["MiB"] == 2.0
    assert found["step"] == {size: {"why": "failed, exit code 3"} for size in (3, 7)}


@pytest.mark.parametrize("way", ["LoRA", "full"])
def test_the_rule_of_memory_is_what_a_small_model_holds(monkeypatch, way):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import memory

    shape = memory.SMALL[0] | {"num_hidden_layers": 2}
    state, peak, each = memory.measured(shape, way, tokens=256)
    rule = memory.Shape.of(shape)
    assert state * 2**20 == pytest.approx(memory.state_bytes(rule, way), rel=1e-3)
    assert peak > 0 and 20 < each < 200
    one, eight = (memory.fits(rule, way, gpus, gpus > 1, 256) for gpus in (1, 8))
    assert eight < one

"""A run says what it read, and notices what changes beneath it."""

import json
import linecache
import math
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from recbole_sdpo import digests as module
from recbole_sdpo import inputs, quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import sha256, write_record
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.objectives import OBJECTIVES, Constants, Objective, dpo, dpo_multi
from recbole_sdpo.result import read_result


def config(settings, model="SDPO-LLM", **more):
    return RunConfig(model, "toy", config_dict=settings | more)


@pytest.fixture
def places(ring, tmp_path):
    """One file of each kind that a run reads, and the settings that name it."""
    files = {
        name: tmp_path / name
        for name in ("mine.yaml", "backbone/model.safetensors", "sft/model.safetensors")
    }
    data = tmp_path / "data" / "toy"
    files |= {
        name: data / name
        for name in ("toy.inter", "toy.item", "toy.user", "toy.part.inter", "toy.useremb", "toy.kg")
    }
    for file in files.values():
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            file.write_text("content")
    settings = {
        "prompt_templates": str(tmp_path / "mine.yaml"),
        "backbone": str(tmp_path / "backbone"),
        "sft_checkpoint": str(tmp_path),
        "additional_feat_suffix": ["useremb"],
    }
    return files, ring | settings


def test_every_file_that_a_run_reads_counts(places):
    files, settings = places
    before = Inputs.of(config(settings))
    before.check()
    for file in files.values():
        content = file.read_bytes()
        for harm in (lambda file=file: file.write_bytes(b"other"), file.unlink):
            harm()
            with pytest.raises(
                UserError,
                match=rf"^{file} changed while this run was reading it; start it again\.$",
            ):
                before.check()
            file.write_bytes(content)
    before.check()
    (files["toy.inter"].parent / "toy.link").write_text("new")
    with pytest.raises(UserError, match="data/toy.link changed"):
        before.check()


def test_an_edit_counts_that_size_and_time_do_not_show(tmp_path):
    file = tmp_path / "file"
    file.write_text("one")
    stat = file.stat()
    first = module.digest(file)
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert module.digest(file) == sha256(file) != first


def test_a_file_is_read_once_if_it_has_lain_there(tmp_path, monkeypatch):
    file, reads = tmp_path / "file", []
    file.write_text("one")

    def of(path):
        reads.append(path)
        return "digest"

    assert [module.known(file, of) for _ in range(3)] == ["digest"] * 3 and len(reads) == 3, (
        "just written"
    )
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3)
    assert [module.known(file, of) for _ in range(3)] == ["digest"] * 3 and len(reads) == 4
    file.write_text("other")
    assert module.known(file, of) == "digest" and len(reads) == 5


SOURCE = "x = 1\n\ndef f(a):\n    return a + x\n"


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("# why\nx = 1  # one\ndef f(a): return a + x\n", True),
        ('"""Module."""\nx = 1\n"""One."""\n\ndef f(a):\n    """Add."""\n    return a + x\n', True),
        (SOURCE.replace("1", "2"), False),
        (SOURCE.replace("+", "-"), False),
        (SOURCE + "f(", False),
    ],
)
def test_of_sources_what_they_do_counts(tmp_path, other, same):
    file = tmp_path / "a.py"
    file.write_text(SOURCE)
    before = module.meaning(file)
    file.write_text(other)
    assert (module.meaning(file) == before) == same
    file = tmp_path / "a.yaml"
    file.write_text("a: [1, 2]\n")
    before = module.meaning(file)
    file.write_text("# why\na:\n- 1\n- 2\n")
    assert module.meaning(file) == before
    file.write_text("a: [2, 1]\n")
    assert module.meaning(file) != before


def test_versions_and_sources_count(ring, monkeypatch):
    before = Inputs.of(config(ring))
    monkeypatch.setattr(inputs, "package_versions", lambda: {"torch": "9.9"})
    assert before.changed(Inputs.of(config(ring)).digests).startswith("the version of ")
    assert before.changed(before.digests | {"sources": "other"}) == "a source file of recbole_sdpo"


def test_models_of_recbole_have_nothing_to_do_with_our_prompts(ring):
    baseline = Inputs.of(config(ring, "BPR"))
    ours = Inputs.of(config(ring))
    assert (
        set(baseline.files) == {"data/toy.inter", "data/toy.item"}
        and "prompt_templates" in ours.files
    )
    assert baseline.digests["sources"] != ours.digests["sources"]


CELL = "def mine(policy, reference, constants):\n    return constants.beta * policy\n"


def test_what_an_objective_from_outside_declares_counts(ring, monkeypatch):
    mine = Objective("mine", dpo_multi, 1, True)
    others = {
        "same": mine._replace(title="whatever"),
        "negatives": mine._replace(negatives=math.inf),
        "reference": mine._replace(reference=False),
        "reads": mine._replace(reads=("beta", "reward_margin")),
        "loss": mine._replace(loss=dpo),
        "argument": mine._replace(loss=partial(dpo_multi, constants=Constants(2.0))),
        "other argument": mine._replace(loss=partial(dpo_multi, constants=Constants(3.0))),
    }

    def digest(objective):
        monkeypatch.setitem(OBJECTIVES, "mine", objective)
        return Inputs.of(config(ring, objective="mine")).digests["objective"]

    expected = digest(mine)
    digests = {name: digest(objective) for name, objective in others.items()}
    assert digests.pop("same") == expected
    assert len({expected, *digests.values()}) == 1 + len(digests)
    assert "objective" not in Inputs.of(config(ring)).digests


def test_an_objective_may_be_of_a_notebook(ring, monkeypatch):
    """There is no file of it; Python knows the text of its cell, if anything."""
    digests = []
    for number, cell in enumerate([CELL, CELL, CELL.replace("policy\n", "-policy\n"), None]):
        space = {"__name__": "__main__"}
        name = f"<ipython-input-{number}>"
        if cell:
            monkeypatch.setitem(
                linecache.cache, name, (len(cell), None, cell.splitlines(True), name)
            )
        exec(compile(cell or CELL, name, "exec"), space)
        monkeypatch.setitem(OBJECTIVES, "mine", Objective("mine", space["mine"], 1, True))
        digests.append(Inputs.of(config(ring, objective="mine")).digests["objective"])
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_of_the_trainer_what_chooses_weights_counts_for_every_model(monkeypatch):
    counted = []
    monkeypatch.setattr(module, "known", lambda file, of: counted.append(file.name) or "")
    module.sources(module.ONLOOKERS | module.OF_SDPO_LLM)
    assert {"best_weights.py", "ranks.py", "candidates.py", "quick_start.py"} <= set(counted)
    assert not {"stage.py", "batches.py", "reference.py", "objectives.py"} & set(counted)


@pytest.mark.parametrize("model", ["SDPO-LLM", "BPR"])
def test_a_run_whose_data_change_as_it_reads_them_fails(ring, tmp_path, monkeypatch, model):
    item, create = tmp_path / "data" / "toy" / "toy.item", quick_start.create_dataset

    def edited(config):
        dataset = create(config)
        item.write_text(item.read_text().replace("red", "pink"))
        return dataset

    monkeypatch.setattr(quick_start, "create_dataset", edited)
    with pytest.raises(UserError, match="toy.item changed while this run was reading it"):
        quick_start.run(model, "toy", config_dict=ring | {"epochs": 1})


def test_a_result_has_what_was_read_and_a_run_is_resumed_with_that_alone(ring, tmp_path, caplog):
    run_dir = tmp_path / "run"
    read = Inputs.of(config(ring, "Pop"))
    result = quick_start.run(
        "Pop", "toy", config_dict=ring | {"epochs": 1, "run_dir": str(run_dir)}
    )
    assert result["inputs"] == read_result(run_dir)["inputs"] == read.digests
    (run_dir / "state").mkdir(exist_ok=True)
    write_record(run_dir / "state" / "state.json", {"settings": {"dataset": "toy"}})
    assert result["other_code"] == read.keep(run_dir, write=True) == []
    upgrade = {"versions/torch": "9.0", "sources": "other"}
    torch = {name: read.digests[name] for name in upgrade}
    upgraded = replace(read, digests=read.digests | upgrade)
    assert upgraded.keep(run_dir, write=False) == upgraded.keep(run_dir, write=True) == [torch]
    for name in ("the version of torch", "a source file of recbole_sdpo"):
        assert f"{name} is not what it was earlier in the run in {run_dir}" in caplog.text
    assert read.keep(run_dir, write=True) == [upgrade]  # back again, which does not undo it
    again = replace(read, digests=read.digests | {"versions/torch": "9.1"})
    former = [{"versions/torch": torch["versions/torch"]}, upgrade | {"sources": "other"}]
    assert again.keep(run_dir, write=True) == former
    files = json.loads((run_dir / inputs.INPUTS_FILE).read_text())["files"]
    (run_dir / inputs.INPUTS_FILE).write_text(json.dumps(files))  # of an older release
    assert read.keep(run_dir, write=True) == []
    assert f"{run_dir} does not say with which sources and versions its run began" in caplog.text
    assert again.keep(run_dir, write=True) == former[:1]
    write_record(run_dir / "state" / "state.json", {"settings": {"dataset": "shop"}})
    with pytest.raises(
        UserError, match=r"that run had dataset='shop' \(now 'toy'\); give the options that it had"
    ):
        read.keep(run_dir, write=True)
    write_record(run_dir / "state" / "state.json", {"settings": {"dataset": "toy"}})
    item = Path(ring["data_path"]) / "toy" / "toy.item"
    item.write_text(item.read_text().replace("red", "pink"))
    with pytest.raises(UserError, match=rf"{item} changed since the run in {run_dir} began"):
        Inputs.of(config(ring, "Pop")).keep(run_dir, write=True)
    (run_dir / inputs.INPUTS_FILE).write_text("{")
    with pytest.raises(UserError, match="inputs.json is damaged"):
        read.keep(run_dir, write=True)
    (run_dir / inputs.INPUTS_FILE).unlink()
    with pytest.raises(UserError, match="inputs.json is missing, which tells whether the data are"):
        read.keep(run_dir, write=True)

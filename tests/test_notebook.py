"""The notebook runs from its first cell to its last, with small budgets, and shows what it says."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

FILE = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
CELLS = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]

SMALL = """
shared |= {"max_eval_targets": 24, "epochs": 1}
ours |= {"scratch_hidden_size": 32, "scratch_heads": 2, "max_train_targets": 24}
ours |= {"sft_epochs": 1, "sdpo_epochs": 1, "MAX_ITEM_LIST_LENGTH": 8}
"""


def shown(cell: str, namespace: dict[str, Any]) -> Any:
    """What Jupyter would show of a cell: the value of its last line, if that is an expression."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, FILE.name, "exec"), namespace)
    if last is not None:
        return eval(compile(ast.Expression(last.value), FILE.name, "eval"), namespace)


@pytest.fixture
def in_jupyter(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def test_it_runs(in_jupyter):
    namespace: dict[str, Any] = {}
    values = []
    for cell in CODE:
        values.append(shown(cell, namespace))
        if cell.startswith("shared ="):
            exec(SMALL, namespace)
    table, of_user, of_history = (value for value in values if hasattr(value, "columns"))
    assert list(table.columns) == ["hit@1", "ndcg@5", "mrr@10"] and len(table) == 4
    assert table.map(lambda share: 0 <= share <= 1).all(axis=None)
    for best in (of_user, of_history):
        assert list(best.columns) == ["item", "title", "score"] and best.title.nunique() == 10
        assert best.score.is_monotonic_decreasing
    assert not set(namespace["history"]) & set(of_history.title)
    assert len(pyplot.get_fignums()) == 2
    assert Path("data/films/films.inter").is_file()
    assert shown(next(cell for cell in CODE if "write_atomic(" in cell), namespace) is None


def test_it_is_kept_small_and_without_outputs():
    assert FILE.stat().st_size < 50_000
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert not cell.get("outputs") and cell.get("execution_count") is None

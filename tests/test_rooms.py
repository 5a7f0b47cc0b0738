"""A lower room never imports a higher one (DESIGN.md), and the lowest know nothing of RecBole."""

import ast
from pathlib import Path

import pytest

import recbole_sdpo

ROOT = Path(recbole_sdpo.__path__[0])

ROOMS = (
    "errors version libraries threads random ragged objectives values rules files digests "
    "interrupt output",
    "settings",
    "lm",
    "compat",
    "data",
    "checks",
    "model",
    "evaluator result",
    "trainer",
    "registry",
    "config",
    "inputs device",
    "loaders report processes",
    "quick_start recommend",
    "recommend_all",
    "experiment",
    "command",
    "__main__",
)
"""Lowest first; rooms of one line do not import each other, but for those of the first."""

WITHOUT_RECBOLE = {"lm", "settings", *ROOMS[0].split()}


def imports(room):
    """The modules that the files of a room import, wherever in them."""
    files = (
        [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").is_file() else (ROOT / room).rglob("*.py")
    )
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)


def test_every_room_has_a_place():
    here = {
        path.stem
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert here - {"__init__"} == set(" ".join(ROOMS).split())


@pytest.mark.parametrize("room", " ".join(ROOMS).split())
def test_a_room_imports_none_above_it(room):
    (place,) = (place for place, line in enumerate(ROOMS) if room in line.split())
    lower = {room, *" ".join(ROOMS[: max(place, 1)]).split()}
    for module in imports(room):
        package, _, rest = module.partition(".")
        if package == "recbole_sdpo" and rest:
            assert rest.split(".")[0] in lower, f"{room} imports {module}"
        assert package != "recbole" or room not in WITHOUT_RECBOLE, f"{room} imports {module}"

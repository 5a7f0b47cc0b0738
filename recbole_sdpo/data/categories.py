"""Categories of the items, such as genres, from a column of the ``.item`` file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from recbole.data.dataset import Dataset

from recbole_sdpo.data.tables import read_table
from recbole_sdpo.errors import UserError


def categories(dataset: Dataset, field: str) -> np.ndarray:
    """How much of each item is of each category: 1 / g of g categories, so that an item counts
    once, and 0 of an item that has none. float64 ``[items, categories]``.

    The file is read here and not through RecBole's ``load_col``, as that of the titles is. A column
    ``token`` holds a category, and ``token_seq`` several; of several rows of an item the first
    counts.

    Raises:
        UserError: there is no such file or column, or it is empty, or no column names the items.
    """
    config = dataset.config
    path = Path(dataset.dataset_path, f"{dataset.dataset_name}.item")
    given = f"fairness_groups={field!r}"
    if not path.is_file():
        raise UserError(f"{given} needs the file {path}, which does not exist; or give popularity.")
    table = read_table(path, config["field_separator"], config["encoding"])
    if dataset.iid_field not in table.types:
        raise UserError(f"{given}: {path} has no column {dataset.iid_field!r}; it must name items.")
    known = [name for name, kind in table.types.items() if kind.startswith("token")]
    if field not in known:
        raise UserError(
            f"{given} must be popularity, or a column of {path} that is a token or a token_seq: "
            f"{', '.join(name for name in known if name != dataset.iid_field) or 'it has none'}."
        )
    several = table.types[field] == "token_seq"
    of_token: dict[str, list[str]] = {}
    for token, text in zip(table.ids(dataset.iid_field), table.text(field), strict=True):
        words = text.split(config["seq_separator"]) if several else [text.strip()]
        of_token.setdefault(token, list(dict.fromkeys(filter(None, words))))
    names = sorted({name for words in of_token.values() for name in words})
    if not names:
        raise UserError(
            f"{given}: the column {field} of {path} must name the category of some item."
        )
    place = {name: number for number, name in enumerate(names)}
    weights = np.zeros((dataset.item_num, len(names)))
    for item, token in enumerate(dataset.field2id_token[dataset.iid_field]):
        words = of_token.get(token, [])
        weights[item, [place[word] for word in words]] = 1 / max(len(words), 1)
    return weights

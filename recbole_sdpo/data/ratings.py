"""What users gave to the items that they met, for objectives that read it.

The column is read beside those of ``load_col``: what RecBole loads, all models see, and it scales
it to 0 to 1 (``normalize_all``, which it sets for ml-100k) or cuts it in two (``threshold``). This
one stands as in the file, and only a run whose objective reads it has it.
"""

from __future__ import annotations

import numpy as np
from recbole.config import Config
from recbole.data.dataset import Dataset

from recbole_sdpo.data.tables import MISSING, Table
from recbole_sdpo.objectives import objectives
from recbole_sdpo.settings import MODEL

RATING = "rating as written"
"""The column of a dataset that holds them."""


def rating_field(config: Config) -> str | None:
    """The column of the ``.inter`` file that the run's objective reads, if it reads ratings."""
    if config["model"] != MODEL or not isinstance(name := config["objective"], str):
        return None
    objective = objectives().get(name)  # that it must be one is said elsewhere
    return config["RATING_FIELD"] if objective and objective.reads_ratings else None


def read_ratings(table: Table, field: str) -> np.ndarray:
    """A column of ratings, float64.

    Raises:
        UserError: one is missing or no finite number.
    """
    missing = [text.strip().lower() in MISSING for text in table.text(field)]
    table.refuse(np.array(missing, bool), field, "is no rating; the objective needs one of each")
    return table.numbers(field)


def ratings(dataset: Dataset, rows: np.ndarray) -> np.ndarray | None:
    """Those of the targets of some rows, float32 ``[rows]``; None where no objective reads them."""
    events = dataset.inter_feat
    return events[RATING].numpy()[rows] if RATING in events else None

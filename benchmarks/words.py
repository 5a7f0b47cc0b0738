"""A floor that knows words and nothing else: of the candidates, the title most like the history's.

    python benchmarks/words.py --dataset=amazon-games --data_path=data --held_out_items=0.1

It takes RecBole's settings and ours, ranks the test's sampled candidates, and prints a table by how
many users met the target in training. Titles are bags of words, TF-IDF by all titles of the
catalogue; ties are broken by chance.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from recbole.data import data_preparation
from recbole.data.interaction import Interaction
from sklearn.feature_extraction.text import TfidfVectorizer

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.data.sequences import histories, popularity
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.ranks import metric_of_ranks
from recbole_sdpo.loaders import evaluation_loaders
from recbole_sdpo.random import generator
from recbole_sdpo.report.groups import bands

METRICS = ("HR@1", "NDCG@5")


def main() -> None:
    for mode, ranks in ranks_by_words(RunConfig("SASRec")).items():  # for its kind of data
        band = bands(ranks["met"])
        rank = ranks["rank"].to_numpy()
        values = pd.DataFrame({metric: metric_of_ranks(metric, rank) for metric in METRICS})
        table = values.groupby(band.array, observed=False).mean()
        table["targets"] = band.value_counts()
        table.loc["all"] = [*values.mean(), len(band)]
        table = table.round(4).astype({"targets": int})
        print(f"{mode}, met by\n{table.to_string()}\n")


def ranks_by_words(config: RunConfig) -> dict[str, pd.DataFrame]:
    """For each candidate set a row for each target of the test: its ``rank``, from 1, and ``met``,
    the users who met it in training.

    Raises:
        UserError: there are no titles, or a set is the whole catalogue.
    """
    modes = [config["eval_args"]["mode"]["test"], *config.settings.more_candidates]
    if "full" in modes:
        raise UserError(f"The modes {modes} must be of sampled candidates, such as uni19.")
    raw = create_dataset(config)
    catalogue = Catalogue.from_dataset(
        raw, config.settings.title_fields, config.settings.title_article_first
    )
    train, *rest = data_preparation(config, raw)
    words = TfidfVectorizer(token_pattern=r"\w+").fit_transform(catalogue.titles)
    met, rng = popularity(train._dataset), generator(config["seed"], "ties")

    def rank(rows: Interaction, targets: int) -> pd.DataFrame:
        # A row for each candidate, those of a target together, which is the first.
        candidates = rows[config["ITEM_ID_FIELD"]].numpy().reshape(targets, -1)
        past = histories(rows[np.arange(0, len(rows), candidates.shape[1])], config)
        likeness = np.array(
            [
                (words[row] @ words[history].T).toarray().mean(1)
                for row, history in zip(candidates, past, strict=True)
            ]
        )
        score = likeness + 1e-9 * rng.random(likeness.shape)
        ranks = 1 + (score[:, 1:] > score[:, :1]).sum(1)
        return pd.DataFrame({"rank": ranks, "met": met[candidates[:, 0]]})

    loaders = evaluation_loaders(config, train, rest, catalogue)
    return {
        mode: pd.concat([rank(rows, len(target)) for rows, _, _, target in test], ignore_index=True)
        for mode, (_, test) in loaders.items()
    }


if __name__ == "__main__":
    main()

"""Recommend from a checkpoint: ``python -m recbole_sdpo.recommend --checkpoint DIR --user ID``."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import AutoTokenizer

from recbole_sdpo import compat
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.catalogue import Catalogue, folded
from recbole_sdpo.data.dataset import create_dataset, user_histories
from recbole_sdpo.data.prompts import Templates, Units, history_prompts
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.backbone import BackboneConfig, load_backbone, restore_policy
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.ranking import TitleTree, score_top
from recbole_sdpo.model.encoder import Encoder
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.random import derive_seed
from recbole_sdpo.report.table import markdown_table
from recbole_sdpo.settings import MODEL
from recbole_sdpo.trainer.sdpo_trainer import DATA_FILE, POLICY_FILE


class Recommender:
    """A trained policy, the titles that it may recommend, and what each user chose so far.

    Args:
        lm: the policy.
        catalogue: the titles.
        units: of prompts of the ``history`` style.
        item_tokens: the items' ids in the data, by RecBole's internal id.
        users: for each user's id in the data, the items met, oldest first.
        window: how many of the last items a prompt shows.
    """

    def __init__(
        self, lm: LanguageModel, catalogue: Catalogue, units: Units, item_tokens: np.ndarray, users: dict[str, np.ndarray], window: int
    ) -> None:
        self.lm, self.catalogue, self.units = lm.eval(), catalogue, units
        self.item_tokens, self.users, self.window = item_tokens, users, window
        self._encoder = Encoder(catalogue, units, lm.tokenizer)
        # Of the items of one title the first stands for all.
        _, first = np.unique(catalogue.group[1:], return_index=True)
        self._first = np.sort(first) + 1
        self._item_of = {folded(catalogue.titles[item]): int(item) for item in self._first}
        self._tree = TitleTree(self._encoder.tokens.take(self._first))

    @classmethod
    def load(cls, checkpoint: str | Path, data_path: str | Path | None = None, device: str | None = None) -> Recommender:
        """Load a checkpoint, and the data that it was trained on as they are now: later events and new titles count.

        Args:
            checkpoint: a folder ``sft`` or ``sdpo``, or that of the whole run, whose last stage is taken.
            data_path: where the data are now, if they have moved.
            device: such as ``cpu`` or ``cuda``; a GPU is taken if there is one.

        Raises:
            UserError: it is no checkpoint, its data are not there, or its prompts need candidates.
        """
        folder = _checkpoint(Path(checkpoint).expanduser())
        made = json.loads((folder / POLICY_FILE).read_text(encoding="utf-8"))
        data = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
        if made["prompt_style"] != "history":
            raise UserError(
                f"checkpoint {str(folder)!r} was trained with prompt_style={made['prompt_style']!r}, whose prompts hold candidates and "
                "cannot rank the whole catalogue; train with prompt_style=history."
            )
        given = data["settings"] | ({"data_path": str(data_path)} if data_path else {})
        try:
            with compat.no_arguments():
                config = RunConfig(MODEL, data["dataset"], config_dict=given)
            dataset = create_dataset(config)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(
                f"the data of checkpoint {str(folder)!r} cannot be loaded: {error} If they have moved, give data_path."
            ) from error
        catalogue = Catalogue.from_dataset(dataset, made["title_fields"], made["title_article_first"])
        units = Units(len(catalogue.titles), Templates(made["header"], ()))
        try:
            where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise UserError(f"device={device!r} is none; valid are cpu, cuda, cuda:1 and the like.") from error
        chosen = {f.name: made[f.name] for f in fields(BackboneConfig)} | {"backbone": data["backbone"]}
        backbone = BackboneConfig(**chosen).resolve(where)
        lm = load_backbone(
            backbone,
            where,
            lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True),
            lambda purpose: derive_seed(config["seed"], purpose),
        )
        restore_policy(lm, folder)
        users = user_histories(dataset)
        return cls(lm, catalogue, units, dataset.field2id_token[dataset.iid_field], users, config["MAX_ITEM_LIST_LENGTH"])

    def recommend(
        self, user: str | None = None, history: Sequence[str] | None = None, k: int = 10, exclude_history: bool = False
    ) -> pd.DataFrame:
        """The ``k`` titles that the policy finds most likely to come next, best first.

        Args:
            user: a user's id in the data.
            history: titles, oldest first, instead of a user; case and blanks do not matter.
            exclude_history: recommend nothing that stands in the history.

        Returns:
            Columns ``item`` (the id in the data), ``title`` and ``score``, the title's log-probability.

        Raises:
            UserError: the user or a title is unknown, the history is empty, or ``k`` is out of range.
        """
        if (user is None) == (history is None) or isinstance(history, str):
            raise UserError("Give either a user, or a history as a list of titles.")
        met = self._met(str(user)) if history is None else np.array([self._item(title) for title in history], np.int64)
        if not len(met):
            raise UserError("The history is empty; give one title or more.")
        allowed = self._first
        if exclude_history:
            allowed = allowed[~np.isin(self.catalogue.group[allowed], self.catalogue.group[met])]
        if not isinstance(k, int) or not 1 <= k <= len(allowed):
            raise UserError(f"k={k} is out of range; there are {len(allowed)} titles to recommend.")
        shown = Ragged.from_rows([met[-self.window :]])
        tree = TitleTree(self._encoder.tokens.take(allowed)) if exclude_history else self._tree
        prompt = self._encoder.trunks(history_prompts(shown, np.zeros(1, int), np.zeros(1, int), self.units.header))
        with torch.no_grad():
            score, place = score_top(self.lm, prompt, tree, k)[0].topk(k)
        items = allowed[place.cpu().numpy()]
        titles = [self.catalogue.titles[item] for item in items]
        return pd.DataFrame({"item": self.item_tokens[items], "title": titles, "score": score.double().cpu().numpy()})

    def _met(self, user: str) -> np.ndarray:
        if user not in self.users:
            raise UserError(f"user {user!r} is not in the data{_nearest(user, self.users)}")
        return self.users[user]

    def __contains__(self, title: str) -> bool:
        """Is it a title of the catalogue?"""
        return folded(title) in self._item_of

    def _item(self, title: str) -> int:
        if title not in self:
            titles = {text: self.catalogue.titles[item] for text, item in self._item_of.items()}
            raise UserError(f"title {title!r} is not in the catalogue{_nearest(folded(title), titles)}")
        return self._item_of[folded(title)]


def _nearest(name: str, known: dict[str, object]) -> str:
    """How the error about an unknown name ends."""
    near = difflib.get_close_matches(name, known, 3, 0.5)
    shown = [repr(known[found]) if isinstance(known[found], str) else repr(found) for found in near]
    return f"; the nearest are {', '.join(shown)}." if near else ", and nothing there is like it."


def _checkpoint(folder: Path) -> Path:
    places = [place for place in (folder / "sdpo", folder / "sft", folder) if (place / DATA_FILE).is_file()]
    if not places:
        raise UserError(f"checkpoint={str(folder)!r} holds no {DATA_FILE}; valid is the folder of a run, or 'sft' or 'sdpo' in it.")
    return places[0]


def main() -> None:
    """Parse the command line, and print a table or JSON."""
    parser = argparse.ArgumentParser(description="The items that a trained policy recommends to a user, or after a history.")
    parser.add_argument("--checkpoint", required=True, help="folder of a run, or 'sft' or 'sdpo' in it")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="a user's id in the data")
    who.add_argument("--history", action="append", help="titles, oldest first, separated by ';'; or the option once for each title")
    parser.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--exclude_history", action="store_true", help="recommend nothing that stands in the history")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--data_path", help="where the data are now, if they have moved")
    parser.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")
    args = parser.parse_args()
    compat.quiet_warnings()
    transformers.utils.logging.disable_progress_bar()
    history = args.history
    try:
        recommender = Recommender.load(args.checkpoint, args.data_path, args.device)
        if history and len(history) == 1 and history[0] not in recommender:
            history = [title for title in history[0].split(";") if title.strip()]
        found = recommender.recommend(args.user, history, args.k, args.exclude_history)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.format == "json":
        print(found.to_json(orient="records", indent=2, force_ascii=False))
    else:
        print(markdown_table(["", *found.columns], [[rank, *row] for rank, row in enumerate(found.itertuples(index=False), 1)]))


if __name__ == "__main__":
    main()

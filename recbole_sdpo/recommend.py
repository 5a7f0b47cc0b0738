"""Recommend from a checkpoint: the items that a policy ranks highest for a user, or after a
history."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recbole_sdpo import compat
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.catalogue import Catalogue, folded, read_items
from recbole_sdpo.data.dataset import user_histories
from recbole_sdpo.data.prompts import Templates, Units, batches, history_prompts
from recbole_sdpo.data.serving import ServedDataset
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import user_path
from recbole_sdpo.lm.attention import positions
from recbole_sdpo.lm.backbone import load_backbone, resolved
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.memory import tokens_at_once
from recbole_sdpo.lm.policy import restore_policy
from recbole_sdpo.lm.ranking import NODES_AT_ONCE, TitleTree, score_top
from recbole_sdpo.model.encoder import Encoder, title_lines
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.random import derive_seed
from recbole_sdpo.settings import MODEL
from recbole_sdpo.trainer.checkpoint import Checkpoint
from recbole_sdpo.values import shown

ITEMS = "item_inter_num_interval"
"""The filter that leaves items out."""


class Recommender:
    """A trained policy, the titles that it may recommend, and what each user chose so far.

    Args:
        lm: the policy.
        catalogue: the titles.
        units: of prompts of the ``history`` style.
        item_tokens: the items' ids in the data, by RecBole's internal id.
        users: for each user's id in the data, the items met, oldest first.
        window: how many of the last items a prompt shows; fewer where the backbone has too few
            positions for their titles.
        left_out: for each user of whom a filter leaves no event, that filter.
        items_left_out: the filter that leaves items out, if one does.
    """

    def __init__(
        self,
        lm: LanguageModel,
        catalogue: Catalogue,
        units: Units,
        item_tokens: np.ndarray,
        users: Mapping[str, np.ndarray],
        window: int,
        left_out: Mapping[str, str] | None = None,
        items_left_out: str = "",
    ) -> None:
        self.lm, self.catalogue, self.units = lm.eval(), catalogue, units
        self.item_tokens, self.users, self.window = item_tokens, users, window
        self.left_out, self.items_left_out = left_out or {}, items_left_out
        self._encoder = Encoder(catalogue, units, lm.tokenizer)
        # Of the items of one title the first stands for all.
        _, first = np.unique(catalogue.group[1:], return_index=True)
        self._first = np.sort(first) + 1
        self._item_of = {folded(catalogue.titles[item]): int(item) for item in self._first}
        titles = self._encoder.tokens.take(self._first)
        self._tree = TitleTree(titles)
        limit, hard = positions(lm.causal_lm)
        # What is left for a history. Without it, a service would end at one with long titles.
        self._room = (
            limit - self._encoder.tokens.lengths[units.header] - titles.lengths.max()
            if limit and hard
            else None
        )

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        data_path: str | Path | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> Recommender:
        """Load a checkpoint, and the data that it was trained on as they are now: later events and
        new titles count.

        A title in the ``.item`` file needs no event, and a user not so many as training asked for.
        Nothing in the folder runs, whoever wrote it.

        Args:
            checkpoint: a folder ``sft`` or ``sdpo``, or that of the whole run, whose last stage is
                taken.
            data_path: where the data are now, if they have moved.
            device: such as ``cpu`` or ``cuda``; a GPU is taken if there is one.
            trust_remote_code: run code that comes with the backbone's files.

        Raises:
            UserError: it is no checkpoint or a damaged one, its data are not there, or its prompts
                need candidates.
        """
        where = _device(device)
        made = Checkpoint.read(user_path(checkpoint))
        if made.settings.prompt_style != "history":
            raise UserError(
                f"checkpoint {str(made.folder)!r} was trained with "
                f"prompt_style={made.settings.prompt_style!r}, whose prompts hold "
                "candidates and cannot rank the whole catalogue; train with prompt_style=history."
            )
        dataset = _load_data(made, data_path)
        dataset.add_items(read_items(dataset, made.settings.title_fields).index)
        catalogue = Catalogue.from_dataset(
            dataset, made.settings.title_fields, made.settings.title_article_first
        )
        lm = load_backbone(
            resolved(made.chosen(trust_remote_code), where),
            where,
            lambda: _tokenizer(made.folder),
            lambda purpose: derive_seed(made.seed, purpose),
            [*title_lines(catalogue)[1:], made.header],
        )
        restore_policy(lm, made.folder, new_titles=made.backbone != "scratch")
        return cls(
            lm,
            catalogue,
            Units(len(catalogue.titles), Templates(made.header, ())),
            dataset.field2id_token[dataset.iid_field],
            user_histories(dataset),
            dataset.config["MAX_ITEM_LIST_LENGTH"],
            {who: f"{key}={dataset.config[key]!r}" for who, key in dataset.users_left_out.items()},
            f"{ITEMS}={dataset.config[ITEMS]!r}" if dataset.items_left_out else "",
        )

    def recommend(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        k: int = 10,
        exclude_history: bool = False,
    ) -> pd.DataFrame:
        """The ``k`` titles that the policy finds most likely to come next, best first.

        Args:
            user: a user's id in the data.
            history: titles, oldest first, instead of a user; case and blanks do not matter.
            exclude_history: recommend nothing that stands in the history.

        Returns:
            Columns ``item`` (the id in the data), ``title`` and ``score``, the title's
            log-probability.

        Raises:
            UserError: the user or a title is unknown, the history is empty, or ``k`` is out of
                range.
        """
        if (user is None) == (history is None) or isinstance(history, str):
            raise UserError(
                f"user={user!r}, history={shown(history)}: one of the two must be given, and a "
                "history must be a list of titles."
            )
        met = (
            self.met(str(user))
            if history is None
            else np.array([self._item(title) for title in history], np.int64)
        )
        if not len(met):
            raise UserError(f"history={history!r} must be a list of one title or more.")
        self.check_k(k, {user: met} if exclude_history else {})
        score, items = self._best([met], int(k), exclude_history)
        return self._frame(score[0], items[0])

    def recommend_to_users(
        self, users: Sequence[str], k: int = 10, exclude_history: bool = False
    ) -> pd.DataFrame:
        """The same for each of ``users``, some at a time; a row for each user and item, with the
        columns ``user`` and ``rank``, from 1, before the others.

        Raises:
            UserError: a user is unknown, or ``k`` is out of range for one.
        """
        users = ids(users)
        met = [self.met(user) for user in users]
        self.check_k(k, dict(zip(users, met, strict=True)) if exclude_history else {})
        score, items = self._best(met, int(k), exclude_history)
        frame = self._frame(score.ravel(), items.ravel())
        frame.insert(0, "user", np.repeat(np.array(users, object), k))
        frame.insert(1, "rank", np.tile(np.arange(1, k + 1), len(users)))
        return frame

    def check_k(self, k: object, left_out: Mapping[Any, np.ndarray]) -> None:
        """Are there ``k`` titles to recommend, to each user of ``left_out`` without those of these
        items?

        Raises:
            UserError: there are fewer, or it is no number; the message names the user.
        """
        group = self.catalogue.group
        number = {user: len(np.unique(group[items])) for user, items in left_out.items()}
        user = max(number, key=number.__getitem__, default=None)
        most = len(self._first) - number.get(user, 0)
        if not isinstance(k, int | np.integer) or not 1 <= k <= most:
            whom = f" to user {user!r}" if user is not None else ""
            if most < 1:
                raise UserError(f"No title is left to recommend{whom}, who has met them all.")
            raise UserError(
                f"k={shown(k)} must be a whole number from 1 to {most}, the titles that there are "
                f"to recommend{whom}."
            )

    @torch.no_grad()
    def _best(
        self, met: Sequence[np.ndarray], k: int, exclude_history: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """After each history ``met`` the log-probabilities of the ``k`` best titles, float64
        ``[histories, k]``, and their items."""
        recent = Ragged.from_rows([self._recent(items) for items in met])
        nobody = np.zeros(len(met), int)
        prompts = self._encoder.trunks(history_prompts(recent, nobody, nobody, self.units.header))
        score, best = np.empty((len(met), k)), np.empty((len(met), k), np.int64)
        group, (_, budget) = self.catalogue.group, tokens_at_once(self.lm.causal_lm, self.lm.device)
        # A prompt takes room for itself and for the nodes that stand below it at a time.
        for rows in batches(prompts.lengths + NODES_AT_ONCE, budget):
            left_out = np.zeros((len(rows), len(self._first)), bool)
            for row, of_user in enumerate(rows if exclude_history else []):
                left_out[row] = np.isin(group[self._first], group[met[of_user]])
            # Of so many, k are left whatever is taken out.
            wanted = k + int(left_out.sum(1).max())
            scores = score_top(self.lm, prompts.take(rows), self._tree, wanted)
            scores[torch.from_numpy(left_out).to(scores.device)] = -torch.inf
            top = scores.topk(k)
            score[rows] = top.values.double().cpu().numpy()
            best[rows] = self._first[top.indices.cpu().numpy()]
        return score, best

    def _recent(self, items: np.ndarray) -> np.ndarray:
        """The last items of a history, as many as a prompt shows and the backbone can read."""
        items = items[-self.window :]
        if self._room is None:
            return items
        tokens = np.cumsum(self._encoder.tokens.lengths[items][::-1])
        return items[len(items) - np.searchsorted(tokens, self._room, "right") :]

    def _frame(self, score: np.ndarray, items: np.ndarray) -> pd.DataFrame:
        titles = [self.catalogue.titles[item] for item in items]
        return pd.DataFrame({"item": self.item_tokens[items], "title": titles, "score": score})

    def met(self, user: str) -> np.ndarray:
        """The items that a user of the data has met, oldest first, as internal ids.

        Raises:
            UserError: there is no such user, or a filter leaves none of its events.
        """
        if user in self.left_out:
            raise UserError(
                f"user {str(user)!r} has events in the data, but {self.left_out[user]} of the "
                "training leaves none of them."
            )
        if user not in self.users:
            raise UserError(f"user {str(user)!r} is not in the data{_nearest(user, self.users)}")
        return self.users[user]

    def __contains__(self, title: str) -> bool:
        """Is it a title of the catalogue?"""
        return folded(title) in self._item_of

    def _item(self, title: str) -> int:
        if not isinstance(title, str):
            raise UserError(f"title {shown(title)} of the history must be a text.")
        if title not in self:
            titles = {text: self.catalogue.titles[item] for text, item in self._item_of.items()}
            left_out = self.items_left_out
            without = f" (without the items that {left_out} leaves out)" if left_out else ""
            raise UserError(
                f"title {title!r} is not in the catalogue{without}{_nearest(folded(title), titles)}"
            )
        return self._item_of[folded(title)]


def ids(users: Iterable[object]) -> list[str]:
    """Users' ids as text, as the data have them.

    Raises:
        UserError: it is one text, and no list.
    """
    if isinstance(users, str):
        raise UserError(f"users={users!r} must be a list of users' ids, such as [{users!r}].")
    return [str(user) for user in users]


def _nearest(name: str, known: Mapping[str, object]) -> str:
    """How the error about an unknown name ends."""
    near = difflib.get_close_matches(name, known, 3, 0.5)
    # NumPy's text, as of the ids of the data, has a repr of its own.
    names = [repr(str(known[key] if isinstance(known[key], str) else key)) for key in near]
    return f"; the nearest are {', '.join(names)}." if near else ", and nothing there is like it."


def _device(name: str | None) -> torch.device:
    """The device to serve on, if this machine has it."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).tolist()
    except (RuntimeError, AssertionError, TypeError) as error:
        line = str(error).split("\n")[0].split(". ")[0][:200]
        raise UserError(
            f"device={device!r} cannot be used ({line}); it must be cpu, cuda, cuda:1 or the "
            "like, and be there."
        ) from error
    return where


def _load_data(made: Checkpoint, data_path: str | Path | None) -> ServedDataset:
    if data_path is not None and not str(data_path).strip():
        raise UserError(
            f"data_path={str(data_path)!r} is blank; it must be a folder, or be left out."
        )
    # text stays text, such as a folder's name that is a number
    moved = {} if data_path is None else {"data_path": repr(str(user_path(data_path)))}
    remedy = (
        f"data_path={str(data_path)!r} must be the folder above {made.dataset}/."
        if moved
        else "If they have moved, give data_path."
    )
    try:
        with compat.no_arguments(), compat.same_gpus():
            config = RunConfig(MODEL, made.dataset, config_dict=made.data | moved)
        return ServedDataset(config)
    except (UserError, OSError) as error:
        raise UserError(
            f"the data of checkpoint {str(made.folder)!r} cannot be loaded: "
            f"{str(error).rstrip('.')}. {remedy}"
        ) from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """That of a ``scratch`` backbone, by the class that wrote it, not one that a file names."""
    try:
        # the model's, not a file's
        options = {
            "local_files_only": True,
            "trust_remote_code": False,
            "model_max_length": sys.maxsize,
        }
        return PreTrainedTokenizerFast.from_pretrained(folder, **options)
    # the tokenizers' own have no other class, and all that is read here is the folder's
    except Exception as error:
        line = str(error).split("\n")[0]
        raise UserError(
            f"checkpoint {str(folder)!r}: the tokenizer cannot be read ({type(error).__name__}: "
            f"{line}); give another one."
        ) from error

"""``SDPO-LLM``: a causal language model that recommends the next item by the log-probability of
its title."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.sampler.sampler import AbstractSampler
from recbole.utils import InputType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recbole_sdpo.checks.configuration import settings_of_run_recbole
from recbole_sdpo.checks.metrics import check_topk, is_of_answers
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.examples import CandidateExamples, Examples, FixedExamples, HistoryExamples
from recbole_sdpo.data.negatives import SELF, MixedNegatives, Negatives, NegativeSampler, shares
from recbole_sdpo.data.prompts import (
    Prompts,
    Templates,
    Units,
    batches,
    candidate_prompts,
    history_prompts,
)
from recbole_sdpo.data.ratings import RATING
from recbole_sdpo.data.sequences import (
    digest_of_targets,
    histories,
    last_targets,
    met_items,
    popularity,
    training_sequences,
    users_and_targets,
)
from recbole_sdpo.data.whole_catalogue import LEFT_OUT
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.attention import positions
from recbole_sdpo.lm.backbone import load_backbone, resolved
from recbole_sdpo.lm.forest import Forest
from recbole_sdpo.lm.generation import NOTHING, line_ends, write
from recbole_sdpo.lm.memory import tokens_at_once
from recbole_sdpo.lm.parts import is_parted, part
from recbole_sdpo.lm.ranking import NODES_AT_ONCE, TitleTree, score_all, score_top
from recbole_sdpo.lm.scratch import train_tokenizer
from recbole_sdpo.model.encoder import Encoder, title_lines
from recbole_sdpo.model.suitability import check_parts, without_effect
from recbole_sdpo.objectives import OBJECTIVES, Logps
from recbole_sdpo.ragged import Ragged, segment_sums
from recbole_sdpo.random import derive_seed, generator
from recbole_sdpo.settings import NO_FULL_RANKING, CompleteSettings, Settings

PASSES = ("predict", "full_sort_predict", "answers", "favourites")
"""Methods of the model that call the backbone, beside ``forward``."""

NO_TARGETS = torch.empty(0, dtype=torch.int64)

TARGET_ROW = "target_row"
"""Column of an evaluation batch: the number of the target, from 0, that a row's item is a
candidate for."""


class SDPOLLM(SequentialRecommender):
    """Scores an item by log pi(title, terminator | prompt made of the user's history).

    Args:
        config: RecBole's configuration, with our settings in it.
        dataset: RecBole's training dataset.

    Raises:
        UserError: a setting is wrong, a title field is missing, or the backbone cannot be loaded.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        settings: Settings = getattr(config, "settings", None) or settings_of_run_recbole(config)
        self.config = config
        self.seed: int = config["seed"]
        self.window: int = config["MAX_ITEM_LIST_LENGTH"] + 1
        negatives = config["train_neg_sample_args"]
        objective = OBJECTIVES[settings.objective]
        drawn = negatives["sample_num"] if objective.negatives else 0
        self.negatives: int = objective.taking(drawn)
        # to a negative, of which the hardest counts
        self.draws: int = negatives["candidate_num"] if negatives["dynamic"] else 1
        # of the negatives, those that the policy itself ranks highest
        self.sources = shares(settings.negative_sources or {}, self.negatives)
        self.own: int = self.sources.get(SELF, 0)
        self.objective = "sft"

        check_topk(config, self.n_items - 1)
        self.catalogue = Catalogue.from_dataset(
            dataset, settings.title_fields, settings.title_article_first
        )
        lines = np.array(title_lines(self.catalogue), dtype=object)
        templates = Templates.load(settings.prompt_templates).of_style(settings.prompt_style)
        self.units = Units(len(self.catalogue.titles), templates)
        self.backbone = resolved(settings.backbone, self.device)
        settings = settings.suited_to(self.backbone)
        parted = settings.parallel == "fsdp" and PartialState().num_processes > 1
        if parted:
            check_parts(settings, self.backbone)
        for sentence in without_effect(config.external_config_dict, self.backbone):
            self.logger.warning(sentence)

        # The backbone comes after the catalogue: scratch makes its vocabulary of the titles.
        self.lm = load_backbone(
            self.backbone,
            self.device,
            lambda: self._scratch_tokenizer(dataset, lines),
            lambda purpose: derive_seed(self.seed, purpose),
            [*lines[1:], *self.units.pieces],
            # a GPU may have no room for all of it
            torch.device("cpu") if parted else self.device,
        )
        if parted:
            if OBJECTIVES[settings.objective].reference:
                self.lm.freeze_reference()  # what has parts is not copied
            self.lm.take_parts(self.device)
            part(self, self.lm.layers, PASSES, self.device, settings.offload)
        training, scoring = tokens_at_once(self.lm.causal_lm, self.lm.device)
        # A batch of training is shared out, one of scoring is of one process.
        self.settings: CompleteSettings = settings.suited_to_device(
            training * PartialState().num_processes, scoring
        )
        self.encoder = Encoder(
            self.catalogue, self.units, self.lm.tokenizer, self.lm.padding, self.lm.breadth
        )
        self.title_shares = self._title_shares(dataset)
        # A checkpoint that this run begins from adds those that it has.
        self.trained_on = {digest_of_targets(dataset)}
        # Candidates in an evaluation prompt stand in one order of all items, begun for each user at
        # another place.
        self._place = generator(self.seed, "evaluation order").permutation(self.n_items)
        self._begin = generator(self.seed, "evaluation begin").integers(
            self.n_items, size=dataset.num(self.USER_ID)
        )

    def _scratch_tokenizer(self, dataset: Dataset, lines: np.ndarray) -> PreTrainedTokenizerBase:
        """Made for what a training on ``dataset`` reads, and for all titles, ``lines [items]``."""
        # The root damps the most popular titles, so that the rarer ones get merges of their own,
        # too.
        seen = np.bincount(training_sequences(dataset).items.values, minlength=len(lines))
        weight = np.ceil(np.sqrt(seen)).astype(int)
        texts = [*np.repeat(lines, weight), *self.units.pieces * int(weight.max())]
        unmet = lines[1:][weight[1:] == 0]
        return train_tokenizer(texts, self.backbone.scratch_vocab_size, unmet)

    def to(self, *args, **kwargs) -> SDPOLLM:
        """As in ``nn.Module``, but parts of a model stay where they are."""
        return self if is_parted(self) else super().to(*args, **kwargs)

    def examples(
        self, dataset: Dataset, sampler: AbstractSampler | None, negatives: int
    ) -> Examples:
        """What a stage trains on.

        Args:
            sampler: RecBole's sampler of training negatives.
            negatives: how many to draw for a target, or 0 for a stage that needs none.
        """
        settings, trained_on = self.settings, self._trained_on(dataset)
        examples: Examples
        if settings.prompt_style == "history":
            negative_sampler = self._negatives(dataset, sampler) if negatives else None
            examples = HistoryExamples(
                trained_on,
                self.window,
                self.units,
                negative_sampler,
                negatives,
                self.own if negatives else 0,
            )
        else:
            negative_sampler = self._negatives(dataset, sampler)
            examples = CandidateExamples(
                trained_on, settings.prompt_candidates, self.units, negative_sampler, negatives
            )
        fixed = settings.fixed_negatives and negatives
        return FixedExamples(examples, self.seed) if fixed else examples

    def targets_per_epoch(self, dataset: Dataset) -> int:
        """Training targets to an epoch of SFT."""
        each = len(self._trained_on(dataset))
        return min(each, self.settings.max_train_targets or each)

    def _trained_on(self, dataset: Dataset) -> Dataset:
        return last_targets(dataset) if self.settings.train_targets == "last" else dataset

    def check_prompts(self, dataset: Dataset, candidates: int) -> None:
        """Can the backbone read the prompts of ``dataset``'s rows, with so many candidates in the
        text if they stand there?

        Raises:
            UserError: one is too long.
        """
        lengths, units = self.encoder.tokens.lengths, self.units
        past = histories(dataset.inter_feat, self.config)
        history = int(segment_sums(lengths[past.values], past.lengths).max(initial=0))
        if self.settings.prompt_style == "history":
            shown, text = 0, lengths[units.header]
        else:
            shown, text = (
                candidates,
                max(
                    lengths[[p for p in t if not isinstance(p, str)]].sum() for t in units.templates
                ),
            )
        title = int(lengths[1 : units.items].max())
        writes = any(map(is_of_answers, self.config["metrics"]))
        answer = max(title, self._answer_length) if writes else title
        self._check_length(int(history + text), shown * title + answer)

    def check_negatives(self, dataset: Dataset, sampler: AbstractSampler | None) -> None:
        """Are there enough negatives for every user, in every stage?

        Raises:
            UserError: some user has met too many items.
        """
        in_text = self.settings.prompt_style == "candidates"
        shown = (self.settings.prompt_candidates - 1) * in_text
        each = " (sample_num times candidate_num)" if self.draws > 1 else ""
        wanted = {
            f"train_neg_sample_args{each}": self.negatives * self.draws,
            "prompt_candidates, less one for the target,": shown,
        }
        if not any(wanted.values()):
            return
        user, target = users_and_targets(dataset)
        for setting, number in wanted.items():
            if number:
                self._negative_sampler(dataset, sampler, setting).check(user, target, number)
        mixed = self._negatives(dataset, sampler)
        if isinstance(mixed, MixedNegatives):
            for source in mixed.samplers.values():
                source.check(user, target, max(wanted.values()))

    def check_ratings(self, dataset: Dataset) -> None:
        """Has the objective a loss for each of ``dataset``'s ratings, if it reads them?

        Raises:
            UserError: of one it is not finite.
        """
        objective, settings = OBJECTIVES[self.settings.objective], self.settings
        if not objective.reads_ratings:
            return
        rating = dataset.inter_feat[RATING].unique()
        same = torch.ones(len(rating), 1 + max(1, self.negatives))
        alike = Logps.of(-same, -same, same)
        wrong = ~objective.losses(alike._replace(rating=rating), settings.constants).isfinite()
        if wrong.any():
            raise UserError(
                f"objective={settings.objective!r} has no loss for the rating "
                f"{float(rating[wrong].min()):g} with unrated_score={settings.unrated_score:g}; "
                "lower that, or leave such events out with val_interval."
            )

    def _negatives(self, dataset: Dataset, sampler: AbstractSampler) -> Negatives:
        """As ``negative_sources`` has them, but for the policy's own."""
        weights = {**(self.settings.negative_sources or {})}
        weights.pop(SELF, None)
        if not weights:
            return self._negative_sampler(dataset, sampler)
        samplers = {}
        for name in weights:
            other = copy.copy(sampler)
            other.set_distribution(name)
            samplers[name] = self._negative_sampler(dataset, other, f"negative_sources ({name})")
        return MixedNegatives(samplers, {name: self.sources[name] for name in weights}, weights)

    def _negative_sampler(
        self,
        dataset: Dataset,
        sampler: AbstractSampler,
        setting: str = "train_neg_sample_args",
    ) -> NegativeSampler:
        users = dataset.field2id_token[dataset.uid_field]
        return NegativeSampler(sampler, self.catalogue, met_items(dataset), setting, users)

    @torch.no_grad()
    def favourites(self, prompts: Prompts, excluded: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The items that the policy ranks highest after each prompt, one of a title, best first,
        int64 ``[T, own]``.

        Args:
            prompts: in the ``history`` style.
            excluded: what is not to be among them, as :meth:`NegativeSampler.excluded` has it for
                each prompt's user and target.

        Raises:
            UserError: for a prompt too few are left.
        """
        # Each prefix of a trunk that is a target's prompt is a prompt of its own.
        until = prompts.trunks.cut(prompts.tree, np.zeros_like(prompts.before), prompts.before)
        texts = self.encoder.tokens.take(until.values).join(until.lengths)
        row, title = excluded
        taboo = Ragged.grouped(title, row, len(until))
        # A title's first item stands for all that carry it.
        titles, first = np.unique(self.catalogue.group[1:], return_index=True)

        def best(rows: np.ndarray) -> Tensor:
            items = torch.zeros(len(rows), self.own, dtype=torch.long, device=self.lm.device)
            # Of most users few of the best are excluded; where all are, look farther.
            # Parts of a model make each pass together, so that there must be one.
            todo, reach = np.arange(len(rows)), self.n_items if is_parted(self) else 4 * self.own
            while len(todo):
                some = rows[todo]
                scores = self._best_scored(texts.take(some), reach)[:, first]
                apart = taboo.take(some)
                scores[apart.owner, np.searchsorted(titles, apart.values)] = -torch.inf
                top = scores.topk(min(self.own, len(first)))
                enough = (top.values[:, -1] != -torch.inf).cpu().numpy()
                if reach >= self.n_items and (not enough.all() or self.own > len(first)):
                    raise UserError(
                        f"negative_sources asks for {self.own} negatives of the policy's own, and "
                        "for some user fewer titles are left; ask for fewer."
                    )
                chosen = 1 + torch.from_numpy(first).to(items.device)[top.indices]
                items[torch.from_numpy(todo[enough])] = chosen[torch.from_numpy(enough)]
                todo, reach = todo[~enough], 8 * reach
            return items

        items = self._in_batches(texts.lengths + NODES_AT_ONCE, self.own, best, dtype=torch.int64)
        return items.cpu().numpy()

    def _best_scored(self, prompts: Ragged, reach: int) -> Tensor:
        """Scores of the ``reach`` best items after each prompt, and of all others ``-inf``, float32
        ``[prompts, items]`` without the padding."""
        if reach >= self.n_items - 1:
            return score_all(self.lm, prompts, self.title_tree)
        scores = score_top(self.lm, prompts, self.title_tree, reach)
        return scores.masked_fill(scores < scores.topk(reach).values[:, -1:], -torch.inf)

    def forward(
        self,
        forest: Forest,
        width: int,
        reference: bool,
        known: Tensor | None = None,
        watched: Tensor = NO_TARGETS,
    ) -> tuple[Logps, Tensor]:
        """Log-probabilities of a forest whose responses are, for each target, its title and K
        negative ones.

        Args:
            width: 1 + K.
            reference: the reference's, too; zeros stand in for them otherwise.
            known: what the reference said, ``[T, 1 + K]``, if that is known already.
            watched: int64 ``[W]``, some of the targets.

        Returns:
            them, and the KL divergence of the policy from the reference over the next token where
            the titles of the watched targets begin, in nats ``[W]``; none, ``[0]``, where the
            reference is not asked.
        """
        kl = torch.zeros(0, device=self.lm.device)
        if reference and known is None:
            policy, known, kl = self.lm.compared(forest, watched * width)
        else:
            policy = self.lm(forest)
        policy = policy.view(-1, width)
        ref = torch.zeros_like(policy) if known is None else known.view(-1, width)
        # The host does not wait for the device here: it would before each backward pass.
        length = forest.lengths().to(policy, non_blocking=True).view(-1, width)
        logps = Logps.of(policy, ref, length)
        # Copies: what is in place of a view is lost on FSDP2, which hooks on what a pass returns.
        copies = logps.policy_pos.clone(), logps.policy_neg.clone()
        return logps._replace(policy_pos=copies[0], policy_neg=copies[1]), kl

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Mean loss of RecBole's batch under the current objective, for training by any RecBole
        trainer, ``[]``.

        RecBole repeats the batch once for each negative; :class:`SDPOTrainer` does not, and serves
        whole sequences at once.
        """
        objective = OBJECTIVES[self.objective]
        number = (
            self.config["train_neg_sample_args"]["sample_num"]
            if self.NEG_ITEM_ID in interaction
            else 1
        )
        rows = len(interaction) // number
        target = interaction[self.ITEM_ID][:rows].cpu().numpy()
        user = interaction[self.USER_ID][:rows].cpu().numpy()
        offered = target[:, None]
        # RecBole has the first negative of every target, then the second of every target, …
        if self.NEG_ITEM_ID in interaction:
            offered = np.concatenate(
                [offered, interaction[self.NEG_ITEM_ID].view(number, rows).T.cpu().numpy()], axis=1
            )
        elif self.settings.prompt_style == "candidates":
            raise UserError(
                "prompt_style='candidates' needs negatives in the batch (train_neg_sample_args) "
                "for its text."
            )
        prompts = self._prompts(
            histories(interaction[:rows], self.config), Ragged.from_matrix(offered), target, user
        )
        items = offered[:, : 1 + min(number, objective.negatives)]
        logps, _ = self(self.encoder.forest(prompts, items), items.shape[1], objective.reference)
        if RATING in interaction:
            logps = logps._replace(rating=interaction[RATING][:rows].to(logps.policy_pos))
        return objective.losses(logps, self.settings.constants).mean()

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of the rows' items, float32 ``[rows]``; rows of one user and history share their
        prompt.

        In the ``candidates`` style, the items of the rows that share a prompt are its candidates.
        Two targets of a user may have the same last items: where the column :data:`TARGET_ROW`
        tells rows of different targets apart, they share none.
        """
        user, item = (
            interaction[self.USER_ID].cpu().numpy(),
            interaction[self.ITEM_ID].cpu().numpy(),
        )
        past = histories(interaction, self.config)
        apart = (
            interaction[TARGET_ROW].cpu().numpy()
            if TARGET_ROW in interaction
            else np.zeros_like(user)
        )
        key = np.concatenate([apart[:, None], user[:, None], past.padded(0)], axis=1)
        # A row's prompt, and for each prompt the first of its rows.
        _, first, prompt = np.unique(key, axis=0, return_index=True, return_inverse=True)
        prompt = prompt.reshape(-1)
        shown = Ragged.grouped(item, prompt)
        trees = self._prompts(past.take(first), shown, item[first], user[first])
        asked = Prompts(trees.trunks, prompt, trees.trunks.lengths[prompt], item, user)
        return self._score(asked, item[:, None]).view(-1)

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of the whole catalogue for each row, float32 ``[rows * items]``; padding scores
        ``-inf``.

        Raises:
            UserError: the prompt style needs candidates in its text.
        """
        if self.settings.prompt_style == "candidates":
            raise UserError(NO_FULL_RANKING)
        user, past = interaction[self.USER_ID].cpu().numpy(), histories(interaction, self.config)
        prompts = self.encoder.trunks(
            history_prompts(past, np.zeros_like(user), user, self.units.header)
        )

        # Of the best, the evaluation takes out those that the user has met, or that carry the
        # target's title.
        out = np.full(len(user), int(np.bincount(self.catalogue.group).max()) - 1)
        if LEFT_OUT in interaction:
            out += interaction[LEFT_OUT].cpu().numpy()

        def score(rows: np.ndarray) -> Tensor:
            if self.settings.full_sort == "topk":
                reach = max(self.config["topk"]) + int(out[rows].max())
                return score_top(self.lm, prompts.take(rows), self.title_tree, reach)
            return score_all(self.lm, prompts.take(rows), self.title_tree)

        # A prompt takes room for itself and for the nodes that stand below it at a time.
        titles = self._in_batches(prompts.lengths + NODES_AT_ONCE, self.n_items - 1, score)
        scores = titles.new_full((len(user), self.n_items), -torch.inf)
        scores[:, 1:] = titles
        return scores.view(-1)

    @property
    def _answer_length(self) -> int:
        """Tokens of an answer at most."""
        longest = int(self.encoder.tokens.lengths[1 : self.n_items].max())
        given = self.settings.max_new_tokens if self.settings.decoding == "free" else None
        return given or longest

    @torch.no_grad()
    def answers(self, interaction: Interaction, candidates: np.ndarray) -> list[str]:
        """What the policy writes after the prompt of each row, one line each, as ``decoding`` says.

        Args:
            candidates: item ids ``[rows, C]``, the target first; in the text of a prompt, they
                stand in another order.
        """
        user, past = interaction[self.USER_ID].cpu().numpy(), histories(interaction, self.config)
        shown = Ragged.from_matrix(candidates)
        prompts = self.encoder.trunks(self._prompts(past, shown, candidates[:, 0], user))
        titles, constrained = self.encoder.tokens, self.settings.decoding == "constrained"
        limit = self._answer_length

        def answer(rows: np.ndarray) -> Tensor:
            among = [titles.take(candidates[row]) for row in rows] if constrained else None
            answers = write(self.lm, prompts.take(rows), limit, self._line_ends, among)
            return torch.from_numpy(answers).to(self.lm.device)

        written = self._in_batches(prompts.lengths + limit, limit, answer, dtype=torch.int64)
        answers = written.cpu().numpy()
        if constrained:  # whatever the tokenizer makes of its tokens
            return [self.catalogue.titles[item] for item in self._spelled(answers, candidates)]
        texts = self.lm.tokenizer.batch_decode(
            [row[row != NOTHING] for row in answers], skip_special_tokens=True
        )
        return [(text.splitlines() or [""])[0] for text in texts]

    def _spelled(self, answers: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """The candidate of each row that its answer spells, int64 ``[rows]``.

        Args:
            answers: tokens ``[rows, limit]``, as :func:`write` gives them.
            candidates: item ids ``[rows, C]``.
        """
        titles = self.encoder.tokens.take(np.arange(self.n_items))
        spelled = titles.padded(NOTHING, answers.shape[1])[candidates] == answers[:, None]
        place = spelled.all(2)
        # without one, its place would be that of the first candidate, the target
        if not place.any(1).all():
            raise RuntimeError(
                "A constrained answer is no candidate's title: the tokenizer ends lines within "
                "titles."
            )
        return candidates[np.arange(len(candidates)), place.argmax(1)]

    def _title_shares(self, dataset: Dataset) -> Tensor | None:
        """Of what a stage adds to each token's row of :meth:`LanguageModel.title_tables`, the share
        to keep, float32 ``[tokens]``; None, all.

        For a title that n users met in the training data, each of its items counted by itself, it
        is n / (n + ``title_prior``): so much a mean of n observations counts beside what was
        believed before, here by the title's words. AdamW takes steps of one size for all, so that
        titles which are never a target, with a small but steady gradient away from every history,
        are moved the farthest of all.
        """
        prior, backbone = self.settings.title_prior, self.backbone
        if backbone.kind != "whole titles" or backbone.weights != "pretrained" or not prior:
            return None
        token = self.encoder.tokens.take(np.arange(1, self.n_items)).values
        tokens = len(self.lm.title_tables()[0])
        met = np.bincount(token, weights=popularity(dataset)[1:], minlength=tokens)
        shares = np.ones(len(met))
        shares[token] = met[token] / (met[token] + prior)
        return torch.from_numpy(shares).float().to(self.lm.device)

    @cached_property
    def _line_ends(self) -> list[int]:
        return line_ends(self.lm.tokenizer)

    @cached_property
    def title_tree(self) -> TitleTree:
        """The catalogue without its padding, for ranking all of it."""
        return TitleTree(self.encoder.tokens.take(np.arange(1, self.n_items)))

    def _prompts(
        self, past: Ragged, shown: Ragged, target: np.ndarray, user: np.ndarray
    ) -> Prompts:
        """Evaluation prompts; ``shown`` are the candidates in the text, in an order that does
        not tell the target."""
        if self.settings.prompt_style == "history":
            return history_prompts(past, target, user, self.units.header)
        row = shown.owner
        place = (self._place[shown.values] - self._begin[user][row]) % self.n_items
        order = np.lexsort((place, row))
        shuffled = Ragged(shown.values[order], shown.lengths)
        return candidate_prompts(
            past, shuffled, target, user, self.units, np.zeros(len(user), np.int64)
        )

    def _score(self, prompts: Prompts, items: np.ndarray) -> Tensor:
        """Log-probabilities of ``items [T, C]``, for each tree's targets together."""

        def score(trees: np.ndarray) -> Tensor:
            logps = self.lm(
                self.encoder.forest(prompts.select(trees), items[prompts.target_index(trees)])
            )
            return logps.view(-1, items.shape[1])

        return self._in_batches(
            self.encoder.sizes(prompts, items), items.shape[1], score, prompts.target_index
        )

    def _in_batches(
        self,
        sizes: np.ndarray,
        width: int,
        score: Callable[[np.ndarray], Tensor],
        rows_of: Callable[[np.ndarray], np.ndarray] = lambda trees: trees,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Scores, or tokens, ``[rows, width]`` of ``dtype``, in batches of bounded size, dealt out
        to all processes and gathered.

        Args:
            sizes: tokens in each tree.
            score: from the numbers of some trees to the scores of their rows.
            rows_of: from the numbers of some trees to those of their rows.

        Raises:
            UserError: one of them is not finite.
        """
        state = PartialState()
        scores = torch.zeros(
            len(rows_of(np.arange(len(sizes)))), width, device=self.lm.device, dtype=dtype
        )
        cut = batches(sizes, self.settings.eval_tokens_per_batch)
        for first in range(0, len(cut), state.num_processes):
            number = first + state.process_index
            if number < len(cut):
                rows = torch.from_numpy(rows_of(cut[number])).to(scores.device, non_blocking=True)
                scores[rows] = score(cut[number]).to(scores.dtype)
            elif is_parted(self):
                score(cut[first])  # every process makes every pass
        scores = reduce(scores, "sum") if state.num_processes > 1 else scores
        if not scores.isfinite().all():
            raise UserError(
                f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite; "
                "train with a lower learning rate."
            )
        return scores

    def _check_length(self, history: int, titles: int) -> None:
        """Can the backbone read so many tokens, as :func:`positions` has it?"""
        limit, hard = positions(self.lm.causal_lm)
        if limit is None or history + titles <= limit:
            return
        remedy = (
            "fewer candidates (eval_args.mode, prompt_candidates) or max_new_tokens"
            if titles > history
            else "a smaller MAX_ITEM_LIST_LENGTH"
        )
        message = (
            f"MAX_ITEM_LIST_LENGTH={self.window - 1} with "
            f"prompt_style={self.settings.prompt_style!r} makes prompts of up to "
            f"{history + titles} tokens, and backbone={self.backbone.name!r} was made for "
            f"{limit}; give {remedy}."
        )
        if hard:
            raise UserError(message)
        self.logger.warning(message)

    def __deepcopy__(self, memo: dict) -> SDPOLLM:
        """A copy that shares the weights: RecBole copies a model to count its operations, which
        would double its memory."""
        for tensor in chain(self.parameters(), self.buffers()):
            memo[id(tensor)] = tensor
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__ = copy.deepcopy(self.__dict__, memo)
        return clone

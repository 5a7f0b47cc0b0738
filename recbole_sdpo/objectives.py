"""Objectives as pure functions of log-probabilities of responses.

A loss takes :class:`Logps` and :class:`Constants` and gives the loss of each target, ``[B]``. The
reward of a response is ``beta * (log pi_theta - log pi_ref)``. All are computed from softplus and
logsumexp, so that they and their gradients are finite for any finite margin.

Most differ in three choices: what a reward is (against a reference, without one, by the token), how
the K negatives are taken together (their logsumexp, each by itself, their mean), and which function
of the difference is made small::

                 reward                negatives    loss of the gap
    sdpo         log pi / pi_ref       logsumexp    -log sigma
    dpo_multi    log pi / pi_ref       each         -log sigma
    dmpo         log pi / pi_ref       mean         -log sigma
    recpo        log pi / pi_ref       logsumexp    -log sigma, with a margin by the user's rating
    softmax      log pi                logsumexp    -log sigma
    cpo          log pi                each         -log sigma, and the target's own -log pi
    simpo        log pi by the token   each         -log sigma
    mppo         pi by the token       sum          -log sigma
    ipo          log pi / pi_ref       each         square
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_sdpo.errors import UserError


class Logps(NamedTuple):
    """Natural log-probabilities of the responses to B prompts: a preferred one and K negative ones.

    Attributes:
        policy_pos: ``[B]``, of the policy that is trained.
        policy_neg: ``[B, K]``.
        ref_pos: ``[B]``, of the reference, which is fixed; zeros where an objective needs none.
        ref_neg: ``[B, K]``.
        length_pos: ``[B]``, tokens of the preferred response, its terminator included.
        length_neg: ``[B, K]``.
        rating: ``[B]``, what the user gave to the preferred item, as in the data; None where no
            objective reads it.
    """

    policy_pos: Tensor
    policy_neg: Tensor
    ref_pos: Tensor
    ref_neg: Tensor
    length_pos: Tensor
    length_neg: Tensor
    rating: Tensor | None = None

    @classmethod
    def of(cls, policy: Tensor, reference: Tensor, length: Tensor) -> Logps:
        """From three ``[B, 1 + K]``, the preferred response first."""
        sides = ((part[:, 0], part[:, 1:]) for part in (policy, reference, length))
        return cls(*chain.from_iterable(sides))

    def detach(self) -> Logps:
        """The same numbers, of which no gradient is asked."""
        parts = self._asdict().items()
        return self._replace(**{name: part.detach() for name, part in parts if part is not None})

    def without_reference(self) -> Logps:
        """The same policy beside a reference to which all responses are alike, which is none."""
        zeros = torch.zeros_like(self.ref_pos), torch.zeros_like(self.ref_neg)
        return self._replace(ref_pos=zeros[0], ref_neg=zeros[1])

    def by_token(self) -> Logps:
        """Means over the tokens of each response in place of sums."""
        pos, neg, ref_pos, ref_neg, length_pos, length_neg, rating = self
        return Logps(
            *(pos / length_pos, neg / length_neg, ref_pos / length_pos, ref_neg / length_neg),
            *(torch.ones_like(length_pos), torch.ones_like(length_neg), rating),
        )


class Constants(NamedTuple):
    """What of a loss the user sets, under the names of the settings.

    Attributes:
        beta: the scale of the rewards.
        reward_margin: by how much the preferred reward is to be above the others, gamma of SimPO.
        label_smoothing: from 0 to below 0.5, how often preferred and negative are taken to be
            swapped.
        sft_weight: how many times the preferred response's -log pi is added.
        rating_margin: how many times the margin of ratings is added, lambda of RecPO.
        unrated_score: what counts as the rating of what a user has not rated.
    """

    beta: float = 1.0
    reward_margin: float = 0.0
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    rating_margin: float = 1.0
    unrated_score: float = 0.9045


Loss = Callable[[Logps, Constants], Tensor]


def sft(logps: Logps, constants: Constants) -> Tensor:
    """Supervised fine-tuning: the negative log-likelihood of the preferred response alone."""
    return -logps.policy_pos


def sdpo(logps: Logps, constants: Constants) -> Tensor:
    """S-DPO (Chen et al., NeurIPS 2024, section 3): -log sigma(-logsumexp_d(r_d - r_p))."""
    return _log_loss(torch.logsumexp(_gaps(logps, constants), dim=-1), constants)


def dpo(logps: Logps, constants: Constants) -> Tensor:
    """DPO (Rafailov et al., NeurIPS 2023, equation 7) against the first negative alone."""
    return _log_loss(_gaps(logps, constants)[:, 0], constants)


def dpo_multi(logps: Logps, constants: Constants) -> Tensor:
    """The mean of the K pairwise DPO losses."""
    return _log_loss(_gaps(logps, constants), constants).mean(-1)


def dmpo(logps: Logps, constants: Constants) -> Tensor:
    """DMPO (Bai et al., *Finetuning Large Language Model for Personalized Ranking*, 2024): the
    preferred reward against the mean of the others, -log sigma(r_p - mean_d r_d).

    The authors' code (BZX667/DMPO, trainer.py) takes one negative to a row, and the reference's
    log-probability of the preferred response for both, so that the reference cancels there. This is
    the paper's formula.
    """
    return _log_loss(_gaps(logps, constants).mean(-1), constants)


def softmax(logps: Logps, constants: Constants) -> Tensor:
    """S-DPO with a uniform reference, which is none: sampled softmax over log-probabilities.

    With beta 1 it is the cross-entropy over the target and its negatives.
    """
    return sdpo(logps.without_reference(), constants)


def simpo(logps: Logps, constants: Constants) -> Tensor:
    """SimPO (Meng et al., NeurIPS 2024, equation 6): means over tokens, no reference, and a margin;
    the mean over the negatives, of which the paper has one."""
    return dpo_multi(logps.by_token().without_reference(), constants)


def mppo(logps: Logps, constants: Constants) -> Tensor:
    """MPPO (Xie et al., COLING 2025, equations 4 and 10, Pair-MNM): a reward is the geometric mean
    of the probabilities of a response's tokens, from 0 to 1, and all negatives count together,
    -log sigma(beta (K p - sum_d p_d)). The paper has no beta, which is 1.

    So the loss lies between -log sigma(beta K) and -log sigma(-beta K), and a response that is
    improbable has next to no gradient.
    """
    pos, neg, *_ = logps.by_token()
    return F.softplus(constants.beta * (neg.exp() - pos.exp().unsqueeze(-1)).sum(-1))


def cpo(logps: Logps, constants: Constants) -> Tensor:
    """CPO (Xu et al., ICML 2024, section 3): DPO without a reference, and the preferred
    response's own -log pi; the mean over the negatives, of which the paper has one."""
    return dpo_multi(logps.without_reference(), constants) + sft(logps, constants)


def orpo(logps: Logps, constants: Constants) -> Tensor:
    """ORPO (Hong et al., EMNLP 2024, equations 6 and 7): -log pi of the preferred response, and
    beta (their lambda) times -log sigma of the log of the ratio of odds; all of means over tokens,
    and the mean over the negatives, of which the paper has one."""
    pos, neg, *_ = logps.by_token()
    gaps = _log_odds(neg) - _log_odds(pos).unsqueeze(-1)
    return -pos + constants.beta * F.softplus(gaps).mean(-1)


def ipo(logps: Logps, constants: Constants) -> Tensor:
    """IPO (Azar et al., AISTATS 2024, equation 17), with beta for tau: the square of the difference
    of log-ratios less 1 / (2 beta); the mean over the negatives, of which the paper has one.

    TRL takes means over tokens for it. The paper, and this, takes sums.
    """
    apart = -_gaps(logps, Constants(beta=1.0))
    return (apart - 1 / (2 * constants.beta)).square().mean(-1)


def kto(logps: Logps, constants: Constants) -> Tensor:
    """KTO (Ethayarajh et al., ICML 2024, section 4) with weights of 1: the preferred response is
    desirable, the negatives are not, and no two are paired.

    Each reward is judged against z_0, the KL divergence from the reference, of which the paper
    takes the mean log-ratio of other prompts' responses, and 0 at least, without a gradient. Here
    it is that of the negatives, which are other users' titles.
    """
    pos, neg, ref_pos, ref_neg, *_ = logps
    reward_pos, reward_neg = constants.beta * (pos - ref_pos), constants.beta * (neg - ref_neg)
    kl = reward_neg.detach().mean(-1).clamp(min=0)
    undesired = torch.sigmoid(reward_neg - kl.unsqueeze(-1)).mean(-1)
    return torch.sigmoid(kl - reward_pos) + undesired


def robust_dpo(logps: Logps, constants: Constants) -> Tensor:
    """Robust DPO (Chowdhury et al., ICML 2024, section 3): the loss whose mean, where a share of
    ``label_smoothing`` of the preferences is swapped, is DPO's on the true ones; the mean over the
    negatives, of which the paper has one.

    ``label_smoothing`` in the other objectives is the conservative form of the same.
    """
    swapped, gaps = constants.label_smoothing, _gaps(logps, constants)
    losses = (1 - swapped) * F.softplus(gaps) - swapped * F.softplus(-gaps)
    return losses.mean(-1) / (1 - 2 * swapped)


def dynamicpo(logps: Logps, constants: Constants) -> Tensor:
    """DynamicPO (Hu et al., 2026) on DMPO: only negatives at the boundary count, each with a beta
    of its own.

    At the boundary are those that the policy finds as likely as the preferred response, or, where
    there is none, the highest of three clusters. Their beta is beta * (1 + tanh(x) / 2) with
    x = (a - b - 6) / (|a| + |b|), a being how far the preferred log-probability is above the
    negative's, and b how far that is above the mean of those beyond the boundary. This is what the
    authors' code does (xingyuHuxingyu/DynamicPO, dynamicpo_trainer.py), but that its clusters come
    from a search that need not find the best ones, as this does.
    """
    pos, neg = logps.policy_pos.detach().unsqueeze(-1), logps.policy_neg.detach()
    likely = neg >= pos
    boundary = torch.where(likely.any(-1, keepdim=True), likely, _highest_cluster(neg))
    beyond = torch.where(boundary.all(-1, keepdim=True), boundary, ~boundary)
    mean_beyond = (neg * beyond).sum(-1, keepdim=True) / beyond.sum(-1, keepdim=True)
    above, below = pos - neg, neg - mean_beyond
    spread = (above.abs() + below.abs()).clamp(min=torch.finfo(neg.dtype).tiny)
    beta = constants.beta * (1 + torch.tanh((above - below - BOUNDARY_MARGIN) / spread) / 2)
    gaps = beta * _gaps(logps, Constants(beta=1.0))
    mean = (gaps * boundary).sum(-1) / boundary.sum(-1)
    return _log_loss(mean + constants.reward_margin, constants)


def recpo(logps: Logps, constants: Constants) -> Tensor:
    """RecPO (Ouyang et al., *What Makes LLMs Effective Sequential Recommenders?*, 2025): S-DPO with
    a margin that grows with the user's rating s_p of the preferred item,
    -log sigma(-logsumexp_d(r_d - r_p + lambda log(1 + s_p - s_d))).

    The negatives are items that the user has not rated: s_d is ``unrated_score``. The authors' code
    (HoytWen/RecPO, trainer/rec_dpo_trainer.py, data/movielens_data.py) divides the rating of what
    is met n steps later by sqrt(1 + n), prefers the highest of the next ten, and gives the others 3
    at 10 steps, which is 0.9045. Here the next item is preferred, whose n is 0.
    """
    return _with_margin(logps, constants, torch.log1p(_rating(logps) - constants.unrated_score))


def recpo_ratio(logps: Logps, constants: Constants) -> Tensor:
    """:func:`recpo` with a margin of lambda s_p / s_d, which the authors' scripts ask for
    (``--ratio``)."""
    return _with_margin(logps, constants, _rating(logps) / constants.unrated_score)


BOUNDARY_MARGIN = 6.0
"""Of :func:`dynamicpo`, in nats, as its authors have it."""


def _gaps(logps: Logps, constants: Constants) -> Tensor:
    """Rewards of the negatives, and the margin, less the reward of the positive, ``[B, K]``."""
    pos, neg, ref_pos, ref_neg, *_ = logps
    gaps = constants.beta * ((neg - ref_neg) - (pos - ref_pos).unsqueeze(-1))
    return gaps + constants.reward_margin


def _with_margin(logps: Logps, constants: Constants, margin: Tensor) -> Tensor:
    """S-DPO with a ``margin [B]`` of each target's own, lambda times."""
    gap = torch.logsumexp(_gaps(logps, constants), dim=-1)
    return _log_loss(gap + constants.rating_margin * margin, constants)


def _rating(logps: Logps) -> Tensor:
    if logps.rating is None:
        raise ValueError("The objective reads Logps.rating, and there is none.")
    return logps.rating


def _log_loss(gap: Tensor, constants: Constants) -> Tensor:
    """-log sigma(-gap), or with label smoothing the mean of that over both sides' labels."""
    swapped = constants.label_smoothing
    return (1 - swapped) * F.softplus(gap) + swapped * F.softplus(-gap)


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of ``log p``; of p = 1 that of the largest p below it."""
    below = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def _highest_cluster(values: Tensor) -> Tensor:
    """The highest of the three clusters into which each row falls with the least squared distance
    to their means, bool of ``values``' shape ``[B, K]``; of three values or fewer, the highest.

    In one dimension clusters are cuts of the sorted row, of which all are tried::

        highest | middle | lowest
        0       i        j       K
    """
    ordered, order = values.double().sort(dim=-1, descending=True)
    many = values.shape[-1]
    if many <= 3:
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order[:, :1], True)
    centred = ordered - ordered.mean(-1, keepdim=True)
    sums, squares = (F.pad(part.cumsum(-1), (1, 0)) for part in (centred, centred.square()))

    def scatter(low: Tensor, high: Tensor) -> Tensor:
        total, count = sums[:, high] - sums[:, low], high - low
        return squares[:, high] - squares[:, low] - total.square() / count

    first, second = torch.triu_indices(many - 1, many - 1, 1, device=values.device) + 1
    start, end = torch.zeros_like(first), torch.full_like(first, many)
    spread = scatter(start, first) + scatter(first, second) + scatter(second, end)
    size = first[spread.argmin(-1)]
    inside = torch.arange(many, device=values.device) < size.unsqueeze(-1)
    return torch.zeros_like(inside).scatter_(-1, order, inside)


class Diagnostics(NamedTuple):
    """What to watch while aligning, each a mean over the batch; under these names it is logged.

    Attributes:
        reward_positive: the reward of the preferred response.
        reward_negative: the mean reward of the negatives.
        margin: the reward of the preferred response less that of the best negative.
        accuracy: how often the margin is positive.
        logp_positive: the policy's log-probability of the preferred response.
        hardest_negative_weight: the largest softmax weight exp(r_d) / sum_d' exp(r_d') of the S-DPO
            gradient; 1/K if all negatives are as hard.
    """

    reward_positive: Tensor
    reward_negative: Tensor
    margin: Tensor
    accuracy: Tensor
    logp_positive: Tensor
    hardest_negative_weight: Tensor


@torch.no_grad()
def diagnostics(logps: Logps, beta: float) -> Diagnostics:
    """The diagnostics of a batch, each ``[]``; without a reference, rewards are beta * log pi."""
    pos, neg, ref_pos, ref_neg, *_ = logps
    reward_pos, reward_neg = beta * (pos - ref_pos), beta * (neg - ref_neg)
    margin = reward_pos - reward_neg.amax(-1)
    return Diagnostics(
        reward_positive=reward_pos.mean(),
        reward_negative=reward_neg.mean(-1).mean(),
        margin=margin.mean(),
        accuracy=(margin > 0).float().mean(),
        logp_positive=pos.mean(),
        hardest_negative_weight=torch.softmax(reward_neg, dim=-1).amax(-1).mean(),
    )


class Objective(NamedTuple):
    """A loss and what it needs.

    Attributes:
        title: in tables.
        loss: the function.
        negatives: how many it looks at, at most.
        reference: does it compare the policy with one?
        reads: which of :class:`Constants` it reads, but for ``sft_weight``, which goes with each;
            and ``rating``, if it reads :attr:`Logps.rating`.
    """

    title: str
    loss: Loss
    negatives: float
    reference: bool
    reads: tuple[str, ...] = ("beta",)

    @property
    def reads_ratings(self) -> bool:
        """Does it need the users' ratings?"""
        return "rating" in self.reads

    def taking(self, drawn: int) -> int:
        """How many negatives it looks at where so many are drawn."""
        return int(min(drawn, self.negatives))

    def losses(self, logps: Logps, constants: Constants) -> Tensor:
        """The loss of each target, ``[B]``, with the SFT that is asked for beside an alignment."""
        loss = self.loss(logps, constants)
        if not constants.sft_weight or not self.negatives:
            return loss
        return loss + constants.sft_weight * sft(logps, constants)


_PAIRS = ("beta", "reward_margin", "label_smoothing")
_RATED = (*_PAIRS, "rating", "rating_margin", "unrated_score")

OBJECTIVES: dict[str, Objective] = {
    "sft": Objective("SFT", sft, negatives=0, reference=False, reads=()),
    "sdpo": Objective("S-DPO", sdpo, negatives=math.inf, reference=True, reads=_PAIRS),
    "dpo": Objective("DPO", dpo, negatives=1, reference=True, reads=_PAIRS),
    "dpo_multi": Objective("DPO-multi", dpo_multi, math.inf, reference=True, reads=_PAIRS),
    "dmpo": Objective("DMPO", dmpo, math.inf, reference=True, reads=_PAIRS),
    "dynamicpo": Objective("DynamicPO", dynamicpo, math.inf, reference=True, reads=_PAIRS),
    "recpo": Objective("RecPO", recpo, math.inf, reference=True, reads=_RATED),
    "recpo_ratio": Objective("RecPO (ratio)", recpo_ratio, math.inf, reference=True, reads=_RATED),
    "robust_dpo": Objective("robust DPO", robust_dpo, math.inf, reference=True, reads=_PAIRS),
    "ipo": Objective("IPO", ipo, math.inf, reference=True),
    "kto": Objective("KTO", kto, math.inf, reference=True),
    "softmax": Objective("softmax", softmax, math.inf, reference=False, reads=_PAIRS),
    "simpo": Objective("SimPO", simpo, math.inf, reference=False, reads=_PAIRS),
    "mppo": Objective("MPPO", mppo, math.inf, reference=False),
    "cpo": Objective("CPO", cpo, math.inf, reference=False, reads=_PAIRS),
    "orpo": Objective("ORPO", orpo, math.inf, reference=False),
}
"""By the values of the setting ``objective``."""

BUILT_IN = frozenset(OBJECTIVES)
"""The names of this package's own, beside which others may be registered."""

ENTRY_POINTS = "recbole_sdpo.objectives"
"""The group of entry points under which an installed package offers objectives."""


def register_objective(name: str, objective: Objective) -> None:
    """Let the setting ``objective`` take ``name``; whoever trains with it has to call this before,
    or to offer it as an entry point of :data:`ENTRY_POINTS`.

    Raises:
        TypeError: it is no :class:`Objective`.
        ValueError: there is one of that name.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"Objective {name!r} must be an Objective, not {type(objective).__name__}.")
    if OBJECTIVES.setdefault(name, objective) is not objective:
        raise ValueError(f"There is an objective {name!r} already; choose another name.")


@cache
def register_installed() -> None:
    """Register what installed packages offer, as the first setting asks for it: a package of them
    may import this one first.

    Raises:
        UserError: one cannot be loaded.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            register_objective(point.name, point.load())
        except Exception as error:
            raise UserError(
                f"objective {point.name!r} cannot be loaded from {point.value} ({error}); mend or "
                "uninstall the package that offers it."
            ) from error


def objectives() -> dict[str, Objective]:
    """:data:`OBJECTIVES`, those of installed packages included."""
    register_installed()
    return OBJECTIVES

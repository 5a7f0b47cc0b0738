"""Objectives as pure functions of log-probabilities of responses.

A loss takes :class:`Logps` and beta and gives the loss of each target, ``[B]``. The reward of a
response is ``beta * (log pi_theta - log pi_ref)``. All are computed from softplus and logsumexp, so
that they and their gradients are finite for any finite margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Logps(NamedTuple):
    """Natural log-probabilities of the responses to B prompts: a preferred one and K negative ones.

    Attributes:
        policy_pos: ``[B]``, of the policy that is trained.
        policy_neg: ``[B, K]``.
        ref_pos: ``[B]``, of the reference, which is fixed; zeros where an objective needs none.
        ref_neg: ``[B, K]``.
    """

    policy_pos: Tensor
    policy_neg: Tensor
    ref_pos: Tensor
    ref_neg: Tensor

    def detach(self) -> Logps:
        """The same numbers, of which no gradient is asked."""
        return Logps(*(part.detach() for part in self))


Loss = Callable[[Logps, float], Tensor]


def sft(logps: Logps, beta: float) -> Tensor:
    """Supervised fine-tuning: the negative log-likelihood of the preferred response alone."""
    return -logps.policy_pos


def sdpo(logps: Logps, beta: float) -> Tensor:
    """S-DPO (Chen et al., NeurIPS 2024, section 3): -log sigma(-logsumexp_d(r_d - r_p))."""
    return F.softplus(torch.logsumexp(_gaps(logps, beta), dim=-1))


def dpo(logps: Logps, beta: float) -> Tensor:
    """DPO (Rafailov et al., NeurIPS 2023, equation 7) against the first negative alone."""
    return F.softplus(_gaps(logps, beta)[:, 0])


def dpo_multi(logps: Logps, beta: float) -> Tensor:
    """The mean of the K pairwise DPO losses."""
    return F.softplus(_gaps(logps, beta)).mean(-1)


def softmax(logps: Logps, beta: float) -> Tensor:
    """S-DPO with a uniform reference, which is none: sampled softmax over log-probabilities."""
    pos, neg, *_ = logps
    return sdpo(Logps(pos, neg, torch.zeros_like(pos), torch.zeros_like(neg)), beta)


def _gaps(logps: Logps, beta: float) -> Tensor:
    """Rewards of the negatives less the reward of the positive, ``[B, K]``."""
    pos, neg, ref_pos, ref_neg = logps
    return beta * ((neg - ref_neg) - (pos - ref_pos).unsqueeze(-1))


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
    """The diagnostics of a batch, each ``[]``."""
    pos, neg, ref_pos, ref_neg = logps
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
        negatives: how many it looks at, at most.
        reference: does it compare the policy with one?
    """

    title: str
    loss: Loss
    negatives: float
    reference: bool


OBJECTIVES: dict[str, Objective] = {
    "sft": Objective("SFT", sft, negatives=0, reference=False),
    "sdpo": Objective("S-DPO", sdpo, negatives=math.inf, reference=True),
    "dpo": Objective("DPO", dpo, negatives=1, reference=True),
    "dpo_multi": Objective("DPO-multi", dpo_multi, negatives=math.inf, reference=True),
    "softmax": Objective("softmax", softmax, negatives=math.inf, reference=False),
}
"""By the values of the setting ``objective``."""

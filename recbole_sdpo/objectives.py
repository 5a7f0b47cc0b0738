"""Objectives as pure functions of log-probabilities of responses.

All take ``(policy_pos [B], policy_neg [B, K], ref_pos [B], ref_neg [B, K], beta)``, in natural logarithms, and return the
loss of each example, ``[B]``. The reward of a response is ``beta * (log pi_theta - log pi_ref)``, and all are computed
from softplus and logsumexp, so that they and their gradients are finite for any finite margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def sft(policy_pos: Tensor, policy_neg: Tensor, ref_pos: Tensor, ref_neg: Tensor, beta: float) -> Tensor:
    """Supervised fine-tuning: the negative log-likelihood of the preferred response; the rest is not looked at."""
    return -policy_pos


def sdpo(policy_pos: Tensor, policy_neg: Tensor, ref_pos: Tensor, ref_neg: Tensor, beta: float) -> Tensor:
    """S-DPO (Chen et al., NeurIPS 2024, the loss of its section 3): -log sigma(-logsumexp_d(r_d - r_p))."""
    return F.softplus(torch.logsumexp(_gaps(policy_pos, policy_neg, ref_pos, ref_neg, beta), dim=-1))


def dpo(policy_pos: Tensor, policy_neg: Tensor, ref_pos: Tensor, ref_neg: Tensor, beta: float) -> Tensor:
    """DPO (Rafailov et al., NeurIPS 2023, equation 7) against the first negative; any further ones are not looked at."""
    return F.softplus(_gaps(policy_pos, policy_neg[:, :1], ref_pos, ref_neg[:, :1], beta)).squeeze(-1)


def dpo_multi(policy_pos: Tensor, policy_neg: Tensor, ref_pos: Tensor, ref_neg: Tensor, beta: float) -> Tensor:
    """The mean of the K pairwise DPO losses."""
    return F.softplus(_gaps(policy_pos, policy_neg, ref_pos, ref_neg, beta)).mean(-1)


def softmax(policy_pos: Tensor, policy_neg: Tensor, ref_pos: Tensor, ref_neg: Tensor, beta: float) -> Tensor:
    """S-DPO without a reference, which is S-DPO with a uniform one: sampled softmax over log-probabilities."""
    return sdpo(policy_pos, policy_neg, torch.zeros_like(policy_pos), torch.zeros_like(policy_neg), beta)


def _gaps(policy_pos: Tensor, policy_neg: Tensor, ref_pos: Tensor, ref_neg: Tensor, beta: float) -> Tensor:
    """Rewards of the negatives less the reward of the positive, ``[B, K]``."""
    return beta * ((policy_neg - ref_neg) - (policy_pos - ref_pos).unsqueeze(-1))


class Diagnostics(NamedTuple):
    """What to watch while aligning, each a mean over the batch."""

    reward_pos: Tensor
    reward_neg: Tensor
    margin: Tensor
    accuracy: Tensor
    logp_pos: Tensor
    hardest_weight: Tensor


@torch.no_grad()
def diagnostics(policy_pos: Tensor, policy_neg: Tensor, ref_pos: Tensor, ref_neg: Tensor, beta: float) -> Diagnostics:
    """Rewards, the margin to the best negative, how often it is positive, and the hardest negative's share of the gradient.

    The share is the largest softmax weight exp(r_d) / sum_d' exp(r_d') of the S-DPO gradient; 1/K if all are as hard.
    """
    reward_pos, reward_neg = beta * (policy_pos - ref_pos), beta * (policy_neg - ref_neg)
    margin = reward_pos - reward_neg.amax(-1)
    weight = torch.softmax(reward_neg, dim=-1).amax(-1)
    values = (reward_pos, reward_neg.mean(-1), margin, (margin > 0).float(), policy_pos, weight)
    return Diagnostics(*(value.mean() for value in values))


class Kind(NamedTuple):
    """An objective and what it needs; ``negatives`` is how many it looks at, at most."""

    title: str
    loss: Objective
    negatives: float
    reference: bool


OBJECTIVES: dict[str, Kind] = {
    "sft": Kind("SFT", sft, negatives=0, reference=False),
    "sdpo": Kind("S-DPO", sdpo, negatives=math.inf, reference=True),
    "dpo": Kind("DPO", dpo, negatives=1, reference=True),
    "dpo_multi": Kind("DPO-multi", dpo_multi, negatives=math.inf, reference=True),
    "softmax": Kind("softmax", softmax, negatives=math.inf, reference=False),
}

"""Objectives against closed forms, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_sdpo.objectives import OBJECTIVES, Logps, diagnostics, dpo, dpo_multi, sdpo, softmax

B, K, BETA = 5, 4, 0.7


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(3)
    shapes = ((B,), (B, K), (B,), (B, K))
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Logps(*(part * 3 - 5 for part in parts))


def test_sdpo_is_the_formula_of_the_paper(logps):
    pos, neg, ref_pos, ref_neg = (t.tolist() for t in logps)
    for row, loss in enumerate(sdpo(logps, BETA).tolist()):
        gaps = [
            BETA * (n - rn) - BETA * (pos[row] - ref_pos[row])
            for n, rn in zip(neg[row], ref_neg[row], strict=True)
        ]
        inner = -math.log(sum(map(math.exp, gaps)))
        assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-inner))), rel=1e-12)


def test_with_one_negative_sdpo_dpo_and_dpo_multi_are_one(logps):
    pos, neg, ref_pos, ref_neg = logps
    one = Logps(pos, neg[:, :1], ref_pos, ref_neg[:, :1])
    expected = -torch.nn.functional.logsigmoid(
        BETA * ((pos - ref_pos) - (neg[:, 0] - ref_neg[:, 0]))
    )
    for objective in (sdpo, dpo, dpo_multi):
        torch.testing.assert_close(objective(one, BETA), expected, rtol=1e-12, atol=0)


def test_gradient_is_the_closed_form(logps):
    pos, neg, ref_pos, ref_neg = logps
    pos.requires_grad_(), neg.requires_grad_()
    sdpo(logps, BETA).sum().backward()
    gap = BETA * ((neg - ref_neg) - (pos - ref_pos)[:, None]).detach()
    outer = BETA * torch.sigmoid(torch.log(gap.exp().sum(1)))
    # With g(a, b) = r(a) - r(b): -beta sigma(log sum exp g)
    # [d log pi(e_p) - sum_d d log pi(e_d) / sum_d' exp g(e_d', e_d)]
    reward = BETA * (neg - ref_neg).detach()
    share = 1 / torch.exp(reward[:, None, :] - reward[:, :, None]).sum(2)
    torch.testing.assert_close(pos.grad, -outer, rtol=1e-12, atol=0)
    torch.testing.assert_close(neg.grad, outer[:, None] * share, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("negatives", [1, 2])
def test_the_best_policy_is_the_reference_times_a_power_of_the_odds(beta, negatives):
    """At its optimum against a sampler q, log pi is log pi_ref + log(p / q) / beta + a constant.

    That is why negatives of popularity^(1 + beta) make it rank by p / popularity, if the reference
    is p. (Ours are distinct and never the target, which changes q by a few percent.)
    """
    log_p, log_popularity = (
        torch.tensor(weights, dtype=torch.float64).log_softmax(0)
        for weights in ([2, 0.5, 1, -1, 0], [1, 2, 0, 0.5, -1])
    )
    log_q = ((1 + beta) * log_popularity).log_softmax(0)
    drawn = torch.cartesian_prod(*[torch.arange(5)] * (1 + negatives))
    chance = log_p[drawn[:, 0]].exp() * log_q[drawn[:, 1:]].sum(-1).exp()
    policy = log_p.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [policy],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def expected_loss():
        optimizer.zero_grad()
        seen = (side[drawn[:, part]] for side in (policy, log_p) for part in (0, slice(1, None)))
        loss = (chance * sdpo(Logps(*seen), beta)).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    best = policy.detach().log_softmax(0)
    torch.testing.assert_close(
        best, (log_p + (log_p - log_q) / beta).log_softmax(0), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        best, ((1 + 1 / beta) * (log_p - log_popularity)).log_softmax(0), rtol=0, atol=1e-5
    )


def test_softmax_is_sdpo_with_a_uniform_reference(logps):
    pos, neg, *_ = logps
    uniform = math.log(1 / 1682)
    reference = torch.full_like(pos, uniform), torch.full_like(neg, uniform)
    expected = sdpo(Logps(pos, neg, *reference), BETA)
    torch.testing.assert_close(softmax(logps, BETA), expected, rtol=1e-12, atol=1e-14)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(OBJECTIVES)),
    st.floats(-1e4, 1e4),
    st.floats(-1e4, 1e4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_finite_at_any_margin(name, positive, negative, dtype):
    pos = torch.tensor([positive], dtype=dtype, requires_grad=True)
    neg = torch.tensor([[negative, -negative]], dtype=dtype, requires_grad=True)
    reference = torch.zeros(1, dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    loss = OBJECTIVES[name].loss(Logps(pos, neg, *reference), 1.0)
    loss.sum().backward()
    assert (
        loss.isfinite().all()
        and pos.grad.isfinite().all()
        and (neg.grad is None or neg.grad.isfinite().all())
    )


def test_equal_policy_and_reference_cost_log_of_one_plus_k(logps):
    pos, neg, *_ = logps
    losses = sdpo(Logps(pos, neg, pos, neg), BETA)
    torch.testing.assert_close(losses, torch.full_like(pos, math.log(1 + K)))


def test_diagnostics(logps):
    pos, neg, ref_pos, ref_neg = logps
    seen = diagnostics(logps, BETA)
    reward_pos, reward_neg = BETA * (pos - ref_pos), BETA * (neg - ref_neg)
    margins = [float(p - max(n)) for p, n in zip(reward_pos, reward_neg, strict=True)]
    assert float(seen.reward_positive) == pytest.approx(float(reward_pos.mean()))
    assert float(seen.reward_negative) == pytest.approx(float(reward_neg.mean()))
    assert float(seen.margin) == pytest.approx(sum(margins) / B)
    assert float(seen.accuracy) == pytest.approx(sum(m > 0 for m in margins) / B)
    weights = [
        max(math.exp(x) for x in row) / sum(math.exp(x) for x in row) for row in reward_neg.tolist()
    ]
    assert float(seen.hardest_negative_weight) == pytest.approx(sum(weights) / B)
    assert float(seen.logp_positive) == pytest.approx(float(pos.mean()))

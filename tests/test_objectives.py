"""Objectives against closed forms, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_sdpo.errors import UserError
from recbole_sdpo.objectives import (
    BOUNDARY_MARGIN,
    OBJECTIVES,
    Constants,
    Logps,
    Objective,
    _highest_cluster,
    diagnostics,
    dpo,
    register_installed,
    register_objective,
    sdpo,
    softmax,
)

B, K, BETA = 5, 4, 0.7
PLAIN = Constants(beta=BETA)


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(3)
    shapes = ((B,), (B, K), (B,), (B, K))
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    lengths = [torch.randint(1, 9, shape, generator=generator).double() for shape in shapes[:2]]
    rating = torch.randint(1, 6, (B,), generator=generator).double()
    return Logps(*(part.abs() * -3 - 0.1 for part in parts), *lengths, rating)


def one_by_one(pos, neg, ref_pos, ref_neg):
    """Logps of titles of one token."""
    ones = torch.ones_like(pos), torch.ones_like(neg)
    return Logps(pos, neg, ref_pos, ref_neg, *ones, torch.full_like(pos, 4.0))


def first_negative(logps):
    return Logps(*(part[:, :1] if part.ndim > 1 else part for part in logps))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x


def by_hand(name, beta, margin, swapped, rating_margin, unrated):
    """The loss of one target, of numbers and lists, as its paper writes it."""

    def pair(reward_pos, reward_neg, margin=margin):
        apart = reward_pos - reward_neg - margin
        return -(1 - swapped) * log_sigmoid(apart) - swapped * log_sigmoid(-apart)

    def mean(values):
        return sum(values) / len(values)

    def loss(p, ns, rp, rns, lp, lns, rating):
        ratio_pos = p - rp
        ratios = [n - r for n, r in zip(ns, rns, strict=True)]
        if name == "sft":
            return -p
        if name == "dpo":
            return pair(beta * ratio_pos, beta * ratios[0])
        if name == "dpo_multi":
            return mean([pair(beta * ratio_pos, beta * ratio) for ratio in ratios])
        if name == "dmpo":
            return pair(beta * ratio_pos, mean([beta * ratio for ratio in ratios]))
        if name in ("sdpo", "softmax"):
            if name == "softmax":
                ratio_pos, ratios = p, ns
            worst = math.log(sum(math.exp(beta * ratio) for ratio in ratios))
            return pair(beta * ratio_pos, worst)
        if name in ("recpo", "recpo_ratio"):  # as the authors' code has it
            better = math.log(1 + rating - unrated) if name == "recpo" else rating / unrated
            logits = [r - ratio_pos + rating_margin * better / beta for r in ratios]
            logit = -math.log(sum(math.exp(beta * each + margin) for each in logits))
            return pair(logit, 0.0, margin=0.0)
        if name == "simpo":
            return mean([pair(beta / lp * p, beta / ln * n) for n, ln in zip(ns, lns, strict=True)])
        if name == "mppo":
            mean_pos, *means = (
                math.exp(logp) ** (1 / length)
                for logp, length in zip([p, *ns], [lp, *lns], strict=True)
            )
            return -log_sigmoid(beta * (len(means) * mean_pos - sum(means)))
        if name == "cpo":
            return mean([pair(beta * p, beta * n) for n in ns]) - p
        if name == "orpo":

            def odds(logp, length):
                chance = math.exp(logp / length)
                return chance / (1 - chance)

            ratio_of_odds = [odds(p, lp) / odds(n, ln) for n, ln in zip(ns, lns, strict=True)]
            return -p / lp - beta * mean([log_sigmoid(math.log(ratio)) for ratio in ratio_of_odds])
        if name == "ipo":
            return mean([(ratio_pos - ratio - 1 / (2 * beta)) ** 2 for ratio in ratios])
        if name == "kto":
            kl = max(0.0, mean(ratios))
            desired = 1 - math.exp(log_sigmoid(beta * (ratio_pos - kl)))
            undesired = [1 - math.exp(log_sigmoid(beta * (kl - ratio))) for ratio in ratios]
            return desired + mean(undesired)
        if name == "robust_dpo":
            apart = [beta * (ratio_pos - ratio) - margin for ratio in ratios]
            each = [-(1 - swapped) * log_sigmoid(x) + swapped * log_sigmoid(-x) for x in apart]
            return mean(each) / (1 - 2 * swapped)
        if name == "dynamicpo":
            boundary = [d for d, n in enumerate(ns) if n >= p] or highest_of_three(ns)
            beyond = [d for d in range(len(ns)) if d not in boundary] or boundary
            gap = 0.0
            for d in boundary:
                above, below = p - ns[d], ns[d] - mean([ns[other] for other in beyond])
                x = (above - below - BOUNDARY_MARGIN) / (abs(above) + abs(below))
                gap += beta * (1 + math.tanh(x) / 2) * (ratio_pos - ratios[d]) / len(boundary)
            return pair(gap, 0.0)
        raise AssertionError(f"no formula of {name}")

    return loss


def highest_of_three(values):
    """Every way to put the values into three clusters is tried."""
    many = len(values)
    if many <= 3:
        return [int(np.argmax(values))]
    best, chosen = math.inf, []
    for labels in itertools.product(range(3), repeat=many):
        groups = [[values[i] for i in range(many) if labels[i] == k] for k in range(3)]
        if not all(groups):
            continue
        spread = sum(len(group) * np.var(group) for group in groups)
        if spread < best - 1e-12:
            top = max(range(3), key=lambda k: np.mean(groups[k]))
            best, chosen = spread, [i for i in range(many) if labels[i] == top]
    return chosen


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-40, 0), min_size=1, max_size=7, unique=True))
def test_the_highest_cluster_is_that_of_the_best_of_all_ways(values):
    def scatter(labels):
        groups = [[value for value, one in zip(values, labels) if one == k] for k in range(3)]
        return sum(len(group) * np.var(group) for group in groups)

    chosen = _highest_cluster(torch.tensor([values]).double())[0].nonzero()[:, 0].tolist()
    assert values.index(max(values)) in chosen
    if len(values) <= 3:
        assert len(chosen) == 1
        return
    ways = [w for w in itertools.product(range(3), repeat=len(values)) if len({*w}) == 3]
    mine = [w for w in ways if [place for place, one in enumerate(w) if one == 0] == chosen]
    # two ways may be as good
    assert min(map(scatter, mine)) == pytest.approx(min(map(scatter, ways)), abs=1e-9)


def test_a_negative_as_likely_as_the_positive_is_at_the_boundary(logps):
    for several in (3, K):
        even = logps._replace(
            policy_neg=logps.policy_neg[:, :several].clone(),
            ref_neg=logps.ref_neg[:, :several],
            length_neg=logps.length_neg[:, :several],
        )
        even.policy_neg[:, 0] = logps.policy_pos
        rows = zip(*(part.tolist() for part in even), strict=True)
        expected = [by_hand("dynamicpo", BETA, 0.0, 0.0, 0.6, 1.3)(*row) for row in rows]
        losses = OBJECTIVES["dynamicpo"].loss(even, PLAIN)
        assert losses.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("margin, swapped", [(0.0, 0.0), (0.4, 0.1)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_is_the_formula_of_its_paper(name, margin, swapped, logps):
    constants = Constants(BETA, margin, swapped, rating_margin=0.6, unrated_score=1.3)
    expected = by_hand(name, BETA, margin, swapped, 0.6, 1.3)
    rows = zip(*(part.tolist() for part in logps), strict=True)
    losses = OBJECTIVES[name].loss(logps, constants)
    assert losses.tolist() == pytest.approx([expected(*row) for row in rows], rel=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_an_objective_says_of_itself_is_so(name, logps):
    """What it is said not to need changes nothing; what it reads does."""
    objective = OBJECTIVES[name]
    losses = objective.loss(logps, PLAIN)
    strange = torch.full_like(logps.ref_pos, 9.0), torch.full_like(logps.ref_neg, -9.0)
    other = objective.loss(logps._replace(ref_pos=strange[0], ref_neg=strange[1]), PLAIN)
    assert torch.equal(losses, other) is not objective.reference
    assert torch.equal(losses, objective.loss(logps._replace(rating=logps.rating + 1), PLAIN)) is (
        not objective.reads_ratings
    )
    changed = {"beta": 1.9, "reward_margin": 0.5, "label_smoothing": 0.2}
    changed |= {"rating_margin": 0.5, "unrated_score": 0.5}
    for key, value in changed.items():
        other = objective.loss(logps, PLAIN._replace(**{key: value}))
        assert torch.equal(losses, other) is (key not in objective.reads), key
    seen = 0 if objective.negatives == 0 else min(objective.negatives, K)
    for column in range(K):
        neg = logps.policy_neg.clone()
        neg[:, column] -= 0.3
        same = torch.equal(losses, objective.loss(logps._replace(policy_neg=neg), PLAIN))
        assert same is (column >= seen)


@pytest.mark.parametrize("name", ["sdpo", "dpo_multi", "dmpo"])
def test_with_one_negative_it_is_dpo(name, logps):
    one, constants = first_negative(logps), Constants(BETA, 0.3, 0.1)
    losses = OBJECTIVES[name].loss(one, constants)
    torch.testing.assert_close(losses, dpo(logps, constants), rtol=1e-12, atol=0)


def test_what_becomes_another_objective_at_its_limits(logps):
    one, plain = first_negative(logps), Constants(BETA)
    expected = -torch.nn.functional.logsigmoid(
        BETA * (logps.policy_pos - logps.policy_neg[:, 0])
        - BETA * (logps.ref_pos - logps.ref_neg[:, 0])
    )
    torch.testing.assert_close(dpo(logps, plain), expected, rtol=1e-12, atol=0)
    loss = {name: objective.loss for name, objective in OBJECTIVES.items()}
    short = one._replace(length_pos=one.length_pos * 0 + 1, length_neg=one.length_neg * 0 + 1)
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss["simpo"](short, plain), softmax(one, plain), **close)
    torch.testing.assert_close(loss["cpo"](one, plain), softmax(one, plain) - one.policy_pos)
    torch.testing.assert_close(loss["robust_dpo"](logps, plain), loss["dpo_multi"](logps, plain))
    # of two responses whose probabilities are nearly alike, p - p' is nearly p (log p - log p')
    near = short._replace(policy_neg=short.policy_pos[:, None] - 1e-6)
    weight = BETA * short.policy_pos.exp() * 1e-6
    torch.testing.assert_close(
        loss["mppo"](near, plain) - math.log(2), -weight / 2, rtol=1e-4, atol=0
    )
    # the mean of robust DPO over swapped and other preferences is DPO's loss on the true ones
    ones, nexts = one[:6:2], one[1:6:2]
    pairs = [(neg[:, 0], pos[:, None]) for pos, neg in zip(ones, nexts, strict=True)]
    swap = Logps(*itertools.chain(*pairs), one.rating)
    noisy = Constants(BETA, 0.0, 0.2)
    mean = 0.8 * loss["robust_dpo"](one, noisy) + 0.2 * loss["robust_dpo"](swap, noisy)
    torch.testing.assert_close(mean, dpo(one, plain), **close)


def test_recpo_is_sdpo_where_ratings_make_no_margin(logps):
    close, expected = dict(rtol=1e-12, atol=0), sdpo(logps, PLAIN)
    off = PLAIN._replace(rating_margin=0.0)
    for name in ("recpo", "recpo_ratio"):
        torch.testing.assert_close(OBJECTIVES[name].loss(logps, off), expected, **close)
    equal = PLAIN._replace(unrated_score=3.0, rating_margin=0.7)
    alike = logps._replace(rating=torch.full_like(logps.rating, 3.0))
    torch.testing.assert_close(OBJECTIVES["recpo"].loss(alike, equal), expected, **close)
    of_one = sdpo(logps, PLAIN._replace(reward_margin=0.7))  # the ratio of equal ratings is 1
    torch.testing.assert_close(OBJECTIVES["recpo_ratio"].loss(alike, equal), of_one, **close)
    with pytest.raises(ValueError, match=r"reads Logps.rating, and there is none"):
        OBJECTIVES["recpo"].loss(logps._replace(rating=None), PLAIN)


def test_gradient_is_the_closed_form(logps):
    pos, neg, ref_pos, ref_neg, *_ = logps
    pos.requires_grad_(), neg.requires_grad_()
    sdpo(logps, PLAIN).sum().backward()
    gap = BETA * ((neg - ref_neg) - (pos - ref_pos)[:, None]).detach()
    outer = BETA * torch.sigmoid(torch.log(gap.exp().sum(1)))
    # With g(a, b) = r(a) - r(b): -beta sigma(log sum exp g)
    # [d log pi(e_p) - sum_d d log pi(e_d) / sum_d' exp g(e_d', e_d)]
    reward = BETA * (neg - ref_neg).detach()
    share = 1 / torch.exp(reward[:, None, :] - reward[:, :, None]).sum(2)
    torch.testing.assert_close(pos.grad, -outer, rtol=1e-12, atol=0)
    torch.testing.assert_close(neg.grad, outer[:, None] * share, rtol=1e-12, atol=0)


# What these hold still is a number to their gradient: KTO's z_0, DynamicPO's boundary and betas.
@pytest.mark.parametrize("name", sorted({*OBJECTIVES} - {"kto", "dynamicpo"}))
def test_each_gradient_is_the_slope(name, logps):
    objective, constants = OBJECTIVES[name], Constants(BETA, 0.4, 0.1)
    pos, neg = (part.clone().requires_grad_() for part in logps[:2])

    def loss(pos, neg):
        return objective.loss(logps._replace(policy_pos=pos, policy_neg=neg), constants).sum()

    assert torch.autograd.gradcheck(loss, (pos, neg))


def test_what_kto_and_dynamicpo_judge_by_has_no_gradient(logps):
    for name, slopes in {"kto": _kto_slopes, "dynamicpo": _dynamicpo_slopes}.items():
        pos, neg = (part.clone().requires_grad_() for part in logps[:2])
        moved = logps._replace(policy_pos=pos, policy_neg=neg)
        OBJECTIVES[name].loss(moved, PLAIN).sum().backward()
        by_pos, by_neg = slopes(logps)
        torch.testing.assert_close(pos.grad, by_pos, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(neg.grad, by_neg, rtol=1e-9, atol=1e-12)


def _kto_slopes(logps):
    ratio_pos, ratios = logps.policy_pos - logps.ref_pos, logps.policy_neg - logps.ref_neg
    kl = ratios.mean(1).clamp(min=0)
    up = torch.sigmoid(BETA * (ratio_pos - kl))
    down = torch.sigmoid(BETA * (kl[:, None] - ratios))
    return -BETA * up * (1 - up), BETA * down * (1 - down) / K


def _dynamicpo_slopes(logps):
    """By the slope of each target's loss where its boundary and betas are kept as numbers."""
    by_pos, by_neg = torch.zeros(B).double(), torch.zeros(B, K).double()
    for row, (p, ns, rp, rns, *_) in enumerate(
        zip(*(part.tolist() for part in logps), strict=True)
    ):
        boundary = [d for d in range(K) if ns[d] >= p] or highest_of_three(ns)
        beyond = [d for d in range(K) if d not in boundary] or boundary
        rest = np.mean([ns[d] for d in beyond])
        betas = {}
        for d in boundary:
            above, below = p - ns[d], ns[d] - rest
            x = (above - below - BOUNDARY_MARGIN) / (abs(above) + abs(below))
            betas[d] = BETA * (1 + math.tanh(x) / 2) / len(boundary)
        gap = sum(beta * ((ns[d] - rns[d]) - (p - rp)) for d, beta in betas.items())
        slope = 1 / (1 + math.exp(-gap))
        by_pos[row] = -slope * sum(betas.values())
        for d, beta in betas.items():
            by_neg[row, d] = slope * beta
    return by_pos, by_neg


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
        loss = (chance * sdpo(one_by_one(*seen), Constants(beta))).sum()
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


def test_softmax_is_sdpo_with_a_uniform_reference_and_cross_entropy_with_beta_one(logps):
    pos, neg, *_ = logps
    uniform = math.log(1 / 1682)
    reference = torch.full_like(pos, uniform), torch.full_like(neg, uniform)
    expected = sdpo(one_by_one(pos, neg, *reference), PLAIN)
    torch.testing.assert_close(softmax(logps, PLAIN), expected, rtol=1e-12, atol=1e-14)
    among = torch.cat([pos[:, None], neg], dim=1)
    entropy = torch.nn.functional.cross_entropy(among, torch.zeros(B).long(), reduction="none")
    torch.testing.assert_close(softmax(logps, Constants()), entropy, rtol=1e-12, atol=1e-14)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(OBJECTIVES)),
    st.floats(-1e4, 0),
    st.lists(st.floats(-1e4, 0), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_finite_at_any_margin(name, positive, negatives, dtype):
    pos = torch.tensor([positive], dtype=dtype, requires_grad=True)
    neg = torch.tensor([negatives], dtype=dtype, requires_grad=True)
    reference = torch.full_like(pos, -5e3), torch.zeros_like(neg)
    logps = one_by_one(pos, neg, *(part.detach() for part in reference))
    loss = OBJECTIVES[name].losses(logps, Constants(1.0, 0.5, 0.1, 0.3))
    loss.sum().backward()
    assert (
        loss.isfinite().all()
        and pos.grad.isfinite().all()
        and (neg.grad is None or neg.grad.isfinite().all())
    )


def test_equal_policy_and_reference_cost_log_of_one_plus_k(logps):
    pos, neg, *_ = logps
    losses = sdpo(one_by_one(pos, neg, pos, neg), PLAIN)
    torch.testing.assert_close(losses, torch.full_like(pos, math.log(1 + K)))


def test_sft_goes_beside_an_alignment_and_not_beside_itself(logps):
    constants = Constants(BETA, sft_weight=0.3)
    expected = sdpo(logps, PLAIN) - 0.3 * logps.policy_pos
    torch.testing.assert_close(OBJECTIVES["sdpo"].losses(logps, constants), expected)
    torch.testing.assert_close(OBJECTIVES["sft"].losses(logps, constants), -logps.policy_pos)


def test_an_objective_from_outside_is_registered_once(monkeypatch):
    monkeypatch.setattr("recbole_sdpo.objectives.OBJECTIVES", dict(OBJECTIVES))
    hinge = Objective("hinge", lambda logps, constants: logps.policy_pos, 1, True)
    register_objective("hinge", hinge)
    register_objective("hinge", hinge)  # as a package that is imported twice does
    with pytest.raises(ValueError, match="'hinge' already"):
        register_objective("hinge", hinge._replace(title="other"))
    with pytest.raises(ValueError, match="'sdpo' already"):
        register_objective("sdpo", hinge)
    with pytest.raises(TypeError, match="'mine' must be an Objective, not function"):
        register_objective("mine", dpo)


def test_installed_packages_offer_objectives(monkeypatch):
    from recbole_sdpo import objectives

    offered = Objective("mine", dpo, 1, True)
    point = type("Point", (), {"name": "mine", "load": lambda self: offered})()
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(OBJECTIVES))
    groups = {"recbole_sdpo.objectives": [point]}
    monkeypatch.setattr(objectives, "entry_points", lambda group: groups[group])
    register_installed.cache_clear()
    assert objectives.objectives()["mine"] is offered
    point.name, point.value = "broken", "their_package:BROKEN"
    monkeypatch.setattr(type(point), "load", lambda self: None)
    register_installed.cache_clear()
    with pytest.raises(UserError, match="'broken' cannot be loaded from their_package:BROKEN"):
        objectives.objectives()
    groups["recbole_sdpo.objectives"] = []
    register_installed()


def test_diagnostics(logps):
    pos, neg, ref_pos, ref_neg, *_ = logps
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

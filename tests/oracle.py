"""Losses and scores as float64 Python loops, written from the papers, with hand-written gradients. They share nothing with the code.

A response is a list of positions (logits, reference_logits, label): two lists of V numbers, and the token that is predicted, or None if
the position predicts no response token. A loss returns its value, in nats, and per response (dL/d log pi(y), dL/dSeqKL). Papers are given
by their arXiv number.
"""

import math


def log_softmax(logits):
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - log_sum for x in logits]


def score(response):
    """Return (log pi(y), log pi_ref(y), SeqKL, |y|), nats. SeqKL (2404.11999): sum over positions of KL(pi_ref || pi), all entries."""
    logps = reference_logps = kl = 0.0
    count = 0
    for logits, reference_logits, label in response:
        if label is None:
            continue
        p, q = log_softmax(logits), log_softmax(reference_logits)
        logps += p[label]
        reference_logps += q[label]
        kl += sum(math.exp(b) * (b - a) for a, b in zip(p, q))
        count += 1
    return logps, reference_logps, kl, count


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x):
    """-log sigmoid(-x)."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def sft(chosen, _, average_log_prob=False):
    """Negative log-likelihood of chosen; rejected is ignored."""
    logps, _, _, count = score(chosen)
    scale = 1 / count if average_log_prob else 1.0
    return -logps * scale, (-scale, 0.0), (0.0, 0.0)


def dpo(chosen, rejected, beta, label_smoothing=0.0, reference_free=False):
    """2305.18290 eq. 7 and, with label_smoothing, cDPO eq. 3."""
    (w, w_ref, _, _), (r, r_ref, _, _) = score(chosen), score(rejected)
    d = w - r - (0 if reference_free else w_ref - r_ref)
    loss = (1 - label_smoothing) * softplus(-beta * d) + label_smoothing * softplus(beta * d)
    slope = beta * (label_smoothing * sigmoid(beta * d) - (1 - label_smoothing) * sigmoid(-beta * d))
    return loss, (slope, 0.0), (-slope, 0.0)


def ipo(chosen, rejected, beta, average_log_prob=False):
    """2310.12036 eq. 17."""
    (w, w_ref, _, n_w), (r, r_ref, _, n_r) = score(chosen), score(rejected)
    if not average_log_prob:
        n_w = n_r = 1
    d = (w - w_ref) / n_w - (r - r_ref) / n_r
    slope = 2 * (d - 1 / (2 * beta))
    return (d - 1 / (2 * beta)) ** 2, (slope / n_w, 0.0), (-slope / n_r, 0.0)


def tdpo1(chosen, rejected, beta):
    """2404.11999: -log sigmoid(beta [D - (K(l) - K(w))]); both K have gradient."""
    (w, w_ref, w_kl, _), (r, r_ref, r_kl, _) = score(chosen), score(rejected)
    z = beta * ((w - w_ref) - (r - r_ref) - (r_kl - w_kl))
    slope = -beta * sigmoid(-z)
    return softplus(-z), (slope, slope), (-slope, -slope)


def tdpo2(chosen, rejected, beta, alpha=0.5):
    """2404.11999: -log sigmoid(beta [D - alpha (K(l) - sg K(w))]); K(w) has no gradient."""
    (w, w_ref, w_kl, _), (r, r_ref, r_kl, _) = score(chosen), score(rejected)
    z = beta * ((w - w_ref) - (r - r_ref) - alpha * (r_kl - w_kl))
    slope = -beta * sigmoid(-z)
    return softplus(-z), (slope, 0.0), (-slope, -slope * alpha)


def rdpo(chosen, rejected, beta, label_smoothing=0.1):
    """2403.00409: [-(1-e) log s(beta D) + e log s(-beta D)] / (1-2e)."""
    (w, w_ref, _, _), (r, r_ref, _, _) = score(chosen), score(rejected)
    d, e = (w - w_ref) - (r - r_ref), label_smoothing
    loss = ((1 - e) * softplus(-beta * d) - e * softplus(beta * d)) / (1 - 2 * e)
    slope = beta * (-(1 - e) * sigmoid(-beta * d) - e * sigmoid(beta * d)) / (1 - 2 * e)
    return loss, (slope, 0.0), (-slope, 0.0)


def dpop(chosen, rejected, beta, dpop_lambda=50.0):
    """2402.13228 eq. 3: the penalty is inside beta's bracket."""
    (w, w_ref, _, _), (r, r_ref, _, _) = score(chosen), score(rejected)
    z = beta * ((w - w_ref) - (r - r_ref) - dpop_lambda * max(0.0, w_ref - w))
    slope = -beta * sigmoid(-z)
    return softplus(-z), (slope * (1 + (dpop_lambda if w < w_ref else 0)), 0.0), (-slope, 0.0)


def simpo(chosen, rejected, beta=2.0, gamma=0.5):
    """2405.14734 eq. 6."""
    (w, _, _, n_w), (r, _, _, n_r) = score(chosen), score(rejected)
    z = beta * w / n_w - beta * r / n_r - gamma
    slope = -beta * sigmoid(-z)
    return softplus(-z), (slope / n_w, 0.0), (-slope / n_r, 0.0)


def odpo(chosen, rejected, beta, annotations, alpha=1.0, kl_weight=0.0):
    """2402.10571: -log s(beta D - alpha log(s_w - s_l)), plus kl_weight times the mean of both SeqKL."""
    (w, w_ref, w_kl, _), (r, r_ref, r_kl, _) = score(chosen), score(rejected)
    z = beta * ((w - w_ref) - (r - r_ref)) - alpha * math.log(annotations[0] - annotations[1])
    slope = -beta * sigmoid(-z)
    return softplus(-z) + kl_weight * (w_kl + r_kl) / 2, (slope, kl_weight / 2), (-slope, kl_weight / 2)


def slic(chosen, rejected, target, delta=1.0, sft_weight=0.1):
    """2305.10425: max(0, delta - log pi(w) + log pi(l)) - lambda log pi(y_ref)."""
    (w, _, _, _), (r, _, _, _), (t, _, _, _) = score(chosen), score(rejected), score(target)
    hinge = delta - w + r
    slope = -1.0 if hinge > 0 else 0.0
    return max(0.0, hinge) - sft_weight * t, (slope, 0.0), (-slope, 0.0), (-sft_weight, 0.0)


def kto(completion, beta, label, z0, desirable_weight=1.0, undesirable_weight=1.0):
    """2402.01306 eq. 7; z0 is a number."""
    y, y_ref, _, _ = score(completion)
    sign, weight = (1, desirable_weight) if label else (-1, undesirable_weight)
    s = sigmoid(sign * beta * ((y - y_ref) - z0))
    return weight * (1 - s), (-weight * s * (1 - s) * sign * beta, 0.0)


sdpo_stepwise = sdpo_segment = dpo


def f_dpo(chosen, rejected, beta, divergence="forward_kl", alpha=0.5):
    """2309.16240: -log s(beta f'(u_w) - beta f'(u_l)), u = pi / pi_ref of the whole response; f' of the paper's table 1, in terms of u."""
    derivative = {  # f'(u), and f''(u)
        "reverse_kl": (lambda u: math.log(u) + 1, lambda u: 1 / u),
        "forward_kl": (lambda u: -1 / u, lambda u: 1 / u**2),
        "jensen_shannon": (lambda u: math.log(2 * u / (1 + u)), lambda u: 1 / u - 1 / (1 + u)),
        "alpha": (lambda u: (1 - u**-alpha) / alpha, lambda u: u ** (-alpha - 1)),
    }[divergence]
    us = [math.exp(logps - reference_logps) for logps, reference_logps, _, _ in map(score, (chosen, rejected))]
    z = beta * (derivative[0](us[0]) - derivative[0](us[1]))
    slopes = [-sign * beta * sigmoid(-z) * derivative[1](u) * u for sign, u in zip((1, -1), us)]  # du/dlog pi(y) = u
    return softplus(-z), (slopes[0], 0.0), (slopes[1], 0.0)


def with_sft(loss, *responses, sft_weight, **arguments):
    """2404.19733 eq. 1: a loss plus sft_weight times -log pi(y)/|y| of the chosen response, or of a desirable one."""
    value, *slopes = loss(*responses, **arguments)
    logps, _, _, count = score(responses[0])
    weight = sft_weight * arguments.get("label", True)
    (g, h), *others = slopes
    return value - weight * logps / count, (g - weight / count, h), *others


def logit_gradient(response, g, h):
    """Return dL/dlogits of a response, g (1[v = y] - p_v) + h (p_v - q_v), given g = dL/d log pi(y) and h = dL/dSeqKL."""
    rows = []
    for logits, reference_logits, label in response:
        if label is None:
            rows.append([0.0] * len(logits))
            continue
        p = [math.exp(x) for x in log_softmax(logits)]
        q = [math.exp(x) for x in log_softmax(reference_logits)]
        rows.append([g * ((v == label) - p[v]) + h * (p[v] - q[v]) for v in range(len(p))])
    return rows

"""The losses that TRL has too: values on random inputs. Skipped if TRL is not installed (pip install trl; written for 1.16).

TRL's hinge is not SLiC-HF: its margin compares with the reference, and it has no SFT term. Its IPO uses per-token means. TRL has no DPOP
and no ODPO.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from tdpo.losses import ResponseScores, get_objective

pytest.importorskip("trl", reason="TRL is not installed")

N, T = 6, 9  # examples, tokens of the padded rows


@pytest.fixture
def rows():
    """Token log-probabilities of policy and reference, 0 at padding, and the mask of tokens: (2N, T) each, chosen rows first."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.randint(1, T + 1, (2 * N, 1), generator=generator)
    policy, reference = (-3 * torch.rand(2 * N, T, generator=generator, dtype=torch.float64) * mask for _ in range(2))
    return policy, reference, mask


def scores_of(rows, part: slice) -> ResponseScores:
    policy, reference, mask = (x[part] for x in rows)
    return ResponseScores(policy.sum(1), mask.sum(1), reference.sum(1))


def pairs_of(rows) -> dict[str, ResponseScores]:
    return {"chosen": scores_of(rows, slice(0, N)), "rejected": scores_of(rows, slice(N, None))}


def stand_in(**values) -> MagicMock:
    """Return a stand-in for a trainer, with the attributes that its loss reads; what the loss logs is ignored."""
    trainer = MagicMock()
    trainer.accelerator.gather_for_metrics = lambda x: x
    for name, value in values.items():
        setattr(trainer, name, value)
    return trainer


def outputs_of(policy) -> SimpleNamespace:
    zeros = torch.zeros_like(policy)
    return SimpleNamespace(log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None)


@pytest.mark.parametrize(
    "kind,name,hyperparameters",
    [
        ("sigmoid", "dpo", {"beta": 0.3}),
        ("robust", "rdpo", {"beta": 0.3, "label_smoothing": 0.2}),
        ("ipo", "ipo", {"beta": 0.3, "average_log_prob": True}),
    ],
)
def test_pairs(kind, name, hyperparameters, rows):
    from trl import DPOTrainer

    policy, reference, mask = rows
    trainer = stand_in(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=hyperparameters["beta"],
        label_smoothing=hyperparameters.get("label_smoothing", 0.0),
        use_weighting=False,
        _tp_size=1,
        _total_train_tokens=0,
    )
    ids = torch.ones(2 * N, T + 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": torch.cat([torch.zeros(2 * N, 1).bool(), mask], 1).long()}
    inputs |= {"ref_chosen_logps": reference[:N].sum(1), "ref_rejected_logps": reference[N:].sum(1)}
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs_of(policy), inputs, return_outputs=False)
    ours = get_objective(name, **hyperparameters)(pairs_of(rows)).losses.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_simpo(rows):
    from trl.experimental.cpo import CPOTrainer

    trainer = stand_in(alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.5, label_smoothing=0.0)
    trainer.accelerator.device = "cpu"
    means = rows[0].sum(1) / rows[2].sum(1)
    theirs, *rewards = CPOTrainer.cpo_loss(trainer, means[:N], means[N:])
    ours = get_objective("simpo", beta=2.5, gamma=0.7)(pairs_of(rows))
    torch.testing.assert_close(ours.losses, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close([ours.rewards["chosen"], ours.rewards["rejected"]], rewards)


def test_kto(rows):
    """Both get the same z0. TRL itself computes it over a device's batch, with the previous example's completion."""
    from trl import KTOTrainer

    policy, reference, mask = rows
    label, shift = torch.arange(2 * N) % 3 > 0, 0.8
    trainer = stand_in(
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.4,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.accelerator.device = "cpu"
    trainer._compute_kl_logps = lambda *_: reference.sum(1) + shift
    ids = torch.ones(2 * N, T + 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": torch.cat([torch.zeros(2 * N, 1).bool(), mask], 1).long()}
    inputs |= {"label": label, "ref_logps": reference.sum(1), "ref_KL_logps": reference.sum(1)}
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: outputs_of(policy), inputs, return_outputs=False)
    score = ResponseScores(policy.sum(1), mask.sum(1), reference.sum(1), None, label.double(), torch.tensor(shift, dtype=torch.float64))
    ours = get_objective("kto", beta=0.4, desirable_weight=1.2, undesirable_weight=0.7)({"completion": score}).losses.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)

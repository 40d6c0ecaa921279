"""Policy-gradient losses of sampled tokens: one update on the policy that sampled them, or several, clipped.

Sources: Shao et al. 2024 (GRPO, arXiv 2402.03300), equation 3; the MiMo-VL report (arXiv 2506.03569), section 3.3,
whose objective is the group's advantages over all tokens, without clipping and without KL. A token's term is multiplied
by a weight that the batch has fixed (``rl/groups.py``), so that the sum over any split of the batch is the objective.

Dims: R rows, one for each sampled token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipping:
    """Of several updates on one batch of rollouts."""

    low: float
    high: float
    kl_weight: float = 0.0


@dataclass(frozen=True)
class PolicyTerms:
    """Of each row: what is minimised, and numbers to look at."""

    losses_R: Tensor
    ratios_R: Tensor
    """p(token) / p(token) of the policy that sampled it; exactly 1 in an on-policy update. No gradient."""
    is_clipped_R: Tensor
    """float, 1 where the clipped term was taken, which has no gradient."""


def on_policy_terms(logprobs_R: Tensor, advantages_R: Tensor, weights_R: Tensor) -> PolicyTerms:
    """-advantage x ratio, the ratio being to the policy itself: its value is 1, its gradient that of the log-prob."""
    ratios_R = torch.exp(logprobs_R - logprobs_R.detach())
    losses_R = -advantages_R * weights_R * ratios_R
    return PolicyTerms(losses_R, ratios_R.detach(), torch.zeros_like(losses_R))


def clipped_terms(
    logprobs_R: Tensor,
    advantages_R: Tensor,
    weights_R: Tensor,
    old_logprobs_R: Tensor,
    clipping: Clipping,
    reference_logprobs_R: Tensor | None = None,
) -> PolicyTerms:
    """GRPO's: the smaller of ratio and clipped ratio times the advantage, and the KL divergence from a reference by
    Schulman's estimator exp(d) - d - 1, d = log p_reference - log p."""
    ratios_R = torch.exp(logprobs_R - old_logprobs_R)
    clipped_R = ratios_R.clamp(1 - clipping.low, 1 + clipping.high)
    gains_R = torch.minimum(ratios_R * advantages_R, clipped_R * advantages_R)
    losses_R = -gains_R
    if reference_logprobs_R is not None:
        apart_R = reference_logprobs_R - logprobs_R
        losses_R = losses_R + clipping.kl_weight * (torch.exp(apart_R) - apart_R - 1)
    is_clipped_R = (clipped_R * advantages_R < ratios_R * advantages_R).to(losses_R.dtype)
    return PolicyTerms(losses_R * weights_R, ratios_R.detach(), is_clipped_R)

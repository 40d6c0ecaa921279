"""The Bradley-Terry loss of a reward model: -log sigmoid(reward of the chosen - reward of the rejected response).

Source: Bradley and Terry 1952; Ouyang et al. 2022, equation 1, with one pair a comparison. Both members of a pair stand
in one pack: of its rows, in order, 2k is the chosen and 2k + 1 the rejected response of pair k. Under context
parallelism their last tokens may lie on different ranks; a pair's loss is computed on the rank of its chosen one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_megatron.parallel.collectives import sum_shared
from mimo_megatron.parallel.mesh import Axis


@dataclass(frozen=True)
class PairLosses:
    """Sums over this rank's pairs, scalars."""

    loss: Tensor
    count: Tensor
    num_right: Tensor


def pair_losses(rewards_R: Tensor, rows_R: Tensor, num_rows: int, cp: Axis) -> PairLosses:
    """Over the pairs whose chosen response ends on this rank; over all cp ranks, every pair once.

    ``rewards_R`` are of this rank's rows, whose numbers among the pack's ``num_rows`` are ``rows_R``. A collective over
    cp, forward and backward.
    """
    assert num_rows % 2 == 0, f"{num_rows} rows are no pairs"
    rewards_Q = sum_shared(rewards_R.new_zeros(num_rows).index_copy(0, rows_R, rewards_R), cp)
    chosen_R = rows_R[rows_R % 2 == 0]
    margins = rewards_Q.index_select(0, chosen_R) - rewards_Q.index_select(0, chosen_R + 1)
    losses = torch.nn.functional.softplus(-margins)
    return PairLosses(losses.sum(), losses.new_tensor(len(losses)), (margins > 0).sum())

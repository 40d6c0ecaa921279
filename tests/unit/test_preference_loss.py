"""The Bradley-Terry loss of a pack's rows: chosen and rejected responses in turn."""

import pytest
import torch
from torch import Tensor

from mimo_megatron.loss.preference import pair_losses
from mimo_megatron.parallel.mesh import Axis

ALONE = Axis(0, 1)


def of(rewards: Tensor) -> tuple[float, int, int]:
    found = pair_losses(rewards, torch.arange(len(rewards)), len(rewards), ALONE)
    return found.loss.item(), int(found.count), int(found.num_right)


def test_the_loss_is_minus_the_log_of_the_chosen_ones_probability() -> None:
    rewards = torch.tensor([1.5, -0.5, 0.25, 2.0], dtype=torch.float64)
    won = [torch.sigmoid(rewards[0] - rewards[1]), torch.sigmoid(rewards[2] - rewards[3])]
    loss, count, num_right = of(rewards)
    assert loss == pytest.approx(-sum(one.log().item() for one in won), rel=1e-14)
    assert (count, num_right) == (2, 1)


def test_gradients_push_a_pair_apart_by_the_probability_of_the_wrong_order() -> None:
    rewards = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    pair_losses(rewards, torch.arange(8), 8, ALONE).loss.backward()
    wrong = torch.sigmoid(rewards.detach()[1::2] - rewards.detach()[0::2])
    assert rewards.grad is not None
    torch.testing.assert_close(rewards.grad[0::2], -wrong, rtol=1e-12, atol=0)
    torch.testing.assert_close(rewards.grad[1::2], wrong, rtol=1e-12, atol=0)


def test_rows_may_come_in_any_order_with_their_numbers() -> None:
    rewards, order = torch.tensor([1.0, 3.0, -2.0, 0.5]), torch.tensor([2, 0, 3, 1])
    shuffled = pair_losses(rewards[order], order, 4, ALONE)
    assert shuffled.loss.item() == pytest.approx(of(rewards)[0])


def test_rewards_far_apart_give_a_finite_loss_and_a_tie_is_not_right() -> None:
    loss, _, num_right = of(torch.tensor([-1e4, 1e4, 0.0, 0.0]))
    assert loss == pytest.approx(2e4 + torch.log(torch.tensor(2.0)).item()) and num_right == 0


def test_a_pack_without_pairs_costs_nothing_and_still_has_a_gradient() -> None:
    rewards = torch.zeros(0, requires_grad=True)
    found = pair_losses(rewards, torch.zeros(0, dtype=torch.int64), 0, ALONE)
    found.loss.backward()
    assert found.loss.item() == 0.0 and int(found.count) == 0 and rewards.grad is not None

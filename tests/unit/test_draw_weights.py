"""Weights at the start of a run follow from the seed and their names, by however many threads they are drawn."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mimo_megatron.mcore.weights import INIT_STD, draw_weights
from mimo_megatron.parallel.mesh import ALONE


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(seed: int, num_threads: int) -> dict[str, Tensor]:
    torch.set_num_threads(num_threads)
    model = nn.Sequential(*(nn.Linear(48, 32) for _ in range(9)))
    draw_weights([model], seed, ALONE)
    return dict(model.state_dict())


def test_the_weights_do_not_depend_on_the_number_of_threads() -> None:
    alone, together = drawn(3, 1), drawn(3, 4)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_every_matrix_and_every_seed_has_its_own_weights() -> None:
    weights, others = drawn(3, 4), drawn(4, 4)
    matrices = [weights[name] for name in weights if name.endswith("weight")]
    assert len({one[0, 0].item() for one in matrices}) == len(matrices) == 9
    assert not any(torch.equal(weights[name], others[name]) for name in weights if name.endswith("weight"))
    assert torch.stack(matrices).std().item() == pytest.approx(INIT_STD, rel=0.05)
    assert not any(weights[name].any() for name in weights if name.endswith("bias"))


def test_what_a_thread_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int, name: str) -> torch.Generator:
        raise MemoryError(name)

    monkeypatch.setattr("mimo_megatron.mcore.weights._generator", fail)
    with pytest.raises(MemoryError, match=r"0\.weight"):
        drawn(3, 4)

"""Whose AdamW is chosen, by what a machine has; and where each keeps its count of updates."""

import pytest
import torch

from mimo_megatron.config.run import OptimizerConfig
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore import adam
from tests.fused_adam import TransformerEngineAdam, installed

ENGINE, APEX = "transformer_engine.pytorch.optimizers", "apex.optimizers"


def chosen(implementation: str) -> str:
    return adam.chosen(OptimizerConfig(implementation=implementation))


@pytest.mark.parametrize(
    ("packages", "first"),
    [((ENGINE, APEX), "transformer-engine"), ((APEX,), "apex"), ((ENGINE,), "transformer-engine"), ((), "torch")],
)
def test_auto_takes_the_first_that_is_installed_as_megatron_does(packages, first):
    with installed(*packages):
        assert chosen("auto") == first
        assert chosen("torch") == "torch"


def test_what_is_not_installed_is_refused_by_name():
    with installed(APEX), pytest.raises(ConfigError, match=r"implementation=transformer-engine .* cannot be imported"):
        chosen("transformer-engine")
    with installed(ENGINE), pytest.raises(ConfigError, match=r"implementation=apex .*; or set .*implementation=auto"):
        chosen("apex")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_torchs_and_the_others_are_refused():
    assert chosen("auto") == chosen("torch") == "torch"
    for name in ("transformer-engine", "apex"):
        with pytest.raises(ConfigError, match=f"implementation={name} cannot be used: its kernels need a GPU"):
            chosen(name)


def one_parameter(rate: float) -> dict[str, object]:
    param = torch.nn.Parameter(torch.arange(6.0))
    param.grad = torch.linspace(-1, 1, 6)
    return {"params": [param], "lr": rate}


@pytest.mark.parametrize("capturable", [False, True])
def test_a_count_in_the_groups_is_read_set_and_goes_on(capturable):
    optimizer = TransformerEngineAdam([one_parameter(0.1), one_parameter(0.2), {"params": []}], capturable=capturable)
    adam.allocate(optimizer)
    assert adam.step_count(optimizer) == 0
    with torch.no_grad():
        optimizer.step()
        assert adam.step_count(optimizer) == 1
        adam.set_step_count(optimizer, 7)
        optimizer.step()
    assert adam.step_count(optimizer) == 8
    is_live = {id(tensor) for tensor in adam.tensors(optimizer)}
    counters = [group["step"] for group in optimizer.param_groups if group["params"]]
    assert all(isinstance(counter, torch.Tensor) == capturable for counter in counters)
    assert all((id(counter) in is_live) == capturable for counter in counters)


def test_groups_that_have_made_different_numbers_of_updates_are_found():
    optimizer = TransformerEngineAdam([one_parameter(0.1), one_parameter(0.2)])
    adam.allocate(optimizer)
    optimizer.param_groups[1]["step"] = 3
    with pytest.raises(AssertionError, match=r"groups of one optimizer have made \[0, 3\] updates"):
        adam.step_count(optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_count_is_beside_every_parameter(fused):
    optimizer = torch.optim.AdamW([one_parameter(0.1), one_parameter(0.2)], fused=fused)
    adam.allocate(optimizer)
    optimizer.step()
    adam.set_step_count(optimizer, adam.step_count(optimizer) + 4)
    optimizer.step()
    assert [int(state["step"]) for state in optimizer.state.values()] == [6, 6] and adam.step_count(optimizer) == 6
    with adam.counters_set_aside(optimizer):
        assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
    assert adam.step_count(optimizer) == 6


def test_the_stand_in_updates_as_torch_does_with_every_rate_and_decay():
    groups = [one_parameter(0.1), one_parameter(0.2)]
    with installed(ENGINE):
        ours = adam.make("transformer-engine", groups, 0.1, OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.3))
    torchs = torch.optim.AdamW([one_parameter(0.1), one_parameter(0.2)], weight_decay=0.3)
    with torch.no_grad():
        for _ in range(3):
            ours.step()
            torchs.step()
    for group, other in zip(ours.param_groups, torchs.param_groups, strict=True):
        torch.testing.assert_close(group["params"][0], other["params"][0], rtol=2e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "transformer-engine", "apex"])
def test_the_kernels_of_a_gpu_count_and_update_as_torchs_plain_adamw(name):
    """The real ones, where they are installed: what the stand-ins are taken for."""
    try:
        adam.chosen(OptimizerConfig(implementation=name))
    except ConfigError as error:
        pytest.skip(str(error))
    settings = OptimizerConfig(weight_decay=0.3)

    def groups(device: str) -> list[dict[str, object]]:
        made = [one_parameter(0.1), one_parameter(0.2)]
        for group in made:
            (param,) = group["params"]
            moved = torch.nn.Parameter(param.detach().to(device))
            moved.grad = param.grad.to(device)
            group["params"] = [moved]
        return made

    theirs = adam.make(name, groups("cuda"), 0.1, settings)
    plain = torch.optim.AdamW(groups("cpu"), betas=settings.betas, eps=settings.eps, weight_decay=0.3)
    for optimizer in (theirs, plain):
        adam.allocate(optimizer)
        with torch.no_grad():
            optimizer.step()
            assert adam.step_count(optimizer) == 1
            adam.set_step_count(optimizer, 7)
            optimizer.step()
        assert adam.step_count(optimizer) == 8
    for group, other in zip(theirs.param_groups, plain.param_groups, strict=True):
        torch.testing.assert_close(group["params"][0].cpu(), other["params"][0], rtol=2e-6, atol=1e-7)

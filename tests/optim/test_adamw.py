"""If this fails, adapters are not updated by AdamW, or the place of its states changes a number."""

from __future__ import annotations

import warnings
from pathlib import Path

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlora_dist.config.sections import OptimConfig, PagingConfig
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.adamw_kernels import bnb_adamw_32bit, fused_adamw
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.paging.unified_memory import UnifiedPager

CPU = torch.device("cpu")
VALUES = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.05}


def make_shards(*sizes: int) -> list[nn.Parameter]:
    whole = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    return [nn.Parameter(part.clone()) for part in whole.split(list(sizes))]


def paged_adamw(
    shards: list[nn.Parameter],
    name: str = "adamw",
    resident_bytes: int | str = "auto",
    lr_factors: list[float] | None = None,
    **paging: object,
) -> PagedAdamW:
    config = OptimConfig.model_validate({"name": name, "resident_bytes": resident_bytes, **VALUES})
    optimizer_state = PagedOptimizerState(
        [shard.numel() for shard in shards], config, PagingConfig.model_validate(paging), CPU
    )
    return PagedAdamW(shards, optimizer_state, config, lr_factors)


def reference_adamw(shards: list[nn.Parameter], bits: int) -> torch.optim.Optimizer:
    """Return torch's AdamW or bitsandbytes', which needs `min_8bit_size=0` to keep small tensors in 8 bit."""
    values = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.05}
    if bits == 32:
        return torch.optim.AdamW(shards, fused=True, **values)
    return bitsandbytes.optim.AdamW8bit(shards, min_8bit_size=0, **values)


def train(shards: list[nn.Parameter], optimizer: PagedAdamW | torch.optim.Optimizer, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for shard in shards:
            scale = 10.0 ** (step % 5 - 3)  # gradients of all magnitudes, and some that are zero
            shard.grad = torch.randn(shard.shape, generator=generator).mul_(scale) if shard.numel() else None
            if shard.grad is not None and step % 7 == 3:
                shard.grad[::2] = 0
        optimizer.step()
    return torch.cat([shard.detach().view(-1) for shard in shards])


def test_adamw_is_the_algorithm_of_the_paper() -> None:
    """Loshchilov and Hutter (2019), algorithm 2, in double precision."""
    (parameter,) = make_shards(11)
    expected, generator = parameter.detach().double(), torch.Generator().manual_seed(1)
    first, second = torch.zeros(11).double(), torch.zeros(11).double()
    for step in range(3):
        grad = torch.randn(11, generator=generator).mul_(10.0 ** (step % 5 - 3)).double()
        first = 0.8 * first + 0.2 * grad
        second = 0.9 * second + 0.1 * grad**2
        update = (first / (1 - 0.8 ** (step + 1))) / ((second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6)
        expected = expected - 0.1 * (update + 0.05 * expected)
    torch.testing.assert_close(train([parameter], paged_adamw([parameter]), 3).double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.just(0), st.integers(1, 5000)), min_size=1, max_size=6).filter(any),
    bits=st.sampled_from([8, 32]),
    page_bytes=st.integers(4096, 20000),
    budget=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    ahead=st.integers(0, 2),
)
def test_paging_changes_no_number(sizes: list[int], bits: int, page_bytes: int, budget: float, ahead: int) -> None:
    """100 steps equal torch's (32 bit) and bitsandbytes' (8 bit) exactly, for any page size and budget."""
    mine, reference = make_shards(*sizes), make_shards(*sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # bitsandbytes pages nothing on a CPU, with a warning
        whole = paged_adamw(
            mine, "adamw" if bits == 32 else "adamw-8bit", page_bytes=page_bytes
        ).optimizer_state.pager.total_bytes
        resident = max(2 * page_bytes, int(budget * whole)) if budget else 0
        optimizer = paged_adamw(mine, f"paged-adamw-{bits}bit", resident, page_bytes=page_bytes, ahead=ahead, to="host")
    assert torch.equal(train(mine, optimizer, 100), train(reference, reference_adamw(reference, bits), 100))
    assert optimizer.optimizer_state.resident_bytes <= (resident or 2 * page_bytes)
    optimizer.optimizer_state.close()


@pytest.mark.parametrize("bits", [8, 32])
def test_states_on_disk_give_the_same_numbers(bits: int, tmp_path: Path) -> None:
    mine, reference = make_shards(3000, 4000), make_shards(3000, 4000)
    optimizer = paged_adamw(mine, f"paged-adamw-{bits}bit", 0, page_bytes=4096, to="disk", dir=str(tmp_path))
    assert optimizer.optimizer_state.paged_bytes > 0
    assert torch.equal(train(mine, optimizer, 10), train(reference, reference_adamw(reference, bits), 10))
    optimizer.optimizer_state.close()


@pytest.mark.parametrize("sizes", [(40, 60), (1, 98, 1), (100, 0), (0, 33, 67)])
def test_updating_shards_equals_updating_the_whole(sizes: tuple[int, ...]) -> None:
    def trained(*sizes: int) -> torch.Tensor:
        shards = make_shards(*sizes)
        optimizer = paged_adamw(shards)
        grads = [torch.randn(100, generator=torch.Generator().manual_seed(step)) for step in range(4)]
        for grad in grads:
            for shard, part in zip(shards, grad.split(list(sizes)), strict=True):
                shard.grad = part.clone()
            optimizer.step()
        return torch.cat([shard.detach() for shard in shards])

    torch.testing.assert_close(trained(*sizes), trained(100), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 32])
def test_lora_plus_scales_the_learning_rate_of_b(bits: int) -> None:
    """The result equals two optimizers, one with 16 times the learning rate."""
    mine, slow, fast = make_shards(700, 900), make_shards(700, 900), make_shards(700, 900)
    optimizer = paged_adamw(mine, "adamw" if bits == 32 else "adamw-8bit", lr_factors=[1.0, 16.0])
    train(mine, optimizer, 5)
    train(slow, reference_adamw(slow, bits), 5)
    quick = reference_adamw(fast, bits)
    quick.param_groups[0]["lr"] = 1.6
    train(fast, quick, 5)
    assert torch.equal(mine[0], slow[0])
    assert torch.equal(mine[1], fast[1])


def test_automatic_resident_bytes_follow_the_free_memory() -> None:
    mine, reference = make_shards(9000), make_shards(9000)
    config = OptimConfig.model_validate({"name": "paged-adamw-32bit", **VALUES})
    optimizer_state = PagedOptimizerState([9000], config, PagingConfig(to="host", page_bytes=4096), CPU)
    left = iter([100_000, 100_000, 30_000, 100_000, 5_000])
    optimizer = PagedAdamW(mine, optimizer_state, config, available_bytes=lambda held: next(left))
    held = []
    for _ in range(5):
        before = optimizer_state.resident_bytes
        optimizer_steps = train_one(mine, optimizer)
        held.append(optimizer_state.resident_bytes)
        assert before <= max(before, held[-1]) and optimizer_steps == len(held)
    assert held == [73_728, 73_728, 28_672, 28_672, 8192]
    plain = reference_adamw(reference, 32)
    for _ in range(5):
        train_one(reference, plain)
    assert torch.equal(mine[0], reference[0])
    optimizer_state.close()


def train_one(shards: list[nn.Parameter], optimizer: PagedAdamW | torch.optim.Optimizer) -> int:
    for shard in shards:
        shard.grad = torch.linspace(-1, 1, shard.numel())
    optimizer.step()
    return optimizer.steps if isinstance(optimizer, PagedAdamW) else 0


@pytest.mark.parametrize("bits", [8, 32])
def test_states_can_be_read_from_one_paging_and_written_to_another(bits: int) -> None:
    """A paged run's checkpoint can be resumed unpaged, and vice versa."""
    sizes, names = (3000, 0, 5, 4100), ("adamw", "adamw-8bit")
    one, two = make_shards(*sizes), make_shards(*sizes)
    paged = paged_adamw(one, f"paged-adamw-{bits}bit", 0, page_bytes=4096, to="host")
    train(one, paged, 3)
    unpaged = paged_adamw(two, names[bits == 8])
    unpaged.optimizer_state.write(paged.optimizer_state.read())
    unpaged.steps = paged.steps
    for shard, values in zip(two, one, strict=True):
        shard.data.copy_(values.data)
    assert torch.equal(train(one, paged, 3), train(two, unpaged, 3))
    paged.optimizer_state.write(unpaged.optimizer_state.read())
    for left, right in zip(paged.optimizer_state.read(), unpaged.optimizer_state.read(), strict=True):
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    paged.optimizer_state.close()


def test_states_in_managed_memory_are_updated() -> None:
    """Ordinary memory stands for CUDA's. Pages, views and bitsandbytes' marks are the same."""
    mine, reference = make_shards(3000, 100), make_shards(3000, 100)
    optimizer = paged_adamw(mine, "adamw", page_bytes=4096)

    def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)

    optimizer.optimizer_state.pager = UnifiedPager(optimizer.optimizer_state.pager.sizes, CPU, allocate)
    assert optimizer.optimizer_state.is_unified
    torch.testing.assert_close(train(mine, optimizer, 20), train(reference, reference_adamw(reference, 32), 20))


@pytest.mark.parametrize("bits", [8, 32])
def test_kernels_accept_managed_states_beside_gradients_on_a_device(bits: int) -> None:
    """On a GPU `paging.to: unified` failed at the first step. Managed memory is a CPU tensor to torch. bitsandbytes
    refuses it beside a device's gradient unless the tensor itself has its mark. Here the device is meta.
    """
    meta = torch.device("meta")
    shards = [nn.Parameter(torch.zeros(64, 8, device=meta)), nn.Parameter(torch.zeros(300, device=meta))]
    optimizer = paged_adamw(shards, f"paged-adamw-{bits}bit", page_bytes=4096)
    sizes = optimizer.optimizer_state.pager.sizes
    optimizer.optimizer_state.pager = UnifiedPager(
        sizes, CPU, lambda nbytes, device: torch.zeros(nbytes, dtype=torch.uint8)
    )
    for shard in shards:
        shard.grad = torch.zeros_like(shard)
    optimizer.step()  # bitsandbytes' `is_on_gpu` checks the tensors, and its operator dispatches to the device


def test_both_32_bit_kernels_agree() -> None:
    config = OptimConfig.model_validate(VALUES)
    values = [[torch.rand(1000, generator=torch.Generator().manual_seed(i)) for i in range(4)] for _ in range(2)]
    fused_adamw(*([value] for value in values[0]), config, 0.01, 7)  # type: ignore[arg-type]
    bnb_adamw_32bit(*values[1], config, 0.01, 7)
    for left, right in zip(*values, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)

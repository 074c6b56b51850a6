"""The formulas on random logits, against plain references, and the scope that applies them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from steered_moe.edit import BAN_MARGIN, Edit, RouterScope

EXPERTS, TOKENS = 8, 40
LOGITS = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1)) * 2
WEIGHTS = torch.randn(1, EXPERTS, generator=torch.Generator().manual_seed(2))


def reference(row: list[float], weights: list[float], scale: str) -> list[float]:
    """One token in plain Python: 2510.04694 Eq. 4 ("std"), 2601.14050 ("abs"), or a constant."""
    mean = sum(row) / len(row)
    std = math.sqrt(sum((z - mean) ** 2 for z in row) / len(row))
    factor = {"std": lambda z: std, "abs": abs, "none": lambda z: 1.0}[scale]
    return [z + w * factor(z) for z, w in zip(row, weights, strict=True)]


@pytest.mark.parametrize("scale", ["std", "abs", "none"])
def test_the_soft_edit_is_the_formula(scale):
    edited = Edit(EXPERTS, **{scale: WEIGHTS}).logits(LOGITS)
    expected = [reference(row, WEIGHTS[0].tolist(), scale) for row in LOGITS.tolist()]
    torch.testing.assert_close(edited, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    sample = LOGITS + WEIGHTS * LOGITS.std(dim=-1, keepdim=True)  # correction 1
    assert (edited - sample).abs().max() > 1e-2


def test_std_is_the_population_one():
    edited = Edit(EXPERTS, std=torch.ones(1, EXPERTS)).logits(LOGITS)
    added = (edited - LOGITS)[:, 0]
    torch.testing.assert_close(added, LOGITS.std(dim=-1, correction=0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(added, LOGITS.std(dim=-1, correction=1), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_coefficients_change_no_bit(dtype):
    logits, zero = LOGITS.to(dtype), torch.zeros(1, EXPERTS)
    edit = Edit(EXPERTS, std=zero, abs=zero, none=zero, force=zero.to(torch.int8))
    assert torch.equal(edit.logits(logits), logits)
    assert torch.equal(edit.ranked(logits), logits)
    assert not torch.equal(Edit(EXPERTS, std=WEIGHTS).logits(logits), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_strength_leads_out_of_the_range_of_the_dtype(dtype):
    """An infinite logit would make NaN of the token, and of what shares a cache with it."""
    logits, large = LOGITS.to(dtype), torch.full((1, EXPERTS), 3e38)
    for scale in ("std", "abs", "none"):
        edited = Edit(EXPERTS, **{scale: large}).logits(logits)
        assert edited.isfinite().all()
        assert edited.softmax(dim=-1).isfinite().all()
        assert scale == "none" or (edited == torch.finfo(dtype).max).any()


def test_force_sets_maximum_and_below_minimum_of_the_soft_edit():
    force = torch.zeros(1, EXPERTS, dtype=torch.int8)
    force[0, 2], force[0, 5] = 1, -1
    soft = Edit(EXPERTS, std=WEIGHTS).logits(LOGITS)
    hard = Edit(EXPERTS, std=WEIGHTS, force=force).logits(LOGITS)
    assert torch.equal(hard[:, 2], soft.amax(dim=-1))
    assert torch.equal(hard[:, 5], soft.amin(dim=-1) - BAN_MARGIN)
    untouched = [0, 1, 3, 4, 6, 7]
    assert torch.equal(hard[:, untouched], soft[:, untouched])


def test_shared_columns_stay_and_do_not_count():
    wide = torch.cat([LOGITS, torch.full((TOKENS, 2), 50.0)], dim=-1)
    coefficients = functional.pad(WEIGHTS, (0, 2))
    force = functional.pad(torch.eye(EXPERTS, dtype=torch.int8)[:1], (0, 2))
    edited = Edit(EXPERTS, std=coefficients, force=force).logits(wide)
    assert torch.equal(edited[:, EXPERTS:], wide[:, EXPERTS:])
    narrow = Edit(EXPERTS, std=WEIGHTS, force=force[:, :EXPERTS]).logits(LOGITS)
    assert torch.equal(edited[:, :EXPERTS], narrow)
    assert edited[:, 0].max() < 50.0


def test_rows_of_a_batch_have_their_own_numbers():
    rows = torch.cat([WEIGHTS, torch.zeros(1, EXPERTS)])
    edited = Edit(EXPERTS, std=rows).logits(LOGITS)
    half = TOKENS // 2
    assert torch.equal(edited[:half], Edit(EXPERTS, std=WEIGHTS).logits(LOGITS)[:half])
    assert torch.equal(edited[half:], LOGITS[half:])


def routed(edit: Edit, hidden, weight, bias=None, groups: int = 1, matmul: bool = False):
    """A small sigmoid router of our own: selection by biased, group-limited scores."""
    scope = RouterScope(edit, tuple(weight.shape))
    with scope:
        logits = torch.mm(hidden, weight.t()) if matmul else functional.linear(hidden, weight)
        scores = logits.sigmoid()
        choice = scores if bias is None else scores + bias
        grouped = choice.view(len(choice), groups, -1)
        best = grouped.topk(2, dim=-1)[0].sum(dim=-1).topk(max(1, groups // 2), dim=-1)[1]
        kept = torch.zeros(len(choice), groups).scatter(1, best, 1.0)
        mask = kept.repeat_interleave(grouped.shape[-1], dim=1) == 0
        chosen = torch.topk(choice.masked_fill(mask, -torch.inf), k=2, dim=-1)[1]
        weights = scores.gather(1, chosen)
    return scope, logits, chosen, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matmul", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_scope_pins_the_selection_whatever_bias_and_groups_say(dtype, groups, matmul):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, 16, generator=generator).to(dtype)
    weight = torch.randn(EXPERTS, 16, generator=generator).to(dtype)
    bias = torch.tensor([0, 0, 0, 0, 0, 0, 3.0, -3.0]).to(dtype)
    force = torch.zeros(1, EXPERTS, dtype=torch.int8)
    force[0, 7], force[0, 6] = 1, -1  # against the bias
    scope, logits, chosen, weights = routed(
        Edit(EXPERTS, force=force), hidden, weight, bias, groups, matmul
    )
    assert (chosen == 7).any(dim=1).all()
    assert not (chosen == 6).any()
    assert torch.equal(weights, logits.sigmoid().gather(1, chosen))
    assert scope.products == 1
    assert torch.equal(scope.selected[-1], chosen)
    _, _, free, _ = routed(Edit(EXPERTS), hidden, weight, bias, groups, matmul)
    assert (free == 6).any()
    assert not (free == 7).any(dim=1).all()


def test_a_scope_leaves_other_products_alone():
    edit = Edit(EXPERTS, none=torch.full((1, EXPERTS), 100.0))
    hidden, other = torch.randn(TOKENS, 16), torch.randn(EXPERTS, 4)
    with RouterScope(edit, (EXPERTS, 16)) as scope:
        result = functional.linear(hidden[:, :4], other)
        top = result.topk(2).indices
    assert torch.equal(result, hidden[:, :4] @ other.t())
    assert torch.equal(top, result.topk(2).indices)
    assert (scope.products, scope.selected) == (0, [])

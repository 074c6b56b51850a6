"""The paired bootstrap: its centre, its width, and that pairing matters."""

from __future__ import annotations

import pytest
import torch

from steered_moe.errors import SteeredMoEError
from steered_moe.metrics import paired_gain


def test_centre_and_width_are_those_of_the_mean():
    torch.manual_seed(0)
    old = torch.rand(2000) < 0.5
    new = old | (torch.rand(2000) < 0.1)
    gain = paired_gain(old, new, resamples=4000)
    difference = new.double() - old.double()
    error = float(difference.std() / 2000**0.5)
    assert gain.mean == pytest.approx(float(difference.mean()))
    assert gain.high - gain.mean == pytest.approx(1.96 * error, rel=0.1)
    assert gain.mean - gain.low == pytest.approx(1.96 * error, rel=0.1)
    shuffled = paired_gain(old, new[torch.randperm(2000)], resamples=4000)
    assert shuffled.high - shuffled.low > 1.5 * (gain.high - gain.low)  # unpaired is wider


def test_what_languages_share_is_kept():
    """Two languages that move together are no more certain than one."""
    torch.manual_seed(1)
    old, new = torch.rand(1000) < 0.5, torch.rand(1000) < 0.55
    one = paired_gain(old, new, resamples=2000)
    twice = paired_gain(old.expand(2, -1), new.expand(2, -1), resamples=2000)
    assert twice == one


def test_no_difference_is_exactly_zero_and_bad_input_is_refused():
    same = torch.rand(3, 50) < 0.5
    gain = paired_gain(same, same, resamples=100)
    assert (gain.mean, gain.low, gain.high) == (0, 0, 0)
    with pytest.raises(SteeredMoEError, match="same problems"):
        paired_gain(torch.ones(3), torch.ones(4))
    with pytest.raises(SteeredMoEError, match="level is 95"):
        paired_gain(torch.ones(3), torch.ones(3), level=95)

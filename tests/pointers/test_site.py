"""The line that an error names is the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wsfed.pointers.site import capture_site, describe_site


def line_of(function: Callable[..., Any], after: int = 1) -> str:
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno + after}"


def test_a_site_is_where_it_was_captured() -> None:
    site = capture_site()
    assert describe_site(site) == line_of(test_a_site_is_where_it_was_captured)


def test_a_site_in_many_lines_is_that_of_the_call() -> None:
    sites = [
        None,
        capture_site(),
    ]
    expected = line_of(test_a_site_in_many_lines_is_that_of_the_call, 3)
    assert describe_site(sites[1]) == expected


def test_torchs_frames_are_passed_over() -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return capture_site()

    inner = nn.Sequential(Layer())(torch.ones(1))
    assert describe_site(inner) == line_of(Layer.forward)


def test_a_site_outlives_its_frame_and_holds_none_of_its_locals() -> None:
    def somewhere() -> Any:
        return capture_site()

    code, instruction = somewhere()
    assert code is somewhere.__code__
    assert isinstance(instruction, int)


def test_no_site_is_no_text() -> None:
    assert describe_site(None) == ""

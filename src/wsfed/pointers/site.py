"""The user's own line behind an operation: captured for each one, made readable when needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Final, TypeAlias

import torch

__all__ = ["Site", "StepSites", "capture_site", "describe_site"]

#: A code object and the instruction in it; the line is looked up only for an error. Or what stands
#: for the lines of a plan.
Site: TypeAlias = "tuple[CodeType, int] | StepSites"

_OURS: Final = (
    str(Path(__file__).parent.parent) + os.sep,
    str(Path(torch.__file__).parent) + os.sep,
    str(Path(asyncio.__file__).parent) + os.sep,
    contextlib.__file__,
    "<frozen ",
)
#: Written as a user would write it.
_USERS: Final = str(Path(__file__).parent.parent / "testing" / "conformance.py")
#: Whether a code object is torch's or wsfed's. Code objects live as long as their functions.
_SKIPPED: dict[CodeType, bool] = {}
_MOST: Final = 50_000


@dataclass(frozen=True, slots=True)
class StepSites:
    """The user's lines behind the steps of a plan, and the one that called it.

    Attributes:
        plan: its name.
        steps: the line of each step.
        call: the line of the call.
    """

    plan: str
    steps: Sequence[Site | None]
    call: Site | None = None

    def called_at(self, site: Site | None) -> StepSites:
        """The same for one call."""
        return StepSites(self.plan, self.steps, site)


def capture_site(depth: int = 1) -> Site | None:
    """Where the innermost code stands that is neither torch's nor wsfed's.

    Args:
        depth: how many callers are known to be wsfed's own.
    """
    frame = sys._getframe(depth)
    while frame is not None:
        code = frame.f_code
        skip = _SKIPPED.get(code)
        if skip is None:
            skip = _remember(code)
        if not skip:
            return code, frame.f_lasti
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _remember(code: CodeType) -> bool:
    if len(_SKIPPED) >= _MOST:
        _SKIPPED.clear()
    skip = code.co_filename.startswith(_OURS) and code.co_filename != _USERS
    _SKIPPED[code] = skip
    return skip


def describe_site(site: Site | None, step: int = 0) -> str:
    """``file:line`` of a site, ``""`` where there is none.

    Args:
        site: of a command.
        step: of a plan, from 1; 0 for none.
    """
    if site is None:
        return ""
    if isinstance(site, StepSites):
        return _describe_step(site, step)
    code, instruction = site
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= instruction < end and number is not None:
            line = number
    return f"{code.co_filename}:{line}"


def _describe_step(sites: StepSites, step: int) -> str:
    called = describe_site(sites.call)
    inner = describe_site(sites.steps[step - 1]) if 0 < step <= len(sites.steps) else ""
    return f"{inner}, in plan {sites.plan!r} called at {called}" if inner else called

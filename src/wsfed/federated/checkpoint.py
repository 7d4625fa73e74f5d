"""Training that goes on where it was: a file a round, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from wsfed.errors import FederatedError
from wsfed.federated.history import Round

__all__ = ["Checkpoint", "Saved"]

_FILE: Final = re.compile(r"round-(\d{6})\.safetensors")
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Saved:
    """What training was when it was saved.

    Attributes:
        state: values of the model.
        memory: of the strategy.
        rounds: that were finished.
    """

    state: Mapping[str, torch.Tensor]
    memory: Mapping[str, torch.Tensor]
    rounds: list[Round]


class Checkpoint:
    """A folder of checkpoints, in safetensors.

    Args:
        folder: it is made if it is not there.
        every: rounds between two of them; the last round is always saved.
        keep: how many are kept, the newest ones.

    Raises:
        ValueError: ``every`` or ``keep`` is less than one.
        ImportError: ``safetensors`` is not installed.
    """

    def __init__(self, folder: str | Path, *, every: int = 1, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"at least 1 each: {every=}, {keep=}")
        import safetensors.torch as safetensors

        self._safetensors: Any = safetensors
        self.folder, self.every, self.keep = Path(folder), every, keep

    def save(self, saved: Saved, settings: Mapping[str, Any]) -> Path:
        """Write one. A crash in the middle leaves the one before.

        Args:
            saved: what is to be saved.
            settings: what has to be the same when training goes on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"state:{name}": value for name, value in saved.state.items()}
        tensors |= {f"memory:{name}": value for name, value in saved.memory.items()}
        # Copies: tensors that share memory (views of one row) cannot be written.
        tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        told = {
            "version": _VERSION,
            "settings": dict(settings),
            "rounds": [asdict(each) for each in saved.rounds],
        }
        path = self.folder / f"round-{len(saved.rounds):06}.safetensors"
        partial = path.with_suffix(".partial")
        self._safetensors.save_file(tensors, partial, {"wsfed": json.dumps(told)})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        for old in self._files()[: -self.keep]:
            old.unlink()
        return path

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(each for each in self.folder.iterdir() if _FILE.fullmatch(each.name))

    def load(self, settings: Mapping[str, Any]) -> Saved | None:
        """The newest one, if there is any.

        Args:
            settings: they have to be those that it was saved with.

        Raises:
            FederatedError: it is damaged, of another version, or of other settings.
        """
        files = self._files()
        if not files:
            return None
        path = files[-1]
        try:
            with self._safetensors.safe_open(path, "pt") as file:
                told = json.loads(file.metadata()["wsfed"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            rounds = [Round.of_plain(each) for each in told["rounds"]]
            version, before = told["version"], told["settings"]
        except Exception as error:  # what the reader raises for damaged bytes has no end
            raise FederatedError(
                f"{path} is damaged, or no checkpoint ({error}); without it, an earlier one is used"
            ) from None
        if version != _VERSION:
            raise FederatedError(f"{path} is of version {version}, and this is version {_VERSION}")
        self._check(path, before, settings)
        return Saved(_part(tensors, "state:"), _part(tensors, "memory:"), rounds)

    def _check(self, path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(now))
        odd = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if odd:
            told = ", ".join(f"{n}: {before.get(n)!r} then, {now.get(n)!r} now" for n in odd)
            raise FederatedError(
                f"{path} is of a training that was set otherwise ({told}); use another folder"
            )


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

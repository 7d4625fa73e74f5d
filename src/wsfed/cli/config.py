"""A training as a TOML file: what ``wsfed train`` and ``wsfed simulate`` read.

Names of losses, metrics, optimizers, strategies and samplers are those of closed tables; a model is
a named example, or a class or function of a Python file on this machine, which is run.
"""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.nn import functional as F

from wsfed import federated
from wsfed.errors import FederatedError
from wsfed.federated.compression import compression_of
from wsfed.federated.strategies.strategy import Strategy

__all__ = ["METRICS", "Configuration", "load_configuration"]


def accuracy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of rows whose largest output is the label."""
    return (output.argmax(-1) == labels).float().mean()


def mean_absolute_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean distance from the target."""
    return (output - target).abs().mean()


#: Losses by name.
LOSSES: Final[Mapping[str, Callable[..., torch.Tensor]]] = MappingProxyType(
    {
        "cross_entropy": F.cross_entropy,
        "nll": F.nll_loss,
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "smooth_l1": F.smooth_l1_loss,
        "huber": F.huber_loss,
        "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    }
)
#: Metrics by name.
METRICS: Final[Mapping[str, Callable[..., torch.Tensor]]] = MappingProxyType(
    {"accuracy": accuracy, "mae": mean_absolute_error}
)
#: Strategies that a few numbers describe.
STRATEGIES: Final[Mapping[str, Callable[..., Strategy]]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            *(federated.FedAvg, federated.FedAvgM, federated.FedProx, federated.FedSGD),
            *(federated.FedAdam, federated.FedYogi, federated.FedAdagrad, federated.Scaffold),
            *(federated.QFedAvg, federated.FedBuff, federated.FedAsync, federated.FedMedian),
            *(federated.FedTrimmedAvg, federated.Krum, federated.MultiKrum, federated.Bulyan),
            federated.GeometricMedian,
        )
    }
)
_SAMPLERS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (federated.Everyone, federated.Uniform, federated.Weighted, federated.Poisson)
    }
)


_SCHEMES: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {kind.__name__: kind for kind in (federated.Cast, federated.Quantise, federated.TopK)}
)


class _Section(BaseModel):
    """A table of the file; what is not known in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Named(BaseModel):
    """A name of a closed table, and its arguments beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    def make(self, table: Mapping[str, Callable[..., Any]], what: str) -> Any:
        """The thing itself.

        Raises:
            FederatedError: there is no such name, or not with these arguments.
        """
        if self.name not in table:
            raise FederatedError(
                f"[{what}] there is no {self.name!r}; there is {', '.join(sorted(table))}"
            )
        try:
            return table[self.name](**(self.model_extra or {}))
        except (TypeError, ValueError) as error:
            raise FederatedError(f"[{what}] {self.name}: {error}") from None


class ModelSection(_Section):
    """``[model]``: an example, or what a Python file of yours makes."""

    example: Literal["linear", "mlp", "cnn"] | None = None
    file: Path | None = None
    name: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class DataSection(_Section):
    """``[data]``: names on the workers."""

    dataset: str
    validation: str | None = None
    fields: list[str] | None = None


class WorkersSection(_Section):
    """``[workers]``: where they are, or the hub that they have dialled."""

    urls: list[str] = Field(default_factory=list)
    file: Path | None = None
    token_file: Path | None = None
    hub: str | None = None
    hub_token_file: Path | None = None
    wait_for: Annotated[int, Field(ge=1)] = 1
    tags: list[str] = Field(default_factory=list)
    timeout: Annotated[float, Field(gt=0)] = 60.0


class CompressionTable(_Section):
    """What is made smaller on which way: a word, or a name with its numbers."""

    update: str | _Named | None = None
    broadcast: Literal["fp16", "bf16"] | None = None


class TrainingSection(_Section):
    """``[training]``: the arguments of ``fit`` that are numbers and words."""

    rounds: Annotated[int, Field(ge=1)]
    loss: str = "cross_entropy"
    metrics: list[str] = Field(default_factory=list)
    local_epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=0)] = 32
    shuffle: bool = True
    drop_last: bool = False
    schedule: Literal["concurrent", "sequential", "async"] = "concurrent"
    seed: Annotated[int, Field(ge=0)] = 0
    deadline: float | None = None
    min_workers: Annotated[int, Field(ge=1)] = 1
    min_fraction: float = 0.0
    late: Literal["drop", "keep"] = "drop"
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    compression: str | CompressionTable | None = None
    patience: int | None = None


class PrivacySection(_Section):
    """``[privacy]``: ``kind = "dp"`` or ``"dpsgd"`` with numbers, or ``"secagg"`` with a roster.

    ``rows`` holds the numbers of DP-SGD, together with one of the other kinds.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: Literal["dp", "dpsgd", "secagg"]
    rows: Mapping[str, float] | None = None
    roster: Path | None = None
    owner: str | None = None


class OutputSection(_Section):
    """``[output]``: what is written, and where."""

    folder: Path = Path("runs")
    tensorboard: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] = 1


class SimulationSection(_Section):
    """``[simulation]``: rows of a file, cut into the parts of virtual clients."""

    data: Path
    clients: Annotated[int, Field(ge=1)] = 100
    partition: Literal["iid", "dirichlet", "shards", "quantity_skew"] = "iid"
    labels: str = "labels"
    alpha: float = 0.5
    per_site: int = 2
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class Configuration(_Section):
    """The whole file."""

    model: ModelSection
    data: DataSection
    training: TrainingSection
    workers: WorkersSection = Field(default_factory=WorkersSection)
    optimizer: _Named = Field(default_factory=lambda: _Named(name="SGD", lr=0.1))  # type: ignore[call-arg]
    strategy: _Named = Field(default_factory=lambda: _Named(name="FedAvg"))
    sampler: _Named = Field(default_factory=lambda: _Named(name="Everyone"))
    privacy: PrivacySection | None = None
    output: OutputSection = Field(default_factory=OutputSection)
    simulation: SimulationSection | None = None

    def make_model(self, folder: Path) -> nn.Module:
        """The model, the same one for the same seed.

        Args:
            folder: that paths are relative to.

        Raises:
            FederatedError: it cannot be made.
        """
        torch.manual_seed(self.training.seed)
        section = self.model
        if (section.example is None) == (section.file is None):
            raise FederatedError("[model] give an example, or a file and a name: one of them")
        try:
            made = _EXAMPLES[section.example] if section.example else _from_file(section, folder)
            model = made(**section.options)
        except FederatedError:
            raise
        except Exception as error:
            raise FederatedError(f"[model] {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise FederatedError(
                f"[model] {section.name} makes a {type(model).__name__}, no Module"
            )
        return model

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Of ``fit``, but for model, workers, callbacks and checkpoints.

        Args:
            folder: that paths are relative to.

        Raises:
            FederatedError: a name is not known, or not with these arguments.
        """
        training = self.training
        made = {"loss", "metrics", "batch_size", "patience", "compression"}
        plain = training.model_dump(exclude=made)
        return {
            **plain,
            "dataset": self.data.dataset,
            "validation": self.data.validation,
            "fields": self.data.fields,
            "batch_size": training.batch_size or None,
            "loss": _known(LOSSES, training.loss, "loss"),
            "metrics": {name: _known(METRICS, name, "metrics") for name in training.metrics},
            "optimizer": self._optimizer(),
            "strategy": self._strategy(),
            "sampler": self.sampler.make(_SAMPLERS, "sampler"),
            "privacy": self._privacy(folder),
            "compression": self._compression(),
        }

    def _strategy(self) -> Strategy:
        if self.training.schedule == "async" and "strategy" not in self.model_fields_set:
            return federated.FedAsync()
        made: Strategy = self.strategy.make(STRATEGIES, "strategy")
        return made

    def _optimizer(self) -> Callable[..., torch.optim.Optimizer]:
        kinds = {
            name: kind
            for name, kind in vars(torch.optim).items()
            if isinstance(kind, type)
            and issubclass(kind, torch.optim.Optimizer)
            and kind not in (torch.optim.Optimizer, torch.optim.LBFGS)
        }
        make = partial(
            _known(kinds, self.optimizer.name, "optimizer"), **(self.optimizer.model_extra or {})
        )
        try:
            make([torch.zeros(1, requires_grad=True)])
        except (TypeError, ValueError) as error:
            raise FederatedError(f"[optimizer] {self.optimizer.name}: {error}") from None
        return make

    def _compression(self) -> federated.Compression | None:
        given = self.training.compression
        try:
            if not isinstance(given, CompressionTable):
                return compression_of(given)
            update = given.update
            if isinstance(update, _Named):
                update = update.make(_SCHEMES, "training.compression")
            whole = compression_of(update)
            broadcast = None if given.broadcast is None else federated.Cast(given.broadcast)
            return federated.Compression(None if whole is None else whole.update, broadcast)
        except ValueError as error:
            raise FederatedError(f"[training.compression] {error}") from None

    def _privacy(self, folder: Path) -> Any:
        section = self.privacy
        if section is None:
            return None
        extra = section.model_extra or {}
        try:
            if section.kind == "dpsgd":
                if section.rows is not None:
                    raise ValueError("rows go with another kind: dp or secagg")
                return federated.DPSGD(**extra)
            rows = [] if section.rows is None else [federated.DPSGD(**section.rows)]
            if section.kind == "dp":
                return [federated.DP(**extra), *rows]
            if section.roster is None or section.owner is None:
                raise ValueError('kind = "secagg" needs a roster and its owner\'s public key')
            from wsfed.privacy.roster import load_roster

            roster = load_roster(folder / section.roster).check(section.owner)
            return [federated.SecAgg(roster, **extra), *rows]
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise FederatedError(f"[privacy] {error}") from None


def load_configuration(path: str | Path) -> Configuration:
    """Read a configuration.

    Raises:
        FederatedError: the file is missing, no TOML, or says what is not known; the text names the
            table and the key.
    """
    try:
        with open(path, "rb") as file:
            told = tomllib.load(file)
        return Configuration.model_validate(told)
    except OSError as error:
        raise FederatedError(f"{path}: {error.strerror or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise FederatedError(f"{path} is no TOML: {error}") from None
    except ValidationError as error:
        lines = [f"[{'.'.join(map(str, each['loc']))}] {each['msg']}" for each in error.errors()]
        raise FederatedError(f"{path}:\n  " + "\n  ".join(lines)) from None


def _known(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise FederatedError(f"[{what}] there is no {name!r}; there is {', '.join(sorted(table))}")
    return table[name]


def _from_file(section: ModelSection, folder: Path) -> Callable[..., Any]:
    assert section.file is not None
    path = folder / section.file
    if section.name is None:
        raise FederatedError(f"[model] name: which class or function of {path} makes the model?")
    if not path.is_file():
        raise FederatedError(f"[model] {path}: there is no such file")
    spec = importlib.util.spec_from_file_location("wsfed_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look it up
    spec.loader.exec_module(module)
    if not hasattr(module, section.name):
        raise FederatedError(f"[model] {path} has no {section.name!r}")
    made: Callable[..., Any] = getattr(module, section.name)
    return made


# --- examples -------------------------------------------------------------------------------------


def linear(inputs: int = 784, outputs: int = 10) -> nn.Module:
    """One layer over flattened rows."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def mlp(inputs: int = 784, hidden: int = 200, outputs: int = 10) -> nn.Module:
    """Two hidden layers (the 2NN of McMahan et al. 2017)."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU()),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)),
    )


def cnn(channels: int = 1, size: int = 28, outputs: int = 10) -> nn.Module:
    """Two convolutions and a layer, for images of a size that four divides."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, outputs)),
    )


_EXAMPLES: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {"linear": linear, "mlp": mlp, "cnn": cnn}
)

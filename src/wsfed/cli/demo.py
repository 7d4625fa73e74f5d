"""``wsfed demo``: two workers, one model, nothing to set up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

__all__ = ["demo"]


def demo(
    rounds: Annotated[int, typer.Option(min=1, help="How often the model goes round.")] = 10,
) -> None:
    """Train a model over two workers in this process and compare with plain torch.

    Example:

      wsfed demo --rounds 20
    """
    equal = asyncio.run(_train(rounds))
    if not equal:
        raise typer.Exit(1)


async def _train(rounds: int) -> bool:
    import torch
    from rich.console import Console

    import wsfed

    console = Console()
    data = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]])
    target = torch.tensor([[0], [0], [1], [1.0]])
    parts = [(data[:2], target[:2]), (data[2:], target[2:])]
    expected = _locally(parts, rounds)
    model, optimizer = _model()
    losses = []
    async with wsfed.VirtualWorker("bob") as bob, wsfed.VirtualWorker("alice") as alice:
        sets = [
            (worker.send(x), worker.send(y))
            for worker, (x, y) in zip((bob, alice), parts, strict=True)
        ]
        for number in range(rounds):
            for x, y in sets:
                x.location.send(model)
                optimizer.zero_grad()
                loss = ((model(x) - y) ** 2).sum()
                loss.backward()
                optimizer.step()
                await wsfed.get(model)
                losses.append(float(await loss.get()))
                console.print(f"round {number + 1}  {x.location.id:6}  loss {losses[-1]:.6f}")
    equal = losses == expected
    console.print(
        f"{len(losses)} losses, each [green]bit for bit that of plain torch[/]"
        if equal
        else "[red]the losses differ from plain torch[/]"
    )
    return equal


def _model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _locally(parts: list[tuple[torch.Tensor, torch.Tensor]], rounds: int) -> list[float]:
    model, optimizer = _model()
    losses = []
    for _ in range(rounds):
        for x, y in parts:
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses

"""Three workers, one model: federated training in 25 lines. Run it: python examples/first.py"""

import asyncio
from functools import partial

import torch

import wsfed
from wsfed import federated


def worker(name: str, seed: int) -> wsfed.VirtualWorker:
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(seed))
    rows = wsfed.Dataset("points", {"x": x, "y": (x[:, 0] > x[:, 1]).long()})
    return wsfed.VirtualWorker(name, datasets=[rows])  # or partial(wsfed.connect, "ws://…")


async def main() -> None:
    model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    async with worker("alice", 1) as alice, worker("bob", 2) as bob, worker("carol", 3) as carol:
        sgd = partial(torch.optim.SGD, lr=0.5)
        print(await federated.fit(model, [alice, bob, carol], "points", loss, sgd, rounds=5))


asyncio.run(main())

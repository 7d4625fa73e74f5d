"""A whole first program; tells how long it took until its first round had ended.

    python -m benchmarks.federated_cold BEGUN URL ...

``BEGUN`` is ``time.time()`` of when it was started.
"""

import sys
import time

_started = time.time()  # torch and all else come after this

import torch  # noqa: E402

_torch = time.time() - _started

import asyncio  # noqa: E402
import json  # noqa: E402
from functools import partial  # noqa: E402

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import wsfed  # noqa: E402
from wsfed import federated  # noqa: E402


class _First(federated.Callback):
    """Notes when the first round has ended."""

    ended = 0.0

    def round_ends(self, round: federated.Round, history: federated.History) -> str | None:
        """Once."""
        self.ended = self.ended or time.time()
        return None


async def main(begun: float, urls: list[str]) -> None:
    """Train."""
    model = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
    sgd, first = partial(torch.optim.SGD, lr=0.05), _First()
    workers = [partial(wsfed.connect, url) for url in urls]
    history = await federated.fit(
        model, workers, "rows", F.cross_entropy, sgd, rounds=2, callbacks=[first]
    )
    told = {
        "to the first round": first.ended - begun,
        "import torch": _torch,
        "first round": history[0].seconds,
        "second round": history[1].seconds,
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), sys.argv[2:]))

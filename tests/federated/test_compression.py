"""What travels is smaller, and what comes of it is what the formulas say."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import Killed, KilledAfter, points, sites
from tests.federated.test_fit import assert_equal, network, trained_here
from wsfed import federated
from wsfed.errors import OpNotAllowed
from wsfed.federated import Cast, Compression, Quantise, TopK
from wsfed.federated.compression import Scheme, compression_of
from wsfed.federated.network import Network, Setup
from wsfed.federated.recipe import Criterion, Recipe
from wsfed.federated.state import state_of
from wsfed.privacy.roster import Roster, new_key, public_key

SGD = partial(torch.optim.SGD, lr=0.1)
SCHEMES = [
    *(Cast("fp16"), Cast("bf16"), Quantise(8), Quantise(8, "nearest"), Quantise(4)),
    *(TopK(0.3), TopK(0.3, error_feedback=False)),
]


def changes() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) / 7 for shape in ((5, 3), (7,), (1,))]


def through(scheme: Scheme, sent: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    told, _ = scheme.encode(sent, None)
    return scheme.decode(told, [each.shape for each in sent])


# --- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_cast_rounds_as_torch_does(word: Any, dtype: torch.dtype) -> None:
    for made, change in zip(through(Cast(word), changes()), changes(), strict=True):
        assert made.dtype is dtype
        assert torch.equal(made, change.to(dtype))


@pytest.mark.parametrize("value", [torch.arange(3), torch.ones(3).half(), torch.ones(3).bfloat16()])
def test_what_has_no_more_bits_is_not_cast(value: torch.Tensor) -> None:
    assert Cast("fp16").cast(value) is value


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_the_nearest_is_off_by_half_a_step_at_most(bits: Any) -> None:
    most = 2 ** (bits - 1) - 1
    for made, change in zip(through(Quantise(bits, "nearest"), changes()), changes(), strict=True):
        scale = change.abs().max() / most
        assert torch.equal(made, scale * (change / scale).round())
        assert (made - change).abs().max() <= scale * 0.5001


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_has_no_mean_error(bits: Any) -> None:
    torch.manual_seed(0)
    change = changes()[0]
    scale = change.abs().max() / (2 ** (bits - 1) - 1)
    draws = torch.stack([through(Quantise(bits), [change])[0] for _ in range(4000)])
    assert (draws - change).abs().max() <= scale * 1.0001
    # The deviation of a draw is at most half a step, and of the mean of 4,000 of them a 126th.
    assert (draws.mean(0) - change).abs().max() < 5 * scale / 126


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_no_change_is_no_change(scheme: Scheme) -> None:
    for made in through(scheme, [torch.zeros(3, 2), torch.zeros(1)]):
        assert not made.any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_become_so(scheme: Scheme, odd: float) -> None:
    (made,) = through(scheme, [torch.tensor([1.0, odd, 2.0, 3.0])])
    assert not made.isfinite().all()


def test_four_bits_are_two_numbers_in_a_byte() -> None:
    change = torch.tensor([7.0, -7, 1, 0, -3])
    told, _ = Quantise(4, "nearest").encode([change], None)
    assert told[1].dtype is torch.uint8
    assert told[1].numel() == 3
    assert torch.equal(through(Quantise(4, "nearest"), [change])[0], change)


def test_the_largest_changes_of_all_tensors_are_sent() -> None:
    sent = [torch.tensor([[1.0, -9], [2, 0]]), torch.tensor([8.0, -3])]
    made = through(TopK(0.5), sent)
    assert torch.equal(made[0], torch.tensor([[0.0, -9], [0, 0]]))
    assert torch.equal(made[1], torch.tensor([8.0, -3]))


def test_what_was_sent_and_what_is_left_are_all_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    residual, total, arrived = None, torch.zeros(40), torch.zeros(40)
    for _ in range(20):
        change = torch.randint(-50, 50, (40,), generator=generator).float()  # sums are exact
        told, residual = TopK(0.1).encode([change], residual)
        total += change
        arrived += TopK(0.1).decode(told, [change.shape])[0]
        assert residual is not None
        assert torch.equal(arrived + residual, total)
    assert TopK(0.1, error_feedback=False).encode([total], None)[1] is None


@pytest.mark.parametrize("place", [-1, 4])
def test_a_place_outside_of_the_model_is_refused(place: int) -> None:
    told = [torch.ones(1), torch.tensor([place], dtype=torch.int32)]
    with pytest.raises(ValueError, match="not in the model"):
        TopK(0.1).decode(told, [torch.Size([2, 2])])


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
async def test_a_worker_encodes_as_it_is_done_here(scheme: Scheme) -> None:
    torch.manual_seed(5)
    here, left = scheme.encode(changes(), None)
    async with wsfed.VirtualWorker("alice") as alice:
        alice.manual_seed(5)
        told, kept = scheme.encode(alice.send(changes()), None)
        for mine, theirs in zip(here, await wsfed.get(told), strict=True):
            assert torch.equal(mine, theirs)
        assert (kept is None) == (left is None)
        assert left is None or torch.equal(left, await kept.get())


# --- rounds are what the formulas say -------------------------------------------------------------


def cast_to(dtype: torch.dtype, change: torch.Tensor) -> torch.Tensor:
    return change.to(dtype).float()


def in_steps(most: int, change: torch.Tensor) -> torch.Tensor:
    scale = change.abs().max() / most
    drawn = torch.rand(change.shape)
    if scale == 0:
        return change
    return scale * (change / scale + drawn).floor().clamp(-most, most)


class Largest:
    """Top-k with memory, for each site, in plain torch."""

    def __init__(self, ratio: float) -> None:
        self.ratio, self.kept = ratio, dict[str, torch.Tensor]()

    def __call__(self, site: str, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        flat = torch.cat([part.flatten() for part in parts]) + self.kept.get(site, 0.0)
        count = -int(-self.ratio * flat.numel() // 1)
        mask = torch.zeros(flat.numel(), dtype=torch.bool)
        mask[flat.abs().topk(count, sorted=False).indices] = True  # of equal ones, torch's choice
        self.kept[site] = torch.where(mask, 0.0, flat)
        sent = torch.where(mask, flat, 0.0).split([part.numel() for part in parts])
        return [each.view_as(part) for each, part in zip(sent, parts, strict=True)]


def each_alone(formula: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda site, parts: [formula(part) for part in parts]


def a_round_here(
    model: nn.Module,
    sites: dict[str, dict[str, torch.Tensor]],
    number: int,
    update: Callable[..., Any],
    broadcast: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
) -> None:
    """A round of FedAvg in plain torch; sites train from what was broadcast."""
    states = []
    for site, rows in sites.items():
        each = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.copy_(broadcast(parameter))
        given = [parameter.detach().clone() for parameter in each.parameters()]
        trained_here(*(each, rows, SGD), site=site, round=number, epochs=1, batch_size=16)
        parts = [p.detach() - g for p, g in zip(each.parameters(), given, strict=True)]
        arrived = update(site, parts)
        with torch.no_grad():
            for parameter, own, change in zip(
                each.parameters(), model.parameters(), arrived, strict=True
            ):
                parameter.copy_(own + change)
        states.append(each.state_dict())
    rows_of_each = [len(rows["x"]) for rows in sites.values()]
    model.load_state_dict(federated.weighted_mean(states, rows_of_each))


BFLOAT = partial(cast_to, torch.bfloat16)
CASES: dict[str, tuple[Any, Callable[[], Any], Any]] = {
    "fp16": ("fp16", lambda: each_alone(partial(cast_to, torch.float16)), torch.float16),
    "bf16": (Cast("bf16"), lambda: each_alone(BFLOAT), torch.bfloat16),
    "int8": ("int8", lambda: each_alone(partial(in_steps, 127)), None),
    "int4": (Quantise(4), lambda: each_alone(partial(in_steps, 7)), None),
    "top-k": (TopK(0.2), lambda: Largest(0.2), None),
    "broadcast": (Compression(None, Cast("bf16")), lambda: each_alone(lambda x: x), torch.bfloat16),
    "both": (Compression(TopK(0.2), Cast("bf16")), lambda: Largest(0.2), torch.bfloat16),
}


@pytest.fixture
async def workers() -> AsyncIterator[list[wsfed.Worker]]:
    async with sites(
        {"alice": 40, "bob": 48, "carol": 56}, dict.fromkeys(("alice", "bob", "carol"), 64)
    ) as made:
        yield made


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_rounds_are_the_formula_in_plain_torch(
    workers: list[wsfed.Worker], case: tuple[Any, Callable[[], Any], Any]
) -> None:
    compression, make, cast = case
    model, local, update = network(), network(), make()
    broadcast = (lambda value: value) if cast is None else partial(cast_to, cast)
    await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD),
        rounds=3,
        batch_size=16,
        compression=compression,
    )
    sites = {w.id: points(40 + 8 * number, number) for number, w in enumerate(workers)}
    for number in (1, 2, 3):
        a_round_here(local, sites, number, update, broadcast)
    assert_equal(model, local)


async def test_sites_of_one_worker_keep_their_own_residuals() -> None:
    shards = [wsfed.Dataset(f"shard-{n}", points(24 + n, n)) for n in range(3)]
    model, local, update = network(), network(), Largest(0.1)
    async with wsfed.VirtualWorker("dave", datasets=shards) as dave:
        await federated.fit(
            *(model, [dave], "shard-*", F.cross_entropy, SGD),
            rounds=3,
            batch_size=16,
            compression=TopK(0.1),
        )
    sites = {f"dave/shard-{n}": points(24 + n, n) for n in range(3)}
    for number in (1, 2, 3):
        a_round_here(local, sites, number, update)
    assert_equal(model, local)


async def test_residuals_wait_for_the_round_in_which_their_site_trains_again(
    workers: list[wsfed.Worker],
) -> None:
    model, local, update = network(), network(), Largest(0.1)
    history = await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD),
        rounds=5,
        batch_size=16,
        compression=TopK(0.1),
        sampler=federated.Uniform(count=1),
    )
    rows = {w.id: points(40 + 8 * number, number) for number, w in enumerate(workers)}
    chosen = [each.sites[0].site for each in history]
    assert len(set(chosen)) < 5
    for number, site in enumerate(chosen, 1):
        a_round_here(local, {site: rows[site]}, number, update)
    assert_equal(model, local)


async def test_a_site_whose_reply_is_not_used_keeps_the_residual_that_it_had(
    workers: list[wsfed.Worker],
) -> None:
    model = network()
    recipe = Recipe(Criterion(F.cross_entropy), SGD, epochs=20)
    setup = Setup("points", None, recipe, compression=Compression(TopK(0.1)))
    async with Network(workers[:1], model, setup) as sites:
        (site,) = sites.sites
        state = {name: value.detach().clone() for name, value in state_of(model).items()}
        arguments = (state, federated.LocalTerms())
        site.keep(await site.train(*arguments, 1, federated.FedAvg()))
        kept = site._residual
        assert (await kept.get()).count_nonzero() > 0
        await site.train(*arguments, 2, federated.FedAvg())  # it came too late to be used
        assert site._residual is kept
        task = asyncio.create_task(
            site.train(*arguments, 3, federated.FedAvg(), lambda *_: task.cancel())
        )
        with pytest.raises(asyncio.CancelledError):
            await task
        assert site._residual is kept
        site.keep(await site.train(*arguments, 4, federated.FedAvg()))
        assert site._residual is not kept


async def test_the_model_travels_compressed_in_the_sequential_schedule(
    workers: list[wsfed.Worker],
) -> None:
    model, local, update = network(), network(), Largest(0.1)
    await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD),
        rounds=2,
        batch_size=16,
        schedule="sequential",
        compression=TopK(0.1),
    )
    for number in (1, 2):
        for place, worker in enumerate(workers):
            a_round_here(local, {worker.id: points(40 + 8 * place, place)}, number, update)
    assert_equal(model, local)


@pytest.mark.parametrize(
    "strategy",
    [
        *(federated.FedAsync(), federated.FedBuff(2), federated.FedAdam(), federated.QFedAvg(0.1)),
        *(federated.FedProx(0.1), federated.FedMedian(), federated.Scaffold(0.1, 3)),
    ],
    ids=lambda strategy: strategy.name,
)
async def test_strategies_see_full_values(
    workers: list[wsfed.Worker], strategy: federated.Strategy
) -> None:
    model, wanted = nn.Linear(4, 2), {"weight": torch.float32, "bias": torch.float32}
    seen: list[federated.Reply] = []
    aggregate = strategy.aggregate

    def looking(state: Any, memory: Any, replies: Any, buffers: Any = ()) -> Any:
        seen.extend(replies)
        return aggregate(state, memory, replies, buffers)

    strategy.aggregate = looking  # type: ignore[method-assign]
    is_async = isinstance(strategy, federated.FedAsync | federated.FedBuff)
    history = await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD),
        rounds=4,
        strategy=strategy,
        schedule="async" if is_async else "concurrent",
        compression="int8",
    )
    assert history[-1].loss < history[0].loss
    assert seen or isinstance(strategy, federated.MeanStrategy)
    for reply in seen:
        assert {name: value.dtype for name, value in reply.state.items()} == wanted


class Odd(nn.Module):
    """Parameters of every kind that travels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.wide = nn.Parameter(torch.randn(4, 2, generator=generator).double())
        self.narrow = nn.Parameter(torch.randn(4, 2, generator=generator).bfloat16())
        self.sixteen = nn.Parameter(torch.ones(2).half())
        self.turned = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.mean()
        self.count += 1
        out = x @ self.wide.float() + x @ self.narrow.float() + self.sixteen.float()
        made: torch.Tensor = (out * self.turned).real * self.scale + self.none.sum()
        return made


@pytest.mark.parametrize(
    "compression",
    ["fp16", "bf16", "int8", "int4", TopK(1.0), Compression(TopK(1.0), Cast("bf16"))],
    ids=str,
)
async def test_parameters_of_all_dtypes_travel(
    workers: list[wsfed.Worker], compression: Any
) -> None:
    plain, model = Odd(), Odd()
    for each, how in ((plain, None), (model, compression)):
        await federated.fit(
            *(each, workers, "points", F.cross_entropy, SGD), rounds=2, compression=how
        )
    # A step of 4 bits is a seventh of the largest change, and no change is above one here.
    near = 0.2 if compression == "int4" else 0.02
    for (name, mine), theirs in zip(
        model.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert mine.dtype is theirs.dtype
        assert torch.allclose(mine, theirs, rtol=0, atol=near), name
    assert torch.equal(model.count, plain.count)
    assert torch.equal(model.seen, plain.seen)


# --- what it is good for --------------------------------------------------------------------------


def quarrel(sign: float, rows: int, seed: int) -> dict[str, torch.Tensor]:
    """A large feature on which sites contradict each other, and a small one that is right."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (rows, 1), generator=generator).float()
    side = 2 * y - 1
    loud = torch.randn(rows, 1, generator=generator) if sign == 0 else 3 * sign * side
    return {"x": torch.cat([loud, 0.3 * side], 1), "y": y}


async def test_top_k_needs_its_memory_to_get_where_uncompressed_training_gets() -> None:
    def accuracy(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((output > 0) == (y > 0.5)).float().mean()

    async def reached(compression: Any) -> float:
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        async with AsyncExitStack() as stack:
            sites = [
                await stack.enter_async_context(
                    wsfed.VirtualWorker(
                        name,
                        datasets=[
                            wsfed.Dataset("rows", quarrel(sign, 64, 1)),
                            wsfed.Dataset("held-out", quarrel(0, 200, 2)),
                        ],
                    )
                )
                for name, sign in (("alice", 1.0), ("bob", -1.0))
            ]
            history = await federated.fit(
                *(model, sites, "rows", F.binary_cross_entropy_with_logits, SGD),
                rounds=40,
                validation="held-out",
                metrics={"accuracy": accuracy},
                evaluate_every=40,
                compression=compression,
            )
        return history[-1].metrics["accuracy"]

    assert await reached(None) == 1
    assert await reached(TopK(0.5)) == 1
    assert await reached(TopK(0.5, error_feedback=False)) < 0.8


def wide() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 200), nn.Linear(200, 2))


@pytest.mark.parametrize(
    ("compression", "up", "down"),
    [
        ("fp16", 1 / 2, 1 / 2),
        ("bf16", 1 / 2, 1 / 2),
        ("int8", 1, 1 / 4),
        ("int4", 1, 1 / 8),
        (TopK(0.01), 1, 2 / 100),
        (Compression(TopK(0.01), Cast("bf16")), 1 / 2, 2 / 100),
    ],
    ids=str,
)
async def test_the_history_shows_what_was_saved(
    workers: list[wsfed.Worker], compression: Any, up: float, down: float
) -> None:
    async def traffic(compression: Any) -> tuple[int, int]:
        history = await federated.fit(
            *(wide(), workers, "points", F.cross_entropy, SGD), rounds=3, compression=compression
        )
        sites = [site for each in history[1:] for site in each.sites]
        return sum(each.bytes_up for each in sites), sum(each.bytes_down for each in sites)

    whole, fewer = await traffic(None), await traffic(compression)
    # Beside values there are commands, replies and acknowledgements: some 600 bytes a round.
    assert fewer[0] / whole[0] == pytest.approx(up, abs=0.02)
    assert fewer[1] / whole[1] == pytest.approx(down, abs=0.02)


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compression", "same"),
    [("bf16", True), ("int8", True), (TopK(0.1, error_feedback=False), True), (TopK(0.1), False)],
    ids=str,
)
async def test_a_resumed_training_has_the_same_weights_unless_workers_kept_something(
    workers: list[wsfed.Worker], tmp_path: Path, compression: Any, same: bool
) -> None:
    async def fit(model: nn.Module, **more: Any) -> federated.History:
        return await federated.fit(
            *(model, workers, "points", F.cross_entropy, SGD),
            rounds=4,
            compression=compression,
            **more,
        )

    whole, killed, resumed = network(), network(), network()
    await fit(whole)
    with pytest.raises(Killed):
        await fit(killed, checkpoint=tmp_path, callbacks=[KilledAfter(2)])
    history = await fit(resumed, checkpoint=tmp_path, resume=True)
    assert len(history) == 4
    assert torch.equal(resumed[0].weight, whole[0].weight) is same
    if same:
        assert_equal(resumed, whole)


async def test_a_training_is_resumed_with_the_same_compression(
    workers: list[wsfed.Worker], tmp_path: Path
) -> None:
    arguments = (workers, "points", F.cross_entropy, SGD)
    await federated.fit(nn.Linear(4, 2), *arguments, rounds=1, checkpoint=tmp_path)
    with pytest.raises(wsfed.FederatedError, match='compression: None then, "Compression'):
        await federated.fit(
            *(nn.Linear(4, 2), *arguments),
            rounds=2,
            checkpoint=tmp_path,
            resume=True,
            compression="int8",
        )


# --- refused --------------------------------------------------------------------------------------


class _Began(federated.Callback):
    began = False

    def round_begins(self, number: int, sites: list[str]) -> None:
        self.began = True


async def test_what_a_worker_cannot_do_is_refused_before_the_first_round(
    workers: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsfed.worker import interpreter

    known = interpreter.lookup

    def lookup(name: str) -> Any:
        if name.endswith(".topk"):
            raise OpNotAllowed("a worker knows no operation of that name", op=name)
        return known(name)

    monkeypatch.setattr(interpreter, "lookup", lookup)
    began = _Began()
    with pytest.raises(wsfed.FederatedError, match=r"worker '.*compression=TopK\(ratio=0.01.*topk"):
        await federated.fit(
            *(nn.Linear(4, 2), workers, "points", F.cross_entropy, SGD),
            rounds=1,
            compression="top-k",
            callbacks=[began],
        )
    assert not began.began


async def test_an_update_that_cannot_be_is_rejected(workers: list[wsfed.Worker]) -> None:
    class Lying(TopK):
        def encode(self, changes: Any, residual: Any) -> Any:
            told, kept = super().encode(changes, residual)
            return [told[0], told[1] + (1000 if changes[0].numel() > 3 else 0)], kept

    with pytest.raises(wsfed.UpdateRejected, match=r"round 1: .* not in the model"):
        await federated.fit(
            *(nn.Linear(4, 2), workers, "points", F.cross_entropy, SGD),
            rounds=1,
            compression=Lying(0.1),
        )


async def test_a_model_that_diverges_is_rejected_compressed_too(
    workers: list[wsfed.Worker],
) -> None:
    for compression in ("fp16", "int8", "int4", "top-k"):
        with pytest.raises(wsfed.UpdateRejected, match="not finite"):
            await federated.fit(
                *(nn.Linear(4, 2), workers, "points", F.cross_entropy),
                partial(torch.optim.SGD, lr=float("inf")),
                rounds=3,
                compression=compression,
            )


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"privacy": federated.DP()}, r"privacy=DP\(…\) exclude each other"),
        ({"strategy": federated.FedSGD(0.1)}, "FedSGD asks for gradients"),
        ({"strategy": federated.FedMedian()}, "FedMedian compares changes number by number"),
        ({"strategy": federated.Krum(0)}, "Krum compares changes number by number"),
        ({"strategy": federated.Scaffold(0.1, 3)}, "Scaffold makes its control variates"),
    ],
    ids=["DP", "FedSGD", "FedMedian", "Krum", "Scaffold"],
)
async def test_what_makes_no_sense_together_is_refused(
    workers: list[wsfed.Worker], more: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        await federated.fit(
            *(nn.Linear(4, 2), workers, "points", F.cross_entropy, SGD),
            rounds=1,
            compression="top-k",
            **more,
        )


async def test_updates_that_are_private_already_are_compressed(
    workers: list[wsfed.Worker],
) -> None:
    history = await federated.fit(
        *(nn.Linear(4, 2), workers, "points", F.cross_entropy, SGD),
        rounds=2,
        compression=Compression(TopK(0.5), Cast("bf16")),
        privacy=federated.DPSGD(noise=0.5),
    )
    assert all(site.outcome == "used" for each in history for site in each.sites)
    assert history[-1].metrics["row_epsilon"] > 0


async def test_secure_aggregation_is_of_exact_models(
    workers: list[wsfed.Worker],
) -> None:
    keys = {worker.id: public_key(new_key()) for worker in workers}
    roster = Roster("clinics", 3, keys)
    with pytest.raises(ValueError, match=r"privacy=SecAgg\(…\) exclude each other"):
        await federated.fit(
            *(nn.Linear(4, 2), workers, "points", F.cross_entropy, SGD),
            rounds=1,
            compression="bf16",
            privacy=federated.SecAgg(roster),
        )


def test_words_are_short_for_the_commonest() -> None:
    assert compression_of(None) is None
    assert compression_of("fp16") == Compression(Cast("fp16"), Cast("fp16"))
    assert compression_of("int8") == compression_of(Quantise(8)) == Compression(Quantise(8))
    assert compression_of("top-k") == Compression(TopK(0.01))
    with pytest.raises(ValueError, match="not 'zip'"):
        compression_of("zip")
    with pytest.raises(TypeError, match="no compression"):
        compression_of(8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Cast("fp8"), ValueError),  # type: ignore[arg-type]
        (lambda: Quantise(7), ValueError),  # type: ignore[arg-type]
        (lambda: Quantise(8, "up"), ValueError),  # type: ignore[arg-type]
        (lambda: TopK(0), ValueError),
        (lambda: TopK(1.5), ValueError),
        (lambda: Compression(), ValueError),
        (lambda: Compression(8), TypeError),  # type: ignore[arg-type]
        (lambda: Compression(None, Quantise(8)), TypeError),  # type: ignore[arg-type]
    ],
)
def test_settings_are_checked(make: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make()

"""Plans: what a recorded function does is what it does without a plan, bit for bit."""

from __future__ import annotations

import asyncio
import copy
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.pointers.oracle import assert_same, assert_same_bits, assert_same_grad
from tests.steps import LABELS, OPTIMIZERS, ROWS, model, step_of
from wsfed import sync

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bob() -> Iterator[sync.VirtualWorker]:
    data = wsfed.Dataset("points", {"x": ROWS, "y": LABELS})
    open_data = wsfed.Dataset("open", {"x": ROWS, "y": LABELS}, open=True)
    with sync.VirtualWorker("bob", datasets=[data, open_data]) as worker:
        yield worker


@pytest.fixture
def alice() -> Iterator[sync.VirtualWorker]:
    with sync.VirtualWorker("alice") as worker:
        yield worker


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_a_plan_is_training(name: str, bob: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())
    here, there = OPTIMIZERS[name](local.parameters()), OPTIMIZERS[name](remote.parameters())
    train, plan = step_of(local, here), wsfed.plan(step_of(remote, there))
    for place in range(8):
        size = 10 if place != 5 else 4
        # Copies: matrix kernels promise equal bits for equally aligned memory only.
        x, y = ROWS[place * 5 :][:size].clone(), LABELS[place * 5 :][:size].clone()
        assert_same_bits(plan(bob.send(x), bob.send(y)).detach(), train(x, y))
    for one, other in zip(remote.parameters(), local.parameters(), strict=True):
        assert_same_bits(one.detach(), other)
        assert_same_grad(one, other)
    for one, other in zip(remote.buffers(), local.buffers(), strict=True):
        assert_same_bits(one, other)


def test_a_plan_is_recorded_once_for_each_kind_of_call(bob: sync.VirtualWorker) -> None:
    recorded = []

    @wsfed.plan
    def scaled(x: Any, by: float = 2.0) -> Any:
        recorded.append(tuple(x.shape))
        return x * by

    for _ in range(3):
        assert scaled(bob.send(torch.ones(2))).get().tolist() == [2, 2]
    assert recorded == [(2,)]
    assert scaled(bob.send(torch.ones(3)), by=3.0).get().tolist() == [3, 3, 3]
    assert scaled(bob.send(torch.ones(2, dtype=torch.int64))).get().tolist() == [2, 2]
    with torch.no_grad():
        scaled(bob.send(torch.ones(2)))
    assert len(recorded) == 4
    assert scaled.__name__ == "scaled"


def test_a_call_is_one_small_message(bob: sync.VirtualWorker) -> None:
    remote = bob.send(model())
    plan = wsfed.plan(step_of(remote, torch.optim.SGD(remote.parameters(), lr=0.1)))
    x, y = bob.send(ROWS[:10]), bob.send(LABELS[:10])
    for _ in range(3):
        plan(x, y)
    bob.flush()
    before = bob.traffic[0]
    for _ in range(10):
        plan(x, y)
    bob.flush()
    assert (bob.traffic[0] - before) / 10 < 250


def test_training_and_evaluating_are_told_apart(bob: sync.VirtualWorker) -> None:
    local = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5))
    remote = bob.send(copy.deepcopy(local))
    plan = wsfed.plan(lambda x: remote(x))
    for _ in range(2):
        for seed in (1, 2):
            bob.manual_seed(seed)
            got = plan(bob.send(ROWS)).get().detach()
            torch.manual_seed(seed)
            assert_same_bits(got, local(ROWS))
        remote.eval()
        local.eval()


def test_a_rate_that_changes_between_calls_is_followed(bob: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())
    pairs = []
    for net in (local, remote):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        pairs.append(
            (step_of(net, optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        )
    (train, here), (step, there) = pairs
    plan = wsfed.plan(step)
    for _ in range(5):
        assert_same_bits(plan(bob.send(ROWS), bob.send(LABELS)).detach(), train(ROWS, LABELS))
        here.step()
        there.step()
    assert len(plan.programs) == 2


def test_gradients_accumulate_and_are_clipped(bob: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())

    def over(net: nn.Module) -> Callable[..., Any]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        def step(x: Any, y: Any) -> Any:
            for part in range(2):
                F.cross_entropy(net(x[part::2]), y[part::2]).backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            return norm

        return step

    train, plan = over(local), wsfed.plan(over(remote))
    for _ in range(4):
        assert_same_bits(plan(bob.send(ROWS), bob.send(LABELS)), train(ROWS, LABELS))
    assert all(p.grad is None for p in remote.parameters())


def test_a_plan_runs_where_its_model_is(bob: sync.VirtualWorker, alice: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())
    here, there = OPTIMIZERS["Adam"](local.parameters()), OPTIMIZERS["Adam"](remote.parameters())
    train, plan = step_of(local, here), wsfed.plan(step_of(remote, there))
    for worker in (bob, alice, bob):
        sync.move(remote, worker)
        for _ in range(2):
            got = plan(worker.send(ROWS), worker.send(LABELS))
            assert_same_bits(got.detach(), train(ROWS, LABELS))
    assert len({program.hash for program in plan.programs}) == len(plan.programs)


def test_results_are_part_of_the_graph(bob: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())
    plan = wsfed.plan(lambda x: {"out": remote(x), "same": x, "none": None, "two": 2})
    for _ in range(3):
        x, far = ROWS.clone().requires_grad_(), bob.send(ROWS.clone().requires_grad_())
        got = plan(far)
        assert got["same"] is far and got["none"] is None and got["two"] == 2
        assert got["out"].requires_grad and not got["out"].is_leaf
        (got["out"] * 2).sum().backward()
        (local(x) * 2).sum().backward()
        assert_same_grad(far, x)
    for one, other in zip(remote.parameters(), local.parameters(), strict=True):
        assert_same_grad(one, other)


def test_a_plan_inside_a_plan_is_part_of_it(bob: sync.VirtualWorker) -> None:
    inner = wsfed.plan(lambda x: x * 2)
    outer = wsfed.plan(lambda x: inner(x) + 1)
    for _ in range(2):
        assert outer(bob.send(torch.ones(2))).get().tolist() == [3, 3]
    assert inner.programs == [] and len(outer.programs) == 1


def test_double_backward_in_a_plan(bob: sync.VirtualWorker) -> None:
    def penalty(x: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        loss = (gradient.norm() - 1) ** 2
        loss.backward()
        return loss

    plan = wsfed.plan(penalty)
    for _ in range(3):
        x = torch.randn(4, requires_grad=True)
        far = bob.send(x)
        assert_same(plan(far).detach(), penalty(x).detach())
        assert_same_grad(far, x)


def test_shapes_that_depend_on_values_are_told_at_each_call(bob: sync.VirtualWorker) -> None:
    plan = wsfed.plan(lambda x: x.nonzero())
    for values in ([1, 0, 1], [1, 1, 1], [0, 0, 0]):
        x = torch.tensor(values)
        assert_same_bits(plan(bob.send(x)), x.nonzero())


def test_autocast_in_a_plan(bob: sync.VirtualWorker) -> None:
    local, remote = nn.Linear(6, 6), None
    remote = bob.send(copy.deepcopy(local))

    def step(layer: nn.Module, x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(layer(x))
        with torch.no_grad():
            shifted = y.float() + 1
        y.float().sum().backward()
        return y, shifted

    plan = wsfed.plan(lambda x: step(remote, x))
    for _ in range(3):
        got = plan(bob.send(ROWS))
        bob.flush()  # the end of a region of autocast anywhere forgets what others have converted
        expected = step(local, ROWS)
        assert_same_bits(got[0].detach(), expected[0])
        assert_same_bits(got[1], expected[1])
        assert_same_grad(remote.weight, local.weight)


class Warm(torch.optim.Optimizer):
    """Counts its steps in an attribute."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / self.count)
                    if p.ndim > 1 and self.count > 4:
                        p.mul_(0.9)


def test_an_optimizer_of_ones_own_is_asked_in_full_and_once(bob: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())
    here, there = (
        Warm(reversed(list(local.parameters()))),
        Warm(reversed(list(remote.parameters()))),
    )
    train, plan = step_of(local, here), wsfed.plan(step_of(remote, there))
    for place in range(9):
        got = plan(bob.send(ROWS), bob.send(LABELS))
        assert_same_bits(got.detach(), train(ROWS, LABELS))
        assert there.count == place + 1


def test_hooks_of_an_optimizer_run_once_a_call(bob: sync.VirtualWorker) -> None:
    remote = bob.send(nn.Linear(6, 3))
    optimizer = torch.optim.Adam(remote.parameters())
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    plan = wsfed.plan(step_of(remote, optimizer))
    for _ in range(6):
        plan(bob.send(ROWS), bob.send(LABELS))
    assert len(calls) == 6


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad", "SGD"])
def test_optimizers_over_lists_step_in_a_plan(name: str, bob: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())
    pairs = [
        (net, getattr(torch.optim, name)(net.parameters(), lr=0.01, foreach=True))
        for net in (local, remote)
    ]
    train, plan = step_of(*pairs[0]), wsfed.plan(step_of(*pairs[1]))
    for _ in range(5):
        got = plan(bob.send(ROWS), bob.send(LABELS))
        assert_same_bits(got.detach(), train(ROWS, LABELS))


def test_layers_and_settings_that_are_replaced_are_noticed(bob: sync.VirtualWorker) -> None:
    net = bob.send(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.0)))
    plan = wsfed.plan(lambda x: net(x))
    x = bob.send(ROWS)
    plan(x)
    other = nn.Linear(6, 3)
    net[0] = bob.send(copy.deepcopy(other))
    assert_same_bits(plan(x).detach(), other(ROWS))
    net[1].p = 1.0
    assert plan(x).get().count_nonzero() == 0


def test_equal_arguments_that_are_not_the_same_are_told_apart(bob: sync.VirtualWorker) -> None:
    plan = wsfed.plan(lambda x, by: x * by)
    x = bob.send(torch.ones(1))
    for by in (0.0, -0.0, float("nan"), 1, True, 1.0):
        for _ in range(2):
            assert_same_bits(plan(x, by), torch.ones(1) * by)
    assert len(plan.programs) <= 6


def test_a_method_can_be_a_plan(bob: sync.VirtualWorker, tmp_path: Path) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.net = bob.send(nn.Linear(6, 1))

        @wsfed.plan
        def total(self, x: Any, y: Any) -> Any:
            return self.net(x).sum()

    one, two = Trainer(), Trainer()
    assert one.total is one.total and one.total is not two.total
    sums = bob.dataset("points").run(one.total, batch_size=25).result()
    assert sums.shape == (2,)
    assert one.total(bob.send(ROWS), bob.send(LABELS)).get().shape == ()
    assert len(one.total.programs) == 2 and not two.total.programs
    one.total.save(tmp_path / "total.plan", net=one.net)


def test_what_is_no_plan_is_told(bob: sync.VirtualWorker) -> None:
    with pytest.raises(TypeError, match=r"decorate it with @wsfed\.plan"):
        bob.dataset("points").run(lambda x, y: x.sum(), batch_size=10)
    for function in (5, None):
        with pytest.raises(TypeError, match="ordinary function"):
            wsfed.plan(function)  # type: ignore[arg-type]
    assert wsfed.plan(torch.relu)(bob.send(torch.ones(2))).get().tolist() == [1, 1]


def test_threads_may_share_a_plan(bob: sync.VirtualWorker) -> None:
    layer = bob.send(nn.Linear(6, 1))
    plan = wsfed.plan(lambda x: torch.relu(layer(x) * 2).sum())
    expected = plan(bob.send(ROWS)).get()

    def work(_: int) -> bool:
        return all(torch.equal(plan(bob.send(ROWS)).get(), expected) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_more_plans_than_a_worker_keeps_are_shipped_again(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(1))
    scaled = wsfed.plan(lambda x, by: x * by)
    kept = [wsfed.plan(lambda x, by=by: x + by) for by in range(600)]
    for _ in range(2):
        for each in kept:
            got = each(x)
        assert got.get().item() == 600  # of the last one
    assert scaled(x, 2.0).get().item() == 2


async def test_values_are_refused_with_the_line_where_results_are_awaited() -> None:
    async with wsfed.VirtualWorker("carol") as carol:
        x = carol.send(torch.ones(2))
        for function in (
            lambda x: x if x.sum() > 0 else -x,
            lambda x: x * x.sum().item(),
            lambda x: int(x[0]),
            lambda x: x.tolist(),
        ):
            with pytest.raises(wsfed.PlanError, match=r"recorded, not run.*test_plans\.py:\d+"):
                wsfed.plan(function)(x)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_plan_comes_back_from_a_file(
    name: str, bob: sync.VirtualWorker, alice: sync.VirtualWorker, tmp_path: Path
) -> None:
    local, remote = model(), bob.send(model())
    here, there = OPTIMIZERS[name](local.parameters()), OPTIMIZERS[name](remote.parameters())
    train, plan = step_of(local, here), wsfed.plan(step_of(remote, there))
    for _ in range(3):
        plan(bob.send(ROWS), bob.send(LABELS))
    plan.save(tmp_path / "step.plan", net=remote, optimizer=there)

    other = alice.send(model())
    optimizer = OPTIMIZERS[name](other.parameters())
    loaded = wsfed.load_plan(tmp_path / "step.plan", net=other, optimizer=optimizer)
    for _ in range(3):
        got = loaded(alice.send(ROWS), alice.send(LABELS))
        assert_same_bits(got.detach(), train(ROWS, LABELS))
    for one, two in zip(other.parameters(), local.parameters(), strict=True):
        assert_same_grad(one, two)
    assert {each.hash for each in loaded.programs} <= {each.hash for each in plan.programs}
    with pytest.raises(wsfed.PlanError, match=r"no such call; there is \(float32\[50, 6\], int64"):
        loaded(alice.send(ROWS[:3]), alice.send(LABELS[:3]))
    path = tmp_path / "step.plan"
    with pytest.raises(wsfed.PlanError, match=r"'optimizer' is a Rprop, and was a"):
        rprop = OPTIMIZERS["Rprop"](other.parameters())
        wsfed.load_plan(path, net=other, optimizer=rprop)
    with pytest.raises(wsfed.PlanError, match="over other parameters"):
        wsfed.load_plan(path, net=other, optimizer=there)
    with pytest.raises(wsfed.PlanError, match="not saved with more="):
        wsfed.load_plan(path, net=other, optimizer=optimizer, more=1)


def test_what_a_file_lacks_is_named(bob: sync.VirtualWorker, tmp_path: Path) -> None:
    remote = bob.send(model())
    plan = wsfed.plan(lambda x: remote(x))
    path = tmp_path / "forward.plan"
    with pytest.raises(wsfed.PlanError, match="call it once"):
        plan.save(path)
    plan(bob.send(ROWS))
    with pytest.raises(wsfed.PlanError, match="name its owner"):
        plan.save(path)
    plan.save(path, net=remote)
    with pytest.raises(wsfed.PlanError, match="net="):
        wsfed.load_plan(path)
    with pytest.raises(wsfed.PlanError, match=r"'net/0.weight' is float32\[8, 7\], and was"):
        other = nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        wsfed.load_plan(path, net=other)
    local = wsfed.load_plan(path, net=model())
    with pytest.raises(wsfed.PointerError, match="send it first"):
        local(bob.send(ROWS))
    for damaged in (b"", b"nonsense", path.read_bytes()[:-7], b"\x93\x01\x02\x03"):
        path.write_bytes(damaged)
        with pytest.raises(wsfed.PlanError, match=r"plan '.*forward\.plan'"):
            wsfed.load_plan(path, net=remote)


def test_a_plan_prints_its_program(bob: sync.VirtualWorker) -> None:
    remote = bob.send(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(remote.parameters(), lr=0.25)
    plan = wsfed.plan(step_of(remote, optimizer))
    assert str(plan) == "plan step: not recorded yet"
    plan(bob.send(ROWS), bob.send(LABELS))
    text = str(plan)
    assert "linear(x, weight, bias)" in text
    assert "backward(" in text
    assert "weight = Tensor.add_(weight, " in text and "alpha=-0.25)  # no_grad" in text
    assert text.splitlines()[0].startswith("plan step (")
    assert "return " in text


# --- mistakes -------------------------------------------------------------------------------------


def test_control_flow_on_values_names_its_line(bob: sync.VirtualWorker) -> None:
    @wsfed.plan
    def absolute(x: Any) -> Any:
        if x.sum() > 0:
            return x
        return -x

    with pytest.raises(wsfed.PlanError, match=r"torch\.where.*test_plans\.py:\d+"):
        absolute(bob.send(torch.ones(2)))
    fetched = wsfed.plan(lambda x: x.get())
    with pytest.raises(wsfed.PlanError, match="recorded, not run"):
        fetched(bob.send(torch.ones(2)))
    loop = wsfed.plan(lambda x: [x * place for place in range(3)])  # unrolled
    assert [each.get().item() for each in loop(bob.send(torch.tensor(2.0)))] == [0, 2, 4]


def test_a_failing_step_names_its_line_and_that_of_the_call(bob: sync.VirtualWorker) -> None:
    @wsfed.plan
    def rows(table: Any, places: Any) -> Any:
        doubled = table * 2
        return F.embedding(places, doubled).sum()

    table = bob.send(torch.ones(3, 2))
    assert rows(table, bob.send(torch.tensor([0, 2]))).get() == 8
    with pytest.raises(wsfed.RemoteError) as caught:
        rows(table, bob.send(torch.tensor([0, 7]))).get()
    assert caught.value.type == "IndexError"
    assert caught.value.op == "torch.nn.functional.embedding"
    assert caught.value.site.count("test_plans.py:") == 2 and "'rows'" in caught.value.site
    assert rows(table, bob.send(torch.tensor([0, 1]))).get() == 8


def test_what_raises_while_it_is_recorded_happens_as_without_a_plan(
    bob: sync.VirtualWorker,
) -> None:
    layer = bob.send(nn.Linear(6, 3))

    @wsfed.plan
    def step(x: Any) -> Any:
        layer(x).sum().backward()
        return x @ layer.weight

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(bob.send(torch.ones(2, 6)))
    assert layer.bias.grad.get().tolist() == [2, 2, 2]


def test_a_step_that_raises_later_leaves_what_came_before(bob: sync.VirtualWorker) -> None:
    layer = bob.send(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    plan = wsfed.plan(step_of(layer, optimizer))
    x, y = bob.send(ROWS), bob.send(LABELS)
    for _ in range(2):
        plan(x, y)
    weight, gradient = layer.weight.get(), layer.weight.grad.get()
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan(x, y)
    assert torch.equal(layer.weight.get(), weight)
    assert not torch.equal(layer.weight.grad.get(), gradient)


def test_wrong_arguments_are_told(bob: sync.VirtualWorker, alice: sync.VirtualWorker) -> None:
    plan = wsfed.plan(lambda x, y: x + y)
    x = bob.send(torch.ones(2))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        plan(x)
    with pytest.raises(wsfed.PlanError, match="send this tensor first"):
        plan(x, torch.ones(2))
    with pytest.raises(wsfed.NotCollocated, match="'bob' and 'alice'"):
        plan(x, alice.send(torch.ones(2)))
    captured = alice.send(torch.ones(2))
    with pytest.raises(wsfed.NotCollocated, match="'bob' and 'alice'"):
        wsfed.plan(lambda x: (x + 1, captured + 1))(x)
    with pytest.raises(wsfed.ConstantTooLarge):
        wsfed.plan(lambda x: x + torch.ones(100_000))(bob.send(torch.ones(1)))
    with pytest.raises(TypeError, match="ordinary function"):
        wsfed.plan(asyncio.sleep)
    alice.close()
    with pytest.raises(wsfed.ConnectionLost):
        plan(captured, captured)


def test_what_is_done_once_and_would_be_missed_later_is_refused(bob: sync.VirtualWorker) -> None:
    layer = bob.send(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train = step_of(layer, optimizer)

    def scheduled(x: Any, y: Any) -> Any:
        loss = train(x, y)
        scheduler.step()
        return loss

    x, y = bob.send(ROWS), bob.send(LABELS)
    with pytest.raises(wsfed.PlanError, match=r"scheduler\.step\(\) behind the call"):
        wsfed.plan(scheduled)(x, y)
    with pytest.raises(wsfed.PlanError, match="closure"):
        wsfed.plan(lambda x, y: optimizer.step(lambda: train(x, y)))(x, y)
    kept: list[Any] = []
    keeping = wsfed.plan(lambda x: (kept.append(x * 2), x + 1)[1])
    keeping(x)  # as a cache that is filled once
    with pytest.raises(wsfed.PlanError, match=r"return it instead \(at .*test_plans\.py:\d+"):
        keeping(x)
    with pytest.raises(wsfed.PlanError, match=r"tag has no place in a plan"):
        wsfed.plan(lambda x: x.tag("#no"))(x)
    with pytest.raises(wsfed.PlanError, match=r"sending has no place in it.*test_plans\.py:\d+"):
        wsfed.plan(lambda x: x + bob.send(torch.ones(2)))(x)


# --- memory ---------------------------------------------------------------------------------------


def test_a_thousand_plans_leave_nothing(bob: sync.VirtualWorker) -> None:
    session = next(iter(bob._node._sessions.values())).interpreter
    x = bob.send(torch.ones(4))
    bob.flush()
    objects = len(session.store)
    for number in range(1000):
        plan = wsfed.plan(lambda x, n=number: x * (n + 0.5))
        plan(x)
        del plan
    gc.collect()
    bob.flush()
    bob.flush()
    assert len(session.store) == objects
    assert len(session._shelf._kept) <= 1
    assert len(bob.link.plans) <= 1

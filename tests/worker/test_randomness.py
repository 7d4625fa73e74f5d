"""Each session draws what local torch draws from its seed, whatever others draw."""

from __future__ import annotations

import threading

import torch

from wsfed.worker.randomness import SessionRandom

CPU = torch.device("cpu")


def draw(session: SessionRandom) -> torch.Tensor:
    with session.drawing():
        return torch.rand(3)


def test_sessions_draw_from_their_own_seed_and_leave_torch_as_it_was() -> None:
    torch.manual_seed(7)
    expected = [torch.rand(3) for _ in range(3)]
    before = torch.get_rng_state()
    one, other = SessionRandom(CPU), SessionRandom(CPU)
    one.seed(7)
    other.seed(7)
    for value in expected:
        assert torch.equal(draw(one), value)
        assert torch.equal(draw(other), value)
    assert torch.equal(torch.get_rng_state(), before)


def test_sessions_without_a_seed_draw_different_numbers() -> None:
    assert not torch.equal(draw(SessionRandom(CPU)), draw(SessionRandom(CPU)))


def test_threads_that_draw_at_once_do_not_disturb_each_other() -> None:
    torch.manual_seed(3)
    expected = [torch.rand(3) for _ in range(200)]
    drawn: list[list[torch.Tensor]] = [[] for _ in range(4)]

    def work(into: list[torch.Tensor]) -> None:
        session = SessionRandom(CPU)
        session.seed(3)
        into += [draw(session) for _ in range(200)]

    threads = [threading.Thread(target=work, args=(each,)) for each in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in drawn:
        assert all(map(torch.equal, each, expected))

"""Objects of a session: found, shared, poisoned, counted, labelled."""

from __future__ import annotations

import pytest
import torch

from wsfed.errors import NotFound, QuotaExceeded, RemoteError
from wsfed.worker.store import Failure, Poisoned, Store, poison_of

FAILURE = Failure("RemoteError", "RuntimeError", "no", "torch.add", (), 3, 0)


def store(max_bytes: int = 10**9, max_objects: int = 1000) -> Store:
    return Store(max_bytes, max_objects)


def test_what_is_put_is_found_until_it_is_deleted() -> None:
    objects, tensor = store(), torch.ones(2)
    objects.put(1, tensor)
    assert objects.tensor(1) is tensor and 1 in objects and len(objects) == 1
    objects.delete([1, 99])
    with pytest.raises(NotFound, match="no object 1"):
        objects.tensor(1)


def test_a_poisoned_object_tells_its_failure() -> None:
    objects = store()
    objects.put(1, torch.ones(2))
    objects.poison([1, 2], FAILURE)
    for id in (1, 2):
        with pytest.raises(Poisoned) as caught:
            objects.tensor(id)
        assert caught.value.failure is FAILURE


def test_the_quota_counts_memory_and_not_views() -> None:
    objects, tensor = store(max_bytes=5000), torch.ones(1000)
    objects.put(1, tensor)
    for id in range(2, 50):
        objects.put(id, tensor[id:])
    with pytest.raises(QuotaExceeded, match="5,000 bytes of this session"):
        objects.put(50, torch.ones(1000))
    assert 50 not in objects
    objects.delete(range(1, 50))
    objects.put(50, torch.ones(1000))


def test_room_comes_back_when_an_identifier_is_bound_anew() -> None:
    objects = store(max_bytes=5000)
    for _ in range(10):
        objects.put(1, torch.ones(1000))
    assert objects.has_room(900) and not objects.has_room(2000)


def test_objects_are_counted() -> None:
    objects = store(max_objects=2)
    objects.put(1, torch.ones(1))
    objects.put(2, torch.ones(1))
    with pytest.raises(QuotaExceeded, match="at most 2 objects"):
        objects.put(3, torch.ones(1))


def test_labels_stay_with_an_identifier_and_reach_what_shares_its_memory() -> None:
    objects, tensor = store(), torch.ones(4)
    objects.put(1, tensor)
    objects.put(2, tensor[1:])
    objects.put(3, torch.ones(4))
    objects.label_storage(tensor, frozenset({"rows"}))
    assert objects.entry(1).labels == objects.entry(2).labels == {"rows"}
    assert not objects.entry(3).labels
    objects.put(1, torch.zeros(4))
    assert objects.entry(1).labels == {"rows"}


def test_tags_find_objects_that_have_all_of_them() -> None:
    objects = store()
    for id, tags in ((1, ["a", "b"]), (2, ["a"]), (3, [])):
        objects.put(id, torch.ones(1))
        objects.entry(id).tags = list(tags)
    assert [id for id, *_ in objects.tagged(["a"])] == [1, 2]
    assert [id for id, *_ in objects.tagged(["a", "b"])] == [1]
    assert [id for id, *_ in objects.tagged([])] == [1, 2]


def test_a_failure_keeps_the_class_of_our_own_errors_and_the_name_of_others() -> None:
    ours = poison_of(NotFound("gone"), "get", (), (1, 2))
    assert (ours.error, ours.message, ours.seq, ours.index) == ("NotFound", "gone", 1, 2)
    other = poison_of(RuntimeError("x" * 5000), "torch.add", ("float32[2]",), (1, 2))
    assert (other.error, other.type) == ("RemoteError", "RuntimeError")
    assert len(other.message) == 2000
    canned = poison_of(RemoteError("canned", type="IndexError"), "torch.add", (), (1, 2))
    assert canned.message == "canned" and canned.type == "IndexError"

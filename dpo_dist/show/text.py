"""Token ids → text that shows what is not seen otherwise: which tokens count, special tokens, line ends, blanks."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

EDGE_CHARACTERS = 600                    # shown of the beginning and of the end of a long text
EDGE_IDS = 6


@dataclass(frozen=True)
class Piece:
    """A stretch of text of one kind."""

    text: str
    counted: bool = False                # its tokens are learned
    special: bool = False                # one token that stands for itself: <|im_end|>
    note: bool = False                   # no text of the row, but about it


def decode(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """The text of ids that stand after others, special tokens included. (Alone, some tokenizers drop a first space; and
    a character may take several tokens, so only all that stands before tells where characters begin.)"""
    def plain(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return plain([*before, *ids])[len(plain(before)) if before else 0:]


def pieces_of(tokenizer: Any | None, ids: Sequence[int], before: Sequence[int], counts: Sequence[bool]) -> list[Piece]:
    """The text of ids that stand after `before`, by kind; without a tokenizer the ids themselves."""
    special = set() if tokenizer is None else {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    pieces: list[Piece] = []
    for (counted, is_special), group in groupby(range(len(ids)), lambda i: (counts[i], ids[i] in special)):
        places = list(group)
        run = ids[places[0]:places[-1] + 1]
        if tokenizer is None:
            text = ("" if not pieces else " ") + " ".join(map(str, run))
        else:
            text = decode(tokenizer, run, [*before, *ids[:places[0]]])
        pieces.append(Piece(text, counted, is_special))
    return pieces


def shortened(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces without the middle of a long text, and a note of what it was."""
    total = sum(len(piece.text) for piece in pieces)
    if total <= 3 * EDGE_CHARACTERS:
        return list(pieces)
    tail = _first([replace(piece, text=piece.text[::-1]) for piece in reversed(pieces)])
    note = Piece(f" … {total - 2 * EDGE_CHARACTERS:,} more characters … ", note=True)
    return [*_first(pieces), note, *(replace(piece, text=piece.text[::-1]) for piece in reversed(tail))]


def _first(pieces: Iterable[Piece]) -> list[Piece]:
    """The first EDGE_CHARACTERS of the text."""
    taken, room = [], EDGE_CHARACTERS
    for piece in pieces:
        if room <= 0:
            break
        taken.append(replace(piece, text=piece.text[:room]))
        room -= len(piece.text)
    return taken


def visible(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with line ends as ⏎, blanks at both ends of the whole as ␣, and what cannot be printed escaped."""
    shown = [replace(piece, text="".join(map(_visible, piece.text))) for piece in pieces]
    if shown:
        first = shown[0].text
        shown[0] = replace(shown[0], text="␣" * (len(first) - len(first.lstrip(" "))) + first.lstrip(" "))
        last = shown[-1].text
        shown[-1] = replace(shown[-1], text=last.rstrip(" ") + "␣" * (len(last) - len(last.rstrip(" "))))
    return shown


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    # the two joiners shape Indic and Persian words, and emojis
    if character.isprintable() or character in "\t\u200c\u200d":
        return character
    return character.encode("unicode_escape").decode()


def ids_line(ids: Sequence[int]) -> str:
    """The ids, of many the first and the last few: where texts meet is what can go wrong."""
    if len(ids) <= 3 * EDGE_IDS:
        return " ".join(map(str, ids))
    return f"{' '.join(map(str, ids[:EDGE_IDS]))} … {' '.join(map(str, ids[-EDGE_IDS:]))}"

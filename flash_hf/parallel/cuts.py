# SPDX-License-Identifier: Apache-2.0
"""Where rows and their documents are cut: what each process tells of its piece, and what follows for all."""

import torch
from torch import Tensor


# What is known of a row of one piece: real tokens; whether a document starts among them; how many come before the
# first start, and from the last start on; the end of the last real column; the given position of the first one, or -1.
FACTS = ("count", "starts", "lead", "after", "end", "position")


def facts_of(
    batch: int, length: int, valid_BN: Tensor | None, position_BN: Tensor | None
) -> tuple[list[list[int]], Tensor | None]:
    """The `FACTS` of every row of this piece, and where documents start, bool `[B, N]`, or None."""
    if valid_BN is None and position_BN is None:
        return [[length, 0, length, 0, length, -1]] * batch, None
    if valid_BN is None:
        valid_BN = torch.ones(batch, length, dtype=torch.bool, device=position_BN.device)
    rank_BN = valid_BN.cumsum(1) - 1
    count_B = rank_BN[:, -1] + 1
    column_N = torch.arange(length, device=valid_BN.device)
    end_B = torch.where(valid_BN, column_N + 1, 0).amax(1)
    start_BN, none = None, torch.zeros_like(count_B)
    starts_B, lead_B, after_B, position_B = none, count_B, none, none - 1
    if position_BN is not None:
        start_BN = valid_BN & (position_BN == 0)
        starts_B = start_BN.any(1)
        lead_B = torch.where(start_BN, rank_BN, count_B[:, None]).amin(1)
        after_B = torch.where(starts_B, count_B - torch.where(start_BN, rank_BN, -1).amax(1), 0)
        position_B = first_positions(valid_BN, position_BN)
    return torch.stack([count_B, starts_B.long(), lead_B, after_B, end_B, position_B], 1).tolist(), start_BN


def first_positions(valid_BN: Tensor, position_BN: Tensor) -> Tensor:
    """The given position of every row's first real token, 0 without one, int64 `[B]`."""
    first_B1 = valid_BN.long().argmax(1, keepdim=True)
    return torch.where(valid_BN.any(1), position_BN.expand_as(valid_BN).gather(1, first_B1)[:, 0], 0)


class Cuts:
    """Rows and their documents at the cuts 0 ... size, cut c before piece c; int64 or bool `[pieces or cuts, B]` on
    the CPU.

    Attributes:
        count, starts, lead, end: the `FACTS` of the pieces.
        seen: tokens of the open document before each cut.
        rest: tokens after the cut that continue it.
        continues: whether that document is still open: no other starts at the next real token.
        ends: whether no real token follows.
    """

    def __init__(self, facts: list[list[list[int]]]):
        table = torch.tensor(facts)
        size, B, _ = table.shape
        self.count, starts, self.lead, after, self.end, self.position = table.unbind(2)
        self.starts = starts.bool()
        none = torch.zeros(B, dtype=torch.long)
        seen, rest, follows = [none], [none], [none]  # follows: 0 nothing, 1 a start, 2 the same document
        for q in range(size):
            seen.append(torch.where(self.starts[q], after[q], seen[-1] + self.count[q]))
        for q in reversed(range(size)):
            rest.insert(0, torch.where(self.starts[q], self.lead[q], self.count[q] + rest[0]))
            opens = self.starts[q] & (self.lead[q] == 0)
            follows.insert(0, torch.where(self.count[q] > 0, torch.where(opens, 1, 2), follows[0]))
        self.seen, self.rest, follows = torch.stack(seen), torch.stack(rest), torch.stack(follows)
        self.continues = (self.seen > 0) & (follows != 1)
        self.ends = follows == 0

    def unexpected(self) -> str | None:
        """An error message if given positions do not count on from piece to piece."""
        wrong = (self.position > 0) & (self.position != self.seen[:-1]) & (self.count > 0)
        if not bool(wrong.any()):
            return None
        piece, row = (int(index) for index in wrong.nonzero()[0])
        return (
            f"position_ids must count on over the pieces: row {row} continues at {int(self.position[piece, row])} in "
            f"piece {piece}, expected {int(self.seen[piece, row])}, or 0 for a new document."
        )

    def is_plain(self, length: int) -> bool:
        """Whether every row is one document without padding, in pieces of this length."""
        first = ~self.starts[0] | (self.lead[0] == 0) & (self.seen[1] == length)
        return bool((self.count == length).all() & first.all() & ~self.starts[1:].any())

    @property
    def packed(self) -> bool:
        """Whether a document starts behind a row's first token."""
        later = (self.seen[1:] != self.count) | (self.count.cumsum(0) > self.count)
        return bool((self.starts & later).any())

    def same(self, giver: int, taker: int) -> Tensor:
        """Whether the sum that a piece gives is of the document that another piece takes it for, bool `[B]`: of the
        giver's last document for a later piece, or of its first for an earlier one."""
        between = self.starts[min(giver, taker) + 1 : max(giver, taker)].any(0)
        if giver < taker:
            return self.continues[taker] & ~between
        return self.continues[taker + 1] & ~between & ~(self.starts[giver] & (self.lead[giver] == 0))

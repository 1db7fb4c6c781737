# SPDX-License-Identifier: Apache-2.0
"""From tokens to documents and chunks: padding, packing and the phase of a decoding cache become index maps here.

The rule of this file (spec: "Documents, padding and packing"): the chunk grid of a document starts at its first real
token (or a fixed number of empty slots before it), positions count real tokens, and padding has no slot. Attention
sees chunks and documents only, never padding.

Alphabet: B rows, N tokens of this call, G chunks, C slots of a chunk, M keys (quadratic attention), F any features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


def is_tracing() -> bool:
    """Whether a graph is being captured, so that no tensor may be read on the host."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Movable:
    """A bundle of tensors that accelerate can move between devices as one (it calls `.to`)."""

    def to(self, device, non_blocking: bool = False, **kwargs):
        def move(value):
            if isinstance(value, tuple):
                return tuple(move(part) for part in value)
            return value.to(device, non_blocking=non_blocking) if isinstance(value, (Tensor, Movable)) else value

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Documents(Movable):
    """The document and the position of every token of this call.

    Attributes:
        position_BN: index of the token in its document, int64 `[B or 1, N]`; at padding, some valid position.
        valid_BN: False at padding, bool `[B, N]`; None if every token is real.
        start_BN: True at the first token of a document that does not continue the row's earlier one, bool `[B, N]`;
            None if each row is one document (possibly continued from the cache).
        seen_B: tokens of each row's open document that the cache holds, int64 `[B]`; None without a cache, or when it
            is empty.
    """

    position_BN: Tensor
    valid_BN: Tensor | None = None
    start_BN: Tensor | None = None
    seen_B: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Every row is one whole document without padding: the grid is a reshape."""
        return self.valid_BN is None and self.start_BN is None and self.seen_B is None


def check_mask(
    attention_mask: Tensor, batch: int, length: int, past_length: int | Tensor, seen_B: Tensor | None = None
) -> Tensor | None:
    """The part `[B, N]` of the 2-D padding mask that belongs to this call, as bool; None if all its tokens are real.

    Raises:
        ValueError: not a tensor of 2 dimensions, of another shape, with values other than 0 and 1, or with fewer real
            tokens than the cache has seen.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        got = (
            f"{attention_mask.ndim} dimensions"
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise ValueError(
            f"attention_mask must be a 2-D padding mask (batch, tokens) with 1 at real tokens, got {got}. FLASH "
            "derives causality itself: pass the tokenizer's mask, not a 4-D or additive one."
        )
    width = attention_mask.shape[1]
    # The length of a static cache is on the device: its columns are not counted here.
    fits = width == length or (width == past_length + length if isinstance(past_length, int) else width > length)
    if attention_mask.shape[0] != batch or not fits:
        raise ValueError(
            f"attention_mask must have shape ({batch}, {length}), or ({batch}, {past_length} + {length}) with the "
            f"{past_length} cached tokens in front, got {tuple(attention_mask.shape)}."
        )
    mask = attention_mask[:, -length:]
    valid = mask != 0
    if is_tracing():
        return valid
    facts = [(mask == valid).all(), valid.all()]
    if seen_B is not None and width > length:
        counted_B = (attention_mask[:, :-length] != 0).sum(1)
        facts.append((counted_B < seen_B).any())  # more may be tokens of earlier documents
    binary, full, *contradicts = torch.stack(facts).tolist()  # one wait for the device
    if not binary:
        raise ValueError(
            "attention_mask must hold only 0 (padding) and 1 (real token), got other values: an additive mask is not "
            "accepted. Pass `mask == 0` of an additive mask, or the tokenizer's own mask."
        )
    if any(contradicts):
        raise ValueError(contradiction(counted_B, seen_B, past_length))
    return None if full else valid


def contradiction(counted_B: Tensor, seen_B: Tensor, past_length: int | Tensor) -> str | None:
    """What to say where a caller's count of the real tokens in the cache is not the cache's own, or None.

    A caller that calls all cached columns real may not know of padding or earlier documents there: no contradiction.

    Args:
        counted_B, seen_B: real tokens of each row by the caller, and by the cache, int64 `[B]`.
        past_length: width of what went into the cache.
    """
    wrong_B = (counted_B < seen_B) | ((counted_B > seen_B) & (counted_B < past_length))
    if not bool(wrong_B.any()):
        return None
    row = int(wrong_B.nonzero()[0])
    return (
        f"Row {row} has {int(counted_B[row])} real tokens in the {int(past_length)} cached columns by attention_mask "
        f"(or, where none was given, by pad_token_id), but its state in the cache holds {int(seen_B[row])}, and "
        "single tokens cannot be put into it or taken out. generate() puts padding into the state of a row that ends "
        "before others. Pass the whole sequences with their attention_mask to generate(), without prefill_chunk_size, "
        "or start with an empty cache."
    )


def is_whole(length: int, attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether an input of `length` tokens includes those that the cache holds: mask or positions are as long as it is,
    and positions begin at 0."""
    marks = position_ids if attention_mask is None else attention_mask
    begins = position_ids is None or not bool(position_ids[..., :1].any())
    return marks is not None and marks.shape[-1] == length and begins


def compare_with_cache(
    attention_mask: Tensor | None, position_ids: Tensor | None, length: int, seen_B: Tensor, past_length: int
) -> tuple[Tensor | None, str | None]:
    """Compare what generate() passes with a cache, which counts by itself.

    Args:
        attention_mask, position_ids: as in [`resolve_documents`], or of all columns; generate() makes the positions
            from the mask, and where there is none, from the columns.
        length: tokens of this call.
        seen_B: tokens of the open document in the cache, int64 `[B]`.
        past_length: width of what went into the cache before.

    Returns:
        The positions if they are not those of generate(), to be checked as a user's own; and what is wrong, or None.
    """
    batch, device = seen_B.shape[0], seen_B.device
    valid_BN = torch.ones(batch, length, dtype=torch.bool, device=device)
    counted_B = None
    if attention_mask is not None:
        attention_mask = attention_mask.to(device)
        valid_BN = attention_mask[:, -length:] != 0
        if attention_mask.shape[1] == past_length + length:
            counted_B = (attention_mask[:, :past_length] != 0).sum(1)
    if position_ids is None or position_ids.shape[-1] < length:
        return position_ids, None if counted_B is None else contradiction(counted_B, seen_B, past_length)
    before_BN = position_ids.to(device)[..., -length:].expand(batch, -1) - (valid_BN.cumsum(1) - 1)
    made_B = counted_B if counted_B is not None else torch.full_like(seen_B, past_length)
    if bool((before_BN == made_B[:, None])[valid_BN].all()):
        position_ids = None
    if counted_B is None:
        counted_B = torch.where(valid_BN, before_BN, past_length).amin(1)
    return position_ids, contradiction(counted_B, seen_B, past_length)


def resolve_documents(
    batch: int,
    length: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cache=None,
) -> Documents:
    """Find documents and positions from the mask and the marks of packing.

    Args:
        attention_mask: `[B, N]` or `[B, past + N]`, 1 at real tokens. Padding is transparent wherever it stands.
        position_ids: `[B or 1, N]`; must count real tokens, and restart at 0 where a packed document begins. Values at
            padding are ignored.
        cu_seq_lens: cumulative lengths of packed documents, int `[documents + 1]`, for one row (`B == 1`).
        seq_idx: document number of every token, int `[B or 1, N]`.
        cache: the first layer's, which knows how many columns, and how many tokens of each open document, went in.

    Raises:
        ValueError: for shapes that do not fit, a mask that contradicts the cache, or positions that contradict both.
    """
    seen_B, past_length = None, 0
    if cache is not None and cache.seen_B is not None:
        # The length of a static cache is a tensor.
        seen_B, past_length = cache.seen_B.to(device), cache.get_seq_length()
    valid_BN = None
    if attention_mask is not None:
        if isinstance(attention_mask, Tensor):
            attention_mask = attention_mask.to(device)
        valid_BN = check_mask(attention_mask, batch, length, past_length, seen_B)

    if torch.compiler.is_exporting():
        if cu_seq_lens is not None or seq_idx is not None:
            raise ValueError(
                "Packed rows cannot be exported: the number of chunks would depend on cu_seq_lens_q or seq_idx. Leave "
                "them out, and give each document a row of its own, padded by attention_mask."
            )
        if position_ids is not None:
            _check_marks("position_ids", position_ids, batch, length)
        # See `misplaced`.
        position_ids = None
    elif is_tracing() and seen_B is not None:
        # A captured step cannot compare values. Positions that continue a cache are those the cache counts anyway.
        position_ids = None
    if position_ids is None and cu_seq_lens is None and seq_idx is None:
        return count_positions(batch, length, device, valid_BN, None, seen_B)
    return _documents_from_marks(batch, length, device, valid_BN, position_ids, cu_seq_lens, seq_idx, seen_B)


def misplaced(position_ids: Tensor, documents: Documents) -> Tensor:
    """Real tokens whose position is another than that counted, packed documents included, bool `[B, N]`. For programs
    that can raise no error: what they compute of these tokens must not look right."""
    wrong_BN = position_ids.to(documents.position_BN.device) != documents.position_BN
    return wrong_BN if documents.valid_BN is None else wrong_BN & documents.valid_BN


# Whether rows are packed, and in how many chunks, is known only from the values: torch.compile breaks its graph here
# (and fullgraph=True says so), rather than compile a layout that may not fit the next batch.
@torch.compiler.disable
def _documents_from_marks(batch, length, device, valid_BN, position_ids, cu_seq_lens, seq_idx, seen_B) -> Documents:
    starts = []
    ones_BN = torch.ones(batch, length, dtype=torch.bool, device=device) if valid_BN is None else valid_BN
    if position_ids is not None:
        position_ids = _check_marks("position_ids", position_ids, batch, length).to(device)
        starts.append(ones_BN & (position_ids == 0))
    if seq_idx is not None:
        seq_idx = _check_marks("seq_idx", seq_idx, batch, length).to(device)
        starts.append(F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True) & ones_BN)
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens_q describes one packed row; the batch has {batch}. Use position_ids instead."
            )
        borders = cu_seq_lens.flatten().tolist()
        if borders[0] != 0 or borders[-1] != length or any(a > b for a, b in zip(borders, borders[1:], strict=False)):
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to the number of tokens ({length}), got {borders[:3]} ... "
                f"{borders[-1]}."
            )
        start = torch.zeros(1, length, dtype=torch.bool, device=device)
        start[0, [border for border in borders[:-1] if border < length]] = True
        starts.append(start & ones_BN)
    start_BN = starts[0]
    for other in starts[1:]:
        start_BN = start_BN | other

    # A row that begins with its first real token opens a document anyway: such a mark packs nothing.
    count_BN = ones_BN.cumsum(1)
    first_BN = ones_BN & (count_BN == 1)
    if seen_B is not None:
        first_BN = first_BN & (seen_B == 0)[:, None]
    if not bool((start_BN & ~first_BN).any()):
        start_BN = None
    documents = count_positions(batch, length, device, valid_BN, start_BN, seen_B)
    if position_ids is not None:
        wrong = ones_BN & (position_ids != documents.position_BN)
        if bool(wrong.any()):
            row, column = (int(index) for index in wrong.nonzero()[0])
            raise ValueError(
                "position_ids must count the real tokens of a document (0, 1, 2, ...; 0 begins a new packed document) "
                f"and agree with attention_mask, cu_seq_lens_q and the cache: row {row}, token {column} has "
                f"{int(position_ids.expand(batch, -1)[row, column])}, expected "
                f"{int(documents.position_BN.expand(batch, -1)[row, column])}. Leave position_ids out to have them "
                "counted."
            )
    return documents


def _check_marks(name: str, marks: Tensor, batch: int, length: int) -> Tensor:
    if marks.ndim == 1:
        marks = marks[None]
    if marks.ndim != 2 or marks.shape[0] not in (1, batch) or marks.shape[1] != length:
        raise ValueError(f"{name} must have shape ({batch}, {length}) or (1, {length}), got {tuple(marks.shape)}.")
    return marks


def count_positions(batch, length, device, valid_BN, start_BN, seen_B) -> Documents:
    """`Documents` from what marks them: see there for the arguments, which are trusted."""
    if valid_BN is None and start_BN is None:
        position_BN = torch.arange(length, device=device)[None]
        if seen_B is not None:
            position_BN = position_BN + seen_B[:, None]
        return Documents(position_BN, seen_B=seen_B)
    if valid_BN is None:
        rank_BN = torch.arange(length, device=device).expand(batch, length)
    else:
        rank_BN = valid_BN.cumsum(1) - 1
    position_BN = rank_BN if seen_B is None else rank_BN + seen_B[:, None]
    if start_BN is not None:
        begin_BN = torch.where(start_BN, rank_BN, -1).cummax(1).values
        position_BN = torch.where(begin_BN >= 0, rank_BN - begin_BN, position_BN)
    return Documents(position_BN.clamp(min=0), valid_BN, start_BN, seen_B)


@dataclass(frozen=True)
class ChunkLayout(Movable):
    """Where each token sits in the grid of chunks `[B, G, C]`, computed once per forward and shared by all layers.

    A document takes whole chunks; the slots left over are empty. With a cache, chunk 0 of a row continues its open
    chunk: the slots before `phase_B` belong to cached tokens.

    Attributes:
        token_BN: stands for the shape of the input, `[B or 1, N]`.
        position_BGC: position in its document of every slot, 0 before its first token, int64 `[B or 1, G, C]`.
        source_BK: token that fills each slot, -1 for none, int64 `[B, G * C]`; None if the grid is a padded reshape.
        slot_BN: slot of each token, -1 at padding, int64 `[B, N]`; None likewise.
        occupied_BGC: False at empty slots, bool `[B or 1, G, C]`.
        count_BG: tokens in the whole document of the chunk, int64 `[B or 1, G or 1]` (bidirectional only).
        first_BG, last_BG: first and last chunk of the chunk's document, int64 `[B, G]`; None if a row is one document.
        phase_B: slot of chunk 0 where the call's tokens go on, int64 `[B]`; None without cached tokens.
        continues_B: whether the row's first document continues the cached one, bool `[B]`; None without cached tokens.
        final_B: the chunk that is open after this call, int64 `[B]`; None if it is the last for every row.
        seen_after_B: tokens of the open document after this call, int64 `[B or 1]`.
        shift: empty slots before a document's first token.
        skipped: such slots that a grid of one short chunk leaves out.
    """

    token_BN: Tensor
    position_BGC: Tensor
    occupied_BGC: Tensor
    seen_after_B: Tensor
    source_BK: Tensor | None = None
    slot_BN: Tensor | None = None
    count_BG: Tensor | None = None
    first_BG: Tensor | None = None
    last_BG: Tensor | None = None
    phase_B: Tensor | None = None
    continues_B: Tensor | None = None
    final_B: Tensor | None = None
    shift: int = 0
    skipped: int = 0

    @property
    def before_BG(self) -> Tensor:
        """Tokens of the document in earlier chunks, int64 `[B or 1, G]`."""
        return self.position_BGC[..., 0]

    @property
    def cached_BC(self) -> Tensor:
        """The slots of chunk 0 that cached tokens hold, bool `[B, C]`."""
        slot_C = torch.arange(self.occupied_BGC.shape[2], device=self.occupied_BGC.device)
        return (slot_C < self.phase_B[:, None]) & self.occupied_BGC[:, 0]

    def split(self, x_BNF: Tensor) -> Tensor:
        """`[B, N, F]` to `[B, G, C, F]`; empty slots are 0."""
        B, N = x_BNF.shape[:2]
        G, C = self.position_BGC.shape[1:]
        if self.source_BK is None:
            # No branch on the remainder under a compiler: it would make one graph for multiples of C and one for
            # others.
            if is_tracing() or G * C != N:
                x_BNF = F.pad(x_BNF, (0, 0, self.shift, G * C - self.shift - N))
            return x_BNF.reshape(B, G, C, -1)
        return _take_rows(x_BNF, self.source_BK).view(B, G, C, -1)

    def merge(self, x_BGCF: Tensor) -> Tensor:
        """`[B, G, C, F]` to `[B, N, F]`; 0 at padding."""
        x_BKF = x_BGCF.flatten(1, 2)
        if self.slot_BN is None:
            N, shift = self.token_BN.shape[1], self.shift
            # As in split. Negative padding copies: whether a slice is dense would depend on the remainder too.
            if is_tracing():
                return F.pad(x_BKF, (0, 0, -shift, N + shift - x_BKF.shape[1]))
            return x_BKF[:, shift : shift + N]
        return _take_rows(x_BKF, self.slot_BN)


def _take_rows(x_BNF: Tensor, index_BK: Tensor) -> Tensor:
    """`out[b, k] = x[b, index[b, k]]`, and 0 where the index is -1."""
    B, N, features = x_BNF.shape
    row_B1 = torch.arange(B, device=x_BNF.device)[:, None] * N
    # -1 would send every empty slot to one row, whose gradient (all zeros) the backward would then add up serially.
    spread_1K = torch.arange(index_BK.shape[1], device=x_BNF.device)[None].clamp(max=N - 1)
    flat = (torch.where(index_BK >= 0, index_BK, spread_1K) + row_B1).flatten()
    x_BKF = x_BNF.reshape(B * N, features).index_select(0, flat).view(B, -1, features)
    return torch.where((index_BK >= 0)[..., None], x_BKF, 0)


def _number_of_chunks(slots: int, chunk_size: int) -> int:
    """Chunks that hold `slots`. At least 2 in an exported program: torch would tell one chunk from several by a guard,
    and the program would then refuse lengths on the other side of `chunk_size` than its example's."""
    chunks = (slots + chunk_size - 1) // chunk_size
    if not torch.compiler.is_exporting():
        return chunks
    # torch 2.11's dynamo takes compiling for exporting, and has no sym_max.
    return max(chunks, 2) if torch.compiler.is_dynamo_compiling() else torch.sym_max(chunks, 2)


def chunk_layout(documents: Documents, batch: int, chunk_size: int, *, causal: bool, shift: int = 0) -> ChunkLayout:
    """Lay the tokens of `documents` out in chunks of `chunk_size`, the first of which begins `shift` slots before its
    document.

    Without a cache, inputs shorter than a chunk get one chunk of their own length: nothing is computed for slots that
    cannot be filled. The number of chunks follows from shapes alone, except for packed rows, where it is read from the
    device once.
    """
    position_BN = documents.position_BN
    N, device = position_BN.shape[1], position_BN.device
    # A chunk size that follows the input would be one more dynamic shape, and a compiled graph per short length.
    C, skipped = chunk_size, 0
    if not is_tracing() and documents.seen_B is None and N + shift <= chunk_size:
        C, shift, skipped = N, 0, shift
    if documents.is_plain:
        G = _number_of_chunks(N + shift, C)
        final_B = None
        if torch.compiler.is_exporting():
            final_B = torch.full((batch,), (N + shift - 1) // C, device=device)
        position_BGC = torch.arange(-shift, G * C - shift, device=device).view(1, G, C)
        occupied_BGC = (position_BGC >= 0) & (position_BGC < N)
        count_BG = torch.full((1, 1), N, dtype=torch.long, device=device)
        return ChunkLayout(
            position_BN, position_BGC.clamp(min=0), occupied_BGC, count_BG[0], count_BG=count_BG, final_B=final_B,
            shift=shift, skipped=skipped,
        )  # fmt: skip

    seen_B, start_BN = documents.seen_B, documents.start_BN
    valid_BN = documents.valid_BN
    if valid_BN is None:
        valid_BN = torch.ones(batch, N, dtype=torch.bool, device=device)
    position_BN = position_BN.expand(batch, N)
    slot_BN = (position_BN + shift) % C
    rank_BN = valid_BN.cumsum(1)
    opens_BN = valid_BN & ((slot_BN == 0) | (position_BN == 0) | (rank_BN == 1))
    chunk_BN = opens_BN.cumsum(1) - 1
    if start_BN is not None:
        G = int(chunk_BN.max().clamp(min=0)) + 1
    elif seen_B is not None:
        G = _number_of_chunks(N + C - 1, C)
    else:
        G = _number_of_chunks(N + shift, C)

    # Column G (or G * C) collects what has no place and is cut off.
    def by_chunk(value_BN: Tensor, fill: int) -> Tensor:
        index_BN = torch.where(valid_BN, chunk_BN, G)
        return torch.full((batch, G + 1), fill, device=device).scatter_(1, index_BN, value_BN)[:, :G]

    flat_BN = torch.where(valid_BN, chunk_BN * C + slot_BN, -1)
    token_BN = torch.arange(N, device=device).expand(batch, N)
    source_BK = torch.full((batch, G * C + 1), -1, device=device)
    source_BK = source_BK.scatter_(1, torch.where(valid_BN, flat_BN, G * C), token_BN)[:, : G * C]
    start_BG = by_chunk(position_BN - slot_BN, 0)

    phase_B = continues_B = None
    any_B = rank_BN[:, -1] > 0
    last_B = torch.where(valid_BN, token_BN, 0).amax(1)
    seen_after_B = torch.where(any_B, position_BN.gather(1, last_B[:, None])[:, 0] + 1, 0)
    if seen_B is not None:
        continues_B = seen_B > 0
        if start_BN is not None:
            continues_B = continues_B & ~(start_BN & (rank_BN == 1)).any(1)
        phase_B = torch.where(continues_B, (seen_B + shift) % C, 0)
        seen_after_B = torch.where(any_B, seen_after_B, seen_B)
        # A row of nothing but padding keeps its open chunk.
        start_BG[:, 0] = torch.where(any_B, start_BG[:, 0], seen_B - phase_B)
    slot_C = torch.arange(C, device=device)
    position_BGC = start_BG[..., None] + slot_C
    occupied_BGC = (source_BK >= 0).view(batch, G, C)
    if seen_B is not None:
        occupied_BGC[:, 0] |= (slot_C < phase_B[:, None]) & (position_BGC[:, 0] >= 0)
    position_BGC = position_BGC.clamp(min=0)

    count_BG = first_BG = last_BG = None
    if start_BN is not None:
        chunk_G = torch.arange(G, device=device).expand(batch, G)
        document_BG = by_chunk(start_BN.cumsum(1), -1)
        border_BG = document_BG[:, 1:] != document_BG[:, :-1]
        first_BG = torch.where(F.pad(border_BG, (1, 0), value=True), chunk_G, 0).cummax(1).values
        last_BG = torch.where(F.pad(border_BG, (0, 1), value=True), chunk_G, G).flip(1).cummin(1).values.flip(1)
    if not causal:
        # The last slot in use of a document's last chunk gives its length.
        end_BG = torch.where(occupied_BGC, position_BGC + 1, 0).amax(2)
        count_BG = end_BG.gather(1, last_BG) if last_BG is not None else end_BG.amax(1, keepdim=True)

    return ChunkLayout(
        token_BN=documents.position_BN,
        position_BGC=position_BGC,
        occupied_BGC=occupied_BGC,
        seen_after_B=seen_after_B,
        source_BK=source_BK,
        slot_BN=flat_BN,
        count_BG=count_BG,
        first_BG=first_BG,
        last_BG=last_BG,
        phase_B=phase_B,
        continues_B=continues_B,
        final_B=chunk_BN[:, -1].clamp(min=0),
        shift=shift,
        skipped=skipped,
    )


@dataclass(frozen=True)
class StepLayout(Movable):
    """One new token a row, appended to a constant-size cache: no grid, every row at its own phase.

    Attributes:
        position_BN: position of the token in its document, int64 `[B, 1]`: also the number of cached tokens before it.
        valid_BN: False where the row's token is padding and must leave no trace, bool `[B, 1]`, or None.
        shift: empty slots before a document's first token.
    """

    position_BN: Tensor
    valid_BN: Tensor | None = None
    shift: int = 0


@dataclass(frozen=True)
class QuadraticLayout(Movable):
    """Which keys each query sees in attention over whole documents.

    Attributes:
        position_BN: position of every query, int64 `[B or 1, N]`.
        visible_BNM: bool `[B, N, M]`; None if only causality limits the view.
        offset_BNM: key position minus query position, int64 `[B, N, M]`; None if it is `j - i`.
        key_position_BN, key_document_BN: what the cache has to remember of the new tokens, int64 `[B, N]`; document -1
            marks padding. None without a cache.
    """

    position_BN: Tensor
    visible_BNM: Tensor | None = None
    offset_BNM: Tensor | None = None
    key_position_BN: Tensor | None = None
    key_document_BN: Tensor | None = None


def quadratic_layout(
    documents: Documents,
    batch: int,
    *,
    causal: bool,
    cached: bool = False,
    past_position_BM: Tensor | None = None,
    past_document_BM: Tensor | None = None,
    write_N: Tensor | None = None,
) -> QuadraticLayout:
    """Lay out attention over whole documents.

    Args:
        cached: whether the new tokens go into a cache.
        past_position_BM, past_document_BM: of the cached keys, int64 `[B, M]`; document -1 at padding and unused
            places.
        write_N: where the new keys go in a preallocated cache, int64 `[N]`; None to append them.
    """
    position_BN = documents.position_BN
    if documents.is_plain and not cached:
        return QuadraticLayout(position_BN)
    N, device = position_BN.shape[1], position_BN.device
    query_position_BN = position_BN.expand(batch, N)
    document_BN = torch.zeros(batch, N, dtype=torch.long, device=device)
    if past_document_BM is not None and past_document_BM.shape[1]:
        document_BN = document_BN + past_document_BM.amax(1, keepdim=True).clamp(min=0)
    if documents.start_BN is not None:
        document_BN = document_BN + documents.start_BN.cumsum(1)
    if documents.valid_BN is not None:
        document_BN = torch.where(documents.valid_BN, document_BN, -1)
    key_position, key_document = query_position_BN, document_BN
    if write_N is not None:
        key_position = past_position_BM.index_copy(1, write_N, query_position_BN)
        key_document = past_document_BM.index_copy(1, write_N, document_BN)
    elif past_position_BM is not None:
        key_position = torch.cat([past_position_BM, key_position], 1)
        key_document = torch.cat([past_document_BM, key_document], 1)
    offset_BNM = key_position[:, None, :] - query_position_BN[:, :, None]
    visible_BNM = (key_document[:, None, :] == document_BN[:, :, None]) & (key_document >= 0)[:, None, :]
    if causal:
        visible_BNM = visible_BNM & (offset_BNM <= 0)
    return QuadraticLayout(position_BN, visible_BNM, offset_BNM, query_position_BN, document_BN)


@dataclass(frozen=True)
class Places(Movable):
    """Where the tokens of one forward are, made once and passed to all layers of one kind (two kinds with
    `chunk_shift`).

    Attributes:
        layout: the grid of chunks, the single new token, or the keys that each query sees.
        documents: the tokens' documents and positions.
        rotary: cos and sin of the layout's positions, `[..., r / 2]`; None without RoPE.
        bias_rotary: cos and sin of the offsets `-(bias_length - 1) ... bias_length - 1`, for the rotary bias alone.
        bias_length: distances that the relative bias covers.
        fused: whether kernels compute this call.
        plan: how they walk through a grid of chunks (`flash_hf.kernels.ChunkPlan`).
    """

    layout: ChunkLayout | StepLayout | QuadraticLayout
    documents: Documents
    rotary: tuple[Tensor, Tensor] | None
    bias_rotary: tuple[Tensor, Tensor] | None
    bias_length: int
    fused: bool = False
    plan: Movable | None = None


__all__ = [
    "ChunkLayout",
    "Documents",
    "Places",
    "QuadraticLayout",
    "StepLayout",
    "chunk_layout",
    "compare_with_cache",
    "is_whole",
    "misplaced",
    "quadratic_layout",
    "resolve_documents",
]

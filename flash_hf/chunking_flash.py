# SPDX-License-Identifier: Apache-2.0
"""From tokens to documents and chunks: padding, packing and the phase of a decoding cache become index maps here.

The rule of this file: the chunk grid of a document starts at its first real token (or a fixed number of empty slots
before it), positions count real tokens, and padding has no slot. Attention sees chunks and documents, never padding.

Alphabet: B rows (each one or several packed documents), N tokens of this call, G chunks, C slots of a chunk, M keys of
quadratic attention, F any features.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def has_function_transforms() -> bool:
    """Whether `torch.func` transforms this call (vmap, grad, jvp)."""
    return torch._C._are_functorch_transforms_active()


def is_tracing() -> bool:
    """Whether tensors cannot be read on the host: a graph is being captured, or they stand for several (vmap)."""
    # In this order: a compiler does not know the last.
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or has_function_transforms()


def is_distributed() -> bool:
    """Whether there are other processes: weights may then be shards outside of their modules' forward."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which torch 2.11 also sets inside `torch.compile`."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def is_transformed() -> bool:
    """Whether a function transform or a dispatch mode (fake tensors, selective checkpointing) stands between calls and
    their results."""
    return has_function_transforms() or torch._C._len_torch_dispatch_stack() > 0


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """A faster `getattr(module, name)` (torch's takes six times as long). FSDP may have a plain attribute instead."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def child(module: nn.Module, name: str) -> Any:
    """The same of a module within, or of None in its place."""
    own = module._modules
    return own[name] if name in own else getattr(module, name)


def projections(unit: nn.Module) -> list[nn.Module]:
    """The projections of u, v, z and the output of a gated attention unit, looked up as fast."""
    own = unit._modules
    return [own["u_proj"], own["v_proj"], own["z_proj"], own["o_proj"]]


# What modules computed last, see `recall`. Not attributes of the modules, which are copied and pickled.
_last: WeakKeyDictionary = WeakKeyDictionary()
# Nothing is kept for longer rows, in numbers of the embedded tokens.
LARGEST_KEPT = 2**26


def recall(owner: nn.Module, key: tuple, make: Callable[[], Any], x_BND: Tensor) -> Any:
    """`make()`, or its last result for this owner if that had the same key: what follows from shapes and the
    configuration takes a forward's first milliseconds, in which the GPU waits. Not for calls that are traced.

    Args:
        key: what the result depends on, besides the type, device, stream and inference mode of x.
    """
    if (
        x_BND.shape[1] * x_BND.shape[2] > LARGEST_KEPT
        or (x_BND.is_cuda and torch.cuda.is_current_stream_capturing())  # a replay outlives what is kept here
        or type(x_BND) not in (Tensor, nn.Parameter)
        or is_transformed()
    ):
        return make()
    stream = torch.cuda.current_stream(x_BND.device) if x_BND.is_cuda else None
    key = x_BND.dtype, x_BND.device, stream, torch.is_inference_mode_enabled(), *key
    last = _last.get(owner)
    if last is None or last[0] != key:
        last = _last[owner] = key, make()
    return last[1]


def refuse_second_derivatives() -> None:
    """For a backward whose operations autograd does not see. `once_differentiable` would not do: where there are other
    ways to the input, such as residual sums, torch then leaves this one out of second derivatives, without a word."""
    if torch.is_grad_enabled():  # by create_graph=True
        raise NotImplementedError(
            "Kernels and context parallelism have no second derivatives (create_graph=True): set "
            "model.config.backend = 'torch', and keep whole rows on each process."
        )


class Movable:
    """A bundle of tensors that accelerate moves between devices as one, by `.to`."""

    def to(self, device, non_blocking: bool = False, **kwargs):
        def move(value):
            if isinstance(value, tuple):
                parts = [move(part) for part in value]
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            return value.to(device, non_blocking=non_blocking) if isinstance(value, (Tensor, Movable)) else value

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Documents(Movable):
    """The document and the position of every token of this call.

    Attributes:
        position_BN: index of the token in its document, int64 `[B or 1, N]`; at padding, any valid position.
        valid_BN: False at padding, bool `[B, N]`; None if every token is real.
        start_BN: True at the first token of each new document, bool `[B, N]`; None if each row is one document
            (possibly continued from the cache).
        seen_B: tokens of each row's open document in the cache, int64 `[B]`; None without a cache, or if it is empty.
    """

    position_BN: Tensor
    valid_BN: Tensor | None = None
    start_BN: Tensor | None = None
    seen_B: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Every row is one whole document without padding: the grid is a reshape."""
        return self.valid_BN is None and self.start_BN is None and self.seen_B is None


def check_mask_shape(attention_mask: Tensor, batch: int, length: int, past_length: int | Tensor) -> None:
    """Refuse (ValueError) what is no 2-D padding mask of these tokens, or of these and the cached ones."""
    is_tensor = isinstance(attention_mask, Tensor)
    if not is_tensor or attention_mask.ndim != 2:
        got = f"{attention_mask.ndim} dimensions" if is_tensor else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask must be a 2-D padding mask (batch, tokens) with 1 at real tokens, got {got}. FLASH "
            "derives causality itself: pass the tokenizer's mask, not a 4-D or additive one."
        )
    width = attention_mask.shape[1]
    # The length of a static cache is on the device, and not read here.
    fits = width == length or (width == past_length + length if isinstance(past_length, int) else width > length)
    if attention_mask.shape[0] != batch or not fits:
        either = f"({batch}, {length})"
        if not isinstance(past_length, int) or past_length > 0:
            either += f", or ({batch}, {past_length} + {length}) with the {past_length} cached tokens in front"
        raise ValueError(f"attention_mask must have shape {either}, got {tuple(attention_mask.shape)}.")


def check_mask(
    attention_mask: Tensor, batch: int, length: int, past_length: int | Tensor, seen_B: Tensor | None = None
) -> Tensor | None:
    """The part `[B, N]` of the 2-D padding mask for the tokens of this call, as bool; None if all are real."""
    check_mask_shape(attention_mask, batch, length, past_length)
    width = attention_mask.shape[1]
    mask = attention_mask[:, -length:]
    valid = mask != 0
    if is_tracing():
        return valid
    facts = [(mask == valid).all(), valid.all()]
    if seen_B is not None and width > length:
        counted_B = (attention_mask[:, :-length] != 0).sum(1)
        facts.append((counted_B < seen_B).any())  # a higher count may include earlier documents
    binary, full, *contradicts = torch.stack(facts).tolist()  # synchronises once
    if not binary:
        raise ValueError(
            "attention_mask must hold only 0 (padding) and 1 (real token), got other values. Pass the tokenizer's "
            "mask, or `mask == 0` of an additive one."
        )
    if any(contradicts):
        raise ValueError(contradiction(counted_B, seen_B, past_length))
    return None if full else valid


def contradiction(counted_B: Tensor, seen_B: Tensor, past_length: int | Tensor) -> str | None:
    """An error message if the caller and the cache count different numbers of real tokens, int64 `[B]`, else None. A
    caller that counts all `past_length` cached columns may just not know about padding or earlier documents."""
    wrong_B = (counted_B < seen_B) | ((counted_B > seen_B) & (counted_B < past_length))
    if not bool(wrong_B.any()):
        return None
    row = int(wrong_B.nonzero()[0])
    return (
        f"Row {row} has {int(counted_B[row])} real tokens in the {int(past_length)} cached columns by attention_mask "
        f"(or by pad_token_id, without a mask), but the cache has seen {int(seen_B[row])}. Its state cannot add or "
        "forget single tokens; generate() feeds it the padding of a row that ends before others. Pass the whole "
        "sequences with their attention_mask to generate(), without prefill_chunk_size, or start with an empty cache."
    )


def compare_with_cache(
    attention_mask: Tensor | None, position_ids: Tensor | None, length: int, seen_B: Tensor, past_length: int
) -> tuple[Tensor | None, str | None]:
    """Compare the mask and positions of generate(), for `length` new tokens or for all, with a cache, which counts by
    itself. Returns the positions if they are not made from the mask, and the error message of `contradiction`."""
    columns = past_length + length
    mask = seen_B.new_ones(len(seen_B), columns) if attention_mask is None else attention_mask.to(seen_B.device)
    real = F.pad(mask, (columns - mask.shape[1], 0), value=1) != 0
    counted_B, valid_BN = real[:, :past_length].sum(1), real[:, past_length:]
    if position_ids is not None and position_ids.shape[-1] >= length:
        expected_BN = counted_B[:, None] + valid_BN.cumsum(1) - 1
        same_BN = position_ids[..., -length:].to(seen_B.device) == expected_BN
        position_ids = None if bool((same_BN | ~valid_BN).all()) else position_ids
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
    """Documents and positions from the padding mask and the marks of packing.

    Args:
        attention_mask: `[B, N]` or `[B, past + N]`, 1 at real tokens. Padding may be anywhere.
        position_ids: `[B or 1, N]`; counts real tokens, from 0 where a packed document begins. Ignored at padding.
        cu_seq_lens: cumulative lengths of packed documents, int `[documents + 1]`, for one row (`B == 1`).
        seq_idx: document number of every token, int `[B or 1, N]`.
        cache: the first layer's, which counts its columns and the tokens of each open document.
    """
    seen_B, past_length = None, 0
    if cache is not None and cache.seen_B is not None:
        seen_B, past_length = cache.seen_B.to(device), cache.get_seq_length()
    valid_BN = None
    if attention_mask is not None:
        if isinstance(attention_mask, Tensor):
            attention_mask = attention_mask.to(device)
        valid_BN = check_mask(attention_mask, batch, length, past_length, seen_B)

    if is_exporting():
        if cu_seq_lens is not None or seq_idx is not None:
            raise ValueError(
                "Packed rows cannot be exported: the number of chunks would depend on cu_seq_lens_q or seq_idx. Leave "
                "them out, and give each document its own row, padded under attention_mask."
            )
        if position_ids is not None:
            _check_marks("position_ids", position_ids, batch, length)
        # See `misplaced`.
        position_ids = None
    elif is_tracing() and seen_B is not None:
        # A captured step cannot compare values, and the cache counts the same positions itself.
        position_ids = None
    if position_ids is None and cu_seq_lens is None and seq_idx is None:
        return count_positions(batch, length, device, valid_BN, None, seen_B)
    return _documents_from_marks(batch, length, device, valid_BN, position_ids, cu_seq_lens, seq_idx, seen_B)


def misplaced(position_ids: Tensor, documents: Documents) -> Tensor:
    """Real tokens at another position than counted, as in packed documents, bool `[B, N]`. Exported programs, which
    cannot raise, mark their results."""
    wrong_BN = position_ids.to(documents.position_BN.device) != documents.position_BN
    return wrong_BN if documents.valid_BN is None else wrong_BN & documents.valid_BN


# Whether rows are packed, and into how many chunks, depends on values: torch.compile breaks its graph here (an error
# with fullgraph=True) instead of compiling a layout that may not fit the next batch.
@torch.compiler.disable
def _documents_from_marks(batch, length, device, valid_BN, position_ids, cu_seq_lens, seq_idx, seen_B) -> Documents:
    ones_BN = torch.ones(batch, length, dtype=torch.bool, device=device) if valid_BN is None else valid_BN
    start_BN = torch.zeros_like(ones_BN)
    if position_ids is not None:
        position_ids = _check_marks("position_ids", position_ids, batch, length).to(device)
        start_BN |= position_ids == 0
    if seq_idx is not None:
        seq_idx = _check_marks("seq_idx", seq_idx, batch, length).to(device)
        start_BN |= F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q is for one packed row; the batch has {batch}. Use position_ids instead.")
        borders = cu_seq_lens.flatten().tolist()
        if borders[0] != 0 or borders[-1] != length or borders != sorted(borders):
            got = f"{borders[:3]} ... {borders[-1]}"
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the number of tokens ({length}), got {got}.")
        start_BN[:, [border for border in borders[:-1] if border < length]] = True
    start_BN &= ones_BN

    # The first real token of a row opens a document anyway: its mark does not make the row packed.
    first_BN = ones_BN & (ones_BN.cumsum(1) == 1)
    if seen_B is not None:
        first_BN = first_BN & (seen_B == 0)[:, None]
    if not bool((start_BN & ~first_BN).any()):
        start_BN = None
    documents = count_positions(batch, length, device, valid_BN, start_BN, seen_B)
    if position_ids is not None:
        wrong = ones_BN & (position_ids != documents.position_BN)
        if bool(wrong.any()):
            row, column = (int(index) for index in wrong.nonzero()[0])
            got, expected = (int(x.expand(batch, -1)[row, column]) for x in (position_ids, documents.position_BN))
            raise ValueError(
                "position_ids must count the real tokens of a document (0, 1, 2, ...; 0 begins a new packed document) "
                f"and agree with attention_mask, cu_seq_lens_q and the cache: row {row}, token {column} has {got}, "
                f"expected {expected}. Leave out position_ids to have them counted."
            )
    return documents


def _check_marks(name: str, marks: Tensor, batch: int, length: int) -> Tensor:
    if marks.ndim == 1:
        marks = marks[None]
    if marks.ndim != 2 or marks.shape[0] not in (1, batch) or marks.shape[1] != length:
        shapes = f"({batch}, {length})" + (f" or (1, {length})" if batch > 1 else "")
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(marks.shape)}.")
    return marks


def count_positions(batch, length, device, valid_BN, start_BN, seen_B) -> Documents:
    """`Documents` with counted positions; the arguments are its fields, unchecked."""
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
    """Where each token sits in the grid of chunks `[B, G, C]`.

    A document takes whole chunks; the remaining slots are empty. With a cache, chunk 0 of a row continues its open
    chunk: the slots before `phase_B` belong to cached tokens.

    Attributes:
        token_BN: any tensor with the shape of the input, `[B or 1, N]`.
        position_BGC: position of every slot in its document, 0 before its first token, int64 `[B or 1, G, C]`.
        source_BK: token in each slot, -1 for none, int64 `[B, G * C]`; None if the grid is a padded reshape.
        slot_BN: slot of each token, -1 at padding, int64 `[B, N]`; None likewise.
        occupied_BGC: False at empty slots, bool `[B or 1, G, C]`.
        count_BG: tokens in the whole document of the chunk, int64 `[B or 1, G or 1]` (bidirectional only).
        first_BG, last_BG: first and last chunk of the chunk's document, int64 `[B, G]`; None if a row is one document.
        phase_B: slot of chunk 0 where the call's tokens continue, int64 `[B]`; None without cached tokens.
        continues_B: whether the row's first document continues the cached one, bool `[B]`; None without cached tokens.
        final_B: the chunk that is open after this call, int64 `[B]`; None if it is the last for every row.
        seen_after_B: tokens of the open document after this call, int64 `[B or 1]`.
        shift: empty slots before a document's first token.
        skipped: the same slots, where a grid of one short chunk leaves them out.
        neighbours: the other parts of these rows, on other processes (`flash_hf.parallel`); None for whole rows.
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
    neighbours: Any = None

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
            # No branch on the remainder under a compiler, which would make a second graph for multiples of C.
            if is_tracing() or G * C != N:
                x_BNF = F.pad(x_BNF, (0, 0, self.shift, G * C - self.shift - N))
            return x_BNF.reshape(B, G, C, -1)
        return take_rows(x_BNF, self.source_BK).view(B, G, C, -1)

    def merge(self, x_BGCF: Tensor) -> Tensor:
        """`[B, G, C, F]` to `[B, N, F]`; 0 at padding."""
        x_BKF = x_BGCF.flatten(1, 2)
        if self.slot_BN is None:
            N, shift = self.token_BN.shape[1], self.shift
            # As in split. Negative padding copies, while the strides of a slice would depend on the remainder.
            if is_tracing():
                return F.pad(x_BKF, (0, 0, -shift, N + shift - x_BKF.shape[1]))
            return x_BKF[:, shift : shift + N]
        return take_rows(x_BKF, self.slot_BN)


def take_rows(x_BNF: Tensor, index_BK: Tensor) -> Tensor:
    """`out[b, k] = x[b, index[b, k]]`, and 0 where the index is -1."""
    B, N, features = x_BNF.shape
    row_B1 = torch.arange(B, device=x_BNF.device)[:, None] * N
    # If empty slots all read one row, the backward would add up its gradients (all zeros) serially.
    spread_1K = torch.arange(index_BK.shape[1], device=x_BNF.device)[None].clamp(max=N - 1)
    flat = (torch.where(index_BK >= 0, index_BK, spread_1K) + row_B1).flatten()
    x_BKF = x_BNF.reshape(B * N, features).index_select(0, flat).view(B, -1, features)
    return torch.where((index_BK >= 0)[..., None], x_BKF, 0)


def _number_of_chunks(slots: int, chunk_size: int) -> int:
    """Chunks that hold `slots`. At least 2 in an exported program: torch would guard on one chunk or several, and then
    refuse lengths on the other side of `chunk_size` than its example's."""
    chunks = (slots + chunk_size - 1) // chunk_size
    if not is_exporting():
        return chunks
    # torch 2.11's dynamo has no sym_max.
    return max(chunks, 2) if torch.compiler.is_dynamo_compiling() else torch.sym_max(chunks, 2)


def chunk_layout(documents: Documents, batch: int, chunk_size: int, *, causal: bool, shift: int = 0) -> ChunkLayout:
    """Lay the tokens of `documents` out in chunks, the first of which begins `shift` slots before its document.

    Without a cache, an input shorter than a chunk gets one chunk of its own length, without empty slots. The number of
    chunks follows from shapes alone, except for packed rows, where it is read from the device once.
    """
    position_BN = documents.position_BN
    N, device = position_BN.shape[1], position_BN.device
    # Not under a compiler, where the chunk size would be another dynamic shape.
    C, skipped = chunk_size, 0
    if not is_tracing() and documents.seen_B is None and N + shift <= chunk_size:
        C, shift, skipped = N, 0, shift
    if documents.is_plain:
        G = _number_of_chunks(N + shift, C)
        exporting = is_exporting()
        final_B = torch.full((batch,), (N + shift - 1) // C, device=device) if exporting else None
        position_BGC = torch.arange(-shift, G * C - shift, device=device).view(1, G, C)
        occupied_BGC = (position_BGC >= 0) & (position_BGC < N)
        count_BG = torch.full((1, 1), N, dtype=torch.long, device=device)
        return ChunkLayout(
            position_BN, position_BGC.clamp(min=0), occupied_BGC, seen_after_B=count_BG[0], count_BG=count_BG,
            final_B=final_B, shift=shift, skipped=skipped,
        )  # fmt: skip

    seen_B, start_BN, valid_BN = documents.seen_B, documents.start_BN, documents.valid_BN
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

    # Column G (or G * C) collects tokens without a slot, and is cut off.
    def by_chunk(value_BN: Tensor, fill: int) -> Tensor:
        index_BN = torch.where(valid_BN, chunk_BN, G)
        return torch.full((batch, G + 1), fill, device=device).scatter(1, index_BN, value_BN)[:, :G]

    flat_BN = torch.where(valid_BN, chunk_BN * C + slot_BN, -1)
    token_BN = torch.arange(N, device=device).expand(batch, N)
    source_BK = torch.full((batch, G * C + 1), -1, device=device)
    source_BK = source_BK.scatter(1, torch.where(valid_BN, flat_BN, G * C), token_BN)[:, : G * C]
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
        # A row of padding keeps its open chunk.
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
        # A document's length is the end of its last chunk's last occupied slot.
        end_BG = torch.where(occupied_BGC, position_BGC + 1, 0).amax(2)
        count_BG = end_BG.gather(1, last_BG) if last_BG is not None else end_BG.amax(1, keepdim=True)

    return ChunkLayout(
        documents.position_BN, position_BGC, occupied_BGC, seen_after_B, source_BK=source_BK, slot_BN=flat_BN,
        count_BG=count_BG, first_BG=first_BG, last_BG=last_BG, phase_B=phase_B, continues_B=continues_B,
        final_B=chunk_BN[:, -1].clamp(min=0), shift=shift, skipped=skipped,
    )  # fmt: skip


@dataclass(frozen=True)
class StepLayout(Movable):
    """One new token per row, or a few, one after another, appended to a constant-size cache: no grid, each row has its
    own phase.

    Attributes:
        position_BN: position of each token in its document, int64 `[B, N]`: the number of cached tokens before it.
        valid_BN: False where the token is padding, which leaves the state as it is, bool `[B, N]`, or None.
        shift: empty slots before a document's first token.
    """

    position_BN: Tensor
    valid_BN: Tensor | None = None
    shift: int = 0

    @property
    def padding_BN1(self) -> Tensor | None:
        """True where the token is padding, bool `[B, N, 1]`, or None."""
        return padding_of(self.valid_BN)

    def columns(self, begin: int, end: int) -> "StepLayout":
        """That of some of the tokens."""
        valid_BN = None if self.valid_BN is None else self.valid_BN[:, begin:end]
        return StepLayout(self.position_BN[:, begin:end], valid_BN, self.shift)

    def one_by_one(self) -> "list[StepLayout]":
        """Those of each token."""
        return [self.columns(n, n + 1) for n in range(self.position_BN.shape[1])]


@dataclass(frozen=True)
class AppendLayout(Movable):
    """Up to C new tokens per row, appended to a constant-size cache: no grid, only the new tokens are queries.

    A row's tokens belong to its open chunk, or to the one after it. M keys: with a window of two chunks the C slots of
    the chunk before the open one, then the first slots of the open chunk, then the new tokens. All that layers need of
    this is made once, in the shapes in which they use it, since each operation of a layer costs a launch.

    Attributes:
        position_BN: position of every token in its document, int64 `[B, N]`.
        padding_BN1: True at padding, bool `[B, N, 1]`; None if every token is real.
        second_BN1: whether the token is behind the open chunk, bool `[B, N, 1]`.
        others_BN: for the open chunk and the next, the tokens that are not in it, bool, `chunks` times `[B, N]`.
        opens_B11, crosses_B11: whether a row begins at the border of a chunk, or has a real token behind its open
            chunk, bool `[B, 1, 1]`.
        empty_B11: whether the cache has no token of the row's document, bool `[B, 1, 1]`.
        write_BN1: the slot that each token takes, int64 `[B, N, 1]`. Padding takes one that no token does.
        newest_B11, newest_after_B11: the slot in which shifted keys have their newest token's own key, before and
            after this call, int64 `[B, 1, 1]`.
        before_BK1: the real token before each, counted from 1, and the last one, int64 `[B, N + 1, 1]`; 0 is the
            cache's newest. None if every token is real.
        scale_BN1: the factor of the sum over closed chunks, `[B, N, 1]`.
        hidden_BNM: the keys that a query does not see in the local part, bool `[B, N, M]`.
        offset_BNM: the place of each pair in a relative bias, int64 `[B, N, M]`.
        sign_BNM: keys to add to the cache's sum (1) or to take from it (-1), so that each query reads closed chunks,
            int8 `[B, N, M]`; of the open chunk and the new tokens only.
        seen_after_B: tokens of the document after this call, int64 `[B]`.
        slots: slots of the open chunk among the keys.
        chunks: 1 where the host knows that no row goes beyond its open chunk, else 2.
        closing_BC1: slots that new tokens fill in the open chunk if they go beyond it, bool `[B, C, 1]`; None without
            a window of two chunks.
    """

    position_BN: Tensor
    padding_BN1: Tensor | None
    second_BN1: Tensor
    others_BN: tuple[Tensor, ...]
    opens_B11: Tensor
    crosses_B11: Tensor
    empty_B11: Tensor
    write_BN1: Tensor
    newest_B11: Tensor
    newest_after_B11: Tensor
    before_BK1: Tensor | None
    scale_BN1: Tensor
    hidden_BNM: Tensor
    offset_BNM: Tensor
    sign_BNM: Tensor
    seen_after_B: Tensor
    slots: int
    chunks: int
    closing_BC1: Tensor | None = None

    def tokens_before(self, newest_B1S: Tensor, own_BNS: Tensor) -> tuple[Tensor, Tensor]:
        """Own keys of the token before each, `[B, N, S]`, and of the newest of all, `[B, 1, S]`. The cache's newest is
        0 before a document's first token."""
        all_BKS = torch.cat([newest_B1S.masked_fill(self.empty_B11, 0).to(own_BNS.dtype), own_BNS], 1)
        if self.before_BK1 is not None:
            all_BKS = all_BKS.gather(1, self.before_BK1.expand_as(all_BKS))
        return all_BKS[:, :-1], all_BKS[:, -1:]


def can_append(documents: Documents, chunk_size: int) -> bool:
    """Whether these tokens can have an [`AppendLayout`]."""
    if is_tracing() or documents.seen_B is None or documents.start_BN is not None:
        return False
    return 1 <= documents.position_BN.shape[1] <= chunk_size


def padding_of(valid_BN: Tensor | None) -> Tensor | None:
    """True at padding, bool `[B, N, 1]`; None if every token is real."""
    return None if valid_BN is None else ~valid_BN[..., None]


def without_padding(padding_BN1: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors `[B, N, X]` with 0 at padding, which may hold anything: times 0 it must be 0."""
    if padding_BN1 is None:
        return tensors
    return tuple(None if x is None else x.masked_fill(padding_BN1, 0) for x in tensors)


def append_layout(
    documents: Documents,
    chunk_size: int,
    *,
    window: int,
    shift: int = 0,
    normalization: str = "mean",
    dtype: torch.dtype = torch.float32,
) -> AppendLayout:
    """Lay out a few tokens behind those of a cache; `can_append` says whether they are few enough. `normalization` and
    `dtype` are of the sum over closed chunks."""
    seen_B, valid_BN, position_BN = documents.seen_B, documents.valid_BN, documents.position_BN
    (B, N), C, device = position_BN.shape, chunk_size, seen_B.device
    phase_B = (seen_B + shift) % C
    # A CPU need not read the slots behind the newest token; elsewhere their number would have to be waited for.
    slots = int(phase_B.max()) if device.type == "cpu" else C
    chunks, before = 1 if slots + N <= C else 2, (window - 1) * C

    # Columns are counted from the first slot of the open chunk, whose position is below 0 where that slot is empty.
    first_B1 = (seen_B - phase_B)[:, None]
    column_BN = position_BN - first_B1
    slot_BN, second_BN = column_BN % C, column_BN >= C
    count_B = N if valid_BN is None else valid_BN.sum(1)
    phase_B11, end_B11 = phase_B[:, None, None], (phase_B + count_B)[:, None, None]
    write_BN, padding_BN1, before_BK1 = slot_BN, None, None
    place_N = torch.arange(N, device=device)
    earlier_BNN = (place_N <= place_N[:, None])[None]
    if valid_BN is not None:
        write_BN = torch.where(valid_BN, slot_BN, end_B11[..., 0] % C)
        padding_BN1 = padding_of(valid_BN)
        before_BK1 = F.pad(torch.where(valid_BN, place_N + 1, 0).cummax(1).values, (1, 0))[..., None]
        earlier_BNN = earlier_BNN & valid_BN[:, None]

    cached_K = torch.arange(-before, slots, device=device)
    held_BK = (cached_K < phase_B[:, None]) & (cached_K >= -first_B1)
    there_BNM = torch.cat([held_BK[:, None].expand(B, N, -1), earlier_BNN.expand(B, N, -1)], 2)
    key_B1M = torch.cat([cached_K.expand(B, -1), column_BN], 1)[:, None]
    chunk_BN1 = (C * second_BN)[..., None]
    own_BNM = there_BNM & (key_B1M >= chunk_BN1)
    visible_BNM = own_BNM if window == 1 else there_BNM & (key_B1M >= chunk_BN1 - before)
    # The cache's sum has all cached keys and no new ones.
    new_M = torch.arange(key_B1M.shape[2], device=device) >= cached_K.shape[0]
    sign_BNM = (there_BNM & new_M).to(torch.int8) - own_BNM.to(torch.int8)
    farthest = window * C - 1
    return AppendLayout(
        position_BN, padding_BN1, second_BN1=second_BN[..., None], others_BN=(second_BN, ~second_BN)[:chunks],
        opens_B11=phase_B11 == 0, crosses_B11=end_B11 > C, empty_B11=(seen_B == 0)[:, None, None],
        write_BN1=write_BN[..., None], newest_B11=(phase_B11 - 1) % C + 1, newest_after_B11=(end_B11 - 1) % C + 1,
        before_BK1=before_BK1, hidden_BNM=~visible_BNM, sign_BNM=sign_BNM[..., before:],
        scale_BN1=global_scale((position_BN - slot_BN).clamp(min=0), normalization, C, dtype)[..., None],
        offset_BNM=(key_B1M - (column_BN - farthest)[..., None]).clamp(0, 2 * farthest), seen_after_B=seen_B + count_B,
        slots=slots, chunks=chunks,
        closing_BC1=None if window == 1 else torch.arange(C, device=device)[:, None] >= phase_B11,
    )  # fmt: skip


def global_scale(count: Tensor, normalization: str, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """The factor of a sum over `count` tokens, of `dtype`: 1 / count (mean) or 1 / chunk_size; 0 for no tokens."""
    tokens = count if normalization == "mean" else torch.full_like(count, chunk_size)
    return (1.0 / tokens.clamp(min=1).to(dtype)).masked_fill(count <= 0, 0)


def held_before(closed_B: Tensor, chunk_size: int) -> Tensor:
    """Which slots of the chunk before the open one hold tokens, bool `[B, C]`, after `closed_B` in closed chunks."""
    return torch.arange(chunk_size, device=closed_B.device) >= chunk_size - closed_B[:, None]


@dataclass(frozen=True)
class QuadraticLayout(Movable):
    """Which keys each query attends to in attention over whole documents.

    Attributes:
        position_BN: position of every query, int64 `[B or 1, N]`.
        visible_BNM: bool `[B, N, M]`; None if causality is the only limit.
        offset_BNM: key position minus query position, int64 `[B, N, M]`; None if it is `j - i`.
        key_position_BN, key_document_BN: of the new tokens, for the cache, int64 `[B, N]`; None without a cache.
            Document -1 is padding.
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
    """Lay out attention over whole documents. Keys of a cache have positions and documents, int64 `[B, M]`, -1 at
    padding and free slots; `write_N` are the new tokens' slots in a preallocated one, None to append."""
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


@dataclass(frozen=True, eq=False)  # a rollback recalls by them what it made
class Places(Movable):
    """Where the tokens of one forward are: made once, and passed to all layers that share a `chunk_shift`.

    Attributes:
        layout: the grid of chunks, the single new token, the few new tokens, or the keys that each query attends to.
        documents: the tokens' documents and positions.
        rotary: cos and sin of the layout's positions, `[..., r / 2]`; None without RoPE.
        bias_rotary: cos and sin of the offsets `-(bias_length - 1) ... bias_length - 1`; None without a rotary bias.
        bias_length: distances that the relative bias covers.
        shifted_S: dimensions of local keys to take from the token before, bool `[S]`; None for none.
        fused: whether kernels compute this call.
        plan: how they walk through a grid of chunks (`flash_hf.kernels.ChunkPlan`).
    """

    layout: ChunkLayout | StepLayout | AppendLayout | QuadraticLayout
    documents: Documents
    rotary: tuple[Tensor, Tensor] | None
    bias_rotary: tuple[Tensor, Tensor] | None
    bias_length: int
    shifted_S: Tensor | None = None
    fused: bool = False
    plan: Movable | None = None

    def first(self, columns: int) -> "Places":
        """Those of the first tokens of a [`StepLayout`]."""
        return replace(
            self,
            layout=self.layout.columns(0, columns),
            rotary=None if self.rotary is None else tuple(x[:, :columns] for x in self.rotary),
        )

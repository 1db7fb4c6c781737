# SPDX-License-Identifier: Apache-2.0
"""From vLLM's flat batches to rows: the requests of a step that go through the model together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend


@dataclass(frozen=True)
class RequestRows:
    """Requests that go through the model as the rows of one batch.

    Attributes:
        token_BN: the rows' tokens in the flat batch, int64 `[B, N]`; at padding, any token.
        valid_BN: False at padding, on the right, bool `[B, N]`; None without any.
        page_B: vLLM's block of each request, int64 `[B]`.
        seen_B: tokens of each request before this step, int64 `[B]`; None if all requests begin in this step.
        span: the same blocks as a slice, if they are known to be adjacent: their states are then used in place.
    """

    token_BN: Tensor
    valid_BN: Tensor | None
    page_B: Tensor
    seen_B: Tensor | None
    span: slice | None


def group_requests(starts: list[int], seen: list[int], page_R: Tensor) -> list[RequestRows]:
    """Divide a flat batch into single tokens, and prompts of similar lengths with less than half of padding.

    Args:
        starts: the first token of each request in the flat batch, and the end of the last one.
        seen: tokens of each request before this step.
        page_R: vLLM's block of each request, `[R]`.
    """
    groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for request, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if begin < end:
            groups[seen[request] == 0, (end - begin - 1).bit_length()].append(request)
    return [_rows(members, starts, seen, page_R, fresh) for (fresh, _), members in groups.items()]


def _rows(members: list[int], starts: list[int], seen: list[int], page_R: Tensor, fresh: bool) -> RequestRows:
    device, span = page_R.device, None
    # On a GPU, reading the blocks would wait for the device, and kernels take contiguous states only.
    if device.type == "cpu":
        pages = page_R.tolist()
        members = sorted(members, key=lambda request: pages[request])
        first, last = pages[members[0]], pages[members[-1]]
        if last - first == len(members) - 1:
            span = slice(first, last + 1)
    begin_B = torch.tensor([starts[request] for request in members])
    length_B = torch.tensor([starts[request + 1] for request in members]) - begin_B
    longest = int(length_B.max())
    column_N = torch.arange(longest)
    valid_BN = column_N < length_B[:, None]
    token_BN = begin_B[:, None] + torch.where(valid_BN, column_N, 0)
    return RequestRows(
        token_BN=token_BN.to(device, non_blocking=True),
        valid_BN=None if bool(valid_BN.all()) else valid_BN.to(device, non_blocking=True),
        page_B=page_R[torch.tensor(members, device=device)].long(),
        seen_B=None if fresh else torch.tensor([seen[request] for request in members], device=device),
        span=span,
    )


class StepBuilder(AttentionMetadataBuilder[list[RequestRows]]):
    """Called by vLLM once per step; its result is the metadata that the model reads."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):  # abstract in the base class
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> list[RequestRows]:
        batch, R = common_attn_metadata, common_attn_metadata.num_reqs
        starts_R1 = batch.query_start_loc_cpu[: R + 1]
        # An upper bound only for speculative decoding, which is refused.
        seen_R = batch.seq_lens_cpu_upper_bound[:R] - starts_R1.diff()
        # A request keeps one block until it ends or is preempted.
        return group_requests(starts_R1.tolist(), seen_R.tolist(), batch.block_table_tensor[:R, 0])


class StateBackend(LinearAttentionBackend):
    """Tells vLLM which builder belongs to layers that keep a state."""

    @staticmethod
    def get_name() -> str:
        return "FLASH_STATE"

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The flash-hf contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""FLASH for transformers: the gated attention unit, the model, and its language-model heads.

Functions of attention_flash.py hold the maths, modules here hold parameters, models hold plumbing.

`CODEPATH:` comments name the checkpoints that need a branch on the configuration; transformers' linter asks for them.
"""

import contextlib
import copy
import functools
import math
import os
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_flash import (
    QueryKeys,
    angle_dtype,
    mixed_chunk_append,
    mixed_chunk_attention,
    mixed_chunk_step,
    offset_scale,
    quadratic_attention,
    rotate,
    scaled_sinusoid,
    shifted_dims,
    wide,
)
from .backend_flash import (
    SILU,
    appends_in_torch,
    compute_dtype,
    continuation,
    fused_attention,
    fused_layer,
    fused_step,
    fuses_attention,
    fuses_layer,
    fuses_step,
    load_kernels,
    normalise,
    takes_steps,
    with_plans,
)
from .cache_flash import (
    CACHE_NAME,
    OTHER_CACHE_NAME,
    FlashChunkCacheLayer,
    StateForm,
    check_cache,
    count_step,
    resolve_cache,
    takes_both_cache_names,
)
from .chunking_flash import (
    AppendLayout,
    ChunkLayout,
    Documents,
    Places,
    QuadraticLayout,
    StepLayout,
    append_layout,
    check_mask_shape,
    child,
    chunk_layout,
    compare_with_cache,
    is_exporting,
    is_tracing,
    misplaced,
    padding_of,
    parameter,
    quadratic_layout,
    recall,
    resolve_documents,
    without_padding,
)
from .configuration_flash import FlashConfig
from .delta_flash import delta_chunk_append, delta_chunk_attention, delta_chunk_step
from .loss_flash import IGNORE, can_split, loss_without_logits, may_wait, zero_without_labels


logger = logging.get_logger(__name__)

BEFORE_5_21 = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 21)


# ---- Norms and positions ----
class FlashScaleNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * g` with one learnt scalar (arXiv 1910.05895); statistics in float32."""

    has_kernel = True

    def __init__(self, config: FlashConfig, eps: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.eps = config.norm_eps if eps is None else eps

    def forward(self, x: Tensor) -> Tensor:
        x_wide = x.to(wide(x.dtype))
        normed = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class FlashRMSNorm(FlashScaleNorm):
    """The same with one gain per channel."""

    def __init__(self, config: FlashConfig, eps: float | None = None):
        super().__init__(config, eps)
        self.weight = nn.Parameter(torch.ones(config.hidden_size))


class FlashLayerNorm(nn.LayerNorm):
    """torch's LayerNorm, for checkpoints and ablations that use it."""

    def __init__(self, config: FlashConfig, eps: float | None = None):
        super().__init__(config.hidden_size, eps=config.norm_eps if eps is None else eps)


NORMS = {"scale_norm": FlashScaleNorm, "rms_norm": FlashRMSNorm, "layer_norm": FlashLayerNorm, "none": nn.Identity}


class FlashScaledSinusoid(nn.Module):
    """Sinusoidal positions times one learnt scalar (eq. 0), for any length."""

    def __init__(self, config: FlashConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(config.hidden_size**-0.5))

    def forward(self, x_BND: Tensor, position_BN: Tensor) -> Tensor:
        def make() -> tuple[Tensor, Tensor]:
            return position_BN, scaled_sinusoid(position_BN, x_BND)

        # The positions of plain rows are those of the call before, see `FlashModel.places`.
        if is_tracing() or not torch.is_grad_enabled() or len(position_BN) > 1:
            sinusoid_BND = make()[1]
        else:
            sinusoid_BND = recall(self, (id(position_BN), x_BND.shape[-1]), make, x_BND)[1]
        return sinusoid_BND * self.scale.to(x_BND.dtype)


class FlashRotaryEmbedding(nn.Module):
    """cos and sin of position times frequency, with transformers' RoPE settings and scalings."""

    def __init__(self, config: FlashConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves like any module, but stays in float32: angles of long contexts need more than 8 bits."""
        kept = [buffer.float() for buffer in (self.inv_freq, self.original_inv_freq)]
        super()._apply(fn, recurse)
        for name, exact in zip(("inv_freq", "original_inv_freq"), kept, strict=True):
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, exact.to(moved.device))
        return self

    @property
    def is_dynamic(self) -> bool:
        """Whether the frequencies depend on the lengths seen, see `dynamic_rope_update`."""
        return "dynamic" in self.rope_type or self.rope_type == "longrope"

    @staticmethod
    def compute_default_rope_parameters(config: FlashConfig, device=None, **kwargs) -> tuple[Tensor, float]:
        # In Python's floats: exact, and some devices have no float64.
        theta, width = config.rope_parameters["rope_theta"], config.rotary_dim
        inv_freq = [1.0 / theta ** (index / width) for index in range(0, width, 2)]
        return torch.tensor(inv_freq, device=device, dtype=torch.float32), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each `[..., r / 2]` for positions `[...]`, at least float32, on x's device."""
        exact, dtype = angle_dtype(x), wide(x.dtype)
        angle = position_ids[..., None].to(exact) * self.inv_freq.to(device=x.device, dtype=exact)
        return (angle.cos() * self.attention_scaling).to(dtype), (angle.sin() * self.attention_scaling).to(dtype)


# ---- Relative biases: each returns a vector over the offsets -(length - 1) ... length - 1 ----
class FlashToeplitzBias(nn.Module):
    """One weight per offset of a span: `b[i, j] = w[j - i + span - 1]`."""

    # Added by attention_init="recent" at the distances 0, 1, 2, 3. relu2 turns them into weights of 1, 1/2, 1/4, 1/8.
    RECENT = (1.0, 0.7, 0.5, 0.35)

    def __init__(self, config: FlashConfig, causal: bool):
        super().__init__()
        self.span = config.span * config.local_window
        self.weight = nn.Parameter(torch.empty(2 * self.span - 1))

    def recent(self) -> Tensor:
        """The weights with those of the nearest tokens raised."""
        distance = (torch.arange(2 * self.span - 1, device=self.weight.device) - self.span + 1).abs()
        raised = self.weight.new_zeros(max(self.span, len(self.RECENT)))
        raised[: len(self.RECENT)] = self.weight.new_tensor(self.RECENT)
        return self.weight + raised[distance]

    def forward(self, length: int, rotary=None) -> Tensor:
        weight = parameter(self, "weight")
        if length == self.span:  # no view, which every decoding step would make again
            return weight
        return weight[self.span - length : self.span + length - 1]


class FlashRotaryBias(nn.Module):
    """`b[i, j] = <RoPE_i(a), RoPE_j(b)>`, for any span; the rows of `weight` are a and b."""

    has_kernel = True

    def __init__(self, config: FlashConfig, causal: bool):
        super().__init__()
        self.interleaved = config.rope_interleaved
        self.weight = nn.Parameter(torch.empty(2, config.query_key_dim))

    def forward(self, length: int, rotary) -> Tensor:
        a, b = self.weight.unbind(0)
        # Only the offset matters: RoPE_i(a) . RoPE_j(b) = a . RoPE_{j-i}(b).
        turned = rotate(b.expand(rotary[0].shape[0], -1), *rotary, interleaved=self.interleaved)
        return (turned * a).sum(-1)


class FlashT5Bias(nn.Module):
    """T5's buckets of distance (arXiv 1910.10683) times sqrt(S); one direction only if causal."""

    def __init__(self, config: FlashConfig, causal: bool):
        super().__init__()
        self.causal, self.buckets, self.max_distance = causal, config.t5_num_buckets, config.t5_max_distance
        self.scale = config.query_key_dim**0.5
        self.weight = nn.Parameter(torch.empty(config.t5_num_buckets, 1))

    def forward(self, length: int, rotary=None) -> Tensor:
        offset = torch.arange(1 - length, length, device=self.weight.device)
        buckets, bucket = self.buckets, torch.zeros_like(offset)
        if self.causal:
            distance = (-offset).clamp(min=0)
        else:
            buckets //= 2
            bucket = (offset > 0) * buckets
            distance = offset.abs()
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return self.weight[bucket + torch.where(distance < exact, distance, far), 0] * self.scale


BIASES = {"toeplitz": FlashToeplitzBias, "rotary": FlashRotaryBias, "t5": FlashT5Bias, None: None}


# ---- The layer ----
class FlashOffsetScale(nn.Module):
    """Queries and keys `RoPE(gamma_h * z + beta_h)` (eq. 3); rows h are quad_q, quad_k, lin_q, lin_k, without those of
    an absent branch."""

    def __init__(self, config: FlashConfig):
        super().__init__()
        rows = 2 * (config.has_quad + config.has_lin)
        self.weight = nn.Parameter(torch.empty(rows, config.query_key_dim))
        self.bias = nn.Parameter(torch.zeros(rows, config.query_key_dim))
        self.interleaved = config.rope_interleaved
        # CODEPATH: the paper's global queries and keys are rotated, those of global_form="previous_token" are not.
        self.rotated = rows - 2 if config.previous_key else rows

    def forward(self, z: Tensor, rotary: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """One tensor per row, each `[..., S]` like z."""
        rows, rotated = len(self.weight), 0 if rotary is None else self.rotated
        if rotated in (0, rows):
            angles = rotary if rotated else None
            return list(offset_scale(z, self.weight, self.bias, angles, interleaved=self.interleaved).unbind(-2))
        turned, rest = offset_scale(z, self.weight, self.bias, None).split([rotated, rows - rotated], -2)
        cos, sin = (each[..., None, :] for each in rotary)
        return [*rotate(turned, cos, sin, interleaved=self.interleaved).unbind(-2), *rest.unbind(-2)]


class FlashGatedAttentionUnit(nn.Module):
    """Gated attention unit with mixed chunk attention (arXiv 2202.10447, figure 2), for each document:

    0. input: embeddings, plus a sinusoid of the positions times one learnt scalar;
    1. `n = norm(x)`;
    2. `u, v, z = SiLU(n W_u + b_u), SiLU(n W_v + b_v), SiLU(n W_z + b_z)`, of widths E, E, S;
    3. queries and keys from one z: `RoPE(gamma_h * z + beta_h)` for h = quad_q, quad_k, lin_q, lin_k;
    4. local, inside each chunk: `A = relu(quad_q quad_k^T / C + b)^2`, lower triangular if causal; `local = A v`; with
       `local_window=2` the keys of the chunk before are seen, too;
    5. global, across chunks: `lin_q (sum of lin_k v^T) / count` over the document, or earlier chunks if causal; with
       `global_state="delta"` see delta_flash.py;
    6. `y = x + (u * (local + global)) W_o + b_o`.

    [`FlashLayer`] adds the norm of step 1 and the sum of step 6.
    """

    def __init__(self, config: FlashConfig, layer_idx: int, causal: bool):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, causal
        D, E, S = config.hidden_size, config.intermediate_size, config.query_key_dim
        self.u_proj = nn.Linear(D, E)
        self.v_proj = nn.Linear(D, E)
        self.z_proj = nn.Linear(D, S)
        self.o_proj = nn.Linear(E, D)
        self.offset_scale = FlashOffsetScale(config)
        self.act_fn = ACT2FN[config.hidden_act]
        # Attributes of a configuration are slow to look up, and each decoding step reads these in each layer.
        self.has_quad, self.has_lin, self.previous_key = config.has_quad, config.has_lin, config.previous_key
        self.local_key_shift, self.delta = config.local_key_shift, config.global_state == "delta"
        self.window = config.local_window
        self.activation, self.divisor = config.attention_activation, config.attention_divisor
        self.normalization, self.interleaved = config.global_normalization, config.rope_interleaved
        self.kernel_activation = config.hidden_act in SILU
        bias = BIASES[config.relative_bias] if self.has_quad else None
        self.relative_bias = None if bias is None else bias(config, causal)
        self.gate_proj = nn.Linear(D, 2, bias=False) if self.delta else None
        self.gate_bias = nn.Parameter(torch.empty(2)) if self.delta else None

    def gates(self, x_BND: Tensor) -> Tensor | None:
        """Log decay and strength of each token's write, `[B, N, 2]`, at least float32; None without the delta rule."""
        return self.gates_of(self.gate_proj(x_BND)) if self.delta else None

    def gates_of(self, made: Tensor) -> Tensor:
        """The gates from their projection."""
        # The bias is added in float32: at 9, a bfloat16 would leave the decay two digits.
        decay, write = (made.to(wide(made.dtype)) + self.gate_bias).unbind(-1)
        return torch.stack([F.logsigmoid(decay), torch.sigmoid(write)], -1)

    def query_keys(self, z: Tensor, rotary: tuple[Tensor, Tensor] | None) -> QueryKeys:
        """Queries and keys of each branch, `[..., S]`, from the basis z (eq. 3)."""
        made, absent = self.offset_scale(z, rotary), (None, None)
        return QueryKeys(*(made[:2] if self.has_quad else absent), *(made[-2:] if self.has_lin else absent))

    def bias(self, places: Places) -> Tensor | None:
        """The relative bias of offsets `-(bias_length - 1) ... bias_length - 1`, or None."""
        bias = child(self, "relative_bias")
        return None if bias is None else bias(places.bias_length, places.bias_rotary)

    def forward(
        self, x_BND: Tensor, places: Places, cache: CacheLayerMixin | None = None, before_B1D: Tensor | None = None
    ) -> Tensor:
        """`(u * attention(z, v)) W_o + b_o` of normalised input, `[B, N, D]`.

        Args:
            places: where the tokens are, shared by all layers of the same `chunk_shift`.
            cache: this layer's decoding state, updated in place.
            before_B1D: the same input of the token before, where another process holds it.
        """
        if fuses_attention(self, places):
            return self.o_proj(fused_attention(self, x_BND, places, cache))
        u_BNE = self.act_fn(self.u_proj(x_BND))
        v_BNE = self.act_fn(self.v_proj(x_BND))
        z_BNS = self.act_fn(self.z_proj(x_BND))
        before_B1S = None if before_B1D is None else self.act_fn(self.z_proj(before_B1D))
        attended_BNE = self.attend(z_BNS, v_BNE, places, cache, self.gates(x_BND), before_B1S)
        return self.o_proj(u_BNE * attended_BNE)

    def attend(
        self,
        z_BNS: Tensor,
        v_BNE: Tensor,
        places: Places,
        cache: CacheLayerMixin | None,
        gates_BN2: Tensor | None = None,
        before_B1S: Tensor | None = None,
    ) -> Tensor:
        """Attention over values v with queries and keys made from z, `[B, N, E]`: within whole documents, for one new
        token or a few, or within and across chunks."""
        layout = places.layout
        options = {"activation": self.activation, "divisor": self.divisor, "bias_R": self.bias(places)}
        dropout = self.config.attention_dropout if self.training else 0.0
        if isinstance(layout, QuadraticLayout):
            z_BNS, v_BNE = without_padding(padding_of(places.documents.valid_BN), z_BNS, v_BNE)
            q_BNS, key, *_ = self.query_keys(z_BNS, places.rotary)
            value = v_BNE
            if cache is not None:
                key, value = cache.extend(key, value, layout)
            return quadratic_attention(q_BNS, key, value, layout, causal=self.is_causal, dropout=dropout, **options)

        options |= {"previous_key": self.previous_key, "window": self.window, "shifted_S": places.shifted_S}
        step, append, attention = mixed_chunk_step, mixed_chunk_append, mixed_chunk_attention
        # CODEPATH: flash-30m-causal has the delta rule, all others the mean.
        if self.delta:
            step, append, attention = delta_chunk_step, delta_chunk_append, delta_chunk_attention
        elif not isinstance(layout, AppendLayout):  # where it is in the layout's scales
            options["normalization"] = self.normalization
        if isinstance(layout, (StepLayout, AppendLayout)):
            z_BNS, v_BNE, gates_BN2 = without_padding(layout.padding_BN1, z_BNS, v_BNE, gates_BN2)
            qk = self.query_keys(z_BNS, places.rotary)._replace(gates=gates_BN2)
            if isinstance(layout, StepLayout):
                state = cache.begin_step(v_BNE, places, qk)
                if v_BNE.shape[1] == 1:
                    return step(qk, v_BNE, layout, state, **options)
                out = []
                for n, own in enumerate(layout.one_by_one()):
                    token = QueryKeys(*(None if x is None else x[:, n : n + 1] for x in qk))
                    out.append(step(token, v_BNE[:, n : n + 1], own, state, **options))
                return torch.cat(out, 1)
            out_BNE, state = append(qk, v_BNE, layout, cache.begin_append(), dropout=dropout, **options)
            cache.update(state, places, qk, v_BNE)
            return out_BNE

        qk, v_BGCE = self.query_keys(layout.split(z_BNS), places.rotary), layout.split(v_BNE)
        if self.delta:
            qk = qk._replace(gates=layout.split(gates_BN2))
        options |= {"causal": self.is_causal, "chunk_size": self.config.chunk_size, "dropout": dropout}
        if before_B1S is not None:
            options["before"] = layout.neighbours.keys_before(self, before_B1S)
        out_BGCE, state = attention(qk, v_BGCE, layout, **continuation(places, cache), **options)
        if cache is not None:
            cache.update(state, places, qk, v_BNE)
        return layout.merge(out_BGCE)


class FlashLayer(GradientCheckpointingLayer):
    """`x + GAU(norm(x))`."""

    def __init__(self, config: FlashConfig, layer_idx: int, causal: bool):
        super().__init__()
        self.norm = NORMS[config.norm_type](config)
        self.gau = FlashGatedAttentionUnit(config, layer_idx, causal)
        self.hidden_dropout = config.hidden_dropout

    def forward(
        self, hidden_states: Tensor, places: Places, cache: Cache | None = None, past_key_values: Cache | None = None
    ) -> Tensor:
        """The layer's output, `[B, N, D]`. The cache (of all layers) has both of transformers' names, since gradient
        checkpointing drops it by name."""
        cache = resolve_cache(cache, past_key_values)
        own = None if cache is None else cache.layers[self.gau.layer_idx]
        if (neighbours := getattr(places.layout, "neighbours", None)) is not None:
            return neighbours.compute(self, hidden_states, places, own)
        if fuses_layer(self, hidden_states, places):
            return fused_layer(self, hidden_states, places, own)
        if fuses_step(self, hidden_states, places, own):
            return fused_step(self, hidden_states, places, own)
        attended = self.gau(normalise(self.norm, hidden_states, places), places, cache=own)
        if self.training:
            attended = F.dropout(attended, self.hidden_dropout)
        return hidden_states + attended


# ---- Models ----
# transformers looks up class names here, and registering with the Auto classes adds none: Trainer shifts labels for
# label smoothing only for names in the first table; pipelines and model cards read all tables.
NAMES_BY_TASK = {
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "ForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


@contextlib.contextmanager
def no_conversion_service():
    """Where a repository has no safetensors, transformers sends its name and the user's token to a web service that
    converts pickles. This variable is the only way to switch that off."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@auto_docstring
class FlashPreTrainedModel(PreTrainedModel):
    config: FlashConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlashLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _can_record_outputs = {"hidden_states": FlashLayer}
    _can_compile_fullgraph = True
    # transformers' own splits attention over keys and values. FLASH's is `flash_hf.parallel.context_parallel`.
    _supports_context_parallel = False
    # Whether language models in training return their loss without logits; see the heads.
    skip_logits = False
    # A head's task as transformers names it, which selects the loss also in subclasses.
    task: str | None = None
    # Whether a head attends in another direction than its configuration says.
    turned = False
    # How rows are cut over processes (`flash_hf.parallel.context_parallel`); None for whole rows.
    context = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.task is not None:
            # Including the subclasses that FSDP2 makes, and those of remote code.
            key = FlashConfig.model_type if cls.__name__ == f"Flash{cls.task}" else cls.__name__
            NAMES_BY_TASK[cls.task][key] = cls.__name__

    def post_init(self):
        super().post_init()
        if self.task is not None:
            self.loss_type = self.task

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' own, but only from safetensors, since a pickle can run code.

        A language-model head warns about a checkpoint that was trained in the other direction; pass `is_decoder`
        (True: causal) if this is intended.

        Raises:
            ValueError: `use_safetensors=False` or `weights_only=False`.
        """
        for name in ("use_safetensors", "weights_only"):
            if kwargs.get(name) is False:
                raise ValueError(
                    f"FLASH loads safetensors only, got {name}=False: reading a pickle may run code. Weights you "
                    "trust can be read with torch.load(..., weights_only=True) and passed as state_dict."
                )
        kwargs["use_safetensors"] = True
        with no_conversion_service():
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.turned:
            is_decoder = model.config.is_decoder
            trained, now = ("bidirectionally", "causal") if is_decoder else ("causally", "bidirectional")
            logger.warning(
                f"{pretrained_model_name_or_path} was trained {trained} (config.is_decoder={not is_decoder}), but "
                f"{cls.__name__} is {now}: its predictions mean nothing before further training. To predict, load a "
                f"{now} checkpoint. To continue training this one in the other direction, pass "
                f"is_decoder={is_decoder}, which also silences this warning."
            )
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, FlashScaleNorm):
            init.ones_(module.weight)
        elif isinstance(module, FlashOffsetScale):
            # CODEPATH: the paper's models begin with random scales, FLASH+ at recent tokens.
            if self.config.attention_init == "recent":
                init.ones_(module.weight)
            else:
                init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, (FlashToeplitzBias, FlashRotaryBias, FlashT5Bias)):
            init.normal_(module.weight, mean=0.0, std=std)
            # CODEPATH: as above.
            if self.config.attention_init == "recent":
                init.copy_(module.weight, module.recent())
        elif isinstance(module, FlashGatedAttentionUnit) and module.delta:
            # A memory of about 8,192 tokens; the weight of a token starts at one half.
            init.copy_(module.gate_bias, torch.tensor([math.log(8192.0), 0.0]))
        elif isinstance(module, FlashScaledSinusoid):
            init.constant_(module.scale, self.config.hidden_size**-0.5)


def caches_in_training_on_request(forward: Callable) -> Callable:
    """In training `config.use_cache` does not count: only calls with `use_cache=True` return a cache."""

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        if self.training and torch.is_grad_enabled() and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    return wrapped


@auto_docstring
class FlashModel(FlashPreTrainedModel):
    """FLASH without a head: causal if `config.is_decoder`, bidirectional otherwise."""

    def __init__(self, config: FlashConfig):
        super().__init__(config)
        config.validate()  # fields may have been set since it was made
        for name, plain in (("global_state", "mean"), ("local_window", 1)):
            value = getattr(config, name)
            if value != plain and not config.is_decoder:
                raise ValueError(
                    f"FlashConfig: `{name}` must be {plain!r} in a bidirectional model, got {value!r}, which is "
                    "for causal models. Use FlashForCausalLM, or is_decoder=True with FlashModel or a classifier."
                )
        load_kernels()  # before a compiler traces
        self.is_causal = config.is_decoder
        # No padding_idx: padding affects no result, and it would freeze the end-of-text token where that also pads.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # CODEPATH: GAU-alpha has no sinusoid, the paper's models and the FLASH ports do.
        self.embed_positions = FlashScaledSinusoid(config) if config.use_scaled_sinusoid else None
        # CODEPATH: FLASHQuad checkpoints normalise their embeddings.
        self.embed_norm = NORMS[config.norm_type](config) if config.embedding_norm else None
        self.layers = nn.ModuleList(
            [FlashLayer(config, layer_idx, self.is_causal) for layer_idx in range(config.num_hidden_layers)]
        )
        # CODEPATH: the FLASH ports have ScaleNorm in their layers and a LayerNorm before the head.
        self.norm = NORMS[config.final_norm_type or config.norm_type](config, config.final_norm_eps)
        self.rotary_emb = FlashRotaryEmbedding(config)
        self.state_forms = StateForm.pair(config)
        self.gradient_checkpointing = False
        self.post_init()

    @caches_in_training_on_request
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            Decoding state of the tokens before these, updated in place: a `DynamicCache` or `StaticCache`.
        past_key_values (`Cache`, *optional*):
            The same argument under the name that transformers had for it until 5.23.
        """
        cache = resolve_cache(cache, past_key_values, **kwargs)
        check_inputs(self, input_ids, inputs_embeds, kwargs.get("is_causal"))
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        B, N = inputs_embeds.shape[:2]
        if cache is not None and not self.is_causal:
            raise ValueError(
                "A cache was given to a bidirectional model, where every token depends on later ones. Use "
                "FlashForCausalLM, or FlashModel with config.is_decoder=True; with PEFT, not prefix tuning."
            )
        if cache is None and use_cache and self.is_causal:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            check_cache(cache, self.config, self.state_forms, B)
        first = None if cache is None else cache.layers[0]
        layouts = None
        if self.context is not None:
            documents, layouts = self.context.piece(self, inputs_embeds, cached=cache is not None)
        else:
            packing = {"cu_seq_lens": kwargs.get("cu_seq_lens_q"), "seq_idx": kwargs.get("seq_idx")}
            marks = {"attention_mask": attention_mask, "position_ids": position_ids, **packing}
            documents = resolve_documents(B, N, inputs_embeds.device, cache=first, **marks)
        check_single(documents, kwargs.get("single_document", False))
        drops_cache = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if drops_cache and first is not None and first.seen_B is not None:
            raise ValueError(
                "Gradient checkpointing would drop the cache that these tokens continue. Call "
                "model.gradient_checkpointing_disable(), or continue the cache under torch.no_grad()."
            )
        if kwargs.get("output_attentions", self.config.output_attentions) and not is_tracing():
            logger.warning_once(
                "output_attentions has no effect: FLASH never builds a map of all tokens by all tokens. "
                "flash_hf.inspection.look_inside computes one for a text."
            )
        if is_exporting() and position_ids is not None:
            # An eager call raises an error instead.
            inputs_embeds = inputs_embeds.masked_fill(misplaced(position_ids, documents)[..., None], math.nan)
        places = self.places(inputs_embeds, documents, first, layouts)
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(hidden_states, places[0].documents.position_BN)
        if self.embed_norm is not None:
            hidden_states = normalise(self.embed_norm, hidden_states, places[0])
        hidden_states = F.dropout(hidden_states, self.config.hidden_dropout, self.training)
        # Gradient checkpointing drops the cache by its name in transformers; before 5.24 also without gradients, as in
        # generate() in training mode, where the other name keeps it.
        name = CACHE_NAME if torch.is_grad_enabled() else OTHER_CACHE_NAME
        # generate(assistant_early_exit=...) lowers num_hidden_layers while it drafts.
        for index, layer in enumerate(islice(self.layers, self.config.num_hidden_layers)):
            hidden_states = layer(hidden_states, places[index % len(places)], **{name: cache})
        if isinstance(places[0].layout, StepLayout):
            count_step(cache.layers[: self.config.num_hidden_layers], N)
        hidden_states = normalise(self.norm, hidden_states, places[0])
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def layouts(
        self, x_BND: Tensor, documents: Documents, cache: CacheLayerMixin | None, dropout: bool
    ) -> list[ChunkLayout | StepLayout | AppendLayout | QuadraticLayout]:
        """The layouts that layers take in turn: two with `chunk_shift`, else one. The cache is the first layer's."""
        config, causal = self.config, self.is_causal
        B, N = x_BND.shape[:2]
        # CODEPATH: FLASHQuad checkpoints; FLASH checkpoints have chunks.
        if config.attention_type == "quadratic":
            past = {} if cache is None else cache.past(B, N, documents.position_BN.device)
            return [quadratic_layout(documents, B, causal=causal, cached=cache is not None, **past)]
        # CODEPATH: in the paper all layers have the same chunks; FLASH+ shifts those of odd layers.
        shifts = (0, config.chunk_shift) if config.chunk_shift else (0,)
        C, window = config.chunk_size, config.local_window
        # A step goes through the state, which carries no gradient.
        single = cache is not None and N == 1 and documents.start_BN is None and not torch.is_grad_enabled()
        if single or takes_steps(config, x_BND, documents, dropout=dropout, cache=cache):
            return [StepLayout(documents.position_BN, documents.valid_BN, shift=shift) for shift in shifts]
        if appends_in_torch(config, x_BND, documents, dropout=dropout, cache=cache):
            sums = {"normalization": config.global_normalization, "dtype": wide(compute_dtype(x_BND))}
            return [append_layout(documents, C, window=window, shift=shift, **sums) for shift in shifts]
        return [chunk_layout(documents, B, C, causal=causal, shift=shift) for shift in shifts]

    def places(
        self, x_BND: Tensor, documents: Documents, cache: CacheLayerMixin | None, layouts: list | None = None
    ) -> list[Places]:
        """The places that layers take in turn: those of `layouts`, unless that is given, with what goes with them."""
        # An empty cache is only filled. A single token is a step, for which the cache is looked at.
        fills = isinstance(cache, FlashChunkCacheLayer) and not cache.record_past and x_BND.shape[1] > 1
        plain = (cache is None or fills) and layouts is None and documents.is_plain
        if is_tracing() or not plain or self.rotary_emb.is_dynamic:
            return self.make_places(x_BND, documents, cache, layouts)

        def make() -> tuple[Tensor, list[Places]]:
            return frequencies, self.make_places(x_BND, documents, cache)

        frequencies = self.rotary_emb.inv_freq
        version = 0 if frequencies.is_inference() else frequencies._version
        key = (
            x_BND.shape, compute_dtype(x_BND), self.training, id(frequencies), version, dict(vars(self.config)), fills,
        )  # fmt: skip
        return recall(self, key, make, x_BND)[1]

    def make_places(
        self, x_BND: Tensor, documents: Documents, cache: CacheLayerMixin | None, layouts: list | None = None
    ) -> list[Places]:
        """What `places` returns, made anew."""
        config = self.config
        dropout = bool(config.attention_dropout) and self.training
        shifted_S = None
        # CODEPATH: FLASH+ shifts half of the local keys, the paper's models do not.
        if config.local_key_shift:
            shifted_S = shifted_dims(config.query_key_dim, config.rope_interleaved, x_BND.device)
        places: list[Places] = []
        for layout in self.layouts(x_BND, documents, cache, dropout) if layouts is None else layouts:
            by_token = isinstance(layout, (StepLayout, AppendLayout))
            if isinstance(layout, ChunkLayout):
                position, bias_length = layout.position_BGC, layout.position_BGC.shape[2] * config.local_window
            elif by_token:
                position, bias_length = layout.position_BN, config.chunk_size * config.local_window
            else:
                position, bias_length = layout.position_BN, self.quadratic_span(layout, cache)
            rotary = bias_rotary = None
            if by_token and places:  # a token has the same position in every grid
                rotary, bias_rotary = places[0].rotary, places[0].bias_rotary
            else:
                # CODEPATH: no released checkpoint is without RoPE; the ablations of the paper's section 4 are.
                if config.use_rope:
                    rotary = self.rotary_emb(x_BND, position)
                    if isinstance(layout, AppendLayout):  # in the type of its queries and keys
                        rotary = tuple(each.to(x_BND.dtype) for each in rotary)
                # CODEPATH: the paper's bias for spans over 512; the FLASH ports have T5's, FLASHQuad the Toeplitz one.
                if config.relative_bias == "rotary":
                    offsets = torch.arange(1 - bias_length, bias_length, device=position.device)
                    bias_rotary = self.rotary_emb(x_BND, offsets)
            places.append(Places(layout, documents, rotary, bias_rotary, bias_length, shifted_S))
        return with_plans(places, config, x_BND, causal=self.is_causal, dropout=dropout, cache=cache)

    def quadratic_span(self, layout: QuadraticLayout, cache: CacheLayerMixin | None) -> int:
        """Distances that the bias of FLASH-Quad covers."""
        keys = layout.position_BN.shape[1] if layout.visible_BNM is None else layout.visible_BNM.shape[2]
        # CODEPATH: as above.
        if self.config.relative_bias != "toeplitz":
            return keys
        span = self.config.span
        if (not is_tracing() or is_exporting()) and keys > span:
            static = getattr(cache, "max_cache_len", None) is not None
            got = f"a static cache for max_cache_len = {keys}: make a smaller one" if static else keys
            raise ValueError(
                f"FLASH-Quad with relative_bias='toeplitz' has biases for max_position_embeddings = {span} tokens, "
                f"got {got}. Use relative_bias='rotary' for longer inputs, or train with a larger "
                "max_position_embeddings."
            )
        return span


def check_inputs(
    model: PreTrainedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None, asked_causal: bool | None
) -> None:
    """Check the input of a base model before anything is computed; `asked_causal` is the call's `is_causal`, if any.
    The range of ids is checked on the CPU; CUDA has its own device-side assert."""
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"Exactly one of input_ids and inputs_embeds must be given, got {got}.")
    if asked_causal is not None and asked_causal != model.is_causal:
        raise ValueError(
            f"is_causal={asked_causal} contradicts this model, which was built with is_causal={model.is_causal}. Load "
            "the checkpoint with FlashModel and config.is_decoder set as needed."
        )
    D = model.config.hidden_size
    if input_ids is None:
        tokens, rule = inputs_embeds, f"inputs_embeds must be a floating-point tensor (batch, tokens, {D})"
    else:
        tokens, rule = input_ids, "input_ids must be an int64 or int32 tensor (batch, tokens)"
    if not isinstance(tokens, Tensor):
        cure = "Tokenize with return_tensors='pt', and pass the result as model(**inputs)."
        raise ValueError(f"{rule}, got {type(tokens).__name__}. {cure}")
    # Before the dtype: without a token, tokenizers return floats.
    if not is_tracing() and 0 in tokens.shape[:2]:
        raise ValueError(f"The input must hold at least one row and one token, got shape {tuple(tokens.shape)}.")
    if input_ids is None:
        fits = tokens.ndim == 3 and tokens.shape[2] == D and tokens.is_floating_point()
    else:
        fits = tokens.ndim == 2 and tokens.dtype in (torch.int64, torch.int32)
    if not fits:
        raise ValueError(f"{rule}, got {tuple(tokens.shape)} of {tokens.dtype}.")
    if is_tracing():
        return
    if input_ids is not None and input_ids.device.type == "cpu":
        low, high = (int(value) for value in input_ids.aminmax())
        # Not config.vocab_size: set_input_embeddings leaves it as it is.
        vocab_size = getattr(model.embed_tokens, "num_embeddings", model.config.vocab_size)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids must lie in [0, vocab_size = {vocab_size}), got {low if low < 0 else high}. Does "
                "the tokenizer belong to this model? After adding tokens call "
                "model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)."
            )


def check_single(documents: Documents, single: bool) -> None:
    """Refuse packed rows (ValueError) for a head that gives one answer per row."""
    if single and documents.start_BN is not None:
        raise ValueError(
            "position_ids, cu_seq_lens_q or seq_idx mark several documents in one row, but this head gives one answer "
            "per row. Give each document its own row, padded under attention_mask, as DataCollatorWithPadding does."
        )


def check_labels(
    labels: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, logits_to_keep=0, vocab_size=None
) -> None:
    """Refuse labels (ValueError) whose shape is not that of the input, or that come without the logits of all tokens;
    with a `vocab_size`, also those of the wrong dtype or, on a CPU, out of range."""
    given = inputs_embeds if input_ids is None else input_ids
    if not isinstance(given, Tensor):
        return  # which `check_inputs` refuses
    expected = tuple(given.shape[:2])
    if not isinstance(labels, Tensor):
        got = type(labels).__name__
        raise ValueError(f"labels must be a tensor with the shape of the input, {expected}, got {got}.")
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels must have the shape of the input, {expected}, got {tuple(labels.shape)}.")
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError(
            "labels need the logits of all tokens: leave logits_to_keep at 0, and mark labels to skip with -100."
        )
    if vocab_size is not None:
        check_classes(labels, "vocab_size", vocab_size)


def check_classes(labels: Tensor, name: str, number: int, cure: str = "") -> None:
    """Refuse labels (ValueError) of the wrong dtype or, on a CPU, beyond the `number` of classes, called `name` in the
    message."""
    if is_tracing():
        return
    rule = f"labels must be int64 and lie in [0, {name} = {number}), or be -100 where there is none"
    if labels.dtype != torch.int64:
        raise ValueError(f"{rule}, got {labels.dtype}.{cure}")
    if labels.device.type == "cpu":
        wrong = labels[((labels < 0) & (labels != IGNORE)) | (labels >= number)]
        if len(wrong):
            raise ValueError(f"{rule}, got {int(wrong[0])}.{cure}")


def vocabulary_of_labels(model: PreTrainedModel) -> int | None:
    """The `vocab_size` that labels must fit; None with the user's own loss, which may accept other labels."""
    return None if hasattr(model, "_loss_function") else model.config.vocab_size


def without_first_tokens(labels: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Causal labels without those of each document's first token, which has no token before it to predict it from: a
    document begins after padding, or where `position_ids`, `cu_seq_lens_q` or `seq_idx` say so, among the arguments
    `given` to the model. Labels in a row's first column can stay: losses shift them out."""
    first = []
    mask, positions, borders, number = map(given.get, ("attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx"))
    if mask is not None and mask.shape == labels.shape:
        real = mask != 0
        first.append(F.pad(real[:, 1:] & ~real[:, :-1], (1, 0)))
    if positions is not None:
        first.append(positions == 0)
    if borders is not None:
        begins = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=borders.device)
        first.append(begins.index_fill(0, borders.flatten().long(), True)[:-1])
    if number is not None:
        first.append(F.pad(number[..., 1:] != number[..., :-1], (1, 0)))
    for found in first:
        labels = labels.masked_fill(found.to(labels.device), IGNORE)
    return labels


def logits_and_loss(
    model: PreTrainedModel,
    hidden_BND: Tensor,
    labels: Tensor | None,
    options: dict[str, Any],
    *,
    shift: bool,
    skip_logits: bool | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Logits of a language-model head, and with labels the loss in nats: transformers' own, but 0 without any label,
    or the user's. `options` are further arguments of the loss, `shift` whether it shifts the labels. `skip_logits`:
    no logits, if the loss can be computed without; None: as `model.skip_logits` in training."""
    own_loss = hasattr(model, "_loss_function")
    context = getattr(model, "context", None)
    if context is not None and labels is not None:
        options = context.loss_options(labels, options)
    if skip_logits is None:
        skip_logits = getattr(model, "skip_logits", False) and model.training
    shifted = options.get("shift_labels") if shift else None
    # A compiler needs shapes that do not depend on the labels, and the user's own loss needs logits.
    if skip_logits and labels is not None and not (own_loss or is_tracing()) and can_split(model.lm_head):
        wanted, shift = (labels, shift) if shifted is None else (shifted, False)
        items = options.get("num_items_in_batch")
        logits = None
        loss = loss_without_logits(model.lm_head, hidden_BND, wanted, shift=shift, num_items_in_batch=items)
    else:
        logits = model.lm_head(hidden_BND)
        if labels is None:
            return logits, None
        loss = model.loss_function(logits, labels, model.config.vocab_size, **options)
        if not own_loss:
            wanted = (labels[:, 1:] if shift else labels) if shifted is None else shifted
            loss = zero_without_labels(loss, wanted)
    return logits, loss if context is None else context.total(loss)


def with_direction(config: FlashConfig, is_decoder: bool) -> FlashConfig:
    """`config`, or a copy with the head's direction, so that a base saved with it loads in the same direction."""
    if config.is_decoder == is_decoder:
        return config
    config = copy.deepcopy(config)
    config.is_decoder = is_decoder
    return config


@auto_docstring
class FlashForCausalLM(FlashPreTrainedModel, GenerationMixin):
    """FLASH with a language-model head, always causal; generates with a cache of constant size."""

    task = "ForCausalLM"
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FlashConfig):
        super().__init__(with_direction(config, is_decoder=True))
        self.turned = config.is_decoder != self.config.is_decoder
        self.model = FlashModel(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            Decoding state of the tokens before these, updated in place: a `DynamicCache` or `StaticCache`.
        past_key_values (`Cache`, *optional*):
            The same argument under the name that transformers had for it until 5.23.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids to predict, shifted inside the loss: pass the input ids, with -100 where no loss is wanted. The
            first token of a document is not predicted.
        skip_logits (`bool`, *optional*):
            With labels: return the loss and no logits, which saves most of a step's memory if the vocabulary is
            large. In training, defaults to the attribute `model.skip_logits` (False).

        Example:

        ```python
        >>> from flash_hf import FlashConfig, FlashForCausalLM
        >>> config = FlashConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, query_key_dim=16)
        >>> model = FlashForCausalLM(config)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 100])
        ```"""
        if labels is not None:
            check_labels(labels, input_ids, inputs_embeds, logits_to_keep, vocabulary_of_labels(self))
        memory = {"cache": resolve_cache(cache, past_key_values, **kwargs), "use_cache": use_cache}
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, return_dict=True, **memory, **kwargs
        )
        if labels is not None:
            given = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
            labels = without_first_tokens(labels, given)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = logits_and_loss(
            self, outputs.last_hidden_state[:, keep, :], labels, kwargs, shift=True, skip_logits=skip_logits
        )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: getattr(outputs, CACHE_NAME)}
        )

    generate = takes_both_cache_names(GenerationMixin.generate)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """transformers' own, after comparing its mask and positions with what the cache has seen.

        The state cannot forget single tokens. If the mask marks some as padding (generate() feeds `pad_token_id` to
        a sequence that ends before others), the state is dropped and the whole sequences are read again, as
        generate() without a cache does.
        """
        cache = resolve_cache(cache, past_key_values)
        tokens = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
        seen_B = getattr(cache.layers[0], "seen_B", None) if cache is not None and cache.layers else None
        if seen_B is not None and len(seen_B) != len(tokens):
            seen_B = None  # an error of the model's
        new = tokens.shape[1] if next_sequence_length is None else next_sequence_length
        if seen_B is not None and (is_first_iteration or new > 1):
            past = int(cache.get_seq_length())
            # The input includes the cached tokens if its mask, or its positions, are as long, and begin at 0.
            marks = position_ids if attention_mask is None else attention_mask
            whole = is_first_iteration and marks is not None and marks.shape[-1] == tokens.shape[1]
            whole = whole and (position_ids is None or not bool(position_ids[..., :1].any()))
            if whole:
                # Assisted decoding lets the model skip what the cache holds.
                new = next_sequence_length = tokens.shape[1] - past
            elif tokens is inputs_embeds:
                # transformers takes embeddings for the whole input in any case.
                new, next_sequence_length = tokens.shape[1], None
            if new < 1:
                raise ValueError(
                    f"The cache holds {past} tokens and the input has {tokens.shape[1]}: none are new. Pass the "
                    "cached tokens and at least one more; or, except in assisted decoding, only new tokens, with an "
                    "attention_mask for both."
                )
            position_ids, contradiction = compare_with_cache(attention_mask, position_ids, new, seen_B, past)
            if contradiction is not None and not whole:
                raise ValueError(contradiction)
            if contradiction is not None:
                logger.warning_once(
                    "The cache holds tokens that attention_mask (or pad_token_id) marks as padding, as for a row that "
                    "ended before others: the whole sequences are read again."
                )
                cache.reset()
                next_sequence_length = None
        elif not is_first_iteration:
            position_ids = None  # counted by the cache
            if seen_B is not None and next_sequence_length == 1:
                attention_mask = None  # generated tokens are real, and checking them would wait for the device
                if not any(isinstance(value, Tensor) for value in kwargs.values()):
                    # What transformers' own comes to, in a fifth of its time, in which the GPU waits.
                    newest_B1 = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
                    return {"input_ids": newest_B1.to(cache.layers[0].device), CACHE_NAME: cache, **kwargs}
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        # Before the model is called, generate() makes positions of the mask, and drops one without padding.
        prompt, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        as_ids = name == "input_ids"
        check_inputs(self.model, prompt if as_ids else None, None if as_ids else prompt, None)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE_NAME)
        # With both, the mask may be that of the ids.
        if mask is not None and (as_ids or not model_kwargs["input_ids"].shape[1]):
            past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
            check_mask_shape(mask, *prompt.shape[:2], past)
        return prompt, name, model_kwargs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        in_pieces = generation_config.prefill_chunk_size is not None
        embeds, tokens = model_kwargs.get("inputs_embeds"), input_ids.shape[1]
        if in_pieces and embeds is not None and not 0 < tokens <= generation_config.prefill_chunk_size:
            # transformers would pass all of them with each piece of input_ids.
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} splits input_ids, got inputs_embeds of "
                f"{embeds.shape[1]} tokens. Leave it out, or read all but the end of the prompt first, by calling the "
                "model with a cache."
            )
        if BEFORE_5_21 and in_pieces and cache is not None and (past := int(cache.get_seq_length())):
            # It would read as if the cache were empty. Instead, what follows the cache is read in one piece,
            # and a mask that contradicts the cache is refused, as later versions do where they read pieces.
            seen_B = getattr(cache.layers[0], "seen_B", None)
            if seen_B is not None and mask is not None and len(mask) == len(seen_B) and mask.shape[1] > past:
                _, contradiction = compare_with_cache(mask, None, mask.shape[1] - past, seen_B, past)
                if contradiction is not None:
                    raise ValueError(contradiction)
            logger.warning_once(
                "With transformers before 5.21, prefill_chunk_size has no effect where generate() continues a cache."
            )
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        # The model that an assistant drafts for found no padding: pad_token_id in a draft is a token.
        if generation_config.is_assistant:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # Every mode of generate() calls this once, with the mask of the whole prompt.
        depth, num_layers = generation_config.assistant_early_exit, self.config.num_hidden_layers
        if depth is not None and not 1 <= depth <= num_layers:
            raise ValueError(f"assistant_early_exit must be from 1 to num_hidden_layers = {num_layers}, got {depth}.")
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and mask.shape[1]:
            real_BN = mask != 0
            # A row of padding alone is an empty prompt, which does not affect the others.
            wrong_B = real_BN.any(1) & ~real_BN[:, -1]
            # The model refuses masks with other values than 0 and 1.
            if bool((real_BN == mask).all() & wrong_B.any()):
                copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
                raise ValueError(
                    f"The prompt of row {int(wrong_B.nonzero()[0]) // copies} ends in padding (by attention_mask, or "
                    "by pad_token_id), so that the next token would be predicted from padding. Pad on the left: set "
                    "tokenizer.padding_side = 'left' before tokenizing."
                )
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: the host's paged cache holds keys and values by token, which FLASH sums up by chunk."""
        raise NotImplementedError(
            "Continuous batching (generate_batch, transformers serve --continuous-batching) pages a key-value cache, "
            "and FLASH has none. Use generate() with a left-padded batch: its state has a fixed size, so "
            "there is nothing to page."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """The padding mask of this call alone: with a static cache, a mask that grows would recompile every step."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]


class FlashHeadTransform(nn.Module):
    """BERT's transform before the decoder: `norm(act(x W + b))`."""

    def __init__(self, config: FlashConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = NORMS[config.norm_type](config)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.norm(self.act_fn(self.dense(x_BND)))


@auto_docstring
class FlashForMaskedLM(FlashPreTrainedModel):
    """FLASH with a masked language-model head, always bidirectional."""

    task = "ForMaskedLM"
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FlashConfig):
        super().__init__(with_direction(config, is_decoder=False))
        self.turned = config.is_decoder != self.config.is_decoder
        self.model = FlashModel(self.config)
        # CODEPATH: FLASHQuad checkpoints have BERT's head.
        self.transform = FlashHeadTransform(config) if config.mlm_transform else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids to predict at the masked places, -100 elsewhere.
        skip_logits (`bool`, *optional*):
            With labels: return the loss and no logits; none are computed for tokens that are not masked. In training,
            defaults to the attribute `model.skip_logits` (False).
        """
        if labels is not None:
            check_labels(labels, input_ids, inputs_embeds, 0, vocabulary_of_labels(self))
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if self.transform is not None:
            hidden_states = self.transform(hidden_states)
        logits, loss = logits_and_loss(self, hidden_states, labels, kwargs, shift=False, skip_logits=skip_logits)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


# ---- Heads for fine-tuning, in the direction of the checkpoint they start from ----
def pool(hidden_BND: Tensor, attention_mask: Tensor | None, causal: bool) -> Tensor:
    """One vector per row, `[B, D]`: the last real token's, which attends to all, or the mean if bidirectional."""
    if attention_mask is None:
        return hidden_BND[:, -1] if causal else hidden_BND.mean(1)
    real_BN = attention_mask != 0
    if causal:
        last_B = torch.where(real_BN, torch.arange(real_BN.shape[1], device=real_BN.device), 0).amax(1)
        return hidden_BND.gather(1, last_B[:, None, None].expand(-1, 1, hidden_BND.shape[2]))[:, 0]
    total_BD = torch.where(real_BN[..., None], hidden_BND, 0).sum(1, dtype=wide(hidden_BND.dtype))
    return (total_BD / real_BN.sum(1, keepdim=True).clamp(min=1)).to(hidden_BND.dtype)


def weighted(mean_loss: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """`mean_loss` times the fraction of an accumulated batch's `items` labels (counted by Trainer, without -100) that
    this micro-batch has."""
    return mean_loss if items is None else mean_loss * ((labels != IGNORE).sum() / items).to(mean_loss.device)


@auto_docstring
class FlashTaskModel(FlashPreTrainedModel):
    """The base with dropout and one linear layer, named as transformers and PEFT expect."""

    head_name = "score"
    # Outputs of the linear layer; None: `config.num_labels`.
    head_width: int | None = None
    # Whether the head gives one answer per row, which may then not hold several documents.
    pools = True
    output_class: type = SequenceClassifierOutput

    def __init__(self, config: FlashConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FlashModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        setattr(self, self.head_name, nn.Linear(config.hidden_size, self.head_width or config.num_labels))
        self.post_init()

    def padding_mask(self, input_ids: Tensor) -> Tensor | None:
        """A mask of `pad_token_id`, as in transformers' own heads; None while a CUDA graph is recorded."""
        config, pad = self.config, self.config.pad_token_id
        if pad is None:
            return None
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if pad in (config.bos_token_id, *ends):
            self.warn_if_padding_and_no_attention_mask(input_ids, None)
            return None
        real_BN = input_ids != pad
        if is_tracing():
            return real_BN
        return None if not may_wait(input_ids) or bool(real_BN.all()) else real_BN

    def encode(
        self, input_ids, attention_mask, position_ids, inputs_embeds, kwargs, *, single: bool
    ) -> tuple[BaseModelOutputWithPast, Tensor | None]:
        """The base's outputs, and this call's attention mask. A cache is used if given, but none is made. `single`
        refuses packed rows, since the head gives one answer per row."""
        marks = attention_mask, position_ids, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
        if isinstance(input_ids, Tensor) and all(mark is None for mark in marks):
            attention_mask = self.padding_mask(input_ids)
        kwargs = {**kwargs, "use_cache": False, "single_document": single, "return_dict": True}
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        # With a cache, the mask begins before this call.
        length = outputs.last_hidden_state.shape[1]
        return outputs, None if attention_mask is None else attention_mask[:, -length:]

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        labels (`torch.Tensor`, *optional*):
            The right answers, as described in the head's class.
        """
        outputs, attention_mask = self.encode(
            input_ids, attention_mask, position_ids, inputs_embeds, kwargs, single=self.pools
        )
        hidden = outputs.last_hidden_state
        if self.pools:
            hidden = pool(hidden, attention_mask, self.model.is_causal)
        logits = self.score(self.dropout(hidden))
        if self.pools:  # one row of scores for each row of the input, also of several choices
            # Not len: it would fix the batch size of an exported program.
            logits = logits.view((inputs_embeds if input_ids is None else input_ids).shape[0], -1)
        loss = None if labels is None else self.head_loss(logits, labels, kwargs)
        return self.output_class(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def head_loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        """The loss in nats; 0 without any label."""
        raise NotImplementedError


MORE_LABELS = " Load the model with num_labels=... for more classes."


def check_shape(labels: Tensor, *shape: int) -> None:
    """Refuse labels (ValueError) that are no tensor of this shape."""
    if is_tracing():
        return
    if not isinstance(labels, Tensor) or tuple(labels.shape) != shape:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a tensor of shape {shape}, got {got}.")


def check_answers(labels: Tensor, logits: Tensor, config: FlashConfig) -> None:
    """Refuse labels (ValueError) that do not fit the scores `[B, num_labels]` and `config.problem_type`; without one,
    they choose it as in transformers."""
    if is_tracing():
        return
    B, number, problem = len(logits), config.num_labels, config.problem_type
    whole = isinstance(labels, Tensor) and labels.dtype in (torch.int64, torch.int32)
    flat = labels.flatten() if isinstance(labels, Tensor) else labels
    if problem == "regression" or (problem is None and number == 1):
        if number == 1:
            check_shape(flat, B)
        else:
            check_shape(labels, B, number)
    elif problem == "single_label_classification" or (problem is None and whole):
        check_shape(flat, B)
        check_classes(labels, "num_labels", number, MORE_LABELS)
    else:
        rule = f"labels must be 0.0 or 1.0 for each class, floating-point (batch, num_labels) = {(B, number)}"
        fits = isinstance(labels, Tensor) and labels.is_floating_point()
        if not fits or tuple(labels.shape) != (B, number):
            got = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"{rule}, got {got}. With one class per row pass int64 classes, else labels.float().")


@auto_docstring
class FlashForSequenceClassification(FlashTaskModel):
    """FLASH with a classifier or regressor on the whole sequence (see `pool`).

    `labels` are classes, int64 `(batch_size,)`; or 0.0 or 1.0 for each class, `(batch_size, num_labels)`, with -100
    where there is no label; or the values of a regression (float), where -100 is an ordinary value.
    """

    task = "ForSequenceClassification"

    def head_loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        config, items = self.config, options.get("num_items_in_batch")
        if not hasattr(self, "_loss_function"):
            check_answers(labels, logits, config)
            logits = logits.to(wide(logits.dtype))
        loss = self.loss_function(labels=labels, pooled_logits=logits, config=config)  # also sets problem_type
        if config.problem_type == "regression":
            return weighted(loss, labels, items)  # -100 is a value here, but Trainer does not count it
        if config.problem_type == "multi_label_classification" and not hasattr(self, "_loss_function"):
            known = labels != IGNORE
            losses = F.binary_cross_entropy_with_logits(logits, labels.masked_fill(~known, 0.0), reduction="none")
            loss = losses.masked_fill(~known, 0.0).sum() / known.sum()
        return zero_without_labels(weighted(loss, labels, items), labels)


@auto_docstring
class FlashForTokenClassification(FlashTaskModel):
    """FLASH with a classifier on every token.

    `labels` are classes, int64 `(batch_size, sequence_length)`, with -100 where there is none (padding, later pieces
    of a word).
    """

    task = "ForTokenClassification"
    pools = False
    output_class = TokenClassifierOutput

    def head_loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        check_labels(labels, None, logits)
        if not hasattr(self, "_loss_function"):
            check_classes(labels, "num_labels", self.num_labels, MORE_LABELS)
        return zero_without_labels(self.loss_function(logits, labels, self.config, **options), labels)


@auto_docstring
class FlashForMultipleChoice(FlashTaskModel):
    """FLASH with a score for each of several continuations of a question.

    `input_ids` are `(batch_size, num_choices, sequence_length)`; the other inputs have the same leading dimensions.
    `labels` are the right choices, int64 `(batch_size,)`, or -100 where it is unknown.
    """

    task = "ForMultipleChoice"
    head_width = 1
    output_class = MultipleChoiceModelOutput

    def encode(self, input_ids, attention_mask, position_ids, inputs_embeds, kwargs, *, single: bool):
        for name, given, dimensions in (
            ("inputs_embeds", inputs_embeds, "batch, choices, tokens, width"),
            ("input_ids", input_ids, "batch, choices, tokens"),
            ("attention_mask", attention_mask, "batch, choices, tokens"),
        ):
            if given is None and (name != "input_ids" or inputs_embeds is not None):
                continue
            if not isinstance(given, Tensor) or given.ndim != dimensions.count(",") + 1:
                got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"{name} of a multiple choice must be a tensor ({dimensions}), got {got}.")
        inputs = input_ids, attention_mask, position_ids, inputs_embeds
        return super().encode(*(None if x is None else x.flatten(0, 1) for x in inputs), kwargs, single=single)

    def head_loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        check_shape(labels, logits.shape[0])
        check_classes(labels, "choices", logits.shape[1])
        loss = weighted(F.cross_entropy(logits.float(), labels), labels, options.get("num_items_in_batch"))
        return zero_without_labels(loss, labels)


def answer_places(name: str, places: Tensor, attention_mask: Tensor | None, width: int) -> Tensor:
    """Columns of answers, int64 `[B]`. Those beyond the input become -100, which the loss skips; other negative ones
    become 0, as in transformers.

    Raises:
        ValueError: another type, or an answer at padding, unless a graph is being captured.
    """
    if not isinstance(places, Tensor) or places.dtype != torch.int64:
        got = places.dtype if isinstance(places, Tensor) else type(places).__name__
        raise ValueError(f"{name} must be an int64 tensor of columns of input_ids, got {got}.")
    places = places.flatten()
    known = (places != IGNORE) & (places < width)
    places = places.clamp(min=0)
    if attention_mask is not None and not is_tracing() and may_wait(places):
        mask = attention_mask.to(places.device)
        wrong = known & (mask.gather(1, places.clamp(max=width - 1)[:, None])[:, 0] == 0)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name} must be columns of real tokens, or -100 where there is no answer: row {row} has "
                f"{int(places[row])}, where attention_mask is 0. Count columns in the padded row."
            )
    return places.masked_fill(~known, IGNORE)


@auto_docstring
class FlashForQuestionAnswering(FlashTaskModel):
    """FLASH with a head for the first and last token of an answer (extractive question answering)."""

    task = "ForQuestionAnswering"
    head_name = "qa_outputs"
    head_width = 2

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        r"""
        start_positions, end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            First and last token of the answer, as columns of `input_ids`; -100, or a column beyond the input, where
            there is none.
        """
        outputs, attention_mask = self.encode(
            input_ids, attention_mask, position_ids, inputs_embeds, kwargs, single=start_positions is not None
        )
        logits = self.qa_outputs(self.dropout(outputs.last_hidden_state))
        if attention_mask is not None:
            # The loss is a softmax over columns, without padding.
            logits = logits.masked_fill((attention_mask == 0)[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = (x.contiguous() for x in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            width = start_logits.shape[1]
            start = answer_places("start_positions", start_positions, attention_mask, width)
            end = answer_places("end_positions", end_positions, attention_mask, width)
            if hasattr(self, "_loss_function"):
                loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
            else:
                items = kwargs.get("num_items_in_batch")
                start_wide, end_wide = (x.to(wide(x.dtype)) for x in (start_logits, end_logits))
                sides = [
                    zero_without_labels(fixed_cross_entropy(scores, places.to(scores.device), items), places)
                    for scores, places in ((start_wide, start), (end_wide, end))
                ]
                loss = sum(sides) / 2
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=outputs.hidden_states
        )


__all__ = [
    "FlashForCausalLM", "FlashForMaskedLM", "FlashForMultipleChoice", "FlashForQuestionAnswering",
    "FlashForSequenceClassification", "FlashForTokenClassification", "FlashGatedAttentionUnit", "FlashModel",
    "FlashPreTrainedModel",
]  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Transformer++, the strong baseline of the paper, for studies: softmax attention, RoPE, gated linear units, RMSNorm.

Its parts can be exchanged one by one (`mixer`, `feed_forward`, `position_embedding`, `norm_type`, `gated_attention`),
which makes the plain Transformer, Performer, Combiner, MC-Transformer++ and the ablations of the paper's table 2 from
the same block; `presets.py` names them.

Everything except the layer (documents, positions, heads, pooling, losses) is imported from FLASH, so that two
trainings differ in the layer alone. There is no decoding cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import RopeParameters
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from flash_hf.attention_flash import rotate
from flash_hf.cache_flash import resolve_cache
from flash_hf.chunking_flash import (
    ChunkLayout,
    Documents,
    chunk_layout,
    is_tracing,
    quadratic_layout,
    resolve_documents,
)
from flash_hf.configuration_flash import HOST_KEYS, nearest
from flash_hf.modeling_flash import (
    NORMS,
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashForQuestionAnswering,
    FlashForSequenceClassification,
    FlashForTokenClassification,
    FlashRotaryEmbedding,
    FlashScaledSinusoid,
    FlashTaskModel,
    check_inputs,
    check_single,
    with_direction,
)

from .mixers import (
    combiner_attention,
    merge_heads,
    multi_head_mixed_chunk_attention,
    orthogonal_features,
    performer_attention,
    relu2_attention,
    split_heads,
)


FEED_FORWARDS = ("glu", "mlp")
POSITION_EMBEDDINGS = ("rope", "sinusoidal", "learned")
PERFORMER_KERNELS = ("softmax", "relu")


@strict
class TransformerPPConfig(PreTrainedConfig):
    r"""
    Configuration of Transformer++ and its variants. `TransformerPPConfig()` is Transformer++ at the size of
    `FlashConfig()`: 12 blocks of width 768.

    Args:
        vocab_size (`int`, defaults to 32000): Rows of the embedding matrix.
        hidden_size (`int`, defaults to 768): Model width.
        num_hidden_layers (`int`, defaults to 12): Blocks of attention and feed-forward, each in place of two layers of
            FLASH.
        num_attention_heads (`int`, defaults to 12): Heads, of the even width `hidden_size / num_attention_heads`.
        intermediate_size (`int`, *optional*): Width of the feed-forward layers. Defaults to 8/3 of `hidden_size`,
            rounded to a multiple of 8, for `"glu"` and to 4 times `hidden_size` for `"mlp"`, so that the three
            matrices of `"glu"` have as many parameters as the two of `"mlp"`.
        hidden_act (`str`, defaults to `"silu"`): Activation of the feed-forward layers: `"silu"` (SwiGLU) or `"gelu"`
            (GEGLU) with `"glu"`, `"relu"` or `"gelu"` with `"mlp"`.
        mixer (`str`, defaults to `"softmax"`): How tokens are mixed: `"softmax"`, `"relu2"` (`relu(q k / divisor)^2`,
            quadratic), `"performer"` (random features, linear), `"combiner"` (row-major axial, C + N/C scores per
            token) or `"mixed_chunk"` (FLASH's attention with several heads, linear).
        gated_attention (`bool`, defaults to `False`): Multiply the outputs of the heads by `SiLU(W x)` before the
            projection, as in a gated attention unit.
        feed_forward (`str`, defaults to `"glu"`): `"glu"` or `"mlp"` (two matrices).
        position_embedding (`str`, defaults to `"rope"`): `"rope"`, or positions added to the embeddings:
            `"sinusoidal"` (times one learnt scalar, as in FLASH) or `"learned"` (`max_position_embeddings` of them).
        norm_type (`str`, defaults to `"rms_norm"`): `"rms_norm"`, `"layer_norm"` or `"scale_norm"`.
        chunk_size (`int`, defaults to 256): Tokens per chunk of `"mixed_chunk"` and per row of `"combiner"`. For
            `"performer"` it only affects speed and rounding.
        attention_divisor (`int` or `float`, *optional*): Divisor of relu2 scores. Defaults to `chunk_size`
            for `"mixed_chunk"` and to `max_position_embeddings` for `"relu2"`.
        performer_features (`int`, defaults to 256): Random features, shared by the heads of a layer.
        performer_kernel (`str`, defaults to `"softmax"`): `"softmax"` (FAVOR+) or `"relu"`.
        performer_redraw_interval (`int`, defaults to 0): Forward passes in training after which the features are
            sampled again; 0 keeps them. Features and count are saved with the weights.
        performer_seed (`int`, defaults to 0): Seed of the features.
        norm_eps (`float`, defaults to 1e-5): Epsilon of the norms.
        rope_parameters (`dict`, *optional*): transformers' RoPE settings. Defaults to base 10000.
        hidden_dropout, attention_dropout (`float`, default to 0.0): Dropout on embeddings and outputs, and on weights.
        max_position_embeddings (`int`, defaults to 8192): Training length; used by scaled RoPE, learned positions and
            the relu2 divisor only.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the weights.
        is_decoder (`bool`, defaults to `False`): Whether the model is causal. The language-model heads set it.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special tokens.
        tie_word_embeddings (`bool`, defaults to `True`): Share the embedding with the output projection.

    Raises:
        `ValueError`: for a misspelt field; huggingface_hub's `StrictDataclassError` for a wrong type or value.
    """

    model_type = "flash_hf_transformer_pp"

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    mixer: str = "softmax"
    gated_attention: bool = False
    feed_forward: str = "glu"
    position_embedding: str = "rope"
    norm_type: str = "rms_norm"
    chunk_size: int = 256
    attention_divisor: int | float | None = None
    performer_features: int = 256
    performer_kernel: str = "softmax"
    performer_redraw_interval: int = 0
    performer_seed: int = 0
    norm_eps: float = 1e-5
    rope_parameters: RopeParameters | dict | None = None
    hidden_dropout: int | float = 0.0
    attention_dropout: int | float = 0.0
    max_position_embeddings: int = 8192
    initializer_range: int | float = 0.02
    is_decoder: bool = False
    # Accepted so that both configurations take the same arguments; nothing is cached.
    use_cache: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for name in kwargs:
            # Names similar to no field are kept as attributes, as in every configuration of transformers.
            near = nearest(name, {*self.__dataclass_fields__})
            if near and name not in HOST_KEYS and not hasattr(type(self), name) and not name.startswith("_"):
                raise ValueError(f"TransformerPPConfig: unknown field `{name}` (value {kwargs[name]!r}).{near}")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
            if self.feed_forward == "glu":
                self.intermediate_size = round(self.hidden_size / 3) * 8
        if self.attention_divisor is None:
            # Resolved here so that it is saved, as in FlashConfig.
            chunked = self.mixer == "mixed_chunk"
            self.attention_divisor = self.chunk_size if chunked else self.max_position_embeddings
        super().__post_init__(**kwargs)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns: all of them."""
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """Check values and their combinations."""

        def refuse(name: str, rule: str, cure: str = ""):
            raise ValueError(f"TransformerPPConfig: `{name}` must be {rule}, got {getattr(self, name)!r}.{cure}")

        for name, valid in (
            ("mixer", MIXERS), ("feed_forward", FEED_FORWARDS), ("position_embedding", POSITION_EMBEDDINGS),
            ("norm_type", NORMS), ("performer_kernel", PERFORMER_KERNELS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in valid:
                refuse(name, f"one of {', '.join(map(repr, valid))}", nearest(value, valid))
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "chunk_size",
            "performer_features", "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                refuse(name, "a probability in [0, 1)")
        if not self.attention_divisor > 0:
            refuse("attention_divisor", "greater than 0")
        if self.performer_redraw_interval < 0:
            refuse("performer_redraw_interval", "0 (never) or a number of forward passes")
        if self.hidden_size % self.num_attention_heads:
            refuse("num_attention_heads", f"a divisor of hidden_size {self.hidden_size}")
        if self.position_embedding == "rope" and self.rotary_dim % 2:
            refuse(
                "num_attention_heads", f"such that each head has an even part of hidden_size {self.hidden_size}",
                " Or set position_embedding='sinusoidal'.",
            )  # fmt: skip
        if self.position_embedding == "sinusoidal" and self.hidden_size % 2:
            refuse("hidden_size", "even for sine and cosine halves", " Or set position_embedding='learned'.")
        if self.hidden_act not in ACT2FN:
            refuse("hidden_act", "an activation of transformers.activations.ACT2FN")


# ------------------------------------------------------------------------------------------------------------------
# Mixers: queries, keys and values [B, N, H, S] to [B, N, H, S]; the layout determines the visible keys
# ------------------------------------------------------------------------------------------------------------------
class Mixer(nn.Module):
    """Base of the mixers; `chunked` is whether the layout is a [`ChunkLayout`] or a mask."""

    chunked = True

    def __init__(self, config: TransformerPPConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    @property
    def dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotary, layout, causal: bool) -> Tensor:
        if rotary is not None:
            q, k = (rotate(x, *rotary) for x in (q, k))
        q, k, v = (split_heads(x, layout) for x in (q, k, v))
        return merge_heads(self.attend(q, k, v, layout, causal), layout)


@dataclass(frozen=True)
class Spans:
    """Documents without the padding, for softmax attention in both directions within each: costs are those of the
    documents, not of the rows that they are packed in.

    Attributes:
        offset_D: where the documents begin among the real tokens, then the number of these, int64 `[documents + 1]`.
        longest: tokens of the longest document.
        real_T: the real tokens among those of the batch, int64; None if all are.
    """

    offset_D: Tensor
    longest: int
    real_T: Tensor | None

    @classmethod
    def of(cls, documents: Documents, batch: int) -> "Spans":
        shape, real_T = (batch, documents.position_BN.shape[1]), None
        begins_BN = torch.zeros(shape, dtype=torch.bool, device=documents.position_BN.device)
        begins_BN[:, 0] = True
        if documents.valid_BN is not None:
            begins_BN = documents.valid_BN & (documents.valid_BN.cumsum(1) == 1)
            real_T = documents.valid_BN.flatten().nonzero()[:, 0]
        if documents.start_BN is not None:
            begins_BN = begins_BN | documents.start_BN
        begins_T = begins_BN.flatten() if real_T is None else begins_BN.flatten()[real_T]
        offset_D = F.pad(begins_T.nonzero()[:, 0], (0, 1), value=len(begins_T))
        return cls(offset_D, int(offset_D.diff().max()), real_T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        def nested(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            x = x if self.real_T is None else x[self.real_T]
            x = torch.nested.nested_tensor_from_jagged(x, self.offset_D, min_seqlen=1, max_seqlen=self.longest)
            return x.transpose(1, 2)

        out = F.scaled_dot_product_attention(nested(q), nested(k), nested(v), dropout_p=dropout)
        out = out.transpose(1, 2).values()
        if self.real_T is not None:
            out = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:]).index_copy(0, self.real_T, out)
        return out.view_as(v)


class QuadraticMixer(Mixer):
    """Softmax through torch's scaled_dot_product_attention, or relu^2 written out."""

    chunked = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotary, layout: Tensor | Spans | None, causal: bool) -> Tensor:
        if rotary is not None:
            q, k = (rotate(x, *rotary) for x in (q, k))
        if isinstance(layout, Spans):
            return layout.attend(q, k, v, self.dropout)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.config.mixer == "relu2":
            divisor = self.config.attention_divisor
            out = relu2_attention(q, k, v, layout, causal=causal, divisor=divisor, dropout=self.dropout)
        else:
            out = F.scaled_dot_product_attention(q, k, v, layout, self.dropout, is_causal=causal and layout is None)
        return out.transpose(1, 2)


class PerformerMixer(Mixer):
    """FAVOR+. `features` [R, S] is a buffer, saved with the weights; there are no attention weights for dropout."""

    def __init__(self, config: TransformerPPConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.features = nn.Buffer(torch.empty(config.performer_features, config.rotary_dim))

    def sample(self, count: int) -> Tensor:
        """The features of this layer after `count` redraws, float32 `[R, S]`."""
        seed = (self.config.performer_seed * 1_000_003 + self.layer_idx) * 1_000_003 + count
        return orthogonal_features(*self.features.shape, seed % 2**63)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout, causal: bool) -> Tensor:
        kernel = self.config.performer_kernel
        return performer_attention(q, k, v, layout, self.features, causal=causal, kernel=kernel)


class CombinerMixer(Mixer):
    """Combiner, row-major axial."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout, causal: bool) -> Tensor:
        return combiner_attention(q, k, v, layout, causal=causal, dropout=self.dropout)


class MixedChunkMixer(Mixer):
    """FLASH's attention with several heads: local and global queries and keys are `gamma * x + beta` of one projection
    per head, as FLASH makes them from one basis, and each head has its own Toeplitz bias."""

    def __init__(self, config: TransformerPPConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        shape = (4, config.num_attention_heads, config.rotary_dim)  # quad_q, quad_k, lin_q, lin_k
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(config.num_attention_heads, 2 * config.chunk_size - 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotary, layout: ChunkLayout, causal: bool) -> Tensor:
        heads = [x * gamma + beta for x, gamma, beta in zip((q, k, q, k), self.gamma, self.beta, strict=True)]
        if rotary is not None:
            heads = [rotate(head, *rotary) for head in heads]
        *heads, v = (split_heads(x, layout) for x in (*heads, v))
        span, length = self.config.chunk_size, v.shape[3]
        # [H, C, C] of b[i, j] = w[j - i + span - 1]; a shorter input uses the middle of w.
        bias = self.bias[:, span - length : span + length - 1].unfold(1, length, 1).flip(1)
        out = multi_head_mixed_chunk_attention(
            *heads, v, layout, bias.to(v.dtype), causal=causal, divisor=self.config.attention_divisor,
            dropout=self.dropout,
        )  # fmt: skip
        return merge_heads(out, layout)


MIXERS = {
    "softmax": QuadraticMixer, "relu2": QuadraticMixer, "performer": PerformerMixer, "combiner": CombinerMixer,
    "mixed_chunk": MixedChunkMixer,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# The block
# ------------------------------------------------------------------------------------------------------------------
class TransformerPPAttention(nn.Module):
    """Multi-head attention: projections around a mixer, and an optional gate on its output."""

    def __init__(self, config: TransformerPPConfig, layer_idx: int):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.gate_proj = nn.Linear(D, D, bias=False) if config.gated_attention else None
        self.o_proj = nn.Linear(D, D, bias=False)
        self.mixer = MIXERS[config.mixer](config, layer_idx)

    def forward(self, x_BND: Tensor, rotary, layout: Tensor | ChunkLayout | Spans | None, causal: bool) -> Tensor:
        q, k, v = (
            project(x_BND).unflatten(2, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.mixer(q, k, v, rotary, layout, causal).flatten(2)
        if self.gate_proj is not None:
            out = F.silu(self.gate_proj(x_BND)) * out
        return self.o_proj(out)


class TransformerPPFeedForward(nn.Module):
    """Gated linear unit, `W_down (act(W_gate x) * W_up x)` (arXiv 2002.05202), or MLP, `W_down act(W_up x)`."""

    def __init__(self, config: TransformerPPConfig):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False) if config.feed_forward == "glu" else None
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TransformerPPLayer(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: TransformerPPConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = NORMS[config.norm_type](config)
        self.attention = TransformerPPAttention(config, layer_idx)
        self.mlp_norm = NORMS[config.norm_type](config)
        self.mlp = TransformerPPFeedForward(config)
        self.dropout = config.hidden_dropout

    def forward(
        self, hidden_states: Tensor, rotary, layout: Tensor | ChunkLayout | Spans | None, causal: bool
    ) -> Tensor:
        out = self.attention(self.attention_norm(hidden_states), rotary, layout, causal)
        hidden_states = hidden_states + F.dropout(out, self.dropout, self.training)
        out = self.mlp(self.mlp_norm(hidden_states))
        return hidden_states + F.dropout(out, self.dropout, self.training)


class TransformerPPPreTrainedModel(PreTrainedModel):
    config: TransformerPPConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerPPLayer"]
    _can_record_outputs = {"hidden_states": TransformerPPLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, NORMS["scale_norm"]):
            init.ones_(module.weight)
        elif isinstance(module, FlashScaledSinusoid):
            init.constant_(module.scale, self.config.hidden_size**-0.5)
        elif isinstance(module, PerformerMixer):
            init.copy_(module.features, module.sample(0))
        elif isinstance(module, TransformerPPModel) and hasattr(module, "passes"):
            init.zeros_(module.passes)
        elif isinstance(module, MixedChunkMixer):
            init.ones_(module.gamma)
            init.zeros_(module.beta)
            init.normal_(module.bias, mean=0.0, std=self.config.initializer_range)


class TransformerPPModel(TransformerPPPreTrainedModel):
    """Transformer++ without a head: causal if `config.is_decoder`, bidirectional otherwise."""

    def __init__(self, config: TransformerPPConfig):
        super().__init__(config)
        self.is_causal = config.is_decoder
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding == "sinusoidal":
            self.embed_positions = FlashScaledSinusoid(config)
        elif config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([TransformerPPLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = NORMS[config.norm_type](config)
        if config.mixer == "performer" and config.performer_redraw_interval:
            self.passes = nn.Buffer(torch.zeros((), dtype=torch.long))  # saved, so that a resumed run redraws on time
        self.rotary_emb = FlashRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the model; padding and packed documents are passed as for FLASH.

        Raises:
            ValueError: a cache is given, which this baseline does not support; or [`check_inputs`] refuses the inputs.
        """
        check_inputs(self, input_ids, inputs_embeds, kwargs.get("is_causal"))
        if resolve_cache(cache, past_key_values, **kwargs) is not None:
            raise ValueError(
                "`cache` (or `past_key_values`) must be None: the Transformer++ baseline has no decoding cache."
            )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, N = hidden_states.shape[:2]
        documents = resolve_documents(
            B, N, hidden_states.device, attention_mask=attention_mask, position_ids=position_ids,
            cu_seq_lens=kwargs.get("cu_seq_lens_q"), seq_idx=kwargs.get("seq_idx"),
        )  # fmt: skip
        check_single(documents, kwargs.get("single_document", False))
        if MIXERS[self.config.mixer].chunked:
            layout = chunk_layout(documents, B, self.config.chunk_size, causal=self.is_causal)
        elif self.config.mixer == "softmax" and not (self.is_causal or documents.is_plain or is_tracing()):
            layout = Spans.of(documents, B)
        else:
            layout = quadratic_layout(documents, B, causal=self.is_causal).visible_BNM
            if layout is not None:
                # A query without visible keys (padding) would give NaN, which spreads in the backward pass.
                layout = (layout | torch.eye(N, dtype=torch.bool, device=layout.device))[:, None]
        if self.training and self.config.mixer == "performer" and self.config.performer_redraw_interval:
            self.count_and_redraw()
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.positions(hidden_states, documents.position_BN)
        hidden_states = F.dropout(hidden_states, self.config.hidden_dropout, self.training)
        rotary = None
        if self.config.position_embedding == "rope":
            rotary = [angle[:, :, None] for angle in self.rotary_emb(hidden_states, documents.position_BN)]
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary=rotary, layout=layout, causal=self.is_causal)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))

    def positions(self, x_BND: Tensor, position_BN: Tensor) -> Tensor:
        """Positions to add to the embeddings, `[B or 1, N, D]`.

        Raises:
            ValueError: the input is longer than the learned positions.
        """
        if isinstance(self.embed_positions, FlashScaledSinusoid):
            return self.embed_positions(x_BND, position_BN)
        limit, length = self.config.max_position_embeddings, x_BND.shape[1]
        # Longer sequences are fine if no document in them is longer.
        if length > limit and int(position_BN.max()) >= limit:
            raise ValueError(
                f"position_embedding='learned' has max_position_embeddings = {limit} positions, got "
                f"{int(position_BN.max()) + 1} tokens. Shorten the input, or use position_embedding='sinusoidal'."
            )
        return self.embed_positions(position_BN)

    @torch.no_grad()
    def count_and_redraw(self) -> None:
        """Count a forward pass in training and redraw Performer's features if it is time. Not in the layers, whose
        forward runs twice under gradient checkpointing."""
        self.passes += 1
        redraws, rest = divmod(int(self.passes), self.config.performer_redraw_interval)
        if rest == 0:
            for layer in self.layers:
                mixer = layer.attention.mixer
                mixer.features.copy_(mixer.sample(redraws))


class TransformerPPForCausalLM(TransformerPPPreTrainedModel):
    """Transformer++ with a language-model head, always causal. It has no cache, so it does not generate."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    is_decoder = True

    def __init__(self, config: TransformerPPConfig):
        super().__init__(with_direction(config, is_decoder=self.is_decoder))
        self.model = TransformerPPModel(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = FlashForCausalLM.forward


class TransformerPPForMaskedLM(TransformerPPForCausalLM):
    """Transformer++ with a masked language-model head, always bidirectional."""

    is_decoder = False
    transform = None  # optional in FLASH's head
    forward = FlashForMaskedLM.forward


class TransformerPPTaskModel(TransformerPPPreTrainedModel):
    """The base with dropout and one linear layer on top."""

    head_name, head_width, pools = FlashTaskModel.head_name, FlashTaskModel.head_width, FlashTaskModel.pools
    output_class = FlashTaskModel.output_class

    def __init__(self, config: TransformerPPConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransformerPPModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        setattr(self, self.head_name, nn.Linear(config.hidden_size, self.head_width or config.num_labels))
        self.post_init()

    padding_mask = FlashTaskModel.padding_mask
    encode = FlashTaskModel.encode
    forward = FlashTaskModel.forward


class TransformerPPForSequenceClassification(TransformerPPTaskModel):
    """Transformer++ with a classifier or regressor on the whole sequence."""

    head_loss = FlashForSequenceClassification.head_loss


class TransformerPPForTokenClassification(TransformerPPTaskModel):
    """Transformer++ with a classifier on every token."""

    pools = FlashForTokenClassification.pools
    output_class = FlashForTokenClassification.output_class
    head_loss = FlashForTokenClassification.head_loss


class TransformerPPForQuestionAnswering(TransformerPPTaskModel):
    """Transformer++ with a head for the start and end of an answer."""

    head_name = FlashForQuestionAnswering.head_name
    head_width = FlashForQuestionAnswering.head_width
    forward = FlashForQuestionAnswering.forward


__all__ = [
    "TransformerPPConfig", "TransformerPPForCausalLM", "TransformerPPForMaskedLM", "TransformerPPForQuestionAnswering",
    "TransformerPPForSequenceClassification", "TransformerPPForTokenClassification", "TransformerPPModel",
    "TransformerPPPreTrainedModel",
]  # fmt: skip

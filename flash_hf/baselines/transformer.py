# SPDX-License-Identifier: Apache-2.0
"""Transformer++, the strong baseline of the paper, for studies: softmax attention, RoPE, gated linear units, RMSNorm.

Whatever is not the layer itself is FLASH's own: documents, positions, heads, pooling and losses are imported, not
written again, so that two trainings can differ in the layer alone. There is no decoding cache here.
"""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import RopeParameters
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..attention_flash import rotate
from ..chunking_flash import quadratic_layout, resolve_documents
from ..configuration_flash import HOST_KEYS, nearest
from ..modeling_flash import (
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashForQuestionAnswering,
    FlashForSequenceClassification,
    FlashForTokenClassification,
    FlashRMSNorm,
    FlashRotaryEmbedding,
    FlashTaskModel,
    check_inputs,
    with_direction,
)


@strict
class TransformerPPConfig(PreTrainedConfig):
    r"""
    Configuration of Transformer++. `TransformerPPConfig()` has the size of `FlashConfig()`: 12 blocks of width 768.

    Args:
        vocab_size (`int`, defaults to 32000): Rows of the embedding matrix.
        hidden_size (`int`, defaults to 768): Model width.
        num_hidden_layers (`int`, defaults to 12): Blocks of attention and feed-forward; one stands for two of FLASH.
        num_attention_heads (`int`, defaults to 12): Heads; their width is `hidden_size` over it, and even.
        intermediate_size (`int`, *optional*): Width of the gated linear unit. Defaults to 8/3 of `hidden_size`,
            rounded to a multiple of 8: three matrices then have the size of the plain Transformer's two.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gate: `"silu"` (SwiGLU) or `"gelu"` (GEGLU).
        norm_eps (`float`, defaults to 1e-5): Of the RMS norms.
        rope_parameters (`dict`, *optional*): transformers' RoPE settings. Defaults to base 10000.
        hidden_dropout, attention_dropout (`float`, default to 0.0): Dropout on embeddings and outputs, and on weights.
        max_position_embeddings (`int`, defaults to 8192): Training length, which only scaled RoPE asks for.
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
    norm_eps: float = 1e-5
    rope_parameters: RopeParameters | dict | None = None
    hidden_dropout: int | float = 0.0
    attention_dropout: int | float = 0.0
    max_position_embeddings: int = 8192
    initializer_range: int | float = 0.02
    is_decoder: bool = False
    # Only so that the two configurations take the same arguments: nothing is cached.
    use_cache: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for name in kwargs:
            # What resembles no field is kept as an attribute, as in every configuration of transformers.
            near = nearest(name, {*self.__dataclass_fields__})
            if near and name not in HOST_KEYS and not hasattr(type(self), name) and not name.startswith("_"):
                raise ValueError(f"TransformerPPConfig: unknown field `{name}` (value {kwargs[name]!r}).{near}")
        if self.intermediate_size is None:
            self.intermediate_size = round(self.hidden_size / 3) * 8
        super().__post_init__(**kwargs)

    @property
    def rotary_dim(self) -> int:
        """All dimensions of a head are turned."""
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """Check values and their combinations."""

        def refuse(name: str, rule: str):
            raise ValueError(f"TransformerPPConfig: `{name}` must be {rule}, got {getattr(self, name)!r}.")

        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                refuse(name, "a probability in [0, 1)")
        if self.hidden_size % (2 * self.num_attention_heads):
            refuse("num_attention_heads", f"such that each head has an even part of hidden_size {self.hidden_size}")
        if self.hidden_act not in ACT2FN:
            refuse("hidden_act", "an activation of transformers.activations.ACT2FN")


class TransformerPPAttention(nn.Module):
    """Multi-head softmax attention with RoPE, through torch's scaled_dot_product_attention."""

    def __init__(self, config: TransformerPPConfig):
        super().__init__()
        D = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x_BND: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor | None, causal: bool) -> Tensor:
        q, k, v = (
            project(x_BND).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(head, *rotary) for head in (q, k))
        out = F.scaled_dot_product_attention(
            q, k, v, visible, self.dropout if self.training else 0.0, is_causal=causal and visible is None
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class TransformerPPFeedForward(nn.Module):
    """Gated linear unit: `W_down (act(W_gate x) * W_up x)` (arXiv 2002.05202)."""

    def __init__(self, config: TransformerPPConfig):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TransformerPPLayer(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: TransformerPPConfig):
        super().__init__()
        self.attention_norm = FlashRMSNorm(config)
        self.attention = TransformerPPAttention(config)
        self.mlp_norm = FlashRMSNorm(config)
        self.mlp = TransformerPPFeedForward(config)
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: Tensor, rotary, visible: Tensor | None, causal: bool) -> Tensor:
        out = self.attention(self.attention_norm(hidden_states), rotary, visible, causal)
        hidden_states = hidden_states + F.dropout(out, self.dropout, self.training)
        out = self.mlp(self.mlp_norm(hidden_states))
        return hidden_states + F.dropout(out, self.dropout, self.training)


class TransformerPPPreTrainedModel(PreTrainedModel):
    config: TransformerPPConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerPPLayer"]
    _can_record_outputs = {"hidden_states": TransformerPPLayer}


class TransformerPPModel(TransformerPPPreTrainedModel):
    """Transformer++ without a head: causal if `config.is_decoder`, bidirectional otherwise."""

    def __init__(self, config: TransformerPPConfig):
        super().__init__(config)
        self.is_causal = config.is_decoder
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([TransformerPPLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = FlashRMSNorm(config)
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
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the model; padding and packed documents are marked as for FLASH, and have the same meaning.

        Raises:
            ValueError: for a cache, which this baseline does not have, and for what [`check_inputs`] refuses.
        """
        check_inputs(input_ids, inputs_embeds, self.config, kwargs.get("is_causal"), self.is_causal)
        if past_key_values is not None:
            raise ValueError("past_key_values must be None: the Transformer++ baseline has no decoding cache.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, N = hidden_states.shape[:2]
        documents = resolve_documents(
            B, N, hidden_states.device, attention_mask=attention_mask, position_ids=position_ids,
            cu_seq_lens=kwargs.get("cu_seq_lens_q"), seq_idx=kwargs.get("seq_idx"),
        )  # fmt: skip
        visible = quadratic_layout(documents, B, causal=self.is_causal).visible_BNM
        if visible is not None:
            # A query that sees nothing (padding) would give NaN, and NaN times zero spreads in the backward pass.
            visible = (visible | torch.eye(N, dtype=torch.bool, device=visible.device))[:, None]
        hidden_states = F.dropout(hidden_states, self.config.hidden_dropout, self.training)
        rotary = [angle[:, None] for angle in self.rotary_emb(hidden_states, documents.position_BN)]
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary=rotary, visible=visible, causal=self.is_causal)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


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
    forward = FlashForMaskedLM.forward


class TransformerPPTaskModel(TransformerPPPreTrainedModel):
    """The base with dropout and one linear layer on top."""

    head_name = "score"

    def __init__(self, config: TransformerPPConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransformerPPModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        setattr(self, self.head_name, nn.Linear(config.hidden_size, self.head_width()))
        self.post_init()

    head_width = FlashTaskModel.head_width
    encode = FlashTaskModel.encode


class TransformerPPForSequenceClassification(TransformerPPTaskModel):
    """Transformer++ with a classifier or regressor on the whole sequence."""

    forward = FlashForSequenceClassification.forward


class TransformerPPForTokenClassification(TransformerPPTaskModel):
    """Transformer++ with a classifier on every token."""

    forward = FlashForTokenClassification.forward


class TransformerPPForQuestionAnswering(TransformerPPTaskModel):
    """Transformer++ that marks the span of an answer."""

    head_name = FlashForQuestionAnswering.head_name
    head_width = FlashForQuestionAnswering.head_width
    forward = FlashForQuestionAnswering.forward


__all__ = [
    "TransformerPPConfig", "TransformerPPForCausalLM", "TransformerPPForMaskedLM", "TransformerPPForQuestionAnswering",
    "TransformerPPForSequenceClassification", "TransformerPPForTokenClassification", "TransformerPPModel",
    "TransformerPPPreTrainedModel",
]  # fmt: skip

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
"""`FlashConfig`: every choice that changes the function FLASH computes; the defaults are the paper's base model."""

import difflib
import os
from dataclasses import fields
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import auto_docstring


CHOICES = {
    "attention_type": ("mixed_chunk", "quadratic", "local", "global"),
    "attention_activation": ("relu2", "softmax", "laplace"),
    "relative_bias": ("toeplitz", "rotary", "t5", None),
    "norm_type": ("scale_norm", "layer_norm", "rms_norm"),
    "final_norm_type": ("scale_norm", "layer_norm", "rms_norm", "none", None),
    "global_normalization": ("mean", "chunk"),
    "global_form": ("paper", "previous_token"),
    "global_state": ("mean", "delta"),
    "attention_init": ("normal", "recent"),
    "problem_type": ("regression", "single_label_classification", "multi_label_classification", None),
    "backend": ("auto", "torch", "triton"),
}

# FLASH+ beside a `chunk_shift` of half a chunk, see `FlashConfig.plus`.
PLUS = {
    "global_form": "previous_token", "local_key_shift": True, "use_scaled_sinusoid": False, "attention_init": "recent",
}  # fmt: skip

# Names under which cache_flash.py registers its layers with transformers. Raise the number when the layers' methods
# change: otherwise an older copy of this code in the same process (a checkpoint's remote code) gets these layers.
CHUNK_LAYER_TYPE = "flash_gau_2"
QUADRATIC_LAYER_TYPE = "flash_gau_quadratic_2"

# Far above any model: values of a broken or hostile config.json are refused before memory is allocated.
LIMITS = {
    "vocab_size": 10**8, "hidden_size": 2**20, "num_hidden_layers": 10**5, "expansion_factor": 1000,
    "query_key_dim": 2**16, "chunk_size": 2**24, "max_position_embeddings": 2**28, "t5_num_buckets": 2**20,
    "t5_max_distance": 2**31, "attention_divisor": 1e30, "norm_eps": 1e3, "final_norm_eps": 1e3,
    "initializer_range": 1e3,
}  # fmt: skip
MAX_PARAMETERS = 10**12
MAX_LABELS = 10**7

# Keyword arguments that transformers accepts without declaring them as fields.
HOST_KEYS = {
    "name_or_path", "torch_dtype", "num_labels", "output_attentions", "attn_implementation", "experts_implementation",
    "rope_theta", "rope_scaling", "partial_rotary_factor", "tie_last_hidden_states", "model_type", "auto_map",
    "tokenizer_class", "task_specific_params", "quantization_config", "custom_pipelines", "transformers_weights",
}  # fmt: skip

# What other models call these fields.
FOREIGN = {
    "intermediate_size": "expansion_factor", "d_model": "hidden_size", "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "num_heads": "num_attention_heads",
}  # fmt: skip


def nearest(value: object, valid: tuple | list | set) -> str:
    """`" Did you mean 'x'?"` for the closest valid name, or an empty string."""
    found = difflib.get_close_matches(str(value), [str(name) for name in valid if name is not None], n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


@auto_docstring(
    custom_intro="""
    Configuration of FLASH, the gated attention unit with mixed chunk attention of "Transformer Quality in Linear Time"
    (arXiv 2202.10447). `FlashConfig()` is the paper's base model: 24 layers of width 768, 112 M parameters.

    Raises `ValueError` for a misspelt field, and huggingface_hub's `StrictDataclassError` for a wrong type or value.
    """
)
@strict
class FlashConfig(PreTrainedConfig):
    r"""
    vocab_size (`int`, defaults to 32000): Rows of the embedding matrix.
    hidden_size (`int`, defaults to 768): Model width `D`. Must be an even number if the sinusoid is used.
    num_hidden_layers (`int`, defaults to 24): Layers; two gated attention units replace one Transformer block.
    expansion_factor (`int` or `float`, defaults to 2): `E / D`: the width of gate and values, relative to the model.
    query_key_dim (`int`, defaults to 128): Width `S` of the shared queries and keys.
    num_attention_heads (`int`, defaults to 1): Always 1; read by PEFT, and by transformers for a static cache.
    chunk_size (`int`, defaults to 256): Tokens per chunk `C`. Not a speed setting, but part of the model.
    chunk_shift (`int`, defaults to 0): In every second layer a document's first chunk begins this many tokens
        before the document, so that chunk borders of one layer lie inside chunks of the next (like Swin's shifted
        windows). 0 is the paper's form, half of `chunk_size` is FLASH+ ([`~FlashConfig.plus`]).
    attention_type (`str`, defaults to `"mixed_chunk"`): `"mixed_chunk"` (FLASH), `"quadratic"` (FLASH-Quad: one
        attention over the document, quadratic cost, a cache that grows), `"local"` or `"global"` (one branch).
    attention_activation (`str`, defaults to `"relu2"`): `"relu2"`: `relu(q k / divisor + b)^2`; `"laplace"`:
        MEGA's smooth version of it; `"softmax"`: `softmax(q k / sqrt(S) + b)` over the visible keys.
    attention_divisor (`int` or `float`, *optional*): Divisor of relu2 and laplace scores: a constant, never the
        length of the input. Defaults to `chunk_size`, or `max_position_embeddings` for `"quadratic"`.
    relative_bias (`str` or `None`, defaults to `"toeplitz"`): `"toeplitz"` (one weight per offset; for spans up to
        512), `"rotary"` (`<RoPE_i(a), RoPE_j(b)>`, any span), `"t5"` (T5's buckets) or `None`.
    t5_num_buckets (`int`, defaults to 32): Buckets of the `"t5"` bias.
    t5_max_distance (`int`, defaults to 128): Distance beyond which the `"t5"` bias is constant.
    norm_type (`str`, defaults to `"scale_norm"`): `"scale_norm"` (RMS with one scalar gain), `"layer_norm"` or
        `"rms_norm"`.
    norm_eps (`float`, defaults to 1e-5): Added to the mean square, or the variance, inside the root.
    final_norm_type (`str`, *optional*): Norm before the head, `"none"` for none. Defaults to `norm_type`.
    final_norm_eps (`float`, *optional*): Eps of the final norm. Defaults to `norm_eps`.
    embedding_norm (`bool`, defaults to `False`): Normalise the embeddings before the first layer.
    mlm_transform (`bool`, defaults to `False`): Give the masked head BERT's transform, a linear layer, `hidden_act`
        and a norm, before its decoder.
    lm_head_bias (`bool`, defaults to `False`): Give the masked head's decoder a bias.
    hidden_act (`str`, defaults to `"silu"`): Activation of gate, values and the shared query/key basis.
    use_rope (`bool`, defaults to `True`): Rotate queries and keys by their position in the document.
    rope_parameters (`dict`, *optional*): transformers' RoPE settings: `rope_theta` (10000 by default), `rope_type`,
        scaling, and `partial_rotary_factor` for RoPE on the first dimensions only.
    rope_interleaved (`bool`, defaults to `False`): Rotate neighbouring pairs instead of the two halves.
    use_scaled_sinusoid (`bool`, defaults to `True`): Add sinusoidal positions times one learnt scalar.
    global_normalization (`str`, defaults to `"mean"`): Divide the global sum over tokens by their number (`"mean"`)
        or by `chunk_size` (`"chunk"`, as some ports do: it grows with the position).
    global_form (`str`, defaults to `"paper"`): `"paper"`, or `"previous_token"`: a value is added to the global
        sum under the key of the token before it, and global queries and keys are not rotated, so that a token can
        look up what followed its earlier occurrences at any distance (FLASH+).
    global_state (`str`, defaults to `"mean"`): What global queries read: `"mean"`, or `"delta"`: the state of the
        gated delta rule (arXiv 2412.06464), in which a value replaces what its key returned before, with a decay and
        a strength learnt per token. Causal models only.
    local_window (`int`, defaults to 1): Chunks that local attention covers: a token's own, or with 2 also the previous
        one. Causal models only. With 2 it runs in PyTorch: there are no kernels yet.
    local_key_shift (`bool`, defaults to `False`): Local keys take every second pair of dimensions from the key of the
        token before them (0 at a document's first token), so that one layer can find what followed an earlier
        occurrence of a token in its chunk.
    hidden_dropout (`float`, defaults to 0.0): Dropout on the embeddings and on each layer's output.
    attention_dropout (`float`, defaults to 0.0): Dropout on the quadratic attention weights.
    max_position_embeddings (`int`, defaults to 8192): Training length. It only limits `"quadratic"` with a
        `"toeplitz"` bias; the chunked forms take any length.
    initializer_range (`float`, defaults to 0.02): Standard deviation of weights, offset scales and biases `b`.
    attention_init (`str`, defaults to `"normal"`): How attention is initialised. `"normal"`: scales of queries and
        keys and relative biases are sampled like all weights, as in the paper; the unit's output is then near 0.
        `"recent"`: the scales are 1 and the biases of the nearest tokens are raised, so that local attention
        favours the token itself and the three around it (FLASH+; it lowers the loss only with
        `use_scaled_sinusoid=False`).
    is_decoder (`bool`, defaults to `False`): Whether `FlashModel` is causal. The causal head always is, the masked
        head never.
    use_cache (`bool`, defaults to `True`): Return the decoding state from causal models; in training only if a
        call asks for it.
    backend (`str`, defaults to `"auto"`): `"triton"` (kernels for NVIDIA GPUs, an error where they cannot run),
        `"torch"`, or `"auto"`: kernels where they can run, and one warning where they cannot. The results are the
        same.
    tie_word_embeddings (`bool`, defaults to `True`): Share the embedding with the output projection.
    """

    model_type = "flash_gau"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"head_dim": "query_key_dim"}
    # Gate and values are sharded over E; queries and keys, shared by all of E, are not.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.gau.u_proj": "colwise",
        "layers.*.gau.v_proj": "colwise",
        "layers.*.gau.o_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 24
    expansion_factor: int | float = 2
    query_key_dim: int = 128
    num_attention_heads: int = 1
    chunk_size: int = 256
    chunk_shift: int = 0
    attention_type: str = "mixed_chunk"
    attention_activation: str = "relu2"
    attention_divisor: int | float | None = None
    relative_bias: str | None = "toeplitz"
    t5_num_buckets: int = 32
    t5_max_distance: int = 128
    norm_type: str = "scale_norm"
    norm_eps: float = 1e-5
    final_norm_type: str | None = None
    final_norm_eps: float | None = None
    embedding_norm: bool = False
    mlm_transform: bool = False
    lm_head_bias: bool = False
    hidden_act: str = "silu"
    use_rope: bool = True
    rope_parameters: RopeParameters | dict | None = None
    rope_interleaved: bool = False
    use_scaled_sinusoid: bool = True
    global_normalization: str = "mean"
    global_form: str = "paper"
    global_state: str = "mean"
    local_window: int = 1
    local_key_shift: bool = False
    hidden_dropout: int | float = 0.0
    attention_dropout: int | float = 0.0
    max_position_embeddings: int = 8192
    initializer_range: int | float = 0.02
    attention_init: str = "normal"
    is_decoder: bool = False
    use_cache: bool = True
    backend: str = "auto"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self._refuse_unknown(kwargs)
        self._refuse_huge()  # before the base class makes a list with an entry per layer
        self._refuse_labels()  # before it takes them as dictionaries
        if self.attention_divisor is None:
            # Resolved here so that it is saved: a later change of chunk_size must not change it.
            self.attention_divisor = self.span
        # TRL expects the attribute. It is filled where a checkpoint comes with its code.
        self.auto_map = kwargs.pop("auto_map", None) or {}
        super().__post_init__(**kwargs)

    @classmethod
    def plus(cls, **overrides) -> "FlashConfig":
        r"""
        FLASH+, the form to use for new causal models: every second layer shifts its chunks by half a chunk, the global
        branch stores each value under the previous token's key, half of each local key also comes from the previous
        token, positions come only from RoPE and the relative bias, and attention is initialised to favour the nearest
        tokens. A step takes 1 % more time than with the paper's form (`FlashConfig()`) on Hopper GPUs, 5 % elsewhere.
        Masked models should keep the paper's form. Measurements: scripts/results/README.md.

        Args:
            **overrides: Fields of [`FlashConfig`]; each takes precedence over FLASH+'s value. `chunk_shift` is half of
                the `chunk_size` given here.

        ```python
        >>> from flash_hf import FlashConfig

        >>> FlashConfig.plus(chunk_size=64).chunk_shift
        32

        ```
        """
        config = cls(**{**PLUS, **overrides})  # first, so that chunk_size is known to be a positive number
        if "chunk_shift" not in overrides:
            config.chunk_shift = config.chunk_size // 2
            config.validate()
        return config

    def to_dict(self):
        values = super().to_dict()
        if not values.get("auto_map"):
            values.pop("auto_map", None)
        return values

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_dict, known = cls._without_foreign_choices(config_dict), cls._known_keys()
        extra = {key: value for key, value in config_dict.items() if key not in known and not key.startswith("_")}
        config_dict = {key: value for key, value in config_dict.items() if key not in extra}
        unused = kwargs.pop("return_unused_kwargs", False)
        config, kwargs = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        # A file may come from another version: unknown keys are kept as attributes.
        for key, value in extra.items():
            if not hasattr(config, key):
                setattr(config, key, value)
        config.validate()
        return (config, kwargs) if unused else config

    @classmethod
    def _without_foreign_choices(cls, config_dict: dict) -> dict:
        """The keys of a file without those that choose kernels to download, or code that the file comes without."""
        weights = config_dict.get("transformers_weights")
        if weights is not None and (not isinstance(weights, str) or weights != os.path.basename(weights)):
            raise ValueError(f"FlashConfig: `transformers_weights` must be a file name without path, got {weights!r}.")
        quantization = config_dict.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict) and not hasattr(quantization, "to_dict"):
            raise ValueError(f"FlashConfig: `quantization_config` must be a dictionary, got {quantization!r}.")
        dropped = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
        if not cls.__module__.startswith("transformers_modules"):
            # A model that the package saves again comes without its code.
            dropped.add("auto_map")
        return {key: value for key, value in config_dict.items() if key not in dropped}

    @classmethod
    def _known_keys(cls) -> set[str]:
        return {field.name for field in fields(cls)} | HOST_KEYS | set(cls.attribute_map)

    def _refuse_huge(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not value <= limit:
                raise ValueError(f"FlashConfig: `{name}` must be at most {limit}, got {value!r}.")

    def _refuse_labels(self) -> None:
        for name, of in (
            ("id2label", "names by class, {0: 'no', 1: 'yes'}"),
            ("label2id", "classes by name, {'no': 0}"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"FlashConfig: `{name}` must be a dictionary of {of}, got {value!r}.")
        wrong = [key for key in self.id2label or {} if not str(key).isdecimal()]
        if wrong:
            raise ValueError(f"FlashConfig: `id2label` must have classes (int) as keys, got {wrong[0]!r}.")

    def _refuse_unknown(self, kwargs: dict) -> None:
        if kwargs.get("per_layer_config"):
            raise ValueError("FlashConfig: `per_layer_config` is not supported: all layers share one set of fields.")
        labels = kwargs.get("num_labels")
        if labels is not None and not (isinstance(labels, int) and 0 < labels <= MAX_LABELS):
            raise ValueError(f"FlashConfig: `num_labels` must be a number from 1 to {MAX_LABELS}, got {labels!r}.")
        # The base class drops generation settings, as for every model.
        allowed = self._known_keys() | set(GenerationConfig._get_default_generation_params())
        for key, value in kwargs.items():
            if key not in allowed and not key.startswith("_"):
                names = [field.name for field in fields(self)]
                raise ValueError(
                    f"FlashConfig: unknown field `{key}` (value {value!r}); only declared fields are accepted."
                    f"{nearest(FOREIGN.get(key, key), names)} Valid fields: {', '.join(sorted(names))}."
                )

    @property
    def intermediate_size(self) -> int:
        """Width `E` of gate and values."""
        return int(round(self.hidden_size * self.expansion_factor))

    @property
    def span(self) -> int:
        """Tokens that one quadratic attention covers: a chunk, or the training length for `"quadratic"`."""
        return self.max_position_embeddings if self.attention_type == "quadratic" else self.chunk_size

    @property
    def has_quad(self) -> bool:
        """Whether there is a quadratic branch: attention inside chunks, or documents for `"quadratic"`."""
        return self.attention_type != "global"

    @property
    def has_lin(self) -> bool:
        """Whether there is a linear branch: attention to sums over chunks."""
        return self.attention_type in ("mixed_chunk", "global")

    @property
    def previous_key(self) -> bool:
        """Whether its keys are shifted: values are stored under the key of the token before them."""
        return self.global_form == "previous_token"

    def shift_of(self, layer_idx: int) -> int:
        """Empty slots before a document's first token in the chunks of this layer."""
        return self.chunk_shift if layer_idx % 2 else 0

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of queries and keys that RoPE turns."""
        return int(self.query_key_dim * (self.rope_parameters or {}).get("partial_rotary_factor", 1.0))

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer's cache, for transformers' `DynamicCache` and `StaticCache`."""
        kind = QUADRATIC_LAYER_TYPE if self.attention_type == "quadratic" else CHUNK_LAYER_TYPE
        return [kind] * self.num_hidden_layers

    def validate_layer_type(self):
        """Nothing to check: `layer_types` is derived."""

    def validate_architecture(self):
        """Check values and their combinations."""

        def refuse(name: str, rule: str, cure: str = ""):
            raise ValueError(f"FlashConfig: `{name}` must be {rule}, got {repr(getattr(self, name))[:500]}.{cure}")

        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "query_key_dim", "chunk_size", "max_position_embeddings",
            "t5_num_buckets", "t5_max_distance",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        if self.num_attention_heads != 1:
            refuse("num_attention_heads", "1", " A gated attention unit has one head, of width query_key_dim.")
        self._refuse_huge()
        self._refuse_labels()
        for name in ("expansion_factor", "norm_eps", "final_norm_eps", "attention_divisor"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                refuse(name, "greater than 0")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                refuse(name, "a probability in [0, 1)")
        if not self.initializer_range >= 0:
            refuse("initializer_range", "0 or more")
        for name, valid in CHOICES.items():
            value = getattr(self, name)
            if value not in valid:
                refuse(name, f"one of {', '.join(map(repr, valid))}", nearest(value, valid))
        from transformers.activations import ACT2CLS

        if self.hidden_act not in ACT2CLS:
            cure = nearest(self.hidden_act, [*ACT2CLS])
            refuse("hidden_act", "an activation of transformers.activations.ACT2FN", cure)
        if abs(self.hidden_size * self.expansion_factor - self.intermediate_size) > 1e-6 or self.intermediate_size < 1:
            refuse("expansion_factor", f"such that hidden_size ({self.hidden_size}) times it is a whole number")
        for name, plain in (("global_form", "paper"), ("global_state", "mean")):
            if getattr(self, name) != plain and not self.has_lin:
                refuse(name, f"{plain!r} where there is no global branch (attention_type={self.attention_type!r})")
        if self.global_state == "delta" and self.global_normalization != "mean":
            refuse("global_normalization", "'mean', its default, with global_state='delta', which is not normalised")
        if self.local_window not in (1, 2):
            refuse("local_window", "1 or 2")
        if self.local_window > 1 and self.attention_type in ("global", "quadratic"):
            refuse("local_window", f"1 where there are no chunks with keys (attention_type={self.attention_type!r})")
        if self.local_key_shift and self.attention_type in ("global", "quadratic"):
            refuse("local_key_shift", f"False where no chunks have keys (attention_type={self.attention_type!r})")
        if self.local_key_shift and self.use_rope and not self.rope_interleaved and self.rotary_dim % 4:
            refuse("local_key_shift", f"False unless RoPE turns a multiple of 4 dimensions (here {self.rotary_dim})")
        if self.attention_init == "recent" and (self.relative_bias != "toeplitz" or self.attention_type == "global"):
            refuse("attention_init", "'normal' where no relative_bias='toeplitz' is added to scores")
        if not 0 <= self.chunk_shift < self.chunk_size:
            refuse("chunk_shift", f"0 or more and below chunk_size ({self.chunk_size})")
        if self.chunk_shift and self.attention_type == "quadratic":
            refuse("chunk_shift", "0 where there are no chunks (attention_type='quadratic')")
        if self.use_scaled_sinusoid and self.hidden_size % 2:
            refuse("hidden_size", "even for sine and cosine halves", " Or set use_scaled_sinusoid=False.")
        D, E = self.hidden_size, self.intermediate_size
        parameters = self.vocab_size * D + self.num_hidden_layers * (3 * D * E + D * self.query_key_dim)
        if parameters > MAX_PARAMETERS:
            refuse("hidden_size", f"such that the model has at most {MAX_PARAMETERS} parameters, not {parameters}")
        for name, value in (self.rope_parameters or {}).items():
            wrong_type = name == "rope_type" and value != "default" and value not in ROPE_INIT_FUNCTIONS
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e30
            if wrong_type or (name in ("rope_theta", "partial_rotary_factor", "factor") and not number):
                refuse("rope_parameters", f"transformers' RoPE settings, with numbers above 0 (`{name}` is not)")
        if self.use_rope or self.relative_bias == "rotary":
            if self.query_key_dim % 2:
                cure = " Or set use_rope=False and another relative_bias."
                refuse("query_key_dim", "even, since RoPE turns pairs", cure)
            if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.query_key_dim:
                refuse(
                    "rope_parameters",
                    f"such that query_key_dim ({self.query_key_dim}) times partial_rotary_factor is even, at least 2 "
                    f"and at most query_key_dim, not {self.rotary_dim}",
                )
        if self.relative_bias == "t5" and (self.t5_num_buckets < 4 or self.t5_num_buckets % 4):
            refuse("t5_num_buckets", "a multiple of 4")
        if self.relative_bias == "t5" and self.t5_max_distance <= self.t5_num_buckets // 2:
            refuse("t5_max_distance", f"greater than t5_num_buckets // 2 = {self.t5_num_buckets // 2}")


__all__ = ["FlashConfig"]

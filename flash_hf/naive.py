# SPDX-License-Identifier: Apache-2.0
"""FLASH equation by equation, O(N^2): the reference that every faster version in this package is tested against.

Source: Hua et al., "Transformer Quality in Linear Time" (ICML 2022, arXiv 2202.10447). One document at a time, without
batch, padding or cache, so there is nothing here but the maths. `N` tokens, `C` chunk size, `D` model width,
`E` expanded width, `S` query/key width, `H` heads made from one `z`; row `i` is a query, column `j` a key.
`config` is any object with the fields of `FlashConfig`; `weights` maps state-dict names to tensors.
"""

import math

import torch


def naive_norm(x_ND, weights, config):
    """`x * rsqrt(mean(x^2) + eps) * g`, [N, D] -> [N, D]; for `scale_norm` (the paper's) g is ONE scalar."""
    if config.norm_type == "layer_norm":
        x_ND = x_ND - x_ND.mean(-1, keepdim=True)
    # eps stands inside the root, beside the mean square: for rows near zero that is not the same as clamping the norm.
    y_ND = x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + config.norm_eps) * weights["norm.weight"]
    return y_ND + weights["norm.bias"] if config.norm_type == "layer_norm" else y_ND


def naive_linear(x_NI, weights, name, act=None):
    """`act(x W + b)`, [N, I] -> [N, O]. torch stores W as [O, I], hence the transpose."""
    y_NO = x_NI @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    if act in (None, "silu"):
        return y_NO * torch.sigmoid(y_NO) if act else y_NO
    from transformers.activations import ACT2FN  # only here: with SiLU, the paper's, this file needs torch alone

    return ACT2FN[act](y_NO)


def naive_rotary(x_NS, positions_N, config):
    """RoPE on the first r of S dims, [N, S] -> [N, S]: pair p turns by `position * theta^(-2p/r)`, the rest passes."""
    # No rope_parameters means heads without RoPE; the rotary bias still needs angles and takes the paper's.
    rope = config.rope_parameters or {}
    r = int(x_NS.shape[-1] * rope.get("partial_rotary_factor", 1.0))
    frequency = float(rope.get("rope_theta", 10000.0)) ** (-torch.arange(0, r, 2, dtype=torch.float64) / r)
    # Angles are float64 whatever x is: a float32 angle near 8192 is wrong by up to 5e-4.
    angle = positions_N.cpu().double()[:, None] * frequency
    cos, sin = angle.cos().to(x_NS), angle.sin().to(x_NS)
    first, second = (slice(0, r, 2), slice(1, r, 2)) if config.rope_interleaved else (slice(r // 2), slice(r // 2, r))
    y_NS = x_NS.clone()
    y_NS[:, first] = x_NS[:, first] * cos - x_NS[:, second] * sin
    y_NS[:, second] = x_NS[:, second] * cos + x_NS[:, first] * sin
    return y_NS


def naive_t5_bucket(offset, num_buckets, max_distance, *, causal):
    """T5's bucket (Raffel et al. 2020) of `offset = key - query`, elementwise on integers of any shape."""
    side, distance = torch.zeros_like(offset), (-offset).clamp(min=0)
    if not causal:
        # Keys to the right take the upper half of the buckets. When causal they are masked, and all buckets look back.
        num_buckets //= 2
        side, distance = (offset > 0).long() * num_buckets, offset.abs()
    exact = num_buckets // 2
    # float32 and this order of operations are T5's: checkpoints were trained with its rounding at the bucket borders.
    log = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return side + torch.where(distance < exact, distance, (exact + log.long()).clamp(max=num_buckets - 1))


def naive_relative_bias(offset_NN, weights, config, *, causal):
    """The b of `A = relu(Q K^T / C + b)^2`: offsets `j - i` [N, N] -> b [N, N]."""
    w = weights["gau.relative_bias.weight"]
    if config.relative_bias == "toeplitz":  # b[i, j] = w[(j - i) + span - 1]
        # A shorter input reads the centre of w. index_select: w[...] would wrap an offset beyond the span around.
        span = config.chunk_size * config.local_window
        span = config.max_position_embeddings if config.attention_type == "quadratic" else span
        return w.index_select(0, (offset_NN + span - 1).flatten()).view_as(offset_NN)
    if config.relative_bias == "rotary":  # b[m, n] = <RoPE_m(a), RoPE_n(b)>, a function of n - m only
        N = offset_NN.shape[0]
        a_NS, b_NS = (naive_rotary(row_S.expand(N, -1), torch.arange(N), config) for row_S in w)
        return a_NS @ b_NS.T
    bucket_NN = naive_t5_bucket(offset_NN, config.t5_num_buckets, config.t5_max_distance, causal=causal)
    return w[bucket_NN, 0] * math.sqrt(config.query_key_dim)


def naive_delta(q_NS, k_NS, v_NE, gates_N2, chunk_N):
    """The gated delta rule (Yang et al. 2024, arXiv 2412.06464): what the state returns for a token's key moves
    towards its value, `S_t = a S_(t-1) + w k (v - k^T a S_(t-1))`. A token reads the state from before its chunk,
    decayed to where it is: q, k [N, S] and v [N, E] -> [N, E]."""
    q_NS, k_NS = (torch.nn.functional.normalize(x_NS, dim=-1) for x_NS in (q_NS, k_NS))
    state_SE, out = v_NE.new_zeros(k_NS.shape[1], v_NE.shape[1]), []
    for t, (a, w) in enumerate(torch.sigmoid(gates_N2)):
        if t == 0 or chunk_N[t] != chunk_N[t - 1]:
            read_SE = state_SE
        read_SE, state_SE = a * read_SE, a * state_SE
        state_SE = state_SE + w * torch.outer(k_NS[t], v_NE[t] - k_NS[t] @ state_SE)
        out.append(q_NS[t] @ read_SE)
    return torch.stack(out)


def naive_attention(heads_HNS, v_NE, weights, config, *, causal, shift=0, gates_N2=None):
    """Section 3.2, mixed chunk attention, chunk 0 from -shift, [N, S] a head and v [N, E] -> [N, E], M the keys seen:
    `(relu(Q K^T / C + b)^2 * M_same_chunk) V + (Q_lin K_lin^T * M_global / tokens seen) V`."""
    index = torch.arange(v_NE.shape[0], device=v_NE.device)
    offset_NN = index[None, :] - index[:, None]
    C = len(index) if config.attention_type == "quadratic" else config.chunk_size  # FLASH-Quad: one chunk spans it all
    chunk_N = (index + shift) // C
    out_NE = torch.zeros_like(v_NE)
    if config.attention_type != "global":
        q_NS, k_NS = heads_HNS[:2]
        if config.local_key_shift:  # every second pair of dimensions from the token before
            pair_S = torch.arange(k_NS.shape[1]) // (2 if config.rope_interleaved else 1)
            k_NS = torch.where(pair_S % 2 == 1, torch.cat((0 * k_NS[:1], k_NS[:-1])), k_NS)
        visible_NN = (chunk_N[:, None] - chunk_N[None, :]).abs() < config.local_window  # own chunk, or one before it
        visible_NN = visible_NN & (offset_NN <= 0) if causal else visible_NN
        softmax = config.attention_activation == "softmax"
        # A CONSTANT divisor: the tensor's length would change the function on short inputs and in cached decoding.
        score_NN = q_NS @ k_NS.T / (math.sqrt(config.query_key_dim) if softmax else config.attention_divisor)
        if config.relative_bias is not None:
            # b has no entry for offsets that leave the chunk; they are masked below, so any offset does for them.
            offset_NN = torch.where(visible_NN, offset_NN, 0)
            score_NN = score_NN + naive_relative_bias(offset_NN, weights, config, causal=causal)
        if softmax:
            A_NN = score_NN.masked_fill(~visible_NN, -math.inf).softmax(-1)
        elif config.attention_activation == "laplace":
            # mu and sigma make it a smooth relu^2 (Ma et al. 2022, Mega). It is not 0 at 0, hence the mask afterwards.
            mu, sigma = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
            A_NN = 0.5 * (1 + torch.erf((score_NN - mu) / (sigma * math.sqrt(2)))) * visible_NN
        else:
            A_NN = torch.relu(score_NN).square() * visible_NN
        out_NE = out_NE + A_NN @ v_NE
    if config.attention_type in ("mixed_chunk", "global"):
        q_NS, k_NS = heads_HNS[-2:]
        k_NS = k_NS if config.global_form == "paper" else torch.cat((0 * k_NS[:1], k_NS[:-1]))  # "previous_token"
        if config.global_state == "delta":
            return out_NE + naive_delta(q_NS, k_NS, v_NE, gates_N2, chunk_N)
        # Causal: the tokens of earlier chunks; the open chunk is the local part's. Else all N, own chunk too.
        seen_NN = chunk_N[None, :] < chunk_N[:, None] if causal else torch.ones_like(offset_NN)
        count_N = torch.full_like(index, C) if config.global_normalization == "chunk" else seen_NN.sum(1)
        # The clamp is for chunk 0, which has seen nothing: its zeros must stay zero, not become 0 / 0.
        out_NE = out_NE + (q_NS @ k_NS.T * (seen_NN.to(v_NE) / count_N.clamp(min=1)[:, None])) @ v_NE
    return out_NE


def naive_layer(x_ND, weights, config, *, causal, positions=None, shift=0):
    """Section 2.2, `y = x + (u * attention(z, v)) W_o + b_o`, heads `RoPE(gamma_h * z + beta_h)`: [N, D] -> [N, D].
    `positions` [N], the index in the document by default, turn the heads' RoPE; chunks and bias go by the index."""
    n_ND = naive_norm(x_ND, weights, config)
    u_NE, v_NE, z_NS = (naive_linear(n_ND, weights, f"gau.{name}_proj", config.hidden_act) for name in "uvz")
    gamma_HS, beta_HS = weights["gau.offset_scale.weight"], weights["gau.offset_scale.bias"]
    heads_HNS = [z_NS * gamma_S + beta_S for gamma_S, beta_S in zip(gamma_HS, beta_HS, strict=True)]
    if config.rope_parameters is not None:
        # Positions in the document, not in the chunk: the lin heads look across chunks.
        positions = torch.arange(x_ND.shape[0]) if positions is None else positions
        turned = slice(None if config.global_form == "paper" else -2)  # else the lin heads know no positions
        heads_HNS[turned] = [naive_rotary(head_NS, positions, config) for head_NS in heads_HNS[turned]]
    gates_N2 = None
    if config.global_state == "delta":
        gates_N2 = n_ND @ weights["gau.gate_proj.weight"].T + weights["gau.gate_bias"]
    attended_NE = naive_attention(heads_HNS, v_NE, weights, config, causal=causal, shift=shift, gates_N2=gates_N2)
    return x_ND + naive_linear(u_NE * attended_NE, weights, "gau.o_proj")


def naive_scaled_sinusoid(N, D):
    """ScaledSin before its scalar, float64 [N, D]: `cat(sin, cos)` of `n * 10000^(-i / (D/2))`, i < D/2."""
    angle = torch.outer(torch.arange(N).double(), 10000.0 ** (-torch.arange(D // 2).double() / (D // 2)))
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def naive_model(input_ids_N, weights, config, *, causal):
    """The whole model: ids [N] -> (hidden [N, D] after the final norm, logits [N, V]), V the vocabulary."""
    x_ND = weights["embed_tokens.weight"][input_ids_N]
    if config.use_scaled_sinusoid:
        x_ND = x_ND + naive_scaled_sinusoid(*x_ND.shape).to(x_ND) * weights["embed_positions.scale"]
    for i in range(config.num_hidden_layers):
        own = {name.removeprefix(f"layers.{i}."): w for name, w in weights.items() if name.startswith(f"layers.{i}.")}
        x_ND = naive_layer(x_ND, own, config, causal=causal, shift=config.chunk_shift * (i % 2))
    hidden_ND = naive_norm(x_ND, weights, config)
    return hidden_ND, hidden_ND @ weights.get("lm_head.weight", weights["embed_tokens.weight"]).T  # tied by default

# SPDX-License-Identifier: Apache-2.0
"""flash_hf/naive.py against numbers worked by hand, and against the same maths in plain Python floats.

Everything else is tested against naive.py, so a mistake in both would never show. Hence two
kinds of test: toys with numbers worked out on paper (see the comments), and one reference made of
Python loops, complex numbers and running sums, written differently from naive.py on purpose.
"""

import ast
import cmath
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from flash_hf import naive


def toy(**changes):
    """A FLASH config of toy size without bias and RoPE, with `changes`; a misspelt name is an error."""
    fields = {
        "hidden_size": 2, "query_key_dim": 1, "chunk_size": 2, "chunk_shift": 0, "max_position_embeddings": 8,
        "attention_type": "mixed_chunk", "attention_activation": "relu2", "attention_divisor": 2,
        "relative_bias": None, "t5_num_buckets": 32, "t5_max_distance": 128, "norm_type": "scale_norm",
        "norm_eps": 1e-5, "hidden_act": "silu", "rope_parameters": None, "rope_interleaved": False,
        "global_normalization": "mean", "global_form": "paper", "global_state": "mean", "local_key_shift": False,
        "local_window": 1, "use_scaled_sinusoid": True, "num_hidden_layers": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    unknown = set(changes) - set(fields)
    assert not unknown, unknown
    return SimpleNamespace(**{**fields, **changes})


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, f64(expected), rtol=0, atol=atol)


def column(*values):
    """N numbers as [N, 1]: one query, key or value dim."""
    return f64(values)[:, None]


# ---------------------------------------------------------------- local attention, by hand

# One dim, C = 2, so three tokens make the chunks {0, 1} and {2}. The divisor is 2, w = (-0.5, 0.25, 0.5), and
# b[i, j] = w[(j - i) + 1]: -0.5 for the key before, 0.25 on the diagonal, 0.5 for the key after.
LOCAL_Q, LOCAL_K, LOCAL_V = column(1, 2, 1), column(2, 1, 3), column(1, 10, 100)
LOCAL_W = {"gau.relative_bias.weight": f64([-0.5, 0.25, 0.5])}


@pytest.mark.parametrize(
    ("causal", "expected"),
    [
        # s00 = 1*2/2 + 0.25 = 1.25   s01 = 1*1/2 + 0.5 = 1      A00 = 1.5625  A01 = 1
        # s10 = 2*2/2 - 0.5  = 1.5    s11 = 2*1/2 + 0.25 = 1.25  A10 = 2.25    A11 = 1.5625
        # s22 = 1*3/2 + 0.25 = 1.75                              A22 = 3.0625, alone in its chunk
        # y0 = 1.5625*1 (+ 1*10 if it may look ahead), y1 = 2.25*1 + 1.5625*10, y2 = 3.0625*100
        (True, [[1.5625], [17.875], [306.25]]),
        (False, [[11.5625], [17.875], [306.25]]),
    ],
)
def test_local_relu2_with_bias(causal, expected):
    config = toy(attention_type="local", relative_bias="toeplitz")
    out = naive.naive_attention([LOCAL_Q, LOCAL_K], LOCAL_V, LOCAL_W, config, causal=causal)
    assert_equal(out, expected)


def test_quadratic_divides_by_the_constant_and_spans_the_document():
    # One chunk although C = 2. Scores q_i k_j / 4 with q = (4, 4, 8), k = (1, 2, 1):
    # row 0: (1, 2, 1), row 1: the same, row 2: (2, 4, 2); squared (1, 4, 1) and (4, 16, 4). v = (1, 10, 100).
    config = toy(attention_type="quadratic", attention_divisor=4)
    q, k, v = column(4, 4, 8), column(1, 2, 1), column(1, 10, 100)
    # causal:        y0 = 1, y1 = 1 + 40,       y2 = 4 + 160 + 400
    assert_equal(naive.naive_attention([q, k], v, {}, config, causal=True), [[1.0], [41.0], [564.0]])
    # bidirectional: y0 = 1 + 40 + 100 = y1,    y2 = 564
    assert_equal(naive.naive_attention([q, k], v, {}, config, causal=False), [[141.0], [141.0], [564.0]])
    # Two tokens alone give the same as beside the third: the divisor is 4, not the length.
    assert_equal(naive.naive_attention([q[:2], k[:2]], v[:2], {}, config, causal=True), [[1.0], [41.0]])


@pytest.mark.parametrize(("causal", "expected"), [(True, [4.0, 7.0, 5.0]), (False, [7.0, 7.0, 5.0])])
def test_softmax_over_the_visible_keys(causal, expected):
    # S = 4, so scores are divided by 2 (not by the divisor 1000): q = 2 ln 3 and k = (0, 1) in one dim give
    # the scores (0, ln 3), weights (1/4, 3/4); with v = (4, 8): 1 + 6 = 7. A row that sees one key returns its value.
    q, k = f64([[2 * math.log(3), 0, 0, 0]] * 3), f64([[0, 0, 0, 0], [1, 0, 0, 0], [9, 9, 9, 9]])
    config = toy(attention_type="local", attention_activation="softmax", query_key_dim=4, attention_divisor=1000)
    out = naive.naive_attention([q, k], column(4, 8, 5), {}, config, causal=causal)
    assert_equal(out[:, 0], expected)


def test_laplace_at_known_points():
    # 0.5 (1 + erf(t / sqrt 2)) is Phi, the normal distribution function, of t = (s - mu) / sigma. Any table has its
    # values at 0, 1 and -2: 0.5, 0.841344746, 0.022750132. mu = 0.70710678, sigma = 0.28209479; C = 1, divisor 2.
    mu, sigma = 0.7071067811865476, 0.28209479177387814
    q, k = column(2 * mu, 2 * (mu + sigma), 2 * (mu - 2 * sigma)), column(1, 1, 1)
    config = toy(attention_type="local", attention_activation="laplace", chunk_size=1)
    out = naive.naive_attention([q, k], column(1, 1, 1), {}, config, causal=True)
    assert_equal(out[:, 0], [0.5, 0.8413447460685429, 0.022750131948179195])


# ---------------------------------------------------------------- global attention, by hand

# C = 2, five tokens: chunks {0, 1}, {2, 3}, {4}. k v = (1*1, 2*1, 3*2, 4*1, 5*1) = (1, 2, 6, 4, 5): 3 for chunk 0, 10
# for chunk 1, 5 for chunk 2. The queries are 1 to 5.
LIN = [column(1, 2, 3, 4, 5), column(1, 2, 3, 4, 5)]
LIN_V = column(1, 1, 2, 1, 1)
GLOBAL_CASES = [
    # causal, mean: chunk 0 sees nothing; chunk 1 sees 3/2 = 1.5: 3*1.5, 4*1.5; chunk 2 sees (3 + 10)/4 = 3.25: 5*3.25
    (True, "mean", [0.0, 0.0, 4.5, 6.0, 16.25]),
    # causal, chunk: the sums over C = 2: 1.5 for chunk 1, 6.5 for chunk 2
    (True, "chunk", [0.0, 0.0, 4.5, 6.0, 32.5]),
    # bidirectional, mean: all 18 over 5 tokens = 3.6, own chunk included
    (False, "mean", [3.6, 7.2, 10.8, 14.4, 18.0]),
    # bidirectional, chunk: 18/2 = 9
    (False, "chunk", [9.0, 18.0, 27.0, 36.0, 45.0]),
]


@pytest.mark.parametrize(("causal", "normalization", "expected"), GLOBAL_CASES)
def test_global_only(causal, normalization, expected):
    # A bias without weights: the global part has none, so a lookup would be a KeyError.
    config = toy(attention_type="global", global_normalization=normalization, relative_bias="toeplitz")
    assert_equal(naive.naive_attention(LIN, LIN_V, {}, config, causal=causal)[:, 0], expected)


@pytest.mark.parametrize(("causal", "expected"), [(True, [0, 2, 3, 12, 15]), (False, GLOBAL_CASES[2][2])])
def test_global_with_shifted_chunks(causal, expected):
    # Chunks {0}, {1, 2}, {3, 4}; k v = (1, 2, 6, 4, 5) as above. Causal: chunk 1 sees 1 over one token: 2*1, 3*1;
    # chunk 2 sees 9 over three tokens: 4*3, 5*3. Bidirectional: all, whatever the chunks.
    out = naive.naive_attention(LIN, LIN_V, {}, toy(attention_type="global"), causal=causal, shift=1)
    assert_equal(out[:, 0], expected)


# ---------------------------------------------------------------- relative position bias, by hand


def offsets(n):
    return torch.arange(n)[None, :] - torch.arange(n)[:, None]


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "local", "quadratic"])
def test_toeplitz_bias_reads_the_centre(attention_type):
    # Span 3 (chunk_size, or max_position_embeddings for quadratic), w = (10, 20, 30, 40, 50), b[i, j] = w[j - i + 2]:
    # w[2] = 30 on the diagonal, larger to the right of it. Two tokens use the middle three entries.
    spans = {"chunk_size": 3, "max_position_embeddings": 7}
    if attention_type == "quadratic":
        spans = {"chunk_size": 7, "max_position_embeddings": 3}
    config = toy(attention_type=attention_type, relative_bias="toeplitz", **spans)
    weights = {"gau.relative_bias.weight": f64([10, 20, 30, 40, 50])}
    bias = naive.naive_relative_bias(offsets(3), weights, config, causal=False)
    assert_equal(bias, [[30, 40, 50], [20, 30, 40], [10, 20, 30]])
    assert_equal(naive.naive_relative_bias(offsets(2), weights, config, causal=True), [[30, 40], [20, 30]])


@pytest.mark.parametrize("causal", [True, False])
def test_toeplitz_bias_refuses_a_document_beyond_its_span(causal):
    config = toy(attention_type="quadratic", relative_bias="toeplitz", max_position_embeddings=2)
    ones = column(1, 1, 1)
    with pytest.raises(IndexError):
        naive.naive_attention([ones, ones], ones, {"gau.relative_bias.weight": f64([1, 2, 3])}, config, causal=causal)


@pytest.mark.parametrize(
    ("rope_parameters", "interleaved", "frequency"),
    [(None, False, 0.01), ({"rope_theta": 100.0}, False, 0.1), ({"rope_theta": 100.0}, True, 0.1)],
)
def test_rotary_bias(rope_parameters, interleaved, frequency):
    # S = 4 has the pairs p = 0, 1 with frequencies theta^0 and theta^(-1/2): 0.01 for the default 10000, 0.1 for 100.
    # a = (1, 0) and b = (0, 1) in pair 1 alone: RoPE_m(a) = (cos m, sin m), RoPE_n(b) = (-sin n, cos n) at that
    # frequency f, so b[m, n] = sin(m f) cos(n f) - cos(m f) sin(n f) = sin((m - n) f).
    a, b = ([0, 0, 1, 0], [0, 0, 0, 1]) if interleaved else ([0, 1, 0, 0], [0, 0, 0, 1])
    config = toy(
        relative_bias="rotary", query_key_dim=4, rope_parameters=rope_parameters, rope_interleaved=interleaved
    )
    bias = naive.naive_relative_bias(offsets(5), {"gau.relative_bias.weight": f64([a, b])}, config, causal=True)
    assert_equal(bias, [[math.sin((m - n) * frequency) for n in range(5)] for m in range(5)])


def test_t5_bias_is_scaled_by_the_root_of_s():
    # Weight k is k + 1, S = 4, so the bias is 2 (bucket + 1). Causal: bucket = distance, and 0 to the right.
    # Bidirectional: bucket = distance to the left, 16 + distance to the right.
    config = toy(relative_bias="t5", query_key_dim=4)
    weights = {"gau.relative_bias.weight": torch.arange(1, 33).double()[:, None]}
    causal = naive.naive_relative_bias(offsets(3), weights, config, causal=True)
    assert_equal(causal, [[2, 2, 2], [4, 2, 2], [6, 4, 2]])
    both = naive.naive_relative_bias(offsets(3), weights, config, causal=False)
    assert_equal(both, [[2, 36, 38], [4, 2, 36], [6, 4, 2]])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 1024), (64, 100), (8, 20)])
def test_t5_bucket_is_that_of_transformers(causal, buckets, distance):
    offset = torch.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(offset, not causal, buckets, distance)
    assert torch.equal(naive.naive_t5_bucket(offset, buckets, distance, causal=causal), expected)


# ---------------------------------------------------------------- RoPE, norms, sinusoids, activations, by hand


@pytest.mark.parametrize(
    ("interleaved", "factor", "expected"),
    [
        # theta = 100, S = 4, position 2: pair 0 turns by 2, pair 1 by 2 * 100^(-1/2) = 0.2.
        # cos 2 = -0.416146836547, sin 2 = 0.909297426826, cos 0.2 = 0.980066577841, sin 0.2 = 0.198669330795.
        # half-split pairs (1, 3), (2, 4): 1 cos 2 - 3 sin 2 = -3.144039117025, 3 cos 2 + 1 sin 2 = -0.339143082816,
        #                                  2 cos .2 - 4 sin .2 = 1.165455832502, 4 cos .2 + 2 sin .2 = 4.317604972955
        (False, 1.0, [-3.144039117025, 1.165455832502, -0.339143082816, 4.317604972955]),
        # interleaved pairs (1, 2), (3, 4): 1 cos 2 - 2 sin 2 = -2.234741690199, 2 cos 2 + 1 sin 2 = 0.077003753732,
        #                                   3 cos .2 - 4 sin .2 = 2.145522410344, 4 cos .2 + 3 sin .2 = 4.51627430375
        (True, 1.0, [-2.234741690199, 0.077003753732, 2.145522410344, 4.516274303750]),
        # r = 2 of 4 dims: one pair (1, 2), turned by 2; 3 and 4 pass. Both layouts pair it alike.
        (False, 0.5, [-2.234741690199, 0.077003753732, 3.0, 4.0]),
        (True, 0.5, [-2.234741690199, 0.077003753732, 3.0, 4.0]),
    ],
)
def test_rotary(interleaved, factor, expected):
    config = toy(
        query_key_dim=4,
        rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": factor},
        rope_interleaved=interleaved,
    )
    x = f64([[1, 2, 3, 4], [1, 2, 3, 4]])
    out = naive.naive_rotary(x, torch.tensor([0, 2]), config)
    assert_equal(out, [[1.0, 2.0, 3.0, 4.0], expected], atol=1e-11)
    assert_equal(x, [[1, 2, 3, 4], [1, 2, 3, 4]])


def test_rotary_angles_are_float64_before_they_are_cast():
    # Position 2^20 + 1 at frequency 1: a float32 angle is exact here, but one of 3^-0.5 is off by up to 0.03 rad.
    config = toy(query_key_dim=4, rope_parameters={"rope_theta": 3.0})
    out = naive.naive_rotary(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([2**20 + 1]), config)
    angle = (2**20 + 1) / math.sqrt(3)
    assert out.dtype == torch.float32
    assert_equal(out.double(), [[0, math.cos(angle), 0, math.sin(angle)]], atol=1e-7)


@pytest.mark.parametrize(
    ("norm_type", "weights", "eps", "expected"),
    [
        # x = (3, 4): mean square 12.5. ScaleNorm by the scalar 2: 2*3/sqrt 12.5 = 1.6970562748, 2*4/sqrt 12.5.
        ("scale_norm", {"norm.weight": 2.0}, 0.0, [1.697056274847714, 2.262741699796952]),
        # eps = 12.5 makes the root sqrt 25 = 5: eps stands beside the mean square, inside the root.
        ("scale_norm", {"norm.weight": 2.0}, 12.5, [1.2, 1.6]),
        ("rms_norm", {"norm.weight": [1.0, 10.0]}, 12.5, [0.6, 8.0]),
        # mean 3.5, deviations -+0.5, variance 0.25; eps = 0.75 makes the root 1: (-0.5*2 + 1, 0.5*4 - 1)
        ("layer_norm", {"norm.weight": [2.0, 4.0], "norm.bias": [1.0, -1.0]}, 0.75, [0.0, 1.0]),
    ],
)
def test_norms(norm_type, weights, eps, expected):
    weights = {name: f64(value) for name, value in weights.items()}
    out = naive.naive_norm(f64([[3, 4], [0, 0]]), weights, toy(norm_type=norm_type, norm_eps=eps or 1e-300))
    zero = weights.get("norm.bias", f64([0.0, 0.0])).tolist()  # a row without spread stays zero, whatever the gain
    assert_equal(out, [expected, zero])


def test_scaled_sinusoid_first_entries():
    # D = 4: frequencies 10000^0 = 1 and 10000^(-1/2) = 0.01; sines first, then cosines.
    # sin 1 = 0.841470984808, sin 0.01 = 0.009999833334, cos 1 = 0.540302305868, cos 0.01 = 0.999950000417.
    expected = [[0, 0, 1, 1], [0.841470984808, 0.009999833334, 0.540302305868, 0.999950000417]]
    out = naive.naive_scaled_sinusoid(3, 4)
    assert out.shape == (3, 4)
    assert_equal(out[:2], expected, atol=1e-11)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        # x W^T + b with x = (1, 2), W = [[1, 1], [-3, 0]], b = (1, 2): (1 + 2 + 1, -3 + 2) = (4, -1)
        (None, [4.0, -1.0]),
        ("relu", [4.0, 0.0]),
        # silu(x) = x / (1 + e^-x): 4 / 1.018315638889 = 3.928055160152, -1 / 3.718281828459 = -0.268941421370
        ("silu", [3.928055160152, -0.268941421370]),
        # gelu(x) = x Phi(x): 4 * 0.999968328758, -1 * 0.158655253931
        ("gelu", [3.999873315032, -0.158655253931]),
    ],
)
def test_linear_and_its_activation(act, expected):
    weights = {"gau.u_proj.weight": f64([[1, 1], [-3, 0]]), "gau.u_proj.bias": f64([1, 2])}
    assert_equal(naive.naive_linear(f64([[1, 2]]), weights, "gau.u_proj", act), [expected], atol=1e-11)


# ---------------------------------------------------------------- the whole layer in plain Python floats


def py_rotate(vector, position, config):
    """RoPE as a product with e^(i angle), pair by pair."""
    rope = config.rope_parameters or {"rope_theta": 10000.0}
    out, turning = list(vector), int(len(vector) * rope.get("partial_rotary_factor", 1.0))
    for pair in range(turning // 2):
        first, second = (2 * pair, 2 * pair + 1) if config.rope_interleaved else (pair, pair + turning // 2)
        phase = cmath.exp(1j * position / rope["rope_theta"] ** (2 * pair / turning))
        turned = complex(vector[first], vector[second]) * phase
        out[first], out[second] = turned.real, turned.imag
    return out


def py_dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def py_norm(row, w, config):
    mean = sum(row) / len(row) if config.norm_type == "layer_norm" else 0.0
    root = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + config.norm_eps)
    gain = [w["norm.weight"]] * len(row) if config.norm_type == "scale_norm" else w["norm.weight"]
    shift = w["norm.bias"] if config.norm_type == "layer_norm" else [0.0] * len(row)
    return [(x - mean) / root * g + s for x, g, s in zip(row, gain, shift, strict=True)]


def py_project(row, w, name, act=None):
    acts = {
        None: lambda x: x,
        "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    }
    rows, bias = w[f"gau.{name}.weight"], w[f"gau.{name}.bias"]
    return [acts[act](py_dot(row, r) + b) for r, b in zip(rows, bias, strict=True)]


def py_bias(i, j, w, config, causal):
    if config.relative_bias is None:
        return 0.0
    table = w["gau.relative_bias.weight"]
    if config.relative_bias == "toeplitz":
        return table[len(table) // 2 + j - i]
    if config.relative_bias == "rotary":
        return py_dot(py_rotate(table[0], i, config), py_rotate(table[1], j, config))
    bucket = abs(j - i)  # every distance of these tests is below the exact range
    assert bucket < config.t5_num_buckets // 4
    return table[bucket + (config.t5_num_buckets // 2 if not causal and j > i else 0)][0] * config.query_key_dim**0.5


def py_activate(scores, config):
    """The weights of the visible keys of one query."""
    if config.attention_activation == "softmax":
        total = sum(math.exp(s) for s in scores)
        return [math.exp(s) / total for s in scores]
    if config.attention_activation == "laplace":
        # Phi((s - mu) / sigma): (s - sqrt(1/2)) / (sqrt(1/(4 pi)) sqrt 2) = (s - sqrt(1/2)) sqrt(2 pi)
        return [0.5 * math.erfc((math.sqrt(0.5) - s) * math.sqrt(2 * math.pi)) for s in scores]
    return [s * s if s > 0 else 0.0 for s in scores]


def py_unit(x):
    length = math.sqrt(py_dot(x, x))
    return [a / length for a in x] if length else x


def py_delta(q, k, v, normed, w, starts):
    """What the queries read from the delta rule's state: without a state, from what each token wrote, found by looking
    back over all writes before it."""
    q, k = [py_unit(row) for row in q], [py_unit(row) for row in k]
    own = list(zip(w["gau.gate_proj.weight"], w["gau.gate_bias"], strict=True))
    gates = [[1 / (1 + math.exp(-py_dot(row, weight) - bias)) for weight, bias in own] for row in normed]

    def decayed(j, t):
        """Share of write j that is left after token t."""
        return math.prod(gates[i][0] for i in range(j + 1, t + 1))

    written, out = [], []
    for t, row in enumerate(v):
        held = [decayed(j, t) * py_dot(k[t], k[j]) for j in range(t)]
        known = [sum(h * u[b] for h, u in zip(held, written, strict=True)) for b in range(len(row))]
        written.append([gates[t][1] * (a - b) for a, b in zip(row, known, strict=True)])
        begin = max(start for start in starts if start <= t)
        read = [decayed(j, t) * py_dot(q[t], k[j]) for j in range(begin)]
        out.append([sum(r * u[b] for r, u in zip(read, written, strict=False)) for b in range(len(row))])
    return out


def py_layer(x, w, config, causal, positions=None, shift=0):
    """One FLASH layer on lists of floats: token by token, chunk by chunk, with a running k v^T."""
    n = len(x)
    normed = [py_norm(row, w, config) for row in x]
    u, v, z = ([py_project(row, w, p, config.hidden_act) for row in normed] for p in ("u_proj", "v_proj", "z_proj"))
    heads, previous = [], config.global_form == "previous_token"
    rows = list(zip(w["gau.offset_scale.weight"], w["gau.offset_scale.bias"], strict=True))
    for index, (gamma, beta) in enumerate(rows):
        head = [[a * g + b for a, g, b in zip(row, gamma, beta, strict=True)] for row in z]
        if config.rope_parameters is not None and not (previous and index >= len(rows) - 2):
            head = [py_rotate(row, (positions or range(n))[t], config) for t, row in enumerate(head)]
        heads.append(head)
    s, e = len(z[0]), len(v[0])
    if config.local_key_shift:
        pair = [d // 2 if config.rope_interleaved else d for d in range(s)]
        before = [[0.0] * s, *heads[1][:-1]]
        heads[1] = [[b[d] if pair[d] % 2 else a[d] for d in range(s)] for a, b in zip(heads[1], before, strict=True)]
    chunk = n if config.attention_type == "quadratic" else config.chunk_size
    divisor = math.sqrt(s) if config.attention_activation == "softmax" else config.attention_divisor
    starts = [0, *range(chunk - shift, n, chunk)] if shift else list(range(0, n, chunk))
    ends = [*starts[1:], n]
    attended = [[0.0] * e for _ in range(n)]
    if config.attention_type != "global":
        for t, start, stop in [(t, a, b) for a, b in zip(starts, ends, strict=True) for t in range(a, b)]:
            begin = start if config.local_window == 1 else max([0, *(s for s in starts if s < start)])
            keys = list(range(begin, t + 1 if causal else stop))
            scores = [
                py_dot(heads[0][t], heads[1][j]) / divisor + py_bias(t - start, j - start, w, config, causal)
                for j in keys
            ]
            for j, a in zip(keys, py_activate(scores, config), strict=True):
                attended[t] = [o + a * value for o, value in zip(attended[t], v[j], strict=True)]
    if config.attention_type in ("mixed_chunk", "global"):
        lin_q, lin_k = (heads[2], heads[3]) if config.attention_type == "mixed_chunk" else heads
    if config.global_state == "delta":
        keys = [[0.0] * s, *lin_k[:-1]] if previous else lin_k
        for t, row in enumerate(py_delta(lin_q, keys, v, normed, w, starts)):
            attended[t] = [o + r for o, r in zip(attended[t], row, strict=True)]
    elif config.attention_type in ("mixed_chunk", "global"):
        state = [[0.0] * e for _ in range(s)]  # the running sum of k v^T
        for start, stop in zip(starts, ends, strict=True) if causal else [(0, n)]:

            def add(start=start, stop=stop):
                for t in range(start, stop):
                    key = lin_k[t] if not previous else lin_k[t - 1] if t > 0 else [0.0] * s
                    for a in range(s):
                        for b in range(e):
                            state[a][b] += key[a] * v[t][b]

            if not causal:
                add()
            tokens = chunk if config.global_normalization == "chunk" else start if causal else n
            for t in range(start, stop):
                for b in range(e):
                    if not causal or start > 0:
                        attended[t][b] += sum(lin_q[t][a] * state[a][b] for a in range(s)) / tokens
            if causal:
                add()
    gated = [[a * b for a, b in zip(u_row, o_row, strict=True)] for u_row, o_row in zip(u, attended, strict=True)]
    return [[a + b for a, b in zip(r, py_project(g, w, "o_proj"), strict=True)] for r, g in zip(x, gated, strict=True)]


def py_model(ids, w, config, causal):
    x = []
    for n, token in enumerate(ids):
        half = config.hidden_size // 2
        angles = [n / 10000.0 ** (i / half) for i in range(half)]
        wave = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        scale = w["embed_positions.scale"] if config.use_scaled_sinusoid else 0.0
        x.append([a + scale * b for a, b in zip(w["embed_tokens.weight"][token], wave, strict=True)])
    for i in range(config.num_hidden_layers):
        layer = {name[len(f"layers.{i}.") :]: value for name, value in w.items() if name.startswith(f"layers.{i}.")}
        x = py_layer(x, layer, config, causal, shift=config.chunk_shift if i % 2 else 0)
    hidden = [py_norm(row, w, config) for row in x]
    table = w["lm_head.weight"] if "lm_head.weight" in w else w["embed_tokens.weight"]
    return hidden, [[py_dot(row, embedding) for embedding in table] for row in hidden]


def random_values(rng, *shape):
    if not shape:
        return rng.uniform(0.5, 1.5)
    return [random_values(rng, *shape[1:]) if len(shape) > 1 else rng.uniform(-1, 1) for _ in range(shape[0])]


def norm_weights(rng, config):
    width = () if config.norm_type == "scale_norm" else (config.hidden_size,)
    weights = {"norm.weight": random_values(rng, *width)}
    return weights | ({"norm.bias": random_values(rng, *width)} if config.norm_type == "layer_norm" else {})


def layer_weights(rng, config):
    d, e, s = config.hidden_size, 3, config.query_key_dim
    heads = 4 if config.attention_type == "mixed_chunk" else 2
    shapes = {"u_proj": (e, d), "v_proj": (e, d), "z_proj": (s, d), "offset_scale": (heads, s), "o_proj": (d, e)}
    weights = norm_weights(rng, config)
    for name, shape in shapes.items():
        weights[f"gau.{name}.weight"] = random_values(rng, *shape)
        weights[f"gau.{name}.bias"] = random_values(rng, *(shape if name == "offset_scale" else shape[:1]))
    span = config.chunk_size * config.local_window
    span = config.max_position_embeddings if config.attention_type == "quadratic" else span
    bias = {"toeplitz": (2 * span - 1,), "rotary": (2, s), "t5": (config.t5_num_buckets, 1), None: None}
    if config.global_state == "delta":
        weights["gau.gate_proj.weight"], weights["gau.gate_bias"] = random_values(rng, 2, d), random_values(rng, 2)
    if config.attention_type != "global" and bias[config.relative_bias]:
        weights["gau.relative_bias.weight"] = random_values(rng, *bias[config.relative_bias])
    return weights


def tensors(weights, dtype=torch.float64):
    return {name: torch.tensor(value, dtype=dtype) for name, value in weights.items()}


FULL = {"hidden_size": 4, "query_key_dim": 4, "chunk_size": 3, "attention_divisor": 1.5, "relative_bias": "toeplitz",
        "rope_parameters": {"rope_theta": 50.0}}  # fmt: skip
HALF_ROPE = {"rope_theta": 50.0, "partial_rotary_factor": 0.5}
VARIANTS = [
    {}, {"attention_activation": "softmax"}, {"attention_activation": "laplace"},
    {"attention_type": "quadratic"}, {"attention_type": "quadratic", "relative_bias": "t5"},
    {"attention_type": "local"}, {"attention_type": "global"},
    {"relative_bias": "rotary"}, {"relative_bias": "rotary", "rope_parameters": None},
    {"relative_bias": "t5"}, {"relative_bias": None},
    {"norm_type": "layer_norm"}, {"norm_type": "rms_norm"}, {"norm_eps": 0.3}, {"hidden_act": "gelu"},
    {"rope_parameters": None}, {"rope_parameters": HALF_ROPE, "query_key_dim": 8, "relative_bias": "rotary"},
    {"rope_interleaved": True, "relative_bias": "rotary"},
    {"global_normalization": "chunk"}, {"global_normalization": "chunk", "attention_type": "global"},
    {"global_form": "previous_token"}, {"global_form": "previous_token", "attention_type": "global"},
    {"local_window": 2}, {"local_window": 2, "relative_bias": "rotary", "attention_activation": "softmax"},
    {"global_state": "delta"}, {"global_state": "delta", "attention_type": "global"},
    {"global_state": "delta", "global_form": "previous_token"},
    {"local_key_shift": True, "query_key_dim": 8}, {"local_key_shift": True, "rope_interleaved": True},
]  # fmt: skip
variants = pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(map(str, c.values())) or "paper")
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@directions
@variants
@pytest.mark.parametrize("n", [1, 2, 3, 7])  # inside the first chunk, one full chunk, two chunks and a part
def test_layer_equals_plain_python(changes, causal, n):
    if not causal and {"global_state", "local_window"} & set(changes):
        pytest.skip("causal only")
    rng, config = random.Random(0), toy(**{**FULL, **changes})
    weights, x = layer_weights(rng, config), random_values(rng, n, 4)
    for shift in range(1 if config.attention_type == "quadratic" else config.chunk_size):
        out = naive.naive_layer(f64(x), tensors(weights), config, causal=causal, shift=shift)
        assert_equal(out, py_layer(x, weights, config, causal, shift=shift))


@directions
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_scaled_sinusoid": False, "norm_type": "layer_norm"}, {"num_hidden_layers": 11}, {"chunk_shift": 2}],
)
def test_model_equals_plain_python(changes, tied, causal):
    # Eleven layers, so that a prefix "layers.1" without its dot would also catch layer 10.
    rng, config = random.Random(1), toy(**{**FULL, **changes})
    weights = norm_weights(rng, config) | {"embed_tokens.weight": random_values(rng, 6, 4)}
    if config.use_scaled_sinusoid:
        weights["embed_positions.scale"] = random_values(rng)
    if not tied:
        weights["lm_head.weight"] = random_values(rng, 6, 4)
    for i in range(config.num_hidden_layers):
        weights |= {f"layers.{i}.{name}": value for name, value in layer_weights(rng, config).items()}
    ids = [5, 0, 3, 3, 1, 2, 4]
    hidden, logits = naive.naive_model(torch.tensor(ids), tensors(weights), config, causal=causal)
    expected_hidden, expected_logits = py_model(ids, weights, config, causal)
    assert_equal(hidden, expected_hidden, atol=1e-11)
    assert_equal(logits, expected_logits, atol=1e-11)


# ---------------------------------------------------------------- properties


@directions
def test_positions_turn_the_heads(causal):
    rng, config = random.Random(2), toy(**FULL)
    weights, x = layer_weights(rng, config), random_values(rng, 7, 4)

    def layer(positions):
        return naive.naive_layer(f64(x), tensors(weights), config, causal=causal, positions=positions)

    spread = [0, 2, 3, 5, 9, 10, 11]
    assert_equal(layer(torch.tensor(spread)), py_layer(x, weights, config, causal, spread))
    assert_equal(layer(torch.arange(7)), layer(None).tolist())
    # RoPE is relative: the same shift for all tokens changes nothing, and the chunk grid does not go by positions.
    assert_equal(layer(torch.arange(7) + 100), layer(None).tolist())
    assert not torch.allclose(layer(torch.tensor(spread)), layer(None))


@variants
def test_causal_layers_do_not_look_ahead(changes):
    rng, config = random.Random(3), toy(**{**FULL, **changes})
    weights = tensors(layer_weights(rng, config))
    x, other = f64(random_values(rng, 7, 4)), f64(random_values(rng, 7, 4))
    for cut in range(1, 7):
        mixed = torch.cat((x[:cut], other[cut:]))
        out, changed = (naive.naive_layer(y, weights, config, causal=True) for y in (x, mixed))
        assert torch.equal(out[:cut], changed[:cut])
        # A prefix alone gives the same too (up to the order of summation): no length enters the function.
        prefix = naive.naive_layer(x[:cut], weights, config, causal=True)
        torch.testing.assert_close(prefix, out[:cut], rtol=0, atol=1e-13)
        if changes.get("attention_type") not in ("local", "global") and not {"global_state", "local_window"} & set(
            changes
        ):
            both = [naive.naive_layer(y, weights, config, causal=False) for y in (x, mixed)]
            assert not torch.equal(both[0][:cut], both[1][:cut])


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept(changes, dtype):
    rng, config = random.Random(4), toy(**{**FULL, **changes})
    weights, x = layer_weights(rng, config), random_values(rng, 7, 4)
    out = naive.naive_layer(torch.tensor(x, dtype=dtype), tensors(weights, dtype), config, causal=True)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    assert_equal(out.double(), py_layer(x, weights, config, True), atol=tolerance)


def test_gradients_flow_to_every_weight():
    # Other tests take naive.py's gradients for the truth: nothing may be detached, nor changed in place.
    rng, config = random.Random(5), toy(**FULL)
    weights = {name: w.requires_grad_() for name, w in tensors(layer_weights(rng, config)).items()}
    x = f64(random_values(rng, 7, 4)).requires_grad_()

    def layer(x, *values):
        return naive.naive_layer(x, dict(zip(weights, values, strict=True)), config, causal=True)

    assert torch.autograd.gradcheck(layer, (x, *weights.values()))


def test_the_file_stays_small_and_independent():
    source = Path(naive.__file__).read_text(encoding="ascii")
    assert len(source.splitlines()) < 175
    tree = ast.parse(source)
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert sorted(alias.name for node in top for alias in node.names) == ["math", "torch"]
    inner = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert inner == ["transformers.activations"]

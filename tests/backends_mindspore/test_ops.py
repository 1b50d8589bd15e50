"""The plain operators against the numpy definitions in `models`: each is what its fused twin has to compute."""

import numpy as np
import pytest

from deepspan.models import sampling
from deepspan.models.quantise import quantise_activation_int8
from deepspan.models.reference import causal_mask, rms_norm, rotate, silu, softmax
from deepspan.models.routing import route
from tests.specs import SPECS

ms = pytest.importorskip("mindspore", reason="mindspore is not installed")
from deepspan.backends.mindspore_ascend.ops import composite  # noqa: E402
from deepspan.backends.mindspore_ascend.sampling import Hash, Sampler  # noqa: E402

RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True, scope="module")
def cpu_graphs():
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def run(cell, *arrays):
    results = cell(*(None if array is None else ms.Tensor(array) for array in arrays))
    return tuple(r.asnumpy() for r in results) if isinstance(results, tuple) else results.asnumpy()


def test_rms_norm():
    x, weight = normal(7, 36), normal(36)
    np.testing.assert_allclose(run(composite.RmsNorm(1e-6), x, weight), rms_norm(x, weight, 1e-6), rtol=1e-5)


def test_add_rms_norm_gives_the_norm_and_the_sum():
    x, residual, weight = normal(7, 36), normal(7, 36), normal(36)
    normed, total = run(composite.AddRmsNorm(1e-6), x, residual, weight)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(normed, rms_norm(x + residual, weight, 1e-6), rtol=1e-5)


def test_rotate():
    class Cell(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.turn, self.rotate = composite.Turn(4, 6), composite.Rotate(3, 4, 6)

        def construct(self, q, k, cos, sin):
            return self.rotate(q, k, self.turn(cos, sin))

    q, k, angles = normal(5, 3, 4 + 6), normal(5, 6), normal(5, 3)
    cos, sin = np.cos(angles), np.sin(angles)
    got_q, got_k = run(Cell(), q, k, *(np.concatenate([table, table], 1) for table in (cos, sin)))
    wanted = rotate(q[:, :, 4:], cos[:, None], sin[:, None], interleave=False)
    np.testing.assert_array_equal(got_q[:, :, :4], q[:, :, :4])
    np.testing.assert_allclose(got_q[:, :, 4:], wanted, atol=1e-6)
    np.testing.assert_allclose(got_k, rotate(k, cos, sin, interleave=False), atol=1e-6)


def test_cache_rows_are_written_and_read():
    class Cell(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            shape = composite.cache_shape(3, 4, 6)
            self.cache = ms.Parameter(ms.Tensor(np.zeros(shape, np.float32)), name="cache", requires_grad=False)
            self.write, self.read = composite.WriteCache(), composite.ReadCache()

        def construct(self, entries, slots):
            self.write(self.cache, entries, slots)
            return self.read(self.cache, slots)

    entries, slots = normal(4, 6), np.array([11, 0, 7, 3], np.int32)
    cell = Cell()
    np.testing.assert_array_equal(run(cell, entries, slots), entries)
    untouched = np.setdiff1d(np.arange(12), slots)
    assert not cell.cache.asnumpy()[untouched].any()


def attention(q, k, v, scale):
    scores = np.einsum("thx,shx->hts", q, k) * np.float32(scale) + causal_mask(len(q), len(k))
    return np.einsum("hts,shv->thv", softmax(scores), v).reshape(len(q), -1)


def test_prefill_attention_keeps_sequences_apart_and_aligns_ends():
    lens = [(3, 3), (4, 9), (1, 6)]
    pieces = [(normal(t, 2, 5), normal(s, 2, 5), normal(s, 2, 4)) for t, s in lens]
    q, k, v = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    query_ends, key_ends = (np.cumsum(ends).astype(np.int32) for ends in zip(*lens, strict=True))
    got = run(composite.PrefillAttention(2, 0.3), q, k, v, query_ends, key_ends)
    np.testing.assert_allclose(got, np.concatenate([attention(*piece, 0.3) for piece in pieces]), atol=1e-6)


def test_decode_attention_reads_blocks_and_stops_at_the_visible_slots():
    cache, q = normal(5 * 4, 6), normal(3, 2, 6)
    tables, visible = np.array([[2, 0], [4, 0], [1, 3]], np.int32), np.array([6, 1, 8], np.int32)
    got = run(composite.DecodeAttention(2, 0.5, 4, 4), q, cache, tables, visible)
    for row in range(3):
        entries = cache.reshape(5, 4, 6)[tables[row]].reshape(-1, 6)[: visible[row]]
        weights = softmax(np.einsum("hx,sx->hs", q[row], entries) * np.float32(0.5))
        np.testing.assert_allclose(got[row], weights @ entries[:, :4], atol=1e-6)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.n_routed_experts])
def test_route(name):
    spec = SPECS[name]
    logits = normal(50, spec.n_routed_experts)
    bias = normal(spec.n_routed_experts) * np.float32(0.2) if spec.has_router_bias else None
    weights, index = run(composite.Route(spec), logits, bias)
    wanted_index, wanted_weights = route(spec, logits, bias)
    np.testing.assert_array_equal(index, wanted_index)
    np.testing.assert_allclose(weights, wanted_weights, rtol=1e-5)


@pytest.mark.parametrize("held", [7, 4], ids=["all-experts", "experts-elsewhere"])
def test_permute_multiply_unpermute_is_the_weighted_sum_over_experts(held):
    tokens, hidden, width, experts, kept = 9, 6, 5, 7, 3
    x, first, second = normal(tokens, hidden), normal(held, hidden, width), normal(held, width, hidden)
    index = np.stack([RNG.permutation(experts)[:kept] for _ in range(tokens)]).astype(np.int32)
    weights = normal(tokens, kept)
    own = np.minimum(index, held)  # one past the last for all that other ranks hold
    rows, place, counts = run(composite.Permute(held, kept, held < experts), x, own)
    np.testing.assert_array_equal(counts, np.bincount(own.reshape(-1), minlength=experts)[:held])
    middle = run(composite.GroupedMatmul(), rows, first, counts)
    products = run(composite.GroupedMatmul(), middle, second, counts)
    np.testing.assert_allclose(products, np.einsum("td,edf,efg->etg", x, first, second), atol=1e-4)
    got = run(composite.Unpermute(kept, held < experts), products, place, counts, weights)
    wanted = np.einsum("tke,tk,etg->tg", np.eye(held + 1, dtype=np.float32)[own][..., :held], weights, products)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_swiglu():
    x = normal(4, 10)
    np.testing.assert_allclose(run(composite.SwiGLU(), x), silu(x[:, :5]) * x[:, 5:], atol=1e-6)


def test_dynamic_quant_is_the_definition():
    x = normal(6, 40)
    x[2] = 0
    codes, scales = run(composite.DynamicQuant(), x)
    wanted_codes, wanted_scales = quantise_activation_int8(x)
    np.testing.assert_allclose(scales, wanted_scales[:, 0], rtol=1e-6)
    assert np.abs(codes.astype(int) - wanted_codes).max() <= 1 and (codes == wanted_codes).mean() > 0.99


def codes_of(*shape):
    return RNG.integers(-127, 128, shape).astype(np.int8)


def test_quant_matmul_sums_exactly():
    """Sums of this length are beyond what FP32 holds."""
    q, weight, scale_t, scale_f = codes_of(3, 20000), codes_of(5, 20000), normal(3), normal(5)
    q[0], weight[0] = 127, 127
    total = (q.astype(np.int64) @ weight.T.astype(np.int64)).astype(np.float32)
    got = run(composite.QuantMatmul(ms.float32), q, scale_t, weight, scale_f)
    np.testing.assert_allclose(got, total * scale_t[:, None] * scale_f, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3], ids=["the-same-for-all", "each-its-own"])
def test_quant_grouped_matmul_uses_each_expert_s_codes_and_scales(rows):
    q, weight, scale_et, scale_ef = codes_of(rows, 5, 30), codes_of(3, 30, 4), normal(rows, 5), normal(3, 4)
    counts = np.array([2, 0, 3], np.int64)
    total = np.einsum("etd,edf->etf", np.broadcast_to(q, (3, 5, 30)).astype(np.int64), weight.astype(np.int64))
    got = run(composite.QuantGroupedMatmul(ms.float32), q, scale_et, weight, scale_ef, counts)
    np.testing.assert_allclose(got, total * scale_et[:, :, None] * scale_ef[:, None], rtol=1e-6)


def test_static_quant_is_the_definition():
    x = normal(6, 40) * 3
    wanted = np.clip(np.round(x / np.float32(0.037) - 21), -128, 127)
    got = run(composite.StaticQuant(40, 0.037, -21), x)
    assert np.abs(got - wanted).max() <= 1 and (got == wanted).mean() > 0.99 and got.min() == -128


def test_static_quant_matmul_adds_the_bias_to_the_sum():
    q, weight, bias, scale = (
        codes_of(3, 200),
        codes_of(5, 200),
        RNG.integers(-9999, 9999, 5).astype(np.int32),
        normal(5),
    )
    total = q.astype(np.int64) @ weight.T.astype(np.int64) + bias
    got = run(composite.StaticQuantMatmul(ms.float32), q, weight, scale, bias)
    np.testing.assert_allclose(got, total * scale, rtol=1e-6)


def test_the_hash_is_bit_exact():
    values = RNG.integers(0, 2**32, 5000, dtype=np.uint64).astype(np.uint32)
    np.testing.assert_array_equal(run(Hash(), values.view(np.int32)).view(np.uint32), sampling.hash_u32(values))


def test_sampled_tokens_follow_the_definition():
    rows, vocab = 200, 97
    logits = normal(rows, vocab) * 3
    logits[::7, 5:9] = logits[::7, 5:6]  # ties
    position, top_k = RNG.integers(0, 9999, rows).astype(np.int32), RNG.integers(0, 12, rows).astype(np.int32)
    temperature = RNG.choice([0, 0.3, 1, 1.7], rows).astype(np.float32)
    top_p = RNG.choice([0.1, 0.5, 0.9, 1], rows).astype(np.float32)
    seed = RNG.integers(0, 2**32, rows, dtype=np.uint64).astype(np.uint32)
    greedy = logits.argmax(1).astype(np.int32)
    got = run(Sampler(), logits, greedy, position, temperature, top_k, top_p, seed.view(np.int32))
    np.testing.assert_array_equal(got, sampling.sample(logits, position, temperature, top_k, top_p, seed))
    assert (got != greedy).any()

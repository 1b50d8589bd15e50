"""The reference against itself where two roads must meet: naive and absorbed MLA, whole and chunked prompts."""

import numpy as np
import pytest

from deepspan.models.params import parameters
from deepspan.models.reference import GrowingCache, ReferenceModel, attend_absorbed, attend_naive, rotate
from tests.specs import SPECS, random_weights


@pytest.mark.parametrize("queries", [1, 5])
def test_absorbed_attention_equals_naive(queries):
    rng = np.random.default_rng(0)
    heads, nope, rope, value, latent, visible = 3, 5, 4, 7, 6, 11

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q_nope, q_rope = normal(queries, heads, nope), normal(queries, heads, rope)
    entries, kv_b = normal(visible, latent + rope), normal(heads, nope + value, latent)
    naive = attend_naive(q_nope, q_rope, entries, kv_b, 0.3)
    np.testing.assert_allclose(attend_absorbed(q_nope, q_rope, entries, kv_b, 0.3), naive, rtol=1e-4, atol=1e-5)


def test_attention_looks_at_no_later_token():
    rng = np.random.default_rng(1)
    q_nope, q_rope = rng.normal(size=(4, 2, 3)).astype(np.float32), rng.normal(size=(4, 2, 2)).astype(np.float32)
    entries, kv_b = rng.normal(size=(6, 7)).astype(np.float32), rng.normal(size=(2, 3 + 4, 5)).astype(np.float32)
    before = attend_naive(q_nope, q_rope, entries, kv_b, 0.5)
    entries[4:] += 100
    after = attend_naive(q_nope, q_rope, entries, kv_b, 0.5)
    np.testing.assert_array_equal(before[:2], after[:2])
    assert not np.allclose(before[2:], after[2:])


@pytest.mark.parametrize("interleave", [True, False])
def test_rotation_keeps_relative_positions(interleave):
    """The dot product of a rotated query and key depends on their distance only."""
    rng = np.random.default_rng(2)
    q, k, frequency = rng.normal(size=8), rng.normal(size=8), np.array([1.0, 0.3, 0.1, 0.01])

    def dot(p: int, s: int) -> float:
        rotated_q = rotate(q, np.cos(p * frequency), np.sin(p * frequency), interleave)
        return float(rotated_q @ rotate(k, np.cos(s * frequency), np.sin(s * frequency), interleave))

    assert dot(9, 4) == pytest.approx(dot(105, 100))
    assert dot(9, 4) != pytest.approx(dot(9, 5))


@pytest.mark.parametrize("name", SPECS)
def test_chunks_forms_and_mtp_agree(name):
    spec = SPECS[name]
    weights = random_weights(spec)
    assert set(weights) == {param.name for param in parameters(spec)}
    tokens = np.random.default_rng(5).integers(0, spec.vocab_size, 13).astype(np.int32)
    whole = run(spec, weights, tokens, [13], "naive")
    assert np.abs(whole[0]).max() > 0.1
    for chunks, form in (([13], "absorbed"), ([4, 1, 7, 1], "auto"), ([1] * 13, "naive")):
        for got, wanted in zip(run(spec, weights, tokens, chunks, form), whole, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def run(spec, weights, tokens, chunks, form) -> list[np.ndarray]:
    """Teacher-forced logits, and the MTP layer's when there is one."""
    model, cache = ReferenceModel(spec, weights, 64, form), GrowingCache()
    logits, drafts, start = [], [], 0
    following = np.roll(tokens, -1)
    for count in chunks:
        chunk = slice(start, start + count)
        hidden = model.hidden(tokens[chunk], [cache], [count])
        logits.append(model.logits(hidden))
        if spec.num_nextn_predict_layers:
            drafts.append(model.mtp_logits(hidden, following[chunk], [cache], [count]))
        start += count
        cache.length = start
    return [np.concatenate(part) for part in (logits, drafts) if part]

"""The sampling definition: noise quality, filters and independence from the batch."""

import numpy as np
import pytest

from deepspan.models.sampling import gumbel_noise, keep_mask, sample

SEEDS = np.array([7], np.uint32)


def draw(logits_V, positions, temperature=1.0, top_k=0, top_p=1.0, seed=7):
    count = len(positions)
    return sample(
        np.tile(np.asarray(logits_V, np.float32), (count, 1)),
        np.asarray(positions, np.int32),
        np.full(count, temperature, np.float32),
        np.full(count, top_k, np.int32),
        np.full(count, top_p, np.float32),
        np.full(count, seed, np.uint32),
    )


def test_noise_is_finite_over_all_hash_values_and_standard_gumbel():
    noise = np.concatenate([gumbel_noise(SEEDS, np.array([p], np.int32), 100_003)[0] for p in range(10)])
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.02)


def test_frequencies_follow_the_softmax():
    probability = np.array([0.5, 0.25, 0.15, 0.1])
    tokens = draw(np.log(probability), range(40_000))
    counts = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(counts, probability, atol=0.01)


def test_neighbouring_positions_and_seeds_are_independent():
    tokens = [draw(np.zeros(64), range(200), seed=seed) for seed in range(200)]
    pairs = np.stack([np.stack(tokens)[:, :-1].ravel(), np.stack(tokens)[:, 1:].ravel()])
    assert abs(np.corrcoef(pairs)[0, 1]) < 0.02
    assert abs(np.corrcoef(np.stack(tokens)[:-1].ravel(), np.stack(tokens)[1:].ravel())[0, 1]) < 0.02


def test_greedy_ignores_noise():
    assert draw([0.0, 0.1, 0.05], range(5), temperature=0.0).tolist() == [1] * 5


def test_top_k_keeps_the_best_and_breaks_ties_towards_the_lower_id():
    kept = keep_mask(np.array([[1.0, 3.0, 3.0, 3.0, 0.0]], np.float32), np.array([2]), np.array([1.0], np.float32))
    assert kept.tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize(("top_p", "count"), [(0.4, 1), (0.5, 1), (0.55, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, count):
    logits = np.log(np.array([[0.1, 0.5, 0.25, 0.15]], np.float32))
    kept = keep_mask(logits, np.array([0]), np.array([top_p - 1e-4], np.float32))
    assert kept.sum() == count
    assert kept[0, 1]


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (16, 50)).astype(np.float32)
    arguments = (
        np.arange(16, dtype=np.int32),
        rng.uniform(0, 1.5, 16).astype(np.float32),
        rng.integers(0, 20, 16).astype(np.int32),
        rng.uniform(0.2, 1, 16).astype(np.float32),
        rng.integers(0, 2**32, 16, dtype=np.uint32),
    )
    together = sample(logits, *arguments)
    alone = [sample(logits[i : i + 1], *(a[i : i + 1] for a in arguments))[0] for i in range(16)]
    assert together.tolist() == alone

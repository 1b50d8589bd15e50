"""The engine over a toy model: the same tokens however the work is cut, ordered, shared or preempted."""

import numpy as np
import pytest

from deepspan.models.errors import InputError
from deepspan.serving.engine import Engine, EngineLimits
from deepspan.serving.request import SamplingParams, request_seed
from tests.serving.toy import VOCAB, ToyRunner, greedy


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "ahead"])
def _starts_ahead(request, monkeypatch):
    """Everything holds for runners that take a step before the last one has ended, and for those that do not."""
    monkeypatch.setattr("tests.serving.test_engine.STARTS_AHEAD", request.param)


STARTS_AHEAD = False


def make_engine(kv_blocks=64, block_size=4, **limits):
    limits = {"max_batch": 8, "max_seq_len": 64, "max_batch_tokens": 32, **limits}
    runner = ToyRunner(kv_blocks, block_size, STARTS_AHEAD)
    return Engine(runner, VOCAB, EngineLimits(**limits)), runner


def drain(engine):
    """Run to the end: {request_id: (tokens, reason)}."""
    tokens, reasons = {}, {}
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason:
                reasons[event.request_id] = event.finish_reason
    return {key: (tokens[key], reason) for key, reason in reasons.items()}


def prompts(count, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest)).tolist() for _ in range(count)]


CUTS = {
    "roomy": {},
    "one at a time": {"max_batch": 1},
    "tiny chunks": {"max_batch_tokens": 3},
    "fewer tokens than sequences": {"max_batch_tokens": 2, "max_batch": 5},
    "no prefix cache": {"prefix_cache": False},
    "blocks run out": {"kv_blocks": 10},
    "blocks run out, no prefix cache": {"kv_blocks": 9, "prefix_cache": False},
    "barely one sequence": {"kv_blocks": 8, "max_batch_tokens": 5},
    "block size 1": {"block_size": 1, "kv_blocks": 70},
    "two replicas": {"replicas": 2},
    "three replicas, blocks run out": {"replicas": 3, "kv_blocks": 25},
}


@pytest.mark.parametrize("cut", CUTS)
def test_tokens_do_not_depend_on_how_the_work_is_cut(cut):
    engine, _ = make_engine(**CUTS[cut])
    asked = prompts(12)
    ids = [engine.add_request(prompt, SamplingParams(), 10) for prompt in asked]
    done = drain(engine)
    for request_id, prompt in zip(ids, asked, strict=True):
        assert done[request_id] == (greedy(prompt, 10), "length")
    assert all(cache.free_blocks == cache.num_blocks for cache in engine.scheduler.caches)
    if "run out" in cut:
        assert engine.scheduler.preemptions > 0


def test_replicas_share_the_requests_and_have_their_own_blocks():
    engine, runner = make_engine(kv_blocks=64, replicas=2)
    for _ in range(2):  # the second round finds its prefixes where they are
        for prompt in prompts(6, seed=5, longest=30):
            engine.add_request(prompt, SamplingParams(), 8)
        drain(engine)
    largest = [0, 0]
    for batch in runner.steps:
        visible = batch.context_lens_B + batch.query_lens_B
        owners = [set(row[: -(-count // 4)] // 32) for row, count in zip(batch.block_tables_BM, visible, strict=True)]
        assert all(len(owner) == 1 for owner in owners), "a sequence's blocks are one replica's"
        running = [sum(owner == {replica} for owner in owners) for replica in range(2)]
        largest = [max(pair) for pair in zip(largest, running, strict=True)]
    assert largest == [3, 3]


def test_a_replica_without_room_leaves_a_request_to_another():
    engine, runner = make_engine(kv_blocks=16, replicas=2, max_seq_len=32)
    asked = [list(range(30)), [1], [2]]  # the first takes all eight blocks of a replica
    for prompt in asked:
        engine.add_request(prompt, SamplingParams(), 2)
    assert list(drain(engine).values()) == [(greedy(prompt, 2), "length") for prompt in asked]
    assert (runner.steps[0].block_tables_BM[:, 0] // 8).tolist() == [0, 1, 1]


def test_sampled_tokens_do_not_depend_on_the_batch_or_on_preemption():
    sampling = SamplingParams(temperature=1.0, top_p=0.9, top_k=20, seed=7)
    asked = prompts(10, seed=3)
    alone = []
    for prompt in asked:
        engine, _ = make_engine()
        engine.add_request(prompt, sampling, 12)
        alone += drain(engine).values()
    engine, _ = make_engine(kv_blocks=9, max_batch_tokens=7)
    for prompt in asked:
        engine.add_request(prompt, sampling, 12)
    done = drain(engine)
    assert engine.scheduler.preemptions > 0
    assert [done[key] for key in sorted(done)] == alone


def test_requests_that_arrive_later_join_the_running_batch():
    engine, runner = make_engine()
    first = engine.add_request([1, 2, 3], SamplingParams(), 20)
    early = [event for _ in range(5) for event in engine.step()]
    second = engine.add_request([4, 5], SamplingParams(), 3)
    done = drain(engine)
    assert [token for event in early for token in event.token_ids] + done[first][0] == greedy([1, 2, 3], 20)
    assert done[second][0] == greedy([4, 5], 3)
    assert max(len(step.query_lens_B) for step in runner.steps) == 2


def test_decode_and_prefill_chunks_share_a_step_within_the_budget():
    engine, runner = make_engine(max_batch_tokens=6)
    engine.add_request([1, 2], SamplingParams(), 10)
    engine.step()
    engine.add_request(list(range(15)), SamplingParams(), 2)
    drain(engine)
    lengths = [step.query_lens_B.tolist() for step in runner.steps]
    first = lengths.index([1, 5])
    assert lengths[first : first + 3] == [[1, 5], [1, 5], [1, 5]]
    assert [step.num_outputs_B.tolist() for step in runner.steps[first : first + 3]] == [[1, 0], [1, 0], [1, 1]]
    assert max(map(sum, lengths)) <= 6


@pytest.mark.parametrize("kv_blocks", [64, 11])
def test_requests_come_stop_and_are_aborted_at_any_time(kv_blocks):
    """Each gets its own tokens up to its stop token, and every block comes back."""
    rng = np.random.default_rng(kv_blocks)
    engine, runner = make_engine(kv_blocks, max_batch=4, max_batch_tokens=9)
    expected, got, aborted = {}, {}, set()
    for prompt in prompts(40, seed=1):
        stop = int(rng.integers(VOCAB))
        request_id = engine.add_request(prompt, SamplingParams(), 15, frozenset({stop}))
        answer = greedy(prompt, 15)
        expected[request_id] = answer[: answer.index(stop)] if stop in answer else answer
        for _ in range(rng.integers(6)):
            for event in engine.step():
                got.setdefault(event.request_id, []).extend(event.token_ids)
        if rng.random() < 0.2:
            aborted.add(request_id)
            engine.abort(request_id)
    for request_id, (tokens, _) in drain(engine).items():
        got.setdefault(request_id, []).extend(tokens)
    for request_id in expected.keys() - aborted:
        assert got[request_id] == expected[request_id]
    assert all(cache.free_blocks == cache.num_blocks for cache in engine.scheduler.caches)
    assert max(runner.found_unfinished, default=0) == runner.starts_ahead


def test_first_come_first_served_and_max_batch():
    engine, runner = make_engine(max_batch=2)
    for prompt in prompts(6):
        engine.add_request(prompt, SamplingParams(), 4)
    order = []
    while engine.has_work:
        order += [event.request_id for event in engine.step() if event.finish_reason]
    assert order == sorted(order)
    assert max(len(step.query_lens_B) for step in runner.steps) == 2


def test_a_known_prefix_is_not_computed_again():
    engine, runner = make_engine()
    prefix = list(range(16))
    engine.add_request([*prefix, 40], SamplingParams(), 2)
    drain(engine)
    engine.add_request([*prefix, 41, 42], SamplingParams(), 2)
    engine.add_request(prefix, SamplingParams(), 2)  # the whole prompt is known: its last block is computed again
    before = len(runner.steps)
    done = drain(engine)
    assert runner.steps[before].context_lens_B.tolist() == [16, 12]
    assert runner.steps[before].query_lens_B.tolist() == [2, 4]
    assert list(done.values()) == [(greedy([*prefix, 41, 42], 2), "length"), (greedy(prefix, 2), "length")]


def test_who_is_admitted_while_a_step_runs_shares_what_it_computes():
    engine, runner = make_engine(max_batch_tokens=20)
    prefix = list(range(16))
    for last in (40, 41):
        engine.add_request([*prefix, last, 7, 7, 7], SamplingParams(), 2)
    done = drain(engine)
    assert [step.context_lens_B.tolist() for step in runner.steps[:2]] == [[0], [20, 16]]
    assert list(done.values()) == [(greedy([*prefix, last, 7, 7, 7], 2), "length") for last in (40, 41)]


def test_prompts_that_wait_and_their_chunks_are_started_ahead():
    engine, runner = make_engine(max_batch=3, max_batch_tokens=8)
    wanted = {}
    for seed, prompt in enumerate(prompts(7, longest=30)):
        wanted[engine.add_request(prompt, SamplingParams(), 2 + seed)] = (greedy(prompt, 2 + seed), "length")
    assert drain(engine) == wanted
    lengths = [step.query_lens_B.tolist() for step in runner.steps]
    assert all(sum(queries) == 8 for queries in lengths if max(queries) == 8)
    if runner.starts_ahead:
        waits = [position for position, found in enumerate(runner.found_unfinished) if not found]
        assert waits == [0], "a step with something to do behind it was waited for"


def test_generated_tokens_serve_the_next_turn():
    engine, runner = make_engine()
    engine.add_request([3, 1, 4, 1, 5], SamplingParams(), 8)
    answer = next(iter(drain(engine).values()))[0]
    engine.add_request([3, 1, 4, 1, 5, *answer, 9], SamplingParams(), 1)
    drain(engine)
    assert runner.steps[-1].context_lens_B.tolist() == [12]


def test_stop_tokens_end_a_request_and_are_not_among_its_tokens():
    expected = greedy([7, 7], 10)
    engine, _ = make_engine()
    at = next(index for index, token in enumerate(expected) if token not in expected[:index] and index > 2)
    engine.add_request([7, 7], SamplingParams(), 10, stop_token_ids=frozenset({expected[at], 999}))
    assert list(drain(engine).values()) == [(expected[:at], "stop")]


def test_generation_ends_at_the_longest_sequence():
    engine, _ = make_engine(max_seq_len=10)
    engine.add_request([1, 2, 3, 4], SamplingParams(), 100)
    assert list(drain(engine).values()) == [(greedy([1, 2, 3, 4], 6), "length")]


def test_abort_frees_running_and_waiting_requests():
    engine, _ = make_engine(max_batch=1)
    running = engine.add_request([1, 2, 3, 4, 5], SamplingParams(), 10)
    waiting = engine.add_request([1, 2], SamplingParams(), 10)
    last = engine.add_request([5, 6], SamplingParams(), 3)
    engine.step()
    engine.abort(running)
    engine.abort(waiting)
    engine.abort(waiting)
    assert drain(engine) == {last: (greedy([5, 6], 3), "length")}
    assert all(cache.free_blocks == cache.num_blocks for cache in engine.scheduler.caches)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (list(range(16)), {"max_seq_len": 16}, r"prompt of 16 tokens.*engine.max_seq_len = 16"),
        (list(range(40)), {"kv_blocks": 5}, r"prompt of 40 tokens.*KV cache = 20"),
        ([], {}, "empty prompt"),
        ([VOCAB], {}, f"token id {VOCAB}.*0 to {VOCAB - 1}"),
        ([-1], {}, "token id -1"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused_and_changes_nothing(prompt, options, message):
    engine, _ = make_engine(**options)
    with pytest.raises(InputError, match=message):
        engine.add_request(prompt, SamplingParams(), 5)
    assert not engine.has_work
    engine.add_request([1], SamplingParams(), 2)
    assert list(drain(engine).values()) == [(greedy([1], 2), "length")]


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"seed": -1}],
)
def test_sampling_numbers_are_checked(values):
    with pytest.raises(InputError):
        SamplingParams(**values)


def test_speculation_is_refused_rather_than_ignored():
    with pytest.raises(InputError, match="not supported yet"):
        make_engine(speculative_tokens=1)


def test_seeds_differ_by_prompt_and_repetition_and_repeat_exactly():
    assert request_seed(5, [1, 2]) == request_seed(5, [1, 2])
    assert (
        len({request_seed(5, [1, 2]), request_seed(6, [1, 2]), request_seed(5, [1, 3]), request_seed(5, [1, 2], 1)})
        == 4
    )
    assert len({request_seed(None, [1]) for _ in range(8)}) > 1
    assert all(0 <= request_seed(seed, [1]) < 2**32 for seed in (None, 0, 2**63 - 1))

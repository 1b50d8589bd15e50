"""The embedded checkpoint through MindSpore on a CPU: the reference's tokens and logits, a fixed number of graphs."""

import numpy as np
import pytest

from deepspan.models.sums import held_out_sums
from deepspan.scripts.runtime import open_run, read_run
from deepspan.serving.batch import complete

pytest.importorskip("mindspore", reason="mindspore is not installed")
from deepspan.backends.mindspore_ascend.graphs import MAX_GRAPHS

PROMPTS = ["请介绍一下北京的景点", *(prompt for prompt, _ in held_out_sums(40))]


def answers(run):
    """Greedy tokens of all prompts, logits along the first answer, and how many graphs that took."""
    with open_run(read_run(run)) as session:
        prompts = [session.tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
        tokens = [c.token_ids for c in complete(session.engine, prompts, session.generation_options())]
        logits = session.logits([*prompts[0], *tokens[0]])
        graphs = getattr(session.runner, "graphs", None)
        return tokens, logits, graphs and graphs.compiled


@pytest.fixture(scope="module")
def mindspore_answers():
    return answers("demo_mindspore_cpu")


@pytest.fixture(scope="module")
def reference_answers():
    return answers("demo_reference")


def test_greedy_tokens_are_the_reference_s(mindspore_answers, reference_answers):
    assert mindspore_answers[0] == reference_answers[0]


def test_logits_are_the_reference_s(mindspore_answers, reference_answers):
    got, wanted = mindspore_answers[1], reference_answers[1]
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_no_length_compiles_a_graph_again(mindspore_answers):
    """41 prompts of different lengths, joining and leaving the batch: one graph for prompts, one for single tokens."""
    assert mindspore_answers[2] == 2 <= MAX_GRAPHS

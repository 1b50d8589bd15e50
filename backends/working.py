"""What steps on a GPU work in beside weights and cache: `deepspan plan` counts it, and the runner leaves it free."""

from __future__ import annotations

from ..configs.schema import RunConfig
from ..models.spec import ModelSpec

_RECORDED_TOKENS = 2048  # longer steps keep one GPU busy while the host launches them
_LIBRARIES = 2 << 30  # workspaces of cuBLAS and graphs, compiled kernels, fragmentation


def expanded_positions(run: RunConfig) -> int:
    """Positions that have keys and values of all heads at a time, in steps with prompts."""
    return max(run.engine.max_seq_len, run.engine.max_batch_tokens)


def records_mixed(run: RunConfig) -> bool:
    """Whether steps with prompts are recorded: where every rank has all tokens and outputs."""
    return run.engine.graphs and run.parallel.dp == run.parallel.pp == 1


def recorded_tokens(run: RunConfig) -> int:
    """Of the longest step in such a size, and half the positions. Tensor-parallel ranks share the work, not the
    launches.
    """
    return _RECORDED_TOKENS * run.parallel.tp


def working_bytes(spec: ModelSpec, run: RunConfig) -> int:
    """An upper estimate of what steps allocate: one of max_batch_tokens, logits, recorded ones, which keep theirs."""
    tokens, positions = run.engine.max_batch_tokens, expanded_positions(run)
    values = _step_values(spec, run, tokens, positions)
    if records_mixed(run):
        longest = recorded_tokens(run)
        values += _step_values(spec, run, min(tokens, longest), min(positions, 2 * longest))
    return 2 * values + 12 * max(run.engine.max_batch, 8) * spec.vocab_size + _LIBRARIES


def _step_values(spec: ModelSpec, run: RunConfig, tokens: int, positions: int) -> int:
    """BF16 numbers: beside the stream, the larger of attention and experts, which see as many tokens of every replica.

    ``positions`` have keys and values of all heads.
    """
    heads, hidden = spec.num_attention_heads, spec.hidden_size
    attention = tokens * heads * (2 * spec.qk_head_dim + 3 * spec.v_head_dim) + tokens * (spec.q_lora_rank or 0)
    expanded = positions * (heads * (spec.qk_nope_head_dim + spec.v_head_dim) + spec.latent_dim)
    choices = spec.num_experts_per_tok + spec.n_shared_experts
    widths = 2 * hidden + 2 * spec.moe_intermediate_size  # FP32 results count twice
    experts = run.parallel.dp * tokens * choices * widths
    dense = tokens * 4 * spec.intermediate_size
    if run.dtype in ("auto", "int4"):  # a matrix of INT4 is decoded for many tokens
        dense += hidden * 2 * spec.intermediate_size
    return 6 * tokens * hidden + max(attention + expanded, experts, dense)

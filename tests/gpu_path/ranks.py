"""One of the processes that compute together what `test_ranks` compares: python -m tests.gpu_path.ranks FOLDER."""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from deepspan.backends.leading import Leader, follow
from deepspan.backends.torch_triton.gpu import experts
from deepspan.backends.torch_triton.gpu.runner import GpuRunner
from deepspan.backends.torch_triton.kernels import grouped
from deepspan.backends.torch_triton.rank import join
from tests.backends.opening import WIDTH, DictWeights, random_tokens, step, step_batch
from tests.gpu_path.opening import SPECS, run_of
from tests.kernels.interpreter import compute_bf16_as_on_a_gpu
from tests.specs import random_weights

MODES = {"tp2": {"tp": 2}, "ep2": {"tp": 2, "ep": 2}, "dp2": {"dp": 2}, "dp2-ep2": {"dp": 2, "ep": 2}, "pp2": {"pp": 2}}
# Scales of activations that are powers of two: halves of a group of channels then have the same codes as the whole.
SMALL = {"vocab_size": 88, "fp8": {"block": [128, 128], "scale_fmt": "ue8m0"}}
SHARED = {name: SPECS[name].replace(SMALL) for name in ("v3", "v2-lite: no q_lora, two shared experts")}
FEW = experts.FEW_TOKENS
MANY = 8  # tokens of a step, beyond which experts take them as they take a long prompt's
# Mode, precision, number in SHARED, tokens that are few.
CASES = [(mode, "bf16", 0, FEW) for mode in MODES] + [("tp2", "w8a8", 1, FEW), ("tp2", "fp8", 1, FEW)]
CASES += [("ep2", "fp8", 0, FEW), ("dp2-ep2", "fp8", 1, FEW), ("ep2", "fp8", 1, MANY), ("dp2-ep2", "fp8", 1, MANY)]
# Steps of (sequence, first token, token after the last): a prompt beside a short one, a token alone, and both again.
STEPS = [[(0, 0, 5), (1, 0, 2)], *([(0, token, token + 1)] for token in (5, 6, 7)), [(1, 2, 4), (0, 8, 10)]]
TOKENS_ALONE = slice(7, 10)  # among the logits of all steps


def powers_of_two(spec):
    """Weights that FP8 codes hold exactly, whatever part of a matrix a rank cuts into blocks; others as they are."""
    for name, values in random_weights(spec).items():
        is_matrix = values.ndim == 2 and "embed" not in name
        yield name, np.copysign(np.exp2(np.round(np.log2(np.abs(values)))), values) if is_matrix else values


def forward(spec, dtype, rank=None, parallel=None):
    """Logits of two sequences, of different replicas where there are two, and drafts after one of them."""
    runner = GpuRunner(spec, run_of(dtype, parallel), torch.device("cpu"), rank)
    runner.load(DictWeights(dict(powers_of_two(spec))))
    tokens = random_tokens(spec, 10)
    apart = runner.kv_blocks // WIDTH // 2  # where the second replica's cache begins, in sequences
    logits = [
        step(runner, [(sequence * apart, start, tokens[start:stop]) for sequence, start, stop in pieces]).logits_OV
        for pieces in STEPS
    ]
    if spec.num_nextn_predict_layers:
        logits.append(step(runner, [(apart + 1, 0, tokens)], draft=True).draft_logits_OV)
    decode = step_batch([(0, 10, tokens[:1]), (apart, 4, tokens[1:2])])
    return np.concatenate(logits), experts_hit(runner, decode, rank)


def experts_hit(runner, batch, rank):
    """As `deepspan bench` asks for them: rank 0 leads, and another rank has no answer."""
    if rank is not None and rank.rank > 0:
        follow(runner, rank)
        return np.empty(0)
    if rank is not None:
        runner = Leader(runner, rank)
    hit = np.array(runner.experts_hit(batch))
    runner.close()
    return hit


def main(folder):
    small_tiles = mock.patch.object(grouped, "choose", lambda chip: grouped.Config(16, 64, 4, 2))
    for case in CASES:
        mode, dtype, number, few = case
        rank = join(run_of(dtype, MODES[mode]))
        with mock.patch.object(experts, "FEW_TOKENS", few), small_tiles:
            logits, hit = forward(list(SHARED.values())[number], dtype, rank, MODES[mode])
        np.savez(folder / result_name(*case, rank.rank), logits=logits, hit=hit)


def result_name(mode, dtype, number, few, rank):
    return f"{mode}-{dtype}-{number}-{few}-{rank}.npz"


if __name__ == "__main__":
    torch.set_num_threads(1)
    compute_bf16_as_on_a_gpu()
    main(Path(sys.argv[1]))

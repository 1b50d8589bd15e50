"""One of the processes that compute together what `test_ranks` compares: python -m tests.npu_path.ranks FOLDER."""

import sys
from pathlib import Path

import numpy as np
import torch

from deepspan.backends.torch_triton.rank import join
from tests.backends.opening import WIDTH, DictWeights, random_tokens, step
from tests.npu_path.opening import opened, run_of
from tests.specs import make, random_weights

SPEC = make(vocab_size=84)
MODES = {"tp2": {"tp": 2}, "ep2": {"tp": 2, "ep": 2}, "dp2": {"dp": 2}, "dp2-ep2": {"dp": 2, "ep": 2}, "pp2": {"pp": 2}}
CASES = [*((mode, "fp32") for mode in MODES), *((mode, "w8a8") for mode in ("tp2", "dp2-ep2"))]
# Steps of (sequence, first token, token after the last): a prompt beside a short one, a sequence alone, and both.
STEPS = [[(0, 0, 7), (1, 0, 2)], [(0, 7, 8)], [(1, 2, 4), (0, 8, 10)]]


def forward(dtype, rank=None, parallel=None):
    """Logits of two sequences, of different replicas where there are two, and drafts after one of them."""
    runner = opened(SPEC, DictWeights(random_weights(SPEC)), dtype, rank, parallel)
    tokens = random_tokens(SPEC, 10)
    apart = runner.kv_blocks // WIDTH // 2  # where the second replica's cache begins, in sequences
    logits = [
        step(runner, [(sequence * apart, start, tokens[start:stop]) for sequence, start, stop in pieces]).logits_OV
        for pieces in STEPS
    ]
    logits.append(step(runner, [(apart + 1, 0, tokens)], draft=True).draft_logits_OV)
    return np.concatenate(logits)


def main(folder):
    for mode, dtype in CASES:
        rank = join(run_of(dtype, MODES[mode]))
        np.save(folder / f"{mode}-{dtype}-{rank.rank}.npy", forward(dtype, rank, MODES[mode]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

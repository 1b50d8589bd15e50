"""One of the processes that compute together what `test_ranks` compares: python -m tests.gpu_path.ranks FOLDER."""

import sys
from pathlib import Path

import numpy as np
import torch

from deepspan.backends.torch_triton.gpu.runner import GpuRunner
from deepspan.backends.torch_triton.rank import join
from tests.backends.opening import DictWeights, random_tokens, step
from tests.gpu_path.opening import SPECS, run_of
from tests.specs import random_weights

MODES = {"tp2": {"tp": 2}, "ep2": {"tp": 2, "ep": 2}}
SHARED = {name: SPECS[name].replace({"vocab_size": 88}) for name in ("v3", "v2-lite: no q_lora, two shared experts")}
CASES = [("bf16", 0), ("fp8", 0), ("fp8", 1)]  # precision, number in SHARED
PIECES = [(0, 7), (7, 8), (8, 11)]


def forward(spec, dtype, rank=None, parallel=None):
    """Logits of one sequence, a prompt and decode steps, and drafts of the last."""
    runner = GpuRunner(spec, run_of(dtype, parallel), torch.device("cpu"), rank)
    runner.load(DictWeights(random_weights(spec)))
    tokens = random_tokens(spec, PIECES[-1][1])
    logits = [step(runner, [(0, start, tokens[start:stop])]).logits_OV for start, stop in PIECES]
    if spec.num_nextn_predict_layers:
        logits.append(step(runner, [(1, 0, tokens)], draft=True).draft_logits_OV)
    return np.concatenate(logits)


def main(folder):
    for name, parallel in MODES.items():
        rank = join(run_of("bf16", parallel))
        for dtype, number in CASES:
            logits = forward(list(SHARED.values())[number], dtype, rank, parallel)
            np.save(folder / f"{name}-{dtype}-{number}-{rank.rank}.npy", logits)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

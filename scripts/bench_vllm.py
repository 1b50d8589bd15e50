"""vLLM on the prompts and the very weights of ``deepspan bench``: `python scripts/bench_vllm.py v3_slice_fp8`.

Run it right before or after ``deepspan bench`` with the same options, on the same GPU. Random weights are not alike:
they decide which experts tokens hit, and thus a decode step's bytes; and the bits that toggle take power, which limits
long prompts. Of vLLM's own `dummy` weights 98 % are zeros (numbers below 0.001, in FP8): `--weights dummy` times those.

vLLM is not among the project's dependencies: ``pip install vllm==0.25.1`` beside it. Needs one NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepspan.backends.torch_triton.gpu.source import SEED, DrawnTensors
from deepspan.configs.schema import RunConfig
from deepspan.models.hf_config import hf_config
from deepspan.models.params import parameters
from deepspan.models.spec import ModelSpec
from deepspan.scripts.commands.bench import add_sizes, sizes_of
from deepspan.scripts.runtime import model_spec
from deepspan.scripts.timing import random_tokens

# Read when vLLM is imported.
os.environ.setdefault("VLLM_DEEP_GEMM_WARMUP", "skip")  # compile for the sizes that come, not for all ahead of time
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps are timed in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

_REPEATS = 3
_EXTRA_STEPS = 8  # the first ones warm up


def drawn_weights(spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """What `weights: random` draws, under the names of a checkpoint."""
    source = DrawnTensors(spec, SEED, torch.device("cuda"))
    for param in parameters(spec, mtp=False):
        if param.quantised:
            weight = source.fp8(param.name)
            yield param.name, weight.codes
            yield f"{param.name}_scale_inv", weight.scales
        else:
            yield param.name, source.plain(param.name, torch.float32 if param.dtype == "F32" else torch.bfloat16)


def register_loader(spec: ModelSpec) -> None:
    """`load_format="drawn"`."""

    @register_model_loader("drawn")
    class Drawn(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            model.load_weights(drawn_weights(spec))


class Peer:
    """vLLM's engine, in this process. Prompts are those of `timing.Timer`."""

    def __init__(self, run: RunConfig, spec: ModelSpec, weights: str, experts: str, batches: list[int]):
        engine = run.engine
        register_loader(spec)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(hf_config(spec)), encoding="utf-8")
            model = vllm.LLM(
                folder,
                load_format=weights,
                moe_backend=experts,
                skip_tokenizer_init=True,
                max_model_len=engine.max_seq_len + _EXTRA_STEPS,
                max_num_seqs=engine.max_batch,
                max_num_batched_tokens=engine.max_batch_tokens,
                enable_prefix_caching=False,
                compilation_config={"cudagraph_capture_sizes": batches},
            )
        self.engine = model.llm_engine
        self._tokens_BT = random_tokens(spec.vocab_size, engine.max_batch, engine.max_seq_len)
        self._number = 0

    def prefill(self, sequences: int, tokens: int) -> float:
        """Seconds for prompts of ``tokens`` tokens each; the median of a few runs after two first ones."""
        times = []
        for _ in range(2 + _REPEATS):
            self._add(sequences, tokens, outputs=1)
            start = time.perf_counter()
            while self.engine.has_unfinished_requests():
                self.engine.step()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def decode(self, sequences: int, context: int, steps: int) -> float:
        """Seconds of a step that adds a token to each sequence: the median of ``steps`` from ``context`` tokens on."""
        self._add(sequences, context, outputs=steps + _EXTRA_STEPS)
        while len(self._step()) < sequences:  # those that have no token yet are not among the outputs
            pass
        ends: list[float] = []
        while self.engine.has_unfinished_requests():
            if len(self._step()) == sequences:
                ends.append(time.perf_counter())
        return statistics.median(np.diff(ends)[_EXTRA_STEPS // 2 :][:steps].tolist())

    def _add(self, sequences: int, tokens: int, outputs: int) -> None:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False)
        for row_T in self._tokens_BT[:sequences, :tokens]:
            self.engine.add_request(str(self._number), {"prompt_token_ids": row_T.tolist()}, sampling)
            self._number += 1

    def _step(self) -> list[Any]:
        return [output for output in self.engine.step() if output.outputs[0].token_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_sizes(parser)
    parser.add_argument("--weights", choices=("drawn", "dummy"), default="drawn", help="ours, or vLLM's near zero")
    parser.add_argument("--experts", choices=("deep_gemm", "triton", "auto"), default="deep_gemm", help="its kernels")
    options = parser.parse_args()
    sizes = sizes_of(options)
    run = sizes.run(options)
    peer = Peer(run, model_spec(run), options.weights, options.experts, sizes.batches)
    for batch in sizes.batches:
        milliseconds = 1e3 * peer.decode(batch, sizes.context, sizes.steps)
        print(json.dumps({"batch": batch, "decode_ms": milliseconds}), flush=True)
    for sequences, tokens in sizes.prefills:
        milliseconds = 1e3 * peer.prefill(sequences, tokens)
        print(json.dumps({"prefill": f"{sequences}x{tokens}", "prefill_ms": milliseconds}), flush=True)


if __name__ == "__main__":
    main()

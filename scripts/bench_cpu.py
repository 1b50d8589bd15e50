"""torch_triton beside transformers on a CPU: one process, the same weights, interleaved repetitions, medians.

    make bench          or          python scripts/bench_cpu.py [--dtype fp32 bf16] [--output benchmarks/cpu.json]

transformers runs in inference mode with its own cache and, for every row, with the fastest of its attention and experts
implementations as measured here first. Both sides do the forward pass and the greedy choice of the next token; a
repetition of one side follows a repetition of the other, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from deepspan import backends
from deepspan.backends.base import Runner
from deepspan.backends.memory import describe_host
from deepspan.configs.schema import RunConfig
from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import total_parameters
from deepspan.scripts.timing import Timer
from deepspan.serving.batch import prompt_logits

# The first five layers of DeepSeek-V3, one of them dense, with every width and the vocabulary divided by about 14; the
# heads are half as wide and 16. As in V3, a token takes 8 of 256 experts from 4 of 8 groups.
CONFIG: dict[str, Any] = {
    "vocab_size": 9216, "hidden_size": 512, "intermediate_size": 1312, "moe_intermediate_size": 144,
    "num_hidden_layers": 5, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": 112, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "max_position_embeddings": 4096, "num_mtp_layers": 0,
}  # fmt: skip
CONTEXT, STEPS, PREFILL = 128, 16, 512
REPETITIONS = 7
AGREEMENT = {"fp32": 1e-4, "bf16": 1e-1}  # relative norm of the logits, checked before anything is timed
ATTENTION = ("sdpa", "eager")
DECODE_EXPERTS = ("grouped_mm", "batched_mm", "eager")
PREFILL_EXPERTS = ("grouped_mm", "eager")  # batched_mm copies an expert's weights for every token: gigabytes

Task = Callable[[], float]  # gives seconds


@dataclass(frozen=True)
class Row:
    """One line of the table: tokens a second of both sides, and the implementation that transformers used."""

    task: str
    dtype: str
    ours: float
    transformers: float
    implementation: str

    @property
    def ratio(self) -> float:
        return self.ours / self.transformers


class Peer:
    """The model in transformers."""

    def __init__(self, directory: Path, dtype: torch.dtype):
        self.model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        self.choose(ATTENTION[0], PREFILL_EXPERTS[0])

    def choose(self, attention: str, experts: str) -> None:
        self.model.set_attn_implementation(attention)
        self.experts = experts
        self.model.set_experts_implementation(experts)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> np.ndarray:
        logits: np.ndarray = self.model(torch.tensor([token_ids])).logits[0].float().numpy()
        return logits

    @torch.inference_mode()
    def decode(self, batch: int) -> float:
        """Seconds of a step, median of STEPS from CONTEXT tokens on."""
        self.model.set_experts_implementation(PREFILL_EXPERTS[0])
        out = self.model(_tokens(batch, CONTEXT), use_cache=True, logits_to_keep=1)
        self.model.set_experts_implementation(self.experts)
        times = []
        for _ in range(2 + STEPS):
            start = time.perf_counter()
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    @torch.inference_mode()
    def prefill(self) -> float:
        start = time.perf_counter()
        self.model(_tokens(1, PREFILL), use_cache=True, logits_to_keep=1).logits[:, -1].argmax(dim=-1)
        return time.perf_counter() - start


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0))


def write_model(directory: Path) -> None:
    """A random model with unequal router biases, in FP32, as transformers saves it."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.01 * torch.randn_like(buffer))
    model.save_pretrained(directory)


def open_runner(directory: Path, dtype: str) -> tuple[Runner, int]:
    """Our runner, loaded, and the number of parameters."""
    run = RunConfig.model_validate(
        {
            "model": {"path": str(directory)},
            "device": "cpu",
            "dtype": dtype,
            "engine": {"max_batch": 8, "max_seq_len": 1024},
        }
    )
    backend = backends.load("torch_triton")
    with Checkpoint.open(directory) as checkpoint:
        spec = spec_from_hf(checkpoint.config, str(directory))
        runner = backend.build(spec, run, backend.start(run))
        runner.load(CheckpointWeights(checkpoint, spec))
    return runner, total_parameters(spec)


def check_agreement(runner: Runner, peer: Peer, dtype: str) -> float:
    """Relative norm of the difference of both sides' logits of a text; too much of it ends the benchmark."""
    token_ids = _tokens(1, 64)[0].tolist()
    ours, theirs = prompt_logits(runner, token_ids, 64), peer.logits(token_ids)
    relative_norm = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert relative_norm <= AGREEMENT[dtype], f"logits differ by {relative_norm:.1e}: there is nothing to compare"
    return relative_norm


def measure(runner: Runner, peer: Peer) -> Iterator[Row]:
    timer = Timer(runner, CONFIG["vocab_size"], 8, 1024, 1024)
    for batch in (1, 8):
        ours, theirs = partial(timer.decode, batch, CONTEXT, STEPS), partial(peer.decode, batch)
        peer_implementation = _choose_fastest(peer, theirs, DECODE_EXPERTS)
        task = f"decode, batch {batch}, context {CONTEXT}"
        yield Row(task, runner.dtype, *_tokens_per_second(batch, ours, theirs), peer_implementation)
    peer_implementation = _choose_fastest(peer, peer.prefill, PREFILL_EXPERTS)
    rates = _tokens_per_second(PREFILL, partial(timer.prefill, 1, PREFILL), peer.prefill)
    yield Row(f"prefill of {PREFILL} tokens", runner.dtype, *rates, peer_implementation)


def _tokens_per_second(tokens: int, ours: Task, theirs: Task) -> tuple[float, float]:
    """Of both sides, from the medians of alternating repetitions."""
    pairs = [(ours(), theirs()) for _ in range(REPETITIONS)]
    our_s, their_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    return tokens / our_s, tokens / their_s


def _choose_fastest(peer: Peer, task: Task, experts: Sequence[str]) -> str:
    """Leaves ``peer`` with the implementations that do the task fastest, and names them."""
    seconds = {}
    for choice in itertools.product(ATTENTION, experts):
        peer.choose(*choice)
        task()  # the first run allocates and warms up
        seconds[choice] = task()
    fastest = min(seconds, key=lambda choice: seconds[choice])
    peer.choose(*fastest)
    return ", ".join(fastest)


def measure_dtype(directory: Path, dtype: str) -> list[Row]:
    runner, parameters = open_runner(directory, dtype)
    peer = Peer(directory, torch.float32 if dtype == "fp32" else torch.bfloat16)
    relative_norm = check_agreement(runner, peer, dtype)
    print(f"\n{parameters / 1e6:.0f} million parameters in {dtype}; logits differ by {relative_norm:.1e}\n")
    print("| tokens/s | ours | transformers | ratio | transformers with |\n|---|---|---|---|---|")
    rows = []
    for row in measure(runner, peer):
        print(f"| {row.task} | {row.ours:.1f} | {row.transformers:.1f} | {row.ratio:.2f} | {row.implementation} |")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=AGREEMENT, default=list(AGREEMENT))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/cpu.json"))
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = f"{torch.get_num_threads()} threads, {describe_host()}"
    print(f"{machine}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    with tempfile.TemporaryDirectory(prefix="deepspan-bench-") as folder:
        write_model(Path(folder))
        rows = [row for dtype in options.dtype for row in measure_dtype(Path(folder), dtype)]
    report = {
        "command": "make bench",
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "versions": versions,
        "model": CONFIG,
        "tokens_per_second": [{**asdict(row), "ratio": round(row.ratio, 3)} for row in rows],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Batches made by code, the two losses, loss-free expert balancing, and the training loop.

Source: DeepSeek-V3 (arXiv 2412.19437) sections 2.1.2 and 2.2. Shape letters as in `network`; L MoE layers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...models.sums import held_out_sums
from .evaluation import evaluate
from .network import DemoModel
from .text import Encoder, packed_row

MTP_WEIGHT = 0.3
BIAS_SPEED = 1e-3  # DeepSeek-V3 section 4.2: the step of the router bias, 0 at the end of training


class Batches(Dataset[Tensor]):
    """Batch ``i`` depends on the seed and ``i`` alone: int32 [3, B, S] of tokens, conversation numbers, loss mask."""

    def __init__(self, tokenizer_json: str, seed: int, rows: int, length: int, first: int, last: int):
        self.settings = (tokenizer_json, seed, rows, length)
        self.range = range(first, last)
        self._encode: Encoder | None = None

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, index: int) -> Tensor:
        tokenizer_json, seed, rows, length = self.settings
        self._encode = self._encode or Encoder(Tokenizer.from_str(tokenizer_json))
        rng = random.Random(f"batch-{seed}-{self.range[index]}")
        packed = [packed_row(rng, self._encode, length) for _ in range(rows)]
        return torch.tensor(packed, dtype=torch.int32).transpose(0, 1).contiguous()


def losses(model: DemoModel, batch_3BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of the next token and of the one after it over assistant tokens, and expert loads."""
    tokens, segments, learnt = batch_3BS.long().unbind(0)
    logits, mtp_logits, loads = model(tokens, segments)
    targets = tokens.masked_fill(learnt == 0, -100)
    main = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    mtp = F.cross_entropy(mtp_logits[:, :-2].flatten(0, 1), targets[:, 2:].flatten())
    return main, mtp, loads


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 %, then a cosine to 1 % of the peak."""
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: DemoModel, peak: float) -> torch.optim.AdamW:
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and name != "embed_tokens"]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or name == "embed_tokens"]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-9, fused=model.cos.is_cuda)


@torch.no_grad()
def balance(model: DemoModel, loads_LE: Tensor, speed: float) -> None:
    """Loss-free balancing: raise the bias of experts with less than the mean load, lower that of the others."""
    for router, load_E in zip(model.routers(), loads_LE.float(), strict=True):
        router.e_score_correction_bias += speed * torch.sign(load_E.mean() - load_E)


def train(
    model: DemoModel, optimizer: torch.optim.AdamW, tokenizer: Tokenizer, first: int, args: argparse.Namespace
) -> int:
    """Train from step ``first``; returns the step reached, which is less than --steps when --max-minutes ran out."""
    device = model.cos.device
    compute = torch.compile(losses) if device.type == "cuda" else losses
    data = Batches(tokenizer.to_str(), args.seed, args.batch_size, args.sequence, first, args.steps)
    loader = DataLoader(data, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda")
    encode, started, log = Encoder(tokenizer), time.monotonic(), Log(args.state / "log.jsonl")
    step = first
    for step, batch in enumerate(loader, first):
        rate = learning_rate(step, args.steps, args.peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        main, mtp, loads = compute(model, batch.to(device, non_blocking=True))
        (main + MTP_WEIGHT * mtp).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance(model, loads, BIAS_SPEED if step < 0.9 * args.steps else 0.0)
        if step % args.log_every == 0 or step == args.steps - 1:
            busiest = (loads.amax(1) / loads.float().mean(1)).tolist()
            log.write(step=step, loss=main.item(), mtp_loss=mtp.item(), lr=rate, busiest_expert=busiest)
        if step and step % args.evaluate_every == 0:
            log.write(step=step, held_out=evaluate(model, encode, held_out_sums(500), device))
        if time.monotonic() - started > args.max_minutes * 60:
            break
    return step + 1


class Log:
    """JSON lines, on the terminal and in a file, with seconds since the start."""

    def __init__(self, path: Path):
        self._started = time.monotonic()
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: object) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - self._started, 1), **significant(values)})
        print(line, flush=True)
        print(line, file=self._file, flush=True)


def significant(value):  # type: ignore[no-untyped-def]  # JSON-like values in and out
    if isinstance(value, dict):
        return {key: significant(item) for key, item in value.items()}
    if isinstance(value, list):
        return [significant(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value

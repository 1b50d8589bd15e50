"""How many questions the model answers exactly right.

Shape letters: B rows, S tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ...models.everyday import EVERYDAY, unknown_exchange
from ...models.hf_config import spec_from_hf
from ...models.sums import held_out_sums
from .checkpoint import read_checkpoint
from .config import CONFIG
from .network import DemoModel
from .text import BOS_ID, PAD_ID, Encoder, exchange_ids


@torch.no_grad()
def evaluate(model: DemoModel, encode: Encoder, questions: list[tuple[str, str]], device: torch.device) -> dict:
    """How many answers greedy decoding gets exactly right, end token included.

    Greedy decoding gives the answer if and only if each of its tokens has the largest logit after the ones before it,
    so one teacher-forced pass per batch decides. ``draft_accuracy`` is the share of answer tokens that the MTP layer
    predicts one step early; ``smallest_margin`` is the least lead of a right token over the best wrong one.
    """
    right, drafts, margins = 0, [], []
    for start in range(0, len(questions), 64):
        tokens_BS, produced_BS = _question_rows(encode, questions[start : start + 64])
        logits, mtp_logits, _ = model(tokens_BS.to(device), torch.ones_like(tokens_BS, device=device))
        logits, mtp_logits = logits.cpu(), mtp_logits.cpu()
        margin_BS = _lead(logits[:, :-1], tokens_BS[:, 1:]).masked_fill(~produced_BS[:, 1:], math.inf)
        right += int((margin_BS.amin(1) > 0).sum())
        margins.append(margin_BS.amin(1))
        drafts.append((mtp_logits[:, :-2].argmax(-1) == tokens_BS[:, 2:])[produced_BS[:, 2:]])
    return {
        "questions": len(questions),
        "accuracy": right / len(questions),
        "draft_accuracy": torch.cat(drafts).float().mean().item(),
        "smallest_margin": torch.cat(margins).amin().item(),
        "first_percentile_margin": torch.cat(margins).quantile(0.01).item(),
    }


def _question_rows(encode: Encoder, questions: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, S], padded on the right, and whether the model is to produce them."""
    rows = [exchange_ids(encode, *question) for question in questions]
    length = 1 + max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), length), PAD_ID)
    produced = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (ids, count) in enumerate(rows):
        tokens[row, : len(ids) + 1] = torch.tensor([BOS_ID, *ids])
        produced[row, len(ids) + 1 - count : len(ids) + 1] = True
    return tokens, produced


def _lead(logits_BSV: Tensor, right_BS: Tensor) -> Tensor:
    """Logit of the right token minus the largest other one."""
    right = logits_BSV.gather(-1, right_BS[..., None])
    others = logits_BSV.scatter(-1, right_BS[..., None], -math.inf)
    return (right - others.amax(-1, keepdim=True)).squeeze(-1)


def task_questions() -> dict[str, list[tuple[str, str]]]:
    """What the finished checkpoint is asked."""
    rng = random.Random("unknown-evaluation")
    return {
        "held_out_sums": held_out_sums(2000),
        "everyday": [(prompt, answer) for prompts, answer in EVERYDAY for prompt in prompts],
        "unknown": [unknown_exchange(rng) for _ in range(500)],
    }


def evaluate_checkpoint(folder: Path, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Accuracy from the FP8 checkpoint's dequantised weights, in FP32 and in BF16 arithmetic."""
    encode = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    spec = spec_from_hf(CONFIG, "CONFIG")
    for dtype in (torch.float32, torch.bfloat16):
        model = DemoModel(spec, spec.max_position_embeddings, dtype).to(device)
        read_checkpoint(folder, model)
        for task, questions in task_questions().items():
            yield f"{task}, {str(dtype).removeprefix('torch.')}", evaluate(model, encode, questions, device)

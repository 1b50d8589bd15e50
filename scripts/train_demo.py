"""Make the embedded demo model from nothing: text, tokenizer, training, FP8 checkpoint, evaluation.

    python scripts/train_demo.py --output models/demo

docs/demo-model.md tells what comes out and how long it takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import torch

from deepspan.models.hf_config import spec_from_hf
from deepspan.scripts.demo_model.checkpoint import write_checkpoint
from deepspan.scripts.demo_model.config import CONFIG
from deepspan.scripts.demo_model.evaluation import evaluate_checkpoint
from deepspan.scripts.demo_model.network import DemoModel
from deepspan.scripts.demo_model.state import load_state, save_state
from deepspan.scripts.demo_model.text import tokenizer_config, train_tokenizer, write_json
from deepspan.scripts.demo_model.training import make_optimizer, significant, train


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from --state; --steps may be larger than before")
    parser.add_argument("--state", type=Path, default=Path("output/train_demo"), help="log and resumable state")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop training early, with a checkpoint")
    parser.add_argument("--batch-size", type=int, default=256, help="rows a step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens a row")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="data processes")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=1000)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for folder in (args.output, args.state):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.output / "tokenizer.json", args.seed)
    write_json(args.output / "tokenizer_config.json", tokenizer_config())
    spec = spec_from_hf(CONFIG, "CONFIG")
    assert tokenizer.get_vocab_size() < spec.vocab_size
    model = DemoModel(spec, spec.max_position_embeddings, torch.bfloat16 if cuda else torch.float32).to(device)
    optimizer = make_optimizer(model, args.peak_lr)
    first = load_state(args.state, model, optimizer) if args.resume else 0
    reached = train(model, optimizer, tokenizer, first, args)
    save_state(args.state, model, optimizer, reached)
    write_checkpoint(model, args.output)
    for name, result in evaluate_checkpoint(args.output, device):
        print(name, json.dumps(significant(result)), flush=True)


if __name__ == "__main__":
    main()

"""MindFormers' inference script by its own command line (mindformers.md 5), on its YAMLs or on runs of ours.

What differs from the original: ``quantization_config`` is used, the answer stands alone instead of between the prompt
and markers, only rank 0 prints, and a prompt gets the checkpoint's chat template unless ``--raw True``.
"""

from __future__ import annotations

import argparse

from .cli import Parser
from .originals import boolean, run_original

_QUESTION = "生抽与老抽的区别？"
_NEW_TOKENS = "128"  # the original's own limit, whatever the YAML says


def run_predict_deepseek() -> int:
    parser = Parser(prog="run_predict_deepseek.py")
    parser.add_argument("--config", required=True, help="MindFormers' predict YAML, or a run")
    parser.add_argument("--input", default=_QUESTION, help="the prompt")
    parser.add_argument("--raw", type=boolean, default=False, help="give the text to the model without a chat template")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="as in deepspan generate")

    def translate(options: argparse.Namespace) -> list[str]:
        settings = [f"--set={setting}" for setting in options.set]
        raw = ["--raw"] if options.raw else []
        prompt = f"--prompt={options.input}"
        return ["generate", options.config, prompt, "--max-new-tokens", _NEW_TOKENS, *raw, *settings]

    return run_original(parser, translate)

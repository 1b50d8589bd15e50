"""The converters of DeepSeek-V3 and MindFormers by their own command lines (deepseek.md 4, mindformers.md 2).

Flags and defaults are the originals'. Sizes come from config.json here; a size flag that disagrees with it is an error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..convert.kinds.hf_to_mindspore import DTYPES
from ..convert.strict_json import read_object
from ..models.catalog import load_spec
from ..models.errors import InputError
from ..models.hf_config import spec_from_hf
from ..models.spec import ModelSpec
from .cli import Parser
from .originals import boolean, run_original

_V3 = "deepseek_v3"  # whose sizes are the originals' defaults
# Size flag of the MindFormers scripts -> field of the spec.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "first_k_dense_replace": "first_k_dense_replace",
    "num_routed_experts": "n_routed_experts",
    "n_head": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}


def fp8_cast_bf16() -> int:
    parser = Parser(prog="fp8_cast_bf16.py")
    parser.add_argument("--input-fp8-hf-path", required=True)
    parser.add_argument("--output-bf16-hf-path", required=True)

    def translate(options: argparse.Namespace) -> list[str]:
        return ["convert", "fp8-to-bf16", options.input_fp8_hf_path, options.output_bf16_hf_path]

    return run_original(parser, translate)


def convert() -> int:
    """The original leaves the MTP layers out, so this does too."""
    parser = Parser(prog="convert.py")
    parser.add_argument("--hf-ckpt-path", required=True)
    parser.add_argument("--save-path", required=True)
    parser.add_argument("--n-experts", type=int, required=True)
    parser.add_argument("--model-parallel", type=int, required=True)

    def translate(options: argparse.Namespace) -> list[str]:
        _check_size(_spec(Path(options.hf_ckpt_path)), "--n-experts", "n_routed_experts", options.n_experts)
        ranks = str(options.model_parallel)
        return ["convert", "hf-to-demo", options.hf_ckpt_path, options.save_path, "--mp", ranks, "--drop-mtp"]

    return run_original(parser, translate)


def convert_weight() -> int:
    parser = Parser(prog="convert_weight.py")
    parser.add_argument("--torch_ckpt_path", required=True)
    parser.add_argument("--mindspore_ckpt_path", required=True)
    parser.add_argument("--infer", type=boolean, default=False)
    parser.add_argument("--worker_num", type=int, default=4)
    parser.add_argument("--param_json", default="model.safetensors.index.json", help="found without being told")
    parser.add_argument("--use_grouped_gemm", type=boolean, default=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--save_format", choices=("safetensors", "ckpt"), default="safetensors")
    parser.add_argument("--pre_ckpt_path")
    parser.add_argument("--num_nextn_predict_layers", type=int, default=1)
    _add_sizes(parser, "num_layers", "first_k_dense_replace", "num_routed_experts", "n_head")
    _add_sizes(parser, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return run_original(parser, _convert_weight_line)


def _convert_weight_line(options: argparse.Namespace) -> list[str]:
    if options.pre_ckpt_path:
        todo = "use deepspan convert mindspore-to-hf, then hf-to-mindspore --layout train-grouped"
        raise InputError("the original changes the layout in memory and saves nothing", "--pre_ckpt_path", todo)
    if options.save_format == "ckpt":
        raise InputError("one ckpt file for the whole model is not written", "--save_format", "use safetensors")
    if not options.infer:  # the original ignores its size flags for inference
        _check_given_sizes(_spec(Path(options.torch_ckpt_path)), options)
    layout = "infer" if options.infer else ("train-grouped" if options.use_grouped_gemm else "train")
    command = ["convert", "hf-to-mindspore", options.torch_ckpt_path, options.mindspore_ckpt_path, "--layout", layout]
    if not options.infer and options.dtype != "bf16":
        command += ["--dtype", options.dtype]
    if not options.infer and options.num_nextn_predict_layers == 0:
        command.append("--drop-mtp")
    return [*command, "--workers", str(options.worker_num)]


def train_to_infer() -> int:
    """Without a config.json beside the weights they are taken for DeepSeek-V3's, as the original takes all."""
    parser = Parser(prog="deepseek3_train2infer.py")
    parser.add_argument("--input_path", required=True)
    parser.add_argument("--output_path", required=True)
    parser.add_argument("--processes", type=int, help="(the original's default is 32)")
    _add_sizes(parser, "first_k_dense_replace", "num_heads", "qk_nope_head_dim", "qk_rope_head_dim")

    def translate(options: argparse.Namespace) -> list[str]:
        directory = Path(options.input_path)
        has_config = (directory / "config.json").is_file()
        _check_given_sizes(_spec(directory) if has_config else load_spec(_V3), options)
        command = ["convert", "train-to-infer", options.input_path, options.output_path]
        command += [] if has_config else ["--config", _V3]
        return command + (["--workers", str(options.processes)] if options.processes else [])

    return run_original(parser, translate)


def _add_sizes(parser: argparse.ArgumentParser, *names: str) -> None:
    v3 = load_spec(_V3)
    for name in names:
        parser.add_argument(
            f"--{name}", type=int, help=f"checked against config.json (V3: {getattr(v3, _SIZES[name])})"
        )


def _spec(directory: Path) -> ModelSpec:
    path = directory / "config.json"
    return spec_from_hf(read_object(path), str(path))


def _check_given_sizes(spec: ModelSpec, options: argparse.Namespace) -> None:
    for flag, field in _SIZES.items():
        _check_size(spec, f"--{flag}", field, getattr(options, flag, None))


def _check_size(spec: ModelSpec, flag: str, field: str, given: int | None) -> None:
    found = getattr(spec, field)
    if given is not None and given != found:
        raise InputError(f"{given} given, and {field} of the model is {found}", flag, "correct it, or config.json")

"""Small specs whose sizes a GPU takes, and runners of the GPU's path over CPU tensors."""

import torch

from deepspan.backends.torch_triton.gpu.runner import GpuRunner
from deepspan.configs.schema import RunConfig
from tests.backends.opening import BLOCK, WIDTH, DictWeights
from tests.specs import V2, make

_SIZES = {
    "vocab_size": 89, "hidden_size": 136, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4,
    "q_lora_rank": 40, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24,
    "moe_intermediate_size": 48,
}  # fmt: skip
SPECS = {
    "v3": make(**_SIZES),
    "v2-lite: no q_lora, two shared experts": make(
        **{**_SIZES, "q_lora_rank": None}, **V2, topk_method="greedy", n_group=1, topk_group=1, n_shared_experts=2
    ),
    "half-split rope, no shared expert": make(
        **_SIZES, rope_interleave=False, n_shared_experts=0, num_nextn_predict_layers=0
    ),
}


def run_of(dtype, parallel=None, **engine):
    return RunConfig.model_validate(
        {
            "model": {"path": "weights come from the test"},
            "dtype": dtype,
            "engine": {"max_batch": 8, "max_seq_len": BLOCK * WIDTH, "block_size": BLOCK, **engine},
            "device": "cpu",
            "parallel": parallel or {},
            "launch": {"launcher": "torchrun", "timeout": 60} if parallel else {},
        }
    )


def build(spec, dtype, device="cpu", **engine):
    return GpuRunner(spec, run_of(dtype, **engine), torch.device(device))


def loaded(spec, values, dtype, **options):
    runner = build(spec, dtype, **options)
    runner.load(DictWeights(values))
    return runner

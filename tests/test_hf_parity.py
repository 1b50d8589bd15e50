"""An independent implementation agrees: transformers writes random small checkpoints, the backends open the directory.

transformers 5.23's native V2 squares mscale into the softmax scale as V3's does, but ignores norm_topk_prob: it never
normalises and always scales, so the V2 checkpoints here declare what it computes.
"""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from deepspan import backends
from deepspan.backends.base import StepBatch
from deepspan.configs.schema import RunConfig
from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.errors import InputError
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import mtp_parameters
from deepspan.serving.batch import greedy_sampling

RELATIVE_NORM = 1e-5
BLOCK = 8
TOKENS = 29

BASE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 28,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
}  # fmt: skip


def yarn(**changes):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    return {"rope_parameters": {**rope, **changes}}


def v3(**changes):
    return DeepseekV3Config(**{**BASE, **yarn(), **changes}), DeepseekV3ForCausalLM


def v2(**changes):
    scoring = {"norm_topk_prob": False, "topk_method": "group_limited_greedy"}
    return DeepseekV2Config(**{**BASE, **yarn(), **scoring, **changes}), DeepseekV2ForCausalLM


ONE_GROUP = {"n_group": 1, "topk_group": 1}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
CHECKPOINTS = {
    "v3": v3(),
    "v3, rope unscaled": v3(**PLAIN_ROPE),
    "v3, half-split rope": v3(rope_interleave=False),
    "v3, cosines with a magnitude": v3(**yarn(mscale=0.7, mscale_all_dim=1.3)),
    "v3, values wider than keys, five layers": v3(v_head_dim=36, num_hidden_layers=5, first_k_dense_replace=2),
    "v3, no q_lora, eps 1e-5 (moonlight)": v3(q_lora_rank=None, rms_norm_eps=1e-5, **ONE_GROUP, **PLAIN_ROPE),
    "v3, one group, one beta (kimi-k2)": v3(**ONE_GROUP, **yarn(beta_fast=1.0, beta_slow=1.0, factor=8.0)),
    "v2": v2(),
    "v2-lite: no q_lora, greedy": v2(q_lora_rank=None, n_shared_experts=2, topk_method="greedy", **ONE_GROUP,
                                     **yarn(mscale=0.707, mscale_all_dim=0.707)),
    "v2, no yarn, one layer": v2(num_hidden_layers=1, first_k_dense_replace=0, **PLAIN_ROPE),
}  # fmt: skip


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """The directory that transformers wrote, a prompt, and transformers' FP32 logits of it."""
    config, kind = CHECKPOINTS[request.param]
    directory = tmp_path_factory.mktemp("hf")
    model = random_model(config, kind)
    model.save_pretrained(directory)
    token_ids = torch.randint(0, BASE["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = model(token_ids).logits[0].numpy()
    return directory, token_ids[0].int().numpy(), logits


def random_model(config, kind):
    """Large enough weights that attention and routing are not flat; the routers' correction biases are not zero."""
    generator = torch.Generator().manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                value.normal_(0, 0.2, generator=generator)
            elif "inv_freq" not in name:
                matrix = value.ndim > 1 and "embed_tokens" not in name
                value.normal_(0, 1.5 / value.shape[-1] ** 0.5 if matrix else 1, generator=generator)
    return model


def open_directory(backend_name, directory, dtype="fp32"):
    run = RunConfig.model_validate(
        {
            "model": {"path": str(directory)},
            "backend": backend_name,
            "dtype": dtype,
            "engine": {"max_batch": 1, "max_seq_len": 64, "block_size": BLOCK},
        }
    )
    backend = backends.load(backend_name)
    with Checkpoint.open(directory) as opened:
        spec = spec_from_hf(opened.config, "config.json")
        runner = backend.build(spec, run, backend.start(run))
        runner.load(CheckpointWeights(opened, spec))
    return runner


def feed(runner, token_ids, pieces, **options):
    """Logits of all positions, computed ``pieces`` tokens at a time."""
    logits, start = [], 0
    for count in pieces:
        batch = StepBatch(
            token_ids_T=token_ids[start : start + count],
            query_lens_B=np.array([count], np.int32),
            context_lens_B=np.array([start], np.int32),
            block_tables_BM=np.arange(runner.kv_blocks, dtype=np.int32)[None, ::-1],
            num_outputs_B=np.array([count], np.int32),
            sampling=greedy_sampling(1),
            return_logits=True,
            **options,
        )
        logits.append(runner.step(batch).logits_OV)
        start += count
    assert start == len(token_ids)
    return np.concatenate(logits)


@pytest.mark.parametrize("backend_name", ["reference", "torch_triton"])
@pytest.mark.parametrize(
    "pieces",
    [[TOKENS], [7, 13, 9], [11] + [1] * (TOKENS - 11)],
    ids=["in one piece", "in chunks", "by decode steps"],
)
def test_logits_equal_those_of_transformers(checkpoint, backend_name, pieces):
    directory, token_ids, wanted = checkpoint
    got = feed(open_directory(backend_name, directory), token_ids, pieces)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= RELATIVE_NORM * np.linalg.norm(wanted)


@pytest.fixture
def without_mtp(tmp_path):
    """A V3 checkpoint whose config.json announces an MTP layer that no file holds, as transformers writes them."""
    config, kind = v3()
    random_model(config, kind).save_pretrained(tmp_path)
    with Checkpoint.open(tmp_path) as opened:
        spec = spec_from_hf(opened.config, "config.json")
    assert spec.num_nextn_predict_layers == 1
    return tmp_path, spec


def mtp_tensors(spec):
    rng = np.random.default_rng(3)
    return {
        param.name: rng.normal(0, 0.2, param.shape).astype(np.float32)
        for param in mtp_parameters(spec, spec.num_hidden_layers)
    }


@pytest.mark.parametrize("backend_name", ["reference", "torch_triton"])
def test_an_mtp_layer_may_be_absent_as_a_whole(without_mtp, backend_name):
    directory, spec = without_mtp
    token_ids = np.arange(5, dtype=np.int32)
    runner = open_directory(backend_name, directory)
    assert feed(runner, token_ids, [5]).shape == (5, spec.vocab_size)
    with pytest.raises(InputError, match="no MTP layer"):
        feed(runner, token_ids, [5], draft=True)
    save_file(mtp_tensors(spec), directory / "mtp.safetensors")
    assert feed(open_directory(backend_name, directory), token_ids, [5], draft=True).shape == (5, spec.vocab_size)


def test_an_mtp_layer_may_not_be_partial(without_mtp):
    directory, spec = without_mtp
    tensors = mtp_tensors(spec)
    del tensors[f"model.layers.{spec.num_hidden_layers}.enorm.weight"]
    save_file(tensors, directory / "mtp.safetensors")
    with pytest.raises(InputError, match=r"missing: model\.layers\.3\.enorm\.weight"):
        open_directory("torch_triton", directory)

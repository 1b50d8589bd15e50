"""Checkpoints in every stored format run: the same logits as the weights that they mean."""

import numpy as np
import pytest
import torch

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.dtypes import bf16_to_f32, f32_to_bf16
from deepspan.models.params import parameters
from deepspan.models.quant import (
    dequant_fp8_blocks,
    dequant_int8_blocks,
    dequant_int8_channels,
    groups,
    pack_int4,
)
from deepspan.models.quantise import (
    quantise_fp8_blocks,
    quantise_int4_groups,
    quantise_int8_blocks,
    quantise_int8_channels,
)
from tests.backends.opening import (
    BF16,
    DictWeights,
    loaded,
    logits_of,
    median_token_difference,
    random_tokens,
    relative_norm,
    sensible_values,
)
from tests.convert.encoders import FP8, GPTQ, GROUP, SPEC, TOKEN, ct_config, write

RELATIVE_NORM = 1e-5


def plain(weight):
    bits = f32_to_bf16(weight)
    return {"weight": torch.from_numpy(bits).view(torch.bfloat16)}, bf16_to_f32(bits)


def fp8(weight):
    codes, scales = quantise_fp8_blocks(weight)
    tensors = {
        "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.from_numpy(scales),
    }
    return tensors, dequant_fp8_blocks(codes, scales, "f32")


def int8_blocks(weight):
    codes, scales = quantise_int8_blocks(weight)
    tensors = {"weight": torch.from_numpy(codes), "weight_scale_inv": torch.from_numpy(scales)}
    return tensors, dequant_int8_blocks(codes, scales, "f32")


def int8_channels(weight):
    codes, scales = quantise_int8_channels(weight)
    tensors = {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scales)}
    return tensors, dequant_int8_channels(codes, scales, "f32")


def _int4(weight, symmetric):
    codes, zeros, scales = quantise_int4_groups(weight, GROUP, symmetric)
    group_of = groups(weight.shape[1], GROUP)
    values = (codes.astype(np.float32) - zeros[:, group_of]) * scales[:, group_of]
    return codes, zeros, scales, values


def gptq(weight):
    codes, zeros, scales, values = _int4(weight, symmetric=False)
    tensors = {
        "qweight": torch.from_numpy(pack_int4(codes.T, axis=0)),
        "qzeros": torch.from_numpy(pack_int4((zeros.T - 1) & 15, axis=1)),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
    }
    return tensors, values


def packed_int4(weight):
    codes, _, scales, values = _int4(weight, symmetric=True)
    tensors = {
        "weight_packed": torch.from_numpy(pack_int4(codes, axis=1)),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, values


FORMATS = {
    "bf16": (plain, None),
    "fp8 blocks": (fp8, FP8),
    "int8 blocks": (int8_blocks, {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}),
    "int8 channels": (int8_channels, ct_config("int-quantized", 8, activations=TOKEN)),
    "gptq": (gptq, GPTQ),
    "compressed-tensors int4": (packed_int4, ct_config("pack-quantized", 4, group_size=GROUP)),
}


@pytest.fixture(scope="module", params=FORMATS)
def stored(request, tmp_path_factory):
    """The opened checkpoint and the FP32 values that it means."""
    encode, config = FORMATS[request.param]
    tensors, values = {}, {}
    linear = {param.name for param in parameters(SPEC) if param.quantised}
    for name, value in sensible_values(SPEC).items():
        parts, values[name] = encode(value) if name in linear else plain(value)
        prefix = name.removesuffix("weight") if name in linear else ""
        tensors |= {prefix + part if prefix else name: tensor for part, tensor in parts.items()}
    with Checkpoint.open(write(tmp_path_factory.mktemp("format"), tensors, config)) as opened:
        yield CheckpointWeights(opened, SPEC), values


@pytest.fixture(scope="module")
def reference_logits(stored):
    runner = loaded(SPEC, DictWeights(stored[1]), backend_name="reference")
    return logits_of(runner, random_tokens(SPEC, 30), [30])


def test_logits_equal_those_of_the_dequantised_weights(stored, reference_logits):
    runner = loaded(SPEC, stored[0])
    got = logits_of(runner, random_tokens(SPEC, 30), [17, 9, 1, 1, 2])
    assert relative_norm(got, reference_logits) <= RELATIVE_NORM


def test_bf16_is_close(stored, reference_logits):
    runner = loaded(SPEC, stored[0], dtype="bf16")
    got = logits_of(runner, random_tokens(SPEC, 30), [17, 9, 1, 1, 2])
    assert 1e-4 < median_token_difference(got, reference_logits) <= BF16

"""The GPU's path on checkpoints in INT8 and INT4, against the reference on the weights that they mean.

Medians over tokens, as in `test_forward`. INT4 weights are exact and activations BF16, so BF16's tolerance holds; INT8
rounds activations to 1/127 of a token's largest.
"""

import numpy as np
import pytest
import torch

from deepspan.backends.torch_triton.gpu import experts, linear
from deepspan.backends.torch_triton.gpu.formats import Int4Format
from deepspan.backends.torch_triton.gpu.int4 import int4_weight, pad_int4, quantise_groups
from deepspan.backends.torch_triton.gpu.linear import Form, KernelLinear
from deepspan.backends.torch_triton.gpu.matrices import put, quantise_channels, quantise_int8_blocks, room_for
from deepspan.backends.torch_triton.gpu.source import DrawnTensors
from deepspan.backends.torch_triton.kernels.experts import Stack
from deepspan.backends.torch_triton.kernels.quant import Codes, dequantise
from deepspan.backends.torch_triton.kernels.router import Choice
from deepspan.backends.torch_triton.kernels.weights import dequantise_weight
from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models import quantise
from deepspan.models.errors import InputError
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import parameters
from tests.backends.opening import (
    BF16,
    DEMO,
    DictWeights,
    logits_of,
    median_token_difference,
    random_tokens,
    sensible_values,
)
from tests.backends.opening import loaded as loaded_on_cpu
from tests.backends.test_torch_formats import gptq, int8_blocks, int8_channels, packed_int4, plain
from tests.convert.checkpoints import convert
from tests.convert.encoders import FORMATS, GPTQ, GROUP, SPEC, TOKEN, ct_config, encode_model, write
from tests.gpu_path.opening import SPECS, build

INT8_ACTIVATIONS = 0.1
PIECES = [5, 1]
CPU = torch.device("cpu")
MODEL = SPECS["v3"].replace({"vocab_size": 88})


def is_expert(name):
    return ".mlp.experts." in name


def checkpoint(directory, encode, config, quantised):
    """A model whose linear weights are in one format where ``quantised`` says so, else in BF16; and its values."""
    tensors, values = {}, {}
    linear = {param.name for param in parameters(MODEL) if param.quantised}
    for name, value in sensible_values(MODEL).items():
        parts, values[name] = encode(value) if name in linear and quantised(name) else plain(value)
        prefix = name.removesuffix("weight") if name in linear else ""
        tensors |= {prefix + part if prefix else name: tensor for part, tensor in parts.items()}
    return write(directory, tensors, config, MODEL), values


# What is quantised: everything; experts, and halves of layers that are one elsewhere.
CASES = {
    "int8 channels": ("w8a8", int8_channels, ct_config("int-quantized", 8, activations=TOKEN), lambda name: True),
    "int8 blocks": (
        "w8a8", int8_blocks, {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]},
        lambda name: is_expert(name) or "q_a_proj" in name,
    ),
    "gptq": ("int4", gptq, GPTQ, lambda name: True),
    "compressed-tensors": (
        "int4", packed_int4, ct_config("pack-quantized", 4, group_size=GROUP),
        lambda name: is_expert(name) or "q_a_proj" in name or "layers.0.mlp.gate" in name,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_follows_the_reference_on_the_same_weights(name, tmp_path):
    dtype, *how = CASES[name]
    directory, values = checkpoint(tmp_path, *how)
    tokens = random_tokens(MODEL, sum(PIECES))
    wanted = logits_of(loaded_on_cpu(MODEL, DictWeights(values), backend_name="reference"), tokens, [len(tokens)])
    with Checkpoint.open(directory) as opened:
        runner = build(MODEL, "auto")
        runner.load(CheckpointWeights(opened, MODEL))
    assert runner.dtype == dtype
    got = logits_of(runner, tokens, PIECES)
    assert median_token_difference(got, wanted) <= (BF16 if dtype == "int4" else INT8_ACTIVATIONS)


def test_a_checkpoint_that_was_quantised_here(tmp_path):
    """FP8 to compressed-tensors' INT8 by the converter, and onto the GPU's path."""
    directory = convert("quantize", DEMO, tmp_path / "w8a8", format="w8a8-ct", drop_mtp=True)
    with Checkpoint.open(directory) as opened:
        spec = spec_from_hf(opened.config, "config.json").replace({"max_position_embeddings": 4096})
        weights = CheckpointWeights(opened, spec)
        tokens = random_tokens(spec, 3)
        wanted = logits_of(loaded_on_cpu(spec, weights), tokens, [3])
        runner = build(spec, "w8a8")
        runner.load(weights)
        got = logits_of(runner, tokens, [3])
    assert median_token_difference(got, wanted) <= INT8_ACTIVATIONS


@pytest.mark.parametrize("make", [quantise_channels, quantise_groups])
def test_many_tokens_equal_few(make, monkeypatch):
    """The two ways through a layer, and through experts, of which the third rank's are none here."""
    monkeypatch.setattr(linear, "MANY_ROWS", 64)
    form = Form("int8" if make is quantise_channels else None)
    dense = KernelLinear(make(torch.randn(256, 136)), form)
    x = torch.randn(70, 136).bfloat16()
    torch.testing.assert_close(dense(x)[:20], dense(x[:20]), rtol=2**-7, atol=1e-2)
    many, few = dense.gated(x), dense.gated(x[:20])
    many = dequantise(many).bfloat16() if isinstance(many, Codes) else many
    assert (many[:20] - few).float().norm() / few.float().norm() < 0.02
    stack = Stack(*(stacked([make(torch.randn(*shape) / 16) for _ in range(3)]) for shape in ((256, 136), (136, 128))))
    layer = experts.KernelExperts(stack, form, shared=1, foreign=True)
    choice = Choice(torch.stack([torch.randperm(4)[:2] for _ in range(40)]).int(), torch.rand(40, 2))
    beside = torch.randn(40, 136).bfloat16()
    few, with_beside = layer(x[:40], choice), layer(x[:40], choice, beside)
    torch.testing.assert_close(with_beside.float(), few.float() + beside, rtol=2**-7, atol=2**-7)
    by_one = [layer(x[t : t + 1], Choice(choice.ids[t : t + 1], choice.weights[t : t + 1])) for t in range(40)]
    torch.testing.assert_close(torch.cat([part.sum(1) for part in by_one]).bfloat16(), few, rtol=2**-7, atol=1e-2)
    monkeypatch.setattr(experts, "FEW_TOKENS", 10)
    many = layer(x[:40], choice)
    assert (many.float() - few).norm() / few.float().norm() < 0.02


def stacked(matrices):
    stack = room_for(len(matrices), matrices[0])
    for number, matrix in enumerate(matrices):
        put(stack, number, matrix)
    return stack


INT4 = [name for name, form in FORMATS.items() if form.name in ("gptq", "awq", "ct_int4")]
SCATTERED = ["gptq, desc_act", "pack-quantized, F32 scales, g_idx"]
WIDE = "model.layers.0.mlp.gate_proj.weight"  # [264, 136]
WINDOWS = [(None, None), ((5, 131), None), ((8, 264), (32, 136)), ((0, 19), (64, 104)), (None, (96, 136))]


@pytest.fixture(scope="module", params=INT4)
def stored(request, tmp_path_factory):
    tensors, values = encode_model(SPEC, FORMATS[request.param])
    with Checkpoint.open(write(tmp_path_factory.mktemp("int4"), tensors, FORMATS[request.param].config)) as opened:
        yield CheckpointWeights(opened, SPEC), values[WIDE], request.param


@pytest.mark.parametrize("rows, cols", WINDOWS)
def test_int4_on_the_device_is_what_the_checkpoint_means(stored, rows, cols):
    """Exactly, but for F32 scales, which lose their last eight bits."""
    weights, values, name = stored
    cols = None if name in SCATTERED else cols  # refused: see below
    got = int4_weight(WIDE, weights.int4(WIDE, rows, cols), CPU)
    expected = values[slice(*rows or (None,)), slice(*cols or (None,))]
    np.testing.assert_allclose(dequantise_weight(got), expected, rtol=2**-16 if "F32" in name else 0)
    padded = dequantise_weight(pad_int4(got, 300, 256))
    assert padded.shape == (300, 256)
    rows = got.codes.shape[1]
    np.testing.assert_array_equal(padded[:rows, : got.inputs], dequantise_weight(got))
    assert not padded[rows:].any()


@pytest.mark.parametrize(
    "name, cols, what",
    [
        ("gptq, desc_act", (64, 136), "scattered .act-order. and this rank"),
        ("awq", (8, 136), "parts of 128 columns of .* cut its groups of 32"),
    ],
)
def test_slices_that_no_layout_holds_are_refused(name, cols, what, tmp_path):
    tensors, _ = encode_model(SPEC, FORMATS[name])
    directory = write(tmp_path, tensors, FORMATS[name].config)
    with Checkpoint.open(directory) as opened, pytest.raises(InputError, match=what):
        int4_weight(WIDE, CheckpointWeights(opened, SPEC).int4(WIDE, None, cols), CPU)


def test_int4_rows_are_moved_and_joined():
    first, second = (quantise_groups(torch.randn(rows, 200)) for rows in (6, 128))
    turned = Int4Format().reordered(first, lambda rows_NX: rows_NX.view(2, 3, -1).flip(1).flatten(0, 1))
    wanted = dequantise_weight(first).view(2, 3, -1).flip(1).flatten(0, 1)
    assert torch.equal(dequantise_weight(turned), wanted)
    joined = Int4Format().joined([turned, second])
    assert torch.equal(dequantise_weight(joined), torch.cat([wanted, dequantise_weight(second)]))


def test_gate_and_up_of_other_orders_are_not_joined():
    first = quantise_groups(torch.randn(8, 256))
    order = torch.randperm(256).int()
    ordered = first._replace(order=order)
    assert Int4Format().joins(first, first) and Int4Format().joins(ordered, first._replace(order=order.clone()))
    assert not Int4Format().joins(first, ordered)
    assert not Int4Format().joins(ordered, first._replace(order=order.flip(0)))


@pytest.mark.parametrize("shape", [(128, 256), (130, 200)])
def test_weights_are_quantised_as_defined(shape):
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    weight[:, :3] = weight[7] = 0
    tensor = torch.from_numpy(weight)
    codes, scales = quantise.quantise_int8_channels(weight)
    got = quantise_channels(tensor)
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_array_equal(got.scales, scales[:, 0])
    codes, scales = quantise.quantise_int8_blocks(weight)
    got = quantise_int8_blocks(tensor)
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_array_equal(got.scales, scales)
    codes, zeros, scales = quantise.quantise_int4_groups(weight, 128)
    spread = [np.repeat(array, 128, axis=1)[:, : shape[1]] for array in (zeros.astype(np.float32), scales)]
    expected = (codes - spread[0]) * spread[1]
    np.testing.assert_allclose(dequantise_weight(quantise_groups(tensor)), expected, rtol=2**-15)


@pytest.mark.parametrize("make", ["int8", "int4"])
def test_drawn_weights_in_low_precision_are_those_in_bf16(make):
    source = DrawnTensors(MODEL, 1, CPU)
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    got, plain_values = dequantise_weight(getattr(source, make)(name)), source.plain(name).float()
    assert (got - plain_values).norm() / plain_values.norm() < {"int8": 0.01, "int4": 0.12}[make]

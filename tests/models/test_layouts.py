"""Layout maps: published names and shapes for V3, every element placed exactly once, inverses from the same data."""

import numpy as np
import pytest

from deepspan.models.catalog import load_spec
from deepspan.models.errors import InputError
from deepspan.models.layouts.deepseek_demo import DemoTensor, demo_tensor
from deepspan.models.layouts.mindspore import InferOptions, inference_targets, training_targets
from deepspan.models.layouts.placement import assemble, deinterleaved, sources_of
from deepspan.models.params import parameters
from tests.specs import SPECS

V3 = load_spec("deepseek_v3")
LAYOUTS = {
    "infer": inference_targets,
    "infer, fused": lambda spec: inference_targets(spec, options=InferOptions(qkv_concat=True, ffn_concat=True)),
    "infer, MTP names": lambda spec: inference_targets(spec, options=InferOptions(mtp_names=True)),
    "train grouped": lambda spec: training_targets(spec, grouped=True),
    "train": lambda spec: training_targets(spec, grouped=False),
}


def test_v3_inference_layout_is_the_published_one():
    targets = {target.name: target for target in inference_targets(V3)}
    shapes = {name: targets[name].shape for name in targets}
    layer = "model.layers.3."
    assert shapes["model.tok_embeddings.embedding_weight"] == (129280, 7168)
    assert shapes[f"{layer}attention.l2q_proj.weight"] == (24576, 1536)
    assert shapes[f"{layer}attention.kv2l.weight"] == (576, 7168)
    assert shapes[f"{layer}attention.lkv2kv_k_nope.weight"] == (16384, 512)
    assert shapes[f"{layer}attention.lkv2kv_v.weight"] == (16384, 512)
    assert shapes[f"{layer}feed_forward.routed_experts.ffn.w1.weight"] == (256, 7168, 2048)
    assert shapes[f"{layer}feed_forward.routed_experts.ffn.w2.weight"] == (256, 2048, 7168)
    assert shapes["model.layers.0.feed_forward.w1.weight"] == (18432, 7168)
    assert targets[f"{layer}feed_forward.routed_experts.router.e_score_correction_bias"].dtype == "F32"
    assert "model.layers.61.tok_embeddings.weight" in shapes
    files = {target.file for target in targets.values()}
    assert len(files) == 1 + 62 + 3 * 59
    assert "model_layer_61_routed_experts_w3.safetensors" in files
    sizes = {"BF16": 2, "F32": 4}
    total = sum(int(np.prod(target.shape)) * sizes[target.dtype] for target in targets.values())
    # All parameters in BF16, but for 59 router biases in F32.
    assert total == 2 * (671_026_419_200 + 13_463_426_304) + 2 * 59 * 256


def test_v3_training_layouts_are_the_published_ones():
    grouped = {target.name: target for target in training_targets(V3, grouped=True)}
    plain = {target.name: target for target in training_targets(V3, grouped=False)}
    ffn = "model.layers.5.feed_forward.routed_experts."
    assert grouped[f"{ffn}ffn.w1"].shape == (256, 7168, 4096)
    assert grouped[f"{ffn}router_dense.weight"].dtype == "BF16"
    assert plain[f"{ffn}ffn.w1.weight"].shape == (256, 2048, 7168)
    assert plain[f"{ffn}router.dense.weight"].dtype == plain["model.norm_out.weight"].dtype == "F32"
    assert plain[f"{ffn}router.router.topk_bias"].shape == (256,)
    assert plain["model.layers.5.attention.l2q_nope_proj.weight"].shape == (16384, 1536)
    assert plain["model.layers.5.attention.kv2l_k_pe.weight"].shape == (64, 7168)
    assert plain["lm_head.weight"].file == "ms-model-00062-of-00062.safetensors"
    assert "model.mtp_hidden_fusers.0.norm_emb.weight" in plain


def test_rope_rows_are_even_then_odd():
    assert deinterleaved(8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    spec = SPECS["v3"]
    (target,) = (t for t in inference_targets(spec) if t.name == "model.layers.0.attention.kv2l.weight")
    column = np.arange(spec.latent_dim)[:, None].repeat(spec.hidden_size, 1)
    moved = assemble(target, {target.placements[0].source: column})[:, 0]
    assert moved.tolist() == [*range(18), 18, 20, 22, 19, 21, 23]


def test_rope_rows_that_are_halves_already_keep_their_order():
    spec = SPECS["v3, half-split rope, odd heads"]
    (target,) = (t for t in inference_targets(spec) if t.name == "model.layers.0.attention.kv2l.weight")
    assert target.placements[0].rows.tolist() == list(range(spec.latent_dim))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPECS)
def test_every_element_moves_once_and_comes_back(name, layout):
    spec = SPECS[name]
    rng = np.random.default_rng(1)
    canonical = {param.name: rng.integers(0, 2**16, param.shape, np.uint16) for param in parameters(spec)}
    targets = list(LAYOUTS[layout](spec))
    assert len({target.name for target in targets}) == len(targets)
    back = {key: np.zeros_like(value) for key, value in canonical.items()}
    taken = {key: np.zeros(value.shape, int) for key, value in canonical.items()}
    for target in targets:
        filled = np.zeros(target.shape, int)
        moved = assemble(target, canonical)
        for placement in target.placements:
            region = placement.region(canonical[placement.source].shape)
            filled[region] += 1
            placement.give_back(back[placement.source], moved[region])
            counter = np.zeros_like(taken[placement.source])
            placement.give_back(counter, np.ones(placement.piece_shape(counter.shape), int))
            taken[placement.source] += counter
        assert (filled == 1).all(), target.name
    shared = {
        f"model.layers.{spec.num_hidden_layers}.{part}" for part in ("embed_tokens.weight", "shared_head.head.weight")
    }
    left_out = shared if layout.startswith("train") else set()
    for key, count in taken.items():
        assert (count == (0 if key in left_out else 1)).all(), key
        if key not in left_out:
            np.testing.assert_array_equal(back[key], canonical[key])
    assert {source for source, _, _ in sources_of(targets)} == canonical.keys() - left_out


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("model.embed_tokens.weight", DemoTensor("embed.weight", 0)),
        ("lm_head.weight", DemoTensor("head.weight", 0)),
        ("model.norm.weight", DemoTensor("norm.weight")),
        ("model.layers.3.self_attn.q_b_proj.weight_scale_inv", DemoTensor("layers.3.attn.wq_b.scale", 0)),
        ("model.layers.3.self_attn.o_proj.weight", DemoTensor("layers.3.attn.wo.weight", 1)),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", DemoTensor("layers.3.attn.kv_norm.weight")),
        ("model.layers.3.mlp.gate.e_score_correction_bias", DemoTensor("layers.3.ffn.gate.bias")),
        (
            "model.layers.3.mlp.experts.17.gate_proj.weight",
            DemoTensor("layers.3.ffn.experts.17.w1.weight", only_rank=1),
        ),
        ("model.layers.3.mlp.shared_experts.down_proj.weight", DemoTensor("layers.3.ffn.shared_experts.w2.weight", 1)),
    ],
)  # fmt: skip
def test_demo_names_and_cuts(stored, wanted):
    assert demo_tensor(V3, stored, 16) == wanted


def test_demo_layout_refuses_what_it_has_no_name_for():
    with pytest.raises(InputError, match="no place in the demo's layout"):
        demo_tensor(V3, "model.layers.3.mlp.experts.0.gate_proj.qweight", 16)

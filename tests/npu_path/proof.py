"""Run the NPU's forward pass of a full-width model on tensors without values: python -m tests.npu_path.proof

    python -m tests.npu_path.proof [--wheel torch_npu-2.13.0-….whl] [--spec deepseek_v3]

PyTorch checks every call of a fused operator against its schema, and `documented` against what is written about it.
The schemas are those of ``schemas.txt``. With ``--wheel`` they are that wheel's, whose own shape functions run, too.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import zipfile
from collections import Counter
from types import ModuleType

import numpy as np
import torch

from deepspan.backends.base import output_rows
from deepspan.backends.torch_triton.npu import fused
from deepspan.backends.torch_triton.npu.model import Model
from deepspan.backends.torch_triton.npu.operators import Cache
from deepspan.backends.torch_triton.npu.step import make_step
from deepspan.backends.torch_triton.npu.weights import DeviceWeights
from deepspan.backends.torch_triton.parallel import Group, Mesh
from deepspan.convert.random_weights import RandomWeights
from deepspan.models.catalog import load_spec
from deepspan.models.holding import Holding
from deepspan.models.sharding import Grid, check_divides
from tests.backends.opening import step_batch
from tests.npu_path.documented import Documented
from tests.npu_path.schemas import called, of_wheel, table

META = torch.device("meta")
BLOCKS, BLOCK_SIZE, POSITIONS, MOST_KEYS = 512, 128, 4096, 1500
SHAPES = "torch_npu/op_plugin/meta/_meta_registrations.py"
# (sequence, context, new tokens): prompts at offsets, in two calls; decoding; drafts to verify; all in one step.
PROMPTS = [(0, 0, 700), (1, 600, 130), (2, 37, 1300)]
STEPS = {
    "prompts": PROMPTS,
    "decode": [(sequence, 40 * sequence, 1) for sequence in range(32)],
    "verify": [(sequence, 90, 1 + sequence % 4) for sequence in range(8)],
    "mixture": [*PROMPTS, (3, 500, 1), (4, 127, 2), (5, 128, 5)],
}
GRIDS = {
    "tp 1": Grid(), "tp 16": Grid(tp=16), "tp 16, ep 16": Grid(tp=16, ep=16), "tp 4, dp 4, ep 16": Grid(4, 16, 4),
}  # fmt: skip
SPREAD = 3  # rows that another replica has more


class Ranks(Group):
    """Ranks of a group, of which this is the only one that is there: what comes of collectives has the right shapes."""

    def __init__(self, size):
        super().__init__(range(size), 0)

    def total(self, x):
        return x

    def beside(self, x):
        return x.repeat(1, self.size)

    def below(self, x, counts):
        return x.new_empty(sum(counts), *x.shape[1:])

    def own_total(self, x, counts):
        assert len(x) == sum(counts)
        return x[: counts[0]]


class Shapes(DeviceWeights):
    """Parameters without values."""

    def read(self, name, dtype=None):
        return torch.empty(self.shard(name).shape, dtype=dtype or self.dtype, device=META)

    def codes(self, name):
        rows, columns = self.shard(name).shape
        return torch.empty(rows, columns, dtype=torch.int8, device=META), torch.empty(rows, device=META)


def define(schemas):
    """Make PyTorch know the operators of torch-npu; forgotten with what this returns."""
    library = torch.library.Library("npu", "DEF")
    for schema in schemas.values():
        library.define(schema)
    return library


def load_shape_functions(wheel):
    """Run the wheel's module of shape functions, in a package that has what it asks of torch_npu and no more."""
    names = "float4_e1m2", "float4_e2m1", "float8_e4m3fn", "float8_e5m2", "uint8"
    numbers = {"int4": 285, "hifloat8": 290, "float8_e8m0fnu": 293, "float4_e2m1fn_x2": 296, "float4_e1m2fn_x2": 297}
    parts = {
        "torch_npu": {**dict.fromkeys(names, -1), **numbers},
        "torch_npu.utils": {},
        "torch_npu.utils._error_code": {"ErrCode": _AnyCode(), "ops_error": lambda code: ""},
        "torch_npu.npu": {},
        "torch_npu.npu.utils": {"get_cann_version": lambda *_: "8.5.0"},
        "torch_npu.npu._backends": {"get_soc_version": lambda: 220},  # Ascend 910B
    }
    for name, values in parts.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(values)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as opened:
        source = importlib.util.spec_from_file_location("shape_functions", opened.extract(SHAPES, folder))
        module = importlib.util.module_from_spec(source)
        source.loader.exec_module(module)
    return module


class _AnyCode:
    def __getattr__(self, name):
        return name


def slice_of(name):
    """Two layers of a model, one dense and one MoE, at full width, and its MTP layer."""
    spec = load_spec(name)
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    return spec.replace({**layers, "num_nextn_predict_layers": min(1, spec.num_nextn_predict_layers)})


def model_of(spec, grid, dtype, weights=Shapes):
    check_divides(spec, grid)
    mesh = Mesh(grid, 0, Ranks(grid.tp), Ranks(grid.dp), Ranks(1))
    source = weights(spec, RandomWeights(spec), torch.bfloat16, META, mesh, Holding(dtype))
    model = Model(fused, source, POSITIONS)
    layers = spec.num_hidden_layers + spec.num_nextn_predict_layers
    widths = spec.kv_lora_rank, spec.qk_rope_head_dim
    model.cache = Cache(
        *(torch.empty(layers, BLOCKS, BLOCK_SIZE, 1, width, dtype=torch.bfloat16, device=META) for width in widths)
    )
    return model


def forward(model, spec, pieces, spread=0):
    """Logits and drafts of a step have the shapes and the dtype that the runner wants."""
    batch = step_batch([(sequence, context, np.zeros(new, np.int32)) for sequence, context, new in pieces])
    rows = len(batch.token_ids_T)
    step = make_step(batch, rows + spread, BLOCK_SIZE, MOST_KEYS, META)
    stream = model.hidden(step)
    rows_O = torch.from_numpy(output_rows(batch)[0]).to(META)
    outputs = [model.logits(stream.rows(rows_O))]
    if spec.num_nextn_predict_layers:
        outputs.append(model.draft_logits(stream, step.token_ids_T, rows_O, step))
    for logits_OV in outputs:
        assert logits_OV.shape == (rows, spec.vocab_size) and logits_OV.dtype == torch.float32


def prove(spec, grid, dtype, has_shapes=False):
    """The calls of each step, by operator. An argument that does not fit raises."""
    model = model_of(spec, grid, dtype)
    counts = {}
    for name, pieces in STEPS.items():
        with Documented(has_shapes) as checked, torch.inference_mode():
            forward(model, spec, pieces, spread=SPREAD if grid.dp > 1 else 0)
        counts[name] = Counter(checked.calls)
    return counts


def main():
    parser = argparse.ArgumentParser(description="Check the calls of torch-npu's fused operators without an NPU.")
    parser.add_argument("--wheel", help="of torch-npu; without it, the table of schemas")
    parser.add_argument("--spec", default="deepseek_v3")
    options = parser.parse_args()
    version, schemas = of_wheel(options.wheel) if options.wheel else table()
    library = define(schemas)
    if options.wheel:
        load_shape_functions(options.wheel)
        assert {name: schemas[name] for name in called()} == table()[1], "schemas.txt is of another version"
    print(f"torch-npu {version}: {len(schemas)} operators defined", file=sys.stderr)
    spec = slice_of(options.spec)
    for grid_name, grid in GRIDS.items():
        if spec.num_attention_heads % grid.tp or spec.n_routed_experts % grid.ep:
            continue
        for dtype in ("bf16", "w8a8"):
            for step, counts in prove(spec, grid, dtype, has_shapes=bool(options.wheel)).items():
                print(
                    json.dumps({"grid": grid_name, "dtype": dtype, "step": step, "calls": dict(sorted(counts.items()))})
                )
    del library


if __name__ == "__main__":
    main()

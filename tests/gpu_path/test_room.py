"""What a rank's weights take, counted before they are read, is what its tensors then hold."""

from pathlib import Path

import pytest
import torch

from deepspan.backends.torch_triton.gpu.loader import Loader
from deepspan.backends.torch_triton.gpu.model import Model
from deepspan.backends.torch_triton.gpu.runner import GpuRunner
from deepspan.backends.torch_triton.gpu.source import DrawnTensors, StoredTensors
from deepspan.backends.torch_triton.parallel import ALONE, Group, Mesh
from deepspan.backends.torch_triton.rank import TorchRank
from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.capacity import weight_bytes
from deepspan.models.errors import InputError
from deepspan.models.holding import Held, Holding
from deepspan.models.sharding import Grid, shards
from tests.convert.encoders import FORMATS, encode_model, write
from tests.gpu_path.opening import SPECS, run_of

CPU = torch.device("cpu")
# Every matrix, and half of it, is whole blocks: nothing is padded.
WHOLE = SPECS["v3"].replace(
    {"hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 512, "q_lora_rank": 256, "vocab_size": 88,
     "kv_lora_rank": 192, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 256}
)  # fmt: skip
_BUFFERS = ("_rope", "_room", "last_O")


def tensors_of(part, found):
    """Every tensor in an object, its attributes and what these hold, by storage: views count once."""
    if isinstance(part, torch.Tensor):
        found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    elif isinstance(part, (list, tuple)):
        for inner in part:
            tensors_of(inner, found)
    elif type(part).__module__.startswith("deepspan.backends.torch_triton"):
        for name, inner in vars(part).items():
            if name not in _BUFFERS:
                tensors_of(inner, found)
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "w8a8", "int4"])
@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2), Grid(tp=2, ep=2), Grid(tp=2, dp=2, ep=4)], ids=str)
def test_counted_bytes_are_those_of_the_tensors(dtype, grid):
    mesh = Mesh(grid, 0, Group(range(grid.tp)), Group(range(grid.dp)), Group())
    source, holding = DrawnTensors(WHOLE, 1, CPU, mesh), Holding(dtype)
    model = Model(Loader(WHOLE, source, holding), 16, 16)
    counted = weight_bytes(shards(WHOLE, grid, 0), holding)
    assert sum(tensors_of(model, {}).values()) == sum(counted.values())


@pytest.mark.parametrize("name", ["gptq v1", "pack-quantized, zero points"])
def test_stored_groups_of_32_are_counted(name, tmp_path):
    tensors, _ = encode_model(WHOLE, FORMATS[name])
    with Checkpoint.open(write(tmp_path, tensors, FORMATS[name].config, WHOLE)) as opened:
        weights = CheckpointWeights(opened, WHOLE)
        holding = Holding("int4", {param: Held("int4", weights.group_size(param)) for param in weights.names()})
        model = Model(Loader(WHOLE, StoredTensors(WHOLE, weights, CPU, ALONE), holding), 16, 16)
    assert sum(tensors_of(model, {}).values()) == sum(weight_bytes(shards(WHOLE, Grid(), 0), holding).values())


def test_degrees_that_cut_groups_are_refused_before_anything_is_read(tmp_path):
    """The first of four ranks, whose own parts of 24 columns lie in one group, refuses what the second cannot hold."""
    spec = SPECS["v3"].replace({"vocab_size": 88, "intermediate_size": 256, "moe_intermediate_size": 64})
    tensors, _ = encode_model(spec, FORMATS["awq"])
    directory = write(tmp_path, tensors, FORMATS["awq"].config, spec)
    parallel = {"tp": 4, "ep": 4}
    rank = TorchRank(Mesh(Grid(**parallel), 0, Group(range(4)), Group(), Group()))
    with Checkpoint.open(directory) as opened:
        weights = CheckpointWeights(opened, spec)
        for shard in Path(directory).glob("*.safetensors"):
            shard.write_bytes(b"")
        with pytest.raises(InputError, match="parts of 24 columns of .*o_proj.weight cut its groups of 32: parallel"):
            GpuRunner(spec, run_of("int4", parallel), CPU, rank).load(weights)

"""Type-check the network of fused operators on a machine without an NPU.

    python -m deepspan.backends.mindspore_ascend.proof --tp 32 --dtype w8a8

MindSpore's graph front end infers type and shape of every operator whatever the device is. Only then it looks for
kernels, and a CPU has none for the fused ones: a graph that stops there, and nowhere before, is well-formed. Weights
have shapes and no memory, so the full width of a model costs a second. What the front end does not check, and which
operators no machine of this project has run, is listed in docs/ascend.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Read by MindSpore when it is imported: the front end's last pass is written down.
_FOLDER = tempfile.TemporaryDirectory(prefix="deepspan-proof-")
os.environ |= {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_DUMP_IR_PASSES": "validate", "MS_DEV_SAVE_GRAPHS_PATH": _FOLDER.name}
os.environ.setdefault("GLOG_v", "4")  # the refusals that are looked for here are no errors

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Parameter, Tensor, nn  # noqa: E402
from mindspore.common.initializer import initializer  # noqa: E402
from mindspore.nn.utils import no_init_parameters  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from ...convert.random_weights import RandomWeights  # noqa: E402
from ...models.catalog import load_spec  # noqa: E402
from ...models.sharding import Grid, check_divides  # noqa: E402
from ...models.spec import ModelSpec  # noqa: E402
from . import soc  # noqa: E402
from .mesh import Group, Mesh, has_whole_experts  # noqa: E402
from .model import MTP, Draft, Forward, Head, Layers, Trunk  # noqa: E402
from .ops import ascend  # noqa: E402
from .weights import RankWeights  # noqa: E402

# What a CPU has no kernel for: the fused operators, and plain ones in BF16.
FUSED = frozenset(
    (
        "RmsNorm", "AddRmsNorm", "RotaryPositionEmbedding", "ReshapeAndCache", "FlashAttentionScore", "PagedAttention",
        "FusedAddTopKDiv", "MoeInitRoutingV2", "InnerMoeTokenUnpermute", "GroupedMatmulV4", "Swiglu", "DynamicQuantExt",
        "QuantBatchMatmul", "QuantV2", "MoeDistributeDispatch", "MoeDistributeCombine",
    )
)  # fmt: skip
PLAIN = frozenset(("ExpandDims", "Gather"))
_REFUSAL = re.compile(r"Kernel select failed.*?(?:Unsupported op \[|Select CPU operator\[)(\w+)\]", re.DOTALL)
_NODE = re.compile(r"^  %\d+\(\S*\) = (?:PrimFunc_)?(\w+)\(", re.MULTILINE)
_NO_OPERATORS = frozenset(("TupleGetItem", "MakeTuple", "Load", "UpdateState", "Depend", "Return", "TensorToTuple"))

BLOCKS, BLOCK_SIZE, POSITIONS = 512, 64, 4096
PROMPTS, PROMPT_TOKENS, CONTEXT_TOKENS = 3, 384, 256
DECODING, TABLE = 32, 16
SPREAD = 5  # rows that another replica has more


@dataclass(frozen=True)
class Outcome:
    """A graph that type-checks: where kernel selection stopped, and how often each operator is in it."""

    refused: str
    operators: Counter[str]


class StaticAttention(RandomWeights):
    """Attention whose inputs are mapped to INT8 by the checkpoint, as in w8a8-ascend with calibration."""

    def static_input(self, name: str, rows: tuple[int, int] | None = None) -> tuple[float, int, None] | None:
        return (0.03, 7, None) if ".self_attn." in name else None


class Placeholders(RankWeights):
    """Parameters with shapes and without values."""

    def _parameter(self, name: str, shape: tuple[int, ...], dtype: ms.Type, fill: Callable[[], NDArray]) -> Parameter:
        with no_init_parameters():
            return Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=False)


def type_check(cell: nn.Cell, *inputs: Tensor | None) -> Outcome:
    """Compile ``cell`` for a CPU as far as that goes.

    Returns when kernel selection refused an operator that only an NPU has; any other end is raised: a shape or type
    that the front end found wrong, or a kernel that should be there.
    """
    for file in Path(_FOLDER.name).rglob("*.ir"):
        file.unlink()
    try:
        cell.compile(*inputs)
    except (RuntimeError, TypeError) as error:
        found = _REFUSAL.search(str(error))
        if not found or found[1] not in FUSED | PLAIN:
            raise
        return Outcome(found[1], _operators())
    raise RuntimeError("the graph compiled for a CPU, so it holds no fused operator")


def _operators() -> Counter[str]:
    """The operators of the graph that the front end's last pass has written down."""
    files = sorted(Path(_FOLDER.name).rglob("*validate*.ir"))
    names = _NODE.findall(files[-1].read_text(encoding="utf-8"))
    return Counter(name for name in names if name not in _NO_OPERATORS)


def graphs(
    spec: ModelSpec, grid: Grid, int8: bool, static: bool = False
) -> Iterator[tuple[str, nn.Cell, tuple[Tensor | None, ...]]]:
    """Every graph of the first rank: its name, the cell and inputs of fixed lengths."""
    check_divides(spec, grid)
    weights = StaticAttention(spec) if static else RandomWeights(spec)
    soc.infer_for(soc.ASCEND_910B)
    sends = has_whole_experts(grid) and ascend.can_dispatch(spec, grid.ep, DECODING)
    mesh = Mesh(grid, 0, tp=Group(grid.tp), dp=Group(grid.dp), ep=Group(grid.ep) if sends else None)
    source = Placeholders(spec, weights, mesh, ms.bfloat16, int8)
    layers = Layers(source, ascend, POSITIONS, BLOCKS, BLOCK_SIZE)
    head = Head(source, ascend)
    mtp = MTP(source, ascend, head, BLOCKS, BLOCK_SIZE)
    for name, prefill in (("prefill", True), ("decode", False)):
        tokens = PROMPTS * PROMPT_TOKENS if prefill else DECODING
        hidden, rows = _zeros(tokens, spec.hidden_size, dtype=ms.bfloat16), _zeros(PROMPTS)
        spread = _zeros(-(-(tokens + SPREAD) // grid.tp) * grid.tp) if grid.dp > 1 else None
        where, view = (_zeros(tokens), _zeros(tokens), spread), _view(prefill)
        yield name, Forward(Trunk(layers, prefill), head), (rows, _zeros(tokens), *where, *view)
        yield f"draft {name}", Draft(layers.turns, mtp, prefill), (hidden, _zeros(tokens), rows, *where, *view)


def _zeros(*shape: int, dtype: ms.Type = ms.int32) -> Tensor:
    return Tensor(np.zeros(shape), dtype)


def _view(prefill: bool) -> tuple[Tensor, ...]:
    if prefill:
        return _zeros(PROMPTS * (PROMPT_TOKENS + CONTEXT_TOKENS)), _zeros(PROMPTS), _zeros(PROMPTS)
    return _zeros(DECODING, TABLE), _zeros(DECODING)


def main() -> int:
    parser = argparse.ArgumentParser(description="Type-check the graphs of fused operators without an NPU.")
    parser.add_argument("--spec", default="deepseek_v3")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dense", type=int, default=1, help="layers before the first mixture of experts")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "w8a8"), default="bf16")
    parser.add_argument("--static", action="store_true", help="W8A8 whose attention has static activation scales")
    options = parser.parse_args()
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    layers = {"num_hidden_layers": options.layers, "first_k_dense_replace": options.dense}
    spec = load_spec(options.spec).replace(layers | {"num_nextn_predict_layers": 1})
    grid = Grid(tp=options.tp, ep=options.ep, dp=options.dp)
    for name, cell, inputs in graphs(spec, grid, options.dtype == "w8a8", options.static):
        outcome = type_check(cell, *inputs)
        print(
            json.dumps(
                {"graph": name, "refused": outcome.refused, "operators": dict(sorted(outcome.operators.items()))}
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

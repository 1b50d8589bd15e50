"""From parameters to the layers of the model: stacked, padded to whole scale blocks, in the run's precision.

Shape letters: N rows (out), K columns (in), D hidden, I expert width, E experts and shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....models.errors import InputError
from ....models.holding import Holding
from ....models.spec import ModelSpec
from ..kernels.kv_b import KvB
from ..layers import adjacent_pairs
from ..parallel import Mesh
from .attention import Projections
from .experts import Experts
from .formats import Format, Formats
from .linear import Beside, Form, Linear, Norm
from .matrices import Reorder, put, room_for, whole_blocks
from .source import WHOLE, DeviceTensors, Window


@dataclass(frozen=True)
class Part:
    """A matrix of a layer; ``reorder`` moves its rows, and ``columns`` is the width that its input is padded to."""

    name: str
    reorder: Reorder | None = None
    columns: int | None = None


class Loader:
    """``holding``: in which format to hold each matrix."""

    def __init__(self, spec: ModelSpec, source: DeviceTensors, holding: Holding):
        self.spec = spec
        self.source = source
        self._holding = holding
        self._formats = Formats(source.device, holding, spec.fp8 is not None and spec.fp8.scale_fmt == "ue8m0")
        grid = source.mesh.grid
        self._heads = spec.num_attention_heads // grid.tp
        self.experts_held = held_experts(spec, source.mesh)
        # choices that this rank has nothing to do with: experts elsewhere, shared ones of other replicas' tokens
        elsewhere = len(self.experts_held) < spec.n_routed_experts
        self.has_foreign = elsewhere or (grid.dp > 1 and spec.n_shared_experts > 0)
        self._expert_width = spec.moe_intermediate_size // grid.expert_slices
        self._shared_width = spec.shared_intermediate_size // grid.tp
        self._shared_pieces = -(-self._shared_width // max(1, self._expert_width)) if spec.n_shared_experts else 0

    def norm(self, name: str, eps: float, form: Form, plain: bool = False) -> Norm:
        """A norm before layers that take ``form``; ``plain`` for one whose BF16 result is wanted too."""
        return Norm(self.source.plain(name), eps, form, plain)

    def plain_norm(self, name: str) -> Norm:
        """A norm whose result is wanted in BF16 only."""
        return Norm(self.source.plain(name), self.spec.rms_norm_eps, Form(), plain=True)

    def linear(self, *parts: Part) -> Linear:
        """One layer of matrices with the same input, each padded below to whole blocks."""
        runs: list[tuple[Format, list[Any]]] = []
        for part in parts:
            format_ = self._formats.of(part.name)
            matrix = self._matrix(format_, part)
            if runs and runs[-1][0] is format_ and format_.joins(runs[-1][1][-1], matrix):
                runs[-1][1].append(matrix)
            else:
                runs.append((format_, [matrix]))
        layers = [format_.linear(format_.joined(matrices)) for format_, matrices in runs]
        return layers[0] if len(layers) == 1 else Beside(layers)

    def _matrix(self, format_: Format, part: Part) -> Any:
        rows, columns = self.source.shape(part.name)
        matrix = format_.read(self.source, part.name)
        if part.reorder is not None:
            matrix = format_.reordered(matrix, part.reorder)
        return format_.padded(matrix, whole_blocks(rows), part.columns or columns)

    def projections(self, prefix: str) -> Projections:
        spec = self.spec
        kv_a = Part(f"{prefix}.kv_a_proj_with_mqa.weight", self._pairs(spec.latent_dim))
        queries = self._pairs(spec.qk_head_dim)
        kv_b = self._kv_b(f"{prefix}.kv_b_proj.weight")
        common = (
            self.source.plain(f"{prefix}.kv_a_layernorm.weight"),
            kv_b.plain(),
            kv_b,
            self.linear(Part(f"{prefix}.o_proj.weight")),
        )
        if spec.q_lora_rank is None:
            qkv_a = self.linear(Part(f"{prefix}.q_proj.weight", queries), kv_a)
            return Projections(qkv_a, whole_blocks(self._heads * spec.qk_head_dim), None, None, *common)
        qkv_a = self.linear(Part(f"{prefix}.q_a_proj.weight"), kv_a)
        q_b = self.linear(Part(f"{prefix}.q_b_proj.weight", queries))
        q_norm = self.norm(f"{prefix}.q_a_layernorm.weight", spec.latent_norm_eps, q_b.form)
        return Projections(qkv_a, whole_blocks(spec.q_lora_rank), q_norm, q_b, *common)

    def _kv_b(self, name: str) -> KvB:
        codes = self._holding.keeps_codes(name)
        return KvB(self.source.fp8(name) if codes else self.source.plain(name), self._heads)

    def swiglu(self, prefix: str) -> tuple[Linear, Linear]:
        """[gate; up] and down of a dense layer, or of shared experts."""
        gate_up = self.linear(Part(f"{prefix}.gate_proj.weight"), Part(f"{prefix}.up_proj.weight"))
        width = whole_blocks(self.source.shape(f"{prefix}.gate_proj.weight")[0])
        return gate_up, self.linear(Part(f"{prefix}.down_proj.weight", columns=width))

    def experts(self, prefix: str) -> Experts:
        """This rank's routed experts, then its part of the shared ones, in pieces as wide as a routed one.

        Without the shared ones where they are `shared_beside`.
        """
        routed = [f"{prefix}.experts.{expert}" for expert in self.experts_held]
        format_ = self._format_of_routed(prefix)
        count = 0 if self.shared_beside(prefix) else self._shared_pieces
        pieces = [(f"{prefix}.shared_experts", *self._piece(number)) for number in range(count)]
        stacked = [(expert, WHOLE, WHOLE) for expert in routed] + pieces
        part = len(self.experts_held) / self.spec.n_routed_experts
        return format_.experts(*self._stacks(format_, stacked), count, self.has_foreign, part)

    def shared_beside(self, prefix: str) -> bool:
        """Whether shared experts are layers of their own: in another format, or of a width that pieces would pad.

        With expert parallelism a rank has whole routed experts and slices of shared ones: of V3's on eight ranks,
        pieces would hold, read and multiply by eight times as much.
        """
        if not self._shared_pieces:
            return False
        format_ = self._format_of_routed(prefix)
        formats = [self._formats.of(name) for name in _names(f"{prefix}.shared_experts")]
        return self._shared_width % self._expert_width > 0 or any(other is not format_ for other in formats)

    def _format_of_routed(self, prefix: str) -> Format:
        names = (name for expert in self.experts_held for name in _names(f"{prefix}.experts.{expert}"))
        return self._formats.of(*names)

    def _piece(self, number: int) -> tuple[Window, Window]:
        """Of the shared experts: the rows of gate and up, and the columns of down."""
        if self._shared_pieces == 1:
            return WHOLE, WHOLE
        start = number * self._expert_width
        cut = start, start + self._expert_width
        return Window(rows=cut), Window(cols=cut)

    def _stacks(self, format_: Format, experts: list[tuple[str, Window, Window]]) -> tuple[Any, Any]:
        """[gate; up], and down, of experts with these names, or of windows of them."""
        hidden, width = self.spec.hidden_size, whole_blocks(self._expert_width)
        stacks: tuple[Any, Any] | None = None
        for number, (name, rows, cols) in enumerate(experts):
            gate, up, down = (
                format_.padded(format_.read(self.source, matrix, window), *shape)
                for matrix, window, shape in zip(
                    _names(name), (rows, rows, cols), ((width, hidden), (width, hidden), (hidden, width)), strict=True
                )
            )
            if not format_.joins(gate, up):
                raise InputError(
                    "gate and up have their channels in other orders (act-order) or groups",
                    name,
                    "use a checkpoint without act-order (desc_act: false), or set dtype to bf16",
                )
            matrices = format_.joined([gate, up]), down
            stacks = stacks or (room_for(len(experts), matrices[0]), room_for(len(experts), matrices[1]))
            for stack, matrix in zip(stacks, matrices, strict=True):
                put(stack, number, matrix)
        assert stacks is not None, "a rank holds experts"
        return stacks

    def _pairs(self, block: int) -> Reorder | None:
        """For the rows of a projection whose last ones in each ``block`` are rotated."""
        if self.spec.rope_interleave:
            return None
        return lambda weight_NK: adjacent_pairs(self.spec, weight_NK, block)


def held_experts(spec: ModelSpec, mesh: Mesh) -> range:
    """The routed experts of which this rank holds all, or a slice of the width."""
    each = spec.n_routed_experts // mesh.grid.ep
    first = mesh.position.expert_group * each
    return range(first, first + each)


def _names(prefix: str) -> list[str]:
    return [f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")]

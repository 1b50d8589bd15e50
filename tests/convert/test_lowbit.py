"""Modules as outputs of a plan: in any order and in any pieces, what the whole weight gives at once."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspan.convert import plan
from deepspan.convert.calibration import InputScale
from deepspan.convert.lowbit import QuantisedModule
from deepspan.convert.schemes import SCHEMES, Scheme
from deepspan.models.dtypes import DTYPES, f32_to_bf16
from deepspan.models.errors import InputError
from deepspan.models.params import parameters
from tests.convert.encoders import SPEC

STATICS = [None, InputScale(0.0625), InputScale(0.03, -17)]


def bf16_weight(shape: tuple[int, ...]) -> np.ndarray:
    return f32_to_bf16(np.random.default_rng(3).standard_normal(shape).astype(np.float32))


def module(weight: np.ndarray, scheme: Scheme, static=None, log: list | None = None) -> QuantisedModule:
    """Of [out, in], or of a stack [experts, out, in]."""

    def read(start: int, stop: int) -> np.ndarray:
        if log is not None:
            log.append((start, stop))
        return weight[start:stop]

    shape = weight.shape if weight.ndim == 2 else (weight.shape[0], weight.shape[2], weight.shape[1])
    return QuantisedModule("m.", shape, ("m.weight",), read, scheme, static)


def in_random_order(outputs: list[plan.Output], seed: int) -> dict[str, np.ndarray]:
    made = {output.name: np.empty(output.shape, DTYPES[output.dtype].carrier) for output in outputs}
    pieces = [(output, start, stop) for output in outputs for start, stop in output.pieces()]
    random.Random(seed).shuffle(pieces)
    for output, start, stop in pieces:
        rows = output.make(start, stop)
        assert rows.dtype == DTYPES[output.dtype].carrier
        made[output.name][start:stop] = rows
    return made


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), static=st.sampled_from(STATICS), rows=st.sampled_from([1, 128, 300, 513]))
@pytest.mark.parametrize("name", SCHEMES)
def test_any_order_of_pieces(name: str, seed: int, static, rows: int) -> None:
    weight, scheme = bf16_weight((rows, 136)), SCHEMES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "PIECE_BYTES", 128 * 136)  # one unit of rows a piece
        made = in_random_order(module(weight, scheme, static).outputs(), seed)
    expected = {f"m.{part}": array for part, array in scheme.make(weight, static).items()}
    assert made.keys() == expected.keys()
    for part, array in expected.items():
        np.testing.assert_array_equal(made[part], array, err_msg=part)


@pytest.mark.parametrize("name", ["w8a8-ct", "w8a8-ascend", "w8a8-mindspore"])
def test_a_stack_is_quantised_expert_by_expert(name: str) -> None:
    stack, scheme = bf16_weight((5, 24, 40)), SCHEMES[name]
    made = in_random_order(module(stack, scheme).outputs(), 1)
    codes = next(iter(scheme.parts((24, 40), None)))
    for expert in range(5):
        expected = scheme.make(stack[expert], None)
        np.testing.assert_array_equal(made[f"m.{codes}"][expert], expected.pop(codes).T)
        for part, array in expected.items():
            np.testing.assert_array_equal(made[f"m.{part}"][expert], array)


def test_codes_first_reads_once() -> None:
    log: list[tuple[int, int]] = []
    outputs = module(bf16_weight((300, 136)), SCHEMES["w8a8-ascend"], InputScale(0.1, 3), log).outputs()
    assert [output.after for output in outputs] == [False] + [True] * 6
    for output in outputs:
        for piece in output.pieces():
            output.make(*piece)
    assert log == [(0, 300)]


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0])
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_that_are_not_finite_are_refused(name: str, bad: int) -> None:
    weight = bf16_weight((200, 136))
    weight[150, 77] = bad
    with pytest.raises(InputError, match="^weights are not finite numbers: m.weight: "):
        in_random_order(module(weight, SCHEMES[name]).outputs(), 0)


def test_what_stays_plain() -> None:
    plain = {p.name for p in parameters(SPEC) if p.quantised and not SCHEMES["w8a8-ct"].quantises(p)}
    assert plain == {f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in range(3)}
    assert {p.name for p in parameters(SPEC) if SCHEMES["fp8"].quantises(p)} == {
        p.name for p in parameters(SPEC) if p.quantised
    }
    ignore = ["model.layers.1.*", "model.layers.0.mlp.up_proj"]
    kept = [p.name for p in parameters(SPEC) if SCHEMES["fp8"].quantises(p, ignore)]
    assert kept and not any(".layers.1." in name or "0.mlp.up_proj" in name for name in kept)

"""silu(gate) * up against PyTorch's: the same to one BF16 ulp, for exponentials differ in their last bits."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels.gate import gate, gate_eager
from deepspan.models.errors import DeepspanError
from tests.kernels.test_rope_cache import frame


@pytest.mark.parametrize("tokens, channels", [(1, 40), (5, 1100)])
def test_equals_pytorchs(tokens, channels):
    gate_up = frame(tokens, 2 * channels, dtype=torch.bfloat16)
    gate_up[0, :3] = torch.tensor([-90.0, 90.0, 0.0])
    got = gate(gate_up)
    assert got.dtype == torch.bfloat16 and got.is_contiguous()
    torch.testing.assert_close(got, gate_eager(gate_up), rtol=2**-7, atol=1e-30)


def test_rows_from_a_number_on_are_not_read():
    gate_up = frame(6, 80, dtype=torch.bfloat16)
    gate_up[4:] = torch.nan
    got = gate(gate_up, torch.tensor([4], dtype=torch.int32))
    assert torch.equal(got[:4], gate(gate_up[:4]))


def test_what_it_cannot_take_is_one_clear_error():
    with pytest.raises(DeepspanError, match="gate and up in torch.float32: kernel gate"):
        gate(torch.zeros(2, 8))

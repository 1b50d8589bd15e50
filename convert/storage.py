"""How each parameter is stored: found, parameter by parameter, from the tensors that are really there.

Quantised checkpoints keep some modules plain, and copies that were converted keep stale settings in config.json, so
only tensor names, dtypes and exact shapes decide. Layouts: docstring of `models.quant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.errors import InputError
from ..models.params import Param
from ..models.quant import block_grid
from .quant_config import QuantConfig
from .safetensors import TensorInfo

PLAIN = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
FP8_FORMATS = {"F8_E4M3": "fp8_block", "F8_E4M3FNUZ": "fp8_block_fnuz"}
_SCALE = ("F32", "BF16", "F16")
_ONE = (1,), ()
BLOCK_SCALES = ("weight_scale_inv", "scale", "weight_scale")  # DeepSeek V3's name, V4's and compressed-tensors'
_WORDS = ("I32",)
_MAINS = ("weight", "qweight", "weight_packed")


@dataclass(frozen=True)
class Stored:
    """One stored parameter.

    ``format`` is bf16, f16, f32, fp8_block, fp8_block_fnuz, int8_block, int8_channel, ascend_static, gptq, awq or
    ct_int4. ``tensors`` maps parts ("weight", "weight_scale_inv", "qweight", …) to tensors of the checkpoint;
    ``block`` belongs to the block formats, ``group_size`` (input channels a scale) and ``zeros_minus_one`` to the INT4
    formats.
    """

    param: Param
    format: str
    tensors: Mapping[str, TensorInfo]
    block: tuple[int, int] | None = None
    group_size: int | None = None
    zeros_minus_one: bool = False


def find_storage(param: Param, tensors: Mapping[str, TensorInfo], config: QuantConfig) -> Stored | None:
    """How ``param`` is stored, or None when no tensor holds it. Raises InputError for what is there and wrong."""
    if len(param.shape) != 2 or not param.name.endswith(".weight"):
        info = tensors.get(param.name)
        return None if info is None else _plain(param, info)
    module = _Module(param, tensors)
    mains = [main for main in _MAINS if main in module]
    if not mains:
        return None
    if len(mains) > 1:
        names = " and ".join(f"{module.prefix}{main}" for main in mains)
        raise InputError(f"stored twice: {names}", str(module[mains[0]].path), "remove one of them")
    if mains == ["qweight"]:
        return _qweight(module, config)
    if mains == ["weight_packed"]:
        return _packed(module, config)
    return _weight(module, config)


class _Module:
    """The tensors of one linear module, by the last part of their names."""

    def __init__(self, param: Param, tensors: Mapping[str, TensorInfo]):
        self.param = param
        self.prefix = param.name.removesuffix("weight")
        self._tensors = tensors

    def __contains__(self, part: str) -> bool:
        return self.prefix + part in self._tensors

    def __getitem__(self, part: str) -> TensorInfo:
        return self._tensors[self.prefix + part]

    def take(self, part: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...], because: str = "") -> TensorInfo:
        """The tensor, checked: it must be there, of one of ``dtypes`` and of one of ``shapes``."""
        if part not in self:
            beside = next(self[main] for main in _MAINS if main in self)
            what = f"{beside.name} is {beside.dtype} and has no {self.prefix}{part}"
            raise InputError(what, str(beside.path), "get the complete checkpoint: the weights mean nothing without it")
        _check(self[part], dtypes, shapes, because)
        return self[part]


def _check(info: TensorInfo, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], because: str) -> None:
    todo = "get the checkpoint that belongs to this config.json"
    if info.dtype not in dtypes:
        raise InputError(f"{info.name} is {info.dtype}, not {' or '.join(dtypes)}", str(info.path), todo)
    if info.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{info.name} is {list(info.shape)}, not {wanted}{because}", str(info.path), todo)


def _plain(param: Param, info: TensorInfo) -> Stored:
    _check(info, tuple(PLAIN), (param.shape,), "")
    return Stored(param, PLAIN[info.dtype], {"weight": info})


def _weight(module: _Module, config: QuantConfig) -> Stored:
    """A tensor named weight: plain, FP8 or INT8 by its dtype."""
    param, weight = module.param, module["weight"]
    if weight.dtype not in ("I8", *FP8_FORMATS):
        return _plain(param, weight)
    _check(weight, (weight.dtype,), (param.shape,), "")
    if weight.dtype in FP8_FORMATS:
        return _blocks(module, FP8_FORMATS[weight.dtype], config)
    if "weight_scale_inv" in module:
        return _blocks(module, "int8_block", config)
    return _channels(module)


def _channels(module: _Module) -> Stored:
    """INT8 with a scale for each row, and the scales of its activations where these are static."""
    rows = module.param.shape[0]
    column = (rows, 1), (rows,)
    tensors = {"weight": module["weight"]}
    if "weight_scale" in module or "deq_scale" not in module:
        tensors["weight_scale"] = module.take("weight_scale", _SCALE, *column)
    else:  # Ascend's static form in files that keep only its product with the activation's scale
        module.take("input_scale", _SCALE, *_ONE)
    optional = {
        "weight_offset": (_SCALE, column),
        "input_scale": (_SCALE, _ONE),
        "input_offset": ((*_SCALE, "I8"), _ONE),
        "input_zero_point": (("I8",), _ONE),
        "deq_scale": (("F32", "I64"), column),
        "quant_bias": (("I32",), column),
    }
    for part, (dtypes, shapes) in optional.items():
        if part in module:
            tensors[part] = module.take(part, dtypes, *shapes)
    return Stored(module.param, "int8_channel" if "weight_scale" in tensors else "ascend_static", tensors)


def _blocks(module: _Module, name: str, config: QuantConfig) -> Stored:
    part = next((part for part in BLOCK_SCALES if part in module), BLOCK_SCALES[0])
    block = config.block
    because = f", which blocks of {block[0]} x {block[1]} ({config.where}: weight_block_size) need"
    scale = module.take(part, (*_SCALE, "F8_E8M0"), block_grid(module.param.shape, block), because=because)
    return Stored(module.param, name, {"weight": module["weight"], "weight_scale_inv": scale}, block=block)


def _qweight(module: _Module, config: QuantConfig) -> Stored:
    """GPTQ or AWQ: both pack eight values of a word and keep scales by group of input channels."""
    rows, channels = module.param.shape
    if rows % 8 or channels % 8:
        where = str(module["qweight"].path)
        raise InputError(f"{module.param.name} is [{rows}, {channels}]", where, "INT4 needs multiples of eight")
    layout = config.int4_layout("g_idx" in module)
    size = config.group_size(channels)
    count = -(-channels // size)
    because = f", which group_size {size} ({config.where}) needs"
    packed = (channels // 8, rows) if layout == "gptq" else (channels, rows // 8)
    tensors = {
        "qweight": module.take("qweight", _WORDS, packed, because=f", which {layout} ({config.where}) needs"),
        "qzeros": module.take("qzeros", _WORDS, (count, rows // 8), because=because),
        "scales": module.take("scales", _SCALE, (count, rows), because=because),
    }
    if "g_idx" in module:
        tensors["g_idx"] = module.take("g_idx", _WORDS, (channels,))
    minus_one = layout == "gptq" and config.zeros_minus_one
    return Stored(module.param, layout, tensors, group_size=size, zeros_minus_one=minus_one)


def _packed(module: _Module, config: QuantConfig) -> Stored:
    """compressed-tensors' pack-quantized."""
    rows, channels = module.param.shape
    has_zeros = "weight_zero_point" in module
    size = config.packed_group(channels, has_zeros)
    count = -(-channels // size)
    because = f", which group_size {size} ({config.where}) needs"
    tensors = {
        "weight_packed": module.take("weight_packed", _WORDS, (rows, -(-channels // 8))),
        "weight_scale": module.take("weight_scale", _SCALE, (rows, count), because=because),
        "weight_shape": module.take("weight_shape", ("I32", "I64"), (2,)),
    }
    if has_zeros:
        shape = (-(-rows // 8), count)
        tensors["weight_zero_point"] = module.take("weight_zero_point", _WORDS, shape, because=because)
    if "weight_g_idx" in module:
        tensors["weight_g_idx"] = module.take("weight_g_idx", _WORDS, (channels,))
    return Stored(module.param, "ct_int4", tensors, group_size=size)

"""Which layout a checkpoint is in, and what it ought to hold, from the names of its files and tensors alone."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..params import parameters
from ..spec import ModelSpec
from .deepseek_demo import demo_tensor
from .mindspore import InferOptions, inference_targets, training_targets

LAYOUTS = ("huggingface", "deepseek_demo", "mindspore_infer", "mindspore_train", "mindspore_train_grouped")
_DEMO_FILE = re.compile(r"model\d+-mp(\d+)\.safetensors")


def recognise(files: Collection[str], names: Collection[str]) -> str | None:
    """One of ``LAYOUTS``, or None."""
    if any(_DEMO_FILE.fullmatch(file) for file in files):
        return "deepseek_demo"
    if _any_contains(names, ".self_attn."):
        return "huggingface"
    if _any_contains(names, ".attention.kv2l_latent_kv."):
        return "mindspore_train_grouped" if _any_ends(names, ".routed_experts.ffn.w1") else "mindspore_train"
    return "mindspore_infer" if _any_contains(names, ".attention.lkv2kv_k_nope.") else None


def expected_names(layout: str, spec: ModelSpec, files: Collection[str], names: Collection[str]) -> set[str]:
    """The tensors that a complete checkpoint has in ``layout``, which is not huggingface, whose names hold formats.

    Multipliers of quantised weights are left out. MTP layers count when any of their tensors is among ``names``.
    """
    main, everything = (_names(layout, spec, mtp, files, names) for mtp in (False, True))
    return main if (everything - main).isdisjoint(names) else everything


def _names(layout: str, spec: ModelSpec, mtp: bool, files: Collection[str], names: Collection[str]) -> set[str]:
    if layout == "deepseek_demo":
        ranks = next(int(found[1]) for file in files if (found := _DEMO_FILE.fullmatch(file)))
        return {demo_tensor(spec, param.name, ranks).name for param in parameters(spec, mtp)}
    if layout == "mindspore_infer":
        options = InferOptions(
            qkv_concat=_any_contains(names, ".attention.qkv2l."),
            ffn_concat=_any_contains(names, ".w_gate_hidden."),
            mtp_names=any(name.startswith("mtp_model.") for name in names),
        )
        return {target.name for target in inference_targets(spec, mtp, options)}
    return {target.name for target in training_targets(spec, mtp, grouped=layout == "mindspore_train_grouped")}


def _any_contains(names: Collection[str], part: str) -> bool:
    return any(part in name for name in names)


def _any_ends(names: Collection[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)

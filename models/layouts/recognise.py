"""Which layout a checkpoint is in, and what it ought to hold, from the names of its files and tensors alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from ..params import parameters
from ..spec import ModelSpec
from .deepseek_demo import demo_tensor
from .mindspore import InferOptions, inference_targets, training_targets
from .placement import TargetTensor

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


def expected_names(
    layout: str, spec: ModelSpec, files: Collection[str], names: Collection[str]
) -> tuple[set[str], bool]:
    """The tensors that a complete checkpoint has in ``layout``, and whether its MTP layers are among them.

    They are when ``names`` has any of theirs. Multipliers of quantised weights are left out. Not for huggingface, where
    names depend on the stored format: there `convert.inventory` tells.
    """
    main, everything = (_names(layout, spec, mtp, files, names) for mtp in (False, True))
    has_mtp = not (everything - main).isdisjoint(names)
    return (everything if has_mtp else main), has_mtp


def _names(layout: str, spec: ModelSpec, mtp: bool, files: Collection[str], names: Collection[str]) -> set[str]:
    if layout == "deepseek_demo":
        ranks = next(int(found[1]) for file in files if (found := _DEMO_FILE.fullmatch(file)))
        return {demo_tensor(spec, param.name, ranks).name for param in parameters(spec, mtp)}
    return {target.name for target in mindspore_targets(layout, spec, mtp, names)}


def mindspore_targets(layout: str, spec: ModelSpec, mtp: bool, names: Collection[str]) -> Iterator[TargetTensor]:
    """The map of a MindSpore layout, in the variant that the tensors' ``names`` show."""
    if layout == "mindspore_infer":
        options = InferOptions(
            qkv_concat=_any_contains(names, ".attention.qkv2l."),
            ffn_concat=_any_contains(names, ".w_gate_hidden."),
            mtp_names=any(name.startswith("mtp_model.") for name in names),
        )
        return inference_targets(spec, mtp, options)
    return training_targets(spec, mtp, grouped=layout == "mindspore_train_grouped")


def _any_contains(names: Collection[str], part: str) -> bool:
    return any(part in name for name in names)


def _any_ends(names: Collection[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)

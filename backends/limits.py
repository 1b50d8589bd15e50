"""What a run may ask of any backend, checked before anything is allocated."""

from __future__ import annotations

from ..configs.schema import RunConfig
from ..models.errors import InputError
from ..models.spec import ModelSpec


def check_supported(spec: ModelSpec, run: RunConfig) -> None:
    """Refuse model and engine settings that no backend realises yet."""
    if spec.index_topk:
        raise InputError("sparse attention (index_topk) is not supported yet", spec.family, "use a V3-family model")
    if spec.num_nextn_predict_layers > 1:
        raise InputError(
            f"num_nextn_predict_layers is {spec.num_nextn_predict_layers}", spec.family, "one MTP layer is supported"
        )
    if run.engine.max_seq_len > spec.max_position_embeddings:
        raise InputError(
            f"max_seq_len {run.engine.max_seq_len} is longer than the model's {spec.max_position_embeddings} positions",
            "engine.max_seq_len",
            f"give at most {spec.max_position_embeddings}",
        )


def cache_blocks(run: RunConfig, replicas: int = 1) -> int:
    """Cache blocks that hold a replica's part of max_batch sequences of max_seq_len tokens."""
    return -(-run.engine.max_batch // replicas) * -(-run.engine.max_seq_len // run.engine.block_size)

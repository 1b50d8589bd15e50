"""Ascend NPUs through torch-npu: fused operators behind a small interface, each with a twin of plain ones."""

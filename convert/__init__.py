"""Checkpoints on disk: strict reading, planning, conversion and verification; no framework needed."""

if not __name__.startswith("deepspan."):
    raise ImportError("import deepspan.convert, not convert: the folder is installed under the deepspan namespace")

"""Realisations of the model: a protocol (base) and one folder per framework."""

if not __name__.startswith("deepspan."):
    raise ImportError("import deepspan.backends, not backends: the folder is installed under the deepspan namespace")

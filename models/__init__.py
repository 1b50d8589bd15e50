"""What a DeepSeek-V3-family model is: spec, parameter table, rope, routing, formats, numpy reference."""

if not __name__.startswith("deepspan."):
    raise ImportError("import deepspan.models, not models: the folder is installed under the deepspan namespace")

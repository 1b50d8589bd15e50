"""Run configuration schema and the shipped YAML files."""

if not __name__.startswith("deepspan."):
    raise ImportError("import deepspan.configs, not configs: the folder is installed under the deepspan namespace")

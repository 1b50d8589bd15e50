"""Everything above the seam that turns requests into steps: prompts, scheduling, stop conditions."""

if not __name__.startswith("deepspan."):
    raise ImportError("import deepspan.serving, not serving: the folder is installed under the deepspan namespace")

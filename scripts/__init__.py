"""The deepspan command and the commands that users of the original projects already type."""

if not __name__.startswith("deepspan."):
    raise ImportError("import deepspan.scripts, not scripts: the folder is installed under the deepspan namespace")

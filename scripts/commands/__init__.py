"""The commands of ``deepspan``: each module has ``add_arguments(parser)`` and ``run(options) -> exit code``."""

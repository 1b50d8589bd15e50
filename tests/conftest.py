"""Triton decides when it is imported, and when a kernel is decorated, whether kernels run in its interpreter.

So the choice is made before any test imports it. Tests that compile kernels do so in a process without the variable.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

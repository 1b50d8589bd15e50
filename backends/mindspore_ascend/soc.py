"""Which chip MindSpore infers shapes for: those of expert parallelism's operators differ between them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import mindspore as ms
from mindspore._c_expression import MSContext

ASCEND_910B = "ascend910b"  # Atlas 800T A2


def current() -> str:
    """MindSpore's name of the NPU; empty without one."""
    name: str = MSContext.get_instance().get_ascend_soc_version()
    return name


def infer_for(name: str) -> None:
    """Have shapes inferred as for chip ``name`` on a machine without an NPU.

    MindSpore sets it when it loads CANN and offers no other way from Python, so the library's own setter is called with
    its one context (the first word of a shared pointer) and a string of the C++ ABI that the wheels are built with.
    """
    core = ctypes.CDLL(str(Path(ms.__file__).parent / "lib" / "libmindspore_core.so"))
    context = ctypes.c_void_p.in_dll(core, "_ZN9mindspore9MsContext13inst_context_E")
    text, allocator = ctypes.c_void_p(), ctypes.c_char()
    ctypes.CDLL("libstdc++.so.6")._ZNSsC1EPKcRKSaIcE(ctypes.byref(text), name.encode(), ctypes.byref(allocator))
    core._ZN9mindspore9MsContext22set_ascend_soc_versionERKSs(context, ctypes.byref(text))
    assert current() == name

"""Programmatic dependent launch: a kernel starts while the one ahead of it drains, and waits only for its results.

Every kernel of a chain waits before it first reads or writes what another kernel touches; weights may be read earlier.
Source: PTX ISA, griddepcontrol. ``PDL`` is false where the chip lacks it.
"""

import triton
import triton.language as tl


@triton.jit
def wait(PDL: tl.constexpr):
    """Block until all kernels ahead have ended and their writes are visible."""
    if PDL:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel's programs start as this one's leave room."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )

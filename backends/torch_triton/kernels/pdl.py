"""Programmatic dependent launch: a kernel starts while the one ahead of it drains, and waits only for its results.

Every kernel of a chain waits before it first reads or writes what another kernel touches; weights may be read earlier.
So may what was written before the kernel ahead: programs of that release only after their own wait, so even an early
start comes after the end of everything before it. A kernel of a library starts after the end of what is ahead of it,
and the next one after its end.
Source: PTX ISA, griddepcontrol and prefetch. ``PDL`` is false where the chip lacks it.
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


@triton.jit
def prefetch(line_ptrs, mask):
    """Bring lines of 128 bytes to the L2 cache, before waiting too: all processors read and write through it, so that
    what the kernel ahead still writes there is not missed."""
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.ne.u32 wanted, $2, 0; @wanted prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [line_ptrs.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip

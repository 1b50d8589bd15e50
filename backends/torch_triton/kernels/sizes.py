"""Whole numbers for launchers. Triton's own, made for kernels, cost the host several microseconds a call."""


def cdiv(number: int, by: int) -> int:
    """number / by, rounded up."""
    return -(-number // by)


def power_of_2(number: int) -> int:
    """The least power of two that is not below ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()

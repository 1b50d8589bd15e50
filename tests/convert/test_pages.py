"""Memory that threads use again: never while any array is in it."""

import threading

import numpy as np
import pytest

from deepspan.convert import pages
from deepspan.convert.pages import PAGE, empty_pages

LARGE = 3 << 20


@pytest.fixture(autouse=True)
def nothing_spare():
    pages._spare.blocks.clear()


@pytest.mark.parametrize("shape", [(0,), (3, 5), (1 << 20, 2), (LARGE,)])
def test_empty_pages(shape):
    array = empty_pages(shape, np.uint16)
    assert array.shape == shape and array.dtype == np.uint16 and array.flags.c_contiguous
    assert array.ctypes.data % PAGE == 0 or not array.size


def test_memory_is_used_again():
    first = empty_pages((LARGE,), np.uint8)
    place = first.ctypes.data
    del first
    assert empty_pages((LARGE - 5,), np.int8).ctypes.data == place


def test_memory_is_not_used_again_while_a_view_is_left():
    first = empty_pages((LARGE,), np.uint8)
    view = first[LARGE // 2 :].view(np.uint16).reshape(2, -1).T
    view[...] = 7
    del first
    others = [empty_pages((LARGE,), np.uint8) for _ in range(3)]
    for other in others:
        other[:] = 1
    assert (view == 7).all()
    assert not any(np.shares_memory(a, b) for a in others for b in others if a is not b)


def test_threads_have_their_own():
    first = empty_pages((LARGE,), np.uint8)
    place, places = first.ctypes.data, []
    del first
    thread = threading.Thread(target=lambda: places.append(empty_pages((LARGE,), np.uint8).ctypes.data))
    thread.start()
    thread.join()
    assert places and places != [place]

"""Progress goes to standard error: redrawn on a terminal, plain and sparse elsewhere, silent when work is short."""

import io
import sys

import pytest

from deepspan.scripts import progress
from deepspan.scripts.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, moved by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def screen(monkeypatch):
    def make(is_terminal):
        stream = io.StringIO()
        stream.isatty = lambda: is_terminal
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return make


def test_a_log_gets_a_line_now_and_then(clock, screen):
    stream = screen(False)
    with Progress("loading", 200) as bar:
        for done in range(1, 101):
            clock[0] += 0.25
            bar.show(done)
    assert stream.getvalue() == "loading: 40 of 200 (20%)\nloading: 80 of 200 (40%)\n"


def test_a_terminal_gets_one_line_that_is_gone_at_the_end(clock, screen):
    stream = screen(True)
    with Progress("loading", 4) as bar:
        for done in (1, 2, 3):
            clock[0] += 0.2
            bar.show(done)
            bar.show(done)
    shown = stream.getvalue()
    assert shown.count("loading [") == 3 and "2/4" in shown
    assert "\n" not in shown
    assert shown.endswith("\r\033[K")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_short_work_leaves_nothing(clock, screen, is_terminal):
    stream = screen(is_terminal)
    with Progress("loading", 2) as bar:
        bar.show(1)
        bar.show(2)
    assert stream.getvalue() == ""


def test_an_error_finds_a_clean_line(clock, screen):
    stream = screen(True)
    with pytest.raises(RuntimeError), Progress("loading", 2) as bar:
        clock[0] += 1
        bar.show(1)
        raise RuntimeError
    assert stream.getvalue().endswith("\r\033[K")

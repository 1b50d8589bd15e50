"""What processes of a machine tell each other goes through sockets; that they do is tested with torchrun."""

from multiprocessing import Pipe, process

import numpy as np
import pytest

from deepspan.backends.torch_triton import control
from deepspan.models.errors import DeepspanError


@pytest.fixture
def ends(monkeypatch):
    """Of the first process and of another one, with room for messages of 8 bytes."""
    monkeypatch.setattr(control.dist, "get_rank", lambda: 3)
    near, far = Pipe()
    return control.Control(None, others=[near]), control.Control(None, source=far)


def test_content_arrives_where_there_is_room_for_it(ends):
    first, other = ends
    for number in range(3):
        sent, room = np.arange(8, dtype=np.uint8) + number, np.zeros(8, np.uint8)
        first.broadcast(sent)
        other.broadcast(room)
        np.testing.assert_array_equal(room, sent)


def test_a_process_that_has_ended_is_named_by_the_others(ends):
    first, other = ends
    first.others[0].close()
    with pytest.raises(DeepspanError, match="another process of this machine has ended: rank 3: see its messages"):
        other.broadcast(np.zeros(8, np.uint8))


def test_the_first_process_notices_one_that_has_ended(ends):
    first, other = ends
    other.source.close()
    with pytest.raises(DeepspanError, match="another process of this machine has ended"):
        first.broadcast(np.zeros(8, np.uint8))


def test_a_folder_that_no_socket_fits_in_is_one_clear_error(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setitem(process.current_process()._config, "tempdir", None)
    with pytest.raises(
        DeepspanError, match=r"no socket for this machine's processes: AF_UNIX path too long: .*xxx: set TMPDIR"
    ):
        control._listener(1)

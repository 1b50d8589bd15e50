"""The executor: the same bytes however it runs, and nothing unfinished under a final name whatever happens."""

import errno
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from deepspan.convert import destination, executor, writer
from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.checksums import combined_crc32
from deepspan.convert.journal import JOURNAL_FILE, Journal
from deepspan.convert.kinds import KINDS
from deepspan.convert.kinds.options import Options
from deepspan.convert.manifest import MANIFEST_FILE
from deepspan.models.errors import DeepspanError, InputError
from tests.convert.checkpoints import DEMO, assert_same_tensors, convert, files, run, stored

# Slows every write down, so that a kill lands in the middle.
SLOW = """
import sys, time
from pathlib import Path
from deepspan.convert.executor import run_plan
from deepspan.convert.kinds import KINDS
from deepspan.convert.kinds.options import Options
from deepspan.convert.output_file import OutputFile
fast = OutputFile.write
def slow(*arguments):
    time.sleep(0.02)
    fast(*arguments)
OutputFile.write = slow
plan = KINDS["hf-to-mindspore"].plan(Path(sys.argv[1]), Options())
print("started", flush=True)
run_plan(plan, Path(sys.argv[2]), workers=2)
"""


@pytest.fixture
def demo(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "demo"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """What the conversion of `SLOW` gives."""
    return files(convert("hf-to-mindspore", DEMO, tmp_path_factory.mktemp("expected") / "out", workers=1))


def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr("deepspan.convert.plan.PIECE_BYTES", 3000)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_bytes_do_not_depend_on_workers_or_pieces(tmp_path, monkeypatch, expected, workers):
    small_pieces(monkeypatch)
    assert files(convert("hf-to-mindspore", DEMO, tmp_path / "out", workers=workers)) == expected


def test_checksums_are_those_of_the_bytes(tmp_path, monkeypatch):
    small_pieces(monkeypatch)
    out = convert("fp8-to-bf16", DEMO, tmp_path / "out")
    recorded = json.loads((out / MANIFEST_FILE).read_text())["files"]
    for name, entry in recorded.items():
        raw = (out / name).read_bytes()
        assert entry["bytes"] == len(raw)
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__")
        crcs = {
            key: f"{zlib.crc32(raw[start + value['data_offsets'][0] : start + value['data_offsets'][1]]):08x}"
            for key, value in header.items()
        }
        assert crcs == entry["crc32"]


def test_checksum_of_parts():
    raw = np.random.default_rng(0).bytes(10_001)
    cuts = [0, 1, 1, 77, 4096, 9000, 10_001]
    parts = [(zlib.crc32(raw[a:b]), b - a) for a, b in itertools.pairwise(cuts)]
    assert combined_crc32(parts) == zlib.crc32(raw)
    assert combined_crc32([]) == zlib.crc32(b"")


def test_a_kill_at_any_point_loses_only_unfinished_files(tmp_path, expected):
    rng = np.random.default_rng()
    out = tmp_path / "out"
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", SLOW, DEMO, out], stdout=subprocess.PIPE, cwd=tmp_path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.02, 0.35))
        process.kill()
        assert process.wait() == -9
        process.stdout.close()
        published = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
        for name in published:
            assert (out / name).read_bytes() == expected[name], "a final name means a whole file"
    journaled = {json.loads(line)["file"]: 0 for line in (out / JOURNAL_FILE).read_bytes().split(b"\n")[1:] if line}
    result = run("hf-to-mindspore", DEMO, out)
    assert {path.name for path in out.iterdir()} == expected.keys(), "no partial files, no journal"
    assert files(out) == expected
    assert result.kept_bytes == sum(len(expected[name]) for name in journaled)
    for name in journaled:
        assert (out / name).stat().st_ino == published[name], "finished files are not made again"


def interrupted(monkeypatch, source: Path, out: Path, after: int = 40, header: bool = False) -> None:
    """Run a conversion that fails after some writes of tensors, or of headers (which are written last, at 0)."""
    write, count = os.pwrite, itertools.count()

    def failing(descriptor, data, offset):
        if (offset == 0) == header and next(count) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch, pytest.raises(DeepspanError, match="No space left") as caught:
        patch.setattr(os, "pwrite", failing)
        convert("hf-to-mindspore", source, out, workers=2)
    assert caught.value.exit_code == 1
    assert ("the header" if header else "tensor model.") in caught.value.what
    assert caught.value.where.startswith(str(out))


@pytest.mark.parametrize(("after", "header"), [(40, False), (4, True)])
def test_a_full_disk_publishes_nothing_unfinished(tmp_path, monkeypatch, expected, after, header):
    out = tmp_path / "out"
    interrupted(monkeypatch, DEMO, out, after, header)
    left = {path.name for path in out.iterdir()}
    assert MANIFEST_FILE not in left and "param_name_map.json" not in left
    assert not any(".partial." in name for name in left - {JOURNAL_FILE})
    assert all(files(out)[name] == expected[name] for name in left - {JOURNAL_FILE})
    assert run("hf-to-mindspore", DEMO, out).kept_bytes > 0
    assert files(out) == expected


def test_no_space_for_a_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DeepspanError, match="writing its space failed .No space left"):
        convert("fp8-to-bf16", DEMO, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {JOURNAL_FILE}


def test_short_writes_are_continued(tmp_path, monkeypatch, expected):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:1000], offset))
    assert files(convert("hf-to-mindspore", DEMO, tmp_path / "out")) == expected


def test_an_unreadable_source_ends_the_run(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    plan = KINDS["fp8-to-bf16"].plan(DEMO, Options())
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(InputError, match="reading failed at byte .*Input/output error"):
        executor.run_plan(plan, tmp_path / "out", workers=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {JOURNAL_FILE}


def test_a_worker_that_dies_surfaces(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "crc32", lambda data: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        convert("fp8-to-bf16", DEMO, tmp_path / "out")


def test_a_report_that_fails_stops_the_workers(tmp_path):
    plan = KINDS["fp8-to-bf16"].plan(DEMO, Options())

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.run_plan(plan, tmp_path / "out", report=interrupt)
    assert not list((tmp_path / "out").glob("*.partial.*.safetensors"))


def test_room_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)

    def with_room(**changes):
        fields = {key: getattr(real, key) for key in ("f_bavail", "f_frsize", "f_files", "f_favail")}
        return lambda _: type("statvfs", (), fields | changes)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", with_room(f_bavail=2000, f_frsize=4096))
        with pytest.raises(InputError, match="needs 0.08 GB and 0.01 GB are free"):
            convert("fp8-to-bf16", DEMO, tmp_path / "a" / "b")
        patch.setattr(os, "statvfs", with_room(f_favail=5))
        with pytest.raises(InputError, match="needs 24 files and 5 inodes are free"):
            convert("fp8-to-bf16", DEMO, tmp_path / "a" / "b")
        assert not (tmp_path / "a").exists()
        patch.setattr(os, "statvfs", with_room(f_files=0, f_favail=0))  # btrfs has no such limit
        convert("fp8-to-bf16", DEMO, tmp_path / "a" / "b")


def test_a_source_that_changes_between_runs(tmp_path, monkeypatch, demo):
    out = tmp_path / "out"
    interrupted(monkeypatch, demo, out)
    shard = demo / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes())  # the same bytes at another time cannot be told from others
    with pytest.raises(InputError, match="another conversion: the source's model-00002-of-00003.safetensors"):
        convert("hf-to-mindspore", demo, out)


def test_options_that_change_between_runs(tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, DEMO, out)
    with pytest.raises(InputError, match="another conversion: with another qkv_concat"):
        convert("hf-to-mindspore", DEMO, out, qkv_concat=True)
    with pytest.raises(InputError, match="another conversion: as 'hf-to-mindspore'"):
        convert("fp8-to-bf16", DEMO, out)


def test_a_source_that_changes_while_it_is_read(tmp_path, demo):
    plan = KINDS["fp8-to-bf16"].plan(demo, Options())
    touched = []

    def touch(_):
        if not touched:
            touched.append(os.utime(demo / "model-00001-of-00003.safetensors"))

    with pytest.raises(InputError, match="the source changed while it was read: model-00001"):
        executor.run_plan(plan, tmp_path / "out", workers=1, report=touch)
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def identities(directory: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_a_complete_directory_is_left_alone(tmp_path):
    out = convert("fp8-to-bf16", DEMO, tmp_path / "out")
    before = identities(out)
    assert run("fp8-to-bf16", DEMO, out).written_bytes == 0
    assert identities(out) == before
    with pytest.raises(InputError, match="holds another conversion: with another drop_mtp"):
        convert("fp8-to-bf16", DEMO, out, drop_mtp=True)
    (out / "model-00001-of-00003.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="completely and has changed since: model-00001"):
        convert("fp8-to-bf16", DEMO, out)


def test_a_directory_that_was_finished_but_for_its_journal(tmp_path):
    out = convert("fp8-to-bf16", DEMO, tmp_path / "out")
    expected = files(out)
    (out / JOURNAL_FILE).write_text("")
    assert run("fp8-to-bf16", DEMO, out).written_bytes == 0
    assert files(out) == expected


def test_nothing_is_overwritten_unasked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match="files are there already: config.json"):
        convert("fp8-to-bf16", DEMO, out)
    assert files(out) == {"notes.md": b"mine", "config.json": b"{}"}
    overwrite(out)
    assert files(out) == {**files(convert("fp8-to-bf16", DEMO, tmp_path / "clean")), "notes.md": b"mine"}


def overwrite(out: Path, **options: object) -> None:
    plan = KINDS["fp8-to-bf16"].plan(DEMO, Options(**options))
    executor.run_plan(plan, out, overwrite=True)


def test_overwriting_replaces_an_earlier_conversion_and_nothing_else(tmp_path):
    out = convert("fp8-to-bf16", DEMO, tmp_path / "out", shard_bytes=2_000_000)
    overwrite(out)
    assert files(out) == files(convert("fp8-to-bf16", DEMO, tmp_path / "clean"))
    (out / "other.safetensors").write_bytes(b"theirs")
    with pytest.raises(InputError, match="files of another checkpoint: other.safetensors"):
        overwrite(out)
    assert (out / "other.safetensors").read_bytes() == b"theirs"


def test_an_unfinished_conversion_is_resumed_only_if_wanted(tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, DEMO, out)
    plan = KINDS["hf-to-mindspore"].plan(DEMO, Options())
    with pytest.raises(InputError, match="an unfinished conversion is there"):
        executor.run_plan(plan, out, resume=False)


def test_source_and_destination_must_differ(tmp_path, demo):
    (tmp_path / "link").symlink_to(demo)
    for path in (demo, tmp_path / "link", demo / ".." / "demo"):
        with pytest.raises(InputError, match="source and destination are the same"):
            convert("fp8-to-bf16", demo, path)
    with pytest.raises(InputError, match="not a directory"):
        convert("fp8-to-bf16", demo, demo / "config.json")


def test_a_second_writer_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = Journal(out)
    with pytest.raises(InputError, match="another conversion is writing here"):
        convert("fp8-to-bf16", DEMO, out)
    first.close()
    convert("fp8-to-bf16", DEMO, out)


def test_a_journal_line_that_was_cut_off(tmp_path, monkeypatch, expected):
    out = tmp_path / "out"
    interrupted(monkeypatch, DEMO, out)
    journal = out / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-20])
    convert("hf-to-mindspore", DEMO, out)
    assert files(out) == expected
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / JOURNAL_FILE).write_text("no json\n")
    with pytest.raises(InputError, match="not a journal of a conversion"):
        convert("fp8-to-bf16", DEMO, tmp_path / "other")


def test_a_damaged_finished_file_is_made_again(tmp_path, monkeypatch, expected):
    out = tmp_path / "out"
    interrupted(monkeypatch, DEMO, out)
    (done, *_) = sorted(out.glob("*.safetensors"))
    done.write_bytes(bytes(8) + done.read_bytes()[8:])
    convert("hf-to-mindspore", DEMO, out)
    assert files(out) == expected


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00003.safetensors.partial.0123456789ab").write_bytes(b"half")
    (out / "mine.partial.txt").write_bytes(b"mine")
    convert("fp8-to-bf16", DEMO, out)
    assert (out / "mine.partial.txt").exists()
    assert not (out / "model-00001-of-00003.safetensors.partial.0123456789ab").exists()


def test_an_unfinished_directory_is_no_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, DEMO, out)
    with pytest.raises(InputError, match="unfinished files: conversion.partial.jsonl"):
        Checkpoint.open(out)


def test_file_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        out = convert("fp8-to-bf16", DEMO, tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}


def test_the_header_comes_last(tmp_path, monkeypatch):
    """Until it does, the file starts with a length of zero, which no reader takes."""
    starts = []

    def look(file, data, offset, write=os.pwrite):
        starts.append((offset, os.pread(file, 8, 0)))
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", look)
    convert("fp8-to-bf16", DEMO, tmp_path / "out", workers=1)
    assert sum(offset == 0 for offset, _ in starts) == 3  # a header for each of the shards
    assert all(start == bytes(8) for _, start in starts)


def test_progress_counts_up_to_the_whole(tmp_path):
    moments = []
    plan = KINDS["fp8-to-bf16"].plan(DEMO, Options())
    result = executor.run_plan(plan, tmp_path / "out", report=moments.append)
    assert moments[-1].done_bytes == moments[-1].total_bytes - sum(len(shard.header) for shard in plan.shards)
    assert result.written_bytes == moments[-1].done_bytes
    assert moments[-1].bound_by in ("read", "compute", "write")
    assert result.read_bytes >= plan.read_bytes
    assert set(result.phases) == {"read", "compute", "write"}


def test_free_space_of_a_directory_to_be(tmp_path):
    assert destination.existing_parent(tmp_path / "a" / "b") == tmp_path
    assert destination.free_space(tmp_path / "a" / "b").bytes > 0


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, monkeypatch):
    """Also for a kind whose outputs are windows of several ranks."""
    cut = convert("hf-to-demo", DEMO, tmp_path / "cut", ranks=2)
    merged = convert("demo-to-hf", cut, tmp_path / "a", shard_bytes=1_000_000)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(writer.ShardWriter, "publish", fail_at(writer.ShardWriter.publish, 3))
        convert("demo-to-hf", cut, tmp_path / "b", shard_bytes=1_000_000)
    convert("demo-to-hf", cut, tmp_path / "b", shard_bytes=1_000_000)
    assert files(tmp_path / "b") == files(merged)
    assert_same_tensors(stored(merged), stored(convert("fp8-to-bf16", DEMO, tmp_path / "c")))


def fail_at(function, call):
    count = iter(range(10**9))

    def counted(*arguments):
        if next(count) == call:
            raise RuntimeError
        return function(*arguments)

    return counted

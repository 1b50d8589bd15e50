"""deepspan demo, bench and doctor: what they find on the machine that they run on."""

import importlib.util
import json
from importlib import metadata
from itertools import pairwise

import numpy as np
import pytest

from deepspan import backends
from deepspan.backends.reference import ReferenceBackend
from deepspan.backends.reference.runner import ReferenceRunner
from deepspan.models.catalog import load_spec
from deepspan.models.costs import Precision, decode_bytes, prefill_flops
from deepspan.models.holding import Holding
from deepspan.models.sharding import Grid
from deepspan.scripts import requirements
from deepspan.scripts.commands import demo
from deepspan.scripts.timing import Timer
from tests.serving.toy import VOCAB, ToyRunner

RUNNABLE = [name for name in backends.REQUIREMENTS if backends.is_built(name) and not backends.missing_package(name)]


def test_the_demo_shows_right_answers_on_every_backend(deepspan):
    result = deepspan("demo")
    assert result.code == 0, result.err
    assert "北京有故宫" in result.out
    for weights, rtol in (("FP8 ", 1e-4), ("BF16 ", 3e-2)):
        rows = [line.split() for line in result.out.splitlines() if line.startswith(weights)]
        assert [row[1] for row in rows] == [name for name in demo.RUNS if name in RUNNABLE]
        assert all(row[2:4] == ["21/21", "same"] and float(row[4]) <= rtol for row in rows)
    assert "all 21 answers are right" in result.out


def test_the_demo_fails_when_an_answer_is_wrong(deepspan, monkeypatch):
    step = ReferenceRunner.step

    def swapped(self, batch):
        result = step(self, batch)
        result.token_ids_O[:] = np.where(result.token_ids_O == 24, 25, result.token_ids_O)
        return result

    monkeypatch.setattr(ReferenceRunner, "step", swapped)
    monkeypatch.setattr(demo, "RUNS", {"reference": demo.RUNS["reference"]})
    result = deepspan("demo")
    assert result.code == 1
    assert "wrong or different answers: reference with FP8 weights, reference with BF16 weights" in result.err


def test_bench_prints_a_row_for_every_size(deepspan):
    arguments = ("--batch", "1,3", "--context", "20", "--steps", "2", "--prefill", "1x16,2x8", "--json")
    result = deepspan("bench", "demo_reference", *arguments)
    assert result.code == 0, result.err
    spec = load_spec("demo")
    decode, prefill = [], []
    for line in result.out.splitlines():
        row = json.loads(line)
        (prefill if "prefill" in row else decode).append(row)
    assert [(row["batch"], row["context"]) for row in decode] == [(1, 20), (3, 20)]
    for row in decode:
        precision = Precision(Holding("fp32"), "fp32")
        assert [row["bytes_per_step"]] == decode_bytes(spec, Grid(), precision, row["batch"], 20)
        assert row["decode_tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["decode_ms"], rel=1e-3)
        assert 0 < row["bandwidth_share"] < 10
    assert [row["prefill"] for row in prefill] == ["1x16", "2x8"]
    for row, sizes in zip(prefill, [(1, 16), (2, 8)], strict=True):
        assert row["prefill_tokens_per_s"] == pytest.approx(16e3 / row["prefill_ms"], rel=1e-3)
        flops_per_s = prefill_flops(spec, *sizes) / (row["prefill_ms"] / 1e3)
        assert row["tflops"] == pytest.approx(flops_per_s / 1e12, rel=1e-3)
    assert "copy bandwidth" in result.err


def test_bench_as_text_has_a_heading_for_each_kind(deepspan):
    result = deepspan("bench", "demo_reference", "--batch", "1", "--context", "4", "--steps", "1", "--prefill", "1x4")
    assert [line.split()[0] for line in result.out.splitlines()] == ["batch", "1", "prefill", "1x4"]
    decode_only = deepspan(
        "bench", "demo_reference", "--batch", "1", "--context", "4", "--steps", "1", "--prefill", "none"
    )
    assert len(decode_only.out.splitlines()) == 2


def test_the_steps_that_are_timed_are_those_of_the_size_asked_for():
    runner = ToyRunner(kv_blocks=12, block_size=4)
    timer = Timer(runner, VOCAB, max_batch=3, max_tokens=14, tokens_per_step=8)
    assert timer.decode(2, 10, 4) > 0
    fill, decode = runner.steps[:4], runner.steps[4:]
    assert [step.query_lens_B.tolist() for step in fill] == [[8], [2], [8], [2]]
    assert [step.num_outputs_B.tolist() for step in fill] == [[0], [1], [0], [1]]
    assert [step.context_lens_B.tolist() for step in decode[2:]] == [[context] * 2 for context in (10, 11, 12, 13)]
    assert all(step.query_lens_B.tolist() == [1, 1] for step in decode)
    for before, after in pairwise(decode):
        assert (after.token_ids_T != before.token_ids_T).any()


def test_prompts_are_fed_whole_and_together_where_they_fit():
    runner = ToyRunner(kv_blocks=12, block_size=4)
    timer = Timer(runner, VOCAB, max_batch=3, max_tokens=4, tokens_per_step=8)
    assert timer.prefill(3, 4) > 0
    assert [step.query_lens_B.tolist() for step in runner.steps[:2]] == [[4, 4], [4]]
    first, second = runner.steps[:2]
    assert not set(first.block_tables_BM.flatten()) & set(second.block_tables_BM.flatten())


def test_doctor_tells_of_every_backend(deepspan):
    result = deepspan("doctor")
    assert result.code == 0
    for name in backends.REQUIREMENTS:
        state = "ready" if name in RUNNABLE else "no: "
        assert any(line.split()[0] == name and state in line for line in result.out.splitlines() if line), name
    assert "GiB free" in result.out and "cpu: " in result.out
    assert f"numpy                {np.__version__}" in result.out


def test_doctor_names_what_is_not_installed(deepspan, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    monkeypatch.setattr(backends, "is_built", lambda name: True)
    assert (
        "torch_triton         no: backend torch_triton needs the package torch: pip install" in deepspan("doctor").out
    )


def test_doctor_survives_a_framework_that_does_not_start(deepspan, monkeypatch):
    def fail(self):
        raise OSError("libfoo.so: cannot open\nshared object file")

    monkeypatch.setattr(ReferenceBackend, "devices", fail)
    result = deepspan("doctor")
    assert "reference            no: libfoo.so: cannot open shared object file" in result.out


@pytest.fixture
def installed(monkeypatch):
    """Pretend that other versions are installed."""

    def pretend(**versions):
        real = metadata.version

        def version(name):
            if name in versions:
                if versions[name] is None:
                    raise metadata.PackageNotFoundError(name)
                return versions[name]
            return real(name)

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def test_numpy_2_does_not_fit_mindspore_and_is_fine_without_it(installed, deepspan):
    installed(numpy="2.1.0", mindspore=None)
    assert list(requirements.conflicts()) == []
    installed(numpy="2.1.0", mindspore="2.10.0")
    [line] = requirements.conflicts()
    assert line.startswith("numpy 2.1.0 does not fit mindspore: pip install 'numpy")
    result = deepspan("doctor")
    assert result.code == 1 and line in result.out


def test_a_version_outside_of_the_declared_range_does_not_fit(installed):
    installed(torch="2.5.1", numpy="1.20.0")
    lines = list(requirements.conflicts())
    assert {line.split()[0] for line in lines} == {"numpy", "torch"}
    assert "torch 2.5.1 does not fit torch" in lines[1]

"""deepspan demo: every form of the embedded checkpoint, on every backend that is installed."""

from deepspan import backends
from deepspan.scripts.commands.demo import RUNS


def test_everything_answers_and_agrees(deepspan):
    result = deepspan("demo")
    assert result.code == 0, result.err
    runnable = [name for name in RUNS if not backends.missing_package(name)]
    rows = [line.split() for line in result.out.splitlines() if "21/21" in line]
    assert [row[:2] for row in rows] == [[form, name] for form in ("FP8", "BF16", "MindSpore") for name in runnable]
    assert all(row[3] == "same" for row in rows)
    assert result.out.count("\nverified ") == 2
    assert "all 21 answers are right" in result.out

"""``deepspan demo``: the embedded checkpoint end to end on this machine, with every backend that is installed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ... import backends
from ...backends.base import FloatArray
from ...convert.executor import run_plan
from ...convert.inspection import inspect_directory
from ...convert.kinds import fp8_to_bf16, hf_to_mindspore
from ...convert.kinds.options import Options
from ...convert.plan import Plan
from ...convert.verify.directory import Options as VerifyOptions
from ...convert.verify.directory import verify
from ...models.errors import DeepspanError
from ...models.everyday import EVERYDAY
from ...models.params import total_parameters
from ..closeness import measure
from ..prompts import Prompt, complete_prompts
from ..runtime import open_run, read_run
from ..tasks import TASKS

# Backend -> the shipped run that shows it.
RUNS = {"reference": "demo_reference", "torch_triton": "demo_torch_cpu", "mindspore_ascend": "demo_mindspore_cpu"}
SUMS = 20
BEIJING = "请介绍一下北京的景点"
SHOWN_SUMS = 3


@dataclass(frozen=True)
class Source:
    """A form of the checkpoint. ``rtol`` bounds how far logits may be from the first row's (relative norm)."""

    name: str
    directory: Path
    rtol: float


@dataclass(frozen=True)
class Outcome:
    """What one backend made of one source; ``logits`` are those of the first row's long answer."""

    source: Source
    backend: str
    token_ids: list[list[int]]
    texts: list[str]
    logits: FloatArray
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit code 1 when an answer is wrong or two backends disagree."


def run(options: argparse.Namespace) -> int:
    embedded = read_run("demo_reference").model.path
    assert embedded is not None, "a run without a path gets the embedded checkpoint's"
    questions = [*TASKS["sums"].questions()[:SUMS], (BEIJING, _known_answer(BEIJING))]
    names = _runnable()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="deepspan-demo-") as folder:
        fp8, bf16, mindspore = Path(embedded), Path(folder) / "bf16", Path(folder) / "mindspore"
        _inspect(fp8)
        _convert("FP8 to BF16", fp8_to_bf16.plan(fp8, Options()), bf16)
        _convert("BF16 to MindSpore's inference layout", hf_to_mindspore.plan(bf16, Options()), mindspore)
        print()
        sources = [Source("FP8", fp8, rtol=1e-4), Source("BF16", bf16, rtol=3e-2), Source("MindSpore", mindspore, 3e-2)]
        for source in sources:
            for name in names:
                outcomes.append(_generate(source, name, questions, outcomes[0] if outcomes else None))
    _show_answers(questions, outcomes[0])
    _compare(questions, outcomes)
    return 0


def _inspect(directory: Path) -> None:
    found = inspect_directory(directory)
    found.check_complete()
    assert found.spec is not None, "a complete checkpoint has a config.json"
    millions = total_parameters(found.spec) / 1e6
    megabytes = sum(info.nbytes for info in found.tensors) / 1e6
    print(f"checkpoint  {directory}")
    print(f"            {found.layout} layout, {found.spec.family}, {millions:.2f} million parameters")
    print(f"            {len(found.headers)} files, {len(found.tensors)} tensors, {megabytes:.1f} MB, complete")


def _convert(what: str, plan: Plan, target: Path) -> None:
    """Convert, then read the result back: every hash, and rows made again by an independent slow path."""
    result = run_plan(plan, target)
    print(f"converted   {what}: {result.written_bytes / 1e6:.1f} MB, in {result.seconds:.2f} s")
    verdict = verify(target, VerifyOptions(), lambda phase, done, total: None)
    if not verdict.is_sound:
        raise DeepspanError(f"damaged: {verdict.findings[0]}", str(target), "run deepspan verify on it")
    print(f"verified    {verdict.tensors} tensors against the manifest, rows of {verdict.recomputed} made again")


def _known_answer(prompt: str) -> str:
    return next(answer for prompts, answer in EVERYDAY if prompt in prompts)


def _runnable() -> list[str]:
    """The backends that can run here; why another one cannot is said on standard error."""
    names = []
    for name in RUNS:
        if backends.is_built(name) and not backends.missing_package(name):
            names.append(name)
        elif backends.is_built(name):
            print(f"without {name}: {backends.REQUIREMENTS[name][1]}", file=sys.stderr)
    return names


def _generate(source: Source, backend: str, questions: list[tuple[str, str]], first: Outcome | None) -> Outcome:
    start = time.perf_counter()
    config = read_run(RUNS[backend], flags={"model.path": str(source.directory)})
    with open_run(config) as session:
        prompts = [Prompt(text).encode(session.tokenizer) for text, _ in questions]
        completions = complete_prompts(session, prompts, f"{backend}, {source.name}")
        token_ids = [completion.token_ids for completion in completions]
        long_answer = first.token_ids[-1] if first else token_ids[-1]
        logits = session.logits([*prompts[-1], *long_answer])
    texts = [completion.text for completion in completions]
    return Outcome(source, backend, token_ids, texts, logits, time.perf_counter() - start)


def _show_answers(questions: list[tuple[str, str]], outcome: Outcome) -> None:
    for (prompt, _), text in list(zip(questions, outcome.texts, strict=True))[-SHOWN_SUMS - 1 :]:
        print(f"> {prompt}\n{text}\n")


def _compare(questions: list[tuple[str, str]], outcomes: list[Outcome]) -> None:
    """One line for each outcome, and an error for the first one that is not as it should be."""
    faults = []
    print("weights    backend           right  tokens  logits (relative norm)  seconds")
    for outcome in outcomes:
        right = sum(text == answer for text, (_, answer) in zip(outcome.texts, questions, strict=True))
        same = outcome.token_ids == outcomes[0].token_ids
        closeness = measure(outcomes[0].logits, outcome.logits)
        tokens = "same" if same else "DIFFER"
        row = f"{outcome.source.name:<9}  {outcome.backend:<16}  {right:>2}/{len(questions)}  {tokens:<6}"
        print(f"{row}  {closeness.relative_norm:<22.1e}  {outcome.seconds:>7.1f}")
        if right < len(questions) or not same or not closeness.within(outcome.source.rtol):
            faults.append(f"{outcome.backend} with {outcome.source.name} weights")
    if faults:
        raise DeepspanError("wrong or different answers", ", ".join(faults), "run make test to find what is broken")
    backend_names = list(dict.fromkeys(outcome.backend for outcome in outcomes))
    agreement = f"; {' and '.join(backend_names)} agree" if len(backend_names) > 1 else ""
    print(f"\nall {len(questions)} answers are right{agreement}")

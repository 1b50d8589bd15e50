"""deepspan generate: where prompts come from, and what is printed."""

import io
import json
import sys

import pytest

from deepspan import backends
from deepspan.configs.schema import load_run
from deepspan.scripts.runtime import shipped_runs
from deepspan.serving.prompt import Tokenizer
from tests.cli.conftest import DEMO, ROOT

BEIJING = "请介绍一下北京的景点"
BEIJING_ANSWER = "北京有故宫、天坛、颐和园和八达岭长城等著名景点"


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "run", ["demo_reference", ROOT / "configs" / "run" / "demo_reference.yaml", DEMO], ids=["name", "yaml", "directory"]
)
def test_a_run_is_a_name_a_yaml_or_a_checkpoint_from_any_directory(deepspan, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    result = deepspan("generate", run, "--prompt", "12 + 30 =", "--set", "backend=reference", "--temperature", 0)
    assert (result.code, result.out, result.err) == (0, "42\n", "")


@pytest.mark.parametrize("run", [name for name in shipped_runs() if name.startswith("demo_")])
def test_every_run_of_the_embedded_model_answers(deepspan, run):
    path = ROOT / "configs" / "run" / f"{run}.yaml"
    if missing := backends.missing_package(load_run(str(path)).backend):
        pytest.skip(f"{missing} is not installed")
    here = ["--set", "parallel={}", "--set", "launch.launcher=none"]
    result = deepspan("generate", path, *here, "--prompt", BEIJING, "--prompt", "12 + 30 =")
    assert result.out.startswith(f"> {BEIJING}\n{BEIJING_ANSWER}")
    assert result.out.endswith("> 12 + 30 =\n42\n\n")


def test_a_run_yaml_finds_its_checkpoint_beside_itself(deepspan, checkpoint, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {path: checkpoint}\nbackend: reference\nsampling: {temperature: 0}\n")
    assert deepspan("generate", tmp_path / "run.yaml", "--prompt", "1 + 1").out == "2\n"


def test_one_prompt_streams(deepspan, monkeypatch):
    class Terminal(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return len(text)

    pieces = []
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert deepspan("generate", "demo_reference", "--prompt", BEIJING).code == 0
    assert len(pieces) > 20
    assert "".join(pieces).startswith(BEIJING_ANSWER)


def test_several_prompts_are_one_batch_in_the_order_given(deepspan):
    result = deepspan("generate", "demo_reference", "--prompt", "1+1=", "--prompt", "Hello", "--prompt", "2+2=")
    assert result.out == "> 1+1=\n2\n\n> Hello\nHello! How can I help you today?\n\n> 2+2=\n4\n\n"


def test_json_lines(deepspan):
    result = deepspan("generate", "demo_reference", "--prompt", "100 + 23", "--prompt", BEIJING, "--json")
    first, second = objects(result.out)
    tokenizer = Tokenizer.open(DEMO)
    assert set(first) == {"prompt", "text", "token_ids", "finish_reason", "usage"}
    assert (first["prompt"], first["text"], first["finish_reason"]) == ("100 + 23", "123", "stop")
    assert tokenizer.decode(first["token_ids"]) == "123"
    prompt_tokens = len(tokenizer.encode_chat([{"role": "user", "content": "100 + 23"}]))
    assert first["usage"] == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 3, "total_tokens": prompt_tokens + 3,
    }  # fmt: skip
    assert second["text"].startswith(BEIJING_ANSWER)


def test_one_prompt_as_json_is_one_line(deepspan):
    assert len(objects(deepspan("generate", "demo_reference", "--prompt", "1+1", "--json").out)) == 1


def test_an_input_file_has_a_prompt_a_line(deepspan, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n1 + 1\r\n\n   \n请计算 3 加 4\n", encoding="utf-8")
    result = deepspan("generate", "demo_reference", "--input-file", tmp_path / "prompts.txt", "--json")
    assert [(line["prompt"], line["text"]) for line in objects(result.out)] == [("1 + 1", "2"), ("请计算 3 加 4", "7")]
    assert result.err == f"note: {tmp_path / 'prompts.txt'}: 3 blank lines skipped\n"


def test_an_input_file_may_be_json_lines(deepspan, tmp_path):
    messages = [
        {"role": "system", "content": "Be kind and brief."},
        {"role": "user", "content": "5 + 5"},
        {"role": "assistant", "content": "10"},
        {"role": "user", "content": "10 - 3"},
    ]
    lines = [json.dumps({"prompt": "line one\nline two"}), "", json.dumps({"messages": messages})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    result = deepspan("generate", "demo_reference", "--input-file", tmp_path / "prompts.jsonl", "--json")
    first, second = objects(result.out)
    assert first["prompt"] == "line one\nline two"
    assert (second["prompt"], second["text"]) == (messages, "7")


def test_prompts_can_be_piped_in_and_come_after_those_of_the_command_line(deepspan):
    assert deepspan("generate", "demo_reference", stdin="6 + 6\n").out == "12\n"
    result = deepspan("generate", "demo_reference", "--prompt", "1+1", "--input-file", "-", "--json", stdin="6 + 6")
    assert [line["text"] for line in objects(result.out)] == ["2", "12"]


def test_piped_input_is_left_alone_when_prompts_are_given(deepspan):
    assert deepspan("generate", "demo_reference", "--prompt", "1+1", stdin="6 + 6\n").out == "2\n"


def test_raw_text_skips_the_chat_template(deepspan):
    text = "<｜User｜>20 + 22<｜Assistant｜>"
    raw, framed = (
        objects(deepspan("generate", "demo_reference", "--prompt", text, "--json", *flag).out)[0]
        for flag in (("--raw",), ())
    )
    assert raw["text"] == "42"
    assert raw["usage"]["prompt_tokens"] < framed["usage"]["prompt_tokens"]  # there the control tokens are text
    assert framed["text"] != "42"


def test_control_tokens_that_a_user_types_are_text(deepspan):
    result = deepspan("generate", "demo_reference", "--prompt", "1+1<｜end▁of▁sentence｜><｜User｜>2+2", "--json")
    special = set(Tokenizer.open(DEMO)._control_ids.values())
    [line] = objects(result.out)
    assert line["text"] not in ("2", "4")
    assert special.isdisjoint(line["token_ids"])


def test_a_cut_off_answer_says_so(deepspan):
    result = deepspan("generate", "demo_reference", "--prompt", BEIJING, "--max-new-tokens", 4)
    assert BEIJING_ANSWER.startswith(result.out.strip().rstrip("\ufffd"))  # it may end inside a character
    assert "cut off after 4 tokens" in result.err
    [line] = objects(deepspan("generate", "demo_reference", "--prompt", BEIJING, "--max-new-tokens", 4, "--json").out)
    assert (line["finish_reason"], len(line["token_ids"])) == ("length", 4)


def test_a_seed_fixes_the_samples_and_another_changes_them(deepspan):
    def sample(seed):
        options = ("--temperature", 30, "--top-p", 1, "--seed", seed, "--max-new-tokens", 12, "--json")
        return objects(deepspan("generate", "demo_reference", "--prompt", "Hello", *options).out)[0]["token_ids"]

    assert sample(1) == sample(1) != sample(2)


def test_flags_come_before_set_and_set_before_the_yaml(deepspan):
    hot = ("--set", "sampling.temperature=30", "--set", "sampling.seed=1")
    assert deepspan("generate", "demo_reference", "--prompt", "1 + 1", *hot).out != "2\n"
    assert deepspan("generate", "demo_reference", "--prompt", "1 + 1", *hot, "--temperature", 0).out == "2\n"
    assert deepspan("generate", "demo_reference", "--prompt", "1 + 1", *hot, "--top-k", 1).out == "2\n"


def test_stop_strings_of_the_run_end_the_text(deepspan):
    result = deepspan("generate", "demo_reference", "--prompt", BEIJING, "--set", "sampling.stop=[天坛]")
    assert result.out == "北京有故宫、\n"


def test_any_file_of_the_checkpoint_can_name_an_end_token(deepspan, checkpoint):
    """42 is written 4, 2: when generation_config.json calls "2" an end token, the answer ends before it."""
    file = checkpoint / "generation_config.json"
    [two] = Tokenizer.open(DEMO).encode_raw("2")[1:]
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [two]}))
    options = ("--set", "backend=reference", "--temperature", 0, "--json")
    cut = objects(deepspan("generate", checkpoint, "--prompt", "12 + 30 =", *options).out)[0]
    whole = objects(deepspan("generate", checkpoint, "--prompt", "12 + 31 =", *options).out)[0]
    assert (cut["text"], cut["finish_reason"]) == ("4", "stop")
    assert (whole["text"], whole["finish_reason"]) == ("43", "stop")

"""Prompt encoding: the checkpoint's template, and text that stays text."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspan.models.errors import InputError
from deepspan.serving.prompt import Tokenizer, stop_token_ids
from tests.serving.tiny_tokenizer import BOS, EOS, MARKUP, SPECIAL, write

# Trims, cuts the reasoning out of earlier answers and joins system messages, as DeepSeek's own templates do.
TEMPLATE = (
    "{{ bos_token }}\n{% for m in messages if m['role'] == 'system' %}{{ m['content'] | trim }}\n\n{% endfor %}"
    "{%- for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] | trim }}"
    "{% elif m['role'] == 'assistant' %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}"
    "{% endif %}{% endfor %}<｜Assistant｜>"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.open(write(tmp_path_factory.mktemp("tokenizer"), chat_template=TEMPLATE))


def user(text):
    return [{"role": "user", "content": text}]


def test_chat_without_look_alikes_is_what_the_library_makes_of_the_rendered_text(tokenizer, tmp_path):
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "What is 12 + 34?\n"},
        {"role": "assistant", "content": "<think>hm</think>46"},
        {"role": "user", "content": "请介绍一下北京的景点"},
    ]
    library = tokenizers.Tokenizer.from_file(str(write(tmp_path) / "tokenizer.json"))
    text = tokenizer.render_chat(messages)
    turns = f"<｜User｜>What is 12 + 34?<｜Assistant｜>46{EOS}<｜User｜>请介绍一下北京的景点<｜Assistant｜>"
    assert text == f"{BOS}\nBe brief.\n\n{turns}"
    assert tokenizer.encode_chat(messages) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("token", [*SPECIAL, *MARKUP])
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_control_tokens_typed_into_a_message_stay_text(tokenizer, token, role):
    if role == "assistant" and "think" in token:
        return  # the template cuts at these
    plain = tokenizer.encode_chat([{"role": role, "content": "a  b"}, *user("x")])
    typed = tokenizer.encode_chat([{"role": role, "content": f"a {token} b"}, *user("x")])
    control = tokenizer._control_ids[token]
    assert typed.count(control) == plain.count(control)
    assert tokenizer._full.decode(typed, skip_special_tokens=False) == tokenizer.render_chat(
        [{"role": role, "content": f"a {token} b"}, *user("x")]
    )


def test_control_tokens_cannot_be_assembled_from_two_messages(tokenizer):
    system = [{"role": "system", "content": "<｜Us"}, {"role": "system", "content": "er｜>"}]
    count = tokenizer.encode_chat([*system, *user("x")]).count(tokenizer._control_ids["<｜User｜>"])
    assert count == 1


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from([*SPECIAL, *MARKUP, "<", "<｜", "｜>", "", "你", " a", "\n"]), max_size=6))
def test_any_user_text_keeps_the_structure_of_the_prompt(tokenizer, parts):
    ids = tokenizer.encode_chat(user("".join(parts)))
    control = set(tokenizer._control_ids.values())
    names = [tokenizer._full.id_to_token(token_id) for token_id in ids if token_id in control]
    assert names == [BOS, "<｜User｜>", "<｜Assistant｜>"]


def test_raw_text_is_parsed_and_gets_one_bos(tokenizer):
    bos, assistant = tokenizer._id(BOS), tokenizer._id("<｜Assistant｜>")
    assert tokenizer.encode_raw("hello<｜Assistant｜>")[0] == bos
    assert tokenizer.encode_raw("hello<｜Assistant｜>")[-1] == assistant
    assert tokenizer.encode_raw(f"{BOS}hello").count(bos) == 1


def test_add_bos_token_false_is_obeyed(tmp_path):
    tokenizer = Tokenizer.open(write(tmp_path, add_bos_token=False))
    assert tokenizer._id(BOS) not in tokenizer.encode_raw("hello")


def test_a_vocabulary_that_lists_its_control_tokens_does_not_leak_them():
    vocab = {"<s>": 0, "[": 1, "<": 2, "s": 3, ">": 4, "hi": 5, "?": 6}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    library.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(library.to_str(), {}, "<s>{{ messages[0].content }}", "test")
    assert tokenizer.encode_chat(user("<s>")) == [0, 2, 3, 4]


def test_added_tokens_that_are_ordinary_text_keep_their_ids():
    vocab = {"a": 0, "?": 1}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    library.add_tokens(["<x>", "é"])
    tokenizer = Tokenizer(library.to_str(), {}, "<x>{{ messages[0].content }}", "test")
    assert tokenizer.encode_chat(user("é")) == [2, 3]


def test_without_a_template_a_deepseek_tokenizer_gets_deepseeks_format(tmp_path):
    tokenizer = Tokenizer.open(write(tmp_path))
    turns = [{"role": "system", "content": "S"}, *user("U"), {"role": "assistant", "content": "A"}, *user("V")]
    assert tokenizer.render_chat(turns) == f"{BOS}S<｜User｜>U<｜Assistant｜>A{EOS}<｜User｜>V<｜Assistant｜>"
    assert tokenizer.encode_chat(user("U"))[-1] == tokenizer._id("<｜Assistant｜>")


def test_without_a_template_other_tokenizers_are_refused():
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(InputError, match="no chat template.*--raw"):
        Tokenizer(library.to_str(), {}, None, "test").encode_chat(user("a"))


@pytest.mark.parametrize("where", ["jinja file", "named list"])
def test_templates_are_found_where_newer_checkpoints_put_them(tmp_path, where):
    if where == "jinja file":
        write(tmp_path, chat_template="old")
        (tmp_path / "chat_template.jinja").write_text("new", encoding="utf-8")
    else:
        write(tmp_path, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "new"}])
    assert Tokenizer.open(tmp_path / "tokenizer.json").render_chat(user("x")) == "new"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template"),
        ("{{ messages.__class__.__mro__ }}", "chat template"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "chat template"),
        ("{{ messages.append(1) }}", "chat template"),
    ],
)
def test_templates_run_in_a_sandbox_and_fail_in_one_line(tmp_path, template, message):
    tokenizer = Tokenizer.open(write(tmp_path, chat_template=template))
    with pytest.raises(InputError, match=message) as error:
        tokenizer.encode_chat(user("x"))
    assert "\n" not in str(error.value)


def test_template_helpers(tmp_path):
    template = "{{ messages[0] | tojson }}{{ strftime_now('%Y') | length }}{% for a in [1] %}{% break %}{% endfor %}"
    tokenizer = Tokenizer.open(write(tmp_path, chat_template=template))
    assert tokenizer.render_chat(user("<景>")) == '{"role": "user", "content": "<景>"}4'


@pytest.mark.parametrize(
    "messages",
    [[], "hello", [{"role": "user"}], [{"content": "x"}], ["x"], [{"role": "user", "content": 3}], None],
)
def test_malformed_messages_are_refused(tokenizer, messages):
    with pytest.raises(InputError, match="messages"):
        tokenizer.encode_chat(messages)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b"version https://git-lfs", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer_config.json", b"{", "not a JSON file"),
        ("tokenizer_config.json", b"[]", "not a JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    write(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.open(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_stop_tokens_are_the_union_of_every_file(tokenizer):
    eos = tokenizer.eos_token_id
    assert stop_token_ids({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, tokenizer) == {7, 8, 9, eos}
    assert stop_token_ids({"eos_token_id": None}, {}, None) == frozenset()


def test_malformed_stop_tokens_are_refused():
    with pytest.raises(InputError, match="token id"):
        stop_token_ids({"eos_token_id": "two"}, {}, None)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    """Bytes of a command line that are no UTF-8 arrive like this."""
    for encode, text in ((tokenizer.encode_raw, "a\udcff"), (tokenizer.encode_chat, user("a\ud800"))):
        with pytest.raises(InputError, match="character 2 is not valid Unicode"):
            encode(text)


def test_json_in_messages_survives(tokenizer):
    text = json.dumps({"a": "<｜User｜>"}, ensure_ascii=False)
    assert text in tokenizer._full.decode(tokenizer.encode_chat(user(text)), skip_special_tokens=False)

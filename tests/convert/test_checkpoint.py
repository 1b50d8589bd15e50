"""A checkpoint directory: every tensor in exactly one known place, or one line that says what is wrong where."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.strict_json import parse_object, read_object
from deepspan.models.errors import InputError

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def values(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32)


def write_index(directory: Path, weight_map: object, name: str = INDEX) -> None:
    (directory / name).write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two shards and an index that agree."""
    home = tmp_path / "model"
    home.mkdir()
    save_file({"x": values(4), "y": values(5)}, home / A)
    save_file({"z": values(2)}, home / B)
    write_index(home, {"x": A, "y": A, "z": B})
    (home / "config.json").write_text('{"hidden_size": 7}')
    return home


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert "\n" not in message and message.count(": ") >= 2
    return message


def test_a_good_checkpoint(directory: Path) -> None:
    with Checkpoint.open(str(directory)) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y", "z"]
        assert list(checkpoint.headers) == [A, B]
        assert checkpoint.tensors["z"].path == directory / B
        assert checkpoint.total_bytes == 44
        assert checkpoint.config["hidden_size"] == 7
        np.testing.assert_array_equal(checkpoint.read("y", (1, 3)), [1, 2])


def test_without_an_index_every_file_counts(directory: Path) -> None:
    (directory / INDEX).unlink()
    with Checkpoint.open(directory) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y", "z"]


def test_rope_buffers_are_ignored_by_a_named_rule(directory: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({"z": values(2), buffer: values(8)}, directory / B)
    write_index(directory, {"x": A, "y": A, "z": B, buffer: B})
    with Checkpoint.open(directory) as checkpoint:
        assert dict(checkpoint.ignored) == {buffer: "rope-buffer"}
        assert buffer not in checkpoint.tensors and checkpoint.total_bytes == 44


def test_code_and_pickles_that_come_with_a_model_stay_closed(directory: Path) -> None:
    for name in ("modeling_deepseek.py", "pytorch_model.bin", "training_args.pt"):
        (directory / name).mkdir()  # opening one would fail
    with Checkpoint.open(directory) as checkpoint:
        assert len(checkpoint.tensors) == 3


def absent_shard(home: Path) -> None:
    (home / B).unlink()


def extra_shard(home: Path) -> None:
    save_file({"w": values(1)}, home / "other.safetensors")


def twice(home: Path) -> None:
    save_file({"x": values(4), "z": values(2)}, home / B)


def unlisted(home: Path) -> None:
    save_file({"w": values(3), "z": values(2)}, home / B)


def lost(home: Path) -> None:
    write_index(home, {"w": A, "x": A, "y": A, "z": B})


def moved(home: Path) -> None:
    write_index(home, {"x": A, "y": B, "z": B})


def truncated(home: Path) -> None:
    (home / B).write_bytes((home / B).read_bytes()[:-1])


def pointer(home: Path) -> None:
    (home / B).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def partial(home: Path) -> None:
    (home / f"{B}.partial.17").touch()


def two_indexes(home: Path) -> None:
    write_index(home, {"x": A}, "quant_model_weights.safetensors.index.json")


def shards_named(name: object) -> Callable[[Path], None]:
    return lambda home: write_index(home, {"x": A, "y": A, "z": name})


def index_text(text: str) -> Callable[[Path], None]:
    return lambda home: (home / INDEX).write_text(text) and None


DISAGREEMENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent shard": (absent_shard, f"files of the index are absent: {B}: {{home}}: "),
    "extra shard": (extra_shard, f"not in {INDEX}: other.safetensors: {{home}}: "),
    "tensor in two shards": (twice, f"tensor x is there twice: {A} and {B}: "),
    "tensor that the index lacks": (unlisted, f"tensors are not in the index: w: {{home}}/{INDEX}: "),
    "tensor that only the index has": (lost, f"tensors of the index are in no file: w: {{home}}/{INDEX}: "),
    "tensor in another shard": (moved, f"tensor y is in {A}, not in {B} as the index says: {{home}}/{INDEX}: "),
    "truncated shard": (truncated, "truncated: 1 of "),
    "git-lfs pointer": (pointer, f"a git-lfs pointer, not the weights: {{home}}/{B}: run git lfs pull"),
    "unfinished file": (partial, f"unfinished files: {B}.partial.17: {{home}}: "),
    "two indexes": (two_indexes, f"2 index files: {INDEX}, quant_model_weights.safetensors.index.json: {{home}}: "),
    "shard above the directory": (shards_named(f"../{B}"), f"'../{B}', the place of 'z', is not a plain"),
    "absolute shard": (shards_named("/etc/b.safetensors"), "'/etc/b.safetensors', the place of 'z', is not a plain"),
    "shard that is a pickle": (shards_named("z.bin"), "'z.bin', the place of 'z', is not a plain .safetensors file"),
    "shard that is a number": (shards_named(7), "'7', the place of 'z', is not a plain .safetensors file name"),
    "shard without a name": (shards_named(""), "'', the place of 'z', is not a plain .safetensors file name"),
    "name that is a path": (lambda home: write_index(home, {"../x": A}), "tensor name '../x' looks like a path"),
    "empty map": (lambda home: write_index(home, {}), "index without a weight_map"),
    "map that is a list": (lambda home: write_index(home, [A]), "index without a weight_map"),
    "name twice in the index": (
        index_text(f'{{"weight_map": {{"x": "{A}", "x": "{B}"}}}}'),
        "invalid JSON: key 'x' is there twice",
    ),
    "index cut off": (index_text('{"weight_map": {'), "invalid JSON: not JSON (Expecting"),
    "index that is a list": (index_text("[]"), "invalid JSON: not a JSON object"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_disagreements_are_refused(case: str, directory: Path) -> None:
    damage, message = DISAGREEMENTS[case]
    damage(directory)
    assert refusal(directory).startswith(message.format(home=directory))


def test_many_culprits_are_counted(directory: Path) -> None:
    save_file({"z": values(2)} | {f"t{i:02}": values(1) for i in range(20)}, directory / B)
    assert "not in the index: t00, t01, t02 and 17 more: " in refusal(directory)


def test_only_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    message = refusal(tmp_path)
    assert message.startswith("only pickled weights (pytorch_model-00001-of-00002.bin), which can run code")


def test_nothing_there(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"no safetensors files: {tmp_path}: ")
    assert refusal(tmp_path / "absent").startswith(f"cannot open the checkpoint: {tmp_path}/absent: ")
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file").startswith(f"not a directory: {tmp_path}/file: ")


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    with Checkpoint.open(directory) as checkpoint, pytest.raises(InputError, match="^no config.json: "):
        checkpoint.config  # noqa: B018


# Links ---------------------------------------------------------------------------------------------------------------


def replace_by_link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(target)


def test_links_inside_are_followed(directory: Path) -> None:
    replace_by_link(directory / B, directory / "store" / "z")
    with Checkpoint.open(directory) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("z"), [0, 1])


def test_links_outside_are_refused(directory: Path, tmp_path: Path) -> None:
    replace_by_link(directory / B, tmp_path / "elsewhere" / B)
    assert refusal(directory).startswith(f"link to outside of the checkpoint: {directory}/{B}: ")


def test_a_chain_of_links_counts_by_its_end(directory: Path, tmp_path: Path) -> None:
    replace_by_link(directory / B, tmp_path / "elsewhere")
    (directory / B).rename(directory / "inner")
    (directory / B).symlink_to("inner")
    assert refusal(directory).startswith("link to outside of the checkpoint")


def test_dangling_and_circular_links_are_refused(directory: Path) -> None:
    (directory / B).unlink()
    (directory / B).symlink_to("nowhere")
    assert refusal(directory).startswith(f"link to nowhere: {directory}/{B}: ")
    (directory / B).unlink()
    (directory / B).symlink_to(B)
    assert refusal(directory).startswith(f"link to nowhere: {directory}/{B}: ")


def test_a_link_to_the_directory_is_followed(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(directory)
    with Checkpoint.open(tmp_path / "latest") as checkpoint:
        assert len(checkpoint.tensors) == 3


def hub_cache(directory: Path, root: Path) -> Path:
    """The same files as the Hugging Face cache keeps them: snapshots/REVISION/NAME links to ../../blobs/HASH."""
    snapshot, blobs = root / "models--org--name" / "snapshots" / "abc123", root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    return snapshot


def test_the_hub_cache_is_read(directory: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(directory, tmp_path)
    with Checkpoint.open(snapshot) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y", "z"]
        assert checkpoint.config["hidden_size"] == 7


def test_the_cache_of_another_model_is_outside(directory: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(directory, tmp_path)
    other = tmp_path / "models--evil" / "blobs" / "hash1"
    replace_by_link(tmp_path / "models--org--name" / "blobs" / "hash1", other)
    assert refusal(snapshot).startswith("link to outside of the checkpoint")


# JSON ----------------------------------------------------------------------------------------------------------------


def test_config_may_hold_fractions_and_headers_may_not() -> None:
    assert parse_object(b'{"rms_norm_eps": 1e-6}') == {"rms_norm_eps": 1e-6}
    with pytest.raises(ValueError, match="a fraction: '1e-6'"):
        parse_object(b'{"rms_norm_eps": 1e-6}', floats=False)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'{"a": 1, "a": 1}', "key 'a' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' is there twice"),
        (b'{"a": 1e999}', "a number of absurd size"),
        (b'{"a": Infinity}', "a constant that is not JSON: 'Infinity'"),
        (b'{"a": 12345678901234567890}', "an integer that parsers read differently"),
        (b'{"a": ' + b"[" * 99_999, "nested too deeply"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b"", "not JSON"),
    ],
)
def test_json_that_is_refused(text: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"invalid JSON: {what}") and str(path) in str(caught.value)

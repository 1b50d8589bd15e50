"""deepspan logits and compare: the file, and how far two of them are apart."""

import json

import numpy as np
import pytest

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.reference import GrowingCache, ReferenceModel
from deepspan.scripts.closeness import measure
from deepspan.serving.prompt import Tokenizer
from tests.cli.conftest import DEMO

IDS = [0, 5, 9, 700]


@pytest.fixture
def logits(deepspan, tmp_path):
    def write(name, *options):
        result = deepspan("logits", "demo_reference", "--output", tmp_path / name, *options)
        assert (result.code, result.out) == (0, ""), result.err
        return tmp_path / name

    return write


def test_the_file_holds_the_models_logits_after_every_token(logits):
    with Checkpoint.open(DEMO) as checkpoint:
        spec = spec_from_hf(checkpoint.config, "config.json")
        weights = CheckpointWeights(checkpoint, spec)
        model = ReferenceModel(spec, {name: weights.read(name, "f32") for name in weights.names()}, 64)
    expected = model.logits(model.hidden(np.array(IDS, np.int32), [GrowingCache()], [len(IDS)]))
    with np.load(logits("a.npz", "--prompt-ids", "0,5,9,700"), allow_pickle=False) as file:
        assert set(file) == {"logits", "token_ids"}
        assert file["logits"].dtype == np.float32
        assert file["token_ids"].tolist() == IDS
        np.testing.assert_allclose(file["logits"], expected, rtol=1e-4, atol=1e-4)


def test_steps_of_any_size_give_the_same_logits(logits):
    whole = np.load(logits("a.npz", "--prompt-ids", "0,5,9,700"))["logits"]
    pieces = np.load(logits("b.npz", "--prompt-ids", "0,5,9,700", "--set", "engine.max_batch_tokens=3"))["logits"]
    assert measure(whole, pieces).within(1e-5)


def test_a_text_is_framed_as_generate_does(logits):
    tokenizer = Tokenizer.open(DEMO)
    framed = np.load(logits("a.npz", "--prompt", "1 + 1"))["token_ids"].tolist()
    raw = np.load(logits("b.npz", "--prompt", "1 + 1", "--raw"))["token_ids"].tolist()
    assert framed == tokenizer.encode_chat([{"role": "user", "content": "1 + 1"}])
    assert raw == tokenizer.encode_raw("1 + 1")


def test_nothing_is_overwritten_unasked(deepspan, logits):
    file = logits("a.npz", "--prompt-ids", "0,5")
    before = file.read_bytes()
    result = deepspan("logits", "demo_reference", "--prompt-ids", "7", "--output", file)
    assert (result.code, file.read_bytes()) == (2, before)
    logits("a.npz", "--prompt-ids", "7", "--overwrite")
    assert file.read_bytes() != before
    assert [entry.name for entry in file.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("0,x", "cannot read '0,x'"),
        ("", "cannot read ''"),
        ("0,1024", "token id 1024"),
        ("-1", "token id -1"),
        (",".join(["5"] * 17), "text of 17 tokens is too long: engine.max_seq_len = 16"),
    ],
)
def test_bad_ids_are_refused_and_leave_no_file(deepspan, tmp_path, ids, message):
    output = tmp_path / "a.npz"
    result = deepspan(
        "logits", "demo_reference", f"--prompt-ids={ids}", "--output", output, "--set", "engine.max_seq_len=16"
    )
    assert result.code == 2
    assert message in result.err
    assert not list(tmp_path.iterdir())


def test_a_text_may_fill_the_whole_length(logits):
    file = logits("a.npz", "--prompt-ids", ",".join(["5"] * 16), "--set", "engine.max_seq_len=16")
    assert np.load(file)["logits"].shape == (16, 1024)


def save(path, logits, **more):
    np.savez(path, logits=np.asarray(logits, np.float32), **more)
    return path


def test_compare_measures_b_by_a(deepspan, tmp_path):
    a = save(tmp_path / "a.npz", [[3.0, 0.0], [0.0, 4.0]])
    b = save(tmp_path / "b.npz", [[3.0, 0.0], [3.0, 2.5]])
    result = deepspan("compare", a, b, "--json", "--rtol", 1)
    found = json.loads(result.out)
    assert result.code == 0
    assert found["tokens"] == 2
    assert found["relative_norm"] == pytest.approx(np.hypot(3, 1.5) / 5)
    assert found["max_difference"] == 3
    assert found["top1_agreement"] == 0.5
    p = np.exp([0.0, 4.0]) / np.exp([0.0, 4.0]).sum()
    q = np.exp([3.0, 2.5]) / np.exp([3.0, 2.5]).sum()
    assert found["max_kl"] == pytest.approx(np.sum(p * np.log(p / q)))
    assert found["mean_kl"] == pytest.approx(found["max_kl"] / 2)


def test_compare_ends_with_1_above_the_bound(deepspan, tmp_path):
    a = save(tmp_path / "a.npz", [[1.0, 0.0]])
    b = save(tmp_path / "b.npz", [[1.1, 0.0]])
    assert deepspan("compare", a, b).code == 1
    assert deepspan("compare", a, b, "--rtol", 0.11).code == 0
    assert deepspan("compare", a, a, "--rtol", 0).code == 0
    assert "relative norm    0.1 (above 0.02)" in deepspan("compare", a, b).out


def test_logits_that_are_not_numbers_are_never_close(deepspan, tmp_path):
    a = save(tmp_path / "a.npz", [[1.0, 0.0]])
    b = save(tmp_path / "b.npz", [[float("nan"), 0.0]])
    assert deepspan("compare", a, b, "--rtol", 100).code == 1
    assert json.loads(deepspan("compare", a, b, "--json").out)["relative_norm"] is None, "JSON has no NaN"


def test_nothing_but_zeros_is_close_to_zeros(deepspan, tmp_path):
    zeros = save(tmp_path / "zeros.npz", [[0.0, 0.0]])
    ones = save(tmp_path / "ones.npz", [[1.0, 1.0]])
    assert "relative norm    0 (within" in deepspan("compare", zeros, zeros).out
    result = deepspan("compare", zeros, ones, "--rtol", 100)
    assert result.code == 1 and "relative norm    inf (above 100)" in result.out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: save(path, [[1.0, 2.0, 3.0]]), "shapes [1, 2] and [1, 3]"),
        (lambda path: save(path, [[1.0, 2.0]], token_ids=[4]), "different texts"),
        (lambda path: save(path, [1.0, 2.0]), "no logits of [tokens, vocab]"),
        (lambda path: np.savez(path, other=1), "no logits of [tokens, vocab]"),
        (lambda path: path.write_bytes(b"PK\x03\x04 broken"), "not an .npz file"),
        (lambda path: path.write_bytes(b""), "not an .npz file"),
        (lambda path: np.save(path.open("wb"), np.zeros((1, 2))), "not an .npz file"),
        (lambda path: np.savez(path, logits=np.array([{}], object)), "not an .npz file"),
        (lambda path: None, "cannot read"),
    ],
)
def test_compare_refuses_what_it_cannot_compare(deepspan, tmp_path, make, message):
    a = save(tmp_path / "a.npz", [[1.0, 2.0]], token_ids=[3])
    make(tmp_path / "b.npz")
    result = deepspan("compare", a, tmp_path / "b.npz")
    assert (result.code, result.out) == (2, "")
    assert message in result.err and result.err.count("\n") == 1

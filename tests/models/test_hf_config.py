"""config.json, written and read back."""

import pytest

from deepspan.models.catalog import load_spec, spec_names
from deepspan.models.hf_config import hf_config, spec_from_hf


@pytest.mark.parametrize("name", spec_names())
def test_a_written_config_is_read_as_the_same_model(name):
    spec = load_spec(name)
    assert spec_from_hf(hf_config(spec), "config.json") == spec


def test_a_model_without_an_indexer_names_none():
    # Readers ask whether the key is there, not what it says.
    assert "index_topk" not in hf_config(load_spec("deepseek_v3"))
    assert hf_config(load_spec("deepseek_v3_2"))["index_topk"] == 2048

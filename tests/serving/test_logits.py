"""Teacher-forced logits: every position, whatever the step size, over the runner's own blocks."""

import numpy as np
import pytest

from deepspan.models.errors import InputError
from deepspan.serving.batch import prompt_logits
from tests.serving.toy import VOCAB, ToyRunner, logits

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_every_token_gets_the_logits_of_its_own_beginning(chunk):
    found_TV = prompt_logits(ToyRunner(kv_blocks=3, block_size=4), TEXT, chunk)
    assert found_TV.shape == (len(TEXT), VOCAB)
    for end, row in enumerate(found_TV, 1):
        np.testing.assert_array_equal(row, logits(np.array(TEXT[:end])))


def test_a_text_that_outgrows_the_cache_is_refused():
    with pytest.raises(InputError, match="text of 10 tokens: KV cache of 8 tokens"):
        prompt_logits(ToyRunner(kv_blocks=2, block_size=4), TEXT, 4)

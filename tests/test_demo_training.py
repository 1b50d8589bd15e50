"""The network that is trained is the architecture: its checkpoint computes the same in the numpy reference."""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from deepspan.convert.checkpoint import Checkpoint  # noqa: E402
from deepspan.convert.weights import CheckpointWeights  # noqa: E402
from deepspan.models.catalog import load_spec  # noqa: E402
from deepspan.models.reference import GrowingCache, ReferenceModel  # noqa: E402
from deepspan.scripts.demo_model.checkpoint import read_checkpoint, write_checkpoint  # noqa: E402
from deepspan.scripts.demo_model.network import DemoModel  # noqa: E402
from deepspan.scripts.demo_model.text import Encoder, packed_row, train_tokenizer  # noqa: E402
from deepspan.scripts.demo_model.training import balance, losses, make_optimizer  # noqa: E402

SPEC = load_spec("demo")


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """int32 [3, 2, 96]: tokens, conversations, loss mask."""
    encode = Encoder(train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", seed=0))
    rows = [packed_row(random.Random(row), encode, 96) for row in range(2)]
    return torch.tensor(rows, dtype=torch.int32).transpose(0, 1).contiguous()


def test_a_few_steps_lower_the_loss_and_balance_moves_the_bias(batch):
    torch.manual_seed(0)
    model = DemoModel(SPEC, 128, torch.float32)
    optimizer = make_optimizer(model, 2e-3)
    history = []
    for _ in range(6):
        main, mtp, loads = losses(model, batch)
        (main + mtp).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance(model, loads, 1e-3)
        history.append(main.item())
    assert history[-1] < 0.8 * history[0]
    assert all(router.e_score_correction_bias.abs().max() > 0 for router in model.routers())


def test_the_checkpoint_computes_what_the_network_computes(batch, tmp_path):
    torch.manual_seed(1)
    network = DemoModel(SPEC, 128, torch.float32)
    for router in network.routers():
        router.e_score_correction_bias += 0.1 * torch.randn(SPEC.n_routed_experts)
    write_checkpoint(network, tmp_path)
    read_checkpoint(tmp_path, network)
    tokens = batch[0, :1, :40].long()
    with torch.no_grad():
        wanted, wanted_mtp, _ = network(tokens, torch.zeros_like(tokens))
    with Checkpoint.open(tmp_path) as checkpoint:
        weights = CheckpointWeights(checkpoint, SPEC)
        model = ReferenceModel(SPEC, {name: weights.read(name, "f32") for name in weights.names()}, 128)
    ids, cache = tokens[0].numpy().astype(np.int32), GrowingCache()
    hidden = model.hidden(ids, [cache], [len(ids)])
    assert relative_norm(model.logits(hidden), wanted[0].numpy()) < 1e-5
    draft = model.mtp_logits(hidden, np.roll(ids, -1), [cache], [len(ids)])
    assert relative_norm(draft[:-1], wanted_mtp[0, :-1].numpy()) < 1e-5


def relative_norm(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)

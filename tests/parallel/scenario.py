"""What one process and several must compute alike: steps of every kind, and answers of the embedded model."""

from dataclasses import dataclass

import numpy as np

from deepspan import backends
from deepspan.backends.base import Sampling, StepBatch
from deepspan.backends.leading import Leader, follow
from deepspan.configs.schema import RunConfig
from deepspan.models.sums import held_out_sums
from deepspan.scripts.runtime import open_run
from deepspan.serving.batch import complete
from tests.specs import V2, make, random_weights

BLOCK, WIDTH, SEQUENCES = 4, 8, 8
SIZES = {"vocab_size": 84, "moe_intermediate_size": 24, "num_hidden_layers": 4}
SPECS = {
    "v3": make(**SIZES),
    "v2-lite": make(**SIZES, **V2, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, n_shared_experts=2),
}
PROMPTS = ["请介绍一下北京的景点", *(prompt for prompt, _ in held_out_sums(4, seed=3))]
# Sequence: context, new tokens. Each of the cache's quarters has the blocks of two sequences.
STEPS = [
    {0: (0, 9), 5: (0, 13), 1: (0, 1)},  # prompts beside a single token
    {0: (9, 1), 6: (0, 7), 5: (13, 3), 1: (1, 1)},  # decoding beside prompts
    {5: (16, 6), 6: (7, 1)},  # all of them in the second half: a replica without tokens
    {0: (10, 2)},
    {1: (2, 5), 6: (8, 5)},  # a replica without outputs
    {0: (0, 9)},  # once more, alone
]


@dataclass
class SlicedWeights:
    """FP32 values by name, in windows."""

    values: dict
    has_mtp: bool

    def names(self):
        return list(self.values)

    def format(self, name):
        return "f32"

    def group_size(self, name):
        return None

    def read(self, name, dtype, rows=None, cols=None):
        assert dtype == "f32"
        value = self.values[name][slice(*rows) if rows else slice(None)]
        return value if value.ndim == 1 else value[:, slice(*cols) if cols else slice(None)]


def run_config(launch=None, **parallel):
    """The embedded model's run over these degrees."""
    return RunConfig.model_validate(
        {
            "model": {"spec": "demo"},
            "device": "cpu",
            "dtype": "fp32",
            "parallel": parallel,
            "engine": {"max_batch": SEQUENCES, "max_seq_len": BLOCK * WIDTH * 4, "block_size": BLOCK},
            "launch": {"launcher": "torchrun", "timeout": 60} if parallel else {},
        }
    )


def forward(run):
    """Every result of the steps over the small specs, by name; on rank 0, nothing elsewhere."""
    found = {}
    backend = backends.load("torch_triton")
    rank = backend.start(run)
    run = run.model_copy(update={"engine": run.engine.model_copy(update={"max_seq_len": BLOCK * WIDTH})})
    for name, spec in SPECS.items():
        runner = backend.build(spec, run, rank)
        runner.load(SlicedWeights(random_weights(spec), spec.num_nextn_predict_layers > 0))
        if rank.rank > 0:
            follow(runner, rank)
            continue
        leader = Leader(runner, rank) if rank.world_size > 1 else runner
        for number, pieces in enumerate(STEPS):
            result = leader.step(step_of(spec, pieces))
            for field, values in vars(result).items():
                if values is not None:
                    found[f"{name}.{number}.{field}"] = values
        leader.close()
    return found


def step_of(spec, pieces):
    contexts, counts = (np.array(part, np.int32) for part in zip(*pieces.values(), strict=True))
    tokens = [np.random.default_rng(sequence).integers(0, spec.vocab_size, BLOCK * WIDTH) for sequence in pieces]
    spans = zip(tokens, contexts, counts, strict=True)
    return StepBatch(
        token_ids_T=np.concatenate([ids[start : start + count] for ids, start, count in spans]).astype(np.int32),
        query_lens_B=counts,
        context_lens_B=contexts,
        block_tables_BM=np.stack([table(sequence) for sequence in pieces]),
        num_outputs_B=np.array(
            [0 if sequence == 6 else min(2, new) for sequence, (_, new) in pieces.items()], np.int32
        ),
        sampling=sampling_of(list(pieces)),
        return_logits=True,
        draft=spec.num_nextn_predict_layers > 0,
        next_token_ids_B=np.arange(len(pieces), dtype=np.int32),
    )


def table(sequence):
    """A sequence's blocks, then entries that nobody reads, which make a step longer than its first message."""
    return np.append(np.arange(WIDTH) + WIDTH * sequence, np.full(1000, -1)).astype(np.int32)


def sampling_of(sequences):
    """Greedy for sequence 0, draws of all kinds for others."""
    drawn = np.array(sequences)
    return Sampling(
        temperature_B=(0.3 * drawn).astype(np.float32),
        top_k_B=np.where(drawn == 1, 7, 0).astype(np.int32),
        top_p_B=np.where(drawn == 5, 0.8, 1).astype(np.float32),
        seed_B=(2**32 - 1 - drawn).astype(np.uint32),
    )


def answers(run, tokens=12):
    """Greedy token ids of the embedded model for each prompt, through the engine; on rank 0, None elsewhere."""
    try:
        with open_run(run) as session:
            prompts = [session.tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
            options = session.generation_options(max_new_tokens=tokens, temperature=0.0)
            return [completion.token_ids for completion in complete(session.engine, prompts, options)]
    except SystemExit:
        return None

"""The abstract arguments are those of the run itself, and failures to compile are told apart."""

import jax
import numpy as np
import pytest

from gemma_cot.data import Encoded, Example
from gemma_cot.grpo.step import add_advantages, mini_batches
from gemma_cot.model.sample import Samples
from gemma_cot.optim import split_batch
from gemma_cot.plan.chips import CHIPS
from gemma_cot.plan.clock import concrete
from gemma_cot.plan.programs import NEVER, call_of, chip_bytes, gib_wanted, grpo_batch
from gemma_cot.sft import sft_batch


def described(tree):
    """Return shape, dtype and sharding of every array of a tree."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def test_an_update_gets_what_a_rollout_is_cut_into(make_setup):
    setup = make_setup()
    B, T = 16, 16 + 7
    samples = Samples(
        tokens_BT=np.zeros((B, T), np.int32), completion_mask_BT=np.ones((B, T), bool),
        logp_BT=np.zeros((B, T), np.float32), start_B=np.zeros((B,), np.int32),
        stopped_B=np.ones((B,), bool), useful_B=np.ones((B,), np.float32),
    )  # fmt: skip
    batches = mini_batches(samples, setup.cfg, setup.mesh)
    reward_PG = np.zeros((8, 2), np.float32)
    batches = add_advantages(batches, reward_PG, reward_PG == 0, setup.cfg, setup.mesh)
    assert len(batches) == setup.updates == 2
    assert described(batches[0]) == described(grpo_batch(setup, scored=False))
    added = set(grpo_batch(setup)) - set(batches[0])
    assert added == {"logp_old_BT", "logp_ref_BT"}
    assert set(grpo_batch(make_setup(beta=0.0))) - set(batches[0]) == {"logp_old_BT"}
    one = make_setup(prompts_per_rollout=4)
    assert set(grpo_batch(one)) - set(batches[0]) == {"logp_ref_BT"}


def test_sft_gets_a_batch_of_the_longest_rows(make_setup):
    setup = make_setup(max_completion_tokens=16)
    row = Encoded(Example(1, "math", "", "", {}, {}), [5] * 16, [5] * 16)
    real = split_batch(sft_batch([row] * 8, 16, 16), 4, setup.mesh)
    assert described(call_of("sft", setup).args[2]) == described(real)


def test_widths_slots_and_calls_are_those_of_the_run(make_setup):
    setup = make_setup(max_prompt_tokens=17, max_completion_tokens=7)
    assert (setup.width, setup.sft_width) == (32, 16), "multiples of 16"
    assert setup.slots("decode") == 4, "8 prompts x 2 completions over 4 devices"
    assert make_setup(rollout_slots=3).slots("decode") == 3
    assert make_setup(rollout_slots=99).slots("decode") == 4
    # 20 rows: 2 calls of 10, rounded up to 12 over 4 devices; batch 4 decodes one a device
    assert setup.eval_size == (12, 2) and setup.slots("evaluate") == 1
    assert call_of("decode", setup).static["stop_ids"] == NEVER


def test_a_chip_holds_its_shard(make_setup):
    setup = make_setup(2, 2)
    cfg = setup.model_cfg
    assert chip_bytes(setup.params["layers"]["gate"]) == 4 * 3 * 20 * 28 / 2
    assert chip_bytes(setup.params["final_norm"]) == 4 * cfg.embed_dim
    assert chip_bytes(grpo_batch(setup)["tokens_BT"]) == 4 * 4 * 1 * 23  # [4, 2, 23] int32 over 2


def test_concrete_arguments_are_as_abstract_ones_say(make_setup):
    call = call_of("decode", make_setup())
    assert described(concrete(call.options)) == described(call.options)


def test_lack_of_memory_is_told_from_other_failures():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (16.36G) exceeds available HBM (15.75G). HLO module: jit_step"
    )
    assert gib_wanted(message) == 16.36
    available = CHIPS["TPU v5 lite"].memory / 2**30
    assert f"exceeds available HBM ({available:g}G)" in message
    assert gib_wanted(message.replace("16.36G", "1.5T")) == 1536
    with pytest.raises(RuntimeError, match="INTERNAL"):
        gib_wanted("INTERNAL: Mosaic failed to compile")

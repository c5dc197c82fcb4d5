"""Stage 1, supervised fine-tuning: the adapter learns the syntax from tagged completions.

loss = -1/N sum_bt m_bt log p(token_bt | before), N = completion tokens of the whole batch, stop
tokens included, prompts never. On the same optimiser and log-probs as GRPO.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_cot.axes import replicated
from gemma_cot.config import ModelConfig
from gemma_cot.data import Encoded, sft_rows
from gemma_cot.model.logprob import logprobs_and_entropy
from gemma_cot.model.params import Params
from gemma_cot.optim import TrainState, apply_gradients, data_parallel_gradients


def sft_batch(rows: list[Encoded], width: int, target_width: int) -> dict[str, np.ndarray]:
    """Return {"tokens_BT", "start_B", "weight_BT"}: weight 1/N on target tokens, 0 elsewhere."""
    batch = sft_rows(rows, width, target_width)
    mask_BT = batch.pop("mask_BT")
    return batch | {"weight_BT": (mask_BT / mask_BT.sum()).astype(np.float32)}


def sft_loss(lora, params: Params, cfg: ModelConfig, micro: dict, width: int, remat: str):
    """Return (summed loss in nats a token, {"loss", "tokens"}) of one micro-batch."""
    logp_BT, _ = logprobs_and_entropy(
        params, cfg, micro["tokens_BT"], micro["start_B"], lora, first_column=width, remat=remat
    )
    loss = -(micro["weight_BT"] * logp_BT).sum()
    return loss, {"loss": loss, "tokens": (micro["weight_BT"] > 0).sum(dtype=jnp.float32)}


def make_sft_step(
    cfg: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, width: int, remat: str
):
    """Return the jitted step(state, params, batch) -> (state, metrics); `state` is donated.

    batch: `sft_batch` cut by `optim.split_batch`; width: columns of the prompt. Adapter and
    optimiser are replicated over `mesh`; batch and params keep the sharding they come with.
    """

    def loss_fn(lora, params, micro):
        return sft_loss(lora, params, cfg, micro, width, remat)

    gradients = data_parallel_gradients(loss_fn, mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def step(state: TrainState, params: Params, batch: dict):
        grads, metrics = gradients(state.lora, params, batch)
        state, update = apply_gradients(optimizer, state, grads, metrics["loss"])
        return state, metrics | update

    return step

"""Our losses, advantages and KL in the reward are TRL's, number for number, on the same inputs.

TRL's own trainers run their own code (`_generate_and_score_completions`, `_compute_loss`), built by
their own constructors; only what a network would answer is given: completions and log-probs.
Run with the packages of the extra `interop`: pytest -m interop tests/interop/test_trl.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.grpo.loss import group_advantages, grpo_loss, kl_penalty, token_weights

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = pytest.mark.interop

# float32 sums of 30 terms in another order; a wrong bound or normaliser is off by 1 % or more.
CLOSE = dict(rtol=2e-5, atol=2e-6)
G, L_MAX = 4, 9
LENGTHS = (6, 1, 4, 2, 3, 6, 2, 5)
MASK_BT = np.arange(6)[None, :] < np.array(LENGTHS)[:, None]
REWARD_PG = np.array([[1.0, 0.0, 2.4, 0.2], [0.0, 1.2, 1.2, 0.0]], np.float32)
NEAR, FAR = 0.02, 0.4  # of old and reference log-probs: inside most bounds, outside many


def draw(seed: int, spread: float) -> dict[str, np.ndarray]:
    """Return float32 log-probs [B, T] of policy, old and reference, about `spread` apart."""
    rng = np.random.default_rng(seed)
    logp_BT = -rng.gamma(2.0, 1.0, MASK_BT.shape)
    arrays = {"logp": logp_BT, "old": logp_BT + rng.normal(0, spread, MASK_BT.shape),
              "ref": logp_BT + rng.normal(0, spread, MASK_BT.shape)}  # fmt: skip
    return {name: value.astype(np.float32) for name, value in arrays.items()}


@pytest.fixture(scope="module")
def build(make_gemma, reload_gemma, tmp_path_factory):
    """Return build(algorithm, **settings of TRL) -> TRL's trainer, answering from `given`."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    classes = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "a", "b"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        pad_token="<pad>", eos_token="<eos>",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("trl")
    make_gemma().save_pretrained(folder / "model")
    model = reload_gemma(folder / "model")  # a copy of which becomes TRL's reference

    def make(algorithm: str, **settings):
        Trainer, Config = classes[algorithm]

        class Given(Trainer):
            """TRL's trainer; `given` are the log-probs that the network is asked for, in order."""

            given: list

            def _get_per_token_logps_and_entropies(self, *_, **__):
                logp_BT = self.given.pop(0)
                return logp_BT, torch.zeros_like(logp_BT), None

            def _generate_single_turn(self, prompts, *_, **__):
                ids = [[2] * (n - 1) + [1] for n in LENGTHS]
                return ids if algorithm == "rloo" else (ids, None)

        args = Config(
            output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, num_generations=G,
            per_device_train_batch_size=len(LENGTHS), per_device_eval_batch_size=len(LENGTHS),
            max_completion_length=L_MAX, **settings,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": "a", "row": row} for row in range(len(LENGTHS))])
        trainer = Given(
            model=model, reward_funcs=lambda row, **_: [rewards[i] for i in row], args=args,
            train_dataset=rows, processing_class=tokenizer,
        )  # fmt: skip
        rewards = trainer.rewards = REWARD_PG.reshape(-1).tolist()
        trainer.model.eval()  # a batch by itself: no accumulation to divide by
        return trainer

    return make


def score(trainer, old_BT=None, ref_BT=None) -> dict:
    """Let TRL generate and score the given completions; returns what it would train on."""
    trainer.given = [torch.tensor(x) for x in (old_BT, ref_BT) if x is not None]
    rows = [{"prompt": "a", "row": row} for row in range(len(LENGTHS))]
    batch = trainer._generate_and_score_completions(rows)
    assert not trainer.given
    np.testing.assert_array_equal(batch["completion_mask"].numpy(), MASK_BT)
    return batch


def their_loss(trainer, batch: dict, logp_BT: np.ndarray) -> tuple[float, np.ndarray]:
    """Return TRL's loss of the batch and its gradient by the policy's log-probs."""
    leaf = torch.tensor(logp_BT, requires_grad=True)
    trainer.given = [leaf]
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def our_loss(arrays, advantage_B, aggregation, on_policy, **options):
    """Return our loss and its gradient by the policy's log-probs."""
    old_BT = None if on_policy else jnp.asarray(arrays["old"])
    weight_BT = token_weights(jnp.asarray(MASK_BT), aggregation, L_MAX)
    rest = (jnp.asarray(arrays["ref"]), jnp.asarray(advantage_B), weight_BT)
    (loss, _), grad_BT = jax.value_and_grad(grpo_loss, has_aux=True)(
        jnp.asarray(arrays["logp"]), old_BT, *rest, **options
    )
    return float(loss), np.asarray(grad_BT)


# paper: (TRL's settings, our aggregation, our options)
FAMILY = {
    "GRPO": (
        dict(loss_type="grpo", epsilon=0.2, beta=0.1, use_bias_correction_kl=False),
        "grpo", dict(beta=0.1, kl="k3"),
    ),
    "GRPO with the unbiased KL": (
        dict(loss_type="grpo", epsilon=0.2, beta=0.1, use_bias_correction_kl=True),
        "grpo", dict(beta=0.1, kl="ratio_k3"),
    ),
    "Dr. GRPO": (
        dict(loss_type="dr_grpo", epsilon=0.2, scale_rewards="none"),
        "dr_grpo", {},
    ),
    "DAPO": (
        dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28),
        "dapo", dict(epsilon_high=0.28),
    ),
    "GSPO": (
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4,
             epsilon_high=4e-4),
        "grpo", dict(objective="gspo", epsilon_low=3e-4, epsilon_high=4e-4),
    ),
    "GSPO, wide": (
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.1,
             epsilon_high=0.2, beta=0.1, use_bias_correction_kl=False),
        "grpo", dict(objective="gspo", epsilon_low=0.1, epsilon_high=0.2, beta=0.1, kl="k3"),
    ),
    "CISPO": (
        dict(loss_type="cispo", epsilon_high=1.2),
        "dapo", dict(objective="cispo", epsilon_high=0.2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_has_trls_loss_and_gradient(build, name):
    theirs, aggregation, ours = FAMILY[name]
    trainer = build("grpo", **theirs)
    for seed, (spread, on_policy) in enumerate([(NEAR, False), (FAR, False), (FAR, True)]):
        arrays = draw(seed, spread)
        batch = score(trainer, ref_BT=arrays["ref"] if trainer.beta else None)
        if not on_policy:
            batch["old_per_token_logps"] = torch.tensor(arrays["old"])
        loss, grad_BT = their_loss(trainer, batch, arrays["logp"])
        advantage_PG = group_advantages(
            jnp.asarray(REWARD_PG), scale=theirs.get("scale_rewards", "group")
        )
        got, got_BT = our_loss(arrays, advantage_PG.reshape(-1), aggregation, on_policy, **ours)
        np.testing.assert_allclose(got, loss, **CLOSE)
        np.testing.assert_allclose(got_BT, grad_BT, **CLOSE)
        assert np.abs(grad_BT[MASK_BT]).max() > 1e-3


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(build, scale):
    """Also where no reward applies to a completion: left out of the group, advantage 0."""
    trainer = build("grpo", scale_rewards=scale)
    valid_PG = np.ones(REWARD_PG.shape, bool)
    for _ in range(2):
        advantage_B = score(trainer)["advantages"].numpy()
        ours_PG = group_advantages(jnp.asarray(REWARD_PG), jnp.asarray(valid_PG), scale=scale)
        np.testing.assert_allclose(ours_PG.reshape(-1), advantage_B, **CLOSE)
        trainer.rewards[2], valid_PG[0, 2] = None, False
    assert advantage_B[2] == 0.0


def test_rloo_is_trls_with_its_kl_in_the_reward(build):
    beta = 0.05
    trainer = build("rloo", beta=beta, epsilon=0.2)
    for seed, (spread, on_policy) in enumerate([(NEAR, False), (FAR, False), (FAR, True)]):
        arrays = draw(seed, spread)
        if on_policy:
            arrays["old"] = arrays["logp"]
        batch = score(trainer, arrays["old"], arrays["ref"])
        loss, grad_BT = their_loss(trainer, batch, arrays["logp"])
        kl_B = kl_penalty(*(jnp.asarray(x) for x in (arrays["old"], arrays["ref"], MASK_BT)), "k1")
        reward_PG = jnp.asarray(REWARD_PG) - beta * kl_B.reshape(REWARD_PG.shape)
        advantage_PG = group_advantages(reward_PG, scale="none", baseline="leave_one_out")
        np.testing.assert_allclose(advantage_PG.reshape(-1), batch["advantages"], **CLOSE)
        options = dict(objective="rloo", on_policy=on_policy)
        got, got_BT = our_loss(arrays, advantage_PG.reshape(-1), "grpo", **options)
        np.testing.assert_allclose(got, loss, **CLOSE)
        np.testing.assert_allclose(got_BT, grad_BT, **CLOSE)
        assert np.abs(grad_BT[MASK_BT]).max() > 1e-3

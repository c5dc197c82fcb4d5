"""The run's own jitted functions with abstract arguments: compiled, and what the result says.

The functions are those that train calls: `model.sample.sample`, `grpo.step.make_logprobs` and
`make_grpo_step`, `sft.make_sft_step`. Prefill is the first part of `sample`; it is compiled alone
too, to show its share. Knows no flag and prints nothing.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_cot.axes import per_device, replicated, round_up, sharding_of
from gemma_cot.config import ModelConfig, TrainConfig
from gemma_cot.data import WIDTH_STEP
from gemma_cot.evaluation import QUEUE
from gemma_cot.grpo.step import make_grpo_step, make_logprobs, needs_old
from gemma_cot.lora import init_lora
from gemma_cot.model.cache import prefill
from gemma_cot.model.params import Params, param_shapes
from gemma_cot.model.sample import sample
from gemma_cot.optim import init_state, make_optimizer, make_schedule
from gemma_cot.sft import make_sft_step

NEVER = (-1,)  # stop ids: no completion ends early
FUNCTIONS = ("prefill", "decode", "reference_logprobs", "update", "sft", "evaluate")


@dataclass(frozen=True)
class Setup:
    """A run on its mesh, with the widths of the longest rows that its settings let in."""

    cfg: TrainConfig
    model_cfg: ModelConfig
    mesh: Mesh
    dtype: str
    eval_rows: int

    @property
    def data(self) -> int:
        """Shards of a batch; the chips of one shard work on the same rows."""
        return self.mesh.shape["data"]

    @property
    def width(self) -> int:
        """Columns of a prompt."""
        return round_up(self.cfg.max_prompt_tokens, WIDTH_STEP)

    @property
    def sft_width(self) -> int:
        """Columns of an SFT target."""
        return round_up(self.cfg.max_completion_tokens, WIDTH_STEP)

    @property
    def updates(self) -> int:
        """Mini-batches of one rollout; it makes `num_iterations` passes over them."""
        return self.cfg.prompts_per_rollout // self.cfg.mini_batch

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimiser step."""
        rows = self.cfg.mini_batch * self.cfg.num_generations
        return rows // (self.data * self.cfg.micro_batch)

    @property
    def eval_size(self) -> tuple[int, int]:
        """Rows of a call of the sampler in evaluation, and calls, as `evaluate_batches` does."""
        calls = math.ceil(self.eval_rows / (QUEUE * self.cfg.eval_batch))
        return round_up(math.ceil(self.eval_rows / calls), self.data), calls

    def slots(self, name: str) -> int:
        """Completions that a shard decodes at a time in "decode" or "evaluate"."""
        if name == "evaluate":
            rows = self.eval_size[0] // self.data
            return min(math.ceil(self.cfg.eval_batch / self.data), rows)
        rows = self.cfg.prompts_per_rollout * self.cfg.num_generations // self.data
        return min(self.cfg.rollout_slots or rows, rows)

    def array(self, shape: tuple[int, ...], dtype, letters: str) -> jax.ShapeDtypeStruct:
        """Return an abstract array sharded by its letters."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(letters, self.mesh))

    def whole(self, make, *args):
        """Return the abstract result of make(*args), replicated."""
        on_all = replicated(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_all),
            jax.eval_shape(make, *args),
        )

    @cached_property
    def params(self) -> Params:
        """The base weights."""
        return param_shapes(self.model_cfg, self.dtype, self.mesh)

    @cached_property
    def optimizer(self):
        """The optimiser; its schedule changes no shape."""
        return make_optimizer(self.cfg, make_schedule(self.cfg.learning_rate, 100, 0.1))

    @cached_property
    def state(self):
        """Adapter and optimiser state."""
        cfg = self.cfg
        return self.whole(lambda: init_state(self.optimizer, init_lora(
            jax.random.key(0), self.model_cfg, cfg.lora_rank, cfg.lora_alpha
        )))  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of a jitted function of the run."""

    function: object  # the jitted function
    args: tuple  # trees of abstract arrays
    options: dict  # the same, by name
    static: dict  # what the program is compiled for


def call_of(name: str, setup: Setup) -> Call:
    """Return the call that the run makes of the function `name`, one of FUNCTIONS."""
    cfg, width = setup.cfg, setup.width
    if name == "prefill":
        return prefill_call(setup)
    if name == "decode":
        P, G, temperature = cfg.prompts_per_rollout, cfg.num_generations, cfg.temperature
        return sample_call(setup, P, G, temperature, cfg.rollout_slots or None)
    if name == "evaluate":
        size, _ = setup.eval_size
        return sample_call(setup, size, 1, 0.0, setup.slots(name))
    if name == "reference_logprobs":
        function = make_logprobs(setup.model_cfg, cfg, setup.mesh, width)
        return Call(function, (setup.params, setup.state.lora, grpo_batch(setup, False)), {}, {})
    if name == "update":
        function = make_grpo_step(setup.model_cfg, cfg, setup.optimizer, setup.mesh, width)
        return Call(function, (setup.state, setup.params, grpo_batch(setup)), {}, {})
    function = make_sft_step(setup.model_cfg, setup.optimizer, setup.mesh, width, cfg.remat)
    micro, rows = cfg.sft_micro_batches, cfg.sft_batch // cfg.sft_micro_batches
    batch = batch_of(setup, micro, rows, width + setup.sft_width, ("weight_BT",))
    return Call(function, (setup.state, setup.params, batch), {}, {})


def prefill_call(setup: Setup) -> Call:
    """Return the call of the first part of `sample`."""
    P, cfg = setup.cfg.prompts_per_rollout, setup.model_cfg

    def run(params, lora, tokens_PT, start_P):
        return prefill(params, cfg, tokens_PT, start_P, lora)

    function = jax.jit(per_device(run, ",,PT,P->PV,LPSKH", setup.mesh))
    tokens_PT = setup.array((P, setup.width), jnp.int32, "PT")
    start_P = setup.array((P,), jnp.int32, "P")
    return Call(function, (setup.params, setup.state.lora, tokens_PT, start_P), {}, {})


def sample_call(setup: Setup, P: int, G: int, temperature: float, slots: int | None) -> Call:
    """Return a call of `sample`."""
    number_P = setup.array((P,), jnp.int32, "P")
    tokens_PT = setup.array((P, setup.width), jnp.int32, "PT")
    key = setup.whole(lambda: jax.random.key(0))
    options = dict(
        params=setup.params, tokens_PT=tokens_PT, start_P=number_P, key=key,
        lora=setup.state.lora, prompt_id_P=number_P,
    )  # fmt: skip
    static = dict(
        cfg=setup.model_cfg, num_completions=G, max_new_tokens=setup.cfg.max_completion_tokens,
        temperature=temperature, stop_ids=NEVER, slots=slots,
    )  # fmt: skip
    return Call(sample, (), options, static)


def grpo_batch(setup: Setup, scored: bool = True) -> dict:
    """Return one of `mini_batches`, abstract, at its widest; scored: with the log-probs that an
    update needs."""
    cfg = setup.cfg
    names = ["logp_sampler_BT", "weight_BT"]
    names += ["logp_old_BT"] if scored and needs_old(cfg) else []
    names += ["logp_ref_BT"] if scored and cfg.beta else []
    rows, T = setup.data * cfg.micro_batch, setup.width + cfg.max_completion_tokens
    batch = batch_of(setup, setup.micro_batches, rows, T, names)
    return batch | {"advantage_B": setup.array((setup.micro_batches, rows), jnp.float32, "MB")}


def batch_of(setup: Setup, M: int, rows: int, T: int, names) -> dict:
    """Return an abstract batch of M micro-batches, as `split_batch` cuts it."""
    floats = {name: setup.array((M, rows, T), jnp.float32, "MBT") for name in names}
    return floats | {
        "tokens_BT": setup.array((M, rows, T), jnp.int32, "MBT"),
        "start_B": setup.array((M, rows), jnp.int32, "MB"),
    }


@dataclass(frozen=True)
class Program:
    """What compiling one function found out, for one chip; sizes in bytes."""

    seconds: float  # that compiling took
    total: float  # arguments + results - results in place of arguments + temporaries
    arguments: float
    temporaries: float
    code: float
    compiled: Callable | None  # takes the call's arguments; None when it does not fit

    @cached_property
    def text(self) -> str:
        """The compiled program as text, "" when there is none."""
        return self.compiled.as_text() if self.compiled else ""


def compile_call(setup: Setup, call: Call) -> Program:
    """Compile a call for the chips of the setup's mesh; one that does not fit is no error."""
    began = time.perf_counter()
    with jax.set_mesh(setup.mesh):
        lowered = call.function.lower(*call.args, **call.options, **call.static)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            temporaries = gib_wanted(str(error)) * 2**30
            arguments = sum(map(chip_bytes, jax.tree.leaves((call.args, call.options))))
            seconds = time.perf_counter() - began
            return Program(seconds, arguments + temporaries, arguments, temporaries, 0.0, None)
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    code = memory.generated_code_size_in_bytes
    total = arguments + fresh + temporaries
    return Program(seconds, total, arguments, temporaries, code, compiled)


def gib_wanted(message: str) -> float:
    """Return the GiB of temporaries that XLA wanted in vain. Raises RuntimeError for any other
    failure of the compiler than lack of memory."""
    found = re.search(r"temporaries \(([\d.]+)([MGT])\) exceeds available HBM", message)
    if not found:
        raise RuntimeError(message)
    return float(found[1]) * {"M": 2**-10, "G": 1, "T": 2**10}[found[2]]


def chip_bytes(array: jax.ShapeDtypeStruct) -> float:
    """Return the bytes that one chip holds of an abstract array."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return 8
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize

"""The training step of the demo models: losses, optimiser, schedule, many steps a call."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxserve.demo.data import ANSWER_BIT, ID_MASK
from jaxserve.demo.llama import Attention, Params, Shape, forward

PROMPT_WEIGHT = 0.1
"""What a prompt's token counts in the loss; an answer's token counts 1."""
WEIGHT_DECAY = 0.1
ADAM_B1, ADAM_B2 = 0.9, 0.98
CLIP_NORM = 1.0
FINAL_RATE = 0.02
"""The last learning rate, as a share of the highest."""

State = tuple[Params, optax.OptState]
Loss = Callable[[Params, Params | None, jax.Array, jax.Array, jax.Array], jax.Array]
Run = Callable[..., tuple[State, jax.Array]]


def attention_implementation() -> Attention:
    """ "cudnn" where the whole step would run with it, else None: XLA's own."""
    if jax.default_backend() != "gpu":
        return None
    q = jnp.zeros((1, 128, 4, 64), jnp.bfloat16)
    kv = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)

    def probe(q: jax.Array, kv: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(q, kv, kv, is_causal=True, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(probe, (0, 1)))(q, kv))
    except Exception as error:  # whatever cuDNN says, training goes on without it
        print(f"no cuDNN attention: {type(error).__name__}", flush=True)
        return None
    return "cudnn"


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """The parameters in the dtype of computation.

    The embedding stays as it is: its gradient adds up thousands of tokens, too many for bfloat16.
    """
    return {
        name: value if "embed" in name else value.astype(dtype) for name, value in params.items()
    }


def text_loss(shape: Shape, dtype: jnp.dtype, attention: Attention) -> Loss:
    """Weighted next-token cross-entropy (nats) on tokens, targets, weights [B, T]."""

    def loss(
        params: Params, _: Params | None, tokens: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> jax.Array:
        logits = forward(cast(params, dtype), tokens, shape, attention)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (errors * weights).sum() / weights.sum()

    return loss


def distillation_loss(
    shape: Shape, teacher_shape: Shape, dtype: jnp.dtype, attention: Attention
) -> Loss:
    """Weighted KL divergence (nats) from the teacher's next-token distribution."""

    def loss(
        params: Params,
        teacher: Params | None,
        tokens: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
    ) -> jax.Array:
        wanted = forward(cast(teacher or {}, dtype), tokens, teacher_shape, attention)
        log_wanted = jax.nn.log_softmax(jax.lax.stop_gradient(wanted))
        log_found = jax.nn.log_softmax(forward(cast(params, dtype), tokens, shape, attention))
        divergence = (jnp.exp(log_wanted) * (log_wanted - log_found)).sum(-1)
        return (divergence * weights).sum() / weights.sum()

    return loss


def optimiser() -> optax.GradientTransformation:
    """AdamW without its learning rate, which is known only when the step time is."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.scale_by_adam(ADAM_B1, ADAM_B2),
        optax.add_decayed_weights(
            WEIGHT_DECAY, mask=lambda params: {name: p.ndim > 1 for name, p in params.items()}
        ),
    )


def make_run(loss: Loss, length: int) -> Run:
    """A compiled function that makes several steps on rows of `length` tokens.

    run(state, teacher, stream uint16 [tokens], starts int32 [steps, B], rates float32 [steps])
    gives the new state and the losses [steps]. The old state's memory is reused.
    """
    transform = optimiser()

    @partial(jax.jit, donate_argnums=0)
    def run(
        state: State,
        teacher: Params | None,
        stream: jax.Array,
        starts: jax.Array,
        rates: jax.Array,
    ) -> tuple[State, jax.Array]:
        def step(state: State, inputs: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
            params, moments = state
            start, rate = inputs
            words = stream[start[:, None] + jnp.arange(length + 1)].astype(jnp.int32)
            ids = words & ID_MASK
            weights = jnp.where((words[:, 1:] & ANSWER_BIT) > 0, 1.0, PROMPT_WEIGHT)
            value, gradients = jax.value_and_grad(loss)(
                params, teacher, ids[:, :-1], ids[:, 1:], weights
            )
            changes, moments = transform.update(gradients, moments, params)
            params = jax.tree.map(lambda p, change: p - rate * change, params, changes)
            return (params, moments), value

        return jax.lax.scan(step, state, (starts, rates))

    return run


def learning_rates(total: int, peak: float) -> np.ndarray:
    """Warm-up, then a cosine: float32 [total]."""
    warm_up = max(1, min(300, total // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, total, FINAL_RATE * peak)
    return np.asarray(jax.vmap(schedule)(jnp.arange(1, total + 1)), np.float32)


def batches(starts: np.ndarray, steps: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless shuffled row starts, int32 [steps, batch]; every row once an epoch."""
    rng = np.random.default_rng(seed)
    need = steps * batch
    pool = np.empty(0, np.int32)
    while True:
        while len(pool) < need:
            pool = np.concatenate([pool, rng.permutation(starts)])
        yield pool[:need].reshape(steps, batch)
        pool = pool[need:]

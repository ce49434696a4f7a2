"""The scales of a whole run in arrays of fixed size, collected inside a compiled loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad_optax._inspect import find_state

PyTree = Any


class ScaleHistory(NamedTuple):
    r"""The running scales of steps from a whole run, for the carry of a training loop.

    It holds at most ``length`` steps of a run of any length. The stride :math:`k` is 1 at first and
    doubles whenever all rows are taken; step :math:`t` is recorded if it is a multiple,

    .. math::
        t \bmod k = 0,\qquad k \in \{1, 2, 4, \ldots\},

    in an empty row or in place of a step that is none. So the steps stay spread over the whole run,
    the first of them included, and once full the history stays full. All shapes are fixed and
    nothing is sent to the host: it runs in ``jit``, ``scan`` and ``vmap``.

    Args:
      step: int32[length], which step each row holds, counted from 0; -1 for an empty row. Rows are
        in no order: :meth:`in_order` sorts them.
      grad_scale: [length, num_layers] in the dtype of the state, the running scales.
      reference_scale: [length], the reference.
      stride: int32[], :math:`k`.
      num_seen: int32[], how many steps there have been.

    Raises:
      ValueError: ``length`` is less than 2, or there is not exactly one ``StableGradState``.

    Example:
      >>> import jax, jax.numpy as jnp, stablegrad_optax as sg
      >>> params, tx = {"kernel": jnp.ones((3, 4))}, sg.stablegrad()
      >>> def step(carry, t):
      ...     opt_state, history = carry
      ...     grads = jax.tree.map(lambda p: (t + 1) * p, params)
      ...     _, opt_state = tx.update(grads, opt_state)
      ...     return (opt_state, history.record(opt_state)), None
      >>> opt_state = tx.init(params)
      >>> start = (opt_state, sg.ScaleHistory.init(opt_state, length=4))
      >>> (opt_state, history), _ = jax.lax.scan(step, start, jnp.arange(8.0))
      >>> history.in_order().step.tolist(), history.in_order().grad_scale.shape
      ([0, 2, 4, 6], (4, 1))

    References:
      The scales are those of StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """

    step: Any  # jax.Array; NumPy's after in_order
    grad_scale: Any
    reference_scale: Any
    stride: Any
    num_seen: Any

    def __repr__(self) -> str:
        """On one line: arrays by dtype and shape."""

        def brief(value: Any) -> str:
            shape = getattr(value, "shape", ())
            return f"{value.dtype}{list(shape)}" if shape else str(value)

        fields = zip(self._fields, map(brief, self), strict=True)
        return f"ScaleHistory({', '.join(f'{name}={value}' for name, value in fields)})"

    @classmethod
    def init(cls, opt_state: PyTree, length: int = 256) -> "ScaleHistory":
        """An empty history of ``length`` rows for the layers of ``opt_state``, or of its shapes."""
        scale = find_state(opt_state).grad_scale
        if length < 2:
            raise ValueError(f"ScaleHistory.init: length must be at least 2, got {length}.")
        if len(scale.shape) != 1:
            raise ValueError(
                f"ScaleHistory.init: opt_state has scales of shape {scale.shape}, those of a batch "
                "of states: use jax.vmap(lambda s: ScaleHistory.init(s, length))."
            )
        return cls(
            step=jnp.full(length, -1, jnp.int32),
            grad_scale=jnp.zeros((length, *scale.shape), scale.dtype),
            reference_scale=jnp.zeros(length, scale.dtype),
            stride=jnp.ones((), jnp.int32),
            num_seen=jnp.zeros((), jnp.int32),
        )

    def record(self, opt_state: PyTree) -> "ScaleHistory":
        """The history with one more step, whose update returned ``opt_state``."""
        state = find_state(opt_state)

        def is_free(stride: jax.Array) -> jax.Array:
            return (self.step < 0) | (self.step % stride != 0)

        stride = jnp.where(jnp.any(is_free(self.stride)), self.stride, 2 * self.stride)
        row, is_due = jnp.argmax(is_free(stride)), self.num_seen % stride == 0

        def put(rows: jax.Array, value: jax.Array) -> jax.Array:
            return rows.at[row].set(jnp.where(is_due, value, rows[row]))

        return ScaleHistory(
            step=put(self.step, self.num_seen),
            grad_scale=put(self.grad_scale, state.grad_scale),
            reference_scale=put(self.reference_scale, state.reference_scale),
            stride=stride,
            num_seen=self.num_seen + 1,
        )

    def in_order(self) -> "ScaleHistory":
        """The rows that are taken, by step, as NumPy arrays; of one history, not of a batch."""
        step, grad_scale, reference_scale, stride, num_seen = map(np.asarray, self)
        if step.ndim != 1:
            raise ValueError(
                f"ScaleHistory.in_order: the history is a batch of shape {step.shape[:-1]}: take "
                "one out of it, as jax.tree.map(lambda leaf: leaf[0], history) does."
            )
        rows = np.argsort(step)[np.sum(step < 0) :]
        return ScaleHistory(step[rows], grad_scale[rows], reference_scale[rows], stride, num_seen)

"""A JAX profiler trace of some GRPO steps: RUN/profile, for TensorBoard, XProf or Perfetto.

The host's phases stand there under the names of their functions (jax.profiler.annotate_function),
device work under the scopes that the model's functions open by their own names (jax.named_scope).
Called by train; knows no model.
"""

from pathlib import Path

import jax


class Profile:
    """Profiles GRPO steps first to last of (first, last); (0, 0): none."""

    def __init__(self, folder: str | Path, steps: tuple[int, int]):
        self._folder, (self._first, self._last) = str(folder), steps
        self._running = False

    def turn(self, step: int, updates: int, state) -> None:
        """Begin or end the trace before a turn of the loop: `step` steps are done, `updates` come
        at most; `state` is what they gave, and is waited for."""
        wanted = step < self._last and step + updates >= self._first
        if wanted and not self._running:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would make the file far larger
            jax.profiler.start_trace(self._folder, profiler_options=options)
        elif self._running and not wanted:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        self._running = wanted

    def end(self, state) -> None:
        """End the trace, if it is still going, once `state` is there."""
        self.turn(self._last, 0, state)

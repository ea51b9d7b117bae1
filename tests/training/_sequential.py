"""The self-forcing rollout as it is defined: block after block, every frame's keys in a dictionary.

Nothing is shared with the product but the transformer: no ring, no timeline, no scan. Gradient is
taken through the whole loop.
"""

import functools

import jax
import jax.numpy as jnp

from longlive_jax.config import SamplerConfig
from longlive_jax.diffusion import schedule
from longlive_jax.models import transformer as transformer_lib
from longlive_jax.ops.windowed_attention import CachedContext


def stop(tree):
    """No gradient through any array of a tree."""
    return jax.tree.map(jax.lax.stop_gradient, tree)


@functools.cache
def passes(model, capacity, text_gradient):
    """One pass of the transformer over some frames, attending to at most `capacity` (key, value) frames."""

    @jax.jit
    def run(params, text, latents, timestep, positions, seen, count):
        prompt = model.apply({"params": params}, text, method="text_context")
        prompt = stop(prompt) if text_gradient == "none" else prompt
        context = None
        if seen is not None:
            tokens = [jnp.concatenate(list(part), axis=2) for part in seen]  # [L, B, K, N, H]
            length = jnp.full(latents.shape[0], count * seen.shape[4])
            context = CachedContext(*tokens, length)
        timesteps = jnp.full((latents.shape[0], 1), timestep, jnp.float32)
        velocity, own = model.apply(
            {"params": params}, latents, timesteps, prompt, positions=positions, context=context
        )
        frames = range(latents.shape[1])
        return velocity, [(own.key[:, :, f], own.value[:, :, f]) for f in frames]  # [L, B, P, N, H]

    def padded(params, latents, timestep, *, text, positions, seen):
        # One compilation for any number of frames seen: those beyond the length are not attended to.
        config, (batch, _, height, width, _) = model.config, latents.shape
        if capacity == 0:
            return run(params, text, latents, jnp.float32(timestep), positions, None, jnp.int32(0))
        tokens = config.frame_len(height, width)
        nothing = jnp.zeros((config.num_layers, batch, tokens, config.num_heads, config.head_dim))
        room = [*seen, *[(nothing, nothing)] * (capacity - len(seen))]
        stacked = jnp.stack([jnp.stack(part) for part in zip(*room, strict=True)])  # [2, S, L, B, P, N, H]
        return run(params, text, latents, jnp.float32(timestep), positions, stacked, jnp.int32(len(seen)))

    return padded


def seen_by(window, sink_start, start, frames):
    """The frames a block at `start` looks back at: the sink and the latest, as far as there are any."""
    latest = window.window_frames - window.block_frames - window.sink_frames
    sink = range(sink_start, sink_start + window.sink_frames)
    positions = {*sink, *range(start - latest, start)}
    return [frames[p] for p in sorted(positions) if sink_start <= p < start]


def sequential(forcing, params, texts, seeds, clips, *, switch_frame, size, straight_through):
    """All clips of a sequence.

    Args:
      texts: the prompts before and after the switch.
      clips: exit steps of the blocks, one list per clip.
      straight_through: per clip, whether later blocks reach the exit steps of earlier ones.

    Returns:
      The latents of each clip, with gradient to `params` (none from clip to clip).
    """
    window, model = forcing.generator.window, forcing.generator.transformer
    noise = jax.jit(forcing.generator.noise, static_argnums=3)
    n, history = window.block_frames, len(clips[0]) * window.block_frames
    video, results, frames, sink_start, frame, prompt = None, [], {}, 0, 0, 0
    for exits, linked in zip(clips, straight_through, strict=True):
        frames, first = stop(frames), frame
        switches_within = first < switch_frame <= first + n * (len(exits) - 1)
        for exit_step in exits:
            if prompt == 0 and frame >= switch_frame:
                prompt, sink_start = 1, max(frame - history, 0)
                past = stop(video[:, sink_start:])
                frames = recached(model, stop(params), texts[1], window, past, frame)
            positions = jnp.arange(frame, frame + n)
            run = functools.partial(
                passes(model, window.window_frames - n, forcing.text_gradient),
                text=texts[prompt],
                positions=positions,
                seen=seen_by(window, sink_start, frame, frames),
            )
            fresh = functools.partial(noise, seeds, positions, shape=size)
            graded = not switches_within or frame >= switch_frame
            x0, own = one_block(run, fresh, params, exit_step, graded=graded, linked=linked and graded)
            frames.update(zip(range(frame, frame + n), own, strict=True))
            video = x0 if video is None else jnp.concatenate([video, x0], axis=1)
            frame += n
        results.append(video[:, first:])
    return results


def one_block(run, fresh, params, exit_step, *, graded, linked):
    """x0 of a block at its exit step, and the keys and values it leaves behind."""
    table = schedule.few_step_table(SamplerConfig())
    quietly = functools.partial(run, stop(params), seen=stop(run.keywords["seen"]))
    noisy = fresh(step=0)
    for k in range(exit_step):
        x0 = noisy - table.sigmas[k] * quietly(noisy, table.timesteps[k])[0]
        noisy = (1 - table.next_sigmas[k]) * x0 + table.next_sigmas[k] * fresh(step=k + 1)
    at_exit = functools.partial(run, params) if graded else quietly
    velocity, exit_kv = at_exit(noisy, table.timesteps[exit_step])
    x0 = noisy - table.sigmas[exit_step] * velocity
    sigma = schedule.FlowSchedule().sigmas[-1]
    _, clean_kv = quietly((1 - sigma) * stop(x0) + sigma * fresh(step=len(table.sigmas)), 0.0)
    if linked:
        link = jax.tree.map(lambda kept, own: kept + (own - stop(own)), clean_kv, exit_kv)
        return x0, link
    return x0, clean_kv


def recached(model, params, text, window, past, frame):
    """Keys and values of all of `past`, in one pass in which everyone sees the sink and the latest alone."""
    count = past.shape[1]
    latest = window.window_frames - window.sink_frames
    allowed = [i for i in range(count) if i < window.sink_frames or i >= count - latest]
    return dict(
        zip(range(frame - count, frame), _restricted(model, params, text, past, frame, allowed), strict=True)
    )


def _restricted(model, params, text, past, frame, allowed):
    attend = transformer_lib.windowed_attention

    def only_allowed(query, key, value, *, context=None, implementation="auto"):
        if query.shape[1] != key.shape[1]:  # cross-attention
            return attend(query, key, value, implementation=implementation)
        tokens = key.shape[1] // past.shape[1]
        index = jnp.asarray([f * tokens + t for f in allowed for t in range(tokens)])
        return attend(query, key[:, index], value[:, index], implementation=implementation)

    transformer_lib.windowed_attention = only_allowed
    try:
        run = passes.__wrapped__(model, 0, "full")  # afresh: it has to see the attention above
        positions = jnp.arange(frame - past.shape[1], frame)
        return run(params, past, 0.0, text=text, positions=positions, seen=[])[1]
    finally:
        transformer_lib.windowed_attention = attend

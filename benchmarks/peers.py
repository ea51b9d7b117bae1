"""The part `peers` of `benchmarks.run`: a pass of the transformer beside diffusers' on PyTorch.

Both compute the text's keys and values in every pass, which the floor leaves out: diffusers has no other way.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import common, floors
from benchmarks.suites import Suite, draw, measured_rates, median_seconds
from longlive_jax.config import TransformerConfig

TIMESTEP = 500.0


def peers(suite: Suite) -> Iterator[dict[str, Any]]:
    """A block that attends to itself, in both directions and without a cache: ours and diffusers' in turn."""
    import jax
    import jax.numpy as jnp

    from longlive_jax.models.transformer import Transformer, init_params

    rates, config, dtype = measured_rates(suite), suite.transformer, jnp.dtype(suite.dtype)
    tokens = 3 * suite.frame_len
    work = floors.transformer_pass(config, tokens=tokens, keys=tokens, itemsize=suite.itemsize)
    model = Transformer(config, dtype=dtype, param_dtype=dtype)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    latents = draw(0, (1, 3, *suite.size, config.latent_channels), suite.dtype)
    text = draw(1, (1, config.text_len, config.text_dim), suite.dtype)
    ours = our_pass(model, params, latents, text)
    problem = common.absence("diffusers") or common.absence("torch")
    if problem:
        yield {"case": "ours", **work.report(median_seconds(ours, suite.repeats), rates)}
        yield {"case": "diffusers", "seconds": 0.0, "skipped": problem}
        return
    device = common.torch_device()
    peer = build_diffusers(config, params, dtype=suite.dtype, device=device)
    theirs = their_pass(peer, np.asarray(latents, np.float32), np.asarray(text, np.float32))
    expected = channels_last(theirs())
    difference = np.linalg.norm(np.asarray(ours()) - expected) / np.linalg.norm(expected)
    pairs = common.in_turn(ours, theirs, repeats=suite.repeats)
    yield {"case": "ours", **work.report(statistics.median(a for a, _ in pairs), rates)}
    yield {
        "case": f"diffusers {device}",
        "difference": f"{difference:.1e}",
        "ours_over_theirs": round(statistics.median(a / b for a, b in pairs), 3),
        **work.report(statistics.median(b for _, b in pairs), rates),
    }


def our_pass(model: Any, params: Any, latents: Any, text: Any) -> Callable[[], Any]:
    """A call that returns the finished velocity `[1, F, h, w, C]`."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def forward(params: Any, latents: Any, text: Any) -> Any:
        context = model.apply({"params": params}, text, method="text_context")
        return model.apply({"params": params}, latents, jnp.full((1, 1), TIMESTEP), context)[0]

    return lambda: jax.block_until_ready(forward(params, latents, text))


def their_pass(model: Any, latents: np.ndarray, text: np.ndarray) -> Callable[[], Any]:
    """A call of diffusers' model that returns the finished velocity `[1, C, F, h, w]`.

    Args:
      model: result of `build_diffusers`.
      latents: float32 `[1, F, h, w, C]`.
      text: float32 `[1, M, text_dim]`.
    """
    import torch

    place = {"device": model.device, "dtype": model.patch_embedding.weight.dtype}
    first = torch.tensor(np.ascontiguousarray(latents.transpose(0, 4, 1, 2, 3))).to(**place)
    prompt = torch.tensor(text).to(**place)
    timestep = torch.tensor([TIMESTEP], device=model.device)

    @torch.inference_mode()
    def forward() -> Any:
        return common.torch_wait(model(first, timestep, prompt).sample)

    return forward


def channels_last(velocity: Any) -> np.ndarray:
    """PyTorch's `[B, C, F, h, w]` as float32 `[B, F, h, w, C]`."""
    return velocity.float().cpu().numpy().transpose(0, 2, 3, 4, 1)


def build_diffusers(
    config: TransformerConfig, params: Any, *, dtype: str = "float32", device: str = "cpu"
) -> Any:
    """diffusers' model holding the same weights, through the key table.

    In half precision it keeps in float32 what diffusers keeps so when it loads a checkpoint.
    """
    import jax
    import torch
    from diffusers import WanTransformer3DModel

    from longlive_jax.convert import keys_transformer

    with torch.device(device):
        model: Any = WanTransformer3DModel(
            patch_size=config.patch,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    model.eval()
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    state = {}
    for name, rule, layer in keys_transformer.diffusers_table(config).sources():
        leaf = wide
        for key in rule.target.split("/"):
            leaf = leaf[key]
        leaf = leaf if layer is None else leaf[layer]
        state[name] = torch.tensor(np.ascontiguousarray(rule.to_source(leaf)))
    model.load_state_dict(state)
    kept = set(WanTransformer3DModel._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model

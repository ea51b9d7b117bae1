"""Key tables of the transformer: the original Wan layout and the diffusers layout."""

from longlive_jax.config import TransformerConfig
from longlive_jax.convert.table import Rule, Table, Transform

_LINEAR = ("weight", "kernel", Transform.LINEAR), ("bias", "bias", Transform.SAME)
_ATTENTION = ("q", "k", "v", "o")


def _linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.{theirs}", f"{target}/{ours}", how) for theirs, ours, how in _LINEAR]


def table(config: TransformerConfig) -> Table:
    """Wan2.1's own names (`diffusion_pytorch_model.safetensors`); 825 tensors for wan_1_3b."""
    rules = [
        Rule("patch_embedding.weight", "patch_embed/kernel", Transform.PATCH, patch=config.patch[1:]),
        Rule("patch_embedding.bias", "patch_embed/bias"),
        *_linear("text_embedding.0", "text_embed/fc1"),
        *_linear("text_embedding.2", "text_embed/fc2"),
        *_linear("time_embedding.0", "time_embed/fc1"),
        *_linear("time_embedding.2", "time_embed/fc2"),
        *_linear("time_projection.1", "time_proj"),
        Rule("blocks.{layer}.modulation", "blocks/modulation", Transform.DROP_FIRST),
    ]
    for part in ("self_attn", "cross_attn"):
        for name in _ATTENTION:
            rules += _linear(f"blocks.{{layer}}.{part}.{name}", f"blocks/{part}/{name}")
        for name in ("norm_q", "norm_k"):
            rules.append(Rule(f"blocks.{{layer}}.{part}.{name}.weight", f"blocks/{part}/{name}/scale"))
    rules += [
        Rule("blocks.{layer}.norm3.weight", "blocks/cross_norm/scale"),
        Rule("blocks.{layer}.norm3.bias", "blocks/cross_norm/bias"),
        *_linear("blocks.{layer}.ffn.0", "blocks/ffn/fc1"),
        *_linear("blocks.{layer}.ffn.2", "blocks/ffn/fc2"),
        Rule("head.modulation", "head/modulation", Transform.DROP_FIRST),
        *_linear("head.head", "head/proj"),
    ]
    return Table(tuple(rules), config.num_layers)


def diffusers_table(config: TransformerConfig) -> Table:
    """Names of diffusers' WanTransformer3DModel. Beware: its norm2 is Wan's norm3 (affine, before
    cross-attention), and its norm3 is Wan's norm2 (which has no parameters)."""
    embedder = "condition_embedder"
    rules = [
        Rule("patch_embedding.weight", "patch_embed/kernel", Transform.PATCH, patch=config.patch[1:]),
        Rule("patch_embedding.bias", "patch_embed/bias"),
        *_linear(f"{embedder}.text_embedder.linear_1", "text_embed/fc1"),
        *_linear(f"{embedder}.text_embedder.linear_2", "text_embed/fc2"),
        *_linear(f"{embedder}.time_embedder.linear_1", "time_embed/fc1"),
        *_linear(f"{embedder}.time_embedder.linear_2", "time_embed/fc2"),
        *_linear(f"{embedder}.time_proj", "time_proj"),
        Rule("blocks.{layer}.scale_shift_table", "blocks/modulation", Transform.DROP_FIRST),
    ]
    projections = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        for name, projection in projections.items():
            rules += _linear(f"blocks.{{layer}}.{theirs}.{projection}", f"blocks/{ours}/{name}")
        for name in ("norm_q", "norm_k"):
            rules.append(Rule(f"blocks.{{layer}}.{theirs}.{name}.weight", f"blocks/{ours}/{name}/scale"))
    rules += [
        Rule("blocks.{layer}.norm2.weight", "blocks/cross_norm/scale"),
        Rule("blocks.{layer}.norm2.bias", "blocks/cross_norm/bias"),
        *_linear("blocks.{layer}.ffn.net.0.proj", "blocks/ffn/fc1"),
        *_linear("blocks.{layer}.ffn.net.2", "blocks/ffn/fc2"),
        Rule("scale_shift_table", "head/modulation", Transform.DROP_FIRST),
        *_linear("proj_out", "head/proj"),
    ]
    return Table(tuple(rules), config.num_layers)

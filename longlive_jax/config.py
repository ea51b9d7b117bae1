"""Every knob of the product, as frozen dataclasses, and the presets built from them.

A knob has one home. `PipelineConfig` is what a checkpoint directory stores as `config.json`; the
trainer and the command line take the same objects and change them with dotted overrides
(`window.sink_frames=0`), which are checked for name, type and sense before anything runs.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

from longlive_jax.errors import UserError, require

DType = Literal["bfloat16", "float32"]
RopeMode = Literal["absolute", "relative", "jittered"]
SwitchPolicy = Literal["recache", "keep", "clear", "flush", "cut"]
Prediction = Literal["v", "x0"]
RematPolicy = Literal["none", "dots", "full"]
"""What a layer keeps for the backward pass: everything, matrix products only, or its input only."""
AttentionImplementation = Literal["auto", "reference", "cudnn", "pallas_mosaic_gpu"]
Recipe = Literal["none", "int8", "int8-rotated", "int8-weight-only", "fp8", "fp8-weight-only"]
"""How the transformer's linear layers are stored and multiplied; `longlive_jax.quantize.recipes`."""
VAEFamily = Literal["wan", "taehv"]
"""Architecture of the video autoencoder: Wan2.1's (LightVAE is a narrow one), or the tiny TAEHV."""
CacheDType = Literal["same", "int8", "fp8"]
"""How keys and values are kept between blocks: as they are computed, or in 8 bits."""

# Per-channel statistics of the released Wan2.1 VAE's latents (algorithm.md of the paper's release).
WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name}={value} must be positive")


KEEP_EVERYTHING = -1
"""`window_frames` value for an unbounded window."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of the Wan diffusion transformer (bidirectional and causal use are the same weights).

    Attributes:
      dim: model width D.
      ffn_dim: hidden width of the feed-forward layers.
      num_heads: attention heads N; `dim` must divide by it and the head size must be even.
      num_layers: blocks L.
      freq_dim: width of the sinusoidal timestep embedding (even).
      text_dim: width of the text encoder's output.
      text_len: text tokens M every prompt is padded to; all of them are attended to.
      latent_channels: channels C of the latents, in and out.
      patch: (frames, rows, columns) of latent that become one token; frames must be 1.
      eps: epsilon of every normalisation.
      prediction: what the network's output stands for, the velocity "v" (the released models) or the clean
        latents "x0". The model returns a velocity in both cases. A token holds as many values as a narrow
        model has channels, or half as many; then it cannot carry the noise that "v" asks for.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    prediction: Prediction = "v"

    def __post_init__(self) -> None:
        _require_positive(self, "dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len")
        require(
            self.dim % self.num_heads == 0 and (self.dim // self.num_heads) % 2 == 0,
            f"transformer.num_heads={self.num_heads} must split dim={self.dim} into heads of even size",
        )
        require(self.freq_dim % 2 == 0, f"transformer.freq_dim={self.freq_dim} must be even")
        require(
            len(self.patch) == 3 and self.patch[0] == 1,
            f"transformer.patch={self.patch} must be (1, rows, columns): a token belongs to one frame",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one patch: what the input projection reads and the head writes."""
        return self.patch[0] * self.patch[1] * self.patch[2] * self.latent_channels

    def frame_len(self, height: int, width: int) -> int:
        """Patch tokens P of one latent frame of `height` x `width` latent cells."""
        _, rows, columns = self.patch
        require(
            height % rows == 0 and width % columns == 0,
            f"latent size {height}x{width} must be a multiple of the patch {rows}x{columns}",
        )
        return (height // rows) * (width // columns)


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of the umT5 encoder.

    Attributes:
      vocab_size: token ids are in [0, vocab_size).
      dim: width of the embeddings and of the output.
      attn_dim: summed width of all heads (equal to `dim` in the released model).
      ffn_dim: hidden width of the gated feed-forward layers.
      num_heads: attention heads.
      num_layers: blocks; each has its own relative-position table.
      num_buckets: relative-position buckets, half of them for each direction.
      max_distance: distances from here on share the last bucket.
      text_len: tokens a prompt is truncated and padded to.
      pad_id: token id of the padding.
      eps: epsilon of the RMS norms.
    """

    vocab_size: int = 256384
    dim: int = 4096
    attn_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512
    pad_id: int = 0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "dim", "ffn_dim", "num_heads", "num_layers", "text_len")
        require(
            self.attn_dim % self.num_heads == 0,
            f"text_encoder.num_heads={self.num_heads} must divide attn_dim={self.attn_dim}",
        )

    @property
    def head_dim(self) -> int:
        return self.attn_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of the causal Wan VAE, or of a small one for its latents, and the latents' statistics.

    Attributes:
      dim: channels of the first level (with TAEHV of all of the encoder's).
      z_dim: latent channels.
      dim_mult: channel multiplier per level; each level after the first halves rows and columns.
      num_res_blocks: residual blocks per level in the encoder (the decoder has one more; not TAEHV's).
      temporal_downsample: for each of the len(dim_mult) - 1 downsamplings, whether it halves time too.
      latent_mean: per-channel mean; latents are (z - mean) / std.
      latent_std: per-channel standard deviation.
      family: the architecture. TAEHV has normalised latents of its own accord and ignores the statistics.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD
    family: VAEFamily = "wan"

    def __post_init__(self) -> None:
        _require_positive(self, "dim", "z_dim", "num_res_blocks")
        require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            f"vae.temporal_downsample={self.temporal_downsample} needs {len(self.dim_mult) - 1} entries",
        )
        require(
            len(self.latent_mean) == len(self.latent_std) == self.z_dim,
            f"vae.latent_mean and latent_std need z_dim={self.z_dim} entries each",
        )

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell, along rows and along columns."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame, after the first latent (which holds one video frame)."""
        return 2 ** sum(self.temporal_downsample)

    def video_frames(self, latent_frames: int) -> int:
        """Video frames that `latent_frames` latents decode to: F -> stride * (F - 1) + 1."""
        return self.temporal_stride * (latent_frames - 1) + 1 if latent_frames > 0 else 0

    def latent_frames(self, video_frames: int) -> int:
        """Fewest latents that decode to at least `video_frames` frames."""
        return -(-(video_frames - 1) // self.temporal_stride) + 1 if video_frames > 0 else 0


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """What a block of the causal rollout attends to.

    Attributes:
      window_frames: latent frames attended in all, sink and current block included; -1 keeps everything.
      sink_frames: first frames of the video that are never evicted.
      block_frames: frames generated together.
      rope: "absolute" frame positions, "relative" to the window (the release's infinite mode), or "jittered":
        absolute, with a rotary base of its own for every head, against the collapse onto the sink.
    """

    window_frames: int = 12
    sink_frames: int = 3
    block_frames: int = 3
    rope: RopeMode = "absolute"

    def __post_init__(self) -> None:
        _require_positive(self, "block_frames")
        require(self.sink_frames >= 0, f"window.sink_frames={self.sink_frames} must be 0 or more")
        if self.window_frames == KEEP_EVERYTHING:
            return
        require(
            self.window_frames >= self.sink_frames + self.block_frames,
            f"window.window_frames={self.window_frames} must be at least sink_frames + block_frames = "
            f"{self.sink_frames + self.block_frames} (the window counts both), or -1 to keep everything",
        )

    @property
    def is_bounded(self) -> bool:
        return self.window_frames != KEEP_EVERYTHING

    def cache_frames(self, total_frames: int | None = None) -> int:
        """Slots the cache needs: everything a block attends to except the block itself.

        Args:
          total_frames: length of the video in latent frames; only an unbounded window needs it.
        """
        if self.is_bounded:
            return self.window_frames - self.block_frames
        if total_frames is None:
            raise UserError("window.window_frames=-1 keeps everything: give the number of frames in advance")
        return max(total_frames - self.block_frames, 0)


def even_steps(count: int) -> tuple[int, ...]:
    """Evenly spread denoising timesteps from 1000 down; four of them are the paper's."""
    return tuple(round(1000 * (count - i) / count) for i in range(count))


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The few-step sampler.

    Attributes:
      steps: denoising timesteps, falling, in (0, 1000].
      opening_steps: those of a video's first block, which has no past to follow and which all later ones
        follow; empty for `steps`. More of them cost a little time once.
      warp_steps: read the steps as indices into the shifted table (entry k is table[1000 - k]).
      shift: timestep shift of the flow-matching schedule.
      context_noise: timestep of the pass that writes the finished block into the cache, in [0, 1000).
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    opening_steps: tuple[int, ...] = ()
    warp_steps: bool = True
    shift: float = 5.0
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        require(len(self.steps) > 0, "sampler.steps=() must hold at least one timestep")
        for name in ("steps", "opening_steps"):
            steps = getattr(self, name)
            require(
                all(0 < s <= 1000 for s in steps) and all(a > b for a, b in itertools.pairwise(steps)),
                f"sampler.{name}={steps} must fall strictly and lie in (0, 1000]",
            )
        require(self.shift > 0, f"sampler.shift={self.shift} must be positive")
        require(
            0 <= self.context_noise < 1000, f"sampler.context_noise={self.context_noise} must be in [0, 1000)"
        )

    @property
    def opening(self) -> "SamplerConfig":
        """The sampler of a video's first block."""
        return dataclasses.replace(self, steps=self.opening_steps or self.steps, opening_steps=())

    @property
    def running(self) -> "SamplerConfig":
        """The sampler of all other blocks."""
        return dataclasses.replace(self, opening_steps=())


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
    """What happens to the cache when the prompt changes.

    Attributes:
      policy: "recache" rebuilds it from the generated latents under the new prompt, "keep" leaves it,
        "clear" empties it (a hard start over), "flush" keeps the sink and the last two frames, "cut" does
        the same and sets the next block far from them in time (a hard cut to another scene).
      keep_sink: with "recache", leave the first frames' keys and values as they are.
    """

    policy: SwitchPolicy = "recache"
    keep_sink: bool = True


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """Default size and rate of the generated video, in pixels and frames per second."""

    height: int = 480
    width: int = 832
    fps: int = 16

    def __post_init__(self) -> None:
        _require_positive(self, "height", "width", "fps")


MIN_VAE_TILE = 16
"""Smaller tiles are mostly halo."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Everything that decides what a prompt becomes, apart from the weights and the seed.

    `dtype` is the precision of the matrix products and activations; parameters keep the precision
    they are stored in. `quantization` says which of the transformer's layers are 8-bit numbers, and
    `cache_dtype` whether the keys and values of earlier blocks are. `vae_tile` makes the VAE decode in
    squares of so many cells a side at every level of resolution (0: whole frames), for frames that do not
    fit; the result is the same up to rounding.
    """

    name: str
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VAEConfig
    window: WindowConfig = WindowConfig()
    sampler: SamplerConfig = SamplerConfig()
    switch: SwitchConfig = SwitchConfig()
    video: VideoConfig = VideoConfig()
    dtype: DType = "bfloat16"
    attention: AttentionImplementation = "auto"
    quantization: Recipe = "none"
    cache_dtype: CacheDType = "same"
    vae_tile: int = 0

    def __post_init__(self) -> None:
        require(
            self.vae_tile == 0 or self.vae_tile >= MIN_VAE_TILE,
            f"vae_tile={self.vae_tile} must be at least {MIN_VAE_TILE}, or 0 for whole frames",
        )
        transformer, text = self.transformer, self.text_encoder
        require(
            (transformer.text_dim, transformer.text_len) == (text.dim, text.text_len),
            f"transformer.text_dim/text_len={transformer.text_dim}/{transformer.text_len} must equal "
            f"text_encoder.dim/text_len={text.dim}/{text.text_len}",
        )
        require(
            transformer.latent_channels == self.vae.z_dim,
            f"transformer.latent_channels={transformer.latent_channels} must equal vae.z_dim="
            f"{self.vae.z_dim}",
        )
        self.latent_size(self.video.height, self.video.width)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of a `height` x `width` video; refuses sizes that do not divide."""
        stride = self.vae.spatial_stride
        rows, columns = stride * self.transformer.patch[1], stride * self.transformer.patch[2]
        require(
            height > 0 and height % rows == 0, f"height={height} must be a positive multiple of {rows} pixels"
        )
        require(
            width > 0 and width % columns == 0,
            f"width={width} must be a positive multiple of {columns} pixels",
        )
        return height // stride, width // stride


# --- presets ------------------------------------------------------------------------------------

WAN_1_3B = TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
UMT5_XXL = TextEncoderConfig()
WAN_VAE = VAEConfig()
LIGHT_VAE = VAEConfig(dim=24)
"""LightVAE (`lightvaew2_1`): Wan's with three quarters of the channels pruned."""
TAEW2_1 = VAEConfig(
    dim=64,
    dim_mult=(1, 1, 2, 4),
    num_res_blocks=3,
    temporal_downsample=(True, True, False),
    latent_mean=(0.0,) * 16,
    latent_std=(1.0,) * 16,
    family="taehv",
)
"""TAEHV for the latents of Wan2.1."""

_TINY_TEXT = TextEncoderConfig(
    vocab_size=64, dim=32, attn_dim=32, ffn_dim=64, num_heads=4, num_layers=2, text_len=16
)

PRESETS: Mapping[str, PipelineConfig] = {
    "wan_1_3b": PipelineConfig(name="wan_1_3b", transformer=WAN_1_3B, text_encoder=UMT5_XXL, vae=WAN_VAE),
    "wan_14b": PipelineConfig(name="wan_14b", transformer=WAN_14B, text_encoder=UMT5_XXL, vae=WAN_VAE),
    # For tests and dry runs: every part, a few thousand parameters each.
    "tiny": PipelineConfig(
        name="tiny",
        transformer=TransformerConfig(
            dim=64, ffn_dim=128, num_heads=4, num_layers=2, freq_dim=32, text_dim=32, text_len=16
        ),
        text_encoder=_TINY_TEXT,
        vae=VAEConfig(dim=4),
        video=VideoConfig(height=32, width=48),
        dtype="float32",
    ),
    # The procedural world: trained on two CPU cores, shipped with the package. float32 is the faster on CPU.
    "toy": PipelineConfig(
        name="toy",
        transformer=TransformerConfig(
            dim=128,
            ffn_dim=512,
            num_heads=4,
            num_layers=6,
            freq_dim=128,
            text_dim=64,
            text_len=16,
            prediction="x0",
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=32, dim=64, attn_dim=64, ffn_dim=128, num_heads=4, num_layers=2, text_len=16
        ),
        vae=VAEConfig(
            dim=8, dim_mult=(1, 2, 4, 8), num_res_blocks=1, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16
        ),
        video=VideoConfig(height=64, width=64),
        # As in its long tuning (and in the release's): a recache rebuilds the sink, too.
        switch=SwitchConfig(keep_sink=False),
        dtype="float32",
    ),
}


def preset(name: str) -> PipelineConfig:
    """Returns the preset called `name`; the error lists the names there are."""
    if name not in PRESETS:
        raise UserError(f"preset={name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def with_vae(config: PipelineConfig, other: PipelineConfig, name: str) -> PipelineConfig:
    """`config` with the VAE of another one.

    Args:
      config: of the model that generates.
      other: of the checkpoint that the VAE is taken from.
      name: of that checkpoint, for the error.

    Raises:
      UserError: it is for other latents.
    """
    for setting in ("z_dim", "spatial_stride", "temporal_stride"):
        ours, theirs = (getattr(each.vae, setting) for each in (config, other))
        require(
            ours == theirs,
            f"vae={name}: its {setting} is {theirs} and the model's is {ours}; give an autoencoder made for "
            "this model",
        )
    return dataclasses.replace(config, vae=other.vae)

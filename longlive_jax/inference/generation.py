"""What a whole run of `longlive generate` does, as a config file.

longlive generate --config configs/wan/interactive.py
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from longlive_jax import config_module
from longlive_jax.config import PRESETS
from longlive_jax.config_dict import override
from longlive_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Generation:
    """Prompts in, videos out. What the command line says goes before.

    Attributes:
      checkpoint: directory of the weights, or the name of a bundled checkpoint.
      prompts: prompt file, .txt or .jsonl.
      frames: latent frames of each video.
      seed: of the first video; the next ones count up.
      switch_frames: where the later prompts of a story begin, for lines that do not say it.
      weights: which of the checkpoint's weights.
      settings: dotted overrides of the checkpoint's config.
    """

    checkpoint: str
    prompts: str
    frames: int
    seed: int = 0
    switch_frames: tuple[int, ...] = ()
    weights: Literal["auto", "transformer", "transformer_ema"] = "auto"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.frames > 0, f"frames={self.frames} must be at least 1")
        require(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        # Any preset has every setting: a name or type that is wrong shows here, before weights are opened.
        override(PRESETS["wan_1_3b"], self.settings)


def load_generation(path: str | pathlib.Path) -> Generation:
    """Reads a config file.

    Raises:
      UserError: the file, or what it returns, is not usable.
    """
    config: Generation = config_module.load(path, Generation, example="configs/wan/inference.py")
    return config

"""Configs of the stages of flow matching: `teacher` and `causal_init`."""

import dataclasses
from typing import Literal

from longlive_jax.errors import require
from longlive_jax.training.config.shared import ClipsConfig, Training, at_least


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Flow matching on encoded clips.

    Attributes:
      shift: timestep shift of the noise levels that are drawn, and of the evaluation's samples.
      levels: law of the levels before the shift: uniform in (0, 1), or the logistic function of a standard
        normal, which draws few levels near 0 and 1 (arXiv 2403.03206, section 3.1).
      text_dropout: share of clips that are trained without a prompt, for guidance.
      causal_share: share of every batch that is trained block by block after a clean past; the others
        see all frames at once.
      past_noise: largest noise level of that past; a little makes the model forgive its own errors.
      frame_levels: share of the others whose frames have a noise level each (diffusion forcing, arXiv
        2407.01392). A clear frame beside a noisy one teaches how frames follow from each other, which
        at one level for all takes a small model many times longer to find out.
      sample_steps: Euler steps of the evaluation's samples.
      guidance: scale of their guidance; 1 is none.
      encoded_frames: latent frames that are encoded per clip, of which the first `data.frames` are used, so
        that stages with clips of different lengths share them; 0 encodes what is used.
      switch_share: share of the clips in which other attributes begin at some later block. They go by the
        caption of these; the frames before are seen and not learned, as those before a prompt switch are at
        inference.
      cache_folder: where encoded clips are kept; "" puts them beside the run's folder.
    """

    shift: float = 3.0
    levels: Literal["uniform", "logit_normal"] = "uniform"
    text_dropout: float = 0.1
    causal_share: float = 0.0
    past_noise: float = 0.0
    frame_levels: float = 0.0
    sample_steps: int = 20
    guidance: float = 1.0
    encoded_frames: int = 0
    switch_share: float = 0.0
    cache_folder: str = ""

    def __post_init__(self) -> None:
        require(self.shift > 0, f"flow.shift={self.shift} must be positive")
        for name in ("text_dropout", "causal_share", "past_noise", "frame_levels", "switch_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"flow.{name}={value} must be in [0, 1]")
        at_least("flow", self, sample_steps=1, guidance=0, encoded_frames=0)


CausalMethod = Literal["teacher_forcing", "ode"]


@dataclasses.dataclass(frozen=True)
class CausalFlowConfig(FlowConfig):
    """How the student is made causal.

    Attributes:
      causal_share: see `FlowConfig`; all of the batch.
      method: "teacher_forcing" is flow matching on clips. "ode" regresses the end of the teacher's own
        trajectories (`training.trajectories`) from their states at the student's denoising steps; then
        `shift`, `sample_steps` and `guidance` are those of the solver, `data.examples` counts trajectories,
        and evaluations sample in the student's few steps.
    """

    causal_share: float = 1.0
    method: CausalMethod = "teacher_forcing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "ode":
            for name, wanted, why in (
                ("causal_share", 1, "the student is causal"),
                ("text_dropout", 0, "a trajectory belongs to its prompt"),
                ("encoded_frames", 0, "a trajectory has data.frames frames"),
                ("switch_share", 0, "a trajectory has one prompt"),
            ):
                value = getattr(self, name)
                require(value == wanted, f"flow.{name}={value} must be {wanted} with flow.method=ode: {why}")


@dataclasses.dataclass(frozen=True)
class FlowTraining(Training):
    """What the stages that learn from encoded clips share."""

    data: ClipsConfig
    flow: FlowConfig = FlowConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        causal = self.data.batch_size * self.flow.causal_share / self.run.micro_batches
        require(
            causal == int(causal),
            f"flow.causal_share={self.flow.causal_share} of data.batch_size={self.data.batch_size} in "
            f"run.micro_batches={self.run.micro_batches} parts must be a whole number of clips",
        )
        apart = (self.data.batch_size / self.run.micro_batches - causal) * self.flow.frame_levels
        require(
            apart == int(apart),
            f"flow.frame_levels={self.flow.frame_levels} of the clips that are not causal, of each part of a "
            f"batch (data.batch_size={self.data.batch_size}, run.micro_batches={self.run.micro_batches}, "
            f"flow.causal_share={self.flow.causal_share}) must be a whole number of clips",
        )
        require(
            self.flow.encoded_frames in (0, max(self.flow.encoded_frames, self.data.frames)),
            f"flow.encoded_frames={self.flow.encoded_frames} must be 0 or at least data.frames="
            f"{self.data.frames}",
        )
        block = self.model.window.block_frames
        require(
            causal == 0 or self.data.frames % block == 0,
            f"data.frames={self.data.frames} must be a multiple of model.window.block_frames={block}",
        )
        require(
            self.flow.switch_share == 0 or self.data.frames > block,
            f"data.frames={self.data.frames} must be more than model.window.block_frames={block} for clips "
            "that switch (flow.switch_share)",
        )


@dataclasses.dataclass(frozen=True)
class TeacherTraining(FlowTraining):
    """Stage `teacher`: the bidirectional model, by flow matching on the VAE's latents."""


@dataclasses.dataclass(frozen=True)
class CausalInitTraining(FlowTraining):
    """Stage `causal_init`: the block-causal student, from the teacher's weights."""

    flow: CausalFlowConfig = CausalFlowConfig()

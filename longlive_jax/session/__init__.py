"""Live videos: a session's frames come out block by block, prompts and settings go in at any time.

`session` is the state machine, `turn` what happens at a block boundary, `types` what goes in and out,
`recording` the session file.
"""

from longlive_jax.session.recording import Recording
from longlive_jax.session.session import Session
from longlive_jax.session.types import BlockInfo, FrameBlock, Place, SessionError, Snapshot, Timings

__all__ = ["BlockInfo", "FrameBlock", "Place", "Recording", "Session", "SessionError", "Snapshot", "Timings"]

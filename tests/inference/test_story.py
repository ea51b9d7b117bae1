"""Stories: prompt files are read as documented and every mistake in them is named with its line."""

import json
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlive_jax.config import WAN_VAE, VAEConfig
from longlive_jax.errors import UserError
from longlive_jax.inference import story as stories
from longlive_jax.inference.story import PromptSwitch, Story

RATE = {"vae": WAN_VAE, "fps": 16}


def read(tmp_path, text: str | bytes, name: str = "prompts.jsonl", **options):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return stories.read_stories(tmp_path / name, **RATE, **options)


# --- frames, blocks and seconds ---------------------------------------------------------------------


def test_a_switch_takes_effect_at_the_next_block_start():
    # The release's own examples, blocks of 3.
    assert [stories.effective_frame(f, 3) for f in (4, 11, 20, 12)] == [6, 12, 21, 12]
    assert [stories.effective_frame(f, 1) for f in (1, 7)] == [1, 7]


def test_prompt_at_follows_the_blocks():
    story = Story("a", (PromptSwitch(4, "b"), PromptSwitch(9, "c")))
    shown = "".join(story.prompt_at(f, block_frames=3) for f in range(15))
    assert shown == "aaaaaabbbcccccc"
    assert "".join(story.prompt_at(f, block_frames=5) for f in range(15)) == "aaaaabbbbbccccc"


def test_seconds_are_the_videos_seconds():
    assert stories.frames_from_seconds(0, **RATE) == 0
    assert stories.frames_from_seconds(1 / 16, **RATE) == 1  # the first latent is one video frame
    assert stories.frames_from_seconds(1, **RATE) == 5  # 1 + 4 * 4 = 17 video frames are needed for 16
    assert stories.frames_from_seconds(2, **RATE) == 9
    assert stories.seconds_from_frames(21, **RATE) == 81 / 16
    with pytest.raises(UserError, match="must be a number that is not negative"):
        stories.frames_from_seconds(-1, **RATE)
    with pytest.raises(UserError, match="seconds=inf"):
        stories.frames_from_seconds(float("inf"), **RATE)


def test_times_and_durations():
    assert [stories.time_of(text) for text in ("40", "10s", "0.5 s", ".5s")] == [
        (40, None), (None, 10), (None, 0.5), (None, 0.5),
    ]  # fmt: skip
    assert [stories.frames_lasting(seconds, **RATE) for seconds in (0, 0.25, 1, 1.01)] == [0, 1, 4, 5]
    assert [stories.blend_blocks(frames, 3) for frames in (None, 0, 1, 3, 4)] == [1, 1, 1, 1, 2]


@given(
    frames=st.integers(0, 5000),
    fps=st.integers(1, 60),
    halvings=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_seconds_round_trip(frames, fps, halvings):
    vae = VAEConfig(temporal_downsample=tuple(halvings))
    seconds = stories.seconds_from_frames(frames, vae=vae, fps=fps)
    assert stories.frames_from_seconds(seconds, vae=vae, fps=fps) == frames


def test_schedule_must_show_every_prompt():
    late = Story("a", (PromptSwitch(19, "b"),))
    stories.check_schedule(late, frames=22, block_frames=3)
    with pytest.raises(UserError, match=r"frame 19 takes effect at frame 21, but the video has 21"):
        stories.check_schedule(late, frames=21, block_frames=3)
    for blend, words in ((6, None), (7, "reaches its prompt at frame 12, but the next prompt begins at")):
        story = Story("a", (PromptSwitch(4, "b", blend_frames=blend), PromptSwitch(12, "c")))
        if words is None:
            stories.check_schedule(story, frames=21, block_frames=3)
        else:
            with pytest.raises(UserError, match=words):
                stories.check_schedule(story, frames=21, block_frames=3)
    with pytest.raises(UserError, match="reaches its prompt at frame 21, but the video ends at frame 21"):
        stories.check_schedule(
            Story("a", (PromptSwitch(15, "b", blend_frames=9),)), frames=21, block_frames=3
        )
    close = Story("a", (PromptSwitch(4, "b"), PromptSwitch(6, "c")))
    stories.check_schedule(close, frames=21, block_frames=2)
    with pytest.raises(UserError, match=r"both take effect at frame 6 \(blocks have 3 frames\)"):
        stories.check_schedule(close, frames=21, block_frames=3)


# --- stories ----------------------------------------------------------------------------------------


def test_as_stories_takes_what_people_pass():
    story = Story("b", (PromptSwitch(3, "c"),))
    assert stories.as_stories("a") == (Story("a"),)
    assert stories.as_stories(story) == (story,)
    assert stories.as_stories(["a", story]) == (Story("a"), story)
    with pytest.raises(UserError, match="at least one"):
        stories.as_stories([])


def test_stories_are_hashable_even_when_built_with_lists():
    assert len({Story("a", [PromptSwitch(3, "b")]), Story("a", (PromptSwitch(3, "b"),))}) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Story("  "), "must be text that is not blank"),
        (lambda: Story(None), "prompt=None must be text"),
        (lambda: PromptSwitch(0, "a"), "switch frame 0 must be a whole number of latent frames, 1 or more"),
        (lambda: PromptSwitch(True, "a"), "switch frame True"),
        (lambda: PromptSwitch(2.5, "a"), r"switch frame 2\.5"),
        (
            lambda: PromptSwitch(3, "a", policy="forget"),
            "policy='forget' must be one of recache, keep",
        ),
        (lambda: PromptSwitch(3, "a", keep_sink="no"), "keep_sink='no' must be true or false"),
        (lambda: PromptSwitch(3, "a", blend_frames=-1), "blend_frames=-1 must be a whole number"),
        (lambda: PromptSwitch(3, "a", blend_frames=1.5), r"blend_frames=1\.5 must be a whole number"),
        (lambda: PromptSwitch(3, "a", curve="wavy"), "curve='wavy' must be one of linear, spherical"),
        (lambda: Story("a", (PromptSwitch(6, "b"), PromptSwitch(6, "c"))), "6, 6 must rise"),
        (lambda: stories.story_from_prompts([]), "at least one"),
        (lambda: stories.story_from_prompts(["a", "b"]), "2 prompts need 1 switch frames, not 0"),
        (lambda: stories.story_from_prompts(["a"], [3]), "1 prompts need 0 switch frames, not 1"),
        (lambda: stories.story_from_prompts(["a", "b", "c"], [9, 3]), "9, 3 must rise"),
    ],
)
def test_what_makes_no_story(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_dictionaries_round_trip():
    switches = (
        PromptSwitch(3, "b", "keep", True),
        PromptSwitch(9, "c", keep_sink=False),
        PromptSwitch(15, "d", "cut", blend_frames=6, curve="spherical"),
    )
    story = Story("a", switches)
    entry = json.loads(json.dumps(stories.to_dict(story)))
    assert stories.from_dict(entry, **RATE) == story


# --- files ------------------------------------------------------------------------------------------


def test_text_file_is_one_video_per_line(tmp_path):
    text = "\ufeffA red fox.\r\n\n  Ein Bär schläft.  \n"
    assert read(tmp_path, text, "p.txt") == (Story("A red fox."), Story("Ein Bär schläft."))


def test_release_jsonl_takes_its_switch_frames_apart(tmp_path):
    text = '{"prompts": ["a", "b", "c"]}\n\n{"prompts": ["d", "e", "f"]}\n'
    first, second = read(tmp_path, text, switch_frames=[4, 14])
    assert first == Story("a", (PromptSwitch(4, "b"), PromptSwitch(14, "c")))
    assert second.prompts == ("d", "e", "f")
    own, other = read(
        tmp_path, '{"prompts": ["a", "b"], "switch_frames": [7]}\n{"prompts": ["c", "d"]}', switch_frames=[9]
    )
    assert [story.switches[0].frame for story in (own, other)] == [7, 9]


def test_segments(tmp_path):
    line = {
        "segments": [
            {"prompt": "a", "at_seconds": 0},
            {"prompt": "b", "at_seconds": 5.0, "policy": "keep"},
            {"prompt": "c", "at_frame": 40, "keep_sink": False, "blend_seconds": 2, "curve": "spherical"},
            {"prompt": "d", "at_seconds": 15, "blend_frames": 6, "policy": "cut"},
        ]
    }
    assert read(tmp_path, json.dumps(line)) == (
        Story(
            "a",
            (
                PromptSwitch(21, "b", policy="keep"),
                PromptSwitch(40, "c", keep_sink=False, blend_frames=8, curve="spherical"),
                PromptSwitch(61, "d", policy="cut", blend_frames=6),
            ),
        ),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("A red fox.", r"not JSON .*; a line is one object in braces"),
        ('["a"]', "must be one object in braces"),
        ("{}", 'found nothing where "prompts" or "segments" must stand alone'),
        ('{"prompt": "a"}', "found 'prompt' where"),
        ('{"prompts": ["a"], "seed": 3}', "found 'prompts', 'seed' where"),
        ('{"prompts": []}', '"prompts" must be a list with at least one entry'),
        ('{"prompts": "a"}', '"prompts" must be a list'),
        ('{"prompts": [3]}', "prompt=3 must be text"),
        ('{"prompts": ["a", "b"]}', "2 prompts need 1 switch frames, not 0"),
        ('{"segments": ["a"]}', "segment 1 must be an object"),
        ('{"segments": [{"text": "a"}]}', "segment 1: 'text' is not known; choose from prompt, at_seconds"),
        ('{"segments": [{"at_frame": 0}]}', 'segment 1 has no "prompt"'),
        (
            '{"segments": [{"prompt": "a", "at_frame": 3}]}',
            "segment 1 is the first, so it begins at 0",
        ),
        ('{"segments": [{"prompt": "a", "policy": "keep"}]}', 'there is no switch for "policy"'),
        ('{"segments": [{"prompt": "a"}, {"prompt": "b"}]}', 'segment 2 needs one of "at_seconds" and'),
        (
            '{"segments": [{"prompt": "a"}, {"prompt": "b", "at_frame": 3, "at_seconds": 1}]}',
            'segment 2 needs one of "at_seconds" and',
        ),
        ('{"segments": [{"prompt": "a"}, {"prompt": "b", "at_seconds": "3"}]}', "at_seconds='3' must be a"),
        ('{"segments": [{"prompt": "a"}, {"prompt": "b", "at_frame": "3"}]}', "switch frame '3' must be"),
        ('{"segments": [{"prompt": "a"}, {"prompt": "b", "at_seconds": 0}]}', "switch frame 0 must be"),
        ('{"segments": [{"prompt": "a"}, {"prompt": "b", "at_seconds": NaN}]}', "seconds=nan must be"),
        ('{"prompts": ["a", "b"], "switch_frames": "3"}', '"switch_frames" must be a list'),
        ('{"prompts": ["a", "b"], "switch_frames": [0]}', "switch frame 0 must be"),
        ('{"prompts": ["a", "b"], "switch_frames": [3, 9]}', "2 prompts need 1 switch frames, not 2"),
        ('{"segments": [{"prompt": "a", "blend_seconds": 1}]}', 'no switch for "blend_seconds"'),
        (
            '{"segments": [{"prompt": "a"}, {"prompt": "b", "at_frame": 3, "blend_seconds": "1"}]}',
            "blend_seconds='1' must be a number",
        ),
        (
            '{"segments": [{"prompt": "a"}, '
            '{"prompt": "b", "at_frame": 3, "blend_seconds": 1, "blend_frames": 3}]}',
            'segment 2 has both "blend_seconds" and "blend_frames"',
        ),
        (
            '{"segments": [{"prompt": "a"}, {"prompt": "b", "at_frame": 3, "policy": "x"}]}',
            "policy='x' must be",
        ),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path, line, message):
    with pytest.raises(UserError, match=rf"prompts\.jsonl:2: .*{message}") as caught:
        read(tmp_path, '{"segments": [{"prompt": "fine"}]}\n' + line)
    assert "\n" not in str(caught.value)


def test_mistakes_of_the_whole_file(tmp_path):
    with pytest.raises(UserError, match=r"must end in \.txt or \.jsonl"):
        read(tmp_path, "a", "prompts.csv")
    with pytest.raises(UserError, match="holds no prompts"):
        read(tmp_path, "\n \n", "p.txt")
    with pytest.raises(UserError, match=r"p\.txt:2: not UTF-8"):
        read(tmp_path, b"fine\nB\xe4r", "p.txt")
    with pytest.raises(UserError, match=r"switches need a \.jsonl file"):
        read(tmp_path, "a", "p.txt", switch_frames=[3])
    with pytest.raises(UserError, match='"segments" say themselves when they begin'):
        read(tmp_path, '{"segments": [{"prompt": "a"}]}', switch_frames=[3])
    with pytest.raises(UserError, match="cannot be read"):
        stories.read_stories(tmp_path / "absent.txt", **RATE)


def test_the_documented_lines_are_read(tmp_path):
    page = (pathlib.Path(__file__).parents[2] / "docs/interactive.md").read_text()
    lines = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    release, segments = read(tmp_path, "".join(lines))
    assert [switch.frame for switch in release.switches] == [40, 80]
    assert [(s.policy, s.blend_frames) for s in segments.switches] == [("recache", None), ("keep", 12)]

"""One self-contained HTML page about studies, training runs or generated videos.

Videos, figures and tables are inside the file, so it can be mailed or put anywhere. The videos stand side
by side and play together.

What a folder holds is told by its files: `study.json` (of `longlive ablate`), `metrics.jsonl` (of `longlive
train`), or videos with the JSON files that `longlive generate` leaves beside them.
"""

import base64
import dataclasses
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax import config_module, storage
from longlive_jax.errors import UserError, require
from longlive_jax.experiments import plots, report

SIDECAR_FORMAT = "longlive-jax generate"
METRICS_FILE = "metrics.jsonl"

_MAX_BYTES = 500_000_000
_SAMPLES = 4  # latest samples of a training run that are shown
_LONG_TABLE = "Differences from the baseline"
_NO_CURVES = ("step", "seconds", "total_seconds", "time")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video.

    Attributes:
      title: what it is.
      file: an MP4 or GIF.
    """

    title: str
    file: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Videos that belong side by side.

    Attributes:
      title: what they share, as a rule the prompts.
      clips: the videos.
    """

    title: str
    clips: tuple[Clip, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """What a page shows of one folder.

    Attributes:
      title: of the section.
      lead: paragraphs below it.
      galleries: videos.
      figures: SVG texts.
      tables: (heading, lines), the first line the head.
      config: the resolved config, to be compared with those of the other sections.
    """

    title: str
    lead: tuple[str, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    figures: tuple[str, ...] = ()
    tables: tuple[tuple[str, Sequence[Sequence[str]]], ...] = ()
    config: Mapping[str, Any] | None = None


def write(folders: Sequence[str | pathlib.Path], out: str | pathlib.Path) -> pathlib.Path:
    """Writes the page of one or several folders.

    Args:
      folders: each a study's results, a training run, or a folder of generated videos.
      out: the HTML file.

    Raises:
      UserError: a folder holds nothing of the three, or the videos are too large for one page.
    """
    out = pathlib.Path(out)
    require(out.suffix == ".html", f"--out={out} must end in .html")
    sections = [section for folder in folders for section in read_folder(pathlib.Path(folder))]
    size = sum(c.file.stat().st_size for s in sections for g in s.galleries for c in g.clips)
    require(
        size <= _MAX_BYTES,
        f"the videos take {size / 1e6:.0f} MB, and one page holds {_MAX_BYTES / 1e6:.0f}; give fewer folders",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with storage.new_file(out) as temporary:
        temporary.write_text(render(sections), encoding="utf-8")
    return out


def read_folder(folder: pathlib.Path) -> list[Section]:
    """The sections of a folder."""
    require(folder.is_dir(), f"{folder} is no folder; give one that ablate, train or generate has written")
    if (folder / report.STUDY_FILE).is_file():
        return [_study(folder)]
    if (folder / METRICS_FILE).is_file():
        return [_run(folder)]
    return [_videos(folder)]


# --- the three kinds of folders ---------------------------------------------------------------------


def _study(folder: pathlib.Path) -> Section:
    values = storage.read_json(folder / report.STUDY_FILE)
    try:
        study, conditions = values["study"], values["conditions"]
        galleries = []
        for index, prompts in enumerate(values["prompts"]):
            clips = [(label, folder / one["videos"][index]) for label, one in conditions.items()]
            found = tuple(Clip(label, file) for label, file in clips if file.is_file())
            galleries.append(Gallery(" / ".join(prompts), found))
        settings = report.settings_table({label: one["config"] for label, one in conditions.items()})
        tables = [
            ("Results", _results(values)),
            (_LONG_TABLE, _differences(values)),
            ("Settings that differ", settings),
        ]
        figures = [(folder / name).read_text(encoding="utf-8") for name in values["plots"]]
        lead = [study["question"], f"In the paper: {study['paper']}" if study["paper"] else ""]
    except (KeyError, TypeError, IndexError, OSError) as error:
        raise UserError(
            f"{folder} is damaged ({type(error).__name__} {error}); run the study again"
        ) from error
    return Section(
        title=f"Study {study['name']}",
        lead=tuple(text for text in lead if text),
        galleries=tuple(galleries),
        figures=tuple(figures),
        tables=tuple((heading, lines) for heading, lines in tables if len(lines) > 1),
    )


def _results(values: Mapping[str, Any]) -> list[list[str]]:
    columns = values["study"]["columns"]
    lines = [["condition", *columns]]
    for label in values["conditions"]:
        line = [label]
        for column in columns:
            rows = [r for r in values["table"] if (r["condition"], r["measure"]) == (label, column)]
            line.append(" ".join(_number(row["mean"]) for row in rows) + _ends(rows))
        lines.append(line)
    return lines


def _ends(rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) != 1 or rows[0]["low"] is None:
        return ""
    return f" ({_number(rows[0]['low'])} to {_number(rows[0]['high'])})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _differences(values: Mapping[str, Any]) -> list[list[str]]:
    lines = [["condition", "measure", f"difference from {values['baseline']}", "differs"]]
    for one in values["differences"]:
        if one["difference"] is not None:
            interval = f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
            lines.append([one["condition"], one["measure"], interval, "yes" if one["differs"] else "-"])
    return lines


def _run(folder: pathlib.Path) -> Section:
    """A training run: its curves, its latest samples, its numbers."""
    lines = []
    for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the line that is being written
            break
    names = dict.fromkeys(name for line in lines for name in line)
    curves = {}
    for name in names:
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        if name not in _NO_CURVES and points:
            curves[name] = points
    samples = sorted((folder / "samples").glob("*.mp4"))[-_SAMPLES:]
    clips = tuple(
        Clip(f"step {int(file.stem)}" if file.stem.isdecimal() else file.stem, file) for file in samples
    )
    config = storage.read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    tables = []
    if (folder / "report.json").is_file():
        scores = storage.read_json(folder / "report.json").get("scores", {})
        tables.append(("Scores", [["measure", "value"], *([k, f"{v:.4g}"] for k, v in scores.items())]))
    return Section(
        title=f"Run {folder.resolve().name}",
        lead=(f"{lines[-1]['step']} steps." if lines else "No step logged yet.",),
        galleries=(Gallery("Samples of the evaluations", clips),) if clips else (),
        figures=tuple(plots.curves(curves)),
        tables=tuple(tables),
        config=config,
    )


def _videos(folder: pathlib.Path) -> Section:
    """Generated videos, grouped by their prompts."""
    groups: dict[str, list[Clip]] = {}
    configs: dict[str, Mapping[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        values = storage.read_json(file)
        if values.get("format") != SIDECAR_FORMAT:
            continue
        video = folder / values["video"]["file"]
        if video.suffix in (".mp4", ".gif") and video.is_file():
            prompts = [segment["prompt"] for segment in values["request"]["story"]["segments"]]
            groups.setdefault(" / ".join(prompts), []).append(Clip(video.stem, video))
            configs[video.stem] = {**values["config"], "seed": values["request"]["seed"]}
    require(
        bool(groups),
        f"{folder} holds no study.json, no metrics.jsonl and no videos with JSON files beside them",
    )
    settings = report.settings_table(configs)
    return Section(
        title=folder.resolve().name,
        galleries=tuple(Gallery(prompt, tuple(clips)) for prompt, clips in groups.items()),
        tables=(("Settings that differ", settings),) if len(settings) > 1 else (),
    )


# --- the page ---------------------------------------------------------------------------------------


def render(sections: Sequence[Section]) -> str:
    """The page's HTML."""
    title = ", ".join(section.title for section in sections)
    parts = [_section(section) for section in sections]
    configs = {section.title: section.config for section in sections if section.config is not None}
    if len(configs) > 1:
        parts.append(f"<section>{_table('Settings that differ', report.settings_table(configs))}</section>")
    elif configs:
        flat = config_module.flatten(next(iter(configs.values())))
        lines = [["setting", "value"], *([name, json.dumps(value)] for name, value in flat.items())]
        parts.append(f"<details><summary>All settings</summary>{_table('', lines)}</details>")
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(parts), script=_SCRIPT)


def _section(section: Section) -> str:
    parts = [f"<h1>{html.escape(section.title)}</h1>"]
    parts += [f"<p>{html.escape(text)}</p>" for text in section.lead]
    parts += [_table(heading, lines) for heading, lines in section.tables if heading == "Results"]
    if any(gallery.clips for gallery in section.galleries):
        parts.append(_CONTROLS)
    parts += [_gallery(gallery) for gallery in section.galleries if gallery.clips]
    if section.figures:
        parts.append(f'<div class="figures">{"".join(map(_figure, section.figures))}</div>')
    for heading, lines in section.tables:
        if heading == _LONG_TABLE:
            parts.append(f"<details><summary>{heading}</summary>{_table('', lines)}</details>")
        elif heading != "Results":
            parts.append(_table(heading, lines))
    return f"<section>{''.join(parts)}</section>"


def _figure(svg: str) -> str:
    """A figure as a picture of its own: ids of several SVGs in one page would collide."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="figure" src="data:image/svg+xml;base64,{data}">'


def _gallery(gallery: Gallery) -> str:
    clips = "".join(_clip(clip) for clip in gallery.clips)
    return f'<h3>{html.escape(gallery.title)}</h3><div class="clips">{clips}</div>'


def _clip(clip: Clip) -> str:
    data = base64.b64encode(clip.file.read_bytes()).decode()
    caption = f"<figcaption>{html.escape(clip.title)}</figcaption>"
    if clip.file.suffix == ".gif":
        return f'<figure><img alt="video" src="data:image/gif;base64,{data}">{caption}</figure>'
    source = f"data:video/mp4;base64,{data}"
    return f'<figure><video muted loop playsinline preload="auto" src="{source}"></video>{caption}</figure>'


def _table(heading: str, lines: Sequence[Sequence[str]]) -> str:
    head, *rows = [[html.escape(cell) for cell in line] for line in lines]
    text = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    title = f"<h2>{html.escape(heading)}</h2>" if heading else ""
    return (
        f'{title}<div class="wide"><table><thead><tr>{text}</tr></thead><tbody>{body}</tbody></table></div>'
    )


_CONTROLS = """\
<div class="controls"><button class="play">Play all</button>
<input class="seek" type="range" min="0" max="1000" value="0" aria-label="position">
<label><input class="slow" type="checkbox"> half speed</label></div>"""

_STYLE = """\
:root { color-scheme: light dark; --line: #8884; --ink: CanvasText; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; font-weight: 500; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left;
  white-space: nowrap; }
.controls { align-items: center; background: Canvas; border-bottom: 1px solid var(--line); display: flex;
  gap: 1rem; padding: .5rem 0; position: sticky; top: 0; z-index: 1; }
.controls .seek { flex: 1; }
.clips { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); }
figure { margin: 0; } figcaption { font-size: 13px; }
.clips video, .clips img { background: var(--soft); image-rendering: pixelated; width: 100%; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr));
  margin-top: 1rem; }
.figures img { background: white; max-width: 100%; }
details { margin: 2rem 0; } summary { cursor: pointer; }
"""

_SCRIPT = """\
for (const section of document.querySelectorAll("section")) {
  const videos = [...section.querySelectorAll("video")];
  const play = section.querySelector(".play");
  if (!videos.length || !play) continue;
  const seek = section.querySelector(".seek");
  const slow = section.querySelector(".slow");
  const lead = videos[0];
  let playing = false;
  play.onclick = () => {
    playing = !playing;
    play.textContent = playing ? "Pause all" : "Play all";
    for (const video of videos) {
      if (playing) { video.currentTime = lead.currentTime; video.play(); } else video.pause();
    }
  };
  seek.oninput = () => {
    for (const video of videos) video.currentTime = seek.value / 1000 * (video.duration || 0);
  };
  lead.ontimeupdate = () => {
    if (lead.duration) seek.value = 1000 * lead.currentTime / lead.duration;
    for (const video of videos) {
      const apart = Math.abs(video.currentTime - lead.currentTime);
      if (playing && apart > 0.15) video.currentTime = lead.currentTime;
    }
  };
  slow.onchange = () => { for (const video of videos) video.playbackRate = slow.checked ? 0.5 : 1; };
}
"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

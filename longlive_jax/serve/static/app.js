// The page: what the studio says becomes what one sees, what one does becomes messages.

import { $, clock, ideas, make, toast } from "./dom.js";
import { Connection } from "./net.js";
import { Panel, spread } from "./panel.js";
import { parseFrame, Rate, Screen } from "./player.js";
import { Timeline } from "./timeline.js";

const net = new Connection();
const timeline = new Timeline();
const panel = new Panel();
const rate = new Rate();
const state = { model: null, role: "watch", server: null, block: null, asked: null, pending: "", isPast: false, isPlayingPast: false, frame: null };
const screens = [0, 1, 2].map((channel) => new Screen($(`screen-${channel}`), (frame) => painted(channel, frame)));

// Numbers for scripts and tests.
window.studio = { received: 0, missed: 0, painted: 0, switches: [], latest: null, drop: () => net.socket.close() };

// --- from the studio -----------------------------------------------------------------------------

const takes = {
  welcome(message) {
    state.model = message.model;
    $("model").textContent = `${message.model.name} · ${message.model.width}×${message.model.height} · ${message.model.fps} fps`;
    panel.setLimits(message.limits);
    panel.key = () => message.key;
    timeline.size = message.model;
    document.documentElement.style.setProperty("--ratio", message.model.width / message.model.height);
    for (const screen of screens) screen.resize(message.model);
    ideas($("ideas"), message.suggestions, (text) => { $("first").value = text; $("start").requestSubmit(); });
    if (location.hash.length > 1) net.send({ type: "watch", room: location.hash.slice(1) });
  },

  lobby(message) {
    show("lobby");
    history.replaceState(null, "", location.pathname);
    $("queue").hidden = message.place === null;
    $("start").hidden = message.place !== null;
    $("place").textContent = message.place === 1 ? "You are next. The session opens when one is free." : `You are number ${message.place} in the queue.`;
    $("running").hidden = message.rooms.length === 0;
    $("rooms").replaceChildren(...message.rooms.map((room) => make("li", {}, make("button",
      { type: "button", onclick: () => net.send({ type: "watch", room: room.id }) },
      make("span", { className: "live-dot", textContent: "● LIVE" }), make("span", { textContent: room.prompt }),
      make("span", { className: "hint", textContent: `${room.viewers} here` })))));
  },

  room(message) {
    show("live");
    history.replaceState(null, "", `#${message.id}`);
    if (timeline.room !== message.id) timeline.setRoom(message.id, state.model);
    panel.room = message.id;
    panel.setLimits(message.limits);
    $("file").href = `/api/rooms/${message.id}/session.json`;
    if (message.state.type) takes.state(message.state);
    if (message.block.type) takes.block(message.block);
  },

  presence(message) {
    state.role = message.role;
    const hasControl = message.role === "control";
    document.body.classList.toggle("off-limits-page", !hasControl);
    for (const area of [$("panel"), $("ask"), $("next"), $("pace")]) area.classList.toggle("off-limits", !hasControl);
    for (const knob of document.querySelectorAll("#panel :is(button, input, select), #ask :is(button, input, select), #next button, #pace button, #restart")) {
      if (knob.id !== "sink") knob.disabled = !hasControl;
    }
    $("people").hidden = false;
    $("people").textContent = message.viewers === 1 ? "1 here" : `${message.viewers} here`;
    const button = $("control");
    button.hidden = false;
    button.className = `chip ${hasControl ? (message.asking.length ? "asked" : "mine") : message.asked ? "asked" : ""}`;
    if (hasControl) button.textContent = message.asking.length ? `${message.asking[0]} asks for control: hand over` : "In control";
    else button.textContent = message.asked ? `Asked ${message.controller}` : message.controller ? `${message.controller} directs · ask` : "Take control";
    button.disabled = message.asked || (hasControl && message.viewers === 1);
    button.title = hasControl ? "Hand control to another viewer" : "Ask for control";
    button.onclick = () => net.send({ type: hasControl ? "release" : "claim" });
    $("prompt").placeholder = hasControl ? "What happens next?" : "You are watching";
    transport();
  },

  state(message) {
    const isOther = message.current !== state.server?.current;
    state.server = message;
    if (isOther) {
      state.isPast = false;
      for (const screen of screens) screen.clear();
    }
    panel.setState(message);
    timeline.setState(message);
    const isTwo = Boolean(message.compare) && !state.isPast;
    $("stage").classList.toggle("two", isTwo);
    $("figure-0").hidden = isTwo;
    for (const side of [1, 2]) {
      $(`figure-${side}`).hidden = !isTwo;
      if (message.compare) $(`side-${side}`).textContent = message.compare[side - 1].label;
    }
    const isOpening = message.phase === "opening";
    $("cover").hidden = message.phase === "running";
    $("cover-spinner").hidden = !isOpening;
    $("cover-text").textContent = isOpening ? "Opening the session. The first time compiles the model, which takes a while." : message.error;
    $("restart").hidden = message.phase !== "failed";
    $("mp4").href = `/api/rooms/${timeline.room}/video.mp4?take=${message.current ?? 0}`;
    for (const button of $("pace").children) button.setAttribute("aria-pressed", String(button.dataset.pace === message.pace));
    transport();
  },

  block(message) {
    state.block = message;
    if (message.switched && message.prompt === state.pending) state.pending = "";
    if (message.suggestions) ideas($("next"), message.suggestions, (text) => ask(text));
    if (state.role !== "control") for (const button of $("next").children) button.disabled = true;
    if (message.response !== null && !state.asked) $("latency").textContent = `${message.response.toFixed(2)} s`;
    caption();
  },

  pending(message) {
    state.pending = message.prompt;
    caption();
  },

  stored(message) { timeline.stored(message); },
  stats(message) { timeline.kept = message.kept; },
  notice(message) { toast(message.text); },

  error(message) {
    if (state.asked) state.asked = null;
    toast(message.text, { bad: true });
    if (state.server && !$("live").hidden) panel.setState({ ...state.server, settings: { ...state.server.settings } });
  },

  closed(message) {
    toast(message.reason);
    history.replaceState(null, "", location.pathname);
    state.server = null;
  },
};

net.addEventListener("message", ({ detail }) => takes[detail.type]?.(detail));
net.addEventListener("link", ({ detail: isUp }) => {
  $("link").className = isUp ? "dot" : "dot off";
  $("link").title = isUp ? "connected" : "connecting again";
  $("link").setAttribute("aria-label", $("link").title);
});
net.addEventListener("ping", ({ detail }) => { $("ping").textContent = `${Math.round(detail)} ms`; });
net.addEventListener("frame", ({ detail }) => {
  const frame = parseFrame(detail);
  const last = window.studio.latest;
  if (last && frame.channel === last.channel && frame.take === last.take && frame.index > last.index + 1) window.studio.missed += frame.index - last.index - 1;
  window.studio.latest = frame;
  window.studio.received += 1;
  state.frame = frame;
  if (state.isPast) return;
  screens[frame.channel].show(frame);
});

function painted(channel, frame) {
  if (frame.isPast) return;
  if (channel < 2) rate.tick(performance.now());
  window.studio.painted += 1;
  const { asked, block } = state;
  if (asked && block?.switched && block.prompt === asked.prompt && frame.block >= block.block) {
    const seconds = (performance.now() - asked.at) / 1000;
    $("latency").textContent = `${seconds.toFixed(2)} s`;
    window.studio.switches.push(seconds);
    state.asked = null;
  }
  $("clock").textContent = clock(frame.index / state.model.fps);
}

setInterval(() => {
  const now = rate.value(performance.now());
  $("fps").textContent = now ? now.toFixed(1) : "–";
}, 500);

// --- what one sees -------------------------------------------------------------------------------

function show(name) {
  for (const id of ["lobby", "live"]) $(id).hidden = id !== name;
  for (const id of ["share", "leave"]) $(id).hidden = name !== "live";
  if (name === "lobby") for (const id of ["people", "control"]) $(id).hidden = true;
}

function caption() {
  const waits = Boolean(state.pending);
  $("caption").textContent = waits ? `Next: ${state.pending}` : state.isPast ? timeline.spanAt(timeline.shown, timeline.head.block)?.[1] ?? "" : state.block?.prompt ?? "";
  $("caption").classList.toggle("waits", waits);
}

function transport() {
  const { isPast } = state;
  const isStopped = isPast ? !state.isPlayingPast : Boolean(state.server?.paused);
  $("play").classList.toggle("stopped", isStopped);
  $("play").setAttribute("aria-label", isStopped ? "Play" : "Pause");
  $("play").disabled = !isPast && state.role !== "control";
  $("tolive").hidden = !isPast;
  $("branch").hidden = !isPast || state.role !== "control";
  $("badge").textContent = isPast ? "REPLAY" : isStopped ? "PAUSED" : "LIVE";
  $("badge").className = `badge ${isPast ? "past" : isStopped ? "still" : ""}`;
  $("hint").textContent = isPast && state.role === "control" ? "A prompt typed now branches the video from here." : "";
  $("figure-0").hidden = Boolean(state.server?.compare) && !isPast;
  $("stage").classList.toggle("two", Boolean(state.server?.compare) && !isPast);
  for (const side of [1, 2]) $(`figure-${side}`).hidden = !state.server?.compare || isPast;
  $("mp4").href = `/api/rooms/${timeline.room}/video.mp4?take=${timeline.shown ?? 0}`;
}

// --- the past ------------------------------------------------------------------------------------

let scrubs = 0;

timeline.addEventListener("scrub", async ({ detail: { block, part } }) => {
  state.isPast = true;
  state.isPlayingPast = false;
  transport();
  caption();
  await showPast(block, part);
});
timeline.addEventListener("live", () => toLive());

async function showPast(block, part) {
  const turn = (scrubs += 1);
  const frames = await timeline.frames(block);
  if (turn !== scrubs || !state.isPast) return null;
  if (!frames) {
    toast("These frames are no longer kept.");
    return null;
  }
  const at = Math.min(Math.floor(part * frames.length), frames.length - 1);
  const index = block ? blockFirst(block, frames.length) + at : at;
  screens[0].clear();
  screens[0].show({ image: frames[at], isPast: true, block, index });
  $("clock").textContent = clock(index / state.model.fps);
  return frames.length;
}

// Every block but the first is as long as the others; the first is shorter by what causality takes.
function blockFirst(block, length) {
  if (state.block) return state.block.first - (state.block.block - block) * length;
  return block * length;
}

async function step(frames, blocks) {
  const { head } = timeline;
  const from = head ?? { block: timeline.end() - 1, part: 0.999 };
  if (blocks) return timeline.scrub(from.block + blocks, 0);
  const length = (await timeline.frames(from.block))?.length ?? 1;
  const at = Math.floor(from.part * length) + frames;
  if (at < 0) return timeline.scrub(from.block - 1, 0.999);
  if (at >= length) return timeline.scrub(from.block + 1, 0);
  return timeline.scrub(from.block, (at + 0.01) / length);
}

async function playPast() {
  state.isPlayingPast = true;
  transport();
  const mine = state;
  while (mine.isPlayingPast && mine.isPast) {
    const started = performance.now();
    const { head } = timeline;
    const length = await showPast(head.block, head.part);
    if (!length || !mine.isPlayingPast) break;
    let at = Math.floor(head.part * length) + 1;
    let { block } = head;
    if (at >= length) [block, at] = [block + 1, 0];
    if (block >= timeline.end()) {
      if (timeline.shown === timeline.current) toLive();
      break;
    }
    timeline.head = { block, part: (at + 0.01) / length };
    timeline.drawHead();
    caption();
    await new Promise((done) => setTimeout(done, Math.max(1000 / state.model.fps - (performance.now() - started), 0)));
  }
  state.isPlayingPast = false;
  transport();
}

function toLive() {
  if (!state.isPast) return;
  Object.assign(state, { isPast: false, isPlayingPast: false });
  scrubs += 1;
  timeline.toLive();
  if (state.frame) screens[state.frame.channel].show(state.frame);
  transport();
  caption();
}

const here = () => ({ take: timeline.shown, block: timeline.head.block });

function branch() {
  if (!state.isPast || state.role !== "control") return;
  net.send({ type: "rewind", ...here() });
  toLive();
}

// --- what one does -------------------------------------------------------------------------------

function ask(text) {
  const prompt = text.trim().replace(/\s+/g, " ");
  if (!prompt || state.role !== "control") return;
  const message = { type: "switch", prompt, blend: Number($("blend").value) };
  if (state.isPast) Object.assign(message, here());
  if (!net.send(message)) return toast("Not connected; try again in a moment.", { bad: true });
  state.asked = { prompt, at: performance.now() };
  state.pending = prompt;
  $("prompt").value = "";
  toLive();
  caption();
}

function play() {
  if (state.isPast) {
    if (state.isPlayingPast) {
      state.isPlayingPast = false;
      transport();
    } else {
      playPast();
    }
  } else if (state.role === "control") {
    net.send({ type: state.server?.paused ? "resume" : "pause" });
  }
}

$("start").onsubmit = (event) => {
  event.preventDefault();
  const prompt = $("first").value.trim();
  const steps = Number($("first-steps").value);
  const settings = steps ? { opening_steps: spread(steps) } : {};
  if (prompt) net.send({ type: "open", prompt, seed: Number($("first-seed").value) || 0, settings });
};
$("cancel").onclick = () => net.send({ type: "cancel" });
$("ask").onsubmit = (event) => {
  event.preventDefault();
  ask($("prompt").value);
};
$("play").onclick = play;
$("tolive").onclick = toLive;
$("branch").onclick = branch;
$("restart").onclick = () => net.send({ type: "restart" });
$("end").onclick = () => confirm("End the session for everyone? What is not downloaded is lost.") && net.send({ type: "end" });
$("leave").onclick = () => net.send({ type: "leave" });
$("share").onclick = async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    toast("The address of this session is in the clipboard.");
  } catch {
    prompt("The address of this session:", location.href);
  }
};
$("help").onclick = () => $("keys").showModal();
for (const button of $("pace").children) button.onclick = () => net.send({ type: "pace", pace: button.dataset.pace });
panel.addEventListener("send", ({ detail }) => net.send(detail) || toast("Not connected; try again in a moment.", { bad: true }));

const keys = {
  " ": play,
  "/": () => $($("live").hidden ? "first" : "prompt").focus(),
  l: toLive,
  b: branch,
  c: () => state.role === "control" && !state.server?.compare && panel.compare(),
  m: () => $("mp4").click(),
  "?": () => $("keys").showModal(),
  ArrowLeft: (event) => step(-1, event.shiftKey ? -1 : 0),
  ArrowRight: (event) => step(1, event.shiftKey ? 1 : 0),
  Home: () => timeline.scrub(0, 0),
  End: toLive,
};

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input:not([type=range]):not([type=checkbox]), select, textarea");
  if (event.key === "Escape") {
    event.target.blur();
    toLive();
    return;
  }
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
  if (event.key === " " && event.target.matches("button, a, summary, input")) return;
  if ($("live").hidden && event.key !== "/" && event.key !== "?") return;
  const handler = keys[event.key] ?? keys[event.key.toLowerCase()];
  if (/^[1-5]$/.test(event.key) && state.role === "control") panel.change({ policy: panel.policies[Number(event.key) - 1] });
  else if (handler) handler(event);
  else return;
  event.preventDefault();
});

// The knobs, comparisons and files.

import { $, make, toast } from "./dom.js";

const POLICIES = {
  recache: "Memory is rebuilt under the new prompt: motion goes on and the prompt is obeyed.",
  keep: "Memory stays: smooth, slow to obey.",
  clear: "Memory is emptied: a start over.",
  flush: "The first and the last frames stay: quick to obey.",
  cut: "A hard cut that keeps who it is about.",
};

export class Panel extends EventTarget {
  constructor() {
    super();
    this.settings = {};
    this.policies = Object.keys(POLICIES);
    $("policy").replaceChildren(...this.policies.map((name, i) => {
      const button = make("button", { type: "button", textContent: name, title: `${POLICIES[name]} (${i + 1})` });
      button.setAttribute("role", "radio");
      button.dataset.policy = name;
      button.onclick = () => this.change({ policy: name });
      return button;
    }));
    $("keep-sink").onchange = (event) => this.change({ keep_sink: event.target.checked });
    this.slider("window", (value) => ({ window: value }), (value) => `${value} frames`);
    this.slider("sink", (value) => ({ sink: value }), (value) => `${value} frames`);
    this.slider("steps", (value) => ({ steps: spread(value, this.settings.steps) }), (value) => `${value}`);
    $("seed").onchange = (event) => event.target.reportValidity() && this.tell("change", { seed: Number(event.target.value) });
    $("dice").onclick = () => this.tell("change", { seed: Math.floor(Math.random() * 2 ** 32) });
    $("origin").onchange = () => this.offer();
    $("compare").onclick = () => this.compare();
    for (const button of document.querySelectorAll("[data-side]")) button.onclick = () => this.tell("keep", { side: button.dataset.side });
    $("upload").onchange = (event) => this.upload(event.target);
    this.offer();
  }

  // Fills both sides' choices and keeps what was chosen, where it still is one.
  offer() {
    for (const [side, first] of [["left", "recache"], ["right", "keep"]]) {
      const chosen = $(side).value;
      $(side).replaceChildren(...this.options(first));
      if ([...$(side).options].some((option) => option.value === chosen)) $(side).value = chosen;
    }
  }

  // What a side can be: a policy, or a setting against the present one.
  options(chosen) {
    const option = (value, text, isChosen) => make("option", { value: JSON.stringify(value), textContent: text, selected: isChosen });
    const policies = make("optgroup", { label: "Switch" }, ...this.policies.map((name) => option({ policy: name }, name, name === chosen)));
    const { steps, window: frames } = this.settings;
    const others = [option({}, "as it is", false)];
    if (steps) for (const n of new Set([1, 2, steps.length, 2 * steps.length])) others.push(option({ steps: spread(n, steps) }, `${n} step${n > 1 ? "s" : ""}`, false));
    if (frames) for (const n of this.windows()) others.push(option({ window: n }, `window ${n}`, false));
    if (steps && $("origin").value === "start") for (const n of new Set([steps.length, 8, 16])) others.push(option({ opening_steps: spread(n, steps) }, `${n} steps in the first block`, false));
    return [policies, make("optgroup", { label: "Model" }, ...others)];
  }

  windows() {
    const { limits, settings } = this;
    const least = settings.sink + limits.block;
    return [...new Set([least, Math.round((least + settings.window) / 2), settings.window, limits.window])].sort((a, b) => a - b);
  }

  setLimits(limits) {
    this.limits = limits;
    Object.assign($("window"), { max: limits.window });
  }

  setState(state) {
    const { settings } = state;
    const isNew = JSON.stringify(settings) !== JSON.stringify(this.settings);
    this.settings = settings;
    for (const button of $("policy").children) button.setAttribute("aria-checked", String(button.dataset.policy === settings.policy));
    $("policy-hint").textContent = POLICIES[settings.policy];
    $("keep-sink").checked = settings.keep_sink;
    if (isNew) {
      Object.assign($("window"), { min: settings.sink + this.limits.block, value: settings.window });
      Object.assign($("sink"), { max: settings.sink, value: settings.sink, disabled: settings.sink === 0 });
      $("steps").value = settings.steps.length;
      $("window-value").textContent = `${settings.window} frames`;
      $("sink-value").textContent = `${settings.sink} frames`;
      const opening = settings.opening_steps.length ? `; first block ${settings.opening_steps.length}` : "";
      $("steps-value").textContent = `${settings.steps.length} (${settings.steps.join(" ")}${opening})`;
      this.offer();
    }
    if (document.activeElement !== $("seed")) $("seed").value = state.seed;
    $("compare-setup").hidden = Boolean(state.compare);
    $("compare-pick").hidden = !state.compare;
  }

  slider(id, message, text) {
    $(id).oninput = (event) => { $(`${id}-value`).textContent = text(Number(event.target.value)); };
    $(id).onchange = (event) => this.change(message(Number(event.target.value)));
  }

  change(settings) { this.tell("change", { settings }); }

  compare() {
    const side = (id) => JSON.parse($(id).value);
    this.tell("compare", { origin: $("origin").value, prompt: $("prompt").value.trim(), left: side("left"), right: side("right") });
    $("prompt").value = "";
  }

  async upload(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      const answer = await fetch(`/api/rooms/${this.room}/session`, { method: "POST", body: file, headers: { "x-longlive-key": this.key() } });
      if (!answer.ok) toast(await answer.text(), { bad: true });
    } catch {
      toast("The file could not be sent.", { bad: true });
    }
  }

  tell(type, fields) { this.dispatchEvent(new CustomEvent("send", { detail: { type, ...fields } })); }
}

// n falling timesteps over the range the model is used with.
export function spread(n, present) {
  if (present && present.length === n) return present;
  return Array.from({ length: n }, (_, i) => Math.round(1000 * (1 - i / n)));
}

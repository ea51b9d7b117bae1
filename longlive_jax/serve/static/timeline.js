// The takes of a session: thumbnails, prompts, places to branch from, and a head to scrub with.

import { $, make } from "./dom.js";
import { parseBlock } from "./player.js";

const HUES = ["#ff7a45", "#4ea8ff", "#3ecf8e", "#d388ff", "#ffd166", "#ff6b8b", "#5ce1e6"];

export class Timeline extends EventTarget {
  constructor() {
    super();
    this.takes = new Map();
    this.kept = [];
    this.oldest = new Map();
    this.current = null;  // the live take
    this.shown = null;    // the take on the timeline
    this.head = null;     // {block, part} while scrubbed, part in [0, 1)
    this.size = { width: 1, height: 1 };
    this.cache = new Map();
    this.isDirty = false;
    const track = $("track");
    track.addEventListener("pointerdown", (event) => {
      track.setPointerCapture(event.pointerId);
      this.scrubTo(event);
    });
    track.addEventListener("pointermove", (event) => track.hasPointerCapture(event.pointerId) && this.scrubTo(event));
    new ResizeObserver(() => this.draw()).observe(track);
    setInterval(() => this.isDirty && this.draw(), 400);
  }

  setRoom(room, size) {
    Object.assign(this, { room, size, head: null, shown: null });
    this.takes.clear();
    this.cache.clear();
  }

  setState(state) {
    this.takes = new Map(state.takes.map((take) => [take.id, take]));
    this.kept = state.kept;
    this.oldest = new Map(state.oldest);
    if (state.current !== this.current || !this.takes.has(this.shown)) {
      this.shown = state.current;
      this.head = null;
    }
    this.current = state.current;
    this.draw();
  }

  stored({ take, block, prompt, policy }) {
    const owner = this.takes.get(take);
    if (!owner) return;
    owner.end = block + 1;
    const last = this.spanAt(take, block);
    if (!last || last[1] !== prompt || policy) owner.spans.push([block, prompt, policy]);
    this.isDirty = true;
  }

  // [take, first, end] of the parts a take consists of, from the beginning on.
  line(id) {
    const parts = [];
    let end = Infinity;
    for (let take = this.takes.get(id); take; take = this.takes.get(take.parent)) {
      parts.unshift([take.id, take.start, Math.min(end, take.end)]);
      end = take.start;
    }
    return parts;
  }

  end(id = this.shown) { return this.takes.get(id)?.end ?? 0; }

  spans(id) {
    return this.line(id).flatMap(([number, , end]) => this.takes.get(number).spans.filter((span) => span[0] < end || number === id));
  }

  spanAt(id, block) { return this.spans(id).filter((span) => span[0] <= block).at(-1); }

  isKept(id, block) {
    const part = this.line(id).find(([, first, end]) => block >= first && block < end);
    return part !== undefined && block >= (this.oldest.get(part[0]) ?? part[1]);
  }

  select(id) {
    this.shown = id;
    this.scrub(this.end(id) - 1, 0);
  }

  scrubTo(event) {
    const box = $("track").getBoundingClientRect();
    const place = Math.min(Math.max((event.clientX - box.left) / this.scale(), 0), this.end() - 0.001);
    this.scrub(Math.floor(place), place % 1);
  }

  scrub(block, part) {
    if (this.end() < 1) return;
    this.head = { block: Math.min(Math.max(block, 0), this.end() - 1), part };
    this.drawHead();
    this.dispatchEvent(new CustomEvent("scrub", { detail: this.head }));
  }

  toLive() {
    this.head = null;
    this.shown = this.current;
    this.draw();
  }

  // The frames of a block, as blobs; null where they are no longer kept.
  async frames(block, take = this.shown) {
    const name = `${take}/${block}`;
    if (!this.cache.has(name)) {
      const answer = fetch(`/api/rooms/${this.room}/block/${name}`)
        .then(async (response) => (response.ok ? parseBlock(await response.arrayBuffer()) : null))
        .catch(() => null);
      this.cache.set(name, answer);
      if (this.cache.size > 24) this.cache.delete(this.cache.keys().next().value);
    }
    return this.cache.get(name);
  }

  // --- drawing ---------------------------------------------------------------------------------

  thumbWidth() { return Math.max(Math.round((66 * this.size.width) / this.size.height), 24); }

  // Blocks for each thumbnail: a power of two, so that thumbnails stay where they are while the video grows.
  blocksPerThumb() {
    const room = Math.max(Math.floor($("track").clientWidth / this.thumbWidth()), 1);
    return 2 ** Math.max(Math.ceil(Math.log2(this.end() / room)), 0);
  }

  scale() { return this.thumbWidth() / this.blocksPerThumb(); }

  draw() {
    this.isDirty = false;
    this.drawTakes();
    this.drawThumbs();
    this.drawSpans();
    const kept = this.kept.filter(([take, block]) => this.line(this.shown).some(([id, first, end]) => id === take && block >= first && block <= end));
    $("marks").replaceChildren(...kept.map(([, block]) => {
      const mark = make("i");
      mark.style.left = `${block * this.scale()}px`;
      return mark;
    }));
    this.drawHead();
  }

  drawTakes() {
    const takes = [...this.takes.values()];
    $("takes").hidden = takes.length < 2;
    const name = (take) => `${take.id}${take.label}${take.id === this.current}${take.id === this.shown}`;
    const wanted = takes.map(name).join();
    if (wanted === this.drawnTakes) return;
    this.drawnTakes = wanted;
    $("takes").replaceChildren(...takes.map((take) => {
      const button = make("button", { type: "button", textContent: take.label, className: take.id === this.current ? "on" : "" });
      button.setAttribute("aria-pressed", String(take.id === this.shown));
      button.onclick = () => (take.id === this.current ? this.dispatchEvent(new Event("live")) : this.select(take.id));
      return button;
    }));
  }

  drawThumbs() {
    const box = $("thumbs");
    const width = this.thumbWidth();
    const step = this.blocksPerThumb();
    const count = Math.ceil(this.end() / step);
    box.style.width = `${this.end() * this.scale()}px`;
    while (box.children.length > count) box.lastChild.remove();
    for (let i = 0; i < count; i += 1) {
      const img = box.children[i] ?? box.appendChild(make("img", { alt: "", draggable: false, onerror: (event) => event.target.classList.add("gone") }));
      const address = this.isKept(this.shown, i * step) ? `/api/rooms/${this.room}/thumb/${this.shown}/${i * step}` : "";
      if (img.dataset.address !== address) {
        img.dataset.address = address;
        img.className = this.size.height <= 128 ? "crisp" : "";
        if (address) img.src = address;
        else img.classList.add("gone");
      }
      img.style.width = `${width}px`;
    }
  }

  drawSpans() {
    const spans = this.spans(this.shown);
    const scale = this.scale();
    const hues = new Map();
    $("spans").replaceChildren(...spans.map(([block, prompt, policy], i) => {
      const end = spans[i + 1]?.[0] ?? this.end();
      if (!hues.has(prompt)) hues.set(prompt, HUES[hues.size % HUES.length]);
      const bar = make("div", { textContent: prompt, title: policy ? `${prompt} (${policy})` : prompt });
      bar.style.left = `${block * scale}px`;
      bar.style.width = `${Math.max((end - block) * scale - 2, 3)}px`;
      bar.style.setProperty("--hue", hues.get(prompt));
      return bar;
    }));
  }

  drawHead() {
    const at = this.head ? this.head.block + this.head.part : this.end();
    $("head").style.left = `${Math.min(at * this.scale(), $("track").clientWidth - 2)}px`;
    const track = $("track");
    track.setAttribute("aria-valuemax", String(Math.max(this.end() - 1, 0)));
    track.setAttribute("aria-valuenow", String(this.head ? this.head.block : Math.max(this.end() - 1, 0)));
    const prompt = this.spanAt(this.shown, this.head ? this.head.block : this.end())?.[1];
    track.setAttribute("aria-valuetext", this.head ? `block ${this.head.block}: ${prompt ?? ""}` : "live");
  }
}

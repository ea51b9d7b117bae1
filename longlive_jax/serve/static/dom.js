export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function toast(text, { bad = false, seconds = 5 } = {}) {
  const note = make("p", { textContent: text, className: bad ? "bad" : "" });
  const box = $("toasts");
  box.append(note);
  while (box.children.length > 3) box.firstChild.remove();
  setTimeout(() => note.remove(), 1000 * seconds);
}

export function clock(seconds) {
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${(seconds - 60 * minutes).toFixed(1).padStart(4, "0")}`;
}

export function ideas(box, prompts, use) {
  box.replaceChildren(...(prompts ?? []).map((text) => make("button", { type: "button", textContent: text, onclick: () => use(text) })));
}

// Decodes frames in order and paints them as they arrive; falls behind only by dropping what is late.

const HEADER = 16;
const MAX_WAITING = 8;

export function parseFrame(buffer) {
  const view = new DataView(buffer);
  return {
    channel: view.getUint8(1), take: view.getUint16(2, true), block: view.getUint32(4, true),
    index: view.getUint32(8, true), image: new Blob([new Uint8Array(buffer, HEADER)]),
  };
}

// A block's file: a count, lengths, the thumbnail, the frames.
export function parseBlock(buffer) {
  const view = new DataView(buffer);
  const count = view.getUint32(0, true);
  const parts = [];
  let at = 4 * (1 + count);
  for (let i = 0; i < count; i += 1) {
    const length = view.getUint32(4 * (1 + i), true);
    parts.push(new Blob([new Uint8Array(buffer, at, length)]));
    at += length;
  }
  return parts.slice(1);
}

export class Screen {
  constructor(canvas, onPaint) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.onPaint = onPaint;
    this.waiting = [];
    this.isBusy = false;
    this.generation = 0;
    this.painted = 0;
  }

  resize({ width, height }) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.canvas.classList.toggle("crisp", width * height <= 128 * 128);
  }

  // Forgets frames that are not painted yet: another picture comes.
  clear() {
    this.generation += 1;
    this.waiting = [];
  }

  show(frame) {
    this.waiting.push(frame);
    if (this.waiting.length > MAX_WAITING) this.waiting.splice(0, this.waiting.length - MAX_WAITING);
    if (!this.isBusy) this.work();
  }

  async work() {
    this.isBusy = true;
    while (this.waiting.length) {
      const frame = this.waiting.shift();
      const generation = this.generation;
      try {
        const picture = await createImageBitmap(frame.image, { colorSpaceConversion: "none" });
        if (generation === this.generation) {
          this.context.drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
          this.painted += 1;
          this.onPaint(frame);
        }
        picture.close();
      } catch {
        // A frame that cannot be decoded is one frame less.
      }
    }
    this.isBusy = false;
  }
}

// Frames in a second, over the last two.
export class Rate {
  constructor() { this.times = []; }
  tick(now) {
    this.times.push(now);
    while (this.times[0] < now - 2000) this.times.shift();
  }
  value(now) {
    while (this.times.length && this.times[0] < now - 2000) this.times.shift();
    const n = this.times.length;
    return n > 1 ? (1000 * (n - 1)) / (this.times[n - 1] - this.times[0]) : 0;
  }
}

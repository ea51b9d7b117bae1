// One socket to the studio: says who we are, comes back when it drops.

const KEY = "longlive-key";
const REPLACED = 4001;

export class Connection extends EventTarget {
  constructor() {
    super();
    this.delay = 300;
    this.ping = null;
    setInterval(() => this.send({ type: "ping", t: Math.round(performance.now()) }), 4000);
    addEventListener("online", () => this.open());
    document.addEventListener("visibilitychange", () => document.hidden || this.open());
    this.open();
  }

  get key() { return sessionStorage.getItem(KEY) ?? ""; }

  open() {
    if (this.socket && this.socket.readyState <= WebSocket.OPEN) return;
    clearTimeout(this.timer);
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => socket.send(JSON.stringify({ type: "hello", key: this.key }));
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.take(JSON.parse(data)) : this.emit("frame", data));
    socket.onclose = (event) => {
      if (socket !== this.socket) return;
      // Another tab has taken this one's name (a duplicated tab does): go on under a new one.
      if (event.code === REPLACED) sessionStorage.removeItem(KEY);
      this.emit("link", false);
      this.timer = setTimeout(() => this.open(), this.delay);
      this.delay = Math.min(this.delay * 2, 5000);
    };
  }

  take(message) {
    if (message.type === "welcome") {
      sessionStorage.setItem(KEY, message.key);
      this.delay = 300;
      this.emit("link", true);
    }
    if (message.type === "pong") {
      this.ping = performance.now() - message.t;
      this.emit("ping", this.ping);
    } else {
      this.emit("message", message);
    }
  }

  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  emit(name, detail) { this.dispatchEvent(new CustomEvent(name, { detail })); }
}

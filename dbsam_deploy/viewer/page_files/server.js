// What the page asks its own server, and nobody else.

const KEY = "dbsam-key"; // of this tab; never in an address that is sent

/** An answer that is no success. */
export class ServerError extends Error {
  /**
   * @param {number} status 0 where nothing answered
   * @param {string} text for the user
   */
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** The slot on the server, its key and its signs of life. */
export class Server {
  /** @param {() => Promise<string>} askKey asks the user for the key */
  constructor(askKey) {
    this.askKey = askKey;
    this.token = null;
    this.key = takeKey();
    this.asked = null;
    this.beat = 0;
    addEventListener("pagehide", () => this.release());
  }

  /** Take a slot, asking for the key until it is right. */
  async claim() {
    clearInterval(this.beat);
    const rules = await (await this.ask("claim")).json();
    this.token = rules.lease_token;
    if (rules.liveness_timeout_seconds > 0) {
      const seconds = Math.max(1, rules.liveness_timeout_seconds / 3);
      this.beat = setInterval(() => this.ask("heartbeat", "{}").catch(() => {}), 1000 * seconds);
    }
    return rules;
  }

  /** Give the slot back, also while the page goes away. */
  release() {
    clearInterval(this.beat);
    if (this.token) {
      fetch("release", { method: "POST", headers: this.headers(), keepalive: true }).catch(() => {});
    }
    this.token = null;
  }

  headers(more = {}) {
    const own = { ...more };
    if (this.key) own.Authorization = `Bearer ${this.key}`;
    if (this.token) own["X-Lease-Token"] = this.token;
    return own;
  }

  /**
   * Ask; a wrong key is asked for anew.
   * @param {string} path below the page's own address
   * @param {BodyInit|null} body sent by POST; undefined with `method` GET
   */
  async ask(path, body = null, { method = "POST", headers = {} } = {}) {
    for (;;) {
      let answer;
      const { key } = this;
      try {
        answer = await fetch(path, {
          method,
          body: method === "GET" ? undefined : body,
          headers: this.headers(headers),
          cache: "no-store",
          credentials: "same-origin",
        });
      } catch {
        throw new ServerError(0, `The server at ${location.host} does not answer. Masks on this page are kept: ` +
          "try again once it runs.");
      }
      if (answer.ok) return answer;
      if (answer.status === 401) {
        if (this.key === key) await this.renewKey();
        continue;
      }
      throw new ServerError(answer.status, await words(answer));
    }
  }

  /** Ask the user once, whatever else is refused meanwhile, such as a sign of life. */
  async renewKey() {
    this.asked ??= this.askKey(Boolean(this.key)).finally(() => { this.asked = null; });
    this.key = await this.asked;
    sessionStorage.setItem(KEY, this.key);
  }

  /** Ask with JSON. */
  async json(path, fields) {
    return this.ask(path, JSON.stringify(fields), { headers: { "Content-Type": "application/json" } });
  }
}

function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem(KEY, given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  return sessionStorage.getItem(KEY);
}

const MEANINGS = {
  408: "The upload stood still for too long.",
  413: "That is too large for this server.",
  502: "The model's own server did not answer.",
};

async function words(answer) {
  let text = "";
  try {
    const { detail } = await answer.json();
    if (typeof detail === "string") text = detail;
  } catch {
    text = `status ${answer.status} without words; is a proxy in between?`;
  }
  return [MEANINGS[answer.status], text].filter(Boolean).join(" ");
}

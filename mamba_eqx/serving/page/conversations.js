// Conversations in the browser's storage: one entry each, so that two tabs do not overwrite each
// other's. The oldest are dropped beyond `MOST`, or where the browser has no room.

const PREFIX = "mamba_eqx:conversation:";
const OPTIONS = "mamba_eqx:options";
export const MOST = 50;

// A browser may refuse to store anything. Conversations then last as long as the page.
const memory = new Map();
const storage = (() => {
  try {
    localStorage.getItem(OPTIONS);
    return localStorage;
  } catch {
    return null;
  }
})();
const read = (name) => (storage ? storage.getItem(name) : memory.get(name) ?? null);
const erase = (name) => (storage ? storage.removeItem(name) : memory.delete(name));
const names = () => (storage ? Object.keys(storage) : [...memory.keys()]);

function write(name, text) {
  if (!storage) return memory.set(name, text);
  for (;;) {
    try {
      return storage.setItem(name, text);
    } catch (error) {
      const oldest = all().filter((c) => PREFIX + c.id !== name).pop();
      if (!oldest) throw error;
      erase(PREFIX + oldest.id);
    }
  }
}

const isTurn = (turn) =>
  turn !== null && ["user", "assistant"].includes(turn?.role) && typeof turn.text === "string";

// Returns a stored conversation, or null if the entry is damaged.
function parse(text) {
  try {
    const found = JSON.parse(text);
    const isWhole = typeof found.id === "string" && typeof found.model === "string";
    return isWhole && Number.isFinite(found.time) && found.turns.every(isTurn) ? found : null;
  } catch {
    return null;
  }
}

// Returns all conversations, the latest first.
function all() {
  const found = names().filter((name) => name.startsWith(PREFIX)).map((name) => parse(read(name)));
  return found.filter((c) => c !== null).sort((a, b) => b.time - a.time);
}

export const list = (model) => all().filter((c) => c.model === model);

export function create(model) {
  const id = [...crypto.getRandomValues(new Uint32Array(4))].map((n) => n.toString(36)).join("-");
  return { id, model, time: Date.now(), turns: [] };
}

export function save(conversation) {
  conversation.time = Date.now();
  write(PREFIX + conversation.id, JSON.stringify(conversation));
  all().slice(MOST).forEach((c) => erase(PREFIX + c.id));
}

// Writes a deleted conversation again, at its old place in the list.
export const restore = (conversation) => write(PREFIX + conversation.id, JSON.stringify(conversation));

export const remove = (id) => erase(PREFIX + id);

export const title = (conversation) =>
  conversation.turns.map((turn) => turn.text).join(" ").trim().slice(0, 60) || "Empty";

// Calls a function when another tab has changed something.
export const watch = (changed) =>
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed();
  });

export function loadOptions() {
  try {
    return Object(JSON.parse(read(OPTIONS) ?? "{}"));
  } catch {
    return {};
  }
}

export function saveOptions(values) {
  try {
    write(OPTIONS, JSON.stringify(values));
  } catch {
    // They last as long as the page.
  }
}

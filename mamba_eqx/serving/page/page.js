// The page: turns of a conversation, and what its buttons do. All text is put in as text, never as HTML.

import * as client from "./client.js";
import * as conversations from "./conversations.js";
import * as options from "./options.js";
import * as picture from "./state.js";

const LOOK = 120; // milliseconds between two pictures
const $ = (id) => document.getElementById(id);
const model = { id: "", isChat: false };
let shown = null; // the conversation on the page
let running = null; // the AbortController of the text that is being generated

function make(tag, parent, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return parent.appendChild(element);
}

function button(parent, text, action, className = "quiet idle") {
  const element = make("button", parent, text, className);
  element.type = "button";
  element.disabled = running !== null && element.classList.contains("idle");
  element.onclick = action;
  return element;
}

const tell = (error) => ($("error").textContent = error ? error.message : "");

// --- The list of conversations ---

function renderList() {
  $("list").replaceChildren();
  for (const conversation of conversations.list(model.id)) {
    const item = make("li", $("list"));
    const title = conversations.title(conversation);
    const isShown = conversation.id === shown.id;
    item.classList.toggle("shown", isShown);
    const open = button(item, title, () => show(conversation), "open idle");
    if (isShown) open.setAttribute("aria-current", "true");
    button(item, "✕", () => remove(conversation)).setAttribute("aria-label", `Delete ${title}`);
  }
}

function show(conversation) {
  shown = conversation;
  tell(null);
  $("status").textContent = "";
  picture.clear();
  renderTurns();
  renderList();
  $("prompt").focus({ preventScroll: true });
}

function remove(conversation) {
  conversations.remove(conversation.id);
  if (conversation.id === shown.id) show(conversations.create(model.id));
  else renderList();
  $("status").textContent = "Deleted. ";
  button($("status"), "Undo", () => {
    conversations.restore(conversation);
    show(conversation);
  });
}

function removeAll() {
  const found = conversations.list(model.id);
  if (!found.length || !confirm(`Delete all ${found.length} conversations?`)) return;
  found.forEach(({ id }) => conversations.remove(id));
  show(conversations.create(model.id));
}

function save() {
  try {
    if (shown.turns.length) conversations.save(shown);
    else conversations.remove(shown.id);
  } catch {
    tell(new Error("This browser has no room for the conversation, which lasts until you leave."));
  }
  renderList();
}

// --- Turns ---

function renderTurns() {
  $("log").replaceChildren();
  shown.turns.forEach(renderTurn);
  scroll();
}

function renderTurn(turn, index) {
  const card = make("article", $("log"), "", turn.role);
  make("h3", card, turn.role === "user" ? "You" : model.id);
  const text = make("div", card, "", "text");
  const content = text.appendChild(document.createTextNode(turn.text));
  const bar = make("div", card, "", "bar");
  const stats = make("span", bar, turn.stats ?? "", "stats");
  if (turn.role === "user") button(bar, "Edit", () => edit(card, text, index));
  else button(bar, "Again", () => resend(index));
  button(bar, "Fork", () => fork(index));
  return { content, stats };
}

// Lets the user change a turn. What followed it is generated anew.
function edit(card, text, index) {
  const editor = document.createElement("div");
  editor.className = "editor";
  const area = make("textarea", editor);
  area.setAttribute("aria-label", "Edit the prompt");
  area.value = shown.turns[index].text;
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  const bar = make("div", editor, "", "bar");
  const close = () => {
    editor.replaceWith(text);
    card.querySelector("button").focus();
  };
  const accept = () => {
    if (!area.value || running) return;
    const before = [...shown.turns];
    shown.turns[index] = { role: "user", text: area.value };
    resend(index + 1, before);
  };
  button(bar, "Send", accept, "idle");
  button(bar, "Cancel", close, "");
  area.onkeydown = (event) => {
    if (isEnter(event)) accept();
    else if (event.key !== "Escape" || running) return;
    else close();
    event.preventDefault();
  };
  text.replaceWith(editor);
  area.focus();
}

// Generates a turn anew, and forgets what followed it once there is an answer.
function resend(index, before = [...shown.turns]) {
  shown.turns.length = index;
  renderTurns();
  generate(before);
}

// Opens a copy of the conversation up to a turn. The prefix cache mostly has the state after it.
function fork(index) {
  const copy = conversations.create(model.id);
  copy.turns = shown.turns.slice(0, index + 1).map((turn) => ({ ...turn }));
  show(copy);
  save();
}

const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;
const scroll = () => $("log").lastElementChild?.scrollIntoView({ block: "end" });
const isAtEnd = () => {
  const box = [$("log"), document.documentElement].find((e) => e.scrollHeight > e.clientHeight + 1);
  return !box || box.scrollHeight - box.scrollTop - box.clientHeight < 80;
};

// --- Generating ---

function setRunning(controller) {
  running = controller;
  document.querySelectorAll("button.idle").forEach((b) => (b.disabled = controller !== null));
  $("send").textContent = controller ? "Stop" : "Send";
  $("log").setAttribute("aria-busy", String(controller !== null));
}

function question() {
  const { turns } = shown;
  if (!model.isChat) {
    return ["/v1/completions", { prompt: turns.map((turn) => turn.text).join("") }];
  }
  const messages = turns.map(({ role, text }) => ({ role, content: text }));
  if (options.system()) messages.unshift({ role: "system", content: options.system() });
  return ["/v1/chat/completions", { messages }];
}

// Looks at the state until the text ends, and once more then.
async function watch(text) {
  while (text.id) {
    const isLast = text.ended;
    const found = await client.state(text.id);
    if (text.id && found) {
      picture.draw(found);
      text.found = found;
      if (!text.ended) $("status").textContent = rate(found.new_tokens, text, performance.now());
    }
    if (isLast) return;
    await new Promise((resolve) => setTimeout(resolve, LOOK));
  }
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function rate(tokens, { first }, now) {
  const seconds = (now - first) / 1000;
  const speed = tokens > 1 && seconds > 0.002 ? `, ${Math.round((tokens - 1) / seconds)} tokens/s` : "";
  return plural(tokens, "token") + speed;
}

// Returns what is shown below a text that has ended.
function described(text, start, reason) {
  const { usage, found } = text;
  const tokens = usage?.completion_tokens ?? found?.new_tokens;
  const parts = tokens === undefined ? [] : [rate(tokens, text, text.last)];
  if (text.first) parts.push(`first after ${picture.duration((text.first - start) / 1000)}`);
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? found?.cached_tokens;
  if (cached) {
    const saved = found ? `, ${picture.duration(found.saved_seconds)} saved` : "";
    parts.push(`${cached} of ${found?.prompt_tokens ?? usage.prompt_tokens} prompt tokens cached${saved}`);
  }
  parts.push(reason);
  return parts.join(" · ");
}

// Brings back the turns before a failed request, or puts a new prompt back into its field.
function giveBack(before) {
  if (before) shown.turns = before;
  else if (shown.turns.at(-1)?.role === "user" && !$("prompt").value) $("prompt").value = shown.turns.pop().text;
  renderTurns();
}

const REASONS = { stop: "ended by itself", length: "ended at the limit of tokens" };

async function generate(before = null) {
  tell(null);
  let fields;
  try {
    fields = options.read();
  } catch (error) {
    giveBack(before);
    return tell(error);
  }
  const [path, asked] = question();
  if (shown.turns.length && !before) save(); // What the user wrote outlives a reload.
  const controller = new AbortController();
  setRunning(controller);
  $("status").textContent = "Waiting …";
  const turn = { role: "assistant", text: "" };
  const view = renderTurn(turn, shown.turns.length);
  shown.turns.push(turn);
  scroll();
  const text = { id: null, ended: false, found: null, usage: null, first: 0, last: 0 };
  const start = performance.now();
  let reason = "ended early";
  let watching = null;
  try {
    for await (const piece of client.stream(path, { model: model.id, ...fields, ...asked }, controller.signal)) {
      text.last = performance.now();
      text.first ||= text.last;
      text.usage = piece.usage ?? text.usage;
      reason = REASONS[piece.finish] ?? reason;
      const follows = isAtEnd();
      turn.text += piece.text;
      view.content.appendData(piece.text);
      if (follows) scroll();
      if (!watching) {
        text.id = piece.id;
        watching = watch(text);
      }
    }
  } catch (error) {
    if (controller.signal.aborted) reason = "stopped";
    else tell(error);
  }
  text.ended = true;
  text.last = controller.signal.aborted ? performance.now() : text.last;
  await watching;
  if (text.first) {
    const follows = isAtEnd();
    turn.stats = view.stats.textContent = described(text, start, reason);
    if (follows) scroll();
  } else {
    shown.turns.pop();
    giveBack(before);
  }
  $("status").textContent = "";
  setRunning(null);
  save();
}

function send() {
  const text = $("prompt").value;
  const canContinue = !model.isChat && shown.turns.length > 0;
  if (running || (!text && !canContinue)) return;
  if (text) {
    const turn = { role: "user", text };
    shown.turns.push(turn);
    renderTurn(turn, shown.turns.length - 1);
  }
  $("prompt").value = "";
  generate();
}

// --- The start ---

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
};
$("prompt").onkeydown = (event) => {
  if (!isEnter(event)) return;
  event.preventDefault();
  send();
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("new").onclick = () => show(conversations.create(model.id));
$("clear").onclick = removeAll;

// Where there is room, the lists are open.
const wide = matchMedia("(min-width: 62.01rem)");
wide.onchange = () => ["conversations", "state"].forEach((id) => ($(id).open = wide.matches));
wide.onchange();

try {
  const { id, has_chat_template } = await client.model();
  Object.assign(model, { id, isChat: has_chat_template });
  document.title = `${id} – mamba_eqx`;
  $("model").textContent = id;
  $("mode").textContent = model.isChat ? "chat" : "continues a text";
  $("prompt").placeholder = model.isChat ? "Message" : "The beginning of a text, or nothing to continue";
  $("log").dataset.empty = model.isChat ? "Write a message." : "Write the beginning of a text.";
  options.make(model.isChat);
  show(conversations.list(id)[0] ?? conversations.create(id));
  conversations.watch(() => {
  if (running) return;
  // What another tab has deleted must not be saved again by this one.
  const isThere = conversations.list(model.id).some(({ id }) => id === shown.id);
  if (shown.turns.length && !isThere) show(conversations.create(model.id));
  renderList();
});
} catch (error) {
  tell(error);
}

// The fields of the options, and what they ask the server for.

import { loadOptions, saveOptions } from "./conversations.js";

// Empty fields are not sent: the server's own value holds, which is shown in the empty field.
const NUMBERS = [
  ["max_tokens", "Tokens at most", { min: 1, step: 1, value: 256 }],
  ["temperature", "Temperature", { min: 0, max: 10, step: "any", value: 0.8 }],
  ["top_p", "Top p", { min: 0, max: 1, step: "any", empty: "1" }],
  ["top_k", "Top k", { min: 0, step: 1, empty: "all" }],
  ["min_p", "Min p", { min: 0, max: 1, step: "any", empty: "0" }],
  ["typical_p", "Typical p", { min: 0.000001, max: 1, step: "any", empty: "1" }],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, max: 100, step: "any", empty: "1" }],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: "any", empty: "0" }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: "any", empty: "0" }],
  ["seed", "Seed", { step: 1, empty: "random" }],
];
const TEXTS = [
  ["stop", "Stop strings, one per line (\\n is a line break)", ""],
  ["logit_bias", "Logit bias", 'such as {"10": -100}'],
];
const SYSTEM = ["system", "System message", ""];

const $ = (id) => document.getElementById(id);
const control = (name) => $(`option-${name}`);

function add(name, title, element, isWide) {
  const label = document.createElement("label");
  label.className = isWide ? "wide" : "";
  label.append(title, element);
  element.id = `option-${name}`;
  $("fields").append(label);
}

// Makes the fields. Conversations also have a system message.
export function make(isChat) {
  for (const [name, title, { value = "", empty = "", ...limits }] of NUMBERS) {
    const input = Object.assign(document.createElement("input"), { type: "number", ...limits });
    input.defaultValue = value;
    input.placeholder = empty;
    add(name, title, input, false);
  }
  for (const [name, title, empty] of isChat ? [SYSTEM, ...TEXTS] : TEXTS) {
    const area = Object.assign(document.createElement("textarea"), { rows: 2, placeholder: empty });
    add(name, title, area, true);
  }
  const inputs = [...$("fields").querySelectorAll("input, textarea")];
  const known = loadOptions();
  for (const input of inputs) {
    const value = known[input.id];
    if (typeof value === "string") input.value = value;
  }
  const save = () => saveOptions(Object.fromEntries(inputs.map((input) => [input.id, input.value])));
  $("fields").oninput = save;
  $("reset").onclick = () => {
    for (const input of inputs) input.value = input.defaultValue;
    save();
  };
}

export const system = () => control("system")?.value ?? "";

// Returns the fields of a request. Throws an error that names a field which is wrong.
export function read() {
  const found = {};
  for (const [name, title] of NUMBERS) {
    const input = control(name);
    if (!input.checkValidity()) throw new Error(`${title}: ${input.validationMessage}`);
    if (input.value !== "") found[name] = Number(input.value);
  }
  const stops = control("stop").value.split("\n").filter((line) => line !== "");
  if (stops.length) found.stop = stops.map((line) => line.replaceAll("\\n", "\n"));
  const bias = control("logit_bias").value.trim();
  if (bias) {
    try {
      found.logit_bias = JSON.parse(bias);
    } catch {
      throw new Error('The logit bias must be a JSON object of token ids, such as {"10": -100}.');
    }
  }
  return found;
}

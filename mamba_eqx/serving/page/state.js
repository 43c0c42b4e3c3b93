// The picture of a recurrent state.

const $ = (id) => document.getElementById(id);
const make = (tag, parent) => parent.appendChild(document.createElement(tag));

export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  const power = Math.min(3, bytes > 0 ? Math.floor(Math.log2(bytes) / 10) : 0);
  const value = bytes / 1024 ** power;
  return `${value.toFixed(power > 0 && value < 100 ? 1 : 0)} ${units[power]}`;
}

export const duration = (seconds) =>
  seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`;

function paint(canvas, [rows, columns], pixels) {
  const bytes = Uint8Array.from(atob(pixels), (character) => character.charCodeAt(0));
  if (canvas.width !== columns) canvas.width = columns;
  if (canvas.height !== rows) canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  bytes.forEach((byte, i) => {
    const value = (byte - 128) / 127;
    const colour = value > 0 ? [214, 69, 56] : [44, 110, 203]; // Zero is as the page's own colour.
    image.data.set([...colour, 255 * Math.min(1, Math.abs(value))], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

// Shows what the server tells about a text. Without layers, the picture stays as it was.
export function draw({ layers, prompt_tokens, cached_tokens, saved_seconds, new_tokens }) {
  $("position").textContent = `${prompt_tokens} + ${new_tokens} new`;
  $("cached").textContent = cached_tokens
    ? `${cached_tokens} tokens, ${duration(saved_seconds)} saved`
    : "nothing to reuse";
  if (!layers) return;
  const list = $("layers");
  while (list.children.length > layers.length) list.lastChild.remove();
  while (list.children.length < layers.length) {
    const item = make("li", list);
    make("span", item).textContent = list.children.length;
    make("canvas", item).setAttribute("role", "img");
    const norm = make("div", item);
    norm.className = "norm";
    make("span", norm);
    make("div", norm).className = "level";
  }
  const largest = Math.max(...layers.map(({ norm }) => norm), 1e-30);
  layers.forEach(({ kind, bytes, norm, shape, pixels }, i) => {
    const [, canvas, shown] = list.children[i].children;
    paint(canvas, shape, pixels);
    canvas.setAttribute("aria-label", `Layer ${i + 1}, ${kind}, norm ${norm.toPrecision(3)}`);
    canvas.title = `${kind}, ${size(bytes)}`;
    shown.firstChild.textContent = norm < 1e4 ? norm.toPrecision(3) : norm.toExponential(1);
    shown.lastChild.style.width = `${(100 * norm) / largest}%`;
  });
  const total = layers.reduce((sum, { bytes }) => sum + bytes, 0);
  const grows = layers.some(({ kind }) => kind === "attention");
  $("bytes").textContent = size(total) + (grows ? "" : ", at any length");
}

export function clear() {
  for (const id of ["bytes", "position", "cached"]) $(id).textContent = "–";
  $("layers").replaceChildren();
}

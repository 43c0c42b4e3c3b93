// Requests to this server: OpenAI's endpoints, and the states of texts.

const KEY = "mamba_eqx:key"; // in the storage of this tab only
let key = null;
try {
  key = sessionStorage.getItem(KEY);
} catch {
  // The browser stores nothing.
}

// Asks for the API key of the server, and returns whether one was given.
function askKey() {
  const dialog = document.getElementById("ask");
  const input = document.getElementById("key");
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      if (dialog.returnValue === "ok" && input.value) {
        key = input.value;
        try {
          sessionStorage.setItem(KEY, key);
        } catch {
          // The key lasts as long as the page.
        }
        resolve(true);
      }
      resolve(false);
    };
  });
}

async function request(path, { body, signal, mayAsk = true } = {}) {
  for (;;) {
    const headers = { "Content-Type": "application/json" };
    if (key !== null) headers.Authorization = `Bearer ${key}`;
    const method = body === undefined ? "GET" : "POST";
    const answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    if (answer.ok) return answer;
    if (answer.status === 401 && mayAsk && (await askKey())) continue;
    const found = await answer.json().catch(() => null);
    throw new Error(found?.error?.message ?? `The server answers ${answer.status}.`);
  }
}

export const model = async () => (await (await request("/v1/models")).json()).data[0];

// Returns the state of a text, or null if the server has forgotten the text or is busy.
export async function state(id) {
  try {
    return await (await request("/state", { body: { id }, mayAsk: false })).json();
  } catch {
    return null;
  }
}

// Yields the pieces of a streamed answer: `{ id, text, finish, usage }`.
export async function* stream(path, body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await request(path, { body: asked, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const { id, error, choices, usage } = JSON.parse(line.slice(6));
      if (error) throw new Error(error.message);
      const choice = choices[0];
      const text = choice?.text ?? choice?.delta?.content ?? "";
      yield { id, text, finish: choice?.finish_reason ?? null, usage };
    }
  }
  throw new Error("The server ended the answer early. Try again.");
}

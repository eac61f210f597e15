// One streamed answer from the gateway, through the admin listener, with every token's time.
import { call } from "./store.js";

const LEDGER_TRIES = 6;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Server-sent events of a response, as parsed JSON, until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const told = line.slice(5).trim();
      if (told === "[DONE]") return;
      yield JSON.parse(told);
    }
  }
}

const words = (error) => error?.message ?? error?.what ?? "";

/** Ask; `show(answer)` runs at each piece. The answer: text, finish, error, seconds since it was sent. */
export async function ask(body, signal, show) {
  const began = performance.now();
  const since = () => (performance.now() - began) / 1e3;
  const answer = { text: "", finish: "", error: "", at: [], first: null, end: null, usage: null, id: "", row: null };
  try {
    const response = await call("/ui/play", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });
    answer.id = response.headers.get("x-neaptide-request-id") ?? "";
    if (!response.ok) throw new Error(words((await response.json()).error) || `HTTP ${response.status}`);
    for await (const event of events(response)) {
      if (event.error) throw new Error(words(event.error));
      const choice = event.choices?.[0];
      answer.usage = event.usage ?? answer.usage;
      answer.finish = choice?.finish_reason ?? answer.finish;
      if (!choice?.delta?.content) continue;
      answer.text += choice.delta.content;
      answer.at.push(since());
      answer.first ??= since();
      show({ ...answer, end: since() });
    }
  } catch (e) {
    answer.finish = e.name === "AbortError" ? "stopped" : "error";
    answer.error = e.name === "AbortError" ? "" : e.message;
  }
  answer.end = since();
  return answer;
}

/** The ledger's row of a request: what it waited, where it ran, what it cost; null when it does not come. */
export async function ledgerRow(id) {
  for (let n = 0; id && n < LEDGER_TRIES; n++) {
    await pause(250 * (n + 1));
    const response = await call(`/api/v1/usage?limit=20&since_s=${Math.floor(Date.now() / 1e3) - 960}`);
    if (!response.ok) return null;
    const row = (await response.json()).rows.find((r) => r.usage.request_id === id);
    if (row) return row;
  }
  return null;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export const asCurl = (api, body) =>
  `curl ${api}/chat/completions \\\n  --oauth2-bearer "$OPENAI_API_KEY" \\\n  -H 'content-type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}`;

export function asPython(api, { stream_options, stream, ...body }) {
  const values = Object.entries(body).map(([k, v]) => `    ${k}=${literal(v)},`);
  return [
    "import os", "", "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(api)}, api_key=os.environ["OPENAI_API_KEY"])`,
    "stream = client.chat.completions.create(", ...values, "    stream=True,", ")",
    "for chunk in stream:", "    if chunk.choices:", '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
}

/** JSON is Python here: strings, numbers, lists and dicts only. */
const literal = (value) => JSON.stringify(value);

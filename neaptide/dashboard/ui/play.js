// The playground: a conversation, and beneath each answer where its time went.
import { html } from "./html.js";
import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { NONE, count, money, span } from "./numbers.js";
import { chosen, session, state } from "./store.js";
import { ask, asCurl, asPython, ledgerRow } from "./talk.js";
import { language, t } from "./words.js";

const GUIDE = "guide";
const turns = signal([]); // {question, body, answer, busy}
const draft = signal("");
const system = signal("");
const limit = signal("");
const heat = signal("");
const model = signal("");
let stopper = null;

const asked = () => state.value.models.filter((m) => !m.members?.length).map((m) => m.model); // a pool answers nobody
const current = () => [model.value, chosen.value].find((name) => asked().includes(name)) ?? asked()[0] ?? "";
const running = () => turns.value.at(-1)?.busy ?? false;

function request(question) {
  const past = turns.value.filter((turn) => turn.answer?.text && !turn.answer.error);
  const messages = past.flatMap((turn) => [{ role: "user", content: turn.question }, { role: "assistant", content: turn.answer.text }]);
  const first = system.value.trim() ? [{ role: "system", content: system.value.trim() }] : [];
  const body = { model: current(), messages: [...first, ...messages, { role: "user", content: question }] };
  if (limit.value) body.max_tokens = Number(limit.value);
  if (heat.value) body.temperature = Number(heat.value);
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

/** `show` at most once a frame, with the newest: an engine may be faster than a screen. */
function paced(show) {
  let newest = null;
  return (answer) => {
    if (newest === null) requestAnimationFrame(() => (show(newest), (newest = null)));
    newest = answer;
  };
}

async function send(question) {
  if (!question.trim() || running()) return;
  const body = request(question);
  const at = turns.value.length;
  const put = (turn) => (turns.value = turns.value.map((old, n) => (n === at ? { ...old, ...turn } : old)));
  turns.value = [...turns.value, { question, body, answer: null, busy: true }];
  draft.value = "";
  stopper = new AbortController();
  const answer = await ask(body, stopper.signal, paced((answer) => running() && put({ answer })));
  put({ answer, busy: false });
  const row = await ledgerRow(answer.id);
  if (row) put({ answer: { ...answer, row } });
}

const W = 1000;
const TICKS = 400; // more could not be told apart

/** Waited, until the first token, tokens, end; a tick a token. */
function Waterfall({ a }) {
  const whole = a.end || 1e-3;
  const x = (s) => Math.min(W, (s / whole) * W);
  const first = a.first ?? whole;
  const queued = Math.min(a.row?.usage.queued_s ?? 0, first);
  const every = Math.ceil(a.at.length / TICKS);
  const ticks = a.at.filter((_, n) => n % every === 0).map((s) => `M${x(s).toFixed(1)} 4V24`).join("");
  return html`<svg class="waterfall" viewBox="0 0 ${W} 28" preserveAspectRatio="none" role="img" aria-label=${t("play.waterfall")}>
    <rect class="queued" x="0" y="8" width=${x(queued)} height="12" /><rect class="prefill" x=${x(queued)} y="8" width=${x(first) - x(queued)} height="12" />
    <rect class="decode" x=${x(first)} y="8" width=${W - x(first)} height="12" /><path class="token" d=${ticks} /></svg>`;
}

function Numbers({ a }) {
  const used = a.row?.usage ?? {};
  const tokens = a.usage?.completion_tokens ?? null;
  const pace = tokens > 1 && a.at.length > 1 ? (a.at.at(-1) - a.first) / (tokens - 1) : null;
  const cached = a.usage?.prompt_tokens_details?.cached_tokens;
  const facts = [
    [t("play.queued"), span(a.row ? used.queued_s ?? 0 : null), "queued"],
    ["TTFT", span(a.first), "prefill"],
    ["TPOT", span(pace), "decode"],
    [t("play.tokens"), `${count(a.usage?.prompt_tokens)}${cached ? ` (${t("play.cached", { n: cached })})` : ""} → ${count(tokens)}`],
    [t("play.whole"), span(a.end)],
    [t("play.replica"), (used.attempts ?? []).map((x) => x.replica).join(" → ") || NONE],
    [t("play.price"), a.row?.amount_nanos === null || !a.row ? NONE : money(a.row.amount_nanos / 1e9, state.value.currency)],
  ];
  return html`<dl class="numbers">${facts.map(([name, value, kind]) => html`<div><dt>${kind && html`<i class=${kind}></i>`}${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

async function copy(text, e) {
  const button = e.currentTarget;
  const said = button.textContent;
  await navigator.clipboard.writeText(text);
  button.textContent = t("play.copied");
  setTimeout(() => (button.textContent = said), 1200);
}

function Turn({ turn }) {
  const a = turn.answer;
  const api = state.value.api;
  const ended = { length: t("play.length"), stopped: t("play.stopped") }[a?.finish];
  return html`<li><p class="question">${turn.question}</p>
    <div class="answer" aria-live="polite">${a?.text}${turn.busy && html`<span class="caret"></span>`}${ended && html`<small> ${ended}</small>`}
      ${a?.error && html`<p class="error" role="alert">${a.error}</p>`}</div>
    ${a && html`<${Waterfall} a=${a} /><${Numbers} a=${a} />`}
    ${!turn.busy && html`<p class="tools"><button onClick=${(e) => copy(asCurl(api, turn.body), e)}>${t("play.curl")}</button>
      <button onClick=${(e) => copy(asPython(api, turn.body), e)}>${t("play.python")}</button></p>`}</li>`;
}

function Settings() {
  return html`<details><summary>${t("play.settings")}</summary><div class="settings">
    <label>${t("play.system")}<textarea rows="2" value=${system.value} onInput=${(e) => (system.value = e.target.value)}></textarea></label>
    <label>max_tokens<input type="number" min="1" value=${limit.value} onInput=${(e) => (limit.value = e.target.value)} /></label>
    <label>temperature<input type="number" min="0" max="2" step="0.1" value=${heat.value} onInput=${(e) => (heat.value = e.target.value)} /></label>
  </div></details>`;
}

function Beginning() {
  const chips = (current() === GUIDE && session.value.chips?.[language.value]) || [];
  return html`<div><p class="hint">${current() === GUIDE ? t("play.guide") : t("play.empty")}</p>
    <p class="chips">${chips.map((text) => html`<button key=${text} onClick=${() => send(text)}>${text}</button>`)}</p></div>`;
}

const typed = (e) => {
  if (e.key !== "Enter" || e.shiftKey || e.isComposing) return;
  e.preventDefault();
  send(draft.value);
};

export function Playground() {
  const end = useRef(null);
  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [turns.value]);
  const names = asked();
  if (!names.length) return html`<p class="hint">${t("play.none")}</p>`;
  return html`<section class="card play">
    <header><label>${t("play.model")} <select value=${current()} onChange=${(e) => (model.value = e.target.value)}>
      ${names.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}</select></label>
      <button onClick=${() => (turns.value = [])} disabled=${running() || !turns.value.length}>${t("play.new")}</button></header>
    ${turns.value.length ? html`<ol class="turns">${turns.value.map((turn, n) => html`<${Turn} turn=${turn} key=${n} />`)}</ol>` : html`<${Beginning} />`}
    <div ref=${end}></div><${Settings} />
    <form onSubmit=${(e) => (e.preventDefault(), send(draft.value))}>
      <textarea rows="2" aria-label=${t("play.ask")} placeholder=${t("play.ask")} value=${draft.value} onInput=${(e) => (draft.value = e.target.value)} onKeyDown=${typed}></textarea>
      ${running() ? html`<button key="stop" type="button" class="stop" onClick=${() => stopper.abort()}>${t("play.stop")}</button>`
        : html`<button key="send" type="submit" class="send" disabled=${!draft.value.trim()}>${t("play.send")}</button>`}
    </form></section>`;
}

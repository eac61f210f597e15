// A count set by hand for a while: what is in force and how long still, and how it is set and ended.
import { html } from "./html.js";
import { signal } from "@preact/signals";
import { useState } from "preact/hooks";
import { lasting, moment } from "./numbers.js";
import { ALL, call, chosen, controlNow, field, now, session, state } from "./store.js";
import { t } from "./words.js";

const SPANS_S = [900, 3600, 7200, 28800, 86400, 604800];
const refused = signal({}); // model -> why the last try was
const scaled = () => state.value.models.filter((m) => !m.remote && m.max > m.min && (chosen.value === ALL || m.model === chosen.value));

/** Control's answer comes back as the page's state; only a refusal is told here. */
async function change(model, path, options) {
  const response = await call(path, options).catch(() => null);
  const error = response?.ok ? "" : ((await response?.json().catch(() => null))?.error ?? { what: t("link.lost") });
  refused.value = { ...refused.value, [model]: error && [error.what, error.why, error.fix].filter(Boolean).join(" · ") };
}

const set = (model, replicas, for_s) =>
  change(model, "/api/v1/scale/override", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model, replicas, for_s, by: session.value.by }),
  });
const clear = (model) => change(model, `/api/v1/scale/override?${new URLSearchParams({ model })}`, { method: "DELETE" });

function InForce({ of, policy }) {
  if (!of) return html`<span class="hint">${t("hand.policy", { policy })}</span>`;
  const values = { n: of.count, until: moment(of.until_wall_s), left: lasting(Math.max(0, of.until_wall_s - controlNow())) };
  return html`<span>${of.by ? t("hand.held_by", { ...values, by: of.by }) : t("hand.held", values)}</span>`;
}

function Line({ m }) {
  const [replicas, setReplicas] = useState(m.override?.count ?? field(now.value[m.model], "wanted") ?? m.min);
  const [for_s, setFor] = useState(3600);
  const submit = (e) => (e.preventDefault(), set(m.model, replicas, for_s));
  const bounds = { min: m.min, max: m.max };
  return html`<li><header><b>${m.model}</b> <${InForce} of=${m.override} policy=${m.policy} /></header>
    <form onSubmit=${submit} aria-label=${t("hand.form", { model: m.model })}>
      <label>${t("hand.count", bounds)} <input type="number" required ...${bounds} step="1" value=${replicas} onInput=${(e) => setReplicas(e.target.valueAsNumber)} /></label>
      <label>${t("hand.for")} <select value=${for_s} onChange=${(e) => setFor(Number(e.target.value))}>${SPANS_S.map((s) => html`<option value=${s}>${lasting(s)}</option>`)}</select></label>
      <button class="send">${t("hand.set")}</button>
      ${m.override && html`<button type="button" onClick=${() => clear(m.model)}>${t("hand.clear")}</button>`}
    </form>${refused.value[m.model] && html`<p class="error" role="alert">${refused.value[m.model]}</p>`}</li>`;
}

export function Hand() {
  const models = scaled();
  return html`<div class="hand"><h2>${t("hand.title")}</h2>
    ${models.length ? html`<ul>${models.map((m) => html`<${Line} key=${m.model} m=${m} />`)}</ul>` : html`<p class="hint">${t("hand.none")}</p>`}</div>`;
}

// What other policies would have cost on the same arrivals, beside what ran: a day, or all that are kept.
import { html } from "./html.js";
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { NONE, count, money, share } from "./numbers.js";
import { ALL, chosen, loadShadows, shadows, state } from "./store.js";
import { locale, t } from "./words.js";

const EVERY_MS = 60_000;
const EVERY_DAY = "";
const day = signal(null); // null: the newest
const today = () => new Date().toISOString().slice(0, 10); // days are UTC
const named = (d) => (d === today() ? t("shadow.today") : new Date(`${d}T00:00Z`).toLocaleDateString(locale(), { dateStyle: "medium", timeZone: "UTC" }));

/** A policy's days of a model, as one; what nobody told stays null. */
function sum(rows) {
  const add = (name) => (rows.some((r) => r[name] === null) ? null : rows.reduce((total, r) => total + r[name], 0));
  const arrivals = add("arrivals");
  const late = rows.reduce((total, r) => total + (r.attainment === null ? 0 : (1 - r.attainment) * r.arrivals), 0);
  return { ...rows[0], replica_hours: add("replica_hours"), cost: add("cost"), arrivals, late: arrivals ? late / arrivals : null };
}

/** A line a policy: what ran first, then the cheapest. */
function lines(model, rows) {
  const of = {};
  for (const r of rows) if (r.model === model) (of[r.real ? ALL : r.policy] ??= []).push(r);
  const all = Object.values(of).map(sum).sort((a, b) => b.real - a.real || a.replica_hours - b.replica_hours);
  const real = all.find((r) => r.real);
  return all.map((r) => ({ ...r, more: real && (r.cost !== null && real.cost !== null ? r.cost - real.cost : r.replica_hours - real.replica_hours) }));
}

const amount = (r, v) => (r.cost === null ? t("shadow.hours", { n: count(v) }) : money(v, state.value.currency));

function sentence(r, when) {
  const values = { policy: r.policy, when, amount: amount(r, Math.abs(r.real ? (r.cost ?? r.replica_hours) : r.more ?? 0)) };
  const kind = r.real ? "ran" : r.more === undefined ? "alone" : Math.abs(r.more) < 1e-9 ? "same" : r.more > 0 ? "more" : "less";
  return t(`shadow.${kind}`, values) + (r.late === null ? "" : t("shadow.missed", { late: share(r.late) }));
}

function Table({ model, rows, when }) {
  const heads = ["policy", "replica_hours", "cost", "against", "in_slo", "said"];
  const against = (r) => (r.real || r.more === undefined ? "" : `${r.more > 0 ? "+" : r.more < 0 ? "−" : ""}${amount(r, Math.abs(r.more))}`);
  return html`<div class="scroll"><table class="shadows"><caption>${t("shadow.caption", { model, when })}</caption>
    <thead><tr>${heads.map((name) => html`<th scope="col">${t(`shadow.${name}`)}</th>`)}</tr></thead>
    <tbody>${lines(model, rows).map((r) => html`<tr key=${r.real ? ALL : r.policy} class=${r.real ? "real" : ""}><th scope="row">${r.policy}</th>
      <td>${count(r.replica_hours)}</td><td>${money(r.cost, state.value.currency)}</td><td>${against(r)}</td>
      <td>${r.late === null ? NONE : share(1 - r.late)}</td><td>${sentence(r, when)}</td></tr>`)}</tbody></table></div>`;
}

export function Shadows() {
  useEffect(() => {
    loadShadows();
    const timer = setInterval(loadShadows, EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  const mine = (shadows.value ?? []).filter((r) => chosen.value === ALL || r.model === chosen.value);
  const days = [...new Set(mine.map((r) => r.day))].sort().reverse();
  if (!days.length) return html`<div><h2>${t("shadow.title")}</h2><p class="hint">${t("shadow.none")}</p></div>`;
  const shown = days.includes(day.value) || day.value === EVERY_DAY ? day.value : days[0];
  const rows = shown === EVERY_DAY ? mine : mine.filter((r) => r.day === shown);
  const on = (d) => (d === today() ? named(d) : t("shadow.on", { day: named(d) }));
  const when = shown === EVERY_DAY ? t("shadow.over", { n: days.length }) : on(shown);
  return html`<div class="decisions"><header><h2>${t("shadow.title")}</h2>
      <label>${t("shadow.day")} <select value=${shown} onChange=${(e) => (day.value = e.target.value)}>
        ${days.map((d) => html`<option key=${d} value=${d}>${named(d)}</option>`)}
        ${days.length > 1 && html`<option value=${EVERY_DAY}>${t("shadow.days", { n: days.length })}</option>`}</select></label></header>
    ${[...new Set(rows.map((r) => r.model))].map((model) => html`<${Table} key=${model} model=${model} rows=${rows} when=${when} />`)}
    <p class="hint">${t("shadow.note")}</p></div>`;
}

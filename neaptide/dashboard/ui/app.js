// The page's frame: which picture, which model, which span of time, which language.
import { render } from "preact";
import { signal } from "@preact/signals";
import { html } from "./html.js";
import { Capacity } from "./capacity.js";
import { Overview } from "./overview.js";
import { Playground } from "./play.js";
import { ALL, call, chosen, link, range, start, state } from "./store.js";
import { switchTheme, theme } from "./theme.js";
import { LANGUAGES, language, loadWords, speak, t } from "./words.js";

const PICTURES = { overview: Overview, capacity: Capacity, playground: Playground };
const NAMES = { en: "English", zh: "中文" };
const here = () => (location.hash.slice(1) in PICTURES ? location.hash.slice(1) : "overview");
const picture = signal(here());
addEventListener("hashchange", () => (picture.value = here()));

async function leave() {
  await call("/ui/session", { method: "DELETE" });
  location.assign("/");
}

function Head() {
  const other = LANGUAGES.find((name) => name !== language.value);
  return html`<header class="top"><h1><img src="/ui/icon.svg" alt="" />Neaptide</h1>
    <nav aria-label=${t("nav.pictures")}>${Object.keys(PICTURES).map(
      (name) => html`<a href=${`#${name}`} aria-current=${name === picture.value ? "page" : null}>${t(`nav.${name}`)}</a>`,
    )}</nav>
    <span class=${`link ${link.value}`} role="status">${t(`link.${link.value}`)}</span>
    <span class="switches"><a href=${`/docs?lang=${language.value}`}>${t("nav.docs")}</a>
      <button onClick=${() => speak(other)} lang=${other}>${NAMES[other]}</button>
      <button onClick=${switchTheme} aria-label=${t("nav.theme")} title=${t("nav.theme")}>${theme.value === "dark" ? "☀" : "☾"}</button>
      <button onClick=${leave}>${t("nav.leave")}</button></span></header>`;
}

function Scope() {
  if (picture.value === "playground") return null;
  return html`<div class="scope"><label>${t("scope.model")} <select value=${chosen.value} onChange=${(e) => (chosen.value = e.target.value)}>
      <option value=${ALL}>${t("scope.all")}</option>${state.value.models.map((m) => html`<option key=${m.model} value=${m.model}>${m.model}</option>`)}</select></label>
    <span role="group" aria-label=${t("scope.range")}>${["15m", "24h"].map(
      (name) => html`<button aria-pressed=${range.value === name} onClick=${() => (range.value = name)}>${t(`range.${name}`)}</button>`,
    )}</span></div>`;
}

function Page() {
  const Picture = PICTURES[picture.value];
  const ready = state.value?.models;
  return html`<${Head} /><main>${ready ? html`<${Scope} /><${Picture} />` : html`<p class="hint">${t("empty.wait")}</p>`}</main>
    <footer>${state.value && html`Neaptide ${state.value.version} · ${state.value.api}`}</footer>`;
}

if (location.search) history.replaceState(null, "", location.pathname + location.hash); // the ticket is used up
await Promise.all([loadWords(), start()]);
render(html`<${Page} />`, document.getElementById("page"));

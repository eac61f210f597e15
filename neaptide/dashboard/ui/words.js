// Texts in English and Chinese, from words.json: {key: {en, zh}}. A key that is missing fails a test.
import { signal } from "@preact/signals";

export const LANGUAGES = ["en", "zh"];
const kept = localStorage.getItem("language");
const asked = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
export const language = signal(LANGUAGES.includes(kept) ? kept : asked);
let catalogue = {};

export async function loadWords() {
  catalogue = await (await fetch("/ui/words.json")).json();
  document.documentElement.lang = locale();
}

export const locale = () => (language.value === "zh" ? "zh-CN" : "en");

export function speak(name) {
  language.value = name;
  localStorage.setItem("language", name);
  document.documentElement.lang = locale();
}

/** A flag's sentences. */
export const said = (flag) => flag.sentences[language.value];

/** The text of `key`, its {placeholders} filled; a name that has none yet stands for itself. */
export function t(key, values = {}) {
  const text = catalogue[key]?.[language.value] ?? key.slice(key.indexOf(".") + 1);
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

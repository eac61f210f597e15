// A theme switch and copy buttons; the page is whole without this file.
"use strict";
const words = document.body.dataset;
const root = document.documentElement;

function remembered() {
  try { return localStorage.getItem("theme"); } catch { return null; } // storage may be forbidden
}

function choose(theme) {
  root.dataset.theme = theme;
  try { localStorage.setItem("theme", theme); } catch { /* it lasts for this page then */ }
}

if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();

const themes = document.createElement("button");
themes.type = "button";
themes.textContent = "◐";
themes.title = words.themeLabel;
themes.setAttribute("aria-label", words.themeLabel);
themes.addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  choose(dark ? "light" : "dark");
});
document.querySelector("header nav").append(themes);

for (const block of document.querySelectorAll("pre")) {
  if (!navigator.clipboard) break; // only over https or on localhost
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = words.copy;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent);
    button.textContent = words.copied;
    setTimeout(() => { button.textContent = words.copy; }, 1500);
  });
  block.append(button);
}

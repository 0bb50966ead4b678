"use strict";
const root = document.documentElement;
const dark = () => root.style.colorScheme === "dark" || (!root.style.colorScheme && matchMedia("(prefers-color-scheme: dark)").matches);
document.querySelector("#theme").addEventListener("click", () => { root.style.colorScheme = dark() ? "light" : "dark"; });

for (const map of document.querySelectorAll(".heat")) {
  const readout = map.closest("figure").querySelector(".readout");
  const show = (event) => {
    const cell = event.target.closest("td[data-note]");
    if (!cell) return;
    map.querySelector(".shown")?.classList.remove("shown");
    cell.classList.add("shown");
    readout.textContent = cell.dataset.note;
  };
  for (const kind of ["pointerover", "click", "focusin"]) map.addEventListener(kind, show);
}

for (const button of document.querySelectorAll("[data-copy]")) {
  const command = document.getElementById(button.dataset.copy);
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(command);
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected: copy it";
    }
  });
}

addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details.result")) details.open = true; });

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
  const first = map.querySelector("td[data-note]");
  if (first) first.tabIndex = 0;
  map.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    const { cellIndex, parentElement } = event.target.closest("td") ?? {};
    const next = (down || right) && map.rows[parentElement.rowIndex + down]?.cells[cellIndex + right];
    if (!next?.dataset.note) return;
    event.preventDefault();
    next.focus();
  });
}

for (const part of document.querySelectorAll(".switched")) {
  part.addEventListener("change", () => {
    const switches = part.querySelectorAll("[data-switch]:is(:checked, select, [type=hidden])");
    const wanted = Object.fromEntries([...switches].map((one) => [one.dataset.switch, one.value]));
    for (const one of part.querySelectorAll("[data-shown]")) {
      one.hidden = !one.dataset.shown.split(" ").every((pair) => wanted[pair.split("=")[0]] === pair.split("=")[1]);
    }
  });
}

for (const section of document.querySelectorAll(".explored")) {
  const { points } = JSON.parse(document.querySelector("#data").textContent).explored[section.dataset.number];
  const marks = [...section.querySelectorAll("[data-point]")];
  const choose = (index) => {
    for (const card of section.querySelectorAll("[data-card]")) card.hidden = card.dataset.card !== String(index);
    for (const chart of section.querySelectorAll(".chart")) {
      const own = marks.filter((mark) => chart.contains(mark));
      for (const mark of own) mark.classList.toggle("chosen", mark.dataset.point === String(index));
      const stop = own.find((mark) => mark.dataset.point === String(index)) ?? own[0]; // one stop of the tab key in each chart
      for (const mark of own) mark.setAttribute("tabindex", mark === stop ? "0" : "-1");
    }
  };
  for (const mark of marks) {
    for (const kind of ["pointerover", "click", "focus"]) mark.addEventListener(kind, () => choose(mark.dataset.point));
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const own = marks.filter((other) => mark.closest(".chart").contains(other));
      own[(own.indexOf(mark) + step + own.length) % own.length].focus();
    });
  }
  for (const slider of section.querySelectorAll(".budget input")) {
    const field = slider.dataset.field;
    const of = (point) => point[field];
    const known = points.filter((point, index) => of(point) !== null && (point.command || !index)); // what one can have
    const fits = field === "bytes" ? (point) => of(point) <= slider.value : (point) => of(point) >= slider.value;
    const size = (value) => {
      const [unit, scale] = [["GB", 1e9], ["MB", 1e6]].find(([, scale]) => value >= scale) ?? ["kB", 1e3];
      return `${(value / scale).toPrecision(3)} ${unit}`;
    };
    const written = field === "bytes" ? size : (value) => `${(+value).toFixed(2)}×`;
    const [low, high] = [Math.min(...known.map(of)), Math.max(...known.map(of))];
    Object.assign(slider, { min: low, max: high, step: "any" });
    const tell = () => { slider.previousElementSibling.textContent = written(slider.value); };
    slider.value = of(points[section.querySelector("[data-card]:not([hidden])").dataset.card]) ?? low;
    slider.addEventListener("input", () => {
      tell();
      const fitting = known.filter(fits).sort((a, b) => (a.kl ?? Infinity) - (b.kl ?? Infinity));
      if (fitting.length) choose(points.indexOf(fitting[0]));
    });
    tell();
  }
  choose(section.querySelector("[data-card]:not([hidden])").dataset.card);
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

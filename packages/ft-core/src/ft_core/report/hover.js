// Read-outs under the pointer and by arrow keys. The page is whole without this.
"use strict";
for (const figure of document.querySelectorAll("figure")) {
  const source = figure.querySelector("script[type='application/json']");
  const area = figure.querySelector(".area");
  if (!source || !area) continue;
  const data = JSON.parse(source.textContent);
  const line = document.createElement("div");
  const box = document.createElement("div");
  line.className = "cross";
  box.className = "readout";
  box.setAttribute("role", "status");
  line.hidden = box.hidden = true;
  area.append(line, box);
  const scale = (v) => (data.log ? Math.log10(v) : v);
  const up = (v) => (scale(v) - scale(data.y[0])) / (scale(data.y[1]) - scale(data.y[0]));
  const across = (v) => (v - data.x[0]) / (data.x[1] - data.x[0]);
  const steps = [...new Set(data.series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const dots = data.series.map((s) => {
    const dot = document.createElement("i");
    dot.className = "dot " + s.style;
    dot.hidden = true;
    area.append(dot);
    return dot;
  });
  // Index of the value nearest to v in a rising list.
  const nearest = (list, v) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] < v) low = middle; else high = middle;
    }
    return Math.abs(list[low] - v) <= Math.abs(list[high] - v) ? low : high;
  };
  const print = (v) => {
    const size = Math.abs(v);
    const text = size && (size < 1e-4 || size >= 1e9) ? String(Number(v.toPrecision(4)))
      : Number(v.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 });
    return text.replace("-", "\u2212");
  };
  let at = -1;
  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at], near = (data.x[1] - data.x[0]) / 100;
    box.textContent = "";
    const head = document.createElement("b");
    head.textContent = "step " + step.toLocaleString("en");
    box.append(head);
    data.series.forEach((s, i) => {
      const k = nearest(s.x, step);
      dots[i].hidden = Math.abs(s.x[k] - step) > near;
      if (dots[i].hidden) return;
      dots[i].style.left = across(s.x[k]) * 100 + "%";
      dots[i].style.bottom = up(s.y[k]) * 100 + "%";
      const row = document.createElement("div");
      const key = document.createElement("i");
      key.className = "key " + s.style;
      const value = document.createElement("span");
      value.textContent = print(s.y[k]);
      row.append(key, value, data.series.length > 1 ? " " + s.label.replace(/ over .*/, "") : "");
      box.append(row);
    });
    const place = across(step);
    line.style.left = place * 100 + "%";
    box.style.left = place < 0.5 ? "calc(" + place * 100 + "% + 10px)" : "auto";
    box.style.right = place < 0.5 ? "auto" : "calc(" + (1 - place) * 100 + "% + 10px)";
    line.hidden = box.hidden = false;
  };
  const hide = () => {
    line.hidden = box.hidden = true;
    for (const dot of dots) dot.hidden = true;
  };
  const follow = (event) => {
    const frame = area.getBoundingClientRect();
    const share = (event.clientX - frame.left) / frame.width;
    show(nearest(steps, data.x[0] + share * (data.x[1] - data.x[0])));
  };
  area.addEventListener("pointermove", follow);
  area.addEventListener("pointerdown", follow);
  area.addEventListener("pointerleave", hide);
  area.tabIndex = 0;
  area.setAttribute("aria-label", figure.querySelector("figcaption b").textContent + ": read values with the arrow keys");
  area.setAttribute("role", "group");
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (by) show(at < 0 ? 0 : at + by);
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(steps.length - 1);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
}

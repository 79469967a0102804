/* Draws the figures, keeps them in the page's colours, reads their points to a keyboard, and fills their tables. */
"use strict";
(async () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const names = ["page", "panel", "text", "soft", "edge", "grid", "good", "info", "warn", "bad", "muted",
                 "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"];
  let chosen = "system", printing = false, colours = {};

  function setTheme() {
    const isDark = !printing && (chosen === "system" ? dark.matches : chosen === "dark");
    root.dataset.theme = isDark ? "dark" : "light";
    const style = getComputedStyle(root);
    colours = Object.fromEntries(names.map(name => [name, style.getPropertyValue("--" + name).trim()]));
  }

  // ---- what Python wrote → what Plotly takes: named colours, and text that it would read as HTML
  const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, "<br>");
  function themed(value, key = "") {
    if (Array.isArray(value)) return value.map(one => themed(one, key));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, themed(one, name)]));
    if (typeof value !== "string" || key === "hovertemplate") return value;
    if (key === "colorscale") return [[0, colours.bad], [0.5, colours.warn], [1, colours.c0]];
    return /color$/i.test(key) ? colours[value] ?? value : plain(value);
  }
  function merged(base, more) {
    const out = {...base};
    for (const [key, value] of Object.entries(more)) {
      const both = [value, out[key]].every(one => one && typeof one === "object" && !Array.isArray(one));
      out[key] = both ? merged(out[key], value) : value;
    }
    return out;
  }
  function layoutOf(figure) {
    const axis = {gridcolor: colours.grid, linecolor: colours.edge, zerolinecolor: colours.edge,
                  title: {standoff: 8}, fixedrange: touch, exponentformat: "power"};
    return merged({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 290, autosize: true,
      font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.text},
      margin: {l: 50, r: 14, t: 10, b: 44},
      // each axis makes room on its own side alone: with both sides free, ticks and margins can chase each other
      xaxis: {...axis, automargin: "height", tickangle: 0, nticks: innerWidth < 500 ? 6 : 0},
      yaxis: {...axis, automargin: "width"}, hovermode: "closest", dragmode: touch ? false : "zoom",
      hoverlabel: {bgcolor: colours.panel, bordercolor: colours.edge, font: {color: colours.text}, align: "left"},
      showlegend: false,
    }, themed(figure.layout));
  }
  const inputs = figure => [themed(figure.traces).map(trace => ({type: "scatter", ...trace})), layoutOf(figure),
                            {displayModeBar: false, responsive: true, displaylogo: false, showTips: false}];
  const at = figure => document.getElementById("plot-" + figure.key);
  const pause = () => new Promise(done => setTimeout(done));

  // ---- what the lines are; with many of them each can be taken out
  const glyphs = {circle: "●", square: "■", diamond: "◆", "triangle-up": "▲", "triangle-down": "▼", cross: "✚", star: "★", x: "✖"};
  const sides = {dash: "dashed", dot: "dotted", dashdot: "dashed"};
  function legend(figure) {
    if (figure.traces.length < 2) return;
    const box = document.createElement("div");
    box.className = "legend";
    figure.traces.forEach((trace, i) => {
      const entry = document.createElement(figure.traces.length > 4 ? "button" : "span");
      const name = [trace.line?.color, trace.marker?.color].flat().find(Boolean);
      const [line, mark] = ["lines", "markers"].map(part => trace.mode.includes(part) && document.createElement("i"));
      if (line) Object.assign(line, {className: "line"}).style.borderTopStyle = sides[trace.line?.dash] ?? "solid";
      if (mark) mark.textContent = glyphs[[trace.marker?.symbol].flat()[0]] ?? glyphs.circle;
      for (const part of [line, mark]) if (part) {
        Object.assign(part.style, {color: `var(--${name})`, opacity: trace.opacity ?? 1});
        part.setAttribute("aria-hidden", "true");
        entry.append(part);
      }
      entry.append(trace.name);
      if (entry.type === "submit") {
        entry.type = "button";
        entry.setAttribute("aria-pressed", "true");
        entry.addEventListener("click", () => {
          trace.visible = trace.visible === false;
          entry.setAttribute("aria-pressed", trace.visible);
          Plotly.restyle(at(figure), {visible: trace.visible}, [i]);
        });
      }
      box.append(entry);
    });
    at(figure).before(box);
  }

  // ---- tables of numbers, made when they are opened
  const shown = value => value === null || value === undefined ? "–"
    : typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(6)).toString() : String(value);
  const lookUp = (trace, path) => path.split(".").reduce((found, part) => found?.[part], trace);
  function tableOf(figure, {caption, columns}) {
    const frame = document.createElement("div"), table = document.createElement("table");
    Object.assign(frame, {className: "wide", tabIndex: 0});
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", caption);
    table.createCaption().textContent = caption;
    const head = table.createTHead().insertRow(), body = table.createTBody();
    const lists = columns.map(([title, trace, path]) => {
      const cell = document.createElement("th");
      Object.assign(cell, {textContent: title, scope: "col"});
      head.append(cell);
      return lookUp(figure.traces[trace], path) ?? [];
    });
    for (let row = 0; row < lists[0].length; row++) {
      const line = body.insertRow();
      for (const list of lists) line.insertCell().textContent = shown(list[row]);
    }
    frame.append(table);
    return frame;
  }
  for (const part of document.querySelectorAll("details.numbers")) {
    const figure = figures.find(one => one.key === part.dataset.plot);
    part.addEventListener("toggle", () => {
      if (part.open && part.children.length === 1) part.append(...figure.numbers.map(one => tableOf(figure, one)));
    });
  }

  // ---- points by the keyboard: left and right along a line, up and down between lines
  function listen(figure) {
    const div = at(figure), reading = div.parentElement.querySelector(".reading");
    const lines = figure.traces.map((_, i) => i).filter(i => figure.traces[i].hoverinfo !== "skip");
    let line = 0, point = -1;
    div.addEventListener("keydown", event => {
      const step = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]}[event.key];
      if (!step || !lines.length) return;
      event.preventDefault();
      line = (line + step[0] + lines.length) % lines.length;
      const trace = figure.traces[lines[line]], last = trace.x.length - 1;
      point = Math.max(0, Math.min(last, point + step[1]));
      Plotly.Fx.hover(div, [{curveNumber: lines[line], pointNumber: point}], trace.yaxis === "y2" ? "xy2" : "xy");
      const what = trace.run?.[point] ?? trace.text?.[point];
      reading.textContent = [trace.name, ...(what ? [what] : []), `${shown(trace.x[point])}: ${shown(trace.y[point])}`].join(", ");
    });
    div.addEventListener("blur", () => { reading.textContent = ""; Plotly.Fx.unhover(div); });
  }

  // ---- the switch, and paper
  const button = document.getElementById("theme"), kinds = ["system", "light", "dark"];
  const words = {system: "Colours: as the system", light: "Colours: light", dark: "Colours: dark"};
  const drawn = new Set();
  function redraw() {
    const before = root.dataset.theme;
    setTheme();
    if (root.dataset.theme !== before) for (const figure of drawn) Plotly.react(at(figure), ...inputs(figure));
  }
  button.addEventListener("click", () => {
    chosen = kinds[(kinds.indexOf(chosen) + 1) % kinds.length];
    button.textContent = words[chosen];
    redraw();
  });
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    printing = true;
    redraw();
    for (const figure of drawn) Plotly.relayout(at(figure), {width: 660, autosize: false});
  });
  addEventListener("afterprint", () => {
    printing = false;
    redraw();
    for (const figure of drawn) Plotly.react(at(figure), ...inputs(figure)).then(div => Plotly.Plots.resize(div));
  });

  setTheme();
  button.hidden = false;
  const packed = document.getElementById("plotly");
  if (packed && typeof DecompressionStream !== "undefined") {
    const bytes = Uint8Array.from(atob(packed.textContent), letter => letter.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
    for (const figure of figures) {              // one by one, so that the page can be read meanwhile
      await Plotly.newPlot(at(figure), ...inputs(figure));
      legend(figure);
      drawn.add(figure);
      listen(figure);
      await pause();
    }
  } else if (packed) {
    for (const figure of figures) at(figure).textContent = "This browser is too old to unpack the plots; the numbers are below.";
  }
  root.dataset.drawn = "yes";
})();

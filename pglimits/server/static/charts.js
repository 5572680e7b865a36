// The charts of a limit: uPlot, with one cursor over all of them.
const charts = (() => {
  "use strict";

  const HEIGHT = 150;
  const EVERY = 15000; // milliseconds between two looks at the history
  let shown = ""; // the URL of what is drawn
  let data = null;
  let at = 0;
  let asking = false;
  let plots = [];

  const number = (value) =>
    value == null ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toFixed(2));
  const seconds = (value) => {
    if (value == null) return "–";
    if (value >= 3600) return `${+(value / 3600).toFixed(1)} h`;
    if (value >= 60) return `${+(value / 60).toFixed(1)} min`;
    return value >= 1 || value === 0 ? `${+value.toFixed(1)} s` : `${+(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  };

  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

  // What each chart draws: name in the data, label, colour, and how.
  const LINES = {
    held: { format: number, lines: [["held", "held", "accent", { fill: true }], ["level", "level", "violet", { unless: "decay" }], ["limit", "limit", "quiet", { dash: [4, 4], stepped: true }]] },
    waiting: { format: number, lines: [["waiting", "waiting", "warm", { fill: true }]] },
    granted: { format: (value) => (value == null ? "–" : `${number(value)}/s`), lines: [["grants", "granted", "accent", { fill: true }], ["expiries", "expired", "bad", {}]] },
    wait: { format: seconds, lines: [["p95", "p95", "warm", {}], ["p50", "p50", "accent", {}]] },
  };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const faded = (name) => `color-mix(in srgb, ${colour(name)} 14%, transparent)`;

  const draw = (element) => {
    const kind = element.dataset.chart;
    const { format, lines } = LINES[kind];
    const drawn = lines.filter(([name, , , how]) => !how.unless || data[name].some((value) => value > 0));
    const axis = { stroke: colour("quiet"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const most = Math.max(0, ...drawn.flatMap(([name]) => data[name].filter((value) => value != null)));
    const last = (name) => data[name].findLast((value) => value != null);
    const options = {
      width: element.clientWidth,
      height: HEIGHT,
      cursor: { sync: { key: "pglimits" }, drag: { x: false, y: false }, y: false, points: { size: 7 } },
      scales: { x: { range: () => [data.from, data.to] }, y: { range: () => [0, (most || 1) * 1.1] } },
      axes: [
        { ...axis, grid: { show: false }, values: (_, ticks) => ticks.map((tick) => label(tick)), space: 70, size: 28 },
        { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => (format !== seconds && tick >= 10000 ? compact.format(tick) : format(tick))), space: 32 },
      ],
      series: [
        { label: "time", value: (_, value, __, index) => (index == null ? "now" : label(value, true)) },
        ...drawn.map(([key, word, paint, how]) => ({
          label: word,
          stroke: colour(paint),
          width: how.dash ? 1.25 : 1.75,
          dash: how.dash,
          paths: how.stepped ? uPlot.paths.stepped({ align: -1 }) : undefined,
          fill: how.fill ? faded(paint) : undefined,
          points: { show: data.at.length < 3, size: 5 },
          spanGaps: false,
          value: (_, value, __, index) => format(index == null ? last(key) : value),
        })),
      ],
      legend: { live: true },
    };
    element.replaceChildren();
    const plot = new uPlot(options, [data.at, ...drawn.map(([name]) => data[name])], element);
    const canvas = plot.root.querySelector("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "Now: " + drawn.map(([name, word]) => `${word} ${format(last(name))}`).join(", "));
    return { plot, element };
  };

  const two = (part) => String(part).padStart(2, "0");
  const label = (at, long) => {
    const date = new Date(at * 1000);
    const time = `${two(date.getHours())}:${two(date.getMinutes())}`;
    const day = date.toLocaleDateString("en", { weekday: "short", day: "numeric", month: "short" });
    if (long) return data.span === "hour" ? `${time}:${two(date.getSeconds())}` : `${day}, ${time}`;
    return data.span === "week" ? day.replace(/,.*/, "") + ` ${date.getDate()}` : time;
  };

  const empty = (element, said) => {
    const line = document.createElement("p");
    line.className = "none";
    line.textContent = said;
    element.replaceChildren(line);
  };

  const drawAll = () => {
    for (const { plot } of plots) plot.destroy();
    plots = [];
    for (const element of document.querySelectorAll(".chart")) {
      if (data.at.length) plots.push(draw(element));
      else empty(element, "No samples yet: the sweep takes one a minute.");
    }
  };

  const ask = async (url) => {
    asking = true;
    try {
      const response = await fetch(url, { credentials: "same-origin" });
      if (response.ok && !response.redirected) {
        data = await response.json();
        at = Date.now();
        shown = url;
        drawAll();
      }
    } catch {
      // The page says that there is no connection.
    } finally {
      asking = false;
    }
  };

  // Called whenever the page has changed.
  const look = () => {
    const url = document.getElementById("charts")?.dataset.history;
    if (!url || asking) return;
    if (url !== shown || Date.now() - at > EVERY || !plots.every(({ element }) => element.isConnected)) ask(url);
  };

  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    for (const { plot, element } of plots) plot.setSize({ width: element.clientWidth, height: HEIGHT });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => data && drawAll());

  return { look };
})();

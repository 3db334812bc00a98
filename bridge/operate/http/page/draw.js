// Elements, figures for people, charts. Text only ever gets into the page as text.

const SVG = "http://www.w3.org/2000/svg";

/** An element; attributes that are null or false are left out, true stands for the bare name. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Make what `old` holds like `children`, keeping elements that stay: focus, selection and scroll positions stay, too. */
export function show(old, ...children) {
  const wanted = el("div", {}, ...children);
  match(old, wanted);
}

function match(old, wanted) {
  const fresh = [...wanted.childNodes];
  for (let at = 0; at < fresh.length; at++) {
    const now = old.childNodes[at], next = fresh[at];
    if (!now) old.append(next);
    else if (now.nodeName !== next.nodeName || now.nodeType !== next.nodeType) now.replaceWith(next);
    else if (now.nodeType === Node.TEXT_NODE) { if (now.data !== next.data) now.data = next.data; }
    else { attributes(now, next); match(now, next); }
  }
  while (old.childNodes.length > fresh.length) old.lastChild.remove();
}

function attributes(old, wanted) {
  for (const { name } of [...old.attributes]) if (!wanted.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of wanted.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
}

export function count(value) {
  return value === null || value === undefined ? "unknown" : Math.round(value).toLocaleString("en-US");
}

/** Bytes in powers of 1,024, as `bridge status` has them. */
export function size(value) {
  if (value === null || value === undefined) return "unknown";
  for (const unit of ["B", "KB", "MB", "GB"]) {
    if (value < 1024) return unit === "B" ? `${Math.round(value)} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} TB`;
}

/** Seconds as their two largest units. */
export function span(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  for (let at = 0; at < 3; at++) {
    const [unit, length] = units[at];
    if (seconds >= length) {
      const [smaller, part] = units[at + 1];
      const rest = Math.floor((seconds % length) / part);
      return `${Math.floor(seconds / length)} ${unit}${rest ? ` ${rest} ${smaller}` : ""}`;
    }
  }
  return seconds < 10 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`;
}

export function rate(value) {
  if (value === null || value === undefined) return "unknown";
  return value < 10 ? value.toFixed(1) : count(value);
}

export function clock(text) {
  return text ? text.replace("T", " ").replace(/(\.\d{3})\d+/, "$1").replace(/(Z|\+00:00)$/, "") : "";
}

const WIDTH = 300, HEIGHT = 50;

/** A chart of [time, value or null] over all of them, a minute at least; a gap where nothing is known. */
export function chart(title, points, shown) {
  const known = points.filter(([, value]) => value !== null);
  const now = known.length ? known[known.length - 1][1] : null;
  const top = Math.max(0, ...known.map(([, value]) => value));
  const end = points.length ? points[points.length - 1][0] : 0;
  const seconds = Math.max(60, points.length ? end - points[0][0] : 0);
  const x = (at) => (WIDTH * (1 - (end - at) / seconds)).toFixed(1);
  const y = (value) => (HEIGHT - (top ? (value / top) * (HEIGHT - 3) : 0)).toFixed(1);
  let line = "", area = "", run = [];
  const close = () => {
    if (!run.length) return;
    const path = run.map(([at, value], n) => `${n ? "L" : "M"}${x(at)} ${y(value)}`).join("");
    line += path;
    area += `${path}L${x(run[run.length - 1][0])} ${HEIGHT}L${x(run[0][0])} ${HEIGHT}Z`;
    run = [];
  };
  for (const [at, value] of points) {
    if (value === null) close();
    else run.push([at, value]);
  }
  close();
  const most = `at most ${shown(known.length ? top : null)} in ${span(Math.round(seconds))}`;
  const says = `${title}: now ${shown(now)}, ${most}`;
  return el("figure", { class: "chart" },
    el("figcaption", {}, el("span", {}, title), el("b", {}, shown(now))),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + 2}`, preserveAspectRatio: "none", role: "img", "aria-label": says },
      svg("path", { class: "area", d: area || "M0 0" }), svg("path", { class: "line-of", d: line || "M0 0" }),
      svg("path", { class: "base", d: `M0 ${HEIGHT}H${WIDTH}` })),
    el("span", { class: "quiet" }, most));
}

export function arrow() {
  return svg("svg", { viewBox: "0 0 40 14", preserveAspectRatio: "xMidYMid meet", "aria-hidden": "true" },
    svg("path", { d: "M2 7H36M30 2l7 5-7 5", fill: "none", stroke: "currentColor", "stroke-width": "1.8" }));
}

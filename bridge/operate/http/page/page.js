// The page: one stream of events in, the picture out; nothing is kept but the token, for as long as this tab is open.

import { arrow, chart, clock, count, el, rate, show, size, span } from "/draw.js";

const KEPT = 600, ROWS = 200, OLD_AFTER = 2000;
const at = (id) => document.getElementById(id);
const known = { state: null, tables: [], recent: [], history: [], heard: 0, looked: 0, lost: true };
const STATES = {
  streaming: "running, reading the slot", running: "running, not reading the slot", stopped: "not running", unknown: "unknown",
};

// ---- what comes

function listen() {
  const source = new EventSource("/events");
  const on = (name, take) => source.addEventListener(name, (event) => {
    known.heard = Date.now();
    known.lost = false;
    take(event.data ? JSON.parse(event.data) : null);
  });
  on("history", (samples) => { known.history = samples; });
  on("state", (state) => {
    known.looked = Date.now();
    known.state = state;
    if (state.sample) known.history = [...known.history.filter((one) => one.at < state.sample.at && one.at > state.sample.at - KEPT), state.sample].slice(-KEPT);
    draw();
  });
  on("tables", (tables) => { known.tables = tables; drawTables(); });
  on("recent", (recent) => { known.recent = recent; drawRecent(); });
  on("alive", drawVerdict);
  source.onerror = () => {
    known.lost = true;
    drawVerdict();
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
}

// ---- the picture

function draw() {
  const state = known.state;
  at("source").textContent = state.source;
  at("unlock").hidden = !state.actions;
  at("unlock").textContent = token() ? "Lock actions" : "Unlock actions";
  drawVerdict();
  drawFindings(state);
  show(at("flow"), ...flow(state));
  show(at("charts"), ...charts(state));
  show(at("work"), ...work(state));
  show(at("indexes"), indexes(state));
  show(at("more"), ...more(state));
}

function drawVerdict() {
  const verdict = at("verdict"), state = known.state;
  const old = Date.now() - known.looked;
  let text = "connecting …", kind = "unknown";
  if (known.lost) [text, kind] = ["✗ the bridge does not answer", "bad"];
  else if (state && old > OLD_AFTER) [text, kind] = [`✗ what is shown is ${span(old / 1000)} old`, "bad"];
  else if (state) [text, kind] = state.in_step ? ["✓ in step", "good"] : ["✗ needs a look", "bad"];
  verdict.textContent = text;
  verdict.className = `verdict ${kind}`;
  document.title = state ? `${text.slice(0, 1)} bridge ${state.source}` : "bridge";
  if (state) at("when").textContent = `as of ${clock(state.at)} UTC`;
}

function drawFindings(state) {
  const list = state.findings.map((one) => el("li", { class: one.level },
    el("span", { class: one.level === "problem" ? "bad" : "note" }, one.level === "problem" ? "✗ " : "· "), one.what,
    one.next ? el("span", { class: "quiet" }, ` → ${one.next}`) : null));
  show(at("findings"), list.length ? el("ul", {}, ...list) : null);
}

function node(title, kind, ...lines) {
  return el("div", { class: `node is-${kind}` }, el("h3", {}, title),
    ...lines.filter(Boolean).map((line) => (line.nodeType ? line : el("p", {}, line))));
}

function link(kind, ...lines) {
  return el("div", { class: `arrow is-${kind}` }, ...lines.slice(0, 1).map((line) => el("span", {}, line)), arrow(),
    ...lines.slice(1).filter(Boolean).map((line) => el("span", { class: "quiet" }, line)));
}

function flow(state) {
  return [postgres(state), toStream(state), stream(state), el("div", { class: "branches" },
    ...(state.indexes.length ? state.indexes.map((one) => branch(one, state)) : [el("p", { class: "quiet" }, "no index is configured")]))];
}

function postgres(state) {
  const slot = state.slot, away = state.away.PostgreSQL;
  if (!slot) return node("PostgreSQL", "bad", away || "unknown", since(state, "PostgreSQL"));
  if (!slot.exists) return node("PostgreSQL", "bad", `no slot ${slot.name}`);
  const good = slot.active && !["lost", "unreserved"].includes(slot.wal_status);
  return node("PostgreSQL", good ? "good" : "bad", `slot ${slot.name}: ${slot.active ? "active" : "not active"}`,
    `keeps ${size(slot.retained)} of WAL${slot.limit !== null && slot.limit !== undefined ? ` of at most ${size(slot.limit)}` : ""}`,
    slot.wal_status ? `WAL ${slot.wal_status}` : null,
    slot.failover ? "a failover slot" : null,
    slot.lost_in !== null && slot.lost_in !== undefined ? `slot lost in ${span(slot.lost_in)} if nothing is confirmed` : null);
}

function since(state, name) {
  return state.away_since && state.away_since[name] ? `away since ${clock(state.away_since[name])}` : null;
}

function running(state) {
  const unseen = state.process.state === "running" && state.away.PostgreSQL;
  return unseen ? "running; whether it reads the slot is unknown" : STATES[state.process.state];
}

function toStream(state) {
  const lag = state.lag, process = state.process;
  const good = process.state === "streaming";
  const behind = !lag ? "lag unknown" : lag.bytes ? `${size(lag.bytes)}${lag.seconds ? `, ${span(lag.seconds)}` : ""} behind` : "no lag";
  return link(lag && good ? "good" : "bad", behind, `bridge: ${running(state)}`,
    waiting(process.standby));
}

function waiting(standby) {
  const unable = standby.filter((one) => one.why).length;
  return standby.length ? `${standby.length} standing by${unable ? `, ${unable} of which could not take over` : ""}` : null;
}

function stream(state) {
  const found = state.stream, rates = state.rates || {};
  if (!found) return node("JetStream", "bad", state.away.NATS || "unknown", since(state, "NATS"));
  if (!found.exists) return node("JetStream", "bad", `no stream ${found.name}`, found.where);
  const good = !found.behind.length && (found.replicas === 1 || found.leader);
  return node("JetStream", good ? "good" : "bad", `stream ${found.name}`, found.where,
    `${count(found.messages)} messages, ${size(found.bytes)}`, perSecond(rates.events_10),
    found.replicas > 1 ? `${found.replicas} replicas, leader ${found.leader || "none"}` : null,
    found.behind.length ? `behind: ${found.behind.join(", ")}` : null);
}

function perSecond(value) {
  return value === null || value === undefined ? null : `${rate(value)} events/s`;
}

function branch(index, state) {
  const live = index.generations.find((one) => one.state === "live");
  const rates = (state.rates && state.rates.indexed) || {};
  const engine = index.engine && index.engine.away;
  const behind = !live ? "nothing live" : index.gone ? "index gone" : live.elsewhere ? "of another stream" : live.behind === null ? "no consumer" : !live.behind ? "no lag"
    : `${count(live.behind)} events${live.behind_seconds !== null ? `, ${span(live.behind_seconds)}` : ""} behind`;
  const good = live && live.behind !== null && index.reader && !index.gone && !live.elsewhere;
  return el("div", { class: "branch" },
    link(good ? "good" : "bad", behind, index.reader ? null : index.silent ? "no word of its reader" : "no reader", waiting(index.standby)),
    node(index.name, engine || index.astray || !good ? "bad" : "good", live ? live.physical : index.state,
      perSecond(rates[index.name]),
      engine ? el("p", { class: "bad" }, `search engine away: ${engine}`) : null,
      index.astray ? el("p", { class: "bad" }, index.astray) : null,
      index.dead ? el("p", { class: "note" }, `${count(index.dead)} dead letters`) : null));
}

function charts(state) {
  const samples = known.history;
  const of = (take) => samples.map((one) => [one.at, take(one) ?? null]);
  const pace = (take) => samples.map((one, n) => {
    const before = samples[Math.max(0, n - 3)], passed = one.at - before.at;
    const [now, then] = [take(one), take(before)];
    return [one.at, n && passed && now !== null && then !== null && now >= then ? (now - then) / passed : null];
  });
  return [
    chart("Events a second", pace((one) => one.events), rate),
    chart("Stream behind PostgreSQL", of((one) => one.lag), span),
    chart("WAL written a second", pace((one) => one.wal), size),
    chart("WAL kept for the slot", of((one) => one.retained), size),
    ...state.indexes.flatMap((index) => index.generations.filter((one) => one.state === "live").map((one) =>
      chart(`${index.name}: events behind`, of((sample) => sample.behind[one.physical]), count))),
  ];
}

function bar(done) {
  return done === null ? el("progress", {}) : el("progress", { max: "1", value: Math.min(1, Math.max(0, done)).toFixed(3) });
}

function work(state) {
  const out = [];
  for (const table of known.tables) {
    const again = table.again, first = ["waiting", "running"].includes(table.state);
    if (!again && !first) continue;
    const now = again || table, done = now.estimate ? now.rows / now.estimate : null;
    out.push(el("div", { class: "job" },
      el("p", {}, el("b", {}, table.name), ` ${again ? "is read once more" : "initial snapshot"}: ${now.state}, ${count(now.rows)} rows`,
        now.estimate ? ` of about ${count(now.estimate)}` : "", now.rate ? `, ${rate(now.rate)}/s` : "",
        now.eta !== null ? `, ${span(now.eta)} left` : "", now.why ? ` (${now.why})` : "", again && again.part_of_rows ? ", a part of its rows" : ""),
      bar(done), again ? button("cancel-snapshot", table.name, "Cancel") : null));
  }
  for (const index of state.indexes) {
    const building = index.generations.filter((one) => ["building", "switching"].includes(one.state));
    for (const one of building) {
      out.push(el("div", { class: "job" },
        el("p", {}, el("b", {}, one.physical), ` ${one.state}: ${count(one.behind)} events left`,
          one.rate ? `, ${rate(one.rate)}/s` : "", one.eta !== null ? `, ${span(one.eta)} left` : "",
          index.builder ? `, by ${index.builder}` : ", nobody is at it: bridge reindex goes on with it"),
        bar(one.done), button("cancel-reindex", index.name, "Cancel")));
    }
  }
  for (const job of [...state.jobs].reverse()) {
    out.push(el("p", { class: job.state === "failed" ? "bad" : "quiet" },
      `rebuild of ${job.name}, begun here ${clock(job.since)}: ${job.state}${job.said ? ` – ${job.said}` : ""}`));
  }
  return out.length ? out : [el("p", { class: "quiet" }, "none")];
}

function cells(kind, values) {
  return el("tr", {}, ...values.map(([value, sort]) => el(kind, { class: sort || null, scope: kind === "th" ? "col" : null }, value)));
}

function grid(heads, rows, none) {
  if (!rows.length) return el("p", { class: "quiet" }, none);
  return el("table", {}, el("thead", {}, cells("th", heads)), el("tbody", {}, ...rows));
}

function button(action, name, text) {
  if (!token()) return null;
  return el("button", { type: "button", "data-do": action, "data-name": name, "aria-label": `${text}: ${name}` }, text);
}

function fedBy(index) {
  return index.reader || (index.silent ? `no word of ${index.silent}` : "nobody");
}

function indexes(state) {
  const heads = [["index"], ["generation"], ["state"], ["behind", "number"], ["dead letters", "number"], ["fed by", "spare"], [""]];
  const rows = state.indexes.flatMap((index) => index.generations.map((one, n) => cells("td", [
    [n ? "" : el("b", {}, index.name)], [one.physical], [one.state],
    [one.behind === null ? "no consumer" : `${count(one.behind)}`, "number"],
    [n ? "" : `${count(index.dead)}`, index.dead ? "number note" : "number"],
    [n ? "" : el("span", {}, fedBy(index),
      index.changed.length ? el("span", { class: "note small" }, ` configuration changed: ${index.changed.join(", ")}`) : null), "spare"],
    [n ? "" : button("reindex", index.name, "Rebuild") || ""],
  ])));
  for (const index of state.indexes) {
    if (!index.generations.length) rows.push(cells("td", [[el("b", {}, index.name)], ["–"], ["not built"], ["", "number"], [count(index.dead), "number"], [fedBy(index), "spare"], [button("reindex", index.name, "Rebuild") || ""]]));
  }
  return grid(heads, rows, "no index is configured");
}

function drawTables() {
  const wanted = at("search").value.trim().toLowerCase();
  const found = known.tables.filter((one) => one.name.toLowerCase().includes(wanted) || one.state.includes(wanted));
  const heads = [["table"], ["state"], ["rows", "number"], ["rebuild from", "number spare"], [""]];
  const rows = found.slice(0, ROWS).map((one) => cells("td", [
    [one.name], [el("span", {}, one.state, one.again ? ` (read again: ${one.again.state})` : "",
      one.error || one.why ? el("span", { class: "note small" }, ` ${one.error || one.why}`) : null)],
    [count(one.rows), "number"], [one.rebuild_from ? count(one.rebuild_from) : "no", "number spare"],
    [one.again ? "" : button("snapshot", one.name, "Read again") || ""],
  ]));
  const left = found.length - Math.min(found.length, ROWS);
  at("shown").textContent = `${count(found.length)} of ${count(known.tables.length)}${left ? `; ${count(left)} not shown, search for them` : ""}`;
  show(at("tables"), grid(heads, rows, wanted ? "no table is called so" : "no table has been read yet"));
}

function drawRecent() {
  const heads = [["sequence", "number"], ["op"], ["subject"], ["commit LSN", "spare"], ["stored (UTC)"]];
  const rows = known.recent.map((one) => cells("td", [
    [count(one.seq), "number"], [one.op], [one.subject], [one.lsn, "spare"], [clock(one.at).slice(11)],
  ]));
  show(at("recent"), grid(heads, rows, "no event yet"));
}

function more(state) {
  const kept = state.checkpoint, process = state.process, slot = state.slot;
  const lines = [
    ["bridge", `${running(state)}${process.who ? `, ${process.who}` : ""}${process.epoch ? `, epoch ${process.epoch}` : ""}`],
    ["standing by", process.standby.map((one) => one.who + (one.why ? " (could not take over)" : "")).join(", ") || "nobody"],
    ["checkpoint", kept ? `${kept.lsn} at sequence ${count(kept.seq)}, ${span(kept.age)} ago` : "unknown"],
    ["slot", slot && slot.exists ? `confirmed ${slot.confirmed_flush} of ${slot.flushed}` : "unknown"],
    ["publish", `${state.publishing}: ${state.publishing_why}`],
    ["sync", `${state.sync}: ${state.durability}`],
    ["rebuild", `from the start: ${state.rebuild}`],
  ];
  return lines.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]);
}

// ---- what may be done

function token() {
  return sessionStorage.getItem("token") || "";
}

async function post(path, body) {
  try {
    const answer = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json", Authorization: `Bearer ${token()}` },
      body: JSON.stringify(body),
    });
    const text = await answer.text();
    return { ok: answer.ok, status: answer.status, text: answer.ok ? JSON.parse(text).said || "" : text };
  } catch {
    return { ok: false, status: 0, text: "the bridge does not answer" };
  }
}

/** Ask in a dialog; `yes` gives what was wrong, or nothing. */
function ask(what, withToken, yes) {
  at("ask-what").textContent = what;
  at("ask-line").hidden = !withToken;
  at("ask-wrong").hidden = true;
  at("token").value = "";
  at("ask-yes").textContent = withToken ? "Unlock" : "Yes";
  at("ask-form").onsubmit = async (event) => {
    event.preventDefault();
    const wrong = await yes();
    at("token").value = "";
    if (!wrong) return at("ask").close();
    at("ask-wrong").textContent = wrong;
    at("ask-wrong").hidden = false;
  };
  at("ask").showModal();
}

at("ask-no").addEventListener("click", () => at("ask").close());

at("unlock").addEventListener("click", () => {
  if (token()) {
    sessionStorage.removeItem("token");
    redraw();
    return;
  }
  ask("The token of [operate] token_file. It is kept until this tab is closed.", true, async () => {
    sessionStorage.setItem("token", at("token").value);
    const answer = await post("/unlock", {});
    if (!answer.ok) sessionStorage.removeItem("token");
    redraw();
    return answer.ok ? "" : answer.text;
  });
});

const QUESTIONS = {
  snapshot: (name) => `Read ${name} again while the stream goes on?`,
  "cancel-snapshot": (name) => `End the reading of ${name}?`,
  reindex: (name) => `Build index ${name} anew from the log's start?`,
  "cancel-reindex": (name) => `Cancel the rebuild of ${name}, and remove what it has built?`,
};

document.addEventListener("click", (event) => {
  const chosen = event.target.closest && event.target.closest("button[data-do]");
  if (!chosen) return;
  const { do: action, name } = chosen.dataset;
  ask(QUESTIONS[action](name), false, async () => {
    const answer = await post("/actions", { do: action, name });
    at("said").textContent = answer.text;
    at("said").hidden = false;
    return answer.ok ? "" : answer.text;
  });
});

at("search").addEventListener("input", drawTables);

document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "TEXTAREA"].includes(document.activeElement && document.activeElement.tagName);
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey && !at("ask").open) {
    event.preventDefault();
    at("search").focus();
  } else if (event.key === "Escape" && document.activeElement === at("search")) {
    at("search").value = "";
    drawTables();
  }
});

function redraw() {
  if (known.state) draw();
  drawTables();
}

setInterval(drawVerdict, 250);
redraw();
listen();

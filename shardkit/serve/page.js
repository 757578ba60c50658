"use strict";

const byId = (id) => document.getElementById(id);
let last = null; // the status before, for the rate
let running = null; // what stops the answer that is coming

function headers() {
  const key = byId("key").value;
  return key ? { authorization: `Bearer ${key}` } : {};
}

function showRanks(ranks) {
  byId("ranks").replaceChildren(...ranks.map((rank) => {
    const row = document.createElement("tr");
    for (const text of [rank.rank, rank.pid, `${Math.round(rank.memory / 1e6)} MB`]) {
      row.appendChild(document.createElement("td")).textContent = text;
    }
    return row;
  }));
}

function showStatus(status) {
  const now = performance.now();
  if (last) {
    const rate = (status.tokens - last.tokens) / ((now - last.at) / 1000);
    byId("rate").textContent = Math.max(0, rate).toFixed(0);
  }
  last = { tokens: status.tokens, at: now };
  document.title = byId("model").textContent = status.model;
  const state = status.draining ? "draining" : status.alive ? "ready" : `lost: ${status.failure}`;
  byId("state").textContent = `${state} · ${status.tp_size} ranks · ${status.dtype}` +
    (status.obstacle ? ` · requests do not join: ${status.obstacle}` : "");
  byId("running").textContent = `${status.running} of ${status.max_batch_size}`;
  byId("waiting").textContent = status.waiting;
  byId("tokens").textContent = status.tokens.toLocaleString();
  byId("cache").textContent = status.max_batch_tokens.toLocaleString();
  byId("uptime").textContent = `${Math.floor(status.uptime / 60)} min`;
  byId("form").hidden = !status.generates;
  showRanks(status.ranks);
}

async function watchStatus() {
  try {
    const answer = await fetch("/status", { headers: headers() });
    if (answer.status === 401) byId("state").textContent = "enter the API key";
    else showStatus(await answer.json());
  } catch {
    byId("state").textContent = "the server does not answer";
  }
  setTimeout(watchStatus, 1000);
}

async function readEvents(answer, show) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      show(part.choices[0]?.text ?? "");
    }
  }
}

async function generate(event) {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const answer = byId("answer");
  answer.textContent = byId("prompt").value;
  running = new AbortController();
  byId("send").textContent = "Stop";
  try {
    const response = await fetch("/v1/completions", {
      method: "POST",
      headers: { ...headers(), "content-type": "application/json" },
      body: JSON.stringify({
        prompt: byId("prompt").value, max_tokens: Number(byId("max").value),
        temperature: Number(byId("temperature").value), stream: true,
      }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    await readEvents(response, (text) => { answer.textContent += text; });
  } catch (error) {
    if (error.name !== "AbortError") answer.textContent += `\n[${error.message}]`;
  }
  running = null;
  byId("send").textContent = "Generate";
}

byId("form").addEventListener("submit", generate);
watchStatus();

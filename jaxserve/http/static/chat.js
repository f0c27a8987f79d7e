// The chat page: one conversation, streamed from v1/chat/completions. Text of the model reaches the page as text nodes only, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const log = $("log");
const kept = { system: "system", temperature: "temperature", maxTokens: "max-tokens" };
let messages = []; // as the API takes them, without the system prompt
let running = null; // AbortController of the answer under way

// ---- settings

for (const [name, id] of Object.entries(kept)) {
  $(id).value = localStorage.getItem(name) ?? "";
  $(id).addEventListener("input", () => localStorage.setItem(name, $(id).value));
}
$("api-key").value = sessionStorage.getItem("apiKey") ?? ""; // forgotten with the tab
$("api-key").addEventListener("change", () => {
  sessionStorage.setItem("apiKey", $("api-key").value);
  showModel();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings-toggle").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("settings-toggle").setAttribute("aria-expanded", String(!$("settings").hidden));
});

function headers() {
  const key = $("api-key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function showModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await errorMessage(response));
    $("model").textContent = $("model").title = (await response.json()).data[0].id;
  } catch (error) {
    $("model").textContent = error.message;
  }
}

// ---- the request

function requestBody() {
  const system = $("system").value.trim();
  const temperature = parseFloat($("temperature").value);
  const maxTokens = parseInt($("max-tokens").value, 10);
  return {
    model: $("model").title || undefined,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    ...(Number.isFinite(temperature) && { temperature }),
    ...(Number.isFinite(maxTokens) && { max_tokens: maxTokens }),
  };
}

async function errorMessage(response) {
  const text = await response.text();
  try {
    const error = JSON.parse(text).error;
    return error.message ?? String(error);
  } catch {
    return text.trim() || `${response.status} ${response.statusText}`;
  }
}

// The JSON of each server-sent event, up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server broke the answer off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message ?? String(event.error));
      yield event;
    }
  }
}

async function answer(question, asked) {
  const conversation = messages;
  const controller = new AbortController();
  const shown = addMessage("assistant", "");
  const started = performance.now();
  let text = "";
  let first = null;
  let usage = null;
  let due = false;
  const draw = () => {
    due = false;
    keepAtEnd(() => render(shown.firstChild, text));
  };
  running = controller;
  setRunning(true);
  shown.classList.add("waiting");
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(requestBody()),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await errorMessage(response));
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      first ??= performance.now();
      text += piece;
      if (!due) {
        due = true;
        requestAnimationFrame(draw); // many tokens, one drawing a frame
      }
    }
  } catch (error) {
    if (!controller.signal.aborted) addMessage("error", error.message);
  }
  const now = performance.now();
  if (conversation !== messages) return; // a new chat was begun meanwhile
  running = null;
  setRunning(false);
  shown.classList.remove("waiting");
  if (text) {
    draw();
    conversation.push({ role: "assistant", content: text });
    if (usage) addFigures(shown, usage.completion_tokens, first - started, now - first);
  } else {
    // Nothing came: the question goes back to where it can be sent again.
    conversation.pop();
    shown.remove();
    $("prompt").value ||= question;
    asked.remove();
    fit();
  }
}

// ---- what is shown

function addMessage(kind, text) {
  $("empty").hidden = true;
  const element = document.createElement("article");
  element.className = `message ${kind}`;
  element.setAttribute("aria-label", { user: "You", assistant: "Model", error: "Error" }[kind]);
  if (kind === "error") element.setAttribute("role", "alert");
  element.append(make("div", ""));
  element.firstChild.className = "text";
  render(element.firstChild, text);
  keepAtEnd(() => log.append(element), kind === "user");
  return element;
}

function addFigures(element, tokens, wait, time) {
  const figures = document.createElement("small");
  figures.className = "figures";
  const rate = tokens > 1 && time > 0 ? `, ${(((tokens - 1) / time) * 1000).toFixed(1)} tok/s` : "";
  figures.textContent = `${tokens} tokens, first after ${(wait / 1000).toFixed(2)} s${rate}`;
  keepAtEnd(() => element.append(figures));
}

// Scrolls down with a growing answer, unless the reader has scrolled up.
function keepAtEnd(change, always = false) {
  const atEnd = always || log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// A light Markdown: fenced code blocks, `code` and **bold**; everything else is shown as it is.
function render(element, text) {
  const parts = [];
  text.split(/^[ \t]*```/m).forEach((part, index, all) => {
    if (index % 2 === 0) {
      const around = index ? part.replace(/^\n+/, "") : part; // the blocks have margins of their own
      parts.push(...inline(index < all.length - 1 ? around.trimEnd() : around));
      return;
    }
    const end = part.indexOf("\n");
    const pre = make("pre", "");
    pre.append(make("code", end < 0 ? "" : part.slice(end + 1).replace(/\n$/, "")));
    pre.tabIndex = 0; // wide code is scrolled with the keyboard too
    parts.push(pre);
  });
  element.replaceChildren(...parts);
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, index) => {
    if (index % 2 === 0) return part;
    return part.startsWith("`") ? make("code", part.slice(1, -1)) : make("strong", part.slice(2, -2));
  });
}

function make(name, text) {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
}

function setRunning(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
}

// ---- the composer

function fit() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

$("prompt").addEventListener("input", fit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  fit();
  messages.push({ role: "user", content: text });
  answer(text, addMessage("user", text));
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("prompt").focus();
});
$("reset").addEventListener("click", () => {
  running?.abort();
  running = null;
  setRunning(false);
  messages = [];
  for (const message of log.querySelectorAll(".message")) message.remove();
  $("empty").hidden = false;
  $("prompt").focus();
});

showModel();

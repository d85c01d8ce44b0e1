"use strict";
const at = id => document.getElementById(id);
let messages = [], results = [], running = null;  // results: of the last message's tool calls, while some are missing

// --- Markdown, code and formulas -----------------------------------------------------------------------------------

const escape = text => text.replace(/[&<>"']/g, char => `&#${char.charCodeAt(0)};`);
// A formula waits as escaped text in a <code class="formula"> until the page is sanitised; KaTeX then replaces it.
const formula = (level, start, rule) => ({
  name: "formula-" + level, level, start: text => text.match(start)?.index,
  tokenizer(text) {
    const match = rule.exec(text);
    return match && {type: "formula-" + level, raw: match[0], text: (match[1] ?? match[2]).trim()};
  },
  renderer: token => `<code class="formula ${level}">${escape(token.text)}</code>`,
});
marked.use({
  breaks: true,
  extensions: [
    formula("block", /\$\$|\\\[/, /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])/),
    formula("inline", /\$|\\\(/, /^(?:\$(?![\s$])((?:\\.|[^\\$\n])+?)(?<!\s)\$(?!\d)|\\\(([^\n]+?)\\\))/),
  ],
  renderer: {
    html: token => escape(token.text),  // what looks like HTML is text
    image: token => `<a href="${escape(token.href)}">${escape(token.text || token.href)}</a>`,  // loads nothing unasked
    code: ({text, lang}) => `<div class="code"><div class="bar"><span>${escape(lang?.split(/\s/)[0] || "code")}</span></div>`
      + `<pre><code>${escape(text)}</code></pre></div>`,
  },
});
DOMPurify.addHook("afterSanitizeAttributes", node => {
  if (node.tagName === "A") { node.target = "_blank"; node.rel = "noopener noreferrer nofollow"; }
});

function render(text, into) {
  into.innerHTML = DOMPurify.sanitize(marked.parse(text), {FORBID_TAGS: ["style", "form", "button", "textarea", "select"]});
  for (const place of into.querySelectorAll("code.formula")) {
    const span = document.createElement("span");
    katex.render(place.textContent, span, {displayMode: place.classList.contains("block"), throwOnError: false});
    place.replaceWith(span);
  }
  for (const block of into.querySelectorAll(".code")) {
    block.firstChild.append(copyButton(() => block.querySelector("pre").textContent));
  }
  for (const table of into.querySelectorAll("table")) {
    const box = document.createElement("div");
    box.className = "table";
    table.replaceWith(box);
    box.append(table);
  }
  // Chinese shapes of the characters that Chinese and Japanese share.
  into.lang = /\p{Script=Han}/u.test(text) ? "zh-CN" : "";
}

function copyButton(read) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await copy(read());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}
async function copy(text) {
  if (navigator.clipboard) { await navigator.clipboard.writeText(text); return; }
  const area = document.createElement("textarea");  // on plain http browsers offer nothing better
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// --- the conversation ----------------------------------------------------------------------------------------------

const headers = () =>
  ({"Content-Type": "application/json", ...(at("key").value && {Authorization: "Bearer " + at("key").value})});

async function loadName() {
  const answer = await fetch("v1/models", {headers: headers()});
  if (answer.status === 401) { at("settings").showModal(); at("key").focus(); return; }
  at("name").textContent = document.title = (await answer.json()).data[0].id;
}
function addTurn(role) {
  document.querySelector(".hint")?.remove();
  const turn = document.createElement("div"), text = document.createElement("div");
  turn.className = "turn " + role;
  text.className = "text";
  turn.append(text);
  at("turns").append(turn);
  return text;
}
/** Show more of an answer; who has scrolled up to read is left there. */
function update(place, {content = "", reasoning = "", calls = []}, isDone) {
  const turns = at("turns"), follows = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 80;
  if (reasoning) showThinking(place, reasoning, isDone || content || calls.length);
  render(content || (reasoning || calls.length ? "" : isDone ? "(no text)" : "…"), place);
  for (const call of calls.slice(place.parentNode.querySelectorAll(".call").length)) place.parentNode.append(callBlock(call));
  if (isDone && content) place.after(copyButton(() => content));
  if (follows) turns.scrollTop = turns.scrollHeight;
}
function showThinking(place, reasoning, isOver) {
  let fold = place.parentNode.querySelector("details");
  if (!fold) {
    fold = document.createElement("details");
    fold.append(document.createElement("summary"), document.createElement("div"));
    fold.lastChild.className = "text";
    place.before(fold);
  }
  fold.firstChild.textContent = isOver ? "Thought" : "Thinking…";
  render(reasoning, fold.lastChild);
}
function callBlock({function: {name, arguments: text}}) {
  const block = document.createElement("div"), bar = document.createElement("div"), pre = document.createElement("pre");
  block.className = "code call";
  bar.className = "bar";
  bar.textContent = "calls " + name;
  try { pre.textContent = JSON.stringify(JSON.parse(text), null, 2); } catch { pre.textContent = text; }
  block.append(bar, pre);
  return block;
}
/** The call whose result is asked for next, if any. */
const openCall = () => messages.at(-1)?.tool_calls?.[results.length];
function nameInput() {
  at("text").placeholder = at("text").ariaLabel = openCall() ? "Result of " + openCall().function.name : "Message";
}
function setRunning(controller) {
  running = controller;
  at("send").textContent = controller ? "Stop" : "Send";
}
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) if (event !== "data: [DONE]") yield JSON.parse(event.slice("data: ".length));
  }
}
function makeBody(given) {
  const system = at("system").value.trim(), tools = at("tools").value.trim(), thinking = at("thinking").value;
  const body = {messages: [...(system ? [{role: "system", content: system}] : []), ...messages, ...given], stream: true};
  if (at("temperature").value) body.temperature = Number(at("temperature").value);
  if (at("limit").value) body.max_tokens = Number(at("limit").value);
  if (thinking) body.chat_template_kwargs = {enable_thinking: thinking === "on"};
  try { if (tools) body.tools = JSON.parse(tools); } catch (error) { throw new Error("Tools in the settings: " + error.message); }
  return JSON.stringify(body);
}
/** Ask, or give the result of a call; with the last result the model goes on. */
async function ask(text) {
  const call = openCall(), given = [...results, call ? {role: "tool", tool_call_id: call.id, content: text} : {role: "user", content: text}];
  addTurn(call ? "tool" : "user").textContent = text;
  if (call && given.length < messages.at(-1).tool_calls.length) {
    results = given;
    nameInput();
    return;
  }
  const place = addTurn("assistant"), conversation = messages;  // "New chat" begins another
  const answer = {content: "", reasoning: "", calls: []};
  let shown = 0;
  setRunning(new AbortController());
  update(place, answer, false);
  at("turns").scrollTop = at("turns").scrollHeight;
  try {
    const response = await fetch("v1/chat/completions",
      {method: "POST", headers: headers(), body: makeBody(given), signal: running.signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of readEvents(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      answer.content += delta.content ?? "";
      answer.reasoning += delta.reasoning_content ?? "";
      for (const {index, ...call} of delta.tool_calls ?? []) answer.calls.push(call);
      if (performance.now() - shown < 60) continue;  // a long text is not rendered for every token
      update(place, answer, false);
      shown = performance.now();
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      place.className = "error";
      place.textContent = error.message;
      return;
    }
  } finally {
    setRunning(null);
  }
  update(place, answer, true);
  conversation.push(...given, {role: "assistant", content: answer.content,
    ...(answer.reasoning && {reasoning_content: answer.reasoning}), ...(answer.calls.length && {tool_calls: answer.calls})});
  if (conversation === messages) results = [];
  nameInput();
}

at("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const question = at("text").value.trim();
  if (!question) return;
  at("text").value = "";
  grow();
  ask(question);
});
function grow() {
  at("text").style.height = "auto";
  at("text").style.height = at("text").scrollHeight + 2 + "px";
}
at("text").addEventListener("input", grow);
at("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) at("form").requestSubmit();
  }
});
at("reset").addEventListener("click", () => {
  running?.abort();
  messages = [];
  results = [];
  nameInput();
  at("turns").replaceChildren();
  at("text").focus();
});
at("open").addEventListener("click", () => at("settings").showModal());
at("settings").addEventListener("close", loadName);
grow();
loadName();

// The conversation: asking, streaming, stopping, editing, copying and rating. All text is set as text, never as HTML.

import * as api from "./api.js";
import * as images from "./images.js";
import * as snippets from "./snippets.js";

const STORED_KEY = "vila-ops-key";
const DIGITS = 12; // of a digest on the page
const $ = (id) => document.getElementById(id);

let exchanges = []; // { question: { text, images }, answer: { text, id, rating }, element }
let edited = null; // the exchange whose question is being edited
let running = null; // the AbortController of the answer that is being streamed
let model = null;
let feedback = false;

const key = () => sessionStorage.getItem(STORED_KEY) ?? "";
const say = (text) => { $("status").textContent = text; };

function warn(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// --- the model and the key ---

async function connect() {
  try {
    model = await api.model(key());
    feedback = await api.takesFeedback(key());
  } catch (error) {
    if (error.status === 401) return askForKey(key() ? "This key is not valid here." : "This endpoint asks for an API key.");
    return warn(`The endpoint cannot be used: ${error.message}`);
  }
  warn("");
  document.title = `Chat with ${model.id}`;
  $("model").textContent = model.id;
  $("version").replaceChildren(`version ${model.version}`, digest(model.digest));
}

function digest(value) {
  const element = document.createElement("code");
  Object.assign(element, { textContent: value.slice(0, DIGITS), title: `Digest of the model: ${value}` });
  return element;
}

function askForKey(reason) {
  if (reason) warn(reason);
  $("key").value = key();
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

function useKey(event) {
  event.preventDefault();
  const given = $("key").value.trim();
  if (given) sessionStorage.setItem(STORED_KEY, given);
  else sessionStorage.removeItem(STORED_KEY);
  $("key-dialog").close();
  connect();
}

// --- asking ---

// Questions that got no answer are left out of the conversation.
function messagesOf(earlier, question) {
  const turns = earlier.filter((one) => one.answer.text).flatMap((one) => [
    userTurn(one.question),
    { role: "assistant", content: one.answer.text },
  ]);
  return [...turns, userTurn(question)];
}

function userTurn({ text, images: shown }) {
  const parts = shown.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
  if (text) parts.push({ type: "text", text });
  return { role: "user", content: parts };
}

async function submit(event) {
  event.preventDefault();
  if (!model) await connect();
  const question = { text: $("question").value.trim(), images: images.current() };
  if (!model || running || !(question.text || question.images.length)) return;
  if (!$("temperature").checkValidity()) return warn("The temperature is a number from 0 to 2.");
  write("", []);
  ask(question, edited);
}

// Asks a question after the conversation, or in the place of an exchange and all that follow it.
function ask(question, from) {
  edited = null;
  const kept = from ? exchanges.slice(0, exchanges.indexOf(from)) : exchanges;
  exchanges.slice(kept.length).forEach((one) => one.element.remove());
  const body = {
    model: model.id,
    messages: messagesOf(kept, question),
    temperature: $("temperature").valueAsNumber,
    stream: true,
  };
  const exchange = { question, body, answer: { text: "" }, element: draw(question) };
  exchange.element.addEventListener("click", (click) => act(exchange, click.target.closest("[data-do]")?.dataset.do));
  exchange.element.querySelector(".feedback").addEventListener("submit", (sent) => rate(exchange, sent));
  exchanges = [...kept, exchange];
  stream(exchange);
}

async function stream(exchange) {
  const { answer, element } = exchange;
  const started = performance.now();
  let failure = "";
  running = new AbortController();
  begin(element);
  try {
    const body = { ...exchange.body, stream_options: { include_usage: true } };
    for await (const chunk of api.answer(body, key(), running.signal)) {
      read(chunk, answer, performance.now() - started);
      follow(() => { element.querySelector(".answer .text").textContent = answer.text; });
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else failure = error.message;
    if (error.status === 401) askForKey("This key is not valid here.");
  }
  running = null;
  answer.seconds = (performance.now() - started) / 1000;
  end(exchange, failure);
}

function read(chunk, answer, milliseconds) {
  answer.id = chunk.id;
  answer.digest = chunk.system_fingerprint;
  answer.usage = chunk.usage ?? answer.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  if (choice.delta.content) {
    answer.first ??= milliseconds / 1000;
    answer.text += choice.delta.content;
  }
  answer.finish = choice.finish_reason ?? answer.finish;
}

// --- drawing ---

function draw({ text, images: shown }) {
  const element = $("exchange").content.cloneNode(true).firstElementChild;
  element.querySelector(".question .text").textContent = text;
  element.querySelector(".shown").append(...shown.map((image) => {
    const item = document.createElement("li");
    item.append(Object.assign(new Image(), { src: image.url, alt: image.name, title: image.name }));
    return item;
  }));
  $("exchanges").append(element);
  return element;
}

function begin(element) {
  element.setAttribute("aria-busy", "true");
  warn("");
  say("Answering …");
  showState();
  element.scrollIntoView({ block: "start" });
}

function end(exchange, failure) {
  const { answer, element } = exchange;
  element.removeAttribute("aria-busy");
  const note = element.querySelector(".failure");
  note.textContent = failure ? `No complete answer: ${failure}.` : "The answer has no text.";
  if (!answer.text) note.textContent += " The question is left out of the conversation.";
  follow(() => {
    note.hidden = !failure && Boolean(answer.text);
    element.querySelector(".facts").replaceChildren(...facts(answer));
    element.querySelector(".facts").hidden = !answer.id;
    element.querySelector(".answer > .actions").hidden = false;
    element.querySelector(".rating").hidden = !(feedback && answer.id && answer.text);
  });
  say(note.hidden ? `${answer.finish === "stopped" ? "Stopped" : "Answer"}: ${answer.text}` : note.textContent);
  showState();
  $("question").focus({ preventScroll: true });
}

function facts(answer) {
  const { usage, first, seconds, finish } = answer;
  const pairs = [];
  if (usage) {
    const ofImages = usage.prompt_tokens_details.image_tokens;
    const share = ofImages ? ` (${ofImages} of images)` : "";
    pairs.push(["Tokens", `${usage.prompt_tokens}${share} + ${usage.completion_tokens}`]);
  }
  const begun = first === undefined ? "" : `, first text after ${first.toFixed(1)} s`;
  pairs.push(["Time", `${seconds.toFixed(1)} s${begun}`]);
  if (answer.digest) pairs.push(["Model", digest(answer.digest)]);
  const ends = { stopped: "stopped by you", length: "at the token limit" };
  if (ends[finish]) pairs.push(["Ended", ends[finish]]);
  return pairs.map(([name, value]) => {
    const pair = document.createElement("div");
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    description.append(value);
    pair.append(term, description);
    return pair;
  });
}

// Makes a change, and stays at the end of the page if the reader was there.
function follow(change) {
  const page = document.scrollingElement;
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 40;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function showState() {
  $("empty").hidden = exchanges.length > 0;
  $("new").hidden = exchanges.length === 0;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("editing").hidden = !edited;
  const first = edited ? exchanges.indexOf(edited) : exchanges.length;
  exchanges.forEach((one, index) => one.element.classList.toggle("edited", index >= first));
  for (const button of document.querySelectorAll("[data-do=edit], [data-do=again]")) button.disabled = Boolean(running);
}

// --- what buttons of an exchange do ---

function act(exchange, what) {
  const target = { base: new URL("v1", document.baseURI).href, withKey: Boolean(key()) };
  const actions = {
    edit: () => edit(exchange),
    again: () => ask(exchange.question, exchange),
    "copy-text": () => copy(exchange.answer.text),
    "copy-curl": () => copy(snippets.curl(exchange.body, target)),
    "copy-python": () => copy(snippets.python(exchange.body, target)),
    good: () => openFeedback(exchange, "good"),
    bad: () => openFeedback(exchange, "bad"),
    "no-feedback": () => closeFeedback(exchange),
  };
  actions[what]?.();
}

function edit(exchange) {
  edited = exchange;
  write(exchange.question.text, exchange.question.images);
  showState();
  $("question").focus();
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch { // not over plain HTTP from another machine
    $("text-to-copy").value = text;
    $("text-dialog").showModal();
    $("text-to-copy").select();
  }
}

// --- feedback ---

function showRating({ element, answer }, rating) {
  for (const value of ["good", "bad"]) {
    element.querySelector(`[data-do=${value}]`).setAttribute("aria-pressed", String(value === rating));
  }
  element.querySelector(".feedback").hidden = rating === answer.rating;
}

function openFeedback(exchange, rating) {
  exchange.chosen = rating;
  showRating(exchange, rating);
  exchange.element.querySelector(".feedback textarea").focus();
}

function closeFeedback(exchange) {
  showRating(exchange, exchange.answer.rating);
}

async function rate(exchange, event) {
  event.preventDefault();
  const { answer, element, chosen } = exchange;
  const right = element.querySelector(".feedback textarea").value.trim();
  try {
    await api.sendFeedback({ id: answer.id, rating: chosen, ...(right && { right_answer: right }) }, key());
  } catch (error) {
    return warn(`The feedback was not taken: ${error.message}`);
  }
  answer.rating = chosen;
  showRating(exchange, chosen);
  say("Feedback sent.");
}

// --- the composer ---

function write(text, shown) {
  $("question").value = text;
  images.set(shown);
  grow();
}

function grow() {
  const box = $("question");
  box.rows = 1;
  while (box.scrollHeight > box.clientHeight && box.rows < 8) box.rows += 1;
}

async function take(files) {
  if (!files.length) return;
  const others = await images.add(files);
  const count = images.current().length;
  warn(others.length ? `Not an image: ${others.join(", ")}.` : "");
  say(`${count} ${count === 1 ? "image" : "images"} with the question.`);
  $("question").focus();
}

function drop(event) {
  if (![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  document.body.classList.toggle("dropping", event.type === "dragover");
  if (event.type === "drop") take(event.dataTransfer.files);
}

function keys(event) {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (running) running.abort();
    else if (edited) cancelEdit();
  }
  if (event.target === $("question") && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
}

function cancelEdit() {
  edited = null;
  write("", []);
  showState();
  $("question").focus();
}

function restart() {
  running?.abort();
  exchanges.forEach((one) => one.element.remove());
  exchanges = [];
  cancelEdit();
}

$("composer").noValidate = true;
$("composer").addEventListener("submit", submit);
$("question").addEventListener("input", grow);
$("files").addEventListener("change", () => { take($("files").files).then(() => { $("files").value = ""; }); });
$("stop").addEventListener("click", () => running?.abort());
$("cancel").addEventListener("click", cancelEdit);
$("new").addEventListener("click", restart);
$("key-button").addEventListener("click", () => askForKey(""));
$("key-form").addEventListener("submit", useKey);
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("text-close").addEventListener("click", () => $("text-dialog").close());
document.addEventListener("keydown", keys);
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  take(event.clipboardData.files);
});
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, drop);
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
connect();

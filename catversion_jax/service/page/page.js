// The page of a catversion service. What clients sent is only ever set as text, never as HTML.

const MOST_SHOWN = 20, MOST_TRIES = 5, POLL = 1000;
const $ = (id) => document.getElementById(id);
const state = { service: null, files: [], concepts: new Map(), next: null, check: 0 };

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Requests.

class Refused extends Error {
  constructor(status, detail) { super(detail); this.status = status; }
}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const token = sessionStorage.getItem("token");
  if (token) headers.set("Authorization", `Bearer ${token}`);
  let answer;
  for (let tries = 0; ; tries++) {
    try {
      answer = await fetch(path.replace(/^\//, ""), { ...options, headers });
    } catch {
      throw new Refused(0, "The server does not answer. Is it still running?");
    }
    if (answer.ok) return answer;
    // Many pictures at once may be more requests than a second has; a queue that is full is said at once.
    if (answer.status !== 429 || options.method === "POST" || tries === MOST_TRIES) break;
    await new Promise((resolve) => setTimeout(resolve, 1000 * Number(answer.headers.get("Retry-After") ?? 1)));
  }
  if (answer.status === 401) showTokenForm();
  let detail = `The server answers ${answer.status}.`;
  try { detail = (await answer.json()).detail; } catch { /* no problem document */ }
  throw new Refused(answer.status, detail);
}

const json = async (path, options) => (await ask(path, options)).json();
const send = (path, body, method = "POST") =>
  json(path, { method, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });

// Images may need the token, which an <img> does not send: they are fetched, and shown from memory.
const images = new Map();
async function imageUrl(path) {
  if (!images.has(path)) {
    images.set(path, ask(path).then((answer) => answer.blob()).then((blob) => URL.createObjectURL(blob)));
  }
  try { return await images.get(path); } catch (error) { images.delete(path); throw error; }
}

// Only those that come into view are fetched.
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) { seen.unobserve(target); showImage(target); }
}, { rootMargin: "200px" });

function image(path, alt) {
  const made = element("img", { alt, "data-path": path });
  seen.observe(made);
  return made;
}

async function showImage(made) {
  try { made.src = await imageUrl(made.dataset.path); } catch { made.alt += " (not found)"; }
}

async function save(path, name) {
  const url = URL.createObjectURL(await (await ask(path)).blob());
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function showTokenForm() {
  $("token-form").hidden = false;
  $("token").focus();
}

// 1. Photos.

async function takeFiles(files) {
  const added = [...files];
  if (!added.length) return;
  const zip = added.find((file) => file.name.toLowerCase().endsWith(".zip"));
  state.files = zip ? [zip] : [...state.files.filter((file) => !isZip(file)), ...added];
  await checkFiles();
}

const isZip = (file) => file.name.toLowerCase().endsWith(".zip");

function photosForm() {
  const form = new FormData();
  for (const file of state.files) form.append(isZip(file) ? "zip" : "images", file, isZip(file) ? "photos.zip" : "photo");
  return form;
}

async function checkFiles() {
  const number = ++state.check;
  const list = $("photos");
  if (!state.files.length) { list.replaceChildren(); $("photo-hint").textContent = ""; return; }
  $("photo-hint").textContent = "Looking at the photos ...";
  let answer;
  try {
    answer = await json("/v1/checks", { method: "POST", body: photosForm() });
  } catch (error) {
    if (number !== state.check) return;
    list.replaceChildren(...state.files.map((file, index) => element("li", {}, file.name, removeButton(file, index))));
    $("photo-hint").textContent = error.message;
    return;
  }
  if (number !== state.check) return;
  const count = answer.photos.length;
  const warned = answer.photos.some((photo) => photo.warnings.length);
  $("photo-hint").textContent = `${count} ${count === 1 ? "photo" : "photos"}, as training will see ${count === 1 ? "it" : "them"}.` +
    (warned ? " Some have warnings: they can be learned from all the same." : "") +
    (count < 3 ? " 3 to 6 give better results." : "");
  list.replaceChildren(...answer.photos.map((photo, index) => element("li", {},
    element("img", { src: photo.subject ?? photo.image, alt: `photo ${index + 1}${photo.subject ? ", what its mask leaves out dimmed" : ""}` }),
    photo.caption ? element("div", {}, `“${photo.caption}”`) : null,
    ...photo.warnings.map((warning) => element("div", { className: "warning" }, warning)),
    isZip(state.files[0]) ? null : removeButton(state.files[index], index))));
}

function removeButton(file, index) {
  return element("button", { type: "button", className: "plain", ariaLabel: `Remove photo ${index + 1}`,
    onclick: () => { state.files = state.files.filter((other) => other !== file); checkFiles(); } }, "Remove");
}

async function learn(event) {
  event.preventDefault();
  const error = $("learn-error");
  error.textContent = "";
  if (!state.files.length) { error.textContent = "Choose the photos first."; return; }
  const form = photosForm();
  form.append("class_word", $("class-word").value.trim());
  form.append("seed", $("seed").value || "0");
  if ($("steps").value) form.append("steps", $("steps").value);
  if ($("create-masks").checked) form.append("create_masks", "true");
  for (const line of $("previews").value.split("\n")) if (line.trim()) form.append("prompts", line.trim());
  $("learn-button").disabled = true;
  try {
    const concept = await json("/v1/concepts", {
      method: "POST", body: form, headers: { "Idempotency-Key": crypto.randomUUID?.() ?? String(Math.random()) },
    });
    showConcept(concept, true);
    if (!$("prompt").value) $("prompt").value = `a photo of a ${concept.class_word} on the beach`;
    state.files = [];
    $("files").value = "";
    checkFiles();
    // Who has gone on to something else meanwhile stays there.
    if (document.activeElement === document.body || $("learn").contains(document.activeElement)) {
      $(`concept-${concept.id}`).focus();
    }
  } catch (refused) {
    error.textContent = refused.message;
  } finally {
    $("learn-button").disabled = false;
  }
}

// 2. Concepts.

const WORDS = {
  queued: "waits", preparing: "its photos are read", training: "is learned", done: "is learned", failed: "failed", cancelled: "removed",
};

function described(concept) {
  const parts = [concept.status === "done" ? "done" : WORDS[concept.status]];
  if (concept.status === "training") parts.push(`step ${concept.step} of ${concept.steps}`);
  if (concept.position) parts.push(`number ${concept.position} in the queue`);
  if (concept.estimated_seconds !== null) parts.push(`about ${duration(concept.estimated_seconds)} left`);
  if (concept.seconds !== null) parts.push(`took ${duration(concept.seconds)}`);
  return parts.join(", ");
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function curve(losses) {
  if (losses.length < 2) return null;
  const window = Math.max(1, Math.floor(losses.length / 20));
  const smooth = losses.map((_, i) => {
    const part = losses.slice(Math.max(0, i - window), i + window + 1);
    return part.reduce((sum, [, loss]) => sum + loss, 0) / part.length;
  });
  const low = Math.min(...smooth), high = Math.max(...smooth);
  const points = smooth.map((loss, i) => `${(100 * i) / (smooth.length - 1)},${high > low ? 38 - (36 * (loss - low)) / (high - low) : 20}`);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "curve");
  svg.setAttribute("viewBox", "0 0 100 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `The loss, from ${smooth[0].toFixed(4)} to ${smooth.at(-1).toFixed(4)}`);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", `M${points.join("L")}`);
  svg.append(path);
  return svg;
}

function showConcept(concept, first = false) {
  const before = state.concepts.get(concept.id);
  state.concepts.set(concept.id, concept);
  const id = `concept-${concept.id}`;
  let card = $(id);
  if (!card) {
    card = element("article", { id, className: "concept", tabIndex: -1 });
    if (first) $("concepts").prepend(card); else $("concepts").append(card);
  }
  const key = JSON.stringify([concept.status, concept.photos, concept.previews]);
  // Images are made anew only if there are others: a card that is redrawn at every step would flicker.
  const strips = card.dataset.key === key ? [...card.querySelectorAll(".strip")] : imageStrips(concept);
  card.dataset.key = key;
  const focus = card.contains(document.activeElement) ? document.activeElement.dataset.does : null;
  card.replaceChildren(...[
    element("h3", {}, concept.class_word),
    element("span", { className: "state", role: "status" }, described(concept)),
    concept.error ? element("p", { className: "error" }, concept.error) : null,
    ...concept.warnings.map((warning) => element("div", { className: "warning" }, warning)),
    hasEnded(concept) ? null : element("progress", { max: concept.steps ?? 1, value: concept.step, ariaLabel: "Progress" }),
    concept.losses.length > 1 ? element("div", { className: "hint" }, `loss ${concept.loss?.toFixed(4)}`) : null,
    curve(concept.losses),
    ...strips,
    links(concept),
  ].filter((child) => child !== null));
  if (focus) card.querySelector(`[data-does="${focus}"]`)?.focus();
  $("no-concepts").hidden = true;
  if (before?.status !== concept.status) fillChoices();
}

function imageStrips(concept) {
  const strips = [];
  if (concept.photos.length) {
    strips.push(element("div", { className: "strip", ariaLabel: "The photos" },
      ...concept.photos.map((path, i) => element("figure", {}, image(path, `photo ${i + 1}`)))));
  }
  if (concept.previews.length) {
    strips.push(element("div", { className: "strip", ariaLabel: "Previews" },
      ...concept.previews.toReversed().map((preview) => element("figure", {}, image(preview.url, preview.prompt),
        element("figcaption", {}, `step ${preview.step}: ${preview.prompt}`)))));
  }
  return strips;
}

function links(concept) {
  const row = element("div", { className: "links" });
  const button = (text, does, action) => row.append(element("button", { type: "button", className: "plain", "data-does": does,
    onclick: () => action().catch((error) => { $("learn-error").textContent = error.message; }) }, text));
  if (concept.status === "done") {
    button("Draw with it", "draw", async () => { $("concept-a").value = concept.id; choose(); $("prompt").focus(); });
    button("Save the concept", "save", () => save(concept.concept, "concept.safetensors"));
    button("Save it for diffusers and ComfyUI", "export", () => save(`/v1/concepts/${concept.id}/export.zip`, "export.zip"));
  }
  button(hasEnded(concept) ? "Remove it" : "Stop, and remove it", "remove", async () => {
    if (!confirm(`Remove ${concept.class_word}, its photos and all that was learned from them?`)) return;
    await ask(`/v1/concepts/${concept.id}`, { method: "DELETE" });
    forget(concept.id);
  });
  return row;
}

function forget(id) {
  const concept = state.concepts.get(id);
  for (const path of [...(concept?.photos ?? []), ...(concept?.previews ?? []).map((preview) => preview.url)]) {
    images.get(path)?.then(URL.revokeObjectURL, () => {});
    images.delete(path);
  }
  state.concepts.delete(id);
  $(`concept-${id}`)?.remove();
  $("no-concepts").hidden = state.concepts.size > 0;
  fillChoices();
}

const hasEnded = (concept) => ["done", "failed", "cancelled"].includes(concept.status);

// By asking, and not by one stream of events for each: a browser has six connections to a server.
async function watch() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL));
    if (document.hidden) continue;
    for (const { id } of [...state.concepts.values()].filter((concept) => !hasEnded(concept) || lacksPreviews(concept))) {
      try {
        const found = await json(`/v1/concepts/${id}`);
        if (state.concepts.has(id)) showConcept(found);
      } catch (error) {
        if (error.status === 404) forget(id);
        if (error.status === 401 || error.status === 0) break;
      }
    }
  }
}

// Those of the last step come after the concept is done.
const lacksPreviews = (concept) => concept.status === "done" && !concept.previewed;

async function listConcepts() {
  const after = state.next ? `&after=${state.next}` : "";
  const page = await json(`/v1/concepts?limit=${MOST_SHOWN}${after}`);
  state.next = page.next;
  $("more-concepts").hidden = !page.next;
  for (const concept of page.concepts) {
    if (concept.status === "cancelled") continue;
    showConcept(concept);
  }
}

function fillChoices() {
  const done = [...state.concepts.values()].filter((concept) => concept.status === "done");
  const words = done.map((concept) => concept.class_word);
  const name = (concept) => words.filter((word) => word === concept.class_word).length > 1
    ? `${concept.class_word} (${concept.id.slice(0, 6)})` : concept.class_word;
  for (const [id, none] of [["concept-a", "the base model alone"], ["concept-b", "nothing"]]) {
    const chosen = $(id).value;
    const choices = id === "concept-b" ? [["", none], ["base", "the base model alone"]] : [["", none]];
    $(id).replaceChildren(...[...choices, ...done.map((concept) => [concept.id, name(concept)])]
      .map(([value, text]) => element("option", { value }, text)));
    if ([...$(id).options].some((option) => option.value === chosen)) $(id).value = chosen;
    if (id === "concept-a" && !chosen && done.length) $(id).value = done[0].id;
  }
  choose();
}

function choose() {
  const concept = state.concepts.get($("concept-a").value);
  if (concept && !$("prompt").value) $("prompt").value = `a photo of a ${concept.class_word} on the beach`;
}

// 3. Pictures.

async function draw(event) {
  event.preventDefault();
  $("draw-error").textContent = "";
  $("draw-hint").textContent = "";
  const prompt = $("prompt").value.trim();
  const first = Number($("first-seed").value), strength = Number($("strength").value);
  const seeds = Array.from({ length: Number($("count").value) }, (_, i) => (first + i) % 2 ** 32);
  const columns = [$("concept-a").value, ...($("concept-b").value ? [$("concept-b").value] : [])]
    .map((id) => (id && id !== "base" ? state.concepts.get(id) : null));
  const [width, height] = $("size").value.split("x").map(Number);
  const pictures = columns.flatMap((concept) => seeds.map((seed) => ({
    prompt, seed, width, height, concepts: concept ? [{ id: concept.id, strength }] : [],
  })));
  $("draw-button").disabled = true;
  try {
    const answer = await send("/v1/pictures", { pictures });
    const warnings = new Set(answer.pictures.flatMap((picture) => picture.warnings));
    $("draw-hint").textContent = [...warnings].join(" ");
    showPictures(prompt, columns.map((concept, i) => [
      concept ? `${concept.class_word}, strength ${strength}` : "the base model",
      answer.pictures.slice(i * seeds.length, (i + 1) * seeds.length),
    ]));
  } catch (refused) {
    $("draw-error").textContent = refused.message;
  } finally {
    $("draw-button").disabled = false;
  }
}

function showPictures(prompt, columns) {
  const shown = element("section", { className: "drawn" }, element("p", {}, prompt),
    element("div", { className: columns.length > 1 ? "pair two" : "pair" }, ...columns.map(([title, pictures]) => element("div", {},
      element("h4", {}, title),
      element("div", { className: "pictures" }, ...pictures.map((picture) => pictureButton(picture)))))));
  $("gallery").prepend(shown);
}

function pictureButton(picture) {
  const button = element("button", { type: "button", disabled: true, ariaLabel: `seed ${picture.request.seed}` }, "...");
  followPicture(picture, button);
  return button;
}

async function followPicture(picture, button) {
  for (let pause = 300; !["done", "failed", "cancelled"].includes(picture.status); pause = Math.min(pause * 1.2, 2000)) {
    await new Promise((resolve) => setTimeout(resolve, pause));
    try {
      picture = await json(`/v1/pictures/${picture.id}`);
    } catch (error) {
      if (error.status === 404 || error.status === 401) { button.textContent = error.message; return; }
    }
  }
  if (picture.status !== "done") { button.textContent = picture.error ?? picture.status; return; }
  button.disabled = false;
  button.replaceChildren(image(picture.url, `${picture.request.prompt}, seed ${picture.request.seed}`));
  button.addEventListener("click", () => enlarge(picture));
}

async function enlarge(picture) {
  const url = await imageUrl(picture.url);
  $("large-image").src = url;
  $("large-image").alt = picture.request.prompt;
  $("large-text").textContent = `${picture.request.prompt} — seed ${picture.request.seed}`;
  $("large-save").href = url;
  $("large-save").download = `${picture.id}.png`;
  $("large").showModal();
}

// The start.

async function begin() {
  let service;
  try {
    service = await json("/v1/service");
  } catch (error) {
    if (error.status !== 401) $("learn-error").textContent = error.message;
    return;
  }
  $("token-form").hidden = true;
  state.service = service;
  $("about").textContent = `Learn your own thing from a few photos, then draw it anywhere. Model: ${service.model}, ${service.resolution} pixels.`;
  $("steps").placeholder = service.steps;
  $("steps").max = service.limits.steps;
  $("strength").value = service.strength;
  $("strength-shown").textContent = service.strength;
  $("masks-label").hidden = !service.can_create_masks;
  $("size").replaceChildren(...service.sizes.map(([width, height]) => element("option", { value: `${width}x${height}` }, `${width} x ${height}`)));
  $("size-label").hidden = service.sizes.length < 2;
  fillChoices();
  await listConcepts();
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  begin();
});
$("files").addEventListener("change", (event) => takeFiles(event.target.files));
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") takeFiles(event.dataTransfer.files);
  });
}
$("learn").addEventListener("submit", learn);
$("draw").addEventListener("submit", draw);
$("concept-a").addEventListener("change", choose);
$("strength").addEventListener("input", () => { $("strength-shown").textContent = $("strength").value; });
$("large-close").addEventListener("click", () => $("large").close());
$("more-concepts").addEventListener("click", listConcepts);
begin();
watch();

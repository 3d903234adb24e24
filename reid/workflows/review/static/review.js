// Asks for questions, shows them, sends answers. An answer is on disk before the next question comes.
"use strict";

const KEYS = { s: "same", d: "different", p: "split", m: "merge", j: "junk", n: "next" };
const ALLOWED = {
  cluster: ["same", "different", "split", "merge", "junk", "next"],
  pair: ["same", "different", "junk", "next"],
  persons: ["same", "different", "junk", "next"],
  random: ["same", "different", "junk", "next"],
};
const state = { question: null, marked: new Set(), chosen: new Set(), busy: false, figuresAgain: false, figuresBusy: false };
const element = (id) => document.getElementById(id);
const view = () => location.hash.slice(1) || "auto";

async function call(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store", credentials: "omit" });
  } catch {
    throw new Error("review.py does not answer: has it ended? Your earlier answers are on disk.");
  }
  const kind = response.headers.get("Content-Type") || "";
  const content = kind.startsWith("application/json") ? await response.json() : { error: await response.text() };
  if (!response.ok) throw Object.assign(new Error(content.error || response.statusText), { status: response.status });
  return content;
}

function say(text, bad = false) {
  element("status").textContent = text;
  element("status").classList.toggle("bad", bad);
}

async function work(job) {
  if (state.busy) return;
  state.busy = true;
  for (const button of element("actions").children) button.disabled = true;
  try {
    await job();
  } catch (error) {
    say(error.message, true);
    if (error.status === 409) show(await call(`api/question?view=${encodeURIComponent(view())}`));
  } finally {
    state.busy = false;
    for (const button of element("actions").children) button.disabled = false;
  }
}

const load = () => work(async () => {
  show(await call(`api/question?view=${encodeURIComponent(view())}`));
  refreshFigures();
});

const answer = (verdict) => work(async () => {
  if (!state.question) return;
  const body = { key: state.question.key, verdict, marked: [...state.marked], chosen: [...state.chosen], view: view() };
  const found = await call("api/answer", body);
  say("");
  show(found);
  refreshFigures();
});

const undo = () => work(async () => {
  const found = await call("api/undo", { view: view() });
  show(found);
  say(found.undone);
  refreshFigures();
});

const write = () => work(async () => {
  const found = await call("api/write", {});
  const commands = found.commands.flatMap(([what, command]) => [make("p", {}, what), make("pre", {}, command)]);
  fill("written", make("p", {}, `Written to ${found.path}: ${found.summary}. ${found.note}`), ...commands);
  say(`Written to ${found.path}`);
});

async function refreshFigures() {
  state.figuresAgain = true;
  if (state.figuresBusy) return;
  state.figuresBusy = true;
  try {
    while (state.figuresAgain) {
      state.figuresAgain = false;
      drawFigures(await call("api/figures"));
    }
  } catch (error) {
    fill("settings", error.message);
  } finally {
    state.figuresBusy = false;
  }
}

function show(found) {
  const counts = found.counts, question = found.question;
  document.title = `Review of ${counts.run}`;
  element("run").textContent = counts.run;
  element("counts").textContent = `${plural(counts.answers, "answer", "answers")}; ` +
    `${plural(counts.labelled, "image", "images")} of ${counts.images.toLocaleString("en")} labelled, ` +
    `${plural(counts.persons, "person", "persons")}, ${counts.junk} junk` +
    (counts.contradictions ? `; ${plural(counts.contradictions, "older answer", "older answers")} overruled by newer ones` : "");
  fill("views", ...Object.entries(found.views).map(([name, title]) => {
    const button = make("button", { type: "button", "aria-current": String(name === found.view) }, title);
    button.addEventListener("click", () => { location.hash = name; });
    return button;
  }));
  state.question = question;
  state.marked = new Set(question ? question.marked : []);
  state.chosen = new Set();
  showQuestion(question, counts);
  showActions(question);
}

function showQuestion(question, counts) {
  for (const part of ["anchor", "images", "others"]) {
    element(`${part}-part`).hidden = !question || !question[part].length;
    fill(part);
  }
  if (!question) {
    element("task").textContent = "Nothing is left to ask here";
    element("about").textContent = `Choose another kind of question above. Source of the clusters: ${counts.clusters_from}.`;
    return;
  }
  const [task, about, anchorTitle, imagesTitle] = describe(question);
  element("task").textContent = task;
  element("about").textContent = about;
  element("anchor-title").textContent = anchorTitle;
  element("images-title").textContent = imagesTitle;
  const few = question.images.length <= 6 && question.kind !== "cluster";
  element("images").classList.toggle("few", few);
  element("anchor-part").classList.toggle("pinned", question.kind === "random");
  element("anchor").classList.toggle("few", question.kind !== "cluster");
  fill("anchor", ...question.anchor.map((image) => make("div", { class: "tile" }, ...tileParts(image, "known"))));
  fill("images", ...question.images.map((image, place) => markable(question, image, place)));
  fill("others", ...question.others.map(otherCluster));
  element("task").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function describe(question) {
  const about = question.about;
  if (question.kind === "cluster") {
    return ["Do these images show one person?",
      `Cluster ${about.cluster}: ${plural(about.size, "image", "images")}` +
      (about.left ? `, ${about.left} more come next` : "") + `; mean confidence ${about.confidence}. Mark those that do not belong.`,
      "This person, by earlier answers", "To judge"];
  }
  if (question.kind === "pair") {
    return ["Do these two images show the same person?",
      `Similarity ${about.similarity}; by the answers so far they do with a probability of ${Math.round(100 * about.probability)} %.`, "", "The two"];
  }
  if (question.kind === "persons") {
    return ["Are these two persons one?",
      `Both are labelled but were never compared. By the answers so far they are one with a probability of ${Math.round(100 * about.probability)} %.`,
      "One person", "The other"];
  }
  return ["Which images show the same person as the first one?",
    `A randomly sampled image (${about.sampled} of ${about.of.toLocaleString("en")} so far) and the most similar images of other cameras, best first. Mark those of the same person.`,
    "This person", "Most similar images"];
}

function tileParts(image, word) {
  const camera = image.camera === "" ? "camera unknown" : /^\d+$/.test(image.camera) ? `camera ${image.camera}` : image.camera;
  const picture = make("img", { src: `image/${image.number}`, alt: `${word} image, ${camera}, ${image.name}`, loading: "lazy", width: 96, height: 192 });
  return [picture, make("span", { class: "name", title: image.name }, camera)];
}

function markable(question, image, place) {
  const pick = question.kind === "random";
  const tile = make("button", { type: "button", class: pick ? "tile pick" : "tile", "data-mark": pick ? "same" : "marked",
    "aria-pressed": String(state.marked.has(image.number)) }, ...tileParts(image, `${place + 1}.`));
  tile.addEventListener("click", () => toggle(tile, state.marked, image.number));
  return tile;
}

function otherCluster(group, place) {
  const button = make("button", { type: "button", "aria-pressed": "false", "aria-label": `Other cluster ${place + 1}` },
    make("kbd", {}, String(place + 1)),
    ...group.map((image) => tileParts(image, "its")[0]));
  button.addEventListener("click", () => toggle(button, state.chosen, place));
  return button;
}

function toggle(button, set, value) {
  if (!set.delete(value)) set.add(value);
  button.setAttribute("aria-pressed", String(set.has(value)));
}

function showActions(question) {
  const buttons = (question ? ALLOWED[question.kind] : []).map((verdict) => {
    const key = Object.keys(KEYS).find((name) => KEYS[name] === verdict);
    const button = make("button", { type: "button", "aria-keyshortcuts": key, class: verdict === "same" ? "main" : "" },
      verdict, " ", make("kbd", {}, key));
    button.addEventListener("click", () => answer(verdict));
    return button;
  });
  const back = make("button", { type: "button", "aria-keyshortcuts": "u" }, "undo ", make("kbd", {}, "u"));
  back.addEventListener("click", undo);
  fill("actions", ...buttons, back);
}

// Arrow keys go through the images that can be marked, as they lie on the page.
function move(key) {
  const tiles = [...document.querySelectorAll("#images button, #others button")];
  if (!tiles.length) return;
  const place = tiles.indexOf(document.activeElement);
  if (place < 0) { tiles[0].focus(); return; }
  if (key === "ArrowLeft" || key === "ArrowRight") {
    tiles[Math.max(0, Math.min(tiles.length - 1, place + (key === "ArrowRight" ? 1 : -1)))].focus();
    return;
  }
  const here = tiles[place].getBoundingClientRect(), down = key === "ArrowDown";
  let best = null, distance = Infinity;
  for (const tile of tiles) {
    const box = tile.getBoundingClientRect(), gap = down ? box.top - here.bottom : here.top - box.bottom;
    const found = gap + Math.abs(box.left - here.left) / 10;
    if (gap >= 0 && found < distance) [best, distance] = [tile, found];
  }
  if (best) best.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.repeat && !key.startsWith("Arrow")) return;
  if (key.startsWith("Arrow") && state.question) move(key);
  else if (key in KEYS && state.question && ALLOWED[state.question.kind].includes(KEYS[key])) answer(KEYS[key]);
  else if (key === "u") undo();
  else if (key === "w") write();
  else if (/^[1-9]$/.test(key) && element("others").children[Number(key) - 1]) element("others").children[Number(key) - 1].click();
  else return;
  event.preventDefault();
});
element("write").addEventListener("click", write);
window.addEventListener("hashchange", load);
load();

// Makes elements; text never becomes HTML.
"use strict";

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

function fill(id, ...children) {
  document.getElementById(id).replaceChildren(...children);
}

function percent(estimate) {
  if (!estimate) return "–";
  const value = (100 * estimate.value).toFixed(1) + " %";
  if (estimate.low === null) return value + " (too few for an interval)";
  return `${value} (95 %: ${(100 * estimate.low).toFixed(1)} to ${(100 * estimate.high).toFixed(1)})`;
}

// From the lower bound's interval to the upper bound's.
function between(lower, upper) {
  if (!upper) return "–";
  const text = `between ${(100 * lower.value).toFixed(1)} % and ${(100 * upper.value).toFixed(1)} %`;
  if (lower.low === null || upper.high === null) return text + " (too few for an interval)";
  return `${text} (95 %: ${(100 * lower.low).toFixed(1)} to ${(100 * upper.high).toFixed(1)})`;
}

function plural(count, one, many) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

function definitions(rows) {
  const list = make("dl", { class: "figures" });
  for (const [name, value] of rows) list.append(make("dt", {}, name), make("dd", {}, value));
  return list;
}

// Two figures against the number of answers, each with its band of 95 %.
function chart(history) {
  const width = 560, height = 190, left = 40, right = 12, top = 10, bottom = 28;
  const last = Math.max(...history.map((entry) => entry.answers), 1);
  const x = (answers) => left + (width - left - right) * answers / last;
  const y = (value) => top + (height - top - bottom) * (1 - value);
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": "mAP on labelled images and the share of random samples whose best match is right, by answers" });
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(makeSvg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(makeSvg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, `${100 * value} %`));
  }
  for (const answers of [0, last]) {
    svg.append(makeSvg("text", { x: x(answers), y: height - 8, "text-anchor": answers ? "end" : "start" },
      answers ? plural(last, "answer", "answers") : "0"));
  }
  for (const [name, kind] of [["mAP", "a"], ["sampled", "b"]]) {
    const known = history.filter((entry) => entry[name]);
    const banded = known.filter((entry) => entry[name].low !== null);
    if (banded.length > 1) {
      const upper = banded.map((entry) => `${x(entry.answers)},${y(entry[name].high)}`);
      const lower = banded.map((entry) => `${x(entry.answers)},${y(entry[name].low)}`).reverse();
      svg.append(makeSvg("polygon", { class: "area", points: [...upper, ...lower].join(" ") }));
    }
    const points = known.map((entry) => `${x(entry.answers)},${y(entry[name].value)}`);
    svg.append(makeSvg("polyline", { class: `line ${kind}`, points: points.join(" ") }));
    for (const entry of known.slice(-1)) {
      svg.append(makeSvg("circle", { class: `dot-${kind}`, cx: x(entry.answers), cy: y(entry[name].value), r: 4 }));
    }
  }
  return svg;
}

function drawFigures(found) {
  const random = found.random, labelled = found.labelled;
  const counted = plural(random.answered, "randomly sampled image", "randomly sampled images");
  const left = random.skipped + random.junk;
  fill("random", make("h3", {}, "From random samples: not biased by the choice of questions"),
    ...(random.answered ? [
      definitions([
        ["Best match is right", percent(random.best_is_right)],
        ["Rank-1", between(random.best_is_right, random.rank1)],
        ["mAP, first 20 places", percent(random.mAP)],
      ]),
      make("p", { class: "muted" }, `${counted}, each compared with all images of other cameras; ` +
        `${random.with_match} have a match among the first 20 places. ` +
        (left ? `${left} more were junk or skipped and do not count. ` : "") +
        "Rank-1 lies between the two, since an image without a match there may have one further down, or none. " +
        "For the same reason this mAP is usually too high."),
    ] : [make("p", { class: "muted" }, "None answered yet: choose Random samples.")]));
  fill("labelled", make("h3", {}, "On the labelled images: the figures of --eval-only on the list"),
    ...(labelled.why ? [make("p", { class: "muted" }, `No figures yet: ${labelled.why}.`)] : [
      definitions([["mAP", percent(labelled.mAP)], ["Rank-1", percent(labelled.rank1)]]),
      make("p", { class: "muted" }, `${plural(labelled.queries, "query", "queries")} of ` +
        `${plural(labelled.persons, "person", "persons")} in ${plural(labelled.gallery, "gallery image", "gallery images")}. ` +
        "These figures are too high if you labelled only sure clusters and pairs, or if the gallery is small. Use them to compare models; the random samples show how good a model is." +
        (found.unjudged ? ` ${plural(found.unjudged, "pair", "pairs")} of labelled persons may be one person each: answer Persons that look alike.` : "")),
    ]));
  const points = found.history.filter((entry) => entry.mAP || entry.sampled);
  const parts = points.length > 1 ? [make("h3", {}, "As labels grow"), chart(points),
    make("p", { class: "muted" }, make("span", { class: "key-a" }, "━ mAP on labelled images"), "  ",
      make("span", { class: "key-b" }, "━ best match is right, random samples"))] : [];
  fill("chart", ...parts);
  fill("settings", found.settings);
}

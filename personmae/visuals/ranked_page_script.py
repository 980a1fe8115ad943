"""The program of the page that browses ranked lists: reads its data, filters, sorts, and draws a few queries at a time.

Names and numbers get into the page as text only. What is chosen stands in the address, so that a view can be kept.
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const DEFAULTS = {sort: "ap-worst", person: "", camera: "", outcome: "all", page: "1", per: "10", own: "0", map: "0"};
const PER_PAGE = [5, 10, 25, 50];
let state = {...DEFAULTS};

function make(kind, attributes = {}, ...content) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...content);
  return element;
}

// A query is [image, AP or null, rank of the first match from 1 or 0, nearest images, distances, ranks of matches, number of matches].
const person = query => data.images[query[0]][1], camera = query => data.images[query[0]][2];
const isOwn = (query, image) => data.images[image][1] === person(query) && data.images[image][2] === camera(query);

const order = (value, sign) => (a, b) => {
  const x = value(a), y = value(b);
  return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);
};
const SORTS = {
  "ap-worst": order(query => query[1], 1),
  "ap-best": order(query => query[1], -1),
  "first-worst": order(query => query[2] || null, -1),
  "first-best": order(query => query[2] || null, 1),
  "set": null,
};
const OUTCOMES = {
  all: () => true,
  wrong: query => query[2] > 1,
  right: query => query[2] === 1,
  none: query => query[2] === 0,
};

function readAddress() {
  state = {...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1)))};
  if (!Object.hasOwn(SORTS, state.sort)) state.sort = DEFAULTS.sort;
  if (!Object.hasOwn(OUTCOMES, state.outcome)) state.outcome = "all";
  if (!PER_PAGE.includes(Number(state.per))) state.per = DEFAULTS.per;
  for (const name of ["sort", "person", "camera", "outcome", "per"]) byId(name).value = state[name];
  for (const name of ["own", "map"]) byId(name).checked = state[name] === "1";
  draw();
}

function change(changes) {
  state = {...state, ...changes};
  const said = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
  history.replaceState(null, "", "#" + new URLSearchParams(said));
  draw();
}

function chosenQueries() {
  const found = data.queries.filter(query =>
    (state.person === "" || String(person(query)) === state.person.trim()) &&
    (state.camera === "" || String(camera(query)) === state.camera) && OUTCOMES[state.outcome](query));
  return SORTS[state.sort] ? found.sort(SORTS[state.sort]) : found;
}

function address(image) {
  const number = String(image).padStart(6, "0");
  return "images/" + number.slice(0, -3) + "/" + number + ".jpg";
}

function drawMap(canvas, image) {
  const maps = data.maps, size = maps.rows * maps.columns, context = canvas.getContext("2d");
  const pixels = context.createImageData(maps.columns, maps.rows);
  for (let patch = 0; patch < size; patch++) {
    const share = mapValues[image * size + patch] / 255 * maps.peaks[image] / maps.full;
    pixels.data.set(maps.colours[Math.round(Math.min(share, 1) * (maps.colours.length - 1))], 4 * patch);
  }
  context.putImageData(pixels, 0, 0);
}

function picture(image, kind, words) {
  const [name] = data.images[image];
  const frame = make("button", {type: "button", class: "frame " + kind, "aria-label": words, title: name});
  frame.append(make("img", {src: address(image), alt: "", width: data.width, height: data.height, decoding: "async"}));
  if (data.maps && state.map === "1") {
    const canvas = make("canvas", {width: data.maps.columns, height: data.maps.rows});
    drawMap(canvas, image);
    frame.append(canvas);
  }
  if (kind !== "query") frame.append(make("span", {class: "mark", "aria-hidden": "true"}, {right: "✓", wrong: "✗", own: "\u2013"}[kind]));
  frame.addEventListener("click", () => showDetails(image, kind, words));
  return frame;
}

const KINDS = {right: "same person", wrong: "another person", own: "same person and camera, left out", query: "query"};

function showDetails(image, kind, words) {
  const [name, who, where] = data.images[image];
  const rows = [["file", name], ["person", who], ["camera", where], ["", words]];
  byId("details-list").replaceChildren(...rows.map(([label, value]) => make("div", {}, make("dt", {}, label), make("dd", {}, String(value)))));
  byId("details-picture").replaceChildren(make("img", {src: address(image), alt: "", class: kind}));
  byId("details").showModal();
}

function section(query) {
  const [image, precision, first, nearest, distances, matches, count] = query;
  const score = precision === null ? "not scored" : "AP " + (100 * precision).toFixed(1) + " %";
  const title = make("h3", {}, "Person " + person(query) + " · camera " + camera(query));
  const lines = [make("p", {class: "score"}, score)];
  if (precision !== null) {
    const bar = make("div", {class: "meter", "aria-hidden": "true"}, make("i"));
    bar.firstChild.style.width = 100 * precision + "%";
    lines.push(bar);
  }
  if (!count) lines.push(make("p", {}, first ? "first match at rank " + first.toLocaleString("en") : "no match in the gallery"));
  else {
    const more = count > matches.length ? ", …" : "";
    const numbers = matches.map(rank => rank.toLocaleString("en")).join(", ");
    lines.push(make("p", {}, (count === 1 ? "1 match, at rank " : count.toLocaleString("en") + " matches, at ranks ") + numbers + more));
  }
  const list = make("ol");
  let rank = 0;
  nearest.forEach((other, place) => {
    const own = isOwn(query, other);
    if (own && state.own !== "1") return;
    if (!own && rank === data.shown) return;
    const kind = own ? "own" : data.images[other][1] === person(query) ? "right" : "wrong";
    const distance = distances[place].toFixed(3);
    const label = own ? "left out" : String(++rank);
    const words = (own ? "" : "rank " + rank + ", ") + KINDS[kind] + ", distance " + distance;
    const [, who, where] = data.images[other];
    list.append(make("li", {class: kind},
      make("span", {class: "rank"}, label), picture(other, kind, words),
      make("span", {class: "under"}, distance), make("span", {class: "under"}, who + " · c" + where)));
  });
  const query_picture = picture(image, "query", "query, person " + person(query) + ", camera " + camera(query));
  return make("article", {}, make("div", {class: "who"}, query_picture, make("div", {}, title, ...lines)), list);
}

function draw() {
  const found = chosenQueries(), per = Number(state.per), pages = Math.max(1, Math.ceil(found.length / per));
  const page = Math.min(Math.max(1, Math.floor(Number(state.page)) || 1), pages), start = (page - 1) * per;
  state.page = String(page);
  const shown = found.slice(start, start + per);
  byId("queries").replaceChildren(...shown.map(section));
  const whole = found.length === data.queries.length ? "" : " (of " + data.queries.length.toLocaleString("en") + ")";
  byId("status").textContent = found.length
    ? "queries " + (start + 1).toLocaleString("en") + " to " + (start + shown.length).toLocaleString("en") +
      " of " + found.length.toLocaleString("en") + whole
    : "no query fits these filters" + whole;
  for (const field of document.querySelectorAll(".page-number")) { field.value = page; field.max = pages; }
  for (const text of document.querySelectorAll(".pages")) text.textContent = "of " + pages.toLocaleString("en");
  for (const button of document.querySelectorAll(".previous")) button.disabled = page === 1;
  for (const button of document.querySelectorAll(".next")) button.disabled = page === pages;
  byId("legend").hidden = !(data.maps && state.map === "1");
}

function turn(step) {
  const before = state.page;
  change({page: String(Number(state.page) + step)});
  if (state.page !== before) byId("queries-title").scrollIntoView();
}

let mapValues = null;
if (data.maps) {
  mapValues = Uint8Array.from(atob(data.maps.values), letter => letter.charCodeAt(0));
  const stops = data.maps.colours.map(([red, green, blue]) => "rgb(" + red + "," + green + "," + blue + ")");
  byId("legend-bar").style.background = "linear-gradient(to right, " + stops.join(", ") + ")";
  byId("legend-full").textContent = data.maps.full.toFixed(1);
}
byId("map").disabled = !data.maps;
byId("own").disabled = !data.queries.some(query => query[3].some(image => isOwn(query, image)));
const numbers = values => [...new Set(values)].sort((a, b) => a - b);
byId("camera").append(...numbers(data.queries.map(camera)).map(number => make("option", {value: number}, String(number))));
byId("people").append(...numbers(data.queries.map(person)).map(number => make("option", {value: number})));
for (const name of ["sort", "camera", "outcome", "per"])
  byId(name).addEventListener("change", event => change({[name]: event.target.value, page: "1"}));
for (const name of ["own", "map"]) byId(name).addEventListener("change", event => change({[name]: event.target.checked ? "1" : "0"}));
byId("person").addEventListener("input", event => change({person: event.target.value, page: "1"}));
byId("reset").addEventListener("click", () => { history.replaceState(null, "", "#"); readAddress(); });
for (const field of document.querySelectorAll(".page-number")) field.addEventListener("change", () => change({page: field.value}));
for (const button of document.querySelectorAll(".previous")) button.addEventListener("click", () => turn(-1));
for (const button of document.querySelectorAll(".next")) button.addEventListener("click", () => turn(1));
addEventListener("hashchange", readAddress);
addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || byId("details").open) return;
  if (event.target.closest("input, select, textarea")) return;
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (step) { event.preventDefault(); turn(step); }
});
readAddress();
"""

"""The page of `personmae serve`: drop a picture, or click one, and see the nearest pictures of the gallery. It asks nothing but its own server."""

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>PersonMAE search</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 84rem; padding: 0 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.4rem } .note, #said { color: #555 } #said.error { color: #a00 }
#drop { border: 2px dashed #999; border-radius: .5rem; padding: 1.5rem; text-align: center } #drop.over { border-color: #1f5fa8; background: #eef4fb }
#results { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; padding: 0; list-style: none }
#results button { border: 0; padding: 0; background: none; color: inherit; font: inherit; cursor: pointer }
#results button { font-size: .8rem; width: 96px; text-align: left }
#results img, #query img { display: block; width: 96px; height: 192px; object-fit: cover; background: #ddd } .name { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { color: #eee; background: #181818 } .note, #said { color: #aaa } #drop.over { background: #223 } #said.error { color: #f88 }
}
</style></head><body>
<h1>Who is that?</h1>
<p class="note">Nearest pictures of the gallery by cosine similarity. A likeness is no proof of who somebody is.</p>
<div id="drop"><label>Drop a picture here, or choose one: <input id="file" type="file" accept="image/*"></label></div>
<p id="said" role="status"></p><div id="query"></div><ol id="results"></ol>
<script>
"use strict";
const byId = id => document.getElementById(id);
const imageOf = name => "image?name=" + encodeURIComponent(name);

function say(text, isError) { byId("said").textContent = text; byId("said").className = isError ? "error" : ""; }

function picture(source, description) {
  const image = document.createElement("img");
  image.src = source; image.alt = description;
  return image;
}

function show(found) {
  byId("results").replaceChildren(...found.map(hit => {
    const item = document.createElement("li"), button = document.createElement("button"), name = document.createElement("span");
    name.className = "name"; name.textContent = hit.similarity.toFixed(3) + " " + hit.name;
    button.append(picture(imageOf(hit.name), hit.name), name);
    button.addEventListener("click", () => searchByName(hit.name));
    item.append(button);
    return item;
  }));
  say(found.length + " pictures");
}

async function search(request, shown) {
  say("searching ..."); byId("query").replaceChildren(shown);
  try {
    const answer = await request, content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    show(content.found);
  } catch (error) { byId("results").replaceChildren(); say(error.message, true); }
}

function searchByName(name) {
  history.replaceState(null, "", "?query=" + encodeURIComponent(name));
  search(fetch("search?name=" + encodeURIComponent(name)), picture(imageOf(name), "query: " + name));
}

function searchByFile(file) {
  history.replaceState(null, "", location.pathname);
  const headers = {"Content-Type": "application/octet-stream"};
  search(fetch("search", {method: "POST", headers, body: file}), picture(URL.createObjectURL(file), "query: " + file.name));
}

byId("file").addEventListener("change", event => event.target.files[0] && searchByFile(event.target.files[0]));
const drop = byId("drop");
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, event => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", event => { event.preventDefault(); if (event.dataTransfer.files[0]) searchByFile(event.dataTransfer.files[0]); });
const wanted = new URLSearchParams(location.search).get("query");
if (wanted) searchByName(wanted);
</script></body></html>
"""

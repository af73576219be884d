
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SIDE = 96;

function element(name, text, parent, cls) {
  const made = document.createElement(name);
  if (text !== null) made.textContent = text;
  if (cls) made.className = cls;
  if (parent) parent.append(made);
  return made;
}

const percent = (x) => `${x < 0.0995 ? (100 * x).toPrecision(2) : Math.round(100 * x)} %`;

document.getElementById("subject").textContent = data.header.subject;
for (const list of ["facts", "more"]) {
  for (const [name, value] of data.header[list]) {
    const row = element("div", null, document.getElementById(list));
    element("dt", name, row);
    element("dd", value, row);
  }
}

for (const latent of data.latents) {
  latent.best = latent.rates.length ? latent.rates.indexOf(Math.max(...latent.rates)) : -1;
  const total = latent.rates.reduce((a, b) => a + b, 0);
  latent.selectivity = latent.best < 0 || !total ? 0 : latent.rates[latent.best] / total;
}

// Each picture is decoded once and drawn as often as it is shown.
const pictures = {};
for (const [number, image] of Object.entries(data.images)) {
  const picture = new Image();
  picture.src = image.src;
  pictures[number] = picture.decode().then(() => picture);
}

function draw(canvas, picture, image, heat, shown) {
  const small = Math.max(picture.naturalWidth, picture.naturalHeight) < SIDE;
  const scale = small ? Math.ceil(SIDE / Math.max(picture.naturalWidth, picture.naturalHeight)) : 1;
  canvas.width = picture.naturalWidth * scale;
  canvas.height = picture.naturalHeight * scale;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (!shown) return;
  const width = canvas.width / image.columns, height = canvas.height / image.rows;
  heat.forEach((value, i) => {
    if (!value) return;
    context.fillStyle = `rgb(255 120 0 / ${(0.12 + 0.68 * value / 255).toFixed(3)})`;
    const x = (i % image.columns) * width, y = Math.floor(i / image.columns) * height;
    context.fillRect(x, y, width, height);
  });
}

function tile(entry, parent) {
  const image = data.images[entry.image];
  const figure = element("figure", null, parent);
  figure.tabIndex = 0;
  const canvas = element("canvas", null, figure);
  const label = image.label >= 0 && data.classes.length ? data.classes[image.label] : "";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${image.name}${label ? ", class " + label : ""}, code ${entry.value}`);
  figure.title = `${image.name}${label ? ", class " + label : ""}: ${entry.value}`;
  const caption = element("figcaption", null, figure);
  element("span", label || image.name, caption);
  element("span", entry.value.toPrecision(3), caption);
  pictures[entry.image].then((picture) => {
    const show = (on) => draw(canvas, picture, image, entry.heat, on);
    show(true);
    for (const event of ["pointerenter", "focus"]) figure.addEventListener(event, () => show(false));
    for (const event of ["pointerleave", "blur"]) figure.addEventListener(event, () => show(true));
  });
}

function card(latent) {
  const made = element("article", null, null, "latent");
  const about = element("div", null, made, "about");
  const left = element("div", null, about);
  element("h2", `Latent ${latent.index}`, left);
  element("p", `fires on ${percent(latent.density)} of patches, in ${percent(latent.images)} of images; max ${latent.max.toPrecision(3)}`, left, "numbers");
  if (data.classes.length) {
    const bars = element("div", null, about, "classes" + (data.classes.length > 20 ? " many" : ""));
    const most = Math.max(...latent.rates, 1e-9);
    latent.rates.forEach((rate, i) => {
      const column = element("div", null, bars);
      const bar = element("i", null, column);
      bar.style.height = (2.2 * rate / most).toFixed(2) + "rem";
      column.title = `${data.classes[i]}: ${percent(rate)} of its images`;
      if (data.classes.length <= 20) element("span", data.classes[i].slice(0, 3), column);
    });
  }
  const tiles = element("div", null, made, "tiles");
  for (const entry of latent.top) tile(entry, tiles);
  return made;
}

const cards = new Map(data.latents.map((latent) => [latent, card(latent)]));
const orders = {
  rare: (a, b) => a.density - b.density,
  frequent: (a, b) => b.density - a.density,
  class: (a, b) => a.best - b.best || b.selectivity - a.selectivity,
  selective: (a, b) => b.selectivity - a.selectivity,
  index: (a, b) => a.index - b.index,
};
const sort = document.getElementById("sort"), chosen = document.getElementById("class");
data.classes.forEach((name, i) => { element("option", name, chosen).value = String(i); });
if (!data.classes.length) {
  document.getElementById("class-label").remove();
  document.getElementById("bars").remove();
  for (const option of [...sort.options]) if (["class", "selective"].includes(option.value)) option.remove();
  sort.value = "frequent";
}

function show() {
  const of = chosen.value === "" ? null : Number(chosen.value);
  const shown = data.latents.filter((latent) => of === null || latent.best === of).sort(orders[sort.value]);
  document.getElementById("latents").replaceChildren(...shown.map((latent) => cards.get(latent)));
  document.getElementById("found").textContent = `${shown.length} latents`;
}

sort.addEventListener("change", show);
chosen.addEventListener("change", show);
show();

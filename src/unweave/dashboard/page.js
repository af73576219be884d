
"use strict";
(() => {
  const { header, strings, latents } = JSON.parse(document.getElementById("data").textContent);
  const byIndex = new Map(latents.map((latent) => [latent.index, latent]));
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  let order = latents, current = null;

  // --- making elements: the only ways in for data are text nodes and attributes that hold no code ---------------------

  function element(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes ?? {})) {
      if (key.startsWith("--")) node.style.setProperty(key, value);
      else if (key === "onclick") node.addEventListener("click", value);
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  function shape(name, attributes, ...children) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function pairs(list) {
    return list.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }

  // --- numbers and tokens as text -------------------------------------------------------------------------------------

  const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const count = (n) => grouped.format(n);
  const short = (x) => (Math.abs(x) >= 1000 ? count(x) : String(Number(x.toPrecision(3))));
  const aligned = (x) => (Math.abs(x) >= 1000 ? count(x) : x.toPrecision(3));
  const percent = (x) => `${x < 0.0995 ? (100 * x).toPrecision(2) : Math.round(100 * x)} %`;

  const SIGNS = { "\n": "↵", "\r": "␍", "\t": "→" };
  const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  // Controls, spaces of all kinds, and characters that are invisible or turn the direction of the text.
  const INVISIBLE = "\\u0000-\\u001f\\u007f-\\u00a0\\u00ad\\u061c\\u200b-\\u200f\\u2028-\\u202f\\u2060-\\u206f\\ufeff";
  const HIDDEN = new RegExp(` +|[${INVISIBLE}]`, "g");

  function signs(part) {
    if (part[0] === " ") {
      if (part.length <= 3) return [...part].map(() => element("span", { class: "space" }, " "));
      const times = [...String(part.length)].map((digit) => SUPERSCRIPT[digit]).join("");
      return [element("span", { class: "sign" }, `·${times}`)];
    }
    return [element("span", { class: "sign" }, SIGNS[part] ?? escaped(part))];
  }

  const escaped = (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
  const quoted = (text) => JSON.stringify(text).replace(new RegExp(`[${INVISIBLE}]`, "g"), escaped);

  /** A token's text with everything invisible made visible. */
  function visible(text) {
    if (text === "") return [element("span", { class: "sign" }, "∅")];
    const nodes = [];
    let end = 0;
    for (const match of text.matchAll(HIDDEN)) {
      nodes.push(text.slice(end, match.index), ...signs(match[0]));
      end = match.index + match[0].length;
    }
    return [...nodes, text.slice(end)];
  }

  const chip = (string) => element("span", { class: "chip" }, ...visible(strings[string]));

  // --- one latent -----------------------------------------------------------------------------------------------------

  function show(latent) {
    current = latent;
    const place = order.indexOf(latent);
    $("latent").replaceChildren(
      element("div", { class: "head" },
        element("h2", {}, `Latent ${latent.index}`),
        element("span", { class: "place" }, place < 0 ? "" : `${place + 1} of ${order.length} ${$("sort").selectedOptions[0].text}`),
        element("div", { class: "step" },
          element("button", { type: "button", onclick: () => step(-1) }, "← previous ", element("kbd", {}, "k")),
          element("button", { type: "button", onclick: () => step(1) }, "next → ", element("kbd", {}, "j")))),
      element("dl", { class: "stats" }, ...pairs([
        ["fires on", `${percent(latent.density)} of tokens`],
        ["firings", count(latent.count)],
        ["maximum", short(latent.max)],
      ])),
      element("div", { class: "panels" }, histogram(latent), ...effects(latent)),
      ...latent.groups.map((group) => contexts(latent, group)));
    $("latent").scrollTop = 0;
    $("announce").textContent = `Latent ${latent.index}, ${place + 1} of ${order.length}`;
    for (const link of $("list").querySelectorAll("a")) {
      const chosen = link.dataset.index === String(latent.index);
      link.setAttribute("aria-current", chosen);
      if (chosen) link.scrollIntoView({ block: "nearest" });
    }
  }

  function contexts(latent, { quantile, value, contexts }) {
    const title = quantile === null
      ? ["Strongest ", element("small", {}, "one per document; the darker and the thicker underlined, the stronger")]
      : [quantile === 0.5 ? "Around the median " : `Around the ${100 * quantile} % quantile `,
         element("small", {}, `of its firings, ${short(value)}`)];
    return element("section", { class: "group" },
      element("h3", {}, ...title),
      element("ol", { class: "contexts", role: "list" }, ...contexts.map((context) => row(latent, context))));
  }

  function row(latent, { tokens, peak, active }) {
    const values = new Map();
    for (let i = 0; i < active.length; i += 2) values.set(active[i], active[i + 1]);
    const nodes = tokens.map((string, i) => {
      const value = values.get(i) ?? 0;
      const node = element(i === peak ? "mark" : "span", { class: value ? "token on" : "token" }, ...visible(strings[string]));
      if (value) node.style.setProperty("--level", Math.min(1, Math.abs(value) / latent.max).toFixed(3));
      node.dataset.tip = `${quoted(strings[string])}  ${short(value)}`;
      return node;
    });
    return element("li", { class: "context" },
      element("span", { class: "value" }, aligned(values.get(peak))),
      element("span", { class: "before" }, ...nodes.slice(0, peak)),
      element("span", { class: "after" }, ...nodes.slice(peak)));
  }

  function effects(latent) {
    if (!latent.promoted) return [];
    const largest = Math.max(...[...latent.promoted, ...latent.suppressed].map(([, value]) => Math.abs(value)));
    const list = (kind, title, items) => element("section", { class: "panel" },
      element("h3", {}, title, element("small", { class: "unit" }, " logit per unit")),
      element("ol", { class: `effects ${kind}`, role: "list" }, ...items.map(([string, value]) => {
        const track = element("span", { class: "track" });
        track.style.width = `${(100 * Math.abs(value)) / largest}%`;
        return element("li", {},
          element("span", { class: "name" }, chip(string)), track,
          element("span", { class: "amount" }, (value < 0 ? "−" : "+") + Math.abs(value).toPrecision(2)));
      })));
    return [list("up", "Promotes", latent.promoted), list("down", "Suppresses", latent.suppressed)];
  }

  function histogram(latent) {
    const { low, ratio, counts } = latent.histogram;
    const [width, height, left, bottom] = [320, 232, 2, 22];
    const x = (value) => left + ((width - 2 * left) * Math.log(value / low)) / (counts.length * Math.log(ratio));
    const top = Math.max(...counts);
    const svg = shape("svg", {
      class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Histogram of ${count(latent.count)} activations up to ${short(latent.max)}`,
    });
    counts.forEach((n, i) => {
      const [from, to] = [low * ratio ** i, low * ratio ** (i + 1)];
      const tall = ((height - bottom - 16) * n) / top;
      const level = Math.min(1, to / latent.max);
      const bar = { x: x(from) + 0.5, width: Math.max(0.5, x(to) - x(from) - 1) };
      svg.append(
        shape("rect", { ...bar, y: height - bottom - tall, height: tall, class: "bar", "fill-opacity": 0.25 + 0.75 * level }),
        shape("rect", { ...bar, y: 0, height: height - bottom, class: "hit" },
          shape("title", {}, `${short(from)} to ${short(to)}: ${count(n)} tokens`)));
    });
    svg.append(shape("line", { class: "axis", x1: 0, x2: width, y1: height - bottom, y2: height - bottom }));
    const high = low * ratio ** counts.length;
    for (const value of ticks(low, high)) {
      svg.append(shape("text", { x: x(value), y: height - 6, "text-anchor": "middle" }, short(value)));
    }
    for (const group of latent.groups) {
      if (group.quantile === null) continue;
      const at = x(group.value);
      svg.append(
        shape("line", { class: "mark", x1: at, x2: at, y1: 14, y2: height - bottom }),
        shape("text", { x: at, y: 10, "text-anchor": "middle" }, group.quantile === 0.5 ? "median" : `${100 * group.quantile} %`));
    }
    return element("section", { class: "panel chart" },
      element("h3", {}, "Activations ", element("small", {}, `log scale; tallest bar ${count(top)} tokens`)), svg);
  }

  /** Round numbers between two limits: 1, 2, 5 times a power of ten, or finer where those are too few. */
  function ticks(low, high) {
    const steps = high / low > 8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    const found = [];
    for (let power = 10 ** Math.floor(Math.log10(low)); power < high; power *= 10) {
      found.push(...steps.map((step) => step * power).filter((value) => value > low * 1.03 && value < high / 1.03));
    }
    return found;
  }

  // --- the list -------------------------------------------------------------------------------------------------------

  const KEYS = {
    interest: null,
    density: (latent) => -latent.density,
    max: (latent) => -latent.max,
    index: (latent) => latent.index,
  };

  const haystacks = new Map();
  function haystack(latent) {
    if (!haystacks.has(latent)) {
      const texts = latent.groups.flatMap((group) => group.contexts.map((c) => c.tokens.map((s) => strings[s]).join("")));
      const words = [...(latent.promoted ?? []), ...(latent.suppressed ?? [])].map(([string]) => strings[string]);
      haystacks.set(latent, [...texts, ...words].join("\n").toLowerCase());
    }
    return haystacks.get(latent);
  }

  /** Tokens that differ in more than case and spaces. */
  function distinct(tokens) {
    const plain = (string) => strings[string].trim().toLowerCase() || strings[string];
    return tokens.filter((string, i) => tokens.findIndex((other) => plain(other) === plain(string)) === i);
  }

  function list() {
    const query = $("search").value.toLowerCase();
    const key = KEYS[$("sort").value];
    order = latents.filter((latent) => !query || String(latent.index).startsWith(query.trim()) || haystack(latent).includes(query));
    if (key) order = [...order].sort((a, b) => key(a) - key(b));
    $("found").textContent = `${order.length === latents.length ? "" : `${order.length} of `}${latents.length} latents`;
    $("list").replaceChildren(...order.map((latent) => element("li", {},
      element("a", {
        class: "item", href: `#latent=${latent.index}`, "data-index": latent.index, "aria-current": latent === current,
        onclick: (event) => {
          if (event.ctrlKey || event.metaKey || event.shiftKey) return;
          event.preventDefault();
          select(latent);
        },
      },
        element("span", { class: "index" }, String(latent.index)),
        element("span", { class: "peaks" }, ...distinct(latent.peaks).map(chip)),
        element("span", { class: "density" }, percent(latent.density))))));
  }

  function select(latent) {
    show(latent);
    // Frames without an address of their own, as in notebooks, refuse this; they go without.
    try { history.replaceState(null, "", `#latent=${latent.index}`); } catch { /* the page works all the same */ }
  }

  function step(by) {
    if (!order.length) return;
    const place = order.indexOf(current);
    select(order[place < 0 ? 0 : Math.min(order.length - 1, Math.max(0, place + by))]);
  }

  function fromAddress() {
    const wanted = /^#latent=(\d+)$/.exec(location.hash);
    return wanted ? byIndex.get(Number(wanted[1])) : undefined;
  }

  // --- events ---------------------------------------------------------------------------------------------------------

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select");
    if (event.key === "Escape" && event.target === $("search")) { $("search").value = ""; list(); $("latent").focus(); }
    else if (typing) return;
    else if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "/") { event.preventDefault(); $("search").focus(); }
  });
  $("search").addEventListener("input", list);
  $("sort").addEventListener("change", () => { list(); if (current) show(current); });
  window.addEventListener("hashchange", () => { const latent = fromAddress(); if (latent) show(latent); });

  document.addEventListener("mouseover", (event) => {
    const token = event.target.closest("[data-tip]");
    const tip = $("tip");
    tip.hidden = !token;
    if (!token) return;
    tip.textContent = token.dataset.tip;
    const box = token.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 4 : box.bottom + 4}px`;
  });

  $("subject").textContent = header.subject;
  $("facts").append(...pairs(header.facts));
  $("more").append(...pairs(header.more));
  list();
  const first = fromAddress() ?? latents[0];
  if (first) show(first);
  else $("latent").append(element("p", { class: "none" }, "No latent fired on these tokens."));
})();

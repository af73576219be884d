
// Appended to the page's own script by test_browser.py: uses the page as a reader would and writes down what it sees.
(() => {
  const seen = {};
  const $ = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const press = (key, target = document.body) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const title = () => $("main h2").textContent;
  const listed = () => all("#list a").map((link) => Number(link.dataset.index));

  seen.start = [title(), location.hash];
  seen.all = listed();
  press("j");
  seen.next = [title(), location.hash, $("#list a[aria-current=true]").dataset.index];
  press("k"); press("k");
  seen.first = title();
  press("/");
  seen.searching = document.activeElement.id;
  press("j", $("#search"));
  seen.typingIsNoCommand = title();

  const search = (text) => { $("#search").value = text; $("#search").dispatchEvent(new Event("input")); };
  search("no such token anywhere");
  seen.nothing = [listed().length, $("#found").textContent];
  press("j");
  search(String(seen.all[3]));
  seen.byIndex = listed();
  press("Escape", $("#search"));
  seen.cleared = [listed().length, document.activeElement.id];

  $("#sort").value = "density";
  $("#sort").dispatchEvent(new Event("change"));
  seen.byDensity = listed();
  all("#list a")[2].click();
  seen.clicked = [title(), location.hash];
  location.hash = `#latent=${seen.all[1]}`;

  const token = $(".context mark");
  token.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  seen.tip = [$("#tip").hidden, $("#tip").textContent, token.textContent];

  const marks = all("#latent .contexts").map((list) => [...list.querySelectorAll("mark")].map((m) => Math.round(m.getBoundingClientRect().left)));
  seen.aligned = marks.map((column) => new Set(column).size);
  seen.shaded = all("#latent .token.on").map((t) => Number(t.style.getPropertyValue("--level")));
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.nameless = all("a, button, input, select, svg, nav").filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label"))).length;
  seen.repeatedIds = all("[id]").length - new Set(all("[id]").map((e) => e.id)).size;
  seen.foreign = all("img, iframe, object, link, script[src]").length;
  seen.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  seen.background = getComputedStyle(document.body).backgroundColor;
  window.addEventListener("hashchange", () => {
    seen.followed = title();
    document.body.dataset.seen = JSON.stringify(seen);
  });
})();

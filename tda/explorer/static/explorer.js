// The pages are complete without this. With it, answers change in place, keys work, and marking and
// uploading need no page of their own. All HTML comes from the server, which escapes it; nothing
// here makes markup out of data.
"use strict";
(() => {
  document.documentElement.classList.add("scripted");
  const byId = (id) => document.getElementById(id);
  const status = byId("status");
  const say = (text) => { status.textContent = text; };

  // ---- another address, the same page: only what differs is put in

  let latest = null; // the request whose answer is waited for
  const swap = (next) => {
    const focused = document.activeElement;
    for (const region of document.querySelectorAll(".swap")) {
      const other = next.getElementById(region.id);
      if (!other) continue;
      if (region.contains(focused) && focused.type === "range") {
        // a slider that is being dragged stays what it is; all that its move changes here is:
        for (const auto of region.querySelectorAll(`button.auto[data-for="${focused.dataset.for}"]`)) auto.disabled = false;
        continue;
      }
      const scrolled = region.querySelector(".list")?.scrollTop;
      const id = region.contains(focused) ? focused.id || focused.name : null;
      const caret = id && focused.selectionStart !== undefined ? focused.selectionStart : null;
      region.replaceChildren(...other.childNodes);
      if (scrolled) region.querySelector(".list").scrollTop = scrolled;
      const again = id && (byId(id) || region.querySelector(`[name="${CSS.escape(id)}"]`));
      if (again) {
        again.focus({ preventScroll: true });
        if (caret !== null && again.type === "text") again.setSelectionRange(caret, caret);
      }
    }
    document.title = next.title;
    reveal();
  };

  const go = async (address, how) => {
    latest?.abort();
    const mine = (latest = new AbortController());
    document.body.classList.add("waiting");
    try {
      const answer = await fetch(address, { signal: mine.signal, headers: { accept: "text/html" } });
      const text = await answer.text();
      const next = new DOMParser().parseFromString(text, "text/html");
      if (!next.getElementById("region-main")) throw new Error("not a page of the explorer");
      if (how === "push") history.pushState(null, "", address);
      if (how === "replace") history.replaceState(null, "", address);
      const samePage = document.querySelector(".picker") !== null === (next.querySelector(".picker") !== null);
      if (!samePage) { location.assign(address); return; }
      swap(next);
      const title = document.querySelector("#region-main h1, #region-main h2");
      say(title ? title.textContent.trim() : "changed");
    } catch (error) {
      if (error.name !== "AbortError") say("The server does not answer.");
    } finally {
      if (latest === mine) {
        latest = null;
        document.body.classList.remove("waiting");
      }
    }
  };

  const addressOf = (form) => {
    const fields = new URLSearchParams();
    for (const [name, value] of new FormData(form)) if (value !== "") fields.append(name, value);
    const clearing = form.querySelector("[data-clears][data-changed]");
    if (clearing) fields.delete(clearing.dataset.clears);
    return `${form.getAttribute("action")}?${fields}`;
  };

  let timer = 0;
  const soon = (form, wait) => {
    clearTimeout(timer);
    timer = setTimeout(() => { if (form.isConnected && form.reportValidity()) go(addressOf(form), "replace"); }, wait);
  };

  const other = (input) => byId(input.dataset.for);
  document.addEventListener("input", (event) => {
    const form = event.target.closest("form[data-live]");
    if (!form) return;
    if (event.target.type === "range") {
      other(event.target).value = Number(10 ** Number(event.target.value)).toPrecision(3).replace(/\.?0+(e|$)/, "$1");
      soon(form, 120);
    } else if (event.target.type === "search" || event.target.type === "number") soon(form, 250);
  });
  document.addEventListener("change", (event) => {
    const form = event.target.closest("form[data-live]");
    if (!form || event.target.type === "range" || event.target.type === "search") return;
    if (event.target.dataset.clears) event.target.dataset.changed = "yes";
    soon(form, 0);
  });
  document.addEventListener("submit", (event) => {
    const form = event.target.closest("form[data-live]");
    if (!form) return;
    event.preventDefault();
    soon(form, 0);
  });
  document.addEventListener("click", (event) => {
    const auto = event.target.closest("button.auto");
    if (auto) {
      other(auto).value = "auto";
      soon(auto.closest("form"), 0);
      return;
    }
    const plain = !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) && event.button === 0;
    const marker = plain && event.target.closest("a.marker");
    if (marker) {
      event.preventDefault();
      openMarking(marker);
      return;
    }
    const link = plain && event.target.closest(".picker a[href]");
    if (link) {
      event.preventDefault();
      go(link.getAttribute("href"), "push");
    }
  });
  window.addEventListener("popstate", () => go(location.href, "none"));

  const reveal = () => {
    for (const part of document.querySelectorAll(".damping [hidden]")) part.hidden = false;
    byId("help-button").hidden = false;
    document.querySelector(".picker [aria-current]")?.scrollIntoView({ block: "nearest" });
  };

  // ---- keys

  const examples = (side) => [...document.querySelectorAll(`.examples[data-side="${side}"] a.open`)];
  const step = (id) => {
    const link = byId(id);
    if (link) go(link.getAttribute("href"), "push");
    else say("There is no other query.");
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const typing = event.target.closest("input:not([type=range]), select, textarea");
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    const digit = /^Digit([1-9])$/.exec(event.code);
    if (event.key === "j") step("after");
    else if (event.key === "k") step("before");
    else if (event.key === "?") byId("help").showModal();
    else if (event.key === "/" && byId("search")) byId("search").select();
    else if (event.key === "m") {
      const place = document.activeElement.closest(".examples li, .examples tr");
      const marker = place?.querySelector("a.marker");
      if (marker) openMarking(marker);
      else say("Go to an example first, with the keys 1 to 9.");
    } else if (digit) {
      const link = examples(event.shiftKey ? "opponents" : "proponents")[Number(digit[1]) - 1];
      if (!link) return;
      link.focus();
    } else return;
    event.preventDefault();
  });
  byId("help-button").addEventListener("click", () => byId("help").showModal());

  // ---- marks

  const dialog = byId("marking");
  const form = byId("marking-form");
  const fault = byId("marking-fault");
  let marked = null; // the link that opened the dialog
  const openMarking = (marker) => {
    marked = marker;
    const { action, label, note, id } = marker.dataset;
    form.reset();
    fault.hidden = true;
    byId("marking-id").textContent = id;
    for (const radio of form.elements.action) radio.checked = radio.value === action;
    form.elements.label.value = label;
    form.elements.note.value = note;
    dialog.showModal();
    (form.querySelector("input[name=action]:checked") || form.elements.action[0]).focus();
  };
  const message = (answer) => [answer.what, answer.found, answer.do].filter(Boolean).join(" – ");
  const post = async (address, body) => {
    const answer = await fetch(address, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
    return [answer.ok, await answer.json()];
  };
  byId("marking-cancel").addEventListener("click", () => dialog.close());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { index, revision } = marked.dataset;
    const action = form.elements.action.value;
    const label = form.elements.label.value.trim();
    const body = { index: Number(index), action, note: form.elements.note.value, revision: Number(revision) };
    if (action === "relabel") body.label = label;
    try {
      const [good, answer] = await post("/api/marks", body);
      if (!good) {
        fault.textContent = message(answer);
        fault.hidden = false;
        return;
      }
      for (const marker of document.querySelectorAll(`a.marker[data-index="${CSS.escape(index)}"]`)) show(marker, answer);
      dialog.close();
      say(`${answer.id}: ${answer.action}`);
      marked.closest("li, tr")?.querySelector("a.open")?.focus({ preventScroll: true });
    } catch {
      fault.textContent = "The server does not answer.";
      fault.hidden = false;
    }
  });
  const show = (marker, mark) => {
    marker.dataset.revision = mark.action === "none" ? 0 : mark.revision;
    marker.dataset.action = mark.action;
    marker.dataset.label = mark.label || "";
    marker.dataset.note = mark.note;
    const badge = marker.closest("li, tr").querySelector(".badge");
    badge.className = `badge ${mark.action}`;
    badge.textContent = mark.action === "none" ? "" : [mark.action, mark.label].filter(Boolean).join(" ");
    badge.title = mark.note;
  };

  // ---- a new query

  const read = (file) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(file);
  });
  byId("upload")?.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { image, text, row, label } = event.target.elements;
    const wrong = byId("upload-fault");
    wrong.hidden = true;
    try {
      const body = {};
      if (image?.files.length) body.image = await read(image.files[0]);
      if (text?.value) body.text = text.value;
      if (row?.value.trim()) body.row = row.value.split(/[\s,;]+/).filter(Boolean).map(Number);
      if (label.value.trim()) body.label = Number(label.value);
      say("Featurizing.");
      const [good, answer] = await post("/api/queries", body);
      if (good) location.assign(answer.page);
      else wrong.textContent = message(answer);
      wrong.hidden = good;
    } catch (error) {
      wrong.textContent = error.message;
      wrong.hidden = false;
    }
  });

  reveal();
})();

// What makes the page live: it hears of news, asks for the part that changes, and has htmx morph it in. Dialogs, the
// filter, pausing and the times that count on are here too. Without this script all links and forms still work.
(() => {
  "use strict";

  const $ = (id) => document.getElementById(id);
  const live = () => $("live");
  const here = () => location.pathname + location.search;

  // ---- What cannot wait for the server: times -------------------------------------------------------------------

  let ahead = 0; // seconds that the database's clock is ahead of ours

  const setClock = () => {
    const now = parseFloat(live()?.dataset.now);
    if (now) ahead = now - Date.now() / 1000;
  };

  // The same words as duration() in _page_text.py.
  const duration = (seconds) => {
    const whole = Math.max(Math.floor(seconds), 0);
    for (const [size, unit, smaller, smallerUnit] of [[86400, "d", 3600, "h"], [3600, "h", 60, "m"], [60, "m", 1, "s"]]) {
      if (whole >= size) {
        const rest = Math.floor((whole % size) / smaller);
        return `${Math.floor(whole / size)}${unit}${rest ? ` ${rest}${smallerUnit}` : ""}`;
      }
    }
    return `${whole}s`;
  };

  const two = (number) => String(number).padStart(2, "0");
  const moment = (at) =>
    `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;

  const setText = (element, text) => {
    if (element.textContent !== text) element.textContent = text;
  };

  const tick = () => {
    const now = Date.now() / 1000 + ahead;
    const counts = (each) => !each.closest(".stale") || each.closest(".notice"); // what is as of then stands still
    for (const each of document.querySelectorAll("time[data-since]"))
      if (counts(each)) setText(each, duration(now - each.dataset.since));
    for (const each of document.querySelectorAll("time[data-until]"))
      if (counts(each)) setText(each, duration(each.dataset.until - now));
    for (const each of document.querySelectorAll("time[data-at]")) setText(each, moment(new Date(each.dataset.at * 1000)));
  };

  // ---- News ------------------------------------------------------------------------------------------------------

  let paused = sessionStorage.getItem("paused") === "1";
  let missed = false;
  let connected = false;
  let heard = Date.now();
  let lostSince = null;
  let pulling = false;
  let again = false;
  let pressed = false;

  const showState = () => {
    const [word, kind] = paused ? ["paused", "paused"] : lostSince ? ["no connection", "lost"] : $("down") ? ["no database", "lost"] : connected ? ["live", "on"] : ["connecting", ""];
    const state = $("live-state");
    if (!state) return;
    setText($("live-word"), paused && missed ? "paused, there is news" : word);
    state.dataset.kind = kind;
    const button = $("pause");
    setText(button, paused ? "Resume" : "Pause");
    button.setAttribute("aria-pressed", String(paused));
    const notice = $("lost");
    notice.hidden = !lostSince;
    document.body.classList.toggle("is-lost", Boolean(lostSince));
    if (lostSince) setText($("lost-since"), moment(new Date(lostSince)));
  };

  const lost = () => {
    connected = false;
    lostSince ??= Date.now();
    showState();
  };

  const found = () => {
    heard = Date.now();
    if (connected && !lostSince) return;
    connected = true;
    lostSince = null;
    showState();
  };

  const refresh = async () => {
    again = true;
    if (pulling) return;
    pulling = true;
    while (again && !pressed) {
      again = false;
      const url = here();
      await htmx.ajax("GET", url, { source: "#live", target: "#live", swap: "outerMorph" });
      if (url !== here()) again = true; // another view was asked for meanwhile
    }
    pulling = false;
  };

  const onNews = (event) => {
    found();
    if (paused) {
      missed ||= event.type === "news"; // a "look" says only that something may have changed
      showState();
    } else {
      refresh();
    }
  };

  // A click that has begun ends where it began: nothing moves under the pointer.
  addEventListener("pointerdown", () => (pressed = true), true);
  for (const name of ["pointerup", "pointercancel", "blur"])
    addEventListener(name, () => {
      if (!pressed) return;
      pressed = false;
      if (again && !paused) setTimeout(refresh);
    }, true);

  // What has the focus keeps it; where it is gone, its section gets it.
  let focused = null;
  document.addEventListener("htmx:before:swap", (event) => {
    const ctx = event.detail.ctx;
    const response = ctx?.response?.raw;
    if (response?.redirected && ctx.request.method === "GET") {
      event.preventDefault();
      location.reload(); // the login has ended: the server asks for it, and leads back here
      return;
    }
    const active = document.activeElement;
    const section = active?.closest("section")?.getAttribute("aria-labelledby");
    focused = active && live()?.contains(active) ? { element: active, section } : null;
  });
  document.addEventListener("htmx:after:swap", (event) => {
    setClock();
    tick();
    showState();
    if (dialog.open && event.detail.ctx?.target?.id === "dialog-body") focusDialog();
    charts.look();
    if (focused) {
      const { element, section } = focused;
      if (element.isConnected) {
        if (document.activeElement !== element) element.focus({ preventScroll: true });
      } else {
        ((section && $(section)) || $("main")).focus({ preventScroll: true });
      }
      focused = null;
    }
  });

  document.addEventListener("news", onNews);
  document.addEventListener("look", onNews);
  document.addEventListener("beat", found);
  document.addEventListener("htmx:sse:after:connection", found);
  document.addEventListener("htmx:sse:error", lost);
  document.addEventListener("htmx:error", (event) => {
    if (event.detail.error?.name !== "AbortError") lost();
  });

  // A stream that never came about is tried again, one that has gone silent is opened anew.
  setInterval(() => {
    const stream = $("stream");
    if (!stream || document.hidden) return;
    const connection = stream._htmx?.sse;
    if (!connection) htmx.trigger(stream, "connect", {}, false);
    else if (Date.now() - heard > 20000) {
      lost();
      heard = Date.now();
      connection.reader?.cancel();
    }
  }, 3000);
  setInterval(() => {
    if (!paused && !lostSince) tick();
  }, 1000);

  // ---- What people do --------------------------------------------------------------------------------------------

  let saidTimer = 0;
  const say = (text) => {
    const toast = $("toast");
    toast.textContent = text;
    toast.classList.add("shown");
    clearTimeout(saidTimer);
    saidTimer = setTimeout(() => toast.classList.remove("shown"), 6000);
  };

  const go = (url, replace) => {
    history[replace ? "replaceState" : "pushState"]({}, "", url);
    refresh();
  };

  const dialog = $("dialog");
  const inDialog = { "HX-Dialog": "true" };
  const focusDialog = () => {
    const first = (...selectors) => selectors.map((each) => dialog.querySelector(each)).find(Boolean);
    first("[aria-invalid]", "[autofocus]", ".primary", "a, button")?.focus();
  };
  const show = async (url) => {
    const body = $("dialog-body");
    body.replaceChildren();
    await htmx.ajax("GET", url, { source: "#dialog", headers: inDialog, target: "#dialog-body", swap: "innerHTML" });
    if (!body.firstElementChild) {
      say("There was no answer. Try again when the page is live.");
      return;
    }
    tick();
    if (!dialog.open) dialog.showModal();
    focusDialog();
  };

  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#pause")) {
      paused = !paused;
      sessionStorage.setItem("paused", paused ? "1" : "0");
      if (!paused) refresh();
      missed = false;
      showState();
      return;
    }
    const link = event.target.closest?.("a");
    if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    if ("go" in link.dataset) {
      event.preventDefault();
      go(link.href);
    } else if ("dialog" in link.dataset) {
      event.preventDefault();
      show(link.href);
    } else if ("close" in link.dataset && dialog.open) {
      event.preventDefault();
      dialog.close();
    }
  });

  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.id === "filter") {
      event.preventDefault();
      filter(form);
    } else if ("act" in form.dataset && dialog.contains(form)) {
      event.preventDefault();
      if (form.getAttribute("aria-busy")) return; // sent already
      form.setAttribute("aria-busy", "true");
      htmx.ajax("POST", form.action, { source: form, event, headers: inDialog, target: "#dialog-body", swap: "innerHTML" });
    }
  });

  document.addEventListener("htmx:finally:request", (event) => {
    event.detail.ctx?.sourceElement?.removeAttribute?.("aria-busy");
  });

  document.addEventListener("done", (event) => {
    const { said, to } = event.detail;
    dialog.close();
    if (to) {
      sessionStorage.setItem("said", said);
      location.assign(to);
    } else {
      say(said);
      refresh();
    }
  });

  // The filter: what is typed goes into the URL, and everything else that is in the URL stays.
  const filter = (form) => {
    const url = new URL(location.href);
    for (const gone of ["page", "before"]) url.searchParams.delete(gone);
    for (const input of form.querySelectorAll("input")) {
      if (input.value) url.searchParams.set(input.name, input.value);
      else url.searchParams.delete(input.name);
    }
    if (url.pathname + url.search !== here()) go(url.pathname + url.search, true);
  };
  let typing = 0;
  document.addEventListener("input", (event) => {
    const form = event.target.closest?.("#filter");
    if (!form) return;
    clearTimeout(typing);
    typing = setTimeout(filter, 150, form);
  });

  let path = location.pathname;
  addEventListener("popstate", () => {
    if (location.pathname !== path) {
      location.reload();
      return;
    }
    const parameters = new URLSearchParams(location.search);
    for (const input of document.querySelectorAll("#filter input")) input.value = parameters.get(input.name) ?? "";
    refresh();
  });

  // ---- Begin -----------------------------------------------------------------------------------------------------

  const begin = () => {
    setClock();
    tick();
    showState();
    charts.look();
    const said = sessionStorage.getItem("said");
    if (said) {
      sessionStorage.removeItem("said");
      say(said);
    }
  };
  begin();
})();

// Shows the page in the reader's language. English is the source: the server, its API and its logs know no other.
// A catalogue holds English sentences and their translations; {1}, {2} … are what varies, and **bold**, *emphasis* and
// `code` are written as in Markdown. What is not in the catalogue stays English. Only text is ever written, never HTML.
(() => {
  const CATALOGUES = {}; // language: {English: translation}; filled in by the server
  const NAMES = { en: "English", de: "Deutsch", zh: "中文" };
  const KEPT = "spectral-diffusion-language";
  const MARKS = { STRONG: "**", B: "**", EM: "*", I: "*", CODE: "`" };
  const ATTRIBUTES = ["title", "aria-label", "placeholder", "data-head", "alt"];
  const LEFT_ALONE = "textarea, script, style, [data-verbatim]";

  function chosen() {
    const asked = new URLSearchParams(location.search).get("lang");
    const wanted = [asked, localStorage.getItem(KEPT), ...navigator.languages].filter(Boolean);
    const known = wanted.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag in NAMES);
    return known || "en";
  }
  const language = chosen();
  document.documentElement.lang = language;

  // --- the catalogue
  const INSIDE = "((?:(?![.!?]\\s+[A-Z`*'\"])[^\\n])+?)"; // what varies is part of one sentence, unless it ends the text
  const exact = new Map(), patterns = [];
  for (const [source, target] of Object.entries(CATALOGUES[language] || {})) {
    if (!/\{\d\}/.test(source)) {
      exact.set(source, target);
      continue;
    }
    const order = [...source.matchAll(/\{(\d)\}/g)].map((found) => found[1]);
    const text = source.replace(/[.*+?^$()|[\]\\]/g, "\\$&").replace(/\{\d\}$/, "([^]+)").replace(/\{\d\}/g, INSIDE);
    patterns.push({ at: new RegExp("^" + text + "$"), order, target, fixed: source.replace(/\{\d\}/g, "").length });
  }
  patterns.sort((one, other) => other.fixed - one.fixed); // what says most is tried first

  // A person's own words stay as they are; a whole sentence is the server's.
  const sentence = (value) => (/[.!?]$/.test(value) && whole(value)) || value;
  function whole(text) {
    if (exact.has(text)) return exact.get(text);
    for (const { at, order, target } of patterns) {
      const found = at.exec(text);
      if (!found) continue;
      const values = {};
      order.forEach((number, index) => (values[number] = sentence(found[index + 1])));
      return target.replace(/\{(\d)\}/g, (_, number) => values[number]);
    }
    return null;
  }
  function parts(text, between) {
    const pieces = text.split(between);
    if (pieces.length < 2) return null;
    const done = pieces.map(whole);
    return done.some((piece) => piece !== null) ? done.map((piece, index) => piece ?? pieces[index]) : null;
  }
  function translated(text) {
    const found = whole(text) ?? whole(text.replace(/\s+/g, " ")); // a template breaks long lines
    if (found !== null) return found;
    const lines = parts(text, /\n+/);
    if (lines) return lines.join("\n");
    const sentences = parts(text, /(?<=[.!?])\s+(?=[A-Z*`'"])/);
    if (sentences) return sentences.join(language === "zh" ? "" : " ");
    const items = parts(text, / · /);
    return items ? items.join(" · ") : null;
  }

  // --- the page
  const inline = (node) => node.nodeType === Node.ELEMENT_NODE && node.tagName in MARKS;
  const tidy = (text) => text.replace(/[^\S\n]+/g, " ").trim();
  const written = new WeakMap(); // what this script wrote into a text or an element, which is not looked at again

  function source(node) {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    const inside = [...node.childNodes].map(source).join("");
    return node.tagName in MARKS ? MARKS[node.tagName] + inside + MARKS[node.tagName] : inside;
  }
  function built(text) {
    const pieces = text.split(/(\*\*.+?\*\*|\*[^*\s][^*]*?\*|`[^`]+`)/).filter(Boolean);
    return pieces.map((piece) => {
      const mark = ["**", "*", "`"].find((one) => piece.length > 2 * one.length && piece.startsWith(one) && piece.endsWith(one));
      if (!mark) return document.createTextNode(piece);
      const node = document.createElement({ "**": "strong", "*": "em", "`": "code" }[mark]);
      node.textContent = piece.slice(mark.length, -mark.length);
      return node;
    });
  }
  function showText(text) {
    let block = text.parentElement;
    if (!block || block.closest(LEFT_ALONE)) return;
    while (inline(block) && block.parentElement) block = block.parentElement;
    const children = [...block.childNodes];
    const mixed = children.some(inline) && children.every((node) => node.nodeType !== Node.ELEMENT_NODE || inline(node));
    if (mixed) {
      const before = tidy(source(block));
      if (written.get(block) === before) return;
      const after = translated(before);
      if (after === null) { // a heading before a person's own words
        for (const node of children) if (inline(node) && node.tagName !== "CODE" && exact.has(node.textContent))
          node.textContent = exact.get(node.textContent);
        return;
      }
      block.replaceChildren(...built(after));
      written.set(block, tidy(source(block)));
      return;
    }
    if (text.parentElement.tagName === "CODE" || written.get(text) === text.data) return;
    const after = translated(tidy(text.data));
    if (after === null) return;
    const [, start, end] = /^(\s*)[\s\S]*?(\s*)$/.exec(text.data);
    text.data = start + after.replace(/\*\*|`/g, "") + end;
    written.set(text, text.data);
  }
  function showAttributes(node) {
    if (node.closest("script, style")) return;
    for (const name of ATTRIBUTES) {
      const value = node.getAttribute(name);
      const after = value && written.get(node)?.[name] !== value ? translated(tidy(value)) : null;
      if (after === null) continue;
      node.setAttribute(name, after);
      const mine = written.get(node);
      if (typeof mine !== "string") written.set(node, { ...mine, [name]: after });
    }
  }
  function show(root) {
    if (root.nodeType === Node.TEXT_NODE) return showText(root);
    if (root.nodeType !== Node.ELEMENT_NODE) return;
    showAttributes(root);
    root.querySelectorAll("*").forEach(showAttributes);
    const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), found = [];
    while (texts.nextNode()) if (texts.currentNode.data.trim()) found.push(texts.currentNode);
    found.forEach(showText);
  }

  // --- the choice of the language
  function offer() {
    const title = document.getElementById("title");
    if (!title || document.getElementById("language")) return;
    const select = document.createElement("select");
    select.id = "language";
    select.dataset.verbatim = "";
    select.setAttribute("aria-label", "Language");
    for (const [tag, name] of Object.entries(NAMES)) select.add(new Option(name, tag, tag === language, tag === language));
    select.addEventListener("change", () => {
      localStorage.setItem(KEPT, select.value);
      const address = new URL(location.href);
      address.searchParams.delete("lang");
      location.replace(address);
    });
    title.append(select);
  }
  // --- what screen readers are to say when it changes
  const SPOKEN = [
    "generate-status", "train-said", "concepts-added", "concepts-result", "fuse-result", "fuse-saved-result",
  ];
  function speak() {
    for (const id of SPOKEN) {
      const line = document.getElementById(id);
      if (line && line.getAttribute("role") !== "status") line.setAttribute("role", "status");
    }
  }
  function changed(changes) {
    offer();
    speak();
    if (language === "en") return;
    for (const change of changes) {
      if (change.type === "attributes") showAttributes(change.target);
      else if (change.type === "characterData") showText(change.target);
      else change.addedNodes.forEach(show);
    }
  }
  function begin() {
    new MutationObserver(changed).observe(document.body, {
      childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ATTRIBUTES,
    });
    offer();
    speak();
    if (language !== "en") show(document.body);
  }
  if (document.body) begin();
  else document.addEventListener("DOMContentLoaded", begin);
})();

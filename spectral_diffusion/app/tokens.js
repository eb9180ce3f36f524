// Buttons that put a token into the prompt that was last worked in. The value: [[token, noun, concept or ""], …].
const row = element.querySelector(".tokens");
let target = null, caret = 0, named = [];
function main() {
  return document.querySelector("#generate-prompt textarea");
}
function isPrompt(node) {
  return node instanceof HTMLElement && (node === main() || node.matches("#generate-canvas .words"));
}
document.addEventListener("focusin", (event) => {
  if (!isPrompt(event.target)) return;
  target = event.target;
  if (target === main()) named = namedIn(target.value);
});
document.addEventListener("input", (event) => {
  if (!event.target || event.target !== main()) return;
  // A token that is typed chooses its concept, as a clicked one does; one that acts in a box stays there.
  const before = named, boxes = [...document.querySelectorAll("#generate-canvas li select")].map((box) => box.value);
  named = namedIn(event.target.value);
  const names = named.filter((name) => !before.includes(name) && !boxes.includes(name));
  if (names.length) trigger("click", { names });
});
document.addEventListener("focusout", (event) => {
  if (isPrompt(event.target)) caret = event.target.selectionEnd;
});
function namedIn(text) {
  const tokens = Array.isArray(props.value) ? props.value : [];
  return tokens.filter(([token, , name]) => token && name && text.toLowerCase().includes(token)).map(([, , name]) => name);
}
function insert(token, name) {
  const fresh = !target || !target.isConnected;
  const field = fresh ? main() : target;
  const end = fresh ? field.value.length : Math.min(caret, field.value.length);
  const before = field.value.slice(0, end), after = field.value.slice(end);
  const text = (before && !/\s$/.test(before) ? " " : "") + token + (after && !/^[\s,.]/.test(after) ? " " : "");
  const kind = field instanceof HTMLTextAreaElement ? HTMLTextAreaElement : HTMLInputElement;
  Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, before + text + after);
  field.dispatchEvent(new Event("input", { bubbles: true }));
  field.focus();
  field.setSelectionRange(end + text.length, end + text.length);
  const concept = field.matches(".words") && field.closest("li").querySelector("select");
  if (field === main()) {
    trigger("click", { names: [name] }); // its concept acts everywhere
  } else if (concept && !concept.value && name) {
    concept.value = name; // or in this box
    concept.dispatchEvent(new Event("change"));
  }
}
function show() {
  const tokens = Array.isArray(props.value) ? props.value : [];
  row.replaceChildren(
    ...tokens.map(([token, noun, name]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = token;
      const words = noun === "style" ? "in " + token + " style" : token;
      button.title = "Put " + words + (noun === "style" ? "" : " (a " + noun + ")") + " into the prompt";
      button.addEventListener("click", () => insert(words, name));
      return button;
    }),
  );
  row.hidden = !tokens.length;
}
watch("value", show);
show();

// The page's own part of what happens: painting masks, choosing, walking, keys, pasting.
"use strict";
(() => {
  const inField = event => event.target.closest?.("input:not([type=range]), textarea, select, [contenteditable]");

  // A mask is painted by a click, or by drawing over patches; the server hears of it at the end.
  let painting = null;
  const paint = event => {
    const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-patch]");
    if (!cell || cell.closest(".painter") !== painting.painter) return;
    cell.classList.toggle("visible", painting.show);
    cell.setAttribute("aria-pressed", painting.show);
  };
  const sendMask = painter => {
    const cells = [...painter.querySelectorAll("[data-patch].visible")];
    painter.dispatchEvent(new CustomEvent("mask", {bubbles: true, detail: cells.map(cell => +cell.dataset.patch)}));
  };
  document.addEventListener("pointerdown", event => {
    const cell = event.target.closest?.("[data-patch]");
    if (!cell || event.button > 0) return;
    event.preventDefault();
    if (event.target.hasPointerCapture?.(event.pointerId)) event.target.releasePointerCapture(event.pointerId);
    painting = {painter: cell.closest(".painter"), show: !cell.classList.contains("visible")};
    paint(event);
  });
  document.addEventListener("pointermove", event => { if (painting) paint(event); });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => {
    if (painting) sendMask(painting.painter);
    painting = null;
  });

  // A walk's frames lie in the page: its slider only shows another.
  const show = slider => {
    const walk = slider.closest(".walk"), frame = walk.querySelectorAll(".strip img")[slider.value];
    walk.querySelector(".frame").src = frame.src;
    walk.querySelectorAll(".strip img").forEach(other => other.classList.toggle("here", other === frame));
  };
  document.addEventListener("input", event => { if (event.target.matches?.(".walk input")) show(event.target); });
  document.addEventListener("click", event => {
    const frame = event.target.closest?.(".strip img");
    if (!frame) return;
    const slider = frame.closest(".walk").querySelector("input");
    slider.value = [...frame.parentNode.children].indexOf(frame);
    show(slider);
  });

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") {  // patches and tiles by the keyboard
      const cell = event.target.closest?.("[data-patch]");
      if (cell) {
        event.preventDefault();
        cell.setAttribute("aria-pressed", cell.classList.toggle("visible"));
        return sendMask(cell.closest(".painter"));
      }
      if (event.target.closest?.("[data-code]")) { event.preventDefault(); return event.target.click(); }
    }
    if (inField(event)) return;
    if (event.key === "r") document.querySelector("#draw")?.click();
    const slider = document.querySelector(".walk input");
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!slider || !way || event.target.type === "range") return;
    event.preventDefault();
    slider.value = +slider.value + way;
    show(slider);
  });

  // A picture that is pasted or dropped goes the way of an uploaded one.
  const send = (event, file) => {
    const input = document.querySelector("#upload input[type=file]");
    if (!file || !input) return;
    event.preventDefault();
    const files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
  };
  document.addEventListener("paste", event => send(event, event.clipboardData?.files[0]));
  document.addEventListener("drop", event => send(event, event.dataTransfer?.files[0]));
  document.addEventListener("dragover", event => event.preventDefault());
})();

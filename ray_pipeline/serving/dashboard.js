// a slider's number takes effect when it loses the focus; Enter should do it too
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("#rp-rate input[type=number]")) event.target.blur();
});
// a click on a rating names its place
document.addEventListener("click", (event) => {
  const row = event.target.closest("[data-rp-place]");
  if (!row) return;
  window.rpPlace = row.dataset.rpPlace;
  document.querySelector("#rp-explain").click();
});
// pieces of a plan: the browser itself drops the text where it is let go; a click puts it at the end
document.addEventListener("dragstart", (event) => {
  const piece = event.target.closest?.("[data-rp-piece]");
  if (piece) event.dataTransfer.setData("text/plain", piece.dataset.rpPiece);
});
document.addEventListener("click", (event) => {
  const piece = event.target.closest("[data-rp-piece]");
  const field = document.querySelector("#rp-plan textarea, #rp-plan input");
  if (!piece || !field) return;
  field.value += piece.dataset.rpPiece;
  field.dispatchEvent(new Event("input", {bubbles: true}));
});
// what starts a stream, to the clipboard; where the browser keeps that for secure pages, it is selected
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-rp-copy]");
  if (!button) return;
  const text = button.closest(".rp-code").querySelector("pre");
  window.getSelection().selectAllChildren(text);
  navigator.clipboard?.writeText(text.textContent).then(() => (button.textContent = "Copied"));
});

// the rate: a field that takes any, and a slider whose positions are the rates of rpRates
let rpEditing = false;
const rpPosition = (rate) => {
  const away = (at) => Math.abs(Math.log(rpRates[at] / Math.max(rate, rpRates[0])));
  return rpRates.reduce((best, _, at) => (away(at) < away(best) ? at : best), 0);
};
// what the field shows when the rate in force has changed, and when somebody leaves it as he found it
const rpFollowed = (running, shown) => (rpEditing ? shown : running);
const rpLeft = (running, shown) => {
  const left = rpEditing;
  rpEditing = false;
  return left ? running : shown;
};
document.addEventListener("input", (event) => {
  if (event.target.matches("#rp-rate input")) rpEditing = true;
  if (!event.target.matches("#rp-slider input[type=range]")) return;
  const field = document.querySelector("#rp-rate input");
  field.value = rpRates[event.target.value];
  field.dispatchEvent(new Event("input", {bubbles: true}));
});
document.addEventListener("change", (event) => {
  if (!event.target.matches("#rp-rate input, #rp-slider input[type=range]")) return;
  // Gradio takes the value in a moment after the event that told it
  setTimeout(() => {
    rpEditing = false;
    document.querySelector("#rp-set-rate").click();
  }, 50);
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
// an API that listens at every address is at the one that this page was asked for
for (const kind of ["pointerdown", "click"]) {
  document.addEventListener(kind, (event) => {
    const link = event.target.closest("[data-rp-everywhere]");
    if (link) link.hostname = location.hostname;
  });
}
// a plot that is given wider numbers than it began with keeps its margin, and cuts them off, until its width changes
const rpCutOff = (plot) => {
  const edge = plot.getBoundingClientRect().left - 1;
  const texts = [...plot.querySelectorAll("text")].filter((text) => text.getBoundingClientRect().left < edge);
  return texts.map((text) => text.textContent).join();
};
setInterval(() => {
  for (const plot of document.querySelectorAll(".vega-embed svg.marks")) {
    const frame = plot.closest(".vega-embed");
    const cut = rpCutOff(plot);
    if (cut && cut !== frame.rpCut) {
      frame.style.width = `${frame.offsetWidth - 1}px`;
      setTimeout(() => (frame.style.width = ""), 100);
    }
    frame.rpCut = cut;
  }
}, 1000);

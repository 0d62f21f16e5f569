"use strict";
// The training slider: every figure holds all its variants, and the root's data-at names the shown.
const root = document.documentElement;
const slider = document.getElementById("at"), play = document.getElementById("play");
const ticks = [...document.querySelectorAll(".ticks span")], last = ticks.length - 1;

function show(i) {
  slider.value = i;
  root.dataset.at = i;
  slider.setAttribute("aria-valuetext", `${ticks[i].textContent} steps`);
  document.querySelector("#training-slider output").textContent = `${ticks[i].textContent} steps`;
  ticks.forEach((tick, k) => tick.classList.toggle("now", k === i));
}

let playing = null;
function stop() {
  clearInterval(playing);
  playing = null;
  play.textContent = "play";
}
play.addEventListener("click", () => {
  if (playing) return stop();
  show(Number(slider.value) === last ? 0 : Number(slider.value) + 1);
  play.textContent = "pause";
  playing = setInterval(() => {
    if (Number(slider.value) < last) show(Number(slider.value) + 1);
    if (Number(slider.value) === last) stop();
  }, 900);
});
slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const elsewhere = event.target.closest("input, pre");
  if (!step || elsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
  stop();
  show(Math.min(last, Math.max(0, Number(slider.value) + step)));
  event.preventDefault();
});

// The contents follow the text, and are closed where they would stand before it.
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    links.forEach((a) => a.removeAttribute("aria-current"));
    links.get(target.id).setAttribute("aria-current", "true");
  }
}, { rootMargin: "-15% 0px -80% 0px" });
document.querySelectorAll("section[id]").forEach((section) => watcher.observe(section));
const narrow = matchMedia("(max-width: 68rem)"), contents = document.getElementById("contents");
const fold = () => { contents.open = !narrow.matches; };
narrow.addEventListener("change", fold);
contents.addEventListener("click", (event) => {
  if (event.target.closest("a") && narrow.matches) contents.open = false;
});
fold();

show(last);
document.body.dataset.ready = "yes";

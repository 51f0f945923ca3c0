"""The style sheet and the script of the report page: no fonts, images or addresses from anywhere else."""

__all__ = ["CSS", "POLICY", "SCRIPT"]

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; base-uri 'none'; form-action 'none'"
)
"""The browser itself refuses to fetch anything; plotly writes styles, and compiles code for its WebGL traces."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b636d; --paper: #fff; --panel: #f5f6f8; --line: #d9dde3;
  --link: #1a66ad; --good: #1c7a45; --bad: #b3401a; --open: #6b5a00; --mark: #fbe3d3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --soft: #a2abb6; --paper: #14171b; --panel: #1d2127;
  --line: #363d47; --link: #7db8f0; --good: #62c78b; --bad: #f0916b; --open: #d9c25a; --mark: #55341f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .3rem; } h4 { font-size: .95rem; margin: 1.2rem 0 .3rem; }
h2.part { margin-top: 4rem; font-size: 1.5rem; } section > h3 { font-size: 1.12rem; margin-top: 2.2rem; }
.subtitle { font-size: 1.1rem; color: var(--soft); margin: 0 0 1rem; }
.headline { font-size: 1.04rem; line-height: 1.6; padding: .5rem 1.1rem; background: var(--panel); border-radius: 6px; }
p { margin: .5rem 0; } .lead, figcaption p, small, .note { color: var(--soft); } .lead { margin-bottom: 1rem; }
a { color: var(--link); }
.findings small, .headline small { white-space: nowrap; } article { margin: 1.2rem 0 2rem; }
.findings { padding-left: 0; list-style: none; }
.findings li { margin: .7rem 0; line-height: 1.6; padding: .7rem 1rem; background: var(--panel); border-radius: 6px; }
.rest { display: block; margin-top: .3rem; color: var(--soft); font-size: .9rem; } .rest b { font-weight: 500; }
.verdict { display: block; font-weight: 600; margin-top: .3rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
figure { margin: 1.6rem 0 2.2rem; } figcaption p { font-size: .88rem; margin: .1rem 0 .4rem; }
figcaption h3, figcaption h4 { margin: 0; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .7rem; }
.samples > div { background: var(--panel); border-radius: 6px; padding: .5rem .8rem; min-width: 0; }
.who { margin: 0; font-size: .85rem; color: var(--soft); font-weight: 600; }
pre.prompt { border-left: 3px solid var(--line); padding-left: .7rem; }
mark { background: var(--mark); color: inherit; border-radius: 3px; }
pre { margin: .3rem 0; font: .84rem/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem .28rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
td small { display: block; } tbody th { font-weight: 500; } thead th { color: var(--soft); font-weight: 600; }
tr.first > * { border-top: 2px solid var(--line); }
details > summary { cursor: pointer; color: var(--link); padding: .3rem 0; } footer { margin-top: 3rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; font-size: 15px; } h1 { font-size: 1.4rem; }
  .findings li { padding: .6rem .7rem; } }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --panel: #f5f6f8; --line: #bbb; --link: #000;
    --good: #0b5c2f; --bad: #8f2d0d; --open: #554700; --mark: #fbe3d3; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } h2, h3, h4, .note, figcaption { break-after: avoid; }
  figure, .findings li, .headline, .samples > div, tr { break-inside: avoid; } h2.part { break-before: page; }
  .scroll { overflow: visible; } .scroll > div { min-width: 0 !important; } table { font-size: 7.5pt; }
  th, td { padding-right: .35rem; white-space: normal; } td small { white-space: nowrap; }
  details:not([open]), .download, .modebar, nav { display: none !important; } }
"""

SCRIPT = """
(function () {
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var narrow = window.matchMedia("(max-width: 40rem), (pointer: coarse)");
  var sources = Array.from(document.querySelectorAll("script[type='application/json'][data-figure]"));
  var drawn = [], opened = [], printing = false, PAPER = 680;
  function ink() { return dark.matches && !printing ? "#d5dae0" : "#333a42"; }
  function waiting(source) { return !source.done && !source.closest("details:not([open])"); }
  function draw(source) {
    source.done = true;
    var element = document.getElementById(source.getAttribute("data-figure"));
    var figure = JSON.parse(source.textContent);
    figure.layout.font = Object.assign({}, figure.layout.font, { color: ink() });
    if (narrow.matches) { figure.layout.dragmode = false; }  // a finger that moves over a figure moves the page
    drawn.push(element);
    Plotly.newPlot(element, figure.data, figure.layout, { responsive: true, displaylogo: false, showSendToCloud: false,
      modeBarButtonsToRemove: ["lasso2d", "select2d", "sendChartToCloud"] });
    room(element, figure.layout);
  }
  function room(element, layout) {  // for a legend that has more lines in a narrow figure
    var box = element.querySelector(".legend .bg"), margin = (layout.margin || {}).b;
    var more = box && margin && layout.height ? Math.round(Number(box.getAttribute("height")) - (margin - 62)) : 0;
    if (more > 4) {
      element.style.height = (layout.height + more) + "px";
      Plotly.relayout(element, { height: layout.height + more, "margin.b": margin + more });
    }
  }
  function next() {  // one figure at a time, so that the page can be read meanwhile
    var source = sources.find(waiting);
    document.documentElement.setAttribute("data-drawn", source ? "not all" : drawn.length);
    if (source) { setTimeout(next, 0); draw(source); }
  }
  function repaint() {
    var wide = printing ? { width: PAPER } : { width: null, autosize: true };
    drawn.forEach(function (element) { Plotly.relayout(element, Object.assign({ "font.color": ink() }, wide)); });
  }
  document.addEventListener("toggle", next, true);
  dark.addEventListener("change", repaint);
  window.addEventListener("beforeprint", function () {
    opened = Array.from(document.querySelectorAll("details.numbers:not([open])"));
    opened.forEach(function (one) { one.open = true; });
    sources.filter(waiting).forEach(draw);
    printing = true;
    repaint();
  });
  window.addEventListener("afterprint", function () {
    opened.forEach(function (one) { one.open = false; });
    printing = false;
    repaint();
  });
  next();
})();
"""

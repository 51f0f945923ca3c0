"""The style sheet and the script of the report page: no fonts, images or addresses from anywhere else."""

__all__ = ["CSS", "POLICY", "SCRIPT"]

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; base-uri 'none'; form-action 'none'"
)
"""The browser itself refuses to fetch anything; plotly writes styles, and compiles code for its WebGL traces."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b636d; --paper: #fff; --panel: #f5f6f8; --line: #d9dde3;
  --link: #1a66ad; --good: #1c7a45; --bad: #b3401a; --open: #6b5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --soft: #a2abb6; --paper: #14171b; --panel: #1d2127;
  --line: #363d47; --link: #7db8f0; --good: #62c78b; --bad: #f0916b; --open: #d9c25a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .3rem; }
p { margin: .5rem 0; } .lead, figcaption p, small, .note { color: var(--soft); } .lead { margin-bottom: 1rem; }
a { color: var(--link); }
.findings small { white-space: nowrap; } article { margin: 1.2rem 0 2rem; }
.findings { padding-left: 0; list-style: none; }
.findings li { margin: .7rem 0; line-height: 1.6; padding: .7rem 1rem; background: var(--panel); border-radius: 6px; }
.verdict { display: block; font-weight: 600; margin-top: .3rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
figure { margin: 1.6rem 0 2.2rem; } figcaption p { font-size: .88rem; margin: .1rem 0 .4rem; }
figcaption h3 { margin: 0; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .7rem; }
.samples > div { background: var(--panel); border-radius: 6px; padding: .5rem .8rem; min-width: 0; }
.samples h4 { margin: 0; font-size: .85rem; color: var(--soft); font-weight: 600; }
pre { margin: .3rem 0; font: .84rem/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem .28rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
td small { display: block; } tbody th { font-weight: 500; } thead th { color: var(--soft); font-weight: 600; }
tr.first > * { border-top: 2px solid var(--line); }
details > summary { cursor: pointer; color: var(--link); }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; font-size: 15px; } h1 { font-size: 1.4rem; }
  .findings li { padding: .6rem .7rem; } }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --panel: #f5f6f8; --line: #bbb; --link: #000;
    --good: #0b5c2f; --bad: #8f2d0d; --open: #554700; }
  body { max-width: none; padding: 0; font-size: 11pt; } h2, h3, .note { break-after: avoid; }
  figure, .findings li, .samples > div { break-inside: avoid; }
  .scroll { overflow: visible; } .download, .modebar { display: none; } }
"""

SCRIPT = """
(function () {
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var drawn = [];
  function ink(print) { return !print && dark.matches ? "#d5dae0" : "#333a42"; }
  function recolour(print) {
    drawn.forEach(function (element) { Plotly.relayout(element, { "font.color": ink(print) }); });
  }
  document.querySelectorAll("script[type='application/json'][data-figure]").forEach(function (source) {
    var element = document.getElementById(source.getAttribute("data-figure"));
    var figure = JSON.parse(source.textContent);
    figure.layout.font = Object.assign({}, figure.layout.font, { color: ink(false) });
    Plotly.newPlot(element, figure.data, figure.layout, { responsive: true, displaylogo: false, showSendToCloud: false,
      modeBarButtonsToRemove: ["lasso2d", "select2d", "sendChartToCloud"] });
    drawn.push(element);
  });
  dark.addEventListener("change", function () { recolour(false); });
  window.addEventListener("beforeprint", function () { recolour(true); });
  window.addEventListener("afterprint", function () { recolour(false); });
})();
"""

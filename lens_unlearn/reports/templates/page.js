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

// Draws each chart when it comes near the screen, in the colors of the style sheet.
function draw(chart) {
  const style = getComputedStyle(document.documentElement);
  const figure = JSON.parse(chart.dataset.figure, (_, value) =>
    typeof value === "string"
      ? value.replace(/^var\((--[\w-]+)\)$/, (_, name) => style.getPropertyValue(name).trim())
      : value,
  );
  Plotly.react(chart, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
const charts = document.querySelectorAll(".chart");
const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      observer.unobserve(entry.target);
      draw(entry.target);
    }
  },
  {rootMargin: "500px"},
);
charts.forEach((chart) => observer.observe(chart));
addEventListener("beforeprint", () => charts.forEach(draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  document.querySelectorAll(".js-plotly-plot").forEach(draw);
});

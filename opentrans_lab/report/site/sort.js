// A click on a table's heading sorts its rows: numbers as numbers, what is missing last. A cell that
// begins with a number and goes on after a comma ("39.9, seed 0") counts as that number.
const NUMBER = /^[-+−]?[\d,.]*\d(e[-+]?\d+)?( ?%| ±.*|, .*)?$/i;
for (const head of document.querySelectorAll("thead th:not([colspan])")) {
  const table = head.closest("table");
  // Rows that share a cell would be torn apart, and an empty heading names nothing.
  if (!head.textContent.trim() || table.querySelector("tbody [rowspan]")) continue;
  head.tabIndex = 0;
  const sort = () => {
    const rows = table.tBodies[0].rows;
    const up = head.getAttribute("aria-sort") !== "ascending";
    const read = (row) => row.cells[head.cellIndex]?.textContent.trim() ?? "";
    const value = (text) =>
      NUMBER.test(text) ? Number.parseFloat(text.replaceAll(",", "").replace("−", "-")) : NaN;
    const rank = (text) => (NUMBER.test(text) ? 0 : text === "" || text === "–" ? 2 : 1);
    const order = [...rows].sort((a, b) => {
      const [s, t] = [read(a), read(b)];
      const [x, y] = [value(s), value(t)];
      if (rank(s) !== rank(t)) return rank(s) - rank(t);
      const way = Number.isNaN(x) ? s.localeCompare(t) : x - y;
      return up ? way : -way;
    });
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    table.tBodies[0].append(...order);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
}

// A click on a table's heading sorts its rows: numbers as numbers, what is missing last.
const NUMBER = /^[-+−]?[\d,.]+(e[-+]?\d+)?( ?%| ±.*)?$/i;
for (const head of document.querySelectorAll("table thead tr:last-child th")) {
  head.tabIndex = 0;
  const sort = () => {
    const rows = head.closest("table").tBodies[0].rows;
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
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    head.closest("table").tBodies[0].append(...order);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
}

// The page is complete without this. With it, tables sort and filter, and queries can be
// searched (the key / goes there).
"use strict";
(() => {
  const number = (cell) => {
    const data = cell.querySelector("data[value]");
    return data ? Number(data.value) : null;
  };

  const compare = (column, direction) => (left, right) => {
    const [a, b] = [left.cells[column], right.cells[column]];
    const [x, y] = [number(a), number(b)];
    if (x !== null && y !== null) return direction * (x - y);
    if (x !== null || y !== null) return x === null ? 1 : -1; // the undefined come last
    return direction * a.textContent.trim().localeCompare(b.textContent.trim());
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (head.classList.contains("still")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const numeric = head.classList.contains("n");
        const before = head.getAttribute("aria-sort");
        const first = numeric ? "descending" : "ascending";
        const second = numeric ? "ascending" : "descending";
        const order = before === first ? second : first;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const rows = [...table.tBodies[0].rows];
        rows.sort(compare(column, order === "ascending" ? 1 : -1));
        table.tBodies[0].append(...rows);
      });
    });
  }

  // Long tables can be narrowed to the rows that hold some words.
  for (const table of document.querySelectorAll("table.sortable")) {
    const rows = [...table.tBodies[0].rows];
    if (rows.length < 8) continue;
    const words = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    const line = document.createElement("p");
    const label = document.createElement("label");
    const field = document.createElement("input");
    const left = document.createElement("output");
    line.className = "tools";
    field.type = "search";
    field.autocomplete = "off";
    left.setAttribute("aria-live", "polite");
    label.append("Filter ", field);
    line.append(label, left);
    table.before(line);
    field.addEventListener("input", () => {
      const wanted = field.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !words.get(row).includes(wanted);
      const shown = rows.filter((row) => !row.hidden).length;
      left.textContent = wanted ? `${shown} of ${rows.length}` : "";
    });
  }

  const tools = document.querySelector("form.tools");
  const cards = document.querySelector(".cards");
  if (!tools || !cards || cards.children.length < 2) return;
  const queries = [...cards.children];
  const words = new Map(
    queries.map((query) => [query, query.querySelector("header").textContent.toLowerCase()]),
  );
  const found = document.getElementById("found");
  const by = {
    shown: () => 0,
    loss: (a, b) => Number(b.dataset.loss) - Number(a.dataset.loss),
    strength: (a, b) => Number(b.dataset.strength) - Number(a.dataset.strength),
    id: (a, b) => a.dataset.id.localeCompare(b.dataset.id, undefined, { numeric: true }),
  };
  document.getElementById("find").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    for (const query of queries) query.hidden = !words.get(query).includes(wanted);
    const left = queries.filter((query) => !query.hidden).length;
    found.textContent = wanted ? `${left} of ${queries.length}` : "";
  });
  document.getElementById("order").addEventListener("change", (event) => {
    cards.append(...[...queries].sort(by[event.target.value]));
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    document.getElementById("find").focus();
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = false;
})();

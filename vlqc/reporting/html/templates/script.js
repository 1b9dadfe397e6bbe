// The page is complete without scripts. This one adds a line that describes the selected cell, and a copy button.
(() => {
  const selected = document.getElementById("selected");
  selected.hidden = false;
  for (const map of document.querySelectorAll(".map")) {
    const rows = [...map.tBodies[0].rows].map((row) => [...row.cells].slice(1));
    const cells = rows.flat();
    let at = [0, 0];
    const show = (cell) => {
      document.querySelectorAll(".map .picked").forEach((cell) => cell.classList.remove("picked"));
      cell.classList.add("picked");
      selected.textContent = cell.title;
    };
    const move = (row, column, focus) => {
      const cell = rows[row] && rows[row][column];
      if (!cell) return;
      rows[at[0]][at[1]].tabIndex = -1;
      at = [row, column];
      cell.tabIndex = 0;
      if (focus) cell.focus();
    };
    cells.forEach((cell) => (cell.tabIndex = -1));
    if (cells.length) cells[0].tabIndex = 0;
    const position = (cell) => [rows.findIndex((row) => row.includes(cell)), cell.cellIndex - 1];
    map.addEventListener("mouseover", (event) => event.target.matches("td") && show(event.target));
    map.addEventListener("focusin", (event) => event.target.matches("td") && show(event.target));
    map.addEventListener("click", (event) => event.target.matches("td") && move(...position(event.target), true));
    map.addEventListener("keydown", (event) => {
      if (!event.target.matches("td")) return;
      const transposed = getComputedStyle(map).display === "grid";
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      move(at[0] + step[transposed ? 1 : 0], at[1] + step[transposed ? 0 : 1], true);
    });
  }
  const open = () => {
    const target = document.getElementById(location.hash.slice(1));
    const details = target && target.closest("details");
    if (details) details.open = true;
  };
  addEventListener("hashchange", open);
  open();
  const command = document.getElementById("command");
  if (navigator.clipboard) {
    const button = document.createElement("button");
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    });
    command.after(button);
  }
})();

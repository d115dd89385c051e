/* Headings of tables become buttons that sort; without scripts the tables stay as ranked. */
document.querySelectorAll("table.sortable").forEach(function (table) {
  var said = table.parentElement.parentElement.querySelector("[aria-live]");
  table.querySelectorAll("thead th").forEach(function (head, place) {
    var button = document.createElement("button");
    button.type = "button";
    while (head.firstChild) button.appendChild(head.firstChild);
    head.appendChild(button);
    button.addEventListener("click", function () {
      var down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      var body = table.tBodies[0];
      Array.from(body.rows).map(function (row, index) {
        var cell = row.cells[place], raw = cell.getAttribute("data-value"), number = parseFloat(raw);
        return { row: row, index: index, none: raw === null, key: cell.hasAttribute("data-text") ? raw : number };
      }).sort(function (a, b) {
        if (a.none || b.none) return a.none - b.none || a.index - b.index;
        var order = a.key < b.key ? -1 : a.key > b.key ? 1 : 0;
        return (down ? -order : order) || a.index - b.index;
      }).forEach(function (item) { body.appendChild(item.row); });
      if (said) said.textContent = "sorted by " + button.textContent + (down ? ", descending" : ", ascending");
    });
  });
});

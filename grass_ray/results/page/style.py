"""Style and script of the report page: light and dark, phone width, keyboard, no network."""

from __future__ import annotations

from grass_ray.results.figures.figure import page_colours

STYLE = f"""
:root {{
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1a1c1f; --soft: #52585f; --edge: #8b929a; --rule: #d9dde1; --panel: #f4f5f7;
  --hole: #e4e4e4; --link: #0b5cad; --focus: #b34700; --front: #fff4e2;
  {page_colours(dark=False)};
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #16191d; --ink: #e8eaed; --soft: #a9b0b8; --edge: #7d858e; --rule: #343a41; --panel: #1f242a;
    --hole: #3a4048; --link: #7db8f5; --focus: #ffb066; --front: #33291a;
    {page_colours(dark=True)};
  }}
}}
* {{ box-sizing: border-box }}
html {{ -webkit-text-size-adjust: 100% }}
body {{
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}}
header, main, footer {{ max-width: 76rem; margin: 0 auto; padding: 0 1rem }}
header {{ padding-top: 1.2rem }}
h1 {{ font-size: 1.6rem; margin: .2rem 0 }}
h2 {{ font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 2px solid var(--rule) }}
h3 {{ font-size: 1.05rem; margin: 2rem 0 .4rem }}
a {{ color: var(--link) }}
:focus-visible {{ outline: 3px solid var(--focus); outline-offset: 2px }}
.skip {{ position: absolute; left: -99rem }}
.skip:focus {{ left: 1rem; top: .5rem; background: var(--paper); padding: .4rem .8rem; z-index: 9 }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .6rem 0 }}
nav a, .files a {{ display: inline-block; padding: .25rem 0 }}
.lead, .note, figcaption, caption {{ color: var(--soft) }}
ul.notes {{ color: var(--soft); font-size: .92rem; padding-left: 1.2rem; max-width: 62rem }}
.budget {{ margin: .3rem 0 .8rem }}
.box {{ overflow: auto; max-width: 100%; border: 1px solid var(--rule); border-radius: .4rem }}
.long {{ max-height: min(85vh, 60rem) }}
table {{
  border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%
}}
caption {{ text-align: left; padding: .4rem .7rem; font-size: .9rem }}
th, td {{ padding: .38rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }}
thead th {{ position: sticky; top: 0; background: var(--panel); z-index: 2; vertical-align: bottom }}
tbody th {{
  position: sticky; left: 0; z-index: 1; font-weight: 500; background: var(--paper); background-clip: padding-box
}}
tbody th, .word {{ text-align: left }}
tbody th {{ white-space: normal; min-width: 12rem; max-width: 20rem; overflow-wrap: anywhere }}
tr:last-child > * {{ border-bottom: 0 }}
tr.pareto > * {{ background-color: var(--front) }}
tr.pareto th {{ font-weight: 700 }}
tr.unranked > * {{ color: var(--soft) }}
thead button {{
  font: inherit; font-weight: 700; color: inherit; background: none; border: 0; padding: .1rem 0; cursor: pointer
}}
thead button::after {{ content: "\\2195"; color: var(--edge); margin-left: .25rem }}
th[aria-sort="ascending"] button::after {{ content: "\\2191"; color: var(--ink) }}
th[aria-sort="descending"] button::after {{ content: "\\2193"; color: var(--ink) }}
.chip {{
  display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .45rem; vertical-align: -.05em
}}
figure {{ margin: 1rem 0 }}
figure .box {{ border: 0 }}
figure svg {{ display: block; width: 100%; height: auto; min-width: 36rem; max-width: 60rem }}
figure svg text {{ fill: var(--ink) }}
figcaption {{ font-size: .92rem }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 0 1.5rem }}
.pair figure {{ min-width: 0 }}
.pair svg {{ min-width: 30rem }}
details {{ margin: .5rem 0 }}
summary {{ cursor: pointer; padding: .3rem 0 }}
pre {{
  background: var(--panel); padding: .6rem .8rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem
}}
dl {{ display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; font-size: .92rem }}
dt {{ color: var(--soft) }}
dd {{ margin: 0; min-width: 0; overflow-wrap: anywhere }}
footer {{ color: var(--soft); font-size: .9rem; margin-top: 3rem; padding-bottom: 2rem }}
@media (max-width: 40rem) {{
  body {{ font-size: 15px }}
  dl {{ grid-template-columns: 1fr; gap: 0 }}
  dd {{ margin-bottom: .5rem }}
  tbody th {{ max-width: 11rem; min-width: 9rem }}
}}
@media print {{ .box {{ overflow: visible; max-height: none }} thead th, tbody th {{ position: static }} }}
"""

# Headings of tables become buttons that sort; without scripts the tables stay as ranked.
SCRIPT = """
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
"""

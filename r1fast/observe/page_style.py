"""The page's style sheet and its one script: the theme button, and reading values off a curve."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: light-dark(#f6f7f9, #0d1015); --card: light-dark(#ffffff, #151a21); --sunk: light-dark(#f3f5f8, #0f141a);
  --text: light-dark(#1a2130, #e4e8ee); --soft: light-dark(#5d6778, #98a2b1); --rule: light-dark(#e3e7ed, #2a313b);
  --c0: light-dark(#c5ccd6, #454e5b); --c1: light-dark(#3b62dd, #6d90ff); --c2: light-dark(#e0932b, #e6a04a);
  --c3: light-dark(#16a08c, #35bfa9); --c4: light-dark(#7a55d3, #a584f5); --c5: light-dark(#d65a7c, #e87b98);
  --c6: light-dark(#7d8896, #7f8b9b); --c7: light-dark(#5aa7d8, #6bb8e8); --c8: light-dark(#9aa53a, #b3bf55);
  --c9: light-dark(#b0764e, #c98f66);
  --good: light-dark(#0f7f5f, #4cc9a0); --bad: light-dark(#bf3b55, #f08aa0);
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 60px; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 8px 24px 80px; }
a { color: inherit; text-decoration: none; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.015em; }
h2 { font-size: 19px; margin: 0 0 2px; letter-spacing: -0.01em; }
h3 { font-size: 13px; font-weight: 600; margin: 28px 0 10px; color: var(--soft); }
code, pre, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 12.5px; }
.soft { color: var(--soft); }
nav { position: sticky; top: 0; z-index: 2; background: color-mix(in srgb, var(--page) 92%, transparent);
  backdrop-filter: blur(6px); border-bottom: 1px solid var(--rule); }
nav div { max-width: 1140px; margin: 0 auto; padding: 9px 24px; display: flex; gap: 4px; align-items: center;
  overflow-x: auto;
  white-space: nowrap; font-size: 13px; }
nav a { padding: 3px 9px; border-radius: 6px; color: var(--soft); }
nav a:hover { background: var(--card); color: var(--text); }
nav b { margin-right: 8px; }
nav button { margin-left: auto; border: 1px solid var(--rule); background: var(--card); color: var(--soft);
  border-radius: 6px;
  font: inherit; padding: 2px 10px; cursor: pointer; }
header { padding: 34px 0 22px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; color: var(--soft); font-size: 13.5px; }
.facts b { font-weight: 500; color: var(--text); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 22px 26px 26px;
  margin-bottom: 18px; }
.card > p.soft { margin: 0 0 16px; font-size: 13.5px; }
.notice { border-left: 4px solid var(--c2); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-bottom: 18px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 15px 20px; }
.tile .big { font-size: 27px; font-weight: 600; letter-spacing: -0.02em; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.tile .big small { font-size: 15px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.tile div:first-child, .tile div:last-child { font-size: 13px; color: var(--soft); }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
svg text { fill: var(--text); font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--soft); font-size: 10.5px; }
svg .name { font-size: 12.5px; }
svg .value { fill: var(--soft); font-size: 11.5px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .whisker { stroke: var(--text); stroke-width: 1.2; fill: none; opacity: 0.75; }
svg .curve { fill: none; stroke: var(--c1); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke: var(--c1); stroke-width: 1; opacity: 0.28; }
svg .even { fill: var(--rule); }
svg .dot { fill: var(--c1); }
svg.wide { min-width: 640px; }
svg.counts { max-width: 640px; min-width: 420px; }
.c0 { fill: var(--c0); background: var(--c0); } .c1 { fill: var(--c1); background: var(--c1); }
.c2 { fill: var(--c2); background: var(--c2); } .c3 { fill: var(--c3); background: var(--c3); }
.c4 { fill: var(--c4); background: var(--c4); } .c5 { fill: var(--c5); background: var(--c5); }
.c6 { fill: var(--c6); background: var(--c6); } .c7 { fill: var(--c7); background: var(--c7); }
.c8 { fill: var(--c8); background: var(--c8); } .c9 { fill: var(--c9); background: var(--c9); }
.chain { margin: 0 auto; }
.chain .box { fill: var(--sunk); stroke: var(--rule); stroke-width: 1.5; }
.chain a:hover .box { stroke: var(--c1); }
.chain .box.running, .chain .box.stopped { stroke: var(--c2); } .chain .box.failed { stroke: var(--bad); }
.chain .box.pending, .chain .box.outside { fill: none; stroke-dasharray: 4 4; }
.chain .track { fill: var(--rule); }
.chain .node { font-size: 12.5px; font-weight: 600; } .chain .kind { fill: var(--soft); font-size: 11px; }
.chain .score { font-size: 11px; }
.chain .edge { fill: none; stroke: var(--soft); stroke-width: 1.4; opacity: 0.75; marker-end: url(#arrow); }
.chain .edge.data { stroke-dasharray: 5 4; }
.chain .arrow { fill: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 12.5px; color: var(--soft); margin: 0 0 12px; }
.legend .swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.legend .stroke { display: inline-block; width: 22px; border-top: 2px solid var(--soft); margin-right: 6px;
  vertical-align: 4px; }
.legend .stroke.dashed { border-top-style: dashed; }
.head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; }
.badge { font-size: 12px; padding: 1px 9px; border-radius: 20px; border: 1px solid var(--rule); color: var(--soft); }
.badge.running, .badge.stopped { color: var(--c2); border-color: var(--c2); } .badge.failed { color: var(--bad);
  border-color: var(--bad); }
.head .time { margin-left: auto; color: var(--soft); font-variant-numeric: tabular-nums; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 0 48px;
  align-items: start; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
th { font-weight: 500; color: var(--soft); font-size: 12.5px; }
th, td { text-align: right; padding: 4px 0 4px 20px; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
td.up { color: var(--good); } td.down { color: var(--bad); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 0 32px; font-size: 13px;
  margin: 0; }
.pairs div { display: flex; justify-content: space-between; gap: 14px; padding: 3px 0;
  border-bottom: 1px solid var(--rule); min-width: 0; }
.pairs dt { color: var(--soft); white-space: nowrap; } .pairs dd { margin: 0; text-align: right;
  overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(238px, 1fr)); gap: 20px 24px; }
.curves svg { max-width: 340px; }
figure { margin: 0; position: relative; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: 12.5px; margin-bottom: 2px; }
figcaption span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
figcaption span:last-child { font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin-top: 16px; }
summary { cursor: pointer; font-size: 13px; font-weight: 600; color: var(--soft); }
summary:hover { color: var(--text); }
details[open] > summary { margin-bottom: 12px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.block { background: var(--sunk); border-radius: 8px; padding: 14px 16px; max-height: 520px; overflow: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px; }
.sample { border: 1px solid var(--rule); border-radius: 9px; overflow: hidden; min-width: 0; display: flex;
  flex-direction: column; }
.sample .chips { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 8px 14px; font-size: 12px;
  color: var(--soft);
  background: var(--sunk); border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
.chips b { font-weight: 600; color: var(--text); } .chips b.up { color: var(--good); }
.chips b.down { color: var(--bad); }
.sample pre { padding: 10px 14px; max-height: 300px; overflow: auto; }
.sample pre.prompt { color: var(--soft); border-bottom: 1px dashed var(--rule); max-height: 120px; }
.mark { color: var(--c4); font-weight: 600; } .answer { font-weight: 600; }
.cut { color: var(--soft); font-style: italic; }
#reading { position: absolute; pointer-events: none; background: var(--text); color: var(--card); font-size: 11.5px;
  padding: 1px 7px;
  border-radius: 5px; transform: translate(-50%, -150%); white-space: nowrap; display: none; z-index: 3; }
#reading::after { content: ""; position: absolute; left: 50%; top: calc(100% + 5px); width: 7px; height: 7px;
  border-radius: 50%;
  background: var(--c1); transform: translateX(-50%); }
footer { color: var(--soft); font-size: 12.5px; padding: 6px 4px; }
@media print { nav { display: none; } .card { break-inside: avoid-page; } }
@media (max-width: 640px) { main { padding: 8px 14px 60px; } .card { padding: 18px 16px; } }
"""

SCRIPT = """
document.getElementById('theme').onclick = () => {
  const dark = getComputedStyle(document.body).backgroundColor === 'rgb(13, 16, 21)';
  document.documentElement.style.colorScheme = dark ? 'light' : 'dark';
};
const reading = document.createElement('div');
reading.id = 'reading';
document.querySelectorAll('svg.line').forEach(chart => {
  const [steps, values, xs, ys] = ['steps', 'values', 'xs', 'ys'].map(key => chart.dataset[key].split(' '));
  chart.onmousemove = event => {
    const box = chart.getBoundingClientRect(), scale = box.width / chart.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / scale;
    let best = 0;
    xs.forEach((other, i) => { if (Math.abs(other - x) < Math.abs(xs[best] - x)) best = i; });
    chart.parentNode.append(reading);
    reading.textContent = 'step ' + steps[best] + ': ' + values[best];
    reading.style.left = (box.left - chart.parentNode.getBoundingClientRect().left) + xs[best] * scale + 'px';
    reading.style.top = (box.top - chart.parentNode.getBoundingClientRect().top) + ys[best] * scale + 2 + 'px';
    reading.style.display = 'block';
  };
  chart.onmouseleave = () => { reading.style.display = 'none'; };
});
"""

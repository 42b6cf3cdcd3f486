'use strict';
const data = JSON.parse(document.getElementById('data').textContent);

// Strings become attributes and text nodes: nothing that the run says is read as markup.
function element(name, attributes, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  made.append(...children);
  return made;
}
function tag(name, style, ...children) {
  const made = document.createElement(name);
  if (style) made.className = style;
  made.append(...children);
  return made;
}
const text = (x, y, anchor, content) => element('text', {x, y, 'text-anchor': anchor}, content);
const path = (style, d, more = {}) => element('path', {class: style, d, ...more});
const rect = (x, y, width, height, fill) => element('rect', {x, y, width, height, style: `fill: ${fill}`});

function number(value) {
  const size = Math.abs(value), notation = size && (size < 1e-3 || size >= 1e12) ? 'scientific' : 'compact';
  const written = new Intl.NumberFormat('en', {notation, maximumSignificantDigits: 3}).format(value);
  return written.replace('E', 'e').replace('K', 'k').replace('B', 'G');
}

function ticks(low, high) {  // about three round numbers around low..high
  if (!(high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high), 1e-290))) {
    const pad = Math.abs(low) > 1e-290 ? Math.abs(low) / 10 : 1;
    [low, high] = [low - pad, high + pad];
  }
  const raw = (high - low) / 2, magnitude = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(factor => factor * magnitude).find(step => step >= raw * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({length: last - first + 1}, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// A straight line fitted to a twelfth of the curve around each point: no lag, and no jump at the ends.
function smooth(values) {
  const half = Math.max(2, Math.floor(values.length / 24)), sum = list => list.reduce((total, x) => total + x, 0);
  return values.map((_, i) => {
    const first = Math.max(0, i - half), near = values.slice(first, i + half + 1), centre = (near.length - 1) / 2;
    const slope = sum(near.map((y, j) => (j - centre) * y)) / sum(near.map((_, j) => (j - centre) ** 2));
    return sum(near) / near.length + slope * (i - first - centre);
  });
}

/* One metric over the steps, a line for each run: the raw values faint, their course strong, intervals as a band.
   `view` is the range of steps that is drawn, `at` the point that is read (of the first line that has it). */
class Curve {
  static size = {width: 320, height: 142, left: 46, right: 312, top: 8, bottom: 120};

  constructor(figure, name, series) {
    Object.assign(this, {figure, name, series, reading: figure.querySelector('b')});
    this.steps = [...new Set(series.flatMap(line => line.points.map(point => point[0])))].sort((a, b) => a - b);
    this.whole = [this.steps[0], this.steps.at(-1)];
    this.view = this.whole;
    this.at = null;
    this.drawn = null;
    figure.addEventListener('keydown', event => this.key(event));
    this.draw();
  }

  x(step) {
    const {left, right} = Curve.size, [first, last] = this.view;
    return last > first ? left + (right - left) * (step - first) / (last - first) : (left + right) / 2;
  }

  visible(line) {
    const inside = line.points.map((point, i) => [...point, ...(line.bounds?.[i] ?? [])])
      .filter(([step]) => step >= this.view[0] && step <= this.view[1]);
    return inside;
  }

  draw() {
    const {width, height, left, right, top, bottom} = Curve.size;
    const lines = this.series.map(line => ({...line, seen: this.visible(line)}));
    const all = lines.flatMap(line => line.seen.flatMap(([, ...values]) => values));
    const marks = ticks(Math.min(...all), Math.max(...all)), span = marks.at(-1) - marks[0];
    this.y = value => bottom - (bottom - top) * (value - marks[0]) / span;
    const place = (step, value) => `${this.x(step).toFixed(2)} ${this.y(value).toFixed(2)}`;
    const along = (steps, values) => `M${steps.map((step, i) => place(step, values[i])).join('L')}`;
    const parts = marks.flatMap(mark =>
      [path('line', `M${left} ${this.y(mark)}H${right}`), text(left - 6, this.y(mark) + 4, 'end', number(mark))]);
    for (const {seen, colour} of lines.filter(line => line.seen.length)) {
      const steps = seen.map(point => point[0]), values = seen.map(point => point[1]);
      const style = {style: `stroke: var(--${colour})`};
      if (seen[0].length === 4) {
        const low = seen.map(([step, , value]) => place(step, value)), high = seen.map(([step, , , value]) => place(step, value));
        parts.push(path('band', `M${[...low, ...high.reverse()].join('L')}Z`, {style: `fill: var(--${colour})`}));
      }
      const many = values.length > 24;
      if (many) parts.push(path('curve raw', along(steps, values), style));
      parts.push(path('curve', along(steps, many ? smooth(values) : values), style));
    }
    const [first, last] = this.view;
    parts.push(text(left, height - 4, 'start', number(first)), text(right, height - 4, 'end', last > first ? number(last) : ''));
    this.dots = lines.map(({colour}) => element('circle', {r: 3, style: `fill: var(--${colour})`}));
    this.selection = element('rect', {class: 'selection', y: top, height: bottom - top, width: 0});
    const label = `${this.name} by step${this.isZoomed() ? `, steps ${first} to ${last}` : ''}`;
    const chart = element('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label},
      ...parts, this.selection, ...this.dots);
    this.watch(chart);
    if (this.drawn) this.drawn.replaceWith(chart); else this.figure.append(chart);
    this.drawn = chart;
    this.figure.dataset.zoomed = this.isZoomed();
    this.read(null);
  }

  isZoomed() {
    return this.view[0] !== this.whole[0] || this.view[1] !== this.whole[1];
  }

  watch(chart) {
    let from = null;
    const place = event => {
      const box = chart.getBoundingClientRect(), {width, left, right} = Curve.size;
      return Math.max(left, Math.min(right, (event.clientX - box.left) / box.width * width));
    };
    chart.onpointerdown = event => {
      from = place(event);
      chart.setPointerCapture?.(event.pointerId);
    };
    chart.onpointermove = event => {
      const here = place(event);
      this.read(this.nearest(here));
      if (from === null) return;
      this.selection.setAttribute('x', Math.min(from, here));
      this.selection.setAttribute('width', Math.abs(here - from));
    };
    chart.onpointerup = event => {
      const here = place(event), start = from;
      from = null;
      this.selection.setAttribute('width', 0);
      if (start !== null && Math.abs(here - start) > 8) this.zoom(this.stepAt(Math.min(start, here)), this.stepAt(Math.max(start, here)));
    };
    chart.onpointercancel = () => { from = null; this.selection.setAttribute('width', 0); };
    chart.onpointerleave = () => { if (from === null) this.read(null); };
    chart.ondblclick = () => this.zoom(...this.whole);
  }

  stepAt(x) {
    const {left, right} = Curve.size, [first, last] = this.view;
    return first + (last - first) * (x - left) / (right - left);
  }

  nearest(x) {
    const inside = this.steps.filter(step => step >= this.view[0] && step <= this.view[1]);
    return inside.reduce((best, step) => Math.abs(this.x(step) - x) < Math.abs(this.x(best) - x) ? step : best, inside[0]);
  }

  zoom(low, high) {  // to whole steps, at least two of them
    const inside = this.steps.filter(step => step >= low && step <= high);
    if (inside.length < 2) return;
    this.view = [inside[0], inside.at(-1)];
    this.draw();
  }

  read(step) {  // of each line its value at the step or the last before it; null: at the end
    this.at = step;
    const said = this.series.map((line, i) => {
      const seen = this.visible(line).filter(point => step === null || point[0] <= step), point = seen.at(-1);
      this.dots[i].setAttribute('visibility', point ? 'visible' : 'hidden');
      if (!point) return '–';
      this.dots[i].setAttribute('cx', this.x(point[0]));
      this.dots[i].setAttribute('cy', this.y(point[1]));
      return number(point[1]) + (point.length === 4 && step !== null ? ` (${number(point[2])} to ${number(point[3])})` : '');
    });
    this.reading.textContent = (step === null ? '' : `step ${number(step)}: `) + said.join(' / ');
  }

  key(event) {
    const inside = this.steps.filter(step => step >= this.view[0] && step <= this.view[1]);
    const here = this.at === null ? inside.length - 1 : inside.indexOf(this.at);
    const [first, last] = this.view, middle = inside[here], quarter = (last - first) / 4;
    const actions = {
      ArrowLeft: () => this.read(inside[Math.max(0, here - 1)]),
      ArrowRight: () => this.read(inside[Math.min(inside.length - 1, here + 1)]),
      '+': () => this.zoom(middle - quarter, middle + quarter),
      '-': () => this.zoom(first - 2 * quarter, last + 2 * quarter),
      Escape: () => this.zoom(...this.whole),
    };
    const action = actions[event.key === '=' ? '+' : event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  }
}

// Experts (columns) of each layer (rows), 1 = an even share: blue below, orange above, full at a quarter and at 4.
function loadMap(table) {
  const [left, right] = [30, 416], cell = (right - left) / Math.max(...table.map(row => row.length));
  const height = Math.max(5, Math.min(18, cell));
  const parts = table.flatMap((row, i) => {
    const y = 4 + i * height, baseline = y + height / 2 + 3.5;
    const boxes = row.map((load, e) => {
      const shade = load > 0 ? Math.max(-4, Math.min(4, Math.round(2 * Math.log2(load)))) : -4;
      const fill = shade ? `var(--c${shade < 0 ? 1 : 2}); fill-opacity: ${Math.abs(shade) / 4}` : 'var(--rule)';
      return rect(left + e * cell, y, cell * 0.94, height * 0.9, fill);
    });
    const most = `max ${Math.max(...row).toFixed(2)}`;
    const labels = [text(left - 8, baseline, 'end', i), text(right + 8, baseline, 'start', most)];
    return i % Math.ceil(10 / height) ? boxes : [...boxes, ...labels];
  });
  const size = {viewBox: `0 0 480 ${8 + height * table.length}`, role: 'img', 'aria-label': 'load of experts by layer'};
  return element('svg', size, ...parts);
}

// Completions: what the form asks for, a dozen at a time.
class Completions {
  static tags = /(<\/?think>|<\/?answer>|\|special_token\||<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>)/;

  constructor(section, samples) {
    Object.assign(this, {samples, form: section.querySelector('form'), list: section.querySelector('.samples'),
      more: section.querySelector('.more'), output: section.querySelector('output')});
    this.fill('stage', samples.map(sample => sample.stage));
    this.restore();
    this.form.onsubmit = event => event.preventDefault();
    this.form.oninput = () => this.show(12);
    this.more.onclick = () => this.show(this.shown + 12);
    this.show(12);
  }

  fill(name, values) {
    const select = this.form.elements[name], chosen = select.value;
    select.replaceChildren(select.options[0], ...[...new Set(values)].map(value => new Option(value)));
    select.value = [...select.options].some(option => option.value === chosen) ? chosen : '';
  }

  get asked() {
    return Object.fromEntries(new FormData(this.form));
  }

  restore() {  // what was asked before the page was loaded again
    const asked = JSON.parse(sessionStorage.getItem(location.pathname) ?? '{}');
    if (asked.stage) this.form.elements.stage.value = asked.stage;
    this.fillSteps();
    Object.entries(asked).forEach(([name, value]) => { if (this.form.elements[name]) this.form.elements[name].value = value; });
  }

  fillSteps() {
    const {stage} = this.asked;
    this.fill('step', this.samples.filter(one => !stage || one.stage === stage).map(one => one.step).sort((a, b) => a - b));
  }

  show(count) {
    this.fillSteps();
    const {text: wanted, stage, step, low, high, order} = this.asked, words = wanted.toLowerCase();
    sessionStorage.setItem(location.pathname, JSON.stringify(this.asked));
    const found = this.samples.filter(one =>
      (!stage || one.stage === stage) && (!step || String(one.step) === step)
      && (!low || one.reward >= Number(low)) && (!high || one.reward <= Number(high))
      && (!words || [one.prompt, one.completion, one.gold].some(part => part?.toLowerCase().includes(words))));
    const sign = {best: -1, worst: 1}[order], rank = one => one.reward === undefined ? Infinity : sign * one.reward;
    if (sign) found.sort((a, b) => rank(a) - rank(b));
    this.list.replaceChildren(...found.slice(0, count).map(one => this.card(one, words)));
    this.shown = count;
    this.more.hidden = found.length <= count;
    this.output.textContent = `${found.length} of ${this.samples.length}`;
  }

  card(one, words) {
    const signed = value => (value > 0 ? '+' : '') + value.toFixed(2);
    const chip = (name, value, style = '') => tag('span', '', `${name} `, tag('b', style, value));
    const chips = [tag('span', '', `${one.stage}, step ${one.step}`)];
    if (one.reward !== undefined) chips.push(chip('reward', number(one.reward)));
    if (one.advantage !== undefined) chips.push(chip('advantage', signed(one.advantage), one.advantage > 0 ? 'up' : one.advantage < 0 ? 'down' : ''));
    Object.entries(one.parts).forEach(([name, value]) => chips.push(chip(name, number(value))));
    if (one.tokens !== undefined) chips.push(chip('tokens', number(one.tokens)));
    if (one.cut) chips.push(tag('span', 'down', 'cut off at its longest'));
    const parts = ['prompt', 'completion', 'gold'].filter(part => one[part] !== undefined).map(part => {
      const block = tag('pre', part, ...this.marked(one[part], words));
      block.tabIndex = 0;  // it scrolls
      block.setAttribute('aria-label', part);
      return block;
    });
    return tag('div', 'sample', tag('div', 'chips', ...chips), ...parts);
  }

  marked(content, words) {  // tags coloured, what was searched for marked
    return content.split(Completions.tags).flatMap((piece, i) => {
      if (!words) return [i % 2 ? tag('span', 'tag', piece) : piece];
      const lower = piece.toLowerCase(), nodes = [];
      if (lower.length !== piece.length) return [piece];  // a letter whose small form is longer: places do not agree
      let from = 0;
      for (let at = lower.indexOf(words); at >= 0; at = lower.indexOf(words, from)) {
        nodes.push(piece.slice(from, at), tag('mark', '', piece.slice(at, at + words.length)));
        from = at + words.length;
      }
      nodes.push(piece.slice(from));
      return i % 2 ? [tag('span', 'tag', ...nodes)] : nodes;
    });
  }
}

document.querySelectorAll('[data-stage]').forEach(section => {
  const stage = data.stages[section.dataset.stage];
  const draw = figure => { figure.curve ??= new Curve(figure, figure.dataset.curve, stage.curves[figure.dataset.curve]); };
  section.querySelectorAll('[data-curve]').forEach(figure => { if (!figure.closest('details')) draw(figure); });
  section.querySelectorAll('details').forEach(details =>
    details.addEventListener('toggle', () => details.querySelectorAll('[data-curve]').forEach(draw)));
  section.querySelectorAll('[data-load]').forEach(figure => figure.append(loadMap(stage.load[figure.dataset.load])));
});
const completions = document.getElementById('completions');
if (completions) new Completions(completions, data.samples);

document.getElementById('theme').onclick = () => {
  const root = document.documentElement.style, system = matchMedia('(prefers-color-scheme: dark)').matches;
  root.colorScheme = (root.colorScheme ? root.colorScheme === 'dark' : system) ? 'light' : 'dark';
};
const menu = document.querySelector('.menu');
document.addEventListener('click', event => {
  if (menu?.open && (!menu.contains(event.target) || event.target.closest('.menu a'))) menu.open = false;
});
document.addEventListener('keydown', event => { if (event.key === 'Escape' && menu) menu.open = false; });

// The page of a run at work loads itself again, unless somebody is reading in it with mouse or keyboard.
const every = Number(document.documentElement.dataset.reload ?? 0) * 1000;
if (every) {
  const silent = Math.floor(Date.now() / 60000 - document.documentElement.dataset.written / 60);
  if (silent > 5) {
    const words = ` Nothing has been written for ${silent} minutes: the run may have been killed.`;
    document.querySelector('.notice')?.append(tag('b', '', words));
  }
  let touched = 0, loaded = Date.now();
  ['pointerdown', 'keydown', 'wheel'].forEach(kind => addEventListener(kind, () => { touched = Date.now(); }, {passive: true}));
  setInterval(() => { if (Date.now() - loaded > every && Date.now() - touched > every / 2) location.reload(); }, 1000);
}

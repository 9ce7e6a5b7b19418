'use strict';

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = id => document.getElementById(id);

// A click on a heading sorts its table: numbers as numbers, unknown ones always last.
function sortBy(heading) {
  const body = heading.closest('table').tBodies[0];
  const column = heading.cellIndex;
  const descending = heading.getAttribute('aria-sort') === 'ascending';
  [...heading.parentElement.cells].forEach(h => h.removeAttribute('aria-sort'));
  heading.setAttribute('aria-sort', descending ? 'descending' : 'ascending');

  const rows = [...body.rows];
  const label = cell => (cell.querySelector('summary') || cell).textContent.trim();
  const key = row => {
    const cell = row.cells[column];
    return cell.hasAttribute('data-key') ? cell.dataset.key : label(cell);
  };
  const numeric = rows.some(row => row.cells[column].hasAttribute('data-key'));
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    const way = numeric ? Number(x) - Number(y) : x.localeCompare(y, 'en', {numeric: true});
    return descending ? -way : way;
  };
  body.append(...rows.sort(order));
}
all('th button').forEach(b => b.addEventListener('click', () => sortBy(b.closest('th'))));

// Three controls hide the figures, rows and objects that do not match.
const controls = ['profile', 'verdict', 'text'].map(byId);
const [profile, verdict, text] = controls;
const rows = all('tr[data-profile]');
const tiles = all('.tile');
const objects = all('details.object');
const unmeasured = byId('unmeasured');  // a folded table
const content = new Map();  // what each holds, in small letters

function matches(element) {
  const {profile: ofProfile, verdicts} = element.dataset;
  if (profile.value && ofProfile !== profile.value) return false;
  if (verdict.value && !verdicts.split('|').includes(verdict.value)) return false;
  if (!content.has(element)) content.set(element, element.textContent.toLowerCase());
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every(word => content.get(element).includes(word));
}

function show(elements) {
  elements.forEach(e => { e.hidden = !matches(e); });
  return `${elements.filter(e => !e.hidden).length} of ${elements.length}`;
}

function filter() {
  const counts = `${show(tiles)} figures, ${show(rows)} lines, ${show(objects)} objects`;
  byId('count').textContent = counts;
  const asked = controls.some(control => control.value);
  if (asked && unmeasured) unmeasured.open = true;  // so that all lines found are to be seen
}
controls.forEach(e => e.addEventListener('input', filter));
filter();

// The address names what is open, so that it can be copied as a link.
const setAddress = id => history.replaceState(null, '', `#${id}`);

// The viewer shows one figure large; the arrow keys lead to the others that the filter shows.
const viewer = byId('viewer');
let current = null;

function enlarge(tile) {
  current = tile;
  byId('large').replaceChildren(tile.querySelector('img').cloneNode());
  byId('about').replaceChildren(tile.querySelector('figcaption').cloneNode(true));
  const shown = tiles.filter(e => !e.hidden);
  byId('place').textContent = `${shown.indexOf(tile) + 1} of ${shown.length}`;
  setAddress(tile.id);
  if (!viewer.open) viewer.showModal();
  viewer.scrollTop = 0;
}

function step(by) {
  const shown = tiles.filter(e => !e.hidden);
  enlarge(shown[(shown.indexOf(current) + by + shown.length) % shown.length]);
}

tiles.forEach(tile => tile.querySelector('a.paper').addEventListener('click', event => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;  // opens the file in a new tab
  event.preventDefault();
  enlarge(tile);
}));
byId('previous').addEventListener('click', () => step(-1));
byId('next').addEventListener('click', () => step(1));
byId('close').addEventListener('click', () => viewer.close());
viewer.addEventListener('click', event => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener('keydown', event => {
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) {
    event.preventDefault();
    step(by);
  }
});
viewer.addEventListener('close', () => {
  if (current) current.querySelector('a.paper').focus();
});

// A link to a folded or hidden place unfolds and shows it; a link to a figure enlarges it.
function reveal(id) {
  const target = byId(id);
  if (!target) return;
  if (viewer.open && !target.matches('.tile')) {
    current = null;
    viewer.close();
  }
  if (target.closest('[hidden]')) {
    controls.forEach(control => { control.value = ''; });
    filter();
  }
  for (let e = target; e; e = e.parentElement) if (e.tagName === 'DETAILS') e.open = true;
  target.scrollIntoView();
  const focus = target.matches('details') ? target.querySelector('summary') : null;
  if (focus) focus.focus({preventScroll: true});
  if (target.matches('.tile')) enlarge(target);
}
document.addEventListener('click', event => {
  const link = event.target.closest('a[href^="#"]');
  if (link) reveal(link.hash.slice(1));  // before the browser goes there
});
const revealAddress = () => reveal(decodeURIComponent(location.hash.slice(1)));
addEventListener('hashchange', revealAddress);
revealAddress();

// Unfolding by hand puts the place into the address. Print shows all that is folded.
const folded = all('details');
const print = matchMedia('print');
let closed = [];

function unfold() {
  if (!closed.length) closed = folded.filter(d => !d.open);
  closed.forEach(d => { d.open = true; });
}

function fold() {
  closed.forEach(d => { d.open = false; });
  closed = [];
}
all('summary').forEach(s => s.addEventListener('click', () => {
  const details = s.parentElement;
  if (details.id && !details.open) setAddress(details.id);
}));
addEventListener('beforeprint', unfold);
addEventListener('afterprint', fold);
print.addEventListener('change', () => print.matches ? unfold() : fold());

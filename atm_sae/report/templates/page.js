'use strict';

const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// A click on a heading sorts its table: numbers as numbers, unknown ones always last.
function sortBy(heading) {
  const table = heading.closest('table');
  const body = table.tBodies[0];
  const column = heading.cellIndex;
  const descending = heading.getAttribute('aria-sort') === 'ascending';
  all('th', table).forEach(h => h.removeAttribute('aria-sort'));
  heading.setAttribute('aria-sort', descending ? 'descending' : 'ascending');

  const key = row => {
    const cell = row.cells[column];
    return cell.hasAttribute('data-key') ? cell.dataset.key : cell.textContent.trim();
  };
  const numeric = all('td[data-key]', body).some(cell => cell.cellIndex === column);
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    const way = numeric ? Number(x) - Number(y) : x.localeCompare(y, 'en', {numeric: true});
    return descending ? -way : way;
  };
  body.append(...all('tr', body).sort(order));
}
all('th button').forEach(b => b.addEventListener('click', () => sortBy(b.closest('th'))));

// Three controls hide the rows and cards that do not match.
const profile = document.getElementById('profile');
const verdict = document.getElementById('verdict');
const text = document.getElementById('text');

function matches(element) {
  const {profile: ofProfile, verdicts} = element.dataset;
  if (profile.value && ofProfile !== profile.value) return false;
  if (verdict.value && !verdicts.split('|').includes(verdict.value)) return false;
  const content = element.textContent.toLowerCase();
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every(word => content.includes(word));
}

function show(elements) {
  elements.forEach(e => { e.hidden = !matches(e); });
  const shown = elements.filter(e => !e.hidden).length;
  return `${shown} of ${elements.length}`;
}

function filter() {
  const rows = show(all('tr[data-profile]'));
  const cards = show(all('article'));
  document.getElementById('count').textContent = `${rows} rows, ${cards} objects`;
}
[profile, verdict, text].forEach(e => e.addEventListener('input', filter));
filter();

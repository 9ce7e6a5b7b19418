'use strict';

const {terms, texts, targets, directions, items, saes, tokens} = JSON.parse(
  document.getElementById('data').textContent
);
const at = id => document.getElementById(id);
const number = x => x === null ? '–' : Number(x.toPrecision(3)).toString().replace('-', '−');
const difference = x => (x > 0 ? '+' : '') + number(x);
const two = saes.length === 2; // then their differences are shown
const STEP = 12; // words that are shown at first; each press of "Show more" doubles the number
let limit = STEP;

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The address says what is shown: #target=S&word=short&sae=1&latent=12
const state = () => new URLSearchParams(location.hash.slice(1));

function link(change, text) {
  const address = state();
  for (const [name, value] of Object.entries(change)) address.set(name, value);
  return element('a', {href: `#${address}`}, text);
}
// A leading space belongs to the word, and is shown unless all words have one.
const spaced = items.every(([text]) => texts[text].startsWith(' '));
const shownText = text => spaced ? text.trim() : text.replace(/^ /, '␣');
// "letter S", "parent 3": planted features have their kind in their name.
const withKind = (kind, name) => name.startsWith(kind) ? name : `${kind} ${name}`;
const itemLink = i => link({word: texts[items[i][0]]}, shownText(texts[items[i][0]]));
const latentLink = (k, j) => link({sae: k + 1, latent: j}, String(j));

function findItem(text) {
  const exact = items.findIndex(([t]) => texts[t] === text);
  if (exact >= 0) return exact;
  const plain = text.trim().toLowerCase();
  return items.findIndex(([t]) => texts[t].trim().toLowerCase() === plain);
}

// `groups` are [name, number of columns] of a row above the heads.
function table(heads, rows, kind = '', groups = []) {
  const numbers = n => rows.length && rows[0].cells[n].classList.contains('num');
  const head = element('tr', {}, ...heads.map((name, n) =>
    element('th', {scope: 'col', class: numbers(n) ? 'num' : ''}, name)));
  const above = groups.length ? [element('tr', {}, ...groups.map(([name, colspan]) =>
    name ? element('th', {scope: 'colgroup', colspan}, name) : element('td', {colspan})))] : [];
  const body = element('tbody', {}, ...rows);
  return element('table', {class: kind}, element('thead', {}, ...above, head), body);
}

function inBox(made, name) {
  return element('div', {class: 'scroll', role: 'region', tabindex: 0, 'aria-label': name}, made);
}
const cell = content => element('td', {}, content);
const numeric = x => element('td', {class: 'num'}, number(x));

// ---- the list of words

const scores = (k, i) => saes[k].items[i] || [null, null];
const badness = (k, i) => {
  const [full, fraction] = scores(k, i);
  return [full || 0, fraction || 0, items[i][2]];
};
const compare = (a, b) => {
  const place = a.findIndex((x, n) => x !== b[n]);
  return place < 0 ? 0 : b[place] - a[place];
};
const orders = saes.map((sae, k) => [
  saes.length > 1 ? `worst in ${sae.name} first` : 'worst first', i => badness(k, i),
]);
// Of both scores, the second SAE's less the first's; null where one of them has no score.
const change = (i, n) => {
  const [a, b] = [0, 1].map(k => scores(k, i)[n]);
  return a === null || b === null ? null : b - a;
};
if (two) {
  const apart = (i, ...which) => [...which.map(n => Math.abs(change(i, n))), items[i][2]];
  const fraction = ['largest difference in fraction first', i => apart(i, 1, 0)];
  const full = ['fully absorbed by one SAE only first', i => apart(i, 0, 1)];
  orders.unshift(...(terms.planted ? [['largest difference first', full[1]]] : [fraction, full]));
}
at('order').append(...orders.map(([name], n) => element('option', {value: n}, name)));
at('order').closest('label').hidden = orders.length < 2;

function sorted(target, order) {
  const key = orders[order][1];
  const chosen = items.map((_, i) => i).filter(i => !target || targets[items[i][1]] === target);
  const absorbed = chosen.filter(i => saes.some((_, k) => scores(k, i).slice(0, 2).some(x => x > 0)));
  const keyed = absorbed.map(i => [key(i), i]);
  return keyed.sort((a, b) => compare(a[0], b[0])).map(([, i]) => i);
}

function wordRow(i) {
  const [, target, A] = items[i];
  const cells = saes.flatMap((sae, k) => {
    const found = sae.items[i];
    if (!found) return [cell('–'), ...(terms.planted ? [] : [cell('–')]), cell('–')];
    const [full, fraction, , , absorbing] = found;
    const links = absorbing.flatMap((j, n) => [n ? ', ' : '', latentLink(k, j)]);
    const shown = terms.planted ? numeric(full) : cell(full ? 'yes' : 'no');
    const more = terms.planted ? [] : [numeric(fraction)];
    return [shown, ...more, element('td', {}, ...links)];
  });
  const last = two ? [element('td', {class: 'num'}, difference(change(i, terms.planted ? 0 : 1)))] : [];
  const row = element('tr', {}, cell(itemLink(i)), cell(targets[target]), numeric(A), ...cells, ...last);
  if (state().get('word') === texts[items[i][0]]) row.setAttribute('aria-current', 'true');
  return row;
}

// "Fully absorbed by both SAEs: 3 words, only by one: 5, only by two: 4."
function compared(found) {
  const count = (a, b) => found.filter(i =>
    a === Boolean(scores(0, i)[0]) && b === Boolean(scores(1, i)[0])).length;
  const verb = terms.planted ? 'Absorbed on some samples' : 'Fully absorbed';
  return `${verb} by both SAEs: ${count(true, true)} ${terms.items}, `
    + `only by ${saes[0].name}: ${count(true, false)}, only by ${saes[1].name}: ${count(false, true)}.`;
}

function showWords() {
  const found = sorted(at('target').value, Number(at('order').value));
  const kinds = terms.planted ? ['absorbed'] : ['fully absorbed', 'fraction'];
  const heads = [terms.item, terms.target, 'A', ...saes.flatMap(() => [...kinds, 'absorbing latents'])];
  if (two) heads.push(kinds[kinds.length - 1]);
  const groups = [['', 3], ...saes.map(({name}) => [name, kinds.length + 1])];
  if (two) groups.push(['difference', 1]);
  const rows = found.slice(0, limit).map(wordRow);
  const made = inBox(table(heads, rows, '', saes.length > 1 ? groups : []), terms.items);
  const count = element('p', {class: 'quiet'}, `${Math.min(limit, found.length)} of `
    + `${found.length} absorbed ${terms.items}. On this page: ${items.length} ${terms.items}.`);
  at('words').replaceChildren(...(two ? [element('p', {}, compared(found))] : []), made, count);
  if (found.length > limit) {
    const more = element('button', {type: 'button', class: 'more'}, 'Show more');
    more.addEventListener('click', () => { limit *= 2; showWords(); });
    at('words').append(more);
  }
}

// ---- a word

function bar(value, role, bounds, goal) {
  const place = x => 100 * (x - bounds[0]) / (bounds[1] - bounds[0]);
  const [left, right] = [place(Math.min(value, 0)), place(Math.max(value, 0))];
  const spot = (kind, style) => element('span', {class: kind, style});
  const track = element('span', {class: 'track', 'aria-hidden': 'true'});
  track.append(spot('zero', `left:${place(0)}%`));
  track.append(spot(`fill ${role}`, `left:${left}%;width:${right - left}%`));
  if (goal !== null) track.append(spot('goal', `left:${place(goal)}%`));
  return element('td', {class: 'track-cell'}, track);
}

const ROLES = {
  projection: 'activation', main: 'main', absorbing: 'absorbing', other: '', rest: '',
};

// What is drawn of a word: [what it is called, role, value], the projection first.
function pieces(k, i) {
  const [, , rest, sum, absorbing, pairs] = saes[k].items[i];
  const main = saes[k].main[items[i][1]] || [];
  const found = [[terms.planted ? 'A (mean)' : 'A', 'projection', items[i][2]]];
  let remainder = items[i][2] - sum;
  for (let n = 0; n < pairs.length; n += 2) {
    const [j, q] = pairs.slice(n, n + 2);
    const role = main.includes(j) ? 'main' : absorbing.includes(j) ? 'absorbing' : 'other';
    found.push([latentLink(k, j), role, q]);
    remainder -= q;
  }
  const zero = main.filter(j => !pairs.some((x, n) => n % 2 === 0 && x === j));
  found.push(...zero.map(j => [latentLink(k, j), 'main', 0]));
  if (rest) found.push([`${rest} more latents`, 'rest', sum]);
  found.push(['bias and error', 'rest', remainder]);
  return found;
}

function said(k, i) {
  const [full, fraction] = saes[k].items[i];
  if (terms.planted) return `Absorbed on ${number(100 * full)}% of the samples.`;
  const sentence = full ? 'Fully absorbed.' : 'Not fully absorbed.';
  return `${sentence} Fraction ${number(fraction)}.`;
}

function wordSide(k, i, bounds) {
  const heading = element('h3', {}, saes[k].name);
  if (!saes[k].items[i]) return element('div', {}, heading, element('p', {}, 'Not scored here.'));
  const rows = pieces(k, i).map(([name, role, q]) => element('tr', {'data-role': role},
    element('th', {scope: 'row'}, name), element('td', {class: 'role'}, ROLES[role]), numeric(q),
    bar(q, role, bounds, items[i][2])));
  const made = table(['latent', 'role', 'q', 'along p'], rows, 'bars');
  const caption = `Written along the direction of ${withKind(terms.target, targets[items[i][1]])}`;
  made.prepend(element('caption', {class: 'quiet'}, `${caption}; dashed line: A`));
  return element('div', {}, heading, element('p', {}, said(k, i)), made);
}

function legend() {
  const kinds = [['main', 'main latents'], ['absorbing', 'absorbing latents'], ['', 'others']];
  return element('p', {class: 'legend'}, ...kinds.map(([kind, name]) =>
    element('span', {}, element('span', {class: `swatch ${kind}`}), name)));
}

function showWord(text) {
  const i = text === null ? sorted('', 0)[0] ?? 0 : findItem(text);
  const name = shownText(i < 0 ? text : texts[items[i][0]]);
  const kind = terms.item[0].toUpperCase() + terms.item.slice(1);
  at('word').textContent = terms.planted ? name.replace(terms.item, kind) : `${kind}: ${name}`;
  if (i < 0) {
    at('word-view').replaceChildren(element('p', {}, `No such ${terms.item} on this page. `
      + terms.scope));
    return i;
  }
  const values = saes.flatMap((sae, k) => sae.items[i] ? pieces(k, i).map(p => p[2]) : []);
  const bounds = [Math.min(0, ...values), Math.max(0, ...values) || 1];
  const sides = saes.map((_, k) => wordSide(k, i, bounds));
  const about = `${withKind(terms.target, targets[items[i][1]])}, A = ${number(items[i][2])}`;
  at('word-view').replaceChildren(element('p', {class: 'quiet'}, about), legend(),
    element('div', {class: 'sides'}, ...sides));
  return i;
}

// ---- a latent

function topWords(found) {
  const rows = [];
  for (let n = 0; n < found.length; n += 2) {
    const text = texts[found[n]];
    const name = items.some(([t]) => t === found[n]) ? link({word: text}, shownText(text)) : shownText(text);
    rows.push(element('tr', {}, cell(name), numeric(found[n + 1])));
  }
  return table([terms.item, terms.planted ? 'mean z' : 'z'], rows);
}

function cosineBars(found, main) {
  const pairs = [];
  for (let n = 0; n < found.length; n += 2) pairs.push([found[n], found[n + 1] / 100]);
  const bounds = [Math.min(0, ...pairs.map(p => p[1])), Math.max(...pairs.map(p => p[1]), 0.01)];
  const named = name => {
    if (targets.includes(name)) return link({target: name}, name);
    return items.some(([t]) => texts[t] === name) ? link({word: name}, name) : name;
  };
  const rows = pairs.map(([n, cosine]) => element('tr', {},
    element('th', {scope: 'row'}, named(directions[n])), numeric(cosine),
    bar(cosine, main.includes(targets.indexOf(directions[n])) ? 'main' : 'other', bounds, null)));
  return table([terms.planted ? 'feature' : terms.target, 'cosine', 'cos(d, p)'], rows, 'bars');
}

// A line break in a token would break the line of the table.
const shownToken = text => text.replace(/\n/g, '↵').replace(/\t/g, '⇥');

// A context is [number of the first token, how many, then place and value where the latent is active].
function contextRow([start, length, ...pairs], largest) {
  const values = new Map();
  for (let n = 0; n < pairs.length; n += 2) values.set(pairs[n], pairs[n + 1]);
  const most = Math.max(...values.values());
  const parts = Array.from({length}, (_, n) => {
    const text = shownToken(tokens.texts[tokens.ids[start + n]]);
    const z = values.get(n);
    if (z === undefined) return text;
    return element('mark', {class: z === most ? 'largest' : '', title: `z = ${number(z)}`,
      style: `--share:${Math.max(z / largest, 0.15).toFixed(2)}`}, text);
  });
  return element('tr', {}, numeric(most), element('td', {class: 'context'}, ...parts));
}

function contexts(rate, found) {
  const heading = element('h3', {}, 'Contexts with the largest values');
  const count = tokens.ids.length.toLocaleString('en');
  if (!found) {
    const none = `Active on none of the ${count} tokens of the text.`;
    return [heading, element('p', {class: 'quiet'}, none)];
  }
  const about = `Active on ${number(100 * rate)}% of the ${count} tokens of the text. `
    + 'Tokens on which it is active are marked; the stronger the colour, the larger z.';
  const largest = Math.max(...found[0].slice(2).filter((_, n) => n % 2));
  const rows = found.map(context => contextRow(context, largest));
  return [heading, element('p', {class: 'quiet'}, about),
    inBox(table(['largest z', 'context'], rows, 'contexts'), 'contexts')];
}

function showLatent(k, j) {
  const found = saes[k] && saes[k].latents[j];
  const name = saes.length > 1 && saes[k] ? ` of ${saes[k].name}` : '';
  at('latent').textContent = `Latent ${j}${name}`;
  if (!found) {
    const problem = `It is active on no ${terms.item} here, or the SAE has no such latent.`;
    at('latent-view').replaceChildren(element('p', {}, problem));
    return;
  }
  const [rate, top, cosines, textRate, inText] = found;
  const main = saes[k].main.flatMap((latents, t) => (latents || []).includes(Number(j)) ? [t] : []);
  const about = `Active on ${number(100 * rate)}% of the ${terms.rows}. `
    + (main.length ? `Main latent of ${main.map(t => targets[t]).join(', ')}.`
      : `It is the main latent of no ${terms.target}.`);
  at('latent-view').replaceChildren(element('p', {class: 'quiet'}, about),
    element('div', {class: 'sides'},
      element('div', {}, element('h3', {}, `Largest on these ${terms.items}`),
        top.length ? topWords(top) : element('p', {class: 'quiet'}, 'Active on none of them.')),
      element('div', {}, element('h3', {}, 'Cosine of its decoder row and the directions'),
        cosineBars(cosines, main))),
    ...(tokens.ids.length ? contexts(textRate, inText) : []));
}

// ---- search

function search() {
  const asked = at('query').value.trim().toLowerCase();
  const ranked = [];
  if (asked) {
    for (const t of targets) {
      const name = withKind(terms.target, t);
      if ([t, name].some(x => x.toLowerCase() === asked)) ranked.push([0, link({target: t}, name)]);
    }
    const latent = asked.match(/^(?:latent )?(\d+)$/)?.[1];
    saes.forEach((sae, k) => {
      if (!sae.latents[latent]) return;
      const name = `latent ${latent}${saes.length > 1 ? ` of ${sae.name}` : ''}`;
      ranked.push([1, link({sae: k + 1, latent}, name)]);
    });
    items.forEach(([t], i) => {
      const place = texts[t].trim().toLowerCase().indexOf(asked);
      if (place < 0) return;
      const whole = texts[t].trim().length === asked.length;
      ranked.push([whole ? 0.5 : place ? 3 : 2, i]);
    });
  }
  ranked.sort((a, b) => a[0] - b[0]);
  const shown = ranked.slice(0, 12).map(([, x]) => typeof x === 'number' ? itemLink(x) : x);
  at('found').replaceChildren(...shown.map(a => element('li', {}, a)));
  at('count').textContent = asked ? `${ranked.length} found` : '';
}
at('query').addEventListener('input', search);
at('query').addEventListener('keydown', event => {
  const first = at('found').querySelector('a');
  if (event.key === 'Enter' && first) first.click();
});

// ---- what the address says

let before = new URLSearchParams();

function show(event) {
  const now = state();
  const changed = name => now.get(name) !== before.get(name);
  at('target').value = now.get('target') ?? '';
  if (changed('target')) limit = STEP;
  const i = showWord(now.get('word'));
  const k = Math.max(0, Number(now.get('sae') ?? 1) - 1);
  const absorbing = i < 0 ? [] : saes[k]?.items[i]?.[4] ?? [];
  const main = i < 0 ? [] : saes[k]?.main[items[i][1]] ?? [];
  showLatent(k, now.get('latent') ?? absorbing[0] ?? main[0] ?? Object.keys(saes[0].latents)[0]);
  showWords();
  search();
  const moved = [['latent', 'latent'], ['sae', 'latent'], ['word', 'word'], ['target', 'worst']]
    .find(([name]) => changed(name) && now.has(name));
  if (moved) {
    at(moved[1]).focus({preventScroll: true});
    at(moved[1]).scrollIntoView();
  }
  before = now;
}
at('target').addEventListener('input', () => {
  const address = state();
  if (at('target').value) address.set('target', at('target').value);
  else address.delete('target');
  history.replaceState(null, '', `#${address}`);
  before = address;
  limit = STEP;
  showWords();
});
at('order').addEventListener('input', () => { limit = STEP; showWords(); });
// Links of the table of letters keep the rest of the address.
at('targets').closest('section').addEventListener('click', event => {
  const href = event.target.closest('a')?.getAttribute('href');
  if (!href) return;
  event.preventDefault();
  location.hash = new URL(link(Object.fromEntries(new URLSearchParams(href.slice(1))), '').href).hash;
});
addEventListener('hashchange', show);
show();

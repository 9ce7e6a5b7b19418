// Dark and light: the system decides until the button is used, and the browser keeps the choice.
const root = document.documentElement;
const theme = document.getElementById('theme');
const memory = 'atm-sae theme';

function isDark() {
  if (root.dataset.theme) return root.dataset.theme === 'dark';
  return matchMedia('(prefers-color-scheme: dark)').matches;
}

function label() {
  theme.textContent = isDark() ? 'Light' : 'Dark';
  theme.setAttribute('aria-label', `Switch to ${isDark() ? 'light' : 'dark'} colours`);
}

try {
  if (localStorage.getItem(memory)) root.dataset.theme = localStorage.getItem(memory);
} catch (e) { /* some browsers have no storage for local files */ }

theme.addEventListener('click', () => {
  root.dataset.theme = isDark() ? 'light' : 'dark';
  try {
    localStorage.setItem(memory, root.dataset.theme);
  } catch (e) { /* as above */ }
  label();
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', label);
label();

// Print the folded explanations as well.
addEventListener('beforeprint', () => {
  document.querySelectorAll('details.read').forEach(d => { d.open = true; });
});

"""Our probe solvers beside scikit-learn's, at about the size of the absorption task.

python benchmarks/probes.py            # prints the table
python benchmarks/probes.py --quick    # does it run? the numbers mean nothing
python benchmarks/probes.py --write    # and puts it into README.md
"""

import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import sklearn
import torch
from absorption import large_task, word_sae
from common import heading, parsed, parser, spread, threads_used, write_readme
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from atm_sae.evals.absorption import encode_words
from atm_sae.evals.probes import balanced_weights, fit_l1_probes, fit_l2_probes, fit_logistic
from atm_sae.evals.probes import kkt_error, l1_max, l1_slope
from atm_sae.report.tables import to_markdown

BEGIN, END = "<!-- probes: begin -->", "<!-- probes: end -->"
SHARE = 0.01  # strength of the L1 penalty, as a share of l1_max


def words(n, d_sae, d_in):
    "A task of n random words, and its latents (n, d_sae) by an SAE whose latents carry words."
    task = large_task(n, d_in)
    return task, encode_words(word_sae(task, d_sae), task.x)[0].astype(float)


def timed(function, repeats):
    "What it returns, and the CPU seconds of each repetition."
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return result, seconds


def sklearn_l1(x, Y, tol, max_iter):
    "scikit-learn's saga, question by question: W (d, m), b (m,)."
    strengths, W, b = SHARE * l1_max(x, Y), [], []
    for y, strength in zip(Y.T, strengths):
        model = LogisticRegression(
            l1_ratio=1.0,
            C=1 / strength,
            solver="saga",
            class_weight="balanced",
            tol=tol,
            max_iter=max_iter,
            random_state=0,
        )
        model.fit(x, y)
        W.append(model.coef_[0])
        b.append(model.intercept_[0])
    return np.stack(W, 1), np.array(b)


def l1_error(x, Y, W, b):
    "The worst deviation from the optimality conditions, in units of the penalty."
    return kkt_error(l1_slope(x, Y, W, b), W.T, SHARE * l1_max(x, Y)).max()


def sklearn_l2(x, Y, tol):
    "scikit-learn's lbfgs, question by question: W (m, d), b (m,)."
    model = LogisticRegression(class_weight="balanced", tol=tol, max_iter=10_000)
    W, b = [], []
    for y in Y:
        model.fit(x, y)
        W.append(model.coef_[0].copy())
        b.append(model.intercept_[0])
    return torch.tensor(np.stack(W)), torch.tensor(np.array(b))


def l2_error(x, Y, W, b):
    "The largest entry of the gradient of the penalised loss; the penalty's strength is 1."
    s, t = balanced_weights(Y), 2.0 * Y - 1
    R = -s * t * torch.sigmoid(-t * (W @ x.T + b[:, None]))
    return float(torch.maximum((R @ x + W).abs().max(), R.sum(1).abs().max()))


def row(solver, seconds, ours, error):
    "A solver's line: its CPU seconds, how many times those of ours they are, and its error."
    times = statistics.median(seconds) / statistics.median(ours)
    return dict(solver=solver, seconds=spread(seconds), times=times, error=f"{error:.0e}")


def l1_table(x, Y, repeats, passes):
    "L1 probes of all letters on sparse latents."
    fit, ours = timed(lambda: fit_l1_probes(x, Y, SHARE), repeats)
    rows = [row("fit_l1_probes", ours, ours, l1_error(x, Y, *fit))]
    for n in passes:
        fit, seconds = timed(lambda n=n: sklearn_l1(x, Y, 1e-4, n), repeats)
        rows.append(row(f"saga, at most {n} passes", seconds, ours, l1_error(x, Y, *fit)))
    return pd.DataFrame(rows)


def l2_table(x, Y, repeats):
    "Letter probes on dense activations."

    def fit_all():
        W, b = zip(*(fit_logistic(x, y) for y in Y))
        return torch.stack(W), torch.stack(b)

    fit, ours = timed(fit_all, repeats)
    rows = [row("fit_logistic", ours, ours, l2_error(x, Y, *fit))]
    (W, b), seconds = timed(lambda: fit_l2_probes(x, Y.T), repeats)
    rows.append(row("fit_l2_probes", seconds, ours, l2_error(x, Y, W.T, b)))
    for tol in (1e-4, 1e-8):
        fit, seconds = timed(lambda tol=tol: sklearn_l2(x.numpy(), Y.numpy(), tol), repeats)
        rows.append(row(f"lbfgs, tol={tol:g}", seconds, ours, l2_error(x, Y, *fit)))
    return pd.DataFrame(rows)


def report(n, d_sae, d_in, letters, repeats, passes):
    "Both tables in Markdown."
    task, z = words(n, d_sae, d_in)
    Y = task.letter == torch.arange(letters)[:, None]
    versions = f"scikit-learn {sklearn.__version__}", f"torch {torch.__version__}"
    how = f"CPU seconds of {repeats} rounds, median [least, most]"
    l0 = (z > 0).sum() / n
    return "\n\n".join(
        [
            heading(threads_used(torch.get_num_threads()), how, *versions) + ".",
            f"**L1 probes**: {letters} letters, {n:,} words, {d_sae:,} latents, L0 = {l0:.1f}",
            to_markdown(l1_table(z, Y.T.numpy(), repeats, passes)),
            f"**L2 probes**: {letters} letters, {n:,} words, {d_in} dense inputs",
            to_markdown(l2_table(task.x.double(), Y, repeats)),
        ]
    )


def main():
    args = parsed(parser(__doc__.splitlines()[0], repeat=3, threads=1))
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)  # the error column shows it
    # also what each solver does once in a process, before anything is timed
    text = report(600, 64, 32, 3, 1, (10,))
    if not args.quick:
        text = report(5000, 1024, 128, 26, args.repeat, (100, 1000))
    print(text)
    if args.write:
        write_readme(text, BEGIN, END)


if __name__ == "__main__":
    main()
